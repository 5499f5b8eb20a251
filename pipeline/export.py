"""Vectors for other programs: a Parquet file of float32 lists, which every reader knows."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import fsync_path
from pipeline.matrix import ItemMatrix
from schemas import tables
from schemas.errors import ConfigError

_ROWS = 65_536


def write_vectors(path: Path, matrix: ItemMatrix) -> int:
    """Write item_id, embedding, available in item order, as stored (not normalised); returns the rows.

    The file appears whole or not at all. Raises ConfigError when its folder does not exist.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}; make it first")
    schema = pa.schema(
        [
            pa.field(tables.ITEM_ID, pa.string(), nullable=False),
            pa.field(tables.EMBEDDING, pa.list_(pa.float32(), matrix.record.dim), nullable=False),
            pa.field(tables.AVAILABLE, pa.bool_(), nullable=False),
        ],
        metadata={"snapshot": matrix.record.id, "item_tower": matrix.fingerprint},
    )
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with pq.ParquetWriter(aside, schema) as file:
            for start in range(0, len(matrix.ids), _ROWS):
                part = slice(start, start + _ROWS)
                values = pa.array(np.asarray(matrix.vectors[part], dtype=np.float32).reshape(-1))
                vectors = pa.FixedSizeListArray.from_arrays(values, matrix.record.dim)
                available = pa.array(matrix.available[part])
                file.write_table(pa.table([matrix.ids[part], vectors, available], schema=schema))
        fsync_path(aside)
        aside.replace(path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)
    return len(matrix.ids)
