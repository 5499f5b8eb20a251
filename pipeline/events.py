"""Interactions as codes: two numbers and a time for each event, the ids once. 20 bytes an event, whatever the ids.

Order and copies are decided here (DESIGN 4): by user, then (timestamp, sequence where given, else hash(user, item)).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.coding import Column
from pipeline.digests import add_texts
from schemas import tables
from schemas.hashing import Digest, tie_hashes

SLICE = 1_048_576  # events decoded at once
_PIECE, _AT_ONCE = 1 << 18, 1 << 20  # events put to their ranges of users, and about as many as are ordered, at once
_FEW = 1 << 17  # events that are not worth a part of their own
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

    names: column -> its distinct values, sorted as UTF-8; where ``EventBuilder.build_with`` made them, items that it
    was given before all others.
    """

    rows: pl.DataFrame
    names: dict[str, pa.Array]

    def __len__(self) -> int:
        return self.rows.height

    def where(self, keep: pl.Series | NDArray[np.bool_]) -> Events:
        """The events of a mask, in their order."""
        return self if keep.all() else replace(self, rows=self.rows.filter(pl.Series(keep)))

    def counts(self, column: str) -> NDArray[np.int64]:
        """Events of each of ``names[column]``."""
        found = np.zeros(len(self.names[column]), dtype=np.int64)
        for part in self.rows[column].to_frame().iter_slices(2 * SLICE):  # bincount makes int64 of what it counts
            found += np.bincount(part.to_series().to_numpy(), minlength=len(found))
        return found

    def compact(self) -> Events:
        """Without the names that no event has any more."""
        given = [column for column in _CODED if self.rows[column].dtype != pl.Null]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(self._used, given))
        names = {column: names for column, (names, _) in zip(given, found, strict=True)}
        return Events(self.rows.with_columns([codes for _, codes in found]), self.names | names)

    def _used(self, column: str) -> tuple[pa.Array, pl.Series]:
        """The names that an event has, and the codes in them."""
        codes, names = self.rows[column], self.names[column]
        used = np.zeros(len(names), dtype=bool)
        used[codes.drop_nulls().to_numpy()] = True
        if used.all():
            return names, codes
        places = pl.Series(column, np.cumsum(used, dtype=np.int32) - 1)
        return names.filter(pa.array(used)), places.gather(codes)

    def parts(self, most: int | None = None, by_user: bool = False) -> Iterator[pl.DataFrame]:
        """The rows, cut about as they lie in memory; of ``most`` at once. by_user: cut where another user begins."""
        users, start = self.rows[tables.USER_ID], 0
        for end in np.cumsum(users.chunk_lengths()).tolist():
            inside = end < len(users)
            if inside and (end - start < _FEW or (by_user and users[end - 1] == users[end])):
                continue
            yield from self.rows[start:end].iter_slices(most or max(1, end - start))
            start = end

    def slices(self, dictionary: bool = False) -> Iterator[pa.Table]:
        """The events with their ids, in the schema of the interactions table.

        dictionary: users as a dictionary array, which the Parquet file of ordered events takes as it is.
        """
        schema = tables.INTERACTIONS
        if dictionary:
            place = schema.get_field_index(tables.USER_ID)
            schema = schema.set(place, schema.field(place).with_type(pa.dictionary(pa.int32(), pa.string())))
        texts = {column: pl.Series(names, dtype=pl.String) for column, names in self.names.items()}
        nothing = {
            f.name: pa.nulls(min(SLICE, len(self)), f.type) for f in schema if self.rows[f.name].dtype == pl.Null
        }
        for part in self.parts(SLICE):
            arrays = []
            for field in schema:
                column = part[field.name]
                if column.dtype == pl.Null:
                    arrays.append(nothing[field.name][: part.height])
                elif pa.types.is_dictionary(field.type):
                    low, high = int(column.min()), int(column.max())
                    names = self.names[field.name].slice(low, high + 1 - low)
                    arrays.append(pa.DictionaryArray.from_arrays((column - low).to_arrow(), names))
                elif field.name in _CODED:
                    spelled = texts[field.name].gather(column)
                    arrays.append(spelled.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(field.type))
                else:
                    arrays.append(column.to_arrow())
            yield pa.table(arrays, schema=schema)

    def digest_into(self, digest: Digest) -> None:
        """Add names and rows, so that equal events give equal digests."""
        for column in _CODED:
            add_texts(digest.add(column), self.names[column])
        for column, dtype in _SCHEMA.items():
            values = self.rows[column]
            if values.null_count() == len(values):
                digest.add(f"no {column}")
                continue
            digest.add(values.is_null().to_numpy().astype(np.uint8).data if values.null_count() else b"")
            digest.add_parts([_contiguous(part[column], dtype) for part in self.parts()])


