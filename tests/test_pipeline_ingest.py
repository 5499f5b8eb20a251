"""Dirty files: what is taken, what is quarantined with file and row, what stops the run."""

from __future__ import annotations

import datetime as dt
import json

import polars as pl
import pytest

from pipeline.ingest import DataConfig, ingest
from schemas.errors import DataError

ITEMS = {"item_id": ["a", "b", "c"], "title": ["A", "B", "C"]}
EVENTS = {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]}


@pytest.fixture
def prepare(tmp_path):
    """prepare(items, events, **DataConfig fields) -> CleanTables, through CSV files unless tables are Parquet."""

    def run(items=ITEMS, events=EVENTS, kind="csv", **settings):
        paths = {}
        for name, table in (("items", items), ("interactions", events)):
            paths[name] = tmp_path / f"{name}.{kind}"
            frame = pl.DataFrame(table)
            frame.write_csv(paths[name]) if kind == "csv" else frame.write_parquet(paths[name])
        return ingest(DataConfig(**paths, **settings))

    return run


def test_clean_tables_pass_and_seconds_become_milliseconds(prepare):
    clean = prepare(events=EVENTS | {"timestamp": [1_600_000_000, 1_600_000_001_000, 1_600_000_002]})
    assert clean.interactions["timestamp"].to_list() == [1_600_000_000_000, 1_600_000_001_000, 1_600_000_002_000]
    assert clean.quarantine.is_empty()
    assert clean.rows_in == {"items": 3, "interactions": 3}


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_datetimes_become_milliseconds(prepare, unit):
    times = pl.Series([dt.datetime(2020, 1, 1, second=s) for s in (0, 1, 2)], dtype=pl.Datetime(unit))
    clean = prepare(events=EVENTS | {"timestamp": times}, kind="parquet")
    assert clean.interactions["timestamp"][0] == 1_577_836_800_000


def test_whole_numbers_as_ids_meet_text_ids(prepare):
    items = {"item_id": pl.Series([1, 2, 3], dtype=pl.Int32), "title": ["A", "B", "C"]}
    events = EVENTS | {"item_id": ["1", "2", "3"]}
    assert prepare(items, events, kind="parquet").interactions.height == 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_price_in_float32_is_the_number_that_a_file_of_text_has(prepare, kind):
    prices = pl.Series([4.99, 0.1, None], dtype=pl.Float32)
    found = prepare(ITEMS | {"price": prices}, kind=kind).items["price"].cast(pl.String).to_list()
    assert found == ["4.99", "0.1", None]


def test_bad_rows_are_quarantined_with_file_row_reason_and_raw(prepare):
    events = {
        "user_id": ["u", "", None, "v", "v"],
        "item_id": ["a", "a", "b", "", "c"],
        "timestamp": ["1", "2", "3", "4", "yesterday"],
    }
    clean = prepare(events=events, reject_share=1.0)
    rows = clean.quarantine.to_dicts()
    assert [(row["row"], row["reason"]) for row in rows] == [
        (2, "empty user_id"),
        (3, "empty user_id"),
        (4, "empty item_id"),
        (5, "timestamp is not a positive number"),
    ]
    assert all(row["file"].endswith("interactions.csv") for row in rows)
    assert '"yesterday"' in rows[-1]["raw"]
    with pytest.raises(DataError, match=r"4 of 5 rows rejected.*reject_share = 0.01; first row 2: empty user_id"):
        prepare(events=events)


def test_times_read_as_numbers_are_quarantined_as_they_came(prepare):
    events = {"user_id": ["u", "", "v"], "item_id": ["a", "a", "c"], "timestamp": ["1", "007", "99999999999999999"]}
    clean = prepare(events=events, reject_share=1.0)
    assert [(row["row"], row["reason"], json.loads(row["raw"])) for row in clean.quarantine.to_dicts()] == [
        (2, "empty user_id", {"user_id": "", "item_id": "a", "timestamp": "007"}),
        (3, "timestamp is in the future", {"user_id": "v", "item_id": "c", "timestamp": "99999999999999999"}),
    ]


def test_copies_are_filtered_and_contradictions_quarantined(prepare):
    items = {
        "item_id": ["a", "b", "c", "a", "a", "b", "c"],
        "title": ["Z", "B", "C", "A", "Z", "B", "D"],
        "updated_at": [1, 1, 1, 2, 1, 1, 1],
    }
    for kind in ("csv", "parquet"):
        clean = prepare(items, EVENTS, reject_share=1.0, kind=kind)
        assert clean.items["title"].to_list() == ["A", "B", "D"]  # the one updated last
        assert clean.items["updated_at"].to_list() == [2_000, 1_000, 1_000]
        assert (clean.filtered["older item rows"], clean.filtered["item copies"]) == (2, 1)
        assert clean.quarantine["reason"].to_list() == ["item_id again with other values"]  # C, at the time of D
    doubled = {name: values * 2 for name, values in EVENTS.items()}
    clean = prepare(events=doubled)
    assert (clean.interactions.height, clean.filtered["interaction copies"]) == (3, 3)


