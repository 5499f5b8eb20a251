"""A night that changes the item tower: the champion is of one tower until it is of the other, whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_jobs_refresh import NIGHT, add_day, champion, tracking

from jobs.cli import NIGHT as STEPS

TUNED = ("--name", "tuned-cache", *NIGHT[2:])
READER = """
import json, sys
from pathlib import Path
from pipeline.release import open_release
from schemas.records import UserVectors

seen = {}
while not Path(sys.argv[2]).exists():
    found = open_release("models:/hllm@champion", sys.argv[1])
    users = found.store.get(UserVectors, found.record.user_vectors)
    of = [found.record.item_fingerprint, found.matrix.fingerprint, users.item_fingerprint]
    assert len(set(of)) == 1, of
    assert found.user_vectors.shape == (len(found.users), found.matrix.vectors.shape[1])
    seen[found.record.id] = of[0]
    Path(sys.argv[3]).write_text(found.record.id)
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_vectors_of_two_towers_never_meet_in_the_champion(workspace, embed_here):
    """A reader opens the champion throughout, and it is looked at after every step of the night."""
    workspace.run("prepare-data")
    workspace.run("tune-items")
    first = workspace.run("refresh", *TUNED)
    assert first["promoted"], first["held_by"]
    stop, last = workspace.folder / "stop", workspace.folder / "last"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, tracking(workspace), str(stop), str(last)],
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def wait_for(release: str) -> None:
        while not last.exists() or last.read_text() != release:
            assert reader.poll() is None, reader.communicate()
            time.sleep(0.05)

    try:
        wait_for(first["release"])
        before = champion(workspace)
        add_day(workspace, 1)
        workspace.run("tune-items", "--set", "tune.train.seed=7")
        for step in STEPS:
            workspace.run("refresh", *TUNED, "--until", step)
            now = champion(workspace)
            assert now.record == before.record, step
            assert (now.user_vectors == before.user_vectors).all()
        night = workspace.run("refresh", *TUNED)
        assert night["promoted"], night["held_by"]
        wait_for(night["release"])
    finally:
        stop.touch()
        out, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err
    after = champion(workspace)
    assert after.record.item_fingerprint != before.record.item_fingerprint
    assert sum(map(len, embed_here)) == 24 + 25  # every text once under each tower
    assert after.users == before.users
    seen = json.loads(out)
    assert seen == {
        first["release"]: before.record.item_fingerprint,
        night["release"]: after.record.item_fingerprint,
    }
