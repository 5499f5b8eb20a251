"""evaluate-ranker: AUC and log loss of a ranker, with intervals, beside a retrieval score on the same candidates."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from item_tower.decoders.precision import default_device
from jobs.context import Context, inputs_hash
from jobs.evaluate import protocol, require_same_split, trained_targets
from jobs.train_ranker import open_clicks
from jobs.train_user import catalog_rows
from pipeline.baselines import TowerRecommender
from pipeline.cache import open_snapshot
from pipeline.click_metrics import ClickFigures, click_figures, rate_entropy
from pipeline.clicks import Questions, RankingConfig, asked_examples
from pipeline.cutoff import seen_targets
from pipeline.ranking import asked_with_negatives, left_out, retrieval_scores
from pipeline.splits import Split
from schemas.errors import DataError
from schemas.records import Ranker as RankerRecord
from schemas.records import Snapshot, UserTower
from user_tower.candidates import Examples
from user_tower.ranking import CandidateScorer, Ranker

RESULT_FORMAT = "ranker-1"


@dataclass(frozen=True)
class ServingRanker:
    """A ranker bound to the catalog that it scores; as ``ServingTower``. settings: those that it was trained with."""

    record: RankerRecord
    scorer: CandidateScorer
    settings: RankingConfig
    item_ids: list[str]
    available: NDArray[np.bool_]
    snapshot: Snapshot | None


def open_ranker(context: Context, snapshot_id: str | None) -> ServingRanker:
    """The newest ranker of the configured name, over a snapshot of its item tower.

    Raises NotFoundError, FingerprintMismatchError, StoreError.
    """
    record = context.store.require(RankerRecord, name=context.config.name)
    settings = RankingConfig(**record.config)
    ranker = Ranker.load(context.store.folder(record)).to(default_device())
    if record.item_fingerprint is None:
        item_ids, available = context.dataset.item_ids, context.dataset.available
        catalog = ranker.tower.catalog(item_ids, None, np.arange(len(item_ids)))
        return ServingRanker(record, CandidateScorer(ranker, catalog), settings, item_ids, available, None)
    chosen = context.snapshot(record.item_fingerprint, f"ranker {record.id} ({record.name})", snapshot_id)
    matrix = open_snapshot(context.store, chosen)
    catalog = ranker.tower.catalog(matrix.item_ids, matrix.vectors, matrix.groups)
    scorer = CandidateScorer(ranker, catalog)
    return ServingRanker(record, scorer, settings, matrix.item_ids, matrix.available, chosen)


@dataclass(frozen=True)
class _Asked:
    """questions: without what the towers were trained on; examples: with sampled negatives where there are some;
    left_out: of the asked events, by reason; cutoff: see ``trained_targets``."""

    questions: Questions
    examples: Examples
    left_out: dict[str, int]
    cutoff: str | None


def _ask(context: Context, serving: ServingRanker, split: Split) -> _Asked:
    config = context.config.evaluate
    rows = catalog_rows(context.dataset.item_ids, serving.item_ids)
    clicks = open_clicks(context, rows, serving.settings)
    questions = asked_examples(clicks, split, config)
    gone = left_out(clicks, questions)
    cutoff, trained = trained_targets(context, serving.record, serving.snapshot, questions.asked)
    fresh = ~trained[questions.kept]
    gone["trained"] = int((~fresh).sum())
    questions = replace(questions, kept=questions.kept[fresh], examples=questions.examples.select(fresh))
    seed = config.negatives_seed
    examples, _ = asked_with_negatives(questions, split, serving.available, serving.settings, seed)
    if len(np.unique(examples.labels)) < 2:
        raise DataError(
            f"evaluate-ranker: {split} asks about {len(examples)} labelled events, an AUC needs both kinds"
        )
    return _Asked(questions, examples, gone, cutoff)


def _retrieval(context: Context, serving: ServingRanker, asked: _Asked, own: ClickFigures) -> dict[str, Any] | None:
    """The retrieval score's AUC on the same examples, and the ranker's less that; None without a tower that fits."""
    store, config, dataset = context.store, context.config, context.dataset
    fingerprints = (None, serving.record.item_fingerprint)
    records = [r for r in store.all(UserTower, name=config.ranker.retrieval) if r.item_fingerprint in fingerprints]
    if not records:
        return None
    record, found = records[-1], asked.questions
    report: dict[str, Any] = {"user_tower": record.id, "name": record.name}
    if record.cutoff == "recorded":
        seen = seen_targets(store.folder(record), found.asked, dataset.histories, dataset.item_ids)[found.kept]
        if seen.any():
            return report | {"refused": f"it was trained on {int(seen.sum())} of {len(seen)} of these events"}
    same = serving.snapshot.id if serving.snapshot and record.item_fingerprint else None
    tower = context.serving_tower(same, record.id)
    recommender = TowerRecommender(tower.tower, tower.catalog)
    rows = catalog_rows(serving.item_ids, tower.item_ids)
    examples = asked.examples
    if (rows[examples.items] < 0).any():
        return report | {"refused": "its catalog lacks some of the candidates"}
    scores = retrieval_scores(recommender, examples, rows, config.evaluate.chunk)
    samples = config.evaluate.bootstrap
    figures = click_figures(scores, examples.labels, examples.users, samples, logits=False)
    more = {name: own.minus(figures, name) for name in figures.values}
    return report | {
        "metrics": figures.values,
        "ci95": figures.ci95(),
        "ranker_minus_retrieval": {name: {"mean": mean, "ci95": ci95} for name, (mean, ci95) in more.items()},
    }


def run(context: Context, split: Split = "test", snapshot: str | None = None) -> dict[str, Any]:
    """Score, log, print.

    Raises NotFoundError, FingerprintMismatchError, ConfigError, DataError, StoreError.
    """
    config, data = context.config, context.dataset.record
    serving = open_ranker(context, snapshot)
    require_same_split(context, serving.record, "train-ranker")
    label = protocol(context)
    content = serving.snapshot.content_digest if serving.snapshot else None
    towers = [record.id for record in context.store.all(UserTower, name=config.ranker.retrieval)]
    inputs = inputs_hash(
        RESULT_FORMAT, serving.record.fingerprint, content, data.digest, split, config.evaluate, json.dumps(towers)
    )
    for finished in context.tracker.find(kind="evaluate-ranker", inputs=inputs)[:1]:
        known: dict[str, Any] = context.tracker.read_json(finished.run_id, "result.json")
        return {**known, "reused": True}
    asked = _ask(context, serving, split)
    tags = {"dataset": data.digest, "data": data.name, "protocol": label, "split": split, "inputs": inputs}
    tags |= {"ranker": serving.record.id, "snapshot": str(serving.record.snapshot)}
    sections = context.settings("name", "evaluate", "data")
    with context.tracker.run("evaluate-ranker", config.name, sections, tags) as run:
        examples = asked.examples
        logits = serving.scorer.score(examples, config.evaluate.chunk, serving.settings.candidates)
        figures = click_figures(logits, examples.labels, examples.users, config.evaluate.bootstrap)
        result: dict[str, Any] = {
            "run_id": run.run_id,
            "name": config.name,
            "ranker": serving.record.id,
            "fusion": serving.record.fusion,
            "next_item_weight": serving.settings.next_item_weight,
            "protocol": label,
            "split": split,
            "labels": serving.settings.meaning,
            "data": {"name": data.name, "digest": data.digest},
            "cutoff": asked.cutoff,
            "users": len(np.unique(examples.users)),
            "examples": len(examples),
            "clicks": int(examples.labels.sum()),
            "left_out": asked.left_out,
            "metrics": figures.values,
            "ci95": figures.ci95(),
            "log_loss_of_the_rate": rate_entropy(examples.labels),
            "retrieval": _retrieval(context, serving, asked, figures),
            "reused": False,
        }
        run.metrics(figures.values)
        run.metrics({f"{name}_low": low for name, (low, _) in result["ci95"].items()})
        run.metrics({f"{name}_high": high for name, (_, high) in result["ci95"].items()})
        run.artifact("result.json", json.dumps(result, indent=1))
        run.tags({"code": context.code})
    return result
