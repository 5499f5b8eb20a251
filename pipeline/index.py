"""The index over the candidates of one snapshot: publish, open, search with filters."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ann import Exact, IndexConfig, Searcher, load, make, require_finite, resolve_kind, save
from pipeline.digests import block_digest, is_old
from pipeline.effort import choose_effort, chooses, intersection
from pipeline.files import UNREADABLE, next_created_at, record_id, write_file, write_record
from pipeline.store import Store
from schemas import tables
from schemas.errors import ConfigError, StoreError
from schemas.hashing import Digest, hash_texts
from schemas.records import Index

__all__ = ["IndexConfig", "OpenIndex", "Retrieved", "ann_report", "build_index", "open_index", "read_blocklist"]
EFFORTS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of the trade-off: multiples of the index's nprobe or efSearch
_CELLS = 1 << 22  # of a search's answer at a time: 48 MiB
_SETTLED = 2.0  # seconds after which a further write of a file cannot bear the same times


class Retrieved(NamedTuple):
    """rows int64 and scores float32 [Q, k], best first; -1 and -inf where a list is under-filled.

    under_filled: lists with fewer than k items; gpu_fallbacks: searches beyond the GPU's caps, made on the CPU.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    under_filled: int
    gpu_fallbacks: int


class OpenIndex:
    """A loaded index; ``item_ids`` [n] by its row numbers."""

    def __init__(self, record: Index, searcher: Searcher | Exact, item_ids: list[str]) -> None:
        self.record = record
        self.searcher = searcher
        self.item_ids = item_ids
        self.rows = {item_id: row for row, item_id in enumerate(item_ids)}

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        seen: Sequence[NDArray[np.int64]] | None = None,
        blocked: NDArray[np.int64] | None = None,
        effort: float = 1,
    ) -> Retrieved:
        """The k best for each query [Q, D], without its ``seen`` rows and without ``blocked`` rows.

        More than k are fetched; a list that is still short is asked again, four times as wide, until it is full or
        the whole index was asked for. effort: multiplies the index's nprobe or efSearch. Raises ConfigError (k),
        DataError (queries that are not finite).
        """
        total = len(self.item_ids)
        if not 1 <= k <= total:
            raise ConfigError(f"k {k}: the index has {total} items; ask for 1 to so many")
        require_finite(queries, "queries")
        before = self.searcher.gpu_fallbacks
        out = np.zeros(total, dtype=bool)
        out[blocked if blocked is not None else []] = True
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        widest = max((len(each) for each in seen), default=0) if seen is not None else 0
        # a long blocklist rarely takes the best places: what it takes beyond k is asked for again
        fetch = min(total, k + widest + min(int(out.sum()), k))
        todo = np.arange(len(queries))
        while len(todo):
            short = []
            step = max(1, _CELLS // fetch)
            for start in range(0, len(todo), step):
                part = todo[start : start + step]
                found_scores, found = self.searcher.search(queries[part], fetch, effort)
                for at, query in enumerate(part):
                    keep = (found[at] >= 0) & ~out[found[at]]
                    if seen is not None and len(seen[query]):
                        keep &= ~np.isin(found[at], seen[query])
                    chosen = np.flatnonzero(keep)[:k]
                    rows[query, : len(chosen)] = found[at, chosen]
                    scores[query, : len(chosen)] = found_scores[at, chosen]
                    if len(chosen) < k:
                        short.append(query)
            if fetch == total and effort > total:
                break
            todo = np.array(short, dtype=np.int64)
            # the last round reads every list of an IVF
            fetch, effort = min(total, 4 * fetch), effort * 4 if fetch < total else total + 1
        return Retrieved(rows, scores, int((rows[:, -1] < 0).sum()), self.searcher.gpu_fallbacks - before)


def read_blocklist(path: str, index: OpenIndex) -> tuple[NDArray[np.int64], int]:
    """Rows of the item ids of a text file, one a line, and how many of them the index lacks. Raises ConfigError."""
    try:
        lines = {line.strip() for line in Path(path).read_text("utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--blocklist {path} cannot be read: {error}") from error
    known = sorted(index.rows[item_id] for item_id in lines if item_id in index.rows)
    return np.array(known, dtype=np.int64), len(lines) - len(known)


def _timed(work: Callable[[], Retrieved]) -> tuple[float, Retrieved]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def ann_report(
    index: OpenIndex,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    targets: NDArray[np.int64],
    k: int,
    seen: Sequence[NDArray[np.int64]] | None = None,
) -> dict[str, Any]:
    """What the model misses and what the index misses, apart (DESIGN 9), over queries [Q, D].

    vectors [n, D]: those of the index, in its order; targets [Q]: the wanted row, -1 where the index lacks it.
    model_recall: share of targets in the exact lists; index_recall: in the index's lists; ann_loss: 1 minus the
    intersection of the two lists; milliseconds: a query, searched in one batch; exact_milliseconds: the same of exact
    search; trade_off: these figures at other efforts, by rising effort, for a kind that has them.
    """
    k = min(k, len(vectors))
    exact = OpenIndex(index.record, Exact(vectors), index.item_ids)
    exact_seconds, truth = _timed(lambda: exact.search(queries, k, seen))
    wanted = (targets >= 0)[:, None]

    def hits(rows: NDArray[np.int64]) -> float:
        return round(float(((rows == targets[:, None]) & wanted).any(1).mean()), 6)

    def at(effort: float) -> tuple[dict[str, Any], int]:
        seconds, found = _timed(lambda: index.search(queries, k, seen, effort=effort))
        point = {
            "index_recall": hits(found.rows),
            "ann_loss": round(1 - intersection(found.rows, truth.rows), 6),
            "milliseconds": round(1000 * seconds / len(queries), 4),
        }
        return point, found.under_filled

    at(1)  # the first search reads the file's pages
    chosen, under_filled = at(1)
    return {
        "k": k,
        "queries": len(queries),
        "model_recall": hits(truth.rows),
        **chosen,
        "exact_milliseconds": round(1000 * exact_seconds / len(queries), 4),
        "bytes": index.record.bytes,
        "under_filled": under_filled,
        "setting": index.searcher.setting(1, k),
        "trade_off": [
            {"setting": setting, "effort": effort, **(chosen if effort == 1 else at(effort)[0])}
            for setting, effort in _settings(index.searcher, k).items()
        ],
    }


def _settings(searcher: Searcher | Exact, k: int) -> dict[str, float]:
    """Each setting that EFFORTS stand for, with the effort nearest to 1 that means it; none without a choice."""
    found: dict[str, float] = {}
    for effort in EFFORTS:
        setting = searcher.setting(effort, k)
        if setting and (setting not in found or effort <= 1):
            found[setting] = effort
    return found


def build_index(
    store: Store,
    config: IndexConfig,
    item_ids: list[str],
    vectors: NDArray[np.float32],
    *,
    snapshot: str | None,
    item_fingerprint: str | None,
    user_tower: str | None,
    queries: NDArray[np.float32] | None = None,
) -> tuple[Index, bool]:
    """Publish an index over the candidates, vectors [n, D] as ``UserTower.item_vectors`` gives them.

    queries [Q, D]: choose an nprobe or ef_search that the configuration leaves open (``choose_effort``). Returns the
    newest index of the same snapshot and tower when it was made from the same vectors, ids, settings and such
    queries, and whether it was there. Raises DataError, ConfigError.
    """
    require_finite(vectors, "vectors")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    kind = resolve_kind(config, len(item_ids))
    asked = queries if chooses(config, kind) else None
    inputs = Digest().add(block_digest(vectors)).add(config.model_dump_json(exclude={"gpu"}))
    for item_id in item_ids:
        inputs.add(item_id)
    if asked is not None:
        require_finite(asked, "queries")
        inputs.add(block_digest(np.ascontiguousarray(asked)))
    existing = store.newest(Index, snapshot=snapshot, user_tower=user_tower)
    if existing and existing.inputs == inputs.hexdigest():
        return existing, True
    index = make(config, vectors)
    if asked is not None:
        choose_effort(index, config, kind, vectors, asked)
    created_at = next_created_at(store.all(Index))
    name = record_id(created_at, inputs.hexdigest())
    with store.new(Index, name) as folder:
        save(index, folder / "index.faiss")
        pq.write_table(pa.table({tables.ITEM_ID: pa.array(item_ids, pa.string())}), folder / "items.parquet")
        record = Index(
            id=name,
            created_at=created_at,
            kind=kind,
            snapshot=snapshot,
            item_fingerprint=item_fingerprint,
            user_tower=user_tower,
            vectors=len(item_ids),
            dim=vectors.shape[1],
            bytes=(folder / "index.faiss").stat().st_size,
            checksum=_checksum(folder / "index.faiss", item_ids),
            inputs=inputs.hexdigest(),
        )
        write_record(folder, record)
    return record, False


def _checksum(path: Path, item_ids: list[str], like: str = "") -> str:
    """Of the file, mapped and hashed on all cores, and of the ids; 96 hexadecimal characters. like: one to compare
    with, which may be old."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped with the last view of it
    digest = block_digest(np.frombuffer(mapped, np.uint8), like)
    return hash_texts(digest, *item_ids).hex() if is_old(like) else digest + hash_texts(*item_ids).hex()


def _versions(folder: Path) -> tuple[str, bool]:
    """What any write of the index's files changes, and whether they are old enough that it would show."""
    states = [(folder / name).stat() for name in ("index.faiss", "items.parquet")]
    newest = max(state.st_ctime for state in states)
    told = [[state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns] for state in states]
    return json.dumps(told), time.time() - newest > _SETTLED


def _require_checksum(store: Store, record: Index, folder: Path, item_ids: list[str]) -> None:
    """Hash the files once for each version of them: a local marker holds inode, size and times of what was found
    right. Raises StoreError."""
    version, settled = _versions(folder)
    marker = store.matrices / f"{record.checksum}.checked"
    if marker.is_file() and marker.read_text("utf-8", "replace") == version:
        return
    if _checksum(folder / "index.faiss", item_ids, record.checksum) != record.checksum:
        raise StoreError(f"index {folder} does not match its checksum; remove it and run build-index again")
    if settled:
        with suppress(OSError):  # a disk that is full or read-only: hashed again next time
            marker.parent.mkdir(exist_ok=True)
            write_file(marker, version.encode())


def open_index(store: Store, record: Index, config: IndexConfig | None = None) -> OpenIndex:
    """Check an index against its checksum and map it. Raises StoreError when it does not match."""
    folder: Path = store.folder(record)
    try:
        item_ids = pq.read_table(folder / "items.parquet").column(tables.ITEM_ID).to_pylist()
        _require_checksum(store, record, folder, item_ids)
    except (*UNREADABLE, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise StoreError(f"index {folder} cannot be read: {error}; run build-index again") from error
    index = load(folder / "index.faiss", record.kind)
    return OpenIndex(record, Searcher(index, config or IndexConfig(), record.kind), item_ids)
