"""evaluate and compare-runs as commands: protocols, cold items, what cannot be ranked, the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from jobs import compare_runs
from jobs.cli import PROTOCOLS, build_parser
from pipeline.splits import SplitConfig
from schemas.errors import StoreError

FIVE = ("--set", "evaluate.metric=recall@5")
BASE = ("--name", "frozen-cache")


def times_of_all_users_alike(workspace) -> None:
    """Event n of every user happens at the same hour: a time cuts every history at the same place."""
    events = pl.read_csv(workspace.data("events"))
    step = pl.col("timestamp").rank("ordinal").over("user_id").cast(pl.Int64)
    events.with_columns(timestamp=1_600_000_000_000 + step * 3_600_000).write_csv(workspace.data("events"))


def test_the_command_line_offers_the_protocols_of_the_configuration():
    assert set(PROTOCOLS) == set(SplitConfig.model_fields["protocol"].annotation.__args__)
    parsed = build_parser().parse_args(["evaluate", "--protocol", "sampled", "--negatives", "5"])
    assert (parsed.protocol, parsed.negatives) == ("sampled", 5)


def test_cold_items_are_found_by_text_and_not_by_id(workspace, embed_here):
    """Two items happen only as last events, so that no user tower ever trained on them; sixty more never happen. To
    ids all of these are one, which never was a target: the ID baseline finds none."""
    items = pl.read_csv(workspace.data("items")).cast(pl.String)
    others = [(f"x{n}", f"kind : {n}", str(n)) for n in range(60)]
    pl.concat([items, pl.DataFrame(others, schema=items.schema, orient="row")]).write_csv(workspace.data("items"))
    held_back = ["i20", "i21"]
    events = pl.read_csv(workspace.data("events"))
    last = pl.col("item_id").is_in(held_back)
    late = events.with_columns(timestamp=pl.col("timestamp") + pl.when(last).then(1_000_000).otherwise(0))
    late.write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    found = {}
    for name in ("frozen-cache", "sasrec-id"):
        workspace.run("train-user", "--name", name, *FIVE)
        result = workspace.run("evaluate", "--name", name, *FIVE)
        found[name] = result["slices"]["cold: not in user training"]
        assert (found[name]["users"], found[name]["targets"]) == (60, 60)
    assert found["frozen-cache"]["recall@5"] > 0.9
    assert found["frozen-cache"]["ci95"][0] > 0.8
    assert found["sasrec-id"]["recall@5"] == 0
    assert found["sasrec-id"]["ci95"] == [0, 0]
    page = workspace.run("compare-runs", *FIVE)["report"]
    assert "not in user training" in Path(page).read_text()


def test_temporal_trains_before_and_asks_after_one_time(workspace, embed_here):
    times_of_all_users_alike(workspace)
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    workspace.run("train-user", *BASE)
    temporal = ("--protocol", "temporal")
    error = workspace.fails("evaluate", *BASE, *temporal)
    assert error["kind"] == "Config"
    assert "trained on the training part of 'leave-last-out'" in error["error"]
    workspace.run("train-user", *BASE, *temporal, *FIVE)
    result = workspace.run("evaluate", *BASE, *temporal)
    # 12 events each at 12 hours: 80 % and 90 % of them precede the tenth and the eleventh hour
    assert re.match(r"temporal, validation from \S+Z, test from \S+Z$", result["protocol"])
    assert (result["users"], result["counts"]["targets"]) == (60, 120)
    assert result["metrics"]["recall@5"] == 1.0
    assert workspace.run("evaluate", "--name", "popularity", *temporal)["metrics"]["recall@5"] < 1.0
    workspace.run("evaluate", "--name", "item-knn")  # of the other protocol
    compared = workspace.run("compare-runs", *temporal)
    assert [run["name"] for run in compared["runs"]] == ["frozen-cache", "popularity"]
    assert [other["name"] for other in compared["left_out"]] == ["item-knn"]
    assert compared["left_out"][0]["protocol"] == "leave-last-out"
    assert compared["protocol"] == result["protocol"]
    error = workspace.fails("evaluate", *BASE)
    assert "this protocol's is 'leave-last-out'" in error["error"]


def test_users_without_a_history_and_withdrawn_items_are_counted(workspace):
    """In the checkerboard one user follows another in time: the last ones have no event before the test."""
    items = pl.read_csv(workspace.data("items"))
    items.with_columns(available=pl.col("item_id") != "i3").write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    result = workspace.run("evaluate", "--name", "popularity", "--protocol", "temporal")
    counts = result["counts"]
    assert counts["users"] == 7  # 72 of 720 events, 12 each, and the end of one before
    assert counts["empty_histories"] == 6
    assert result["slices"]["history 0"]["users"] == 6
    assert counts["candidates"] == 23
    events = pl.read_csv(workspace.data("events")).sort("timestamp").tail(72)
    assert counts["misses"]["unavailable"] == events.filter(item_id="i3").height > 0
    assert result["slices"]["history 0"]["recall@10"] > 0


def test_items_that_the_snapshot_lacks_leave_an_empty_history_and_a_miss(workspace, embed_here):
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    workspace.run("train-user", *BASE, "--set", "train.epochs=1")
    items, events = (pl.read_csv(workspace.data(name)) for name in ("items", "events"))
    new = pl.DataFrame({"item_id": ["n0", "n1", "n2"], "title": ["The red 9"] * 3, "year": ["9"] * 3})
    pl.concat([items.cast(pl.String), new]).write_csv(workspace.data("items"))
    rows = [("new", f"n{n}", 1_700_000_000_000 + n) for n in range(3)]
    rows += [("half", item, 1_700_000_000_000 + n) for n, item in enumerate(["n0", "n1", "i3"])]
    pl.concat([events, pl.DataFrame(rows, schema=events.schema, orient="row")]).write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    result = workspace.run("evaluate", *BASE)
    assert result["counts"]["empty_histories"] == 2
    assert result["counts"]["misses"] == {"absent": 1, "unavailable": 0, "repeated": 0}
    assert result["skipped_events"] == 4
    assert "cold: new in this snapshot" not in result["slices"]  # the first snapshot has none before it
    workspace.run("embed-items", *BASE)
    result = workspace.run("evaluate", *BASE)
    assert result["counts"]["misses"]["absent"] == 0
    assert result["slices"]["cold: new in this snapshot"]["users"] == 1


def test_a_repeated_target_is_a_miss_and_counted(workspace):
    events = pl.read_csv(workspace.data("events"))
    again = events.filter(user_id="u0").sort("timestamp").head(1).with_columns(timestamp=1_700_000_000_000)
    pl.concat([events, again.select(events.columns)]).write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    name = ("--name", "popularity")
    assert workspace.run("evaluate", *name)["counts"]["misses"]["repeated"] == 1
    allowed = workspace.run("evaluate", *name, "--set", "evaluate.repeats=true")
    assert allowed["counts"]["misses"]["repeated"] == 0
    assert allowed["protocol"] == "leave-last-out, repeats allowed"


def test_items_that_stage_one_saw_are_told_from_those_that_it_did_not(workspace, embed_here):
    workspace.run("prepare-data")
    workspace.run("tune-items")
    workspace.run("embed-items")
    workspace.run("train-user", "--set", "train.epochs=1")
    assert workspace.run("evaluate")["slices"]["cold: not in item tuning"]["users"] == 0
    items, events = (pl.read_csv(workspace.data(name)) for name in ("items", "events"))
    new = pl.DataFrame({"item_id": ["n0"], "title": ["The red 9"], "year": ["9"]})
    pl.concat([items.cast(pl.String), new]).write_csv(workspace.data("items"))
    row = pl.DataFrame([("u0", "n0", 1_700_000_000_000)], schema=events.schema, orient="row")
    pl.concat([events, row]).write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    workspace.run("embed-items")
    assert workspace.run("evaluate")["slices"]["cold: not in item tuning"]["users"] == 1


def test_a_target_that_the_item_llm_was_tuned_on_is_refused_or_left_out(workspace, embed_here):
    """Tuned on ten events of each user; asked, under another protocol, about the last six: four were seen."""
    times_of_all_users_alike(workspace)
    workspace.run("prepare-data")
    workspace.run("tune-items", "--set", "tune.train.max_steps=1", "--set", "tune.warmup_epochs=0")
    workspace.run("embed-items")
    start = "2020-09-13T{:02d}:26:00"  # the first event is at 13:26:40
    temporal = ["--protocol", "temporal"]
    times = {"valid_from": start.format(18), "test_from": start.format(19)}
    temporal += [word for key, time in times.items() for word in ("--set", f"evaluate.{key}={time}")]
    workspace.run("train-user", *temporal, "--set", "train.epochs=1")
    error = workspace.fails("evaluate", *temporal)
    assert error["kind"] == "Data"
    assert re.search(r"ItemTower \S+ was trained on 240 of 360 targets of this evaluation", error["error"])
    left = workspace.run("evaluate", *temporal, "--set", "evaluate.trained_targets=leave-out")
    assert (left["cutoff"], left["trained_targets"], left["counts"]["targets"]) == ("recorded", 240, 120)
    base = ("--name", "frozen-cache")
    workspace.run("embed-items", *base)
    workspace.run("train-user", *base, *temporal, "--set", "train.epochs=1")
    untuned = workspace.run("evaluate", *base, *temporal)
    assert (untuned["cutoff"], untuned["trained_targets"]) == ("unknown", 0)
    assert workspace.run("evaluate", "--name", "popularity", *temporal)["cutoff"] is None
    # not the same targets: never in one table
    error = workspace.fails("compare-runs", *temporal)
    assert error["kind"] == "Store"
    assert re.search(r"do not answer the same questions \((120 and 360|360 and 120) targets\)", error["error"])


def test_a_user_tower_that_saw_the_targets_is_refused(workspace, embed_here):
    """Trained on all of today's data but the last two; yesterday's data ends earlier, its targets were seen."""
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    workspace.run("train-user", *BASE, "--set", "train.epochs=1")
    events = pl.read_csv(workspace.data("events")).sort("user_id", "timestamp")
    events.filter(pl.int_range(pl.len()).over("user_id") < 9).write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    error = workspace.fails("evaluate", *BASE)
    assert re.search(r"UserTower \S+ was trained on 60 of 60 targets", error["error"])


def test_sampled_is_labelled_and_never_in_a_table_with_the_full_catalog(workspace):
    workspace.run("prepare-data")
    sampled = ("--protocol", "sampled", "--negatives", "5", "--set", "evaluate.metric=recall@5")
    for name in ("popularity", "item-knn"):
        workspace.run("evaluate", "--name", name, "--set", "evaluate.metric=recall@5")
    result = workspace.run("evaluate", "--name", "popularity", *sampled)
    assert result["protocol"] == "sampled 1+5 (seed 0), not comparable with the full catalog"
    assert result["metrics"]["hr@5"] == result["metrics"]["recall@5"] > 0.5
    assert set(result["metrics"]) == {"recall@1", "ndcg@1", "recall@5", "ndcg@5", "mrr", "hr@1", "hr@5"}
    assert result["lists"] == {}
    compared = workspace.run("compare-runs", *sampled)
    assert [run["name"] for run in compared["runs"]] == ["popularity"]
    assert [other["name"] for other in compared["left_out"]] == ["item-knn"]
    error = workspace.fails("evaluate", "--name", "popularity", "--protocol", "sampled", "--negatives", "5")
    assert "evaluate.metric = 'recall@10': among 5 negatives" in error["error"]


def test_candidates_by_release(workspace):
    """Two items appear with their first events: whoever is asked before these is not offered them."""
    items = pl.read_csv(workspace.data("items"))
    late = pl.col("item_id").str.slice(1).cast(pl.Int64) >= 22
    items.with_columns(seen_from=pl.when(late).then(pl.lit("2030-01-01")).otherwise(pl.lit("2000-01-01"))).write_csv(
        workspace.data("items")
    )
    workspace.run("prepare-data")
    name = ("--name", "popularity")
    plain = workspace.run("evaluate", *name)
    assert "is not known" in plain["candidates"]
    dated = workspace.run("evaluate", *name, "--set", "evaluate.released=seen_from")
    assert "seen_from" in dated["candidates"]
    assert dated["protocol"] == "leave-last-out, candidates by seen_from"
    # the first users are asked before anybody met i22 or i23: two candidates fewer, so no worse a rank
    assert dated["metrics"]["mrr"] > plain["metrics"]["mrr"]
    error = workspace.fails("evaluate", *name, "--set", "evaluate.released=nothing")
    assert "evaluate.released = 'nothing'" in error["error"]


def test_lists_tell_coverage_and_popularity_bias(workspace):
    workspace.run("prepare-data")
    popular = workspace.run("evaluate", "--name", "popularity")["lists"]
    similar = workspace.run("evaluate", "--name", "item-knn")["lists"]
    assert popular["coverage@10"] == popular["items_shown@10"] / 24
    # whoever likes red gets what is popular of blue too
    assert popular["popularity@10"] >= similar["popularity@10"]
    assert popular["popularity_lift@10"] >= similar["popularity_lift@10"]


def test_runs_that_differ_are_not_ranked():
    plain = {
        "run_id": "1",
        "name": "a",
        "protocol": "leave-last-out",
        "split": "test",
        "data": {"digest": "x"},
        "users": 3,
    }
    compare_runs.require_comparable([plain, plain | {"run_id": "2"}])
    for key, value in {"protocol": "sampled 1+20", "split": "valid", "data": {"digest": "y"}, "users": 4}.items():
        with pytest.raises(StoreError, match=f"differ in {key}: .*cannot be ranked in one table"):
            compare_runs.require_comparable([plain, plain | {"run_id": "2", key: value}])


def test_targets_of_a_user_lie_together():
    assert compare_runs.user_offsets(["a", "a", "b", "c", "c"]).tolist() == [0, 2, 3, 5]
    assert compare_runs.user_offsets([]).tolist() == [0]


class Tags(HTMLParser):
    """Every tag, and the attributes that would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_with_charts_and_nothing_from_elsewhere(workspace):
    workspace.run("prepare-data")
    workspace.run("train-user", "--name", "sasrec-id", "--set", "train.epochs=3")
    for name in ("popularity", "item-knn", "sasrec-id"):
        workspace.run("evaluate", "--name", name)
    compared = workspace.run("compare-runs")
    page = Path(compared["report"]).read_text()
    found = Tags()
    found.feed(page)
    assert found.open == []
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert found.fetched == []
    assert "width=device-width" in page
    assert not re.search(r"url\(|@import|https?:", page)
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", page)
    assert {"By popularity of the target", "By length of the history", "Samples", "Data"} <= set(headings)
    assert "Training: recall@10 on validation" in headings
    assert found.tags.count("svg") >= 5
    assert "nan" not in page.lower().replace("finance", "")
    assert compared["protocol"] in page
    behind = [run["behind"] for run in compared["runs"]]
    assert behind[0] is None
    for mean, low, high, p in behind[1:]:
        assert low <= mean <= high
        assert 0 < p <= 1
    values = np.array([run["slices"]["history 1-20"]["recall@10"] for run in compared["runs"]])
    assert (values >= 0).all()


def test_the_report_is_logged(workspace):
    from jobs.config import load_config
    from jobs.context import Context

    workspace.run("prepare-data")
    workspace.run("evaluate", "--name", "popularity")
    workspace.run("compare-runs")
    tracker = Context(load_config(str(workspace.toml), None, [])).tracker
    (run,) = tracker.find(kind="compare-runs")
    assert run.tags["protocol"] == "leave-last-out"
    files = list((workspace.store / "mlartifacts").rglob("report.html"))
    assert len(files) == 1
    assert files[0].read_text().startswith("<!doctype html>")
