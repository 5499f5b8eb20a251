"""bench scale: bytes and hours of 10 and 100 million items and 100 million users on 1, 8 and 64 GPUs.

Rates come from the configuration (``bench.rates``); what is not given there is measured here, small and on this
machine, which the rows say.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from item_tower.cpu import in_streams, speed_up
from item_tower.decoders.precision import default_device
from item_tower.encoder import ItemEncoder
from item_tower.prompt import TemplateConfig
from jobs.bench_cache import fill, write_catalog
from jobs.config import Config, load_config
from pipeline import scale
from pipeline.ann import IndexConfig, make
from pipeline.cache import plan_embedding
from pipeline.catalog import scan_catalog
from pipeline.joint import JointStep, distinct_texts
from pipeline.matrix import build_matrix
from pipeline.store import Store
from user_tower.model import UserTower
from user_tower.negatives import NegativeSampler, draws
from user_tower.sequences import Batch, Histories, last_events, training_batches
from user_tower.steps import UserStep

CATALOGS, GPUS, NIGHT_HOURS = (10_000_000, 100_000_000), (1, 8, 64), 8.0
_ITEMS, _USERS, _TEXTS = 20_000, 256, 256
_TOWER = "b" * 32


def _rate(work: Callable[[], object], amount: float, seconds: float = 3.0) -> float:
    """Amount a second of the fastest call, after one that is not counted, for about so many seconds in all."""
    work()
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return amount / best


def _made_up(events: float, items: int) -> Histories:
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.poisson(events, _USERS))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    users = [str(n) for n in range(_USERS)]
    return Histories(users, offsets, rng.integers(0, items, offsets[-1]), np.arange(offsets[-1]) * 60_000)


def _first_batch(histories: Histories, history: int, size: int) -> Batch:
    return next(iter(training_batches(histories, history, size, np.random.default_rng(0))))


def _item_rates(config: Config, sizes: scale.Sizes) -> dict[str, float]:
    """Embedding and stage I of the configured Item LLM on random tokens, tokens a second."""
    encoder = ItemEncoder.from_config(config.encoder, config.template).to(default_device()).eval()
    rng, vocabulary = np.random.default_rng(0), len(encoder.tokenizer)
    lengths = np.clip(rng.poisson(sizes.item_tokens, _TEXTS), 1, config.encoder.max_length)
    ids = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    histories = _made_up(sizes.user_events, _TEXTS)
    tower = UserTower(config.tune.user_tower, encoder.dim, None).to(encoder.device)
    never = config.tune.model_copy(update={"collapse_floor": 0.0})  # made-up texts may well be alike
    step = JointStep(encoder, tower, ids, torch.arange(_TEXTS), never).to(encoder.device).train()
    batch = _first_batch(histories, config.tune.user_tower.history, 16)
    needed, _, _ = distinct_texts(batch, step.groups, never.train.negatives, 0)
    found = {"tune_tokens": _rate(lambda: step(batch, batch, 0).backward(), float(lengths[needed].sum()))}
    encoder.packing = config.embed.packing
    speed_up(encoder)
    budget = config.embed.tokens_at_once(encoder.device)
    batches = encoder.batches(lengths, budget)

    def encode(batch: NDArray[np.int64], _: int) -> None:
        encoder.encode([ids[row] for row in batch])

    found["embed_tokens"] = _rate(lambda: in_streams(encoder.device, encode, batches), float(lengths.sum()))
    return found


def _user_rates(config: Config, sizes: scale.Sizes) -> dict[str, float]:
    """Stage II in target positions a second, and user vectors a second, of the configured user tower."""
    vectors = np.random.default_rng(0).standard_normal((_ITEMS, sizes.dim), dtype=np.float32)
    names = [str(n) for n in range(_ITEMS)]
    settings = config.user_tower.model_copy(update={"features": "text"})
    tower = UserTower(settings, sizes.dim, None).to(default_device()).train()
    catalog = tower.catalog(names, vectors, np.arange(_ITEMS))
    device = catalog.groups.device
    negatives = draws(config.train.negatives, sizes.items) or _ITEMS
    sampler = NegativeSampler(
        torch.arange(_ITEMS, device=device), torch.ones(_ITEMS, device=device), min(negatives, _ITEMS), "uniform"
    )
    histories = _made_up(sizes.user_events, _ITEMS)
    batch = _first_batch(histories, settings.history, config.train.batch_size)
    step = UserStep(tower, catalog, sampler)
    found = {"train_positions": _rate(lambda: step(batch, batch, 0).backward(), batch.positions)}
    tower.eval()
    recent = last_events(histories, settings.history)
    items, lengths, _, times = (torch.from_numpy(array).to(device) for array in recent)
    with torch.inference_mode():
        found["user_vectors"] = _rate(lambda: tower.queries(catalog, items, lengths, times), len(histories))
    return found


def _driver_rates(sizes: scale.Sizes, folder: Path) -> dict[str, float]:
    """A plan, a matrix and an IVF of 20,000 made-up items."""
    store, template = Store(folder), TemplateConfig(fields=("title",))
    write_catalog(folder / "items.parquet", _ITEMS, 0)
    scan = scan_catalog(folder / "items.parquet", template)
    fill(store, scan, sizes.dim)
    found = {}

    def plan() -> None:
        plan_embedding(store, _TOWER, scan_catalog(folder / "items.parquet", template), {})

    def matrix() -> None:
        digest, _ = build_matrix(store, _TOWER, scan.keys, "float16", sizes.dim, check=True)
        store.matrix_file(digest).unlink()

    found["plan_items"] = _rate(plan, _ITEMS)
    found["matrix_bytes"] = _rate(matrix, scale.matrix_bytes(_ITEMS, sizes.dim, 2))
    index = IndexConfig(kind="ivf-flat", nlist=256)
    vectors = np.random.default_rng(0).standard_normal((_ITEMS, sizes.dim), dtype=np.float32)
    found["index_flops"] = _rate(lambda: make(index, vectors), scale.index_build_flops(index, _ITEMS, sizes.dim), 1.0)
    return found


def measure(config: Config, given: scale.Rates, sizes: scale.Sizes, parent: Path | None = None) -> scale.Rates:
    """The given rates, and those of this machine for what is missing."""
    missing = {name for name, value in given.model_dump().items() if value is None}
    found: dict[str, float] = {}
    if missing & {"embed_tokens", "tune_tokens"}:
        found |= _item_rates(config, sizes)
    if missing & {"train_positions", "user_vectors"}:
        found |= _user_rates(config, sizes)
    if missing & {"plan_items", "matrix_bytes", "index_flops"}:
        with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=parent) as folder:
            found |= _driver_rates(sizes, Path(folder))
    return given.model_copy(update={name: found[name] for name in missing})


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Print one row a catalog and number of GPUs. ``bench.rates`` and ``bench.scale`` set rates and sizes."""
    settings = load_config(config, None, sets)
    given, sizes, window = settings.bench.rates, settings.bench.scale, settings.embed.window
    rates = measure(settings, given, sizes)
    rows: list[dict[str, Any]] = []
    for items in CATALOGS:
        asked = sizes.model_copy(update={"items": items})
        stored = scale.storage(asked, settings.index, window)
        for gpus in GPUS:
            took = scale.hours(asked, rates, settings.index, gpus, window)
            row = {
                "name": f"{items // 1_000_000}M items, {sizes.users / 1e6:g}M users, {gpus} GPUs",
                "gib": {name: round(value / 2**30, 1) for name, value in stored.items()},
                "hours": {name: None if value is None else round(value, 2) for name, value in took.items()},
                "tokens_per_second_for_8_hours": round(scale.tokens_for(asked, NIGHT_HOURS, gpus)),
            }
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    known = {name for name, value in given.model_dump().items() if value is not None}
    return {
        "name": "scale",
        "rows": rows,
        "rates": rates.model_dump(),
        "measured_here": sorted(set(rates.model_dump()) - known),
        "sizes": sizes.model_dump(),
        "ratio": {},
    }
