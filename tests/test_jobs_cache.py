"""embed-items as a user meets it: --plan, --allow-full, poison, chunks; snapshots and export-items."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import polars as pl
import pytest

from item_tower.encoder import ItemEncoder
from jobs import bench_nights, embed_worker
from jobs.config import load_config
from jobs.context import Context
from jobs.embed_ledger import MAX_DEATHS, MAX_IDLE, Ledger
from pipeline.cache import open_snapshot
from pipeline.store import Store
from schemas.errors import EmbeddingError
from schemas.records import Snapshot

BASE = ("--set", "item_tower.use=base")


def retitle_only(workspace, **titles: str) -> None:
    items = pl.read_csv(workspace.data("items"))
    title = pl.col("item_id").replace_strict(titles, default=pl.col("title"), return_dtype=pl.String)
    items.with_columns(title=title).write_csv(workspace.data("items"))


def retitle(workspace, **titles: str) -> None:
    retitle_only(workspace, **titles)
    workspace.run("prepare-data")


def test_a_plan_says_what_a_run_then_does(workspace, embed_here):
    workspace.run("prepare-data")
    plan = workspace.run("embed-items", "--plan", *BASE)
    assert (plan["embedded"], plan["reused"], plan["estimated_seconds"]) == (24, 0, None)
    assert embed_here == []
    assert not (workspace.store / "item_embeddings").exists()
    done = workspace.run("embed-items", *BASE)
    assert (done["embedded"], done["tokens"]) == (24, plan["tokens"])
    retitle(workspace, i3="The green 3")
    plan = workspace.run("embed-items", "--plan", *BASE)
    assert (plan["embedded"], plan["reused"]) == (1, 23)
    speed = Store(workspace.store).require(Snapshot).tokens_per_second
    assert plan["estimated_seconds"] == round(plan["tokens"] / speed, 1)
    workspace.run("embed-items", *BASE)
    retitle(workspace, i4="The green 4")  # of two runs the larger says how fast it goes
    plan = workspace.run("embed-items", "--plan", *BASE)
    assert plan["estimated_seconds"] == round(plan["tokens"] / speed, 1)


def test_most_of_a_catalog_again_needs_a_word(workspace, embed_here):
    limits = ("--set", "embed.full_from=5", "--set", "embed.max_share=0.3", *BASE)
    workspace.run("prepare-data")
    workspace.run("embed-items", *limits)  # the first time is no question
    retitle(workspace, **{f"i{n}": f"green {n}" for n in range(9)})
    before = workspace.published()
    error = workspace.fails("embed-items", *limits)
    assert error["kind"] == "Config"
    assert "9 of 24 texts have no vector" in error["error"]
    assert "if so many texts were meant to change" in error["error"]
    assert "--allow-full" in error["error"]
    assert workspace.published() == before
    assert workspace.run("embed-items", "--plan", *limits)["embedded"] == 9
    assert workspace.run("embed-items", "--allow-full", *limits)["embedded"] == 9


@pytest.fixture
def poison(monkeypatch):
    """The model cannot embed the word 'kind' (token 4 + 4)."""
    forward = ItemEncoder.forward

    def model(self, ids, mask):
        if (ids == 8).any():
            raise RuntimeError("cannot")
        return forward(self, ids, mask)

    monkeypatch.setattr(ItemEncoder, "forward", model)


def test_a_poison_item_is_left_out_and_remembered(workspace, embed_here, poison):
    limits = ("--set", "gates.max_failed=0.1", *BASE)
    workspace.run("prepare-data")
    retitle(workspace, i3="kind of", i5="kind of")
    error = workspace.fails("embed-items", *BASE)
    assert error["kind"] == "Gate"
    assert "RuntimeError: cannot" in error["error"]
    done = workspace.run("embed-items", *limits)
    assert (done["items"], done["quarantined"]) == (22, 2)
    store = Store(workspace.store)
    record = store.require(Snapshot)
    left = pl.read_parquet(store.folder(record) / "quarantine.parquet")
    assert left["item_id"].to_list() == ["i3", "i5"]
    assert left["reason"].unique().to_list() == ["RuntimeError: cannot"]
    assert not {"i3", "i5"} & set(open_snapshot(store, record).item_ids)
    calls = len(embed_here)
    again = workspace.run("embed-items", *limits)
    assert (again["snapshot"], again["embedded"], len(embed_here)) == (done["snapshot"], 0, calls)
    workspace.fails("embed-items", "--set", "embed.retry_failed=true", "--set", "gates.max_failed=0", *BASE)
    assert embed_here[-1] == ["title: kind of, year: 3", "title: kind of, year: 5"]


def add_item(workspace, item_id: str, title: str, year: str) -> None:
    items = pl.read_csv(workspace.data("items"), infer_schema=False)
    added = pl.DataFrame({"item_id": [item_id], "title": [title], "year": [year]})
    pl.concat([items, added]).write_csv(workspace.data("items"))
    workspace.run("prepare-data")


def test_new_items_that_are_left_out_are_in_a_snapshot_and_not_tried_again(workspace, embed_here, poison):
    limits = ("--set", "gates.max_failed=0.1", "--set", "template.empty_text=quarantine", *BASE)
    workspace.run("prepare-data")
    first = workspace.run("embed-items", *BASE)  # the policy decides no vector
    add_item(workspace, "zz", "kind of", "1")
    second = workspace.run("embed-items", *limits)
    assert (second["reused"], second["fingerprint"]) == (24, first["fingerprint"])
    assert (second["items"], second["quarantined"], second["snapshot"] == first["snapshot"]) == (24, 1, False)
    calls = len(embed_here)
    assert workspace.run("embed-items", *limits)["snapshot"] == second["snapshot"]
    add_item(workspace, "zzz", "", "")
    assert workspace.run("embed-items", "--plan", *limits)["quarantined"] == 2
    third = workspace.run("embed-items", *limits)
    assert (third["items"], third["embedded"], third["quarantined"], len(embed_here)) == (24, 0, 2, calls)
    store = Store(workspace.store)
    left = pl.read_parquet(store.folder(store.require(Snapshot)) / "quarantine.parquet")
    assert sorted(left["item_id"]) == ["zz", "zzz"]
    shown = workspace.run("snapshots", "show", "--snapshot", third["snapshot"])
    assert {row["item_id"]: row["reason"] for row in shown["left_out"]} == {
        "zz": "RuntimeError: cannot", "zzz": "no text in the template's fields"
    }  # fmt: skip


def test_failures_of_many_nights_add_up_to_the_limit(workspace, embed_here, poison):
    limits = ("--set", "gates.max_failed=0.1", *BASE)
    workspace.run("prepare-data")
    for night in range(2):
        retitle(workspace, **{f"i{night}": "kind of"})
        assert workspace.run("embed-items", *limits)["quarantined"] == night + 1
    retitle(workspace, i2="kind of")
    error = workspace.fails("embed-items", *limits)["error"]
    assert "gate failed: 0.125 is above 0.1" in error
    assert "RuntimeError: cannot" in error


def test_a_catalog_of_which_nothing_is_left_is_one_line(workspace, embed_here, poison):
    retitle(workspace, **{f"i{n}": "kind of" for n in range(24)})
    error = workspace.fails("embed-items", "--set", "gates.max_failed=1", *BASE)
    assert error["kind"] == "Data"
    assert "all 24 items are left out, 'i0' for: RuntimeError: cannot" in error["error"]
    retitle(workspace, **{f"i{n}": "" for n in range(24)})
    empty = ("--set", "template.empty_text=quarantine", "--set", 'template.fields=["title"]', *BASE)
    assert "'i0' for: no text in the template's fields" in workspace.fails("embed-items", *empty)["error"]


def test_finished_chunks_are_kept_when_a_later_window_fails(workspace, embed_here, poison):
    small = ("--set", "embed.window=6", "--set", "embed.commit_texts=6", *BASE)
    workspace.run("prepare-data")
    retitle(workspace, i9="kind of")  # in the last window
    workspace.fails("embed-items", "--set", "gates.max_failed=0", *small)
    plan = workspace.run("embed-items", "--plan", *small)
    assert plan["embedded"] == 6
    retitle(workspace, i9="green 9")
    assert workspace.run("embed-items", *small)["embedded"] == 6


def test_stored_vectors_that_come_out_different_stop_the_run(workspace, embed_here, monkeypatch):
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    retitle(workspace, i3="The green 3")
    forward, rng = ItemEncoder.forward, np.random.default_rng(0)

    def drifted(self, ids, mask):
        found = forward(self, ids, mask)
        return found * (1 + 0.3 * found.new_tensor(rng.normal(size=found.shape)))

    before = workspace.published()
    with monkeypatch.context() as patch:
        patch.setattr(ItemEncoder, "forward", drifted)
        error = workspace.fails("embed-items", *BASE)
    assert error["kind"] == "Gate"
    assert "gate agreement: 0." in error["error"]
    assert workspace.published() == before
    assert workspace.run("embed-items", *BASE)["embedded"] == 1


def test_stored_vectors_are_compared_however_many_nights_their_files_are_of(workspace, embed_here, monkeypatch):
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    assert "agreement" not in Store(workspace.store).require(Snapshot).gates  # of nothing
    for night in range(9):
        retitle(workspace, i3=f"green {night}")
        workspace.run("embed-items", *BASE)
    assert Store(workspace.store).require(Snapshot).gates["agreement"] > 0.999
    retitle(workspace, i3="The green 3")
    forward = ItemEncoder.forward
    with monkeypatch.context() as patch:
        patch.setattr(ItemEncoder, "forward", lambda self, ids, mask: forward(self, ids, mask).roll(1, dims=1))
        assert "gate agreement: " in workspace.fails("embed-items", *BASE)["error"]
        patch.setattr(ItemEncoder, "forward", lambda self, ids, mask: 1 / 0)
        error = workspace.fails("embed-items", *BASE)
    assert error["kind"] == "Data"
    assert "stored vector fail in the item tower tonight, that of item 'i0' with: ZeroDivisionError" in error["error"]


def test_snapshots_are_listed_shown_and_cleaned(workspace, embed_here):
    workspace.run("prepare-data")
    first = workspace.run("embed-items", *BASE)
    retitle(workspace, i3="The green 3")
    second = workspace.run("embed-items", *BASE)
    now = ("--set", "retention.days=0", "--set", "retention.newest=1", "--set", "retention.job_hours=0", *BASE)
    listed = workspace.run("snapshots", "list", *now)["snapshots"]
    assert [(line["id"], line["expired"]) for line in listed] == [
        (first["snapshot"], True),
        (second["snapshot"], False),
    ]
    assert workspace.run("snapshots", "show", "--snapshot", second["snapshot"])["checked"] == 24
    assert workspace.run("snapshots", "clean")["dropped"] == []
    cleaned = workspace.run("snapshots", "clean", *now)
    assert (cleaned["dropped"], cleaned["rows_dropped"]) == ([first["snapshot"]], 1)
    assert workspace.run("snapshots", "show", "--snapshot", second["snapshot"])["checked"] == 24
    error = workspace.fails("snapshots", "show", "--snapshot", first["snapshot"])
    assert error["kind"] == "NotFound"
    assert "--snapshot" in workspace.fails("snapshots", "show")["error"]


def test_items_are_exported_as_float32_lists(workspace, embed_here, tmp_path):
    workspace.run("prepare-data")
    made = workspace.run("embed-items", *BASE)
    out = tmp_path / "out.parquet"
    done = workspace.run("export-items", "--out", str(out), *BASE)
    assert (done["rows"], done["snapshot"]) == (24, made["snapshot"])
    store = Store(workspace.store)
    matrix = open_snapshot(store, store.require(Snapshot))
    table = pl.read_parquet(out)
    assert table["item_id"].to_list() == matrix.item_ids
    assert np.array_equal(np.array(table["embedding"].to_list()), matrix.vectors.astype(np.float32))
    assert "make it first" in workspace.fails("export-items", "--out", str(tmp_path / "no" / "x"), *BASE)["error"]


def test_a_worker_compiles_where_the_configuration_says_so(workspace, embed_here, monkeypatch):
    """Nothing is generated here: what a compiled model computes, a GPU's test says."""
    compiled = []
    monkeypatch.setattr(embed_worker, "compile_layers", compiled.append)
    workspace.run("prepare-data")
    first = workspace.run("embed-items", *BASE)
    assert not compiled
    workspace.run("embed-items", "--set", "embed.compile=true", *BASE)
    assert not compiled  # it decides no vector, so nothing is embedded again
    retitle(workspace, i3="The green 3")
    done = workspace.run("embed-items", "--set", "embed.compile=true", *BASE)
    assert done["fingerprint"] == first["fingerprint"]
    assert [type(model).__name__ for model in compiled] == ["BertModel"]


