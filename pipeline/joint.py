"""Stage I: both towers tuned together; each distinct item of a batch is encoded once (DESIGN 7).

Shapes: B windows, T positions, M distinct items of the batch, D item vector.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from item_tower.decoders.layers import checkpoint_layers, compile_layers, mark_training
from item_tower.encoder import ItemEncoder
from schemas.errors import TrainingError
from user_tower.lora import LoraSettings
from user_tower.loss import share_apart
from user_tower.model import Catalog, UserTower, UserTowerConfig
from user_tower.negatives import Negatives
from user_tower.sequences import Batch, IntArray
from user_tower.steps import sequence_loss, use_settings
from user_tower.train import TrainConfig


class JointConfig(BaseModel):
    """Stage I: how the Item LLM is tuned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_tower: UserTowerConfig = UserTowerConfig()
    """The small user tower that teaches the Item LLM."""
    train: TrainConfig = TrainConfig(epochs=2, batch_size=64, warmup_steps=10, checkpoint_steps=50)
    """``learning_rate`` is the user tower's; ``negatives`` are drawn from the catalog beside the batch's items, by
    default none."""
    warmup_epochs: int = Field(default=6, ge=0)
    """Epochs of the small user tower alone, on the untuned vectors, before the two are tuned together: cheap, and
    the Item LLM then learns from a tower that already predicts something."""
    item_learning_rate: float = Field(default=1e-4, gt=0)
    lora: LoraSettings | None = None
    """Tune low-rank adapters and merge them at the end; by default all weights are tuned."""
    token_budget: int = Field(default=2_048, gt=0, exclude=True)
    """Padded tokens of one forward pass of the Item LLM. Decides no figure."""
    graph_tokens: int = Field(default=16_384, gt=0, exclude=True)
    """Padded tokens whose activations are kept for the backward pass; those of larger batches are computed twice.
    Decides no figure."""
    near: float = Field(default=0.99, gt=0, le=1)
    """A negative whose cosine with the positive is above this is masked: it is taken for the same item."""
    collapse_floor: float = Field(default=0.5, ge=0, le=1)
    """Training stops when the share of pairs of items that differ (cosine at most ``near``) stays below this."""
    collapse_steps: int = Field(default=20, gt=0)
    """For so many steps on end."""


def distinct_texts(
    batch: Batch, groups: IntArray, negatives: int | None, seed: int
) -> tuple[IntArray, IntArray, IntArray]:
    """What a step encodes: catalog rows that it needs; of which of them each distinct text is read; the text of each
    row.

    groups: [N], as in ``JointStep``; negatives: drawn from the catalog beside the batch's items, None
    for none.
    """
    real = batch.targets >= 0
    needed = [batch.items[real], batch.targets[real]]
    if negatives:
        needed.append(np.random.default_rng(seed).integers(len(groups), size=negatives))
    rows = np.unique(np.concatenate(needed))
    # texts that are the same are encoded once, however many items carry them
    _, texts, place = np.unique(groups[rows], return_index=True, return_inverse=True)
    return rows, texts, place


class JointStep(nn.Module):
    """Windows of histories to the joint loss, through the Item LLM; a ``step`` of ``user_tower.train.fit``.

    In several processes each encodes its share of the batch's distinct items, and all vectors are gathered, with
    gradients: every position meets every candidate, and no text is encoded twice.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        tower: UserTower,
        token_ids: list[list[int]],
        groups: Tensor,
        config: JointConfig,
    ) -> None:
        """token_ids: N tokenised texts; groups: int64 [N], items of the same text share a number."""
        super().__init__()
        self.encoder = encoder
        self.tower = tower
        self.token_ids = token_ids
        self.groups = groups.numpy()
        self.config = config
        encoder.packing = config.train.packing
        use_settings(tower, config.train)
        if config.train.gradient_checkpointing:
            checkpoint_layers(encoder.model)
        if config.train.compile:
            compile_layers(encoder.model)
        self.counts: Tensor
        # a buffer, so that a training that goes on from a checkpoint counts on
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.apart: list[float] = []  # of each step, see ``share_apart``

    @property
    def items_encoded(self) -> int:
        """Texts that went through the Item LLM in training."""
        return int(self.counts[0])

    @property
    def items_unique(self) -> int:
        """Distinct texts of each batch, summed: the least that could go through."""
        return int(self.counts[1])

    def forward(self, batch: Batch, own: Batch, seed: int) -> Tensor:
        """The mean InfoNCE of ``own``; all distinct items of ``batch`` are candidates of every position.

        Raises TrainingError when the items' vectors have collapsed.
        """
        rows, texts, place = distinct_texts(batch, self.groups, self.config.train.negatives, seed)
        encoded_MD = self._encode([self.token_ids[row] for row in rows[texts]])
        vectors_MD = F.normalize(encoded_MD, dim=-1)
        local = np.zeros(len(self.token_ids), dtype=np.int64)
        local[rows] = place
        numbers = torch.arange(len(texts), device=vectors_MD.device)
        small = Batch(
            np.where(np.arange(own.items.shape[1]) < own.lengths[:, None], local[own.items], 0),
            own.lengths,
            np.where(own.targets >= 0, local[np.maximum(own.targets, 0)], -1),
            own.times,
        )
        if self.training:
            self.counts += torch.tensor([len(vectors_MD), len(texts)], device=self.counts.device)
            self._guard(vectors_MD)
        catalog = Catalog(vectors_MD, None, numbers, encoded_MD.norm(dim=-1))
        return sequence_loss(self.tower, catalog, small, Negatives(numbers, None), self.config.near)

    def _encode(self, distinct: list[list[int]]) -> Tensor:
        """Vectors of M tokenised texts, float32 [M, D], in every process."""
        config = self.config
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.encoder.encode_ids(distinct, config.token_budget, config.graph_tokens)
        rank, world = dist.get_rank(), dist.get_world_size()
        own = distinct[rank::world] or distinct[:1]
        vectors = self.encoder.encode_ids(own, config.token_budget, config.graph_tokens)
        most = -(-len(distinct) // world)
        parts = all_gather(F.pad(vectors, (0, 0, 0, most - len(vectors))))
        return torch.stack(list(parts), dim=1).flatten(0, 1)[: len(distinct)]

    def _guard(self, vectors_MD: Tensor) -> None:
        config = self.config
        self.apart.append(share_apart(vectors_MD.detach(), config.near))
        last = self.apart[-config.collapse_steps :]
        if len(last) == config.collapse_steps and max(last) < config.collapse_floor:
            raise TrainingError(
                f"tune-items: the items' vectors have collapsed: of the pairs of different texts only {last[-1]:.1%} "
                f"have a cosine of at most {config.near}, for {len(last)} steps less than tune.collapse_floor = "
                f"{config.collapse_floor:.0%}; lower tune.item_learning_rate ({config.item_learning_rate}), take "
                f"more different items a step (tune.train.batch_size, tune.train.negatives), or see whether the "
                f"texts differ within encoder.max_length ({self.encoder.config.max_length} tokens)"
            )

    def train(self, mode: bool = True) -> JointStep:
        """Dropout stays off in the Item LLM: what is tuned is the network whose vectors are cached. Adapters keep
        theirs."""
        super().train(mode)
        self.encoder.eval()
        mark_training(self.encoder, mode and self.config.train.gradient_checkpointing)
        for name, module in self.encoder.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def parameter_groups(self) -> list[dict]:
        """The two towers with a learning rate each."""
        return [
            {"params": list(self.encoder.parameters()), "lr": self.config.item_learning_rate},
            {"params": list(self.tower.parameters()), "lr": self.config.train.learning_rate},
        ]
