"""Damaged, missing and foreign files: every reader gives the right answer or a named error, and no reader another."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from night import DIM, TOWER, night, scan, vector

from pipeline.cache import open_snapshot, plan_embedding
from pipeline.cleanup import RetentionConfig, clean
from pipeline.export import write_vectors
from pipeline.files import LocalFolder
from pipeline.gates import choose_probes
from pipeline.store import Store
from schemas.errors import StoreError
from schemas.records import Snapshot

FLIPS = 200
TEXTS = [f"t{n:02}" for n in range(70)]
ALL = RetentionConfig(days=1000, newest=9, job_hours=0)  # joins files, drops no snapshot


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store with two snapshots, eight data files, a checkpoint, and two commits after it. Not to be changed."""
    store = Store(tmp_path_factory.mktemp("made") / "store")
    night(store, "one", TEXTS[:50])
    store.embeddings.vacuum(1000)  # makes the checkpoint
    night(store, "two", TEXTS[20:])
    return store.root


@pytest.fixture
def store(made, tmp_path) -> Store:
    shutil.copytree(made, tmp_path / "store")
    return Store(tmp_path / "store")


def right(texts: list[str]) -> np.ndarray:
    return np.stack([vector(text) for text in texts])


def opens(store: Store, record: Snapshot) -> None:
    """open_snapshot, and with it ``snapshots show``, train-user, build-index and recommend."""
    shutil.rmtree(store.matrices, ignore_errors=True)
    opened = open_snapshot(store, store.get(Snapshot, record.id))
    assert opened.item_ids == (TEXTS[:50] if record.run_id == "one" else TEXTS[20:])
    assert np.array_equal(opened.vectors, right(opened.item_ids))


def exports(store: Store, record: Snapshot) -> None:
    shutil.rmtree(store.matrices, ignore_errors=True)
    write_vectors(store.root / "out.parquet", open_snapshot(store, record))
    table = pq.read_table(store.root / "out.parquet")
    found = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
    assert np.array_equal(found, right(table.column("item_id").to_pylist()).astype(np.float32))


def plans(store: Store, record: Snapshot) -> None:
    assert plan_embedding(store, TOWER, scan(TEXTS), {}).embedded == 0


def probes(store: Store, record: Snapshot) -> None:
    places, stored = choose_probes(store.embeddings, TOWER, scan(TEXTS), "float16", DIM)
    assert len(places) > 0
    assert np.array_equal(stored, right([TEXTS[place] for place in places]))


def compacts(store: Store, record: Snapshot) -> None:
    """A clean-up that went through has copied right vectors only, for their checksums are new ones."""
    assert clean(store, ALL).files > 1
    opens(store, record)


READERS = [opens, exports, plans, probes, compacts]


def flip(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


@pytest.mark.parametrize(
    "reader",
    [pytest.param(reader, marks=() if reader is probes else pytest.mark.slow) for reader in READERS],
    ids=lambda reader: reader.__name__,
)
def test_a_flipped_byte_of_a_data_file_is_found_or_harmless(made, store, reader):
    """200 flips for each reader; what could be read before a clean-up that refused can be read after it."""
    rng, found, messages = np.random.default_rng(0), Counter(), []
    files = sorted(made.glob("item_embeddings/fingerprint=*/*.parquet"))
    for number in range(FLIPS):
        whole = files[number % len(files)]
        path = store.root / whole.relative_to(made)
        flip(path, rng)
        record = store.all(Snapshot)[number % 2]
        try:
            reader(store, record)
            found["harmless"] += 1
        except StoreError as error:
            found["found"] += 1
            messages.append(str(error))
        if reader is compacts:
            assert len(store.all(Snapshot)) == 2
            if path.exists():  # not replaced: nothing was
                shutil.copy(whole, path)
                opens(store, record)
            shutil.rmtree(store.root)
            shutil.copytree(made, store.root)
        else:
            shutil.copy(whole, path)
    assert found["found"] > FLIPS // 4, found
    assert [message for message in messages if "restore" not in message] == []


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"other": [1]}), path)


DAMAGES = {
    ("item_embeddings/fingerprint=*/*.parquet", Path.unlink): "part-",
    ("item_embeddings/fingerprint=*/*.parquet", half): "part-",
    ("item_embeddings/fingerprint=*/*.parquet", empty): "part-",
    ("item_embeddings/fingerprint=*/*.parquet", foreign): "part-",
    ("item_embeddings/_delta_log/*.json", half): ".json is cut short or damaged",
    ("item_embeddings/_delta_log/*.json", empty): ".json is cut short or damaged",
    ("item_embeddings/_delta_log/*.checkpoint.parquet", half): "item_embeddings: its log cannot be read",
    ("item_embeddings/_delta_log/*.checkpoint.parquet", empty): "item_embeddings: its log cannot be read",
    ("item_embeddings/_delta_log/*.checkpoint.parquet", Path.unlink): "item_embeddings: its log cannot be read",
    ("item_embeddings/_delta_log/_last_checkpoint", half): None,
    ("item_embeddings/_delta_log/_last_checkpoint", empty): None,
    ("item_embeddings/_delta_log/_last_checkpoint", Path.unlink): None,
    ("snapshots/[!.]*/record.json", half): "record.json cannot be read",
    ("snapshots/[!.]*/record.json", empty): "record.json cannot be read",
    ("snapshots/[!.]*/items.parquet", half): "items.parquet is damaged or missing",
    ("snapshots/[!.]*/items.parquet", empty): "items.parquet is damaged or missing",
    ("snapshots/[!.]*/items.parquet", Path.unlink): "items.parquet is damaged or missing",
    ("snapshots/[!.]*/items.parquet", foreign): "items.parquet",
}


