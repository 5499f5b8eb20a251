"""Clean-up: what is kept opens as before, what nobody needs is gone, and what somebody is about to need stays."""

from __future__ import annotations

import hashlib
import shutil
import time

import numpy as np
import pyarrow as pa
import pytest

from pipeline import cleanup, embeddings
from pipeline.cache import create_snapshot, open_snapshot, snapshot_items
from pipeline.catalog import CatalogScan
from pipeline.cleanup import RetentionConfig, clean, expired
from pipeline.embeddings import stamped
from pipeline.gates import GateConfig
from pipeline.store import Store
from schemas import tables
from schemas.errors import StoreError
from schemas.records import Snapshot

TOWER, OTHER = "f" * 32, "e" * 32
NOW = RetentionConfig(days=0, newest=1, job_hours=0)
DAY = 86_400_000
FACTS = {
    "embedded": 0, "reused": 0, "tokens_per_second": None, "dataset": "d", "code_version": "0", "run_id": "run"
}  # fmt: skip


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def vector(text: str) -> list[float]:
    return np.random.default_rng(int.from_bytes(key(text)[:8], "little")).normal(size=4).astype(np.float16).tolist()


def embed(store: Store, texts: list[str], tower: str = TOWER, run_id: str = "run") -> None:
    rows = pa.table(
        {
            "key": pa.array(list(map(key, texts)), pa.binary()),
            "embedding": pa.array([np.array(vector(text), "<f2").tobytes() for text in texts], pa.binary()),
            "n_tokens": pa.array([7] * len(texts), pa.int32()),
            "truncated": pa.array([False] * len(texts)),
        }
    )
    file = store.embeddings.write(tower, stamped(rows, run_id))
    store.embeddings.commit(tower, [file])


def publish(store: Store, texts: list[str], tower: str = TOWER) -> Snapshot:
    scan = CatalogScan(
        item_ids=pa.array([f"i{n:04}" for n in range(len(texts))]),
        keys=np.frombuffer(b"".join(map(key, texts)), dtype="<u8").reshape(-1, 2),
        available=np.ones(len(texts), bool),
        rows=np.arange(len(texts)),
        empty=[],
    )
    items = snapshot_items(scan, set())
    left_out = tables.LEFT_OUT.empty_table()
    return create_snapshot(
        store, tower, items, left_out, dtype="float16", dim=4, limits=GateConfig(), gates={}, facts=FACTS
    )


def check(store: Store, record: Snapshot, texts: list[str]) -> None:
    shutil.rmtree(store.matrices, ignore_errors=True)
    assert open_snapshot(store, record).vectors.tolist() == [vector(text) for text in texts]


def data_files(store: Store) -> set[str]:
    return {path.name for path in store.embeddings.folder.path.rglob("*.parquet") if "_delta_log" not in path.parts}


def test_what_no_snapshot_needs_is_gone_and_the_rest_opens(store):
    texts = [f"a{n}" for n in range(50)]
    embed(store, texts)
    first = publish(store, texts)
    embed(store, ["new"], run_id="two")
    embed(store, texts[:5], run_id="twice")
    changed = [*texts[:25], "new"]
    second = publish(store, changed)
    embed(store, ["x"], OTHER)
    done = clean(store, NOW)
    assert done.snapshots == [first.id]
    assert done.rows == 50 - 25 + 5 + 1
    assert [record.id for record in store.all(Snapshot)] == [second.id]
    assert {file.path.name for file in store.embeddings.files(TOWER)} == data_files(store)
    assert sum(file.rows for file in store.embeddings.files(TOWER)) == 26
    assert store.embeddings.files(OTHER) == []
    check(store, second, changed)
    assert clean(store, NOW).files == 0


def test_what_is_young_stays_needed_or_not(store):
    embed(store, ["a", "b"])
    first = publish(store, ["a", "b"])
    embed(store, ["of a running job"])
    unfinished = store.embeddings.write(TOWER, tables.EMBEDDINGS.empty_table())  # of a worker, not committed
    publish(store, ["a"])
    done = clean(store, RetentionConfig(days=0, newest=1, job_hours=1))
    assert (done.snapshots, done.rows, done.files) == ([first.id], 0, 0)
    assert (store.embeddings.folder.path / unfinished["path"]).exists()
    assert len(data_files(store)) == 3