def _contiguous(values: pl.Series, dtype: Any) -> memoryview:
    return np.ascontiguousarray(values.cast(dtype).fill_null(0).to_numpy()).data


class EventBuilder:
    """Takes checked events part by part and holds codes, no texts."""

    def __init__(self) -> None:
        self._columns = {column: Column() for column in _CODED}
        self._plain: list[pl.DataFrame] = []

    def add(self, part: pl.DataFrame) -> None:
        """part: the columns of the interactions table, ids as strings; Null columns where nothing is given."""
        for column, taken in self._columns.items():
            taken.add(part[column])
        self._plain.append(part[[tables.TIMESTAMP, tables.SEQUENCE, tables.LABEL]])

    def build(self) -> Events:
        """All events so far, in the order in which they came, duplicates included."""
        return self.build_with(pl.Series([], dtype=pl.String))[0]

    def build_with(self, items: pl.Series) -> tuple[Events, int]:
        """As ``build``; and how many of ``items``, which are distinct and sorted, an event has: their codes are the
        first ones.
        """
        coming = {
            name: taken.build(items if name == tables.ITEM_ID else items[:0]) for name, taken in self._columns.items()
        }
        none = pl.DataFrame(schema={tables.TIMESTAMP: pl.Int64, tables.SEQUENCE: pl.Null, tables.LABEL: pl.Null})
        plain = pl.concat([none, *self._plain], how="vertical_relaxed")
        self._plain, self._columns = [], {}
        found = {name: built.result() for name, built in coming.items()}
        columns = plain.to_dict() | {name: built.codes.alias(name) for name, built in found.items()}
        rows = pl.DataFrame([columns[name] for name in _SCHEMA])  # polars' own ways copy what lies in other chunks
        return Events(rows, {name: built.names for name, built in found.items()}), found[tables.ITEM_ID].known


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
    """As ``_sorted`` by these two; None where times in no order are too far apart.

    Two sorts, of one number each, are several times faster than one by two columns; the first is not needed for a
    log that is in order of time.
    """
    users, times = rows[tables.USER_ID].to_numpy(), rows[tables.TIMESTAMP].to_numpy()
    by_time = None
    if (times[1:] < times[:-1]).any():
        by_time = _places_by_number(times)
        if by_time is None:
            return None
        users = users.take(by_time)
    places = _places_by_code(users)
    users = users.take(places)
    places = places if by_time is None else by_time.take(places)
    times = times.take(places)
    again = np.zeros(len(places), dtype=bool)
    again[1:] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    return _Sorted(places, pl.DataFrame({tables.USER_ID: users, tables.TIMESTAMP: times}), again)


