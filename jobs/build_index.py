"""build-index: FAISS over the available candidates of a user tower's snapshot."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.context import Context, ServingTower, inputs_hash
from jobs.train_user import catalog_rows
from pipeline.ann import resolve_kind
from pipeline.baselines import TowerRecommender
from pipeline.effort import chooses
from pipeline.index import ann_report, build_index, open_index
from pipeline.splits import queries
from schemas.errors import DataError, NotFoundError
from schemas.records import Index

SAMPLE, REPORT_K = 1000, 100
LEAST = 50  # histories from which they tell how far to search
RESULT = "index.json"
_FORMAT = "1"  # of RESULT


class _Sample(NamedTuple):
    """Validation histories as queries. choosing: [C, D] to choose the index's effort by, or None; queries [Q, D],
    targets [Q] and seen, rows of the index: to measure it by."""

    choosing: NDArray[np.float32] | None
    queries: NDArray[np.float32]
    targets: NDArray[np.int64]
    seen: list[NDArray[np.int64]] | None


def _sample(
    context: Context, serving: ServingTower, recommender: TowerRecommender, rows: NDArray[np.int64]
) -> _Sample | str:
    """A fixed sample of histories, at most SAMPLE for either use, no history for both; or why there is none. rows:
    catalog row of each vector of the index."""
    config = context.config
    try:
        asked = queries(context.dataset.histories, "valid", config.evaluate)
    except (NotFoundError, DataError) as error:
        return str(error)
    asked = asked.map_items(catalog_rows(context.dataset.item_ids, serving.item_ids))
    usable = np.flatnonzero(asked.histories.lengths)
    if len(usable) == 0:
        return "no validation history has an item of the snapshot"
    choosing = min(SAMPLE, len(usable) // 2)
    if choosing < LEAST or not chooses(config.index, resolve_kind(config.index, len(rows))):
        choosing = 0
    order = np.random.default_rng(config.index.seed).permutation(usable)

    def vectors(users: NDArray[np.int64]) -> NDArray[np.float32]:
        starts = range(0, len(users), 100)
        parts = [recommender.queries(asked.histories.select(users[start : start + 100])) for start in starts]
        return torch.cat(parts).cpu().numpy()

    measured = np.sort(order[choosing : choosing + SAMPLE])
    in_index = np.full(len(serving.item_ids) + 1, -1, dtype=np.int64)
    in_index[rows] = np.arange(len(rows))
    seen = None if config.evaluate.repeats else [in_index[asked.histories.of(user)] for user in measured]
    return _Sample(
        vectors(np.sort(order[:choosing])) if choosing else None,
        vectors(measured),
        in_index[asked.targets[measured]],
        seen,
    )


def _report(context: Context, record: Index, vectors: NDArray[np.float32], sample: _Sample | str) -> dict[str, Any]:
    """``ann_report`` over the sample; or why there is none."""
    if isinstance(sample, str):
        return {"none": sample}
    index = open_index(context.store, record, context.config.index)
    return ann_report(index, vectors, sample.queries, sample.targets, REPORT_K, sample.seen)


def _owner(serving: ServingTower) -> str | None:
    """Candidates that are not the cached vectors themselves belong to this one tower."""
    return None if serving.record.features == "text" else serving.record.id


def _data(context: Context) -> str | None:
    """Digest of the data set whose histories the report asks after, where there is one."""
    record = context.dataset_or_none()
    return record.digest if record else None


def _inputs(context: Context, serving: ServingTower) -> str:
    """Of all that decides the index and its report."""
    snapshot, config = serving.snapshot, context.config
    return inputs_hash(
        _FORMAT,
        serving.record.fingerprint,
        snapshot.id if snapshot else None,
        _data(context),
        config.evaluate,
        config.index,
    )


def _finished(context: Context, serving: ServingTower, inputs: str) -> dict[str, Any] | None:
    """What a finished run of the same inputs answered, where its index is the one in force."""
    snapshot = serving.snapshot.id if serving.snapshot else None
    newest = context.store.newest(Index, snapshot=snapshot, user_tower=_owner(serving))
    if newest is None:
        return None
    for run in context.tracker.find(kind="index", inputs=inputs, index=newest.id)[:1]:
        found: dict[str, Any] = context.tracker.read_json(run.run_id, RESULT)
        return {**found, "reused": True}
    return None


def run(context: Context, snapshot: str | None = None, tower: str | None = None) -> dict[str, Any]:
    """Build, publish, measure, log. What a finished run of the same inputs made is answered again, with no new run.

    Raises NotFoundError, FingerprintMismatchError, DataError, EmbeddingError (vectors that are not finite).
    """
    started = time.perf_counter()
    serving = context.serving_tower(snapshot, tower)
    inputs = _inputs(context, serving)
    if (finished := _finished(context, serving, inputs)) is not None:
        return finished
    rows = np.flatnonzero(serving.available)
    if len(rows) == 0:
        raise DataError(f"none of the {len(serving.item_ids)} items is available; an index would be empty")
    recommender = TowerRecommender(serving.tower, serving.catalog)
    vectors = recommender.candidates.cpu().numpy()[rows]
    sample = _sample(context, serving, recommender, rows)
    snapshot_id = serving.snapshot.id if serving.snapshot else None
    tags = {"inputs": inputs, "user_tower": serving.record.id, "snapshot": str(snapshot_id)}
    tags["dataset"] = str(_data(context))
    # opened first: a disk too full for its own record must not be found out after the index is published
    with context.tracker.run("index", context.config.name, context.settings("index"), tags) as logged:
        record, reused = build_index(
            context.store,
            context.config.index,
            [serving.item_ids[row] for row in rows],
            vectors,
            snapshot=snapshot_id,
            item_fingerprint=serving.record.item_fingerprint,
            user_tower=_owner(serving),
            queries=None if isinstance(sample, str) else sample.choosing,
        )
        seconds = round(time.perf_counter() - started, 3)
        ann = _report(context, record, vectors, sample)
        result = {
            "index": record.id,
            "snapshot": record.snapshot,
            "kind": record.kind,
            "vectors": record.vectors,
            "bytes": record.bytes,
            "seconds": seconds,
            "ann": ann,
            "reused": reused,
        }
        logged.tags({"index": record.id})
        logged.metrics({f"ann_{key}": value for key, value in ann.items() if isinstance(value, int | float)})
        logged.artifact(RESULT, json.dumps(result, indent=1))
    shown = {key: value for key, value in ann.items() if key != "trade_off"}
    print(f"{record.kind}, {record.vectors} vectors, {record.bytes} bytes; {shown}", file=sys.stderr)
    return result
