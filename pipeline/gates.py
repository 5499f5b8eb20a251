"""What must hold before a snapshot is published (DESIGN 6). Each gate measures one figure and compares it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.catalog import CatalogScan
from pipeline.cells import PAIR, decode_keys, decode_vectors, key_frame
from pipeline.embeddings import EmbeddingTable, read_file, read_keys
from pipeline.files import on_threads
from schemas import tables
from schemas.errors import GateError

PROBES = 256
_PROBE_FILES = 4
_SOME = 65_536  # texts of the catalog among which probes are looked for first
_PAIRS = 20_000
_SAME = 0.99


class GateConfig(BaseModel):
    """Limits of the gates; a run that passes one of them publishes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_failed: float = Field(default=0.01, ge=0, le=1)
    """Share of the catalog that may fail in the item tower."""
    max_truncated: float = Field(default=1.0, ge=0, le=1)
    """Share of the catalog's texts that may be longer than ``encoder.max_length``; by default any."""
    max_collapsed: float = Field(default=0.2, ge=0, le=1)
    """Share of random pairs of different texts that may have a cosine above 0.99."""
    min_agreement: float = Field(default=0.999, ge=0, le=1)
    """Cosine between a stored vector and the same text embedded tonight."""


def pass_gate(name: str, value: float, limit: float, way_out: str, *, at_least: bool = False) -> float:
    """Return ``value``. Raises GateError, with value and limit, when it is on the wrong side of ``limit`` or NaN."""
    if not ((value >= limit) if at_least else (value <= limit)):
        side = "below" if at_least else "above"
        raise GateError(f"gate {name}: {value:.6g} is {side} {limit:g}; no snapshot was made. {way_out}")
    return value


def collapsed_share(vectors: NDArray[np.floating], keys: NDArray[np.uint64]) -> float:
    """Share of 20,000 random pairs of rows with different keys whose cosine is above 0.99.

    vectors: [N, D]; keys: uint64 [N, 2]. 0 where no two keys differ.
    """
    if len(keys) < 2:
        return 0.0
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, len(keys), (2, _PAIRS))
    different = (keys[left] != keys[right]).any(axis=1)
    left, right = left[different], right[different]
    if not len(left):
        return 0.0
    a, b = (
        np.asarray(vectors[np.sort(rows)], dtype=np.float32)[np.argsort(np.argsort(rows))] for rows in (left, right)
    )
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float((cosine > _SAME).mean())


def check_collapse(vectors: NDArray[np.floating], keys: NDArray[np.uint64], limits: GateConfig) -> float:
    """``collapsed_share``. Raises GateError when too many different texts have one vector."""
    way_out = "The item tower gives different texts one vector: tune it again, or raise gates.max_collapsed"
    return pass_gate("collapsed", collapsed_share(vectors, keys), limits.max_collapsed, way_out)


def check_truncated(table: EmbeddingTable, fingerprint: str, keys: NDArray[np.uint64], limits: GateConfig) -> float:
    """The share of texts that were cut off, of those of ``keys`` [N, 2] that have a vector, each counted once.

    Not of tonight's alone: those of a run that a gate ended are committed. Raises GateError.
    """
    files = table.files(fingerprint)
    parts = list(on_threads(lambda file: read_file(file, [tables.KEY, tables.TRUNCATED]), files))
    stored = np.concatenate(
        [np.zeros((0, 2), dtype=np.uint64), *(decode_keys(part.column(tables.KEY)) for part in parts)]
    )
    cut = np.concatenate([np.zeros(0, dtype=bool), *(part.column(tables.TRUNCATED).to_numpy() for part in parts)])
    first = key_frame(stored).with_row_index("row").unique(PAIR, keep="first", maintain_order=True)
    read = cut[first.join(key_frame(keys), on=PAIR, how="semi")["row"].to_numpy()]
    way_out = "Raise encoder.max_length, shorten the texts, or raise gates.max_truncated"
    return pass_gate("truncated", float(read.sum()) / max(1, len(read)), limits.max_truncated, way_out)


def choose_probes(
    table: EmbeddingTable, fingerprint: str, scan: CatalogScan, dtype: str, dim: int
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Places in the scan of up to 256 items whose text has a stored vector, and those vectors [n, D]; none only where
    no text has one.

    Taken from random files, the likelier the more of these texts they hold: four, so that a large table is not read
    whole, or as many small ones as hold 256.
    """
    files = table.files(fingerprint)
    rows = key_frame(read_keys(files)).with_row_index("row")
    rng = np.random.default_rng(table.version() + 1)  # others every night
    shuffled = rng.permutation(len(scan.keys))
    for some in (shuffled[:_SOME], shuffled):  # of most catalogs a part is enough
        wanted = key_frame(scan.keys[some]).with_columns(place=some).unique(PAIR, keep="first")
        stored = rows.join(wanted, on=PAIR, maintain_order="left").unique(PAIR, keep="first", maintain_order=True)
        if stored.height >= PROBES:
            break
    if stored.is_empty():
        return np.zeros(0, dtype=np.int64), np.zeros((0, dim), dtype=dtype)
    ends = np.cumsum([file.rows for file in files])
    file_of = np.searchsorted(ends, stored["row"].to_numpy(), side="right")
    counts = np.bincount(file_of, minlength=len(files))
    holding = np.flatnonzero(counts)
    drawn = rng.choice(holding, len(holding), replace=False, p=counts[holding] / counts.sum())
    few = max(_PROBE_FILES, 1 + int(np.searchsorted(np.cumsum(counts[drawn]), PROBES)))
    picked = rng.permutation(np.flatnonzero(np.isin(file_of, drawn[:few])))[:PROBES]
    places, vectors = [], []
    for number in np.unique(file_of[picked]).tolist():
        chosen = stored[np.sort(picked[file_of[picked] == number])]
        column = read_file(files[number], [tables.EMBEDDING]).column(tables.EMBEDDING)
        places.append(chosen["place"].to_numpy().astype(np.int64))
        first = int(ends[number]) - files[number].rows
        vectors.append(decode_vectors(column, dtype, dim)[chosen["row"].to_numpy() - first])
    return np.concatenate(places), np.concatenate(vectors)


def lowest_agreement(stored: NDArray[np.floating], tonight: NDArray[np.floating]) -> float:
    """The lowest cosine between rows of two arrays [n, D], n > 0; NaN where one is zero or not finite."""
    a, b = stored.astype(np.float32), tonight.astype(np.float32)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
