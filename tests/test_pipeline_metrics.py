"""Metrics against fractions written out by hand."""

from __future__ import annotations

from fractions import Fraction
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import bootstrap, ndcg_at, paired_difference, per_user, recall_at, reciprocal_rank


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


def test_bootstrap_covers_the_mean_and_narrows_with_users():
    rng = np.random.default_rng(0)
    few, many = (bootstrap((rng.random(n) < 0.2).astype(float)) for n in (50, 5000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    # 95 % of a Bernoulli mean is 2 * 1.96 standard errors wide
    expected = 2 * 1.96 * (many.mean * (1 - many.mean) / 5000) ** 0.5
    assert many.high - many.low == pytest.approx(expected, rel=0.15)
    assert bootstrap(np.zeros(0)) == (0.0, 0.0, 0.0)


def test_paired_difference_uses_the_same_users():
    first = np.random.default_rng(0).random(200)
    assert paired_difference(first + 0.25, first) == pytest.approx((0.25, 0.25, 0.25, 1 / 1001))
