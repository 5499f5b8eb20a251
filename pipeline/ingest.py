"""Files as they come to clean tables: what is taken, what is quarantined, what is filtered (DESIGN 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from schemas import tables
from schemas.errors import DataError
from schemas.hashing import tie_hashes

# Unix seconds stay below this until the year 5138; milliseconds are above it since 1973.
SECONDS_BELOW = 100_000_000_000
FLAGS = {"true": True, "1": True, "yes": True, "": True, "false": False, "0": False, "no": False}
_ROW = "__row"
_TEXT = "__text"
_HASH = "__hash"


class DataConfig(BaseModel):
    """Where the two tables are and how their columns are called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "my-data"
    items: Path = Path("items.parquet")
    interactions: Path = Path("interactions.parquet")
    """Formats by ending: .parquet; .csv and .tsv; .item and .inter (RecBole atomic files); text also .gz."""
    item_columns: dict[str, str] = Field(default_factory=dict)
    """Our name = the file's name, for columns called otherwise there."""
    interaction_columns: dict[str, str] = Field(default_factory=dict)
    download: Literal["movielens-100k"] | None = None
    """Fetch a public data set when ``items`` is not there."""
    unknown_items: Literal["drop", "error"] = "drop"
    """Interactions with an item that is not in the catalog: dropped and counted, or an error."""
    reject_share: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this share of a table's rows is rejected."""


@dataclass(frozen=True)
class CleanTables:
    """items sorted by id; interactions in the order of ``order_events``; the counts add up to ``rows_in``."""

    items: pl.DataFrame
    interactions: pl.DataFrame
    quarantine: pl.DataFrame
    rows_in: dict[str, int]
    filtered: dict[str, int]


def _recbole(path: Path) -> pl.DataFrame:
    table = pl.read_csv(path, separator="\t", infer_schema=False, quote_char=None)
    return table.rename({name: name.split(":")[0] for name in table.columns})


def _csv(separator: str) -> Callable[[Path], pl.DataFrame]:
    return lambda path: pl.read_csv(path, separator=separator, infer_schema=False)


READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".parquet": lambda path: pl.read_parquet(path, glob=False),
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".item": _recbole,
    ".inter": _recbole,
}


def read_table(path: Path, columns: dict[str, str]) -> pl.DataFrame:
    """The file's rows with its columns renamed to ours, and their 1-based row numbers.

    Raises DataError when the file is missing, unreadable, empty, or lacks a column that ``columns`` names.
    """
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending not in READERS:
        raise DataError(f"{path}: unknown ending {ending!r}; known are {sorted(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; set data.items and data.interactions")
    try:
        table = READERS[ending](path)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from error
    if table.is_empty():
        raise DataError(f"{path}: holds no rows")
    missing = [theirs for theirs in columns.values() if theirs not in table.columns]
    if missing:
        raise DataError(f"{path}: columns {missing} are missing; found {table.columns}")
    renamed = table.rename({theirs: ours for ours, theirs in columns.items()}, strict=True)
    return renamed.with_row_index(_ROW, offset=1).with_columns(pl.col(_ROW).cast(pl.Int64))


def _require(table: pl.DataFrame, names: list[str], path: Path) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        found = [name for name in table.columns if name != _ROW]
        raise DataError(
            f"{path}: columns {missing} are missing; found {found}; map them under [data.item_columns] "
            f"or [data.interaction_columns]"
        )


def _as_id(table: pl.DataFrame, name: str, path: Path) -> pl.Expr:
    dtype = table.schema[name]
    if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical)):
        raise DataError(f"{path}: column {name!r} is {dtype}, expected text or whole numbers")
    return pl.col(name).cast(pl.String).str.strip_chars()


def _as_flag(table: pl.DataFrame, path: Path) -> pl.Expr:
    """``available`` as a boolean: true where it is not given, null where it cannot be read."""
    dtype = table.schema.get(tables.AVAILABLE, pl.Null)
    if dtype == pl.Null:
        return pl.lit(True)
    column = pl.col(tables.AVAILABLE)
    if dtype == pl.Boolean:
        return column.fill_null(True)
    if not (dtype.is_integer() or dtype == pl.String):
        raise DataError(f"{path}: column {tables.AVAILABLE!r} is {dtype}, expected true and false")
    words = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    return words.fill_null("").replace_strict(FLAGS, default=None, return_dtype=pl.Boolean)


