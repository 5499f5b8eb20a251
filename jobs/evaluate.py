"""evaluate: one run name under one protocol: metrics with intervals, slices, lists, per-user ranks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.context import Context, inputs_hash
from jobs.train_user import catalog_rows
from pipeline.baselines import BASELINES, Recommender, TowerRecommender
from pipeline.cache import read_items
from pipeline.cutoff import seen_targets
from pipeline.dataset import OpenDataset, find_dataset, open_dataset
from pipeline.evaluate import EvaluateConfig, Pool, Ranks, rank_users, top_items
from pipeline.metrics import FloatArray, IntArray, Interval, intervals, per_user
from pipeline.slices import list_figures, profile_popularity, slice_values, target_slices
from pipeline.splits import Queries, Split, protocol_label, queries, training_label, training_part, with_negatives
from schemas import tables
from schemas.errors import ConfigError, DataError
from schemas.records import ItemTower, Ranker, Snapshot, UserTower

SAMPLE_USERS = 3
SAMPLE_ITEMS = 5
LIST = 10  # items of each user's list behind coverage and popularity bias
RESULT_FORMAT = "3"  # of result.json; a result of another format is not reused
_WHAT = {UserTower: "user tower", Ranker: "ranker"}
TODAY = "every available item of the catalog: when each appeared is not known, so old targets meet newer items"


@dataclass(frozen=True)
class Subject:
    """What is evaluated, over which catalog; ``identity`` names it for the reuse of a finished run."""

    recommender: Recommender
    item_ids: list[str]
    available: NDArray[np.bool_]
    identity: str
    tags: dict[str, str]
    snapshot: Snapshot | None = None
    user_tower: UserTower | None = None


def protocol(context: Context) -> str:
    """See ``protocol_label``; for the data set and configuration of the context."""
    return protocol_label(context.dataset.histories, context.config.evaluate)


def require_same_split(context: Context, record: UserTower | Ranker, command: str) -> None:
    """Raises ConfigError when the tower was trained on events that this protocol asks about."""
    wanted = training_label(context.dataset.histories, context.config.evaluate)
    if record.dataset == context.dataset.record.digest and record.split != wanted:
        raise ConfigError(
            f"{_WHAT[type(record)]} {record.id} ({record.name}) was trained on the training part of "
            f"{record.split!r}; this protocol's is {wanted!r}: it may have seen the targets. Run {command} with the "
            f"same evaluate.protocol"
        )


def open_subject(context: Context, snapshot_id: str | None, tower_id: str | None = None) -> Subject:
    """The baseline of that name, or a user tower: by default the newest of that name.

    Raises NotFoundError, ConfigError.
    """
    name, dataset = context.config.name, context.dataset
    if name in BASELINES:
        if snapshot_id is not None:
            raise ConfigError(f"{name} reads no snapshot; leave --snapshot out")
        training = training_part(dataset.histories, context.config.evaluate)
        recommender = BASELINES[name](training, len(dataset.item_ids))
        return Subject(recommender, dataset.item_ids, dataset.available, name, {})
    serving = context.serving_tower(snapshot_id, tower_id)
    require_same_split(context, serving.record, "train-user")
    tags = {
        "user_tower": serving.record.id,
        "fingerprint": str(serving.record.item_fingerprint),
        "snapshot": serving.snapshot.id if serving.snapshot else "None",
        "training_run": serving.record.run_id,
    }
    if serving.record.dataset != dataset.record.digest:
        tags["trained_on"] = serving.record.dataset
    return Subject(
        TowerRecommender(serving.tower, serving.catalog),
        serving.item_ids,
        serving.available,
        json.dumps([serving.record.fingerprint, serving.snapshot.content_digest if serving.snapshot else None]),
        tags,
        serving.snapshot,
        serving.record,
    )


def trained_targets(
    context: Context, own: UserTower | Ranker | None, snapshot: Snapshot | None, asked: Queries
) -> tuple[str | None, NDArray[np.bool_]]:
    """What is known of the events that a tower and the Item LLM of its snapshot were trained on, and [P] the targets
    among these (DESIGN 7).

    "recorded", "unknown" where weights come from elsewhere, None without towers. Raises DataError as configured.
    """
    seen = np.zeros(len(asked.targets), dtype=bool)
    towers: list[ItemTower | UserTower | Ranker] = [own] if own else []
    if snapshot is not None:
        towers += context.item_towers(snapshot)
    if not towers:
        return None, seen
    dataset = context.dataset
    for tower in towers:
        if tower.cutoff == "unknown":
            continue
        found = seen_targets(context.store.folder(tower), asked, dataset.histories, dataset.item_ids)
        if found.any() and context.config.evaluate.trained_targets == "refuse":
            raise DataError(
                f"{type(tower).__name__} {tower.id} was trained on {int(found.sum())} of {len(found)} targets of "
                f"this evaluation, the first is of user {asked.histories.users[asked.owners[found][0]]!r}: their "
                f"figure would say nothing. Train it on the training part of this protocol and data, or set "
                f"evaluate.trained_targets = leave-out"
            )
        seen |= found
    untuned = snapshot is not None and len(towers) == 1
    return "unknown" if untuned or any(tower.cutoff == "unknown" for tower in towers) else "recorded", seen


def _tuned_items(context: Context, snapshot: Snapshot | None) -> NDArray[np.bool_] | None:
    """[N] the data set's items that the Item LLM was tuned with; None for an untuned one, or where that is lost."""
    if snapshot is None:
        return None
    towers = context.item_towers(snapshot)
    if not towers:
        return None
    found = find_dataset(context.store, towers[-1].dataset)
    if found is None:
        return None
    same = found.digest == context.dataset.record.digest
    data: OpenDataset = context.dataset if same else open_dataset(context.store, found)
    if not towers[-1].split.startswith(training_label(data.histories, context.config.evaluate)):
        return None
    training, ids = training_part(data.histories, context.config.evaluate), data.item_ids
    met = {ids[row] for row in np.unique(training.items).tolist()}
    return np.array([item_id in met for item_id in context.dataset.item_ids])


