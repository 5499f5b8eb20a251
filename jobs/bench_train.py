"""bench train: positions per second of the user tower's training against RecTools' and RecBole's SASRec, tokens of a
stage I step against the official scheme, and the memory of both.

Shapes: S positions of one product, N catalog items, H hidden width.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from item_tower.decoders.precision import default_device, fast_bfloat16
from item_tower.encoder import tokenise_texts
from jobs import prepare_data
from jobs.bench_peers import PEERS, peer_python
from jobs.bench_stage1 import memory_rows, stage1_rows
from jobs.bench_train_peer import HISTORY, LAYERS, WIDTH, Measure, Stopwatch
from jobs.config import Config, data_sets, load_config, local_store
from jobs.context import Context
from jobs.tune_items import open_corpus
from pipeline.dataset import OpenDataset
from pipeline.splits import training_part
from schemas.errors import ConfigError
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batch, Batches, Histories, training_batches
from user_tower.steps import UserStep
from user_tower.train import TrainConfig, fit

GRID_SECONDS, ROUND_SECONDS, ROUNDS = 5.0, 15.0, 3
# of which each takes its best; a step of the first two is so many histories, one of RecBole's so many positions
BATCHES = {"ours": (64, 128, 256, 512), "rectools": (32, 64, 128, 256), "recbole": (512, 1_024, 2_048, 4_096)}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def _peer(name: str, python: Path, folder: Path) -> Iterator[Measure]:
    """A peer in its own process, which answers one request after the other and waits between them."""
    script = Path(__file__).with_name("bench_train_peer.py")
    command = [str(python), "-I", str(script), name, str(folder), str(torch.get_num_threads())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def measure(batch_size: int, seconds: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"batch_size": batch_size, "seconds": seconds}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            last = (folder / "log").read_text().strip().splitlines()[-1:]
            raise ConfigError(f"bench train: {name} ended without an answer: {' '.join(last)}")
        found: dict[str, Any] = json.loads(answer)
        return found

    try:
        yield measure
    finally:
        process.kill()
        process.communicate()


def write_events(folder: Path, histories: Histories, training: Histories) -> None:
    """events.npz as bench_train_peer.py reads it: all events in order, and which of them are of training."""
    users = np.repeat(np.arange(len(histories)), histories.lengths)
    place = np.arange(len(histories.items)) - histories.offsets[:-1][users]
    np.savez(folder / "events.npz", users=users, items=histories.items, training=place < training.lengths[users])


def id_step(item_ids: list[str]) -> UserStep:
    """SASRec on ids with full softmax: what is measured of ours."""
    torch.manual_seed(0)
    config = UserTowerConfig(features="id", similarity="dot", hidden=WIDTH, layers=LAYERS, history=HISTORY)
    tower = UserTower(config, None, item_ids).to(default_device())
    catalog = tower.catalog(item_ids, None, np.arange(len(item_ids)))
    candidates = torch.arange(len(item_ids), device=catalog.groups.device)
    return UserStep(tower, catalog, NegativeSampler(candidates, torch.ones_like(candidates), 0, "uniform"))


@dataclass(frozen=True)
class _UntilTime:
    """Batches of epoch after epoch as the one epoch of ``fit``, until the watch has seen enough."""

    watch: Stopwatch
    epoch: Callable[[], Batches[Batch]]

    def __len__(self) -> int:
        return len(self.epoch())  # of the first; it steers a learning rate, which is constant here

    def __iter__(self) -> Iterator[Batch]:
        return self.watch.batches(self.epoch, lambda batch: batch.positions)


def ours(training: Histories, item_ids: list[str]) -> Measure:
    """batch size, seconds -> what was measured, as of a peer: ``user_tower.train.fit`` without its validation."""

    def measure(batch_size: int, seconds: float) -> dict[str, Any]:
        step, watch, rng = id_step(item_ids), Stopwatch(seconds), np.random.default_rng(0)

        def epoch() -> Batches[Batch]:
            return training_batches(training, HISTORY, batch_size, rng)

        fit(
            step,
            [{"params": list(step.parameters())}],
            lambda _: _UntilTime(watch, epoch),
            lambda: {"none": 0.0},
            TrainConfig(epochs=1, batch_size=batch_size),
            name=f"ours x {batch_size}",
            metric="none",
        )
        return watch.answer()

    return measure


def position_flops(tower: nn.Module, items: int) -> float:
    """Multiplications and additions that training on one real position needs at least: three products with the
    catalog, and three for each linear layer; attention and everything that is no product left out."""
    linears = [layer for layer in tower.modules() if isinstance(layer, nn.Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in linears)
    return 3 * 2.0 * (weights + items * WIDTH)


def product_rate(items: int) -> float:
    """FLOP/s of the best of the loss's products by themselves, over some numbers of positions and both shapes."""
    device = default_device()
    dtype, best = torch.bfloat16 if fast_bfloat16(device) else torch.float32, 0.0
    catalog = torch.randn(items, WIDTH, dtype=dtype, device=device)
    for positions in (64, 256, 1_024):
        queries = torch.randn(positions, WIDTH, dtype=dtype, device=device)
        logits = queries @ catalog.T
        flops = 2 * logits.numel() * WIDTH
        works = (partial(torch.mm, queries, catalog.T, out=logits), partial(torch.mm, logits, catalog))
        for work in works:
            for _ in range(10):
                started = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best = max(best, flops / (time.perf_counter() - started))
    return best


