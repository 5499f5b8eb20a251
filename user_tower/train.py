"""The one training loop, for every backbone, for the ID baselines, for the joint stage and for the rankers.

Everything random in a step follows from the seed, the number of the step and the rank of the process, so a
training that goes on from a checkpoint, and one that is divided among processes, is the same training.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from item_tower.decoders.packed import Packing
from item_tower.decoders.precision import default_device, fast_bfloat16
from schemas.errors import ConfigError, TrainingError
from user_tower.lora import LoraSettings
from user_tower.negatives import Sampling

# the main process validates while the others wait
_PATIENCE = datetime.timedelta(hours=6)


class StepBatch(Protocol):
    """What one step trains on, of all processes together."""

    @property
    def positions(self) -> int:
        """What the loss is a mean over."""
        ...

    def share(self, rank: int, world: int) -> Self:
        """The part of one of ``world`` processes; never empty, though its ``positions`` may be 0."""
        ...


class EpochBatches(Protocol):
    """The batches of one epoch, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[StepBatch]: ...


class TrainConfig(BaseModel):
    """How long and how fast to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=50, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after so many optimiser steps, whatever the epoch."""
    batch_size: int = Field(default=64, gt=0)
    """Windows of histories in one step, of all processes together."""
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=50, ge=0)
    decay: float = Field(default=0.0, ge=0, le=1)
    """The last share of ``epochs``, or of ``max_steps``, in which the learning rate falls to zero along half a
    cosine: 1 is the schedule of the paper's code, 0 keeps the rate. It wants ``epochs`` that training does take."""
    clip_norm: float = Field(default=1.0, gt=0)
    patience: int = Field(default=5, gt=0)
    """Validations without a better figure before training stops."""
    validate_every: int = Field(default=1, gt=0)
    """Epochs between validations."""
    negatives: int | None = Field(default=None, ge=0)
    """Negatives drawn a step, shared by its positions; 0 is the whole catalog. None: the whole catalog up to 16,384
    items, 8,192 draws beyond, where its cost is most of a step's."""
    sampling: Sampling = "uniform"
    """``uniform``, ``popularity``, ``in-batch`` (none is drawn) or ``mixed`` (in-batch and uniform); all but the
    first are corrected by logQ."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = Field(default=0, ge=0)
    lora: LoraSettings | None = None
    """Train adapters on an ``llm`` backbone and merge them at the end; by default all its weights are trained."""
    warm_start: str | None = None
    """Begin with the weights of a user tower: its id, or ``newest``; by default with random ones."""
    checkpoint_steps: int = Field(default=500, gt=0, exclude=True)
    """Steps between checkpoints; a killed training goes on from the last one. Decides no figure."""
    packing: Packing = Field(default="auto", exclude=True)
    """Histories of an ``llm`` backbone, and in stage I the texts of a decoder, in one row without padding, or padded;
    ``auto``: packed on a GPU. Decides no figure."""
    gradient_checkpointing: bool = Field(default=False, exclude=True)
    """Keep only the inputs of each layer for the backward pass and compute the layer again there, in both towers:
    less memory, more time. Decides no figure."""
    compile: bool = Field(default=False, exclude=True)
    """``torch.compile`` the transformers models in training, for any length of row. The first step takes minutes."""

    @model_validator(mode="after")
    def _popularity_draws(self) -> TrainConfig:
        if self.sampling == "popularity" and self.negatives == 0:
            raise ValueError(
                "negatives = 0 is the whole catalog, and sampling = 'popularity' draws: ask for 1 or more"
            )
        return self


@dataclass
class FitResult:
    """What a training did; the model is left with its best weights."""

    steps: int = 0
    epochs: int = 0
    positions: int = 0
    seconds: float = 0.0  # in training steps, validation not counted
    best: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def positions_per_second(self) -> float:
        """Real (unpadded) target positions per second of training."""
        return self.positions / self.seconds if self.seconds else 0.0


def _mixed_precision(precision: str) -> Literal["bf16", "no"]:
    if precision != "auto":
        return "bf16" if precision == "bfloat16" else "no"
    return "bf16" if fast_bfloat16(default_device()) else "no"


def _accelerator(precision: str) -> Accelerator:
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "this training cannot shard its weights: one process validates and saves, and would wait for the others "
            "for ever; launch without FSDP (jobs/configs/multi-gpu.yaml), and save memory by "
            "train.gradient_checkpointing, tune.graph_tokens or LoRA"
        )
    # the precision of the first training in a process would be that of all: a later one may be set differently
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # without it several processes on a CPU would not know of each other
        mixed_precision=_mixed_precision(precision),
        kwargs_handlers=[
            # under ``dot`` the temperature has no gradient, and a small batch leaves parts of a tower out
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )


def is_main_process() -> bool:
    """Whether this process is the one that writes and reports; true when there is only one."""
    return bool(_accelerator("float32").is_main_process)


def has_checkpoint(folder: Path) -> bool:
    """Whether ``fit`` would go on from a checkpoint there."""
    return any(folder.glob("step-*"))


def step_seed(*parts: int) -> int:
    """A seed from some numbers, such as seed and step; 0 to 2^63 - 1."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def rate_factor(steps: int, done: float, config: TrainConfig) -> float:
    """What a learning rate is multiplied by for the step after so many: a linear ramp, and half a cosine at the end.

    done: share of the training that lies behind, 0 to 1.
    """
    ramp = min(1.0, (steps + 1) / (config.warmup_steps + 1))
    falling = (done - 1 + config.decay) / config.decay if config.decay else 0.0
    return ramp * 0.5 * (1 + math.cos(math.pi * max(0.0, falling)))


