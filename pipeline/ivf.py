"""Search in inverted lists, list by list: every list meets all queries that read it in one matrix product.

FAISS goes query by query and reads a list from memory once for each; with many queries that traffic is the cost.

Legend: Q queries, P probed lists of a query, L lists, D dim, k neighbours, m queries of a list, n vectors of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
# of a list: its vectors float32 [n, D], and the row of each in the index, int64 [n]
Lists = Callable[[int], tuple[FloatArray, IntArray]]
QUERIES = 4096  # at a time; what the first lists hold is kept for so many, about 200 MiB
_FIRST, _WIDTH = 4, 8  # lists read before there is a floor; they should hold so many times k
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
        """[Q] what a vector must reach to come in."""
        return self.scores[:, -1]


def _scan(queries_QD: Tensor, probes: IntArray, lists: Lists, best: _Best) -> _Best:
    """best, after the lists ``probes`` [Q, P] of each query (-1: none)."""
    count, width = probes.shape
    flat = probes.ravel()
    order = np.argsort(flat, kind="stable")  # pairs of query and list, those of a list together
    found, bounds = np.unique(flat[order], return_index=True)
    ends = [*bounds[1:].tolist(), len(flat)]
    hits = torch.zeros(count * width, dtype=torch.int64)  # of each pair
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for number, first, last in zip(found.tolist(), bounds.tolist(), ends, strict=True):
        if number < 0:
            continue
        vectors, rows = lists(number)
        if not len(rows):
            continue
        pairs = torch.from_numpy(order[first:last])
        owners = pairs // width
        scores_mn = queries_QD[owners] @ torch.from_numpy(vectors).T
        query, column = torch.nonzero(scores_mn >= best.floor[owners][:, None], as_tuple=True)
        each = torch.bincount(query, minlength=len(pairs))
        hits[pairs] = each
        place = torch.arange(len(query)) - (each.cumsum(0) - each)[query]  # among the hits of its pair
        parts.append((pairs[query], place, scores_mn[query, column], torch.from_numpy(rows)[column]))
    if not parts:
        return best
    pair, place, scores, rows_found = (torch.cat(part) for part in zip(*parts, strict=True))
    by_query = hits.view(count, width)
    starts = (by_query.cumsum(1) - by_query).flatten()
    at = pair // width, starts[pair] + place
    wide_scores = torch.full((count, int(by_query.sum(1).max())), -torch.inf)
    wide_rows = torch.full(wide_scores.shape, -1)
    wide_scores[at], wide_rows[at] = scores, rows_found
    together = torch.cat([best.scores, wide_scores], dim=1)
    values, columns = together.topk(best.scores.shape[1], dim=1)
    return _Best(values, torch.cat([best.rows, wide_rows], dim=1).gather(1, columns))


def search_lists(queries: FloatArray, probes: IntArray, k: int, lists: Lists) -> tuple[FloatArray, IntArray]:
    """The k largest inner products of queries [Q, D] with the vectors in their lists.

    probes [Q, P]: the lists of each query, nearest first, -1 for none. Scores float32 and rows int64 [Q, k], best
    first, equal ones in any order; -inf and -1 where the lists hold fewer. The first lists give each query a floor;
    of the others only what reaches it is kept.
    """
    scores = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    sizes = {number: len(lists(number)[1]) for number in np.unique(probes[:, :_FIRST]).tolist() if number >= 0}
    mean = sum(sizes.values()) / max(1, len(sizes))
    first = max(_FIRST, round(_WIDTH * k / max(1.0, mean)))
    for start in range(0, len(queries), QUERIES):
        part = probes[start : start + QUERIES]
        queries_QD = torch.from_numpy(np.ascontiguousarray(queries[start : start + QUERIES], dtype=np.float32))
        shape = len(part), k
        best = _Best(torch.full(shape, -torch.inf), torch.full(shape, -1))
        for lap in (part[:, :first], part[:, first:]):
            if lap.shape[1]:
                best = _scan(queries_QD, np.ascontiguousarray(lap), lists, best)
        scores[start : start + QUERIES], rows[start : start + QUERIES] = best.scores.numpy(), best.rows.numpy()
    return scores, rows
