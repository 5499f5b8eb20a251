"""prepare-data: files as they come -> one immutable, ordered data set in the store."""

from __future__ import annotations

from typing import Any

from jobs.context import Context
from pipeline.dataset import write_dataset
from pipeline.download import fetch_movielens
from pipeline.ingest import ingest


def run(context: Context) -> dict[str, Any]:
    """Check, quarantine, order, publish. Raises DataError, DownloadError; then nothing is written."""
    config = context.config.data
    if config.download == "movielens-100k" and not config.items.exists():
        fetch_movielens(config.items.parent)
    record, reused = write_dataset(context.store, config.name, ingest(config))
    return {
        "dataset": record.id,
        "digest": record.digest,
        "items": record.items,
        "users": record.users,
        "interactions": record.interactions,
        "quarantined": record.quarantined,
        "filtered": record.filtered,
        "rows_in": record.rows_in,
        "reused": reused,
    }
