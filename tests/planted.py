"""A click log whose labels an inner product with the item's vector cannot express."""

from __future__ import annotations

import numpy as np

from pipeline.clicks import Clicks
from user_tower.sequences import Histories

DIM = 16


def planted_clicks(users: int = 120, items: int = 200, shown: int = 24, seed: int = 0) -> tuple[Clicks, np.ndarray]:
    """Each item has two signs, in the first two places of its vector; each user clicks what has their product at
    either +1 or -1, and is shown both alike. Returns the log and float32 [items, DIM].

    For a user the click is XOR of two linear features of the item: a score that is linear in the item's vector has
    AUC 0.5, whatever the user's vector. Which product it is only the history tells.
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (items, 2))
    vectors = np.concatenate([2 * signs, rng.normal(size=(items, DIM - 2))], axis=1).astype(np.float32)
    shows = np.concatenate([rng.permutation(items)[:shown] for _ in range(users)])
    likes = np.repeat(rng.choice([-1.0, 1.0], users), shown)
    kinds = (signs[shows].prod(axis=1) == likes).astype(np.int8)
    offsets = np.arange(users + 1) * shown
    times = np.tile(np.arange(shown) * 3_600_000, users) + 1_600_000_000_000
    histories = Histories([f"u{n}" for n in range(users)], offsets, shows, times)
    return Clicks(histories, kinds, np.arange(items)), vectors
