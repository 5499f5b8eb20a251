"""export-items: one snapshot as a plain Parquet file, for Spark, SQL or a vector database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.context import Context
from pipeline.cache import open_snapshot
from pipeline.export import write_vectors


def run(context: Context, snapshot: str | None, out: str) -> dict[str, Any]:
    """Write item_id, embedding (float32 list), available. Raises NotFoundError, StoreError, ConfigError."""
    record = context.snapshot(context.item_fingerprint(), "export-items", snapshot)
    matrix = open_snapshot(context.store, record)
    rows = write_vectors(Path(out), matrix)
    return {"path": out, "rows": rows, "dim": record.dim, "snapshot": record.id, "fingerprint": record.fingerprint}
