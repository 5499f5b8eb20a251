"""Nearest vectors by inner product: exact, and the FAISS kinds with their defaults. The only file that imports faiss.

Legend: Q queries, N vectors, D dim, k neighbours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.hits import Best, Hits, merge
from pipeline.ivf import search_lists, worthwhile
from schemas.errors import ConfigError, DataError, StoreError

_faiss: Any = faiss  # its stubs lack the constructors with keywords
Kind = Literal["flat", "ivf-flat", "ivf-pq", "hnsw"]
AUTO_FLAT = 100_000  # up to here exact search of a batch is as fast as an IVF that finds 95 % (bench retrieve)
PQ_TRAIN = 39 * 256  # FAISS asks for 39 training points a centroid, and a byte of a code has 256 centroids
NPROBE = 128  # at 10^6 vectors, where no queries tell
EF_SEARCH = 256  # the same
# of k-means: vectors a centroid (FAISS warns below 39; its 256 take six times as long) and rounds (FAISS: 10)
KMEANS_POINTS, KMEANS_ROUNDS = 40, 6
GPU_CAP = 2048  # of k and of nprobe, FAISS wiki, "Faiss on the GPU"
_ITEMS, _SCORES = 8_192, 1 << 23  # vectors, and scores, of one block of the exact search: 32 MiB
_WAITING = 2  # times k hits a query that may wait to be merged


class IndexConfig(BaseModel):
    """Kind and parameters of an index; None is a default by the number of vectors N."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["auto", "flat", "ivf-flat", "ivf-pq", "hnsw"] = "auto"
    """``flat`` is exact. ``auto`` is ``flat`` up to 100,000 vectors, else ``ivf-flat``."""
    nlist: int | None = Field(default=None, ge=1)
    """Lists of an IVF; None: 8 sqrt(N), the middle of the FAISS guidelines, and at most N / 39."""
    nprobe: int | None = Field(default=None, ge=1)
    """Lists that a query reads; None: the fewest that find ``recall`` for a sample of validation histories, see
    ``pipeline/effort.py``; without such histories 128 (10^6 / N)^.3, at least 128 and at most all, which was enough
    for .95 with the queries of user towers over untuned vectors."""
    pq_bytes: int | None = Field(default=None, ge=1)
    """Bytes of a product-quantised vector, a divisor of D; None: the largest that is at most D / 4."""
    hnsw_links: int = Field(default=32, ge=4)
    """Links of a node (M)."""
    ef_construction: int = Field(default=100, ge=1)
    """Candidates while HNSW is built."""
    ef_search: int | None = Field(default=None, ge=1)
    """Candidates while HNSW is searched, never fewer than k; None: as ``nprobe``, without histories 256."""
    recall: float = Field(default=0.95, gt=0, lt=1)
    """Share of the exact 100 that a chosen nprobe or ef_search finds."""
    seed: int = 1234
    """Of k-means. HNSW links depend on the number of threads as well: two builds may differ."""
    gpu: bool = True
    """Search on the GPUs that there are."""


def resolve_kind(config: IndexConfig, count: int) -> Kind:
    """The kind that ``auto`` stands for."""
    if config.kind != "auto":
        return config.kind
    return "flat" if count <= AUTO_FLAT else "ivf-flat"


