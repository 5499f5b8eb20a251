"""Delimited text: the fast way reads what the careful one reads, and a bad line costs its block no row."""

from __future__ import annotations

import gzip
import threading

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import delimited
from pipeline.delimited import Delimited, read_delimited
from pipeline.readers import ROW, ahead, named
from schemas.errors import DataError

NAMES = ("user", "item", "time")
CELLS = ["a", "", "07", " x", "y ", "é", "#c", "\ufeff", "null", "\x1c", "longer than the twelve bytes of a view"]
MARKED = ['"{}"', '"{}"', "{}", '{}"', '"{}', '"{}"x', 'a"{}"b', '"{}""', '"{},\n{}"']


def read(parts):
    """Rows with their numbers, and what was rejected; or the error."""
    try:
        parts = list(parts)
    except DataError as error:
        return str(error)
    for part in parts:
        cells = part.table.drop(ROW).rows()
        assert not part.tidy or all(cell.isascii() and cell == cell.strip() for row in cells for cell in row)
    rows = [row for part in parts for row in part.table.rows(named=True)]
    return rows, sorted((bad.row, bad.reason, bad.raw) for part in parts for bad in part.rejected)


def whole(path, shape):
    """The file as one stream, all of it by pyarrow."""
    with named(path):
        yield from delimited._whole(path, shape, "utf-8", masked=not delimited._is_utf8(path))


@st.composite
def files(draw):
    """(bytes, shape): lines of one to three columns, mostly as they should be."""
    columns, separator = draw(st.integers(1, 3)), draw(st.sampled_from([",", "\t"]))
    quoted, header = draw(st.booleans()), draw(st.booleans())
    dirty, marked = draw(st.booleans()), draw(st.sampled_from([[], MARKED[:3], MARKED]))
    end = draw(st.sampled_from(["\n", "\r\n", None]))

    def line(cells):
        return separator.join(cells) + (end or draw(st.sampled_from(["\n", "\r\n", "\r"])))

    lines = []
    for _ in range(draw(st.integers(1, 12))):
        count = draw(st.integers(0, 4)) if dirty and draw(st.booleans()) else columns
        cells = [draw(st.sampled_from(CELLS)) for _ in range(count)]
        if quoted and marked:
            cells = [draw(st.sampled_from(marked)).replace("{}", cell) for cell in cells]
        lines.append(line(cells).encode())
    if dirty and draw(st.booleans()):
        lines[-1] = b"\xff" + lines[-1]
    data = b"".join(lines)
    data = data.rstrip(b"\r\n") if draw(st.booleans()) else data
    if header:
        data = line([f'"{name}"' for name in NAMES] if marked else NAMES[:columns]).encode() + data
    return data.removeprefix("\ufeff".encode()), Delimited(separator, quoted, None if header else NAMES[:columns])


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=files(), block=st.integers(2, 60))
def test_blocks_are_read_as_pyarrow_reads_the_whole(tmp_path, file, block):
    data, shape = file
    path = tmp_path / "file.csv"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "_READ", block)
        patch.setattr(delimited, "_CACHED", 7)
        found = read(read_delimited(path, shape, "utf-8"))
    assert found == read(whole(path, shape))