def test_the_nights_of_the_bench_embed_all_nothing_and_what_changed(workspace, embed_here, monkeypatch):
    for name in ("CHANGED", "NEW", "REMOVED"):
        monkeypatch.setattr(bench_nights, name, 0.1)
    workspace.run("prepare-data")
    context = Context(load_config(str(workspace.toml), None, ['item_tower.use="base"']))
    nights = bench_nights.run_nights(context, str(workspace.toml), ["embed.full_from=50"])
    assert [nights[name]["embedded"] for name in ("full", "nothing", "delta")] == [24, 0, 4]
    assert (nights["delta"]["items"], nights["delta"]["removed"]) == (24, 2)
    assert not list(workspace.folder.glob("store-bench*"))


def test_the_ledger_halves_what_workers_die_of_until_one_text_is_left():
    ledger, deaths = Ledger(), 0
    poison = 13

    def window() -> list[int]:
        """One life of a worker; returns the rows it was told not to try, or raises when it dies."""
        groups, dead = ledger.begin(7)
        rest = [n for n in range(16) if n not in dead and not any(n in group for group in groups)]
        for batch in [*groups, rest]:
            ledger.attempt(7, batch, 0)
            if poison in batch:
                raise InterruptedError
        ledger.end(7)
        return dead

    while True:
        try:
            assert window() == [poison]
            break
        except InterruptedError:
            deaths += 1
    assert deaths == 6  # 16, 8, 4, 2, alone, alone
    assert ledger.begin(7) == ([], [poison])
    assert ledger.begin(8) == ([], [])
    for _ in range(MAX_DEATHS - deaths):
        ledger.attempt(9, [1, 2], 0)
        ledger.begin(9)
    ledger.attempt(9, [1, 2], 0)
    with pytest.raises(EmbeddingError, match=f"{MAX_DEATHS} workers died"):
        ledger.begin(9)


