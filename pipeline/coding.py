"""A column of texts as numbers: each text as its place among the distinct ones, sorted when all have come."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.columns import nothing
from pipeline.text_order import places_by_text
from pipeline.vocabulary import MOST, Vocabulary

_WAITING = 8  # parts of texts that wait for their codes at most, each a block of a file


class Named(NamedTuple):
    """names: the distinct texts, the given ones that are among them before the others, each sorted; codes: in these,
    Null where all are missing; known: of the names, those that were given."""

    names: pa.Array
    codes: pl.Series
    known: int


class _Part(NamedTuple):
    """Texts of a column: the code of each is that of its slot; no codes where all are missing.

    missing: which are, None for none.
    """

    slots: NDArray[np.int32]
    codes: NDArray[np.int32]
    missing: NDArray[np.bool_] | None


class Column:
    """Texts of one column on their way to codes, in a thread beside the reader."""

    def __init__(self) -> None:
        self._thread, self._vocabulary = ThreadPoolExecutor(1), Vocabulary()
        self._parts: list[Future[list[_Part]]] = []

    def add(self, texts: pl.Series) -> None:
        for before in self._parts[-_WAITING : 1 - _WAITING]:
            before.result()  # some wait, while the table of ids grows
        self._parts.append(self._thread.submit(_looked_up, self._vocabulary, texts))

    def build(self, given: pl.Series) -> Future[Named]:
        """Of all parts."""
        built = self._thread.submit(lambda: _named(self._vocabulary, self._all(), given))
        self._thread.shutdown(wait=False)
        return built

    def _all(self) -> list[_Part]:
        return [part for done in self._parts for part in done.result()]


def _looked_up(vocabulary: Vocabulary, texts: pl.Series) -> list[_Part]:
    if texts.null_count() == len(texts):
        return [_Part(np.broadcast_to(np.int32(0), len(texts)), np.zeros(0, dtype=np.int32), None)]
    return [_part(vocabulary, part.to_series()) for part in texts.cast(pl.String).to_frame().iter_slices(MOST)]


def _part(vocabulary: Vocabulary, texts: pl.Series) -> _Part:
    if not texts.null_count():
        return _Part(*vocabulary.look_up(texts), None)
    missing, slots = texts.is_null().to_numpy(), np.zeros(len(texts), dtype=np.int32)
    slots[~missing], codes = vocabulary.look_up(texts.drop_nulls())
    return _Part(slots, codes, missing)


def _named(vocabulary: Vocabulary, parts: list[_Part], given: pl.Series) -> Named:
    seen, other = len(vocabulary), np.ones(len(vocabulary), dtype=bool)
    found = vocabulary.encode(given)
    known, first = found[found < seen], given.filter(pl.Series(found < seen))
    other[known] = False
    others, texts = np.flatnonzero(other), vocabulary.texts
    others = others.take(places_by_text(texts.gather(others)))
    rank = np.zeros(len(vocabulary), dtype=np.int32)
    rank[known] = np.arange(len(known), dtype=np.int32)
    rank[others] = np.arange(len(known), seen, dtype=np.int32)
    spelled = pl.concat([first, texts.gather(others)])
    names = spelled.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
    return Named(names, _ranked(rank, parts), len(known))


def _ranked(rank: NDArray[np.int32], parts: list[_Part]) -> pl.Series:
    """The rank of each code of the parts, which are spent, a chunk a part."""
    if not any(len(part.codes) for part in parts):
        return nothing("", sum(len(part.slots) for part in parts))
    found, table, ranks = [], rank[:0], rank
    for slots, codes, missing in parts:
        if not len(codes):
            found.append(pa.nulls(len(slots), pa.int32()))
            continue
        if codes is not table:  # a larger one from here on
            table, ranks = codes, rank.take(codes)
        ranks.take(slots, out=slots, mode="clip")  # into their memory: new memory takes longer than the look-up
        found.append(pa.array(slots, mask=missing))
    return pl.Series(pl.from_arrow(pa.chunked_array(found, pa.int32()), rechunk=False))
