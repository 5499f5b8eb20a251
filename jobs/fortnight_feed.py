"""The feed of ``bench fortnight``: a data set replayed by time, with a catalog that changes, and damaged deliveries.

Everything is decided by the data and a seed, so an interrupted fortnight gets the same files again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from item_tower.prompt import TemplateConfig, content_keys, render
from jobs.config import data_table
from schemas import tables
from schemas.errors import ConfigError

NIGHTS = 14
EDITED, WITHDRAWN = 0.01, 0.005  # of the first night's catalog, each night
AWAY = 3  # nights until a withdrawn item is back
_BACK_SECONDS = 400 * 86_400  # by which the clock of the producers goes back
IntArray = NDArray[np.int64]


class Window(NamedTuple):
    """What a night brings. first, last: seconds of its events."""

    first: int
    last: int
    events: int
    users: int


class Catalog(NamedTuple):
    """A night's catalog as delivered. new, edited, reverted, withdrawn, returned: items of which that happened since
    the night before; reverted ones have the text they had before."""

    table: pa.Table
    new: int
    edited: int
    reverted: int
    withdrawn: int
    returned: int

    @property
    def changes(self) -> dict[str, int]:
        """The counts by name."""
        return {name: value for name, value in self._asdict().items() if name != "table"}

    @property
    def available(self) -> set[str]:
        """Ids that may be recommended."""
        kept = self.table.filter(self.table.column(tables.AVAILABLE))
        return set(kept.column(tables.ITEM_ID).to_pylist())


@dataclass(frozen=True)
class Replay:
    """items: sorted by id; events: in order of time; nights: [E] the night that delivers each event, from 0; arrives:
    [N] the night on which each item is in the catalog for the first time."""

    items: pa.Table
    events: pa.Table
    nights: IntArray
    arrives: IntArray
    field: str

    def window(self, night: int) -> Window:
        """Night 1 brings everything up to it."""
        mine = self.nights == night - 1
        times = self.events.column(tables.TIMESTAMP).to_numpy()[mine]
        users = self.events.column(tables.USER_ID).filter(pa.array(mine))
        return Window(int(times.min()), int(times.max()), int(mine.sum()), len(users.unique()))

    def catalog(self, night: int) -> Catalog:
        """The catalog of a night, all changes of the nights before it included."""
        count, base = len(self.arrives), np.flatnonzero(self.arrives == 0)
        edition, away_until = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        flagged = np.zeros(count, dtype=bool)
        edited: dict[int, IntArray] = {}
        reverted, gone = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        for number in range(2, night + 1):
            order = np.random.default_rng([0, number]).permutation(base)
            order = order[away_until[order] <= number]
            edits = max(3, round(EDITED * len(base)))
            edited[number], rest = order[:edits], order[edits:]
            earlier = edited.get(number - 2, rest[:0])
            reverted = np.setdiff1d(earlier[: len(earlier) // 3], edited[number])
            reverted = reverted[edition[reverted] == number - 2]
            edition[edited[number]], edition[reverted] = number, 0
            gone = rest[: max(2, round(WITHDRAWN * len(base)))]
            away_until[gone] = number + AWAY
            flagged[gone] = np.arange(len(gone)) % 2 == 0  # half of them stay in the feed, as not available
        away = away_until > night
        delivered = (self.arrives < night) & ~(away & ~flagged)
        titles = self.items.column(self.field).to_pylist()
        texts = [f"{text}, edition {n}" if n else text for text, n in zip(titles, edition.tolist(), strict=True)]
        place = self.items.column_names.index(self.field)
        table = self.items.set_column(place, self.field, pa.array(texts, pa.string()))
        table = table.append_column(tables.AVAILABLE, pa.array(~away)).filter(pa.array(delivered))
        new = int((self.arrives == night - 1).sum())
        returned = int((away_until == night).sum())
        return Catalog(table, new, len(edited.get(night, ())), len(reverted), len(gone), returned)

    def keys(self, night: int, template: TemplateConfig) -> set[bytes]:
        """Content keys of all texts that the night's catalog delivers."""
        return set(content_keys([text for text in render(self.catalog(night).table, template) if text]))

    def write(self, folder: Path, night: int, fault: str | None = None) -> None:
        """The feed as it lies there on a night: the catalog, and one file of events for each night so far."""
        shutil.rmtree(folder, ignore_errors=True)
        events = folder / "interactions"
        events.mkdir(parents=True)
        pq.write_table(self.catalog(night).table, folder / "items.parquet")
        for number in range(night):
            pq.write_table(
                self.events.filter(pa.array(self.nights == number)), events / f"night-{number + 1:02}.parquet"
            )
        if fault is not None:
            FEED_FAULTS[fault](folder, events / f"night-{night:02}.parquet")


