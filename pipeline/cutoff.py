"""What a tower was trained on, by user, so that nothing it has seen is ever a test question (DESIGN 7)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.forgotten import ForgottenUsers
from pipeline.splits import Queries
from pipeline.store import Store
from schemas import tables
from schemas.errors import StoreError
from schemas.records import ItemTower, Ranker, UserTower
from user_tower.sequences import Histories, IntArray

_FILE = "cutoff.parquet"


def write_cutoff(folder: Path, training: Histories, item_ids: list[str], parent: Path | None = None) -> None:
    """Write each user's last event that a training saw. training: with times; item_ids: of its catalog rows; parent:
    the folder of the tower that it began with, whose events count as seen too. Raises StoreError."""
    assert training.times is not None
    some = np.flatnonzero(training.lengths > 0)
    last = training.offsets[1:][some] - 1
    columns = [
        [training.users[user] for user in some],
        training.times[last],
        [item_ids[row] for row in training.items[last]],
    ]
    table = pa.table(columns, schema=tables.CUTOFF)
    if parent is not None:  # of each user the later one of the two
        both = pa.concat_tables([table, _read(parent)])
        users, times = both.column(tables.USER_ID).to_pylist(), both.column(tables.TIMESTAMP).to_pylist()
        latest: dict[str, int] = {}
        for place, user in enumerate(users):
            if user not in latest or times[place] > times[latest[user]]:
                latest[user] = place
        table = both.take(list(latest.values()))
    pq.write_table(table, folder / _FILE)


def _read(folder: Path) -> pa.Table:
    try:
        return pq.read_table(folder / _FILE, schema=tables.CUTOFF)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{folder / _FILE} cannot be read: {error}; train that tower again") from error


def seen_events(folder: Path, histories: Histories, item_ids: list[str]) -> IntArray:
    """[U] how many of each user's events the tower in this folder was trained on: up to the one in its table.

    An event is found again by its time and item, wherever later deliveries have moved it; where it is gone, all
    events up to its time count. Raises StoreError when the table is missing or damaged.
    """
    table = _read(folder)
    assert histories.times is not None
    users = {user: number for number, user in enumerate(histories.users)}
    rows = {item: row for row, item in enumerate(item_ids)}
    found = np.array([users.get(user, -1) for user in table.column(tables.USER_ID).to_pylist()], dtype=np.int64)
    known = found >= 0
    # no event has a time this early: users that the training did not see
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


def seen_targets(folder: Path, questions: Queries, histories: Histories, item_ids: list[str]) -> NDArray[np.bool_]:
    """[P] the targets that the tower in this folder was trained on. histories: all events that the questions were
    made of, in rows of item_ids. Raises StoreError."""
    assert questions.numbers is not None
    seen = dict(zip(histories.users, seen_events(folder, histories, item_ids).tolist(), strict=True))
    until = np.array([seen[user] for user in questions.histories.users], dtype=np.int64)
    found: NDArray[np.bool_] = questions.numbers < until[questions.owners]
    return found


def forget_cutoffs(store: Store, tower: ItemTower | UserTower | Ranker, forgotten: ForgottenUsers) -> int:
    """Take users out of the table beside a tower; how many it had. The file is replaced in place: no checksum covers
    it, and the weights and the tower's id stay. Raises StoreError when it is damaged."""
    data = store.read_file(tower, _FILE)
    if data is None:
        return 0
    try:
        table = pq.read_table(pa.BufferReader(data), schema=tables.CUTOFF)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{_FILE} of {tower.id} cannot be read: {error}; {store.way_out(tower)}") from error
    gone = forgotten.mask(table.column(tables.USER_ID).to_pylist())
    if gone.any():
        out = pa.BufferOutputStream()
        pq.write_table(table.filter(pa.array(~gone)), out)
        store.replace_file(tower, _FILE, out.getvalue().to_pybytes())
    return int(gone.sum())
