"""paper-table on the tiny data: the same budget for every trained row, resumed without doing anything twice."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from jobs import paper_table, train_user
from pipeline.published import published_rows
from pipeline.splits import SplitConfig, protocol_label
from user_tower.sequences import Histories

NO_EVENTS = Histories([], np.zeros(1, np.int64), np.zeros(0, np.int64))
SETS = ("--set", "train.epochs=2", "--set", "evaluate.metric=recall@5")


@pytest.fixture
def folder(workspace):
    for table, name in (("items", "items"), ("interactions", "events")):
        frame = pl.read_csv(workspace.data(name), schema_overrides={"year": pl.String})
        frame.write_parquet(workspace.folder / f"{table}.parquet")
    return str(workspace.folder)


def test_rows_with_one_budget_and_a_resumed_run(workspace, embed_here, folder, monkeypatch):
    arguments = ["--data", folder, "--budget-minutes", "0", *SETS]
    result = workspace.run("paper-table", *arguments, "--only", "popularity,sasrec-id,frozen-cache")
    by_name = {row["name"]: row for row in result["rows"]}
    assert list(by_name) == ["popularity", "sasrec-id", "frozen-cache"]
    for name in ("sasrec-id", "frozen-cache"):  # no budget: the first point of the grid and no other
        assert len(by_name[name]["tried"]) == 1
        assert by_name[name]["grid_cut"]
    assert by_name["sasrec-id"]["over_better_id"] is None
    mean, low, high, p = by_name["popularity"]["over_better_id"]
    assert low <= mean <= high
    assert 0 < p <= 1
    assert by_name["frozen-cache"]["cutoff"] == "unknown"

    trained = []
    monkeypatch.setattr(train_user, "_train", lambda *_: trained.append(1))
    again = workspace.run("paper-table", *arguments, "--only", "popularity,sasrec-id,frozen-cache")
    assert not trained
    assert again["rows"] == result["rows"]


def test_rows_of_another_item_tower_are_embedded_beside_it_in_any_order(workspace, embed_here, folder):
    rows = ("--only", "frozen-cache", "--set", "embed.full_from=0")
    arguments = ["--data", folder, "--budget-minutes", "0", *SETS, *rows]
    first = workspace.run("paper-table", *arguments, "--set", "template.prompt='about: '")
    second = workspace.run("paper-table", *arguments)
    assert first["rows"][0]["run_id"] != second["rows"][0]["run_id"]


def test_a_tuned_row_by_itself_is_tuned_for(workspace, embed_here, folder):
    sets = ("--set", "tune.train.epochs=1", "--set", "tune.warmup_epochs=0", "--budget-minutes", "0", *SETS)
    result = workspace.run("paper-table", "--data", folder, *sets, "--only", "tuned-cache+time")
    assert [row["cutoff"] for row in result["rows"]] == ["recorded"]


@pytest.mark.slow
def test_the_whole_grid_chooses_on_validation(workspace, embed_here, folder):
    result = workspace.run(
        "paper-table", "--data", folder, "--budget-minutes", "60", *SETS, "--only", "sasrec-id",
    )  # fmt: skip
    (row,) = result["rows"]
    assert len(row["tried"]) == 4
    assert not row["grid_cut"]
    assert row["tried"][row["best"]] == max(row["tried"].values())


def test_an_unknown_row_and_a_folder_without_tables_are_named(workspace, tmp_path):
    error = workspace.fails("paper-table", "--only", "popularity,ours")
    assert "'ours' is no row" in error["error"]
    error = workspace.fails("paper-table", "--data", str(tmp_path / "nothing"))
    assert "there is no items.parquet" in error["error"]


def test_published_rows_of_other_protocols_are_shown_with_these_alone():
    sampled = protocol_label(NO_EVENTS, SplitConfig(protocol="sampled", negatives=20, negatives_seed=3))
    repeats = protocol_label(NO_EVENTS, SplitConfig(repeats=True))
    figures = {"MicroLens-50k": 0.7123, "amazon-baby": 0.6786, "Amazon-Games": 0.7011}
    for name, figure in figures.items():
        assert [row["hr@5"] for row in published_rows(name, sampled)] == [figure]
        assert published_rows(name, sampled.replace("1+20", "1+99")) == []
        assert published_rows(name, "leave-last-out") == []
    for name, figure in {"EB-NeRD-small": 0.5006, "merrec": 0.4987}.items():
        assert [row["recall@10"] for row in published_rows(name, repeats)] == [figure]
        assert published_rows(name, "leave-last-out") == []
    ours = {"data": {"name": "microlens"}, "users": 3, "counts": {"items": 9}}
    table = paper_table._published(published_rows("microlens", sampled), ours, "recall@5")
    assert "| published, model not named, MicroLens, 20 random negatives | 0.7123 | as handed" in table


def test_published_rows_stand_beside_the_same_protocol_alone(workspace, embed_here, folder):
    books = published_rows("amazon2014-book-1m", "leave-last-out")
    methods = {"SASRec", "SASRec-1B", "LEARN", "HSTU-large", "HSTU-1B", "HLLM-1B", "HLLM-7B"}
    assert {row["method"] for row in books} == methods
    assert {row["source"] for row in books} == {"arXiv 2409.12740, table 7"}
    figures = [0.0306, 0.0407, 0.0478, 0.05, 0.0509, 0.0525, 0.0535, 0.0649, 0.0685, 0.0697, 0.0928, 0.0939]
    assert sorted(row["recall@10"] for row in books) == figures
    tables = {row["source"] for row in published_rows("pixel1m", "leave-last-out")}
    assert tables == {f"arXiv 2409.12740, table {number}" for number in (2, 4, 7, 8, 12)}
    assert published_rows("amazon2014-book-1m", "sampled 1+20") == []
    assert published_rows("movielens-100k", "leave-last-out") == []
    sets = (*SETS, "--set", 'data.name="my-books"')
    result = workspace.run("paper-table", "--data", folder, *sets, "--only", "popularity")
    assert result["published"] == books
