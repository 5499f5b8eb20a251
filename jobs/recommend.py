"""recommend: the index's nearest items for a user's history, or for a history given by hand."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from jobs.context import Context, ServingTower
from pipeline.baselines import TowerRecommender
from pipeline.index import open_index
from schemas import tables
from schemas.errors import ConfigError, NotFoundError
from schemas.records import Index
from user_tower.sequences import Histories


def _history(context: Context, user: str | None, items: list[str]) -> list[tuple[str, int]]:
    """Item ids and milliseconds, oldest first; items given by hand happen now. Raises NotFoundError for an unknown
    user or item."""
    if user is None:
        titles = context.titles()
        unknown = [item_id for item_id in items if item_id not in titles]
        if unknown:
            raise NotFoundError(
                f"--items: {unknown[:3]} are not in the catalog of data set {context.dataset.record.id}"
            )
        return [(item_id, time.time_ns() // 1_000_000) for item_id in items]
    histories = context.dataset.histories
    if user not in histories.users:
        raise NotFoundError(
            f"--user {user}: unknown; data set {context.dataset.record.id} has {len(histories)} users, "
            f"such as {histories.users[:3]}"
        )
    ids = context.dataset.item_ids
    place = histories.users.index(user)
    return [(ids[row], int(at)) for row, at in zip(histories.of(place), histories.times_of(place), strict=True)]


def _index(context: Context, serving: ServingTower) -> Index:
    snapshot = serving.snapshot.id if serving.snapshot else None
    owner = None if serving.record.features == "text" else serving.record.id
    return context.store.require(Index, snapshot=snapshot, user_tower=owner)


def run(context: Context, user: str | None, items: list[str], k: int, snapshot: str | None = None) -> dict[str, Any]:
    """Print titles with scores, best first; seen items are left out.

    Raises NotFoundError, ConfigError (k larger than the catalog), FingerprintMismatchError.
    """
    serving = context.serving_tower(snapshot)
    index = open_index(context.store, _index(context, serving))
    if k < 1:
        raise ConfigError(f"--k {k}: ask for at least one item")
    if k > len(index.item_ids):
        raise ConfigError(f"--k {k}: the catalog has {len(index.item_ids)} items; ask for at most so many")
    events = _history(context, user, items)
    seen = [item_id for item_id, _ in events]
    places = {item_id: row for row, item_id in enumerate(serving.item_ids)}
    known = [(places[item_id], at) for item_id, at in events if item_id in places]
    if not known:
        raise NotFoundError(f"none of the {len(seen)} items of the history is in snapshot {index.record.snapshot}")
    if len(known) < len(seen):
        print(f"{len(seen) - len(known)} items of the history are not in the snapshot", file=sys.stderr)
    rows, times = np.array(known, dtype=np.int64).T
    history = Histories([user or ""], np.array([0, len(known)]), rows, times)
    query = TowerRecommender(serving.tower, serving.catalog).queries(history)[0].cpu().numpy()
    exclude = set() if context.config.evaluate.repeats else set(seen)
    found = index.search(query, k, exclude)
    titles = context.titles()
    for item_id, score in found:
        print(f"{score:7.4f}  {titles.get(item_id, item_id)}")
    return {
        "user": user,
        "skipped_events": len(seen) - len(known),
        "user_tower": serving.record.id,
        "index": index.record.id,
        "items": [
            {tables.ITEM_ID: item_id, "score": round(score, 6), "title": titles.get(item_id, item_id)}
            for item_id, score in found
        ],
    }
