"""The protocols: who is asked what, what may be trained on, and the leaks that each must not have."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.baselines import ItemKNN, Popularity
from pipeline.evaluate import EvaluateConfig, Pool, rank_users
from pipeline.events import EventBuilder, order_events
from pipeline.metrics import per_user, recall_at
from pipeline.scores import Dense
from pipeline.slices import popularity_deciles, target_slices
from pipeline.splits import (
    SplitConfig,
    boundaries,
    protocol_label,
    queries,
    training_label,
    training_part,
    with_negatives,
)
from schemas.errors import ConfigError, DataError
from user_tower.sequences import Histories

LAST_OUT, TEMPORAL, SAMPLED = (EvaluateConfig(protocol=name) for name in ("leave-last-out", "temporal", "sampled"))
PROTOCOLS = [LAST_OUT, TEMPORAL, SAMPLED]


def histories(*rows: list[tuple[int, int]]) -> Histories:
    """rows: (item, time) of each user's events."""
    offsets = np.cumsum([0, *map(len, rows)])
    flat = np.array([event for row in rows for event in row], dtype=np.int64).reshape(-1, 2)
    return Histories([f"u{n}" for n in range(len(rows))], offsets, flat[:, 0], flat[:, 1])


def made_up(seed: int, users: int = 40, items: int = 15) -> Histories:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        length = int(rng.integers(1, 12))
        times = np.sort(rng.integers(1_000, 1_000_000, length))
        rows.append(list(zip(rng.integers(0, items, length).tolist(), times.tolist(), strict=True)))
    return histories(*rows)


def test_temporal_asks_once_a_user_for_the_distinct_items_of_the_window():
    config = SplitConfig(
        protocol="temporal", valid_from=datetime.fromtimestamp(5, UTC), test_from=datetime.fromtimestamp(8, UTC)
    )
    events = histories(
        [(0, 1000), (1, 4999), (2, 5000), (3, 7999), (4, 8000)],
        [(5, 9000), (6, 9500), (5, 9900)],
        [(7, 2000)],
        [(0, 8000), (1, 8001)],
    )
    assert boundaries(events, config) == (5000, 8000)
    training = training_part(events, config)
    assert [training.of(user).tolist() for user in range(4)] == [[0, 1], [], [7], []]
    valid, test = queries(events, "valid", config), queries(events, "test", config)
    assert valid.histories.users == ["u0"]
    assert (valid.targets.tolist(), valid.bounds.tolist(), valid.times.tolist()) == ([2, 3], [0, 2], [5000, 7999])
    assert valid.histories.of(0).tolist() == [0, 1]
    assert test.histories.users == ["u0", "u1", "u3"]
    assert (test.targets.tolist(), test.bounds.tolist()) == ([4, 5, 6, 0, 1], [0, 1, 3, 5])
    assert [test.histories.of(user).tolist() for user in range(3)] == [[0, 1, 2, 3], [], []]
    assert test.owners.tolist() == [0, 1, 1, 2, 2]
    part = test.select(np.array([2, 0]))
    assert (part.targets.tolist(), part.bounds.tolist()) == ([0, 1, 4], [0, 2, 3])
    assert test.places(np.array([2, 0])).tolist() == [3, 4, 0]


def test_temporal_by_default_cuts_at_shares_of_the_events():
    events = histories([(0, 1000 * n) for n in range(1, 101)])
    assert boundaries(events, TEMPORAL) == (80_000, 90_000)
    assert training_part(events, TEMPORAL).lengths.tolist() == [79]


