"""Vectors for other programs: a Parquet file of float32 lists, which every reader knows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cells import decode_vectors
from pipeline.files import fsync_path
from pipeline.matrix import ItemMatrix
from pipeline.store import Store
from pipeline.users import read_parts
from schemas import tables
from schemas.errors import ConfigError
from schemas.records import UserVectors

_ROWS = 65_536


def write_vectors(path: Path, matrix: ItemMatrix) -> int:
    """Write item_id, embedding, available in item order, as stored (not normalised); returns the rows.

    The file appears whole or not at all. Raises ConfigError when its folder does not exist, or it is one.
    """
    schema = pa.schema(
        [
            pa.field(tables.ITEM_ID, pa.string(), nullable=False),
            pa.field(tables.EMBEDDING, pa.list_(pa.float32(), matrix.record.dim), nullable=False),
            pa.field(tables.AVAILABLE, pa.bool_(), nullable=False),
        ],
        metadata={"snapshot": matrix.record.id, "item_tower": matrix.fingerprint},
    )
    with _whole(path) as aside, pq.ParquetWriter(aside, schema) as file:
        for start in range(0, len(matrix.ids), _ROWS):
            part = slice(start, start + _ROWS)
            vectors = _lists(matrix.vectors[part])
            available = pa.array(matrix.available[part])
            file.write_table(pa.table([matrix.ids[part], vectors, available], schema=schema))
    return len(matrix.ids)


def write_user_vectors(path: Path, store: Store, record: UserVectors) -> int:
    """Write user_id, embedding of a table in its order; returns the rows. Raises ConfigError, StoreError."""
    schema = pa.schema(
        [
            pa.field(tables.USER_ID, pa.string(), nullable=False),
            pa.field(tables.EMBEDDING, pa.list_(pa.float32(), record.dim), nullable=False),
        ],
        metadata={
            "user_vectors": record.id,
            "user_tower": record.user_tower_fingerprint,
            "item_tower": str(record.item_fingerprint),
            "snapshot": str(record.snapshot),
        },
    )
    with _whole(path) as aside, pq.ParquetWriter(aside, schema) as file:
        for part in read_parts(store, record):
            vectors = _lists(decode_vectors(part.column(tables.EMBEDDING), record.dtype, record.dim))
            file.write_table(pa.table([part.column(tables.USER_ID), vectors], schema=schema))
    return record.users


def _lists(vectors: NDArray[np.floating]) -> pa.Array:
    values = pa.array(np.asarray(vectors, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to fill that gets its name when the block ends. Raises ConfigError when that is a folder, or in none."""
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}; make it first")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        fsync_path(aside)
        aside.replace(path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)
