"""Files to rows, a block at a time: delimited text, JSON lines and Parquet, each row with its number.

What cannot be read as a row is handed back with its reason; what cannot be read as a file is a DataError.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.errors import DataError

ROW = "__row"
BLOCK = 16 << 20  # bytes of text parsed at once; a row must fit into two of them
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
    counts of what a format holds besides rows of ours."""

    table: pl.DataFrame
    rejected: list[Rejected]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Delimited:
    """How a text file is cut into cells. names: given where the file has no header."""

    separator: str = ","
    quoted: bool = True
    names: tuple[str, ...] | None = None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Any way in which a file can fail to be one, as a DataError with its name."""
    try:
        yield
    except (UnicodeError, LookupError) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}; set data.encoding") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}; the file was cut short or damaged") from error
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path}: cannot be read: {_first_line(error)}; deliver it again") from error


def _open(path: Path) -> Any:
    file = pa.OSFile(str(path))
    return pa.CompressedInputStream(file, "gzip") if path.suffix == ".gz" else file


def _check_encoding(path: Path, encoding: str) -> bool:
    """Whether the encoding is UTF-8. Raises DataError when the file is UTF-16 then."""
    if codecs.lookup(encoding).name != "utf-8":
        return False
    with _open(path) as file:
        start = file.read(2)
    if start in _WIDE_BOMS:
        raise DataError(f'{path}: is UTF-16, not UTF-8; set data.encoding = "utf-16"')
    return True


def _numbers(start: int, count: int, bad: list[int]) -> NDArray[np.int64]:
    """``count`` row numbers from ``start`` on, those of rows that were no rows left out."""
    inside = np.array([number for number in bad if number >= start], dtype=np.int64)
    numbers = np.arange(start, start + count + len(inside), dtype=np.int64)
    return np.setdiff1d(numbers, inside)[:count] if len(inside) else numbers


def _is_text(cell: bytes | None) -> bool:
    try:
        return cell is None or isinstance(cell.decode(), str)
    except UnicodeDecodeError:
        return False


def _as_text(table: pl.DataFrame) -> tuple[pl.DataFrame, list[Rejected]]:
    """Bytes to text; rows with bytes that are not UTF-8 are handed back, never mended."""
    names = [name for name, dtype in table.schema.items() if dtype == pl.Binary]
    if not names:
        return table, []
    try:
        return table.with_columns(pl.col(names).cast(pl.String)), []
    except pl.exceptions.ComputeError:  # one cell or more is not text: look at each
        fine = [all(map(_is_text, cells)) for cells in table.select(names).rows()]
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


def as_json(row: dict[str, Any]) -> str:
    """A row as one line of JSON, whatever is in it."""
    return json.dumps(row, ensure_ascii=False, default=str)


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _unmasked(table: pl.DataFrame) -> pl.DataFrame:
    """Bytes that were read as latin-1, which has a character for each, as the bytes they are."""
    cells = [
        pl.Series(name, [cell.decode().encode("latin-1") for cell in table[name]], dtype=pl.Binary)
        for name in table.columns
    ]
    return pl.DataFrame(cells).rename(_true_name)


def _true_name(name: str) -> str:
    return name.encode("latin-1").decode("utf-8-sig")


def read_delimited(path: Path, shape: Delimited, encoding: str) -> Iterator[Part]:
    """Comma- or tab-separated text: every cell a string, quotes and line breaks in quotes respected.

    Rows with more or fewer cells than the header, or bytes that are not text, are rejected. Raises DataError.
    """
    with _named(path):
        # pyarrow cannot say which row has a wrong number of cells if it is no text: it is shown latin-1 then
        masked = _check_encoding(path, encoding) and not _is_utf8(path)
        yield from _delimited(path, shape, "latin-1" if masked else encoding, masked)


def _delimited(path: Path, shape: Delimited, encoding: str, masked: bool) -> Iterator[Part]:
    bad: list[Rejected] = []

    def keep(row: Any) -> str:
        number = row.number - (0 if shape.names else 1)
        raw = row.text.encode("latin-1").decode("utf-8", "backslashreplace") if masked else row.text
        bad.append(Rejected(number, f"{row.actual_columns} cells, expected {row.expected_columns}", raw))
        return "skip"

    parse = pc.ParseOptions(
        delimiter=shape.separator,
        quote_char='"' if shape.quoted else False,
        newlines_in_values=shape.quoted,
        invalid_row_handler=keep,
    )
    read = pc.ReadOptions(
        block_size=BLOCK, use_threads=False, encoding=encoding, column_names=list(shape.names or ()) or None
    )
    with _open(path) as file:
        names = pc.open_csv(file, read_options=read, parse_options=parse).schema.names
    ours = [_true_name(name) if masked else name for name in names]
    if len(set(ours)) < len(ours):
        raise DataError(f"{path}: a column is there twice: {ours}; rename one")
    bad.clear()
    cells = pc.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()))
    start, told = 1, 0
    with _open(path) as file:
        for batch in pc.open_csv(file, read_options=read, parse_options=parse, convert_options=cells):
            here, told = bad[told:], len(bad)  # the reader is ahead of the batch
            numbers = _numbers(start, batch.num_rows, [row.row for row in bad])
            start = int(numbers[-1]) + 1 if len(numbers) else start
            table = pl.DataFrame(pa.Table.from_batches([batch]))
            table = (_unmasked(table) if masked else table).with_columns(pl.Series(ROW, numbers))
            text, broken = _as_text(table)
            yield Part(text, here + broken, {})
    if told < len(bad):
        yield Part(pl.DataFrame(schema=dict.fromkeys(ours, pl.String) | {ROW: pl.Int64}), bad[told:], {})


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
    return f"not a row: {_first_line(error)}"


def _json_part(rows: list[dict[str, str | None]], numbers: list[int], bad: list[Rejected]) -> Part:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pl.DataFrame({name: pl.Series([row.get(name) for row in rows], dtype=pl.String) for name in names})
    return Part(table.with_columns(pl.Series(ROW, numbers, dtype=pl.Int64)), bad, {})


@contextmanager
def _lines_of(path: Path, wide: str | None) -> Iterator[Iterable[bytes]]:
    """The lines of a file; as UTF-8 where its encoding, ``wide``, has line breaks of several bytes."""
    with path.open("rb") as packed, gzip.open(packed) if path.suffix == ".gz" else packed as file:
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
    with _named(path):
        _check_encoding(path, encoding)
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
    with _named(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS):
            table = pl.DataFrame(pa.Table.from_batches([batch]))
            numbers = np.arange(start, start + batch.num_rows, dtype=np.int64)
            start += batch.num_rows
            text, broken = _as_text(table.with_columns(pl.Series(ROW, numbers)))
            yield Part(text, broken, {})
