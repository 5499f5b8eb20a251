"""Click labels, examples that leak nothing, sampled negatives; AUC and its intervals against brute force."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.click_metrics import auc, click_figures, log_losses, rate_entropy
from pipeline.clicks import (
    CLICK,
    NEITHER,
    SHOWN,
    Clicks,
    RankingConfig,
    asked_examples,
    event_kinds,
    training_examples,
    with_sampled,
)
from pipeline.ranking import asked_with_negatives, epoch_examples, left_out
from pipeline.splits import SplitConfig
from schemas.errors import DataError
from user_tower.candidates import Examples, contexts_of
from user_tower.sequences import Histories

HOUR = 3_600_000


def table(labels=None, events=None) -> pa.Table:
    count = len(labels or events)
    names = pa.chunked_array([pa.array(events or [None] * count, pa.string()).dictionary_encode()])
    return pa.table({"event": names, "label": pa.array(labels or [None] * count, pa.float64())})


def log(*users: list[tuple[int, int, int]]) -> Clicks:
    """Each user's events as (item, kind, hour), over 10 items that the catalog holds in the same rows."""
    rows = np.array([event for user in users for event in user], dtype=np.int64).reshape(-1, 3)
    offsets = np.cumsum([0, *map(len, users)])
    histories = Histories([f"u{n}" for n in range(len(users))], offsets, rows[:, 0], rows[:, 2] * HOUR)
    return Clicks(histories, rows[:, 1].astype(np.int8), np.arange(10))


def spelled(examples: Examples) -> list[tuple[str, list[int], int, int]]:
    """(user, what came before, candidate, label) of each example."""
    contexts, place = contexts_of(examples)
    users = [examples.histories.users[user] for user in examples.users]
    before = [contexts.of(int(row)).tolist() for row in place]
    return list(zip(users, before, examples.items.tolist(), examples.labels.tolist(), strict=True))


def test_a_label_or_an_event_type_says_what_a_click_is():
    labels = table([5.0, 3.0, None, 4.0])
    assert event_kinds(labels, RankingConfig(positive_from=4)).tolist() == [CLICK, SHOWN, NEITHER, CLICK]
    types = table(events=["impression", "click", None, "buy", "impression"])
    config = RankingConfig(labels="events", positive_events=("buy", "click"))
    assert event_kinds(types, config).tolist() == [SHOWN, CLICK, NEITHER, CLICK, SHOWN]
    assert event_kinds(types, RankingConfig(labels="sampled")).tolist() == [CLICK] * 5


@pytest.mark.parametrize("found", [table(events=["click"]), table([1.0, 2.0]), table([0.0])])
def test_a_log_without_both_kinds_is_refused_with_the_way_out(found):
    with pytest.raises(DataError, match=r"clicks and \d are not; a ranker needs both.*ranker\.labels = sampled"):
        event_kinds(found, RankingConfig())


def test_examples_stand_after_the_clicks_before_them():
    """What is shown at one time is asked together: item 3, clicked at hour 2, tells nothing of its neighbours."""
    clicks = log([(1, 1, 0), (2, 0, 1), (3, 1, 2), (4, 0, 2), (5, NEITHER, 3), (6, 1, 4), (7, 0, 5), (8, 1, 6)])
    assert spelled(training_examples(clicks, SplitConfig())) == [
        ("u0", [], 1, 1),
        ("u0", [1], 2, 0),
        ("u0", [1], 3, 1),
        ("u0", [1], 4, 0),
        ("u0", [1, 3], 6, 1),
    ]
    assert spelled(asked_examples(clicks, "valid", SplitConfig()).examples) == [("u0", [1, 3, 6], 7, 0)]
    assert spelled(asked_examples(clicks, "test", SplitConfig()).examples) == [("u0", [1, 3, 6], 8, 1)]


