"""What a catalog and its users cost: bytes of what is stored and hours of what is computed, each formula once.

Symbols: N items, U users, E events, D item vector, g GPUs. Bytes are those of the files and indexes as this project
writes them; tests/test_pipeline_scale.py builds each at 1/1000 and compares. Hours follow from rates measured
elsewhere (``Rates``), which are never guessed here.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.ann import KMEANS_POINTS, KMEANS_ROUNDS, IndexConfig, lists, pq_bytes, resolve_kind

PREFIX = 4  # bytes of the length before a value of a Parquet byte array
KEY = 16  # bytes of a content key, and of a history's digest
RUN_ID = 32  # characters of an MLflow run id
FILE_OVERHEAD = 4_096  # footer and page headers of one file; a few KiB


class Sizes(BaseModel):
    """A catalog, its users, and how they change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: int = Field(default=10_000_000, gt=0)
    users: int = Field(default=100_000_000, gt=0)
    item_tokens: float = Field(default=20.0, gt=0)
    """Mean tokens of a text; profile.json has yours."""
    user_events: float = Field(default=20.0, ge=2)
    """Mean events of a user."""
    history: int = Field(default=50, gt=0)
    """Events of a user that the user tower reads."""
    dim: int = Field(default=2_048, gt=0)
    """D; 2,048 is the hidden width of TinyLlama-1.1B."""
    vector_bytes: int = Field(default=2, gt=0)
    """Of one number as stored: 2 for float16."""
    id_bytes: int = Field(default=12, gt=0)
    """Mean bytes of an item's or a user's id."""
    changed: float = Field(default=0.02, ge=0, le=1)
    """Share of the catalog whose text is new or changed in a night."""
    active: float = Field(default=0.1, ge=0, le=1)
    """Share of users with a new event in a day."""
    kept_nights: int = Field(default=14, ge=1)
    """Nights whose snapshots and vectors are kept (``retention.days``)."""
    tune_epochs: int = Field(default=2, gt=0)
    tune_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the users that stage I is tuned on."""
    train_epochs: int = Field(default=10, gt=0)


class Rates(BaseModel):
    """Measured speeds: a GPU's (or, without one, this machine's), and those of the driver's machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_tokens: float | None = Field(default=None, gt=0)
    """Tokens a second of one embedding worker: ``bench gpu``, ``bench embed``."""
    tune_tokens: float | None = Field(default=None, gt=0)
    """Tokens a second of stage I, both towers, forward and backward."""
    train_positions: float | None = Field(default=None, gt=0)
    """Target positions a second of stage II (``train-user`` reports it)."""
    user_vectors: float | None = Field(default=None, gt=0)
    """Users a second of ``embed-users``, one worker."""
    plan_items: float | None = Field(default=None, gt=0)
    """Items a second that a plan reads and compares: ``bench cache``."""
    matrix_bytes: float | None = Field(default=None, gt=0)
    """Bytes of vectors a second from the table into a snapshot's checked matrix."""
    index_flops: float | None = Field(default=None, gt=0)
    """FLOP/s at which FAISS builds an IVF: ``index_build_flops`` over its seconds."""
    scaling: float = Field(default=1.0, gt=0, le=1)
    """Of several GPUs: speed over that many times the speed of one."""


def embedding_row_bytes(dim: int, vector_bytes: int) -> float:
    """One row of item_embeddings: key, vector, n_tokens, truncated, created_at, run_id; plain and not compressed."""
    return (KEY + PREFIX) + (dim * vector_bytes + PREFIX) + 4 + 1 / 8 + 8 + (RUN_ID + PREFIX)


def embedding_bytes(items: float, dim: int, vector_bytes: int, window: int) -> float:
    """The files of ``items`` vectors, one file a window of texts."""
    return items * embedding_row_bytes(dim, vector_bytes) + math.ceil(items / window) * FILE_OVERHEAD


def snapshot_bytes(items: float, id_bytes: float) -> float:
    """items.parquet: id, key, available; at most, since ids are compressed."""
    return items * (id_bytes + PREFIX + KEY + PREFIX + 1 / 8) + FILE_OVERHEAD


def matrix_bytes(items: float, dim: int, vector_bytes: int) -> float:
    """The local memory-mapped copy of one snapshot: as much disk, and page cache when all of it is read."""
    return items * dim * vector_bytes


def user_table_bytes(users: float, dim: int, vector_bytes: int, id_bytes: float) -> float:
    """users.parquet: id, digest of the history, vector."""
    return users * (id_bytes + PREFIX + KEY + PREFIX + dim * vector_bytes + PREFIX) + FILE_OVERHEAD


