"""The formats that a team's logs come in, and which files are read: one table, a small function a format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from pipeline.delimited import Delimited, read_delimited
from pipeline.digests import file_digest
from pipeline.readers import ROW, Part, read_jsonl, read_parquet
from schemas import tables
from schemas.errors import DataError

Format = Literal["table", "hllm-csv", "recbole", "amazon-2018", "amazon-2023", "microlens", "mind"]
Kind = Literal["items", "interactions"]
Expand = Callable[[Part], Part]
ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".item", ".inter")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Layout:
    """How the files of one table look. columns: our name = the file's; only: leave all other columns out."""

    shape: Delimited = field(default_factory=Delimited)
    columns: dict[str, str] = field(default_factory=dict)
    only: bool = False
    expand: Expand | None = None


def _table(kind: Kind, ending: str) -> Layout:
    if ending in (".item", ".inter"):
        return _recbole(kind, ending)
    return Layout(Delimited("\t" if ending == ".tsv" else ","))


def _recbole(kind: Kind, ending: str) -> Layout:
    """Atomic files: tab-separated, no quotes, types in the header. Sequence fields stay one text."""

    def strip_types(part: Part) -> Part:
        names = {name: name.split(":")[0] for name in part.table.columns}
        return replace(part, table=part.table.rename(names))

    return Layout(Delimited("\t", quoted=False), expand=strip_types)


def _amazon_2018(kind: Kind, ending: str) -> Layout:
    if kind == "items":
        texts = {name: name for name in ("title", "brand", "description", "category", "feature", "price")}
        return Layout(columns={tables.ITEM_ID: "asin"} | texts, only=True)
    return Layout(
        columns={
            tables.USER_ID: "reviewerID",
            tables.ITEM_ID: "asin",
            tables.TIMESTAMP: "unixReviewTime",
            tables.LABEL: "overall",
        },
        only=True,
    )


def _amazon_2023(kind: Kind, ending: str) -> Layout:
    if kind == "items":
        texts = {name: name for name in ("title", "store", "description", "features", "categories", "price")}
        return Layout(columns={tables.ITEM_ID: "parent_asin"} | texts, only=True)
    return Layout(
        columns={
            tables.USER_ID: tables.USER_ID,
            tables.ITEM_ID: "parent_asin",
            tables.TIMESTAMP: tables.TIMESTAMP,
            tables.LABEL: "rating",
        },
        only=True,
    )


def _microlens(kind: Kind, ending: str) -> Layout:
    if kind == "items":
        return Layout(columns={tables.ITEM_ID: "item", "title": "title"}, only=True)
    if ending == ".tsv":
        return Layout(Delimited("\t", quoted=False, names=(tables.USER_ID, "items")), expand=_item_lists)
    return Layout(columns={tables.USER_ID: "user", tables.ITEM_ID: "item", tables.TIMESTAMP: "timestamp"}, only=True)


def _item_lists(part: Part) -> Part:
    """One user a line with the items in order, and no times: all at one moment, told apart by ``sequence``."""
    long = (
        part.table.with_columns(pl.col("items").str.strip_chars().str.split(" ").alias(tables.ITEM_ID))
        .with_columns(pl.int_ranges(1, pl.col(tables.ITEM_ID).list.len() + 1).alias(tables.SEQUENCE))
        .explode(tables.ITEM_ID, tables.SEQUENCE)
        .drop("items")
        .with_columns(pl.lit(1, pl.Int64).alias(tables.TIMESTAMP))
    )
    return Part(long, part.rejected, part.skipped)


def _mind(kind: Kind, ending: str) -> Layout:
    if kind == "items":
        texts = ("category", "subcategory", "title", "abstract")
        names = (tables.ITEM_ID, *texts, "url", "title_entities", "abstract_entities")
        columns = {name: name for name in (tables.ITEM_ID, *texts)}
        return Layout(Delimited("\t", quoted=False, names=names), columns, only=True)
    shown = ("impression_id", tables.USER_ID, tables.TIMESTAMP, "history", "impressions")
    return Layout(Delimited("\t", quoted=False, names=shown), expand=_clicks)


def _clicks(part: Part) -> Part:
    """Each clicked impression is an event. What was shown and not clicked is none, and the clicks of the history
    column have no time: both are counted, not taken."""
    table = part.table.with_columns(
        pl.col("history").str.extract_all(r"\S+").list.len().alias("__before"),
        pl.col("impressions").str.extract_all(r"\S+").alias("__shown"),
    )
    shown = table.select(ROW, tables.USER_ID, tables.TIMESTAMP, pl.col("__shown").alias("impression"))
    shown = shown.explode("impression", empty_as_null=True)
    clicked = shown.filter(pl.col("impression").str.ends_with("-1").fill_null(True))
    clicks = clicked.with_columns(pl.col("impression").str.replace(r"-1$", "").alias(tables.ITEM_ID))
    skipped = {
        "shown, not clicked": shown.height - clicked.height,
        "history without a time": int(table["__before"].sum()),
    }
    return Part(clicks.drop("impression"), part.rejected, skipped)


