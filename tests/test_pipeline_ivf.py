"""Search list by list against brute force over the same lists, and against FAISS's own way through them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import hits, ivf
from pipeline.ann import IndexConfig, Searcher, load, make, save
from pipeline.ivf import search_lists, worthwhile


def lists_of(owner: np.ndarray, vectors: np.ndarray):
    """Vectors and rows of each list, by the list [n] of each vector."""
    return lambda number: (vectors[owner == number], np.flatnonzero(owner == number))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 60), st.integers(1, 7), st.integers(1, 12), st.integers(1, 3))
def test_it_is_brute_force_over_the_probed_lists(seed, count, nlist, k, first):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-9, 10, (count, 3)).astype(np.float32)  # whole numbers: no score is rounded
    queries = rng.integers(-9, 10, (5, 3)).astype(np.float32)
    owner = rng.integers(0, nlist, count)  # some lists are empty
    probes = np.stack([rng.permutation(np.arange(-1, nlist))[: rng.integers(1, 2) + nlist - 1] for _ in range(5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ivf, "QUERIES", 3)
        patch.setattr(ivf, "_FIRST", first)
        patch.setattr(ivf, "_BLOCK", 2)
        patch.setattr(hits, "_BLOCK", 2)
        patch.setattr(ivf, "_GROWTH", 1)
        patch.setattr(ivf, "_WIDTH", 0)  # the floor is met after the first lists, however few they hold
        scores, rows = search_lists(queries, probes, k, lists_of(owner, vectors))
    for query, probed, got, places in zip(queries, probes, scores, rows, strict=True):
        inside = np.flatnonzero(np.isin(owner, probed))
        expected = np.sort(vectors[inside] @ query)[::-1][:k]
        assert got[: len(expected)].tolist() == expected.tolist()
        assert (got[len(expected) :] == -np.inf).all()
        known = places[places >= 0]
        assert len(set(known.tolist())) == len(known) == len(expected)
        assert set(known.tolist()) <= set(inside.tolist())
        assert (vectors[known] @ query).tolist() == got[: len(known)].tolist()


def test_ties_are_not_kept_beyond_k(monkeypatch):
    """All vectors equal: what could be kept of every list must not be."""
    kept = []
    sort = np.argsort
    monkeypatch.setattr(ivf.np, "argsort", lambda owner, **how: (kept.append(len(owner)), sort(owner, **how))[1])
    vectors, owner = np.ones((4000, 2), np.float32), np.arange(4000) % 40
    probes = np.tile(np.arange(40), (9, 1))
    scores, rows = search_lists(vectors[:9], probes, 10, lists_of(owner, vectors))
    assert (scores == 2).all()
    assert all(len(set(row)) == 10 for row in rows.tolist())
    assert kept == [9 * 4, 9 * 36]  # the pairs of both laps were sorted, and no hits


def test_lists_that_hold_fewer_than_k_are_read_to_the_end():
    """There is no floor before k are known: all that the first lap lacks comes from the further ones."""
    vectors, owner = np.arange(1, 121, dtype=np.float32)[:, None], np.arange(120) // 2
    probes = np.tile(np.arange(60), (3, 1))
    scores, rows = search_lists(np.ones((3, 1), np.float32), probes, 100, lists_of(owner, vectors))
    assert (rows == np.arange(119, 19, -1)).all()
    assert (scores == np.arange(120, 20, -1)).all()


def test_many_queries_find_what_faiss_finds_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((n, 16)).astype(np.float32) for n in (3000, 400))
    config = IndexConfig(kind="ivf-flat", nlist=40, nprobe=6)
    save(make(config, vectors), tmp_path / "index")
    searcher = Searcher(load(tmp_path / "index", "ivf-flat"), config, "ivf-flat")
    assert worthwhile(400, 6, 40)
    assert not worthwhile(1, 6, 40)
    together = searcher.search(queries, 20)
    alone = [searcher.search(query[None], 20) for query in queries[:50]]
    assert together[1][:50].tolist() == [rows[0].tolist() for _, rows in alone]
    assert together[0][:50] == pytest.approx(np.concatenate([scores for scores, _ in alone]), abs=1e-4)
