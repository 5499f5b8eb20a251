"""export-users: one table of user vectors as a plain Parquet file, for Spark, SQL or a vector database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.context import Context
from pipeline.export import write_user_vectors
from schemas.records import UserTower, UserVectors


def run(context: Context, out: str) -> dict[str, Any]:
    """Write user_id, embedding (float32 list) of the newest table of the newest tower of that name.

    Raises NotFoundError, StoreError, ConfigError.
    """
    tower = context.store.require(UserTower, name=context.config.name)
    record = context.store.require(UserVectors, user_tower=tower.id)
    rows = write_user_vectors(Path(out), context.store, record)
    return {"path": out, "rows": rows, "dim": record.dim, "table": record.id, "user_tower": record.user_tower}
