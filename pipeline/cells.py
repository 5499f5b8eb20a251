"""Keys and vectors as cells of Arrow columns, as arrays, and keys as a frame that joins.

A key is 16 bytes, uint64 [2] or two columns ``low`` and ``high``; a vector the little-endian bytes of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import StoreError

PAIR = ["low", "high"]


def key_frame(keys: NDArray[np.uint64]) -> pl.DataFrame:
    """Two columns of uint64, ``PAIR``, from uint64 [N, 2]."""
    return pl.DataFrame({"low": keys[:, 0], "high": keys[:, 1]})


def _fixed_width(column: pa.ChunkedArray, width: int) -> Iterator[NDArray[np.uint8]]:
    """The bytes of each chunk of a binary column, [rows, width], without a copy."""
    for chunk in column.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if (np.diff(offsets) != width).any():
            raise StoreError(f"a cell of the embedding table is not {width} bytes wide; restore the table")
        if len(chunk):
            yield np.frombuffer(chunk.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]].reshape(-1, width)


def decode_vectors(column: pa.ChunkedArray, dtype: str, dim: int) -> NDArray[np.floating]:
    """[rows, dim] from the little-endian bytes of each cell; a view where the column has one chunk."""
    kind = np.dtype(dtype).newbyteorder("<")
    parts = [part.view(kind) for part in _fixed_width(column, kind.itemsize * dim)]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, dim), dtype=kind), *parts])


def decode_keys(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """[rows, 2] from a binary column of 16-byte keys."""
    parts = [part.view("<u8") for part in _fixed_width(column, 16)]
    return np.concatenate([np.zeros((0, 2), dtype=np.uint64), *parts])


def encode_keys(keys: NDArray[np.uint64]) -> pa.Array:
    """A binary column of 16-byte keys from uint64 [N, 2]."""
    data = pa.py_buffer(np.ascontiguousarray(keys, dtype="<u8"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, data]).cast(pa.binary())