def test_items_that_the_catalog_lacks_are_in_no_context_and_are_counted():
    clicks = log([(1, 1, 0), (2, 1, 1), (3, 0, 2), (4, 0, 3), (5, NEITHER, 4)], [(9, 0, 0), (8, 1, 1), (2, 1, 2)])
    clicks = Clicks(clicks.histories, clicks.kinds, np.array([0, 5, -1, 3, 4, 6, 6, 7, 8, 9]))
    assert spelled(training_examples(clicks, SplitConfig())) == [
        ("u0", [], 5, 1),
        ("u0", [5], 3, 0),
        ("u1", [], 9, 0),
    ]
    questions = asked_examples(clicks, "test", SplitConfig())
    assert spelled(questions.examples) == []
    assert left_out(clicks, questions) == {"absent": 1, "unlabelled": 1}


event = st.tuples(st.integers(0, 9), st.sampled_from([CLICK, SHOWN, NEITHER]), st.integers(0, 30))


@given(st.lists(st.lists(event, min_size=3, max_size=9), min_size=2, max_size=6), st.sampled_from(["train", "valid"]))
@settings(deadline=None, max_examples=25)
def test_a_time_split_takes_nothing_from_later(users, part):
    """Whatever happens from the boundary on, the examples before it are the same."""
    times = {"protocol": "temporal", "valid_from": "1970-01-01T10:00:00", "test_from": "1970-01-01T20:00:00"}
    config = SplitConfig.model_validate(times)
    users = [sorted([*user, (0, CLICK, 0), (1, SHOWN, 10), (2, CLICK, 20)], key=lambda e: e[2]) for user in users]
    until = 10 if part == "train" else 20
    changed = [[(i, k, h) if h < until else (9 - i, 1 - abs(k), h) for i, k, h in user] for user in users]

    def found(log_of):
        clicks = log(*log_of)
        own = (
            training_examples(clicks, config) if part == "train" else asked_examples(clicks, "valid", config).examples
        )
        return own, spelled(own)

    examples, rows = found(users)
    assert rows == found(changed)[1]
    hours = {"train": (0, 10), "valid": (10, 20)}[part]
    expected = [
        (f"u{n}", i, k) for n, user in enumerate(users) for i, k, h in user if hours[0] <= h < hours[1] and k >= 0
    ]
    assert [(user, item, label) for user, _, item, label in rows] == expected
    assert (examples.histories.times < 10 * HOUR).all()  # the protocol's histories end where the window begins


def test_sampled_negatives_are_available_unmet_and_know_nothing_of_the_test():
    """u0 meets 0 to 6 in training and 7, 8 later: only what it met in training is never drawn there."""
    clicks = log([(item, CLICK, item) for item in range(9)], [(0, CLICK, 0), (1, CLICK, 1), (2, CLICK, 2)])
    config = RankingConfig(labels="sampled", negatives=50, contexts=0)
    available = np.arange(10) != 9
    examples = training_examples(clicks, SplitConfig())
    drawn = epoch_examples(examples, available, config, [0, 1])
    negatives = {user: set() for user in ("u0", "u1")}
    for user, _, item, label in spelled(drawn):
        if not label:
            negatives[user].add(item)
    assert negatives == {"u0": {7, 8}, "u1": {1, 2, 3, 4, 5, 6, 7, 8}}
    assert spelled(drawn) == spelled(epoch_examples(examples, available, config, [0, 1]))
    assert spelled(drawn) != spelled(epoch_examples(examples, available, config, [0, 2]))
    questions = asked_examples(clicks, "test", SplitConfig())
    asked, stand = asked_with_negatives(questions, "test", available, config, 0)
    assert {item for user, _, item, label in spelled(asked) if user == "u1" and not label} == {3, 4, 5, 6, 7, 8}
    assert {item for user, _, item, label in spelled(asked) if user == "u0"} == {8}  # nothing unmet is left
    assert asked.users.tolist() == questions.examples.users[stand].tolist()


