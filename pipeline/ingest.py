"""Files as they come to clean tables: what is taken, what is quarantined, what is filtered (DESIGN 4).

Memory: some parts of a file at a time, 20 bytes an event (``pipeline.events``), and the ids, each with at most 48
bytes to find it by. The catalog's texts and the rejected rows lie in a temporary folder (TMPDIR) and are mapped.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow.parquet as pq

from pipeline.columns import as_id, as_milliseconds, as_number, as_text, time_reasons
from pipeline.events import EventBuilder, Events, order_events
from pipeline.files import UNREADABLE, unreadable_dataset
from pipeline.filters import apply, event_filter, first_events, k_core
from pipeline.forgotten import FILTER, ForgottenUsers
from pipeline.importers import Delivery, Kind, delivery, read_file
from pipeline.intake import QUARANTINE, DataConfig, Intake, column_of, id_reason, require
from pipeline.items import carry, clean_items
from pipeline.readers import Part, ahead
from schemas import tables
from schemas.errors import DataError

_UNKNOWN, _REPEATS, _OUTSIDE = "unknown items", "repeats", "outside the k-core"
_LEFT_OUT = (FILTER, _UNKNOWN, _REPEATS, _OUTSIDE)  # with one of these events a name can be lost, never with a copy


@dataclass(frozen=True)
class CleanTables:
    """items sorted by id; events in the order of ``order_events``, an event for each of their names; the counts add
    up to ``rows_in``.

    carried: items of the data set before that left the catalog and that an event names, in ``items``, unavailable;
    removed: those that no event names.
    """

    items: pl.DataFrame
    events: Events
    quarantine: pl.DataFrame
    rows_in: dict[str, int]
    filtered: dict[str, int]
    carried: int
    removed: int
    deliveries: dict[Kind, Delivery]

    @property
    def interactions(self) -> pl.DataFrame:
        """The events as one table with their ids, for data that is small."""
        return pl.concat(
            [
                pl.DataFrame(tables.INTERACTIONS.empty_table()),
                *map(pl.DataFrame, self.events.slices()),
            ]
        )


class _Catalog(NamedTuple):
    """known: ids that an event may name, sorted: of ``items`` and those of the data set before that are ``gone``."""

    items: pl.DataFrame
    known: pl.Series
    gone: pl.Series


def _read_catalog(config: DataConfig, given: Delivery, intake: Intake, previous: Path | None) -> _Catalog:
    items, feed = clean_items(config, given, intake)
    known = items[tables.ITEM_ID]
    if previous is None:
        return _Catalog(items, known, known[:0])
    before = _ids_before(previous)
    gone = before.filter(~before.is_in(feed.implode()))
    return _Catalog(items, pl.concat([known, gone]).sort() if len(gone) else known, gone)


def _ids_before(previous: Path) -> pl.Series:
    try:
        found = pq.read_table(previous, columns=[tables.ITEM_ID], page_checksum_verification=True)
    except UNREADABLE as error:
        raise unreadable_dataset(previous, error) from error
    return pl.Series(found.column(tables.ITEM_ID))


def _check_swapped(events: pl.DataFrame, path: Path) -> None:
    """Raise DataError when an id column holds times and the time column does not."""
    median = events[tables.TIMESTAMP].median()
    if events.height < 2 or (isinstance(median, float) and median > 1e11):  # 1973
        return
    for name in (tables.USER_ID, tables.ITEM_ID):
        likely = events[name].cast(pl.Float64, strict=False).is_between(6e8, 4e12).fill_null(False)
        if likely.mean() > 0.9:  # type: ignore[operator]
            raise DataError(
                f"{path}: column {name!r} holds what look like times ({events[name][0]}) and 'timestamp' does not; "
                f"are two columns swapped?"
            )


def _clean_events(part: Part, path: Path, intake: Intake) -> pl.DataFrame:
    """The rows of a part that can be interactions. Raises DataError for a column of a wrong type."""
    raw = part.table
    require(raw, [tables.USER_ID, tables.ITEM_ID, tables.TIMESTAMP], path)
    ids = [as_id(column_of(raw, name), path, part.tidy) for name in (tables.USER_ID, tables.ITEM_ID)]
    times = as_milliseconds(column_of(raw, tables.TIMESTAMP), path)
    sequence, no_sequence = _number(raw, tables.SEQUENCE, pl.Int64(), path)
    label, no_label = _number(raw, tables.LABEL, pl.Float64(), path)
    kinds = column_of(raw, tables.EVENT)
    if kinds.dtype.is_nested() or kinds.dtype == pl.Object:
        raise DataError(f"{path}: column {tables.EVENT!r} is {kinds.dtype}, expected text")
    event = kinds if kinds.dtype == pl.Null else as_text(as_text(kinds).cast(pl.String))
    reasons = [id_reason(column_of(raw, name)) for name in (tables.USER_ID, tables.ITEM_ID)]
    reasons += time_reasons(tables.TIMESTAMP)
    if no_sequence is not None:
        reasons.append((pl.lit(no_sequence), f"{tables.SEQUENCE} is not a whole number"))
    if no_label is not None:
        reasons.append((pl.lit(no_label), f"{tables.LABEL} is not a number"))
    table = pl.DataFrame([*ids, times.alias(tables.TIMESTAMP), sequence, event, label])
    return intake.split(part, table, reasons, path)


def _number(raw: pl.DataFrame, name: str, dtype: pl.DataType, path: Path) -> tuple[pl.Series, pl.Series | None]:
    column = column_of(raw, name)
    if column.dtype == pl.Null:
        return column, None
    number, wrong = as_number(column, dtype, path)
    return number.alias(name), wrong


def _read_events(config: DataConfig, given: Delivery, intake: Intake, items: Future[_Catalog]) -> tuple[Events, int]:
    """All usable events of the files, filters by row applied; and how many known items they have (``build_with``)."""
    builder, filters = EventBuilder(), event_filter(config.filters)
    for path in given.files:
        first = True
        parts = read_file(path, "interactions", config.format, config.interaction_columns, config.encoding)
        for part in ahead(parts):
            if items.done():
                items.result()
            intake.take(path, part)
            clean = _clean_events(part, path, intake)
            if first:
                _check_swapped(clean, path)
                first = False
            builder.add(apply(clean, filters, intake.leave))
    intake.check_share()
    return builder.build_with(items.result().known)


def _alike(ids: pl.Series) -> pl.Series:
    """Ids without what a program may add to or take from a number: leading zeros, and ``.0``."""
    return ids.str.replace(r"\.0+$", "").str.replace(r"^0+(\d)", "$1")


def _check_unknown(events: Events, first: int, known: pl.Series, config: DataConfig) -> pl.Series:
    """Which events name a known item, one of the ``first`` names. Raises DataError when that is none, or by policy
    when it is not all.
    """
    mask = events.rows[tables.ITEM_ID] < first
    unknown = len(events) - int(mask.sum())
    if not unknown:
        return mask
    lost = pl.Series(events.names[tables.ITEM_ID][first:], dtype=pl.String)
    spelled = lost.filter(_alike(lost).is_in(_alike(known).implode()))
    events_of = pl.Series(events.counts(tables.ITEM_ID)[first:]).filter(lost.is_in(spelled.implode())).sum()
    if events_of > config.reject_share * len(events):
        raise DataError(
            f"{config.interactions}: {events_of} interactions have items such as {spelled[0]!r}, spelled otherwise "
            f"in {config.items} (leading zeros, or a number with .0); write ids alike in both, as text"
        )
    if unknown == len(events):
        raise DataError(f"{config.interactions}: none of its {unknown} rows has an item of {config.items}")
    if config.unknown_items == "error":
        raise DataError(
            f"{config.interactions}: {unknown} interactions with {len(lost)} items that are not in "
            f'{config.items}, first {lost[:3].to_list()}; add them, or set data.unknown_items = "drop"'
        )
    return mask


def _kept(intake: Intake, name: str, events: Events, kept: Events) -> Events:
    """``kept``, what is missing of ``events`` counted as filtered."""
    intake.leave(name, len(events) - len(kept))
    return kept


def _events_of_items(config: DataConfig, given: Delivery, intake: Intake, catalog: Future[_Catalog]) -> Events:
    """The events that name a known item, as they came, without those of forgotten users. Raises DataError, that of
    the catalog first.
    """
    try:
        events, first = _read_events(config, given, intake, catalog)
    except DataError:
        catalog.result()
        raise
    if not len(events):
        raise DataError(f"{config.interactions}: none of its {intake.rows_in} rows is left ({intake.filtered})")
    if intake.forgotten:
        gone = intake.forgotten.mask(events.names[tables.USER_ID].to_pylist())
        events = _kept(intake, FILTER, events, events.where(~gone[events.rows[tables.USER_ID].to_numpy()]))
    known = events.where(_check_unknown(events, first, catalog.result().known, config))
    return _kept(intake, _UNKNOWN, events, known)


def clean_interactions(config: DataConfig, given: Delivery, intake: Intake, catalog: Future[_Catalog]) -> Events:
    """Events with a known item, ordered, without copies, filtered. Raises DataError, that of the catalog first."""
    events, copies = order_events(_events_of_items(config, given, intake, catalog))  # held nowhere: they may go
    intake.leave("interaction copies", copies)
    if config.filters.first_only:
        events = _kept(intake, _REPEATS, events, first_events(events))
    if config.filters.k_core:
        events = _kept(intake, _OUTSIDE, events, k_core(events, config.filters.k_core))
    if not len(events):
        counts = intake.filtered
        raise DataError(f"{config.interactions}: the filters leave none of its {intake.rows_in} rows ({counts})")
    intake.check_sum(len(events))
    lost = any(intake.filtered.get(name) for name in _LEFT_OUT)
    return events.compact() if lost else events


def ingest(config: DataConfig, previous: Path | None = None, forgotten: ForgottenUsers | None = None) -> CleanTables:
    """Read both tables beside each other, check, filter and order them. Raises DataError; publishes nothing.

    previous: the catalog file of the data set before, from which items that left the feed are carried over while
    an interaction names them; forgotten: users whose rows are left out and counted.
    """
    without = forgotten or ForgottenUsers(())
    with tempfile.TemporaryDirectory(prefix="hllm-ingest-") as folder:
        intakes = {kind: Intake(kind, config, Path(folder), without) for kind in ("items", "interactions")}
        hashing = ThreadPoolExecutor(1)
        try:
            deliveries: dict[Kind, Delivery] = {
                "items": delivery(config.items, "items", hashing),
                "interactions": delivery(config.interactions, "interactions", hashing),
            }
            with ThreadPoolExecutor(1) as pool:
                catalog = pool.submit(_read_catalog, config, deliveries["items"], intakes["items"], previous)
                events = clean_interactions(config, deliveries["interactions"], intakes["interactions"], catalog)
            wait(future for given in deliveries.values() for future in given.hashing)
        finally:
            hashing.shutdown(wait=False, cancel_futures=True)
        items, _, gone = catalog.result()
        wanted = gone
        if previous is not None and len(gone):
            wanted = gone.filter(gone.is_in(pl.Series(events.names[tables.ITEM_ID], dtype=pl.String).implode()))
            items = carry(items, previous, wanted) if len(wanted) else items
        rejected = [intake.saved("rejected", QUARANTINE).sort(tables.FILE, tables.ROW) for intake in intakes.values()]
        return CleanTables(
            items=items,
            events=events,
            quarantine=pl.concat(rejected, rechunk=False),
            rows_in={kind: intake.rows_in for kind, intake in intakes.items()},
            filtered={name: rows for intake in intakes.values() for name, rows in intake.filtered.items()},
            carried=len(wanted),
            removed=len(gone) - len(wanted),
            deliveries=deliveries,
        )
