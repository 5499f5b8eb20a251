"""Retention: which snapshots stay, and taking away what none of them needs (DESIGN 6)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.cache import read_items
from pipeline.cells import PAIR, decode_keys, key_frame
from pipeline.embeddings import EmbeddingFile, read_file, read_keys
from pipeline.files import record_id
from pipeline.store import Store
from schemas import tables
from schemas.errors import StoreError
from schemas.records import Index, ItemTower, Ranker, Record, Snapshot, UserTower, UserVectors

_HOUR = 3_600_000
_ATTEMPTS = 5
_DEAD_SHARE = 0.05
_FILE_ROWS = 131_072


class RetentionConfig(BaseModel):
    """What ``hllm snapshots clean`` keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    days: float = Field(default=14.0, ge=0, allow_inf_nan=False)
    """A younger snapshot stays."""
    newest: int = Field(default=2, ge=1)
    """So many of every item tower in use stay, however old: of the newest tuned one and of every user tower's."""
    job_hours: float = Field(default=48.0, ge=0, allow_inf_nan=False)
    """Longer than the longest job: nothing younger is taken, whether a snapshot needs it or not."""


@dataclass
class Cleaned:
    """What a clean-up did. snapshots: ids dropped; files: data files replaced by fewer or none."""

    snapshots: list[str] = field(default_factory=list)
    files: int = 0
    rows: int = 0
    freed: int = 0  # bytes


def in_use(store: Store) -> set[str]:
    """Fingerprints that somebody reads: of the newest tuned tower, of every user tower and ranker, of the newest
    snapshot."""
    tower, snapshot = store.newest(ItemTower), store.newest(Snapshot)
    towers = {record.name: record.item_fingerprint for record in store.all(UserTower)}
    rankers = {record.name: record.item_fingerprint for record in store.all(Ranker)}
    found = {name for name in (*towers.values(), *rankers.values()) if name is not None}
    return found | ({tower.fingerprint} if tower else set()) | ({snapshot.fingerprint} if snapshot else set())


def expired(store: Store, config: RetentionConfig, now: int, kept: frozenset[str] = frozenset()) -> list[Snapshot]:
    """Snapshots past retention; now: milliseconds; kept: ids that stay whatever their age."""
    records, used = store.all(Snapshot), in_use(store)
    newest: set[str] = set()
    for fingerprint in used:
        newest.update(record.id for record in records if record.fingerprint == fingerprint)
        of_tower = [record.id for record in records if record.fingerprint == fingerprint]
        newest.difference_update(of_tower[: -config.newest])
    stay = newest | kept
    return [r for r in records if r.id not in stay and now - r.created_at >= config.days * 24 * _HOUR]


def _unused(
    store: Store, kind: type[Index] | type[UserVectors], config: RetentionConfig, now: int, kept: frozenset[str]
) -> list[Record]:
    """Indexes or tables of user vectors past retention, but for the newest of each user tower and item tower."""
    records: list[Index | UserVectors] = list(store.all(kind))
    of_tower: dict[tuple[str | None, str | None], list[str]] = {}
    for record in records:
        of_tower.setdefault((record.item_fingerprint, record.user_tower), []).append(record.id)
    stay = kept.union(*(ids[-config.newest :] for ids in of_tower.values()))
    return [r for r in records if r.id not in stay and now - r.created_at >= config.days * 24 * _HOUR]


def clean(
    store: Store, config: RetentionConfig, now: int | None = None, kept: frozenset[str] = frozenset()
) -> Cleaned:
    """Drop expired snapshots, indexes and user vectors, then every item vector that no kept snapshot needs; join
    small files. kept: ids that stay whatever their age, those of the champion and its parent.

    Nothing younger than ``job_hours`` is touched, so a running job loses nothing. What a job is about to publish
    counts as used. Raises StoreError when others commit all the time, or when the store is damaged.
    """
    now = time.time_ns() // 1_000_000 if now is None else now
    _check_records(store)
    before = store.size()
    done = Cleaned()
    for record in expired(store, config, now, kept):
        store.remove(record)
        done.snapshots.append(record.id)
    for unused in (*_unused(store, Index, config, now, kept), *_unused(store, UserVectors, config, now, kept)):
        store.remove(unused)
    oldest = now - int(config.job_hours * _HOUR)
    store.sweep(oldest)
    for fingerprint in store.embeddings.fingerprints():
        files, rows = _rewrite(store, fingerprint, oldest)
        done.files += files
        done.rows += rows
    digests = {record.vectors_digest for record in store.all(Snapshot)}
    for local in store.matrices.glob("*.bin"):
        with suppress(FileNotFoundError):  # a reader builds it anew
            if local.stem not in digests and local.stat().st_mtime * 1000 <= oldest:
                local.unlink()
    checksums = {record.checksum for record in store.all(Index)}
    for marker in store.matrices.glob("*.checked"):
        if marker.stem not in checksums:
            marker.unlink(missing_ok=True)
    store.embeddings.vacuum(config.job_hours)
    done.freed = max(0, before - store.size())  # a commit's entry may be more than what goes
    return done


