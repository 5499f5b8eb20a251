"""evaluate: one run name over the full catalog: recall and NDCG with intervals, slices, per-user ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.context import Context, inputs_hash
from jobs.train_user import catalog_rows
from pipeline.baselines import ItemKNN, Popularity, Recommender, TowerRecommender
from pipeline.evaluate import EvaluateConfig, Ranks, rank_targets, top_items
from pipeline.metrics import bootstrap, per_user
from pipeline.splits import PROTOCOL, Queries, Split, queries, training_part
from schemas import tables
from schemas.errors import ConfigError
from user_tower.sequences import Histories

BASELINES: dict[str, Callable[[Histories, int], Recommender]] = {"popularity": Popularity, "item-knn": ItemKNN}
SAMPLE_USERS = 3
SAMPLE_ITEMS = 5
# Upper bounds of the history lengths that are reported apart
LENGTH_SLICES = ((1, 20), (21, 50), (51, 200), (201, None))


@dataclass(frozen=True)
class Subject:
    """What is evaluated, over which catalog; ``identity`` names it for the reuse of a finished run."""

    recommender: Recommender
    item_ids: list[str]
    available: NDArray[np.bool_]
    identity: str
    tags: dict[str, str]


def protocol(config: EvaluateConfig) -> str:
    """The protocol's name as it stands beside every figure; figures of different ones are never compared."""
    return f"{PROTOCOL}, repeats allowed" if config.repeats else PROTOCOL


def open_subject(context: Context, snapshot_id: str | None) -> Subject:
    """The baseline of that name, or the newest user tower of that name. Raises NotFoundError."""
    name, dataset = context.config.name, context.dataset
    if name in BASELINES:
        if snapshot_id is not None:
            raise ConfigError(f"{name} reads no snapshot; leave --snapshot out")
        training = training_part(dataset.histories)
        recommender = BASELINES[name](training, len(dataset.item_ids))
        return Subject(recommender, dataset.item_ids, dataset.available, name, {})
    serving = context.serving_tower(snapshot_id)
    tags = {
        "user_tower": serving.record.id,
        "fingerprint": str(serving.record.item_fingerprint),
        "snapshot": serving.snapshot.id if serving.snapshot else "None",
    }
    if serving.record.dataset != dataset.record.digest:
        tags["trained_on"] = serving.record.dataset
    return Subject(
        TowerRecommender(serving.tower, serving.catalog),
        serving.item_ids,
        serving.available,
        json.dumps([serving.record.fingerprint, serving.snapshot.content_digest if serving.snapshot else None]),
        tags,
    )


def slices(context: Context, questions: Queries, hits: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """The deciding metric by slice, with the users in it. questions: in the data set's catalog rows."""
    training = training_part(context.dataset.histories)
    seen = np.bincount(training.items, minlength=len(context.dataset.item_ids)) > 0
    lengths = questions.histories.lengths
    members = {"cold items": ~seen[questions.targets]}
    for low, high in LENGTH_SLICES:
        label = f"history {low}-{high}" if high else f"history {low}+"
        members[label] = (lengths >= low) & (lengths <= (high or lengths.max(initial=0)))
    metric = context.config.evaluate.metric
    return {
        label: {"users": int(chosen.sum()), metric: float(hits[chosen].mean()) if chosen.any() else 0.0}
        for label, chosen in members.items()
    }


def samples(context: Context, subject: Subject, questions: Queries) -> list[dict[str, Any]]:
    """Some users' last events, target and recommendations, as titles."""
    titles = context.titles()
    names = [titles.get(item_id, item_id) for item_id in subject.item_ids]
    step = max(1, len(questions.targets) // SAMPLE_USERS)
    part = questions.select(np.arange(0, len(questions.targets), step)[:SAMPLE_USERS])
    k = min(SAMPLE_ITEMS, len(names))
    best = top_items(subject.recommender, part.histories, subject.available, context.config.evaluate, k)
    shown = []
    for row, user in enumerate(part.histories.users):
        target = int(part.targets[row])
        shown.append(
            {
                "user": user,
                "history": [names[item] for item in part.histories.of(row)[-SAMPLE_ITEMS:]],
                "target": names[target] if target >= 0 else None,
                "recommended": [names[item] for item in best[row]],
            }
        )
    return shown


def figures(context: Context, ranks: Ranks, catalog: int) -> tuple[dict, dict, dict]:
    """Per-user values, their means, and their 95 % intervals, by metric."""
    config = context.config.evaluate
    values = per_user(ranks.above, ranks.ties, config.ks, catalog)
    intervals = {name: bootstrap(value, config.bootstrap) for name, value in values.items()}
    means = {name: interval.mean for name, interval in intervals.items()}
    return values, means, {name: [interval.low, interval.high] for name, interval in intervals.items()}


def _check(context: Context, subject: Subject) -> None:
    largest = max(context.config.evaluate.ks)
    if largest > len(subject.item_ids):
        raise ConfigError(f"evaluate.ks asks for {largest}, the catalog has {len(subject.item_ids)} items")


def run(context: Context, split: Split = "test", snapshot: str | None = None) -> dict[str, Any]:
    """Score, log, print; skipped_events are those of items that the snapshot does not hold.

    Raises NotFoundError, FingerprintMismatchError, ConfigError, DataError.
    """
    config, dataset = context.config, context.dataset
    subject = open_subject(context, snapshot)
    asked = queries(dataset.histories, split)
    _check(context, subject)
    digest = dataset.record.digest
    inputs = inputs_hash(config.name, subject.identity, digest, split, config.evaluate)
    tags = {
        "dataset": digest,
        "data": dataset.record.name,
        "protocol": protocol(config.evaluate),
        "split": split,
    }
    tags["inputs"] = inputs
    for finished in context.tracker.find(kind="evaluate", inputs=inputs)[:1]:
        found: dict[str, Any] = context.tracker.read_json(finished.run_id, "result.json")
        return {**found, "reused": True}
    questions = asked.map_items(catalog_rows(dataset.item_ids, subject.item_ids))
    sections = context.settings("name", "evaluate", "data")
    with context.tracker.run("evaluate", config.name, sections, {**tags, **subject.tags}) as run:
        label = f"evaluate {config.name}"
        ranks = rank_targets(subject.recommender, questions, subject.available, config.evaluate, label)
        values, means, ci95 = figures(context, ranks, len(subject.item_ids))
        result: dict[str, Any] = {
            "run_id": run.run_id,
            "name": config.name,
            "protocol": protocol(config.evaluate),
            "split": split,
            "users": len(questions.targets),
            "skipped_events": int(asked.histories.lengths.sum() - questions.histories.lengths.sum()),
            "metrics": means,
            "ci95": ci95,
            "slices": slices(context, asked, values[config.evaluate.metric]),
            "reused": False,
        }
        run.metrics(means)
        run.metrics({f"{name}_low": low for name, (low, _) in ci95.items()})
        run.metrics({f"{name}_high": high for name, (_, high) in ci95.items()})
        targets = [dataset.item_ids[row] for row in asked.targets]
        columns = [asked.histories.users, targets, ranks.above, ranks.ties]
        run.artifact("ranks.parquet", pa.table(columns, schema=tables.RANKS))
        run.artifact("samples.json", json.dumps(samples(context, subject, questions), indent=1))
        run.artifact("result.json", json.dumps(result, indent=1))
        run.tags({"catalog": str(len(subject.item_ids)), "code": context.code})
    return result
