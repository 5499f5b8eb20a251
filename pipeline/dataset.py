"""A prepared data set in the store: written once, opened by every job."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.catalog import SLICE_ROWS
from pipeline.files import next_created_at, record_id, write_record
from pipeline.ingest import CleanTables, to_arrow
from pipeline.store import Store
from schemas import tables
from schemas.errors import StoreError
from schemas.hashing import Digest
from schemas.records import Dataset
from user_tower.sequences import Histories

_DIGEST_ROWS = 1_000_000


@dataclass(frozen=True)
class OpenDataset:
    """items: the catalog table, sorted by id; histories: events as rows of that table, in their order."""

    record: Dataset
    items: pa.Table
    histories: Histories

    @property
    def item_ids(self) -> list[str]:
        """Ids by catalog row."""
        return self.items.column(tables.ITEM_ID).to_pylist()

    @property
    def available(self) -> np.ndarray:
        """[N] bool, by catalog row."""
        return self.items.column(tables.AVAILABLE).to_numpy()


def data_digest(items: pl.DataFrame, interactions: pl.DataFrame) -> str:
    """The data version: a digest of both ordered tables, 32 hexadecimal characters."""
    digest = Digest()
    for table in (items, interactions):
        digest.add(",".join(table.columns))
        for part in table.iter_slices(_DIGEST_ROWS):
            digest.add(part.write_ndjson())
    return digest.hexdigest()


def write_dataset(store: Store, name: str, clean: CleanTables) -> tuple[Dataset, bool]:
    """Publish the tables, or return the newest data set when it is the same; and whether it was there."""
    digest = data_digest(clean.items, clean.interactions)
    existing = store.all(Dataset, name=name)
    if existing and existing[-1].digest == digest:
        return existing[-1], True
    created_at = next_created_at(existing)
    record = Dataset(
        id=record_id(created_at, digest),
        created_at=created_at,
        name=name,
        digest=digest,
        items=clean.items.height,
        users=clean.interactions[tables.USER_ID].n_unique(),
        interactions=clean.interactions.height,
        quarantined=clean.quarantine.height,
        filtered=clean.filtered,
        rows_in=clean.rows_in,
        watermark=int(clean.interactions[tables.TIMESTAMP].max()),  # type: ignore[arg-type]
    )
    with store.new(Dataset, record.id) as folder:
        pq.write_table(to_arrow(clean.items), folder / "items.parquet", row_group_size=SLICE_ROWS)
        events = tables.check(to_arrow(clean.interactions), tables.INTERACTIONS, "interactions")
        pq.write_table(events, folder / "interactions.parquet")
        rejected = tables.check(to_arrow(clean.quarantine), tables.QUARANTINE, "quarantine")
        pq.write_table(rejected, folder / "quarantine.parquet")
        write_record(folder, record)
    return record, False


def open_dataset(store: Store, record: Dataset) -> OpenDataset:
    """Read a data set. Raises StoreError when a file is damaged."""
    folder = store.folder(record)
    try:
        items = pq.read_table(folder / "items.parquet")
        events = pq.read_table(
            folder / "interactions.parquet", columns=[tables.USER_ID, tables.ITEM_ID, tables.TIMESTAMP]
        )
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"data set {folder} cannot be read: {error}; run prepare-data again") from error
    return OpenDataset(record, items, _histories(items, events))


def _histories(items: pa.Table, events: pa.Table) -> Histories:
    catalog = pl.DataFrame({tables.ITEM_ID: items.column(tables.ITEM_ID)}).with_row_index("catalog_row")
    rows = pl.DataFrame(events).join(catalog, on=tables.ITEM_ID, how="left", maintain_order="left")
    counts = rows.group_by(tables.USER_ID, maintain_order=True).len()
    offsets = np.concatenate([[0], np.cumsum(counts["len"].to_numpy())]).astype(np.int64)
    return Histories(
        counts[tables.USER_ID].to_list(),
        offsets,
        rows["catalog_row"].to_numpy().astype(np.int64),
        rows[tables.TIMESTAMP].to_numpy().astype(np.int64),
    )