def test_of_streams_only_what_ran_alone_is_blamed():
    ledger = Ledger()
    for _ in range(2):  # beside the killer, a batch of one text that is innocent
        assert ledger.begin(3)[1] == []
        ledger.attempt(3, [1, 2, 3, 4], 0)
        ledger.attempt(3, [5], 1)
    assert ledger.begin(3) == ([[1, 2], [3, 4], [5]], [])
    ledger.attempt(3, [1, 2], 0)
    ledger.attempt(3, [3, 4], 0)
    assert ledger.begin(3) == ([[3], [4]], [])
    for _ in range(2):
        ledger.attempt(3, [3], 0)
        groups, dead = ledger.begin(3)
    assert (groups, dead) == ([], [3])
    ledger.attempt(3, [1, 2, 4], 0)
    ledger.attempt(3, [5], 1)
    done = ledger.progress()
    ledger.end(3)
    assert ledger.progress() == done + 4


def test_workers_that_die_before_their_first_text_end_the_run():
    """For want of memory while they load the model, or of a text in the tokenizer, which is found like any other."""
    ledger = Ledger()
    for _ in range(MAX_IDLE):
        assert ledger.begin(0) == ([], [])
        assert ledger.begin(7) == ([], [])
        ledger.end(7)  # another window goes well
    with pytest.raises(EmbeddingError, match=r"3 workers died before their first text.*more memory"):
        ledger.begin(0)
    rows, tried = list(range(100)), 0
    ledger = Ledger()
    groups, dead = ledger.begin(0)
    while not dead:
        for group in [*groups, [row for row in rows if not any(row in group for group in groups)]]:
            ledger.tokenise(0, group)
            if 42 in group:
                break
        tried += 1
        groups, dead = ledger.begin(0)
    assert dead == [42]
    assert tried <= 9
    ledger.tokenise(0, [])
    assert ledger.progress() == 0  # tokenised is not computed
    ledger.attempt(0, [1, 2], 0)
    ledger.end(0)
    assert ledger.progress() == 2


