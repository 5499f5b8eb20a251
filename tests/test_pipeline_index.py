"""Exact top-k, every kind of index, filters by over-fetch against brute force, damage, and the GPU's caps."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ann, hits
from pipeline import index as index_module
from pipeline.ann import GPU_CAP, IndexConfig, Searcher, exact_top_k, lists, make, resolve_kind
from pipeline.cleanup import RetentionConfig, clean
from pipeline.digests import block_digest
from pipeline.index import ann_report, build_index, open_index, read_blocklist
from pipeline.store import Store
from schemas.errors import ConfigError, DataError, StoreError
from schemas.hashing import hash_texts

_CHECKSUM = index_module._checksum


def unit(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def opened(root, vectors, **config):
    store, ids = Store(root), [f"i{n}" for n in range(len(vectors))]
    chosen = IndexConfig(**config)
    record, _ = build_index(store, chosen, ids, vectors, snapshot="s", item_fingerprint="f", user_tower=None)
    return open_index(store, record, chosen)


def brute(query, vectors, k, out):
    """Rows by score, equal ones by row, without ``out``; small whole numbers, so that no score is rounded."""
    scores = vectors @ query
    return [row for row in np.lexsort((np.arange(len(vectors)), -scores)) if row not in out][:k]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 999), st.sampled_from([1, 3, 8192]), st.sampled_from([0, 1, 9]), st.data())
def test_exact_top_k_is_brute_force_with_ties_by_smallest_row(count, seed, width, waiting, data):
    """Also in blocks so small that most neighbours come as hits, merged at once or together."""
    rng = np.random.default_rng(seed)
    largest = data.draw(st.integers(1, 9))
    vectors, queries = (rng.integers(-largest, largest + 1, (n, 3)).astype(np.float32) for n in (count, 5))
    k = data.draw(st.integers(1, count))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_ITEMS", width), ("_SCORES", 3 * width), ("_WAITING", waiting)):
            patch.setattr(ann, name, value)
        patch.setattr(hits, "_BLOCK", 2)
        scores, rows = exact_top_k(queries, vectors, k)
    assert rows.tolist() == [brute(query, vectors, k, set()) for query in queries]
    assert (scores == np.take_along_axis(queries @ vectors.T, rows, axis=1)).all()


def test_exact_top_k_over_several_blocks_keeps_ties_in_row_order():
    vectors = np.ones((40_000, 2), dtype=np.float32)
    vectors[[39_999, 17_000]] = 2
    _, rows = exact_top_k(np.ones((300, 2), dtype=np.float32), vectors, 5)
    assert (rows == [17_000, 39_999, 0, 1, 2]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.sets(st.integers(0, 59)), st.sets(st.integers(0, 59)), st.integers(1, 60))
@pytest.mark.parametrize("kind", ["flat", "ivf-flat"])
def test_filters_equal_brute_force(tmp_path_factory, kind, seed, seen, blocked, k):
    vectors = np.random.default_rng(1).integers(-9, 10, (60, 4)).astype(np.float32)
    index = _shared(tmp_path_factory, kind, vectors)
    query = np.random.default_rng(seed).integers(-9, 10, (1, 4)).astype(np.float32)
    rows = [np.array(sorted(each), dtype=np.int64) for each in (seen, blocked)]
    found = index.search(query, k, [rows[0]], rows[1])
    expected = brute(query[0], vectors, k, seen | blocked)
    got = [row for row in found.rows[0].tolist() if row >= 0]
    assert len(got) == len(expected)
    assert found.under_filled == int(len(expected) < k)
    assert not set(got) & (seen | blocked)
    if kind == "flat":
        assert got == expected


_SHARED: dict[str, object] = {}


def _shared(factory, kind, vectors):
    if kind not in _SHARED:
        _SHARED[kind] = opened(factory.mktemp(kind), vectors, kind=kind, nlist=6, nprobe=1)
    return _SHARED[kind]


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "hnsw"])
def test_every_vector_finds_itself_after_a_load(tmp_path, kind):
    vectors = unit(2000)
    found = opened(tmp_path, vectors, kind=kind).search(vectors[:200], 1)
    assert (found.rows[:, 0] == np.arange(200)).mean() > 0.98


@pytest.mark.slow
def test_product_quantisation_loses_what_the_report_says(tmp_path):
    vectors = unit(10_000)
    index = opened(tmp_path, vectors, kind="ivf-pq", nlist=16, nprobe=16)
    report = ann_report(index, vectors, vectors[:50], np.arange(50), 10)
    assert report["model_recall"] == 1.0
    assert 0 < report["ann_loss"] < 0.9
    flat = opened(tmp_path / "flat", vectors, kind="flat")
    assert ann_report(flat, vectors, vectors[:50], np.arange(50), 10)["ann_loss"] == 0.0
    assert report["bytes"] < flat.record.bytes / 3


@pytest.mark.parametrize("kind", ["flat", "ivf-flat"])
def test_the_same_input_gives_the_same_bytes_and_is_reused(tmp_path, kind):
    vectors = unit(2000)
    first, second = (opened(tmp_path / name, vectors, kind=kind).record for name in "ab")
    assert first.checksum == second.checksum
    assert opened(tmp_path / "a", vectors, kind=kind).record.id == first.id
    assert opened(tmp_path / "a", vectors[::-1], kind=kind).record.id != first.id


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "hnsw"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_refused(tmp_path, kind, damage):
    index = opened(tmp_path, unit(500), kind=kind)
    path = tmp_path / "indexes" / index.record.id / "index.faiss"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    with pytest.raises(StoreError, match="run build-index again"):
        open_index(Store(tmp_path), index.record)


def test_an_index_whose_checksum_is_of_the_kind_before_opens(tmp_path):
    index, store = opened(tmp_path, unit(50)), Store(tmp_path)
    path = store.folder(index.record) / "index.faiss"
    digest = block_digest(np.fromfile(path, dtype=np.uint8), "0" * 32)
    old = index.record.model_copy(update={"checksum": hash_texts(digest, *index.item_ids).hex()})
    assert open_index(store, old).item_ids == index.item_ids
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="does not match its checksum"):
        open_index(store, old)


def test_a_version_of_the_files_is_hashed_once_and_a_later_write_is_seen(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(index_module, "_checksum", lambda *args: (hashed.append(1), _CHECKSUM(*args))[1])
    record = opened(tmp_path, unit(500)).record
    store, started = Store(tmp_path), len(hashed)
    open_index(store, record)
    assert len(hashed) == started + 1  # so young that a write in the same tick would not show
    monkeypatch.setattr(index_module, "_SETTLED", -1.0)
    for _ in range(3):
        open_index(store, record)
    assert len(hashed) == started + 2
    path = tmp_path / "indexes" / record.id / "index.faiss"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    for _ in range(2):
        with pytest.raises(StoreError, match="does not match its checksum"):
            open_index(store, record)
    clean(store, RetentionConfig())
    assert len(list(store.matrices.glob("*.checked"))) == 1
    store.remove(record)
    clean(store, RetentionConfig())
    assert not list(store.matrices.glob("*.checked"))


def test_what_does_not_fit_is_named(tmp_path):
    vectors = unit(30)
    index = opened(tmp_path, vectors)
    with pytest.raises(ConfigError, match="k 31: the index has 30 items"):
        index.search(vectors[:1], 31)
    bad = vectors.copy()
    bad[7, 0] = np.nan
    with pytest.raises(DataError, match="1 of 30 vectors are not finite, the first is row 7"):
        make(IndexConfig(), bad)
    with pytest.raises(DataError, match="1 of 1 queries are not finite"):
        index.search(bad[7:8], 1)
    with pytest.raises(ConfigError, match=r"index\.nlist 31: there are 30 vectors"):
        make(IndexConfig(kind="ivf-flat", nlist=31), vectors)
    assert [resolve_kind(IndexConfig(), n) for n in (100_000, 100_001)] == ["flat", "ivf-flat"]
    assert [lists(IndexConfig(), n) for n in (30, 1_000, 100_000, 1_000_000)] == [
        (1, 1), (25, 25), (2529, 255), (8000, 128)
    ]  # fmt: skip


def test_a_blocklist_is_read_at_query_time(tmp_path):
    index = opened(tmp_path, unit(10))
    (tmp_path / "block.txt").write_text("i3\n\ni4 \nnothing\ni3\n")
    rows, unknown = read_blocklist(str(tmp_path / "block.txt"), index)
    assert (rows.tolist(), unknown) == ([3, 4], 1)
    found = index.search(unit(2, seed=5), 10, None, rows)
    assert found.under_filled == 2
    assert not {3, 4} & set(found.rows.ravel().tolist())


def test_beyond_the_caps_of_a_gpu_the_cpu_searches_and_it_is_counted(monkeypatch):
    vectors = unit(3000)
    index = make(IndexConfig(kind="flat"), vectors)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", lambda: type("Options", (), {})(), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index, options: index, raising=False)
    searcher = Searcher(index, IndexConfig(), "flat")
    searcher.search(vectors[:1], GPU_CAP)
    assert searcher.gpu_fallbacks == 0
    searcher.search(vectors[:1], GPU_CAP + 1)
    assert searcher.gpu_fallbacks == 1


@pytest.mark.gpu
@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a CUDA device and faiss-gpu")
@pytest.mark.parametrize("kind", ["flat", "ivf-flat"])
def test_the_gpu_agrees_with_exact_search(tmp_path, kind):
    vectors = unit(5000)
    report = ann_report(opened(tmp_path, vectors, kind=kind, nprobe=64), vectors, vectors[:99], np.arange(99), 50)
    assert report["ann_loss"] < 0.1
