"""The cache: what is planned, committed, published and read back; and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cache
from pipeline.cache import (
    commit_files,
    create_snapshot,
    open_snapshot,
    plan_embedding,
    require_fingerprint,
    snapshot_items,
    write_embedding_file,
)
from pipeline.store import Store
from schemas.errors import EmbeddingError, FingerprintMismatchError, StoreError
from schemas.records import Snapshot

TOWER = "f" * 32
IDS = ["a", "b", "c", "d"]
KEYS = [b"k1", b"k2", b"k1", b"k3"]  # a and c have the same text
VECTORS = {b"k1": [1.0, 2.0], b"k2": [3.0, 4.0], b"k3": [5.0, 6.0]}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def write(store: Store, vectors: dict[bytes, list[float]], run_id: str = "run", dtype: str = "<f2") -> dict:
    rows = pa.table(
        {
            "key": pa.array(list(vectors), pa.binary()),
            "embedding": pa.array([np.array(v, dtype).tobytes() for v in vectors.values()], pa.binary()),
            "n_tokens": pa.array([7] * len(vectors), pa.int32()),
            "truncated": pa.array([False] * len(vectors)),
        }
    )
    return write_embedding_file(store.embeddings, TOWER, run_id, rows)


def publish(store: Store, ids: list[str] = IDS, keys: list[bytes] = KEYS, available=None) -> Snapshot:
    plan = plan_embedding(store, TOWER, ids, keys)
    items = snapshot_items(plan, np.ones(len(ids), bool) if available is None else np.array(available))
    return create_snapshot(
        store, plan, items, dtype="float16", dim=2, dataset="data", quarantined=[], code_version="0", run_id="run"
    )


def test_a_snapshot_comes_back_as_it_was_written(store):
    plan = plan_embedding(store, TOWER, IDS, KEYS)
    assert plan.missing == [0, 1, 3]
    assert (plan.embedded, plan.reused) == (3, 1)
    commit_files(store, TOWER, [write(store, {b"k1": [1, 2], b"k3": [5, 6]}), write(store, {b"k2": [3, 4]})])
    record = publish(store, available=[True, False, True, True])
    matrix = open_snapshot(store, record)
    assert matrix.item_ids == IDS
    assert matrix.vectors.dtype == np.float16
    assert matrix.vectors.tolist() == [VECTORS[key] for key in KEYS]
    assert matrix.available.tolist() == [True, False, True, True]
    assert matrix.groups[0] == matrix.groups[2]
    assert len(set(matrix.groups)) == 3
    assert matrix.fingerprint == TOWER
    assert plan_embedding(store, TOWER, IDS, KEYS).missing == []


def test_another_tower_reuses_nothing(store):
    commit_files(store, TOWER, [write(store, VECTORS)])
    assert plan_embedding(store, "e" * 32, IDS, KEYS).missing == [0, 1, 3]


def test_the_same_content_is_the_same_snapshot_and_a_change_is_its_child(store):
    commit_files(store, TOWER, [write(store, VECTORS)])
    first = publish(store)
    assert publish(store) == first
    second = publish(store, ["a", "b", "c"], KEYS[:3])
    assert (second.parent, second.removed, second.items) == (first.id, 1, 3)
    assert second.content_digest != first.content_digest
    assert publish(store, ["a", "b", "c"], KEYS[:3], [True, True, False]).content_digest != second.content_digest
    assert open_snapshot(store, first).item_ids == IDS


def test_of_two_rows_of_one_key_the_earlier_run_wins_everywhere(store, monkeypatch):
    late, early = {key: [9.0, 9.0] for key in VECTORS}, VECTORS
    files = []
    for vectors, at, run_id in [(late, 2_000, "a"), (early, 1_000, "b"), (late, 1_000, "c")]:
        monkeypatch.setattr(cache.time, "time_ns", lambda at=at: at * 1_000_000)
        files.append(write(store, vectors, run_id))
    commit_files(store, TOWER, files)
    assert open_snapshot(store, publish(store)).vectors.tolist() == [VECTORS[key] for key in KEYS]


@pytest.mark.parametrize("damage", ["short", "gone", "foreign"])
def test_a_file_that_is_not_what_its_worker_reported_commits_nothing(store, damage):
    info = write(store, VECTORS)
    path = store.embeddings / info["path"]
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "gone":
        path.unlink()
    else:
        pq.write_table(pa.table({"key": [b"k1"] * 3}), path)
    with pytest.raises(StoreError, match="nothing was committed"):
        commit_files(store, TOWER, [info])
    assert plan_embedding(store, TOWER, IDS, KEYS).embedded == 3


def test_no_snapshot_without_every_vector_or_with_a_bad_one(store):
    commit_files(store, TOWER, [write(store, {b"k1": [1, 2]})])
    with pytest.raises(StoreError, match="2 of 4 vectors"):
        publish(store)
    commit_files(store, TOWER, [write(store, {b"k2": [3, float("inf")], b"k3": [5, 6]})])
    with pytest.raises(EmbeddingError, match="NaN or infinity"):
        publish(store)
    assert store.all(Snapshot) == []


def test_a_flipped_bit_in_a_vector_is_noticed(store):
    info = write(store, VECTORS)
    commit_files(store, TOWER, [info])
    record = publish(store)
    path = store.embeddings / info["path"]
    data = bytearray(path.read_bytes())
    place = data.index(np.array([3.0, 4.0], "<f2").tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"part-.*damaged or missing"):
        open_snapshot(store, record)


def test_vectors_of_another_width_are_noticed(store):
    commit_files(store, TOWER, [write(store, VECTORS, dtype="<f4")])
    with pytest.raises(StoreError, match="not 4 bytes"):
        publish(store)


def test_changed_or_damaged_items_are_noticed(store):
    commit_files(store, TOWER, [write(store, VECTORS)])
    record = publish(store)
    path = store.folder(record) / "items.parquet"
    items = pq.read_table(path)
    pq.write_table(items.set_column(0, items.schema.field(0), pa.array(["a", "b", "c", "x"])), path)
    with pytest.raises(StoreError, match="do not match their digest"):
        open_snapshot(store, record)
    path.write_bytes(b"PAR1 is not enough")
    with pytest.raises(StoreError, match=r"items\.parquet is damaged"):
        open_snapshot(store, record)


def test_vectors_that_are_other_ones_now_are_noticed(store):
    commit_files(store, TOWER, [write(store, VECTORS)])
    record = publish(store)
    changed = record.model_copy(update={"vectors_digest": "0" * 32})
    with pytest.raises(StoreError, match="vectors do not match"):
        open_snapshot(store, changed)


def test_two_towers_are_named_when_they_do_not_pair(store):
    commit_files(store, TOWER, [write(store, VECTORS)])
    record = publish(store)
    require_fingerprint(record, TOWER, "reader")
    require_fingerprint(record, None, "a reader of ids")
    with pytest.raises(FingerprintMismatchError, match=f"{'e' * 32}.*{TOWER}"):
        require_fingerprint(record, "e" * 32, "user tower 7")