def test_retention_keeps_the_newest_of_every_tower_in_use(store, monkeypatch):
    embed(store, ["a", "b", "c"])
    embed(store, ["a"], OTHER)
    made = [publish(store, texts) for texts in (["a"], ["b"], ["c"])]
    old_tower = publish(store, ["a"], OTHER)
    made.append(publish(store, ["a", "b"]))
    later = made[-1].created_at + 20 * DAY
    config = RetentionConfig(days=14, newest=2)
    assert expired(store, config, made[-1].created_at) == []
    assert {record.id for record in expired(store, config, later)} == {made[0].id, made[1].id, old_tower.id}
    monkeypatch.setattr(cleanup, "in_use", lambda store: {TOWER, OTHER})
    assert {record.id for record in expired(store, config, later)} == {made[0].id, made[1].id}


def test_what_is_about_to_be_published_is_needed(store, monkeypatch):
    """A clean-up while a snapshot is made of old vectors that no other one needs any more."""
    with monkeypatch.context() as patch:
        patch.setattr(embeddings.time, "time_ns", lambda: int(time.time() - 3 * 86_400) * 1_000_000_000)
        embed(store, ["a", "b", "c"])
        publish(store, ["a"])
    seal, cleaned = embeddings.EmbeddingTable.seal, []

    def sealed(table, version):
        if not cleaned:
            cleaned.append(clean(store, RetentionConfig(days=0, newest=1, job_hours=48)))
        return seal(table, version)

    monkeypatch.setattr(embeddings.EmbeddingTable, "seal", sealed)
    record = publish(store, ["a", "b"])
    assert cleaned[0].rows == 1  # c; b is named by the folder that waits for its record
    check(store, record, ["a", "b"])


def test_a_commit_during_a_clean_up_is_not_lost(store, monkeypatch):
    embed(store, ["a", "b"])
    publish(store, ["a"])
    keep, met = cleanup._rows_to_keep, []

    def busy(files, needed):
        if not met:
            met.append(embed(store, ["c"], run_id="meanwhile"))
            publish(store, ["a", "c"])
        return keep(files, needed)

    monkeypatch.setattr(cleanup, "_rows_to_keep", busy)
    clean(store, NOW)
    check(store, store.require(Snapshot), ["a", "c"])
    monkeypatch.setattr(embeddings.EmbeddingTable, "replace", lambda *_: False)
    embed(store, ["d"])
    before = data_files(store)
    with pytest.raises(StoreError, match="committed to by others"):
        clean(store, NOW)
    assert data_files(store) == before


def test_many_nights_with_a_clock_that_goes_back(store, monkeypatch):
    """Every kept snapshot opens after every night; the table holds what they need and little more."""
    rng = np.random.default_rng(0)
    start, pool = 1_700_000_000_000, [f"t{n}" for n in range(60)]
    kept: dict[str, list[str]] = {}
    for night in range(40):
        now = start + night * DAY - (30 * DAY if night % 7 == 3 else 0)
        monkeypatch.setattr(embeddings.time, "time_ns", lambda now=now: now * 1_000_000)
        texts = sorted(rng.choice(pool, 30, replace=False).tolist())
        have = {bytes(k) for k in embeddings.read_keys(store.embeddings.files(TOWER))}
        missing = [text for text in texts if key(text) not in have]
        if missing:
            embed(store, missing, run_id=f"night{night}")
        kept[publish(store, texts).id] = texts
        clean(store, RetentionConfig(days=5, newest=2, job_hours=0), now)
        records = store.all(Snapshot)
        assert len(records) >= min(night + 1, 2)
        for record in records[-3:]:
            check(store, record, kept[record.id])
    needed = {text for record in store.all(Snapshot) for text in kept[record.id]}
    assert len(needed) <= sum(file.rows for file in store.embeddings.files(TOWER)) <= 1.06 * len(needed)