def _empty(folder: Path, tonight: Path) -> None:
    """Every file is there and holds no rows."""
    for path in folder.rglob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 0), path)


def _swap(first: str, second: str) -> Callable[[Path, Path], None]:
    def damage(folder: Path, tonight: Path) -> None:
        table = pq.read_table(tonight)
        other = {first: second, second: first}
        pq.write_table(table.rename_columns([other.get(name, name) for name in table.column_names]), tonight)

    return damage


def _cut_short(folder: Path, tonight: Path) -> None:
    data = tonight.read_bytes()
    tonight.write_bytes(data[: len(data) // 2])


def _go_back(folder: Path, tonight: Path) -> None:
    table = pq.read_table(tonight)
    times = pa.array(table.column(tables.TIMESTAMP).to_numpy() - _BACK_SECONDS)
    pq.write_table(table.set_column(table.column_names.index(tables.TIMESTAMP), tables.TIMESTAMP, times), tonight)


# what is wrong with tonight's delivery
FEED_FAULTS: dict[str, Callable[[Path, Path], None]] = {
    "empty feed": _empty,
    "swapped item and time": _swap(tables.ITEM_ID, tables.TIMESTAMP),
    "swapped user and item": _swap(tables.USER_ID, tables.ITEM_ID),
    "corrupt file": _cut_short,
    "event clock back": _go_back,
}


def _read(folder: Path, name: str) -> pa.Table:
    table = pq.read_table(data_table(folder, name)).replace_schema_metadata(None)
    strings = [pa.field(f.name, pa.string()) if pa.types.is_large_string(f.type) else f for f in table.schema]
    return table.cast(pa.schema(strings))


def cut_points(times: IntArray, first_share: float) -> IntArray:
    """[NIGHTS] last time of each night: equal shares of the events after the first night, cut between two times.

    Calendar days would leave some nights with hardly a user. times: [E], sorted. Raises ConfigError where the times
    are too few for that.
    """
    shares = first_share + (1 - first_share) * np.arange(NIGHTS) / (NIGHTS - 1)
    cuts = times[np.maximum(0, np.round(shares * len(times)).astype(np.int64) - 1)]
    if len(np.unique(cuts)) < NIGHTS:
        raise ConfigError(f"the last {1 - first_share:.0%} of the events have too few times for {NIGHTS} nights")
    return cuts


def open_replay(folder: Path, field: str, first_share: float, users: int | None) -> Replay:
    """Read items.parquet and interactions.parquet of a folder, timestamps in seconds. users: so many at random, and
    the items that they met; None for all. field: the column that is edited. Raises ConfigError."""
    items, events = _read(folder, "items"), _read(folder, "interactions")
    for table, name, column in ((items, "items", field), (events, "interactions", tables.TIMESTAMP)):
        if column not in table.column_names:
            raise ConfigError(
                f"--data {folder}: {name}.parquet has no column {column!r}, it has {table.column_names}"
            )
    if users is not None:
        ids = events.column(tables.USER_ID).unique().sort()
        chosen = np.random.default_rng(0).permutation(len(ids))[:users]
        events = events.filter(pc.is_in(events.column(tables.USER_ID), ids.take(pa.array(chosen))))
        named = events.column(tables.ITEM_ID).unique()
        items = items.filter(pc.is_in(items.column(tables.ITEM_ID), named))
    items, events = items.sort_by(tables.ITEM_ID), events.sort_by(tables.TIMESTAMP)
    times = events.column(tables.TIMESTAMP).to_numpy()
    nights = np.searchsorted(cut_points(times, first_share), times, side="left")
    return Replay(items, events, nights, _arrivals(items, events, nights), field)


def _arrivals(items: pa.Table, events: pa.Table, nights: IntArray) -> IntArray:
    """[N] the night of each item's first event; 0 for one without."""
    places: dict[Any, int] = {item: row for row, item in enumerate(items.column(tables.ITEM_ID).to_pylist())}
    found = np.full(len(places), NIGHTS, dtype=np.int64)
    rows = np.array([places.get(item, -1) for item in events.column(tables.ITEM_ID).to_pylist()], dtype=np.int64)
    np.minimum.at(found, rows[rows >= 0], nights[rows >= 0])
    return np.where(found == NIGHTS, 0, found)
