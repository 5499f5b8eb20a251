"""Scores of some histories against a catalog, made a few columns at a time so that they never exist whole.

Shapes: B histories, N catalog items, C columns of a tile, D vector width, m items of each history.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from schemas.errors import EmbeddingError

# Scores closer than this share of the largest possible one are one score. A float32 product of the same two vectors
# differs in the last bits with the place of the row in the matrix; a tie must not depend on that.
TIE_TOLERANCE = 1e-6
_ROUNDING = 2.0**-24
_GATHERED = 1 << 25  # elements of item vectors gathered at once


class Scores(Protocol):
    """float32 scores [B, N]. tolerance: [B], scores of a history that are no further apart are one score."""

    tolerance: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        ...

    def tile(self, start: int, stop: int, out: Tensor) -> Tensor:
        """[B, stop - start] columns, written into the contiguous ``out`` of that shape and returned."""
        ...

    def at(self, items: Tensor) -> Tensor:
        """[B, m] scores of items int64 [B, m]."""
        ...


class Dense:
    """Scores that a recommender makes whole."""

    def __init__(self, scores: Tensor, tolerance: float = TIE_TOLERANCE) -> None:
        """scores: [B, N]; tolerance: as a share of a row's largest score, 0 for scores that are exact.

        Raises EmbeddingError when a score is not finite.
        """
        self.scores = scores
        largest = scores.abs().amax(1) if scores.shape[1] else scores.new_zeros(len(scores))
        _require_finite(largest, "scores")
        self.tolerance = tolerance * largest

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        return self.scores.shape[0], self.scores.shape[1]

    def tile(self, start: int, stop: int, out: Tensor) -> Tensor:
        """See ``Scores``."""
        return out.copy_(self.scores[:, start:stop])

    def at(self, items: Tensor) -> Tensor:
        """See ``Scores``."""
        return self.scores.gather(1, items)


class Product:
    """Scores that are inner products of queries and candidates."""

    def __init__(self, queries: Tensor, candidates: Tensor, longest_candidate: float) -> None:
        """queries: float32 [B, D]; candidates: float32 [N, D]; longest_candidate: see ``longest``.

        Raises EmbeddingError when a query is not finite.

        Rounding of a product of D terms grows like sqrt(D) 2^-24 |query| |candidate| (Higham and Mary 2019).
        """
        self.queries = queries
        self.candidates = candidates
        lengths = torch.linalg.vector_norm(queries, dim=1)
        _require_finite(lengths, "queries")
        share = max(TIE_TOLERANCE, math.sqrt(queries.shape[1]) * _ROUNDING)
        self.tolerance = share * lengths * longest_candidate

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        return len(self.queries), len(self.candidates)

    def tile(self, start: int, stop: int, out: Tensor) -> Tensor:
        """See ``Scores``."""
        return torch.mm(self.queries, self.candidates[start:stop].T, out=out)

    def at(self, items: Tensor) -> Tensor:
        """See ``Scores``."""
        found = self.queries.new_empty(items.shape)
        step = max(1, _GATHERED // max(1, items.shape[1] * self.queries.shape[1]))
        for start in range(0, len(items), step):
            part = slice(start, start + step)
            vectors = self.candidates.index_select(0, items[part].reshape(-1)).view(*items[part].shape, -1)
            found[part] = torch.bmm(vectors, self.queries[part, :, None])[:, :, 0]
        return found


def longest(candidates: Tensor) -> float:
    """The largest length of a candidate's vector. Raises EmbeddingError when one is not finite."""
    if not len(candidates):
        return 0.0
    length = torch.linalg.vector_norm(candidates, dim=1).amax()
    _require_finite(length, "item vectors")
    return float(length)


def _require_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise EmbeddingError(f"{what} of the recommender are not finite; train the user tower again")
