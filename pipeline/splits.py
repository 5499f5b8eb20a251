"""Who is tested on what: the evaluation protocols (DESIGN 9, docs/evaluation.md).

Shapes: U users asked, P targets of all of them, N catalog items, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.errors import ConfigError, DataError
from user_tower.sequences import Histories, IntArray

Split = Literal["valid", "test"]
Protocol = Literal["leave-last-out", "temporal", "sampled"]
PROTOCOL: Protocol = "leave-last-out"
LEAST_EVENTS = 3  # of a user whom leave-last-out asks
_SHARES = (0.8, 0.9)  # of the events lie before validation, before test, when no times are given


class SplitConfig(BaseModel):
    """Which protocol, and its parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol = PROTOCOL
    """``leave-last-out`` (the paper's), ``temporal`` (one time for all users), or ``sampled`` (leave-last-out's
    questions among a few random negatives; not comparable with the others)."""
    negatives: int = Field(default=20, gt=0)
    """For ``sampled``: random items that each target stands against."""
    negatives_seed: int = Field(default=0, ge=0)
    valid_from: datetime | None = None
    """For ``temporal``: validation asks about events from here on; without a zone in UTC. By default the time that
    80 % of the events precede."""
    test_from: datetime | None = None
    """For ``temporal``: test asks about events from here on. By default the time that 90 % of the events precede."""
    repeats: bool = False
    """Whether an item of the history may be recommended; without it a repeated target is a miss."""
    released: str | None = None
    """Column of the items with the time from which each could be recommended; a target then stands only against
    items released by its own time. Without it every item of the catalog is a candidate."""

    @model_validator(mode="after")
    def _times_are_ordered(self) -> SplitConfig:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from and test_from are given together or not at all")
        if self.valid_from and self.test_from and _milliseconds(self.valid_from) >= _milliseconds(self.test_from):
            raise ValueError(f"valid_from {self.valid_from} must lie before test_from {self.test_from}")
        return self


@dataclass(frozen=True)
class Queries:
    """What is asked of a recommender.

    histories: U; targets: [P] catalog rows, -1 for one that the catalog lacks; offsets: [U + 1], the targets of user
    u are targets[offsets[u]:offsets[u + 1]], distinct, or None where each user has one; times: [P] milliseconds of
    the targets, or None where they are not known; negatives: [U, n] rows that the one target of each user stands
    against (-1: none), or None where the whole catalog does; numbers: [P] which of its user's events each target is,
    from 0, or None where they are none.
    """

    histories: Histories
    targets: IntArray
    offsets: IntArray | None = None
    times: IntArray | None = None
    negatives: IntArray | None = None
    numbers: IntArray | None = None

    @property
    def bounds(self) -> IntArray:
        """[U + 1] ``offsets``, also where each user has one target."""
        return np.arange(len(self.targets) + 1) if self.offsets is None else self.offsets

    @property
    def owners(self) -> IntArray:
        """[P] the user of each target."""
        return np.repeat(np.arange(len(self.histories)), np.diff(self.bounds))

    def map_items(self, rows: IntArray) -> Queries:
        """The same questions in another catalog's rows; what is not in it becomes -1."""
        negatives = None if self.negatives is None else _mapped(self.negatives, rows)
        histories, targets = self.histories.map_items(rows), _mapped(self.targets, rows)
        return replace(self, histories=histories, targets=targets, negatives=negatives)

    def select(self, users: IntArray) -> Queries:
        """The questions of some users, in the order given."""
        places = self.places(users)
        offsets = None
        if self.offsets is not None:
            offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[users])]).astype(np.int64)
        return Queries(
            self.histories.select(users),
            self.targets[places],
            offsets,
            None if self.times is None else self.times[places],
            None if self.negatives is None else self.negatives[users],
            None if self.numbers is None else self.numbers[places],
        )

    def without(self, gone: NDArray[np.bool_]) -> Queries:
        """The questions without some targets [P]; a user with none left is not asked."""
        kept = np.bincount(self.owners[~gone], minlength=len(self.histories))
        offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        rest = replace(
            self,
            targets=self.targets[~gone],
            offsets=offsets,
            times=None if self.times is None else self.times[~gone],
            numbers=None if self.numbers is None else self.numbers[~gone],
        )
        rest = rest.select(np.flatnonzero(kept))
        return replace(rest, offsets=None) if self.offsets is None else rest

    def places(self, users: IntArray) -> IntArray:
        """Where the targets of ``select(users)`` stand among these."""
        counts = np.diff(self.bounds)[users]
        ends = np.cumsum(counts)
        return np.arange(counts.sum()) + np.repeat(self.bounds[:-1][users] - (ends - counts), counts)


def _mapped(found: IntArray, rows: IntArray) -> IntArray:
    return np.where(found < 0, -1, rows[found])


def _milliseconds(time: datetime) -> int:
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1000)


