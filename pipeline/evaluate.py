"""Exact ranks of the targets over the full catalog.

Shapes: B users of a chunk, N catalog items, U users.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from tqdm import tqdm

from pipeline.baselines import Recommender
from pipeline.metrics import IntArray, metric_names
from pipeline.splits import Queries
from user_tower.sequences import Histories

# Scores closer than this share of the row's largest are one score. A float32 product of the same two vectors
# differs in the last bits with the place of the row in the matrix; a tie must not depend on that.
TIE_TOLERANCE = 1e-6


class EvaluateConfig(BaseModel):
    """What is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(5, 10, 50, 200), min_length=1)
    metric: str = "recall@10"
    """The figure that decides: early stopping, and the best run of a comparison."""
    repeats: bool = False
    """Whether an item of the history may be recommended; without it a repeated target is a miss."""
    chunk: int = Field(default=512, gt=0)
    """Users scored at once."""
    bootstrap: int = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _metric_is_measured(self) -> EvaluateConfig:
        if self.metric not in metric_names(self.ks):
            raise ValueError(f"metric {self.metric!r} is not among {metric_names(self.ks)}; see ks")
        return self


class Ranks(NamedTuple):
    """above, ties: int64 [U] as in ``pipeline.metrics``."""

    above: IntArray
    ties: IntArray


def _rank_chunk(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """scores: float32 [B, N], -inf where not a candidate; targets: [B] valid rows. Returns above, ties [B]."""
    goal = scores.gather(1, targets[:, None])
    finite = scores.masked_fill(scores == -torch.inf, 0.0)
    tolerance = TIE_TOLERANCE * finite.abs().amax(1, keepdim=True)
    above = (scores > goal + tolerance).sum(1)
    ties = (scores >= goal - tolerance).sum(1) - above - 1
    missed = goal[:, 0] == -torch.inf
    return torch.where(missed, -1, above), torch.where(missed, 0, ties)


def _candidate_scores(
    recommender: Recommender, histories: Histories, banned: Tensor, config: EvaluateConfig
) -> Tensor:
    """Scores [B, N] with -inf for what must not be recommended. banned: bool [N]."""
    scores = recommender.score(histories)
    scores = scores.masked_fill(banned.to(scores.device), -torch.inf)
    if not config.repeats:
        rows = torch.from_numpy(np.repeat(np.arange(len(histories)), histories.lengths))
        items = torch.from_numpy(histories.items)
        scores[rows.to(scores.device), items.to(scores.device)] = -torch.inf
    return scores


def top_items(
    recommender: Recommender,
    histories: Histories,
    available: NDArray[np.bool_],
    config: EvaluateConfig,
    k: int,
) -> list[list[int]]:
    """The k best catalog rows of each history, best first; fewer where no more candidates are left."""
    scores = _candidate_scores(recommender, histories, torch.from_numpy(~available), config)
    best = scores.topk(k, dim=1)
    return [rows[keep].tolist() for rows, keep in zip(best.indices, best.values > -torch.inf, strict=True)]


def rank_targets(
    recommender: Recommender,
    questions: Queries,
    available: NDArray[np.bool_],
    config: EvaluateConfig,
    progress: str | None = None,
) -> Ranks:
    """The rank of every user's target among the available items that are not in the history.

    available: [N]. A target that is absent, unavailable, or (without repeats) in the history is a miss.
    """
    above = np.full(len(questions.targets), -1, dtype=np.int64)
    ties = np.zeros(len(questions.targets), dtype=np.int64)
    banned = torch.from_numpy(~available)
    starts = range(0, len(above), config.chunk)
    for start in tqdm(starts, desc=progress, disable=progress is None, unit="chunk", mininterval=2):
        users = np.arange(start, min(start + config.chunk, len(above)))
        users = users[questions.targets[users] >= 0]
        if len(users) == 0:
            continue
        part = questions.select(users)
        scores = _candidate_scores(recommender, part.histories, banned, config)
        chunk = _rank_chunk(scores, torch.from_numpy(part.targets).to(scores.device))
        above[users], ties[users] = (part_ranks.cpu().numpy() for part_ranks in chunk)
    return Ranks(above, ties)
