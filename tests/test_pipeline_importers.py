"""Every format on dirty files: nothing crashes, nothing is lost, what was left out has its file, row and reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
import zipfile
from pathlib import Path

import polars as pl
import pytest

from pipeline.ingest import CleanTables, ingest
from pipeline.intake import DataConfig
from schemas.errors import DataError

NOW = int(time.time())
BIG = "long " * 200_000  # 1 MB
SECONDS = 1_600_000_000


def as_csv(rows: list[list[str]], separator: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue().encode()


def as_json(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def balanced(clean: CleanTables) -> CleanTables:
    """Rows in = rows out + quarantined + filtered."""
    out = clean.items.height - clean.carried + len(clean.events)
    assert sum(clean.rows_in.values()) == out + clean.quarantine.height + sum(clean.filtered.values())
    return clean


def reasons(clean: CleanTables) -> set[tuple[str, int, str]]:
    return {(Path(row["file"]).name, row["row"], row["reason"]) for row in clean.quarantine.to_dicts()}


@pytest.fixture
def put(tmp_path):
    """put(name, bytes) writes a file, gzipped where its name says so."""

    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def run(items: Path, interactions: Path, **settings) -> CleanTables:
    return balanced(ingest(DataConfig(items=items, interactions=interactions, **{"reject_share": 1.0} | settings)))


ITEMS = b"item_id,title\na,A\nb,B\nc,C\n"
EVENTS = b"user_id,item_id,timestamp\nu,a,1600000000\nu,b,1600000001\nv,c,1600000002\n"


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "tsv.gz"])
def test_delimited_text(put, ending):
    separator = "\t" if "tsv" in ending else ","
    items = as_csv(
        [
            ["item_id", "title"],
            ["a", 'quotes "inside"'],
            ["b", "lines\nbroken,\tand commas"],
            ["c", BIG],
            ["d", "first"],
            ["d", "again with another text"],
            ["007", "Bond\x00\x1b"],
        ],
        separator,
    )
    items += separator.join(["e", "E", "extra"]).encode() + b"\nf\n" + separator.encode().join([b"g", b"\xff\xfe\n"])
    rows = [["user_id", "item_id", "timestamp", "label"]]
    rows += [["u", "a", str(SECONDS), "5"], ["u", "b", str(SECONDS * 1000 + 7), "4.5"], ["v", "c", "1.6e9", ""]]
    rows += [["v", "d", "-5", "1"], ["v", "d", "0", "1"], ["v", "d", str(NOW + 10 * 86_400), "1"]]
    rows += [["w", "007", "2020-09-13T12:26:40Z", "1"], ["w", "a", "soon", "1"], ["w", "a", str(SECONDS), "good"]]
    clean = run(put(f"items.{ending}", items), put(f"events.{ending}", as_csv(rows, separator)))
    assert clean.items["item_id"].to_list() == ["007", "a", "b", "c", "d"]
    texts = dict(clean.items.select("item_id", "title").iter_rows())
    assert texts["b"] == "lines\nbroken,\tand commas"
    assert texts["a"] == 'quotes "inside"'
    assert len(texts["c"]) == len(BIG)
    assert clean.interactions.select("user_id", "item_id", "timestamp", "label").rows() == [
        ("u", "a", SECONDS * 1000, 5.0),
        ("u", "b", SECONDS * 1000 + 7, 4.5),
        ("v", "c", SECONDS * 1000, None),
        ("w", "007", SECONDS * 1000, 1.0),
    ]
    assert reasons(clean) == {
        (f"items.{ending}", 5, "item_id again with other values"),
        (f"items.{ending}", 7, "3 cells, expected 2"),
        (f"items.{ending}", 8, "1 cells, expected 2"),
        (f"items.{ending}", 9, "bytes that are not UTF-8"),
        (f"events.{ending}", 4, "timestamp is not a positive number"),
        (f"events.{ending}", 5, "timestamp is not a positive number"),
        (f"events.{ending}", 6, "timestamp is in the future"),
        (f"events.{ending}", 8, "timestamp is not a positive number"),
        (f"events.{ending}", 9, "label is not a number"),
    }
    raw = {row["row"]: row["raw"] for row in clean.quarantine.to_dicts() if "items" in row["file"]}
    assert "\\\\xff\\\\xfe" in raw[9]


def test_a_row_that_is_too_long_and_no_text_is_one_rejected_row(put, capfd):
    items = b"\xef\xbb\xbfitem_id,title\na,A\n\xf6,b,c\nb,Caf\xc3\xa9 \xf0\x9f\x98\x80\n\xff,x\nc,C\n"
    clean = run(put("i.csv", items), put("e.csv", EVENTS))
    assert clean.items["title"].to_list() == ["A", "Caf\u00e9 \U0001f600", "C"]
    assert reasons(clean) == {("i.csv", 2, "3 cells, expected 2"), ("i.csv", 4, "bytes that are not UTF-8")}
    assert clean.quarantine["raw"].to_list() == ["\\xf6,b,c", '{"item_id": "\\\\xff", "title": "x"}']
    assert "Exception" not in capfd.readouterr().err


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_json_lines(put, ending):
    items = as_json(
        [
            {"item_id": 1, "title": "A", "tags": ["x", "y", None], "more": {"k": 1}},
            {"item_id": "007", "title": BIG},
            {"item_id": 2.0, "title": "line\nbreak"},
            {"title": "no id"},
        ]
    )
    items += b'[1]\n{"item_id": "x"\n\n{"item_id": "y", "title": "\\ud800"}\n{"item_id": "z", "title": "\xff"}\n'
    items += b"[" * 100_000 + b"\n"
    events = as_json(
        [
            {"user_id": 5, "item_id": "1", "timestamp": SECONDS},
            {"user_id": "5", "item_id": 2, "timestamp": SECONDS * 1000 + 1, "event": "click"},
            {"user_id": "6", "item_id": "007", "timestamp": "2020-09-13 12:26:40"},
            {"user_id": "6", "item_id": "1", "timestamp": True},
        ]
    )
    clean = run(put(f"i.{ending}", items), put(f"e.{ending}", events))
    assert clean.items["item_id"].to_list() == ["007", "1", "2"]
    assert clean.items.row(1, named=True) | {"available": 0} == {
        "item_id": "1", "title": "A", "tags": "x, y", "more": '{"k": 1}', "available": 0
    }  # fmt: skip
    assert [row[:3] for row in clean.interactions.rows()] == [
        ("5", "1", SECONDS * 1000), ("5", "2", SECONDS * 1000 + 1), ("6", "007", SECONDS * 1000)
    ]  # fmt: skip
    found = {(name, row): reason for name, row, reason in reasons(clean)}
    assert found[(f"i.{ending}", 4)] == "empty item_id"
    assert found[(f"i.{ending}", 5)] == "not a row: not a JSON object"
    assert "not a row" in found[(f"i.{ending}", 6)]
    assert found[(f"i.{ending}", 8)] == "half of a surrogate pair"
    assert found[(f"i.{ending}", 9)] == "bytes that are not utf-8"
    assert (f"i.{ending}", 10) in found
    assert len(found) == 7


def test_parquet_of_every_kind(put, tmp_path):
    items = pl.DataFrame(
        {
            "item_id": pl.Series([1.0, 2.0, None, 2.5], dtype=pl.Float64),  # whole numbers as pandas leaves them
            "title": [b"A", b"\xff", b"C", b"D"],
            "genres": [["x"], [], None, ["y"]],
            "more": [{"a": 1}] * 4,
        }
    )
    items.write_parquet(tmp_path / "i.parquet")
    events = {"user_id": [7, 7], "item_id": ["1", "1"], "timestamp": [SECONDS, -1], "label": [float("nan"), 1.0]}
    pl.DataFrame(events).write_parquet(tmp_path / "e.parquet")
    clean = run(tmp_path / "i.parquet", tmp_path / "e.parquet")
    assert clean.items.to_dicts() == [
        {"item_id": "1", "title": "A", "genres": ["x"], "more": '{"a": 1}', "available": True}
    ]
    assert clean.interactions["label"].to_list() == [None]
    assert {reason for _, _, reason in reasons(clean)} == {
        "bytes that are not UTF-8",
        "item_id is no whole number",
        "timestamp is not a positive number",
    }


def test_recbole_atomic_files(put):
    items = (
        'item_id:token\tmovie_title:token_seq\tclass:token_seq\tscores:float_seq\n1\tThe "Best One\tA B\t.1 .2\n'
        "2\tx\n3\tC\tD\t\n"
    )
    events = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n9\t1\t4\t881250949\n9\t3\t4\tx\n"
    settings = {"format": "recbole", "item_columns": {"title": "movie_title"}}
    clean = run(put("x.item", items.encode()), put("x.inter", events.encode()), **settings)
    assert clean.items.row(0) == ("1", 'The "Best One', "A B", ".1 .2", True)
    assert clean.interactions["timestamp"].to_list() == [881_250_949_000]
    assert {(name, row) for name, row, _ in reasons(clean)} == {("x.item", 2), ("x.inter", 2)}


def test_the_hllm_csv_pair(put):
    items = as_csv(
        [["item_id", "title", "tag", "description"], ["v1", "T", "", "say hi, ok\nsecond"], ["v2", "", "", ""]]
    )
    events = as_csv(
        [["item_id", "user_id", "timestamp"], ["v1", "u1", str(SECONDS)], ["v1", "", "1"], ["v9", "u1", "1"]]
    )
    clean = run(put("information/P.csv", items), put("dataset/P.csv", events), format="hllm-csv")
    assert clean.items.row(0, named=True)["tag"] is None
    assert [row[:2] for row in clean.interactions.rows()] == [("u1", "v1")]
    assert clean.filtered["unknown items"] == 1
    assert reasons(clean) == {("P.csv", 2, "empty user_id")}


def test_amazon_2018_and_2023(put):
    meta = [
        {
            "asin": "B1",
            "title": "T &amp; U",
            "description": ["one", "two"],
            "category": ["x", "y"],
            "also_buy": ["B2"],
        },
        {"asin": "B2", "title": None, "description": []},
        {"asin": "", "title": "no id"},
    ]
    reviews = [
        {"reviewerID": "A1", "asin": "B1", "unixReviewTime": SECONDS, "overall": 5.0, "reviewText": "t"},
        {"reviewerID": "A1", "asin": "B2", "unixReviewTime": 0, "overall": 1.0},
        {"asin": "B2", "unixReviewTime": SECONDS},
    ]
    clean = run(
        put("meta.json.gz", as_json(meta)), put("r.json.gz", as_json(reviews) + b"{cut"), format="amazon-2018"
    )
    assert clean.items.row(0, named=True) == {
        "item_id": "B1", "title": "T &amp; U", "description": "one, two", "category": "x, y", "available": True
    }  # fmt: skip
    assert clean.interactions.rows() == [("A1", "B1", SECONDS * 1000, None, None, 5.0)]
    assert clean.quarantine.height == 4
    meta = [{"parent_asin": "P1", "title": "T", "store": "S", "features": ["f"], "details": {"a": 1}, "price": 9.0}]
    reviews = [
        {
            "user_id": "U",
            "asin": "V1",
            "parent_asin": "P1",
            "timestamp": SECONDS * 1000 + 3,
            "rating": 4.0,
            "title": "r",
        },
        {"user_id": "U", "asin": "V1", "parent_asin": "P1", "timestamp": "x", "rating": 4.0},
    ]
    clean = run(put("m.jsonl.gz", as_json(meta)), put("r.jsonl.gz", as_json(reviews)), format="amazon-2023")
    assert clean.items.columns == ["item_id", "title", "store", "features", "price", "available"]
    assert clean.interactions.rows() == [("U", "P1", SECONDS * 1000 + 3, None, None, 4.0)]
    assert reasons(clean) == {("r.jsonl.gz", 2, "timestamp is not a positive number")}


def test_microlens_with_and_without_times(put):
    titles = put("titles.csv", b'item,title\n1,"a, b"\n2,B\n3\n')
    pairs = put("pairs.csv", f"user,item,timestamp\n7,1,{SECONDS * 1000 + 5}\n7,2,never\n".encode())
    clean = run(titles, pairs, format="microlens")
    assert clean.interactions.rows() == [("7", "1", SECONDS * 1000 + 5, None, None, None)]
    assert clean.quarantine.height == 2
    clean = run(titles, put("pairs.tsv", b"7\t2 1 2\n8\t1\nbroken\n"), format="microlens")
    assert [row[:4] for row in clean.interactions.rows()] == [
        ("7", "2", 1000, 1), ("7", "1", 1000, 2), ("7", "2", 1000, 3), ("8", "1", 1000, 1)
    ]  # fmt: skip


def test_mind_clicks_are_events_and_the_rest_is_counted(put):
    news = 'N1\tsports\tsoccer\tA "title\tAbstract\turl\t[]\t[]\nN2\tnews\tx\tB\t\turl\t[]\t[]\nN3\tshort\n'
    log = (
        "1\tU1\t11/15/2019 8:55:22 AM\tN8 N9\tN1-1 N2-0 N2-1\n"
        "2\tU2\t11/15/2019 12:55:22 PM\t\tN1-0\n"
        "3\tU3\tyesterday\tN1\tN2-1\n4\tU4\n5\tU5\t11/15/2019 1:55:22 PM\t\t\n"
    )
    clean = run(put("news.tsv", news.encode()), put("behaviors.tsv", log.encode()), format="mind")
    assert sorted(row[:3] for row in clean.interactions.rows()) == [
        ("U1", "N1", 1_573_808_122_000), ("U1", "N2", 1_573_808_122_000)
    ]  # fmt: skip
    assert clean.items.columns == ["item_id", "category", "subcategory", "title", "abstract", "available"]
    assert clean.filtered["shown, not clicked"] == 2
    assert clean.filtered["history without a time"] == 3
    assert reasons(clean) == {
        ("news.tsv", 3, "2 cells, expected 8"),
        ("behaviors.tsv", 3, "timestamp is not a positive number"),
        ("behaviors.tsv", 4, "2 cells, expected 5"),
        ("behaviors.tsv", 5, "empty item_id"),
    }


def test_encodings_are_what_is_configured_and_never_guessed(put):
    items = "item_id,title\na,Café\n"
    events = put("e.csv", EVENTS)
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        clean = run(
            put("i.csv", items.encode(encoding)), put("e16.csv", EVENTS.decode().encode(encoding)), encoding=encoding
        )
        assert clean.items["title"].to_list() == ["Café"]
    assert run(put("i.csv", b"\xef\xbb\xbf" + items.encode()), events).items["title"].to_list() == ["Café"]
    with pytest.raises(DataError, match=r"is UTF-16, not UTF-8; set data.encoding"):
        run(put("i.csv", items.encode("utf-16")), events)
    with pytest.raises(DataError, match=r"the catalog is empty: none of its 1 rows can be used"):
        run(put("i.csv", items.encode("latin-1")), events)
    with pytest.raises(DataError, match=r"unknown encoding: klingon; set data.encoding"):
        run(put("i.csv", items.encode()), events, encoding="klingon")
    wide = put("i.jsonl", '{"item_id": "a", "title": "Café"}\n'.encode("utf-16"))
    events16 = put("e.jsonl", '{"item_id": "a", "user_id": "u", "timestamp": 5}\n'.encode("utf-16"))
    assert run(wide, events16, encoding="utf-16").items["title"].to_list() == ["Café"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("i.csv", b"", r"i\.csv: cannot be read"),
        ("i.jsonl", b"", r"i\.jsonl: holds no rows"),
        ("i.parquet", b"", r"i\.parquet: cannot be read"),
        ("i.csv", b"item_id,title\n", r"i\.csv: holds no rows"),
        ("i.csv", b"item_id,title,title\na,b,c\n", r"a column is there twice"),
        ("i.csv", b"item_id,title\na," + b"x" * (40 << 20) + b"\nb,c\n", r"i\.csv: cannot be read"),
        ("i.zip", b"PK", r"archives are not opened"),
        ("i.tar.gz", b"", r"archives are not opened"),
        ("i.tgz", b"", r"archives are not opened"),
        ("i.csv", b"title,item_id\n1600000000,a\n", None),
    ],
)
def test_files_that_are_none_are_named(put, name, data, message):
    events = put("e.csv", EVENTS)
    if message is None:
        assert run(put(name, data), events).items["item_id"].to_list() == ["a"]
        return
    with pytest.raises(DataError, match=message):
        run(put(name, data), events)


@pytest.mark.parametrize("name", ["e.csv.gz", "e.jsonl.gz"])
def test_a_gz_cut_short_is_named(put, name):
    rows = EVENTS * 3000 if "csv" in name else as_json([{"user_id": "u", "item_id": "a", "timestamp": 5}] * 3000)
    path, items = put(name, rows), put("i.csv", ITEMS)
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"gz: cannot be read: .*(cut short|Truncated|deliver it again)"):
            run(items, path)
    path.write_bytes(whole[:20] + bytes(40) + whole[60:])
    with pytest.raises(DataError, match="cannot be read"):
        run(items, path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="cannot be read"):
        run(items, path)
    path.write_bytes(
        gzip.compress(EVENTS) + gzip.compress(EVENTS.split(b"\n", 1)[1])
    )  # two members, as cat leaves them
    if "csv" in name:
        assert run(items, path).filtered["interaction copies"] == 3


def test_links_and_paths_out_of_the_folder_are_refused(put, tmp_path):
    secret = put("secret/e.csv", EVENTS)
    items, log = put("i.csv", ITEMS), put("log/1.csv", EVENTS).parent
    (log / "2.csv").symlink_to(secret)
    for location in (log, log / "*.csv"):
        with pytest.raises(DataError, match=r"2\.csv: is a link out of"):
            run(items, location)
    (log / "2.csv").unlink()
    (log / "2").symlink_to(secret.parent)
    with pytest.raises(DataError, match="is a link out of"):
        run(items, log)
    (log / "2").unlink()
    (log / "same.csv").symlink_to(log / "1.csv")
    assert len(run(items, log).deliveries["interactions"].files) == 1
    with zipfile.ZipFile(log / "3.zip", "w") as archive:
        archive.writestr("../../out.csv", EVENTS)
    with pytest.raises(DataError, match="archives are not opened"):
        run(items, log)
    assert not (tmp_path.parent / "out.csv").exists()


def test_folders_of_daily_files_each_content_once(put, tmp_path):
    items = put("i.csv", ITEMS)
    put("log/day-1.csv", EVENTS)
    put("log/day-2.csv.gz", b"user_id,item_id,timestamp\nu,c,1600000009\n")
    put("log/day-3.csv", EVENTS)  # delivered again
    put("log/day-4.csv", b"user_id,item_id,timestamp\n")
    put("log/.crc", b"x")
    put("log/_SUCCESS", b"")
    clean = run(items, tmp_path / "log")
    given = clean.deliveries["interactions"]
    assert ([path.name for path in given.files], given.again) == (["day-1.csv", "day-2.csv.gz", "day-4.csv"], 1)
    assert clean.rows_in["interactions"] == len(clean.events) == 4
    assert run(items, tmp_path / "log" / "day-[12].csv*").rows_in["interactions"] == 4
    with pytest.raises(DataError, match=r"no files there; set data\.interactions"):
        run(items, tmp_path / "log" / "*.nothing")
    put("catalog/1.csv", b"item_id,title\na,old\nb,B\n")
    put("catalog/2.csv", b"item_id,title,colour\na,new,red\nc,C,blue\n")
    clean = run(tmp_path / "catalog", tmp_path / "log", reject_share=0.0)
    assert clean.items.rows() == [("a", "new", True, "red"), ("b", "B", True, None), ("c", "C", True, "blue")]
    assert clean.filtered["older item rows"] == 1  # the later file counts
