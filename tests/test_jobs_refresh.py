"""A night: promoted or held, resumable, never two at once, and the champion always opens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from jobs import train_user
from jobs.cli import NIGHT as NIGHT_STEPS
from jobs.config import load_config
from jobs.context import Context
from jobs.release_check import _late_events, _unknown_items
from pipeline.files import exclusive
from pipeline.release import open_release
from schemas.errors import NotFoundError, ReleaseError
from schemas.records import Dataset

NAME = ("--name", "frozen-cache")
NIGHT = (
    *NAME, "--set", "train.epochs=2", "--set", "evaluate.metric=recall@5", "--set", "refresh.gates.min_users=20",
    "--set", "evaluate.trained_targets=leave-out", "--set", "refresh.gates.max_metric_loss=0.2",
    "--set", "refresh.gates.max_slice_loss=1.0",
)  # fmt: skip
ALWAYS = ("--set", "refresh.train=always")


def tracking(workspace) -> str:
    return f"sqlite:///{workspace.store.resolve() / 'mlflow.db'}"


def champion(workspace):
    return open_release("models:/hllm@champion", tracking(workspace))


def add_day(workspace, day: int, users: int = 20, items: bool = True) -> None:
    """A day later: events of some users, a new item, an edited one."""
    events = pl.read_csv(workspace.data("events"))
    moment = 1_700_000_000_000 + day * 86_400_000
    rows = [(f"u{user}", f"i{(user + 2 * day) % 24}", moment + user) for user in range(users)]
    pl.concat([events, pl.DataFrame(rows, schema=events.schema, orient="row")]).write_csv(workspace.data("events"))
    if items:
        table = pl.read_csv(workspace.data("items")).cast(pl.String)
        new = pl.DataFrame([(f"n{day}", f"The red {day}", str(day))], schema=table.schema, orient="row")
        edited = table.with_columns(
            title=pl.when(item_id=f"i{day}")
            .then(pl.lit(f"The {'blue' if day % 2 else 'red'} {30 + day}"))
            .otherwise("title")
        )
        pl.concat([edited, new]).write_csv(workspace.data("items"))


def test_nights_promote_and_embed_exactly_what_is_new(workspace, embed_here):
    first = workspace.run("refresh", *NIGHT)
    assert first["promoted"]
    assert first["champion"] == first["release"]
    assert first["embedded"] == 24
    assert {row["verdict"] for row in first["gates"]} <= {"first", "pass"}
    again = workspace.run("refresh", *NIGHT)
    assert (again["release"], again["embedded"], again["users_embedded"], again["reused"]) == (
        first["release"],
        0,
        0,
        True,
    )

    add_day(workspace, 1)
    plan = workspace.run("refresh", *NIGHT, "--dry-run")
    assert plan["champion"] == first["release"]
    second = workspace.run("refresh", *NIGHT)
    assert second["promoted"], second["held_by"]
    assert second["embedded"] == 2  # a new and an edited text
    opened = champion(workspace)
    assert opened.record.id == second["release"]
    assert opened.record.champion == first["release"]
    assert len(opened.users) == 60
    assert len(opened.index.item_ids) == 25
    vectors = np.asarray(opened.matrix.vectors)
    assert opened.matrix.fingerprint == opened.record.item_fingerprint
    assert opened.user_vectors.shape[1] == vectors.shape[1]

    lines = [json.loads(line) for line in (workspace.store / "refresh.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "end"][:3] == [
        "prepare-data",
        "embed-items",
        "train-user",
    ]
    metrics = (workspace.store / "refresh.prom").read_text()
    assert 'hllm_refresh_items_embedded{model="hllm"} 2.0' in metrics
    assert "hllm_refresh_last_success_timestamp_seconds" in metrics


def test_a_worse_model_is_held_and_says_why(workspace, embed_here):
    first = workspace.run("refresh", *NIGHT, "--set", "train.epochs=12", "--set", "train.learning_rate=1e-2")
    add_day(workspace, 1)
    worse = (
        "--set",
        "train.learning_rate=1e-9",
        "--set",
        "refresh.train=always",
        "--set",
        "refresh.gates.max_metric_loss=0.01",
    )
    held = workspace.run("refresh", *NIGHT, *worse, expect=3)
    assert held["held_by"] == ["recall@5"]
    assert held["champion"] == first["release"]
    gate = next(row for row in held["gates"] if row["name"] == "recall@5")
    assert gate["verdict"] == "hold"
    assert gate["limit"] == "> -0.01"
    assert gate["value"] < -0.01
    assert champion(workspace).record.id == first["release"]
    assert workspace.run("refresh", *NIGHT, *worse, expect=3)["release"] == held["release"]  # still held

    # the night after, which trains by the policy, neither pairs its data with the held tower nor begins with it
    kept = workspace.run("refresh", *NIGHT)
    assert kept["promoted"], kept["held_by"]
    assert (kept["user_tower"], kept["champion"]) == (first["user_tower"], kept["release"])
    assert held["user_tower"] in Context(load_config(str(workspace.toml), "frozen-cache", [])).rejected_towers()
    context = Context(load_config(str(workspace.toml), "frozen-cache", ['train.warm_start="newest"']))
    parent = train_user.find_parent(context, train_user.open_features(context, None))
    assert parent is not None
    assert parent.label == first["user_tower"]


def test_one_bad_file_among_many_good_ones_is_held():
    def data(rows: int, unknown: int) -> Dataset:
        return Dataset.model_construct(
            interactions=rows, rows_in={"interactions": rows}, filtered={"unknown items": unknown}
        )

    assert _unknown_items(data(10_000, 100), None) == (0.01, "")
    assert _unknown_items(data(10_200, 300), data(10_000, 100)) == (1.0, "of 200 new rows")
    assert _unknown_items(data(10_050, 150), data(10_000, 100)) == (150 / 10_050, "")  # too few to say so
    assert _unknown_items(data(10_200, 100), data(10_000, 100)) == (100 / 10_200, "")


def test_events_far_behind_the_champion_are_late(workspace):
    context = Context(load_config(str(workspace.toml), "frozen-cache", []))
    workspace.run("prepare-data", *NAME)
    then = context.store.require(Dataset, name="board")
    events = pl.read_csv(workspace.data("events"))
    newest, day = events["timestamp"].max(), 86_400_000
    times = [newest + day] * 90 + [newest - day // 2] * 60 + [newest - 3 * day] * 50
    rows = [(f"u{number}", "i1", time + number) for number, time in enumerate(times)]
    pl.concat([events, pl.DataFrame(rows, schema=events.schema, orient="row")]).write_csv(workspace.data("events"))
    workspace.run("prepare-data", *NAME)
    now = context.store.require(Dataset, name="board")
    assert now.interactions - then.interactions == 200
    assert _late_events(context, now, then) == 50 / 200
    assert _late_events(context, now, None) is None
    assert _late_events(context, then, now) is None


@pytest.mark.parametrize(
    ("fault", "gate"),
    [
        ("catalog", "catalog size"),
        pytest.param("events", "interactions lost", marks=pytest.mark.slow),
        pytest.param("clock", "newer than the champion, days", marks=pytest.mark.slow),
    ],
)
def test_drifting_input_is_held(workspace, embed_here, fault, gate):
    add_day(workspace, 5, items=False)
    first = workspace.run("refresh", *NIGHT)
    items, events = (pl.read_csv(workspace.data(name)) for name in ("items", "events"))
    if fault == "catalog":
        items.with_columns(available=pl.int_range(pl.len()) < 8).write_csv(workspace.data("items"))
    if fault == "events":
        events.filter(pl.int_range(pl.len()) % 10 > 0).write_csv(workspace.data("events"))
    if fault == "clock":
        earlier = pl.when(pl.col("timestamp") > 1_650_000_000_000).then(10_000_000_000).otherwise(0)
        events.with_columns(timestamp=pl.col("timestamp") - earlier).write_csv(workspace.data("events"))
    held = workspace.run("refresh", *NIGHT, expect=3)
    assert gate in held["held_by"]
    assert champion(workspace).record.id == first["release"]


@pytest.mark.parametrize("fault", ["empty feed", "swapped columns", "mlflow unreachable"])
def test_a_broken_night_leaves_the_champion(workspace, embed_here, fault, monkeypatch):
    first = workspace.run("refresh", *NIGHT)
    whole = workspace.data("events").read_bytes()
    with monkeypatch.context() as patch:
        if fault == "empty feed":
            workspace.data("events").write_text("user_id,item_id,timestamp\n")
        if fault == "swapped columns":
            pl.read_csv(workspace.data("events")).rename({"item_id": "x"}).rename(
                {"timestamp": "item_id"}).rename({"x": "timestamp"}).write_csv(workspace.data("events"))  # fmt: skip
        if fault == "mlflow unreachable":
            patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        error = workspace.fails("refresh", *NIGHT)
    assert error["kind"] == ("Tracking" if fault == "mlflow unreachable" else "Data")
    assert champion(workspace).record.id == first["release"]
    workspace.data("events").write_bytes(whole)
    assert workspace.run("refresh", *NIGHT)["release"] == first["release"]


def test_rollback_serves_the_one_before_and_no_night_undoes_it(workspace, embed_here):
    first = workspace.run("refresh", *NIGHT)
    error = workspace.fails("releases", "rollback", *NAME)
    assert "is the first one" in error["error"]
    add_day(workspace, 1)
    second = workspace.run("refresh", *NIGHT)
    failures: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                assert champion(workspace).record.id in (first["release"], second["release"])
            except BaseException as failure:
                failures.append(failure)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        rolled = workspace.run("releases", "rollback", *NAME)
        assert rolled["champion"] == first["release"]
        assert (
            workspace.run("releases", "promote", *NAME, "--release", second["release"])["champion"]
            == second["release"]
        )
        workspace.run("releases", "rollback", *NAME)
    finally:
        ended.set()
        reader.join()
    assert not failures
    held = workspace.run("refresh", *NIGHT, expect=3)
    assert (held["release"], held["held_by"]) == (second["release"], ["rolled back before"])
    add_day(workspace, 2)
    third = workspace.run("refresh", *NIGHT)
    assert third["promoted"]
    shown = workspace.run("releases", "show", *NAME)
    assert shown["releases"][0]["champion"] == first["release"]


def test_two_at_once(workspace, embed_here):
    workspace.run("refresh", *NIGHT)
    with exclusive(workspace.store / ".refresh.lock") as ours:
        assert ours
        assert "another refresh" in workspace.run("refresh", *NIGHT)["skipped"]
        assert workspace.run("refresh", *NIGHT, "--set", "refresh.lock=false")["promoted"]


def test_a_release_whose_parts_changed_does_not_open(workspace, embed_here):
    first = workspace.run("refresh", *NIGHT)
    folder = workspace.store / "releases" / first["release"]
    opened = open_release(str(folder))
    assert opened.record.id == first["release"]
    record = json.loads((folder / "record.json").read_text())
    record["checksums"]["index"] = "0" * 32
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(ReleaseError, match="index is not what was released"):
        open_release(str(folder))
    with pytest.raises(ReleaseError, match="is another one than the registry's"):
        champion(workspace)
    with pytest.raises(NotFoundError):
        open_release("models:/hllm@nobody", tracking(workspace))


def start_night(workspace, *sets: str, before: str = "") -> subprocess.Popen:
    """A refresh in a process of its own, with its exit status; before: Python to run there first."""
    arguments = ["refresh", "--config", str(workspace.toml), *NIGHT, *sets]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import conftest; from jobs import cli, embed_items\n{before}\n"
        f"embed_items.RayDriver = conftest.EmbedInThisProcess([]); sys.exit(cli.main({arguments}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_nights(workspace, kills: int) -> None:
    """SIGKILL at random moments. The champion must open and answer after each; a finished night brings a new day."""
    # thirty days in one night are more than these gates let pass; they are tested elsewhere
    always = (
        *ALWAYS, "--set", "refresh.gates.max_metric_loss=1.0", "--set", "refresh.gates.max_catalog_change=9.0"
    )  # fmt: skip
    workspace.run("refresh", *NIGHT, *always)
    copy = copied(workspace)
    day, rng = 1, np.random.default_rng(0)
    add_day(workspace, day)
    known = champion(workspace).record.id
    for wait in rng.uniform(2.0, 9.0, kills):
        process = start_night(workspace, *always)
        time.sleep(wait)
        process.kill()
        process.communicate()
        found = champion(workspace)
        assert found.index.search(found.user_vectors[:1].astype(np.float32), 3).rows.min() >= 0
        if found.record.id != known:
            known, day = found.record.id, day + 1
            add_day(workspace, day)
    finish_as_in(workspace, copy, always)
    require_swept(workspace)


def copied(workspace) -> Path:
    """The store as it is now, for a run that nobody kills."""
    copy = workspace.folder / "copy"
    subprocess.run(["cp", "-r", str(workspace.store), str(copy)], check=True)
    return copy


def finish_as_in(workspace, copy: Path, sets: tuple[str, ...]) -> str:
    """The next night of the store promotes, and ends in the release of one night of the copy; returns it."""
    resumed = workspace.run("refresh", *NIGHT, *sets)
    assert resumed["promoted"], resumed["held_by"]
    whole = workspace.run("refresh", *NIGHT, *sets, "--set", f"store={copy}")
    assert resumed["release"] == whole["release"]
    return resumed["release"]


def require_swept(workspace) -> None:
    """What was killed aside of its publication stays for ``job_hours``, as a running job's; then nothing of it is."""
    workspace.run("snapshots", "clean", "--set", "retention.job_hours=0")
    assert list(workspace.store.glob("*/.*")) == []


