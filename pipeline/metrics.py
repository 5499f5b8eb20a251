"""Ranking metrics from exact ranks, ties by expectation; bootstrap intervals and the paired test.

Shapes: U users, P targets of all of them, M figures of a user, S resamples. ``above``: candidates scored strictly
higher than the target, -1 where the target could not be ranked (a miss); ``ties``: other candidates with its score.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_DRAWS = 1 << 22  # numbers drawn at once for a bootstrap


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean difference over the same users, its 95 % interval, and the p value of no difference."""

    mean: float
    low: float
    high: float
    p: float


def expected_gain(above: IntArray, ties: IntArray, gains: FloatArray) -> FloatArray:
    """[P] expected gain when the target is equally likely at each rank from above to above + ties (0-based).

    gains: gain of each 0-based rank; ranks past its end gain 0.
    """
    cumulative = np.concatenate([[0.0], np.cumsum(gains)])
    low = np.clip(above, 0, len(gains))
    high = np.clip(above + ties + 1, 0, len(gains))
    value = (cumulative[high] - cumulative[low]) / (ties + 1)
    return np.where(above < 0, 0.0, value)


def recall_at(above: IntArray, ties: IntArray, k: int) -> FloatArray:
    """[P] the chance that a target is among the first k: with one target a user, its Recall@k (and hit rate)."""
    return expected_gain(above, ties, np.ones(k))


def _discounts(k: int) -> FloatArray:
    return 1.0 / np.log2(np.arange(2, k + 2))


def ndcg_at(above: IntArray, ties: IntArray, k: int) -> FloatArray:
    """[P] 1 / log2(rank + 1) when rank <= k (Jarvelin and Kekalainen 2002): with one target a user, its NDCG@k."""
    return expected_gain(above, ties, _discounts(k))


def reciprocal_rank(above: IntArray, ties: IntArray, catalog: int) -> FloatArray:
    """[P] 1 / rank over a catalog of so many items."""
    return expected_gain(above, ties, 1.0 / np.arange(1, catalog + 1))


def metric_names(ks: tuple[int, ...]) -> list[str]:
    """The keys of ``per_user``."""
    return [f"{kind}@{k}" for k in ks for kind in ("recall", "ndcg")] + ["mrr"]


def per_user(
    above: IntArray, ties: IntArray, ks: tuple[int, ...], catalog: int, offsets: IntArray | None = None
) -> dict[str, FloatArray]:
    """Every metric of every user: {"recall@10": [U], "ndcg@10": [U], ..., "mrr": [U]}.

    offsets: [U + 1], the targets of each user (see ``Queries``), None for one each. A user without targets is NaN.
    Recall is the found share of all targets, misses included; NDCG divides by the best gain that so many targets can
    have; MRR looks at the first target that is found. Expectations over ties are exact.
    """
    values = {}
    if offsets is None:
        for k in ks:
            values[f"recall@{k}"] = recall_at(above, ties, k)
            values[f"ndcg@{k}"] = ndcg_at(above, ties, k)
        values["mrr"] = reciprocal_rank(above, ties, catalog)
        return values
    counts = np.diff(offsets)
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in ks:
            ideal = np.concatenate([[0.0], np.cumsum(_discounts(k))])
            values[f"recall@{k}"] = _sums(recall_at(above, ties, k), offsets) / counts
            values[f"ndcg@{k}"] = _sums(ndcg_at(above, ties, k), offsets) / ideal[np.minimum(counts, k)]
    values["mrr"] = np.where(counts > 0, _first_reciprocal(above, ties, offsets, catalog), np.nan)
    return values


def _sums(values: FloatArray, offsets: IntArray) -> FloatArray:
    return np.diff(np.concatenate([[0.0], np.cumsum(values)])[offsets])


