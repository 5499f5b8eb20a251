"""Bad input at the command line: one line, exit 1, nothing written; and usage, exit 2."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest

from jobs.cli import build_parser, main
from jobs.context import Context


def change(workspace, table: str, **columns) -> None:
    pl.read_csv(workspace.data(table)).with_columns(**columns).write_csv(workspace.data(table))


BAD_TABLES = {
    "missing file": (
        lambda ws: ws.data("items").unlink(),
        r"items.csv: no such file",
    ),
    "missing column": (
        lambda ws: pl.read_csv(ws.data("events")).drop("timestamp").write_csv(ws.data("events")),
        r"events.csv: columns ['timestamp'] are missing; found ['user_id', 'item_id']",
    ),
    "wrong type": (
        lambda ws: change(ws, "events", timestamp=pl.lit("soon")),
        r"events.csv: 720 of 720 rows rejected, more than data.reject_share = 0.01; first row 1: timestamp is not",
    ),
    "header alone": (
        lambda ws: ws.data("items").write_text("item_id,title,year\n"),
        r"items.csv: holds no rows",
    ),
    "empty file": (
        lambda ws: ws.data("items").write_text(""),
        r"items.csv: cannot be read",
    ),
    "catalog of other items": (
        lambda ws: change(ws, "items", item_id=pl.lit("x") + pl.col("item_id")),
        r"events.csv: none of its 720 rows has an item of",
    ),
    "ragged rows": (
        lambda ws: ws.data("items").write_text("item_id,title,year\na,b,c,d,e\n"),
        r"items.csv: 1 of 1 rows rejected, more than data.reject_share = 0.01; first row 1: 5 cells, expected 3: a,b",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_one_line_and_nothing_is_written(workspace, case):
    spoil, message = BAD_TABLES[case]
    spoil(workspace)
    error = workspace.fails("prepare-data")
    assert error["kind"] == "Data"
    assert message in error["error"]
    assert not workspace.store.exists()


def test_a_corrupt_parquet_file_is_one_line(workspace):
    path = workspace.folder / "items.parquet"
    pl.read_csv(workspace.data("items")).write_parquet(path)
    data = path.read_bytes()
    for spoilt in (data[: len(data) // 2], b"not parquet at all", b""):
        path.write_bytes(spoilt)
        error = workspace.fails("prepare-data", "--set", f"data.items={path}")
        assert f"{path}: cannot be read" in error["error"]
    assert not workspace.store.exists()


def test_items_without_text_under_both_policies(workspace, embed_here):
    change(workspace, "items", title=pl.when(pl.col("item_id") != "i7").then("title"), year=pl.lit(None))
    workspace.run("prepare-data")
    before = workspace.published()
    base = ("--set", "item_tower.use=base")
    for command in ("tune-items", "embed-items"):
        error = workspace.fails(command, *base)
        assert "1 of 24 items have no text in ['title', 'year'], first ['i7']" in error["error"]
    assert workspace.published() == before
    quarantine = (*base, "--set", "template.empty_text=quarantine")
    result = workspace.run("embed-items", *quarantine)
    assert (result["items"], result["quarantined"]) == (23, 1)
    (rows,) = workspace.store.glob("snapshots/*/quarantine.parquet")
    assert pl.read_parquet(rows)["item_id"].to_list() == ["i7"]
    # its events are left out of training, and as a target it is a miss, not a hole in the count of users
    workspace.run("train-user", *quarantine)
    assert workspace.run("evaluate", *quarantine)["users"] == 60


@pytest.mark.parametrize("command", ["tune-items", "embed-items", "train-user", "evaluate", "compare-runs"])
def test_a_command_before_its_input_names_the_command_that_makes_it(workspace, command):
    error = workspace.fails(command)
    assert error["kind"] == "NotFound"
    assert "run hllm prepare-data first" in error["error"]
    assert workspace.published() == set()


def test_what_comes_next_is_named_step_by_step(workspace, embed_here):
    workspace.run("prepare-data")
    assert "run hllm tune-items first" in workspace.fails("embed-items")["error"]
    base = ("--set", "item_tower.use=base", "--set", "train.epochs=1")
    assert "run hllm embed-items first" in workspace.fails("train-user", *base)["error"]
    workspace.run("embed-items", *base)
    assert "run hllm train-user first" in workspace.fails("evaluate", *base)["error"]
    assert "run hllm evaluate first" in workspace.fails("compare-runs", *base)["error"]
    workspace.run("train-user", *base)
    assert "run hllm build-index first" in workspace.fails("recommend", *base, "--user", "u0")["error"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the first test leaves a copy of its store for the others."""
    return tmp_path_factory.mktemp("served") / "store"


