"""Forgotten users: found in every form in which a row may name them, kept out of the next delivery."""

from __future__ import annotations

import shutil

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket_server import serve
from conftest import checkerboard

from pipeline.cutoff import forget_cutoffs
from pipeline.dataset import find_dataset, open_dataset, read_profile, without_users, write_dataset
from pipeline.files import write_record
from pipeline.forgotten import FILTER, ForgottenUsers, read_forgotten, remember_forgotten, user_hash
from pipeline.ingest import ingest
from pipeline.intake import DataConfig
from pipeline.report import without_samples
from pipeline.store import Store, open_store
from schemas import tables
from schemas.errors import ConfigError, DataError
from schemas.records import Dataset, UserTower

TOWER = UserTower(
    id="tower", created_at=1, name="n", features="text", inputs="", item_fingerprint=None, snapshot=None, dataset="",
    fingerprint="", config={}, run_id="", steps=1, positions_per_second=1.0, valid={},
)  # fmt: skip


def forget(*users: str) -> ForgottenUsers:
    return ForgottenUsers(map(user_hash, users))


@pytest.mark.parametrize(
    "raw",
    [
        '{"user_id": "u 7", "item_id": "i1", "timestamp": "soon"}',
        '{"who": [{"id": " u 7 "}], "item_id": "i1"}',
        "u 7,i1,5,6,7",
        'i1;"u 7";x',
        "i1\tu 7\tx",
        '{"user_id": "u 7", "item_id"',
    ],
)
def test_a_rejected_row_names_a_user_in_any_form(raw):
    assert forget("u 7").in_row(raw)
    assert not forget("u 8").in_row(raw)


@pytest.mark.parametrize(
    ("raw", "named"), [('{"u": "4 42"}', False), ('{"u": 42}', True), ('{"u": 42.0}', True), ('{"u": 420}', False)]
)
def test_numbers_are_spelled_as_ids_are(raw, named):
    assert forget("42").in_row(raw) is named


def test_the_list_holds_hashes_and_takes_a_user_once(tmp_path):
    store = Store(tmp_path)
    assert remember_forgotten(store, "somebody@example.org ")
    assert not remember_forgotten(store, "somebody@example.org")
    assert "somebody@example.org" in read_forgotten(store)
    assert len(read_forgotten(store)) == 1
    everything = "".join(f"{path}{path.read_text()}" for path in tmp_path.rglob("*") if path.is_file())
    assert "somebody" not in everything
    with pytest.raises(ConfigError, match="the id is empty"):
        remember_forgotten(store, " ")


@pytest.fixture
def board(tmp_path) -> tuple[Store, DataConfig, Dataset]:
    """A data set of 60 users, with event types of which one is filtered, and a bad row of u3."""
    items, events = checkerboard()
    events = events.with_columns(
        event=pl.when(pl.int_range(pl.len()) % 7 == 0).then(pl.lit("view")).otherwise(pl.lit("buy"))
    )
    bad = pl.DataFrame([("u3", "i1", -5, "buy")], schema=events.schema, orient="row")
    items.write_csv(tmp_path / "items.csv")
    pl.concat([events, bad]).write_csv(tmp_path / "events.csv")
    config = DataConfig(
        items=tmp_path / "items.csv", interactions=tmp_path / "events.csv", filters={"events": ("buy",)}
    )
    store = Store(tmp_path / "store")
    record, _ = write_dataset(store, "board", ingest(config), lambda: {"quarantined": {}, "interactions": {}})
    return store, config, record


def test_a_data_set_without_a_user_is_the_one_that_the_feed_gives_from_now_on(board):
    store, config, record = board
    before = open_dataset(store, record).histories
    own = int(before.lengths[before.users.index("u3")])
    found = without_users(store, record, forget("u3"))
    assert found is not None
    assert (found.interactions, found.quarantined) == (own, 1)
    new = found.record
    assert (new.users, new.interactions, new.quarantined) == (59, record.interactions - own, 0)
    assert new.filtered[FILTER] == own + 1
    assert new.replaces == (record.digest,)
    assert read_profile(store, new)["interactions"]["users"] == 59
    again = ingest(config, None, forget("u3"))
    assert again.filtered[FILTER] >= own + 1  # and what the other filters take of the user before
    assert "u3" not in again.interactions["user_id"].to_list()
    assert again.quarantine.height == 0
    assert find_dataset(store, record.digest) == record
    store.remove(record)
    assert find_dataset(store, record.digest) == new
    assert find_dataset(store, "0" * 32) is None
    assert write_dataset(store, "board", again, dict) == (new, True), (
        "the next night finds the data set that it would make"
    )
    assert without_users(store, new, forget("u3")) is None
    after = open_dataset(store, new).histories
    assert after.of(after.users.index("u4")).tolist() == before.of(before.users.index("u4")).tolist()


