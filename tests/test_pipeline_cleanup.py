"""Clean-up: what is kept opens as before, what nobody needs is gone, and what somebody is about to need stays."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cleanup, embeddings
from pipeline.cache import announced, create_snapshot, open_snapshot, plan_embedding, snapshot_items
from pipeline.catalog import CatalogScan
from pipeline.cleanup import RetentionConfig, clean, expired
from pipeline.embeddings import stamped
from pipeline.gates import GateConfig
from pipeline.store import Store
from schemas import tables
from schemas.errors import NotFoundError, StoreError
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


def scan_of(texts: list[str]) -> CatalogScan:
    return CatalogScan(
        item_ids=pa.array([f"i{n:04}" for n in range(len(texts))]),
        keys=np.frombuffer(b"".join(map(key, texts)), dtype="<u8").reshape(-1, 2),
        available=np.ones(len(texts), bool),
        rows=np.arange(len(texts)),
        empty=[],
    )


def publish(store: Store, texts: list[str], tower: str = TOWER) -> Snapshot:
    items = snapshot_items(scan_of(texts), set())
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


def test_two_clean_ups_at_once_do_the_work_of_one(store):
    embed(store, ["a", "b"])
    made = [publish(store, ["a"] if number % 2 else ["a", "b"]) for number in range(30)]
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(lambda _: clean(Store(store.root), RetentionConfig(days=0, newest=1, job_hours=1)), range(2))
        )
    assert {id for each in done for id in each.snapshots} == {record.id for record in made[:-1]}
    assert [record.id for record in store.all(Snapshot)] == [made[-1].id]
    assert [path.name for path in store.parent(Snapshot).iterdir()] == [made[-1].id]


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


@pytest.mark.parametrize("nights", [40, pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_many_nights_with_a_clock_that_goes_back(store, monkeypatch, nights):
    """Every kept snapshot opens after every night; the table holds what they need and little more.

    The clock is 30 days back in some nights and before all other ones in others; the files bear the dates of their
    nights, so that Delta drops old log entries as it would.
    """
    rng = np.random.default_rng(0)
    start, pool = time.time_ns() // 1_000_000 - nights * DAY, [f"t{n}" for n in range(60)]
    kept: dict[str, list[str]] = {}
    dated: set[Path] = set()
    log, commits = store.root / "item_embeddings" / "_delta_log", 0

    def date(now: int) -> None:
        for path in set(store.root.rglob("*.*")) - dated:
            os.utime(path, (now / 1000, now / 1000))
            dated.add(path)

    for night in range(nights):
        now = start + night * DAY - (30 * DAY if night % 7 == 3 else 300 * DAY if night % 11 == 5 else 0)
        monkeypatch.setattr(embeddings.time, "time_ns", lambda now=now: now * 1_000_000)
        texts = sorted(rng.choice(pool, 30, replace=False).tolist())
        have = {bytes(k) for k in embeddings.read_keys(store.embeddings.files(TOWER))}
        missing = [text for text in texts if key(text) not in have]
        if missing:
            embed(store, missing, run_id=f"night{night}")
        kept[publish(store, texts).id] = texts
        date(now)
        clean(store, RetentionConfig(days=5, newest=2, job_hours=0), now)
        date(now)
        commits = max(commits, store.embeddings.version())
        records = store.all(Snapshot)
        assert len(records) >= min(night + 1, 2)
        for record in records if night % 10 == 9 else records[-2:]:
            check(store, record, kept[record.id])
    needed = {text for record in store.all(Snapshot) for text in kept[record.id]}
    assert len(needed) <= sum(file.rows for file in store.embeddings.files(TOWER)) <= 1.06 * len(needed)
    if nights > 60:
        assert len(list(log.glob("*.json"))) < commits / 2  # old entries are gone, and nothing with them


def test_a_pinned_reader_sees_the_same_bytes_until_its_snapshot_expires(store):
    """Twenty refreshes, each with a clean-up that joins files: the open array, and every opening anew."""
    texts = [f"a{n}" for n in range(40)]
    embed(store, texts)
    pinned = publish(store, texts)
    opened = open_snapshot(store, pinned)
    before = opened.vectors.tobytes()
    keep, replaced = RetentionConfig(days=1, newest=1, job_hours=0), 0
    for night in range(20):
        texts = [*texts[2:], f"b{night}", f"c{night}"]
        embed(store, texts[-2:], run_id=f"night{night}")
        publish(store, texts)
        replaced += clean(store, keep).files
        assert opened.vectors.tobytes() == before
        if night % 2:
            shutil.rmtree(store.matrices)
        assert open_snapshot(store, store.get(Snapshot, pinned.id)).vectors.tobytes() == before
    assert replaced > 20
    assert pinned.id in clean(store, NOW).snapshots
    assert opened.vectors.tobytes() == before  # who has it open keeps it
    for reopen in (lambda: store.get(Snapshot, pinned.id), lambda: open_snapshot(store, pinned)):
        with pytest.raises(NotFoundError, match=rf"{pinned.id}.*past retention.*snapshots list"):
            reopen()


def test_a_clean_up_at_every_step_takes_nothing_of_a_running_job(store, monkeypatch):
    """The job reuses vectors that no snapshot needs any more, and lies between file, commit and snapshot."""
    with monkeypatch.context() as patch:
        patch.setattr(embeddings.time, "time_ns", lambda: int(time.time() - 3 * 86_400) * 1_000_000_000)
        embed(store, ["a", "b", "c"])
        publish(store, ["a", "b", "c"])
        embed(store, ["x", "y"], run_id="two")
        publish(store, ["x"])
    retention, cleaned, busy = RetentionConfig(days=0, newest=1, job_hours=48), [], []

    def with_clean_up(name: str) -> None:
        plain = getattr(embeddings.EmbeddingTable, name)

        def step(*values, **named):
            outermost = not busy
            busy.append(name)
            try:
                if outermost:
                    cleaned.append(clean(store, retention))
                result = plain(*values, **named)
                if outermost:
                    cleaned.append(clean(store, retention))
                return result
            finally:
                busy.pop()

        monkeypatch.setattr(embeddings.EmbeddingTable, name, step)

    for name in ("write", "commit", "seal", "files"):
        with_clean_up(name)
    wanted = scan_of(["a", "b", "new"])
    with announced(store, snapshot_items(wanted, set())):
        assert plan_embedding(store, TOWER, wanted, {}).missing.tolist() == [2]
        embed(store, ["new"], run_id="three")
        record = publish(store, ["a", "b", "new"])
    assert sum(done.rows for done in cleaned) == 2  # c and y
    assert len(cleaned) > 8
    check(store, record, ["a", "b", "new"])


def test_with_retention_past_the_disk_holds_what_snapshots_need(store, tmp_path):
    """No orphan of a killed run, and at most 1.1 times the bytes that a new store with the same snapshots has."""
    rng, texts = np.random.default_rng(0), [f"t{n}" for n in range(2_000)]
    embed(store, texts)
    made = [publish(store, texts)]
    for night in range(8):
        fresh = [f"n{night}-{n}" for n in range(40)]
        texts = [*rng.permutation(texts)[40:].tolist(), *fresh]
        embed(store, fresh, run_id=f"night{night}")
        made.append(publish(store, texts))
    table = store.root / "item_embeddings"
    orphans = [
        store.root / "item_embeddings" / store.embeddings.write(TOWER, tables.EMBEDDINGS.empty_table())["path"],
        table / "_delta_log" / "00000000000000000099.json#1",
        table / "_delta_log" / "_commit_x.json.tmp",
        store.parent(Snapshot) / ".wanted.x" / "items.parquet",
        store.parent(Snapshot) / ".20250101-x.y" / "items.parquet",
        store.matrices / ".x",
        store.matrices / "y.bin",
    ]
    for path in orphans[1:]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
    done = clean(store, RetentionConfig(days=0, newest=2, job_hours=0), time.time_ns() // 1_000_000 + 1000)
    assert len(done.snapshots) == len(made) - 2
    assert [path for path in orphans if path.exists()] == []
    assert {file.path.name for file in store.embeddings.files(TOWER)} == data_files(store)
    kept = [(made[-2], None), (made[-1], texts)]
    check(store, made[-1], texts)
    other = Store(tmp_path / "other")
    needed = {bytes(k) for record, _ in kept for k in open_snapshot(store, record).keys}
    assert sum(file.rows for file in store.embeddings.files(TOWER)) <= 1.1 * len(needed)
    embed(other, [str(n) for n in range(len(needed))], run_id="night7")
    used, least = (sum(file.size for file in each.embeddings.files(TOWER)) for each in (store, other))
    assert used <= 1.1 * least
    size = sum(path.stat().st_size for path in table.rglob("*.parquet") if "_delta_log" not in path.parts)
    assert size == used


def test_a_list_that_cannot_be_read_now_keeps_what_it_names(store, monkeypatch):
    """Whatever a running job announced is unknown then, and nothing may be taken."""
    embed(store, ["a", "b"])
    publish(store, ["a"])
    before = data_files(store)
    with announced(store, snapshot_items(scan_of(["a", "b"]), set())):
        real = pq.read_table

        def fails(path, *rest, **more):
            if ".wanted" in str(path):
                raise OSError(5, "Input/output error", str(path))
            return real(path, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.store.pq.read_table", fails)
            with pytest.raises(OSError, match="Input/output error"):
                clean(store, RetentionConfig(days=0, newest=1, job_hours=1))
        assert data_files(store) == before