def lists(config: IndexConfig, count: int) -> tuple[int, int]:
    """(nlist, nprobe) for ``count`` vectors. Raises ConfigError when there are more lists than vectors."""
    nlist = config.nlist or max(1, min(int(8 * math.sqrt(count)), count // 39))
    if nlist > count:
        raise ConfigError(f"index.nlist {nlist}: there are {count} vectors; ask for at most so many lists")
    default = max(NPROBE, round(NPROBE * (1e6 / count) ** 0.3))
    return nlist, min(nlist, config.nprobe or default)


def pq_bytes(config: IndexConfig, dim: int, count: int) -> int:
    """Bytes of a product-quantised vector. Raises ConfigError when they do not divide D, or N is too few to train."""
    if count < PQ_TRAIN:
        raise ConfigError(f"index.kind ivf-pq: {count} vectors, it is trained on {PQ_TRAIN} at least; use flat")
    size = config.pq_bytes or max(d for d in range(1, max(1, dim // 4) + 1) if dim % d == 0)
    if dim % size:
        raise ConfigError(f"index.pq_bytes {size} does not divide the dim {dim}")
    return size


def require_finite(vectors: NDArray[np.float32], what: str) -> None:
    """Raises DataError, naming the first row of [n, D] with a NaN or an infinity."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(f"{len(bad)} of {len(vectors)} {what} are not finite, the first is row {bad[0]}; embed again")


def make(config: IndexConfig, vectors: NDArray[np.float32]) -> Any:
    """A trained and filled FAISS index over vectors [N, D], rows in their order.

    Raises DataError (not finite), ConfigError (parameters that do not fit N or D).
    """
    require_finite(vectors, "vectors")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    count, dim = vectors.shape
    kind = resolve_kind(config, count)
    index: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, config.hnsw_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = config.ef_construction, config.ef_search or EF_SEARCH
    else:
        nlist, nprobe = lists(config, count)
        code = "Flat" if kind == "ivf-flat" else f"PQ{pq_bytes(config, dim, count)}"
        index = faiss.index_factory(dim, f"IVF{nlist},{code}", faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.seed = nprobe, config.seed
        index.cp.max_points_per_centroid, index.cp.niter = KMEANS_POINTS, KMEANS_ROUNDS
        index.train(vectors)
    index.add(vectors)
    return index


def load(path: Path, kind: str) -> Any:
    """An index from its file, memory-mapped: an IVF by its lists, the others whole. Raises StoreError."""
    flag = faiss.IO_FLAG_MMAP if kind.startswith("ivf") else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flag)
    except RuntimeError as error:
        raise StoreError(f"index {path} cannot be read: {error}; run build-index again") from error


def save(index: Any, path: Path) -> None:
    """Write an index to a file."""
    faiss.write_index(index, str(path))


def flat_vectors(index: Any) -> NDArray[np.float32]:
    """The vectors [N, D] of a flat index, not copied; valid while the index lives."""
    flat: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
    return flat.reshape(index.ntotal, index.d)


class Exact:
    """Exact search over an array [N, D], the reference of every index."""

    gpu_fallbacks = 0

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._vectors = vectors

    def setting(self, effort: float, k: int) -> str:
        """Nothing to choose."""
        return ""

    def search(
        self, queries: NDArray[np.float32], k: int, effort: float = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See ``exact_top_k``."""
        return exact_top_k(queries, self._vectors, k)


class Searcher:
    """Search in one index. gpu_fallbacks: searches that the GPU's caps sent to the CPU."""

    def __init__(self, index: Any, config: IndexConfig, kind: str) -> None:
        self.kind, self._cpu, self.gpu_fallbacks = kind, index, 0
        self._gpu = None
        if config.gpu and kind != "hnsw" and faiss.get_num_gpus() > 0:
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = options.shard = True
            self._gpu = faiss.index_cpu_to_all_gpus(index, options)

    @property
    def level(self) -> int:
        """nprobe or efSearch as the index has it; not of ``flat``. Set, it is what ``save`` keeps."""
        return int(self._cpu.hnsw.efSearch if self.kind == "hnsw" else self._cpu.nprobe)

    @level.setter
    def level(self, value: int) -> None:
        if self.kind == "hnsw":
            self._cpu.hnsw.efSearch = value
        else:
            self._cpu.nprobe = value

    @property
    def highest(self) -> int:
        """The level at which all is searched."""
        return int(self._cpu.ntotal if self.kind == "hnsw" else self._cpu.nlist)

    def _nprobe(self, effort: float) -> int:
        return max(1, min(self.highest, round(self.level * effort)))

    def _ef(self, effort: float, k: int) -> int:
        return max(k, round(self.level * effort))

    def setting(self, effort: float, k: int) -> str:
        """What an effort means for lists of k, in words; empty for an exact kind."""
        if self.kind.startswith("ivf"):
            return f"nprobe {self._nprobe(effort)}"
        return f"efSearch {self._ef(effort, k)}" if self.kind == "hnsw" else ""

    def search(
        self, queries: NDArray[np.float32], k: int, effort: float = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and rows [Q, k], best first; row -1 where fewer were found. effort multiplies nprobe or efSearch."""
        parameters: Any = None
        nprobe = 0
        if self.kind.startswith("ivf"):
            nprobe = self._nprobe(effort)
            parameters = _faiss.SearchParametersIVF(nprobe=nprobe)
        elif self.kind == "hnsw":
            parameters = _faiss.SearchParametersHNSW(efSearch=self._ef(effort, k))
        if self._gpu is not None:
            if max(k, nprobe) <= GPU_CAP:
                return self._gpu.search(queries, k, params=parameters)
            self.gpu_fallbacks += 1
        if self.kind == "flat":
            return exact_top_k(queries, flat_vectors(self._cpu), k)
        if self.kind == "ivf-flat" and worthwhile(len(queries), nprobe, self._cpu.nlist):
            _, probes = self._cpu.quantizer.search(queries, nprobe)
            return search_lists(queries, probes, k, self._list)
        return self._cpu.search(queries, k, params=parameters)

    def _list(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Vectors and rows of an inverted list, not copied; valid while the index lives."""
        lists = self._cpu.invlists
        size, dim = lists.list_size(number), self._cpu.d
        if not size:
            return np.empty((0, dim), dtype=np.float32), np.empty(0, dtype=np.int64)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * dim * 4)
        return codes.view(np.float32).reshape(size, dim), faiss.rev_swig_ptr(lists.get_ids(number), size)


def _block_top(scores: torch.Tensor, k: int) -> Best:
    """The k best of each row of [Q, n], equal scores by smallest column; best first."""
    size = scores.shape[1]
    values, rows = scores.topk(min(k + 1, size), dim=1)
    if k < size:
        values, tied = values[:, :k], torch.nonzero(values[:, k - 1] == values[:, k]).flatten()
        rows = rows[:, :k]
        if len(tied):  # topk takes any of the equal ones at the border
            ordered = scores[tied].sort(dim=1, descending=True, stable=True)
            rows = rows.index_copy(0, tied, ordered.indices[:, :k])
    rows = rows.sort(dim=1).values
    values, order = scores.gather(1, rows).sort(dim=1, descending=True, stable=True)
    return Best(values, rows.gather(1, order))


def _exact_block(queries_QD: torch.Tensor, items_ND: torch.Tensor, k: int, width: int) -> Best:
    """The first ``width`` vectors give each query k neighbours; of the others only what beats the last is kept."""
    count = len(queries_QD)
    best = _block_top(queries_QD @ items_ND[:width].T, k)
    buffer, met, waiting = torch.empty(count * width), list[Hits](), 0
    for first in range(width, len(items_ND), width):
        block_nD = items_ND[first : first + width]
        size = len(block_nD)
        scores_Qn = torch.mm(queries_QD, block_nD.T, out=buffer[: count * size].view(count, size))
        over = torch.from_numpy(np.flatnonzero((scores_Qn > best.floor[:, None]).numpy()))
        met.append(Hits(over // size, scores_Qn.view(-1)[over], over % size + first))  # rows ascend, so ties do
        waiting += len(over)
        if waiting and (waiting > _WAITING * k * count or first + width >= len(items_ND)):
            merge(best, met)
            met, waiting = [], 0
    return best


def exact_top_k(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k largest inner products of queries [Q, D] with vectors [N, D]: scores float32 and rows [Q, k].

    Best first, equal scores by smallest row. In blocks: [Q, N] never exists. Raises ConfigError when k > N.
    """
    if not 1 <= k <= len(vectors):
        raise ConfigError(f"k {k}: there are {len(vectors)} vectors; ask for 1 to so many")
    items_ND = torch.from_numpy(vectors)
    scores = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    width = max(_ITEMS, k)
    step = max(1, _SCORES // width)
    for start in range(0, len(queries), step):
        queries_QD = torch.from_numpy(np.ascontiguousarray(queries[start : start + step], dtype=np.float32))
        best = _exact_block(queries_QD, items_ND, k, width)
        scores[start : start + step], rows[start : start + step] = best.scores.numpy(), best.places.numpy()
    return scores, rows


def faiss_flat(vectors: NDArray[np.float32]) -> Any:
    """FAISS's own exact index over [N, D], to measure against."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def serialized_bytes(index: Any) -> int:
    """Bytes of an index as it is saved."""
    return len(faiss.serialize_index(index))


def set_threads(count: int) -> int:
    """Let FAISS use so many threads; returns it."""
    faiss.omp_set_num_threads(count)
    return count
