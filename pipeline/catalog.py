"""The catalog as the cache sees it: ids, availability and content keys, read in slices, never as one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from item_tower.prompt import TemplateConfig, content_keys, render
from pipeline.cells import encode_keys
from pipeline.files import UNREADABLE, unreadable_dataset
from schemas import tables

SLICE_ROWS = 65_536


@dataclass(frozen=True)
class CatalogScan:
    """The N items that have text, and the ids of those that have none.

    item_ids: strings [N], sorted; keys: uint64 [N, 2]; available: bool [N]; rows: int64 [N], places in the
    catalog's file.
    """

    item_ids: pa.Array
    keys: NDArray[np.uint64]
    available: NDArray[np.bool_]
    rows: NDArray[np.int64]
    empty: list[str]


def _slices(path: Path, columns: list[str], skip: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """(first row, rows) of each slice; skip: [row groups], those not to be read."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            start = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skip is None or not skip[group]:
                    at = start
                    for batch in file.iter_batches(SLICE_ROWS, row_groups=[group], columns=columns):
                        yield at, pa.Table.from_batches([batch])
                        at += batch.num_rows
                start += rows
    except UNREADABLE as error:
        raise unreadable_dataset(path, error) from error


def _columns(path: Path, template: TemplateConfig) -> list[str]:
    """The columns to render: the template's fields, or all, so that ``render`` can say which one is missing."""
    try:
        names = pq.read_schema(path).names
    except UNREADABLE as error:
        raise unreadable_dataset(path, error) from error
    lost = {tables.ITEM_ID, tables.AVAILABLE} - set(names)
    if lost:
        raise unreadable_dataset(path, KeyError(f"no column {min(lost)}"))
    usable = set(names) - set(tables.RESERVED_ITEM_COLUMNS)
    return list(template.fields) if set(template.fields) <= usable else names


def scan_catalog(path: Path, template: TemplateConfig) -> CatalogScan:
    """Render every item of a prepared catalog and keep its key, not its text.

    Raises ConfigError for a field that the catalog lacks, StoreError for a damaged file.
    """
    ids, keys, available, rows, empty = [], [], [], [], []
    columns = list(dict.fromkeys([tables.ITEM_ID, tables.AVAILABLE, *_columns(path, template)]))
    for start, part in _slices(path, columns):
        texts = render(part, template)
        kept = np.flatnonzero(np.fromiter(map(bool, texts), dtype=bool, count=len(texts)))
        part_ids = part.column(tables.ITEM_ID).combine_chunks()
        if len(kept) < len(texts):
            gone = np.setdiff1d(np.arange(len(texts)), kept)
            empty.extend(part_ids.take(pa.array(gone)).to_pylist())
            part_ids, texts = part_ids.take(pa.array(kept)), [texts[row] for row in kept]
        ids.append(part_ids)
        keys.append(np.frombuffer(b"".join(content_keys(texts)), dtype="<u8").reshape(-1, 2))
        available.append(part.column(tables.AVAILABLE).to_numpy()[kept])
        rows.append(kept + start)
    return CatalogScan(
        item_ids=pa.concat_arrays(ids) if ids else pa.array([], pa.string()),
        keys=np.concatenate([np.zeros((0, 2), dtype=np.uint64), *keys]),
        available=np.concatenate([np.zeros(0, dtype=bool), *available]),
        rows=np.concatenate([np.zeros(0, dtype=np.int64), *rows]),
        empty=empty,
    )


def read_texts(path: Path, template: TemplateConfig, rows: NDArray[np.int64]) -> pa.Table:
    """Key and rendered text of some rows of the catalog (sorted), reading only the row groups they lie in."""
    try:
        metadata = pq.read_metadata(path)
    except UNREADABLE as error:
        raise unreadable_dataset(path, error) from error
    ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    skip = np.ones(len(ends), dtype=bool)
    skip[np.searchsorted(ends, rows, side="right")] = False
    texts: list[str] = []
    for start, part in _slices(path, _columns(path, template), skip):
        low, high = np.searchsorted(rows, [start, start + part.num_rows])
        if high > low:
            texts.extend(render(part.take(pa.array(rows[low:high] - start)), template))
    keys = np.frombuffer(b"".join(content_keys(texts)), dtype="<u8").reshape(-1, 2)
    return pa.table({tables.KEY: encode_keys(keys), tables.TEXT: pa.array(texts, pa.string())})
