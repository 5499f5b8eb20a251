"""What bench retrieve searches in and asks for: a store's vectors and its user tower's queries, or made-up ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.config import Config, local_store
from jobs.context import Context
from jobs.train_user import catalog_rows
from pipeline.baselines import TowerRecommender
from pipeline.cache import open_snapshot
from pipeline.store import open_store
from schemas.records import Snapshot, UserTower
from user_tower.sequences import Histories

DIM, CLUSTERS, NOISE = 384, 1000, 0.7
JITTER = 0.3  # length of what is added to a unit vector: a cosine of .96 to it
FAR = 1.0  # the same for a made-up query, which is as far from its items as a user tower's: a cosine of .7
CHOOSING = 1000  # queries that an index's effort is chosen by
_BATCH = 512
Vectors = NDArray[np.float32]


class Searched(NamedTuple):
    """vectors [N, D], queries [Q, D], unit length where the tower's are; source: where both are from.

    choosing [C, D]: further queries of the same kind, to choose an index's effort by.
    """

    vectors: Vectors
    queries: Vectors
    choosing: Vectors
    source: str


def unit(rows: NDArray[np.floating]) -> Vectors:
    """[n, D] with length 1."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def moved(base: Vectors, share: float, rng: np.random.Generator) -> Vectors:
    """Vectors [n, D] moved by a random vector of ``share`` of their length; lengths stay."""
    lengths = np.linalg.norm(base, axis=1, keepdims=True)
    noise = rng.standard_normal(base.shape, dtype=np.float32)
    noise *= np.float32(share / base.shape[1] ** 0.5) * lengths
    noise += base
    return unit(noise) * lengths


def _grown(base: Vectors, size: int, rng: np.random.Generator) -> tuple[Vectors, str]:
    """``size`` vectors from base [n, D]: some of them, or all many times over, each with jitter."""
    if len(base) >= size:
        return base[np.sort(rng.permutation(len(base))[:size])], f"{size} of its {len(base)} vectors"
    copies = base[rng.permutation(size) % len(base)]
    return moved(copies, JITTER, rng), f"its {len(base)} vectors with jitter {JITTER}"


def random_cuts(histories: Histories, count: int, rng: np.random.Generator) -> Histories:
    """``count`` beginnings of histories, each up to a random event; the same one twice only where all are taken."""
    events = len(histories.items)
    ends = np.concatenate([rng.permutation(events) for _ in range(-(-count // events))])[:count]
    users = np.searchsorted(histories.offsets, ends, side="right") - 1
    return histories.select(users).cut(ends - histories.offsets[users] + 1)


def _tower_queries(context: Context, recommender: TowerRecommender, item_ids: list[str], count: int) -> Vectors:
    known = context.dataset.histories.map_items(catalog_rows(context.dataset.item_ids, item_ids))
    asked = random_cuts(known, count, np.random.default_rng(1))
    parts = [
        recommender.queries(asked.select(np.arange(start, min(start + _BATCH, count)))).cpu()
        for start in range(0, count, _BATCH)
    ]
    return torch.cat(parts).numpy()


def _of_a_tower(context: Context, size: int, count: int) -> Searched:
    serving = context.serving_tower(None)
    recommender = TowerRecommender(serving.tower, serving.catalog)
    base = recommender.candidates.cpu().numpy()[serving.available]
    vectors, how = _grown(base, size, np.random.default_rng(0))
    queries = _tower_queries(context, recommender, serving.item_ids, count + CHOOSING)
    snapshot = f"snapshot {serving.snapshot.id}" if serving.snapshot else "the tower's ids"
    source = f"{snapshot}: {how}; queries of user tower {serving.record.id}"
    return Searched(vectors, queries[:count], queries[count:], source)


def searched(config: Config) -> Searched:
    """``bench.vectors`` vectors and ``bench.queries`` queries.

    Of the newest user tower of the configured name, asked after random beginnings of the data set's histories.
    Without one, of the newest snapshot, and without that around random centres, with queries made up near them.
    """
    size, count, rng = config.bench.vectors, config.bench.queries, np.random.default_rng(0)
    store = open_store(str(local_store(config)))
    if store.newest(UserTower, name=config.name) is not None:
        return _of_a_tower(Context(config), size, count)
    snapshot = store.newest(Snapshot)
    if snapshot is not None:
        matrix = open_snapshot(open_store(config.store), snapshot)
        base = unit(np.asarray(matrix.vectors, dtype=np.float32)[matrix.available])
        vectors, how = _grown(base, size, rng)
        source = f"snapshot {snapshot.id}: {how}"
    else:
        centres = unit(rng.standard_normal((CLUSTERS, DIM), dtype=np.float32))
        vectors = moved(centres[rng.integers(CLUSTERS, size=size)], NOISE, rng)
        source = f"made up: {CLUSTERS} clusters, noise {NOISE}"
    queries = moved(vectors[rng.integers(size, size=count + CHOOSING)], FAR, rng)
    source = f"{source}; queries made up: vectors with jitter {FAR}"
    return Searched(vectors, queries[:count], queries[count:], source)
