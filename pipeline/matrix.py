"""One snapshot as an array: [N, D] in item order, a memory-mapped local file named by its digest (DESIGN 6).

The file is a cache, never the truth: it is checked against the snapshot's digest at every opening and built
again from the table when it is missing or different.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cells import PAIR, decode_vectors, key_frame
from pipeline.digests import BLOCK_BYTES, block_digest, hash_block, join_blocks
from pipeline.embeddings import EmbeddingFile, read_column, read_keys
from pipeline.files import PIECE, naming, on_threads
from pipeline.store import Store
from schemas import tables
from schemas.errors import EmbeddingError, StoreError
from schemas.records import Snapshot

_RUN = 16  # rows from which a run is worth a call
_ATTEMPTS = 3  # a compaction may replace files between listing and reading them


@dataclass(frozen=True)
class ItemMatrix:
    """One open snapshot. Row numbers mean nothing outside of it.

    ids: strings [N], sorted; vectors: [N, D] in the stored dtype, not normalised, read-only; keys: uint64
    [N, 2]; available: bool [N].
    """

    record: Snapshot
    ids: pa.Array
    vectors: NDArray[np.floating]
    keys: NDArray[np.uint64]
    available: NDArray[np.bool_]

    @property
    def fingerprint(self) -> str:
        """Of the item tower that made the vectors."""
        return self.record.fingerprint

    @cached_property
    def item_ids(self) -> list[str]:
        """``ids`` as a list."""
        return self.ids.to_pylist()

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """int64 [N]: items with the same key share a number."""
        pairs = key_frame(self.keys)
        return pairs.select(pl.struct(PAIR).rank("dense")).to_series().to_numpy().astype(np.int64) - 1


def map_matrix(path: Path, dtype: str, shape: tuple[int, int]) -> NDArray[np.floating]:
    """The local file as a read-only array of that shape, its bytes not looked at."""
    if shape[0] == 0:
        return np.zeros(shape, dtype=dtype)
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=shape)


def load_matrix(path: Path, dtype: str, shape: tuple[int, int], digest: str) -> NDArray[np.floating] | None:
    """The local file, mapped, if it is there and has this digest; else None. shape: (N, D)."""
    try:
        vectors = map_matrix(path, dtype, shape)
    except (OSError, ValueError):
        return None
    return vectors if block_digest(vectors, digest) == digest else None


def build_matrix(
    store: Store, fingerprint: str, keys: NDArray[np.uint64], dtype: str, dim: int, *, check: bool
) -> tuple[str, NDArray[np.floating]]:
    """Write the vectors of some keys (uint64 [N, 2]) in their order into the local file; returns digest and array.

    Never holds more than the file's pages and a few table files in memory. Raises StoreError when a vector is
    missing; under ``check`` also when a page is damaged, and EmbeddingError when a vector is not finite or zero.
    Without ``check`` the caller compares the digest.
    """
    for attempt in range(_ATTEMPTS):
        files = store.embeddings.files(fingerprint)
        try:
            return _build(store, files, keys, dtype, dim, check)
        except StoreError:
            again = attempt + 1 < _ATTEMPTS and store.embeddings.files(fingerprint) != files
            if not again:
                raise
    raise AssertionError("unreachable")


def _build(
    store: Store, files: Sequence[EmbeddingFile], keys: NDArray[np.uint64], dtype: str, dim: int, check: bool
) -> tuple[str, NDArray[np.floating]]:
    places = _places(store, files, keys)
    order = np.argsort(places, kind="stable")  # rows of the matrix in the order of the table
    starts = np.concatenate([[0], np.cumsum([file.rows for file in files])]).astype(np.int64)
    bounds = np.searchsorted(places, starts, sorter=order)
    store.matrices.mkdir(parents=True, exist_ok=True)
    aside = store.matrices / f".{uuid.uuid4().hex}"
    try:
        vectors = _allocate(aside, dtype, (len(keys), dim))
        output = _Output(aside, vectors)

        def fill(part: tuple[EmbeddingFile, NDArray[np.int64], int]) -> None:
            file, rows, start = part
            chosen = places[rows] - start  # ascending
            for at, column in read_column(file, tables.EMBEDDING, verify=check):
                found = decode_vectors(column, dtype, dim)
                low, high = np.searchsorted(chosen, [at, at + len(found)])
                if check:
                    _require_usable(found[chosen[low:high] - at], file)
                output.write(rows[low:high], found, chosen[low:high] - at)

        used = np.flatnonzero(np.diff(bounds)).tolist()
        parts = [(files[n], order[bounds[n] : bounds[n + 1]], int(starts[n])) for n in used]
        with naming(store.matrices), output:
            # each holds a row group's column in memory
            for _ in on_threads(fill, parts, threads=2):
                pass
            digest = output.digest()
        mapped = map_matrix(aside, dtype, (len(keys), dim))  # stays open whatever becomes of the file's name
        aside.replace(store.matrix_file(digest))
        return digest, mapped
    finally:
        aside.unlink(missing_ok=True)


def _allocate(path: Path, dtype: str, shape: tuple[int, int]) -> NDArray[np.floating]:
    kind = np.dtype(dtype).newbyteorder("<")
    size = shape[0] * shape[1] * kind.itemsize
    with naming(path), path.open("wb") as file:
        if size:  # now, in one line, and not as a bus error when a page is first written
            os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype=kind, mode="r+", shape=shape) if size else np.zeros(shape, dtype=kind)


class _Output:
    """The file being filled from several threads. Each block of the digest is hashed as soon as it is full, while
    others are still being read: the hash is the longest part of the work."""

    def __init__(self, path: Path, vectors: NDArray[np.floating]) -> None:
        """vectors: the file as an array [N, D] that can be written."""
        self._vectors = vectors
        self._width = vectors.shape[1] * vectors.itemsize
        self._file = os.open(path, os.O_RDWR)
        self._left = np.diff([*range(0, vectors.nbytes, BLOCK_BYTES), vectors.nbytes])  # bytes to come, by block
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor()
        self._digests: dict[int, Future[bytes]] = {}

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        os.close(self._file)

    def write(self, rows: NDArray[np.int64], found: NDArray[np.floating], chosen: NDArray[np.int64]) -> None:
        """vectors[rows] = found[chosen], by whole runs straight into the file where there are long ones.

        Writing through the map would have every page zeroed and faulted in first, three times the work.
        """
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(chosen) != 1)) + 1
        if len(rows) < _RUN * (len(breaks) + 1):
            self._vectors[rows] = found[chosen]
        else:
            data = np.ascontiguousarray(found).view(np.uint8).reshape(-1).data
            for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
                first = int(chosen[start]) * self._width
                self._put(data[first : first + (end - start) * self._width], int(rows[start]) * self._width)
        self._count(rows)

    def _put(self, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._file, data[:PIECE], at)
            data, at = data[written:], at + written

    def _count(self, rows: NDArray[np.int64]) -> None:
        """Take these rows off what is to come; a row may lie in two blocks or more."""
        first, end = rows * self._width, (rows + 1) * self._width
        full = []
        with self._lock:
            while len(first):
                block = first // BLOCK_BYTES
                until = np.minimum(end, (block + 1) * BLOCK_BYTES)
                written = np.bincount(block, weights=until - first, minlength=len(self._left)).astype(np.int64)
                self._left -= written
                full += np.flatnonzero((self._left == 0) & (written > 0)).tolist()
                first, end = until[until < end], end[until < end]
            for number in full:
                self._digests[number] = self._pool.submit(self._hash, number)

    def _hash(self, number: int) -> bytes:
        return hash_block(os.pread(self._file, BLOCK_BYTES, number * BLOCK_BYTES))

    def digest(self) -> str:
        """``block_digest`` of the array, when all rows were written."""
        digests = [self._digests[number].result() for number in range(len(self._left))]
        return join_blocks(self._vectors.nbytes, digests)


def _places(store: Store, files: Sequence[EmbeddingFile], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Row of each key in the files laid end to end; of several the first."""
    found = read_keys(files)
    rows = key_frame(found).with_row_index("place")
    on = ["low"]  # half a key tells keys apart but for one chance in 2^64, and joins in a third of the time
    if rows["low"].n_unique() < rows.height:
        on = PAIR
        rows = rows.unique(on, keep="first", maintain_order=True)
    wanted = key_frame(keys)
    joined = wanted.join(rows, on=on, how="left", maintain_order="left")
    if len(on) == 1:
        joined = joined.with_columns(place=pl.when(pl.col("high") == pl.col("high_right")).then("place"))
    places = joined["place"]
    if places.null_count():
        raise StoreError(
            f"{places.null_count()} of {len(keys)} vectors are missing from {store.embeddings.folder}; "
            f"restore it, or run embed-items again"
        )
    return places.cast(pl.Int64).to_numpy()


def _require_usable(vectors: NDArray[np.floating], file: EmbeddingFile) -> None:
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        raise EmbeddingError(f"{file} holds vectors that are not finite or are zero; no snapshot was made")
