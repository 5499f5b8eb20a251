"""Histories as flat arrays with offsets; windows and padded batches cut from them.

Shapes: U users, E events of all users, B windows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Made = TypeVar("Made", covariant=True)


@dataclass(frozen=True)
class Batches(Generic[Made]):
    """The batches of one epoch, made one at a time; their number is known before.

    cuts: the rows of each batch, in the order of the epoch; make: rows to batch.
    """

    cuts: list[IntArray]
    make: Callable[[IntArray], Made]

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[Made]:
        return map(self.make, self.cuts)


@dataclass(frozen=True)
class Histories:
    """What each user did, oldest first.

    users: U ids; offsets: [U + 1], the events of user u are items[offsets[u]:offsets[u + 1]];
    items: [E] catalog rows; times: [E] milliseconds since 1970, UTC, or None where they are not known.
    """

    users: list[str]
    offsets: IntArray
    items: IntArray
    times: IntArray | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> IntArray:
        """[U] events per user."""
        return np.diff(self.offsets)

    def of(self, user: int) -> IntArray:
        """Catalog rows of one user's events, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def times_of(self, user: int) -> IntArray:
        """Milliseconds of one user's events; 0 where they are not known."""
        part = slice(self.offsets[user], self.offsets[user + 1])
        return np.zeros_like(self.items[part]) if self.times is None else self.times[part]

    def cut(self, ends: IntArray) -> Histories:
        """The first ``ends[u]`` events of each user u; users stay, even with none left."""
        keep = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths) < np.repeat(ends, self.lengths)
        return self._where(keep)

    def map_items(self, rows: IntArray) -> Histories:
        """Events with each catalog row r replaced by ``rows[r]``; events mapped to -1 are dropped."""
        mapped = Histories(self.users, self.offsets, rows[self.items], self.times)
        return mapped._where(mapped.items >= 0)

    def select(self, users: IntArray) -> Histories:
        """The histories of some users, in the order given."""
        lengths = self.lengths[users]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][users] - offsets[:-1], lengths)
        times = None if self.times is None else self.times[events]
        return Histories([self.users[int(user)] for user in users], offsets, self.items[events], times)

    def _where(self, keep: NDArray[np.bool_]) -> Histories:
        kept = np.concatenate([[0], np.cumsum(keep)])
        times = None if self.times is None else self.times[keep]
        return Histories(self.users, kept[self.offsets].astype(np.int64), self.items[keep], times)


def target_counts(histories: Histories, catalog: int) -> IntArray:
    """[catalog] how often each item is a target in training: in every place but a history's first."""
    first = np.zeros(len(histories.items), dtype=bool)
    first[histories.offsets[:-1][histories.lengths > 0]] = True
    return np.bincount(histories.items[~first], minlength=catalog)


class Batch(NamedTuple):
    """A right-padded batch of windows.

    items: [B, T] catalog rows, 0 where padded; lengths: [B] true positions;
    targets: [B, T] the next item of each position, -1 where there is none;
    times: [B, T] milliseconds, 0 where padded or not known.
    """

    items: IntArray
    lengths: IntArray
    targets: IntArray
    times: IntArray

    @property
    def positions(self) -> int:
        """P, the positions that have a target."""
        return int((self.targets >= 0).sum())

    def share(self, rank: int, world: int) -> Batch:
        """The rows of one of ``world`` processes; where there are none, one row without targets."""
        own = Batch(*(array[rank::world] for array in self))
        if len(own.lengths):
            return own
        return Batch(self.items[:1], self.lengths[:1], np.full_like(self.targets[:1], -1), self.times[:1])


def last_events(histories: Histories, length: int) -> Batch:
    """The last ``length`` events of every user as one batch, for inference; targets are all -1."""
    ends = histories.offsets[1:]
    return _pad(histories, np.maximum(histories.offsets[:-1], ends - length), ends, with_targets=False)


def context_batch(histories: Histories, users: IntArray, before: IntArray, length: int) -> Batch:
    """The newest ``length`` of the first ``before[b]`` events of each user ``users[b]``, possibly none. Targets: the
    next event of each position, also of the last one where the histories go on."""
    begins = histories.offsets[:-1][users]
    ends = begins + before
    batch = _pad(histories, np.maximum(begins, ends - length), ends, with_targets=False)
    steps = np.arange(batch.items.shape[1])
    following = (ends - batch.lengths)[:, None] + steps + 1
    real = (steps < batch.lengths[:, None]) & (following < histories.offsets[1:][users][:, None])
    if real.any():
        batch.targets[real] = histories.items[following[real]]
    return batch


def training_windows(histories: Histories, length: int, rng: np.random.Generator) -> IntArray:
    """Windows of at most ``length`` + 1 events that overlap by one, so that each event is a target once; [W, 2],
    the first event of each and the one after its last.

    The newest window of a user is full, unless a shift drawn per user moves the cuts: an item is then met
    at other positions each epoch.
    """
    windows = []
    for begin, end in zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True):
        first = length if end - begin <= length + 1 else int(rng.integers(length // 2, length + 1))
        while end - begin > 1:
            start = max(begin, end - 1 - first)
            windows.append((start, end))
            end, first = start + 1, length
    return np.array(windows, dtype=np.int64).reshape(-1, 2)


def length_cuts(order: IntArray, lengths: IntArray, size: int, pool: int) -> list[IntArray]:
    """Rows in some order as batches of ``size`` of similar length: so many as ``pool`` are sorted at a time."""
    cuts = []
    for start in range(0, len(order), pool):
        chunk = order[start : start + pool]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        cuts += [chunk[at : at + size] for at in range(0, len(chunk), size)]
    return cuts


def training_batches(histories: Histories, length: int, batch_size: int, rng: np.random.Generator) -> Batches[Batch]:
    """One epoch of shuffled batches of windows of similar length, so that little is padding."""
    windows = training_windows(histories, length, rng)
    order = rng.permutation(len(windows))
    cuts = length_cuts(order, windows[:, 1] - windows[:, 0], batch_size, batch_size * 16)

    def make(rows: IntArray) -> Batch:
        return _pad(histories, windows[rows, 0], windows[rows, 1], with_targets=True)

    return Batches([cuts[number] for number in rng.permutation(len(cuts))], make)


def _pad(histories: Histories, starts: IntArray, ends: IntArray, with_targets: bool) -> Batch:
    """Events starts[b] to ends[b] of each row; with targets, the last one is a target and not an input."""
    lengths = ends - starts - (1 if with_targets else 0)
    width = max(1, int(lengths.max(initial=0)))
    steps = np.arange(width)
    real = steps < lengths[:, None]
    events = np.where(real, starts[:, None] + steps, 0)
    targets = np.full(events.shape, -1, dtype=np.int64)
    if not len(histories.items):
        return Batch(np.zeros_like(events), lengths, targets, np.zeros_like(events))
    if with_targets:
        targets[real] = histories.items[events[real] + 1]
    times = np.zeros_like(events) if histories.times is None else np.where(real, histories.times[events], 0)
    return Batch(np.where(real, histories.items[events], 0), lengths, targets, times)
