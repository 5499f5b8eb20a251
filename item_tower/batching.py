"""Length-sorted batches under a token budget, so that padding costs little and memory is bounded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def token_budget_batches(
    lengths: NDArray[np.int64], token_budget: int, max_items: int = 4096
) -> list[NDArray[np.int64]]:
    """Split rows into batches whose padded size (rows x longest) stays within ``token_budget`` tokens.

    lengths: [N] tokens per row. Returns arrays of row numbers, longest rows first, so that a batch too large
    for the memory fails at the start; a row longer than the budget is a batch of its own. A batch that is a
    quarter full ends where the length changes: rows of one length need neither padding nor mask.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = -lengths[order]
    batches, start = [], 0
    while start < len(order):
        longest = max(1, -int(descending[start]))
        size = max(1, min(token_budget // longest, max_items))
        end = min(start + size, len(order))
        change = int(np.searchsorted(descending, descending[start], side="right"))
        if change < end and 4 * (change - start) >= size:
            end = change
        batches.append(order[start:end])
        start = end
    return batches


def packed_batches(lengths: NDArray[np.int64], token_budget: int, max_items: int = 4096) -> list[NDArray[np.int64]]:
    """Split rows into batches whose summed length stays within ``token_budget`` tokens, for rows without padding.

    lengths: [N] tokens per row. Order and over-long rows as in ``token_budget_batches``.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    batches, start = [], 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, before + token_budget, side="right"))
        end = min(max(end, start + 1), start + max_items)
        batches.append(order[start:end])
        start = end
    return batches
