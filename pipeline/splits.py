"""Who is tested on what: the evaluation protocols (DESIGN 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from schemas.errors import DataError
from user_tower.sequences import Histories, IntArray

Split = Literal["valid", "test"]
PROTOCOL = "leave-last-out"


@dataclass(frozen=True)
class Queries:
    """What is asked of a recommender: histories [U], and the target row of each, -1 if it has none."""

    histories: Histories
    targets: IntArray

    def map_items(self, rows: IntArray) -> Queries:
        """The same questions in another catalog's rows; a target not in it becomes -1."""
        return Queries(self.histories.map_items(rows), rows[self.targets])

    def select(self, users: IntArray) -> Queries:
        """The questions of some users."""
        return Queries(self.histories.select(users), self.targets[users])


def training_part(histories: Histories) -> Histories:
    """Leave-last-out's training events: all but the last two of each user with three or more.

    A user with fewer has no validation or test target and stays whole.
    """
    return histories.cut(np.where(histories.lengths >= 3, histories.lengths - 2, histories.lengths))


def queries(histories: Histories, split: Split) -> Queries:
    """Leave-last-out's questions (paper, section 4): ``valid`` asks for event -2, ``test`` for event -1.

    The history is everything before the target, so the test history holds the validation item. Raises DataError
    when no user has three events.
    """
    users = np.flatnonzero(histories.lengths >= 3)
    if len(users) == 0:
        raise DataError(f"{PROTOCOL} needs users with three events or more; none of {len(histories)} users has them")
    chosen = histories.select(users)
    ends = chosen.lengths - (2 if split == "valid" else 1)
    return Queries(chosen.cut(ends), chosen.items[chosen.offsets[:-1] + ends])
