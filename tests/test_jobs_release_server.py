"""Releases through an MLflow tracking server over HTTP, as a team has one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from pipeline.release import open_release

NIGHT = (
    "--name", "frozen-cache", "--set", "train.epochs=1", "--set", "evaluate.metric=recall@5",
    "--set", "refresh.gates.min_users=20",
)  # fmt: skip


@pytest.fixture
def server(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
         "--artifacts-destination", str(tmp_path / "server-artifacts")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                break
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < until
            time.sleep(0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:  # it waits for connections that this process keeps open
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.mark.slow
def test_a_release_is_made_found_and_rolled_back_over_http(workspace, embed_here, server):
    first = workspace.run("refresh", *NIGHT)
    assert first["promoted"]
    opened = open_release("models:/hllm@champion")
    assert opened.record.id == first["release"]
    assert len(opened.users) == len(opened.user_vectors) == 60
    assert np.isfinite(np.asarray(opened.user_vectors, dtype=np.float32)).all()
    assert open_release("models:/hllm/1").record == opened.record
    held = workspace.run(
        "refresh", *NIGHT, "--set", "refresh.gates.min_index_recall=1", "--set", "refresh.train=always"
    )
    second = workspace.run("releases", "list", "--name", "frozen-cache")
    assert [row["release"] for row in second["releases"]] == [first["release"], held["release"]]
    assert held["promoted"]
    started = time.perf_counter()
    workspace.run("releases", "rollback", "--name", "frozen-cache")
    assert open_release("models:/hllm@champion").record.id == first["release"]
    assert time.perf_counter() - started < 10
