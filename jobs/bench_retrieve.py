"""bench retrieve: exact top-200 against FAISS flat and torch, and each kind of index against flat."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.config import Config, load_config, local_store
from pipeline.ann import PQ_TRAIN, IndexConfig, Searcher, exact_top_k, faiss_flat, make, serialized_bytes, set_threads
from pipeline.cache import open_snapshot
from pipeline.index import intersection
from pipeline.store import open_store
from schemas.records import Snapshot

DIM, K, ANN_K, CLUSTERS, NOISE = 384, 200, 100, 1000, 0.7
_JITTER, _BLOCK = 0.3, 256


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _noisy(base: NDArray[np.float32], share: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Unit vectors [n, D] moved by a random vector of length ``share``."""
    noise = rng.standard_normal(base.shape, dtype=np.float32) * np.float32(share / base.shape[1] ** 0.5)
    return _unit(base + noise)


def _vectors(config: Config) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
    """Vectors [N, D], queries [Q, D], and where they are from. Queries are vectors, moved once more."""
    rng = np.random.default_rng(0)
    size = config.bench.vectors
    snapshot = open_store(str(local_store(config))).newest(Snapshot)
    if snapshot is not None:
        base = _unit(np.asarray(open_snapshot(open_store(config.store), snapshot).vectors, dtype=np.float32))
        source = f"snapshot {snapshot.id}, {len(base)} vectors with jitter {_JITTER}"
        vectors = _noisy(base[rng.integers(len(base), size=size)], _JITTER, rng)
    else:
        centres = _unit(rng.standard_normal((CLUSTERS, DIM), dtype=np.float32))
        source = f"made up: {CLUSTERS} clusters, noise {NOISE}"
        vectors = _noisy(centres[rng.integers(CLUSTERS, size=size)], NOISE, rng)
    queries = _noisy(vectors[rng.integers(size, size=config.bench.queries)], _JITTER, rng)
    return vectors, queries, source


def _torch_top(queries: NDArray[np.float32], vectors: NDArray[np.float32], dtype: torch.dtype) -> None:
    items_DN = torch.from_numpy(vectors).to(dtype).T
    for start in range(0, len(queries), _BLOCK):
        (torch.from_numpy(queries[start : start + _BLOCK]).to(dtype) @ items_DN).topk(min(K, len(vectors)), dim=1)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def _gflops(vectors: NDArray[np.float32]) -> float:
    """The best measured rate of the product by itself, GFLOP/s, over some block shapes."""
    best, items = 0.0, torch.from_numpy(vectors[:65_536]).T
    for queries in (_BLOCK, 1_024, 4_096):
        for count in (4_096, 16_384, items.shape[1]):
            left, right = torch.randn(queries, items.shape[0]), items[:, :count]
            seconds = min(_timed(partial(torch.mm, left, right))[0] for _ in range(3))
            best = max(best, 2 * queries * right.numel() / seconds / 1e9)
    return best


def _exact_rows(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> list[dict[str, Any]]:
    k = min(K, len(vectors))
    flat = faiss_flat(vectors)
    works: dict[str, Callable[[], Any]] = {
        "exact_top_k": lambda: exact_top_k(queries, vectors, k),
        "faiss flat": lambda: flat.search(queries, k),
        "torch float32": lambda: _torch_top(queries, vectors, torch.float32),
        "torch bfloat16": lambda: _torch_top(queries, vectors, torch.bfloat16),
    }
    flops = 2 * len(queries) * vectors.size
    took = {name: _timed(work)[0] for name, work in works.items()}
    # FAISS multiplies too: where its whole search was faster than the best product measured here, it is the floor
    floor = min(flops / _gflops(vectors) / 1e9, *(took[name] for name in ("faiss flat", "torch float32")))
    rows = []
    for name, seconds in took.items():
        rows.append({"name": name, "k": k, "seconds": round(seconds, 3), "floor_seconds": round(floor, 3)})
        print(f"{name:16} {seconds:8.2f} s, floor {floor:.2f} s", file=sys.stderr, flush=True)
    return rows


def _ann_row(
    kind: str, config: IndexConfig, queries: NDArray[np.float32], vectors: NDArray[np.float32], flat: dict[str, Any]
) -> dict[str, Any]:
    chosen = config.model_copy(update={"kind": kind})
    build, index = _timed(lambda: make(chosen, vectors))
    seconds, (_, found) = _timed(lambda: Searcher(index, chosen, kind).search(queries, flat["k"]))
    row = {
        "name": kind,
        "k": flat["k"],
        "build_seconds": round(build, 2),
        "ms_per_query": round(1000 * seconds / len(queries), 4),
        "intersection": round(intersection(found, flat["rows"]), 4),
        "bytes": serialized_bytes(index),
        "speed_over_flat": round(flat["seconds"] / seconds, 2),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Print rows and ratios; every search takes all queries as one batch, with the same threads."""
    settings = load_config(config, None, sets)
    vectors, queries, source = _vectors(settings)
    threads = set_threads(torch.get_num_threads())
    rows = _exact_rows(queries, vectors)
    k = min(ANN_K, len(vectors))
    index = faiss_flat(vectors)
    seconds, (_, exact) = _timed(lambda: index.search(queries, k))
    flat = {"k": k, "seconds": seconds, "rows": exact}
    kinds = ["ivf-flat", "hnsw", *(["ivf-pq"] if len(vectors) >= PQ_TRAIN else [])]
    ann = [_ann_row(kind, settings.index, queries, vectors, flat) for kind in kinds]
    facts = {"vectors": len(vectors), "queries": len(queries), "dim": vectors.shape[1], "threads": threads}
    by_name = {row["name"]: row for row in rows}
    ratio = {
        "ann_speed_over_flat": ann[0]["speed_over_flat"],  # ivf-flat, the default of a large catalog
        "ann_recall": ann[0]["intersection"],
        "exact_over_faiss_flat": round(by_name["exact_top_k"]["seconds"] / by_name["faiss flat"]["seconds"], 3),
    }
    return {"name": "retrieve", "rows": [row | facts | {"source": source} for row in rows + ann], "ratio": ratio}
