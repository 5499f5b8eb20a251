"""In place of ``jobs.embed_ray`` in the process that ``jobs.ray_process`` starts: no Ray, and deaths as asked."""

from __future__ import annotations

import os
import pickle
import time
from contextlib import contextmanager
from pathlib import Path

from jobs.embed_ledger import Ledger
from schemas.errors import DataError

ENDING = "RAY_DRIVERS_ENDING"  # seconds that it takes to end
FAIL_STARTS = "RAY_DRIVERS_FAIL_STARTS"  # a file with one letter for each start that shall fail


@contextmanager
def session():
    left = Path(os.environ.get(FAIL_STARTS, "/nonexistent"))
    if left.exists() and left.read_text():
        left.write_text(left.read_text()[1:])
        os._exit(1)  # as Ray's library does
    yield
    time.sleep(float(os.environ.get(ENDING, 0)))
    if left.parent.exists():
        (left.parent / "ended").touch()


def numbers(count: int, end: str, folder: str):
    """0 to count - 1 and this process; then what ``end`` says."""
    try:
        for number in range(count):
            yield number, os.getpid()
        if end == "die":
            os._exit(1)
        if end == "data error":
            raise DataError("row 7 is bad")
        if end == "odd error":
            raise Odd(count, lambda: None)
        if end == "wait":
            time.sleep(100)
    finally:
        Path(folder, "closed").touch()


class Odd(Exception):
    """One that cannot be pickled."""


def embed_windows(work: bytes, windows, workers):
    """The first window, then death."""
    worker, arguments = pickle.loads(work)
    yield from worker(**arguments, ledger=Ledger())(windows[0]).to_pylist()
    os._exit(1)
