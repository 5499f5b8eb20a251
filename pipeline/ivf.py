"""Search in inverted lists, list by list: every list meets all queries that read it in one matrix product.

FAISS goes query by query and reads a list from memory once for each; with many queries that traffic is the cost.

Legend: Q queries, P probed lists of a query, L lists, D dim, k neighbours, m queries of a list, n vectors of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
# of a list: its vectors float32 [n, D], and the row of each in the index, int64 [n]
Lists = Callable[[int], tuple[FloatArray, IntArray]]
QUERIES = 16_384  # at a time, at most
_FIRST, _WIDTH = 4, 8  # lists read before there is a floor; they should hold so many times k
_GROWTH = 24  # each further lap reads so many times as many; more laps would keep fewer hits, and cost more products
_HITS = 1 << 23  # kept of the first lists, about 300 MiB
_CELLS = 1 << 25  # scores that are put side by side to find the best, 400 MiB with their rows
_SHARED = 4  # queries a list from which one product is faster than reading the list for each


def worthwhile(queries: int, nprobe: int, nlist: int) -> bool:
    """Whether enough queries meet in each list."""
    return queries * nprobe >= _SHARED * nlist


class _Best(NamedTuple):
    """scores float32 and rows int64 [Q, k], best first; -inf and -1 where fewer are known."""

    scores: Tensor
    rows: Tensor

    @property
    def floor(self) -> Tensor:
        """[Q] what a vector must exceed to come in."""
        return self.scores[:, -1]


class _Hits(NamedTuple):
    """What of one list exceeds the floors. pairs: [m], counts: [m] hits of each; then of every hit: its pair, its
    place among the hits of that pair, score, and row in the index."""

    pairs: Tensor
    counts: Tensor
    pair: Tensor
    place: Tensor
    scores: Tensor
    rows: Tensor


def _meet(
    queries_QD: Tensor, floor_Q: Tensor, owners: Tensor, pairs: Tensor, found: tuple[FloatArray, IntArray]
) -> _Hits:
    """One list, its vectors and rows ``found``, and the m queries ``owners`` that read it."""
    scores_mn = queries_QD[owners] @ torch.from_numpy(found[0]).T
    query, column = torch.nonzero(scores_mn > floor_Q[owners][:, None], as_tuple=True)
    counts = torch.bincount(query, minlength=len(pairs))
    place = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    return _Hits(pairs, counts, pairs[query], place, scores_mn[query, column], torch.from_numpy(found[1])[column])


def _scan(queries_QD: Tensor, probes: IntArray, lists: Lists, best: _Best, pool: Executor, jobs: int) -> _Best:
    """best, after the lists ``probes`` [Q, P] of each query (-1: none)."""
    count, width = probes.shape
    flat = probes.ravel()
    order = np.argsort(flat, kind="stable")  # pairs of query and list, those of a list together
    numbers, bounds = np.unique(flat[order], return_index=True)
    spans = list(zip(numbers.tolist(), bounds.tolist(), [*bounds[1:].tolist(), len(flat)], strict=True))

    def work(first: int) -> list[_Hits]:
        met = []
        for number, start, stop in spans[first::jobs]:
            found = lists(number) if number >= 0 else None
            if found is not None and len(found[1]):
                pairs = torch.from_numpy(order[start:stop])
                met.append(_meet(queries_QD, best.floor, pairs // width, pairs, found))
        return met

    parts = [hits for part in pool.map(work, range(jobs)) for hits in part]
    if not parts:
        return best
    each_pair, each_count, pair, place, scores, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    by_query = torch.zeros(count * width, dtype=torch.int64).index_copy(0, each_pair, each_count).view(count, width)
    starts = (by_query.cumsum(1) - by_query).flatten()
    owner, column = pair // width, starts[pair] + place
    widest = int(by_query.sum(1).max())
    step = max(1, min(_CELLS // max(1, jobs * widest), -(-count // jobs)))

    def merge(start: int) -> _Best:
        own = (owner >= start) & (owner < start + step) if step < count else slice(None)
        part = _Best(best.scores[start : start + step], best.rows[start : start + step])
        return _merge(part, owner[own] - start, column[own], scores[own], rows[own], widest)

    merged = list(pool.map(merge, range(0, count, step)))
    return _Best(*(torch.cat(part) for part in zip(*merged, strict=True)))


def _merge(best: _Best, owner: Tensor, column: Tensor, scores: Tensor, rows: Tensor, widest: int) -> _Best:
    """best, and hits of these queries, each at its own column below ``widest``."""
    wide_scores = torch.full((len(best.scores), widest), -torch.inf)
    wide_rows = torch.full(wide_scores.shape, -1)
    wide_scores[owner, column], wide_rows[owner, column] = scores, rows
    together = torch.cat([best.scores, wide_scores], dim=1)
    values, columns = together.topk(best.scores.shape[1], dim=1)
    return _Best(values, torch.cat([best.rows, wide_rows], dim=1).gather(1, columns))


def _laps(first: int, width: int) -> list[slice]:
    """Columns of the probes, a few first and then ever more."""
    ends = [min(first, width)]
    while ends[-1] < width:
        ends.append(min(width, ends[-1] * (1 + _GROWTH)))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@contextmanager
def _workers() -> Iterator[tuple[Executor, int]]:
    """As many threads as torch has, each of which computes alone: a product of one list is too small to be shared."""
    jobs = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield pool, jobs
    finally:
        torch.set_num_threads(jobs)


def search_lists(queries: FloatArray, probes: IntArray, k: int, lists: Lists) -> tuple[FloatArray, IntArray]:
    """The k largest inner products of queries [Q, D] with the vectors in their lists.

    probes [Q, P]: the lists of each query, nearest first, -1 for none. Scores float32 and rows int64 [Q, k], best
    first, equal ones in any order; -inf and -1 where the lists hold fewer. The first lists give each query a floor;
    of the others only what exceeds it is kept.
    """
    scores = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    sizes = {number: len(lists(number)[1]) for number in np.unique(probes[:, :_FIRST]).tolist() if number >= 0}
    mean = sum(sizes.values()) / max(1, len(sizes))
    first = max(_FIRST, round(_WIDTH * k / max(1.0, mean)))
    step = min(QUERIES, max(1, round(_HITS / max(1.0, first * mean))))
    with _workers() as (pool, jobs):
        for start in range(0, len(queries), step):
            part = probes[start : start + step]
            queries_QD = torch.from_numpy(np.ascontiguousarray(queries[start : start + step], dtype=np.float32))
            shape = len(part), k
            best = _Best(torch.full(shape, -torch.inf), torch.full(shape, -1))
            for lap in _laps(first, part.shape[1]):
                best = _scan(queries_QD, np.ascontiguousarray(part[:, lap]), lists, best, pool, jobs)
            scores[start : start + step], rows[start : start + step] = best.scores.numpy(), best.rows.numpy()
    return scores, rows
