"""Comma- and tab-separated text to rows: blocks of lines that are as they should be fast, all others with care.

With care is pyarrow's reader, which can say which row is none. Both read alike what both can read.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pc
from numpy.typing import NDArray

from pipeline.readers import ROW, Part, Rejected, ahead, as_text, check_encoding, is_text, named, open_bytes, threads
from schemas.errors import DataError

BLOCK = 16 << 20  # bytes that pyarrow parses at once; a row must fit into two of them
_READ = 8 << 20  # bytes whose lines are parsed at once
_AHEAD = 2  # blocks that are parsed while one is looked at
_CACHED = 1 << 17  # bytes counted at once: with what is made of them they lie in a processor's cache


@dataclass(frozen=True)
class Delimited:
    """How a text file is cut into cells. names: given where the file has no header."""

    separator: str = ","
    quoted: bool = True
    names: tuple[str, ...] | None = None


def _blocks_of(file: Any) -> Iterator[bytes]:
    """The bytes of a file, each block read and unpacked in a thread while the one before is looked at.

    Cut behind line ends; but for the last, and for lines too long for any reader.
    """

    def blocks() -> Iterator[bytes]:
        left: list[bytes] = []
        while data := file.read(_READ):
            end = data.rfind(b"\n") + 1
            if end or sum(map(len, left)) > 2 * BLOCK:
                yield b"".join([*left, memoryview(data)[:end]])
                left = []
            left.append(data[end:])
        yield b"".join(left)

    return ahead(filter(None, blocks()))


class _Rest:
    """Bytes, then blocks of them, as one stream.

    It is never cut within a line end: pyarrow drops a line feed that a block begins with, in quotes too, where the
    block before it ends in a carriage return.
    """

    def __init__(self, start: bytes, blocks: Iterator[bytes]) -> None:
        self._start, self._blocks, self.closed = start, blocks, False

    def read(self, size: int) -> bytes:
        found = self._take(size - 1)
        return found + self._take(1) if found.endswith(b"\r") else found

    def _take(self, size: int) -> bytes:
        found = []
        while size > 0 and (start := self._start or next(self._blocks, b"")):
            found.append(start[:size])
            self._start = start[size:]
            size -= len(found[-1])
        return b"".join(found)

    def close(self) -> None:
        self.closed = True


def read_delimited(
    path: Path, shape: Delimited, encoding: str, numbers: frozenset[str] = frozenset()
) -> Iterator[Part]:
    """Comma- or tab-separated text: every cell a string, quotes and line breaks in quotes respected.

    Rows with more or fewer cells than the header, or bytes that are not text, are rejected. numbers: columns that
    likely hold whole numbers, int64 in parts where all their cells do (``Part.text``). Raises DataError.
    """
    with named(path):
        if not check_encoding(path, encoding):
            yield from _whole(path, shape, encoding, masked=False)
            return
        with open_bytes(path) as file:
            blocks = _blocks_of(file)
            data = next(blocks, b"")
            head = 0 if shape.names else data.find(b"\n") + 1
            names = list(shape.names or _plain_names(data[:head], shape))
            rows = data[head:] if head else data.removeprefix(codecs.BOM_UTF8)
            if names and rows:
                _check_names(path, names)
                yield from _blocks(path, chain([rows], blocks), shape, names, numbers.intersection(names))
                return
        yield from _whole(path, shape, encoding, masked=not _is_utf8(path))


def _blocks(
    path: Path, blocks: Iterator[bytes], shape: Delimited, names: list[str], numbers: frozenset[str]
) -> Iterator[Part]:
    """UTF-8 lines without a header, a block at a time; all that is left as one stream where a quote needs care."""
    start, coming = 1, deque[tuple[bytes, Future[Part | None]]]()
    with threads(_AHEAD) as pool:
        while True:
            while len(coming) <= _AHEAD and (block := next(blocks, None)):
                coming.append((block, pool.submit(_plain, block, shape, names, numbers)))
            if not coming:
                return
            block, plain = coming.popleft()
            part, cut = plain.result(), bool(coming) and not block.endswith(b"\n")
            if part and not cut:
                yield replace(part, table=_numbered(part.table, start))
                start += part.table.height
                numbers = numbers if part.text else frozenset()  # else each block would be parsed twice
            elif cut or (shape.quoted and b'"' in block):
                rest = chain((block for block, _ in coming), blocks)
                yield from _later(block, rest, shape, names, not _is_utf8(path), start)
                return
            elif block.strip(b"\r\n"):
                for each in _later(block, iter(()), shape, names, not is_text(block), start):
                    start += each.table.height + len(each.rejected)
                    yield each


def _numbered(table: pl.DataFrame, start: int) -> pl.DataFrame:
    numbers = pl.int_range(start, start + table.height, dtype=pl.Int64, eager=True)
    return table.with_columns(numbers.alias(ROW))


def _plain_names(line: bytes, shape: Delimited) -> list[str]:
    """The names in a first line that is the header and all of it; none where that is not sure."""
    text = line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").removesuffix(b"\r")
    if not text or b"\r" in text or (shape.quoted and text.count(b'"') % 2):
        return []
    names: list[str] = pc.open_csv(pa.BufferReader(line), parse_options=_parse(shape, None)).schema.names
    return names


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a column is there twice: {names}; rename one")


def _plain(block: bytes, shape: Delimited, names: list[str], numbers: frozenset[str]) -> Part | None:
    """Lines that have a cell for each name, a quote only around one; None where it is not sure that all are such."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    if b"\r" in block or block.startswith(codecs.BOM_UTF8):
        return None
    quoted = shape.quoted and b'"' in block
    read = partial(_parsed, block, shape, quoted, names)
    table, text = read(numbers), None
    if numbers and (table is None or any(table[name].null_count() for name in numbers)):
        table = read(frozenset())
    elif numbers:
        text = partial(_as_given, read)
    if table is None:
        return None
    rows, separator, open_end = table.height, shape.separator.encode(), not block.endswith(b"\n")
    marks, others = _marks(block, separator, quoted), rows * (len(names) - 1)
    # polars takes no line with too many cells; of one with too few the last is missing
    if table[names[-1]].null_count() and (quoted or not _even(block, separator, rows, len(names))):
        return None
    if quoted and (marks.separators != others or marks.lines + open_end != rows or marks.around != marks.quotes):
        return None
    tidy = block.isascii() and marks.low == rows - open_end + (others if separator <= b" " else 0)
    return Part(_filled(table), [], {}, tidy, text)


