"""What a row of compare-runs cost, beside what it is worth."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from pipeline.report import as_text, cost_rows, rows

FULL = {
    "items_per_second": 227.04,
    "positions_per_second": 1234.56,
    "seconds": {"tune-items": 60.0, "embed-items": 30.0, "train-user": 9.5, "evaluate": 0.5},
    "wall_seconds": 100.0,
}
BASELINE = {
    "items_per_second": None, "positions_per_second": None, "seconds": {"evaluate": 0.25}, "wall_seconds": 0.25,
}  # fmt: skip


def runs():
    shared = {"metrics": {"recall@10": 0.5}, "ci95": {"recall@10": [0.4, 0.6]}, "lists": {}}
    return [
        {"name": "tuned-cache", "behind": None, "cost": FULL, **shared},
        {"name": "popularity", "behind": [0.1, 0.0, 0.2, 0.05], "cost": BASELINE, **shared},
    ]


def test_cost_stands_beside_quality():
    header, cells = rows(runs(), "recall@10")
    assert header[-3:] == ["items/s", "positions/s", "wall s"]
    assert cells[0][-3:] == ["227.0", "1234.6", "100.0"]
    assert cells[1][-3:] == ["-", "-", "0.2"]
    assert as_text(header, cells).splitlines()[0].endswith("items/s  positions/s  wall s")


def test_cost_by_step():
    header, cells = cost_rows(runs())
    assert header == [
        "run", "tune-items s", "embed-items s", "train-user s", "evaluate s", "wall s", "items/s", "positions/s",
    ]  # fmt: skip
    assert cells == [
        ["tuned-cache", "60.0", "30.0", "9.5", "0.5", "100.0", "227.0", "1234.6"],
        ["popularity", "-", "-", "-", "0.2", "0.2", "-", "-"],
    ]


@pytest.mark.slow
def test_costs_are_those_of_the_runs_behind_a_row(workspace, embed_here):
    short = ("--set", "train.epochs=1")
    workspace.run("prepare-data")
    workspace.run("tune-items")
    embedded = workspace.run("embed-items")
    trained = workspace.run("train-user", *short)
    # nothing of this snapshot is new: its vectors are of the run before
    items = pl.read_csv(workspace.data("items"))
    items.with_columns(available=pl.col("item_id") != "i3").write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    later = workspace.run("embed-items")
    assert (later["embedded"], later["snapshot"] != embedded["snapshot"]) == (0, True)
    leave_out = ("--set", "evaluate.trained_targets=leave-out")
    workspace.run("evaluate", *leave_out)
    workspace.run("evaluate", "--name", "popularity", *leave_out)
    workspace.capsys.readouterr()
    compared = workspace.run("compare-runs", *leave_out)
    costs = {run["name"]: run["cost"] for run in compared["runs"]}
    own = costs["tuned-cache"]
    assert set(own["seconds"]) == {"tune-items", "embed-items", "train-user", "evaluate"}
    assert own["wall_seconds"] == pytest.approx(sum(own["seconds"].values()))
    assert own["items_per_second"] == embedded["items_per_second"] != later["items_per_second"]
    assert own["positions_per_second"] == pytest.approx(trained["positions_per_second"], abs=0.1)
    assert set(costs["popularity"]["seconds"]) == {"evaluate"}
    assert costs["popularity"]["items_per_second"] is costs["popularity"]["positions_per_second"] is None
    page = Path(compared["report"]).read_text()
    assert "<h2>Cost</h2>" in page
    assert "<th>tune-items s</th>" in page
