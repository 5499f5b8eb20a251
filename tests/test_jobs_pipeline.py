"""The commands, one after the other, on a board with a known answer; tiny models, no Ray but in one test."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import polars as pl
import pytest

from jobs import demo, tune_items
from jobs.cli import main
from pipeline.store import Store
from schemas.records import Snapshot


def test_every_recommender_solves_the_board(workspace, embed_here):
    prepared = workspace.run("prepare-data")
    assert (prepared["items"], prepared["users"], prepared["interactions"]) == (24, 60, 720)
    tuned = workspace.run("tune-items")
    assert tuned["items_encoded"] == tuned["items_unique"] > 0
    assert tuned["steps"] == 4
    for name in ("frozen-cache", "tuned-cache"):
        snapshot = workspace.run("embed-items", "--name", name)
        assert snapshot["embedded"] == 24
        assert workspace.run("train-user", "--name", name)["snapshot"] == snapshot["snapshot"]
    workspace.run("train-user", "--name", "sasrec-id")
    for name in ("item-knn", "sasrec-id", "frozen-cache", "tuned-cache"):
        result = workspace.run("evaluate", "--name", name)
        assert result["protocol"] == "leave-last-out"
        assert result["users"] == 60
        assert result["metrics"]["recall@1"] == 1.0, name
        assert result["ci95"]["recall@10"] == [1.0, 1.0]
    popularity = workspace.run("evaluate", "--name", "popularity")
    # the 11 items of the other colour and the one left of the own: colours are nothing to a count
    assert popularity["metrics"]["recall@1"] < 0.5
    compared = workspace.run("compare-runs")
    assert [run["name"] for run in compared["runs"]][-1] == "popularity"
    assert compared["runs"][-1]["behind"][0] == pytest.approx(1.0 - popularity["metrics"]["recall@10"])
    page = (workspace.store / "reports" / "board-leave-last-out-test.html").read_text()
    assert "popularity" in page
    assert "The red" in page
    for name, user in (("tuned-cache", "u0"), ("tuned-cache", "u1"), ("sasrec-id", "u0")):
        workspace.run("build-index", "--name", name)
        recommended = workspace.run("recommend", "--name", name, "--user", user, "--k", "3")["items"]
        # every item of the own colour is seen: whatever comes is of the other one, and is not the history
        assert {int(item["item_id"][1:]) % 2 for item in recommended} == {1 - int(user[1:]) % 2}
    by_items = workspace.run("recommend", "--items", "i0,i2,i4", "--k", "9")["items"]
    assert {int(item["item_id"][1:]) % 2 for item in by_items} == {0}
    assert all(item["title"].startswith("The red") for item in by_items)
    scores = [item["score"] for item in by_items]
    assert scores == sorted(scores, reverse=True)


def test_the_demo_reuses_what_is_finished(workspace, embed_here, monkeypatch):
    sets = ["--set", "train.epochs=1", "--set", "tune.warmup_epochs=0"]
    first = workspace.run("demo", *sets)
    assert [run["name"] for run in first["runs"]] != []
    assert {run["name"] for run in first["runs"]} == {
        "popularity", "item-knn", "sasrec-id", "frozen-cache", "tuned-cache"
    }  # fmt: skip
    before = workspace.published()
    assert workspace.run("demo", *sets) == first
    assert workspace.published() == before
    assert len(embed_here) == 2


def test_only_what_changed_is_embedded_and_ray_stays_out(workspace, embed_here):
    base = ("--set", "item_tower.use=base")
    workspace.run("prepare-data")
    first = workspace.run("embed-items", *base)
    assert (first["items"], first["embedded"], first["reused"]) == (24, 24, 0)
    again = workspace.run("embed-items", *base)
    assert (again["embedded"], again["reused"], again["snapshot"]) == (0, 24, first["snapshot"])
    items = pl.read_csv(workspace.data("items"))
    items.with_columns(title=pl.when(item_id="i3").then(pl.lit("The green 3")).otherwise("title")).write_csv(
        workspace.data("items")
    )
    workspace.run("prepare-data")
    third = workspace.run("embed-items", *base)
    assert (third["items"], third["embedded"], third["reused"], third["removed"]) == (24, 1, 23, 0)
    assert embed_here[1:] == [["title: The green 3, year: 3"]]
    items.with_columns(available=pl.col("item_id") != "i3").write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    fourth = workspace.run("embed-items", *base)
    assert fourth["embedded"] == 0
    assert len({first["snapshot"], third["snapshot"], fourth["snapshot"]}) == 3
    items.filter(pl.col("item_id") != "i5").write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    assert workspace.run("embed-items", *base)["removed"] == 0  # events still name it
    events = pl.read_csv(workspace.data("events"))
    events.filter(pl.col("item_id") != "i5").write_csv(workspace.data("events"))
    assert workspace.run("prepare-data")["removed"] == 1
    assert workspace.run("embed-items", *base)["removed"] == 1
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_an_item_that_left_the_feed_stays_for_histories_and_is_never_recommended(workspace, embed_here):
    workspace.toml.write_text(workspace.toml.read_text() + '[item_tower]\nuse = "base"\n')
    workspace.run("prepare-data")
    workspace.run("embed-items")
    items = pl.read_csv(workspace.data("items"))
    items.filter(pl.col("item_id") != "i4").with_columns(colour=pl.lit("x")).write_csv(workspace.data("items"))
    prepared = workspace.run("prepare-data")
    assert (prepared["items"], prepared["carried"], prepared["removed"]) == (24, 1, 0)
    assert prepared["rows_in"] == {"items": 23, "interactions": 720}
    assert workspace.run("prepare-data")["reused"]  # the carried item is carried again
    (catalog,) = workspace.store.glob(f"datasets/{prepared['dataset']}/items.parquet")
    row = pl.read_parquet(catalog).row(by_predicate=pl.col("item_id") == "i4", named=True)
    assert row == {"item_id": "i4", "title": "The red 4", "year": "4", "available": False, "colour": None}
    snapshot = workspace.run("embed-items")
    assert (snapshot["items"], snapshot["embedded"], snapshot["removed"]) == (24, 0, 0)
    (rows,) = workspace.store.glob(f"snapshots/{snapshot['snapshot']}/items.parquet")
    assert pl.read_parquet(rows).filter(pl.col("available").not_())["item_id"].to_list() == ["i4"]
    workspace.run("train-user", "--set", "train.epochs=1")
    workspace.run("build-index")
    for history in ("i0,i2,i6", "i4,i0"):
        found = workspace.run("recommend", "--items", history, "--k", "20")["items"]
        assert found
        assert "i4" not in {item["item_id"] for item in found}


def test_row_order_of_the_inputs_changes_nothing(workspace, embed_here):
    """A third of the events share their timestamp with the next one of the user."""
    events = pl.read_csv(workspace.data("events")).with_columns(pl.col("timestamp") // 3000 * 3000)
    results = []
    for seed in (None, 1, 2):
        name = f"order-{seed}"
        for table, rows in (("items", pl.read_csv(workspace.data("items"))), ("events", events)):
            rows = rows if seed is None else rows.sample(fraction=1, shuffle=True, seed=seed)
            rows.write_csv(workspace.folder / f"{table}-{name}.csv")
        sets = []
        for key, value in {
            "data.items": workspace.folder / f"items-{name}.csv",
            "data.interactions": workspace.folder / f"events-{name}.csv",
            "store": workspace.folder / name,
            "train.epochs": 1,
        }.items():
            sets += ["--set", f"{key}={value}"]
        prepared = workspace.run("prepare-data", *sets)
        workspace.run("embed-items", *sets, "--set", "item_tower.use=base")
        trained = workspace.run("train-user", "--name", "frozen-cache", *sets)
        figures = {"digest": prepared["digest"], "valid": trained["valid"]}
        for run in ("popularity", "item-knn", "frozen-cache"):
            figures[run] = workspace.run("evaluate", "--name", run, *sets)["metrics"]
        results.append(figures)
    assert results[0] == results[1] == results[2]


@pytest.fixture
def two_towers(workspace, embed_here):
    """Snapshots and user towers of the untuned and of the tuned item tower."""
    workspace.run("prepare-data")
    workspace.run("tune-items")
    made = {}
    for name in ("frozen-cache", "tuned-cache"):
        made[name] = workspace.run("embed-items", "--name", name)
        workspace.run("train-user", "--name", name, "--set", "train.epochs=1")
        workspace.run("build-index", "--name", name)
    return workspace, made["frozen-cache"], made["tuned-cache"]


def test_a_snapshot_of_another_tower_is_refused_with_both_fingerprints(two_towers):
    workspace, frozen, tuned = two_towers
    assert frozen["fingerprint"] != tuned["fingerprint"]
    before = workspace.published()
    for command in (["train-user"], ["evaluate"], ["build-index"], ["recommend", "--user", "u0"]):
        error = workspace.fails(command[0], *command[1:], "--snapshot", frozen["snapshot"])
        assert error["kind"] == "FingerprintMismatch"
        assert frozen["fingerprint"] in error["error"]
        assert tuned["fingerprint"] in error["error"]
    assert workspace.published() == before


def test_yesterdays_user_tower_reads_todays_snapshot_of_the_same_tower(two_towers):
    workspace, _, tuned = two_towers
    items = pl.read_csv(workspace.data("items"))
    new = pl.DataFrame(
        {"item_id": ["i24"], "title": ["The red 24"], "year": ["24"]}, schema=items.schema, strict=False
    )
    pl.concat([items, new]).write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    today = workspace.run("embed-items")
    assert (today["fingerprint"], today["embedded"]) == (tuned["fingerprint"], 1)
    workspace.run("build-index")
    found = workspace.run("recommend", "--items", "i0", "--k", "24")["items"]
    assert "i24" in {item["item_id"] for item in found}


def test_events_of_items_that_the_snapshot_lacks_are_skipped_and_counted(two_towers):
    workspace, _, _ = two_towers
    items, events = (pl.read_csv(workspace.data(name)) for name in ("items", "events"))
    new = pl.DataFrame({"item_id": ["i24"], "title": ["The red 24"], "year": ["24"]})
    pl.concat([items.cast(pl.String), new]).write_csv(workspace.data("items"))
    first = events.filter(user_id="u0").sort("timestamp").head(1)
    pl.concat([events, first.with_columns(item_id=pl.lit("i24"))]).write_csv(workspace.data("events"))
    workspace.run("prepare-data")
    assert workspace.run("evaluate")["skipped_events"] == 1
    assert workspace.run("recommend", "--user", "u0", "--k", "3")["skipped_events"] == 1
    assert workspace.run("recommend", "--user", "u1", "--k", "3")["skipped_events"] == 0


def test_a_changed_weight_of_a_tuned_tower_is_refused(two_towers):
    workspace, _, tuned = two_towers
    (weights,) = workspace.store.glob("item_towers/*/model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)
    assert workspace.run("embed-items")["embedded"] == 0  # nothing is embedded with it, so nobody looks at it
    items = pl.read_csv(workspace.data("items"))
    items.with_columns(title=pl.lit("The green ") + pl.col("item_id")).write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    before = workspace.published()
    error = workspace.fails("embed-items")
    assert workspace.published() == before
    assert error["kind"] == "FingerprintMismatch"
    assert tuned["fingerprint"] in error["error"]


def test_the_rate_falls_in_the_joint_stage_and_not_in_its_warm_up(workspace, monkeypatch):
    seen, fit = {}, tune_items.fit

    def recorded(step, groups, batches, validate, config, **rest):
        seen[rest["name"]] = config.decay
        return fit(step, groups, batches, validate, config, **rest)

    monkeypatch.setattr(tune_items, "fit", recorded)
    workspace.run("prepare-data")
    workspace.run("tune-items", "--set", "tune.train.decay=0.5")
    assert seen == {"tune-items warm-up": 0.0, "tune-items": 0.5}


def test_going_back_to_the_first_tower_costs_no_embedding(workspace, embed_here):
    workspace.run("prepare-data")
    workspace.run("tune-items", "--set", "tune.warmup_epochs=0")
    names = ("frozen-cache", "tuned-cache")
    made = {name: workspace.run("embed-items", "--name", name) for name in names}
    calls = len(embed_here)
    for name in names:
        again = workspace.run("embed-items", "--name", name)
        assert (again["embedded"], again["snapshot"]) == (0, made[name]["snapshot"])
        exported = workspace.run("export-items", "--name", name, "--out", str(workspace.folder / name))
        assert (exported["snapshot"], exported["fingerprint"]) == (made[name]["snapshot"], made[name]["fingerprint"])
    items = pl.read_csv(workspace.data("items"))
    items.filter(pl.col("item_id") != "i5").write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    for name in names:  # another content: new snapshots of each, of the vectors that are there
        assert workspace.run("embed-items", "--name", name)["embedded"] == 0
    assert len(embed_here) == calls
    frozen, tuned = (pl.read_parquet(workspace.folder / name) for name in names)
    assert frozen["item_id"].equals(tuned["item_id"])
    assert (np.array(frozen["embedding"].to_list()) != np.array(tuned["embedding"].to_list())).any(axis=1).all()

    items.with_columns(title=pl.lit(""), year=pl.lit("")).head(1).vstack(items[1:].cast(pl.String)).write_csv(
        workspace.data("items")
    )
    workspace.run("prepare-data")
    assert "1 of 24 items have no text" in workspace.fails("embed-items")["error"]
    workspace.capsys.readouterr()
    sets = ["template.empty_text=quarantine", "encoder.max_length=12"]
    options = [option for each in sets for option in ("--set", each)]
    assert main(["embed-items", "--config", str(workspace.toml), *options]) == 0  # what decides no vector is taken
    shown = workspace.capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["quarantined"] == 1
    assert "encoder.max_length = 12 is not in force: item tower" in shown.err
    assert "empty_text" not in shown.err
    assert len(embed_here) == calls


def test_a_copied_store_is_the_same_store(two_towers, tmp_path):
    workspace, _, tuned = two_towers
    copy = tmp_path / "elsewhere"
    shutil.copytree(workspace.store, copy)
    again = workspace.run("embed-items", "--set", f"store={copy}")
    assert (again["embedded"], again["snapshot"]) == (0, tuned["snapshot"])


def test_a_decoder_with_an_item_token_runs_the_same_path(workspace, embed_here, llama_folder):
    sets = ("--set", f"encoder.model={llama_folder}", "--set", "encoder.pooling=item_token")
    workspace.run("prepare-data")
    workspace.run("tune-items", *sets)
    workspace.run("embed-items", *sets)
    workspace.run("train-user", *sets, "--set", "user_tower.backbone=llm")
    assert workspace.run("evaluate", *sets)["metrics"]["recall@1"] == 1.0


def test_a_tower_of_text_and_ids_that_reads_times_solves_the_board_too(workspace, embed_here):
    sets = (
        "--set", "user_tower.backbone=hstu", "--set", "user_tower.features=text+id",
        "--set", "user_tower.timestamps=true", "--set", "train.sampling=mixed", "--set", "train.negatives=12",
        "--set", "train.epochs=16", "--set", "train.patience=16",
    )  # fmt: skip
    workspace.run("prepare-data")
    workspace.run("tune-items", *sets)
    workspace.run("embed-items", *sets)
    workspace.run("train-user", *sets)
    assert workspace.run("evaluate", *sets)["metrics"]["recall@1"] >= 0.95  # chance is 1 of 12
    assert "run hllm build-index" in workspace.fails("recommend", "--items", "i0,i2", *sets)["error"]
    workspace.run("build-index", *sets)
    for who in (("--items", "i0,i2,i4"), ("--user", "u1")):
        found = workspace.run("recommend", *who, "--k", "3", *sets)["items"]
        assert {int(item["item_id"][1:]) % 2 for item in found} == {0}
    items = pl.read_csv(workspace.data("items"))
    new = pl.DataFrame({"item_id": ["i24"], "title": ["The red 24"], "year": ["24"]})
    pl.concat([items.cast(pl.String), new]).write_csv(workspace.data("items"))
    workspace.run("prepare-data")
    workspace.run("embed-items", *sets)
    workspace.run("build-index", *sets)
    found = workspace.run("recommend", "--items", "i0,i2,i4", "--k", "10", *sets)["items"]
    assert "i24" in {item["item_id"] for item in found}  # never seen by the tower, known by its text


@pytest.mark.ray
def test_embed_items_on_a_real_ray_session(workspace, bert_folder):
    """Two workers, windows of 5 texts, one commit; then a worker's error arrives as one line."""
    base = ("--set", "item_tower.use=base", "--set", "embed.window=5", "--set", "embed.workers=2")
    workspace.run("prepare-data")
    first = workspace.run("embed-items", *base)
    assert first["embedded"] == 24
    assert len(list(workspace.store.glob("item_embeddings/_delta_log/*.json"))) == 3  # made, 24 rows, sealed
    assert workspace.run("embed-items", *base)["embedded"] == 0
    store = Store(workspace.store)
    assert store.require(Snapshot).items == 24
    before = workspace.published()
    model = workspace.folder / "broken"
    shutil.copytree(bert_folder, model)
    _poison(model)
    error = workspace.fails("embed-items", *base, "--set", f"encoder.model={model}")
    assert error["kind"] == "Gate"
    assert "not finite" in error["error"]
    assert workspace.published() == before


def _poison(model) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_the_steps_of_the_demo_are_the_picture():
    titles = [step.title for step in demo.STEPS]
    assert list(dict.fromkeys(titles)) == [
        "prepare-data", "evaluate", "train-user", "embed-items", "tune-items", "build-index"
    ]  # fmt: skip