def _parsed(
    block: bytes, shape: Delimited, quoted: bool, names: list[str], numbers: frozenset[str]
) -> pl.DataFrame | None:
    """Lines as polars reads them, ``numbers`` as int64; None where it cannot."""
    schema = {name: pl.Int64 if name in numbers else pl.String for name in names}
    quote = '"' if quoted else None
    try:
        return pl.read_csv(block, has_header=False, separator=shape.separator, quote_char=quote, schema=schema)
    except pl.exceptions.PolarsError:
        return None


def _filled(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.col(pl.String).fill_null(""))


def _as_given(read: Callable[[frozenset[str]], pl.DataFrame | None]) -> pl.DataFrame:
    table = read(frozenset())
    assert table is not None, "what can be read as numbers can be read as text"
    return _filled(table)


class _Marks(NamedTuple):
    """Bytes of a block: up to a space; where quotes are looked for also separators, line ends, quotes, and those of
    them that begin a cell or end one, not both."""

    low: int
    separators: int = 0
    lines: int = 0
    quotes: int = 0
    around: int = 0


def _marks(block: bytes, separator: bytes, quoted: bool) -> _Marks:
    cells = np.frombuffer(block, dtype=np.uint8)
    found = np.zeros(len(_Marks._fields) if quoted else 1, dtype=np.int64)
    for at in range(0, len(cells), _CACHED):
        part = cells[at : at + _CACHED]
        found[0] += np.count_nonzero(part <= ord(" "))
        if quoted:
            ends, lines, quotes = part == ord(separator), part == ord("\n"), part == ord('"')
            found[1] += np.count_nonzero(ends)
            ends |= lines
            before = not at or cells[at - 1] in (ord(separator), ord("\n"))
            behind = at + _CACHED >= len(cells) or cells[at + _CACHED] in (ord(separator), ord("\n"))
            around = np.concatenate([[before], ends[:-1]]) ^ np.concatenate([ends[1:], [behind]])
            found[2:] += np.count_nonzero(lines), np.count_nonzero(quotes), np.count_nonzero(around & quotes)
    return _Marks(*map(int, found))


