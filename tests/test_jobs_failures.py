"""Interrupts and a full disk in every stage: nothing half-written is visible, and a second try goes through."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import embed_items
from jobs.cli import main
from jobs.context import checkpoint_folder
from pipeline import cache, dataset, embeddings, evaluate, files, index
from pipeline.store import Store
from schemas.records import Snapshot
from user_tower import steps

BASE = ("--set", "item_tower.use=base", "--set", "train.epochs=1", "--set", "tune.warmup_epochs=0")
STAGES = ["prepare-data", "tune-items", "embed-items", "train-user", "build-index", "evaluate", "compare-runs"]


def run_until(workspace, stage: str) -> None:
    for earlier in STAGES[: STAGES.index(stage)]:
        workspace.run(earlier, *BASE)


def interrupt(*_, **__):
    raise KeyboardInterrupt


# where the interrupt comes: in the work itself, or when everything is written but not yet published
MOMENTS = [
    ("prepare-data", dataset, "write_record"),
    ("prepare-data", dataset, "data_digest"),
    ("tune-items", steps, "info_nce"),
    ("embed-items", embeddings.EmbeddingTable, "commit"),
    ("embed-items", cache, "content_digest"),
    ("embed-items", cache, "write_record"),
    ("train-user", steps, "info_nce"),
    ("build-index", index, "write_record"),
    ("evaluate", evaluate, "_rank_chunk"),
]


def test_two_at_one_training_keep_their_checkpoints_apart_and_say_so(tmp_path, capsys):
    store = Store(tmp_path)
    with checkpoint_folder(store, "inputs") as first, checkpoint_folder(store, "inputs") as second:
        assert first == tmp_path / "checkpoints" / "inputs"
        assert tmp_path not in second.parents
        assert "inputs.lock: this one begins anew" in capsys.readouterr().err
    with checkpoint_folder(store, "inputs") as later:
        assert later == first
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("stage", "module", "function"), MOMENTS, ids=[f"{m[0]}-{m[2]}" for m in MOMENTS])
def test_an_interrupt_is_exit_130_and_a_second_try_goes_through(
    workspace, embed_here, monkeypatch, stage, module, function
):
    run_until(workspace, stage)
    before = {name for name in workspace.published() if not name.endswith(".json")}
    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupt)
        result = workspace.run(stage, *BASE, expect=130)
    assert result["kind"] == "Interrupted"
    assert {name for name in workspace.published() if not name.endswith(".json")} == before
    assert list(workspace.store.glob("*/.*")) == []
    workspace.run(stage, *BASE)


def test_work_that_was_committed_before_an_interrupt_is_not_done_again(workspace, embed_here, monkeypatch):
    run_until(workspace, "embed-items")
    with monkeypatch.context() as patch:
        patch.setattr(embed_items, "create_snapshot", interrupt)
        workspace.run("embed-items", *BASE, expect=130)
    again = workspace.run("embed-items", *BASE)
    assert (again["embedded"], again["reused"]) == (0, 24)


def test_ctrl_c_on_a_real_process(workspace, embed_here):
    run_until(workspace, "train-user")
    before = workspace.published()
    arguments = [sys.executable, "-m", "jobs", "train-user", "--config", str(workspace.toml)]
    endless = ["--set", "train.epochs=100000", "--set", "train.patience=100000", "--set", "item_tower.use=base"]
    log = workspace.folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*arguments, *endless], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=Path(__file__).parent.parent
        )
    end = time.monotonic() + 120
    while "step/s" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, log.read_text()
    assert json.loads(output.strip().splitlines()[-1])["kind"] == "Interrupted"
    assert workspace.published() == before
    workspace.run("train-user", *BASE)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 3 MB; tests that need it are skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # MLflow's SQLite file is still open


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but ``leave`` bytes of the folder's file system."""
    path = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path.write_bytes(b"\0" * max(0, free - leave))
    return path


@pytest.mark.parametrize(
    "stage", ["prepare-data", "tune-items", "embed-items", "train-user", "build-index", "evaluate"]
)
def test_a_full_disk_is_one_line_and_a_second_try_goes_through(workspace, embed_here, tiny_disk, stage):
    """Every stage meets a disk with less and less room, until it fits."""
    disk = ("--set", f"store={tiny_disk}/store", *BASE)
    for earlier in STAGES[: STAGES.index(stage)]:
        workspace.run(earlier, *disk)
    store = tiny_disk / "store"

    def published() -> set[str]:
        return {str(path) for path in store.glob("*/[!.]*/record.json")}

    before, failures = published(), 0
    for leave in (0, 4_096, 16_384):
        filler = fill(tiny_disk, leave)
        workspace.capsys.readouterr()
        status = main([stage, "--config", str(workspace.toml), *disk])
        output = workspace.capsys.readouterr()
        filler.unlink()
        if status == 0:
            break
        failures += 1
        assert status == 1
        assert json.loads(output.out.strip().splitlines()[-1])["kind"] == "DiskFull"
        assert output.err.strip().splitlines()[-1].startswith("error: the disk is full; nothing was published")
        assert published() == before
        assert list(store.glob("*/.*")) == []
    assert failures
    workspace.run(stage, *disk)


def embeddings_of(workspace) -> int:
    store = Store(workspace.store)
    towers = store.embeddings.fingerprints()
    return sum(file.rows for tower in towers for file in store.embeddings.files(tower))


@pytest.mark.parametrize("at", [4, 12])
def test_an_input_output_error_is_one_line_and_a_second_try_goes_through(workspace, embed_here, monkeypatch, at):
    """fsync fails once: of the log, then of a snapshot."""
    run_until(workspace, "embed-items")
    plain, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        error = workspace.fails("embed-items", *BASE)
    assert error["kind"] == "Store"
    assert error["error"].startswith(str(workspace.store))
    assert "input/output error" in error["error"]
    committed, snapshots = embeddings_of(workspace), Store(workspace.store).all(Snapshot)
    done = workspace.run("embed-items", *BASE)
    assert (done["embedded"], done["reused"]) == (24 - committed, committed)
    assert snapshots in ([], Store(workspace.store).all(Snapshot))
    workspace.run("snapshots show", "--snapshot", done["snapshot"])


def test_a_full_disk_is_found_inside_what_libraries_raise():
    error = RuntimeError("Kernel error: ... Os { code: 28, message: 'No space left on device' }")
    assert files.disk_full(error) is not None