def _places_by_code(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Places [n] of codes, none of them negative, in order; those of equal ones as they came.

    By 16 bits at a time, which numpy's stable sort counts and does not compare: half the time of a sort of numbers
    of 64 bits, or less.
    """
    codes = codes - codes.min()
    places = np.argsort(codes.astype(np.uint16), kind="stable")
    high = (codes >> 16).astype(np.uint16)
    if high.any():
        places = places.take(np.argsort(high.take(places), kind="stable"))
    return places


def _places_by_number(numbers: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Places [n] of numbers in order, of equal ones as they came; None where they are too far apart.

    One number carries the place along. Polars sorts it: where AVX-512 is slow to compress, as in Zen 4, numpy takes
    three times as long.
    """
    bits, base = len(numbers).bit_length(), int(numbers.min())
    if (int(numbers.max()) - base).bit_length() + bits > 63:
        return None
    packed = (numbers - base) << bits
    packed |= np.arange(len(packed))
    return pl.Series(packed).sort(multithreaded=False).to_numpy() & ((1 << bits) - 1)


def _hashes(rows: pl.DataFrame, names: dict[str, pa.Array]) -> list[pl.Series]:
    """``tie_hashes`` of each row as two numbers that sort as its 16 bytes do."""
    halves = [np.zeros((0, 2), dtype=np.uint64)]
    for part in rows.iter_slices(SLICE):
        users, items = (
            names[column].take(part[column].to_arrow()).to_pylist() for column in (tables.USER_ID, tables.ITEM_ID)
        )
        hashes = b"".join(tie_hashes(users, items))
        halves.append(np.frombuffer(hashes, dtype=">u8").astype(np.uint64).reshape(-1, 2))
    joined = np.concatenate(halves)
    return [pl.Series("__high", joined[:, 0]), pl.Series("__low", joined[:, 1])]


def order_events(events: Events) -> tuple[Events, int]:
    """Events in their order, copies taken out; and how many these were. A thread orders a range of users.

    Real logs tie on the timestamp for a quarter to a half of consecutive events, stored in id order, which
    leaks; the hash is an order that knows nothing (DESIGN 4). Only tied events are hashed. What is given goes part by
    part, where the caller does not hold it: in memory of its own the order would take longer.
    """
    if not len(events):
        return events, 0
    count, names, range_of = len(events), events.names, _ranges(events)
    with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
        cut = pool.map(partial(_cut, range_of=range_of), events.parts(_PIECE))
        del events
        ranges = list(map(list, zip(*cut, strict=True)))
        found = list(pool.map(partial(_ordered_range, names=names), ranges))
    rows = pl.concat(found, rechunk=False)
    return Events(rows, names), count - rows.height


def _ranges(events: Events) -> NDArray[np.uint8]:
    """The range that each user is in, by code: of users in order, with about as many events as the others.

    What a thread orders at once is small: in new memory for half of all events it would take twice as long.
    """
    users, count = events.rows[tables.USER_ID], len(events.names[tables.USER_ID])
    size = max(_AT_ONCE, len(users) // 255)
    some = users.gather_every(1 + len(users) // 10_000).sort().to_numpy()
    bounds = np.unique(some[:: -(-len(some) * size // len(users))][1:])
    return np.searchsorted(bounds, np.arange(count), side="right").astype(np.uint8)


def _cut(part: pl.DataFrame, range_of: NDArray[np.uint8]) -> list[pl.DataFrame]:
    """The rows of each range, in the order in which they came."""
    of = range_of.take(part[tables.USER_ID].to_numpy())
    part = part[np.argsort(of, kind="stable")]  # a counting sort, as they are bytes
    ends = np.cumsum(np.bincount(of, minlength=int(range_of[-1]) + 1)).tolist()
    return [part[start:end] for start, end in pairwise([0, *ends])]


def _ordered_range(pieces: list[pl.DataFrame], names: dict[str, pa.Array]) -> pl.DataFrame:
    """As ``_ordered``, of all the pieces, which are given up."""
    rows = pl.concat(pieces, rechunk=True)
    pieces.clear()
    return _ordered(rows, names)


def _ordered(rows: pl.DataFrame, names: dict[str, pa.Array]) -> pl.DataFrame:
    """Rows of some users in their order, without copies."""
    if rows.is_empty():
        return rows
    keys = [tables.USER_ID, tables.TIMESTAMP]
    if rows[tables.SEQUENCE].dtype != pl.Null:
        keys.append(tables.SEQUENCE)
    order, chosen, again = _sorted(rows, keys)
    places = np.flatnonzero(again | np.append(again[1:], False))
    copies: NDArray[np.bool_] = np.zeros(len(order), dtype=bool)
    if len(places):
        tied = rows[order[places]]
        within = [*keys, "__high", "__low", tables.EVENT, tables.LABEL]
        tied = tied.with_columns(_hashes(tied, names)).with_row_index("__place").sort(within, nulls_last=True)
        order[places] = order[places][tied["__place"].to_numpy()]
        every: list[Any] = [
            pl.col(name).eq_missing(pl.col(name).shift()) for name in _SCHEMA if tied[name].dtype != pl.Null
        ]
        same = tied.select(pl.all_horizontal(every)).to_series().to_numpy().copy()
        same[0] = False
        copies[places] = same
    others = rows.select(name for name in _SCHEMA if name not in keys)[order]
    rows = pl.concat([chosen, others], how="horizontal").select(list(_SCHEMA))
    return rows.filter(pl.Series(~copies)) if copies.any() else rows
