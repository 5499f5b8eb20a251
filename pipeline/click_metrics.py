"""AUC, per-user AUC and log loss of click scores, with bootstrap intervals over users; ties count a half.

Shapes: P examples, G groups of equal score, U users, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.metrics import FloatArray, IntArray

# counts of how often each user was drawn [U] -> the figure
_Figure = Callable[[FloatArray], float]


@dataclass(frozen=True)
class ClickFigures:
    """values: by name, those alone that the examples have; draws: name -> [S] of the resamples, the same users in
    every call with the same seed and number of users, NaN where a resample lacks a class."""

    values: dict[str, float]
    draws: dict[str, FloatArray]

    def ci95(self) -> dict[str, list[float]]:
        """The 95 % percentile intervals; of the resamples that have the figure, and of its value where none has."""
        return {name: _interval(np.append(self.draws[name], value)) for name, value in self.values.items()}

    def minus(self, other: ClickFigures, name: str) -> tuple[float, list[float]]:
        """The difference of a figure on the same users, with its paired interval."""
        mean = self.values[name] - other.values[name]
        return mean, _interval(np.append(self.draws[name] - other.draws[name], mean))


def _interval(draws: FloatArray) -> list[float]:
    return [float(edge) for edge in np.nanquantile(draws, [0.025, 0.975])]


class _Auc:
    """Sorted once, weighed many times. ``within``: [P] scores are compared only inside a part, None for one part."""

    def __init__(
        self, scores: FloatArray, labels: IntArray, owners: IntArray, within: IntArray | None = None
    ) -> None:
        part = np.zeros(len(scores), dtype=np.int64) if within is None else within
        order = np.lexsort((scores, part))
        self.labels, self.owners = labels[order].astype(np.float64), owners[order]
        own, scores = part[order], scores[order]
        new = np.append(True, (np.diff(scores) != 0) | (np.diff(own) != 0))[: len(scores)]
        self.starts = np.flatnonzero(new)  # [G]
        self.part_of_group = own[self.starts]
        self.parts = int(own[-1]) + 1 if len(own) else 0

    def wins(self, drawn: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[parts] won pairs, a tie half, and all pairs. drawn: [U]."""
        weights = drawn[self.owners]
        clicks = weights * self.labels
        clicks_G = np.add.reduceat(clicks, self.starts)
        others_G = np.add.reduceat(weights - clicks, self.starts)
        part = self.part_of_group
        all_others = np.bincount(part, weights=others_G, minlength=self.parts)
        before_part = np.concatenate([[0.0], np.cumsum(all_others)])[:-1]
        below_G = np.cumsum(others_G) - others_G - before_part[part]
        won = np.bincount(part, weights=clicks_G * (below_G + others_G / 2), minlength=self.parts)
        pairs = np.bincount(part, weights=clicks_G, minlength=self.parts) * all_others
        return won.astype(np.float64), pairs.astype(np.float64)


def auc(scores: FloatArray, labels: IntArray) -> float:
    """The chance that a random click is scored above a random other, a tie counting a half (Hanley and McNeil 1982);
    NaN where there is none of either. scores, labels (1 or 0): [P]."""
    if not len(scores):
        return np.nan
    won, pairs = _Auc(scores, labels, np.zeros(len(scores), dtype=np.int64)).wins(np.ones(1))
    return float(won[0] / pairs[0]) if pairs[0] else np.nan


def log_losses(logits: FloatArray, labels: IntArray) -> FloatArray:
    """[P] binary cross-entropy in nats of logits [P]."""
    return np.logaddexp(0.0, np.where(labels == 1, -logits, logits))


def rate_entropy(labels: IntArray) -> float:
    """The log loss of always saying the share of clicks, in nats."""
    share = float(labels.mean())
    return -sum(part * np.log(part) for part in (share, 1 - share) if part)


def click_figures(
    scores: FloatArray, labels: IntArray, owners: IntArray, samples: int, *, logits: bool = True, seed: int = 0
) -> ClickFigures:
    """``auc`` over all examples; ``user_auc``, the AUC inside each user who has both kinds, weighed by the user's
    examples (GAUC, Zhou et al. 2018, eq. 7), left out where nobody has; ``log_loss`` when the scores are logits.
    scores, labels, owners: [P].

    Users are resampled with replacement (Efron and Tibshirani 1993, chapter 13), a user's examples stay together.
    """
    _, users = np.unique(owners, return_inverse=True)
    count = int(users.max()) + 1
    pooled = _Auc(scores, labels, users)
    won, pairs = _Auc(scores, labels, users, within=users).wins(np.ones(count))
    examples = np.bincount(users, minlength=count).astype(np.float64)
    both = np.where(pairs > 0, examples, 0.0)
    own = np.divide(won, pairs, out=np.zeros(count), where=pairs > 0)
    losses: FloatArray | None = None
    if logits:
        losses = np.bincount(users, weights=log_losses(scores, labels), minlength=count).astype(np.float64)

    def pooled_auc(drawn: FloatArray) -> float:
        won, pairs = pooled.wins(drawn)
        return float(won[0] / pairs[0]) if pairs[0] else np.nan

    def mean_of(sums: FloatArray, sizes: FloatArray) -> _Figure:
        def mean(drawn: FloatArray) -> float:
            total = drawn @ sizes
            return float(drawn @ sums / total) if total else np.nan

        return mean

    figures: dict[str, _Figure] = {"auc": pooled_auc, "user_auc": mean_of(both * own, both)}
    if losses is not None:
        figures["log_loss"] = mean_of(losses, examples)
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(samples):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        for name, figure in figures.items():
            found[name].append(figure(drawn))
    values = {name: figure(np.ones(count)) for name, figure in figures.items()}
    known = [name for name, value in values.items() if not np.isnan(value)]
    return ClickFigures({name: values[name] for name in known}, {name: np.array(found[name]) for name in known})
