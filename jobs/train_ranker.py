"""train-ranker: the discriminative variant on the cached vectors of one snapshot, see ``user_tower.ranking``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from item_tower.decoders.precision import default_device
from jobs.context import Context, checkpoint_folder, inputs_hash
from jobs.train_user import Features, find_parent, make_tower, open_features, trained_facts, write_seen
from pipeline.click_metrics import auc, log_losses
from pipeline.clicks import Clicks, RankingConfig, asked_examples, event_kinds, training_examples
from pipeline.dataset import read_labels
from pipeline.files import next_created_at, record_id, write_record
from pipeline.ranking import asked_with_negatives, epoch_examples
from schemas.errors import DataError
from schemas.records import Ranker as RankerRecord
from user_tower.candidates import CandidateBatch, Examples, candidate_batches
from user_tower.model import UserTower
from user_tower.negatives import NegativeSampler
from user_tower.ranking import CandidateScorer, Ranker, RankingStep
from user_tower.sequences import Batches, IntArray, target_counts
from user_tower.train import FitResult, fit, is_main_process

METRIC = "auc"


def open_clicks(context: Context, rows: IntArray, config: RankingConfig) -> Clicks:
    """The data set's events with their labels; rows: as in ``Clicks``. Raises DataError, StoreError."""
    kinds = event_kinds(read_labels(context.store, context.dataset_record), config)
    return Clicks(context.dataset.histories, kinds, rows)


def make_ranker(context: Context, features: Features, training: Examples, parent: UserTower | None) -> Ranker:
    """An untrained ranker, its tower that of ``parent`` where there is one. Raises ConfigError."""
    config = context.config
    tower = make_tower(context, features, np.union1d(training.histories.items, training.items), parent)
    ranker = Ranker(tower, config.ranker.fusion, config.ranker.factors).to(default_device())
    if parent is not None:
        tower.start_from(parent)
    if config.train.lora:
        tower.add_lora(config.train.lora)
    return ranker


def _validation(context: Context, features: Features, clicks: Clicks) -> Examples:
    config = context.config
    questions = asked_examples(clicks, "valid", config.evaluate)
    seed = config.evaluate.negatives_seed
    asked, _ = asked_with_negatives(questions, "valid", features.available, config.ranker, seed)
    if len(np.unique(asked.labels)) < 2:
        raise DataError(
            f"train-ranker: validation asks about {len(asked)} labelled events of "
            f"{'one kind' if len(asked) else 'no kind'}; an AUC needs clicks and others: see evaluate.protocol, "
            f"evaluate.valid_from, ranker.labels"
        )
    return asked


def _train(
    context: Context, features: Features, parent: UserTower | None, checkpoints: Path
) -> tuple[Ranker, FitResult]:
    config, settings = context.config, context.config.ranker
    clicks = open_clicks(context, features.rows, settings)
    training = training_examples(clicks, config.evaluate)
    asked = _validation(context, features, clicks)
    torch.manual_seed(config.train.seed)
    ranker = make_ranker(context, features, training, parent)
    catalog = ranker.tower.catalog(features.item_ids, features.vectors, features.groups)
    candidates = torch.from_numpy(np.flatnonzero(features.available)).to(catalog.groups.device)
    counts = torch.from_numpy(target_counts(training.histories, catalog.size)).to(candidates.device)
    sampler = NegativeSampler(candidates, counts, config.train.negatives, config.train.sampling)
    step = RankingStep(ranker, catalog, sampler, settings.next_item_weight, config.train)

    def batches(epoch: int) -> Batches[CandidateBatch]:
        seed = [config.train.seed, epoch]
        own = epoch_examples(training, features.available, settings, seed)
        rng = np.random.default_rng(seed)
        return candidate_batches(own, ranker.context_length, config.train.batch_size, settings.candidates, rng)

    def validate() -> dict[str, float]:
        scorer = CandidateScorer(ranker, catalog)
        logits = scorer.score(asked, config.train.batch_size, settings.candidates)
        losses = log_losses(logits, asked.labels)
        return {METRIC: auc(logits, asked.labels), "log_loss": float(losses.mean())}

    groups = [{"params": list(ranker.parameters())}]
    label = f"train-ranker {config.name}"
    result = fit(step, groups, batches, validate, config.train, name=label, metric=METRIC, checkpoints=checkpoints)
    if config.train.lora:
        ranker.tower.merge_lora()
    return ranker, result


def run(context: Context, snapshot: str | None = None) -> dict[str, Any]:
    """Train, save, publish; in several processes (accelerate launch) the main one. A killed run goes on.

    Raises NotFoundError, ConfigError, DataError, FingerprintMismatchError, StoreError, TrainingError.
    """
    config, store = context.config, context.store
    features = open_features(context, snapshot)
    content = features.snapshot.content_digest if features.snapshot else None
    digest = context.dataset.record.digest
    inputs = inputs_hash("ranker", digest, content, config.user_tower, config.train, config.evaluate, config.ranker)
    earlier = store.all(RankerRecord, name=config.name)
    if earlier and earlier[-1].inputs == inputs:
        return _report(earlier[-1], reused=True)
    with checkpoint_folder(store, inputs) as checkpoints:
        return _make(context, features, inputs, checkpoints)


def _make(context: Context, features: Features, inputs: str, checkpoints: Path) -> dict[str, Any]:
    config, store, digest = context.config, context.store, context.dataset.record.digest
    earlier = store.all(RankerRecord, name=config.name)
    parent = find_parent(context, features)
    start = parent.tower if parent else None
    if not is_main_process():
        _train(context, features, start, checkpoints)
        return {}
    sections = context.settings("name", "ranker", "user_tower", "train", "data", "evaluate", "item_tower")
    with context.tracker.run("train-ranker", config.name, sections, {"dataset": digest, "inputs": inputs}) as run:
        ranker, result = _train(context, features, start, checkpoints)
        run.curve(result.curve)
        run.metrics({"examples_per_second": result.positions_per_second}, result.steps)
        made = ranker.fingerprint()
        created_at = next_created_at(earlier)
        record = RankerRecord(
            id=record_id(created_at, made),
            created_at=created_at,
            fusion=config.ranker.fusion,
            inputs=inputs,
            fingerprint=made,
            config=config.ranker.model_dump(mode="json"),
            run_id=run.run_id,
            examples_per_second=round(result.positions_per_second, 1),
            **trained_facts(context, features, parent, result),
        )
        with store.new(RankerRecord, record.id) as folder:
            ranker.save(folder)
            write_seen(folder, context, features, parent)
            write_record(folder, record)
        tags = {"ranker": record.id, "ranker_fingerprint": made, "snapshot": str(record.snapshot)}
        run.tags({**tags, "fingerprint": str(record.item_fingerprint), "code": context.code})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return _report(record, reused=False)


def _report(record: RankerRecord, reused: bool) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "ranker": record.id,
        "name": record.name,
        "fusion": record.fusion,
        "snapshot": record.snapshot,
        "parent": record.parent,
        "steps": record.steps,
        "examples_per_second": record.examples_per_second,
        "valid": record.valid,
        "reused": reused,
    }