def test_what_a_night_killed_at_its_publication_left_is_not_read_and_goes_later(workspace, embed_here):
    first = workspace.run("refresh", *NIGHT, *ALWAYS)
    copy = copied(workspace)
    add_day(workspace, 1)
    at_the_rename = (
        "import os, signal\nfrom pathlib import Path\nrename = Path.rename\n"
        "def kill(path, target):\n"
        "    if path.parent.name == 'snapshots': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(path, target)\n"
        "Path.rename = kill"
    )
    process = start_night(workspace, *ALWAYS, before=at_the_rename)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = {path.name for path in workspace.store.glob("snapshots/.*")}
    assert len(left) == 2  # the announced rows, and the snapshot without its name
    assert champion(workspace).record.id == first["release"]
    resumed = finish_as_in(workspace, copy, ALWAYS)
    assert left <= {path.name for path in workspace.store.glob("snapshots/.*")}
    require_swept(workspace)
    assert workspace.run("refresh", *NIGHT)["release"] == resumed


def test_a_killed_night_ends_in_the_release_of_one_that_was_not(workspace, embed_here):
    kill_nights(workspace, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_killed_nights(workspace, embed_here):
    kill_nights(workspace, int(os.environ.get("HLLM_KILLS", "30")))


def test_the_lock_is_not_waited_for(tmp_path):
    with exclusive(tmp_path / "lock") as first, exclusive(tmp_path / "lock") as second:
        assert (first, second) == (True, False)


def test_training_policy(workspace, embed_here):
    error = workspace.fails("refresh", *NIGHT, "--set", "refresh.train=never")
    assert "refresh.train = never, but there is no user tower" in error["error"]
    first = workspace.run("refresh", *NIGHT)
    add_day(workspace, 1)
    kept = workspace.run("refresh", *NIGHT, "--set", "refresh.train=never")
    assert kept["user_tower"] == first["user_tower"]
    add_day(workspace, 2, users=60)
    grown = workspace.run("refresh", *NIGHT, "--set", "refresh.train_share=0.05")
    assert grown["user_tower"] != first["user_tower"]


def test_steps_one_by_one_end_where_one_run_does(workspace, embed_here):
    for step in NIGHT_STEPS:
        assert list(workspace.run("refresh", *NIGHT, "--until", step)["steps"])[-1] == step
    last = workspace.run("refresh", *NIGHT)
    assert last["promoted"]
    assert (last["embedded"], last["users_embedded"]) == (0, 0)
    copy = f"store={workspace.folder / 'copy'}"
    assert workspace.run("refresh", *NIGHT, "--set", copy)["release"] == last["release"]
