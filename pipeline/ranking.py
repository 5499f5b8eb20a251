"""What a ranker is asked, with its negatives, and what a retrieval score says of the same candidates.

Shapes: P examples, N catalog items.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.baselines import TowerRecommender
from pipeline.clicks import Clicks, Questions, RankingConfig, with_sampled
from pipeline.metrics import FloatArray
from pipeline.splits import Split
from user_tower.candidates import Examples, contexts_of, draw_contexts
from user_tower.sequences import IntArray

_SPLITS: tuple[Split, Split] = ("valid", "test")


def epoch_examples(
    examples: Examples, available: NDArray[np.bool_], config: RankingConfig, seed: list[int]
) -> Examples:
    """The examples of an epoch: some contexts of each user; under ``sampled`` with negatives that the user has not
    met in the training part, over which the examples are."""
    chosen = draw_contexts(examples, config.contexts, np.random.default_rng(seed))
    if config.labels != "sampled":
        return chosen
    known = examples.histories
    met = (np.repeat(np.arange(len(known)), known.lengths), known.items)
    return with_sampled(chosen, met, available, config.negatives, seed)[0]


def asked_with_negatives(
    questions: Questions, split: Split, available: NDArray[np.bool_], config: RankingConfig, seed: int
) -> tuple[Examples, IntArray]:
    """The examples that are asked, under ``sampled`` with negatives that are the same for every ranker of the same
    seed; and [P] which of ``questions.examples`` each stands by."""
    examples = questions.examples
    if config.labels != "sampled":
        return examples, np.arange(len(examples))
    known = examples.histories
    users = np.concatenate([np.repeat(np.arange(len(known)), known.lengths), examples.users])
    met = (users, np.concatenate([known.items, examples.items]))
    return with_sampled(examples, met, available, config.negatives, [seed, _SPLITS.index(split)])


def left_out(clicks: Clicks, questions: Questions) -> dict[str, int]:
    """Events of the asked part that are no example: of an item that the catalog lacks, or without a label."""
    absent = int((clicks.rows[questions.asked.targets] < 0).sum())
    return {"absent": absent, "unlabelled": len(questions.asked.targets) - len(questions.kept) - absent}


def retrieval_scores(recommender: TowerRecommender, examples: Examples, rows: IntArray, chunk: int) -> FloatArray:
    """float64 [P] what a user tower's query says of each candidate. rows: [N] the recommender's row of each row of
    the examples' catalog."""
    contexts, place = contexts_of(examples)
    contexts, candidates = contexts.map_items(rows), torch.from_numpy(rows[examples.items])
    found = np.empty(len(examples))
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(0, len(contexts) + chunk, chunk))
    with torch.inference_mode():
        for number, (low, high) in enumerate(pairwise(bounds.tolist())):
            part, start = order[low:high], number * chunk
            users = np.arange(start, min(start + chunk, len(contexts)))
            own = recommender.queries(contexts.select(users))[torch.from_numpy(place[part] - start)]
            scores = (own * recommender.candidates[candidates[part]]).sum(-1)
            found[part] = scores.double().cpu().numpy()
    return found
