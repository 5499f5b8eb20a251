"""prepare-data: files as they come -> one immutable, ordered data set in the store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from item_tower.encoder import tokenise_texts
from jobs.context import Context
from pipeline.dataset import catalog_file, read_profile, write_dataset
from pipeline.download import fetch_movielens
from pipeline.forgotten import read_forgotten
from pipeline.ingest import ingest
from pipeline.profile import CountTokens, profile
from schemas.errors import ConfigError
from schemas.records import Dataset


def token_counter(context: Context) -> CountTokens:
    """Counts tokens as the configured Item LLM does, truncated at ``encoder.max_length``."""

    def count(texts: list[str]) -> Sequence[int]:
        try:
            lengths: Sequence[int] = tokenise_texts(None, context.config.encoder, texts).lengths.tolist()
        except (ConfigError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            print(f"no token figures: the tokenizer of encoder.model cannot be loaded: {reason}", file=sys.stderr)
            return []
        return lengths

    return count


def run(context: Context) -> dict[str, Any]:
    """Check, quarantine, filter, order, publish. Raises DataError, DownloadError; then nothing is written."""
    config, store = context.config.data, context.store
    if config.download == "movielens-100k" and not config.items.exists():
        fetch_movielens(config.items.parent)
    before = store.newest(Dataset, name=config.name)
    clean = ingest(config, None if before is None else catalog_file(store, before), read_forgotten(store))

    def describe() -> dict[str, Any]:
        then = {} if before is None else read_profile(store, before)
        return profile(clean, context.config.template, token_counter(context), before, then)

    record, reused = write_dataset(store, config.name, clean, describe)
    drift = read_profile(store, record).get("drift")
    return {
        "dataset": record.id,
        "digest": record.digest,
        "items": record.items,
        "users": record.users,
        "interactions": record.interactions,
        "quarantined": clean.quarantine.height,
        "filtered": clean.filtered,
        "rows_in": clean.rows_in,
        "carried": clean.carried,
        "removed": clean.removed,
        "files": {kind: len(given.files) for kind, given in clean.deliveries.items()},
        "files_again": sum(given.again for given in clean.deliveries.values()),
        "late": drift["late"] if drift else 0,
        "watermark": record.watermark,
        "reused": reused,
    }
