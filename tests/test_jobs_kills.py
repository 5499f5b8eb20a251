"""embed-items killed at random moments: readers see whole snapshots only, and the next run goes on from the commits.

HLLM_KILLS sets how many times (by default 3 of each kind).
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
import threading
import time

import polars as pl
import pytest

from pipeline.cache import open_snapshot
from pipeline.store import Store
from schemas.records import Snapshot

KILLS = int(os.environ.get("HLLM_KILLS", "3"))
ITEMS = 6_000
SETTINGS = (
    "--set", "item_tower.use=base", "--set", "embed.window=500", "--set", "embed.commit_texts=500",
    "--set", "embed.token_budget=64", "--set", "gates.max_collapsed=1", "--allow-full",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(60 * (KILLS + 2) * 3)]


def ray_processes() -> dict[int, str]:
    """Processes of Ray on this machine, by id."""
    lines = subprocess.run(
        ["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {}
    for line in lines:
        number, arguments = line.strip().split(" ", 1)
        if any(
            name in arguments for name in ("raylet/raylet", "gcs_server", "ray::", "ray/_private", "ray/dashboard")
        ):
            found[int(number)] = arguments
    return found


def start(workspace) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs", "embed-items", "--config", str(workspace.toml), *SETTINGS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.fixture
def catalog(workspace):
    titles = [f"{a} {b} {n % 60}" for n in range(ITEMS) for a, b in [("red" if n % 2 else "blue", f"x{n}")]]
    frame = pl.DataFrame({"item_id": [f"i{n}" for n in range(ITEMS)], "title": titles, "year": list(range(ITEMS))})
    frame.write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    return workspace


@pytest.fixture
def reader(catalog):
    """Opens every visible snapshot again and again, its local array removed; collects what was wrong."""
    store, ended, wrong, opened = Store(catalog.store), threading.Event(), [], set()

    def look():
        while not ended.wait(0.2):
            for record in store.all(Snapshot):
                try:
                    store.matrix_file(record.vectors_digest).unlink(missing_ok=True)
                    open_snapshot(store, record)
                    opened.add(record.id)
                except Exception as error:
                    wrong.append(repr(error))

    thread = threading.Thread(target=look)
    thread.start()
    yield wrong, opened
    ended.set()
    thread.join()


@pytest.mark.parametrize("victim", ["driver", "worker", "raylet"])
def test_a_killed_run_leaves_nothing_half_done(catalog, reader, victim):
    wrong, _ = reader
    store, rng, committed = Store(catalog.store), random.Random(victim), 0
    finished = None
    for _ in range(KILLS):
        run = start(catalog)
        names = {"driver": None, "worker": "MapWorker", "raylet": "raylet/raylet"}
        if victim == "driver":
            time.sleep(rng.uniform(6, 22))
            run.send_signal(signal.SIGKILL)
        else:
            deadline = time.time() + 60
            target: list[int] = []
            while not target and time.time() < deadline and run.poll() is None:
                target = [number for number, line in ray_processes().items() if names[victim] in line]
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 8))
            for number in target:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        output = run.communicate(timeout=240)[0]
        now = sum(file.rows for file in store.embeddings.files(_tower(store)))
        assert now >= committed
        committed = now
        if run.returncode == 0:
            finished = json.loads(output.strip().splitlines()[-1])
    last = start(catalog)
    done = json.loads(last.communicate(timeout=240)[0].strip().splitlines()[-1])
    assert last.returncode == 0
    assert done["embedded"] == ITEMS - committed
    if finished is not None:
        assert done["snapshot"] == finished["snapshot"]
    assert wrong == []
    assert len(store.all(Snapshot)) == 1
    assert sum(file.rows for file in store.embeddings.files(_tower(store))) == ITEMS
    shutil.rmtree(store.matrices)
    assert len(open_snapshot(store, store.require(Snapshot)).vectors) == ITEMS
    deadline = time.time() + 30
    while ray_processes() and time.time() < deadline:
        time.sleep(1)
    assert ray_processes() == {}


def _tower(store: Store) -> str:
    return next(iter(store.embeddings.fingerprints()), "")
