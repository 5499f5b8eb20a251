"""The table of user vectors: one immutable Parquet file a table, in the order of the users (DESIGN 10).

A user whose history gives the same digest under the same towers keeps the vector of the table before.
Shapes: U users, E events, D vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cells import decode_vectors
from pipeline.files import UNREADABLE, record_id, write_record
from pipeline.forgotten import ForgottenUsers
from pipeline.store import Store
from schemas import tables
from schemas.errors import EmbeddingError, StoreError
from schemas.hashing import Digest, hash_texts
from schemas.records import UserVectors
from user_tower.sequences import Histories

DTYPE = "float16"
_FILE = "users.parquet"


def history_digests(histories: Histories, keys: NDArray[np.uint64], last: int) -> list[bytes]:
    """16 bytes for each user: BLAKE2b over the key of the item and the time of each of the ``last`` events.

    keys: uint64 [N, 2] by catalog row; another text of an item is another key, and so another digest.
    """
    rows = np.empty((len(histories.items), 3), dtype="<u8")
    rows[:, :2] = keys[histories.items]
    rows[:, 2] = 0 if histories.times is None else histories.times.view(np.uint64)
    data, width = rows.reshape(-1).view(np.uint8).data, rows.shape[1] * 8
    found = []
    for start, end in zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True):
        part = data[max(start, end - last) * width : end * width]
        found.append(hashlib.blake2b(part, digest_size=16).digest())
    return found


def encode_user_vectors(vectors: NDArray[np.floating]) -> pa.Array:
    """A binary column of float16 from [U, D]. Raises EmbeddingError for what float16 cannot hold."""
    stored = vectors.astype("<f2")
    if not np.isfinite(stored).all():
        raise EmbeddingError(
            f"{int((~np.isfinite(stored)).any(axis=1).sum())} user vectors are not finite in {DTYPE}"
        )
    data = pa.py_buffer(np.ascontiguousarray(stored))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * vectors.shape[1]), len(stored), [None, data])


class TableWriter:
    """Writes a table part by part; ``checksum`` is over users, histories and vectors in their order."""

    def __init__(self, folder: Path) -> None:
        self._file = pq.ParquetWriter(
            folder / _FILE, tables.USER_VECTORS, compression="none", use_dictionary=False, write_page_checksum=True
        )
        self._digest = Digest()
        self.rows = 0

    def write(self, users: list[str], histories: list[bytes], vectors: pa.Array) -> None:
        """Append [u] users; vectors: as ``encode_user_vectors`` makes them."""
        if users:
            part = pa.table([users, histories, vectors.cast(pa.binary())], schema=tables.USER_VECTORS)
            self._file.write_table(part)
            _add(self._digest, part)
            self.rows += len(users)

    def close(self) -> str:
        """The checksum, when everything is written."""
        self._file.close()
        return self._digest.hexdigest()


def _add(digest: Digest, part: pa.Table) -> None:
    for row in zip(*(part.column(name).to_pylist() for name in tables.USER_VECTORS.names), strict=True):
        for cell in row:
            digest.add(cell)


def read_parts(store: Store, record: UserVectors) -> Iterator[pa.Table]:
    """The table row group by row group, checked at its end. Raises StoreError when it is damaged."""
    path, digest = store.folder(record) / _FILE, Digest()
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                part = file.read_row_group(number)
                _add(digest, part)
                yield part
    except UNREADABLE as error:
        raise StoreError(f"{path} cannot be read: {error}; run embed-users again") from error
    if digest.hexdigest() != record.checksum:
        raise StoreError(f"{path} does not match its checksum; remove {store.folder(record)}, run embed-users again")


def open_user_vectors(store: Store, record: UserVectors) -> tuple[list[str], NDArray[np.floating]]:
    """Users [U] and vectors float16 [U, D]. Raises StoreError when the table is damaged."""
    users: list[str] = []
    parts = [np.zeros((0, record.dim), dtype="<f2")]
    for part in read_parts(store, record):
        users += part.column(tables.USER_ID).to_pylist()
        parts.append(decode_vectors(part.column(tables.EMBEDDING), record.dtype, record.dim))
    return users, np.concatenate(parts)


class Reusable:
    """The vectors of the table before, by history digest."""

    def __init__(self, store: Store, record: UserVectors | None) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._cells: list[Any] = []
        for number, part in enumerate(read_parts(store, record) if record is not None else ()):
            self._cells.append(part.column(tables.EMBEDDING).combine_chunks())
            for row, digest in enumerate(part.column(tables.HISTORY).to_pylist()):
                self._places[digest] = (number, row)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def cell(self, digest: bytes) -> bytes:
        """The stored bytes of the vector of that history."""
        number, row = self._places[digest]
        found: bytes = self._cells[number][row].as_py()
        return found


def forgotten_rows(store: Store, record: UserVectors, forgotten: ForgottenUsers) -> int:
    """Rows of a table that are of these users. Raises StoreError when it is damaged."""
    return sum(
        int(forgotten.mask(part.column(tables.USER_ID).to_pylist()).sum()) for part in read_parts(store, record)
    )


def without_users(
    store: Store, record: UserVectors, forgotten: ForgottenUsers, inputs: str, dataset: str
) -> UserVectors:
    """Publish a table again without these users, as of another data version. What it stands for is left in place.

    inputs, dataset: of the new record, as embed-users would write them. Raises StoreError when it is damaged.
    """
    name = record_id(record.created_at, hash_texts(inputs, record.id).hex())
    there = store.all(UserVectors, id=name)
    if there:
        return there[0]
    with store.new(UserVectors, name) as folder:
        writer = TableWriter(folder)
        for part in read_parts(store, record):
            kept = part.filter(pa.array(~forgotten.mask(part.column(tables.USER_ID).to_pylist())))
            users, histories = (kept.column(column).to_pylist() for column in (tables.USER_ID, tables.HISTORY))
            writer.write(users, histories, kept.column(tables.EMBEDDING).combine_chunks())
        changed = {"id": name, "inputs": inputs, "dataset": dataset, "users": writer.rows, "checksum": writer.close()}
        new = record.model_copy(update=changed)
        write_record(folder, new)
    return new
