"""train-ranker, evaluate-ranker and rank as commands: labels, sampled negatives, what is refused, reuse."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from jobs.cli import build_parser
from pipeline.store import Store
from schemas.records import Ranker, UserTower

BASE = ("--name", "frozen-cache")
QUICK = ("--set", "train.epochs=2")
SAMPLED = ("--set", "ranker.labels=sampled")


def label_by_colour(workspace) -> None:
    """Two users in three are shown the other colour too, between their own: what they click is their colour."""
    rng, events = np.random.default_rng(0), pl.read_csv(workspace.data("events"))
    later = pl.Series(rng.permutation(1_000)[: events.height] + 500)  # between two events of the board
    other = pl.concat_str(pl.lit("i"), (23 - pl.col("item_id").str.slice(1).cast(pl.Int64)).cast(pl.String))
    shown = events.with_columns(item_id=other, timestamp=pl.col("timestamp") + later, label=0.0)
    shown = shown.filter(pl.col("user_id").str.slice(1).cast(pl.Int64) % 3 > 0)
    pl.concat([events.with_columns(label=1.0), shown]).write_csv(workspace.data("events"))


def test_the_command_line_knows_the_rankers():
    parsed = build_parser().parse_args(["evaluate-ranker", "--protocol", "temporal", "--split", "valid"])
    assert (parsed.protocol, parsed.split) == ("temporal", "valid")
    assert build_parser().parse_args(["rank", "--user", "u", "--items", "a,b"]).items == "a,b"
    with pytest.raises(SystemExit):
        build_parser().parse_args(["rank", "--user", "u"])


def test_clicks_of_a_log_with_labels_from_training_to_a_ranked_list(workspace, embed_here):
    label_by_colour(workspace)
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    missing = workspace.fails("evaluate-ranker", *BASE)
    assert "run hllm train-ranker first" in missing["error"]
    made = workspace.run("train-ranker", *BASE, "--set", "train.epochs=4")
    assert made["fusion"] == "late"
    assert set(made["valid"]) == {"auc", "log_loss", "loss"}
    assert workspace.run("train-ranker", *BASE, "--set", "train.epochs=4")["reused"]
    workspace.run("train-user", *BASE, "--set", "train.epochs=1")
    found = workspace.run("evaluate-ranker", *BASE, "--set", "ranker.retrieval=frozen-cache")
    events = pl.read_csv(workspace.data("events")).sort("user_id", "timestamp")
    asked = events.group_by("user_id").last()  # no ties: one event each
    assert (found["users"], found["examples"], found["clicks"]) == (60, 60, int(asked["label"].sum()))
    assert found["left_out"] == {"absent": 0, "unlabelled": 0, "trained": 0}
    assert found["metrics"]["auc"] > 0.8  # colour by text; the checkerboard's answer is 1
    assert found["ci95"]["auc"][0] <= found["metrics"]["auc"] <= found["ci95"]["auc"][1]
    assert found["metrics"]["log_loss"] < found["log_loss_of_the_rate"]
    assert found["labels"] == "click: label >= 1"
    assert (found["cutoff"], found["protocol"]) == ("unknown", "leave-last-out")  # an untuned Item LLM
    retrieval = found["retrieval"]
    difference = found["metrics"]["auc"] - retrieval["metrics"]["auc"]
    assert retrieval["ranker_minus_retrieval"]["auc"]["mean"] == pytest.approx(difference)
    again = workspace.run("evaluate-ranker", *BASE, "--set", "ranker.retrieval=frozen-cache")
    assert (again["reused"], again["metrics"]) == (True, found["metrics"])

    ranked = workspace.run("rank", *BASE, "--user", "u1", "--items", "i0, i1,i2,i3")
    assert [item["item_id"] for item in ranked["items"][:2]] in (["i1", "i3"], ["i3", "i1"])  # u1 likes blue
    assert ranked["history"] == 12
    scores = [item["score"] for item in ranked["items"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] < scores[0] < 1
    nobody = workspace.run("rank", *BASE, "--user", "who", "--items", "i1,i0")
    assert (nobody["history"], len(nobody["items"])) == (0, 2)
    assert "['x9'] are not in the catalog" in workspace.fails("rank", *BASE, "--user", "u1", "--items", "x9")["error"]
    error = workspace.fails("train-ranker", *BASE, "--set", "ranker.positive_from=2")
    assert error["kind"] == "Data"
    assert "1200 events 0 are clicks and 1200 are not" in error["error"]
    assert (
        "Run train-ranker with the same"
        in workspace.fails("evaluate-ranker", *BASE, "--protocol", "temporal")["error"]
    )
    (record,) = Store(workspace.store).all(Ranker)
    assert record.config["next_item_weight"] == 1.0
    assert json.loads((workspace.store / "rankers" / record.id / "ranker.json").read_text())["fusion"] == "late"


@pytest.mark.slow
def test_a_log_of_clicks_alone_on_ids_and_targets_that_a_ranker_was_trained_on(workspace):
    """At the end the newest events are taken back: an event of the old training part is now the last one."""
    ids = ("--name", "sasrec-id")
    workspace.run("prepare-data")
    error = workspace.fails("train-ranker", *ids)
    assert "720 events 0 are clicks and 0 are not" in error["error"]
    assert "ranker.labels = sampled" in error["error"]
    early = ("--set", "ranker.fusion=early", "--set", "ranker.contexts=2")
    made = workspace.run("train-ranker", *ids, *SAMPLED, *early, *QUICK)
    assert (made["fusion"], made["snapshot"]) == ("early", None)
    found = workspace.run("evaluate-ranker", *ids)  # asks as it was trained, whatever [ranker] says now
    assert (found["examples"], found["clicks"]) == (300, 60)
    assert found["labels"].startswith("sampled: 4 items")
    assert found["retrieval"] is None
    workspace.run("train-user", "--name", "tuned-cache", "--set", "user_tower.features=id", *QUICK)
    assert workspace.run("evaluate-ranker", *ids)["retrieval"]["name"] == "tuned-cache"
    warm = ("--name", "tuned-cache", "--set", "user_tower.features=id", "--set", "train.warm_start=newest")
    made = workspace.run("train-ranker", *warm, *SAMPLED, *QUICK)
    assert made["parent"] == Store(workspace.store).require(UserTower, name="tuned-cache").id
    events = pl.read_csv(workspace.data("events"))
    gone = pl.col("timestamp").rank("ordinal", descending=True).over("user_id") <= 2
    events.filter(~gone).write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    error = workspace.fails("evaluate-ranker", *ids)
    assert "Ranker" in error["error"]
    assert "was trained on 60 of 60 targets" in error["error"]