def test_temporal_says_what_it_lacks():
    with pytest.raises(ConfigError, match=r"leave no event .* run from 1970-01-01T00:00:01Z"):
        boundaries(histories([(0, 1000), (1, 1000), (2, 1000)]), TEMPORAL)
    timeless = Histories(["u"], np.array([0, 3]), np.array([0, 1, 2]))
    with pytest.raises(DataError, match="needs the times"):
        training_part(timeless, TEMPORAL)
    with pytest.raises(ValueError, match="given together"):
        SplitConfig(valid_from=datetime(2020, 1, 1))
    with pytest.raises(ValueError, match="must lie before"):
        SplitConfig(valid_from=datetime(2020, 1, 2), test_from=datetime(2020, 1, 1, tzinfo=UTC))


def test_labels_tell_protocols_apart():
    events = made_up(0)
    labels = [protocol_label(events, config) for config in PROTOCOLS]
    labels += [protocol_label(events, config.model_copy(update={"repeats": True})) for config in PROTOCOLS]
    labels += [protocol_label(events, SAMPLED.model_copy(update={"negatives": 100})), "leave-last-out"]
    assert len(set(labels)) == len(labels) - 1
    assert "1+20" in labels[2]
    assert "not comparable" in labels[2]
    assert training_label(events, SAMPLED) == training_label(events, LAST_OUT)
    assert training_label(events, TEMPORAL) != training_label(events, LAST_OUT)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_no_target_is_in_training_and_no_history_reaches_its_target(seed):
    """Events are told apart by their item here: each happens once."""
    events = made_up(seed)
    events = Histories(events.users, events.offsets, np.arange(len(events.items)), events.times)
    for config in PROTOCOLS:
        training = set(training_part(events, config).items.tolist())
        for split in ("valid", "test"):
            asked = queries(events, split, config)
            assert not training & set(asked.targets.tolist())
            for user in range(len(asked.histories)):
                own = asked.targets[asked.bounds[user] : asked.bounds[user + 1]]
                assert not len(asked.histories.of(user)) or asked.histories.of(user).max() < own.min()
        held_out = set(queries(events, "valid", config).targets.tolist())
        assert not held_out & set(queries(events, "test", config).targets.tolist())


@pytest.mark.parametrize("config", PROTOCOLS, ids=lambda config: config.protocol)
def test_what_happens_later_changes_nothing_that_is_learnt_or_read(config):
    """Leak drill: other events from validation on, the same training, the same validation histories."""
    events = made_up(1)
    if config.protocol == "temporal":
        later = events.times >= boundaries(events, config)[0]
    else:
        position = np.arange(len(events.items)) - np.repeat(events.offsets[:-1], events.lengths)
        lengths = np.repeat(events.lengths, events.lengths)
        later = (lengths >= 3) & (position >= lengths - 2)
    other = Histories(events.users, events.offsets, np.where(later, 14 - events.items, events.items), events.times)
    assert (other.items != events.items).any()
    for make in (Popularity, ItemKNN):
        plain, changed = (make(training_part(data, config), 15) for data in (events, other))
        asked, asked_changed = (queries(data, "valid", config).histories for data in (events, other))
        assert (plain.score(asked).scores == changed.score(asked_changed).scores).all()


class Memory:
    """Knows every pair of a user and an item that it was trained on."""

    def __init__(self, training: Histories, catalog: int) -> None:
        self.training, self.catalog = training, catalog

    def score(self, asked: Histories) -> Dense:
        scores = torch.zeros(len(asked), self.catalog)
        places = {user: row for row, user in enumerate(self.training.users)}
        for row, user in enumerate(asked.users):
            scores[row, self.training.of(places[user])] = 1.0
        return Dense(scores)


