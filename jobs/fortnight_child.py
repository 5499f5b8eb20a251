"""A command of ``hllm`` in a process whose surroundings fail: ``python -m jobs.fortnight_child FAULT refresh ...``.

disk-full:STEP  from the begin of that step on every flush and write by position of this process finds the disk full
clock:DAYS      the machine's clock is so many days behind

Without root neither a full disk nor another clock can be had, so the calls of this process are replaced.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from jobs.cli import main
from pipeline.oplog import StepLog

_ROOMS = ("jobs", "pipeline", "item_tower", "user_tower", "schemas", "mlflow")


def _fill_disk(step: str) -> None:
    """Let the calls through which everything is published fail from a step on."""
    log = StepLog.write

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self: StepLog, event: str, **values: Any) -> None:
        log(self, event, **values)
        if (event, values.get("step")) == ("begin", step):
            for name in ("fsync", "pwrite", "posix_fallocate"):
                setattr(os, name, full)

    StepLog.write = write  # type: ignore[method-assign]


def _turn_clock_back(days: str) -> None:
    """Give this project's modules and MLflow's another clock; Ray pickles functions of the ``time`` that it knows."""
    importlib.import_module("jobs.refresh")
    importlib.import_module("mlflow.utils.time")
    real, seconds = time, float(days) * 86_400  # this module gets the other clock too
    behind = {"time": lambda: real.time() - seconds, "time_ns": lambda: real.time_ns() - int(seconds * 1e9)}
    clock = SimpleNamespace(**(vars(real) | behind))
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in _ROOMS and getattr(module, "time", None) is real:
            module.time = clock  # type: ignore[attr-defined]


FAULTS: dict[str, Callable[[str], None]] = {"disk-full": _fill_disk, "clock": _turn_clock_back}


if __name__ == "__main__":
    name, _, value = sys.argv[1].partition(":")
    FAULTS[name](value)
    raise SystemExit(main(sys.argv[2:]))
