"""Ranking metrics from exact ranks, ties by expectation, and their bootstrap intervals.

Shapes: U users. ``above``: candidates scored strictly higher than the target, -1 where the target could not
be ranked (a miss); ``ties``: other candidates with the target's score.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def expected_gain(above: IntArray, ties: IntArray, gains: FloatArray) -> FloatArray:
    """[U] expected gain when the target is equally likely at each rank from above to above + ties (0-based).

    gains: gain of each 0-based rank; ranks past its end gain 0.
    """
    cumulative = np.concatenate([[0.0], np.cumsum(gains)])
    low = np.clip(above, 0, len(gains))
    high = np.clip(above + ties + 1, 0, len(gains))
    value = (cumulative[high] - cumulative[low]) / (ties + 1)
    return np.where(above < 0, 0.0, value)


def recall_at(above: IntArray, ties: IntArray, k: int) -> FloatArray:
    """[U] Recall@k with one target a user: the chance that it is among the first k."""
    return expected_gain(above, ties, np.ones(k))


def ndcg_at(above: IntArray, ties: IntArray, k: int) -> FloatArray:
    """[U] NDCG@k with one target a user: 1 / log2(rank + 1) when rank <= k (Jarvelin and Kekalainen 2002)."""
    return expected_gain(above, ties, 1.0 / np.log2(np.arange(2, k + 2)))


def reciprocal_rank(above: IntArray, ties: IntArray, catalog: int) -> FloatArray:
    """[U] 1 / rank over a catalog of so many items."""
    return expected_gain(above, ties, 1.0 / np.arange(1, catalog + 1))


def metric_names(ks: tuple[int, ...]) -> list[str]:
    """The keys of ``per_user``."""
    return [f"{kind}@{k}" for k in ks for kind in ("recall", "ndcg")] + ["mrr"]


def per_user(above: IntArray, ties: IntArray, ks: tuple[int, ...], catalog: int) -> dict[str, FloatArray]:
    """Every metric of every user: {"recall@10": [U], "ndcg@10": [U], ..., "mrr": [U]}."""
    values = {}
    for k in ks:
        values[f"recall@{k}"] = recall_at(above, ties, k)
        values[f"ndcg@{k}"] = ndcg_at(above, ties, k)
    values["mrr"] = reciprocal_rank(above, ties, catalog)
    return values


def bootstrap(values: FloatArray, samples: int = 1000, seed: int = 0) -> Interval:
    """The mean over users with its percentile interval from resampled users. values: [U]."""
    if len(values) == 0:
        return Interval(0.0, 0.0, 0.0)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for sample in range(samples):
        means[sample] = values[rng.integers(0, len(values), len(values))].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(first: FloatArray, second: FloatArray, samples: int = 1000, seed: int = 0) -> Interval:
    """Mean of first minus second over the same users, with its interval. Both [U], in the same user order."""
    return bootstrap(first - second, samples, seed)
