"""Texts in the order of their UTF-8 bytes, by the numbers that their first bytes make."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import polars as pl
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeline.digests import bytes_of

_WIDTH = 8  # bytes that are one number


def places_by_text(texts: pl.Series) -> NDArray[np.int64]:
    """Places [n] of texts, none of them null, in order; those of equal ones in any.

    The bytes behind what all have in common are sorted as numbers; only texts with the same number are compared. For
    ids in no order this takes a fifth of polars' processor time or less.
    """
    if not len(texts):
        return np.zeros(0, dtype=np.int64)
    numbers = _numbers(texts)
    places = pl.Series(numbers).arg_sort().to_numpy().astype(np.int64)
    numbers = numbers.take(places)
    again = numbers[1:] == numbers[:-1]
    tied = np.flatnonzero(np.append(again, False) | np.append(False, again))
    if len(tied):
        among = places.take(tied)
        places[tied] = among.take(texts.gather(among).arg_sort().to_numpy())
    return places


def _numbers(texts: pl.Series) -> NDArray[np.uint64]:
    """The first bytes [n] behind those that all texts begin with, big-endian, filled up with zeros."""
    least, most = str(texts.min()).encode(), str(texts.max()).encode()
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False)))
    offsets, found = bytes_of(texts.to_arrow(compat_level=pl.CompatLevel.oldest()))
    windows = sliding_window_view(np.append(found, np.zeros(_WIDTH, dtype=np.uint8)), _WIDTH)
    starts = offsets[:-1] + common
    numbers = windows[starts].view(">u8").ravel().astype(np.uint64)
    others = 8 * np.maximum(_WIDTH - (offsets[1:] - starts), 0).astype(np.uint64)  # bits of the next texts
    return numbers >> others << others
