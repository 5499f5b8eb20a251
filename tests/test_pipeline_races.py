"""Two nights at once on one store, with a clean-up beside them: snapshots are whole and right, whoever wins."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from night import TOWER, right

from pipeline.cache import open_snapshot
from pipeline.cleanup import RetentionConfig, clean
from pipeline.store import Store
from schemas.errors import StoreError
from schemas.records import Snapshot

ROUNDS = 20
NIGHT = Path(__file__).with_name("night.py")
# nothing younger than 15 seconds is touched: longer than a night here, and shorter than the test
RETENTION = RetentionConfig(days=0, newest=3, job_hours=15 / 3600)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nights_and_a_clean_up_at_once(tmp_path):
    store, rng = Store(tmp_path / "store"), np.random.default_rng(0)
    pool = [f"text {n}" for n in range(200)]
    pinned: tuple[Snapshot, np.ndarray] | None = None
    cleaned, refused = 0, []
    for number in range(ROUNDS):
        chosen = [sorted(rng.choice(pool, 100, replace=False).tolist()) for _ in range(2)]
        if number % 3 == 0:
            chosen[1] = chosen[0]  # the same content from both
        runs = [
            subprocess.Popen([sys.executable, str(NIGHT), str(store.root), f"{number}-{side}", *texts],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for side, texts in enumerate(chosen)
        ]  # fmt: skip
        while any(run.poll() is None for run in runs):
            try:
                cleaned += clean(store, RETENTION).files
            except StoreError as error:
                refused.append(str(error))
            time.sleep(0.2)
        for run in runs:
            output, errors = run.communicate()
            assert run.returncode == 0, errors
            record = store.get(Snapshot, output.strip().splitlines()[-1])
            assert record.items == 100
        shutil.rmtree(store.matrices)  # as on another machine: from the table, against the digest
        for record in store.all(Snapshot):
            assert right(open_snapshot(store, record))
        if pinned is None:
            pinned = (store.require(Snapshot), np.array(open_snapshot(store, store.require(Snapshot)).vectors))
    assert cleaned > 0
    assert all("run the clean-up again" in line for line in refused)
    assert len(store.all(Snapshot)) <= 2 * ROUNDS
    with pytest.raises(Exception, match="no snapshots called"):
        store.get(Snapshot, pinned[0].id)  # its time is over, and that is said
    assert {file.rows for file in store.embeddings.files(TOWER)}
