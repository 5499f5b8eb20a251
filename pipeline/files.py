"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from schemas.errors import DiskFullError, StoreError
from schemas.records import STORE_FORMAT, Record

R = TypeVar("R", bound=Record)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(error: BaseException) -> DiskFullError | None:
    """The error to show if ``error`` or what caused it says that the disk is full, else None."""
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        # Ray, Delta, SQLite and Rust wrap the error and keep only its words
        words = ("No space left on device", "database or disk is full", "StorageFull")
        if full or any(word in str(seen) for word in words):
            return DiskFullError("the disk is full; nothing was published. Free space and run the command again")
        seen = seen.__cause__ or seen.__context__
    return None


def write_file(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename: a reader sees the old file, or the new one whole."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name when the block ends, and vanishes when the block fails.

    If ``path`` already exists then, what is there stays: names in the store are never reused for other content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        yield aside
        for root, _, names in os.walk(aside):
            for name in names:
                fsync_path(Path(root) / name)
            fsync_path(Path(root))
        try:
            aside.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync_path(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Take a folder's name away first, so that no reader finds half of it."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    path.rename(aside)
    shutil.rmtree(aside)


def sweep(parent: Path, oldest: int) -> None:
    """Remove what killed runs left aside under ``parent`` before ``oldest`` (milliseconds)."""
    for path in parent.glob(".*"):
        if path.stat().st_mtime * 1000 <= oldest:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_record(folder: Path, record: Record) -> None:
    """Write ``record.json`` of a folder; without it the folder's contents do not exist."""
    write_file(folder / "record.json", record.model_dump_json(indent=1).encode())


def read_record(folder: Path, kind: type[R]) -> R:
    """The record of a folder. Raises StoreError when it is damaged or of another store format."""
    path = folder / "record.json"
    try:
        text = path.read_text()
        record = kind.model_validate_json(text)
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(f"{path} cannot be read: {reason}; restore it, or remove its folder") from error
    if record.store_format != STORE_FORMAT:
        raise StoreError(
            f"{path} has store format {record.store_format}, this version reads {STORE_FORMAT}; "
            f"use the version that wrote it"
        )
    return record


def records(parent: Path, kind: type[R]) -> list[R]:
    """The records of all folders under ``parent``, oldest first; folders without a record do not exist."""
    found = [read_record(path.parent, kind) for path in sorted(parent.glob("[!.]*/record.json"))]
    return sorted(found, key=lambda record: (record.created_at, record.id))


def next_created_at(existing: list[R]) -> int:
    """Now in milliseconds, but later than every existing record even when the clock went back."""
    latest = max((record.created_at for record in existing), default=0)
    return max(time.time_ns() // 1_000_000, latest + 1)


def record_id(created_at: int, digest: str) -> str:
    """A sortable name: UTC time to the millisecond and the start of a digest."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(created_at / 1000))
    return f"{stamp}{created_at % 1000:03d}-{digest[:12]}"