@pytest.mark.parametrize(("where", "damage"), DAMAGES, ids=lambda part: getattr(part, "__name__", part))
def test_a_damaged_file_is_named_and_never_read_as_something_else(made, store, where, damage):
    """The newest file of each kind; also by the night that comes after, which publishes nothing wrong."""
    records = store.all(Snapshot)
    path = sorted(store.root.glob(where))[-1]
    damage(path)
    name, refused = DAMAGES[where, damage], []
    for reader in READERS[:-1]:
        for record in records:
            try:
                reader(store, record)
            except StoreError as error:
                refused.append(str(error))
    try:
        third = night(store, "three", [*TEXTS[10:], "new"])
        found = open_snapshot(store, third)
        assert np.array_equal(found.vectors, right(found.item_ids))
    except StoreError as error:
        refused.append(str(error))
    assert (refused == []) == (name is None)
    assert [message for message in refused if name not in message] == []
    shutil.rmtree(store.root)
    shutil.copytree(made, store.root)
    for record in records:
        opens(store, record)


@pytest.mark.parametrize("damage", [half, empty])
def test_a_damaged_checkpoint_can_be_removed_while_the_log_is_whole(store, damage):
    log = store.embeddings.folder.path / "_delta_log"
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    damage(checkpoint)
    with pytest.raises(StoreError, match="may be removed together with _last_checkpoint"):
        plans(store, store.require(Snapshot))
    checkpoint.unlink()
    (log / "_last_checkpoint").unlink()
    for record in store.all(Snapshot):
        opens(store, record)


def test_an_empty_entry_before_the_newest_is_named_too(store):
    """Two runs commit, the power fails: the entry of one is empty, the one after it whole."""
    entries = sorted((store.embeddings.folder.path / "_delta_log").glob("*.json"))
    empty(entries[-3])
    for reader in READERS:
        with pytest.raises(StoreError, match=rf"{entries[-3].name} is cut short or damaged"):
            reader(store, store.require(Snapshot))
    with pytest.raises(StoreError, match=rf"{entries[-3].name} is cut short or damaged"):
        store.embeddings.commit(TOWER, [])


def reword(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


WRONG = {  # one digit or letter
    ("snapshots/[!.]*/record.json", '"created_at": 1', '"created_at": 2'): "its record is damaged",
    ("snapshots/[!.]*/record.json", '"fingerprint": "f', '"fingerprint": "d'): "items do not match their digest",
    ("item_embeddings/_delta_log/*.json", '"fingerprint":"f', '"fingerprint":"d'): "for item tower dfff",
}


@pytest.mark.parametrize(("where", "old", "new"), WRONG, ids=str)
def test_a_clean_up_drops_nothing_for_a_damaged_record_or_log(made, store, where, old, new):
    path = [path for path in sorted(store.root.glob(where)) if old in path.read_text()][-1]
    before = path.read_bytes()
    reword(path, old, new)
    with pytest.raises(StoreError, match=WRONG[where, old, new]):
        clean(store, RetentionConfig(days=14, newest=2, job_hours=0))
    path.write_bytes(before)
    for record in store.all(Snapshot):
        opens(store, record)


def test_another_store_format_is_named_whatever_its_fields_are(store):
    path = sorted(store.root.glob("snapshots/[!.]*/record.json"))[0]
    reword(path, '"store_format": 2', '"store_format": 3,\n "of_tomorrow": 1')
    with pytest.raises(StoreError, match="has store format 3, this version reads 2; use the version that wrote it"):
        store.all(Snapshot)


@pytest.mark.parametrize("error", [errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_an_entry_that_cannot_be_read_now_is_not_called_damaged(store, monkeypatch, error):
    def fails(self, name):
        raise OSError(error, os.strerror(error), name)

    monkeypatch.setattr(LocalFolder, "read", fails)
    with pytest.raises(StoreError, match=rf"\.json cannot be read: .*{os.strerror(error)}.* run the command again"):
        plans(store, store.require(Snapshot))


def test_a_staged_checkpoint_is_none(store):
    """What a killed clean-up left: the entries before it are looked at as before."""
    log = store.embeddings.folder.path / "_delta_log"
    entries = sorted(log.glob("*.json"))
    (log / f"{entries[-2].stem}.checkpoint.parquet#1").write_bytes(b"")
    empty(entries[-3])
    with pytest.raises(StoreError, match=rf"{entries[-3].name} is cut short or damaged"):
        plans(store, store.require(Snapshot))
