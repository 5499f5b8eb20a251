"""bench rank: what one more candidate costs under late and early fusion, against a bare inner product."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from item_tower.decoders.precision import default_device
from jobs.bench_clock import fastest
from jobs.config import Config, load_config
from user_tower.candidates import Examples
from user_tower.model import UserTower
from user_tower.ranking import CandidateScorer, Fusion, Ranker
from user_tower.sequences import Histories

DIM = 384  # of the made-up item vectors
FEW = 200  # candidates of early fusion; late fusion is asked about bench.vectors
REPEATS = 5  # the scores end on the CPU, so a GPU is waited for


def _ask(items: int, events: int, count: int) -> Examples:
    """One user with so many events, and the first ``count`` items as candidates."""
    rng = np.random.default_rng(0)
    history = Histories([""], np.array([0, events]), rng.integers(0, items, events))
    nobody = np.zeros(count, dtype=np.int64)
    return Examples(history, nobody, nobody + events, np.arange(count), nobody)


def _flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _row(settings: Config, vectors: np.ndarray, fusion: Fusion, few: int, many: int) -> dict[str, Any]:
    """Costs for few and for many candidates; their difference is that of the candidates alone."""
    ids = [str(row) for row in range(len(vectors))]
    torch.manual_seed(0)
    tower = settings.user_tower.model_copy(update={"features": "text"})
    ranker = Ranker(UserTower(tower, DIM, None), fusion, settings.ranker.factors).to(default_device())
    scorer = CandidateScorer(ranker, ranker.tower.catalog(ids, vectors, np.arange(len(ids))))
    asked = [_ask(len(ids), ranker.context_length, count) for count in (few, many)]
    works = [lambda own=own: scorer.score(own, 1, FEW) for own in asked]
    (first, second), flops = [fastest(work, REPEATS) for work in works], [_flops(work) for work in works]
    return {
        "name": f"{fusion} fusion",
        "candidates": many,
        "milliseconds": round(second * 1e3, 3),
        "microseconds_per_candidate": round((second - first) / (many - few) * 1e6, 4),
        "flops_per_candidate": round((flops[1] - flops[0]) / (many - few), 1),
    }


def _bare(settings: Config, many: int) -> dict[str, Any]:
    """The gather and the inner products of late fusion, with arrays of the same size and nothing else."""
    torch.manual_seed(0)
    width = settings.ranker.factors + 1
    device = default_device()
    items, user = torch.randn(many, width, device=device), torch.randn(1, width, device=device)
    rows = torch.arange(many)
    seconds = fastest(lambda: (user @ items[rows.to(device)].T)[0].double().cpu().numpy(), REPEATS)
    each = round(seconds / many * 1e6, 4)
    row = {"name": "bare inner product", "candidates": many, "milliseconds": round(seconds * 1e3, 3)}
    return row | {"microseconds_per_candidate": each, "flops_per_candidate": 2.0 * width}


@torch.inference_mode()
def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Rows and ratios, by FLOPs (exact) and by time (of this machine)."""
    settings = load_config(config, None, sets)
    many = settings.bench.vectors
    vectors = np.random.default_rng(0).standard_normal((many, DIM), dtype=np.float32)
    bare = _bare(settings, many)
    late = _row(settings, vectors, "late", 1, many)
    early = _row(settings, vectors, "early", 1, min(many, FEW))
    rows = [bare, late, early]
    for row in rows:
        print(row, file=sys.stderr, flush=True)
    facts = {"history": settings.user_tower.history, "hidden": settings.user_tower.hidden}
    facts |= {"factors": settings.ranker.factors, "threads": torch.get_num_threads()}
    ratio = {}
    for name, own in (("late", late), ("early", early)):
        ratio[f"{name}_over_product_flops"] = round(own["flops_per_candidate"] / bare["flops_per_candidate"], 3)
        time_of = "microseconds_per_candidate"
        ratio[f"{name}_over_product_time"] = round(own[time_of] / max(bare[time_of], 1e-9), 3)
    return {"name": "rank", "rows": [row | facts | {"source": "made up"} for row in rows], "ratio": ratio}
