"""bench fortnight: the replayed feed, and a whole fortnight in miniature."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from item_tower.prompt import TemplateConfig
from jobs import bench_fortnight
from jobs.bench_fortnight import PLAN
from jobs.fortnight_feed import FEED_FAULTS, NIGHTS, cut_points, open_replay
from schemas.errors import ConfigError

KINDS, FIRST, LATER, DAYS = 6, 9, 3, 200


def write_data(folder: Path, users: int) -> None:
    """Each user meets 8 of the 12 items of one kind, on random days; a quarter of the items appear late."""
    rng = np.random.default_rng(0)
    items = [(f"k{kind}n{n}", f"{50 + kind} {50 + kind} {50 + kind} {n}") for kind in range(KINDS) for n in range(12)]
    from_day = {f"k{k}n{FIRST + n}": 140 + 20 * n + 3 * k for k in range(KINDS) for n in range(LATER)}
    rows = []
    for user in range(users):
        seen: set[str] = set()
        for day in np.sort(rng.integers(0, DAYS, 8)).tolist():
            own = [f"k{user % KINDS}n{n}" for n in range(12)]
            free = [item for item in own if item not in seen and from_day.get(item, 0) <= day]
            item = free[rng.integers(len(free))]
            seen.add(item)
            rows.append((f"u{user}", item, 1_600_000_000 + 86_400 * day + user))
    pl.DataFrame(items, schema=["item_id", "title"], orient="row").write_parquet(folder / "items.parquet")
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(
        folder / "interactions.parquet"
    )


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_data(folder, 800)
    return folder


def test_nights_have_equal_shares_of_events_whatever_the_days():
    thin = np.sort(np.concatenate([np.arange(9_000), 9_000 + 50 * np.arange(1_000)]))
    counts = np.bincount(np.searchsorted(cut_points(thin, 0.7), thin))
    assert counts[0] == 7_000
    assert counts[1:].min() >= 230
    assert counts.sum() == 10_000
    with pytest.raises(ConfigError, match="too few times"):
        cut_points(np.repeat(np.arange(5), 100), 0.7)


def test_the_replay_delivers_each_event_once_and_the_catalog_changes(data, tmp_path):
    replay, template = open_replay(data, "title", 0.7, None), TemplateConfig(prompt="")
    feed, before = tmp_path / "feed", None
    known: set[bytes] = set()
    for night in range(1, NIGHTS + 1):
        replay.write(feed, night)
        catalog = replay.catalog(night)
        assert pq.read_table(feed / "items.parquet") == catalog.table
        files = sorted((feed / "interactions").iterdir())
        assert len(files) == night
        assert pq.read_metadata(files[-1]).num_rows == replay.window(night).events
        fresh = replay.keys(night, template) - known
        known |= fresh
        if before is not None:
            assert (catalog.edited, catalog.withdrawn) == (3, 2)
            assert len(fresh) == catalog.new + catalog.edited  # no text is like another here
            gone = before.available - catalog.available
            assert len(gone) == catalog.withdrawn
            away = set(before.table["item_id"].to_pylist()) - set(catalog.table["item_id"].to_pylist())
            assert len(gone & away) == 1  # the other one stays in the feed, as not available
            assert catalog.returned == (2 if night >= 5 else 0)
        before = catalog
    assert sum(pq.read_metadata(file).num_rows for file in files) == len(replay.events) == 6_400
    assert sum(replay.catalog(night).new for night in range(1, NIGHTS + 1)) == 72
    some = open_replay(data, "title", 0.7, 100)
    assert len(some.events) == 800


def test_each_fault_damages_what_it_says(data, tmp_path):
    replay, feed = open_replay(data, "title", 0.7, None), tmp_path / "feed"
    used = {attempt.feed for night in PLAN.values() for attempt in night.attempts if attempt.feed}
    assert used == set(FEED_FAULTS)
    tonight = feed / "interactions" / "night-05.parquet"
    replay.write(feed, 5)
    whole = pl.read_parquet(tonight)
    found = {}
    for fault in FEED_FAULTS:
        replay.write(feed, 5, fault)
        assert pq.read_table(feed / "interactions" / "night-04.parquet").num_rows > 0 or fault == "empty feed"
        if fault != "corrupt file":
            found[fault] = pl.read_parquet(tonight)
    assert found["empty feed"].is_empty()
    assert found["swapped item and time"]["timestamp"].to_list() == whole["item_id"].to_list()
    assert found["swapped user and item"]["item_id"].to_list() == whole["user_id"].to_list()
    assert found["event clock back"]["timestamp"].max() < whole["timestamp"].min()
    replay.write(feed, 5, "corrupt file")
    with pytest.raises(pl.exceptions.PolarsError):
        pl.read_parquet(tonight)


def test_what_the_bench_refuses(workspace):
    assert "--data" in workspace.fails("bench fortnight")["error"]
    error = workspace.fails("bench fortnight", "--data", str(workspace.folder / "nothing"))
    assert "there is no items.parquet" in error["error"]


MINI = (
    "--set", "item_tower.use=base", "--set", "evaluate.metric=recall@5",
    "--set", 'template.fields=["title"]', "--set", "evaluate.trained_targets=leave-out",
    "--set", "train.epochs=4", "--set", "train.warm_start=newest", "--set", "gates.max_collapsed=1",
    "--set", "refresh.gates.min_users=50", "--set", "refresh.gates.max_metric_loss=0.1",
    "--set", "refresh.gates.max_slice_loss=0.5",
)  # fmt: skip


@pytest.mark.slow
def test_the_clock_of_a_child_is_behind_for_what_it_writes_and_ray_can_pickle():
    code = """
