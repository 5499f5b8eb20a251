"""Metrics against fractions written out by hand."""

from __future__ import annotations

from fractions import Fraction
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import metrics
from pipeline.metrics import (
    bootstrap,
    bootstrap_means,
    intervals,
    ndcg_at,
    paired_difference,
    per_user,
    recall_at,
    reciprocal_rank,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_recall_and_ndcg_without_ties():
    above, ties = ints(0, 1, 4, 5, -1), ints(0, 0, 0, 0, 0)
    assert recall_at(above, ties, 5).tolist() == [1, 1, 1, 0, 0]
    assert ndcg_at(above, ties, 5) == pytest.approx([1 / log2(2), 1 / log2(3), 1 / log2(6), 0, 0])
    assert reciprocal_rank(above, ties, 10) == pytest.approx([1, 1 / 2, 1 / 5, 1 / 6, 0])


def test_ties_count_by_expectation():
    # one item above, three share the target's score: ranks 2, 3, 4, 5 with a quarter each
    above, ties = ints(1), ints(3)
    assert recall_at(above, ties, 2)[0] == Fraction(1, 4)
    assert recall_at(above, ties, 4)[0] == Fraction(3, 4)
    assert ndcg_at(above, ties, 3)[0] == pytest.approx((1 / log2(3) + 1 / log2(4)) / 4)
    assert reciprocal_rank(above, ties, 10)[0] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)


def test_all_tied_is_chance():
    catalog = 40
    assert recall_at(ints(0), ints(catalog - 1), 10)[0] == Fraction(10, catalog)


@given(st.integers(0, 60), st.integers(0, 30), st.integers(1, 50))
def test_expected_recall_is_the_mean_over_the_tied_ranks(above, ties, k):
    ranks = range(above, above + ties + 1)
    expected = sum(Fraction(rank < k) for rank in ranks) / (ties + 1)
    assert recall_at(ints(above), ints(ties), k)[0] == pytest.approx(float(expected))


def test_per_user_names_every_metric():
    values = per_user(ints(0, 7), ints(0, 0), (5, 10), 20)
    assert sorted(values) == ["mrr", "ndcg@10", "ndcg@5", "recall@10", "recall@5"]
    assert values["recall@10"].tolist() == [1, 1]
    assert values["recall@5"].tolist() == [1, 0]


def test_several_targets_share_recall_and_the_ideal_gain():
    offsets = ints(0, 2, 3, 3)
    values = per_user(ints(0, 4, -1), ints(0, 0, 0), (2, 5), 10, offsets)
    assert values["recall@2"][:2].tolist() == [1 / 2, 0]
    assert values["recall@5"][:2].tolist() == [1, 0]
    ideal = 1 / log2(2) + 1 / log2(3)
    assert values["ndcg@5"][0] == pytest.approx((1 / log2(2) + 1 / log2(6)) / ideal)
    assert values["mrr"][:2].tolist() == [1, 0]
    assert all(np.isnan(value[2]) for value in values.values())  # nothing was asked of the third user


def test_one_target_each_is_the_same_with_and_without_offsets():
    rng = np.random.default_rng(0)
    above, ties = rng.integers(-1, 20, 50), rng.integers(0, 4, 50)
    plain, general = per_user(above, ties, (1, 10), 24), per_user(above, ties, (1, 10), 24, np.arange(51))
    assert plain.keys() == general.keys()
    for name, value in plain.items():
        assert general[name] == pytest.approx(value), name


def test_bootstrap_covers_the_mean_and_narrows_with_users():
    rng = np.random.default_rng(0)
    few, many = (bootstrap((rng.random(n) < 0.2).astype(float)) for n in (50, 5000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    # 95 % of a Bernoulli mean is 2 * 1.96 standard errors wide
    expected = 2 * 1.96 * (many.mean * (1 - many.mean) / 5000) ** 0.5
    assert many.high - many.low == pytest.approx(expected, rel=0.15)
    assert bootstrap(np.zeros(0)) == (0.0, 0.0, 0.0)


def test_figures_that_some_users_lack_are_resampled_over_the_others():
    rng = np.random.default_rng(1)
    whole = rng.random(400)
    part = np.where(np.arange(400) < 100, whole, np.nan)
    both = intervals(np.stack([whole, part, np.full(400, np.nan)], axis=1))
    assert both[0] == pytest.approx(bootstrap(whole))
    assert both[1].mean == pytest.approx(whole[:100].mean())
    alone = bootstrap(whole[:100])
    assert both[1].high - both[1].low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert np.isnan(both[2].mean)
    assert intervals(np.zeros((0, 1)))[0].mean is np.nan


def test_resampled_means_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(0).random((30, 2))
    many = bootstrap_means(values, 40)
    monkeypatch.setattr(metrics, "_DRAWS", 60)  # two resamples at a time
    assert bootstrap_means(values, 40) == pytest.approx(many)


def test_paired_difference_uses_the_same_users():
    first = np.random.default_rng(0).random(200)
    assert paired_difference(first + 0.25, first) == pytest.approx((0.25, 0.25, 0.25, 1 / 1001))
    assert paired_difference(first, first) == (0.0, 0.0, 0.0, 1.0)
    assert paired_difference(np.zeros(0), np.zeros(0)) == (0.0, 0.0, 0.0, 1.0)


def test_intervals_hold_the_truth_and_the_paired_test_seldom_alarms():
    """1,000 simulated comparisons of two runs whose users gain alike: how often each statement is wrong."""
    truth, users, trials = 0.3, 300, 1000
    rng = np.random.default_rng(7)
    held = alarms = found = 0
    for trial in range(trials):
        easy = rng.random(users) < 0.5  # both runs do well on the same users
        chance = np.where(easy, 0.5, 0.1)
        first, second = ((rng.random(users) < chance).astype(float) for _ in range(2))
        interval = bootstrap(first, 400, seed=trial)
        held += interval.low <= truth <= interval.high
        alarms += paired_difference(first, second, 400, seed=trial).p < 0.05
        found += paired_difference(first + 0.1, second, 400, seed=trial).p < 0.05
    assert 0.93 <= held / trials <= 0.97
    assert 0.03 <= alarms / trials <= 0.07
    assert found / trials > 0.7  # what is there is seen