def _earlier_items(context: Context, snapshot: Snapshot | None) -> NDArray[np.bool_] | None:
    """[N] the data set's items that the parent of the snapshot held; None where there is none."""
    if snapshot is None or snapshot.parent is None:
        return None
    parents = context.store.all(Snapshot, id=snapshot.parent)
    if not parents:
        return None
    held = set(read_items(context.store, parents[-1]).column(tables.ITEM_ID).to_pylist())
    return np.array([item_id in held for item_id in context.dataset.item_ids])


@dataclass(frozen=True)
class Figures:
    """metrics, ci95: by metric; slices: label -> users, targets, the deciding metric and its interval."""

    metrics: dict[str, float]
    ci95: dict[str, list[float]]
    slices: dict[str, dict[str, Any]]


def _interval(found: Interval) -> list[float] | None:
    return None if math.isnan(found.mean) else [found.low, found.high]


def figures(
    config: EvaluateConfig, asked: Queries, ranks: Ranks, catalog: int, members: dict[str, NDArray[np.bool_]]
) -> Figures:
    """All means, each with its interval from the same resamples of the users. members: label -> [P]."""
    ks = _ks(config)
    values = per_user(ranks.above, ranks.ties, ks, catalog, asked.offsets)
    metric, bounds = config.metric, asked.bounds
    parts = {
        label: slice_values(metric, ranks.above, ranks.ties, bounds, catalog, own) for label, own in members.items()
    }
    found = intervals(np.stack([*values.values(), *parts.values()], axis=1), config.bootstrap)
    whole = dict(zip(values, found, strict=False))
    if config.protocol == "sampled":  # as papers with so few candidates call it
        whole |= {f"hr@{k}": whole[f"recall@{k}"] for k in ks}
    slices = {}
    for (label, own), part, interval in zip(members.items(), parts.values(), found[len(values) :], strict=True):
        mean = None if math.isnan(interval.mean) else interval.mean
        users = int((~np.isnan(part)).sum())
        slices[label] = {"users": users, "targets": int(own.sum()), metric: mean, "ci95": _interval(interval)}
    means = {name: interval.mean for name, interval in whole.items()}
    return Figures(means, {name: [interval.low, interval.high] for name, interval in whole.items()}, slices)


