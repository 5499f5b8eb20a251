"""The item-embedding cache: what is there, what is missing, commits, snapshots, and reading one (DESIGN 6).

Vectors lie in a Delta table, content-addressed: (fingerprint, key) -> embedding. A snapshot is an immutable
map item_id -> key under one fingerprint. Shapes: N items of a snapshot, D item vector.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction
from numpy.typing import NDArray

from pipeline.files import fsync_path, new_folder, next_created_at, record_id, write_record
from pipeline.store import Store
from schemas import tables
from schemas.errors import EmbeddingError, FingerprintMismatchError, StoreError
from schemas.hashing import Digest
from schemas.records import Snapshot


@dataclass(frozen=True)
class EmbeddingPlan:
    """What a run has to do. keys: of every wanted item, in item order; missing: rows of one item per key
    that has no vector yet, in item order."""

    fingerprint: str
    item_ids: list[str]
    keys: list[bytes]
    missing: list[int]

    @property
    def embedded(self) -> int:
        """Texts to embed."""
        return len(self.missing)

    @property
    def reused(self) -> int:
        """Items whose vector is there, or comes with another item of the same text."""
        return len(self.keys) - len(self.missing)


@dataclass(frozen=True)
class ItemMatrix:
    """One open snapshot. Row numbers mean nothing outside of it.

    item_ids: N, sorted; vectors: [N, D] in the stored dtype, not normalised; groups: int64 [N], items with
    the same key share a number; available: bool [N].
    """

    record: Snapshot
    item_ids: list[str]
    vectors: NDArray[np.floating]
    groups: NDArray[np.int64]
    available: NDArray[np.bool_]

    @property
    def fingerprint(self) -> str:
        """Of the item tower that made the vectors."""
        return self.record.fingerprint


def require_fingerprint(snapshot: Snapshot, expected: str | None, reader: str) -> None:
    """Raise FingerprintMismatchError, with both fingerprints, unless ``reader`` pairs with the snapshot.

    ``expected`` None is a reader of ids, which pairs with every snapshot.
    """
    if expected is not None and snapshot.fingerprint != expected:
        raise FingerprintMismatchError(
            f"{reader} belongs to item tower {expected}, snapshot {snapshot.id} was made by "
            f"{snapshot.fingerprint}; name a snapshot of that tower, or run embed-items with it"
        )


def _open_table(store: Store) -> DeltaTable | None:
    if not (store.embeddings / "_delta_log").is_dir():
        return None
    try:
        return DeltaTable(store.embeddings)
    except DeltaError as error:
        raise StoreError(f"{store.embeddings}: its log cannot be read: {error}") from error


def _read(store: Store, fingerprint: str, columns: list[str]) -> pa.Table:
    """Rows of one fingerprint, page checksums verified. Raises StoreError for a damaged or missing file."""
    table = _open_table(store)
    wanted = pa.schema([tables.EMBEDDINGS.field(name) for name in columns])
    if table is None:
        return wanted.empty_table()
    parts = [wanted.empty_table()]
    for uri in table.file_uris(partition_filters=[(tables.FINGERPRINT, "=", fingerprint)]):
        try:
            part = pq.read_table(
                uri.removeprefix("file://"),
                columns=columns,
                page_checksum_verification=True,
                partitioning=None,
            )
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"embedding file {uri} is damaged or missing: {error}; restore it") from error
        parts.append(tables.check(part, wanted, uri))
    return pa.concat_tables(parts)


def plan_embedding(store: Store, fingerprint: str, item_ids: list[str], keys: list[bytes]) -> EmbeddingPlan:
    """Which texts have no vector under this fingerprint. item_ids must be sorted; keys in the same order."""
    seen = set(_read(store, fingerprint, [tables.KEY]).column(tables.KEY).to_pylist())
    missing = []
    for row, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            missing.append(row)
    return EmbeddingPlan(fingerprint, item_ids, keys, missing)


def write_embedding_file(root: Path, fingerprint: str, run_id: str, rows: pa.Table) -> dict[str, Any]:
    """Write one uncommitted Parquet file into the table's folder; called by workers.

    rows: key, embedding, n_tokens, truncated. Returns what ``commit_files`` needs to know about it.
    """
    count = rows.num_rows
    full = rows.append_column(tables.CREATED_AT, pa.array([time.time_ns() // 1_000_000] * count, pa.int64()))
    full = full.append_column(tables.RUN_ID, pa.array([run_id] * count, pa.string()))
    relative = f"{tables.FINGERPRINT}={fingerprint}/part-{uuid.uuid4().hex}.parquet"
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    checked = tables.check(full, tables.EMBEDDINGS, relative)
    try:  # vectors do not compress
        pq.write_table(checked, path, write_page_checksum=True, use_dictionary=False, compression="none")
        fsync_path(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
    return {
        "path": relative,
        "size": path.stat().st_size,
        "rows": count,
        "tokens": int(np.sum(rows.column(tables.N_TOKENS).to_numpy())),
        "truncated": int(np.sum(rows.column(tables.TRUNCATED).to_numpy())),
    }


def commit_files(store: Store, fingerprint: str, files: list[dict[str, Any]]) -> None:
    """Make worker-written files part of the table, in one transaction, flushed to the disk.

    Raises StoreError when a file is missing, short, or of another schema; then nothing is committed.
    """
    delta_schema = Schema.from_arrow(tables.EMBEDDINGS.append(pa.field(tables.FINGERPRINT, pa.string(), False)))
    for file in files:
        path = store.embeddings / file["path"]
        try:
            found = pq.ParquetFile(path)
            whole = found.metadata.num_rows == file["rows"] and path.stat().st_size == file["size"]
            if not whole or not found.schema_arrow.equals(tables.EMBEDDINGS):
                raise StoreError(f"{path} is not what its worker reported; nothing was committed, run again")
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{path} cannot be read back: {error}; nothing was committed, run again") from error
    actions = [
        AddAction(
            path=file["path"],
            size=file["size"],
            partition_values={tables.FINGERPRINT: fingerprint},
            modification_time=time.time_ns() // 1_000_000,
            data_change=True,
            stats=json.dumps({"numRecords": file["rows"]}),
        )
        for file in files
    ]
    DeltaTable.create(store.embeddings, schema=delta_schema, mode="ignore", partition_by=[tables.FINGERPRINT])
    DeltaTable(store.embeddings).create_write_transaction(
        actions, mode="append", schema=delta_schema, partition_by=[tables.FINGERPRINT]
    )
    log = store.embeddings / "_delta_log"
    for entry in log.glob("*.json"):
        fsync_path(entry)
    fsync_path(log)
    fsync_path(store.embeddings)


def content_digest(fingerprint: str, items: pa.Table) -> str:
    """Digest of the fingerprint and the sorted (item_id, key, available) rows; 32 hexadecimal characters."""
    digest = Digest().add(fingerprint)
    for item_id in items.column(tables.ITEM_ID).to_pylist():
        digest.add(item_id)
    digest.add(b"".join(items.column(tables.KEY).to_pylist()))
    digest.add(items.column(tables.AVAILABLE).to_numpy().astype(np.uint8).data)
    return digest.hexdigest()


def _decode(column: pa.ChunkedArray, dtype: str, dim: int, source: str) -> NDArray[np.floating]:
    """[rows, dim] from the little-endian bytes of each cell, without a Python loop over rows."""
    width = np.dtype(dtype).itemsize * dim
    parts = [np.zeros((0, dim), dtype=dtype)]
    for chunk in column.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if (np.diff(offsets) != width).any():
            raise StoreError(f"{source}: vectors are not {width} bytes ({dim} x {dtype}); restore the table")
        data = np.frombuffer(chunk.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
        parts.append(data.view(np.dtype(dtype).newbyteorder("<")).reshape(-1, dim))
    return np.concatenate(parts)


def _vectors_for(store: Store, fingerprint: str, keys: pa.Array, dtype: str, dim: int) -> NDArray[np.floating]:
    """[len(keys), dim]; of several rows with one key the smallest (created_at, run_id) wins."""
    columns = [tables.KEY, tables.EMBEDDING, tables.CREATED_AT, tables.RUN_ID]
    rows = _read(store, fingerprint, columns)
    vectors = _decode(rows.column(tables.EMBEDDING), dtype, dim, str(store.embeddings))
    first = (
        pl.DataFrame(rows.drop_columns([tables.EMBEDDING]))
        .with_row_index("place")
        .sort(tables.CREATED_AT, tables.RUN_ID, "place")
        .unique(tables.KEY, keep="first", maintain_order=True)
    )
    wanted = pl.DataFrame({tables.KEY: keys}).join(first, on=tables.KEY, how="left", maintain_order="left")
    absent = wanted["place"].null_count()
    if absent:
        raise StoreError(
            f"{absent} of {len(keys)} vectors of item tower {fingerprint} are missing from "
            f"{store.embeddings}; restore it, or run embed-items again"
        )
    return vectors[wanted["place"].to_numpy()]


def find_snapshot(store: Store, plan: EmbeddingPlan, items: pa.Table) -> Snapshot | None:
    """The newest snapshot of the plan's fingerprint if it has this content; else None."""
    newest = store.newest(Snapshot, fingerprint=plan.fingerprint)
    same = newest is not None and newest.content_digest == content_digest(plan.fingerprint, items)
    return newest if same else None


