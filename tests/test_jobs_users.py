"""embed-users and export-users: only what is new is computed, and nothing of two towers meets in one table."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from jobs import embed_users
from pipeline.cache import open_snapshot
from pipeline.store import Store
from pipeline.users import open_user_vectors, read_parts
from schemas.errors import EmbeddingError, StoreError
from schemas.records import Snapshot, UserVectors

BASE = ("--name", "frozen-cache")
SHORT = ("--set", "train.epochs=1")


@pytest.fixture
def trained(workspace, embed_here):
    workspace.run("prepare-data")
    workspace.run("embed-items", *BASE)
    workspace.run("train-user", *BASE, *SHORT)
    return workspace


def table(workspace, table_id: str):
    store = Store(workspace.store)
    users, vectors = open_user_vectors(store, store.get(UserVectors, table_id))
    return dict(zip(users, vectors, strict=True))


def test_only_users_with_something_new_are_computed(trained):
    first = trained.run("embed-users", *BASE)
    assert (first["users"], first["embedded"], first["without_history"]) == (60, 60, 0)
    again = trained.run("embed-users", *BASE)
    assert (again["table"], again["reused"], again["embedded"]) == (first["table"], True, 0)
    before = table(trained, first["table"])

    events = pl.read_csv(trained.data("events"))
    new = pl.DataFrame(
        [("u7", "i0", 1_700_000_000_000), ("new", "i3", 1_700_000_000_000)], schema=events.schema, orient="row"
    )
    pl.concat([events, new]).write_csv(trained.data("events"))
    trained.run("prepare-data")
    later = trained.run("embed-users", *BASE)
    assert (later["users"], later["embedded"], later["taken_over"]) == (61, 2, 59)
    after = table(trained, later["table"])
    assert {user for user in before if not np.array_equal(before[user], after[user])} == {"u7"}
    # what is taken over is what would be computed
    whole = trained.run("embed-users", *BASE, "--set", "users.window=7", "--set", "users.batch=3")
    assert whole["reused"]

    trained.run("train-user", *BASE, *SHORT, "--set", "train.seed=5")
    other = trained.run("embed-users", *BASE)
    assert (other["embedded"], other["taken_over"]) == (61, 0)


def test_an_edited_text_changes_the_users_who_met_the_item(trained):
    first = trained.run("embed-users", *BASE)
    items = pl.read_csv(trained.data("items"))
    items.with_columns(title=pl.when(item_id="i1").then(pl.lit("The blue 58")).otherwise("title")).write_csv(
        trained.data("items")
    )
    trained.run("prepare-data")
    trained.run("embed-items", *BASE)
    later = trained.run("embed-users", *BASE)
    assert later["embedded"] == 30  # the odd users met the blue items
    before, after = table(trained, first["table"]), table(trained, later["table"])
    assert all(np.array_equal(before[f"u{n}"], after[f"u{n}"]) for n in range(0, 60, 2))


def test_a_stored_vector_and_the_stored_items_give_the_recommendation(trained):
    made = table(trained, trained.run("embed-users", *BASE)["table"])
    trained.run("build-index", *BASE)
    store = Store(trained.store)
    items = open_snapshot(store, store.require(Snapshot))
    unit = items.vectors.astype(np.float32) / np.linalg.norm(items.vectors.astype(np.float32), axis=1, keepdims=True)
    events = pl.read_csv(trained.data("events"))
    for user in ("u3", "u8"):
        seen = events.filter(user_id=user)["item_id"].to_list()
        scores = unit @ made[user].astype(np.float32)
        scores[[items.item_ids.index(item) for item in seen]] = -np.inf
        found = trained.run("recommend", *BASE, "--user", user, "--k", "1")["items"]
        assert found[0]["item_id"] == items.item_ids[int(scores.argmax())]
        assert found[0]["score"] == pytest.approx(float(scores.max()), abs=2e-3)


@pytest.mark.slow
def test_ray_gives_the_same_table(workspace):
    """The only test here that starts Ray."""
    workspace.run("prepare-data")
    workspace.run("train-user", "--name", "sasrec-id", *SHORT)
    here = workspace.run("embed-users", "--name", "sasrec-id")
    on_ray = ["--set", "users.ray_from=1", "--set", "users.window=16"]
    copy = workspace.folder / "copy"
    workspace.store.rename(copy)
    for path in (copy / "user_vectors").glob("*"):
        path.rename(workspace.folder / "made-here")
    there = workspace.run("embed-users", "--name", "sasrec-id", *on_ray, "--set", f"store={copy}")
    assert there["embedded"] == here["embedded"] == 60
    tables = [
        pl.read_parquet(path / "users.parquet")
        for path in (workspace.folder / "made-here", copy / "user_vectors" / there["table"])
    ]
    assert tables[0].equals(tables[1])


def test_users_whose_items_the_snapshot_lacks_have_no_row(trained):
    events = pl.read_csv(trained.data("events"))
    items = pl.read_csv(trained.data("items")).cast(pl.String)
    pl.concat([items, pl.DataFrame([("n0", "The red 9", "9")], schema=items.schema, orient="row")]).write_csv(
        trained.data("items")
    )
    row = pl.DataFrame([("newcomer", "n0", 1_700_000_000_000)], schema=events.schema, orient="row")
    pl.concat([events, row]).write_csv(trained.data("events"))
    trained.run("prepare-data")  # and no embed-items
    result = trained.run("embed-users", *BASE)
    assert (result["users"], result["without_history"]) == (60, 1)


def test_an_export_is_float32_lists_with_its_origin(trained):
    made = trained.run("embed-users", *BASE)
    out = trained.folder / "users.parquet"
    result = trained.run("export-users", *BASE, "--out", str(out))
    assert (result["rows"], result["table"]) == (60, made["table"])
    frame = pl.read_parquet(out)
    assert frame["embedding"].dtype.inner == pl.Float32
    first = table(trained, made["table"])
    assert np.array_equal(frame["embedding"][0].to_numpy(), first[frame["user_id"][0]].astype(np.float32))
    assert pq.read_schema(out).metadata[b"user_vectors"].decode() == made["table"]
    error = trained.fails("export-users", *BASE, "--out", str(trained.folder / "no" / "x.parquet"))
    assert "there is no folder" in error["error"]


def test_damage_and_overflow_are_named(trained, monkeypatch):
    made = trained.run("embed-users", *BASE)
    store = Store(trained.store)
    record = store.get(UserVectors, made["table"])
    path = store.folder(record) / "users.parquet"
    whole = path.read_bytes()
    for place in (100, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StoreError, match="run embed-users again"):
            list(read_parts(store, record))
    with pytest.raises(EmbeddingError, match="1 user vectors are not finite in float16"):
        embed_users.encode_user_vectors(np.array([[1.0, 2.0], [1e6, 0.0]]))