def test_what_a_gate_refused_is_refused_again(workspace, embed_here):
    """The texts are committed by then: the second run embeds none of them."""
    limits = ("--set", "encoder.max_length=4", "--set", "gates.max_collapsed=1", *BASE)
    workspace.run("prepare-data")
    for _ in range(2):
        error = workspace.fails("embed-items", *limits, "--set", "gates.max_truncated=0.1")
        assert error["kind"] == "Gate"
        assert "gate truncated: 1 is above 0.1" in error["error"]
    assert sum(map(len, embed_here)) == 24
    workspace.run("embed-items", *limits)
    assert Store(workspace.store).require(Snapshot).gates["truncated"] == 1


def test_a_damaged_catalog_is_named_and_prepared_anew(workspace, embed_here):
    """Every bit of its texts is covered, and the way out that the message names is one."""
    workspace.run("prepare-data")
    (path,) = workspace.store.glob("datasets/*/items.parquet")
    whole = path.read_bytes()
    data = bytearray(whole)
    data[data.find(b"red ")] ^= 0x10
    path.write_bytes(data)
    error = workspace.fails("embed-items", *BASE)["error"]
    assert "items.parquet cannot be read" in error
    assert "remove its folder and run prepare-data again" in error
    path.write_bytes(whole[:-30])
    retitle_only(workspace, i3="The green 3")
    assert "remove its folder and run prepare-data again" in workspace.fails("prepare-data")["error"]
    shutil.rmtree(path.parent)
    workspace.run("prepare-data")
    assert workspace.run("embed-items", *BASE)["embedded"] == 24


