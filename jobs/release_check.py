"""The figures behind a release's gates: tonight's data, index and recall against the champion's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs import evaluate
from jobs.context import Context
from pipeline.cache import read_items
from pipeline.dataset import events_before, find_dataset, read_profile
from pipeline.metrics import FloatArray, per_user
from pipeline.release_gates import Gate, ReleaseGates, at_least, at_most, change, non_inferior, slices_not_worse
from pipeline.slices import target_slices
from pipeline.splits import queries, training_part
from schemas import tables
from schemas.records import Dataset, Release, Snapshot

_DAY = 86_400_000
_ENOUGH_ROWS = 100  # of new events, for a share of them to mean something
Ranks = dict[tuple[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Candidate:
    """What tonight made. index: the answer of build-index; evaluated: that of evaluate."""

    dataset: Dataset
    snapshot: Snapshot | None
    index: dict[str, Any]
    evaluated: dict[str, Any]


def data_gates(context: Context, candidate: Candidate, champion: Release | None) -> list[Gate]:
    """Coverage, drift of the input and freshness. What there is nothing to compare with passes as ``first``."""
    limits, now = context.config.refresh.gates, candidate.dataset
    then = None if champion is None else find_dataset(context.store, champion.dataset)
    profile = read_profile(context.store, now)
    before = None if then is None else read_profile(context.store, then)
    snapshot = candidate.snapshot
    left_out = 0.0 if snapshot is None else snapshot.quarantined / max(1, snapshot.items + snapshot.quarantined)

    def figure(part: str, name: str) -> tuple[float | None, float | None]:
        found = [None if side is None else side.get(part, {}).get(name) for side in (profile, before)]
        means = [value.get("mean") if isinstance(value, dict) else value for value in found]
        return means[0], means[1]

    lost = None if then is None else max(0, then.interactions - now.interactions) / max(1, then.interactions)
    days = None if then is None else (now.watermark - then.watermark) / _DAY
    unknown, of_what = _unknown_items(now, then)
    gates = [
        at_most("left out", left_out, limits.max_left_out),
        at_most("catalog size", change(*figure("items", tables.AVAILABLE)), limits.max_catalog_change),
        at_most("text length", change(*figure("items", "characters")), limits.max_text_change),
        at_most("interactions lost", lost, limits.max_interactions_lost),
        at_most("unknown items", unknown, limits.max_unknown_items, of_what),
        at_most("late events", _late_events(context, now, then), limits.max_late_events),
        at_least("newer than the champion, days", days, 0.0),
    ]
    if limits.max_age_days is not None:
        age = (now.created_at - now.watermark) / _DAY
        gates.append(at_most("age of the newest event, days", age, limits.max_age_days))
    return gates


def _unknown_items(now: Dataset, then: Dataset | None) -> tuple[float, str]:
    """Share of events with an item that the catalog lacks, and of which rows: of all, or of those that came since the
    champion where that is more, or else one bad file among many good ones would not be seen."""
    rows = now.rows_in.get("interactions", now.interactions)
    unknown = now.filtered.get("unknown items", 0)
    whole = unknown / max(1, rows)
    if then is None:
        return whole, ""
    new_rows = rows - then.rows_in.get("interactions", then.interactions)
    if new_rows < _ENOUGH_ROWS:
        return whole, ""
    new = (unknown - then.filtered.get("unknown items", 0)) / new_rows
    return (new, f"of {new_rows} new rows") if new > whole else (whole, "")


def _late_events(context: Context, now: Dataset, then: Dataset | None) -> float | None:
    """Share of the events that came since the champion which are more than a day older than its newest one; None
    where too few came."""
    new = 0 if then is None else now.interactions - then.interactions
    if then is None or new < _ENOUGH_ROWS:
        return None
    limit = then.watermark - _DAY
    return max(0, events_before(context.store, now, limit) - events_before(context.store, then, limit)) / new


def index_gate(candidate: Candidate, limits: ReleaseGates) -> Gate:
    """What the index finds of the exact neighbours; no validation history to ask with decides nothing."""
    loss = candidate.index["ann"].get("ann_loss")
    if loss is None:
        return Gate("index recall", None, f">= {limits.min_index_recall:g}", "undecided", "no validation histories")
    return at_least("index recall", 1 - loss, limits.min_index_recall)


def _ranks(context: Context, run_id: str) -> Ranks:
    table = context.tracker.read_table(run_id, "ranks.parquet")
    columns = (table.column(name).to_pylist() for name in tables.RANKS.names)
    return {(user, target): (above, ties) for user, target, above, ties in zip(*columns, strict=True)}


def _values(context: Context, ranks: Ranks, asked: list[tuple[str, str]]) -> FloatArray:
    """[U] the deciding metric of each user over some targets, which lie together by user."""
    users = [user for user, _ in asked]
    starts = [place for place, user in enumerate(users) if place == 0 or user != users[place - 1]]
    above = np.array([ranks[pair][0] for pair in asked], dtype=np.int64)
    ties = np.array([ranks[pair][1] for pair in asked], dtype=np.int64)
    offsets = np.array([*starts, len(users)], dtype=np.int64)
    config = context.config.evaluate
    return per_user(above, ties, config.ks, len(context.dataset.item_ids), offsets)[config.metric]


def quality_gates(
    context: Context, candidate: Candidate, champion: Release | None
) -> tuple[list[Gate], dict[str, Any]]:
    """The paired comparison on the targets that both were asked, none of which either was trained on and whose items
    both catalogs hold; and the champion's own evaluation on tonight's data."""
    limits, metric = context.config.refresh.gates, context.config.evaluate.metric
    if champion is None:
        value = candidate.evaluated["metrics"][metric]
        return [Gate(metric, round(value, 6), f"> {-limits.max_metric_loss:g}", "first", "no champion yet")], {}
    theirs = evaluate.run(context, "test", champion.snapshot, champion.user_tower)
    ours, others = (_ranks(context, result["run_id"]) for result in (candidate.evaluated, theirs))
    common = _common_items(context, candidate.snapshot, champion)
    asked = [pair for pair in ours if pair in others and (common is None or pair[1] in common)]
    gates = [
        non_inferior(
            metric, _values(context, ours, asked), _values(context, others, asked), limits.max_metric_loss, limits
        )
    ]
    config, dataset = context.config.evaluate, context.dataset
    every = queries(dataset.histories, "test", config)
    counts = np.bincount(training_part(dataset.histories, config).items, minlength=len(dataset.item_ids))
    owners = every.owners.tolist()
    pairs = [
        (every.histories.users[o], dataset.item_ids[t]) for o, t in zip(owners, every.targets.tolist(), strict=True)
    ]
    chosen, members = set(asked), {}
    for label, mask in target_slices(every, counts).items():
        own = [pairs[place] for place in np.flatnonzero(mask).tolist() if pairs[place] in chosen]
        if own:
            members[label] = (_values(context, ours, own), _values(context, others, own))
    return [*gates, *slices_not_worse(members, limits.max_slice_loss, limits)], theirs


def _common_items(context: Context, snapshot: Snapshot | None, champion: Release) -> set[str] | None:
    """Ids that both snapshots hold; None where neither reads one."""
    if snapshot is None or champion.snapshot is None or snapshot.id == champion.snapshot:
        return None
    before = context.store.get(Snapshot, champion.snapshot)
    held = [set(read_items(context.store, each).column(tables.ITEM_ID).to_pylist()) for each in (snapshot, before)]
    return held[0] & held[1]
