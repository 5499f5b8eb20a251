"""Files, folders and records that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from pipeline import files
from pipeline.files import (
    LocalFolder,
    disk_full,
    new_folder,
    next_created_at,
    read_record,
    record_id,
    write_file,
    write_record,
)
from pipeline.store import Store
from schemas.errors import NotFoundError, StoreError
from schemas.records import STORE_FORMAT, Index


def index(created_at: int, checksum: str = "c", **values) -> Index:
    fields = {
        "id": record_id(created_at, checksum), "created_at": created_at, "kind": "flat", "snapshot": "s",
        "item_fingerprint": None, "user_tower": None, "vectors": 1, "dim": 2, "bytes": 3, "checksum": checksum,
    }  # fmt: skip
    return Index(**(fields | values))


def put(store: Store, record: Index) -> None:
    with new_folder(store.folder(record)) as folder:
        write_record(folder, record)


def test_a_failed_folder_leaves_nothing(tmp_path):
    def fill_and_stop():
        with new_folder(tmp_path / "kind" / "x") as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_and_stop()
    assert list((tmp_path / "kind").iterdir()) == []


def test_a_folder_is_invisible_until_it_is_whole_and_its_name_is_never_reused(tmp_path):
    for text in ("first", "second"):
        with new_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(text)
            if text == "first":
                assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_listing_leaves_out_what_goes_meanwhile_and_names_a_broken_disk(tmp_path, monkeypatch):
    for name in ("a/one", "b/two", "c/three"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    scandir = os.scandir

    def removing(path):
        if str(path).endswith("b"):
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removing)
    assert [each.name for each in LocalFolder(tmp_path).below("")] == ["a/one", "c/three"]

    def broken(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}"):
        LocalFolder(tmp_path).below("")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (ValueError("other"), False),
    ],
)
def test_a_full_disk_is_recognised_through_wrappers(error, known):
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert (disk_full(wrapped) is not None) is known


def test_records_are_found_newest_last_and_by_the_start_of_their_id(tmp_path):
    store = Store(tmp_path)
    old, new = index(1_000), index(2_000, "d", snapshot="other")
    put(store, new)
    put(store, old)
    assert store.all(Index) == [old, new]
    assert store.newest(Index, snapshot="s") == old
    assert store.get(Index, new.id[:19]) == new
    assert store.get(Index, old.id) == old
    with pytest.raises(NotFoundError, match="2 indexes called"):
        store.get(Index, "19700101")
    with pytest.raises(NotFoundError, match="indexes holds none of snapshot nine; run hllm build-index"):
        store.require(Index, snapshot="nine")


def test_a_folder_without_its_record_does_not_exist(tmp_path):
    store = Store(tmp_path)
    put(store, index(1_000))
    (store.parent(Index) / "empty").mkdir()
    assert len(store.all(Index)) == 1


@pytest.mark.parametrize("text", ["{", '{"id": "x"}', '{"surprise": 1}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(StoreError, match=r"record\.json cannot be read"):
        read_record(tmp_path, Index)


def test_a_store_of_another_format_is_refused(tmp_path):
    write_record(tmp_path, index(1_000, store_format=99))
    with pytest.raises(StoreError, match=f"store format 99, this version reads {STORE_FORMAT}"):
        read_record(tmp_path, Index)


def test_ids_sort_by_time_and_time_never_goes_back():
    assert record_id(1_600_000_000_123, "abcdef0123456789") == "20200913T122640123-abcdef012345"
    future = index(9_999_999_999_999)
    assert next_created_at([future]) == 10_000_000_000_000
