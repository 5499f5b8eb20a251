"""What came in, in figures: kept beside each data set as JSON, compared with the one before, shown in the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from item_tower.prompt import TemplateConfig, render
from pipeline.events import Events
from pipeline.ingest import CleanTables
from pipeline.intake import to_arrow
from schemas import tables
from schemas.records import Dataset

CountTokens = Callable[[list[str]], Sequence[int]]
_SAMPLE = 1_000  # texts rendered and tokenised
_TOP = 5
_PAIRS = 1 << 18  # events whose pairs of user and item are sorted at once
_QUANTILES = (0.5, 0.95, 1.0)


def _share(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0


def _day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = zip(_QUANTILES, np.quantile(values, _QUANTILES).tolist(), strict=True)
    return {"mean": round(float(values.mean()), 2)} | {f"p{round(100 * q)}": value for q, value in found}


def _repeats(users: NDArray[np.int32], items: NDArray[np.int32]) -> int:
    """Events whose user has an earlier one with the item. users: ordered, so that some at once can be looked at."""
    bounds = [*np.unique(np.searchsorted(users, users[::_PAIRS])).tolist(), len(users)]
    repeats = 0
    for start, end in pairwise(bounds):
        pairs = users[start:end].astype(np.int64)
        pairs <<= 32
        pairs |= items[start:end]
        pairs = pl.Series(pairs).sort(multithreaded=False).to_numpy()  # numpy's is slow with AVX-512 on Zen 4
        repeats += int(np.count_nonzero(pairs[1:] == pairs[:-1]))
    return repeats


def _largest(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the few largest, of equal ones the first."""
    least = np.partition(counts, -_TOP)[-_TOP] if len(counts) > _TOP else 0
    places = np.flatnonzero(counts >= least)
    return places[np.argsort(-counts[places], kind="stable")[:_TOP]]


def describe_events(events: Events) -> dict[str, Any]:
    """Counts, dates, and the shares of ties (consecutive events of a user at one time) and of repeated pairs.

    events: ordered, with an event for each of their names.
    """
    ties = same_users = repeats = 0
    counts = [np.zeros(0, dtype=np.int64)]
    for part in events.parts(by_user=True):
        users, times = part[tables.USER_ID].to_numpy(), part[tables.TIMESTAMP].to_numpy()
        same = users[1:] == users[:-1]
        same_users += int(np.count_nonzero(same))
        ties += int(np.count_nonzero(same & (times[1:] == times[:-1])))
        repeats += _repeats(users, part[tables.ITEM_ID].to_numpy())
        counts.append(np.diff(np.flatnonzero(np.concatenate([[True], ~same, [True]]))))
    by_user, by_item, every = np.concatenate(counts), events.counts(tables.ITEM_ID), events.rows[tables.TIMESTAMP]
    most = _largest(by_item)
    return {
        "interactions": len(events),
        "users": len(by_user),
        "items_named": len(by_item),
        "first_day": _day(int(every.min())),  # type: ignore[arg-type]
        "last_day": _day(int(every.max())),  # type: ignore[arg-type]
        "tie_share": _share(ties, same_users),
        "repeat_share": _share(repeats, len(events)),
        "events_per_user": _spread(by_user),
        "events_per_item": _spread(by_item),
        "top_items": {events.names[tables.ITEM_ID][int(place)].as_py(): int(by_item[place]) for place in most},
    }


def describe_items(
    items: pl.DataFrame, carried: int, template: TemplateConfig, count_tokens: CountTokens | None
) -> dict[str, Any]:
    """Counts, items without text, texts that several items share, and lengths of a sample as the template renders it.

    count_tokens: the tokenizer of the Item LLM; None where it cannot be had, then there are no token figures.
    """
    fields = [name for name in template.fields if name in items.columns]
    cells = [pl.col(name) for name in fields if items.schema[name] == pl.String]
    text = pl.Series([""]).new_from_index(0, items.height)
    if cells:
        text = items.select(pl.concat_str(cells, separator=", ", ignore_nulls=True)).to_series().str.strip_chars()
    given = text.filter(text != "")
    hashed = given.hash()
    again, top = hashed.sort().rle().struct.unnest().filter(pl.col("len") > 1), {}
    if len(again):
        most = again["value"].gather(_largest(again["len"].cast(pl.Int64).to_numpy()))
        heads = given.filter(hashed.is_in(most.implode()))
        counts = heads.value_counts().sort(["count", heads.name], descending=[True, False])
        top = {value[:80]: int(count) for value, count in counts.iter_rows()}
    found = {
        "items": items.height,
        tables.AVAILABLE: int(items[tables.AVAILABLE].sum()),
        "carried": carried,
        "without_text_share": _share(items.height - len(given), items.height) if cells else None,
        "same_text_share": _share(int(again["len"].sum()), items.height),
        "top_duplicates": top,
    }
    return found | _lengths(items, fields, template, count_tokens)