def speeds(works: dict[str, Measure]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows, and the median rate of each: its best batch size first, then rounds in which all take turns."""

    def measured(name: str, batch_size: int, seconds: float) -> dict[str, float]:
        found = works[name](batch_size, seconds)
        rates = {key: found["positions"] / found[key] for key in ("seconds", "cpu_seconds")}
        steps = f"{found['steps']} steps in {found['seconds']:.1f} s"
        _say(
            f"{name} x {batch_size}: {rates['seconds']:.0f} positions/s, {steps}, {rates['cpu_seconds']:.0f} a CPU s"
        )
        return rates

    tried = {name: {size: measured(name, size, GRID_SECONDS)["seconds"] for size in BATCHES[name]} for name in works}
    best = {name: max(rates, key=lambda size: rates[size]) for name, rates in tried.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, found in rounds.items():
            found.append(measured(name, best[name], ROUND_SECONDS))
    rows = [
        {
            "name": f"training, {name}",
            "positions_per_second": round(median(rates["seconds"] for rates in rounds[name]), 1),
            "positions_per_cpu_second": round(median(rates["cpu_seconds"] for rates in rounds[name]), 1),
            "batch_size": best[name],
            "rounds": [round(rates["seconds"], 1) for rates in rounds[name]],
            "tried": {str(size): round(value, 1) for size, value in tried[name].items()},
        }
        for name in works
    ]
    return rows, {name: median(rates["seconds"] for rates in found) for name, found in rounds.items()}


def _training_rows(dataset: OpenDataset, training: Histories, store: Path) -> tuple[list[dict[str, Any]], dict]:
    """Rows and ratios of the user tower's training."""
    items = len(dataset.item_ids)
    flops, before = position_flops(id_step(dataset.item_ids).tower, items), product_rate(items)
    _say(f"floor: {before / flops:.0f} positions/s, the products alone at {before / 1e9:.0f} GFLOP/s")
    with ExitStack() as stack:
        works = {"ours": ours(training, dataset.item_ids)}
        for name, pins in PEERS.items():
            python = peer_python(name, pins, store)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"bench-{name}-")))
            write_events(folder, dataset.histories, training)
            works[name] = stack.enter_context(_peer(name, python, folder))
        rows, rates = speeds(works)
    best = max(before, product_rate(items))  # what else runs on the machine differs
    floor = {
        "name": "floor: the products alone",
        "positions_per_second": round(best / flops, 1),
        "gflops": round(best / 1e9, 1),
        "mflop_per_position": round(flops / 1e6, 2),
    }
    ratio = {f"over_{name}": rates["ours"] / rates[name] for name in PEERS}
    return [floor, *rows], {**ratio, "training_over_floor": rates["ours"] / (best / flops)}


def _stage1(context: Context, config: Config) -> list[dict[str, Any]]:
    corpus = open_corpus(context, config.template)
    lengths = tokenise_texts(None, config.encoder, corpus.texts).lengths
    tower = config.tune.user_tower.model_copy(update={"history": HISTORY})
    joint = config.tune.model_copy(update={"user_tower": tower})
    item_token = config.encoder.pooling == "item_token"
    return stage1_rows(corpus.training, lengths, corpus.groups, joint, item_token)


def run(config: str, sets: list[str], data: str | None = None) -> dict[str, Any]:
    """Print rows and ratios. data: a folder with items.parquet and interactions.parquet, in place of the configured
    data. Raises ConfigError when a peer cannot be installed or does not answer, and what prepare-data raises."""
    own = [] if data is None else data_sets(data, load_config(config, None, []).store)
    settings = load_config(config, None, [*own, *sets])
    store, context = local_store(settings), Context(settings)
    prepared = prepare_data.run(context)
    dataset = context.dataset
    training = training_part(dataset.histories, settings.evaluate)
    rows, ratio = _training_rows(dataset, training, store)
    stage1 = _stage1(context, settings)
    rows += stage1
    for row in stage1:
        _say(f"{row['name']}: {row['tokens']} tokens a step, official scheme {row['official_tokens']}")
    rows += memory_rows(store)
    ratio["stage1_tokens_over_official"] = stage1[0]["tokens_over_official"]
    return {
        "name": "train",
        "rows": rows,
        "data": {key: prepared[key] for key in ("dataset", "items", "users", "interactions")},
        "shape": {"width": WIDTH, "layers": LAYERS, "history": HISTORY, "threads": torch.get_num_threads()},
        "device": torch.backends.cpu.get_cpu_capability() if default_device().type == "cpu" else "cuda",
        "precision": "bfloat16" if fast_bfloat16(default_device()) else "float32",
        "ratio": {name: round(value, 3) for name, value in ratio.items()},
    }