@pytest.mark.parametrize("config", PROTOCOLS, ids=lambda config: config.protocol)
def test_a_memory_of_the_training_part_is_at_most_chance_and_of_all_events_is_perfect(config):
    """Leak drill, test item in training: the same recommender shows what a leak would look like."""
    rng = np.random.default_rng(0)
    rows = [
        [
            (int(item), int(time))
            for item, time in zip(rng.permutation(400)[:8], np.sort(rng.integers(1, 10**6, 8)), strict=True)
        ]
        for _ in range(60)
    ]
    events, available = histories(*rows), np.ones(400, bool)
    asked = queries(events, "test", config)
    if config.protocol == "sampled":
        asked = with_negatives(asked, available, config)

    def recall(recommender: Memory) -> float:
        ranks = rank_users(recommender, asked, Pool(available), config)
        return float(per_user(ranks.above, ranks.ties, (5,), 400, asked.offsets)["recall@5"].mean())

    chance = 5 / 21 if config.protocol == "sampled" else 5 / 393
    assert recall(Memory(training_part(events, config), 400)) == pytest.approx(chance, rel=0.05)
    assert recall(Memory(events, 400)) > 0.9


def test_an_item_of_the_history_is_no_hit_even_for_an_oracle():
    """Leak drill, target in history."""

    class Oracle:
        def score(self, asked: Histories) -> Dense:
            return Dense(torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(len(asked), -1))

    events = histories([(2, 1), (1, 2), (2, 3)])
    asked = queries(events, "test", LAST_OUT)
    assert rank_users(Oracle(), asked, Pool(np.ones(4, bool)), LAST_OUT).above.tolist() == [-1]
    allowed = LAST_OUT.model_copy(update={"repeats": True})
    assert rank_users(Oracle(), asked, Pool(np.ones(4, bool)), allowed).above.tolist() == [0]


def test_ties_of_time_tell_nothing_by_the_order_of_ids():
    """Leak drill: events of one moment, stored in order of their ids; the highest id must not be the last event."""
    rng = np.random.default_rng(0)
    rows = [
        {"user_id": f"u{user:03}", "item_id": f"i{item:02}", "timestamp": 1_600_000_000_000}
        for user in range(200)
        for item in sorted(rng.permutation(50)[:5].tolist())
    ]
    builder = EventBuilder()
    part = pl.DataFrame(rows).with_columns(
        pl.lit(None).alias("sequence"), pl.lit(None).alias("event"), pl.lit(None).alias("label")
    )
    builder.add(part)
    ordered = order_events(builder.build())[0]
    items = ordered.rows["item_id"].to_numpy().reshape(200, 5)
    last_is_highest = (items[:, -1] == items.max(axis=1)).mean()
    assert 0.1 < last_is_highest < 0.3  # chance is a fifth; in the stored order it is always so


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_negatives_are_distinct_available_unseen_and_not_the_target(seed, count, repeats):
    events = made_up(seed)
    rng = np.random.default_rng(seed)
    available = rng.random(15) < 0.8
    config = SplitConfig(protocol="sampled", negatives=count, repeats=repeats)
    asked = with_negatives(queries(events, "test", config), available, config)
    for user, drawn in enumerate(asked.negatives.tolist()):
        taken = {int(asked.targets[user])} | (set() if repeats else set(asked.histories.of(user).tolist()))
        free = set(np.flatnonzero(available).tolist()) - taken
        real = [item for item in drawn if item >= 0]
        assert len(set(real)) == len(real) == min(count, len(free))
        assert set(real) <= free
    again = with_negatives(queries(events, "test", config), available, config)
    assert (again.negatives == asked.negatives).all()


def test_negatives_are_uniform():
    events = histories(*[[(0, 1), (1, 2), (2, 3)] for _ in range(4000)])
    asked = with_negatives(queries(events, "test", SAMPLED), np.ones(103, bool), SAMPLED)
    counts = np.bincount(asked.negatives.ravel(), minlength=103)
    assert not counts[:3].any()
    expected = 4000 * 20 / 100
    assert abs(counts[3:] - expected).max() < 5 * expected**0.5