def snapshot_items(plan: EmbeddingPlan, available: NDArray[np.bool_]) -> pa.Table:
    """The rows of the plan's snapshot; available: bool, in the plan's item order."""
    return pa.table([plan.item_ids, plan.keys, available], schema=tables.SNAPSHOT_ITEMS)


def create_snapshot(
    store: Store,
    plan: EmbeddingPlan,
    items: pa.Table,
    *,
    dtype: str,
    dim: int,
    dataset: str,
    quarantined: list[str],
    code_version: str,
    run_id: str,
) -> Snapshot:
    """Publish the snapshot of a plan whose vectors are all committed.

    items: of ``snapshot_items``; quarantined: ids left out because they have no text. A rerun returns the
    snapshot that is there. Raises StoreError when a vector is missing, EmbeddingError when one is not finite.
    """
    existing = find_snapshot(store, plan, items)
    if existing is not None:
        return existing
    vectors = _vectors_for(store, plan.fingerprint, items.column(tables.KEY).combine_chunks(), dtype, dim)
    if not np.isfinite(vectors).all():
        raise EmbeddingError(f"vectors of item tower {plan.fingerprint} hold NaN or infinity; no snapshot was made")
    parent = store.newest(Snapshot, fingerprint=plan.fingerprint)
    gone: set[str] = set()
    if parent is not None:
        gone = set(_read_items(store, parent)[tables.ITEM_ID].to_pylist()) - set(plan.item_ids)
    created_at = next_created_at(store.all(Snapshot))
    content = content_digest(plan.fingerprint, items)
    record = Snapshot(
        id=record_id(created_at, content),
        created_at=created_at,
        fingerprint=plan.fingerprint,
        parent=parent.id if parent else None,
        content_digest=content,
        vectors_digest=Digest().add(np.ascontiguousarray(vectors).data).hexdigest(),
        dim=dim,
        dtype=dtype,
        items=len(plan.item_ids),
        embedded=plan.embedded,
        reused=plan.reused,
        removed=len(gone),
        quarantined=len(quarantined),
        dataset=dataset,
        code_version=code_version,
        run_id=run_id,
    )
    with new_folder(store.folder(record)) as folder:
        pq.write_table(items, folder / "items.parquet", write_page_checksum=True)
        left_out = pa.table({tables.ITEM_ID: pa.array(quarantined, pa.string())})
        reasons = pa.array(["no text in the template's fields"] * len(quarantined), pa.string())
        pq.write_table(left_out.append_column(tables.REASON, reasons), folder / "quarantine.parquet")
        write_record(folder, record)
    return record


def _read_items(store: Store, record: Snapshot) -> pa.Table:
    path = store.folder(record) / "items.parquet"
    try:
        items = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} is damaged or missing: {error}; restore it, or remove the snapshot") from error
    return tables.check(items, tables.SNAPSHOT_ITEMS, str(path))


def open_snapshot(store: Store, record: Snapshot) -> ItemMatrix:
    """Read one snapshot whole and check it against its digests. Raises StoreError when they differ."""
    items = _read_items(store, record)
    if content_digest(record.fingerprint, items) != record.content_digest:
        raise StoreError(f"{store.folder(record)}: items do not match their digest; restore the snapshot")
    keys = items.column(tables.KEY).combine_chunks()
    vectors = _vectors_for(store, record.fingerprint, keys, record.dtype, record.dim)
    if Digest().add(np.ascontiguousarray(vectors).data).hexdigest() != record.vectors_digest:
        raise StoreError(f"{store.folder(record)}: vectors do not match their digest; restore {store.embeddings}")
    groups = keys.dictionary_encode().indices.to_numpy().astype(np.int64)
    available = items.column(tables.AVAILABLE).to_numpy()
    return ItemMatrix(record, items.column(tables.ITEM_ID).to_pylist(), vectors, groups, available)
