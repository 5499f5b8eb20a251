"""The item-embedding cache: plan, publish a snapshot (an immutable map item_id -> key), open one (DESIGN 6)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.catalog import CatalogScan
from pipeline.cells import PAIR, decode_keys, encode_keys, key_frame
from pipeline.digests import block_digest
from pipeline.embeddings import read_keys
from pipeline.files import UNREADABLE, naming, next_created_at, record_id, write_record
from pipeline.gates import GateConfig, check_collapse
from pipeline.matrix import ItemMatrix, build_matrix, load_matrix
from pipeline.store import Store, gone
from schemas import tables
from schemas.errors import DataError, FingerprintMismatchError, StoreError
from schemas.hashing import Digest
from schemas.records import Snapshot

_ATTEMPTS = 5  # to publish between the commits of others


@dataclass(frozen=True)
class EmbeddingPlan:
    """What a run has to do. missing: places in the scan, one item for each key that has no vector yet;
    refused: places of items whose text failed before, with the reason of each."""

    fingerprint: str
    scan: CatalogScan
    missing: NDArray[np.int64]
    refused: dict[int, str]

    @property
    def embedded(self) -> int:
        """Texts to embed."""
        return len(self.missing)

    @property
    def reused(self) -> int:
        """Items whose vector is there, or comes with another item of the same text."""
        return len(self.scan.keys) - len(self.missing) - len(self.refused)


def require_fingerprint(snapshot: Snapshot, expected: str | None, reader: str) -> None:
    """Raise FingerprintMismatchError, with both fingerprints, unless ``reader`` pairs with the snapshot.

    ``expected`` None is a reader of ids, which pairs with every snapshot.
    """
    if expected is not None and snapshot.fingerprint != expected:
        raise FingerprintMismatchError(
            f"{reader} belongs to item tower {expected}, snapshot {snapshot.id} was made by "
            f"{snapshot.fingerprint}; name a snapshot of that tower, or run embed-items with it"
        )


def plan_embedding(store: Store, fingerprint: str, scan: CatalogScan, failed: dict[bytes, str]) -> EmbeddingPlan:
    """Which texts have no vector under this fingerprint.

    failed: keys that are not to be tried again, with the reason (``remembered_failures``).
    """
    known = key_frame(read_keys(store.embeddings.files(fingerprint)))
    absent = (
        key_frame(scan.keys)
        .with_row_index("place")
        .join(known, on=PAIR, how="anti")
        .select(pl.col("place").cast(pl.Int64), first=pl.struct(PAIR).is_first_distinct())
        .sort("place")
    )
    refused = {}
    if failed:
        reasons = ((int(row), failed.get(scan.keys[row].tobytes())) for row in absent["place"].to_numpy())
        refused = {row: reason for row, reason in reasons if reason is not None}
    missing = absent.filter("first")["place"].to_numpy()
    missing = missing[~np.isin(missing, list(refused))]
    return EmbeddingPlan(fingerprint, scan, missing, refused)


@contextmanager
def announced(store: Store, items: pa.Table) -> Iterator[None]:
    """While the block runs, a clean-up keeps the vectors of these items (``snapshot_items``). Plan inside of it.

    Raises StoreError when others commit all the time.
    """
    with store.announce(items):
        for _ in range(_ATTEMPTS):  # a clean-up that began before can no longer commit after this
            version = store.embeddings.version()
            if version < 0 or store.embeddings.seal(version):
                break
        else:
            raise StoreError(f"{store.embeddings.folder} was committed to by others all the time; run it again")
        yield


def content_digest(fingerprint: str, items: pa.Table) -> str:
    """Digest of the fingerprint and the sorted (item_id, key, available) rows; 32 hexadecimal characters."""
    ids = items.column(tables.ITEM_ID).combine_chunks().cast(pa.large_string())
    offsets = np.frombuffer(ids.buffers()[1], dtype=np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    digest = Digest().add(fingerprint).add(np.diff(offsets).astype("<i8").data).add(data.data)
    digest.add(np.ascontiguousarray(decode_keys(items.column(tables.KEY))).data)
    digest.add(items.column(tables.AVAILABLE).to_numpy().astype(np.uint8).data)
    return digest.hexdigest()


def snapshot_items(scan: CatalogScan, without: set[int]) -> pa.Table:
    """The rows of a snapshot: every item of the scan but those at the places ``without``."""
    items = pa.table([scan.item_ids, encode_keys(scan.keys), scan.available], schema=tables.SNAPSHOT_ITEMS)
    if not without:
        return items
    kept = np.ones(items.num_rows, dtype=bool)
    kept[list(without)] = False
    return items.filter(pa.array(kept))


def find_snapshot(store: Store, fingerprint: str, items: pa.Table, quarantine: pa.Table) -> Snapshot | None:
    """The newest snapshot of an item tower if it has these items, left out these, and reads back whole where
    anything was committed since; else None.

    Raises StoreError when the table or the snapshot is damaged.
    """
    newest = store.newest(Snapshot, fingerprint=fingerprint)
    if newest is None or newest.content_digest != content_digest(fingerprint, items):
        return None
    if not left_out(store, newest).equals(quarantine):
        return None
    if all(file.written_at <= newest.created_at for file in store.embeddings.files(fingerprint)):
        return newest  # nothing was committed since it was made of them
    keys = decode_keys(items.column(tables.KEY))
    found, vectors = build_matrix(store, fingerprint, keys, newest.dtype, newest.dim, check=True)
    digest = newest.vectors_digest
    same = found == digest or block_digest(vectors, digest) == digest
    return newest if same else None  # else the table was restored, and embedded into, since


def create_snapshot(
    store: Store,
    fingerprint: str,
    items: pa.Table,
    quarantine: pa.Table,
    *,
    dtype: str,
    dim: int,
    limits: GateConfig,
    gates: dict[str, float],
    facts: dict[str, Any],
) -> Snapshot:
    """Publish a snapshot whose vectors are all committed; a rerun returns the one that is there (``find_snapshot``).

    items: of ``snapshot_items``; quarantine: of ``tables.LEFT_OUT``; gates: what was measured before; facts: the
    other fields of the record. Raises StoreError when a vector is missing, EmbeddingError when one is not finite
    or zero, GateError when the vectors have collapsed.
    """
    existing = find_snapshot(store, fingerprint, items, quarantine)
    if existing is not None:
        return existing
    parent = store.newest(Snapshot, fingerprint=fingerprint)
    content = content_digest(fingerprint, items)
    created_at = next_created_at(store.all(Snapshot))
    name = record_id(created_at, content)
    with store.new(Snapshot, name) as folder:
        # written before the vectors are looked for: a clean-up counts the keys of what is about to be published
        with naming(folder):
            pq.write_table(items, folder / "items.parquet", write_page_checksum=True)
            pq.write_table(quarantine, folder / "quarantine.parquet", write_page_checksum=True)
        keys = decode_keys(items.column(tables.KEY))
        digest, vectors = _sealed_matrix(store, fingerprint, keys, dtype, dim)
        record = Snapshot(
            id=name,
            created_at=created_at,
            fingerprint=fingerprint,
            parent=parent.id if parent else None,
            content_digest=content,
            vectors_digest=digest,
            dim=dim,
            dtype=dtype,
            items=items.num_rows,
            removed=0 if parent is None else _count_removed(store, parent, items),
            quarantined=quarantine.num_rows,
            gates=gates | {"collapsed": check_collapse(vectors, keys, limits)},
            **facts,
        )
        write_record(folder, record)
    return record


def _sealed_matrix(
    store: Store, fingerprint: str, keys: NDArray[np.uint64], dtype: str, dim: int
) -> tuple[str, NDArray[np.floating]]:
    """``build_matrix``, and certain that no clean-up took one of its vectors meanwhile."""
    for _ in range(_ATTEMPTS):
        version = store.embeddings.version()
        built = build_matrix(store, fingerprint, keys, dtype, dim, check=True)
        if store.embeddings.seal(version):
            return built
    raise StoreError(f"{store.embeddings.folder} was committed to by others all the time; run embed-items again")


def _count_removed(store: Store, parent: Snapshot, items: pa.Table) -> int:
    before, now = (pl.DataFrame(table.select([tables.ITEM_ID])) for table in (read_items(store, parent), items))
    return before.join(now, on=tables.ITEM_ID, how="anti").height


def _read_checked(store: Store, record: Snapshot, name: str, schema: pa.Schema) -> pa.Table:
    path = store.folder(record) / name
    try:
        found = pq.read_table(path, page_checksum_verification=True)
        return tables.check(found, schema, str(path))
    except (*UNREADABLE, DataError) as error:
        raise StoreError(f"{path} is damaged or missing: {error}; {store.way_out(record)}") from error


def read_items(store: Store, record: Snapshot) -> pa.Table:
    """item_id, key, available of a snapshot, checked against its digest. Raises StoreError when they differ."""
    items = _read_checked(store, record, "items.parquet", tables.SNAPSHOT_ITEMS)
    if content_digest(record.fingerprint, items) != record.content_digest:
        raise StoreError(f"{store.folder(record)}: items do not match their digest; {store.way_out(record)}")
    return items


def left_out(store: Store, record: Snapshot) -> pa.Table:
    """item_id, key, reason (``tables.LEFT_OUT``) of the items without a vector. Raises StoreError when damaged."""
    return _read_checked(store, record, "quarantine.parquet", tables.LEFT_OUT)


def remembered_failures(store: Store, fingerprint: str) -> dict[bytes, str]:
    """Keys that the newest snapshot of an item tower left out because they failed twice, with the reasons."""
    newest = store.newest(Snapshot, fingerprint=fingerprint)
    if newest is None:
        return {}
    left = left_out(store, newest)
    rows = zip(left.column(tables.KEY).to_pylist(), left.column(tables.REASON).to_pylist(), strict=True)
    return {key: reason for key, reason in rows if key is not None}


def open_snapshot(store: Store, record: Snapshot) -> ItemMatrix:
    """Open one snapshot, checked against its digests. Raises StoreError when they differ or vectors are lost,
    NotFoundError when a clean-up dropped the snapshot meanwhile.

    The second opening on one machine maps the file that the first one wrote.
    """
    try:
        return _open(store, record)
    except StoreError as error:
        if any(kept.id == record.id for kept in store.all(Snapshot)):
            raise
        raise gone(record.id, store) from error


def _open(store: Store, record: Snapshot) -> ItemMatrix:
    items = read_items(store, record)
    keys = decode_keys(items.column(tables.KEY))
    shape = (record.items, record.dim)
    vectors = load_matrix(store.matrix_file(record.vectors_digest), record.dtype, shape, record.vectors_digest)
    if vectors is None:
        found, vectors = build_matrix(store, record.fingerprint, keys, record.dtype, record.dim, check=False)
        if found != record.vectors_digest:
            built = store.matrix_file(found)
            if block_digest(vectors, record.vectors_digest) != record.vectors_digest:
                built.unlink(missing_ok=True)
                build_matrix(store, record.fingerprint, keys, record.dtype, record.dim, check=True)  # names the file
                raise StoreError(
                    f"{store.folder(record)}: vectors do not match their digest; restore {store.embeddings.folder}"
                )
            with suppress(FileNotFoundError):  # another reader of the same snapshot was first
                built.replace(store.matrix_file(record.vectors_digest))
    available = items.column(tables.AVAILABLE).to_numpy()
    return ItemMatrix(record, items.column(tables.ITEM_ID).combine_chunks(), vectors, keys, available)
