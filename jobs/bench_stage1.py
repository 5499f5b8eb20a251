"""Of bench train: the tokens that a stage I step encodes, and the memory of steps, each in its own process."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BertConfig, BertModel

from item_tower.batching import token_budget_batches
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.prompt import TemplateConfig
from jobs.bench_cache import apart
from pipeline.joint import JointConfig, JointStep, distinct_texts
from user_tower.loss import info_nce
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batch, Histories, IntArray, training_batches
from user_tower.steps import UserStep
from user_tower.train import TrainConfig, fit

STAGE1_BATCH = 64
LOSS_POSITIONS, LOSS_DIM = 2_048, 128
LOSS_NEGATIVES = (4_096, 16_384, 65_536, 262_144)
STEP_ITEMS, STEP_TOKENS = (512, 2_048, 8_192), 16
GRAPH_TOKENS = (4_096, 16_384)
_MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
LONG_HISTORY, LONG_BATCH, LONG_CATALOG, LONG_DIM = 1_000, 8, 12_000, 384


class Encoded(NamedTuple):
    """What goes through the Item LLM in a step. padded: tokens with the padding of its forward passes."""

    items: int
    tokens: int
    padded: int


def own_encoded(
    batch: Batch, lengths: IntArray, groups: IntArray, config: JointConfig, seed: int, item_token: bool
) -> Encoded:
    """Of our step: each distinct text once. lengths, groups: [N] tokens of the text and group of each item;
    item_token: whether each text is followed by [ITEM]."""
    rows, texts, _ = distinct_texts(batch, groups, config.train.negatives, seed)
    tokens = lengths[rows[texts]]
    passes = token_budget_batches(tokens, config.token_budget)
    padded = sum((int(tokens[one].max()) + item_token) * len(one) for one in passes)
    return Encoded(len(tokens), int(tokens.sum()) + item_token * len(tokens), padded)


def official_encoded(
    batch: Batch, lengths: IntArray, history: int, rng: np.random.Generator, item_token: bool
) -> Encoded:
    """Of the official code (bytedance/HLLM, code/REC/data/dataset/trainset.py) for the same windows: history + 1
    items of each, what is missing filled up with random ones, and as many random negatives. It packs, so nothing is
    padded."""
    real = np.concatenate([batch.items[:, 0], batch.targets[batch.targets >= 0]])
    items = 2 * (history + 1) * len(batch.lengths)
    drawn = rng.integers(len(lengths), size=items - len(real))
    tokens = int(lengths[real].sum() + lengths[drawn].sum()) + item_token * items
    return Encoded(items, tokens, tokens)


def stage1_rows(
    training: Histories, lengths: IntArray, groups: IntArray, config: JointConfig, item_token: bool
) -> list[dict[str, Any]]:
    """Tokens of an epoch's steps against the official scheme: as configured, with as many candidates as there, and
    for the full windows alone, where nothing is random padding."""
    history = config.user_tower.history

    def row(name: str, batches: list[Batch], own: JointConfig) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        ours = [own_encoded(batch, lengths, groups, own, seed, item_token) for seed, batch in enumerate(batches)]
        theirs = [official_encoded(batch, lengths, history, rng, item_token) for batch in batches]
        a, b = (Encoded(*np.array(found).sum(0).tolist()) for found in (ours, theirs))
        return {
            "name": f"stage I, {name}",
            "steps": len(batches),
            "batch_size": STAGE1_BATCH,
            "items": round(a.items / len(batches), 1),
            "tokens": round(a.padded / len(batches)),
            "tokens_without_padding": round(a.tokens / len(batches)),
            "official_items": round(b.items / len(batches), 1),
            "official_tokens": round(b.tokens / len(batches)),
            "tokens_over_official": round(a.padded / b.padded, 3),
        }

    batches = list(training_batches(training, history, STAGE1_BATCH, np.random.default_rng(0)))
    many = config.train.model_copy(update={"negatives": STAGE1_BATCH * (history + 1)})
    rows = [
        row("as configured", batches, config),
        row("as many candidates as the official scheme", batches, config.model_copy(update={"train": many})),
    ]
    long = training.select(np.flatnonzero(training.lengths > history))
    cut = training_batches(long, history, STAGE1_BATCH, np.random.default_rng(0))
    full = [batch for batch in cut if (batch.lengths == history).all()]
    return rows + ([row("full windows alone", full, config)] if full else [])


def _status_mib(field: str) -> float:
    """A line of /proc/self/status; where there is none, the most that this process ever had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _peak(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds, and the peak memory above what was there before."""
    before, started = _status_mib("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_above_mib": round(max(0.0, _status_mib("VmHWM") - before), 1)}


def loss_memory(negatives: int, root: Path) -> dict[str, Any]:
    """Full softmax and its gradients over so many negatives; beside it what one [P, M] of float32 would take."""
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(LOSS_POSITIONS, LOSS_DIM, generator=rng, requires_grad=True)
    candidates = torch.randn(negatives, LOSS_DIM, generator=rng, requires_grad=True)
    targets = torch.randint(negatives, (LOSS_POSITIONS,), generator=rng)
    groups = torch.arange(negatives)
    found = _peak(
        lambda: info_nce(queries, candidates[targets], candidates, groups[targets], groups, torch.ones(())).backward()
    )
    whole = LOSS_POSITIONS * negatives * 4 / 2**20
    return {**found, "positions": LOSS_POSITIONS, "negatives": negatives, "whole_logits_mib": round(whole, 1)}


def tiny_step(items: int, graph_tokens: int) -> tuple[JointStep, Batch]:
    """Stage I's step with a small random encoder, and a batch of 8 windows: most of its items are negatives, so that
    the user tower's own memory stays the same."""
    rng = np.random.default_rng(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    model = BertModel(BertConfig(vocab_size=1_000, **shape), add_pooling_layer=False)
    reads = EncoderConfig(pooling="mean", compute_dtype="float32")
    encoder = ItemEncoder(model, SimpleNamespace(pad_token_id=0), reads, TemplateConfig())
    texts = rng.integers(1, 1_000, (items, STEP_TOKENS)).tolist()
    windows = np.arange(64, dtype=np.int64).reshape(8, 8)
    batch = Batch(windows[:, :-1], np.full(8, 7), windows[:, 1:], np.zeros((8, 7), dtype=np.int64))
    config = JointConfig(
        user_tower=UserTowerConfig(hidden=64, history=8),
        train=TrainConfig(negatives=12 * items),  # drawn with replacement: nearly every item is among them
        graph_tokens=graph_tokens,
        collapse_floor=0,
    )
    tower = UserTower(config.user_tower, encoder.dim, None)
    return JointStep(encoder, tower, texts, torch.arange(items), config).train(), batch


def step_memory(items: int, graph_tokens: int, root: Path) -> dict[str, Any]:
    """One stage I step, forward and backward, with so many distinct items in the batch."""
    warm, small = tiny_step(64, graph_tokens)
    warm(small, small, 0).backward()
    step, batch = tiny_step(items, graph_tokens)
    found = _peak(lambda: step(batch, batch, 0).backward())
    tokens = step.items_encoded * STEP_TOKENS
    return {**found, "items": step.items_encoded, "tokens": tokens, "graph_tokens": graph_tokens}


def long_memory(root: Path) -> dict[str, Any]:
    """Steps on histories of LONG_HISTORY events through an ``llm`` backbone of the demo's size, in the training loop;
    the memory is that of the whole process."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((LONG_CATALOG, LONG_DIM), dtype=np.float32)
    length = LONG_HISTORY + 1
    histories = Histories(
        [str(user) for user in range(LONG_BATCH)],
        np.arange(LONG_BATCH + 1) * length,
        rng.integers(LONG_CATALOG, size=LONG_BATCH * length),
    )
    tower = UserTower(UserTowerConfig(backbone="llm", history=LONG_HISTORY), LONG_DIM, None)
    catalog = tower.catalog([str(item) for item in range(LONG_CATALOG)], vectors, np.arange(LONG_CATALOG))
    candidates = torch.arange(LONG_CATALOG)
    step = UserStep(tower, catalog, NegativeSampler(candidates, torch.ones(LONG_CATALOG), 0, "uniform"))
    done = fit(
        step,
        [{"params": list(tower.parameters())}],
        lambda epoch: training_batches(histories, LONG_HISTORY, LONG_BATCH, rng),
        lambda: {"none": 0.0},
        TrainConfig(batch_size=LONG_BATCH, epochs=2),
        name="history 1000",
        metric="none",
    )
    return {
        "seconds_per_step": round(done.seconds / done.steps, 2),
        "positions": done.positions // done.steps,
        "peak_mib_of_process": round(_status_mib("VmHWM")),
    }


@contextmanager
def _blocks_given_back() -> Iterator[None]:
    """Processes started meanwhile give every block of 1 MiB or more back to the system at once (glibc). What they
    then hold is what is in use; by default the heap keeps holes between blocks of different size."""
    os.environ[_MMAP_THRESHOLD] = str(1 << 20)
    try:
        yield
    finally:
        del os.environ[_MMAP_THRESHOLD]


def memory_rows(root: Path) -> list[dict[str, Any]]:
    """All curves, one process a point; stage I's in use, and for the smaller graph also with the heap as it is."""

    def row(name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        found = apart(name, work, root)
        # those of ``apart`` hold what the parent had when it started this process
        return {key: value for key, value in found.items() if key not in ("start_mib", "peak_mib")}

    rows = [row(f"memory, loss over {count} negatives", partial(loss_memory, count)) for count in LOSS_NEGATIVES]
    for graph_tokens in GRAPH_TOKENS:
        for items in STEP_ITEMS:
            work = partial(step_memory, items, graph_tokens)
            name = f"memory, stage I, {items} items, graph of {graph_tokens} tokens"
            with _blocks_given_back():
                rows.append(row(f"{name}, in use", work))
            if graph_tokens == GRAPH_TOKENS[0]:
                rows.append(row(f"{name}, the process", work))
    rows.append(row(f"memory, llm backbone, batch {LONG_BATCH}, history {LONG_HISTORY}", long_memory))
    return rows
