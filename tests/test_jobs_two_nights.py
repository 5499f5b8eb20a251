"""Two refreshes at once, and moving the alias under the eyes of a reader."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_jobs_refresh import NIGHT, add_day, champion, start_night, tracking

from jobs import releases
from jobs.config import load_config
from jobs.context import Context
from pipeline.release import ARTIFACT, describe, find_parts, open_parts
from pipeline.store import Store
from schemas.records import Dataset, Release, Snapshot, UserTower, UserVectors

ONE_THREAD = "import torch; torch.set_num_threads = lambda count: None"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """embed-items' worker, which runs in this process here, sets the threads of the training after it; with another
    number the weights differ, and so do the releases of a night that embeds and one that finds it done."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def both(workspace, *sets: str) -> list[dict]:
    """What two refreshes that start together print; both must end with status 0."""
    found = []
    for process in [start_night(workspace, *sets, before=ONE_THREAD) for _ in range(2)]:
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, (out[-2000:], err[-3000:])
        found.append(json.loads(out.strip().splitlines()[-1]))
    return found


@pytest.mark.slow
def test_of_two_at_once_one_runs_and_the_other_leaves(workspace, embed_here):
    results = both(workspace)
    skipped = [result for result in results if "skipped" in result]
    (ran,) = [result for result in results if "skipped" not in result]
    assert skipped == [{"skipped": "another refresh of this store is running"}]
    assert ran["promoted"]
    assert champion(workspace).record.id == ran["release"]
    assert len(Store(workspace.store).all(Dataset)) == 1


@pytest.mark.slow
def test_without_the_lock_both_finish_and_nothing_is_mixed(workspace, embed_here):
    first = workspace.run("refresh", *NIGHT)
    alone = workspace.folder / "alone"
    add_day(workspace, 1)
    results = both(workspace, "--set", "refresh.lock=false", "--set", "refresh.train=always")
    assert [result["promoted"] for result in results] == [True, True]
    store = Store(workspace.store)
    made = [find_parts(store, store.get(Release, result["release"])).checksums() for result in results]
    assert made[0] == made[1]
    assert len({result["release"] for result in results}) == 1
    opened = champion(workspace)
    assert opened.record.id == results[0]["release"]
    assert opened.record.champion == first["release"]
    assert len(opened.users) == 60
    for record in store.all(Release):  # every one of them is a whole set, whoever made its parts
        open_parts(store, record)
        assert find_parts(store, record).checksums() == record.checksums
    for kind in (UserTower, Snapshot, UserVectors):  # twice the same, where both were made
        contents = {(r.fingerprint if kind is not UserVectors else r.checksum) for r in store.all(kind)}
        assert len(contents) <= 2, kind
    assert list(workspace.store.glob("*/.*")) == []
    # what one night alone makes of the same data
    steps = ("--set", f"store={alone}", "--set", "refresh.train=always")
    assert workspace.run("refresh", *NIGHT, *steps)["release"] == results[0]["release"]
    assert workspace.run("refresh", *NIGHT)["release"] == results[0]["release"]


READER = """
import json, sys
from pathlib import Path
from pipeline.release import open_release
stop, opened = Path(sys.argv[2]), {}
while not stop.exists():
    found = open_release("models:/hllm@champion", sys.argv[1])
    assert len(found.users) == len(found.user_vectors) == 60
    opened[found.record.id] = opened.get(found.record.id, 0) + 1
    Path(sys.argv[3]).write_text(str(sum(opened.values())))
print(json.dumps(opened))
"""


@pytest.mark.slow
def test_promote_and_rollback_are_one_call_each_under_two_seconds_and_no_reader_fails(workspace, embed_here):
    workspace.run("refresh", *NIGHT)
    context = Context(load_config(str(workspace.toml), "frozen-cache", []))
    registry, store = context.registry, context.store
    (first,) = store.all(Release)
    with context.tracker.run("release", "hllm", {}, {}) as run:  # a second one of the same parts
        changed = {"id": "f" * 32, "created_at": first.created_at + 1, "champion": first.id, "run_id": run.run_id}
        second = first.model_copy(update=changed)
        run.artifact(ARTIFACT, describe(store, second))
        with store.new(Release, second.id) as folder:
            (folder / "record.json").write_text(second.model_dump_json())
    registry.register(second)
    stop, count = workspace.folder / "stop", workspace.folder / "count"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, tracking(workspace), str(stop), str(count)],
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not count.exists():
            assert reader.poll() is None, reader.communicate()
            time.sleep(0.05)
        client = registry._client
        calls = []
        move = client.set_registered_model_alias
        client.set_registered_model_alias = lambda *values: (calls.append(values), move(*values))
        seconds = []
        for _ in range(5):
            for action, release in (("promote", second.id), ("rollback", None)):
                before, seen = len(calls), int(count.read_text() or 0)
                started = time.perf_counter()
                releases.run(context, action, release)
                seconds.append(time.perf_counter() - started)
                assert len(calls) == before + 1
                assert registry.champion() == (second.id if action == "promote" else first.id)
                while int(count.read_text() or 0) <= seen + 1:  # the reader opens each of the two
                    assert reader.poll() is None, reader.communicate()
                    time.sleep(0.02)
    finally:
        stop.touch()
        out, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err
    assert set(json.loads(out)) == {first.id, second.id}
    assert max(seconds) < 2
