"""What a scheduler and a monitor read: JSON lines of the steps, and a Prometheus text file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.files import write_file
from schemas.secrets import redact


class Step:
    """One step of a run; what it counts stands in its line."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counted: dict[str, Any] = {}
        self.seconds = 0.0

    def counts(self, **values: Any) -> None:
        """Add numbers and ids to the step's line."""
        self.counted |= values


class StepLog:
    """Appends one JSON line for each begin and end of a step to a file, with time, run, step and counts."""

    def __init__(self, path: Path, run: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._run = path, run
        self.seconds: dict[str, float] = {}

    def write(self, event: str, **values: Any) -> None:
        """One line; a whole line or none, since it is one small append."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": moment, "run": self._run, "event": event, **values})
        with self._path.open("a") as file:
            file.write(redact(line) + "\n")

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Log begin, and end with status and seconds; an exception is logged by its kind and goes on."""
        step, started = Step(name), time.perf_counter()
        self.write("begin", step=name)
        print(f"{name} ...", file=sys.stderr, flush=True)
        status = "failed"
        try:
            yield step
            status = "done"
        except BaseException as error:
            step.counts(error=type(error).__name__)
            raise
        finally:
            step.seconds = self.seconds[name] = round(time.perf_counter() - started, 3)
            self.write("end", step=name, status=status, seconds=step.seconds, **step.counted)


def write_metrics(path: Path, values: dict[str, tuple[str, float]], labels: dict[str, str]) -> None:
    """Write gauges in Prometheus' text format, whole or not at all. values: name -> (help, value)."""
    spelled = ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items())
    lines = []
    for name, (text, value) in values.items():
        lines += [f"# HELP hllm_{name} {text}", f"# TYPE hllm_{name} gauge", f"hllm_{name}{{{spelled}}} {value!r}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, redact("\n".join(lines) + "\n").encode())


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
