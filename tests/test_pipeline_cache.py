"""The cache: what is planned, committed, published and read back; and what is refused."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake.transaction import AddAction

from pipeline import digests, embeddings, matrix
from pipeline.cache import (
    create_snapshot,
    open_snapshot,
    plan_embedding,
    remembered_failures,
    require_fingerprint,
    snapshot_items,
)
from pipeline.catalog import CatalogScan
from pipeline.cleanup import RetentionConfig, clean
from pipeline.embeddings import stamped
from pipeline.files import write_record
from pipeline.gates import GateConfig, pass_gate
from pipeline.store import Store
from schemas import tables
from schemas.errors import EmbeddingError, FingerprintMismatchError, GateError, StoreError
from schemas.records import STORE_FORMAT, Snapshot

TOWER = "f" * 32
IDS = ["a", "b", "c", "d"]
K1, K2, K3 = (bytes([n]) * 16 for n in (1, 2, 3))
KEYS = [K1, K2, K1, K3]  # a and c have the same text
VECTORS = {K1: [1.0, 2.0], K2: [3.0, 4.0], K3: [5.0, -6.0]}
FACTS = {
    "embedded": 0, "reused": 0, "tokens_per_second": None, "dataset": "data", "code_version": "0", "run_id": "run"
}  # fmt: skip


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
    return store.embeddings.write(TOWER, stamped(rows, run_id))


def scan(ids: list[str] = IDS, keys: list[bytes] = KEYS, available=None) -> CatalogScan:
    return CatalogScan(
        item_ids=pa.array(ids, pa.string()),
        keys=np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2),
        available=np.ones(len(ids), bool) if available is None else np.array(available),
        rows=np.arange(len(ids)),
        empty=[],
    )


def plan(store: Store, tower: str = TOWER, failed: dict[bytes, str] | None = None):
    return plan_embedding(store, tower, scan(), failed or {})


def publish(store: Store, ids=IDS, keys=KEYS, available=None, quarantine=None) -> Snapshot:
    return create_snapshot(
        store,
        TOWER,
        snapshot_items(scan(ids, keys, available), set()),
        tables.LEFT_OUT.empty_table() if quarantine is None else quarantine,
        dtype="float16",
        dim=2,
        limits=GateConfig(),
        gates={},
        facts=FACTS,
    )


def test_a_snapshot_comes_back_as_it_was_written(store):
    planned = plan(store)
    assert planned.missing.tolist() == [0, 1, 3]
    assert (planned.embedded, planned.reused) == (3, 1)
    store.embeddings.commit(TOWER, [write(store, {K1: [1, 2], K3: [5, -6]}), write(store, {K2: [3, 4]})])
    record = publish(store, available=[True, False, True, True])
    for _ in range(2):  # built from the table, then mapped
        opened = open_snapshot(store, record)
        assert opened.item_ids == IDS
        assert opened.vectors.dtype == np.float16
        assert opened.vectors.tolist() == [VECTORS[key] for key in KEYS]
        assert opened.available.tolist() == [True, False, True, True]
        assert opened.groups[0] == opened.groups[2]
        assert sorted(set(opened.groups)) == [0, 1, 2]
        assert opened.fingerprint == TOWER
        with pytest.raises(ValueError, match="read-only"):
            opened.vectors[0] = 0
    assert plan(store).missing.tolist() == []


def test_the_second_opening_reads_no_table_and_a_damaged_local_file_is_built_again(store, monkeypatch):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    record = publish(store)
    local = store.matrix_file(record.vectors_digest)
    with monkeypatch.context() as patch:
        patch.setattr(matrix, "read_column", None)
        assert isinstance(open_snapshot(store, record).vectors, np.memmap)
    for damage in (b"", b"x" * local.stat().st_size):
        local.write_bytes(damage)
        assert open_snapshot(store, record).vectors.tolist() == [VECTORS[key] for key in KEYS]
    shutil.rmtree(store.matrices)
    assert open_snapshot(store, record).vectors.tolist() == [VECTORS[key] for key in KEYS]


def test_a_snapshot_whose_digest_is_of_the_kind_before_opens(store):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    record = publish(store)
    vectors = open_snapshot(store, record).vectors
    old = record.model_copy(update={"vectors_digest": digests.block_digest(vectors, "0" * 32)})
    write_record(store.folder(record), old)
    shutil.rmtree(store.matrices)
    for _ in range(2):  # built from the table, then mapped
        assert open_snapshot(store, old).vectors.tolist() == vectors.tolist()
        assert [path.stem for path in store.matrices.iterdir()] == [old.vectors_digest]


@pytest.mark.parametrize("block", [3, 10, 64, 1 << 20])
def test_blocks_are_hashed_as_they_fill_in_whatever_order(store, monkeypatch, block):
    monkeypatch.setattr(digests, "BLOCK_BYTES", block)
    monkeypatch.setattr(matrix, "BLOCK_BYTES", block)
    rng = np.random.default_rng(block)
    keys = [bytes(rng.integers(0, 256, 16, dtype=np.uint8)) for _ in range(200)]
    wide = {key: rng.normal(size=2).astype(np.float16).tolist() for key in keys}
    for part in np.array_split(rng.permutation(200), 5):
        store.embeddings.commit(TOWER, [write(store, {keys[row]: wide[keys[row]] for row in part})])
    ids = [f"i{number:03}" for number in range(200)]
    record = publish(store, ids, keys)
    monkeypatch.setattr(matrix, "build_matrix", None)
    opened = open_snapshot(store, record)  # mapped: the digest is that of the whole array
    assert opened.vectors.tolist() == [wide[key] for key in keys]


def test_another_tower_reuses_nothing(store):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    assert plan(store, "e" * 32).missing.tolist() == [0, 1, 3]


def test_a_table_restored_from_a_backup_gets_a_snapshot_of_its_own(store):
    backup = store.root.with_name("backup")
    store.embeddings.commit(TOWER, [write(store, {K1: [1, 2]})])
    shutil.copytree(store.embeddings.folder.path, backup)
    store.embeddings.commit(TOWER, [write(store, {K2: [3, 4], K3: [5, -6]})])
    lost = publish(store)
    shutil.rmtree(store.embeddings.folder.path)
    shutil.copytree(backup, store.embeddings.folder.path)
    store.embeddings.commit(TOWER, [write(store, {K2: [3, 4.004], K3: [5, -6]})])  # the last bit, as in another batch
    made = publish(store)
    assert made.id != lost.id
    assert publish(store) == made
    shutil.rmtree(store.matrices)
    assert open_snapshot(store, made).vectors[1].tolist() == [3, np.float16(4.004)]


def test_a_text_that_failed_is_not_tried_again(store):
    store.embeddings.commit(TOWER, [write(store, {K2: [3, 4]})])
    planned = plan(store, failed={K1: "NaN", K2: "old"})
    assert (planned.missing.tolist(), planned.refused, planned.reused) == ([3], {0: "NaN", 2: "NaN"}, 1)
    left = pa.table([["c", "x"], pa.array([K1, None], pa.binary()), ["NaN", "no text"]], schema=tables.LEFT_OUT)
    record = publish(store, ["b"], [K2], quarantine=left)
    assert record.quarantined == 2
    assert remembered_failures(store, TOWER) == {K1: "NaN"}
    assert remembered_failures(store, "e" * 32) == {}


def test_the_same_content_is_the_same_snapshot_and_a_change_is_its_child(store):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    first = publish(store)
    assert publish(store) == first
    second = publish(store, ["a", "b", "c"], KEYS[:3])
    assert (second.parent, second.removed, second.items) == (first.id, 1, 3)
    assert second.content_digest != first.content_digest
    assert publish(store, ["a", "b", "c"], KEYS[:3], [True, True, False]).content_digest != second.content_digest
    assert open_snapshot(store, first).item_ids == IDS


def test_of_two_rows_of_one_key_the_first_committed_counts_for_good(store, monkeypatch):
    other, now = {key: [9.0, 9.0] for key in VECTORS}, 10 * 24 * 3_600_000
    early, files = write(store, other, "a"), []  # stamped first, committed last
    for vectors, at in [(VECTORS, now), (other, now + 5_000), (other, now - 5_000)]:  # by three nodes' clocks
        monkeypatch.setattr(embeddings.time, "time_ns", lambda at=at: at * 1_000_000)
        files.append(write(store, vectors, f"run {at}"))
        store.embeddings.commit(TOWER, [files[-1]])
        if len(files) == 1:
            record = publish(store)
    store.embeddings.commit(TOWER, [early])
    for at, files_left in [(now - 10_000, 4), (now + 1, 2), (now + 10_000, 1)]:  # the second joins around a young one
        clean(store, RetentionConfig(days=100, job_hours=0), now=at)
        assert len(store.embeddings.files(TOWER)) == files_left
        shutil.rmtree(store.matrices)
        assert open_snapshot(store, record).vectors.tolist() == [VECTORS[key] for key in KEYS]
        assert publish(store) == record


def test_what_a_clean_up_joins_of_a_table_without_commit_numbers_goes_on_counting(store, monkeypatch):
    hour, action = 3_600_000, embeddings._add_action

    def before(fingerprint, file, commit):
        made = action(fingerprint, file, commit)
        name = made.partition_values["file"].partition(".")[2]
        return AddAction(
            path=made.path, size=made.size, partition_values={"fingerprint": fingerprint, "file": name},
            modification_time=made.modification_time, data_change=True, stats=made.stats,
        )  # fmt: skip

    monkeypatch.setattr(embeddings, "_add_action", before)
    others = {key: [9.0, 9.0] for key in VECTORS}
    for at, vectors in [(50, {b"x" * 16: [1.0, 1.0]}), (50, VECTORS), (47, others)]:
        monkeypatch.setattr(embeddings.time, "time_ns", lambda at=at: (100 - at) * hour * 1_000_000)
        store.embeddings.commit(TOWER, [write(store, vectors)])
        if vectors is VECTORS:
            record = publish(store)
    monkeypatch.setattr(embeddings, "_add_action", action)
    monkeypatch.setattr(embeddings.time, "time_ns", lambda: 100 * hour * 1_000_000)
    assert clean(store, RetentionConfig(days=100, job_hours=48), now=100 * hour).files == 2
    shutil.rmtree(store.matrices)
    assert open_snapshot(store, record).vectors.tolist() == [VECTORS[key] for key in KEYS]


@pytest.mark.parametrize("damage", ["short", "gone", "foreign"])
def test_a_file_that_is_not_what_its_worker_reported_commits_nothing(store, damage):
    info = write(store, VECTORS)
    path = store.embeddings.folder.path / info["path"]
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "gone":
        path.unlink()
    else:
        pq.write_table(pa.table({"key": [K1] * 3}), path)
    with pytest.raises(StoreError, match="nothing was committed"):
        store.embeddings.commit(TOWER, [info])
    assert plan(store).embedded == 3


def test_no_snapshot_without_every_vector_or_with_a_bad_one(store):
    store.embeddings.commit(TOWER, [write(store, {K1: [1, 2]})])
    with pytest.raises(StoreError, match="2 of 4 vectors"):
        publish(store)
    store.embeddings.commit(TOWER, [write(store, {K2: [3, float("inf")], K3: [5, 6]})])
    with pytest.raises(EmbeddingError, match="not finite"):
        publish(store)
    assert store.all(Snapshot) == []


def test_a_flipped_bit_in_a_vector_is_noticed(store):
    info = write(store, VECTORS)
    store.embeddings.commit(TOWER, [info])
    record = publish(store)
    shutil.rmtree(store.matrices)
    path = store.embeddings.folder.path / info["path"]
    data = bytearray(path.read_bytes())
    place = data.index(np.array([3.0, 4.0], "<f2").tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"part-.*damaged or missing"):
        open_snapshot(store, record)


def test_vectors_of_another_width_are_noticed(store):
    store.embeddings.commit(TOWER, [write(store, VECTORS, dtype="<f4")])
    with pytest.raises(StoreError, match="not 4 bytes wide"):
        publish(store)


def test_changed_or_damaged_items_are_noticed(store):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
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
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    record = publish(store)
    changed = record.model_copy(update={"vectors_digest": "0" * 32})
    with pytest.raises(StoreError, match="vectors do not match"):
        open_snapshot(store, changed)


def test_two_towers_are_named_when_they_do_not_pair(store):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    record = publish(store)
    require_fingerprint(record, TOWER, "reader")
    require_fingerprint(record, None, "a reader of ids")
    with pytest.raises(FingerprintMismatchError, match=f"{'e' * 32}.*{TOWER}"):
        require_fingerprint(record, "e" * 32, "user tower 7")


def test_files_are_replaced_only_if_nobody_committed_meanwhile(store):
    table = store.embeddings
    table.commit(TOWER, [write(store, {K1: [1, 2]}), write(store, {K2: [3, 4]})])
    record = publish(store, ["a", "b"], [K1, K2])
    version, old = table.version(), table.files(TOWER)
    joined = (write(store, {K1: [1, 2], K2: [3, 4]}), old[0].commit)
    table.commit(TOWER, [write(store, {K3: [5, 6]})])
    assert not table.replace(TOWER, old, [joined], version)
    assert table.replace(TOWER, old, [joined], table.version())
    assert len(table.files(TOWER)) == 2
    assert not table.seal(version)
    assert table.seal(table.version())
    shutil.rmtree(store.matrices)
    assert open_snapshot(store, record).vectors.tolist() == [[1, 2], [3, 4]]


def test_a_snapshot_is_published_between_the_commits_of_others(store, monkeypatch):
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    seal, others = embeddings.EmbeddingTable.seal, []

    def sealed(table, version):
        if len(others) < 2:
            others.append(table.commit(TOWER, [write(store, {K1: [1, 2]})]))
        return seal(table, version)

    monkeypatch.setattr(embeddings.EmbeddingTable, "seal", sealed)
    assert open_snapshot(store, publish(store)).vectors.tolist() == [VECTORS[key] for key in KEYS]
    assert len(others) == 2
    assert len(store.all(Snapshot)) == len(list(store.parent(Snapshot).iterdir())) == 1
    monkeypatch.setattr(embeddings.EmbeddingTable, "seal", lambda *_: False)
    with pytest.raises(StoreError, match="committed to by others all the time"):
        publish(store, ["a"], [K1])
    assert len(list(store.parent(Snapshot).iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b'{"commitInfo": {'])
def test_a_damaged_newest_log_entry_is_named_and_the_way_out_works(store, damage):
    store.embeddings.commit(TOWER, [write(store, {K1: [1, 2]})])
    store.embeddings.commit(TOWER, [write(store, {K2: [3, 4], K3: [5, -6]})])
    newest = sorted((store.embeddings.folder.path / "_delta_log").glob("*.json"))[-1]
    newest.write_bytes(damage)
    with pytest.raises(StoreError, match=rf"{newest.name} is cut short.*remove it"):
        plan(store)
    newest.unlink()
    assert plan(store).missing.tolist() == [1, 3]


def test_another_store_format_is_refused(store, monkeypatch):
    monkeypatch.setattr(embeddings, "STORE_FORMAT", 99)
    store.embeddings.commit(TOWER, [write(store, VECTORS)])
    monkeypatch.setattr(embeddings, "STORE_FORMAT", STORE_FORMAT)
    with pytest.raises(StoreError, match=f"store format 99, this version reads {STORE_FORMAT}"):
        plan(store)


@pytest.mark.parametrize("at_least", [False, True])
def test_a_figure_that_is_no_number_passes_no_gate(at_least):
    with pytest.raises(GateError, match="gate x: nan"):
        pass_gate("x", float("nan"), 0.5, "", at_least=at_least)


def test_a_collapsed_tower_makes_no_snapshot(store):
    store.embeddings.commit(TOWER, [write(store, {K1: [1, 2], K2: [2, 4], K3: [3, 6]})])
    with pytest.raises(GateError, match=r"gate collapsed: 1 is above 0\.2; no snapshot was made"):
        publish(store)
    assert store.all(Snapshot) == []


def test_two_hundred_flipped_bytes_are_found_or_harmless(store):
    """In data files, snapshot items and the local array: every reader gives the same answer, or a named error."""
    rng = np.random.default_rng(0)
    keys = [bytes(rng.integers(0, 256, 16, dtype=np.uint8)) for _ in range(300)]
    ids = [f"i{n:03}" for n in range(300)]
    wide = {key: rng.normal(size=2).tolist() for key in keys}
    store.embeddings.commit(TOWER, [write(store, wide)])
    record = publish(store, ids, keys)
    right = np.array(open_snapshot(store, record).vectors)
    (data,) = store.embeddings.folder.path.rglob("part-*.parquet")
    items, local = store.folder(record) / "items.parquet", store.matrix_file(record.vectors_digest)
    found = 0
    for number in range(200):
        open_snapshot(store, record)  # makes the local array where it was removed
        path = (data, items, local)[number % 3]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        if path is data:
            shutil.rmtree(store.matrices)
        path.write_bytes(changed)
        try:
            opened = open_snapshot(store, record)
            assert np.array_equal(opened.vectors, right)
            assert opened.item_ids == ids
        except StoreError:
            found += 1
        try:
            missing = plan_embedding(store, TOWER, scan(ids, keys), {}).missing
            assert len(missing) == 0 or path is data
        except StoreError:
            pass
        path.write_bytes(whole)
    assert found > 60


def test_success_is_reported_after_data_log_and_folders_are_on_the_disk(store, monkeypatch):
    flushed: list[str] = []

    def fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    info = write(store, VECTORS)
    root = store.embeddings.folder.path.resolve()
    assert flushed == [str(root / info["path"]), str((root / info["path"]).parent)]
    store.embeddings.commit(TOWER, [info])
    log = root / "_delta_log"
    entries = {str(path) for path in log.glob("*.json")}
    assert entries | {str(log), str(root)} <= set(flushed)
    flushed.clear()
    record = publish(store)
    names = {path.rpartition("/")[2] for path in flushed}
    assert {"items.parquet", "quarantine.parquet", "_delta_log", "snapshots"} <= names
    assert any("record.json" in name for name in names)
    assert flushed[-1] == str(store.folder(record).parent.resolve())