import pickle, time
from jobs.fortnight_child import FAULTS
FAULTS["clock"]("3")
from mlflow.utils.time import get_current_time_millis
from pipeline.files import next_created_at
now = time.time_ns() // 1_000_000
assert abs(now - next_created_at([]) - 3 * 86_400_000) < 60_000
assert abs(now - get_current_time_millis() - 3 * 86_400_000) < 60_000
pickle.dumps(time.time)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def run_bench(command: list[str]) -> dict:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_a_fortnight_in_miniature(workspace, data):
    command = [sys.executable, "-m", "jobs", "bench", "fortnight", "--config", str(workspace.toml)]
    command += ["--data", str(data), *MINI]
    state, log = workspace.store / "fortnight.json", workspace.store / "refresh.jsonl"
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not state.exists() or len(json.loads(state.read_text())["rows"]) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    size = log.stat().st_size
    while log.stat().st_size == size:
        time.sleep(0.1)
    process.kill()  # the bench itself, in the third night; its refresh goes on
    process.wait()
    result = run_bench(command)  # goes on with that night
    rows = result["rows"]
    assert [row["night"] for row in rows] == list(range(1, NIGHTS + 1))
    for row in rows:
        expected = [attempt.expect for attempt in PLAN.get(row["night"], bench_fortnight.Night()).attempts]
        assert [each["outcome"] for each in row["attempts"]] == expected
    assert result["ends"]["promoted"] == 9
    assert rows[5]["attempts"][0]["why"].startswith("recall@5")
    champions = [row["champion"] for row in rows]
    assert champions[3] == champions[2]
    assert champions[6] != champions[5] == champions[4]
    assert champions[11] == champions[10]
    assert len(set(champions)) == 9
    assert rows[0]["embedded"] == rows[0]["new"]
    for before, row in itertools.pairwise(rows):
        embeds = [PLAN.get(each["night"], bench_fortnight.Night()).embeds for each in (before, row)]
        if all(embeds):
            assert row["embedded"] == row["new"] + row["edited"]
        assert embeds[1] or row["embedded"] == 0
    page = Path(result["report"]).read_text()
    assert "unknown items" in page
    assert "MLflow" in page
    assert run_bench(command) == result  # there is nothing left to do
    assert not list(workspace.folder.glob("store-*"))
    assert json.loads((workspace.store / "fortnight.json").read_text())["rows"] == rows