TIMES = ["12", "12", "1500000000", "-3", "007", "+4", "", " 6", "5.0", "1" * 25, "x"]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    times=st.lists(st.sampled_from(TIMES), min_size=1, max_size=30),
    few=st.integers(1, len(TIMES)),
    last=st.booleans(),
    quoted=st.booleans(),
    block=st.integers(40, 99),
)
def test_numbers_are_those_of_the_cells_as_they_came(tmp_path, times, few, last, quoted, block):
    times = [TIMES[TIMES.index(time) % few] for time in times]
    cell = '"{}"' if quoted else "{}"
    lines = [f"{cell.format('u')},{time}" if last else f"{time},{cell.format('u')}" for time in times]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user,time" if last else "time,user", *lines]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "_READ", block)
        typed = list(read_delimited(path, Delimited(), "utf-8", frozenset({"time", "other"})))
    text = pl.concat(part.table for part in read_delimited(path, Delimited(), "utf-8"))
    assert pl.concat(part.given() for part in typed).equals(text)
    assert not any(part.rejected for part in typed)
    for part in typed:
        numbers = part.table["time"]
        assert numbers.dtype == (pl.Int64 if part.text else pl.String)
        cells = text.filter(text[ROW].is_in(part.table[ROW].implode()))["time"]
        assert numbers.equals(cells.str.strip_chars().cast(pl.Int64) if part.text else cells)
    if few <= 5:
        assert all(part.text for part in typed if part.table.height)


LOG = pl.DataFrame({"user": ["u1", "u2", "u1"] * 40, "item": ["i7", "", "i9"] * 40, "time": ["12", "13", "14"] * 40})


@pytest.mark.parametrize("style", ["necessary", "always", "non_numeric"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_log_as_programs_write_it_needs_no_care(tmp_path, monkeypatch, style, end):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(LOG.write_csv(quote_style=style, line_terminator=end).encode()))
    monkeypatch.setattr(delimited, "_READ", 200)
    monkeypatch.setattr(delimited, "_careful", None)
    parts = list(read_delimited(path, Delimited(), "utf-8"))
    assert len(parts) > 5
    assert all(part.tidy for part in parts)
    assert pl.concat(part.table for part in parts).equals(LOG.with_columns(pl.int_range(1, 121).alias(ROW)))


def test_a_reader_that_is_given_up_waits_for_no_thread(tmp_path, monkeypatch):
    path, again, plain, seen = tmp_path / "log.csv", threading.Event(), delimited._plain, []
    path.write_text(LOG.write_csv())

    def slow(*arguments):
        seen.append(arguments)
        assert len(seen) == 1 or again.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(delimited, "_READ", 200)
    monkeypatch.setattr(delimited, "_plain", slow)
    for parts in (read_delimited(path, Delimited(), "utf-8"), ahead(read_delimited(path, Delimited(), "utf-8"))):
        seen.clear()
        again.clear()
        assert next(parts).table.height
        closing = threading.Thread(target=parts.close)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
        again.set()


def test_a_bad_line_sends_only_its_block_the_careful_way(tmp_path, monkeypatch):
    lines = LOG.write_csv(quote_style="never").encode().splitlines()
    lines[30] = b"one cell"
    lines[90] = b"u1,\xff,15"
    path = tmp_path / "log.csv"
    path.write_bytes(b"\n".join(lines))
    careful, blocks = delimited._careful, []
    monkeypatch.setattr(delimited, "_READ", 200)
    monkeypatch.setattr(delimited, "_careful", lambda *args: blocks.append(args) or careful(*args))
    rows, rejected = read(read_delimited(path, Delimited(), "utf-8"))
    assert [(number, reason) for number, reason, _ in rejected] == [
        (30, "1 cells, expected 3"),
        (90, "bytes that are not UTF-8"),
    ]
    assert [row[ROW] for row in rows] == [number for number in range(1, 121) if number not in (30, 90)]
    assert len(blocks) == 2


def test_a_line_break_within_a_cell_keeps_both_characters_wherever_a_block_ends(tmp_path, monkeypatch):
    path = tmp_path / "items.csv"
    path.write_bytes(b"item,title\r\n" + b"".join(b'i%d,"one\r\ntwo"\r\n' % number for number in range(40)))
    for block in range(20, 60):
        monkeypatch.setattr(delimited, "_READ", block)
        monkeypatch.setattr(delimited, "BLOCK", block + 20)
        rows, rejected = read(read_delimited(path, Delimited(), "utf-8"))
        assert not rejected
        assert [row["title"] for row in rows] == ["one\r\ntwo"] * 40