def _spelled(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _times(histories: Histories) -> IntArray:
    if histories.times is None or not len(histories.times):
        raise DataError("the temporal protocol needs the times of the events; this data has none")
    return histories.times


def boundaries(histories: Histories, config: SplitConfig) -> tuple[int, int]:
    """First millisecond of validation and of test under ``temporal``. histories: all events.

    Raises DataError when there are no times, ConfigError when no event lies between the two.
    """
    times = _times(histories)
    if config.valid_from is not None and config.test_from is not None:
        first, second = _milliseconds(config.valid_from), _milliseconds(config.test_from)
    else:
        ordered = np.partition(times, [int(share * (len(times) - 1)) for share in _SHARES])
        first, second = (int(ordered[int(share * (len(times) - 1))]) for share in _SHARES)
    if not ((times < first).any() and ((times >= first) & (times < second)).any() and (times >= second).any()):
        span = f"{_spelled(int(times.min()))} to {_spelled(int(times.max()))}"
        raise ConfigError(
            f"temporal: validation from {_spelled(first)} and test from {_spelled(second)} leave no event for "
            f"training, validation or test; the events run from {span}: set evaluate.valid_from, evaluate.test_from"
        )
    return first, second


def training_label(histories: Histories, config: SplitConfig) -> str:
    """Names the training part: two protocols of the same label train on the same events."""
    if config.protocol != "temporal":
        return PROTOCOL
    return f"temporal, before {_spelled(boundaries(histories, config)[0])}"


def protocol_label(histories: Histories, config: SplitConfig) -> str:
    """The protocol as it stands beside every figure; figures of different labels are never ranked together."""
    label: str = config.protocol
    if config.protocol == "temporal":
        first, second = boundaries(histories, config)
        label += f", validation from {_spelled(first)}, test from {_spelled(second)}"
    if config.protocol == "sampled":
        label += f" 1+{config.negatives} (seed {config.negatives_seed}), not comparable with the full catalog"
    if config.released is not None:
        label += f", candidates by {config.released}"
    return label + (", repeats allowed" if config.repeats else "")


def training_part(histories: Histories, config: SplitConfig) -> Histories:
    """The events that may be trained on, by any recommender and any tower; users stay, even with none left.

    ``leave-last-out``, ``sampled``: all but the last two of each user with three or more; a user with fewer has no
    target and stays whole. ``temporal``: what happened before validation begins.
    """
    if config.protocol == "temporal":
        return histories.cut(_before(histories, boundaries(histories, config)[0]))
    enough = histories.lengths >= LEAST_EVENTS
    return histories.cut(np.where(enough, histories.lengths - 2, histories.lengths))


def _before(histories: Histories, time: int) -> IntArray:
    """[users] events of each user before a time; events are in order of time."""
    earlier = np.concatenate([[0], np.cumsum(_times(histories) < time)])
    return np.diff(earlier[histories.offsets])


def queries(histories: Histories, split: Split, config: SplitConfig, distinct: bool = True) -> Queries:
    """The questions of a protocol, over the whole catalog (``with_negatives`` makes them sampled ones).

    distinct: under ``temporal``, a user's targets are the distinct items of the window; else all its events. Raises
    DataError when nobody can be asked.
    """
    if config.protocol == "temporal":
        return _temporal(histories, split, config, distinct)
    users = np.flatnonzero(histories.lengths >= LEAST_EVENTS)
    if len(users) == 0:
        raise DataError(
            f"{config.protocol} needs users with three events or more; none of {len(histories)} users has them"
        )
    chosen = histories.select(users)
    ends = chosen.lengths - (2 if split == "valid" else 1)
    places = chosen.offsets[:-1] + ends
    times = None if chosen.times is None else chosen.times[places]
    return Queries(chosen.cut(ends), chosen.items[places], times=times, numbers=ends)


def _temporal(histories: Histories, split: Split, config: SplitConfig, distinct: bool) -> Queries:
    """Histories up to the window, targets the events in it, or its distinct items, in their order."""
    first, second = boundaries(histories, config)
    times = _times(histories)
    start = first if split == "valid" else second
    inside = (times >= start) & ((times < second) if split == "valid" else True)
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    places = np.flatnonzero(inside)
    if distinct:
        pairs = np.stack([owners[places], histories.items[places]], axis=1)
        _, kept = np.unique(pairs, axis=0, return_index=True)
        places = places[np.sort(kept)]
    users, counts = np.unique(owners[places], return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    asked = histories.cut(_before(histories, start)).select(users)
    numbers = places - histories.offsets[:-1][owners[places]]
    return Queries(asked, histories.items[places], offsets, times[places], numbers=numbers)


def with_negatives(questions: Queries, available: NDArray[np.bool_], config: SplitConfig) -> Queries:
    """The questions with n distinct random negatives each: available, not in the history, not the target.

    available: [N] of the catalog in whose rows the questions are, so that every recommender meets the same ones.
    A user with fewer than n such items gets all of them, and -1 for the rest. Items of the history are left in when
    repeats are allowed.
    """
    rng = np.random.default_rng(config.negatives_seed)
    pool, size = np.flatnonzero(available), len(available)
    histories, users = questions.histories, len(questions.histories)
    owners = np.repeat(np.arange(users), histories.lengths)
    taken = np.zeros(0, np.int64) if config.repeats else owners * size + histories.items
    taken = np.unique(np.concatenate([taken, np.arange(users) * size + questions.targets]))
    free = len(pool) - np.bincount(taken[available[taken % size]] // size, minlength=users)
    drawn = np.full((users, config.negatives), -1, dtype=np.int64)
    few = free < 2 * config.negatives  # for these a draw without replacement costs less than many tries
    for user in np.flatnonzero(few).tolist():
        low, high = np.searchsorted(taken, [user * size, (user + 1) * size])
        rest = rng.permutation(np.setdiff1d(pool, taken[low:high] - user * size))[: config.negatives]
        drawn[user, : len(rest)] = rest
    open_cells = np.repeat(~few[:, None], config.negatives, axis=1)
    while open_cells.any():
        drawn[open_cells] = pool[rng.integers(0, len(pool), int(open_cells.sum()))]
        rows = np.flatnonzero(open_cells.any(axis=1))
        keys = rows[:, None] * size + drawn[rows]
        order = np.argsort(keys, axis=1, kind="stable")
        ordered = np.take_along_axis(keys, order, axis=1)
        again = np.zeros_like(keys, dtype=bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        found = np.minimum(np.searchsorted(taken, keys), len(taken) - 1)
        open_cells[rows] = again | (taken[found] == keys)
    return replace(questions, negatives=drawn)
