"""recommend: the index's nearest items for a user's history, or for a history given by hand."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.context import Context, ServingTower
from pipeline.baselines import TowerRecommender
from pipeline.index import OpenIndex, open_index, read_blocklist
from schemas import tables
from schemas.errors import ConfigError, NotFoundError
from schemas.records import Index
from user_tower.sequences import Histories


def _history(context: Context, user: str | None, items: list[str]) -> list[tuple[str, int]]:
    """Item ids and milliseconds, oldest first; items given by hand happen now; none for an unknown user. Raises
    NotFoundError for an unknown item."""
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
        return []
    ids = context.dataset.item_ids
    place = histories.users.index(user)
    return [(ids[row], int(at)) for row, at in zip(histories.of(place), histories.times_of(place), strict=True)]


def _index(context: Context, serving: ServingTower) -> Index:
    snapshot = serving.snapshot.id if serving.snapshot else None
    owner = None if serving.record.features == "text" else serving.record.id
    return context.store.require(Index, snapshot=snapshot, user_tower=owner)


def _popular(
    context: Context, index: OpenIndex, k: int, seen: NDArray[np.int64], blocked: NDArray[np.int64]
) -> list[tuple[str, float]]:
    """The k items of the index with the most events, which are their scores; equal ones by row."""
    ids, rows = context.dataset.item_ids, index.rows
    counts = np.zeros(len(index.item_ids))
    for row, count in enumerate(np.bincount(context.dataset.histories.items, minlength=len(ids))):
        if ids[row] in rows:
            counts[rows[ids[row]]] = count
    counts[seen], counts[blocked] = -1, -1
    best = np.argsort(-counts, kind="stable")[:k]
    return [(index.item_ids[row], float(counts[row])) for row in best if counts[row] >= 0]


def _nearest(
    serving: ServingTower,
    index: OpenIndex,
    known: list[tuple[int, int]],
    k: int,
    seen: NDArray[np.int64],
    blocked: NDArray[np.int64],
) -> list[tuple[str, float]]:
    """What the user tower finds after events (catalog row, milliseconds)."""
    rows, times = np.array(known, dtype=np.int64).T
    history = Histories([""], np.array([0, len(known)]), rows, times)
    query = TowerRecommender(serving.tower, serving.catalog).queries(history).cpu().numpy()
    found = index.search(query, k, [seen], blocked)
    pairs = zip(found.rows[0], found.scores[0], strict=True)
    return [(index.item_ids[row], float(score)) for row, score in pairs if row >= 0]


def run(
    context: Context,
    user: str | None,
    items: list[str],
    k: int,
    snapshot: str | None = None,
    blocklist: str | None = None,
) -> dict[str, Any]:
    """Print titles with scores, best first; seen and blocked items are left out.

    A user without history in the snapshot gets the most popular items, said under ``fallback``.
    Raises NotFoundError, ConfigError (k larger than the catalog, blocklist), FingerprintMismatchError.
    """
    serving = context.serving_tower(snapshot)
    index = open_index(context.store, _index(context, serving), context.config.index)
    if k < 1:
        raise ConfigError(f"--k {k}: ask for at least one item")
    if k > len(index.item_ids):
        raise ConfigError(f"--k {k}: the catalog has {len(index.item_ids)} items; ask for at most so many")
    blocked, unknown = read_blocklist(blocklist, index) if blocklist else (np.empty(0, dtype=np.int64), 0)
    events = _history(context, user, items)
    places = {item_id: row for row, item_id in enumerate(serving.item_ids)}
    known = [(places[item_id], at) for item_id, at in events if item_id in places]
    if len(known) < len(events):
        print(f"{len(events) - len(known)} items of the history are not in the snapshot", file=sys.stderr)
    own = [] if context.config.evaluate.repeats else [index.rows[i] for i, _ in events if i in index.rows]
    seen = np.array(own, dtype=np.int64)
    if known:
        found = _nearest(serving, index, known, k, seen, blocked)
    else:
        print("no history in the snapshot: the most popular items instead", file=sys.stderr)
        found = _popular(context, index, k, seen, blocked)
    titles = context.titles()
    for item_id, score in found:
        print(f"{score:7.4f}  {titles.get(item_id, item_id)}")
    return {
        "user": user,
        "fallback": None if known else "popularity",
        "users_without_history": int(not known),
        "skipped_events": len(events) - len(known),
        "blocked": len(blocked),
        "blocklist_unknown": unknown,
        "under_filled": int(len(found) < k),
        "user_tower": serving.record.id,
        "index": index.record.id,
        "items": [
            {tables.ITEM_ID: item_id, "score": round(score, 6), "title": titles.get(item_id, item_id)}
            for item_id, score in found
        ],
    }