def test_availability_is_read_from_words_numbers_and_booleans(prepare):
    words = ITEMS | {"available": ["False", None, " yes"]}
    assert prepare(words).items["available"].to_list() == [False, True, True]
    assert prepare(ITEMS | {"available": [0, 1, 1]}, kind="parquet").items["available"].to_list() == [
        False,
        True,
        True,
    ]
    assert prepare(ITEMS | {"available": [True, None, False]}, kind="parquet").items["available"].to_list() == [
        True, True, False
    ]  # fmt: skip
    clean = prepare(ITEMS | {"available": ["true", "maybe", "false"]}, reject_share=0.5)
    assert clean.items["item_id"].to_list() == ["a", "c"]
    assert clean.quarantine["reason"].to_list() == ["available is neither true nor false"]
    with pytest.raises(DataError, match="'available' is Float64"):
        prepare(ITEMS | {"available": [0.5, 1.0, 1.0]}, kind="parquet")


def test_an_unusable_row_does_not_take_a_good_rows_place(prepare):
    items = {"item_id": ["a", "a", "b"], "title": ["A", "Z", "B"], "available": ["true", "?", "true"]}
    clean = prepare(items, reject_share=0.5)
    assert clean.items["title"].to_list() == ["A", "B"]


def test_unknown_items_are_counted_or_an_error(prepare):
    events = EVENTS | {"item_id": ["a", "b", "zz"]}
    assert prepare(events=events).filtered["unknown items"] == 1
    with pytest.raises(DataError, match=r"1 interactions with 1 items.*\['zz'\].*unknown_items"):
        prepare(events=events, unknown_items="error")


def test_ties_are_ordered_by_sequence_else_by_hash_whatever_the_row_order(prepare):
    ids = [f"i{n}" for n in range(20)]
    items = {"item_id": ids, "title": ids}
    events = pl.DataFrame({"user_id": ["u"] * 20, "item_id": ids, "timestamp": [5] * 20})
    plain = prepare(items, events).interactions["item_id"].to_list()
    assert plain == prepare(items, events.sample(fraction=1, shuffle=True, seed=1)).interactions["item_id"].to_list()
    assert plain != sorted(ids)  # id order would leak
    numbered = events.with_columns(sequence=pl.Series(range(19, -1, -1)))
    assert prepare(items, numbered).interactions["item_id"].to_list() == ids[::-1]


@pytest.mark.parametrize(
    ("items", "events", "message"),
    [
        (
            {"id": ["a"], "title": ["A"]},
            EVENTS,
            r"items\.csv: columns \['item_id'\] are missing; found \['id', 'title'\]",
        ),
        (ITEMS, {"user_id": ["u"], "item_id": ["a"]}, r"interactions\.csv: columns \['timestamp'\] are missing"),
        ({"item_id": [], "title": []}, EVENTS, r"items\.csv: holds no rows"),
        (ITEMS, EVENTS | {"item_id": ["x", "y", "z"]}, "none of its 3 rows has an item of"),
        ({"item_id": ["", ""], "title": ["A", "B"]}, EVENTS, "2 of 2 rows rejected"),
    ],
)
def test_unusable_tables_are_named(prepare, items, events, message):
    with pytest.raises(DataError, match=message):
        prepare(items, events)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (EVENTS | {"user_id": [1.5, 2.5, 3.5]}, "3 of 3 rows rejected.*user_id is no whole number"),
        (
            EVENTS | {"user_id": [True, False, True]},
            "column 'user_id' is Boolean, expected text or whole numbers",
        ),
        (
            EVENTS | {"timestamp": [True, False, True]},
            "column 'timestamp' is Boolean, expected numbers or a datetime",
        ),
    ],
)
def test_wrong_types_are_named(prepare, events, message):
    with pytest.raises(DataError, match=message):
        prepare(events=events, kind="parquet")


def test_of_two_unusable_tables_the_catalog_is_named(prepare):
    wrong = EVENTS | {"timestamp": ["x", "y", "z"]}
    for _ in range(5):  # whichever is read first
        with pytest.raises(DataError, match=r"items\.csv: columns \['item_id'\] are missing"):
            prepare({"item": ["a"]}, wrong)
    with pytest.raises(DataError, match=r"interactions\.csv: 3 of 3 rows rejected"):
        prepare(events=wrong)


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,a,1\n")

    def run(name):
        return ingest(DataConfig(items=tmp_path / name, interactions=tmp_path / "x.csv"))

    with pytest.raises(DataError, match=r"no\.csv: no such file"):
        run("no.csv")
    with pytest.raises(DataError, match=r"unknown ending '\.xlsx'; known are"):
        run("items.xlsx")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        run("bad.parquet")
    (tmp_path / "bad.csv").write_bytes(b"item_id,title\na,\xff\xfe\nb,c,d,e\n")
    with pytest.raises(DataError, match=r"bad\.csv"):
        run("bad.csv")


def test_columns_are_mapped_and_recbole_types_stripped(tmp_path):
    (tmp_path / "x.item").write_text('item_id:token\tmovie_title:token_seq\n1\tThe "Best" One\n2\tB\n')
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n9\t1\t4\t881250949\n"
    )
    clean = ingest(
        DataConfig(
            items=tmp_path / "x.item",
            interactions=tmp_path / "x.inter",
            item_columns={"title": "movie_title"},
            interaction_columns={"label": "rating"},
        )
    )
    assert clean.items["title"].to_list() == ['The "Best" One', "B"]
    assert clean.interactions.to_dicts() == [
        {"user_id": "9", "item_id": "1", "timestamp": 881250949000, "sequence": None, "event": None, "label": 4.0}
    ]
    with pytest.raises(DataError, match=r"x\.item: columns \['no'\] are missing"):
        ingest(DataConfig(items=tmp_path / "x.item", interactions=tmp_path / "x.inter", item_columns={"title": "no"}))
