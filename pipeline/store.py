"""Where everything lies in a store, and how the newest of each kind is found."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pipeline.embeddings import EmbeddingTable
from pipeline.files import read_record, records, remove_folder, sweep
from schemas.errors import NotFoundError
from schemas.records import Dataset, Index, ItemTower, Record, Snapshot, UserTower

R = TypeVar("R", bound=Record)

FOLDERS: dict[type[Record], str] = {
    Dataset: "datasets",
    ItemTower: "item_towers",
    Snapshot: "snapshots",
    UserTower: "user_towers",
    Index: "indexes",
}
MADE_BY: dict[type[Record], str] = {
    Dataset: "hllm prepare-data",
    ItemTower: "hllm tune-items",
    Snapshot: "hllm embed-items",
    UserTower: "hllm train-user",
    Index: "hllm build-index",
}


class Store:
    """A folder of immutable folders, each described by its ``record.json``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def embeddings(self) -> EmbeddingTable:
        """The table of all item vectors."""
        return EmbeddingTable(self.root / "item_embeddings")

    @property
    def matrices(self) -> Path:
        """Where the local arrays of snapshots lie; a cache that can be deleted at any time."""
        return self.root / "matrices"

    def matrix_file(self, digest: str) -> Path:
        """The local array with that digest."""
        return self.matrices / f"{digest}.bin"

    def folder(self, record: Record) -> Path:
        """Where the files of a record lie."""
        return self.parent(type(record)) / record.id

    def parent(self, kind: type[Record]) -> Path:
        """Where all records of a kind lie."""
        return self.root / FOLDERS[kind]

    def remove(self, record: Record) -> None:
        """Take a record and its files away; who has them open keeps them."""
        remove_folder(self.folder(record))

    def sweep(self, oldest: int) -> None:
        """Remove what killed runs left unfinished before ``oldest`` (milliseconds)."""
        for parent in [*(self.parent(kind) for kind in FOLDERS), self.matrices]:
            sweep(parent, oldest)

    def all(self, kind: type[R], **wanted: object) -> list[R]:
        """Records of a kind whose fields have the wanted values, oldest first."""
        found = records(self.parent(kind), kind)
        return [r for r in found if all(getattr(r, name) == value for name, value in wanted.items())]

    def newest(self, kind: type[R], **wanted: object) -> R | None:
        """The newest record of a kind whose fields have the wanted values, or None."""
        return next(reversed(self.all(kind, **wanted)), None)

    def require(self, kind: type[R], **wanted: object) -> R:
        """As ``newest``. Raises NotFoundError, naming the command that makes one."""
        record = self.newest(kind, **wanted)
        if record is None:
            which = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise NotFoundError(f"{self.parent(kind)} holds none of {which or 'any name'}; run {MADE_BY[kind]} first")
        return record

    def get(self, kind: type[R], record_id: str) -> R:
        """The record of that id, or of the only id that starts so. Raises NotFoundError."""
        parent = self.parent(kind)
        matches = sorted(path.parent for path in parent.glob("[!.]*/record.json"))
        exact = [path for path in matches if path.name == record_id]
        matches = exact or [path for path in matches if path.name.startswith(record_id)]
        if len(matches) != 1:
            what = "no" if not matches else f"{len(matches)}"
            raise NotFoundError(f"{what} {FOLDERS[kind]} called {record_id!r} in {parent}")
        return read_record(matches[0], kind)
