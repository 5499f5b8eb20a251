"""demo: every step of the picture in one process, on the data of the configuration."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import build_index, compare_runs, embed_items, evaluate, prepare_data, train_user, tune_items
from jobs.config import load_config
from jobs.context import Context


@dataclass(frozen=True)
class Step:
    """A command under a run name; the variants of the configuration say what differs by name."""

    title: str
    command: Callable[[Context], dict[str, Any]]
    name: str


STEPS = (
    Step("prepare-data", prepare_data.run, "tuned-cache"),
    Step("evaluate", evaluate.run, "popularity"),
    Step("evaluate", evaluate.run, "item-knn"),
    Step("train-user", train_user.run, "sasrec-id"),
    Step("evaluate", evaluate.run, "sasrec-id"),
    Step("embed-items", embed_items.run, "frozen-cache"),
    Step("train-user", train_user.run, "frozen-cache"),
    Step("evaluate", evaluate.run, "frozen-cache"),
    Step("tune-items", tune_items.run, "tuned-cache"),
    Step("embed-items", embed_items.run, "tuned-cache"),
    Step("train-user", train_user.run, "tuned-cache"),
    Step("build-index", build_index.run, "tuned-cache"),
    Step("evaluate", evaluate.run, "tuned-cache"),
)


def run_steps(config: str, sets: list[str]) -> Context:
    """All steps up to the last evaluation; finished ones are reused. Returns the last step's context."""
    for number, step in enumerate(STEPS, 1):
        context = Context(load_config(config, step.name, sets))
        started = time.perf_counter()
        print(f"[{number}/{len(STEPS)}] {step.title} {step.name}", file=sys.stderr, flush=True)
        result = step.command(context)
        shown = {key: value for key, value in result.items() if isinstance(value, int | str)}
        took = time.perf_counter() - started
        print(f"[{number}/{len(STEPS)}] {took:.1f} s {shown}", file=sys.stderr, flush=True)
    return context


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Raises what the steps raise; a rerun goes on after the last finished step."""
    return compare_runs.run(run_steps(config, sets))
