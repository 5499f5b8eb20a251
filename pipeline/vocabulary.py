"""Distinct texts as codes, a part at a time: a table of hashes that all texts of a part are looked up in at once."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

_SEEDS = (secrets.randbits(64), secrets.randbits(64))  # which slot a text has depends on them, no result does
MOST = 1 << 18  # texts for all of which there is room in advance
_TAKEN = np.uint64(1)


class Slots(NamedTuple):
    """Where texts were found: codes[slots] are theirs.

    slots: [n] int32; codes: [slots of the table] int32, which stay as they are where a text is. Who maps codes to
    something else maps the table once, and reads it once for each text.
    """

    slots: NDArray[np.int32]
    codes: NDArray[np.int32]


class Vocabulary:
    """Gives each distinct text a code, from 0 on, and keeps the text once.

    Open addressing with double hashing, written for whole arrays. A text is told by 63 bits of one hash in the slots
    that another one says: of n distinct texts two are taken for one with a probability of about n / 2**62. No more
    than two thirds of the slots are taken.
    """

    def __init__(self) -> None:
        self._texts: list[pl.Series] = [pl.Series([], dtype=pl.String)]
        self._count = 0
        self._make(1 << 12)

    def __len__(self) -> int:
        return self._count

    @property
    def texts(self) -> pl.Series:
        """[distinct], by code."""
        return pl.concat(self._texts)

    def encode(self, texts: pl.Series) -> NDArray[np.int32]:
        """A code [n] for each text, none of them null; those seen for the first time get the next ones."""
        parts = (self.look_up(texts[start : start + MOST]) for start in range(0, len(texts), MOST))
        return np.concatenate([np.zeros(0, dtype=np.int32), *(codes.take(slots) for slots, codes in parts)])

    def look_up(self, texts: pl.Series) -> Slots:
        """As ``encode``, but the codes are not read yet; of no more than ``MOST`` texts."""
        self._reserve(len(texts))
        slots, new = self._find(*_hashes(texts))
        if len(new):
            self._texts.append(texts.gather(new))
        return Slots(slots, self._codes)

    def _find(self, hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray]:
        """The slot [n] of each pair of hashes [n]; and the places of those whose codes are new, by code."""
        last = len(self._hashes) - 1
        at = (others & np.uint64(last)).view(np.int64)
        rest = np.flatnonzero(self._hashes.take(at, mode="wrap") != hashes)
        slots, new = at.astype(np.int32), [np.zeros(0, dtype=np.int64)]
        hashes, at = hashes.take(rest), at.take(rest)
        step = (others.take(rest) >> 32 | 1).view(np.int64)  # odd, so that all slots are come by in the end
        while len(rest):
            there = self._hashes.take(at, mode="wrap")
            free = np.flatnonzero(there == 0)
            if len(free):
                won = self._fill(at.take(free), hashes.take(free))
                new.append(rest.take(free.take(won)))
                there[free] = self._hashes.take(at.take(free))  # an equal text may have been the first
            same = there == hashes
            found, left = np.flatnonzero(same), np.flatnonzero(~same)
            slots[rest.take(found)] = at.take(found)
            rest, hashes, step = rest.take(left), hashes.take(left), step.take(left)
            at = (at.take(left) + step) & last
        return slots, np.concatenate(new)

    def _fill(self, at: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Give the next codes to free slots, of which several may be one; the places of those that are there now."""
        codes = np.arange(self._count, self._count + len(at), dtype=np.int32)
        self._codes[at] = codes
        won = np.flatnonzero(self._codes.take(at) == codes)
        at = at.take(won)
        self._hashes[at] = hashes.take(won)
        self._codes[at] = codes[: len(won)]  # without gaps
        self._count += len(won)
        return won

    def _make(self, slots: int) -> None:
        self._hashes, self._codes = np.zeros(slots, dtype=np.uint64), np.zeros(slots, dtype=np.int32)

    def _reserve(self, more: int) -> None:
        wanted, count = (self._count + more) * 3 // 2, self._count
        if wanted <= len(self._hashes):
            return
        self._make(1 << wanted.bit_length())  # who has slots of the table before keeps its codes
        slots, _ = self._find(*_hashes(self.texts))
        self._codes[slots] = np.arange(count, dtype=np.int32)
        self._count = count


def _hashes(texts: pl.Series) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Two [n] of texts; the first is never zero, which is a free slot."""
    first, second = (texts.hash(seed).to_numpy() for seed in _SEEDS)
    return first | _TAKEN, second