def _as_milliseconds(table: pl.DataFrame, path: Path) -> pl.Expr:
    dtype = table.schema[tables.TIMESTAMP]
    column = pl.col(tables.TIMESTAMP)
    if isinstance(dtype, pl.Datetime):
        return column.dt.epoch("ms")
    if not (dtype.is_numeric() or dtype == pl.String):
        raise DataError(f"{path}: column {tables.TIMESTAMP!r} is {dtype}, expected numbers or a datetime")
    if dtype.is_integer():
        value = column.cast(pl.Int64, strict=False)
        return pl.when(value < SECONDS_BELOW).then(value * 1000).otherwise(value)
    number = column.cast(pl.Float64, strict=False)
    scaled = pl.when(number < SECONDS_BELOW).then(number * 1000).otherwise(number)
    return scaled.round().cast(pl.Int64, strict=False)


def _split_bad(
    raw: pl.DataFrame, clean: pl.DataFrame, reason: pl.Expr, path: Path
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of ``clean`` whose reason is null, and the quarantine rows of the others (from ``raw``)."""
    reasons = clean.select(reason.alias(tables.REASON)).to_series()
    bad = raw.filter(reasons.is_not_null())
    originals = bad.drop(_ROW).write_ndjson().splitlines()
    quarantined = pl.DataFrame(
        {
            tables.FILE: [str(path)] * len(bad),
            tables.ROW: bad[_ROW],
            tables.REASON: reasons.drop_nulls(),
            tables.RAW: originals,
        },
        schema=pl.DataFrame(tables.QUARANTINE.empty_table()).schema,
    )
    return clean.filter(reasons.is_null()), quarantined


def _empty(name: str) -> pl.Expr:
    return (pl.col(name).is_null() | (pl.col(name) == "")).fill_null(True)


def _check_share(rejected: pl.DataFrame, total: int, config: DataConfig) -> None:
    if len(rejected) <= config.reject_share * total:
        return
    first = rejected.row(0, named=True)
    raise DataError(
        f"{first[tables.FILE]}: {len(rejected)} of {total} rows rejected, more than data.reject_share = "
        f"{config.reject_share}; first row {first[tables.ROW]}: {first[tables.REASON]}: {first[tables.RAW][:120]}"
    )


def clean_items(config: DataConfig) -> tuple[pl.DataFrame, pl.DataFrame, int, dict[str, int]]:
    """Items sorted by id, quarantined rows, rows read, and filtered counts.

    Of several rows with one id, the one updated last is kept (then the largest as text); copies are filtered,
    others quarantined. Raises DataError.
    """
    path = config.items
    raw = read_table(path, config.item_columns)
    _require(raw, [tables.ITEM_ID], path)
    items = raw.with_columns(_as_id(raw, tables.ITEM_ID, path))
    items = items.with_columns(_as_flag(items, path).alias(tables.AVAILABLE))
    unusable = (
        pl.when(_empty(tables.ITEM_ID))
        .then(pl.lit("empty item_id"))
        .when(pl.col(tables.AVAILABLE).is_null())
        .then(pl.lit("available is neither true nor false"))
    )
    items, bad = _split_bad(raw, items, unusable, path)
    items = items.with_columns(pl.Series(_TEXT, items.drop(_ROW).write_ndjson().splitlines(), pl.String))
    order = [tables.UPDATED_AT] if tables.UPDATED_AT in items.columns else []
    chosen = (
        items.sort([*order, _TEXT, _ROW], descending=True, nulls_last=True)
        .unique(tables.ITEM_ID, keep="first", maintain_order=True)
        .select(tables.ITEM_ID, chosen_text=_TEXT, chosen_row=_ROW)
    )
    items = items.join(chosen, on=tables.ITEM_ID, how="left", maintain_order="left")
    is_chosen = pl.col(_ROW) == pl.col("chosen_row")
    is_copy = is_chosen.not_() & (pl.col(_TEXT) == pl.col("chosen_text"))
    again = pl.when((is_chosen | is_copy).not_()).then(pl.lit("item_id again with other values"))
    originals = raw.join(items.select(_ROW), on=_ROW, how="semi", maintain_order="left")
    good, contradictions = _split_bad(originals, items, again, path)
    copies = good.filter(is_copy).height
    good = good.filter(is_chosen).drop(_ROW, _TEXT, "chosen_text", "chosen_row").sort(tables.ITEM_ID)
    rejected = pl.concat([bad, contradictions]).sort(tables.ROW)
    _check_share(rejected, raw.height, config)
    if good.is_empty():
        raise DataError(f"{path}: the catalog is empty: none of its {raw.height} rows can be used")
    return good, rejected, raw.height, {"item copies": copies}


def order_events(interactions: pl.DataFrame) -> pl.DataFrame:
    """Sort by user, then (timestamp, sequence where given, else hash(user, item)).

    Real logs tie on the timestamp for a quarter to a half of consecutive events, stored in id order, which
    leaks; the hash is an order that knows nothing (DESIGN 4).
    """
    hashes = tie_hashes(interactions[tables.USER_ID].to_list(), interactions[tables.ITEM_ID].to_list())
    keys = [tables.USER_ID, tables.TIMESTAMP, tables.SEQUENCE, _HASH, tables.EVENT, tables.LABEL]
    ordered = interactions.with_columns(pl.Series(_HASH, hashes, dtype=pl.Binary)).sort(keys, nulls_last=True)
    return ordered.drop(_HASH)


def clean_interactions(
    config: DataConfig, catalog: pl.Series
) -> tuple[pl.DataFrame, pl.DataFrame, int, dict[str, int]]:
    """Interactions ordered by ``order_events``, quarantined rows, rows read, and filtered counts.

    catalog: the known item ids. Raises DataError.
    """
    path = config.interactions
    raw = read_table(path, config.interaction_columns)
    _require(raw, [tables.USER_ID, tables.ITEM_ID, tables.TIMESTAMP], path)
    table = raw.with_columns(
        _as_id(raw, tables.USER_ID, path).alias(tables.USER_ID),
        _as_id(raw, tables.ITEM_ID, path).alias(tables.ITEM_ID),
        _as_milliseconds(raw, path).alias(tables.TIMESTAMP),
    )
    optional = {tables.SEQUENCE: pl.Int64, tables.EVENT: pl.String, tables.LABEL: pl.Float64}
    for name, dtype in optional.items():
        column = pl.col(name).cast(dtype, strict=False) if name in table.columns else pl.lit(None, dtype)
        table = table.with_columns(column.alias(name))
    reason = (
        pl.when(_empty(tables.USER_ID))
        .then(pl.lit("empty user_id"))
        .when(_empty(tables.ITEM_ID))
        .then(pl.lit("empty item_id"))
        .when(pl.col(tables.TIMESTAMP).is_null() | (pl.col(tables.TIMESTAMP) <= 0))
        .then(pl.lit("timestamp is not a positive number"))
    )
    good, rejected = _split_bad(raw, table, reason, path)
    _check_share(rejected, raw.height, config)
    names = tables.INTERACTIONS.names
    distinct = good.select(names).unique()
    known = distinct.filter(pl.col(tables.ITEM_ID).is_in(catalog.implode()))
    filtered = {
        "interaction copies": good.height - distinct.height,
        "unknown items": distinct.height - known.height,
    }
    if filtered["unknown items"] and config.unknown_items == "error":
        lost = distinct.filter(~pl.col(tables.ITEM_ID).is_in(catalog.implode()))[tables.ITEM_ID].unique().sort()
        raise DataError(
            f"{path}: {filtered['unknown items']} interactions with {len(lost)} items that are not in "
            f'{config.items}, first {lost[:3].to_list()}; add them, or set data.unknown_items = "drop"'
        )
    if known.is_empty():
        raise DataError(f"{path}: none of its {raw.height} rows has an item of {config.items}")
    return order_events(known), rejected, raw.height, filtered


def ingest(config: DataConfig) -> CleanTables:
    """Read, check and order both tables. Raises DataError; writes nothing."""
    items, bad_items, item_rows, item_filtered = clean_items(config)
    interactions, bad_events, event_rows, event_filtered = clean_interactions(config, items[tables.ITEM_ID])
    clean = CleanTables(
        items,
        interactions,
        pl.concat([bad_items, bad_events]),
        {"items": item_rows, "interactions": event_rows},
        {**item_filtered, **event_filtered},
    )
    taken = items.height + interactions.height + clean.quarantine.height + sum(clean.filtered.values())
    assert taken == item_rows + event_rows, "rows in are not rows out + quarantined + filtered"
    return clean


def to_arrow(table: pl.DataFrame) -> pa.Table:
    """The Arrow form with plain string columns, as Parquet and every other reader expects."""
    arrow = table.to_arrow()
    plain = {pa.large_string(): pa.string(), pa.string_view(): pa.string(), pa.large_binary(): pa.binary()}
    fields = [pa.field(field.name, plain.get(field.type, field.type)) for field in arrow.schema]
    return arrow.cast(pa.schema(fields))