def _first_reciprocal(above: IntArray, ties: IntArray, offsets: IntArray, catalog: int) -> FloatArray:
    """[U] expected 1 / rank of each user's best target. Of r targets among n items of one score, the first is at
    place i of these with chance C(n - i, r - 1) / C(n, r)."""
    users = len(offsets) - 1
    owners = np.repeat(np.arange(users), np.diff(offsets))
    found = above >= 0
    best = np.full(users, np.iinfo(np.int64).max)
    np.minimum.at(best, owners[found], above[found])
    first = found & (above == best[owners])
    together = np.bincount(owners[first], minlength=users)
    values = np.zeros(users)
    values[owners[first]] = reciprocal_rank(above[first], ties[first], catalog)
    for user in np.flatnonzero(together > 1).tolist():
        place = np.flatnonzero(first[offsets[user] : offsets[user + 1]])[0] + offsets[user]
        n, r, start = int(ties[place]) + 1, int(together[user]), int(above[place])
        chances = [comb(n - i, r - 1) / comb(n, r) / (start + i) for i in range(1, n - r + 2)] if n >= r else []
        values[user] = sum(chances) if chances else 1.0 / (start + 1)
    return values


def bootstrap_means(values: FloatArray, samples: int, seed: int = 0) -> FloatArray:
    """[S, M] means of resampled users. values: [U, M], NaN where a user has no such figure.

    Users are drawn with replacement as integers (so that the counts are multinomial), a few resamples at a time; all
    figures share the draws, and one matrix product gives all their sums. NaN where a resample holds nobody.
    """
    users = len(values)
    known = ~np.isnan(values)
    partial = ~known.all(axis=0)  # only these need their own number of users
    columns = np.concatenate([np.where(known, values, 0.0), known[:, partial].astype(np.float64)], axis=1)
    rng = np.random.default_rng(seed)
    means = np.empty((samples, values.shape[1]))
    step = max(1, _DRAWS // max(1, users))
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        draws = (
            rng.integers(0, users, (rows, users), dtype=np.int32) + np.arange(rows, dtype=np.int64)[:, None] * users
        )
        weights = np.bincount(draws.ravel(), minlength=rows * users).reshape(rows, users)
        sums = weights.astype(np.float64) @ columns
        counts = np.full((rows, values.shape[1]), float(users))
        counts[:, partial] = sums[:, values.shape[1] :]
        with np.errstate(invalid="ignore", divide="ignore"):
            means[start : start + rows] = sums[:, : values.shape[1]] / counts
    return means


def intervals(values: FloatArray, samples: int = 1000, seed: int = 0) -> list[Interval]:
    """Means with 95 % percentile intervals (Efron and Tibshirani 1993, chapter 13) of each figure. values: as in
    ``bootstrap_means``. A figure that no user has is NaN."""
    if len(values) == 0 or values.shape[1] == 0:
        return [Interval(np.nan, np.nan, np.nan)] * values.shape[1]
    means = bootstrap_means(values, samples, seed)
    found = []
    for column in range(values.shape[1]):
        own = values[~np.isnan(values[:, column]), column]
        drawn = means[~np.isnan(means[:, column]), column]
        if not len(own) or not len(drawn):
            found.append(Interval(np.nan, np.nan, np.nan))
            continue
        low, high = np.quantile(drawn, [0.025, 0.975])
        found.append(Interval(float(own.mean()), float(low), float(high)))
    return found


def bootstrap(values: FloatArray, samples: int = 1000, seed: int = 0) -> Interval:
    """``intervals`` of one figure; zeros where there is no user. values: [U]."""
    if len(values) == 0:
        return Interval(0.0, 0.0, 0.0)
    return intervals(values[:, None], samples, seed)[0]


def paired_difference(first: FloatArray, second: FloatArray, samples: int = 1000, seed: int = 0) -> Paired:
    """Mean of first minus second over the same users, its interval, and the two-sided p value of the bootstrap test
    (Efron and Tibshirani 1993, 16.4; Sakai 2006): how often the resampled difference is as far from the observed one
    as that is from 0. Both [U], in the same user order.
    """
    difference = first - second
    if len(difference) == 0:
        return Paired(0.0, 0.0, 0.0, 1.0)
    mean = float(difference.mean())
    drawn = bootstrap_means(difference[:, None], samples, seed)[:, 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    slack = 1e-12 * float(np.abs(difference).max())  # sums differ in their last bits
    extreme = int((np.abs(drawn - mean) >= abs(mean) - slack).sum())
    return Paired(mean, float(low), float(high), (1 + extreme) / (1 + samples))
