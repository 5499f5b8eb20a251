"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
from pydantic import ValidationError

from schemas.errors import DiskFullError, StoreError, first_line
from schemas.records import STORE_FORMAT, Record

R = TypeVar("R", bound=Record)
S = TypeVar("S")
T = TypeVar("T")

# what pyarrow raises for a damaged Parquet file; the last for a damaged column name
UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError)

# bytes written at once: for more the page cache takes huge pages, which a virtual machine may have to get from its
# host first, in up to ten times the time
PIECE = 1 << 19


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError out of the block names the file, which calls by descriptor and Parquet writers leave out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_full(error: BaseException) -> DiskFullError | None:
    """The error to show if ``error`` or what caused it says that the disk is full, else None."""
    for seen in _causes(error):
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        # Ray, Delta, SQLite and Rust wrap the error and keep only its words
        words = ("No space left on device", "database or disk is full", "StorageFull")
        if full or any(word in str(seen) for word in words):
            return DiskFullError("the disk is full; nothing was published. Free space and run the command again")
    return None


def disk_broken(error: BaseException) -> StoreError | None:
    """The error to show if ``error`` or what caused it says that a disk cannot be read or written, else None."""
    for seen in _causes(error):
        if isinstance(seen, OSError) and seen.errno == errno.EIO:
            where = seen.filename or "a file of the store"
        elif "Input/output error" in str(seen):
            where = next(line.strip() for line in str(seen).splitlines() if "Input/output error" in line)
        else:
            continue
        return StoreError(f"{where}: the disk reports an input/output error. Check it and run the command again")
    return None


def not_allowed(error: BaseException | None) -> StoreError | None:
    """The error to show if ``error`` or its cause says that a place cannot be read or written, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            return StoreError(f"{error.filename or 'a file'}: {error.strerror}; give access to it or name another")
        if "attempt to write a readonly database" in str(error):
            return StoreError("MLflow's database cannot be written; make the store writable, or name another one")
        error = error.__cause__
    return None


def write_file(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename: a reader sees the old file, or the new one whole."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with naming(path), aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)


class Listed(NamedTuple):
    """A file as a listing shows it. size: bytes; modified: milliseconds."""

    name: str
    size: int
    modified: int


class Folder(Protocol):
    """Files under one place, a path or a bucket's URL; names are relative to it, with slashes."""

    def below(self, prefix: str) -> list[Listed]:
        """All files below a prefix that ends at a slash, by name."""

    def read(self, name: str) -> bytes:
        """A whole file."""

    def source(self, name: str) -> Any:
        """What Parquet readers open."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def create(self, name: str, data: Any) -> None:
        """Write a new file from a buffer, flushed to the disk when this returns."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove files; those that are not there do not matter."""

    def flush(self, names: Sequence[str]) -> None:
        """Flush files that others wrote, and the folders that they lie in, to the disk."""

    def require_conditions(self) -> None:
        """Raises ConfigError where a second new file of one name would take the place of the first."""


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class LocalFolder:
    """A ``Folder`` on a local or shared file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def below(self, prefix: str) -> list[Listed]:
        """See ``Folder``."""
        found = []
        for root, _, names in os.walk(self.path / prefix, onerror=_raise_unless_gone):
            for path in (Path(root) / name for name in names):
                with suppress(FileNotFoundError):  # removed since it was listed
                    state = path.stat()
                    if stat.S_ISREG(state.st_mode):
                        name = path.relative_to(self.path).as_posix()
                        found.append(Listed(name, state.st_size, state.st_mtime_ns // 1_000_000))
        return sorted(found)

    def read(self, name: str) -> bytes:
        """See ``Folder``."""
        return (self.path / name).read_bytes()

    def source(self, name: str) -> Path:
        """See ``Folder``."""
        return self.path / name

    def size(self, name: str) -> int:
        """See ``Folder``."""
        return (self.path / name).stat().st_size

    def create(self, name: str, data: Any) -> None:
        """See ``Folder``. Its readers must not look for it before it is named to them: it grows in place."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("xb") as file:
            try:
                whole = memoryview(data).cast("B")
                for start in range(0, len(whole), PIECE):
                    file.write(whole[start : start + PIECE])
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                path.unlink(missing_ok=True)
                raise
        fsync_path(path.parent)

    def delete(self, names: Sequence[str]) -> None:
        """See ``Folder``."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def flush(self, names: Sequence[str]) -> None:
        """See ``Folder``."""
        for name in names:
            with suppress(FileNotFoundError):  # removed since it was listed
                fsync_path(self.path / name)
        for folder in {(self.path / name).parent for name in names} | {self.path, self.path.parent}:
            fsync_path(folder)

    def require_conditions(self) -> None:
        """Nothing to do: a file system makes a name once."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name when the block ends, and vanishes when the block fails.

    If ``path`` already exists then, what is there stays: names in the store are never reused for other content.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fsync_path(path.parent.parent)
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


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock file while the block runs; gives False, without waiting, where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def on_threads(work: Callable[[S], T], parts: Sequence[S], threads: int = 4) -> Iterator[T]:
    """``work`` of each part, in order, on a few threads, as many parts ahead of the caller."""
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(work, part) for part in parts[:threads])
        for number in range(len(parts)):
            result = ahead.popleft().result()
            if number + threads < len(parts):
                ahead.append(pool.submit(work, parts[number + threads]))
            yield result


def remove_folder(path: Path) -> None:
    """Take a folder's name away first, so that no reader finds half of it; one that is gone does not matter."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        shutil.rmtree(aside)


def sweep(parent: Path, oldest: int) -> None:
    """Remove what killed runs left aside under ``parent`` before ``oldest`` (milliseconds)."""
    for path in parent.glob(".*"):
        with suppress(FileNotFoundError):  # its run has just ended
            if path.stat().st_mtime * 1000 > oldest:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def write_record(folder: Path, record: Record) -> None:
    """Write ``record.json`` of a folder; without it the folder's contents do not exist."""
    write_file(folder / "record.json", record.model_dump_json(indent=1).encode())


def read_record(folder: Path, kind: type[R]) -> R:
    """The record of a folder. Raises StoreError when it is damaged or of another store format."""
    path = folder / "record.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; restore it, or remove its folder") from error
    return parse_record(data, str(path), kind)


def parse_record(data: bytes, path: str, kind: type[R]) -> R:
    """A record from its JSON; path: for messages. Raises StoreError as ``read_record``."""
    found = STORE_FORMAT
    with suppress(ValueError, AttributeError):  # else it is damaged, which is said below
        found = json.loads(data).get("store_format", STORE_FORMAT)
    if found != STORE_FORMAT:  # before its fields are looked at, which are others there
        raise StoreError(
            f"{path} has store format {found}, this version reads {STORE_FORMAT}; use the version that wrote it"
        )
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(f"{path} cannot be read: {first_line(error)}; restore it, or remove its folder") from error


def unreadable_dataset(path: Path, error: BaseException) -> StoreError:
    """What to raise for a file of a data set; prepare-data alone would find the same data set there and keep it."""
    return StoreError(
        f"{path} cannot be read: {first_line(error)}; restore it, or remove its folder and run prepare-data again"
    )


def next_created_at(existing: list[R]) -> int:
    """Now in milliseconds, but later than every existing record even when the clock went back."""
    latest = max((record.created_at for record in existing), default=0)
    return max(time.time_ns() // 1_000_000, latest + 1)


def record_id(created_at: int, digest: str) -> str:
    """A sortable name: UTC time to the millisecond and the start of a digest."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(created_at / 1000))
    return f"{stamp}{created_at % 1000:03d}-{digest[:12]}"
