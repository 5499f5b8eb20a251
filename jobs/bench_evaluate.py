"""bench evaluate: a whole evaluation against the bare float32 score-and-top-k of the same users, in one run, and
against RecBole's full-sort evaluation of the same users, histories, candidates and queries."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.bench_clock import clocked
from jobs.bench_peers import PEERS, peer_python
from jobs.config import Config, load_config, local_store
from jobs.evaluate import LIST, figures
from pipeline.evaluate import Pool, rank_users
from pipeline.scores import Product, Scores, longest
from pipeline.slices import target_slices
from pipeline.splits import Queries
from schemas.errors import ConfigError
from user_tower.sequences import Histories

DIM, BARE_TOP, EVENTS = 384, 200, 9
_BARE_CHUNKS = (64, 128, 256, 512)
_TRIED = 2_048  # users on which each bare chunk is tried


class _Known:
    """A recommender whose queries are made up beforehand: what is measured is the evaluation, not a tower."""

    def __init__(self, queries: torch.Tensor, candidates: torch.Tensor) -> None:
        self._queries, self._candidates = queries, candidates
        self._longest = longest(candidates)

    def score(self, histories: Histories) -> Scores:
        """Inner products; users are called by their row."""
        rows = torch.tensor([int(user) for user in histories.users])
        return Product(self._queries[rows], self._candidates, self._longest)


def _inputs(config: Config) -> tuple[torch.Tensor, torch.Tensor, Queries, np.ndarray]:
    """Queries [U, D], candidates [N, D], the questions, and training counts [N] of a popular head and a long tail."""
    rng = np.random.default_rng(0)
    users, items = config.bench.users, config.bench.vectors
    candidates = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((items, DIM), dtype=np.float32)))
    popular = np.minimum(items - 1, (items * rng.power(0.4, (users, EVENTS + 1))).astype(np.int64))
    lengths = rng.integers(1, EVENTS + 1, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    inside = np.arange(EVENTS) < lengths[:, None]
    histories = Histories([str(user) for user in range(users)], offsets, popular[:, :EVENTS][inside])
    targets = popular[:, EVENTS]
    noise = torch.from_numpy(rng.standard_normal((users, DIM), dtype=np.float32))
    queries = torch.nn.functional.normalize(candidates[targets] + 0.1 * noise)
    return queries, candidates, Queries(histories, targets), np.bincount(histories.items, minlength=items)


def _bare(queries: torch.Tensor, candidates: torch.Tensor, chunk: int) -> None:
    for start in range(0, len(queries), chunk):
        (queries[start : start + chunk] @ candidates.T).topk(min(BARE_TOP, len(candidates)), dim=1)


def _gflops(candidates: torch.Tensor) -> float:
    """The best measured rate of the product by itself, GFLOP/s, over some block shapes."""
    best = 0.0
    for rows in (128, 512, 2_048):
        left, right = torch.randn(rows, DIM), candidates[:16_384].T.contiguous()
        seconds = min(clocked(partial(torch.mm, left, right)).seconds for _ in range(5))
        best = max(best, 2 * rows * right.numel() / seconds / 1e9)
    return best


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _recbole(python: Path, queries: torch.Tensor, candidates: torch.Tensor, asked: Queries) -> dict[str, Any]:
    """What ``bench_evaluate_peer`` answers: RecBole's evaluation with the batch that was its best on some users.

    Raises ConfigError when it ends without an answer.
    """
    threads, histories = str(torch.get_num_threads()), asked.histories
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        np.savez(
            folder / "inputs.npz",
            queries=queries.numpy(),
            candidates=candidates.numpy(),
            offsets=histories.offsets,
            items=histories.items,
            targets=asked.targets,
        )
        script = Path(__file__).with_name("bench_evaluate_peer.py")
        command = [str(python), "-I", str(script), aside, threads, str(_TRIED)]
        alone = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise ConfigError(f"bench evaluate: RecBole ended with {done.returncode}: {last}; set bench.recbole=false")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"name": "RecBole 1.2.1, full sort", **answer, "seconds": round(answer["seconds"], 2)}


@torch.inference_mode()
def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Rows and ratios: ranks, lists, intervals and slices of all users over the bare pass at its best chunk."""
    settings = load_config(config, None, sets)
    queries, candidates, asked, counts = _inputs(settings)
    pool = Pool(np.ones(len(candidates), dtype=bool))
    before = _peak_mib()

    def whole() -> dict[str, float]:
        recommender = _Known(queries, candidates)
        ranks = rank_users(recommender, asked, pool, settings.evaluate, top=LIST, progress="evaluate")
        members = target_slices(asked, counts)
        return figures(settings.evaluate, asked, ranks, len(candidates), members).metrics

    own, own_cpu, metrics = clocked(whole)
    peak = _peak_mib() - before  # before the bare pass, which holds whole rows of scores
    small = queries[:_TRIED]
    _bare(small, candidates, 512)  # once unmeasured: the first product starts the threads
    chunk = min(_BARE_CHUNKS, key=lambda size: clocked(lambda: _bare(small, candidates, size)).seconds)
    bare, bare_cpu, _ = clocked(lambda: _bare(queries, candidates, chunk))
    flops = 2 * len(queries) * candidates.numel()
    rate = _gflops(candidates)
    floor = flops / rate / 1e9
    facts = {"users": len(queries), "items": len(candidates), "dim": DIM, "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = [
        {
            "name": "evaluate",
            "seconds": round(own, 2),
            "cpu_seconds": round(own_cpu, 2),
            "peak_mib_above_inputs": peak,
            "chunk": settings.evaluate.chunk,
        },
        {
            "name": f"bare float32 score and top {BARE_TOP}",
            "seconds": round(bare, 2),
            "cpu_seconds": round(bare_cpu, 2),
            "chunk": chunk,
        },
        {"name": "floor: the products alone", "seconds": round(floor, 2), "gflops": round(rate, 1)},
    ]
    ratio = {
        "over_bare_score_topk": round(own / bare, 3),
        "cpu_over_bare_score_topk": round(own_cpu / bare_cpu, 3),
        "floor_over_evaluate": round(floor / own, 3),
    }
    if settings.bench.recbole:
        python = peer_python("recbole", PEERS["recbole"], local_store(settings))
        rows.append(_recbole(python, queries, candidates, asked))
        ratio["over_recbole"] = round(own / rows[-1]["seconds"], 3)
        ratio["cpu_over_recbole"] = round(own_cpu / rows[-1]["cpu_seconds"], 3)
    for row in rows:
        print(row, file=sys.stderr, flush=True)
    metric = settings.evaluate.metric
    return {
        "name": "evaluate",
        "rows": [facts | row | {"source": "made up"} for row in rows],
        "metric": {metric: metrics[metric]},
        "ratio": ratio,
    }
