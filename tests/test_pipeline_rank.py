"""The ranking engine and the metrics together, against implementations written another way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import evaluate
from pipeline.evaluate import EvaluateConfig, Pool, rank_users
from pipeline.metrics import per_user
from pipeline.scores import Dense, Product, longest
from pipeline.splits import Queries
from schemas.errors import EmbeddingError
from user_tower.sequences import Histories

KS = (1, 3, 10)


class Table:
    """A recommender with a row of scores for each user number."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = torch.from_numpy(np.asarray(scores, dtype=np.float32))

    def score(self, histories: Histories) -> Dense:
        return Dense(self.scores[[int(user) for user in histories.users]])


class Vectors:
    """A recommender with a query for each user number."""

    def __init__(self, queries: np.ndarray, items: np.ndarray) -> None:
        self.queries, self.items = (torch.from_numpy(part.astype(np.float32)) for part in (queries, items))
        self.longest = longest(self.items)

    def score(self, histories: Histories) -> Product:
        return Product(self.queries[[int(user) for user in histories.users]], self.items, self.longest)


def histories(rows: list[list[int]]) -> Histories:
    offsets = np.cumsum([0, *map(len, rows)])
    flat = np.array([item for row in rows for item in row], dtype=np.int64)
    return Histories([str(n) for n in range(len(rows))], offsets, flat)


def questions(seen: list[list[int]], targets: list[list[int]], times: np.ndarray | None = None) -> Queries:
    offsets = np.cumsum([0, *map(len, targets)])
    flat = np.array([item for row in targets for item in row], dtype=np.int64)
    return Queries(histories(seen), flat, offsets, times)


@dataclass
class Case:
    """scores: [U, N]; seen may repeat items and be empty; targets may be empty, seen, unavailable or absent (-1)."""

    scores: np.ndarray
    seen: list[list[int]]
    targets: list[list[int]]
    available: np.ndarray

    def allowed(self, user: int) -> list[int]:
        """Candidates, best first."""
        kept = [n for n in range(self.scores.shape[1]) if self.available[n] and n not in set(self.seen[user])]
        return sorted(kept, key=lambda item: -self.scores[user, item])

    def measured(self) -> dict[str, np.ndarray]:
        asked = questions(self.seen, self.targets)
        ranks = rank_users(Table(self.scores), asked, Pool(self.available), EvaluateConfig(chunk=3))
        return per_user(ranks.above, ranks.ties, KS, self.scores.shape[1], asked.offsets)


