"""Which items stand against the targets of a batch, and how probable each was to be among them (DESIGN 8).

Shapes: N catalog items, C of them candidates, P target positions of a batch, M negatives.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Sampling = Literal["uniform", "popularity", "in-batch", "mixed"]
WHOLE, DRAWS = 16_384, 8_192  # candidates up to which all stand against a target; draws a step beyond
_LEAST = 1e-12


def draws(count: int | None, candidates: int, sampling: Sampling = "uniform") -> int:
    """Draws a step, 0 for every candidate; a ``count`` of None is left to their number."""
    if count is not None:
        return count
    return 0 if candidates <= WHOLE and sampling != "popularity" else DRAWS


class Negatives(NamedTuple):
    """rows: int64 [M], distinct; log_q: float32 [N], see ``info_nce``, or None where q is the same for all."""

    rows: Tensor
    log_q: Tensor | None


class NegativeSampler:
    """Draws the negatives of a step; all positions of the batch share them.

    ``uniform``: ``count`` draws over the candidates, 0 for all of them. ``popularity``: ``count`` draws by training
    counts. ``in-batch``: the batch's own targets. ``mixed``: those and ``count`` uniform draws. Candidates are a
    set, so q is the probability that at least one draw gives the item: 1 - (1 - p)^draws.
    """

    def __init__(self, candidates: Tensor, counts: Tensor, count: int | None, sampling: Sampling) -> None:
        """candidates: int64 [C] rows that may be negatives; counts: [N] how often each item is a training target;
        count: as for ``draws``."""
        self.candidates = candidates
        self.count = draws(count, len(candidates), sampling)
        self.sampling = sampling
        self.share = counts.double() / counts.sum().clamp(min=1)  # p of the data

    def draw(self, targets: Tensor, seed: int) -> Negatives:
        """Negatives for a batch with these targets, int64 [P] catalog rows; the same for the same seed."""
        generator = torch.Generator(self.candidates.device).manual_seed(seed)
        if self.sampling == "uniform":
            return Negatives(self._uniform(generator)[0], None)
        if self.sampling == "popularity":
            allowed = self.share[self.candidates]
            drawn = torch.multinomial(allowed, self.count, replacement=True, generator=generator)
            rows = self.candidates[drawn].unique()
            return Negatives(rows, _log_q(self.count * torch.log1p(-self.share / allowed.sum())))
        inside = targets.unique()
        log_absent = len(targets) * torch.log1p(-self.share)
        if self.sampling == "in-batch":
            return Negatives(inside, _log_q(log_absent))
        drawn, missed = self._uniform(generator)
        log_absent[self.candidates] += missed
        return Negatives(torch.cat([inside, drawn]).unique(), _log_q(log_absent))

    def _uniform(self, generator: torch.Generator) -> tuple[Tensor, float]:
        """Distinct candidates, and the logarithm of the probability with which each of them is left out."""
        size = len(self.candidates)
        if not 0 < self.count < size:
            return self.candidates, -math.inf
        if self.count > size // 8:
            order = torch.randperm(size, device=self.candidates.device, generator=generator)
            return self.candidates[order[: self.count]], math.log1p(-self.count / size)
        drawn = torch.randint(size, (self.count,), device=self.candidates.device, generator=generator)
        return self.candidates[drawn.unique()], self.count * math.log1p(-1 / size)


def _log_q(log_absent: Tensor) -> Tensor:
    """float32 [N]: log of 1 - exp(log_absent)."""
    return (-torch.expm1(log_absent)).clamp(min=_LEAST).log().float()