def _ks(config: EvaluateConfig) -> tuple[int, ...]:
    """The ks that mean something under the protocol."""
    return tuple(k for k in config.ks if config.protocol != "sampled" or k <= config.negatives)


def samples(context: Context, subject: Subject, questions: Queries) -> list[dict[str, Any]]:
    """Some users' last events, first target and recommendations, as titles."""
    titles = context.titles()
    names = [titles.get(item_id, item_id) for item_id in subject.item_ids]
    step = max(1, len(questions.histories) // SAMPLE_USERS)
    part = questions.select(np.arange(0, len(questions.histories), step)[:SAMPLE_USERS])
    k = min(SAMPLE_ITEMS, len(names))
    best = top_items(subject.recommender, part.histories, subject.available, context.config.evaluate, k)
    shown = []
    for row, user in enumerate(part.histories.users):
        target = int(part.targets[part.bounds[row]])
        shown.append(
            {
                "user": user,
                "history": [names[item] for item in part.histories.of(row)[-SAMPLE_ITEMS:]],
                "target": names[target] if target >= 0 else None,
                "recommended": [names[item] for item in best[row]],
            }
        )
    return shown


def _check(context: Context, subject: Subject) -> None:
    config, largest = context.config.evaluate, max(context.config.evaluate.ks)
    if config.protocol != "sampled" and largest > len(subject.item_ids):
        raise ConfigError(f"evaluate.ks asks for {largest}, the catalog has {len(subject.item_ids)} items")
    k = config.metric.partition("@")[2]
    if k and int(k) not in _ks(config):
        raise ConfigError(
            f"evaluate.metric = {config.metric!r}: among {config.negatives} negatives and the target it says "
            f"nothing; set evaluate.metric, such as recall@5 with 5 in evaluate.ks"
        )


def _counts(asked: Queries, questions: Queries, ranks: Ranks, pool: Pool) -> dict[str, Any]:
    """What was asked, and what could not be answered. asked: in the data set's rows, questions: in the subject's."""
    targets = questions.targets
    absent = targets < 0
    unavailable = ~absent & ~pool.available[np.maximum(targets, 0)]
    repeated = (ranks.above < 0) & ~absent & ~unavailable
    found = {
        "users": len(questions.histories),
        "targets": len(targets),
        "items": len(pool.available),
        "candidates": int(pool.available.sum()),
        "empty_histories": int((questions.histories.lengths == 0).sum()),
        "skipped_events": int(asked.histories.lengths.sum() - questions.histories.lengths.sum()),
        "misses": {
            "absent": int(absent.sum()),
            "unavailable": int(unavailable.sum()),
            "repeated": int(repeated.sum()),
        },
    }
    if questions.negatives is not None:
        found["fewer_negatives"] = int((questions.negatives < 0).any(axis=1).sum())
    return found


def _mapped(values: IntArray, rows: IntArray, size: int) -> IntArray:
    """[size] values [N] of the data set's items by their rows in another catalog; 0 for an item it does not have."""
    found = np.zeros(size, dtype=np.int64)
    found[rows[rows >= 0]] = values[rows >= 0]
    return found


def _lists(asked: Queries, ranks: Ranks, pool: Pool, counts: IntArray, rows: IntArray) -> dict[str, float]:
    if not ranks.best.shape[1]:
        return {}
    profiles: FloatArray = profile_popularity(asked, counts)
    own = _mapped(counts, rows, len(pool.available))
    return list_figures(ranks.best, int(pool.available.sum()), own, profiles)


@dataclass(frozen=True)
class Work:
    """asked: the questions in the data set's rows; questions: in the subject's; rows: [N] from these to those.

    cutoff: see ``trained_targets``; left_out: targets that the towers were trained on.
    """

    subject: Subject
    asked: Queries
    questions: Queries
    rows: IntArray
    pool: Pool
    cutoff: str | None
    left_out: int


def prepare(context: Context, split: Split, subject: Subject) -> Work:
    """The questions of the protocol. Raises DataError, ConfigError."""
    config, dataset = context.config.evaluate, context.dataset
    asked = queries(dataset.histories, split, config)
    cutoff, trained = trained_targets(context, subject.user_tower, subject.snapshot, asked)
    if trained.all():
        raise DataError(f"the towers were trained on all {len(trained)} targets of this evaluation; nothing is left")
    if config.protocol == "sampled":
        asked = with_negatives(asked, dataset.available, config)
    asked = asked.without(trained) if trained.any() else asked
    rows = catalog_rows(dataset.item_ids, subject.item_ids)
    released = None
    if config.released is not None:
        released = _mapped(dataset.released(config.released), rows, len(subject.item_ids))
    pool = Pool(subject.available, released)
    return Work(subject, asked, asked.map_items(rows), rows, pool, cutoff, int(trained.sum()))


def measure(context: Context, work: Work) -> tuple[Ranks, dict[str, Any]]:
    """Ranks, and all that is computed from them."""
    config, dataset, asked = context.config.evaluate, context.dataset, work.asked
    label, top = f"evaluate {context.config.name}", min(LIST, len(work.pool.available))
    ranks = rank_users(work.subject.recommender, work.questions, work.pool, config, top=top, progress=label)
    training = training_part(dataset.histories, config)
    counts = np.bincount(training.items, minlength=len(dataset.item_ids))
    snapshot = work.subject.snapshot
    members = target_slices(asked, counts, _tuned_items(context, snapshot), _earlier_items(context, snapshot))
    found = figures(config, asked, ranks, len(dataset.item_ids), members)
    return ranks, {
        "metrics": found.metrics,
        "ci95": found.ci95,
        "slices": found.slices,
        "lists": _lists(asked, ranks, work.pool, counts, work.rows),
        "counts": _counts(asked, work.questions, ranks, work.pool),
    }


def run(
    context: Context, split: Split = "test", snapshot: str | None = None, tower: str | None = None
) -> dict[str, Any]:
    """Score, log, print; skipped_events are those of items that the snapshot does not hold.

    Raises NotFoundError, FingerprintMismatchError, ConfigError, DataError.
    """
    config, record = context.config, context.dataset.record
    subject, label = open_subject(context, snapshot, tower), protocol(context)
    work = prepare(context, split, subject)
    _check(context, subject)
    inputs = inputs_hash(RESULT_FORMAT, config.name, subject.identity, record.digest, split, config.evaluate)
    tags = {"dataset": record.digest, "data": record.name, "protocol": label, "split": split, "inputs": inputs}
    tags["format"] = RESULT_FORMAT
    for finished in context.tracker.find(kind="evaluate", inputs=inputs)[:1]:
        found: dict[str, Any] = context.tracker.read_json(finished.run_id, "result.json")
        return {**found, "reused": True}
    sections = context.settings("name", "evaluate", "data")
    with context.tracker.run("evaluate", config.name, sections, {**tags, **subject.tags}) as run:
        ranks, measured = measure(context, work)
        released = config.evaluate.released
        result: dict[str, Any] = {
            "run_id": run.run_id,
            "name": config.name,
            "protocol": label,
            "candidates": TODAY if released is None else f"items released by the target's time, column {released}",
            "split": split,
            "data": {"name": record.name, "digest": record.digest, "users": record.users,
                     "interactions": record.interactions},
            "cutoff": work.cutoff,
            "trained_targets": work.left_out,
            "users": measured["counts"]["users"],
            "skipped_events": measured["counts"]["skipped_events"],
            **measured,
            "reused": False,
        }  # fmt: skip
        run.metrics(measured["metrics"] | measured["lists"])
        run.metrics({f"{name}_low": low for name, (low, _) in measured["ci95"].items()})
        run.metrics({f"{name}_high": high for name, (_, high) in measured["ci95"].items()})
        run.artifact("ranks.parquet", _rank_table(context, work.asked, ranks))
        run.artifact("samples.json", json.dumps(samples(context, subject, work.questions), indent=1))
        run.artifact("result.json", json.dumps(result, indent=1))
        run.tags({"catalog": str(len(subject.item_ids)), "code": context.code})
    return result


def _rank_table(context: Context, asked: Queries, ranks: Ranks) -> pa.Table:
    """One row a target, the targets of a user together."""
    ids = context.dataset.item_ids
    users = [asked.histories.users[owner] for owner in asked.owners.tolist()]
    columns = [users, [ids[row] for row in asked.targets.tolist()], ranks.above, ranks.ties]
    return pa.table(columns, schema=tables.RANKS)