def _even(block: bytes, separator: bytes, rows: int, columns: int) -> bool:
    """Whether each line has a cell for each column."""
    others = bytes(value for value in range(256) if value not in (ord("\n"), ord(separator)))
    marks = block.translate(None, others)
    return columns > 1 and marks.removesuffix(b"\n") == (((columns - 1) * separator + b"\n") * rows)[:-1]


def _later(
    data: bytes, blocks: Iterator[bytes], shape: Delimited, names: list[str], masked: bool, start: int
) -> Iterator[Part]:
    """Rows behind the header: those of ``data``, then those of the blocks."""
    if masked:
        names = [name.encode().decode("latin-1") for name in names]
    else:
        data = codecs.BOM_UTF8 + data  # one that is within the data would be taken off
    yield from _careful(_Rest(data, blocks), shape, names, "utf-8", masked, start)


def _whole(path: Path, shape: Delimited, encoding: str, masked: bool) -> Iterator[Part]:
    """A file from its beginning, all of it with care."""
    seen = "latin-1" if masked else encoding
    read = pc.ReadOptions(block_size=BLOCK, use_threads=False, encoding=seen, column_names=shape.names)
    with open_bytes(path) as file:
        names = pc.open_csv(file, read_options=read, parse_options=_parse(shape, lambda row: "skip")).schema.names
    _check_names(path, [_true_name(name) if masked else name for name in names])
    with open_bytes(path) as file:
        rows = _Rest(b"", _blocks_of(file))
        yield from _careful(rows, shape, names, encoding, masked, 1, header=shape.names is None)


def _parse(shape: Delimited, keep: Any) -> pc.ParseOptions:
    return pc.ParseOptions(
        delimiter=shape.separator,
        quote_char='"' if shape.quoted else False,
        newlines_in_values=shape.quoted,
        invalid_row_handler=keep,
    )


def _careful(
    file: Any, shape: Delimited, names: list[str], encoding: str, masked: bool, start: int, header: bool = False
) -> Iterator[Part]:
    """Rows from number ``start`` on. header: the first row holds the names.

    masked: shown to pyarrow as latin-1, which has a character for each byte, ``names`` too: it cannot say which row
    has a wrong number of cells if that is no text.
    """
    bad: list[Rejected] = []
    before = start - 1 - header

    def keep(row: Any) -> str:
        raw = row.text.encode("latin-1").decode("utf-8", "backslashreplace") if masked else row.text
        bad.append(Rejected(before + row.number, f"{row.actual_columns} cells, expected {row.expected_columns}", raw))
        return "skip"

    read = pc.ReadOptions(
        block_size=BLOCK,
        use_threads=False,
        encoding="latin-1" if masked else encoding,
        column_names=None if header else names,
    )
    cells = pc.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()))
    told = 0
    for batch in pc.open_csv(file, read_options=read, parse_options=_parse(shape, keep), convert_options=cells):
        here, told = bad[told:], len(bad)  # the reader is ahead of the batch
        numbers = _numbers(start, batch.num_rows, [row.row for row in bad])
        start = int(numbers[-1]) + 1 if len(numbers) else start
        table = pl.DataFrame(pa.Table.from_batches([batch]))
        table = (_unmasked(table) if masked else table).with_columns(pl.Series(ROW, numbers))
        text, broken = as_text(table)
        yield Part(text, here + broken, {})
    if told < len(bad):
        ours = [_true_name(name) if masked else name for name in names]
        yield Part(pl.DataFrame(schema=dict.fromkeys(ours, pl.String) | {ROW: pl.Int64}), bad[told:], {})


def _numbers(start: int, count: int, bad: list[int]) -> NDArray[np.int64]:
    """``count`` row numbers from ``start`` on, those of rows that were no rows left out."""
    inside = np.array([number for number in bad if number >= start], dtype=np.int64)
    numbers = np.arange(start, start + count + len(inside), dtype=np.int64)
    return np.setdiff1d(numbers, inside)[:count] if len(inside) else numbers


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path) as file:
        try:
            while block := file.read(_READ):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _unmasked(table: pl.DataFrame) -> pl.DataFrame:
    """Bytes that were read as latin-1 as the bytes they are."""
    cells = [
        pl.Series(name, [cell.decode().encode("latin-1") for cell in table[name]], dtype=pl.Binary)
        for name in table.columns
    ]
    return pl.DataFrame(cells).rename(_true_name)


def _true_name(name: str) -> str:
    return name.encode("latin-1").decode("utf-8-sig")
