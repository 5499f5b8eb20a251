"""forget-user as a command: nothing in the store or in MLflow names the user, and the champion serves throughout."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import contextmanager

import polars as pl
import pyarrow.parquet as pq
import pytest
from test_jobs_refresh import NAME, NIGHT, add_day, champion, tracking

from jobs import forget_user
from pipeline.files import exclusive
from pipeline.release import Registry, open_release
from pipeline.store import Store
from pipeline.tracking import Tracker
from schemas.errors import NotFoundError

USER = "u7"
DAY = 86_400_000


def named(folder) -> list[str]:
    """Files below a folder that hold the user's id as a word or a cell."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            columns = pq.read_table(path).to_pydict()
            cells = {str(cell) for name, column in columns.items() if name != "embedding" for cell in column}
            if USER in cells or any(f'"{USER}"' in cell for cell in cells):
                found.append(str(path))
        elif path.suffix in (".json", ".html", ".jsonl", ".prom", ".txt") and (
            f'"{USER}"' in path.read_text() or f"user {USER}<" in path.read_text()
        ):
            found.append(str(path))
    return found


@pytest.fixture
def served(workspace, embed_here):
    """Two nights, the second one serves; a rejected row of the user, samples and a report that show the user."""
    with workspace.data("events").open("a") as file:
        file.write(f"{USER},i1,-5\n")
    patch = pytest.MonkeyPatch()
    patch.setattr("jobs.evaluate.SAMPLE_USERS", 60)
    workspace.run("refresh", *NIGHT)
    add_day(workspace, 1)
    workspace.run("refresh", *NIGHT)
    workspace.run("compare-runs", *NIGHT)
    yield workspace
    patch.undo()


@pytest.mark.slow
def test_nothing_names_the_user_and_the_next_night_finds_its_own_release(served):
    before = champion(served)
    assert len(named(served.store)) >= 8
    vectors = dict(zip(before.users, before.user_vectors, strict=True))
    result = served.run("forget-user", *NAME, "--user", USER)
    assert named(served.store) == []
    removed = result["removed"]
    assert (removed["datasets"], removed["quarantined"], removed["user_vectors"], removed["releases"]) == (2, 2, 2, 2)
    assert removed["interactions"] == 12 + 13
    assert min(removed[place] for place in ("cutoffs", "ranks", "samples", "report_samples")) >= 1
    tower = before.record.user_tower
    assert result["remains"] == {"item_towers": [], "user_towers": [tower], "rankers": []}

    after = champion(served)
    assert after.record.id == result["champion"] != before.record.id
    assert after.record.replaces == (before.record.id,)
    assert sorted(after.users) == sorted(set(before.users) - {USER})
    assert all((vectors[u] == v).all() for u, v in zip(after.users, after.user_vectors, strict=True))
    with pytest.raises(NotFoundError):
        open_release("models:/hllm/2", tracking(served))
    again = served.run("forget-user", *NAME, "--user", USER)
    assert again["known_before"]
    assert set(again["removed"].values()) == {0}
    assert again["remains"] == result["remains"]  # until another is trained
    assert served.run("recommend", *NAME, "--user", USER)["fallback"] == "popularity"

    night = served.run("refresh", *NIGHT)  # the feed still holds the user
    assert (night["release"], night["promoted"], night["users_embedded"]) == (after.record.id, True, 0)
    assert served.run("prepare-data", *NAME)["filtered"]["forgotten users"] == 13 + 1
    assert served.run("releases", "rollback", *NAME)["champion"] in after.record.champion or champion(served)
    add_day(served, 2)
    assert served.run("refresh", *NIGHT)["promoted"]
    assert USER not in champion(served).users
    assert named(served.store) == []


def test_a_store_that_was_copied_has_its_runs_files_to_itself(workspace, tmp_path):
    workspace.run("prepare-data")
    workspace.run("evaluate", "--name", "popularity")
    copy, before = tmp_path / "copy", workspace.published()
    shutil.copytree(workspace.store, copy)
    runs = [path.relative_to(copy) for path in copy.rglob("ranks.parquet")]
    assert (len(runs), len(named(copy))) == (1, 2)
    assert workspace.run("forget-user", "--set", f"store={copy}", "--user", USER)["removed"]["ranks"] == 1
    assert named(copy) == []
    assert workspace.published() == before
    assert len(named(workspace.store)) == 2
    workspace.run("evaluate", "--set", f"store={copy}", "--name", "item-knn")
    assert len(list(copy.rglob("ranks.parquet"))) == 2
    assert workspace.published() == before


class Killed(BaseException):
    """As SIGKILL between two changes of the disk or the registry."""


class Deaths:
    """Raises Killed after so many changes; what changes nothing is not counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for owner, name in (
            (Store, "remove"),
            (Store, "replace_file"),
            (Tracker, "replace_artifact"),
            (Registry, "register"),
            (Registry, "promote"),
            (forget_user, "without_events"),
            (forget_user, "without_users"),
            (forget_user, "write_file"),
        ):
            patch.setattr(owner, name, self.dying(getattr(owner, name), name == "without_events"))

    def dying(self, whole, may_do_nothing):
        def change(*values, **more):
            found = whole(*values, **more)
            self.left -= not (may_do_nothing and found is None)
            if self.left < 0:
                raise Killed
            return found

        return change


@contextmanager
def readers(workspace):
    """The champion opened again and again while the block runs; yields what failed."""
    failures: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                opened = champion(workspace)
                assert len(opened.users) == len(opened.user_vectors) >= 59
            except BaseException as failure:
                failures.append(failure)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield failures
    finally:
        ended.set()
        reader.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_after_every_change_it_is_finished_and_readers_never_fail(served, monkeypatch):
    deaths, kills = Deaths(monkeypatch), 0
    with readers(served) as failures:
        while True:
            deaths.left = kills // 2  # each place twice, then one change further
            try:
                served.run("forget-user", *NAME, "--user", USER)
                break
            except Killed:
                kills += 1
    assert not failures
    assert kills >= 8
    assert named(served.store) == []
    assert USER not in champion(served).users
    versions = served.run("releases", "list", *NAME)["releases"]
    assert [row["version"] for row in versions] == [3, 4]
    assert all(row["promoted_at"] for row in versions)
    assert served.run("refresh", *NIGHT)["release"] == champion(served).record.id


def test_a_store_without_releases_and_a_lock_that_is_held(workspace):
    workspace.run("prepare-data")
    with exclusive(workspace.store / ".refresh.lock"):
        assert "a refresh of this store is running" in workspace.fails("forget-user", "--user", USER)["error"]
    assert workspace.run("forget-user")["forgotten"] == 0
    result = workspace.run("forget-user", "--user", USER)
    assert (result["removed"]["interactions"], result["champion"], result["forgotten"]) == (12, None, 1)
    assert named(workspace.store) == []
    # another command that began before wrote the user again
    shutil.copytree(workspace.store, workspace.folder / "kept")
    raw = json.dumps({"user_id": USER})
    assert raw not in "".join(path.read_text() for path in workspace.store.rglob("*.json"))
    events = pl.read_csv(workspace.data("events"))
    again = workspace.run("prepare-data")
    assert again["interactions"] == events.filter(pl.col("user_id") != USER).height
    assert again["filtered"]["forgotten users"] == 12
    assert "the id is empty" in workspace.fails("forget-user", "--user", "")["error"]
