"""An index's nprobe or efSearch, chosen by queries: the least that is enough, kept in the file, not where one is
configured."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.ann import PQ_TRAIN, IndexConfig, Searcher, exact_top_k, make
from pipeline.effort import choose_effort, intersection
from pipeline.index import build_index, open_index
from pipeline.store import Store


def unit(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, CHOOSING, OTHERS = unit(8000), unit(300, seed=1), unit(300, seed=2)


def published(root, queries, **config):
    store, ids = Store(root), [f"i{n}" for n in range(len(VECTORS))]
    chosen = IndexConfig(**config)
    record, reused = build_index(
        store, chosen, ids, VECTORS, snapshot="s", item_fingerprint="f", user_tower=None, queries=queries
    )
    return open_index(store, record, chosen).searcher, record, reused


def found(searcher: Searcher, level: int) -> float:
    searcher.level = level
    return intersection(searcher.search(OTHERS, 100)[1], exact_top_k(OTHERS, VECTORS, 100)[1])


@pytest.mark.parametrize("kind", ["ivf-flat", "hnsw"])
@pytest.mark.parametrize("recall", [0.8, 0.97])
def test_the_least_effort_that_is_enough_is_kept_in_the_file(tmp_path, kind, recall):
    searcher, _, _ = published(tmp_path, CHOOSING, kind=kind, recall=recall)
    level = searcher.level
    assert level < searcher.highest
    assert found(searcher, level) >= recall - 0.003  # other queries than those it was chosen by
    if level > {"ivf-flat": 1, "hnsw": 100}[kind]:  # not the first that was tried
        assert found(searcher, round(level / 1.3)) < recall + 0.003


def test_more_recall_takes_more_lists(tmp_path):
    levels = [
        published(tmp_path / str(recall), CHOOSING, kind="ivf-flat", recall=recall)[0].level
        for recall in (0.5, 0.8, 0.9, 0.99)
    ]
    assert levels == sorted(set(levels))


def test_a_configured_effort_and_an_index_without_queries_are_left_alone(tmp_path):
    assert published(tmp_path / "a", CHOOSING, kind="ivf-flat", nprobe=3)[0].level == 3
    assert published(tmp_path / "b", CHOOSING, kind="hnsw", ef_search=130)[0].level == 130
    assert published(tmp_path / "c", None, kind="ivf-flat", nlist=200)[0].level == 200  # its default: 128 * 125^.3
    assert published(tmp_path / "d", None, kind="hnsw")[0].level == 256


def test_other_queries_are_another_index_only_where_they_choose(tmp_path):
    first = published(tmp_path, CHOOSING, kind="ivf-flat")
    assert published(tmp_path, CHOOSING, kind="ivf-flat")[1:] == (first[1], True)
    assert published(tmp_path, OTHERS, kind="ivf-flat")[2] is False
    for config in ({"kind": "flat"}, {"kind": "ivf-flat", "nprobe": 3}):
        published(tmp_path, CHOOSING, **config)
        assert published(tmp_path, OTHERS, **config)[2] is True


def test_where_the_codes_lose_it_no_further_list_is_read_for_it():
    vectors = unit(PQ_TRAIN + 16, 32)
    config = IndexConfig(kind="ivf-pq", pq_bytes=4, nlist=256, recall=0.95)
    index = make(config, vectors)
    choose_effort(index, config, "ivf-pq", vectors, unit(100, 32, seed=1))
    queries = unit(200, 32, seed=2)
    searcher, exact = Searcher(index, config, "ivf-pq"), exact_top_k(queries, vectors, 100)[1]
    chosen = intersection(searcher.search(queries, 100)[1], exact)
    assert searcher.level < 256
    searcher.level = 256
    assert intersection(searcher.search(queries, 100)[1], exact) - chosen < 0.01
    assert chosen < 0.9
