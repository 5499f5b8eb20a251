"""train-user: stage II, the user tower on the cached vectors of one snapshot; or an ID baseline on ids."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from item_tower.decoders.precision import default_device
from jobs.context import Context, checkpoint_folder, inputs_hash
from pipeline.baselines import BASELINES, TowerRecommender
from pipeline.cache import open_snapshot
from pipeline.cutoff import write_cutoff
from pipeline.evaluate import rank_targets
from pipeline.files import next_created_at, record_id, write_record
from pipeline.metrics import per_user
from pipeline.splits import queries, training_label, training_part
from schemas.errors import ConfigError, FingerprintMismatchError
from schemas.records import ItemTower, Snapshot, UserTower
from user_tower.model import UserTower as UserTowerModel
from user_tower.model import UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batch, Batches, IntArray, target_counts, training_batches
from user_tower.steps import UserStep
from user_tower.train import FitResult, fit, is_main_process


@dataclass(frozen=True)
class Features:
    """The catalog to train on. rows: [data set's N] its row of each of the data set's items, -1 if absent."""

    snapshot: Snapshot | None
    item_ids: list[str]
    vectors: NDArray[np.floating] | None
    groups: NDArray[np.int64]
    available: NDArray[np.bool_]
    rows: NDArray[np.int64]


def open_features(context: Context, snapshot_id: str | None) -> Features:
    """The snapshot of the item tower in force, or the data set's ids. Raises FingerprintMismatchError."""
    dataset = context.dataset
    if context.config.user_tower.features == "id":
        if snapshot_id is not None:
            raise ConfigError("user_tower.features is id: such a tower reads no snapshot; leave --snapshot out")
        rows = np.arange(len(dataset.item_ids))
        return Features(None, dataset.item_ids, None, rows, dataset.available, rows)
    use = context.config.item_tower.use
    chosen = context.snapshot(context.item_fingerprint(), f"train-user with item_tower.use = {use!r}", snapshot_id)
    matrix = open_snapshot(context.store, chosen)
    rows = catalog_rows(dataset.item_ids, matrix.item_ids)
    return Features(chosen, matrix.item_ids, matrix.vectors, matrix.groups, matrix.available, rows)


def catalog_rows(from_ids: list[str], to_ids: list[str]) -> NDArray[np.int64]:
    """[len(from_ids)] the place of each id in ``to_ids``, -1 where it is not there."""
    places = {item_id: row for row, item_id in enumerate(to_ids)}
    return np.array([places.get(item_id, -1) for item_id in from_ids], dtype=np.int64)


class Parent(NamedTuple):
    """The tower that training begins with. label: what to call it; folder: where its cut-off table lies, None where
    it has none."""

    label: str
    tower: UserTowerModel
    folder: Path | None


def find_parent(context: Context, features: Features) -> Parent | None:
    """The tower that ``train.warm_start`` names; None where there is none that fits.

    ``newest``: the newest user tower of this name, item tower and shape whose releases were not all held or rolled
    back, else the one that stage I trained beside the Item LLM. Raises NotFoundError, ConfigError,
    FingerprintMismatchError for an id that does not fit.
    """
    config, store = context.config, context.store

    def opened(record: UserTower) -> Parent:
        folder = store.folder(record)
        return Parent(record.id, UserTowerModel.load(folder), folder if record.cutoff == "recorded" else None)

    use = config.train.warm_start
    if use is None:
        return None
    fingerprint = features.snapshot.fingerprint if features.snapshot else None
    if use != "newest":
        record = store.get(UserTower, use)
        if record.item_fingerprint != fingerprint:
            raise FingerprintMismatchError(
                f"train.warm_start = {use!r} reads item tower {record.item_fingerprint}, this training reads "
                f"{fingerprint}; name a user tower of that item tower, or newest"
            )
        parent = opened(record)
        if parent.tower.config != config.user_tower:
            raise ConfigError(
                f"train.warm_start = {use!r} has another shape than [user_tower] asks for: {parent.tower.config}; "
                f"train from the beginning, or set user_tower as there"
            )
        return parent
    rejected = context.rejected_towers()
    for record in reversed(store.all(UserTower, name=config.name, item_fingerprint=fingerprint)):
        if UserTowerConfig(**record.config) == config.user_tower and record.id not in rejected:
            return opened(record)
    tuned = store.newest(ItemTower, fingerprint=fingerprint) if fingerprint else None
    if tuned is not None:
        folder = store.folder(tuned)
        tower = UserTowerModel.load(folder / "user_tower")
        if tower.config == config.user_tower:
            known = folder if tuned.cutoff == "recorded" else None
            return Parent(f"stage I of item tower {tuned.id}", tower, known)
    return None


def make_tower(context: Context, features: Features, met: IntArray, parent: UserTowerModel | None) -> UserTowerModel:
    """An untrained user tower as configured, of the architecture of ``parent``; met: catalog rows of its vocabulary,
    where it has one. Raises ConfigError."""
    config = context.config.user_tower
    vocabulary = None if config.features == "text" else [features.item_ids[row] for row in met.tolist()]
    item_dim = None if features.vectors is None else features.vectors.shape[1]
    return UserTowerModel(config, item_dim, vocabulary, None if parent is None else parent.architecture())


def trained_facts(context: Context, features: Features, parent: Parent | None, result: FitResult) -> dict[str, Any]:
    """What the records of a user tower and of a ranker say alike."""
    config, snapshot = context.config, features.snapshot
    return {
        "name": config.name,
        "features": config.user_tower.features,
        "item_fingerprint": snapshot.fingerprint if snapshot else None,
        "snapshot": snapshot.id if snapshot else None,
        "dataset": context.dataset.record.digest,
        "parent": parent.label if parent else None,
        "split": training_label(context.dataset.histories, config.evaluate),
        "cutoff": "unknown" if parent and parent.folder is None else "recorded",
        "steps": result.steps,
        "valid": result.best,
    }


def write_seen(folder: Path, context: Context, features: Features, parent: Parent | None) -> None:
    """The table of what a training on these features saw, beside its weights."""
    training = training_part(context.dataset.histories, context.config.evaluate).map_items(features.rows)
    write_cutoff(folder, training, features.item_ids, parent.folder if parent else None)


def _train(
    context: Context, features: Features, parent: UserTowerModel | None, checkpoints: Path
) -> tuple[UserTowerModel, FitResult]:
    config, histories = context.config, context.dataset.histories
    training = training_part(histories, config.evaluate).map_items(features.rows)
    validation = queries(histories, "valid", config.evaluate).map_items(features.rows)
    torch.manual_seed(config.train.seed)
    tower = make_tower(context, features, np.unique(training.items), parent).to(default_device())
    if parent is not None:
        tower.start_from(parent)
    if config.train.lora:
        tower.add_lora(config.train.lora)
    catalog = tower.catalog(features.item_ids, features.vectors, features.groups)
    candidates = torch.from_numpy(np.flatnonzero(features.available)).to(catalog.groups.device)
    counts = torch.from_numpy(target_counts(training, len(features.item_ids))).to(candidates.device)
    sampler = NegativeSampler(candidates, counts, config.train.negatives, config.train.sampling)
    step = UserStep(tower, catalog, sampler, config.train)

    def batches(epoch: int) -> Batches[Batch]:
        rng = np.random.default_rng([config.train.seed, epoch])
        return training_batches(training, config.user_tower.history, config.train.batch_size, rng)

    def validate() -> dict[str, float]:
        ranks = rank_targets(TowerRecommender(tower, catalog), validation, features.available, config.evaluate)
        values = per_user(ranks.above, ranks.ties, config.evaluate.ks, len(features.item_ids), validation.offsets)
        return {name: float(value.mean()) for name, value in values.items()}

    groups = [{"params": list(tower.parameters())}]
    label = f"train-user {config.name}"
    result = fit(
        step,
        groups,
        batches,
        validate,
        config.train,
        name=label,
        metric=config.evaluate.metric,
        checkpoints=checkpoints,
    )
    if config.train.lora:
        tower.merge_lora()
    return tower, result


def run(context: Context, snapshot: str | None = None) -> dict[str, Any]:
    """Train, save, publish; in several processes (accelerate launch) the main one. A killed run goes on.

    Raises ConfigError, NotFoundError, FingerprintMismatchError, StoreError, TrainingError.
    """
    config, store = context.config, context.store
    if config.name in BASELINES:
        raise ConfigError(
            f"--name {config.name} is a baseline's, which needs no training; name the user tower otherwise"
        )
    features = open_features(context, snapshot)
    content = features.snapshot.content_digest if features.snapshot else None
    inputs = inputs_hash(context.dataset.record.digest, content, config.user_tower, config.train, config.evaluate)
    earlier = store.all(UserTower, name=config.name)
    if earlier and earlier[-1].inputs == inputs:
        return _report(earlier[-1], reused=True)
    with checkpoint_folder(store, inputs) as checkpoints:
        return _make(context, features, inputs, checkpoints)


def _make(context: Context, features: Features, inputs: str, checkpoints: Path) -> dict[str, Any]:
    config, store, digest = context.config, context.store, context.dataset.record.digest
    earlier = store.all(UserTower, name=config.name)
    parent = find_parent(context, features)
    start = parent.tower if parent else None
    if not is_main_process():
        _train(context, features, start, checkpoints)
        return {}
    sections = context.settings("name", "user_tower", "train", "data", "evaluate", "item_tower")
    with context.tracker.run("train-user", config.name, sections, {"dataset": digest, "inputs": inputs}) as run:
        tower, result = _train(context, features, start, checkpoints)
        run.curve(result.curve)
        run.metrics({"positions_per_second": result.positions_per_second}, result.steps)
        made = tower.fingerprint()
        created_at = next_created_at(earlier)
        record = UserTower(
            id=record_id(created_at, made),
            created_at=created_at,
            inputs=inputs,
            fingerprint=made,
            config=config.user_tower.model_dump(mode="json"),
            run_id=run.run_id,
            positions_per_second=round(result.positions_per_second, 1),
            **trained_facts(context, features, parent, result),
        )
        with store.new(UserTower, record.id) as folder:
            tower.save(folder)
            write_seen(folder, context, features, parent)
            write_record(folder, record)
        tags = {"user_tower": record.id, "user_fingerprint": made, "snapshot": str(record.snapshot)}
        run.tags({**tags, "fingerprint": str(record.item_fingerprint), "code": context.code})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return _report(record, reused=False)


def _report(record: UserTower, reused: bool) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "user_tower": record.id,
        "name": record.name,
        "snapshot": record.snapshot,
        "parent": record.parent,
        "steps": record.steps,
        "positions_per_second": record.positions_per_second,
        "valid": record.valid,
        "reused": reused,
    }