@dataclass
class _Place:
    """Where a training stands beside its weights and optimiser; what a checkpoint carries of it."""

    result: FitResult = field(default_factory=FitResult)
    batches: int = 0  # of the epoch under way
    loss_sum: float = 0.0  # of those batches
    stale: int = 0  # validations since the best one
    finished: bool = False
    best_weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "result": asdict(self.result)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.result = FitResult(**state["result"])


class _Loop:
    """What the epochs of one training share."""

    def __init__(
        self, step: nn.Module, parameter_groups: list[dict], config: TrainConfig, name: str, checkpoints: Path | None
    ) -> None:
        self.name, self.config, self.checkpoints = name, config, checkpoints
        self.accelerator = _accelerator(config.precision)
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in parameter_groups]
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.step, self.optimizer = self.accelerator.prepare(step, optimizer)
        self.place = _Place()
        self.accelerator.register_for_checkpointing(self.place)
        self._resume()

    @property
    def model(self) -> nn.Module:
        """The step without its wrappers."""
        model: nn.Module = self.accelerator.unwrap_model(self.step)
        return model

    @property
    def out_of_steps(self) -> bool:
        return self.place.result.steps == self.config.max_steps

    def epoch(self, batches: EpochBatches, progress: tqdm) -> float:
        """Train on what is left of the epoch, up to ``max_steps`` in all; returns its mean loss.

        Raises TrainingError.
        """
        place, result = self.place, self.place.result
        count, started = len(batches), time.perf_counter()
        self.step.train()
        for batch in itertools.islice(batches, place.batches, None):
            self._set_rates(count)
            place.loss_sum += self._step(batch)
            place.batches += 1
            result.steps += 1
            result.positions += batch.positions
            progress.update()
            if self.out_of_steps:
                break
            if result.steps % self.config.checkpoint_steps == 0:
                result.seconds += time.perf_counter() - started
                self.save()
                started = time.perf_counter()
        result.seconds += time.perf_counter() - started
        result.epochs += 1
        self.step.eval()
        loss = place.loss_sum / max(1, place.batches)
        place.batches, place.loss_sum = 0, 0.0
        return loss

    def _set_rates(self, batches: int) -> None:
        """The learning rates of the next step, in an epoch of so many batches."""
        place, config = self.place, self.config
        done = (place.result.epochs + place.batches / batches) / config.epochs
        if config.max_steps is not None:
            done = max(done, place.result.steps / config.max_steps)
        factor = rate_factor(place.result.steps, done, config)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _step(self, batch: StepBatch) -> float:
        accelerator, number = self.accelerator, self.place.result.steps
        rank, world = accelerator.process_index, accelerator.num_processes
        own = batch.share(rank, world)
        torch.manual_seed(step_seed(self.config.seed, number, rank + 1))
        # gradients are averaged over the processes: this weight makes that the mean over all positions
        weight = world * own.positions / max(1, batch.positions)
        loss = self.step(batch, own, step_seed(self.config.seed, number)) * weight
        value = accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.name}: the loss is {value} at step {number}; lower the learning rate "
                f"({self.config.learning_rate}), or check the item vectors"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def judge(self, figures: dict[str, float], metric: str) -> None:
        """Take in a validation: keep the weights when they are the best so far."""
        place, result = self.place, self.place.result
        result.curve.append({"step": result.steps, "epoch": result.epochs, **figures})
        if not result.best or figures[metric] > result.best[metric]:
            result.best, place.stale = figures, 0
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            place.best_weights = copy.deepcopy({name: parameter.detach() for name, parameter in trained})
        else:
            place.stale += 1
        last = result.epochs >= self.config.epochs or self.out_of_steps
        place.finished = last or place.stale >= self.config.patience

    def validate(self, figures: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The figures of the main process, in every process."""
        found = [figures() if self.accelerator.is_main_process else {}]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return found[0]

    def save(self) -> None:
        """Put a checkpoint in place of the last one; it is whole, or it is not there."""
        if self.checkpoints is None:
            return
        result = self.place.result
        made = self.checkpoints / f"step-{result.steps:09d}-epoch-{result.epochs:06d}"
        part = self.checkpoints / "part"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            older = list(self.checkpoints.glob("step-*"))
            part.rename(made)
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)

    def _resume(self) -> None:
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints else []
        if not found:
            return
        try:
            self.accelerator.load_state(str(found[-1]))
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise TrainingError(
                f"{self.name}: checkpoint {found[-1]} cannot be read ({type(error).__name__}); remove the folder and "
                f"train from the beginning"
            ) from error

    def close(self) -> None:
        """Leave the model with its best weights."""
        if self.place.best_weights is not None:
            self.model.load_state_dict(self.place.best_weights, strict=False)
        self.model.eval()


def fit(
    step: nn.Module,
    parameter_groups: list[dict],
    epoch_batches: Callable[[int], EpochBatches],
    validate: Callable[[], dict[str, float]],
    config: TrainConfig,
    *,
    name: str,
    metric: str,
    checkpoints: Path | None = None,
) -> FitResult:
    """Train ``step`` and leave it with the weights of the best validation.

    step: ``forward(batch, own, seed)`` is the mean loss over the positions of ``own``, this process's rows of the
    step's batch; seed: of the random draws that all processes share. parameter_groups: as for an optimiser, each
    with its "params" and optionally its "lr". epoch_batches: epoch number -> its batches, the same in every process
    and every time. validate: figures of the current weights; ``metric`` decides. checkpoints: a folder of this
    training alone, from which a killed one goes on; who calls removes it when what was trained is safe. Raises
    TrainingError when the loss is not finite or a checkpoint is damaged.
    """
    loop = _Loop(step, parameter_groups, config, name, checkpoints)
    place = loop.place
    bar = tqdm(
        total=config.max_steps,
        initial=place.result.steps,
        desc=name,
        unit="step",
        mininterval=2,
        disable=not loop.accelerator.is_main_process,
    )
    with bar as progress:
        while not place.finished:
            loss = loop.epoch(epoch_batches(place.result.epochs), progress)
            last = place.result.epochs >= config.epochs or loop.out_of_steps
            if last or place.result.epochs % config.validate_every == 0:
                figures = {"loss": loss, **loop.validate(validate)}
                loop.judge(figures, metric)
                progress.set_postfix({metric: f"{figures[metric]:.4f}", "loss": f"{figures['loss']:.3f}"})
                loop.save()
    loop.close()
    return place.result