def cases(count: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        users, items = int(rng.integers(1, 8)), int(rng.integers(4, 40))
        scores = np.stack([rng.permutation(items) for _ in range(users)]) - items / 2
        seen = [rng.integers(0, items, rng.integers(0, 6)).tolist() for _ in range(users)]
        targets = [rng.permutation(np.arange(-1, items))[: rng.integers(0, 5)].tolist() for _ in range(users)]
        yield Case(scores, seen, targets, rng.random(items) < 0.9)


def by_lists(ranked: list[int], wanted: list[int]) -> dict[str, float]:
    """The metrics read off one ranked list, as the definitions say."""
    gains = [1 / log2(place + 2) if item in wanted else 0.0 for place, item in enumerate(ranked)]
    found = {"mrr": next((1 / (place + 1) for place, item in enumerate(ranked) if item in wanted), 0.0)}
    for k in KS:
        found[f"recall@{k}"] = len(set(ranked[:k]) & set(wanted)) / len(wanted)
        found[f"ndcg@{k}"] = sum(gains[:k]) / sum(1 / log2(place + 2) for place in range(min(k, len(wanted))))
    return found


def test_two_hundred_cases_equal_the_definitions():
    asked = 0
    for case in cases(200):
        values = case.measured()
        for user, wanted in enumerate(case.targets):
            if not wanted:
                assert np.isnan(values["recall@1"][user])
                continue
            asked += 1
            expected = by_lists(case.allowed(user), wanted)
            assert {name: value[user] for name, value in values.items()} == pytest.approx(expected)
    assert asked > 400


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unsafe cast")
def test_two_hundred_cases_equal_ranx():
    """Slow because ranx compiles itself first."""
    from ranx import Qrels, Run
    from ranx import evaluate as ranx_evaluate

    wanted, listed, ours = {}, {}, []
    for number, case in enumerate(cases(200)):
        values = case.measured()
        for user, targets in enumerate(case.targets):
            ranked = case.allowed(user)
            if not targets or not ranked:
                continue
            key = f"{number}-{user}"
            wanted[key] = {str(item): 1 for item in targets}
            listed[key] = {str(item): float(case.scores[user, item]) for item in ranked}
            ours.append([key, {name: value[user] for name, value in values.items()}])
    names = list(ours[0][1])
    theirs = ranx_evaluate(Qrels(wanted), Run(listed), names, return_mean=False)
    order = {key: place for place, key in enumerate(sorted(wanted))}  # ranx sorts the queries
    for key, values in ours:
        assert values == pytest.approx({name: theirs[name][order[key]] for name in names}), key


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_count_by_expectation_over_every_order(data):
    items = data.draw(st.integers(2, 6))
    scores = data.draw(st.lists(st.integers(0, 2), min_size=items, max_size=items))
    targets = data.draw(st.lists(st.integers(0, items - 1), min_size=1, max_size=3, unique=True))
    seen = data.draw(st.lists(st.integers(0, items - 1), max_size=2))
    case = Case(np.array([scores]), [seen], [targets], np.ones(items, bool))
    orders = [
        sorted([item for item in order if item not in seen], key=lambda item: -scores[item])
        for order in permutations(range(items))
    ]
    each = [by_lists(order, targets) for order in orders]
    expected = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
    assert {name: value[0] for name, value in case.measured().items()} == pytest.approx(expected)


def brute(vectors: Vectors, asked: Queries, pool: Pool, repeats: bool) -> tuple[list[int], list[list[int]]]:
    """Ranks of the targets and best ten of each user, from the whole matrix in float64."""
    scores = vectors.queries.double().numpy() @ vectors.items.double().numpy().T
    above, lists = [], []
    for user in range(len(asked.histories)):
        first, last = asked.bounds[user : user + 2]
        mask = ~pool.available
        if not repeats:
            mask = mask.copy()
            mask[asked.histories.of(user)] = True
        for place in range(first, last):
            own = mask if pool.released is None else mask | (pool.released > asked.times[place])
            target = asked.targets[place]
            missed = target < 0 or mask[target]
            above.append(-1 if missed else int((scores[user][~own] > scores[user][target] + 1e-9).sum()))
        own = mask if pool.released is None else mask | (pool.released > asked.times[first])
        order = [item for item in np.argsort(-scores[user]).tolist() if not own[item]][:10]
        lists.append(order + [-1] * (10 - len(order)))
    return above, lists


@pytest.mark.parametrize("tile", [1, 64, 1 << 18])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("dated", [False, True])
def test_tiles_give_the_ranks_and_lists_of_the_whole_matrix(monkeypatch, tile, repeats, dated):
    monkeypatch.setitem(evaluate._TILE, "cpu", tile)
    rng = np.random.default_rng(3)
    for items in (3, 8, 61, 200):
        users = 23
        vectors = Vectors(rng.normal(size=(users, 16)), rng.normal(size=(items, 16)))
        seen = [rng.integers(0, items, rng.integers(0, 9)).tolist() for _ in range(users)]
        targets = [rng.permutation(np.arange(-1, items))[: rng.integers(1, 4)].tolist() for _ in range(users)]
        released = rng.integers(0, 100, items) if dated else None
        count = sum(map(len, targets))
        asked = questions(seen, targets, rng.integers(0, 100, count) if dated else None)
        if dated:  # an item that somebody met was there
            inside = asked.targets >= 0
            np.minimum.at(released, asked.targets[inside], asked.times[inside])
        pool = Pool(rng.random(items) < 0.8, released)
        found = rank_users(vectors, asked, pool, EvaluateConfig(chunk=7, repeats=repeats), top=10)
        above, lists = brute(vectors, asked, pool, repeats)
        assert found.above.tolist() == above
        assert not found.ties.any()
        assert found.best.tolist() == lists


def test_scores_that_are_not_finite_are_refused():
    rng = np.random.default_rng(0)
    queries, items, asked = rng.normal(size=(2, 4)), rng.normal(size=(5, 4)), questions([[], []], [[1], [2]])
    for broken in (queries, items):
        kept = broken[0, 0]
        broken[0, 0] = np.nan
        with pytest.raises(EmbeddingError, match="not finite"):
            rank_users(Vectors(queries, items), asked, Pool(np.ones(5, bool)), EvaluateConfig())
        broken[0, 0] = kept
    with pytest.raises(EmbeddingError, match="not finite"):
        rank_users(Table(np.full((2, 5), np.inf)), asked, Pool(np.ones(5, bool)), EvaluateConfig())


def test_counts_beyond_a_million_are_told_apart():
    """A tolerance relative to the largest score would make neighbours of two large counts one."""
    from pipeline.baselines import Popularity

    recommender = Popularity(histories([[0]]), 3)
    recommender.counts = torch.tensor([3_000_000.0, 2_999_999.0, 2_999_998.0])
    ranks = rank_users(recommender, questions([[]], [[1]]), Pool(np.ones(3, bool)), EvaluateConfig())
    assert (ranks.above[0], ranks.ties[0]) == (1, 0)


def test_copies_of_a_vector_tie_wherever_they_lie(monkeypatch):
    """One vector under many rows: the last bits of its product differ by place, its rank must not."""
    monkeypatch.setitem(evaluate._TILE, "cpu", 512)
    rng = np.random.default_rng(0)
    items = rng.normal(size=(997, 384))
    copies = np.sort(rng.choice(997, 40, replace=False))
    items[copies] = items[copies[0]]
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    query = items[copies[0]] + 0.05 * rng.normal(size=384)
    vectors = Vectors(query[None] / np.linalg.norm(query), items)
    ranks = [
        rank_users(vectors, questions([[]], [[int(copy)]]), Pool(np.ones(997, bool)), EvaluateConfig())
        for copy in copies
    ]
    assert {(int(rank.above[0]), int(rank.ties[0])) for rank in ranks} == {(0, 39)}


def test_memory_does_not_grow_with_users_times_catalog():
    """800 users x 20,000 items are 64 MB of scores; the pass allocates a tile of them at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for part in found if isinstance(found, list | tuple) else [found]:
                if isinstance(part, torch.Tensor) and part._base is None:
                    largest = max(largest, part.untyped_storage().nbytes())
            return found

    rng = np.random.default_rng(0)
    vectors = Vectors(rng.normal(size=(800, 8)), rng.normal(size=(20_000, 8)))
    asked = questions([[]] * 800, rng.integers(0, 20_000, (800, 1)).tolist())
    with Watch():
        rank_users(vectors, asked, Pool(np.ones(20_000, bool)), EvaluateConfig(chunk=200), top=10)
    assert 0 < largest < 800 * 20_000 * 4 / 5
