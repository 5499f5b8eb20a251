"""How far an approximate index searches: the least that finds the asked share of the exact neighbours.

Legend: Q queries, N vectors, D dim, k neighbours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ann import IndexConfig, Kind, Searcher, exact_top_k

K = 100  # neighbours that are compared
_FIRST = {"ivf-flat": 1, "ivf-pq": 1, "hnsw": K}  # nprobe or efSearch that is tried first
_GAIN = 0.003  # a doubling that brings less is the last: what PQ's codes lose, no further list brings back
_HALVINGS = 4  # between the last that is too little and the first that is enough: to 2^(1/16), 4 %
_SURE = 3.0  # standard errors by which the measured share must exceed what is asked: some ten levels are tried


def chooses(config: IndexConfig, kind: Kind) -> bool:
    """Whether an index of this kind has an nprobe or efSearch to choose, and none is configured."""
    return (config.ef_search if kind == "hnsw" else config.nprobe) is None and kind != "flat"


def shares(found: NDArray[np.int64], exact: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each exact list [Q, k] that the found list [Q, k] holds; lists that are empty are left out."""
    return np.array(
        [
            len(np.intersect1d(a[a >= 0], b[b >= 0])) / (b >= 0).sum()
            for a, b in zip(found, exact, strict=True)
            if (b >= 0).any()
        ]
    )


def intersection(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Mean of ``shares``; 1 where no exact list holds anything."""
    each = shares(found, exact)
    return float(each.mean()) if len(each) else 1.0


def choose_effort(
    index: Any, config: IndexConfig, kind: Kind, vectors: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    """Set the index's nprobe or efSearch to the least for which queries [Q, D] find ``config.recall`` of the exact
    100 among vectors [N, D], surely (three standard errors), to 4 %.

    Where more stops to help before, to what it stopped at.
    """
    searcher = Searcher(index, config, kind)
    k = min(K, len(vectors))
    _, exact = exact_top_k(queries, vectors, k)

    def reached(level: int) -> tuple[bool, float]:
        searcher.level = level
        each = shares(searcher.search(queries, k)[1], exact)
        return each.mean() - _SURE * each.std() / math.sqrt(len(each)) >= config.recall, float(each.mean())

    low, high = 0, min(_FIRST[kind], searcher.highest)
    enough, found = reached(high)
    while not enough and high < searcher.highest:
        more = min(2 * high, searcher.highest)
        enough, better = reached(more)
        if not enough and better - found < _GAIN:
            break
        low, high, found = high, more, better
    for _ in range(_HALVINGS if enough and low else 0):
        middle = round(math.sqrt(low * high))
        if middle in (low, high):
            break
        low, high = (low, middle) if reached(middle)[0] else (middle, high)
    searcher.level = high