def _check_records(store: Store) -> None:
    """Raise StoreError for a snapshot whose age or item tower is not the one that it was published with: what is
    dropped, and which vectors, is decided by these."""
    records = store.all(Snapshot)
    towers = set(store.embeddings.fingerprints())  # after them: a snapshot's vectors are committed before it is there
    for record in records:
        if record.id != record_id(record.created_at, record.content_digest):
            raise StoreError(f"{store.folder(record)}: its record is damaged; {store.way_out(record)}")
        if record.fingerprint not in towers:
            read_items(store, record)  # checked against a digest that covers the item tower
            raise StoreError(
                f"{store.embeddings.folder} holds no vector of item tower {record.fingerprint}, which snapshot "
                f"{record.id} needs; restore it, or remove {store.parent(Snapshot) / record.id}"
            )


def _needed(store: Store, fingerprint: str) -> pl.DataFrame:
    """Keys of all snapshots of an item tower, and of all that are about to become one, each once; low, high."""
    # asides first: one that gets its name meanwhile is then seen twice, and never not at all
    # and one that is not yet whole seals after us
    announced = store.announced(tables.KEY)
    kept = (read_items(store, record).column(tables.KEY) for record in store.all(Snapshot, fingerprint=fingerprint))
    found = key_frame(np.zeros((0, 2), dtype=np.uint64))
    for column in chain(announced, kept):  # joined one by one: most have most keys in common
        found = pl.concat([found, key_frame(decode_keys(column))]).unique()
    return found


def _rewrite(store: Store, fingerprint: str, oldest: int) -> tuple[int, int]:
    """Replace files with rows that nobody needs, and small ones. Returns files replaced and rows dropped."""
    table = store.embeddings
    for _ in range(_ATTEMPTS):
        version = table.version()
        files = table.files(fingerprint)
        keep = _rows_to_keep(files, _needed(store, fingerprint))
        old = _worth_replacing(files, keep, oldest)
        if not old:
            return 0, 0
        new = []
        for group in _groups(old, keep):
            rows = pa.concat_tables([_kept_rows(file, keep[file.name]) for file in group])
            if rows.num_rows:
                # -1: before files of tables without numbers, of which some may hold rows that lost to these
                new.append((table.write(fingerprint, rows), min(file.commit for file in group) or -1))
        if table.replace(fingerprint, old, new, version):
            dropped = sum(file.rows - int(keep[file.name].sum()) for file in old)
            return len(old), dropped
        table.folder.delete([file["path"] for file, _ in new])
    raise StoreError(f"{table.folder} was committed to by others all the time; run the clean-up again")


def _rows_to_keep(files: Sequence[EmbeddingFile], needed: pl.DataFrame) -> dict[str, NDArray[np.bool_]]:
    """File name -> bool [rows]: the rows that readers choose of the needed keys."""
    found = read_keys(files)
    rows = key_frame(found).with_row_index("place")
    live = rows.join(needed, on=PAIR, how="semi").sort("place").unique(PAIR, keep="first")
    keep = np.zeros(len(found), dtype=bool)
    keep[live["place"].to_numpy()] = True
    ends = np.cumsum([file.rows for file in files])
    return {file.name: keep[end - file.rows : end] for file, end in zip(files, ends.tolist(), strict=True)}


def _worth_replacing(
    files: Sequence[EmbeddingFile], keep: dict[str, NDArray[np.bool_]], oldest: int
) -> list[EmbeddingFile]:
    """Old enough files with too many dead rows, and small ones if there are several."""
    old = [file for file in files if file.written_at <= oldest]
    dead = {file.name for file in old if (~keep[file.name]).mean() > _DEAD_SHARE or not file.rows}
    small = {file.name for file in old if file.rows < _FILE_ROWS // 8}
    if len(small) < 2:
        small = set()
    return [file for file in old if file.name in dead | small]


def _groups(files: Sequence[EmbeddingFile], keep: dict[str, NDArray[np.bool_]]) -> list[list[EmbeddingFile]]:
    """Files to be joined into one each, in order, of about 131,072 rows."""
    groups: list[list[EmbeddingFile]] = []
    rows = _FILE_ROWS
    for file in files:
        if rows >= _FILE_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(file)
        rows += int(keep[file.name].sum())
    return groups


def _kept_rows(file: EmbeddingFile, keep: NDArray[np.bool_]) -> pa.Table:
    return read_file(file, tables.EMBEDDINGS.names).filter(pa.array(keep))