def _die_of_kind() -> None:
    """In every Ray worker: the model takes its process along when it reads the word 'kind'."""
    import os

    from item_tower.encoder import ItemEncoder

    forward = ItemEncoder.forward

    def model(self, ids, mask):
        if (ids == 8).any():
            os._exit(139)
        return forward(self, ids, mask)

    ItemEncoder.forward = model


def _die_reading_kind() -> None:
    """In every Ray worker: the tokenizer takes its process along."""
    import os

    from item_tower.encoder import ItemEncoder

    tokenise = ItemEncoder.tokenise

    def split(self, texts):
        if any("kind" in text for text in texts):
            os._exit(139)
        return tokenise(self, texts)

    ItemEncoder.tokenise = split


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.parametrize("death", [_die_of_kind, _die_reading_kind])
def test_a_text_that_kills_its_worker_is_left_out(workspace, death):
    import ray

    workspace.run("prepare-data")
    retitle(workspace, i7="kind of")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": death},
    )  # fmt: skip
    try:
        done = workspace.run("embed-items", "--set", "gates.max_failed=0.1", "--set", "embed.window=12", *BASE)
    finally:
        ray.shutdown()
    assert (done["items"], done["quarantined"]) == (23, 1)
    store = Store(workspace.store)
    left = pl.read_parquet(store.folder(store.require(Snapshot)) / "quarantine.parquet")
    assert left.select("item_id", "reason").row(0) == ("i7", "two workers died while embedding it")
