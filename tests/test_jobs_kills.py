"""embed-items killed again and again: readers see whole snapshots only, and the next run goes on from the commits.

HLLM_KILLS sets how many times (by default 3 of each kind). A third of the kills come at any time, a third while
vectors are computed, and a third right after a commit or a snapshot appeared, before the run could tell of it.
When a catalog is finished, all its titles change, so that every run has something to lose.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from pipeline.cache import open_snapshot
from pipeline.store import Store
from schemas.records import Snapshot

KILLS = int(os.environ.get("HLLM_KILLS", "3"))
ITEMS = 3_000
CHUNK = 250
SETTINGS = (
    "--set", "item_tower.use=base", "--set", f"embed.window={CHUNK}", "--set", f"embed.commit_texts={CHUNK}",
    "--set", "embed.token_budget=32", "--set", "gates.max_collapsed=1", "--allow-full",
)  # fmt: skip
VICTIMS = {"worker": "MapWorker", "raylet": "raylet/raylet"}

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(60 * (KILLS + 2) * 5)]


class Run:
    """One embed-items as a process of its own, and everything that it started."""

    def __init__(self, workspace) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kill", dir="/tmp"))  # a socket's path must be short
        command = [sys.executable, "-m", "jobs", "embed-items", "--config", str(workspace.toml), *SETTINGS]
        self.driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=(workspace.folder / "stderr").open("w"), text=True,
            env=os.environ | {"RAY_TMPDIR": str(self.folder)},
        )  # fmt: skip
        self.killed_at = 0.0

    def processes(self) -> dict[int, str]:
        """Living processes of this run, by number: their command, environment or open files name its folder."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                of_run = str(self.folder).encode() in command + (entry / "environ").read_bytes()
                if command and (of_run or any(self._opened(file) for file in (entry / "fd").iterdir())):
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def _opened(self, file: Path) -> bool:
        try:
            return str(file.readlink()).startswith(str(self.folder))
        except OSError:
            return False

    def kill(self, victim: str) -> bool:
        """SIGKILL to the driver, or to every process of that kind; False when there is none any more."""
        if victim == "driver":
            targets = [self.driver.pid] if self.driver.poll() is None else []
        else:
            targets = [number for number, line in self.processes().items() if VICTIMS[victim] in line]
        for number in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.killed_at = time.time()
        return bool(targets)

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120) -> bool:
        """Whether it happened before the run ended."""
        end = time.time() + seconds
        while time.time() < end and self.driver.poll() is None:
            if happened():
                return True
            time.sleep(0.002)
        return False

    def result(self) -> dict | None:
        """The JSON of a run that succeeded, else None; waits for its end."""
        output = self.driver.communicate(timeout=300)[0]
        return json.loads(output.strip().splitlines()[-1]) if self.driver.returncode == 0 else None

    def gone(self) -> bool:
        """Whether no process is left 30 seconds after the kill."""
        while self.processes() and time.time() < self.killed_at + 30:
            time.sleep(1)
        left = self.processes()
        if not left:
            shutil.rmtree(self.folder, ignore_errors=True)
        return not left


def change_every_title(workspace, season: int) -> None:
    rows = range(ITEMS)
    titles = [f"{'red' if n % 2 else 'blue'} x{n} {n % 60} s{season}" for n in rows]
    frame = pl.DataFrame({"item_id": [f"i{n}" for n in rows], "title": titles, "year": list(rows)})
    frame.write_csv(workspace.data("items"))
    workspace.run("prepare-data")


@pytest.fixture
def reader(workspace):
    """Opens every visible snapshot again and again, its local array removed; collects what was wrong."""
    store, ended, wrong, opened = Store(workspace.store), threading.Event(), [], Counter()

    def look() -> None:
        while not ended.wait(0.5):
            for record in store.all(Snapshot):
                try:
                    store.matrix_file(record.vectors_digest).unlink(missing_ok=True)
                    open_snapshot(store, record)
                    opened[record.id] += 1
                except Exception as error:
                    wrong.append(repr(error))

    thread = threading.Thread(target=look)
    thread.start()
    yield wrong, opened
    ended.set()
    thread.join()


def rows_of(store: Store) -> int:
    towers = store.embeddings.fingerprints()
    return sum(file.rows for tower in towers for file in store.embeddings.files(tower))


def strike(run: Run, store: Store, victim: str, moment: str, rng: random.Random, usual: float) -> bool:
    """Kill the victim at that moment; returns whether it came to that."""
    log = store.root / "item_embeddings" / "_delta_log"
    commits, snapshots = len(list(log.glob("*.json"))), len(store.all(Snapshot))
    if moment == "any":
        end = time.time() + rng.uniform(0.2, 1.0) * usual
        run.wait_for(lambda: time.time() > end)
    elif moment == "work":
        run.wait_for(lambda: any("MapWorker" in line for line in run.processes().values()))
        end = time.time() + rng.uniform(0, 0.5) * usual
        run.wait_for(lambda: time.time() > end)
    elif moment == "commit":
        more = rng.randint(1, ITEMS // CHUNK)
        run.wait_for(lambda: len(list(log.glob("*.json"))) >= commits + more)
    else:
        run.wait_for(lambda: len(list(store.parent(Snapshot).glob("[!.]*/record.json"))) > snapshots)
    return run.kill(victim)


@pytest.mark.parametrize("victim", ["driver", "worker", "raylet"])
def test_a_killed_run_leaves_nothing_half_done(workspace, reader, victim):
    wrong, opened = reader
    store, rng, season, runs, struck = Store(workspace.store), random.Random(victim), 0, [], Counter()
    change_every_title(workspace, season)
    started = time.time()
    first = Run(workspace)
    assert first.result()["embedded"] == ITEMS
    usual, committed = time.time() - started, ITEMS
    season, published = 1, 1
    change_every_title(workspace, season)
    moments = ["any", "commit", "work", "commit", "any", "snapshot" if victim == "driver" else "work"]
    for number in range(KILLS):
        moment = moments[number % len(moments)]
        run = Run(workspace)
        hit = strike(run, store, victim, moment, rng, usual)
        struck[moment, hit] += 1
        done = run.result()
        runs.append(run)
        now, there = rows_of(store), len(store.all(Snapshot))
        assert committed <= now <= ITEMS * (season + 1)
        with workspace.capsys.disabled():
            print(f"{victim} {number} {moment} hit={hit} status={run.driver.returncode} rows={now - ITEMS * season}")
        assert published <= there <= season + 1
        if done is not None:
            assert done["embedded"] == ITEMS * (season + 1) - committed  # what was committed is not embedded again
            assert (now, there) == (ITEMS * (season + 1), season + 1)
        committed, published = now, there
        if there == season + 1:  # perhaps published by a run that did not live to say so
            again = Run(workspace).result()
            assert (again["embedded"], again["snapshot"]) == (0, store.require(Snapshot).id)
            season += 1
            change_every_title(workspace, season)
        while len(runs) > 3:
            assert runs.pop(0).gone()
    done = Run(workspace).result()
    assert done["embedded"] == ITEMS * (season + 1) - committed
    assert rows_of(store) == ITEMS * (season + 1)
    assert wrong == []
    assert len(opened) >= season  # the last one may have been too short a time there
    assert len(store.all(Snapshot)) == season + 1
    shutil.rmtree(store.matrices)
    for record in store.all(Snapshot):
        assert len(open_snapshot(store, record).vectors) == ITEMS
    assert all(run.gone() for run in runs)
    with workspace.capsys.disabled():
        print(f"{victim}: {dict(struck)}, {season} catalogs, {sum(opened.values())} openings by the reader")