FORMATS: dict[Format, Callable[[Kind, str], Layout]] = {
    "table": _table,
    "hllm-csv": _table,
    "recbole": _recbole,
    "amazon-2018": _amazon_2018,
    "amazon-2023": _amazon_2023,
    "microlens": _microlens,
    "mind": _mind,
}
assert set(FORMATS) == set(get_args(Format))


def ending_of(path: Path) -> str:
    """What kind of file it is by its name, .gz taken off. Raises DataError for archives and unknown endings."""
    ending = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if ending in ARCHIVES:
        raise DataError(f"{path}: archives are not opened, their entries can point anywhere; unpack it, check it")
    if ending not in ENDINGS:
        raise DataError(f"{path}: unknown ending {ending!r}; known are {sorted(ENDINGS)}, text also with .gz")
    return ending


def find_files(location: Path, setting: str) -> list[Path]:
    """The file, or the files of a folder or pattern in name order. Raises DataError.

    Names that start with a dot or an underscore are not data. A link that leads out of its folder is refused.
    """
    if location.is_file():
        return [location]
    if location.is_dir():
        folder, found = location, location.rglob("*")
    elif has_magic(str(location)):
        parts = location.parts
        fixed = next(place for place, part in enumerate(parts) if has_magic(part))
        folder = Path(*parts[:fixed])
        found = folder.glob(str(Path(*parts[fixed:])))
    else:
        ending_of(location)
        raise DataError(f"{location}: no such file; set data.items and data.interactions")
    inside, files = folder.resolve(), []
    for path in sorted(found):
        if any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            continue
        if not path.resolve().is_relative_to(inside):
            raise DataError(f"{path}: is a link out of {folder}; put the file itself there")
        if path.is_file():
            files.append(path)
    if not files:
        raise DataError(f"{location}: no files there; set data.{setting}")
    return files


@dataclass(frozen=True)
class Delivery:
    """The files of one table, each content once. again: how many were left out as delivered before."""

    files: list[Path]
    hashing: list[Future[str]]
    again: int

    @property
    def digests(self) -> list[str]:
        """Of the files; waits for those that are still being hashed."""
        return [digest.result() for digest in self.hashing]


def delivery(location: Path, kind: Kind, pool: Executor) -> Delivery:
    """Look up the files of a table and hash them in the pool: waited for only where two have one size, which may be
    one file delivered twice. Raises DataError.
    """
    found = find_files(location, kind)
    for path in found:
        ending_of(path)
    sizes = Counter(path.stat().st_size for path in found)
    hashing = {path: pool.submit(file_digest, path) for path in found}
    seen: dict[Any, Path] = {}
    for path in found:
        seen.setdefault(path if sizes[path.stat().st_size] == 1 else hashing[path].result(), path)
    files = list(seen.values())
    return Delivery(files, [hashing[path] for path in files], len(found) - len(files))


def _renamed(table: pl.DataFrame, columns: dict[str, str], only: bool) -> pl.DataFrame:
    taken = {theirs: ours for ours, theirs in columns.items() if theirs in table.columns}
    kept = [name for name in table.columns if name in taken or name == ROW or not (only or name in columns)]
    return table.select(kept).rename(taken)


def _ours(part: Part, columns: dict[str, str], only: bool) -> Part:
    text = part.text
    as_given = None if text is None else lambda: _renamed(text(), columns, only)
    return replace(part, table=_renamed(part.table, columns, only), text=as_given)


def read_file(path: Path, kind: Kind, form: Format, columns: dict[str, str], encoding: str) -> Iterator[Part]:
    """The rows of a file under our column names, as the format has them. columns: ours = theirs, by configuration.

    Raises DataError when the file cannot be read or lacks a column that ``columns`` names.
    """
    ending = ending_of(path)
    layout = FORMATS[form](kind, ending)
    merged = layout.columns | columns
    json = ending in (".jsonl", ".json")
    if json:
        parts = read_jsonl(path, frozenset(merged.values()) if layout.only else None, encoding)
    elif ending == ".parquet":
        parts = read_parquet(path)
    else:
        plain = kind == "interactions" and not layout.expand
        times = [merged.get(tables.TIMESTAMP, tables.TIMESTAMP)] if plain else []
        parts = read_delimited(path, layout.shape, encoding, frozenset(times))
    for part in parts:
        ours = layout.expand(part) if layout.expand and ending != ".parquet" else part
        missing = [theirs for theirs in columns.values() if theirs not in ours.table.columns]
        if missing and not json:
            found = [name for name in ours.table.columns if name != ROW]
            raise DataError(f"{path}: columns {missing} are missing; found {found}")
        yield _ours(ours, merged, layout.only)


def bare_scan(path: Path, out: Path, order: list[str]) -> None:
    """What reading costs at least: polars' streaming scan of a CSV to Parquet, sorted if told so, nothing checked."""
    rows = pl.scan_csv(path)
    (rows.sort(order) if order else rows).sink_parquet(out)
