"""FAISS over the candidates of one snapshot: build, save, load, search. The only file that imports faiss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.files import next_created_at, record_id, write_record
from pipeline.store import Store
from schemas import tables
from schemas.errors import StoreError
from schemas.hashing import hash_bytes
from schemas.records import Index


class IndexConfig(BaseModel):
    """Kind of the index. ``flat`` is exact inner product."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["flat"] = "flat"


class OpenIndex:
    """A loaded index; ``item_ids`` [n] by its row numbers."""

    def __init__(self, record: Index, index: Any, item_ids: list[str]) -> None:
        self.record = record
        self.index = index
        self.item_ids = item_ids

    def search(self, query: NDArray[np.float32], k: int, exclude: set[str]) -> list[tuple[str, float]]:
        """The k best (item_id, score) for one query [D], without ``exclude``; fewer when no more are left."""
        fetch = min(k + len(exclude), len(self.item_ids))  # over-fetch: excluded items may take every place
        scores, rows = self.index.search(query[None].astype(np.float32), fetch)
        found = [
            (self.item_ids[row], float(score))
            for row, score in zip(rows[0], scores[0], strict=True)
            if row >= 0 and self.item_ids[row] not in exclude
        ]
        return found[:k]


def build_index(
    store: Store,
    config: IndexConfig,
    item_ids: list[str],
    vectors: NDArray[np.float32],
    *,
    snapshot: str | None,
    item_fingerprint: str | None,
    user_tower: str | None,
) -> tuple[Index, bool]:
    """Publish an index over the candidates, vectors [n, D] as ``UserTower.item_vectors`` gives them.

    Returns the newest index of the same snapshot and tower when its bytes are the same, and whether it was there.
    """
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    data = faiss.serialize_index(index).tobytes()
    checksum = hash_bytes(data, *(item_id.encode() for item_id in item_ids)).hex()
    existing = store.all(Index, snapshot=snapshot, user_tower=user_tower)
    if existing and existing[-1].checksum == checksum:
        return existing[-1], True
    created_at = next_created_at(store.all(Index))
    record = Index(
        id=record_id(created_at, checksum),
        created_at=created_at,
        kind=config.kind,
        snapshot=snapshot,
        item_fingerprint=item_fingerprint,
        user_tower=user_tower,
        vectors=len(item_ids),
        dim=vectors.shape[1],
        bytes=len(data),
        checksum=checksum,
    )
    with store.new(Index, record.id) as folder:
        (folder / "index.faiss").write_bytes(data)
        pq.write_table(pa.table({tables.ITEM_ID: pa.array(item_ids, pa.string())}), folder / "items.parquet")
        write_record(folder, record)
    return record, False


def open_index(store: Store, record: Index) -> OpenIndex:
    """Load an index and check it. Raises StoreError when it does not match its checksum."""
    folder: Path = store.folder(record)
    try:
        data = (folder / "index.faiss").read_bytes()
        item_ids = pq.read_table(folder / "items.parquet").column(tables.ITEM_ID).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"index {folder} cannot be read: {error}; run build-index again") from error
    if hash_bytes(data, *(item_id.encode() for item_id in item_ids)).hex() != record.checksum:
        raise StoreError(f"index {folder} does not match its checksum; remove it and run build-index again")
    return OpenIndex(record, faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)), item_ids)