def _lengths(
    items: pl.DataFrame, fields: list[str], template: TemplateConfig, count_tokens: CountTokens | None
) -> dict[str, Any]:
    if not fields:
        return {"characters": {}, "tokens": {}}
    count = min(_SAMPLE, items.height)
    places = np.sort(np.random.default_rng(0).choice(items.height, count, replace=False, shuffle=False))
    sample = to_arrow(items[places].select(tables.ITEM_ID, *fields))
    rendered = [text for text in render(sample, template.model_copy(update={"fields": tuple(fields)})) if text]
    tokens = np.array(count_tokens(rendered)) if count_tokens and rendered else np.zeros(0)
    return {"characters": _spread(np.array([len(text) for text in rendered])), "tokens": _spread(tokens)}


def profile(
    clean: CleanTables, template: TemplateConfig, count_tokens: CountTokens | None, before: Dataset | None,
    profile_before: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything of one delivery as JSON values. before: the data set of the same name that this one follows."""
    found: dict[str, Any] = {
        "files": {
            kind: {"files": dict(zip(map(str, given.files), given.digests, strict=True)), "again": given.again}
            for kind, given in clean.deliveries.items()
        },
        "rows_in": clean.rows_in,
        "filtered": clean.filtered,
        "quarantined": dict(clean.quarantine[tables.REASON].value_counts().sort(tables.REASON).iter_rows()),
        "removed": clean.removed,
        "items": describe_items(clean.items, clean.carried, template, count_tokens),
        "interactions": describe_events(clean.events),
    }
    return found | {"drift": _drift(found, profile_before, before, clean.events)}


def _drift(
    now: dict[str, Any], then: dict[str, Any], before: Dataset | None, events: Events
) -> dict[str, Any] | None:
    """What changed since ``before``: figure -> [then, now]; and the events that came late, behind its watermark."""
    if before is None or not then:
        return None
    watched = [("items", name) for name in ("items", tables.AVAILABLE, "without_text_share", "same_text_share")]
    names = ("interactions", "users", "items_named", "first_day", "last_day", "tie_share", "repeat_share")
    watched += [("interactions", name) for name in names]
    changed = {
        f"{part}.{name}": [then[part][name], now[part][name]]
        for part, name in watched
        if then[part].get(name) != now[part][name]
    }
    for part, spread in (("items", "tokens"), ("interactions", "events_per_user")):
        means = [side[part].get(spread, {}).get("mean") for side in (then, now)]
        if means[0] != means[1]:
            changed[f"{part}.{spread}.mean"] = means
    behind = int((events.rows[tables.TIMESTAMP] <= before.watermark).sum())
    return {"since": before.id, "changed": changed, "late": max(0, behind - before.interactions)}


def drift_rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures that a report shows: name, now, and before where it was another; none without a profile."""
    if not found:
        return []
    changed = (found.get("drift") or {}).get("changed", {})
    rows = []
    for part in ("items", "interactions"):
        for name, value in found[part].items():
            if isinstance(value, int | float | str):
                then = changed.get(f"{part}.{name}")
                rows.append([f"{part}: {name}", str(value), "" if then is None else str(then[0])])
    rows.append(["items: tokens, mean", str(found["items"]["tokens"].get("mean", "unknown")), ""])
    for part in ("rows_in", "filtered", "quarantined"):
        rows.extend([f"{part}: {name}", str(count), ""] for name, count in found[part].items())
    return rows
