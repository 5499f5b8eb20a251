"""rank: the click probabilities of given items for a user, best first."""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.context import Context
from jobs.evaluate_ranker import open_ranker
from jobs.train_ranker import open_clicks
from jobs.train_user import catalog_rows
from schemas import tables
from schemas.errors import NotFoundError
from user_tower.candidates import Examples


def run(context: Context, user: str, items: list[str], snapshot: str | None = None) -> dict[str, Any]:
    """Print titles with probabilities. The history is what the user clicked, none for an unknown user.

    Raises NotFoundError for an item that the catalog lacks; FingerprintMismatchError, StoreError.
    """
    serving = open_ranker(context, snapshot)
    places = {item_id: row for row, item_id in enumerate(serving.item_ids)}
    unknown = [item_id for item_id in items if item_id not in places]
    if unknown:
        raise NotFoundError(f"--items: {unknown[:3]} are not in the catalog of ranker {serving.record.id}")
    rows = catalog_rows(context.dataset.item_ids, serving.item_ids)
    clicks = open_clicks(context, rows, serving.settings)
    known = clicks.clicked(clicks.histories.lengths)
    users = known.users
    own = known.select(np.array([users.index(user)] if user in users else [], dtype=np.int64))
    if not len(own):
        own = known.select(np.array([0])).cut(np.array([0]))
    candidates = np.array([places[item_id] for item_id in items], dtype=np.int64)
    nobody = np.zeros(len(items), dtype=np.int64)
    examples = Examples(own, nobody, np.repeat(own.lengths, len(items)), candidates, nobody)
    logits = serving.scorer.score(examples, 1, serving.settings.candidates)
    chances = np.exp(-np.logaddexp(0.0, -logits))
    titles, best = context.titles(), np.argsort(-chances, kind="stable")
    ranked = [(items[place], float(chances[place])) for place in best.tolist()]
    for item_id, chance in ranked:
        print(f"{chance:7.4f}  {titles.get(item_id, item_id)}")
    return {
        "user": user,
        "history": int(own.lengths[0]),
        "ranker": serving.record.id,
        "fusion": serving.record.fusion,
        "items": [
            {tables.ITEM_ID: item_id, "score": round(chance, 6), "title": titles.get(item_id, item_id)}
            for item_id, chance in ranked
        ],
    }
