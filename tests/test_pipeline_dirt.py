"""The same dirt through every layout: the good rows come out whole, each bad one has its file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.ingest import CleanTables, ingest
from pipeline.intake import DataConfig
from schemas.errors import DataError

Row = tuple[Any, ...]
SECONDS, MILLIS, FUTURE = 1_600_000_000, 1_600_000_001_000, int(time.time()) + 400 * 86_400
BIG = "long " * 200_000  # 1 MB
TITLES = {"1": "A", "2": 'B "quoted", with, commas', "3": BIG, "4": "D \x07\x1b[31m control"}
ITEMS: list[Row] = [*TITLES.items(), ("", "no id"), ("1", "A second")]
TIMES = [SECONDS, MILLIS, -5, 0, FUTURE, "never"]
EVENTS: list[Row] = [("u", str(1 + row % 4), moment) for row, moment in enumerate(TIMES)]
TIMELESS = {3, 4, 5, 6}  # rows of EVENTS whose time cannot be used


def delimited(header: list[str], rows: list[Row], separator: str = ",", quoted: bool = True) -> bytes:
    if not quoted:
        return "".join(separator.join(map(str, row)) + "\n" for row in ([header] if header else []) + rows).encode()
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def json_lines(names: list[str], rows: list[Row]) -> bytes:
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode()


def parquet(names: list[str], rows: list[Row]) -> bytes:
    """All as text, as a dump of unknown types has it."""
    file = io.BytesIO()
    pl.DataFrame(
        [tuple(map(str, row)) for row in rows], schema=dict.fromkeys(names, pl.String), orient="row"
    ).write_parquet(file)
    return file.getvalue()


def mind_time(moment: Any) -> str:
    if not isinstance(moment, int):
        return str(moment)
    return datetime.fromtimestamp(moment / 1000 if moment > 10**11 else moment, UTC).strftime("%m/%d/%Y %I:%M:%S %p")


@dataclass(frozen=True)
class Layout:
    """items, events: rows as in ITEMS and EVENTS to a file's bytes; ragged: a line of the wrong shape, or None."""

    form: str
    item_file: str
    event_file: str
    items: Callable[[list[Row]], bytes]
    events: Callable[[list[Row]], bytes]
    ragged: bytes | None = b"only one cell\n"
    header: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


ITEM, EVENT = ["item_id", "title"], ["user_id", "item_id", "timestamp"]
LAYOUTS = {
    "csv": Layout("table", "i.csv", "e.csv", lambda r: delimited(ITEM, r), lambda r: delimited(EVENT, r)),
    "tsv": Layout(
        "table", "i.tsv", "e.tsv", lambda r: delimited(ITEM, r, "\t"), lambda r: delimited(EVENT, r, "\t")
    ),
    "jsonl": Layout(
        "table", "i.jsonl", "e.jsonl", lambda r: json_lines(ITEM, r), lambda r: json_lines(EVENT, r),
        b'{"cut": \n', False,
    ),
    "parquet": Layout(
        "table", "i.parquet", "e.parquet", lambda r: parquet(ITEM, r), lambda r: parquet(EVENT, r), None
    ),
    "hllm-csv": Layout(
        "hllm-csv", "information/P.csv", "dataset/P.csv",
        lambda r: delimited(["item_id", "title", "tag", "description"], [(*row, "", "") for row in r]),
        lambda r: delimited(["item_id", "user_id", "timestamp"], [(item, user, moment) for user, item, moment in r]),
    ),
    "recbole": Layout(
        "recbole", "x.item", "x.inter",
        lambda r: delimited(["item_id:token", "title:token_seq"], r, "\t", quoted=False),
        lambda r: delimited(["user_id:token", "item_id:token", "timestamp:float"], r, "\t", quoted=False),
    ),
    "amazon-2018": Layout(
        "amazon-2018", "meta.json", "r.json", lambda r: json_lines(["asin", "title"], r),
        lambda r: json_lines(["reviewerID", "asin", "unixReviewTime"], r), b'{"cut": \n', False,
    ),
    "amazon-2023": Layout(
        "amazon-2023", "meta.jsonl", "r.jsonl", lambda r: json_lines(["parent_asin", "title"], r),
        lambda r: json_lines(["user_id", "parent_asin", "timestamp"], r), b'{"cut": \n', False,
    ),
    "microlens": Layout(
        "microlens", "titles.csv", "pairs.csv", lambda r: delimited(["item", "title"], r),
        lambda r: delimited(["user", "item", "timestamp"], r),
    ),
    "mind": Layout(
        "mind", "news.tsv", "behaviors.tsv",
        lambda r: delimited([], [(item, "c", "s", title, "", "", "", "") for item, title in r], "\t", quoted=False),
        lambda r: delimited(
            [], [(n, user, mind_time(moment), "", f"{item}-1") for n, (user, item, moment) in enumerate(r)], "\t",
            quoted=False,
        ),
        header=False,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    return path


def run(layout: Layout, items: Path, events: Path, **settings: Any) -> CleanTables:
    """Rows in = rows out + quarantined + filtered, whatever came."""
    values = {"format": layout.form, "reject_share": 1.0} | layout.settings | settings
    clean = ingest(DataConfig(items=items, interactions=events, **values))
    out = clean.items.height - clean.carried + len(clean.events)
    assert sum(clean.rows_in.values()) == out + clean.quarantine.height + sum(clean.filtered.values())
    return clean


def rejected(clean: CleanTables, path: Path) -> set[int]:
    return {row["row"] for row in clean.quarantine.to_dicts() if row["file"] == str(path)}


@EVERY
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_good_rows_come_out_whole_and_bad_ones_are_named(tmp_path, layout, zipped):
    if zipped and layout.ragged is None:
        pytest.skip("Parquet compresses itself")
    end = ".gz" if zipped else ""
    tail = b"" if layout.ragged is None else layout.ragged + b"\xff\xfe\xfa broken bytes\n"
    items = write(tmp_path, layout.item_file + end, layout.items(ITEMS) + tail)
    events = write(tmp_path, layout.event_file + end, layout.events(EVENTS) + tail)
    clean = run(layout, items, events)
    titles = dict(clean.items.select("item_id", "title").rows())
    assert titles == TITLES
    kept = [row[:3] for row in clean.interactions.rows()]
    # MIND's times are dates to the second
    assert sorted(kept) == [("u", "1", SECONDS * 1000), ("u", "2", MILLIS)]
    lines = set() if layout.ragged is None else {7, 8}
    assert rejected(clean, items) == {5, 6} | lines  # no id; an id again with another title
    assert rejected(clean, events) == TIMELESS | lines


@EVERY
def test_more_bad_rows_than_allowed_stop_the_run_with_the_reasons(tmp_path, layout):
    items = write(tmp_path, layout.item_file, layout.items(ITEMS[:4]))
    events = write(tmp_path, layout.event_file, layout.events(EVENTS))
    with pytest.raises(DataError, match="4 of 6 rows rejected"):
        run(layout, items, events, reject_share=0.01)


@EVERY
def test_empty_header_only_cut_short_and_packed_files_are_named(tmp_path, layout):
    items = write(tmp_path, layout.item_file, layout.items(ITEMS[:4]))
    name = Path(layout.event_file).name
    empty = write(tmp_path, layout.event_file, b"")
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|holds no rows)"):
        run(layout, items, empty)
    if layout.header:
        with pytest.raises(DataError, match=rf"{name}: holds no rows"):
            run(layout, items, write(tmp_path, layout.event_file, layout.events([])))
    packed = tmp_path / f"{name}.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../out.csv", layout.events(EVENTS))
    with pytest.raises(DataError, match="archives are not opened"):
        run(layout, items, packed)
    assert not (tmp_path.parent / "out.csv").exists()
    if layout.ragged is None:
        cut = write(tmp_path, layout.event_file, layout.events(EVENTS)[:-7])
    else:
        cut = write(tmp_path, layout.event_file + ".gz", layout.events(EVENTS * 3000))
        cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{name}\S*: cannot be read"):
        run(layout, items, cut)


