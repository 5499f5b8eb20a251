"""Histories as flat arrays with offsets; windows and padded batches cut from them.

Shapes: U users, E events of all users, B windows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Histories:
    """What each user did, oldest first.

    users: U ids; offsets: [U + 1], the events of user u are items[offsets[u]:offsets[u + 1]];
    items: [E] catalog rows.
    """

    users: list[str]
    offsets: IntArray
    items: IntArray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> IntArray:
        """[U] events per user."""
        return np.diff(self.offsets)

    def of(self, user: int) -> IntArray:
        """Catalog rows of one user's events, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def cut(self, ends: IntArray) -> Histories:
        """The first ``ends[u]`` events of each user u; users stay, even with none left."""
        keep = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths) < np.repeat(ends, self.lengths)
        return self._where(keep)

    def map_items(self, rows: IntArray) -> Histories:
        """Events with each catalog row r replaced by ``rows[r]``; events mapped to -1 are dropped."""
        mapped = Histories(self.users, self.offsets, rows[self.items])
        return mapped._where(mapped.items >= 0)

    def select(self, users: IntArray) -> Histories:
        """The histories of some users, in the order given."""
        items = [self.of(int(user)) for user in users]
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in items])]).astype(np.int64)
        flat = np.concatenate(items) if items else np.zeros(0, dtype=np.int64)
        return Histories([self.users[int(user)] for user in users], offsets, flat)

    def _where(self, keep: NDArray[np.bool_]) -> Histories:
        kept = np.concatenate([[0], np.cumsum(keep)])
        return Histories(self.users, kept[self.offsets].astype(np.int64), self.items[keep])


class Batch(NamedTuple):
    """A right-padded batch of windows.

    items: [B, T] catalog rows, 0 where padded; lengths: [B] true positions;
    targets: [B, T] the next item of each position, -1 where there is none.
    """

    items: IntArray
    lengths: IntArray
    targets: IntArray


def last_events(histories: Histories, length: int) -> Batch:
    """The last ``length`` events of every user as one batch, for inference; targets are all -1."""
    return _pad([histories.of(user)[-length:] for user in range(len(histories))], with_targets=False)


def training_windows(histories: Histories, length: int, rng: np.random.Generator) -> list[IntArray]:
    """Windows of at most ``length`` + 1 events that overlap by one, so that each event is a target once.

    The newest window of a user is full, unless a shift drawn per user moves the cuts: an item is then met
    at other positions each epoch.
    """
    windows = []
    for user in range(len(histories)):
        events = histories.of(user)
        end = len(events)
        first = length if end <= length + 1 else int(rng.integers(length // 2, length + 1))
        while end > 1:
            start = max(0, end - 1 - first)
            windows.append(events[start:end])
            end, first = start + 1, length
    return windows


def training_batches(histories: Histories, length: int, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch of shuffled batches of windows of similar length, so that little is padding."""
    windows = training_windows(histories, length, rng)
    order = rng.permutation(len(windows))
    pool = batch_size * 16
    cuts = []
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda number: len(windows[number]))
        cuts += [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
    for number in rng.permutation(len(cuts)):
        yield _pad([windows[window] for window in cuts[number]], with_targets=True)


def _pad(windows: list[IntArray], with_targets: bool) -> Batch:
    inputs = [window[:-1] if with_targets else window for window in windows]
    lengths = np.array([len(window) for window in inputs], dtype=np.int64)
    width = max(1, int(lengths.max(initial=0)))
    items = np.zeros((len(windows), width), dtype=np.int64)
    targets = np.full((len(windows), width), -1, dtype=np.int64)
    for row, (window, given) in enumerate(zip(windows, inputs, strict=True)):
        items[row, : len(given)] = given
        if with_targets:
            targets[row, : len(given)] = window[1:]
    return Batch(items, lengths, targets)
