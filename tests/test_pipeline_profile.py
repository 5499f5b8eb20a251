"""Filters with their counts, the profile and its drift, and tables of any kind: nothing crashes, nothing is lost."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing.parametric import column, dataframes

from pipeline.ingest import ingest
from pipeline.intake import DataConfig
from schemas.errors import PipelineError

DAY = 86_400_000
DAYS = (dt.date(2020, 9, 16), dt.date(2020, 9, 18))
CATALOG = {
    "item_id": ["a", "b", "c", "d"],
    "title": ["red chair", "blue table", "x", "красный стул"],
}


def events() -> pl.DataFrame:
    rows = [
        ("u", "a", 1, "buy", 5.0),
        ("u", "a", 2, "view", 4.0),
        ("u", "b", 3, "buy", 2.0),
        ("v", "a", 4, "buy", None),
    ]
    rows += [("v", "b", 5, "buy", 5.0), ("v", "c", 6, None, 3.0), ("w", "d", 7, "buy", 4.0)]
    table = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "event", "label"], orient="row")
    return table.with_columns(timestamp=pl.col("timestamp") * DAY + 1_600_000_000_000)


def prepare(tmp_path, **filters):
    pl.DataFrame(CATALOG).write_parquet(tmp_path / "i.parquet")
    events().write_parquet(tmp_path / "e.parquet")
    clean = ingest(DataConfig(items=tmp_path / "i.parquet", interactions=tmp_path / "e.parquet", filters=filters))
    total = clean.items.height + len(clean.events) + sum(clean.filtered.values())
    assert total == sum(clean.rows_in.values()) == 11
    return clean, {name: rows for name, rows in clean.filtered.items() if rows}


@pytest.mark.parametrize(
    ("filters", "counted"),
    [
        ({}, {}),
        ({"events": ["buy"]}, {"other event types": 2}),
        ({"min_label": 4}, {"label below minimum": 3}),
        ({"since": DAYS[0], "before": DAYS[1]}, {"before the first day": 2, "after the last day": 3}),
        ({"first_only": True}, {"repeats": 1}),
        ({"k_core": 2}, {"outside the k-core": 2}),
        ({"events": ["buy"], "k_core": 2}, {"other event types": 2, "outside the k-core": 1}),
        ({"min_text": 5}, {"text too short": 1, "unknown items": 1}),
        ({"script": "Latin"}, {"text not Latin": 1, "unknown items": 1}),
        ({"script": "Cyrillic"}, {"text not Cyrillic": 3, "unknown items": 6}),
    ],
)  # fmt: skip
def test_every_filter_is_counted(tmp_path, filters, counted):
    assert prepare(tmp_path, **filters)[1] == counted


def test_filters_that_leave_nothing_or_do_not_exist_are_named(tmp_path):
    for filters, message in (
        ({"k_core": 9}, "the filters leave none of its 7 rows"),
        ({"events": ["sale"]}, "none of its 7 rows is left.*other event types"),
        ({"script": "Klingon"}, "'Klingon' is no Unicode script"),
        ({"min_text": 99}, "the catalog is empty: none of its 4 rows can be used"),
    ):
        with pytest.raises(PipelineError, match=message):
            prepare(tmp_path, **filters)


def test_the_profile_lies_beside_the_record_and_tells_the_drift(workspace):
    first = workspace.run("prepare-data")
    (path,) = workspace.store.glob(f"datasets/{first['dataset']}/profile.json")
    found = json.loads(path.read_text())
    assert found["drift"] is None
    assert found["interactions"] | {"events_per_user": 0, "events_per_item": 0, "top_items": 0} == {
        "interactions": 720, "users": 60, "items_named": 24, "first_day": "2020-09-13", "last_day": "2020-09-13",
        "tie_share": 0.0, "repeat_share": 0.0, "events_per_user": 0, "events_per_item": 0, "top_items": 0,
    }  # fmt: skip
    assert found["items"]["without_text_share"] == 0.0
    assert found["items"]["tokens"]["mean"] > 5
    assert list(found["files"]["items"]["files"]) == [str(workspace.data("items"))]
    table = pl.read_csv(workspace.data("events"))
    late = table.head(2).with_columns(timestamp=pl.lit(1_500_000_000, pl.Int64), user_id=pl.lit("late"))
    pl.concat([table, late, late]).write_csv(workspace.data("events"))
    items = pl.read_csv(workspace.data("items")).with_columns(year=pl.lit(None), title=pl.lit("same"))
    items.write_csv(workspace.data("items"))
    second = workspace.run("prepare-data")
    assert second["late"] == 2
    assert second["filtered"]["interaction copies"] == 2
    (path,) = workspace.store.glob(f"datasets/{second['dataset']}/profile.json")
    found = json.loads(path.read_text())
    assert found["drift"]["since"] == first["dataset"]
    assert found["drift"]["changed"]["interactions.users"] == [60, 61]
    assert found["drift"]["changed"]["items.same_text_share"] == [0.0, 1.0]
    assert found["items"]["top_duplicates"] == {"same": 24}
    assert workspace.run("prepare-data")["reused"]


NAMES = ["user_id", "item_id", "timestamp", "label", "event", "sequence", "title", "available", "updated_at"]
PLAIN = [pl.String, pl.Int64, pl.Float64, pl.UInt64, pl.Boolean, pl.Datetime("us"), pl.Date, pl.Binary, pl.Duration]
KINDS = [
    *PLAIN,
    pl.Categorical,
    pl.Time,
    pl.Int8,
    pl.List(pl.String),
    pl.List(pl.Int8),
    pl.Struct({"a": pl.Int8}),
    pl.Null,
]


@st.composite
def any_tables(draw: st.DrawFn) -> pl.DataFrame:
    columns = [column(name, dtype=draw(st.sampled_from(KINDS)), allow_null=True) for name in NAMES]
    return draw(dataframes(columns, min_size=1, max_size=8))


DELAYS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=30, deadline=None, suppress_health_check=DELAYS)
@given(items=any_tables(), log=any_tables(), ids=st.booleans())
def test_a_table_of_any_types_is_taken_whole_or_refused_by_name(tmp_path, items, log, ids):
    if ids:  # so that some get through
        items = items.with_columns(item_id=pl.Series(["a", "b"] * 4)[: items.height])
        log = log.with_columns(item_id=pl.lit("a"), user_id=pl.lit("u"), timestamp=pl.lit(5))
    items.write_parquet(tmp_path / "i.parquet")
    log.write_parquet(tmp_path / "e.parquet")
    config = DataConfig(items=tmp_path / "i.parquet", interactions=tmp_path / "e.parquet", reject_share=1.0)
    _balanced_or_refused(config, items.height + log.height)


@settings(max_examples=30, deadline=None, suppress_health_check=DELAYS)
@given(rows=st.lists(st.lists(st.text(max_size=8), max_size=5), max_size=8), data=st.binary(max_size=60))
def test_bytes_of_any_kind_are_taken_whole_or_refused_by_name(tmp_path, rows, data):
    text = "item_id,user_id,timestamp,title\na,u,5,A\n" + "\n".join(",".join(row) for row in rows)
    for ending in ("csv", "tsv", "inter", "jsonl"):
        path = Path(tmp_path / f"x.{ending}")
        path.write_bytes(text.encode("utf-8", "replace") + b"\n" + data)
        _balanced_or_refused(DataConfig(items=path, interactions=path, reject_share=1.0), None)


def _balanced_or_refused(config: DataConfig, rows: int | None) -> None:
    try:
        clean = ingest(config)
    except PipelineError:
        return
    out = clean.items.height + len(clean.events) + clean.quarantine.height + sum(clean.filtered.values())
    assert out == sum(clean.rows_in.values())
    assert rows is None or out == rows
