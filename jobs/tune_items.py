"""tune-items: stage I, the Item LLM and a small user tower tuned together on the training part of the split."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from item_tower.cpu import speed_up
from item_tower.decoders.precision import default_device
from item_tower.embed import encode_texts
from item_tower.encoder import ItemEncoder
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig, apply_empty_policy, content_keys, render
from jobs.context import Context, checkpoint_folder, inputs_hash
from pipeline.baselines import TowerRecommender
from pipeline.cutoff import write_cutoff
from pipeline.evaluate import rank_targets
from pipeline.files import next_created_at, record_id, write_record
from pipeline.joint import JointStep
from pipeline.metrics import per_user
from pipeline.splits import Queries, queries, training_label, training_part
from schemas.records import ItemTower
from user_tower.lora import add_lora, merge_lora
from user_tower.model import Catalog, UserTower
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batch, Batches, Histories, training_batches
from user_tower.steps import UserStep
from user_tower.train import FitResult, fit, has_checkpoint, is_main_process

NAME = "tuned"


@dataclass(frozen=True)
class Corpus:
    """The items that have text, and the questions about them, in rows of this catalog.

    texts, item_ids: N; groups: int64 [N], items of the same text share a number; available: bool [N].
    """

    texts: list[str]
    item_ids: list[str]
    groups: NDArray[np.int64]
    available: NDArray[np.bool_]
    training: Histories
    validation: Queries


def open_corpus(context: Context, template: TemplateConfig) -> Corpus:
    """Render the catalog and split the histories. Raises DataError, ConfigError."""
    dataset = context.dataset
    texts, ids = render(dataset.items, template), dataset.item_ids
    kept = apply_empty_policy(ids, texts, template)
    rows = np.full(len(texts), -1, dtype=np.int64)
    rows[kept] = np.arange(len(kept))
    texts = [texts[row] for row in kept]
    _, groups = np.unique(np.array(content_keys(texts), dtype="S16"), return_inverse=True)
    return Corpus(
        texts,
        [ids[row] for row in kept],
        groups.astype(np.int64),
        dataset.available[kept],
        training_part(dataset.histories, context.config.evaluate).map_items(rows),
        queries(dataset.histories, "valid", context.config.evaluate).map_items(rows),
    )


def _inference_copy(encoder: ItemEncoder, lora: bool) -> ItemEncoder:
    """What validation encodes with: on a CPU a packed copy, which is faster; adapters are left as they are."""
    if lora or encoder.device.type != "cpu":
        return encoder
    packed = copy.deepcopy(encoder)
    speed_up(packed)
    return packed


def _tune(context: Context, encoder: ItemEncoder, corpus: Corpus, checkpoints: Path) -> tuple[JointStep, FitResult]:
    config, evaluate = context.config.tune, context.config.evaluate
    torch.manual_seed(config.train.seed)
    device = default_device()
    tower = UserTower(config.user_tower, encoder.dim, None).to(device)
    groups = torch.from_numpy(corpus.groups)
    token_ids = encoder.tokenise(corpus.texts).input_ids

    def batches(epoch: int) -> Batches[Batch]:
        rng = np.random.default_rng([config.train.seed, epoch])
        return training_batches(corpus.training, config.user_tower.history, config.train.batch_size, rng)

    def figures(catalog: Catalog) -> dict[str, float]:
        ranks = rank_targets(TowerRecommender(tower, catalog), corpus.validation, corpus.available, evaluate)
        values = per_user(ranks.above, ranks.ties, evaluate.ks, len(corpus.item_ids), corpus.validation.offsets)
        return {name: float(value.mean()) for name, value in values.items()}

    def encode() -> Catalog:
        vectors, _, _ = encode_texts(
            _inference_copy(encoder, config.lora is not None), corpus.texts, config.token_budget
        )
        return tower.catalog(corpus.item_ids, vectors, corpus.groups)

    encoder.to(device)
    if config.warmup_epochs and not has_checkpoint(checkpoints / "joint"):
        untuned = encode()
        candidates = torch.from_numpy(np.flatnonzero(corpus.available)).to(device)
        counts = torch.zeros(len(corpus.item_ids), device=device)
        alone = UserStep(tower, untuned, NegativeSampler(candidates, counts, 0, "uniform"))
        # its rate does not fall: the tower's training goes on in the joint one, at the full rate
        own = {"epochs": config.warmup_epochs, "max_steps": None, "decay": 0.0, "lora": None}
        warmup = config.train.model_copy(update=own)
        fit(
            alone,
            [{"params": list(tower.parameters())}],
            batches,
            lambda: figures(untuned),
            warmup,
            name="tune-items warm-up",
            metric=evaluate.metric,
            checkpoints=checkpoints / "warm-up",
        )
    if config.lora:
        encoder.model = add_lora(encoder.model, config.lora)
    if config.train.lora:
        tower.add_lora(config.train.lora)
    step = JointStep(encoder, tower, token_ids, groups, config).to(device)
    result = fit(
        step,
        step.parameter_groups(),
        lambda epoch: batches(config.warmup_epochs + epoch),
        lambda: {**figures(encode()), "pairs_apart": float(np.mean(step.apart)) if step.apart else 1.0},
        config.train,
        name="tune-items",
        metric=evaluate.metric,
        checkpoints=checkpoints / "joint",
    )
    if config.lora:
        encoder.model = merge_lora(encoder.model)
    if config.train.lora:
        tower.merge_lora()
    return step, result


def run(context: Context) -> dict[str, Any]:
    """Tune, save, publish; in several processes (accelerate launch) the main one. A killed run goes on.

    Raises DataError, ConfigError, NotFoundError, TrainingError.
    """
    config, store = context.config, context.store
    encoder = ItemEncoder.from_config(config.encoder, config.template)
    base = fingerprint(encoder, config.embed.output_dtype)
    inputs = inputs_hash(base, context.dataset.record.digest, config.tune, config.evaluate)
    earlier = store.all(ItemTower, name=NAME)
    if earlier and earlier[-1].inputs == inputs:
        return _report(earlier[-1], reused=True)
    with checkpoint_folder(store, inputs) as checkpoints:
        return _make(context, encoder, inputs, checkpoints)


def _make(context: Context, encoder: ItemEncoder, inputs: str, checkpoints: Path) -> dict[str, Any]:
    config, store = context.config, context.store
    earlier = store.all(ItemTower, name=NAME)
    corpus = open_corpus(context, encoder.template)
    if not is_main_process():
        _tune(context, encoder, corpus, checkpoints)
        return {}
    tags = {"dataset": context.dataset.record.digest, "inputs": inputs}
    sections = context.settings("encoder", "template", "tune", "data", "evaluate")
    with context.tracker.run("tune-items", NAME, sections, tags) as run:
        step, result = _tune(context, encoder, corpus, checkpoints)
        run.curve(result.curve)
        made = fingerprint(step.encoder, config.embed.output_dtype)
        created_at = next_created_at(earlier)
        record = ItemTower(
            id=record_id(created_at, made),
            created_at=created_at,
            name=NAME,
            fingerprint=made,
            dim=step.encoder.dim,
            output_dtype=config.embed.output_dtype,
            inputs=inputs,
            base=config.encoder.model,
            dataset=context.dataset.record.digest,
            split=f"{training_label(context.dataset.histories, config.evaluate)}: training part, chosen on valid",
            cutoff="recorded",
            run_id=run.run_id,
            steps=result.steps,
            epochs=result.epochs,
            items_encoded=step.items_encoded,
            items_unique=step.items_unique,
            valid=result.best,
        )
        with store.new(ItemTower, record.id) as folder:
            step.encoder.save(folder)
            (folder / "user_tower").mkdir()
            step.tower.save(folder / "user_tower")
            write_cutoff(folder, corpus.training, corpus.item_ids)
            write_record(folder, record)
        run.tags({"item_tower": record.id, "fingerprint": made})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return _report(record, reused=False)


def _report(record: ItemTower, reused: bool) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "item_tower": record.id,
        "fingerprint": record.fingerprint,
        "steps": record.steps,
        "epochs": record.epochs,
        "items_encoded": record.items_encoded,
        "items_unique": record.items_unique,
        "valid": record.valid,
        "reused": reused,
    }
