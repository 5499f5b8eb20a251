"""The process that Ray's driver is: what it yields, and what becomes of its death and its parent's."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EmbedInThisProcess
from ray_drivers import ENDING, FAIL_STARTS

from jobs import embed_items, ray_process
from jobs.ray_process import RayDriver
from pipeline.store import Store
from schemas.errors import ClusterError, DataError
from schemas.records import Snapshot


@pytest.fixture
def driver(monkeypatch, tmp_path) -> str:
    """A folder for ``ray_drivers``, which is what the process imports in place of Ray."""
    monkeypatch.setattr(ray_process, "_MODULE", "ray_drivers")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(FAIL_STARTS, str(tmp_path / "starts"))
    return str(tmp_path)


def test_values_come_in_order_from_another_process(driver):
    values = list(RayDriver().stream("numbers", 5, "", driver))
    assert [number for number, _ in values] == [0, 1, 2, 3, 4]
    assert {process for _, process in values}.isdisjoint({os.getpid()})
    assert len({process for _, process in values}) == 1


def test_a_session_that_is_not_needed_ends_with_its_block(driver):
    with RayDriver(ahead=True) as ahead:
        process = ahead._process._process.pid
        assert Path(f"/proc/{process}").exists()
    assert not Path(f"/proc/{process}").exists()
    with RayDriver() as idle:
        assert idle._process is None


def test_the_session_ends_beside_what_comes_after_the_last_value_and_is_waited_for(driver, monkeypatch):
    monkeypatch.setenv(ENDING, "3")
    with RayDriver() as ending:
        assert len(list(ending.stream("numbers", 3, "", driver))) == 3
        process = ending._process._process
        assert process.poll() is None
        assert not Path(driver, "ended").exists()
    assert process.returncode == 0  # not interrupted
    assert Path(driver, "ended").exists()


def test_a_start_that_fails_is_tried_once_more(driver, capsys):
    Path(driver, "starts").write_text("x")
    assert len(list(RayDriver().stream("numbers", 3, "", driver))) == 3
    assert "Ray did not start (its driver ended with status 1); trying once more" in capsys.readouterr().err


def test_two_starts_that_fail_are_one_clear_error(driver):
    Path(driver, "starts").write_text("xxx")
    with pytest.raises(ClusterError, match=r"Ray did not start: .*status 1\. Ray's logs: .*/session_latest/logs"):
        list(RayDriver().stream("numbers", 3, "", driver))
    assert Path(driver, "starts").read_text() == "x"


def test_a_cluster_of_somebody_else_is_asked_once(driver, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        Path(driver, "starts").write_text("xx")
        with pytest.raises(ClusterError, match=f"Ray did not start: .* RAY_ADDRESS is {re.escape(address)}"):
            list(RayDriver().stream("numbers", 3, "", driver))
    assert Path(driver, "starts").read_text() == "x"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_no_cluster_answers_the_command_says_so_at_once(driver, monkeypatch, scheme):
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"{scheme}127.0.0.1:{cluster.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at RAY_ADDRESS {address} .*unset RAY_ADDRESS"):
        RayDriver(ahead=True)
    with RayDriver():  # and asks for none where there is nothing to do
        pass


def test_a_death_on_the_way_is_an_error_after_what_was_finished(driver):
    values = RayDriver().stream("numbers", 2, "die", driver)
    assert [next(values)[0], next(values)[0]] == [0, 1]
    with pytest.raises(ClusterError, match=r"the Ray session died: .* run the command again"):
        next(values)


def test_known_errors_arrive_as_they_are_and_others_with_their_traceback(driver):
    with pytest.raises(DataError, match="row 7 is bad"):
        list(RayDriver().stream("numbers", 1, "data error", driver))
    with pytest.raises(RuntimeError, match="Odd: ") as caught:
        list(RayDriver().stream("numbers", 1, "odd error", driver))
    assert "ray_drivers.py" in caught.value.__notes__[0]


def test_closing_ends_the_process_in_order(driver):
    values = RayDriver().stream("numbers", 1, "wait", driver)
    process = next(values)[1]
    started = time.time()
    values.close()
    assert time.time() - started < 20
    assert Path(driver, "closed").exists()  # it unwound
    assert not Path(f"/proc/{process}").exists()


def test_the_process_ends_with_a_command_that_is_killed(driver):
    code = (
        "from jobs import ray_process\nray_process._MODULE = 'ray_drivers'\n"
        f"values = ray_process.RayDriver().stream('numbers', 1, 'wait', {driver!r})\n"
        "for _, process in values:\n    print(process, flush=True)\n"
    )
    paths = os.pathsep.join(str(Path(__file__).parent.parent / name) for name in ("", "tests"))
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    process = int(command.stdout.readline())
    command.send_signal(signal.SIGKILL)
    command.wait()
    end = time.time() + 20
    while Path(f"/proc/{process}").exists() and time.time() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_embed_items_keeps_what_was_finished_before_the_session_died(workspace, driver, monkeypatch):
    """24 texts in windows of 5, death after the first: its texts are committed, the night's log has the error.

    The first window of the night is of probes, so 19 texts are left.
    """
    settings = ("--set", "item_tower.use=base", "--set", "embed.window=5")
    workspace.run("prepare-data")
    error = workspace.fails("embed-items", *settings)
    assert error["kind"] == "Cluster"
    assert "the Ray session died" in error["error"]
    assert Store(workspace.store).all(Snapshot) == []
    workspace.fails("refresh", *settings)
    steps = [json.loads(line) for line in (workspace.store / "refresh.jsonl").read_text().splitlines()]
    assert (steps[-1]["step"], steps[-1]["error"]) == ("embed-items", "ClusterError")
    calls: list[list[str]] = []
    monkeypatch.setattr(embed_items, "RayDriver", EmbedInThisProcess(calls))
    assert workspace.run("embed-items", *settings)["embedded"] == 19
    assert sum(map(len, calls)) == 19
