"""One night of ``bench fortnight``: the refresh as a process of its own, what it logged, and what serves after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.digests import file_digest
from pipeline.embeddings import read_keys
from pipeline.release import OpenRelease, find_parts, open_release
from pipeline.store import Store
from schemas.errors import NotFoundError
from schemas.records import Release

ROOT = Path(__file__).resolve().parent.parent
LOG = "refresh.jsonl"
_KILL_AFTER = 0.5  # seconds into the step
_POLL = 0.02

Outcome = Literal["promoted", "held", "error", "killed"]
_STATUS: dict[int, Outcome] = {0: "promoted", 1: "error", 3: "held", -9: "killed"}


@dataclass(frozen=True)
class Attempt:
    """A refresh, what is done to it, and how it must end. feed: see ``FEED_FAULTS``; child: see ``fortnight_child``;
    detail: the gate that holds it, or the kind of its error."""

    expect: Outcome
    detail: str | None = None
    fault: str | None = None
    feed: str | None = None
    child: str | None = None
    kill_at: str | None = None
    sets: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended. result: the JSON of its last line, {} for a killed one; steps: name -> seconds of those
    that ended; last: the step that it was in, or had ended last."""

    outcome: Outcome | None
    result: dict[str, Any]
    seconds: float
    steps: dict[str, float]
    last: str | None
    trained: str | None

    @property
    def why(self) -> str:
        """What held or stopped it."""
        if self.outcome == "held":
            return ", ".join(self.result["held_by"])
        if self.outcome == "error":
            return f"{self.result['kind']}: {self.result['error']}"
        return f"killed in {self.last}" if self.outcome == "killed" else ""


def _lines(log: Path, start: int) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    whole = log.read_bytes()[start:].rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _wait(process: subprocess.Popen[bytes], log: Path, start: int, kill_at: str | None) -> None:
    """Until it ends; SIGKILL a moment after it has begun a step, or at once where the step has ended by then."""
    deadline = float("inf")
    while kill_at is not None and process.poll() is None:
        done = [line["event"] for line in _lines(log, start) if line.get("step") == kill_at]
        if "begin" in done:
            deadline = min(deadline, time.monotonic() + _KILL_AFTER)
        if "end" in done or time.monotonic() > deadline:
            process.kill()
            break
        time.sleep(_POLL)
    process.wait()


def _surroundings() -> dict[str, str]:
    """The environment of a command that runs this code and tracks in its store."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return found | {"PYTHONPATH": os.pathsep.join(paths)}


def roll_back(arguments: list[str]) -> float:
    """``hllm releases rollback``, as an operator does it; returns its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jobs", "releases", "rollback", *arguments]
    done = subprocess.run(command, env=_surroundings(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return round(time.perf_counter() - began, 2)


def refresh(store: Path, arguments: list[str], attempt: Attempt) -> Ended:
    """Run ``hllm refresh`` with its fault. arguments: --config and every --set. Output lies beside the store."""
    child = ["jobs"] if attempt.child is None else ["jobs.fortnight_child", attempt.child]
    command = [sys.executable, "-m", *child, "refresh", *arguments]
    command += [part for each in attempt.sets for part in ("--set", each)]
    log = store / LOG
    start, began = log.stat().st_size if log.exists() else 0, time.perf_counter()
    out, err = (store.with_name(f"{store.name}.{kind}") for kind in ("out", "err"))
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=_surroundings() | attempt.environment, stdin=subprocess.DEVNULL
        )
        try:
            _wait(process, log, start, attempt.kill_at)
        finally:
            process.kill()
    lines = _lines(log, start)
    printed = out.read_text().strip().splitlines()
    outcome = _STATUS.get(process.returncode)
    result = json.loads(printed[-1]) if printed and outcome != "killed" else {}
    if outcome != "killed" and ("kind" if outcome == "error" else "promoted") not in result:
        outcome = None  # a traceback, or a refresh that did nothing
    ended = [line for line in lines if line["event"] == "end"]
    named = [line["step"] for line in lines if "step" in line]
    why = [line["why"] for line in ended if line["step"] == "train-user" and line.get("why")]
    return Ended(
        outcome,
        result,
        round(time.perf_counter() - began, 2),
        {line["step"]: line["seconds"] for line in ended},
        named[-1] if named else None,
        why[-1] if why else None,
    )


@dataclass(frozen=True)
class Serving:
    """A release that was opened whole, and the digest of each of its files, by path in the store."""

    release: str
    before: str | None
    items: frozenset[str]
    files: dict[str, str]


def _answer(found: OpenRelease, store: Store) -> Serving:
    """Ask it something, and read all its files."""
    rows = found.index.search(found.user_vectors[:1].astype(np.float32), 3).rows
    assert rows.min() >= 0, f"release {found.record.id} gives no recommendations"
    parts = find_parts(store, found.record)
    records = [found.record, parts.user_tower, parts.snapshot, parts.index, parts.user_vectors]
    folders = [store.folder(record) for record in records if record is not None]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    digests = {str(path.relative_to(store.root)): file_digest(path) for path in files}
    return Serving(found.record.id, found.record.champion, frozenset(found.index.item_ids), digests)


def serving(store: Store, model: str) -> Serving | None:
    """The champion as a consumer finds it, None before the first. Every part is checked against the release; the
    vectors are read from the table again."""
    shutil.rmtree(store.matrices, ignore_errors=True)
    try:
        found = open_release(f"models:/{model}@champion", tracking_uri(store))
    except NotFoundError:
        return None
    return _answer(found, store)


def kept(store: Store, release: str) -> Serving:
    """A release by its id, opened from its folder."""
    return _answer(open_release(str(store.parent(Release) / release)), store)


def tracking_uri(store: Store) -> str:
    """Of the store's own MLflow."""
    return f"sqlite:///{store.root.resolve() / 'mlflow.db'}"


def stored_keys(store: Store) -> list[bytes]:
    """Content key of each row of the table of item vectors."""
    found: list[bytes] = []
    for fingerprint in store.embeddings.fingerprints():
        found += [row.tobytes() for row in read_keys(store.embeddings.files(fingerprint))]
    return found
