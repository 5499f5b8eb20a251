"""Which clean rows are wanted: filters by configuration, each counted by its name."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.events import Events
from schemas import tables
from schemas.errors import DataError


class FilterConfig(BaseModel):
    """What of the clean rows is left out. The defaults leave nothing out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    events: tuple[str, ...] = ()
    """Event types to keep; none named: all."""
    min_label: float | None = None
    """Smallest label (rating) to keep; events without one go."""
    since: dt.date | None = None
    """First day to keep, UTC."""
    before: dt.date | None = None
    """First day not to keep any more, UTC."""
    first_only: bool = False
    """Of a user's events with one item only the first is kept."""
    k_core: int = Field(default=0, ge=0)
    """Users and items with fewer events go, again and again until none has fewer. The catalog stays whole."""
    min_text: int = Field(default=0, ge=0)
    """Fewest characters of an item, over all of its text columns."""
    script: str | None = Field(default=None, pattern="^[A-Za-z_]+$")
    """Unicode script that most letters of an item must be of, such as Latin or Han: it stands in for language."""


def _midnight(day: dt.date) -> int:
    return int(dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC).timestamp() * 1000)


def event_filter(filters: FilterConfig) -> dict[str, pl.Expr]:
    """Name of each filter -> which events it leaves out; they are applied in this order."""
    out: dict[str, pl.Expr] = {}
    if filters.events:
        out["other event types"] = pl.col(tables.EVENT).is_in(list(filters.events)).fill_null(False).not_()
    if filters.min_label is not None:
        out["label below minimum"] = (pl.col(tables.LABEL) >= filters.min_label).fill_null(False).not_()
    if filters.since is not None:
        out["before the first day"] = pl.col(tables.TIMESTAMP) < _midnight(filters.since)
    if filters.before is not None:
        out["after the last day"] = pl.col(tables.TIMESTAMP) >= _midnight(filters.before)
    return out


def item_filter(filters: FilterConfig, items: pl.DataFrame) -> dict[str, pl.Expr]:
    """As ``event_filter``, for the catalog. Raises DataError for a script that Unicode does not have."""
    names = [n for n, dtype in items.schema.items() if dtype == pl.String and n != tables.ITEM_ID]
    text = pl.concat_str([pl.col(name).fill_null("") for name in names], separator=" ") if names else pl.lit("")
    out: dict[str, pl.Expr] = {}
    if filters.min_text:
        out["text too short"] = text.str.strip_chars().str.len_chars() < filters.min_text
    if filters.script:
        try:
            pl.Series(["a"]).str.count_matches(rf"\p{{{filters.script}}}")
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"data.filters.script = {filters.script!r} is no Unicode script; Latin, Cyrillic, Han are"
            ) from error
        wanted = text.str.count_matches(rf"\p{{{filters.script}}}")
        out[f"text not {filters.script}"] = wanted * 2 <= text.str.count_matches(r"\p{L}")
    return out


def apply(table: pl.DataFrame, left_out: dict[str, pl.Expr], count: Callable[[str, int], None]) -> pl.DataFrame:
    """The rows that no filter leaves out; ``count`` is told of the others, by filter."""
    for name, expression in left_out.items():
        kept = table.filter(~expression)
        count(name, table.height - kept.height)
        table = kept
    return table


def first_events(events: Events) -> Events:
    """The first event of each (user, item), of ordered events."""
    pairs = events.rows.select(
        pl.struct(pl.col(tables.USER_ID), pl.col(tables.ITEM_ID)).is_first_distinct().alias("first")
    )
    return events.where(pairs["first"])


def k_core(events: Events, k: int) -> Events:
    """The largest part in which every user and every item has ``k`` events or more."""
    users, items = events.rows[tables.USER_ID].to_numpy(), events.rows[tables.ITEM_ID].to_numpy()
    keep: NDArray[np.bool_] = np.ones(len(events), dtype=bool)
    while True:
        by_user = np.bincount(users[keep], minlength=len(events.names[tables.USER_ID]))
        by_item = np.bincount(items[keep], minlength=len(events.names[tables.ITEM_ID]))
        still = keep & (by_user[users] >= k) & (by_item[items] >= k)
        if still.sum() == keep.sum():
            return events.where(keep)
        keep = still
