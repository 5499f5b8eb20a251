"""Recommenders as the evaluation sees them: popularity, item-kNN and a user tower (DESIGN 9).

Shapes: B histories, N catalog items, D vector width, m items of each history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.scores import Dense, Product, Scores, longest
from user_tower.model import Catalog, UserTower
from user_tower.sequences import Histories, last_events

KNN_EVENTS = 20


class Recommender(Protocol):
    """Scores a catalog for some histories; higher is better."""

    def score(self, histories: Histories) -> Scores:
        """Scores of B histories against N items, made as they are asked for."""
        ...


class Popularity:
    """Training counts, the same for everyone."""

    def __init__(self, training: Histories, catalog: int) -> None:
        counts = np.bincount(training.items, minlength=catalog)
        self.counts = torch.from_numpy(counts.astype(np.float32))

    def score(self, histories: Histories) -> Scores:
        """Training counts: whole numbers, equal or not."""
        return Dense(self.counts.expand(len(histories), -1), tolerance=0.0)


class ItemKNN:
    """Cosine between item columns of the training user-item matrix, summed over the last 20 events."""

    def __init__(self, training: Histories, catalog: int) -> None:
        users = np.repeat(np.arange(len(training)), training.lengths)
        pairs = np.unique(np.stack([users, training.items]), axis=1)
        norms = np.sqrt(np.bincount(pairs[1], minlength=catalog).astype(np.float64))
        weights = (1.0 / np.maximum(norms, 1.0))[pairs[1]]
        self.matrix = torch.sparse_coo_tensor(
            torch.from_numpy(pairs), torch.from_numpy(weights), (len(training), catalog), check_invariants=False
        ).to_sparse_csr()
        self.transposed = self.matrix.to_sparse_coo().t().to_sparse_csr()

    def score(self, histories: Histories) -> Scores:
        """Summed cosines; float64 sums, so that equal sums tie."""
        recent = last_events(histories, KNN_EVENTS)
        wanted = torch.zeros(self.matrix.shape[1], len(histories), dtype=torch.float64)
        for row, length in enumerate(recent.lengths):
            events = torch.from_numpy(recent.items[row, :length])
            wanted[:, row].index_add_(0, events, torch.ones(int(length), dtype=torch.float64))
        return Dense((self.transposed @ (self.matrix @ wanted)).T.float())


class TowerRecommender:
    """A user tower over an open catalog."""

    def __init__(self, tower: UserTower, catalog: Catalog) -> None:
        self.tower = tower.eval()
        self.catalog = catalog
        with torch.inference_mode():
            self.candidates = tower.item_vectors(catalog).float()
            self.longest = longest(self.candidates)

    @torch.inference_mode()
    def queries(self, histories: Histories) -> Tensor:
        """float32 [B, D]; zero for an empty history."""
        batch = last_events(histories, self.tower.config.history)
        device = self.candidates.device
        items = torch.from_numpy(batch.items).to(device)
        lengths = torch.from_numpy(batch.lengths).to(device)
        times = torch.from_numpy(batch.times).to(device)
        vectors = self.tower.queries(self.catalog, items, lengths.clamp(min=1), times)
        return torch.where(lengths[:, None] > 0, vectors, torch.zeros_like(vectors))

    @torch.inference_mode()
    def score(self, histories: Histories) -> Scores:
        """Inner products; cosines where the tower normalises."""
        return Product(self.queries(histories), self.candidates, self.longest)


# run name -> what makes it of the training histories and the number of items
BASELINES: dict[str, Callable[[Histories, int], Recommender]] = {"popularity": Popularity, "item-knn": ItemKNN}
