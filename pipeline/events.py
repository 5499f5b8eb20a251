"""Interactions as codes: two numbers and a time for each event, the ids once. 20 bytes an event, whatever the ids.

Order and copies are decided here (DESIGN 4): by user, then (timestamp, sequence where given, else hash(user, item)).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from schemas import tables
from schemas.hashing import Digest, tie_hashes

SLICE = 1_048_576  # events decoded at once
_SEGMENT = 4_000_000  # events whose ids are encoded together
_CODED = (tables.USER_ID, tables.ITEM_ID, tables.EVENT)
_SCHEMA = {
    tables.USER_ID: pl.Int32,
    tables.ITEM_ID: pl.Int32,
    tables.TIMESTAMP: pl.Int64,
    tables.SEQUENCE: pl.Int64,
    tables.EVENT: pl.Int32,
    tables.LABEL: pl.Float64,
}


@dataclass(frozen=True)
class Events:
    """rows: one an event, ids and event types as places in ``names``; a column that nothing fills is of type Null.

    names: column -> its distinct values, sorted as UTF-8.
    """

    rows: pl.DataFrame
    names: dict[str, pa.Array]

    def __len__(self) -> int:
        return self.rows.height

    def where(self, keep: pl.Series | NDArray[np.bool_]) -> Events:
        """The events of a mask, in their order."""
        return self if keep.all() else replace(self, rows=self.rows.filter(pl.Series(keep)))

    def count(self, column: str) -> int:
        """Distinct ids of a column that an event has."""
        return int(np.count_nonzero(self.counts(column)))

    def counts(self, column: str) -> NDArray[np.int64]:
        """Events of each of ``names[column]``."""
        found = np.zeros(len(self.names[column]), dtype=np.int64)
        for part in self.rows[column].to_frame().iter_slices(4 * SLICE):  # bincount makes int64 of what it counts
            found += np.bincount(part.to_series().to_numpy(), minlength=len(found))
        return found

    def compact(self) -> Events:
        """Without the names that no event has any more."""
        names, columns = {}, []
        for column in _CODED:
            if self.rows[column].dtype == pl.Null:
                continue
            used = np.zeros(len(self.names[column]), dtype=bool)
            used[self.rows[column].drop_nulls().to_numpy()] = True
            if used.all():
                continue
            codes = pl.Series(column, (np.cumsum(used) - 1).astype(np.int32))
            names[column] = self.names[column].filter(pa.array(used))
            columns.append(codes.gather(self.rows[column]))
        return Events(self.rows.with_columns(columns), self.names | names)

    def slices(self, dictionary: bool = False) -> Iterator[pa.Table]:
        """The events with their ids, in the schema of the interactions table.

        dictionary: users as a dictionary array, which the Parquet file of ordered events takes as it is.
        """
        schema = tables.INTERACTIONS
        if dictionary:
            place = schema.get_field_index(tables.USER_ID)
            schema = schema.set(place, schema.field(place).with_type(pa.dictionary(pa.int32(), pa.string())))
        for part in self.rows.iter_slices(SLICE):
            arrays = []
            for field in schema:
                column = part[field.name]
                if column.dtype == pl.Null:
                    arrays.append(pa.nulls(part.height, field.type))
                elif pa.types.is_dictionary(field.type):
                    low, high = int(column.min()), int(column.max())
                    names = self.names[field.name].slice(low, high + 1 - low)
                    arrays.append(pa.DictionaryArray.from_arrays((column - low).to_arrow(), names))
                elif field.name in _CODED:
                    arrays.append(_spelled(column, self.names[field.name]))
                else:
                    arrays.append(column.to_arrow())
            yield pa.table(arrays, schema=schema)

    def digest_into(self, digest: Digest) -> None:
        """Add names and rows, so that equal events give equal digests."""
        for column in _CODED:
            values = self.names[column].cast(pa.large_string())
            digest.add(column).add(np.diff(_offsets(values)).astype("<i8").data).add(_bytes(values).data)
        for column, dtype in _SCHEMA.items():
            values = self.rows[column]
            if values.null_count() == len(values):
                digest.add(f"no {column}")
                continue
            missing = values.is_null().to_numpy().astype(np.uint8)
            digest.add(missing.data if missing.any() else b"")
            digest.add(np.ascontiguousarray(values.cast(dtype).fill_null(0).to_numpy()).data)


def _offsets(values: pa.Array) -> NDArray[np.int64]:
    return np.frombuffer(values.buffers()[1] or b"\0" * 8, dtype=np.int64)[
        values.offset : values.offset + len(values) + 1
    ]


def _bytes(values: pa.Array) -> NDArray[np.uint8]:
    offsets = _offsets(values)
    return np.frombuffer(values.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]


def _spelled(codes: pl.Series, names: pa.Array) -> pa.Array:
    return names.take(codes.to_arrow())


class _Coded(NamedTuple):
    """Some texts as codes. codes: [n], null where the text is; texts: [distinct]."""

    codes: pa.Array
    texts: pl.Series


_SEEDS = (secrets.randbits(64), secrets.randbits(64))  # which code a text has depends on them, no result does


def _encode(parts: list[pl.Series]) -> _Coded:
    """Codes of texts; runs in a thread beside the reader."""
    texts = pl.concat(parts, rechunk=False)
    if texts.null_count() == len(texts):
        return _Coded(pa.nulls(len(texts), pa.int32()), texts[:0])
    some = texts.drop_nulls()
    codes, first = _distinct(*(some.hash(seed).to_numpy() for seed in _SEEDS))
    if len(some) == len(texts):
        return _Coded(pa.array(codes), some.gather(first))
    given = texts.is_not_null().to_numpy()
    every = np.zeros(len(texts), dtype=np.int32)
    every[given] = codes
    return _Coded(pa.array(every, mask=~given), some.gather(first))


def _distinct(hashes: NDArray[np.uint64], other: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """A code [n] for each text and the place of the first of each code, from two hashes [n] of them.

    Texts are told apart by a hundred bits: those of the first hash that fit into a number beside the place, as one
    number sorts faster than a table of hashes finds, and all 64 of the other.
    """
    count, mask = len(hashes), np.uint64((1 << len(hashes).bit_length()) - 1)
    packed = hashes & ~mask
    packed |= np.arange(count, dtype=np.uint64)
    packed.sort()
    starts = np.ones(count, dtype=bool)
    np.greater(packed[1:] ^ packed[:-1], mask, out=starts[1:])
    packed &= mask
    places = packed.view(np.int64)
    check = other[places]
    differ = np.zeros(count, dtype=bool)
    np.not_equal(check[1:], check[:-1], out=differ[1:])
    if (differ & ~starts).any():  # some texts agree in the first hash's bits: side by side by the other
        groups = np.cumsum(starts)
        among = np.flatnonzero(np.isin(groups, groups[differ & ~starts]))
        places[among] = places[among][np.lexsort((places[among], check[among], groups[among]))]
        check = other[places]
        starts[1:] |= check[1:] != check[:-1]
    ranks = np.cumsum(starts, dtype=np.int32)
    ranks -= 1
    codes = np.empty(count, dtype=np.int32)
    codes[places] = ranks
    return codes, places[starts]


class EventBuilder:
    """Takes checked events part by part and holds codes, no texts."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._waiting: dict[str, list[pl.Series]] = {column: [] for column in _CODED}
        self._encoded: dict[str, list[Future[_Coded]]] = {column: [] for column in _CODED}
        self._plain: list[pl.DataFrame] = []
        self._rows = 0

    def add(self, part: pl.DataFrame) -> None:
        """part: the columns of the interactions table, ids as strings; Null columns where nothing is given."""
        for column in _CODED:
            text = part[column] if part[column].dtype == pl.String else part[column].cast(pl.String)
            self._waiting[column].append(text)
        self._plain.append(part.select(tables.TIMESTAMP, tables.SEQUENCE, tables.LABEL))
        self._rows += part.height
        if self._rows >= _SEGMENT:
            self._flush()

    def _flush(self) -> None:
        for column, texts in self._waiting.items():
            if texts:
                for earlier in self._encoded[column][:-1]:
                    earlier.result()  # at most two segments of texts at once
                self._encoded[column].append(self._pool.submit(_encode, texts))
            self._waiting[column] = []
        self._rows = 0

    def build(self) -> Events:
        """All events so far, in the order in which they came, duplicates included."""
        self._flush()
        parts = {column: [found.result() for found in futures] for column, futures in self._encoded.items()}
        unified = dict(zip(parts, self._pool.map(_unified, parts.values()), strict=True))
        self._pool.shutdown()
        names = {column: found[0] for column, found in unified.items()}
        columns = [found[1].alias(column) for column, found in unified.items()]
        plain = {name: _SCHEMA[name] for name in (tables.TIMESTAMP, tables.SEQUENCE, tables.LABEL)}
        rows = pl.concat([pl.DataFrame(schema=dict.fromkeys(plain, pl.Null)), *self._plain], how="vertical_relaxed")
        self._plain, self._encoded = [], {}
        rows = rows.with_columns(pl.col(tables.TIMESTAMP).cast(pl.Int64), *columns).select(list(_SCHEMA))
        return Events(rows.rechunk(), names)


