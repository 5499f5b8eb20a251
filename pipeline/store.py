"""Where everything lies in a store, and how the newest of each kind is found: in a folder, or in a bucket."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bucket import Bucket
from pipeline.embeddings import EmbeddingTable
from pipeline.files import (
    Listed,
    LocalFolder,
    naming,
    new_folder,
    parse_record,
    read_record,
    remove_folder,
    sweep,
    write_file,
)
from schemas.errors import ConfigError, NotFoundError, StoreError
from schemas.hashing import hash_texts
from schemas.records import (
    Dataset,
    ForgottenUser,
    Index,
    ItemTower,
    Ranker,
    Record,
    Release,
    Snapshot,
    UserTower,
    UserVectors,
)
from schemas.secrets import redact

R = TypeVar("R", bound=Record)

FOLDERS: dict[type[Record], str] = {
    Dataset: "datasets",
    ItemTower: "item_towers",
    Snapshot: "snapshots",
    UserTower: "user_towers",
    Ranker: "rankers",
    Index: "indexes",
    UserVectors: "user_vectors",
    Release: "releases",
    ForgottenUser: "forgotten",
}
MADE_BY: dict[type[Record], str] = {
    Dataset: "hllm prepare-data",
    ItemTower: "hllm tune-items",
    Snapshot: "hllm embed-items",
    UserTower: "hllm train-user",
    Ranker: "hllm train-ranker",
    Index: "hllm build-index",
    UserVectors: "hllm embed-users",
    Release: "hllm refresh",
    ForgottenUser: "hllm forget-user",
}
IMPORTED = "imported"  # name of item towers that were tuned elsewhere
IMPORTED_BY = "hllm import-checkpoint"
_TABLE = "item_embeddings"
_ITEMS = "items.parquet"
_RECORD = "record.json"


def gone(snapshot_id: str, store: Store) -> NotFoundError:
    """What to raise for a snapshot that is not, or no longer, there."""
    return NotFoundError(
        f"no snapshots called {snapshot_id!r} in {store}/{FOLDERS[Snapshot]}; if it was, `hllm snapshots clean` "
        f"dropped it past retention. `hllm snapshots list` names those that are kept"
    )


class Store:
    """A folder of immutable folders, each described by its ``record.json``."""

    def __init__(self, root: Path) -> None:
        self.root = root  # where local files lie: the store itself, or the copies of a bucket's

    def __str__(self) -> str:
        return str(self.root)

    @property
    def url(self) -> str:
        """What ``open_store`` opens it by, from any working folder."""
        return str(self.root.resolve())

    @property
    def embeddings(self) -> EmbeddingTable:
        """The table of all item vectors."""
        return EmbeddingTable(LocalFolder(self.root / _TABLE))

    @property
    def matrices(self) -> Path:
        """Where the local arrays of snapshots lie; a cache that can be deleted at any time."""
        return self.root / "matrices"

    def matrix_file(self, digest: str) -> Path:
        """The local array with that digest."""
        return self.matrices / f"{digest}.bin"

    def parent(self, kind: type[Record]) -> Path:
        """Where the local files of all records of a kind lie."""
        return self.root / FOLDERS[kind]

    def folder(self, record: Record) -> Path:
        """Where the files of a record lie, to be read."""
        return self.parent(type(record)) / record.id

    def way_out(self, record: Record) -> str:
        """What to do when a file of a record is damaged, for messages."""
        return "restore it, or remove its folder"

    def new(self, kind: type[Record], name: str) -> AbstractContextManager[Path]:
        """A folder to fill, ``record.json`` included; published under ``name`` when the block ends, else gone."""
        return new_folder(self.parent(kind) / name)

    def remove(self, record: Record) -> None:
        """Take a record and its files away; who has them open keeps them."""
        remove_folder(self.parent(type(record)) / record.id)

    def read_file(self, record: Record, name: str) -> bytes | None:
        """A small file of a record, None where it has none of that name."""
        path = self.folder(record) / name
        return path.read_bytes() if path.exists() else None

    def replace_file(self, record: Record, name: str, data: bytes) -> None:
        """Put another file in the place of one that no checksum covers; a reader sees the one or the other."""
        write_file(self.parent(type(record)) / record.id / name, data)

    def sweep(self, oldest: int) -> None:
        """Remove what killed runs left unfinished before ``oldest`` (milliseconds)."""
        for parent in [*(self.parent(kind) for kind in FOLDERS), self.matrices]:
            sweep(parent, oldest)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.size for each in LocalFolder(self.root).below(""))

    @contextmanager
    def announce(self, items: pa.Table) -> Iterator[None]:
        """While the block runs, ``announced`` holds these rows of a snapshot to come."""
        folder = self.parent(Snapshot) / f".wanted.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            with naming(folder):
                pq.write_table(items, folder / _ITEMS)
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def announced(self, column: str) -> list[pa.ChunkedArray]:
        """A column of each table that is announced, or written and not yet published."""
        found = []
        for path in list(self.parent(Snapshot).glob(f".*/{_ITEMS}")):
            try:
                found.append(pq.read_table(path, columns=[column]).column(column))
            except pa.ArrowInvalid:
                continue  # not yet whole
            except OSError:
                if path.exists():  # else published or given up; this may hide what is wanted
                    raise
        return found

    def _ids(self, kind: type[Record]) -> list[str]:
        """Of the published records of a kind, sorted."""
        return sorted(path.parent.name for path in self.parent(kind).glob(f"[!.]*/{_RECORD}"))

    def _read(self, kind: type[R], record_id: str) -> R:
        return read_record(self.parent(kind) / record_id, kind)

    def all(self, kind: type[R], **wanted: object) -> list[R]:
        """Records of a kind whose fields have the wanted values, oldest first."""
        found = []
        for record_id in self._ids(kind):
            try:
                found.append(self._read(kind, record_id))
            except StoreError:
                if record_id in self._ids(kind):  # else it was removed since it was listed
                    raise
        chosen = [r for r in found if all(getattr(r, name) == value for name, value in wanted.items())]
        return sorted(chosen, key=lambda record: (record.created_at, record.id))

    def newest(self, kind: type[R], **wanted: object) -> R | None:
        """The newest record of a kind whose fields have the wanted values, or None."""
        return next(reversed(self.all(kind, **wanted)), None)

    def require(self, kind: type[R], **wanted: object) -> R:
        """As ``newest``. Raises NotFoundError, naming the command that makes one."""
        record = self.newest(kind, **wanted)
        if record is None:
            which = ", ".join(f"{name} {value}" for name, value in wanted.items())
            made_by = IMPORTED_BY if kind is ItemTower and wanted.get("name") == IMPORTED else MADE_BY[kind]
            raise NotFoundError(f"{self}/{FOLDERS[kind]} holds none of {which or 'any name'}; run {made_by} first")
        return record

    def get(self, kind: type[R], record_id: str) -> R:
        """The record of that id, or of the only id that starts so. Raises NotFoundError."""
        ids = self._ids(kind)
        matches = [each for each in ids if each == record_id] or [each for each in ids if each.startswith(record_id)]
        if not matches and kind is Snapshot:
            raise gone(record_id, self)
        if len(matches) != 1:
            what = "no" if not matches else f"{len(matches)}"
            raise NotFoundError(f"{what} {FOLDERS[kind]} called {record_id!r} in {self}/{FOLDERS[kind]}")
        return self._read(kind, matches[0])


class BucketStore(Store):
    """The same in a bucket. What is read is copied to a local folder first, once: published files never change.

    A bucket knows no rename: files get their final names one by one, and ``record.json`` is the last of them.
    """

    def __init__(self, url: str, copies: Path) -> None:
        super().__init__(copies)
        self.bucket = Bucket(url)
        self._known: dict[tuple[type[Record], str], Record] = {}

    def __str__(self) -> str:
        return str(self.bucket)

    @property
    def url(self) -> str:
        """See ``Store``."""
        return str(self.bucket)

    @property
    def embeddings(self) -> EmbeddingTable:
        """See ``Store``."""
        return EmbeddingTable(Bucket(f"{self.bucket}/{_TABLE}"))

    def folder(self, record: Record) -> Path:
        """See ``Store``. Raises StoreError when the bucket is out of reach."""
        local = self.parent(type(record)) / record.id
        if not (local / _RECORD).exists():
            with new_folder(local) as aside:
                self.bucket.download(f"{FOLDERS[type(record)]}/{record.id}", aside)
        return local

    def way_out(self, record: Record) -> str:
        """See ``Store``."""
        return f"remove {self.parent(type(record)) / record.id}, a copy that is fetched again"

    @contextmanager
    def new(self, kind: type[Record], name: str) -> Iterator[Path]:
        """See ``Store``."""
        with new_folder(self.parent(kind) / name) as folder:
            yield folder
            self.bucket.upload(folder, f"{FOLDERS[kind]}/{name}", last=_RECORD)

    def remove(self, record: Record) -> None:
        """See ``Store``."""
        prefix = f"{FOLDERS[type(record)]}/{record.id}/"
        self.bucket.delete([f"{prefix}{_RECORD}"])  # first: without it the rest does not exist
        self.bucket.delete([each.name for each in self.bucket.below(prefix)])
        shutil.rmtree(self.parent(type(record)) / record.id, ignore_errors=True)

    def read_file(self, record: Record, name: str) -> bytes | None:
        """See ``Store``. The rest of the record is not fetched."""
        folder = f"{FOLDERS[type(record)]}/{record.id}/"
        there = any(each.name == f"{folder}{name}" for each in self.bucket.below(folder))
        return self.bucket.read(f"{folder}{name}") if there else None

    def replace_file(self, record: Record, name: str, data: bytes) -> None:
        """See ``Store``. Copies on other machines stay as they are."""
        self.bucket.overwrite(f"{FOLDERS[type(record)]}/{record.id}/{name}", data)
        if (self.parent(type(record)) / record.id / name).exists():
            super().replace_file(record, name, data)

    def sweep(self, oldest: int) -> None:
        """See ``Store``. Also drops local copies of what the bucket no longer has."""
        super().sweep(oldest)
        for kind in FOLDERS:
            for files in self._unpublished(kind).values():
                if max(each.modified for each in files) <= oldest:
                    self.bucket.delete([each.name for each in files])
            for copy in set(super()._ids(kind)) - set(self._ids(kind)):
                shutil.rmtree(self.parent(kind) / copy, ignore_errors=True)

    def size(self) -> int:
        """See ``Store``."""
        return sum(each.size for each in self.bucket.below(""))

    @contextmanager
    def announce(self, items: pa.Table) -> Iterator[None]:
        """See ``Store``."""
        name = f"{FOLDERS[Snapshot]}/.wanted.{uuid.uuid4().hex}/{_ITEMS}"
        data = pa.BufferOutputStream()
        pq.write_table(items, data)
        self.bucket.create(name, data.getvalue())
        try:
            yield
        finally:
            self.bucket.delete([name])

    def announced(self, column: str) -> list[pa.ChunkedArray]:
        """See ``Store``."""
        found = []
        for files in self._unpublished(Snapshot).values():
            for each in files:
                if each.name.endswith(f"/{_ITEMS}"):
                    try:
                        data = self.bucket.read(each.name)
                    except StoreError as error:
                        if not isinstance(error.__cause__, FileNotFoundError):
                            raise
                        continue  # published or given up since it was listed
                    found.append(pq.read_table(pa.BufferReader(data), columns=[column]).column(column))
        return found

    def _unpublished(self, kind: type[Record]) -> dict[str, list[Listed]]:
        """Folder -> files, of the folders of a kind that have no record."""
        folders: dict[str, list[Listed]] = {}
        for each in self.bucket.below(f"{FOLDERS[kind]}/"):
            folders.setdefault(each.name.split("/")[1], []).append(each)
        return {
            name: files
            for name, files in folders.items()
            if not any(each.name == f"{FOLDERS[kind]}/{name}/{_RECORD}" for each in files)
        }

    def _ids(self, kind: type[Record]) -> list[str]:
        names = [each.name.split("/")[1:] for each in self.bucket.below(f"{FOLDERS[kind]}/")]
        return sorted(name[0] for name in names if len(name) == 2 and name[1] == _RECORD)

    def _read(self, kind: type[R], record_id: str) -> R:
        if (kind, record_id) not in self._known:
            name = f"{FOLDERS[kind]}/{record_id}/{_RECORD}"
            self._known[kind, record_id] = parse_record(self.bucket.read(name), f"{self}/{name}", kind)
        found = self._known[kind, record_id]
        assert isinstance(found, kind)
        return found


def open_store(where: str) -> Store:
    """The store at a path, or at a bucket's URL; the copies of the latter lie under XDG_CACHE_HOME (~/.cache)."""
    if "://" not in where:
        if re.match(r"\w+:/", where):
            raise ConfigError(f"store = {where!r}: an address of a bucket has two slashes: s3://bucket/folder")
        whole = str(Path(where).resolve())
        if re.search("%[0-9A-Fa-f]{2}", whole):
            raise ConfigError(
                f"store = {where!r}: the Delta library takes the % in {whole} for an encoded "
                f"character and finds nothing there; name a path without it"
            )
        return Store(Path(where))
    if not re.match(r"(s3|gs|az)://[^/]", where):
        raise ConfigError(
            f"store = {where!r} cannot be opened: it is no path, nor s3://, gs:// or az:// and a bucket"
        )
    if redact(where) != where:
        raise ConfigError(f"store = {where!r}: an address must hold no secrets; set them in the environment (README)")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    url = where.rstrip("/")
    name = "-".join(part for part in url.split("://")[1].split("/") if part)
    return BucketStore(url, caches / "hllm" / f"{name[:80]}-{hash_texts(url).hex()[:12]}")
