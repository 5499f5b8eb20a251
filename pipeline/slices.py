"""Which targets are looked at apart, and what the lists of a run are like as a whole (DESIGN 9).

Shapes: U users, P targets, N catalog items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import FloatArray, IntArray, per_user
from pipeline.splits import Queries

Mask = NDArray[np.bool_]
# bounds of the history lengths that are reported apart
LENGTHS = ((0, 0), (1, 20), (21, 50), (51, 200), (201, None))
DECILES = 10


def popularity_deciles(counts: IntArray) -> IntArray:
    """[N] 0 for the tenth of the items that training met least, 9 for the tenth that it met most; -1 for an item that
    it never met. counts: [N] training events. Items of the same count are in the same decile, by their mean rank."""
    deciles = np.full(len(counts), -1, dtype=np.int64)
    met = counts > 0
    ordered = np.sort(counts[met])
    ranks = (np.searchsorted(ordered, counts[met], "left") + np.searchsorted(ordered, counts[met], "right")) / 2
    deciles[met] = np.minimum(DECILES - 1, (DECILES * ranks / max(1, len(ordered))).astype(np.int64))
    return deciles


def target_slices(
    questions: Queries, counts: IntArray, tuned: Mask | None = None, earlier: Mask | None = None
) -> dict[str, Mask]:
    """Label -> [P] the targets of each slice. questions, counts [N]: in one catalog's rows, all targets in it.

    tuned: [N] items that the Item LLM was tuned with; earlier: [N] items that the snapshot before this one held; None
    where that is not known or means nothing.
    """
    targets, deciles = questions.targets, popularity_deciles(counts)
    found = {"cold: not in user training": counts[targets] == 0}
    if tuned is not None:
        found["cold: not in item tuning"] = ~tuned[targets]
    if earlier is not None:
        found["cold: new in this snapshot"] = ~earlier[targets]
    for decile in range(DECILES):
        found[f"popularity decile {decile + 1}"] = deciles[targets] == decile
    lengths = questions.histories.lengths[questions.owners]
    for low, high in LENGTHS:
        label = f"history {low}" if low == high else f"history {low}-{high}" if high else f"history {low}+"
        found[label] = (lengths >= low) & (lengths <= high if high is not None else True)
    return found


def slice_values(
    metric: str, above: IntArray, ties: IntArray, bounds: IntArray, catalog: int, members: Mask
) -> FloatArray:
    """[U] the metric over each user's targets of a slice alone, NaN where there is none. members: [P]."""
    offsets = np.concatenate([[0], np.cumsum(members)])[bounds]
    ks = (int(metric.partition("@")[2]),) if "@" in metric else ()
    return per_user(above[members], ties[members], ks, catalog, offsets)[metric]


def list_figures(best: IntArray, candidates: int, counts: IntArray, profiles: FloatArray) -> dict[str, float]:
    """Coverage and popularity bias of the lists. best: [U, k] rows, -1 where a list is short; candidates: items that
    could be recommended; counts: [N] training events; profiles: [U] mean count of each history, NaN for an empty one.

    coverage: share of the candidates that are in some list. popularity: mean training count of a list, averaged over
    users; popularity_lift: that over the same mean of the histories, less one (Abdollahpouri et al. 2020): above zero
    the lists are more popular than what the same users did.
    """
    k, listed = best.shape[1], best >= 0
    shown = len(np.unique(best[listed]))
    lengths = listed.sum(axis=1)
    sums = np.where(listed, counts[np.maximum(best, 0)], 0).sum(axis=1)
    means = sums / np.maximum(lengths, 1)
    both = (lengths > 0) & ~np.isnan(profiles)
    own = float(profiles[both].mean()) if both.any() else 0.0
    return {
        f"coverage@{k}": shown / max(1, candidates),
        f"items_shown@{k}": float(shown),
        f"popularity@{k}": float(means[lengths > 0].mean()) if (lengths > 0).any() else 0.0,
        f"popularity_lift@{k}": float(means[both].mean()) / own - 1 if own > 0 else 0.0,
    }


def profile_popularity(questions: Queries, counts: IntArray) -> FloatArray:
    """[U] mean training count of the items of each history, NaN for an empty one. Both in one catalog's rows."""
    histories = questions.histories
    sums = np.diff(np.concatenate([[0], np.cumsum(counts[histories.items])])[histories.offsets])
    return np.where(histories.lengths > 0, sums / np.maximum(histories.lengths, 1), np.nan)
