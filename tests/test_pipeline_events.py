"""Events as codes: texts told apart by hashes, and their order."""

from __future__ import annotations

import weakref
from unittest.mock import patch

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.digests import new_digest
from pipeline.events import _SCHEMA, EventBuilder, Events, order_events
from pipeline.profile import describe_events
from schemas import tables
from schemas.hashing import tie_hashes


def build(rows: list[tuple], parts: int = 1) -> Events:
    """Events from (user, item, time, sequence) in so many parts."""
    builder = EventBuilder()
    for part in np.array_split(np.arange(len(rows)), parts):
        chosen = [rows[place] for place in part]
        columns = dict(zip(["user_id", "item_id", "timestamp", "sequence"], zip(*chosen, strict=True), strict=True))
        table = pl.DataFrame(columns).with_columns(event=pl.lit(None), label=pl.lit(None))
        given = table["sequence"].null_count() < table.height
        builder.add(table if given else table.with_columns(sequence=pl.lit(None)))
    return builder.build()


def plain(events: Events) -> list[tuple]:
    return [row[:4] for part in events.slices() for row in pl.DataFrame(part).rows()]


IDS = st.sampled_from(["b", "a", "ab", "é", "\U0001f600", "a longer name than the twelve of a view"])
FAR = 1 << 61  # leaves no room for a place beside it


@given(
    rows=st.lists(st.tuples(IDS, IDS, st.sampled_from([1, 2, 3, 1000, FAR])), min_size=1, max_size=40),
    sequence=st.booleans(),
    in_order=st.booleans(),
    at_once=st.sampled_from([1, 3, 1 << 20]),
)
def test_events_are_ordered_by_user_then_time_then_what_knows_nothing(rows, sequence, in_order, at_once):
    rows = sorted(rows, key=lambda row: row[2]) if in_order else rows
    rows = [(*row, place % 3 if sequence else None) for place, row in enumerate(rows)]
    with patch.multiple("pipeline.events", _PIECE=at_once, _AT_ONCE=at_once):
        ordered, copies = order_events(build(rows, parts=min(3, len(rows))))

    def key(row):
        user, item, time, place = row
        return user.encode(), time, place or 0, tie_hashes([user], [item])[0]

    assert plain(ordered) == sorted(set(rows), key=key)
    assert copies == len(rows) - len(set(rows))


@pytest.mark.parametrize("in_order", [True, False])
def test_more_users_at_once_than_sixteen_bits_can_tell_apart(in_order):
    rng, count = np.random.default_rng(0), 300_000
    users, times = rng.integers(0, 200_000, count), rng.permutation(count)
    times = np.sort(times) if in_order else times
    names = pl.Series([f"u{number:06}" for number in range(200_000)])
    builder = EventBuilder()
    columns = {"user_id": names[users], "item_id": pl.repeat("i", count, eager=True), "timestamp": times}
    builder.add(pl.DataFrame(columns).with_columns(sequence=None, event=None, label=None))
    rows = order_events(builder.build())[0].rows
    expected = np.lexsort((times, users))
    assert np.array_equal(rows["timestamp"], times[expected])
    assert np.array_equal(rows["user_id"], np.unique(users, return_inverse=True)[1][expected])


def test_what_is_ordered_goes_part_by_part_where_nobody_holds_it():
    parts, size = 8 * pl.thread_pool_size(), 10
    times = [np.arange(size) + part for part in range(parts)]
    held, left = [weakref.ref(part) for part in times], []

    def events() -> Events:
        rows = pl.DataFrame(
            {
                "user_id": pl.Series([part for part in range(parts) for _ in range(size)], dtype=pl.Int32),
                "item_id": pl.Series([0] * parts * size, dtype=pl.Int32),
            }
        )
        chunks = pa.chunked_array([pa.Array.from_buffers(pa.int64(), size, [None, pa.py_buffer(t)]) for t in times])
        times.clear()
        rows = rows.with_columns(sequence=pl.lit(None), event=pl.lit(None), label=pl.lit(None))
        given = pl.Series("timestamp", pl.from_arrow(chunks, rechunk=False))
        columns = {**rows.to_dict(), "timestamp": given}
        names = {"user_id": pa.array(map(str, range(parts))), "item_id": pa.array(["a"]), "event": pa.array([])}
        return Events(pl.DataFrame([columns[name] for name in _SCHEMA]), names)

    def ordered(rows, names):
        left.append(sum(part() is not None for part in held))
        return rows

    with patch.multiple("pipeline.events", _FEW=1, _AT_ONCE=1, _ordered=ordered):
        order_events(events())
    assert left[0] <= pl.thread_pool_size()  # a thread may not have put its last one down yet


def everything(events: Events) -> tuple:
    digest = new_digest()
    events.digest_into(digest)
    return (
        digest.hexdigest(),
        describe_events(events),
        plain(events),
        pa.concat_tables(events.slices(True)).to_pylist(),
    )


@given(rows=st.lists(st.tuples(IDS, IDS, st.integers(1, 4)), min_size=1, max_size=40), few=st.integers(1, 20))
def test_where_rows_are_cut_makes_no_difference(rows, few):
    rows = [(*row, None) for row in rows]
    whole = everything(order_events(build(rows))[0])
    with patch.multiple("pipeline.events", _PIECE=few, _AT_ONCE=few, _FEW=few):
        cut, _ = order_events(build(rows, parts=min(7, len(rows))))
        assert all(part.height >= few for part in list(cut.parts())[:-1])
        assert everything(cut) == whole


def test_a_column_may_be_missing_in_any_part():
    given = [pl.lit(None), pl.lit(None, pl.String), pl.Series(["b", None]), pl.Series(["a", "b"]), pl.lit(None)]
    table = pl.DataFrame(
        {"user_id": ["u", "v"], "item_id": ["i", "i"], "timestamp": [1, 2], "sequence": [None, None]}
    )
    for parts, event in ((given, [None] * 4 + ["b", None, "a", "b"] + [None] * 2), (given[:2], [None] * 4)):
        builder = EventBuilder()
        for each in parts:
            builder.add(table.with_columns(event=each, label=pl.lit(None)))
        events = builder.build()
        assert [row[4] for part in events.slices() for row in pl.DataFrame(part).rows()] == event
        assert (events.rows["event"].dtype == pl.Null) == (parts is not given)


@pytest.mark.parametrize("dictionary", [False, True])
def test_slices_spell_the_ids(dictionary):
    ordered, _ = order_events(build([("u2", "i1", 5, None), ("u1", "i2", 7, None), ("u1", "i1", 6, None)]))
    (part,) = ordered.slices(dictionary)
    assert part.cast(tables.INTERACTIONS).equals(
        pl.DataFrame(
            {
                "user_id": ["u1", "u1", "u2"],
                "item_id": ["i1", "i2", "i1"],
                "timestamp": [6, 7, 5],
                "sequence": [None] * 3,
                "event": [None] * 3,
                "label": [None] * 3,
            }
        )
        .to_arrow()
        .cast(tables.INTERACTIONS)
    )