@pytest.fixture
def served(workspace, embed_here, made):
    """A workspace whose untuned cache can recommend."""
    workspace.toml.write_text(workspace.toml.read_text() + '[item_tower]\nuse = "base"\n')
    if made.exists():
        shutil.copytree(made, workspace.store)
        return workspace
    workspace.run("prepare-data")
    workspace.run("embed-items")
    workspace.run("train-user", "--set", "train.epochs=1")
    workspace.run("build-index")
    shutil.copytree(workspace.store, made)
    return workspace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "--user", "u0", "--blocklist", "none.txt"], "--blocklist none.txt cannot be read"),
        (["build-index", "--set", "index.kind=tree"], "index.kind: Input should be 'auto', 'flat'"),
        (["build-index", "--set", "index.kind=ivf-pq"], "24 vectors, it is trained on 9984 at least; use flat"),
        (["recommend", "--items", "i0,nothing"], "--items: ['nothing'] are not in the catalog"),
        (["recommend", "--items", ""], "are not in the catalog"),
        (["recommend", "--user", "u0", "--k", "25"], "--k 25: the catalog has 24 items"),
        (["recommend", "--user", "u0", "--k", "0"], "--k 0: ask for at least one item"),
        (["recommend", "--user", "u0", "--snapshot", "2001"], "no snapshots called '2001'"),
        (["evaluate", "--set", "evaluate.ks=[10,25]"], "evaluate.ks asks for 25, the catalog has 24 items"),
        (["evaluate", "--set", "evaluate.ks=[0]"], "greater than 0"),
        (["evaluate", "--set", "evaluate.metric=recall@7"], "evaluate: Value error, metric 'recall@7' is not among"),
        (["train-user", "--set", "evaluate.ks=[5]"], "metric 'recall@10' is not among ['recall@5', 'ndcg@5', 'mrr']"),
        (["evaluate", "--name", "other"], "holds none of name other; run hllm train-user first"),
        (["evaluate", "--name", "popularity", "--snapshot", "x"], "popularity reads no snapshot"),
        (["train-user", "--name", "sasrec-id", "--snapshot", "x"], "such a tower reads no snapshot"),
        (["embed-items", "--set", "template.fields=['titel']"], "names 'titel', the catalog has ['title', 'year']"),
        (["embed-items", "--set", "encoder.model=/nowhere"], "encoder.model = '/nowhere' cannot be loaded"),
        (["embed-items", "--set", "item_tower.use=mine"], "no item_towers called 'mine'"),
        (["train-user", "--set", "user_tower.heads=3"], "is not a multiple of user_tower.heads = 3"),
        (["train-user", "--set", "trian.epochs=3"], "trian: Extra inputs are not permitted"),
        (["train-user", "--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["train-user", "--name", "popularity"], "--name popularity is a baseline's"),
        (["evaluate", "--negatives", "20"], "--negatives is for --protocol sampled"),
        (["embed-items", "--set", "encoder.max_length=65"], "has positions for 64 tokens of text"),
        (["snapshots", "clean", "--snapshot", "2001"], "snapshots clean takes no --snapshot"),
        (["snapshots", "list", "--snapshot", "2001"], "snapshots list takes no --snapshot"),
        (["releases", "rollback", "--release", "2001"], "`releases promote --release 2001` to another one"),
        (["prepare-data", "--set", "store="], "store: String should have at least 1 character"),
        (["prepare-data", "--set", "store=/dev/null/x"], "/dev/null/x"),
        (["export-items", "--out", "/tmp"], "--out /tmp is a folder; name a file in it"),
    ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(served, arguments, message):
    before = served.published()
    assert message in served.fails(*arguments)["error"]
    assert served.published() == before


@pytest.mark.parametrize("command", ["snapshots list", "releases list", "forget-user --user u1"])
def test_a_store_that_is_not_there_is_not_made_by_looking_into_it(workspace, command):
    assert f"there is no store at {workspace.store}" in workspace.fails(command)["error"]
    assert not workspace.store.exists()


def test_too_few_events_to_evaluate(served):
    events = pl.read_csv(served.data("events"))
    events.group_by("user_id", maintain_order=True).head(2).write_csv(served.data("events"))
    served.run("prepare-data")
    for command in ("evaluate", "train-user"):
        assert "needs users with three events or more" in served.fails(command)["error"]


def damage(served, pattern: str) -> None:
    for path in served.store.glob(pattern):
        path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("item_embeddings/*/part-*.parquet", ["evaluate"]),
        ("item_embeddings/*/part-*.parquet", ["train-user", "--name", "again"]),
        ("snapshots/*/items.parquet", ["evaluate"]),
        ("snapshots/*/record.json", ["evaluate"]),
        ("datasets/*/items.parquet", ["embed-items"]),
        ("datasets/*/interactions.parquet", ["evaluate"]),
        ("user_towers/*/user_tower.safetensors", ["evaluate"]),
        ("indexes/*/index.faiss", ["recommend", "--user", "u0"]),
        ("indexes/*/items.parquet", ["recommend", "--user", "u0"]),
    ],
)
def test_a_damaged_file_of_the_store_is_named(served, pattern, command):
    damage(served, pattern)
    shutil.rmtree(served.store / "matrices")  # a local copy of the vectors would serve without the table
    error = served.fails(*command)
    assert error["kind"] == "Store"
    assert pattern.split("/")[0] in error["error"]


def test_usage_is_exit_2_and_help_lists_every_command(capsys):
    for arguments in (
        [],
        ["nothing"],
        ["recommend"],
        ["recommend", "--user", "1", "--items", "2"],
        ["evaluate", "--split", "x"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    capsys.readouterr()
    text = build_parser().format_help()
    for command in (
        "prepare-data",
        "tune-items",
        "embed-items",
        "train-user",
        "build-index",
        "evaluate",
        "recommend",
    ):
        assert command in text


def test_what_is_not_known_keeps_its_traceback(workspace, monkeypatch):
    def fail(_):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(Context, "dataset_record", property(fail))
    with pytest.raises(RuntimeError, match="a defect of ours"):
        main(["embed-items", "--config", str(workspace.toml)])


def test_the_last_line_is_one_json_object(workspace, capsys):
    capsys.readouterr()
    assert main(["prepare-data", "--config", str(workspace.toml)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert json.loads(lines[-1])["items"] == 24
