"""Ranks over the full catalog: chance, masks, permutations, the protocol, and a board with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.baselines import ItemKNN, Popularity, TowerRecommender
from pipeline.evaluate import EvaluateConfig, rank_targets, top_items
from pipeline.metrics import recall_at
from pipeline.scores import Dense
from pipeline.splits import Queries, queries, training_part
from user_tower.model import UserTower, UserTowerConfig
from user_tower.sequences import Histories

REPEATS = EvaluateConfig(repeats=True)
UNSEEN = EvaluateConfig()


def histories(*rows: list[int]) -> Histories:
    offsets = np.cumsum([0, *map(len, rows)])
    flat = np.array([item for row in rows for item in row], dtype=np.int64)
    return Histories([f"u{n}" for n in range(len(rows))], offsets, flat)


class Fixed:
    """A recommender with given scores [B, N]."""

    def __init__(self, scores: list[list[float]]) -> None:
        self.scores = torch.tensor(scores)

    def score(self, histories: Histories) -> Dense:
        return Dense(self.scores[[int(user[1:]) for user in histories.users]])


def board(items: int = 20, users: int = 40) -> Histories:
    rng = np.random.default_rng(0)
    return histories(*[rng.permutation(np.arange(user % 2, items, 2)).tolist() for user in range(users)])


def test_ranks_count_what_is_above_and_what_ties():
    asked = Queries(histories([3]), np.array([1]))
    ranks = rank_targets(Fixed([[0.5, 0.2, 0.9, 1.0, 0.2, 0.1]]), asked, np.ones(6, bool), UNSEEN)
    assert (ranks.above[0], ranks.ties[0]) == (2, 1)  # 0.9 and 0.5; item 3 was seen
    ranks = rank_targets(Fixed([[0.5, 0.2, 0.9, 1.0, 0.2, 0.1]]), asked, np.ones(6, bool), REPEATS)
    assert (ranks.above[0], ranks.ties[0]) == (3, 1)


def test_repeated_unavailable_and_absent_targets_are_misses():
    asked = Queries(histories([1], [0], [0]), np.array([1, 2, -1]))
    available = np.array([True, True, False, True])
    ranks = rank_targets(Fixed([[0.1, 0.9, 0.3, 0.2]] * 3), asked, available, UNSEEN)
    assert ranks.above.tolist() == [-1, -1, -1]
    # an empty slice of users leaves the others' ranks where they belong
    asked = Queries(histories([1], [0]), np.array([-1, 1]))
    ranks = rank_targets(Fixed([[0.1, 0.9, 0.3, 0.2]] * 2), asked, available, UNSEEN)
    assert ranks.above.tolist() == [-1, 0]


def test_constant_vectors_score_chance():
    events = board()
    tower = UserTower(UserTowerConfig(hidden=8, layers=1, heads=1), 6, None)
    vectors = np.random.default_rng(0).normal(size=(1, 6)).repeat(20, axis=0).astype(np.float32)
    recommender = TowerRecommender(tower, tower.catalog([str(n) for n in range(20)], vectors, np.arange(20)))
    asked = queries(events, "test", UNSEEN)
    ranks = rank_targets(recommender, asked, np.ones(20, bool), UNSEEN)
    unseen = 20 - 9  # nine of ten events are in the history
    assert recall_at(ranks.above, ranks.ties, 5) == pytest.approx(np.full(40, 5 / unseen))
    ranks = rank_targets(recommender, asked, np.ones(20, bool), REPEATS)
    assert recall_at(ranks.above, ranks.ties, 5) == pytest.approx(np.full(40, 5 / 20))


@pytest.mark.parametrize("kind", ["popularity", "item-knn", "tower"])
def test_permuting_the_catalog_changes_no_rank(kind):
    events, items = board(), 20
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(items, 6)).astype(np.float32)
    vectors[5] = vectors[4] = vectors[12]  # texts that are the same tie exactly
    tower = UserTower(UserTowerConfig(hidden=8, layers=1, heads=1, dropout=0.0), 6, None)

    def ranks(order: np.ndarray):
        """order: old row of each new row."""
        inverse = np.argsort(order)
        training = training_part(events, UNSEEN).map_items(inverse)
        made = {
            "popularity": lambda: Popularity(training, items),
            "item-knn": lambda: ItemKNN(training, items),
            "tower": lambda: TowerRecommender(tower, tower.catalog([""] * items, vectors[order], np.arange(items))),
        }[kind]()
        return rank_targets(made, queries(events, "test", UNSEEN).map_items(inverse), np.ones(items, bool), UNSEEN)

    plain, mixed = ranks(np.arange(items)), ranks(rng.permutation(items))
    assert plain.above.tolist() == mixed.above.tolist()
    assert plain.ties.tolist() == mixed.ties.tolist()


def test_item_knn_solves_the_board():
    events = board()
    recommender = ItemKNN(training_part(events, UNSEEN), 20)
    ranks = rank_targets(recommender, queries(events, "test", UNSEEN), np.ones(20, bool), UNSEEN)
    assert ranks.above.tolist() == [0] * 40


def test_item_knn_is_the_sum_of_cosines():
    training = histories([0, 1], [0, 1, 2], [2])
    scores = ItemKNN(training, 3).score(histories([0, 2])).scores
    # columns: item 0 {u0, u1}, item 1 {u0, u1}, item 2 {u1, u2}
    assert scores[0].tolist() == pytest.approx([1 + 1 / 2, 1 + 1 / 2, 1 / 2 + 1])


def test_popularity_counts_the_training_part_only():
    events = histories([0, 0, 1, 2, 2], [0, 3, 3])
    scores = Popularity(training_part(events, UNSEEN), 4).score(events).scores
    assert scores.tolist() == [[3, 1, 0, 0]] * 2


def test_leave_last_out_holds_the_validation_item_in_the_test_history():
    events = histories([5, 6, 7, 8], [1, 2], [3, 4, 5])
    assert [training_part(events, UNSEEN).of(user).tolist() for user in range(3)] == [[5, 6], [1, 2], [3]]
    valid, test = queries(events, "valid", UNSEEN), queries(events, "test", UNSEEN)
    assert valid.histories.users == test.histories.users == ["u0", "u2"]  # two events are too few to ask
    assert [test.histories.of(user).tolist() for user in range(2)] == [[5, 6, 7], [3, 4]]
    assert (valid.targets.tolist(), test.targets.tolist()) == ([7, 4], [8, 5])


def test_top_items_leaves_out_seen_and_unavailable_ones():
    best = top_items(Fixed([[0.9, 0.8, 0.7, 0.6]]), histories([0]), np.array([True, False, True, True]), UNSEEN, 3)
    assert best == [[2, 3]]


def test_an_empty_history_has_a_zero_query():
    tower = UserTower(UserTowerConfig(hidden=8, layers=1, heads=1), 4, None)
    catalog = tower.catalog(["a", "b"], np.ones((2, 4), np.float32), np.arange(2))
    queries_BD = TowerRecommender(tower, catalog).queries(histories([], [1]))
    assert not queries_BD[0].any()
    assert queries_BD[1].any()
