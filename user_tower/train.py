"""The one training loop, for every backbone, for the ID baselines and for the joint stage."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from schemas.errors import TrainingError
from user_tower.loss import info_nce
from user_tower.model import Catalog, UserTower
from user_tower.negatives import Negatives, NegativeSampler, Sampling
from user_tower.sequences import Batch


class TrainConfig(BaseModel):
    """How long and how fast to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=50, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after so many optimiser steps, whatever the epoch."""
    batch_size: int = Field(default=64, gt=0)
    """Windows of histories in one step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=50, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    patience: int = Field(default=5, gt=0)
    """Validations without a better figure before training stops."""
    validate_every: int = Field(default=1, gt=0)
    """Epochs between validations."""
    negatives: int = Field(default=0, ge=0)
    """Negatives drawn a step, shared by its positions; 0 is the whole catalog."""
    sampling: Sampling = "uniform"
    """``uniform``, ``popularity``, ``in-batch`` (none is drawn) or ``mixed`` (in-batch and uniform); all but the
    first are corrected by logQ."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = 0


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


class UserStep(nn.Module):
    """Stage II's step: windows of histories over one open catalog to the loss."""

    def __init__(self, tower: UserTower, catalog: Catalog, sampler: NegativeSampler) -> None:
        super().__init__()
        self.tower = tower
        self.open_catalog = catalog
        self.sampler = sampler

    def forward(self, batch: Batch) -> Tensor:
        """The mean InfoNCE of the batch's positions, a scalar."""
        targets = torch.from_numpy(batch.targets[batch.targets >= 0]).to(self.open_catalog.groups.device)
        return sequence_loss(self.tower, self.open_catalog, batch, self.sampler.draw(targets))


def sequence_loss(tower: UserTower, catalog: Catalog, batch: Batch, negatives: Negatives) -> Tensor:
    """InfoNCE of every position of a batch against the negatives; a scalar."""
    device = catalog.groups.device
    items, lengths, targets, times = (torch.from_numpy(array).to(device) for array in batch)
    queries_PD = tower(catalog, items, lengths, times)[targets >= 0]
    target_rows = targets[targets >= 0]
    log_q_N = negatives.log_q
    return info_nce(
        queries_PD,
        tower.item_vectors(catalog, target_rows),
        tower.item_vectors(catalog, negatives.rows),
        catalog.groups[target_rows],
        catalog.groups[negatives.rows],
        tower.scale(),
        None if log_q_N is None else log_q_N[target_rows],
        None if log_q_N is None else log_q_N[negatives.rows],
    )


def _mixed_precision(precision: str) -> Literal["bf16", "no"]:
    if precision != "auto":
        return "bf16" if precision == "bfloat16" else "no"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


@dataclass
class _Loop:
    """What the epochs of one training share."""

    name: str
    accelerator: Accelerator
    step: nn.Module
    optimizer: torch.optim.Optimizer
    warmup: torch.optim.lr_scheduler.LRScheduler
    parameters: list[nn.Parameter]
    config: TrainConfig
    progress: tqdm
    result: FitResult = field(default_factory=FitResult)

    @property
    def out_of_steps(self) -> bool:
        return self.result.steps == self.config.max_steps

    def epoch(self, batches: Iterable[Batch]) -> float:
        """Train on the batches, up to ``max_steps`` in all; returns their mean loss. Raises TrainingError."""
        started, first, loss_sum = time.perf_counter(), self.result.steps, 0.0
        self.step.train()
        for batch in batches:
            loss = self.step(batch)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.name}: the loss is {value} at step {self.result.steps}; lower the learning rate "
                    f"({self.config.learning_rate}), or check the item vectors"
                )
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm)
            self.optimizer.step()
            self.warmup.step()
            self.optimizer.zero_grad()
            loss_sum += value
            self.result.steps += 1
            self.result.positions += int((batch.targets >= 0).sum())
            self.progress.update()
            if self.out_of_steps:
                break
        self.result.seconds += time.perf_counter() - started
        self.result.epochs += 1
        self.step.eval()
        return loss_sum / max(1, self.result.steps - first)


def fit(
    step: nn.Module,
    parameter_groups: list[dict],
    epoch_batches: Callable[[int], Iterable[Batch]],
    validate: Callable[[], dict[str, float]],
    config: TrainConfig,
    *,
    name: str,
    metric: str,
) -> FitResult:
    """Train ``step`` (a module from Batch to loss) and leave it with the weights of the best validation.

    parameter_groups: as for an optimiser, each with its "params" and optionally its "lr".
    epoch_batches: epoch number -> its batches. validate: figures of the current weights; ``metric`` decides.
    Raises TrainingError when the loss is not finite.
    """
    # the precision of the first training in a process would be that of all: a later one may be set differently
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=_mixed_precision(config.precision))
    optimizer = torch.optim.AdamW(
        parameter_groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    ramp = config.warmup_steps + 1
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: min(1.0, (number + 1) / ramp))
    step, optimizer, warmup = accelerator.prepare(step, optimizer, warmup)
    parameters = [parameter for group in parameter_groups for parameter in group["params"]]
    best_state, stale = None, 0
    with tqdm(total=config.max_steps, desc=name, unit="step", mininterval=2) as progress:
        loop = _Loop(name, accelerator, step, optimizer, warmup, parameters, config, progress)
        result = loop.result
        for epoch in range(config.epochs):
            loss = loop.epoch(epoch_batches(epoch))
            last = result.epochs == config.epochs or loop.out_of_steps
            if not last and result.epochs % config.validate_every:
                continue
            figures = {"loss": loss, **validate()}
            result.curve.append({"step": result.steps, "epoch": result.epochs, **figures})
            progress.set_postfix({metric: f"{figures[metric]:.4f}", "loss": f"{figures['loss']:.3f}"})
            if not result.best or figures[metric] > result.best[metric]:
                result.best, stale = figures, 0
                best_state = copy.deepcopy(accelerator.unwrap_model(step).state_dict())
            else:
                stale += 1
            if last or stale >= config.patience:
                break
    model = accelerator.unwrap_model(step)
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return result