def test_only_a_rejected_row_goes(board):
    store, config, _record = board
    events = pl.read_csv(config.interactions).with_columns(
        user_id=pl.when(pl.col("timestamp") < 0).then(pl.lit("stranger")).otherwise("user_id")
    )
    events.write_csv(config.interactions)
    other, _ = write_dataset(store, "other", ingest(config), dict)
    found = without_users(store, other, forget("stranger"))
    assert found is not None
    assert (found.interactions, found.quarantined, found.record.digest) == (0, 1, other.digest)
    assert found.record.replaces == ()
    assert found.record.id != other.id
    path = store.folder(found.record) / "quarantine.parquet"
    assert pq.read_table(path).num_rows == 0


def test_the_last_user_cannot_be_taken_out(board):
    store, _, record = board
    with pytest.raises(DataError, match="holds nobody else"):
        without_users(store, record, forget(*(f"u{n}" for n in range(60))))
    assert [each.id for each in store.all(Dataset)] == [record.id]


def test_cutoffs_lose_the_row_and_nothing_else(tmp_path):
    store = Store(tmp_path)
    folder = store.folder(TOWER)
    folder.mkdir(parents=True)
    assert forget_cutoffs(store, TOWER, forget("u1")) == 0
    rows = {tables.USER_ID: ["u1", "u2"], tables.TIMESTAMP: [1, 2], tables.ITEM_ID: ["a", "b"]}
    pq.write_table(pa.table(rows, schema=tables.CUTOFF), folder / "cutoff.parquet")
    assert forget_cutoffs(store, TOWER, forget("u1", "u9")) == 1
    assert pq.read_table(folder / "cutoff.parquet").to_pylist() == [
        {tables.USER_ID: "u2", tables.TIMESTAMP: 2, tables.ITEM_ID: "b"}
    ]


def test_a_page_loses_one_sample():
    page = "<p>u1<article><h3>user a&amp;b</h3><p>x</p></article><article><h3>user c</h3></article></p>"
    assert without_samples(page, lambda user: user == "a&b") == (
        "<p>u1<article><h3>user c</h3></article></p>",
        1,
    )


def test_a_bucket_loses_rows_and_local_copies_too(board, tmp_path, monkeypatch):
    import boto3

    store, _, record = board
    with serve() as (address, *_):
        for name, value in {
            "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "XDG_CACHE_HOME": str(tmp_path / "copies"),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="forgetting")
        bucket = open_store("s3://forgetting/store")
        assert remember_forgotten(bucket, "u3")
        with bucket.new(Dataset, record.id) as folder:
            shutil.copytree(store.folder(record), folder, dirs_exist_ok=True)
        rows = {tables.USER_ID: ["u3", "u2"], tables.TIMESTAMP: [1, 2], tables.ITEM_ID: ["a", "b"]}
        with bucket.new(UserTower, TOWER.id) as folder:
            pq.write_table(
                tables.CUTOFF.empty_table().from_pydict(rows, schema=tables.CUTOFF), folder / "cutoff.parquet"
            )
            write_record(folder, TOWER)
        forgotten = read_forgotten(bucket)
        found = without_users(bucket, record, forgotten)
        bucket.remove(record)
        assert [each.id for each in bucket.all(Dataset)] == [found.record.id]
        assert forget_cutoffs(bucket, TOWER, forgotten) == 1
        assert forget_cutoffs(bucket, TOWER, forgotten) == 0
        assert pq.read_table(bucket.folder(TOWER) / "cutoff.parquet").column(tables.USER_ID).to_pylist() == ["u2"]
        events = bucket.folder(found.record) / "interactions.parquet"
        assert "u3" not in pq.read_table(events).column(tables.USER_ID).to_pylist()
        assert list((tmp_path / "copies").rglob(record.id)) == []