@EVERY
def test_a_link_out_of_the_folder_is_refused(tmp_path, layout):
    items = write(tmp_path, layout.item_file, layout.items(ITEMS[:4]))
    secret = write(tmp_path / "elsewhere", layout.event_file, layout.events(EVENTS))
    log = write(tmp_path / "log", f"0-{Path(layout.event_file).name}", layout.events(EVENTS)).parent
    (log / f"1-{secret.name}").symlink_to(secret)
    with pytest.raises(DataError, match="is a link out of"):
        run(layout, items, log)


@EVERY
def test_swapped_columns_are_noticed(tmp_path, layout):
    """As many rows as before, every one of them wrong."""
    items = write(tmp_path, layout.item_file, layout.items(ITEMS[:4]))
    if layout.form != "mind":  # where items and times do not stand in one form
        swapped = [(user, str(moment), item) for user, item, moment in EVENTS[:2]]
        with pytest.raises(DataError, match=r"column 'item_id' holds what look like times.*are two columns swapped"):
            run(layout, items, write(tmp_path, layout.event_file, layout.events(swapped)))
    swapped = [(str(moment), item, user) for user, item, moment in EVENTS[:2]]
    with pytest.raises(DataError, match="2 of 2 rows rejected"):
        run(layout, items, write(tmp_path, layout.event_file, layout.events(swapped)), reject_share=0.01)


@EVERY
@pytest.mark.parametrize("spelled", ["001", "1.0"])
def test_ids_spelled_otherwise_are_noticed(tmp_path, layout, spelled):
    items = write(tmp_path, layout.item_file, layout.items([("1", "A"), ("2", "B")]))
    events = write(tmp_path, layout.event_file, layout.events([("u", spelled, SECONDS), ("u", "2", SECONDS)]))
    with pytest.raises(DataError, match=rf"1 interactions have items such as '{spelled}', spelled otherwise"):
        run(layout, items, events, reject_share=0.01)


@pytest.mark.parametrize("name", ["jsonl", "amazon-2018", "amazon-2023"])
def test_ids_as_numbers_in_one_file_and_text_in_the_other_meet(tmp_path, name):
    layout = LAYOUTS[name]
    items = write(tmp_path, layout.item_file, layout.items([(1, "A"), (2, "B")]))
    events = write(tmp_path, layout.event_file, layout.events([("u", "1", SECONDS), ("u", 2, MILLIS)]))
    assert [row[1] for row in run(layout, items, events).interactions.rows()] == ["1", "2"]
