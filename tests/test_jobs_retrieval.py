"""recommend with a blocklist and without a history, the report of build-index, and bench retrieve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from jobs import build_index
from jobs.bench import BENCHES
from jobs.bench_vectors import random_cuts
from jobs.config import load_config
from jobs.context import Context
from user_tower.sequences import Histories


def test_blocklist_fallback_and_report(workspace, embed_here, tmp_path):
    """Item i3 was withdrawn: no index holds it, and nobody gets it, with a history or without."""
    workspace.toml.write_text(workspace.toml.read_text() + '[item_tower]\nuse = "base"\n')
    items = pl.read_csv(workspace.data("items"))
    items.with_columns(available=pl.col("item_id") != "i3").write_csv(workspace.data("items"))
    for command in ("prepare-data", "embed-items", "train-user"):
        workspace.run(command)
    built = workspace.run("build-index")
    assert built["vectors"] == 23
    assert (built["kind"], built["ann"]["ann_loss"], built["ann"]["queries"]) == ("flat", 0.0, 60)
    assert built["ann"]["model_recall"] == built["ann"]["index_recall"]
    assert workspace.run("build-index") == {**built, "reused": True}
    config = load_config(str(workspace.toml), None, [])
    assert len(Context(config).tracker.find(kind="index")) == 1  # what was answered again is no new run
    workspace.run("evaluate", "--set", "evaluate.metric=recall@5")
    page = Path(workspace.run("compare-runs")["report"]).read_text()
    assert "Index: model recall and ANN loss" in page
    assert "<td>flat</td><td>-</td><td>60</td>" in page  # exact: nothing to choose, so no curve

    plain = workspace.run("recommend", "--user", "u0", "--k", "3")
    assert (plain["fallback"], plain["users_without_history"], plain["blocked"]) == (None, 0, 0)
    ids = [item["item_id"] for item in plain["items"]]
    (tmp_path / "block.txt").write_text(f"{ids[0]}\nnothing\n")
    blocked = workspace.run("recommend", "--user", "u0", "--k", "3", "--blocklist", str(tmp_path / "block.txt"))
    assert (blocked["blocked"], blocked["blocklist_unknown"]) == (1, 1)
    assert [item["item_id"] for item in blocked["items"]][:2] == ids[1:]
    assert blocked["index"] == plain["index"]

    counts = pl.read_csv(workspace.data("events"))["item_id"].value_counts()
    by_item = dict(zip(counts["item_id"], counts["count"], strict=True))
    cold = workspace.run("recommend", "--user", "nobody", "--k", "5", "--blocklist", str(tmp_path / "block.txt"))
    assert (cold["fallback"], cold["users_without_history"]) == ("popularity", 1)
    assert [item["score"] for item in cold["items"]] == sorted(
        (count for item, count in by_item.items() if item not in (ids[0], "i3")), reverse=True
    )[:5]
    assert all(
        by_item[item["item_id"]] == item["score"] and item["item_id"] not in (ids[0], "i3") for item in cold["items"]
    )
    every = workspace.run("recommend", "--user", "nobody", "--k", "23")
    assert "i3" not in [item["item_id"] for item in every["items"]]


def test_half_of_the_validation_histories_choose_how_far_to_search(workspace, embed_here, monkeypatch):
    workspace.toml.write_text(workspace.toml.read_text() + '[item_tower]\nuse = "base"\n')
    for command in ("prepare-data", "embed-items", "train-user"):
        workspace.run(command, *(("--set", "train.epochs=1") if command == "train-user" else ()))
    lists = ("--set", "index.kind=ivf-flat", "--set", "index.nlist=8")
    few = workspace.run("build-index", *lists)["ann"]  # 30 of 60 are too few to tell
    assert (few["queries"], few["setting"], few["ann_loss"]) == (60, "nprobe 8", 0.0)
    monkeypatch.setattr(build_index, "LEAST", 30)
    by_queries = [workspace.run("build-index", *lists, "--set", f"index.recall={share}") for share in (0.5, 0.99)]
    assert [found["ann"]["queries"] for found in by_queries] == [30, 30]
    settings = [int(found["ann"]["setting"].removeprefix("nprobe ")) for found in by_queries]
    assert settings[0] < settings[1] == 8
    assert by_queries[0]["ann"]["ann_loss"] <= 0.5
    fixed = workspace.run("build-index", *lists, "--set", "index.nprobe=2")["ann"]
    assert (fixed["queries"], fixed["setting"]) == (60, "nprobe 2")


def test_bench_retrieve_prints_its_rows_and_ratios(tmp_path):
    sets = [
        f'store="{tmp_path / "none"}"',
        "bench.vectors=1500",
        "bench.queries=40",
        "index.nlist=20",
        "index.nprobe=20",
    ]
    result = BENCHES["retrieve"]("demo.toml", sets)
    assert [row["name"] for row in result["rows"]] == [
        "exact_top_k", "faiss flat", "torch float32", "torch bfloat16", "ivf-flat", "hnsw"
    ]  # fmt: skip
    assert set(result["ratio"]) == {
        "ann_speed_over_flat", "ann_cpu_speed_over_flat", "ann_recall", "exact_over_faiss_flat"
    }  # fmt: skip
    assert result["ratio"]["ann_recall"] == 1.0  # it reads every list
    assert all("queries made up" in row["source"] for row in result["rows"])
    assert {point["setting"] for point in result["rows"][4]["trade_off"]} == {
        "nprobe 2", "nprobe 5", "nprobe 10", "nprobe 20"
    }  # fmt: skip


def test_bench_retrieve_asks_with_the_user_tower_of_the_store(workspace, embed_here):
    workspace.toml.write_text(workspace.toml.read_text() + '[item_tower]\nuse = "base"\n')
    for command in ("prepare-data", "embed-items", "train-user"):
        workspace.run(command, *(("--set", "train.epochs=1") if command == "train-user" else ()))
    sets = ["bench.vectors=500", "bench.queries=1000", "bench.exact=false", "index.kind=ivf-flat"]
    result = BENCHES["retrieve"](str(workspace.toml), sets)
    (row,) = result["rows"]
    assert (row["name"], row["vectors"], row["queries"]) == ("ivf-flat", 500, 1000)
    assert "24 vectors with jitter 0.3; queries of user tower" in row["source"]
    cut = random_cuts(Histories(["a", "b", "c"], np.array([0, 2, 2, 5]), np.arange(5)), 5, np.random.default_rng(0))
    assert sorted(cut.of(user).tolist() for user in range(5)) == [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
