"""embed-items on a cluster of two nodes that somebody else started (RAY_ADDRESS), and one whose workers fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import pytest

from pipeline.store import Store
from schemas.records import Snapshot

ITEMS = 600
SETTINGS = (
    "--set", "item_tower.use=base", "--set", "embed.window=50", "--set", "embed.commit_texts=50",
    "--set", "embed.token_budget=32", "--set", "gates.max_collapsed=1", "--allow-full",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


class TwoNodes:
    """A head and a second node, one processor each, on this machine. Folders and ports of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder = folder
        self.environment = os.environ | {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_ADDRESS": self.address,
        }
        self.nodes: list[subprocess.Popen] = []

    def start(self) -> None:
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        ray += ["--disable-usage-stats", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        head = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
        # the second is what a command sets for a session of its own, as one did in this process
        other = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        environment = {name: value for name, value in self.environment.items() if name not in other}
        for role in (head, [f"--address={self.address}"]):
            log = (self.folder / f"node{len(self.nodes)}.log").open("w")
            self.nodes.append(
                subprocess.Popen([*ray, *role], stdout=log, stderr=log, env=environment, start_new_session=True)
            )
            self.wait_for(len(self.nodes))

    def wait_for(self, nodes: int) -> None:
        end = time.time() + 120
        while self.alive() < nodes:
            assert time.time() < end, (self.folder / f"node{nodes - 1}.log").read_text()[-3000:]
            time.sleep(1)

    def alive(self) -> int:
        """Nodes that the head counts as alive; 0 while there is no head."""
        code = (
            "import ray; from ray._raylet import GcsClient; "
            f"print(sum(node.state == 0 for node in GcsClient('{self.address}').get_all_node_info().values()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=self.environment, timeout=100
        )
        return int(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else 0

    def workers(self) -> dict[int, int]:
        """Process of each worker that embeds -> process of its node's raylet."""
        lines = subprocess.run(
            ["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True
        ).stdout.splitlines()
        fields = [line.split(None, 2) for line in lines]
        raylets = {int(f[0]) for f in fields if "raylet/raylet" in f[2] and str(self.folder) in f[2]}
        return {int(f[0]): int(f[1]) for f in fields if "MapWorker" in f[2] and int(f[1]) in raylets}

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)


@pytest.fixture
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="two", dir="/tmp"))  # a socket's path must be short
    cluster = TwoNodes(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def catalog(workspace):
    titles = [f"{'red' if n % 2 else 'blue'} x{n} {n % 60}" for n in range(ITEMS)]
    frame = pl.DataFrame({"item_id": [f"i{n}" for n in range(ITEMS)], "title": titles, "year": list(range(ITEMS))})
    frame.write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    return workspace


def start(workspace, cluster: TwoNodes) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs", "embed-items", "--config", str(workspace.toml), *SETTINGS]
    log = (workspace.folder / "stderr").open("w")
    return subprocess.Popen(
        [*command, "--set", "embed.workers=2"], stdout=subprocess.PIPE, stderr=log, text=True, env=cluster.environment
    )


def watch(run: subprocess.Popen, cluster: TwoNodes, victim: bool = False) -> tuple[dict, set[int], bool]:
    """What the run says, the raylets that embedded for it, and whether a worker of it was killed on the way."""
    nodes: set[int] = set()
    killed = False
    end = time.time() + 300
    while run.poll() is None and time.time() < end:
        workers = cluster.workers()
        nodes |= set(workers.values())
        if victim and not killed and len(nodes) == 2:
            time.sleep(2)
            os.kill(next(iter(workers)), signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    output = run.communicate(timeout=10)[0]
    return json.loads(output.strip().splitlines()[-1]), nodes, killed


def test_two_nodes_embed_for_one_driver_and_stay_when_it_ends(catalog, cluster):
    run = start(catalog, cluster)
    done, nodes, _ = watch(run, cluster)
    assert run.returncode == 0, done
    assert done["embedded"] == ITEMS
    assert len(nodes) == 2
    time.sleep(8)  # longer than a guard waits before it ends a session of its own
    assert cluster.alive() == 2
    assert [node.poll() for node in cluster.nodes] == [None, None]

    # a driver that is killed takes nothing of the cluster with it, and a worker that is killed nothing of the run
    titles = pl.read_csv(catalog.data("items")).with_columns(title=pl.lit("new ") + pl.col("title"))
    titles.write_csv(catalog.data("items"))
    catalog.run("prepare-data")
    run = start(catalog, cluster)
    end = time.time() + 120
    while not cluster.workers() and time.time() < end:
        time.sleep(0.1)
    time.sleep(1)
    run.kill()
    run.communicate()
    time.sleep(8)
    assert cluster.alive() == 2
    store = Store(catalog.store)
    towers = store.embeddings.fingerprints()
    committed = sum(file.rows for tower in towers for file in store.embeddings.files(tower))
    run = start(catalog, cluster)
    done, _, killed = watch(run, cluster, victim=True)
    assert run.returncode == 0, done
    assert done["embedded"] == 2 * ITEMS - committed
    assert killed
    assert sum(file.rows for tower in towers for file in store.embeddings.files(tower)) == 2 * ITEMS
    assert [record.items for record in store.all(Snapshot)] == [ITEMS, ITEMS]
    assert cluster.alive() == 2
