"""The heaps of a process that computes, the C library's, polars' and Arrow's; and Python's garbage collector."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_POLARS = "_RJEM_MALLOC_CONF"  # of the heap that polars brings along, jemalloc
_ARROW = "ARROW_DEFAULT_MEMORY_POOL"


def keep_pages() -> None:
    """Let glibc's heap keep what tensors gave back, for the next ones; elsewhere nothing happens.

    It returns the end of the heap to the system whenever a large tensor goes, and the next layer has it back page by
    page, each zeroed: 17,000 page faults a batch of 4,096 tokens, up to a tenth of the time. The peak of the memory
    is the same; between peaks the process keeps it. There is a heap a core, not eight: prepare-data takes a twentieth
    less time. Who sets one of glibc's ``MALLOC_...`` variables decides instead.

    Polars' heap, where it is not loaded yet, gets one arena a core in place of four, and blocks of 8 MiB and more are
    in these too and not given back at once: a tenth fewer page faults in prepare-data. What is free it keeps for ten
    seconds, as jemalloc does by itself: another fifth fewer, for 5 % more memory at the peak. Arrow's memory comes
    from jemalloc too, not from mimalloc's huge pages, which a virtual machine may have to get from its host first.
    """
    os.environ.setdefault(_POLARS, f"narenas:{os.cpu_count() or 1},oversize_threshold:0,dirty_decay_ms:10000")
    if _ARROW not in os.environ:
        with suppress(NotImplementedError):  # a build without it
            pa.set_memory_pool(pa.jemalloc_memory_pool())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes; larger ones are rare
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_ARENA_MAX, os.cpu_count() or 1)


@contextmanager
def uncollected() -> Iterator[None]:
    """What comes up in the block is not looked through by the garbage collector, then or later or at the end.

    For imports: half a million objects that stay. PyTorch and transformers are imported in 3.3 s for 4.2, and a
    process that has them ends in 0.2 s for 1.2.
    """
    atexit.register(gc.freeze)
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
