"""Files to rows, a block at a time: JSON lines and Parquet here, delimited text in ``pipeline.delimited``.

What cannot be read as a row is handed back with its reason; what cannot be read as a file is a DataError.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from isal import igzip, isal_zlib

from schemas.errors import DataError, first_line

T = TypeVar("T")
ROW = "__row"
BLOCK = 16 << 20  # bytes of JSON lines handed on at once
PARQUET_ROWS = 131_072
JSON_ROWS = 50_000
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Rejected:
    """A row that is not taken: its 1-based number, why, and the row as text."""

    row: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Part:
    """Some rows of a file: cells under the file's own names with the row numbers as ``ROW``; what is no row; and
    counts of what a format holds besides rows of ours.

    tidy: no cell has a space, a control character or one outside ASCII; text: where some cells were read as numbers,
    how to have all as they came, without ``ROW``.
    """

    table: pl.DataFrame
    rejected: list[Rejected]
    skipped: dict[str, int]
    tidy: bool = False
    text: Callable[[], pl.DataFrame] | None = None

    def given(self) -> pl.DataFrame:
        """The table with its cells as they came."""
        return self.table if self.text is None else self.text().with_columns(self.table[ROW])


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Any way in which a file can fail to be one, as a DataError with its name."""
    try:
        yield
    except (UnicodeError, LookupError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}; set data.encoding") from error
    except (EOFError, isal_zlib.error, igzip.BadGzipFile) as error:  # type: ignore[misc]  # a class
        raise DataError(f"{path}: cannot be read: {first_line(error)}; the file was cut short or damaged") from error
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}; deliver it again") from error


def open_bytes(path: Path) -> Any:
    """The bytes of a file, unpacked where its name ends in .gz."""
    return igzip.open(path) if path.suffix == ".gz" else path.open("rb")


def check_encoding(path: Path, encoding: str) -> bool:
    """Whether the encoding is UTF-8. Raises DataError when the file is UTF-16 then."""
    if codecs.lookup(encoding).name != "utf-8":
        return False
    with open_bytes(path) as file:
        start = file.read(2)
    if start in _WIDE_BOMS:
        raise DataError(f'{path}: is UTF-16, not UTF-8; set data.encoding = "utf-16"')
    return True


def is_text(cell: bytes | None) -> bool:
    """Whether bytes are UTF-8; None is nothing wrong."""
    try:
        return cell is None or isinstance(cell.decode(), str)
    except UnicodeDecodeError:
        return False


def as_text(table: pl.DataFrame) -> tuple[pl.DataFrame, list[Rejected]]:
    """Bytes to text; rows with bytes that are not UTF-8 are handed back, never mended."""
    names = [name for name, dtype in table.schema.items() if dtype == pl.Binary]
    if not names:
        return table, []
    try:
        return table.with_columns(pl.col(names).cast(pl.String)), []
    except pl.exceptions.ComputeError:  # one cell or more is not text: look at each
        fine = [all(map(is_text, cells)) for cells in table.select(names).rows()]
    mask = ~pl.Series(fine, dtype=pl.Boolean)
    text = table.filter(~mask).with_columns(pl.col(names).cast(pl.String))
    rejected = []
    for row in table.filter(mask).rows(named=True):
        number = row.pop(ROW)
        cells = {
            name: value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
            for name, value in row.items()
        }
        rejected.append(Rejected(number, "bytes that are not UTF-8", as_json(cells)))
    return text, rejected


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool for a generator, left without waiting for its threads.

    A generator that an error left behind is closed by the garbage collector, which may come while that very thread
    holds the lock of ``threading`` that joining a thread takes: it would wait for itself.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ahead(parts: Iterator[T]) -> Iterator[T]:
    """The same, the next one read in a thread meanwhile."""
    with threads(1) as pool:
        coming = pool.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = pool.submit(next, parts, None)
            yield part


def as_json(row: dict[str, Any]) -> str:
    """A row as one line of JSON, whatever is in it."""
    return json.dumps(row, ensure_ascii=False, default=str)


def _cell(value: Any) -> str | None:
    """A JSON value as text: lists joined by commas, objects as JSON, whole numbers without a fraction."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return ", ".join(text for text in map(_cell, value) if text)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _json_row(line: bytes, encoding: str, wanted: frozenset[str] | None) -> dict[str, str | None]:
    """The cells of a line. Raises ValueError or RecursionError with what is wrong with it."""
    found = json.loads(line.decode(encoding))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    row = {name: _cell(value) for name, value in found.items() if wanted is None or name in wanted}
    if b"\\u" in line:
        "".join([*row, *filter(None, row.values())]).encode()  # half a surrogate pair has no UTF-8
    return row


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not {error.encoding}"
    return f"not a row: {first_line(error)}"


def _json_part(rows: list[dict[str, str | None]], numbers: list[int], bad: list[Rejected]) -> Part:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pl.DataFrame({name: pl.Series([row.get(name) for row in rows], dtype=pl.String) for name in names})
    return Part(table.with_columns(pl.Series(ROW, numbers, dtype=pl.Int64)), bad, {})


@contextmanager
def _lines_of(path: Path, wide: str | None) -> Iterator[Iterable[bytes]]:
    """The lines of a file; as UTF-8 where its encoding, ``wide``, has line breaks of several bytes."""
    with open_bytes(path) as file:
        yield (line.encode() for line in io.TextIOWrapper(file, wide, newline="\n")) if wide else file


def read_jsonl(path: Path, wanted: frozenset[str] | None, encoding: str) -> Iterator[Part]:
    """JSON lines, one object each: every cell as text (``_cell``). wanted: names to keep, None for all.

    A line that is no JSON object is rejected. Raises DataError.
    """
    wide = encoding.lower().startswith(("utf-16", "utf-32", "utf_16", "utf_32"))
    rows: list[dict[str, str | None]] = []
    numbers: list[int] = []
    bad: list[Rejected] = []
    size = 0
    with named(path):
        check_encoding(path, encoding)
        with _lines_of(path, encoding if wide else None) as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not text.strip():
                    continue
                try:
                    rows.append(_json_row(text, "utf-8" if wide else encoding, wanted))
                    numbers.append(number)
                except (ValueError, RecursionError) as error:
                    bad.append(Rejected(number, _why(error), text.decode("utf-8", "backslashreplace").rstrip()))
                size += len(text)
                if len(rows) + len(bad) >= JSON_ROWS or size >= BLOCK:
                    yield _json_part(rows, numbers, bad)
                    rows, numbers, bad, size = [], [], [], 0
    if rows or bad:
        yield _json_part(rows, numbers, bad)


def read_parquet(path: Path) -> Iterator[Part]:
    """Parquet as it is typed; binary columns are text. Raises DataError."""
    start = 1
    with named(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS):
            table = pl.DataFrame(pa.Table.from_batches([batch]))
            numbers = np.arange(start, start + batch.num_rows, dtype=np.int64)
            start += batch.num_rows
            text, broken = as_text(table.with_columns(pl.Series(ROW, numbers)))
            yield Part(text, broken, {})
