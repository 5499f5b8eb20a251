"""snapshots list | show | clean: what is in the cache, and what may go (DESIGN 6)."""

from __future__ import annotations

import time
from typing import Any

from jobs.context import Context
from pipeline.cache import left_out, open_snapshot
from pipeline.cleanup import clean, expired
from schemas import tables
from schemas.errors import ConfigError
from schemas.records import Snapshot

_LEFT_OUT = 100


def _line(record: Snapshot) -> dict[str, Any]:
    return record.model_dump(include={"id", "fingerprint", "items", "embedded", "parent", "dataset"})


def run(context: Context, action: str, snapshot: str | None) -> dict[str, Any]:
    """list: all, oldest first; show: one, its vectors read and checked, with the first 100 of the items that it left
    out; clean: drop what is past retention.

    Raises ConfigError when none is named to show, NotFoundError, StoreError.
    """
    store = context.store
    if action == "show":
        if snapshot is None:
            raise ConfigError("snapshots show: name one with --snapshot; `hllm snapshots list` names all")
        record = store.get(Snapshot, snapshot)
        matrix = open_snapshot(store, record)
        left = left_out(store, record).select([tables.ITEM_ID, tables.REASON])
        return {
            "snapshots": [record.model_dump()],
            "checked": len(matrix.vectors),
            "left_out": left.slice(0, _LEFT_OUT).to_pylist(),
        }
    if snapshot is not None:
        raise ConfigError(
            f"snapshots {action} takes no --snapshot: clean drops what is past [retention], list shows all"
        )
    if action == "clean":
        started = time.perf_counter()
        done = clean(store, context.config.retention, kept=context.kept_ids())
        kept = [_line(record) for record in store.all(Snapshot)]
        return {
            "snapshots": kept,
            "dropped": done.snapshots,
            "rows_dropped": done.rows,
            "files_replaced": done.files,
            "bytes_freed": done.freed,
            "seconds": round(time.perf_counter() - started, 3),
        }
    past = {
        record.id
        for record in expired(store, context.config.retention, time.time_ns() // 1_000_000, context.kept_ids())
    }
    return {"snapshots": [_line(record) | {"expired": record.id in past} for record in store.all(Snapshot)]}