def index_bytes(config: IndexConfig, items: int, dim: int) -> float:
    """A FAISS index, in memory and as a file.

    flat: the float32 vectors. IVF: vectors or codes, an int64 id each, and the centroids; PQ also 256 centroids of D
    numbers in all. HNSW: the vectors, 2 M int32 links on the lowest layer and M on each above, which one of M nodes
    reaches, an offset (8) and a level (4) a node.
    """
    kind = resolve_kind(config, items)
    if kind == "flat":
        return items * dim * 4
    if kind == "hnsw":
        links = config.hnsw_links
        return items * (dim * 4 + 4 * (2 * links + links / (links - 1)) + 8 + 4)
    centroids = lists(config, items)[0] * dim * 4
    if kind == "ivf-flat":
        return items * (dim * 4 + 8) + centroids
    return items * (pq_bytes(config, dim, items) + 8) + centroids + 256 * dim * 4


def index_build_flops(config: IndexConfig, items: int, dim: int) -> float:
    """Multiplications and additions of an IVF's k-means and of putting every vector into its list; 0 for flat."""
    kind = resolve_kind(config, items)
    if not kind.startswith("ivf"):
        return 0.0
    nlist = lists(config, items)[0]
    return 2.0 * dim * nlist * (items + KMEANS_ROUNDS * min(items, KMEANS_POINTS * nlist))


def embed_hours(texts: float, item_tokens: float, tokens_per_second: float, gpus: int, window: int) -> float:
    """Windows of texts go to whichever worker is free; the last round may leave some idle."""
    windows = math.ceil(texts / window)
    rounds = math.ceil(windows / gpus)
    per_window = texts / max(1, windows) * item_tokens / tokens_per_second
    return rounds * per_window / 3600


def positions(users: float, events: float) -> float:
    """Target positions of one epoch: every event but a user's first (``sequences.training_windows``)."""
    return users * (events - 1)


def tune_tokens(sizes: Sizes) -> float:
    """Tokens that stage I encodes, at most: each event of a user as an item of its own.

    A batch encodes its distinct items once; in a catalog of millions hardly two of them are the same.
    """
    return sizes.tune_epochs * sizes.tune_share * sizes.users * sizes.user_events * sizes.item_tokens


def _hours(work: float, rate: float | None, workers: float = 1.0) -> float | None:
    return None if rate is None else work / (rate * workers) / 3600


def storage(sizes: Sizes, index: IndexConfig, window: int) -> dict[str, float]:
    """Bytes of everything that stays, after ``kept_nights`` nights; independent of the number of GPUs."""
    nights = sizes.items * sizes.changed * sizes.kept_nights
    return {
        "embeddings": embedding_bytes(sizes.items + nights, sizes.dim, sizes.vector_bytes, window),
        "snapshots": sizes.kept_nights * snapshot_bytes(sizes.items, sizes.id_bytes),
        "matrix": matrix_bytes(sizes.items, sizes.dim, sizes.vector_bytes),
        "index": index_bytes(index, sizes.items, sizes.dim),
        "user_vectors": user_table_bytes(sizes.users, sizes.dim, sizes.vector_bytes, sizes.id_bytes),
    }


def hours(sizes: Sizes, rates: Rates, index: IndexConfig, gpus: int, window: int) -> dict[str, float | None]:
    """Hours of each job on g GPUs; None where its rate is not known. ``night`` is the sum of a night's own.

    A night plans, embeds what changed, builds matrix and index, and computes the users who were active. Plan, matrix
    and index are the driver's work and do not get faster with more GPUs.
    """
    workers = 1.0 if gpus == 1 else gpus * rates.scaling
    changed = sizes.items * sizes.changed
    # the share that scaling takes stretches every worker's window alike
    rate = None if rates.embed_tokens is None else rates.embed_tokens * workers / gpus
    night = {
        "plan": _hours(sizes.items, rates.plan_items),
        "embed_changed": None if rate is None else embed_hours(changed, sizes.item_tokens, rate, gpus, window),
        "matrix": _hours(matrix_bytes(sizes.items, sizes.dim, sizes.vector_bytes), rates.matrix_bytes),
        "index": _hours(index_build_flops(index, sizes.items, sizes.dim), rates.index_flops),
        "active_users": _hours(sizes.users * sizes.active, rates.user_vectors, workers),
    }
    known = [value for value in night.values() if value is not None]
    stage2 = sizes.train_epochs * positions(sizes.users, sizes.user_events)
    return {
        "embed_all": None if rate is None else embed_hours(sizes.items, sizes.item_tokens, rate, gpus, window),
        "tune": _hours(tune_tokens(sizes), rates.tune_tokens, workers),
        "train": _hours(stage2, rates.train_positions, workers),
        "all_users": _hours(sizes.users, rates.user_vectors, workers),
        **night,
        "night": float(np.sum(known)) if len(known) == len(night) else None,
    }


def tokens_for(sizes: Sizes, hours_given: float, gpus: int) -> float:
    """Tokens a second that each of g GPUs must embed so that the whole catalog takes so many hours."""
    return sizes.items * sizes.item_tokens / (hours_given * 3600 * gpus)