def _unified(parts: list[_Coded]) -> tuple[pa.Array, pl.Series]:
    """One sorted list of distinct texts for all parts, and the codes in it; Null when every value is null."""
    if not parts:
        return pa.array([], pa.string()), pl.Series([], dtype=pl.Int32)
    every = pl.concat([part.texts for part in parts], rechunk=False)
    joined = _encode([every])
    order = joined.texts.arg_sort()
    rank = np.empty(len(order), dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    names = joined.texts.gather(order).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
    rows = sum(len(part.codes) for part in parts)
    if not len(names):
        return names, pl.Series([None], dtype=pl.Null).new_from_index(0, rows)
    ranks, start, codes = rank[joined.codes.to_numpy()], 0, []
    for part in parts:
        own = pa.array(ranks[start : start + len(part.texts)])
        start += len(part.texts)
        codes.append(pl.Series(own.take(part.codes), dtype=pl.Int32))
    return names, pl.concat(codes)


class _Sorted(NamedTuple):
    """places: of the rows in order; keys: their columns, ordered; again: [n], the same keys as the row before."""

    places: NDArray[np.int64]
    keys: pl.DataFrame
    again: NDArray[np.bool_]


def _sorted(rows: pl.DataFrame, keys: list[str]) -> _Sorted:
    found = None if tables.SEQUENCE in keys else _by_user_and_time(rows)
    if found is not None:
        return found
    places = rows.select(pl.arg_sort_by(keys, nulls_last=True)).to_series().to_numpy().astype(np.int64)
    chosen = rows.select(keys)[places]
    same = chosen.select(pl.all_horizontal(pl.col(key).eq_missing(pl.col(key).shift()) for key in keys))
    again = same.to_series().to_numpy().copy()
    again[0] = False
    return _Sorted(places, chosen, again)


def _by_user_and_time(rows: pl.DataFrame) -> _Sorted | None:
    """As ``_sorted`` by these two; None where the numbers are too large.

    Two sorts, each of one number that carries the place along, are several times faster than one by two columns;
    the first is not needed for a log that is in order of time.
    """
    users, times = rows[tables.USER_ID].to_numpy(), rows[tables.TIMESTAMP].to_numpy()
    bits = len(users).bit_length()
    mask = (1 << bits) - 1
    base, by_time = int(times.min()), None
    if max(int(times.max()) - base, int(users.max())).bit_length() + bits > 63:
        return None
    if (times[1:] < times[:-1]).any():
        by_time = _sorted_with_places(times - base, bits)
        by_time &= mask
        users = users[by_time]
    packed = _sorted_with_places(users.astype(np.int64), bits)
    users = np.empty(len(packed), dtype=np.int32)
    np.right_shift(packed, bits, out=users, casting="unsafe")
    packed &= mask
    places = packed if by_time is None else by_time[packed]
    times = times[places]
    again = np.zeros(len(places), dtype=bool)
    again[1:] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    return _Sorted(places, pl.DataFrame({tables.USER_ID: users, tables.TIMESTAMP: times}), again)


def _sorted_with_places(numbers: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """The numbers, which are spent, in order; the place of each in its lowest bits."""
    numbers <<= bits
    for start in range(0, len(numbers), SLICE):
        part = numbers[start : start + SLICE]
        part |= np.arange(start, start + len(part))
    numbers.sort()
    return numbers


def _hashes(rows: pl.DataFrame, names: dict[str, pa.Array]) -> list[pl.Series]:
    """``tie_hashes`` of each row as two numbers that sort as its 16 bytes do."""
    halves = [np.zeros((0, 2), dtype=np.uint64)]
    for part in rows.iter_slices(SLICE):
        users, items = (
            _spelled(part[column], names[column]).to_pylist() for column in (tables.USER_ID, tables.ITEM_ID)
        )
        hashes = b"".join(tie_hashes(users, items))
        halves.append(np.frombuffer(hashes, dtype=">u8").astype(np.uint64).reshape(-1, 2))
    joined = np.concatenate(halves)
    return [pl.Series("__high", joined[:, 0]), pl.Series("__low", joined[:, 1])]


def order_events(events: Events) -> tuple[Events, int]:
    """Events in their order, copies taken out; and how many these were.

    Real logs tie on the timestamp for a quarter to a half of consecutive events, stored in id order, which
    leaks; the hash is an order that knows nothing (DESIGN 4). Only tied events are hashed.
    """
    if not len(events):
        return events, 0
    keys = [tables.USER_ID, tables.TIMESTAMP]
    if events.rows[tables.SEQUENCE].dtype != pl.Null:
        keys.append(tables.SEQUENCE)
    order, chosen, again = _sorted(events.rows, keys)
    places = np.flatnonzero(again | np.append(again[1:], False))
    copies: NDArray[np.bool_] = np.zeros(len(order), dtype=bool)
    if len(places):
        tied = events.rows[order[places]]
        within = [*keys, "__high", "__low", tables.EVENT, tables.LABEL]
        tied = tied.with_columns(_hashes(tied, events.names)).with_row_index("__place").sort(within, nulls_last=True)
        order[places] = order[places][tied["__place"].to_numpy()]
        every: list[Any] = [
            pl.col(name).eq_missing(pl.col(name).shift()) for name in _SCHEMA if tied[name].dtype != pl.Null
        ]
        same = tied.select(pl.all_horizontal(every)).to_series().to_numpy().copy()
        same[0] = False
        copies[places] = same
    others = events.rows.select(name for name in _SCHEMA if name not in keys)[order]
    rows = pl.concat([chosen, others], how="horizontal").select(list(_SCHEMA))
    return replace(events, rows=rows).where(~copies), int(copies.sum())
