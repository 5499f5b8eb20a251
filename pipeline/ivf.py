"""Search in inverted lists, list by list: every list meets all queries that read it in one matrix product.

FAISS goes query by query and reads a list from memory once for each; with many queries that traffic is the cost. Two
laps: the first lists of a query give it k neighbours, and so a floor; of the others only what exceeds it is kept.

Legend: Q queries, P probed lists of a query, L lists, D dim, k neighbours, m queries of a list, n vectors of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from item_tower.decoders.threads import single_threads
from pipeline.hits import Best, Hits, merge

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
# of a list: its vectors float32 [n, D], and the row of each in the index, int64 [n]
Lists = Callable[[int], tuple[FloatArray, IntArray]]
QUERIES = 16_384  # at a time, at most
_FIRST, _WIDTH = 4, 16  # lists of the first lap, at least; they should hold so many times k
_GROWTH = 40  # a further lap reads so many times as many; more laps would keep fewer hits, and cost more products
_CELLS = 1 << 26  # scores that are put side by side to find the best, 256 MiB
_BLOCK = 256  # queries whose best of the first lap are found at once
_SHARED = 4  # queries a list from which one product is faster than reading the list for each


def worthwhile(queries: int, nprobe: int, nlist: int) -> bool:
    """Whether enough queries meet in each list."""
    return queries * nprobe >= _SHARED * nlist


class _Read(NamedTuple):
    """The lists of a search, numbered anew from 0. vectors: [n, D] of each; sizes and starts: int64 [L], n, and where
    the list begins in ``rows``, the rows in the index of all of them, one list after the other."""

    vectors: list[Tensor]
    sizes: Tensor
    starts: Tensor
    rows: Tensor


class _Workers(NamedTuple):
    """Threads, each of which computes alone."""

    pool: Executor
    jobs: int

    def visit(self, probes_QP: Tensor, read: _Read, work: Callable[[int, Tensor], None]) -> None:
        """work(list, pairs int64 [m]) for each list with vectors; a pair is query * P + its column."""
        flat, count = probes_QP.numpy().ravel(), len(read.vectors)
        order = np.argsort(flat.astype(np.min_scalar_type(count)), kind="stable")
        ends = np.bincount(flat, minlength=count).cumsum()
        bounds = [(number, start, end) for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]

        def some(first: int) -> None:
            for number, start, end in bounds[first :: self.jobs]:
                if start < end and len(read.vectors[number]):
                    work(number, torch.from_numpy(order[start:end]))

        list(self.pool.map(some, range(self.jobs)))


def _open(probes: IntArray, lists: Lists) -> tuple[Tensor, _Read]:
    """The probes [Q, P] in new numbers, and what they read. -1 stands for a list without vectors."""
    seen = np.zeros(int(probes.max(initial=-1)) + 2, dtype=bool)
    seen[probes + 1] = True
    none = np.empty((0, 0), dtype=np.float32), np.empty(0, dtype=np.int64)
    parts = [lists(number) if number >= 0 else none for number in (np.flatnonzero(seen) - 1).tolist()]
    sizes = torch.tensor([len(rows) for _, rows in parts])
    rows = torch.from_numpy(np.concatenate([rows for _, rows in parts]))
    renumbered = torch.from_numpy((np.cumsum(seen) - 1)[probes + 1])
    return renumbered, _Read([torch.from_numpy(part) for part, _ in parts], sizes, sizes.cumsum(0) - sizes, rows)


def _first_lap(queries_QD: Tensor, probes_QP: Tensor, read: _Read, k: int, workers: _Workers) -> Best:
    """The k best of these lists, by place in ``read.rows``; their scores stand side by side, a row for each query."""
    sizes = read.sizes[probes_QP]
    ends = sizes.cumsum(1)
    begins = ends - sizes
    width = max(k, int(ends[:, -1].max()))
    scores = torch.full((len(queries_QD), width), -torch.inf)
    cells = (begins + width * torch.arange(len(begins))[:, None]).flatten()

    def meet(number: int, pairs: Tensor) -> None:
        vectors_nD = read.vectors[number]
        columns = cells[pairs][:, None] + torch.arange(len(vectors_nD))
        scores.view(-1)[columns] = queries_QD.index_select(0, pairs // probes_QP.shape[1]) @ vectors_nD.T

    workers.visit(probes_QP, read, meet)

    def top(start: int) -> Best:
        block = slice(start, start + _BLOCK)
        values, columns = scores[block].topk(k, dim=1)
        which = (columns[:, :, None] >= ends[block, None, :]).sum(2).clamp(max=ends.shape[1] - 1)
        places = read.starts[probes_QP[block].gather(1, which)] + columns - begins[block].gather(1, which)
        return Best(values, places.masked_fill(values == -torch.inf, -1))

    parts = list(workers.pool.map(top, range(0, len(scores), _BLOCK)))
    return Best(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _further_lap(queries_QD: Tensor, probes_QP: Tensor, read: _Read, best: Best, workers: _Workers) -> None:
    """Take what these lists hold into ``best``, in place."""
    met: list[Hits] = []
    floor = best.floor.contiguous()

    def meet(number: int, pairs: Tensor) -> None:
        vectors_nD, owners = read.vectors[number], pairs // probes_QP.shape[1]
        scores_mn = queries_QD.index_select(0, owners) @ vectors_nD.T
        over = torch.from_numpy(np.flatnonzero((scores_mn > floor[owners][:, None]).numpy()))
        if len(over):
            places = over % len(vectors_nD) + read.starts[number]
            met.append(Hits(owners[over // len(vectors_nD)], scores_mn.view(-1)[over], places))

    workers.visit(probes_QP, read, meet)
    if met:
        merge(best, met, workers.pool.map)


def _laps(first: int, width: int) -> list[slice]:
    """Columns of the probes, a few first and then ever more."""
    ends = [min(first, width)]
    while ends[-1] < width:
        ends.append(min(width, ends[-1] * (1 + _GROWTH)))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def search_lists(queries: FloatArray, probes: IntArray, k: int, lists: Lists) -> tuple[FloatArray, IntArray]:
    """The k largest inner products of queries [Q, D] with the vectors in their lists.

    probes [Q, P]: the lists of each query, nearest first, -1 for none. Scores float32 and rows int64 [Q, k], best
    first, equal ones in any order; -inf and -1 where the lists hold fewer.
    """
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    probes_QP, read = _open(probes, lists)
    if not len(read.rows):
        return scores, rows
    mean = float(read.sizes[probes_QP[:, :_FIRST]].float().mean())
    first = max(_FIRST, round(_WIDTH * k / max(1.0, mean)))
    widest = int(read.sizes[probes_QP[:, :first]].sum(1).max())
    step = min(QUERIES, max(1, _CELLS // max(k, widest)))
    with single_threads() as threads:  # a product of one list is too small to be shared
        workers = _Workers(*threads)
        for start in range(0, len(queries), step):
            part = probes_QP[start : start + step]
            queries_QD = torch.from_numpy(np.ascontiguousarray(queries[start : start + step], dtype=np.float32))
            nearest, *others = _laps(first, part.shape[1])
            best = _first_lap(queries_QD, part[:, nearest].contiguous(), read, k, workers)
            for lap in others:
                _further_lap(queries_QD, part[:, lap].contiguous(), read, best, workers)
            known = best.places >= 0
            scores[start : start + step] = best.scores.numpy()
            rows[start : start + step] = torch.where(known, read.rows[best.places.clamp(min=0)], -1).numpy()
    return scores, rows
