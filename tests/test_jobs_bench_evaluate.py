"""bench evaluate on few users, and what it asks of its peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs import bench_evaluate, bench_evaluate_peer, bench_peers
from jobs.bench import BENCHES
from schemas.errors import ConfigError

SETS = ["bench.users=60", "bench.vectors=300", "evaluate.bootstrap=20", "evaluate.ks=[5,10]"]
PEER = """import json, sys
import numpy as np
found = np.load(sys.argv[1] + "/inputs.npz")
print("noise")
answer = {"seconds": 1e-9 + len(found["targets"]), "cpu_seconds": 20.0, "users": len(found["offsets"]) - 1}
print(json.dumps(answer))
"""


def test_the_whole_evaluation_stands_beside_the_bare_pass_and_recbole(tmp_path, monkeypatch):
    """The peer is a stand-in here: it gets the same users and says how long it took."""
    script = tmp_path / "bench_evaluate_peer.py"
    script.write_text(PEER)
    monkeypatch.setattr(bench_evaluate, "__file__", str(tmp_path / "bench_evaluate.py"))
    monkeypatch.setattr(bench_evaluate, "peer_python", lambda *_: Path(sys.executable))
    result = BENCHES["evaluate"]("demo.toml", SETS)
    whole, _, _, peer = result["rows"]
    assert (peer["users"], peer["seconds"], peer["items"]) == (60, 60.0, 300)
    assert result["ratio"]["over_recbole"] == pytest.approx(whole["seconds"] / 60, abs=2e-3)
    assert result["ratio"]["cpu_over_recbole"] == pytest.approx(whole["cpu_seconds"] / 20, abs=2e-3)
    assert set(result["ratio"]) == {
        "over_bare_score_topk", "cpu_over_bare_score_topk", "floor_over_evaluate", "over_recbole", "cpu_over_recbole"
    }  # fmt: skip
    script.write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"RecBole ended with 3.*bench\.recbole=false"):
        BENCHES["evaluate"]("demo.toml", SETS)


def test_the_peer_reads_every_event_with_the_target_last(tmp_path):
    inputs = {
        "candidates": np.zeros((4, 2)), "offsets": np.array([0, 2, 3]), "items": np.array([3, 1, 0]),
        "targets": np.array([2, 1]),
    }  # fmt: skip
    bench_evaluate_peer.write_events(tmp_path / "all", inputs, 2)
    _, *events = (tmp_path / "all" / "all.inter").read_text().splitlines()
    assert events == ["0\t3\t0", "0\t1\t1", "0\t2\t2", "1\t0\t0", "1\t1\t1"]
    assert (tmp_path / "all" / "all.item").read_text().split() == ["item:token", "0", "1", "2", "3"]


def test_an_environment_is_made_once_and_a_failure_is_named(tmp_path, monkeypatch):
    asked = []
    statuses = iter([0, 3, 0, 0])

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, next(statuses))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match=r"pip install .* some==1 ended with 3"):
        bench_peers.peer_python("some", ("some==1",), tmp_path)
    (tmp_path / "peers").mkdir()
    monkeypatch.setattr(Path, "touch", lambda path: (path.parent.mkdir(), path.write_text("")))
    made = [bench_peers.peer_python("some", ("some==1",), tmp_path) for _ in range(2)]
    assert made[0] == made[1]
    assert len(asked) == 4  # the second time nothing is run
