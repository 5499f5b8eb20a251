"""Cells to the types of our tables: ids, times, flags, numbers, texts. What cannot be read becomes a reason."""

from __future__ import annotations

import json
import time
from pathlib import Path

import polars as pl

from schemas import tables
from schemas.errors import DataError

# Unix seconds stay below this until the year 5138; milliseconds are above it since 1973.
SECONDS_BELOW = 100_000_000_000
DAY = 86_400_000  # milliseconds
FLAGS = {"true": True, "1": True, "yes": True, "": True, "false": False, "0": False, "no": False}
# tried in this order on times that are no numbers; without a zone they are UTC
TIME_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d", "%m/%d/%Y %I:%M:%S %p")
Reason = tuple[pl.Expr, str]  # of rows that a condition holds for, why they are not taken
_PLAIN = (pl.String, pl.Boolean, pl.Float64)
_WHOLE = r"^[+-]?\d+$"


def as_id(column: pl.Series, path: Path, tidy: bool = False) -> pl.Series:
    """Ids as text without outer spaces; null where there is none. A float that is whole counts as that number.

    tidy: there are none to take off (``Part.tidy``). Raises DataError for a column that cannot hold ids.
    """
    dtype = column.dtype
    if dtype.is_float():
        whole = column.is_finite() & (column == column.round()) & (column.abs() < 2**53)
        column = column.to_frame().select(pl.when(whole).then(pl.col(column.name))).to_series().cast(pl.Int64)
    elif not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(f"{path}: column {column.name!r} is {dtype}, expected text or whole numbers")
    text = column.cast(pl.String)
    return text if tidy or column.dtype != pl.String else text.str.strip_chars()


def _text_times(text: pl.Series) -> pl.Series:
    """Milliseconds of times that are written as text: numbers, or one of TIME_FORMATS; null where unreadable."""
    numbers = _scaled(text.cast(pl.Int64, strict=False))
    if numbers.null_count() == text.null_count():
        return numbers
    text = text.str.strip_chars()
    if numbers.null_count() > text.null_count():
        numbers = numbers.zip_with(numbers.is_not_null(), _scaled(text.cast(pl.Float64, strict=False)))
    for form in TIME_FORMATS:
        if numbers.null_count() == text.null_count():
            break
        spelled = text.str.replace(r"^(\d{4}-\d{2}-\d{2}) (\d)", "${1}T$2").str.replace(r"[zZ]$", "+00:00")
        numbers = numbers.zip_with(numbers.is_not_null(), _parsed(spelled, form))
    return numbers


def _parsed(text: pl.Series, form: str) -> pl.Series:
    if form.endswith("z"):
        return text.str.to_datetime(form, time_unit="ms", time_zone="UTC", strict=False).dt.epoch("ms")
    return text.str.to_datetime(form, time_unit="ms", strict=False).dt.epoch("ms")


def _scaled(number: pl.Series) -> pl.Series:
    """Seconds or milliseconds, told apart value by value, as int64 milliseconds."""
    low, high = number.min(), number.max()
    if not number.dtype.is_float() and low is not None and -SECONDS_BELOW < low <= high < SECONDS_BELOW:  # type: ignore[operator]
        return number * 1000
    given = pl.col(number.name)
    small = given.abs() < SECONDS_BELOW
    scaled = number.to_frame().select(pl.when(small).then(given * 1000).otherwise(given)).to_series()
    return scaled.round().cast(pl.Int64, strict=False) if number.dtype.is_float() else scaled


def as_milliseconds(column: pl.Series, path: Path) -> pl.Series:
    """int64 milliseconds since 1970, null where unreadable. Raises DataError for a column that holds no times."""
    dtype = column.dtype
    if dtype == pl.Null:
        return column.cast(pl.Int64)
    if dtype == pl.String:
        return _text_times(column)
    if isinstance(dtype, pl.Datetime) or dtype == pl.Date:
        return column.cast(pl.Datetime("ms", getattr(dtype, "time_zone", None))).dt.epoch("ms")
    if dtype.is_integer():
        return _scaled(column.cast(pl.Int64, strict=False))
    if not dtype.is_numeric():
        raise DataError(f"{path}: column {column.name!r} is {dtype}, expected numbers or a datetime")
    return _scaled(column.cast(pl.Float64, strict=False))


def time_reasons(name: str) -> list[Reason]:
    """Where a time in milliseconds cannot be one."""
    latest = time.time_ns() // 1_000_000 + DAY
    return [
        (pl.col(name).is_null() | (pl.col(name) <= 0), "timestamp is not a positive number"),
        (pl.col(name) > latest, "timestamp is in the future"),
    ]


def nothing(name: str, rows: int) -> pl.Series:
    """A column that is not there: of type Null."""
    return pl.Series(name, [None], dtype=pl.Null).new_from_index(0, rows)


def as_flag(column: pl.Series, path: Path) -> pl.Series:
    """``available`` as a boolean: true where it is not given, null where it cannot be read."""
    dtype = column.dtype
    if dtype == pl.Boolean:
        return column.fill_null(True)
    if dtype == pl.Null:
        return pl.Series(column.name, [True]).new_from_index(0, len(column))
    if not (dtype.is_integer() or dtype == pl.String):
        raise DataError(f"{path}: column {tables.AVAILABLE!r} is {dtype}, expected true and false")
    words = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    return words.fill_null("").replace_strict(FLAGS, default=None, return_dtype=pl.Boolean)


def as_number(column: pl.Series, dtype: pl.DataType | type[pl.DataType], path: Path) -> tuple[pl.Series, pl.Series]:
    """The column as that type, null where it is empty; and where something is given that is no such number."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.String, pl.Boolean, pl.Null)):
        raise DataError(f"{path}: column {column.name!r} is {column.dtype}, expected numbers")
    given = column.is_not_null()
    if column.dtype == pl.String:
        column = column.str.strip_chars()
        given &= column != ""
    number = column.cast(pl.Float64, strict=False)
    given &= ~number.is_nan().fill_null(False)  # how pandas writes nothing
    if dtype == pl.Int64:
        whole = column.cast(pl.Int64, strict=False)
        exact = number.round().cast(pl.Int64, strict=False)
        number = whole.zip_with(whole.is_not_null() & (not column.dtype.is_float()), exact.set(number != exact, None))
    else:
        number = number.set(number.is_finite().not_(), None)
    return number, given & number.is_null()


def as_text(column: pl.Series) -> pl.Series:
    """A column of the catalog in a type that a template can render and Parquet can hold; empty text is null."""
    dtype = column.dtype
    if dtype == pl.String:
        return column.set(column == "", None)
    if dtype == pl.Float32:  # 4.99, as in a file of text, not 4.989999771118164
        return column.cast(pl.String).cast(pl.Float64)
    if dtype in _PLAIN or (dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128)):
        return column
    if dtype == pl.List and dtype.inner in (pl.String, pl.Int64, pl.Int32, pl.Float64):  # type: ignore[attr-defined]
        return column
    if dtype == pl.Duration:
        return column.dt.to_string()
    if dtype.is_nested() or dtype == pl.Object:
        return pl.Series(
            column.name,
            [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in column.to_list()],
            dtype=pl.String,
        )
    return column.cast(pl.String)
