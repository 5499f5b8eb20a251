"""Many small computations beside each other on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[int]:
    """Torch computes with one thread in the block, as before after it; gives the number that it had."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(count)


@contextmanager
def single_threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool of as many threads as torch has, and their number; torch computes with one in each and in the caller."""
    with one_thread() as count, ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool, count