def test_sampled_ranks_are_among_the_negatives_alone():
    events = histories([(0, 1), (1, 2), (2, 3)], [(3, 1), (4, 2), (5, 3)])
    config = SAMPLED.model_copy(update={"negatives": 2})
    asked = with_negatives(queries(events, "test", config), np.ones(30, bool), config)

    class Falling:
        def score(self, asked: Histories) -> Dense:
            return Dense(-torch.arange(30.0).expand(len(asked), -1))

    ranks = rank_users(Falling(), asked, Pool(np.ones(30, bool)), config, top=5)
    expected = [(asked.negatives[user] < asked.targets[user]).sum() for user in range(2)]
    assert ranks.above.tolist() == expected
    assert ranks.best.shape == (2, 0)
    # in the rows of a catalog that lacks the second target and a negative of the first
    rows = np.arange(30)
    rows[[5, asked.negatives[0, 0]]] = -1
    mapped = asked.map_items(rows)
    assert mapped.negatives[0, 0] == -1
    ranks = rank_users(Falling(), mapped, Pool(np.ones(30, bool)), config)
    assert ranks.above.tolist() == [int(asked.negatives[0, 1] < asked.targets[0]), -1]


def test_constant_scores_are_chance_among_negatives():
    events = made_up(2, users=30, items=60)
    asked = with_negatives(queries(events, "test", SAMPLED), np.ones(60, bool), SAMPLED)
    allowed = SAMPLED.model_copy(update={"repeats": True})

    class Constant:
        def score(self, asked: Histories) -> Dense:
            return Dense(torch.ones(len(asked), 60))

    ranks = rank_users(Constant(), asked, Pool(np.ones(60, bool)), allowed)
    assert recall_at(ranks.above, ranks.ties, 5) == pytest.approx(np.full(len(asked.targets), 5 / 21))


@pytest.mark.parametrize("config", PROTOCOLS, ids=lambda config: config.protocol)
def test_permuting_the_catalog_changes_no_rank_of_any_protocol(config):
    events, items = made_up(5, items=60), 60
    available = np.arange(items) % 7 != 0
    asked = queries(events, "test", config)
    if config.protocol == "sampled":
        asked = with_negatives(asked, available, config)
    released = np.random.default_rng(0).integers(0, 10**6, items)
    found = []
    for order in (np.arange(items), np.random.default_rng(1).permutation(items)):
        rows = np.argsort(order)  # new row of each old one
        recommender = ItemKNN(training_part(events, config).map_items(rows), items)
        pool = Pool(available[order], released[order])
        ranks = rank_users(recommender, asked.map_items(rows), pool, config, top=5)
        found.append((ranks.above.tolist(), ranks.ties.tolist()))
    assert found[0] == found[1]


def test_deciles_hold_a_tenth_of_the_items_and_equal_counts_share_one():
    counts = np.array([0, *range(1, 101)])
    deciles = popularity_deciles(counts)
    assert deciles[0] == -1
    assert np.bincount(deciles[1:]).tolist() == [10] * 10
    assert deciles[[1, 100]].tolist() == [0, 9]
    assert len(set(popularity_deciles(np.full(20, 3)))) == 1


def test_slices_name_cold_items_popularity_and_history_length():
    events = histories([(0, 1), (0, 2), (1, 3), (2, 4), (3, 5)], [(0, 1), (4, 2), (0, 3)])
    asked = queries(events, "test", LAST_OUT)
    counts = np.bincount(training_part(events, LAST_OUT).items, minlength=5)
    tuned, earlier = np.array([1, 1, 0, 0, 0], bool), np.array([1, 1, 1, 0, 1], bool)
    found = target_slices(asked, counts, tuned, earlier)
    assert found["cold: not in user training"].tolist() == [True, False]  # item 3 is cold, item 0 is not
    assert found["cold: not in item tuning"].tolist() == [True, False]
    assert found["cold: new in this snapshot"].tolist() == [True, False]
    assert found["history 1-20"].tolist() == [True, True]
    deciles = [label for label in found if label.startswith("popularity")]
    assert len(deciles) == 10
    assert sum(found[label].astype(int) for label in deciles).tolist() == [0, 1]
