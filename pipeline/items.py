"""The catalog: which rows are items, which of several rows of one item counts, and items that left the feed."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline.columns import as_flag, as_id, as_milliseconds, as_text
from pipeline.files import unreadable_dataset
from pipeline.filters import apply, item_filter
from pipeline.importers import Delivery, read_file
from pipeline.intake import DataConfig, Intake, column_of, id_reason, require
from pipeline.readers import ROW, Part, ahead
from pipeline.text_order import places_by_text
from schemas import tables
from schemas.errors import DataError

_FILE = "__file"


def _clean_items(part: Part, path: Path, intake: Intake) -> pl.DataFrame:
    """The rows of a part that can be items. Raises DataError for a column of a wrong type."""
    raw = part.table
    require(raw, [tables.ITEM_ID], path)
    special = (tables.ITEM_ID, tables.AVAILABLE, tables.UPDATED_AT, ROW)
    columns = [as_id(column_of(raw, tables.ITEM_ID), path)]
    columns += [as_text(raw[name]) for name in raw.columns if name not in special]
    columns.append(as_flag(column_of(raw, tables.AVAILABLE), path).alias(tables.AVAILABLE))
    given = column_of(raw, tables.UPDATED_AT)
    if tables.UPDATED_AT in raw.columns:
        columns.append(as_milliseconds(given, path))
    unread = pl.lit(False)
    if given.dtype == pl.String:
        unread = pl.lit((given.str.strip_chars() != "") & columns[-1].is_null()).fill_null(False)
    reasons = [
        id_reason(column_of(raw, tables.ITEM_ID)),
        (pl.col(tables.AVAILABLE).is_null(), "available is neither true nor false"),
        (unread, "updated_at is no time"),
    ]
    return intake.split(part, pl.DataFrame([*columns, raw[ROW]]), reasons, path)


def _read_items(config: DataConfig, given: Delivery, intake: Intake) -> pl.DataFrame:
    """All usable rows of the catalog's files, mapped; with the number of file and row."""
    for number, path in enumerate(given.files):
        for part in ahead(read_file(path, "items", config.format, config.item_columns, config.encoding)):
            intake.take(path, part)
            clean = _clean_items(part, path, intake)
            intake.save(clean.with_columns(pl.lit(number, pl.Int32).alias(_FILE)), "clean")
    intake.check_share()
    return intake.saved("clean")


def _newest(rows: pl.DataFrame, given: Delivery, intake: Intake) -> pl.DataFrame:
    """One row an id: that updated last, then that of the last file. Of several such rows the largest as text.

    Older rows and copies are filtered; another text in the same file at the same time is rejected.
    """
    intake.filtered |= {"older item rows": 0, "item copies": 0}
    if rows[tables.ITEM_ID].hash().n_unique() == rows.height:  # several times as fast as telling the ids apart
        return rows
    again = rows.select(pl.col(tables.ITEM_ID).is_duplicated()).to_series()
    order = [name for name in (tables.UPDATED_AT, _FILE) if name in rows.columns]
    several = rows.with_row_index("__place").filter(again).sort([tables.ITEM_ID, *order], nulls_last=False)
    last = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).last().over(tables.ITEM_ID)) for name in order)
    current = several.filter(last)
    texts = current.drop("__place", ROW, _FILE).write_ndjson().splitlines()
    current = current.select("__place", tables.ITEM_ID, ROW, _FILE, pl.Series("__text", texts, dtype=pl.String))
    current = current.sort(tables.ITEM_ID, "__text", ROW, descending=[False, True, True])
    first = pl.col(tables.ITEM_ID).is_first_distinct()
    copy = first.not_() & (pl.col("__text") == pl.col("__text").first().over(tables.ITEM_ID))
    chosen = current.filter(first)["__place"]
    bad = current.filter((first | copy).not_())
    intake.filtered["older item rows"] = several.height - current.height
    intake.filtered["item copies"] = current.height - len(chosen) - bad.height
    for (number,), group in bad.group_by(_FILE):
        reasons = ["item_id again with other values"] * group.height
        intake.reject(given.files[number], group[ROW].to_list(), reasons, group["__text"].to_list())
    return rows[pl.concat([(~again).arg_true(), chosen]).sort()]


def clean_items(config: DataConfig, given: Delivery, intake: Intake) -> tuple[pl.DataFrame, pl.Series]:
    """Items sorted by id, and every id of the feed, also of items that are filtered. Raises DataError."""
    rows = _read_items(config, given, intake)
    if not rows.is_empty():
        rows = _newest(rows, given, intake)
        intake.check_share()
    good = apply(rows.drop(ROW, _FILE, strict=False), item_filter(config.filters, rows), intake.leave)
    if good.is_empty():
        raise DataError(
            f"{config.items}: the catalog is empty: none of its {intake.rows_in} rows can be used "
            f"({intake.rejected} rejected, filtered {intake.filtered})"
        )
    intake.check_sum(good.height)
    return good[places_by_text(good[tables.ITEM_ID])], rows[tables.ITEM_ID]


def carry(items: pl.DataFrame, previous: Path, wanted: pl.Series) -> pl.DataFrame:
    """Rows of the data set before for ``wanted`` ids, unavailable, in tonight's columns; null where it had none."""
    kept = pl.scan_parquet(previous).filter(pl.col(tables.ITEM_ID).is_in(wanted.implode()))
    try:
        old = kept.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable_dataset(previous, error) from error
    columns = []
    for name, dtype in items.schema.items():
        same = name in old.columns and (
            old.schema[name] == dtype or not (dtype.is_nested() or old.schema[name].is_nested())
        )
        columns.append(pl.col(name).cast(dtype, strict=False) if same else pl.lit(None, dtype).alias(name))
    carried = old.select(columns).with_columns(pl.lit(False).alias(tables.AVAILABLE))
    both = pl.concat([items, carried], rechunk=False)
    return both[places_by_text(both[tables.ITEM_ID])]