def test_each_click_gets_its_number_of_negatives_in_its_own_context():
    clicks = log([(item, CLICK, item) for item in range(4)], [(item, CLICK, item) for item in range(3)])
    examples = training_examples(clicks, SplitConfig())
    met = (np.repeat([0, 1], [2, 1]), np.array([0, 1, 0]))
    drawn, stand = with_sampled(examples, met, np.ones(10, dtype=bool), 3, [0])
    assert np.bincount(stand).tolist() == [4] * len(examples)
    assert (drawn.before == examples.before[stand]).all()
    empty, _ = with_sampled(examples, met, np.zeros(10, dtype=bool), 3, [0])
    assert len(empty) == len(examples)


def brute_auc(scores, labels, weights) -> float:
    won = pairs = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            weight = weights[i] * weights[j]
            pairs += weight
            won += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return won / pairs if pairs else math.nan


triple = st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.integers(0, 1), st.integers(0, 3))


@given(st.lists(triple, min_size=1, max_size=25), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_figures_equal_brute_force_with_ties_and_so_does_each_resample(rows, seed):
    scores, labels, owners = (np.array(column) for column in zip(*rows, strict=True))
    found = click_figures(scores, labels, owners, 4, seed=seed)
    ids = np.unique(owners)
    rng = np.random.default_rng(seed)
    counts = [
        np.ones(len(ids)),
        *(np.bincount(rng.integers(0, len(ids), len(ids)), minlength=len(ids)) for _ in "1234"),
    ]
    losses = np.array([-math.log(1 / (1 + math.exp(-s if y else s))) for s, y in zip(scores, labels, strict=True)])
    for number, count in enumerate(counts):
        weights = count[np.searchsorted(ids, owners)]
        own = [(c * (owners == u).sum(), brute_auc(scores[owners == u], labels[owners == u], np.ones(25)))
               for c, u in zip(count, ids, strict=True)]  # fmt: skip
        own = [(weight, value) for weight, value in own if not math.isnan(value) and weight]
        expected = {
            "auc": brute_auc(scores, labels, weights),
            "user_auc": sum(w * v for w, v in own) / sum(w for w, _ in own) if own else math.nan,
            "log_loss": (weights * losses).sum() / weights.sum(),
        }
        for name, value in expected.items():
            if number == 0:
                assert found.values.get(name, math.nan) == pytest.approx(value, nan_ok=True), name
            elif name in found.draws:
                assert found.draws[name][number - 1] == pytest.approx(value, nan_ok=True), name
    assert auc(scores, labels) == pytest.approx(brute_auc(scores, labels, np.ones(25)), nan_ok=True)


def test_auc_of_known_cases():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 3 / 4
    assert auc(np.zeros(5), np.array([0, 1, 0, 1, 1])) == 1 / 2
    assert math.isnan(auc(np.array([0.3]), np.array([1])))
    assert math.isnan(auc(np.zeros(0), np.zeros(0, dtype=int)))
    assert log_losses(np.array([0.0, 900.0]), np.array([1, 0])).tolist() == [math.log(2), 900.0]
    assert rate_entropy(np.array([1, 0, 0, 1])) == pytest.approx(math.log(2))
    assert rate_entropy(np.array([1, 1])) == 0


def test_a_difference_is_paired_and_intervals_hold_the_truth():
    """Two scores that are the same but for noise differ by less than either is uncertain."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(200), 10)
    labels = rng.integers(0, 2, 2000)
    scores = labels + np.repeat(rng.normal(size=200), 10) + rng.normal(size=2000)
    first = click_figures(scores, labels, owners, 100)
    second = click_figures(scores + 0.01 * rng.normal(size=2000), labels, owners, 100)
    low, high = first.ci95()["auc"]
    assert low < first.values["auc"] < high
    mean, (least, most) = first.minus(second, "auc")
    assert least <= mean <= most
    assert most - least < (high - low) / 5
