"""What the Item LLM was tuned on, by user, so that nothing it has seen is ever a test question (DESIGN 7)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas import tables
from schemas.errors import StoreError
from user_tower.sequences import Histories, IntArray

_FILE = "cutoff.parquet"


def write_cutoff(folder: Path, training: Histories, item_ids: list[str]) -> None:
    """Write each user's last event that a tuning saw. training: with times; item_ids: of its catalog rows."""
    assert training.times is not None
    some = np.flatnonzero(training.lengths > 0)
    last = training.offsets[1:][some] - 1
    columns = [
        [training.users[user] for user in some],
        training.times[last],
        [item_ids[row] for row in training.items[last]],
    ]
    pq.write_table(pa.table(columns, schema=tables.CUTOFF), folder / _FILE)


def seen_events(folder: Path, histories: Histories, item_ids: list[str]) -> IntArray:
    """[U] how many of each user's events the tower in this folder was tuned on: up to the one in its table.

    An event is found again by its time and item, wherever later deliveries have moved it; where it is gone, all
    events up to its time count. Raises StoreError when the table is missing or damaged.
    """
    try:
        table = pq.read_table(folder / _FILE, schema=tables.CUTOFF)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{folder / _FILE} cannot be read: {error}; run tune-items again") from error
    assert histories.times is not None
    users = {user: number for number, user in enumerate(histories.users)}
    rows = {item: row for row, item in enumerate(item_ids)}
    found = np.array([users.get(user, -1) for user in table.column(tables.USER_ID).to_pylist()], dtype=np.int64)
    known = found >= 0
    # no event has a time this early: users that the tuning did not see
    times = np.full(len(histories), np.iinfo(np.int64).min)
    items = np.full(len(histories), -1, dtype=np.int64)
    times[found[known]] = table.column(tables.TIMESTAMP).to_numpy()[known]
    last_items = np.array([rows.get(item, -1) for item in table.column(tables.ITEM_ID).to_pylist()], dtype=np.int64)
    items[found[known]] = last_items[known]
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    same = (histories.times == times[owners]) & (histories.items == items[owners])
    exact = np.zeros(len(histories), dtype=np.int64)
    np.maximum.at(exact, owners[same], (np.arange(len(owners)) - histories.offsets[:-1][owners] + 1)[same])
    until = np.bincount(owners[histories.times <= times[owners]], minlength=len(histories))
    return np.where(exact > 0, exact, until)
