"""How benchmarks measure time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Clocked(NamedTuple):
    """cpu_seconds: of all threads of this process; where other work shares the machine, only these compare."""

    seconds: float
    cpu_seconds: float
    found: Any


def clocked(work: Callable[[], Any]) -> Clocked:
    """One call, with what it returned."""
    busy, started = time.process_time(), time.perf_counter()
    found = work()
    return Clocked(time.perf_counter() - started, time.process_time() - busy, found)


def fastest(work: Callable[[], object], rounds: int, device: torch.device | None = None) -> float:
    """Seconds of the fastest of some calls, after one that is not counted; a GPU ``device`` is waited for."""

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
