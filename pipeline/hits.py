"""The best neighbours of each query so far, and hits that are better than the last of them.

Legend: Q queries, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64  # queries whose hits are put side by side


class Best(NamedTuple):
    """scores float32 and places int64 [Q, k], best first; -inf and -1 where fewer are known."""

    scores: Tensor
    places: Tensor

    @property
    def floor(self) -> Tensor:
        """[Q] what a vector must exceed to come in."""
        return self.scores[:, -1]


class Hits(NamedTuple):
    """Single scores that exceed a floor, in any order of queries. owners: int64 [h], the query of each; scores:
    float32 [h]; places: int64 [h]."""

    owners: Tensor
    scores: Tensor
    places: Tensor


def merge(best: Best, met: list[Hits], each: Callable[..., Any] = map) -> None:
    """Take hits into ``best``, in place. Of equal scores those of ``best`` stand first, then the hits in their order.

    each: ``map``, or that of a pool of threads.
    """
    owners, scores, places = (torch.cat(part) for part in zip(*met, strict=True))
    order = torch.from_numpy(np.argsort(owners.numpy().astype(np.min_scalar_type(len(best.scores))), kind="stable"))
    scores, places = scores[order], places[order]  # those of a query together
    counts = torch.bincount(owners, minlength=len(best.scores))
    starts = counts.cumsum(0) - counts

    def take(block: Tensor) -> None:
        columns = torch.arange(int(counts[block].max()))
        cells = (starts[block][:, None] + columns).clamp(max=len(scores) - 1)
        none = columns >= counts[block][:, None]
        together = torch.cat([best.scores[block], scores[cells].masked_fill(none, -torch.inf)], dim=1)
        found = torch.cat([best.places[block], places[cells].masked_fill(none, -1)], dim=1)
        values, chosen = together.sort(dim=1, descending=True, stable=True)
        k = best.scores.shape[1]
        best.scores[block], best.places[block] = values[:, :k], found.gather(1, chosen[:, :k])

    by_count = counts.argsort()  # a block is as wide as the most hits in it
    list(each(take, by_count.split(_BLOCK)))
