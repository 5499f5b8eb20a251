"""A prepared data set in the store: written once, opened by every job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.catalog import SLICE_ROWS
from pipeline.columns import as_milliseconds
from pipeline.digests import add_texts, new_digest
from pipeline.events import EventBuilder, Events
from pipeline.files import UNREADABLE, next_created_at, record_id, unreadable_dataset, write_file, write_record
from pipeline.forgotten import FILTER, ForgottenUsers
from pipeline.ingest import CleanTables
from pipeline.intake import to_arrow
from pipeline.profile import describe_events
from pipeline.readers import ahead
from pipeline.store import Store
from schemas import tables
from schemas.errors import ConfigError, DataError, StoreError
from schemas.hashing import hash_texts
from schemas.records import Dataset
from user_tower.sequences import Histories

PROFILE = "profile.json"
_EVENTS = "interactions.parquet"


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

    def released(self, column: str) -> np.ndarray:
        """int64 [N] milliseconds from which each item could be recommended: what the column says, or its first event
        where that came earlier; 0 where the column says nothing. Raises ConfigError for a column that is not there.
        """
        if column not in self.items.column_names:
            raise ConfigError(f"evaluate.released = {column!r}: the items have {self.items.column_names}")
        told = as_milliseconds(pl.Series(column, self.items.column(column)), Path(column))
        times = told.fill_null(0).to_numpy().astype(np.int64, copy=True)
        if self.histories.times is not None:
            np.minimum.at(times, self.histories.items, self.histories.times)
        return times


def data_digest(items: pl.DataFrame, events: Events) -> str:
    """The data version: a digest of both ordered tables, 32 hexadecimal characters."""
    digest = new_digest().add(",".join(items.columns))
    for part in items.iter_slices(SLICE_ROWS):
        for column in part:
            if column.dtype == pl.String:
                add_texts(digest, column.to_arrow(compat_level=pl.CompatLevel.oldest()))
            else:
                digest.add(column.to_frame().write_ndjson())
    events.digest_into(digest)
    return digest.hexdigest()


def catalog_file(store: Store, record: Dataset) -> Path:
    """Where the catalog of a data set lies."""
    return store.folder(record) / "items.parquet"


def write_dataset(
    store: Store, name: str, clean: CleanTables, describe: Callable[[], dict[str, Any]]
) -> tuple[Dataset, bool]:
    """Publish the tables, or return the newest data set when it is the same; and whether it was there.

    describe: makes the profile that is kept beside the record (``pipeline.profile``). It runs, and the tables are
    hashed, while they are written; where as much came as the newest data set holds, they are hashed first.
    """
    existing = store.all(Dataset, name=name)
    created_at = next_created_at(existing)
    files = [digest for given in clean.deliveries.values() for digest in given.digests]
    found: dict[str, Any] = {
        "name": name,
        "items": clean.items.height,
        "users": len(clean.events.names[tables.USER_ID]),
        "interactions": len(clean.events),
        "watermark": int(clean.events.rows[tables.TIMESTAMP].max()),  # type: ignore[arg-type]
    }
    with ThreadPoolExecutor(1) as pool:  # a thread for all else: the events are what takes longest
        hashing = pool.submit(data_digest, clean.items, clean.events)
        alike = existing and all(getattr(existing[-1], field) == value for field, value in found.items())
        if alike and existing[-1].digest == hashing.result():
            return existing[-1], True
        profile = pool.submit(describe)
        record_name = record_id(created_at, hash_texts(name, *files).hex())
        with store.new(Dataset, record_name) as folder, ExitStack() as ending:
            catalog = pool.submit(_write_items, folder / "items.parquet", clean.items)
            ending.callback(wait, [catalog])  # before the folder goes, should the block fail
            _write_events(folder / _EVENTS, clean.events)
            rejected = tables.check(to_arrow(clean.quarantine), tables.QUARANTINE, "quarantine")
            pq.write_table(rejected, folder / "quarantine.parquet")
            write_file(folder / PROFILE, json.dumps(profile.result(), indent=1).encode())
            catalog.result()
            record = Dataset(
                id=record_name,
                created_at=created_at,
                digest=hashing.result(),
                quarantined=clean.quarantine.height,
                filtered=clean.filtered,
                rows_in=clean.rows_in,
                carried=clean.carried,
                **found,
            )
            write_record(folder, record)
    return record, False


def _write_items(path: Path, items: pl.DataFrame) -> None:
    others = [name for name in items.columns if name != tables.ITEM_ID]  # ids are distinct
    _write_slices(path, map(to_arrow, items.iter_slices(SLICE_ROWS)), use_dictionary=others)


def _write_slices(path: Path, slices: Iterator[pa.Table], **options: Any) -> None:
    first = next(slices)
    with pq.ParquetWriter(path, first.schema, write_page_checksum=True, **options) as file:
        file.write_table(first)
        for part in ahead(slices):
            file.write_table(part)


def _write_events(path: Path, events: Events) -> None:
    """Users as a dictionary, as they are ordered by it; items, in no order, gain nothing by one.

    Times as differences: a third smaller than compressed, in half the time.
    """
    _write_slices(
        path,
        events.slices(dictionary=True),
        store_schema=False,
        use_dictionary=[tables.USER_ID, tables.EVENT],
        write_statistics=[tables.TIMESTAMP],  # of users they would take as long as the users themselves
        column_encoding={tables.TIMESTAMP: "DELTA_BINARY_PACKED"},
        compression={name: "none" if name == tables.TIMESTAMP else "snappy" for name in tables.INTERACTIONS.names},
    )


def read_profile(store: Store, record: Dataset) -> dict[str, Any]:
    """The profile of a data set, empty for one that was prepared without. Raises StoreError when it is damaged."""
    path = store.folder(record) / PROFILE
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise unreadable_dataset(path, error) from error
    return found


def _columns(store: Store, record: Dataset, name: str, columns: list[str] | None, **options: Any) -> pa.Table:
    path = store.folder(record) / name
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True, **options)
    except UNREADABLE as error:
        raise unreadable_dataset(path, error) from error


def events_before(store: Store, record: Dataset, time: int) -> int:
    """How many events of a data set are earlier than a time in milliseconds. Raises StoreError when it is damaged."""
    times = _columns(store, record, _EVENTS, [tables.TIMESTAMP]).column(tables.TIMESTAMP).to_numpy()
    return int((times < time).sum())


def open_dataset(store: Store, record: Dataset) -> OpenDataset:
    """Read a data set. Raises StoreError when a file is damaged."""
    items = _columns(store, record, "items.parquet", None)
    events = _columns(store, record, _EVENTS, [tables.USER_ID, tables.ITEM_ID, tables.TIMESTAMP])
    return OpenDataset(record, items, _histories(items, events))


def read_labels(store: Store, record: Dataset) -> pa.Table:
    """Event types and labels of all events, in the order of ``OpenDataset.histories``. Raises StoreError."""
    return _columns(store, record, _EVENTS, [tables.EVENT, tables.LABEL], read_dictionary=[tables.EVENT])


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


def find_dataset(store: Store, digest: str) -> Dataset | None:
    """The newest data set of that version, or what stands for it since users were forgotten; None: it is gone."""
    found = [record for record in store.all(Dataset) if digest == record.digest or digest in record.replaces]
    return next((record for record in reversed(found) if record.digest == digest), found[-1] if found else None)


class Rewritten(NamedTuple):
    """A data set without forgotten users. interactions, quarantined: rows that are left out."""

    record: Dataset
    interactions: int
    quarantined: int


def without_users(store: Store, record: Dataset, forgotten: ForgottenUsers) -> Rewritten | None:
    """Publish the data set again without these users; None where it has no row of them.

    Its version is the one that prepare-data gives the same files from now on. What it stands for is left in place.
    Raises DataError when nobody else is in it, StoreError when it is damaged.
    """
    folder = store.folder(record)
    path = folder / _EVENTS
    try:
        rejected = pq.read_table(folder / "quarantine.parquet")
        users = pc.unique(pq.read_table(path, columns=[tables.USER_ID]).column(0)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"data set {folder} cannot be read: {error}; restore it, or remove its folder") from error
    keep = np.array([not forgotten.in_row(raw) for raw in rejected.column(tables.RAW).to_pylist()], dtype=bool)
    if keep.all() and not forgotten.mask(users).any():
        return None
    before = _read_events(path)
    gone = forgotten.mask(before.names[tables.USER_ID].to_pylist())
    events = before.where(~gone[before.rows[tables.USER_ID].to_numpy()]).compact()
    if not len(events):
        raise DataError(f"data set {record.id} holds nobody else; remove {folder}, and what was made of it")
    kept = rejected.filter(pa.array(keep))
    counts = Rewritten(record, len(before) - len(events), rejected.num_rows - kept.num_rows)
    digest = data_digest(pl.read_parquet(folder / "items.parquet"), events)
    filtered = record.filtered | {FILTER: record.filtered.get(FILTER, 0) + counts.interactions + counts.quarantined}
    new = record.model_copy(
        update={
            # the version alone may be the same: where only a rejected row goes
            "id": record_id(record.created_at, hash_texts(digest, record.id).hex()),
            "digest": digest,
            "users": len(events.names[tables.USER_ID]),
            "interactions": len(events),
            "quarantined": kept.num_rows,
            "filtered": filtered,
            "watermark": int(events.rows[tables.TIMESTAMP].max()),  # type: ignore[arg-type]
            "replaces": (*record.replaces, *((record.digest,) if digest != record.digest else ())),
        }
    )
    profile = read_profile(store, record)
    if profile:
        reasons = pc.value_counts(kept.column(tables.REASON)).to_pylist()
        profile["quarantined"] = {each["values"]: each["counts"] for each in reasons}
        profile |= {"filtered": filtered, "interactions": describe_events(events)}
    if not store.all(Dataset, id=new.id):
        with store.new(Dataset, new.id) as aside:
            shutil.copyfile(folder / "items.parquet", aside / "items.parquet")
            _write_events(aside / _EVENTS, events)
            pq.write_table(kept, aside / "quarantine.parquet")
            write_file(aside / PROFILE, json.dumps(profile, indent=1).encode())
            write_record(aside, new)
    return counts._replace(record=new)


def _read_events(path: Path) -> Events:
    builder = EventBuilder()
    with pq.ParquetFile(path) as file:
        for part in file.iter_batches(1 << 20):
            builder.add(pl.DataFrame(pa.Table.from_batches([part])))
    return builder.build()
