"""bench retrieve: exact top-200 against FAISS flat and torch, and each kind of index against flat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.bench_clock import Clocked, clocked
from jobs.bench_vectors import Searched, searched
from jobs.config import load_config
from pipeline.ann import (
    PQ_TRAIN,
    IndexConfig,
    Kind,
    Searcher,
    exact_top_k,
    faiss_flat,
    make,
    serialized_bytes,
    set_threads,
)
from pipeline.effort import choose_effort, chooses, intersection
from pipeline.index import EFFORTS

K, ANN_K = 200, 100
_BLOCK = 256
IntArray = NDArray[np.int64]


class _Flat(NamedTuple):
    """The search that all others are set against. rows: [Q, k], exact."""

    took: Clocked
    rows: IntArray


def _torch_top(queries: NDArray[np.float32], vectors: NDArray[np.float32], dtype: torch.dtype) -> None:
    items_DN = torch.from_numpy(vectors).to(dtype).T
    for start in range(0, len(queries), _BLOCK):
        (torch.from_numpy(queries[start : start + _BLOCK]).to(dtype) @ items_DN).topk(min(K, len(vectors)), dim=1)


def _gflops(vectors: NDArray[np.float32]) -> float:
    """The best measured rate of the product by itself, GFLOP/s, over some block shapes."""
    best, items = 0.0, torch.from_numpy(vectors[:65_536]).T
    for queries in (_BLOCK, 1_024, 4_096):
        for count in (4_096, 16_384, items.shape[1]):
            left, right = torch.randn(queries, items.shape[0]), items[:, :count]
            seconds = min(clocked(partial(torch.mm, left, right)).seconds for _ in range(3))
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
    took = {name: clocked(work).seconds for name, work in works.items()}
    # FAISS multiplies too: where its whole search was faster than the best product measured here, it is the floor
    floor = min(flops / _gflops(vectors) / 1e9, *(took[name] for name in ("faiss flat", "torch float32")))
    rows = []
    for name, seconds in took.items():
        rows.append({"name": name, "k": k, "seconds": round(seconds, 3), "floor_seconds": round(floor, 3)})
        print(f"{name:16} {seconds:8.2f} s, floor {floor:.2f} s", file=sys.stderr, flush=True)
    return rows


def _flat(inputs: Searched) -> _Flat:
    index = faiss_flat(inputs.vectors)
    index.search(inputs.queries[:_BLOCK], 1)  # once unmeasured: the first product starts the threads
    took = clocked(lambda: index.search(inputs.queries, min(ANN_K, len(inputs.vectors))))
    return _Flat(took, took.found[1])


def _figures(took: Clocked, flat: _Flat) -> dict[str, float]:
    """Of one search of all queries, beside flat's."""
    found = took.found[1]
    return {
        "ms_per_query": round(1000 * took.seconds / len(found), 4),
        "intersection": round(intersection(found, flat.rows), 4),
        "speed_over_flat": round(flat.took.seconds / took.seconds, 2),
        "cpu_speed_over_flat": round(flat.took.cpu_seconds / took.cpu_seconds, 2),
    }


def _ann_row(kind: Kind, config: IndexConfig, inputs: Searched, flat: _Flat) -> dict[str, Any]:
    """One kind with its effort chosen as build-index does, and what more or less gives."""
    chosen = config.model_copy(update={"kind": kind})
    build, _, index = clocked(lambda: make(chosen, inputs.vectors))
    choosing = 0.0
    if chooses(chosen, kind):
        choosing = clocked(lambda: choose_effort(index, chosen, kind, inputs.vectors, inputs.choosing)).seconds
    searcher, k = Searcher(index, chosen, kind), flat.rows.shape[1]
    searcher.search(inputs.queries[:_BLOCK], k)  # once unmeasured

    def at(effort: float) -> dict[str, Any]:
        took = clocked(lambda: searcher.search(inputs.queries, k, effort))
        return {"setting": searcher.setting(effort, k), **_figures(took, flat)}

    made = {"build_seconds": round(build, 2), "choose_seconds": round(choosing, 2)}
    row = {"name": kind, "k": k, **made, **at(1), "bytes": serialized_bytes(index)}
    row["trade_off"] = [at(effort) for effort in EFFORTS]
    print(row, file=sys.stderr, flush=True)
    return row


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Print rows and ratios; every search takes all queries as one batch, with the same threads.

    ``index.kind``, where it is not ``auto``, leaves the other kinds out.
    """
    settings = load_config(config, None, sets)
    inputs = searched(settings)
    vectors, queries = inputs.vectors, inputs.queries
    print(f"{len(vectors)} vectors, {len(queries)} queries; {inputs.source}", file=sys.stderr, flush=True)
    threads = set_threads(torch.get_num_threads())
    rows = _exact_rows(queries, vectors) if settings.bench.exact else []
    flat = _flat(inputs)
    print({"name": "flat", **_figures(flat.took, flat)}, file=sys.stderr, flush=True)
    kinds: list[Kind] = ["ivf-flat", "hnsw"]
    if len(vectors) >= PQ_TRAIN:
        kinds.append("ivf-pq")
    if settings.index.kind != "auto":
        kinds = [settings.index.kind]
    ann = [_ann_row(kind, settings.index, inputs, flat) for kind in kinds]
    facts: dict[str, Any] = {"vectors": len(vectors), "queries": len(queries), "dim": vectors.shape[1]}
    ratio = {  # of ivf-flat, the default of a large catalog, where it is not left out
        "ann_speed_over_flat": ann[0]["speed_over_flat"],
        "ann_cpu_speed_over_flat": ann[0]["cpu_speed_over_flat"],
        "ann_recall": ann[0]["intersection"],
    }
    by_name = {row["name"]: row for row in rows}
    if rows:
        over = by_name["exact_top_k"]["seconds"] / by_name["faiss flat"]["seconds"]
        ratio["exact_over_faiss_flat"] = round(over, 3)
    facts |= {"threads": threads, "source": inputs.source}
    return {"name": "retrieve", "rows": [row | facts for row in rows + ann], "ratio": ratio}
