"""Stage I: both towers tuned together; each distinct item of a batch is encoded once (DESIGN 7).

Shapes: B windows, T positions, M distinct items of the batch, D item vector.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from item_tower.encoder import ItemEncoder
from user_tower.model import Catalog, UserTower, UserTowerConfig
from user_tower.negatives import Negatives
from user_tower.sequences import Batch
from user_tower.train import TrainConfig, sequence_loss


class JointConfig(BaseModel):
    """Stage I: how the Item LLM is tuned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_tower: UserTowerConfig = UserTowerConfig()
    """The small user tower that teaches the Item LLM."""
    train: TrainConfig = TrainConfig(epochs=2, batch_size=64, warmup_steps=10)
    """``learning_rate`` is the user tower's; ``negatives`` are drawn from the catalog beside the batch's items."""
    warmup_epochs: int = Field(default=6, ge=0)
    """Epochs of the small user tower alone, on the untuned vectors, before the two are tuned together: cheap, and
    the Item LLM then learns from a tower that already predicts something."""
    item_learning_rate: float = Field(default=1e-4, gt=0)
    token_budget: int = Field(default=2_048, gt=0)
    """Padded tokens of one forward pass of the Item LLM."""


def _fast_backward(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward takes a third of a step on short texts (0.41 of the matmul rate,
    against 0.64 with plain matrix products); its forward is no faster. A GPU keeps its fused kernels."""
    backend: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return backend if device.type == "cpu" else nullcontext()


class JointStep(nn.Module):
    """Windows of histories to the joint loss, through the Item LLM."""

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
        self.groups = groups
        self.config = config
        self.items_encoded = 0  # texts that went through the Item LLM
        self.items_unique = 0  # distinct texts of each batch, summed: the least that could go through

    def forward(self, batch: Batch) -> Tensor:
        """The batch's mean InfoNCE; all its distinct items are candidates of every position."""
        real = batch.targets >= 0
        needed = [batch.items[real], batch.targets[real]]
        if self.config.train.negatives:
            needed.append(torch.randint(len(self.token_ids), (self.config.train.negatives,)).numpy())
        rows = np.unique(np.concatenate(needed))
        # texts that are the same are encoded once, however many items carry them
        groups, texts, place = np.unique(self.groups[rows].numpy(), return_index=True, return_inverse=True)
        distinct = [self.token_ids[row] for row in rows[texts]]
        with _fast_backward(self.encoder.device):
            vectors_MD = self.encoder.encode_ids(distinct, self.config.token_budget)
        local = np.zeros(len(self.token_ids), dtype=np.int64)
        local[rows] = place
        catalog = Catalog(F.normalize(vectors_MD, dim=-1), None, torch.from_numpy(groups).to(vectors_MD.device))
        small = Batch(
            np.where(real, local[batch.items], 0),
            batch.lengths,
            np.where(real, local[np.maximum(batch.targets, 0)], -1),
            batch.times,
        )
        if self.training:
            self.items_encoded += len(vectors_MD)
            self.items_unique += len(groups)
        negatives = Negatives(torch.arange(len(groups), device=vectors_MD.device), None)
        return sequence_loss(self.tower, catalog, small, negatives)

    def train(self, mode: bool = True) -> JointStep:
        """Dropout stays off in the Item LLM: what is tuned is the network whose vectors are cached."""
        super().train(mode)
        self.encoder.eval()
        return self

    def parameter_groups(self) -> list[dict]:
        """The two towers with a learning rate each."""
        return [
            {"params": list(self.encoder.parameters()), "lr": self.config.item_learning_rate},
            {"params": list(self.tower.parameters()), "lr": self.config.train.learning_rate},
        ]
