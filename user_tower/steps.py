"""Stage II's step: histories over one open catalog to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from item_tower.decoders.layers import checkpoint_layers, compile_layers
from user_tower.backbones import HSTU, CausalLM, SASRec
from user_tower.loss import info_nce
from user_tower.model import Catalog, UserTower
from user_tower.negatives import Negatives, NegativeSampler
from user_tower.sequences import Batch
from user_tower.train import TrainConfig


class UserStep(nn.Module):
    """Windows of histories over one open catalog to the loss; a ``step`` of ``user_tower.train.fit``."""

    def __init__(
        self, tower: UserTower, catalog: Catalog, sampler: NegativeSampler, config: TrainConfig | None = None
    ) -> None:
        super().__init__()
        if config is not None:
            use_settings(tower, config)
        self.tower = tower
        self.open_catalog = catalog
        self.sampler = sampler

    def forward(self, batch: Batch, own: Batch, seed: int) -> Tensor:
        """The mean InfoNCE of this process's positions, against negatives that all processes share; a scalar."""
        targets = torch.from_numpy(batch.targets[batch.targets >= 0]).to(self.open_catalog.groups.device)
        return sequence_loss(self.tower, self.open_catalog, own, self.sampler.draw(targets, seed))


def use_settings(tower: UserTower, config: TrainConfig) -> None:
    """Let a tower compute as a training says: packed, checkpointed, compiled. None of it changes a figure."""
    backbone = tower.backbone
    if isinstance(backbone, CausalLM):
        backbone.packing = config.packing
        if config.gradient_checkpointing:
            checkpoint_layers(backbone.model)
        if config.compile:
            compile_layers(backbone.model)
    else:
        assert isinstance(backbone, SASRec | HSTU)
        backbone.checkpointing = config.gradient_checkpointing


def sequence_loss(
    tower: UserTower, catalog: Catalog, batch: Batch, negatives: Negatives, near: float | None = None
) -> Tensor:
    """InfoNCE of every position of a batch against the negatives, ``near`` as in ``info_nce``; a scalar."""
    device = catalog.groups.device
    items, lengths, targets, times = (torch.from_numpy(array).to(device) for array in batch)
    queries_PD = tower(catalog, items, lengths, times)[targets >= 0]
    return query_loss(tower, catalog, queries_PD, targets[targets >= 0], negatives, near)


def query_loss(
    tower: UserTower,
    catalog: Catalog,
    queries_PD: Tensor,
    target_rows: Tensor,
    negatives: Negatives,
    near: float | None = None,
) -> Tensor:
    """InfoNCE of queries, float32 [P, D], towards their targets, int64 [P] catalog rows; a scalar."""
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
        near,
    )
