"""build-index: FAISS over the available candidates of a user tower's snapshot."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from jobs.context import Context
from pipeline.index import build_index
from schemas.errors import DataError


def run(context: Context, snapshot: str | None = None) -> dict[str, Any]:
    """Build, publish. Raises NotFoundError, FingerprintMismatchError, DataError."""
    started = time.perf_counter()
    serving = context.serving_tower(snapshot)
    with torch.inference_mode():
        vectors = serving.tower.item_vectors(serving.catalog).float().cpu().numpy()
    rows = np.flatnonzero(serving.available)
    if len(rows) == 0:
        raise DataError(f"none of the {len(serving.item_ids)} items is available; an index would be empty")
    record, reused = build_index(
        context.store,
        context.config.index,
        [serving.item_ids[row] for row in rows],
        vectors[rows],
        snapshot=serving.snapshot.id if serving.snapshot else None,
        item_fingerprint=serving.record.item_fingerprint,
        # candidates that are not the cached vectors themselves belong to this one tower
        user_tower=None if serving.record.features == "text" else serving.record.id,
    )
    return {
        "index": record.id,
        "snapshot": record.snapshot,
        "kind": record.kind,
        "vectors": record.vectors,
        "bytes": record.bytes,
        "seconds": round(time.perf_counter() - started, 3),
        "reused": reused,
    }
