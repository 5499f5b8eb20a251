"""Exact ranks of the targets over the full catalog, and each user's best items, in one pass over the scores.

A chunk of users meets the catalog tile by tile; a tile of scores is used up while it is in the CPU's cache (or is one
kernel's worth of work on a GPU), so memory grows neither with users nor with users x catalog.

Shapes: B users of a chunk, N catalog items, C columns of a tile, U users, P targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from pipeline.baselines import Recommender
from pipeline.metrics import IntArray, metric_names
from pipeline.scores import Scores
from pipeline.splits import Queries, SplitConfig
from user_tower.sequences import Histories

# Scores of one tile: 1 MiB stays in the cache of a core or two; a GPU wants few and large products
_TILE = {"cpu": 1 << 18, "cuda": 1 << 26}
_GROUP = 8  # columns whose largest score is kept for the lists


class EvaluateConfig(SplitConfig):
    """What is asked, see ``SplitConfig``, and what is measured."""

    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(5, 10, 50, 200), min_length=1)
    metric: str = "recall@10"
    """The figure that decides: early stopping, and the best run of a comparison."""
    chunk: int = Field(default=512, gt=0)
    """Users scored at once."""
    bootstrap: int = Field(default=1000, gt=0)
    """Resamples of the users behind each interval."""
    trained_targets: Literal["refuse", "leave-out"] = "refuse"
    """What happens to targets that the Item LLM or the user tower was trained on: an error, or they are left out and
    counted; the other runs of a table must then leave the same ones out."""

    @model_validator(mode="after")
    def _metric_is_measured(self) -> EvaluateConfig:
        if self.metric not in metric_names(self.ks):
            raise ValueError(f"metric {self.metric!r} is not among {metric_names(self.ks)}; see ks")
        return self


class Ranks(NamedTuple):
    """above, ties: int64 [P] as in ``pipeline.metrics``; best: int64 [U, top] rows of each user's best items, best
    first, -1 where no candidate is left."""

    above: IntArray
    ties: IntArray
    best: IntArray


class Pool(NamedTuple):
    """What may be recommended. available: bool [N]; released: int64 [N] milliseconds from which each item could be
    recommended, or None where that is not known."""

    available: NDArray[np.bool_]
    released: IntArray | None = None


class _Chunk(NamedTuple):
    """A chunk's questions on the device. owners, targets: [p] of the targets that can be found, and slots: [p] their
    places among their user's; seen: [e, 2] (row, item) that must not be recommended, sorted by item; times: [p] or
    None; asked: [B] the time of each user's first target, or None."""

    owners: Tensor
    targets: Tensor
    slots: IntArray
    seen: IntArray
    times: Tensor | None
    asked: Tensor | None


class _Slot(NamedTuple):
    """One target of each of some rows. rows: [r], or None for all of them; low, high: [r, 1] the scores between which
    a candidate ties; places: [r] where their counts belong; times: [r, 1]."""

    rows: Tensor | None
    low: Tensor
    high: Tensor
    places: Tensor
    times: Tensor | None


class _Limits:
    """The pool on the device, tile by tile."""

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self.banned = np.flatnonzero(~pool.available)
        self.banned_rows = torch.from_numpy(~pool.available).to(device)
        self.released = None if pool.released is None else torch.from_numpy(pool.released).to(device)
        self._device = device
        self._made: dict[int, Tensor] = {}

    def columns(self, start: int, stop: int) -> Tensor | None:
        """Columns of a tile that nobody may be recommended."""
        low, high = np.searchsorted(self.banned, [start, stop])
        return torch.from_numpy(self.banned[low:high] - start).to(self._device) if high > low else None

    def groups(self, size: int, width: int) -> Tensor:
        """See ``_groups``; made once for each width."""
        if width not in self._made:
            self._made = {width: _groups(size, width).to(self._device)}
        return self._made[width]


def _prepare(part: Queries, pool: Pool, repeats: bool, device: torch.device) -> tuple[_Chunk, IntArray]:
    """The chunk on the device, and which of its targets can be found at all."""
    size, histories = len(pool.available), part.histories
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    order = np.argsort(histories.items, kind="stable")
    seen = np.stack([rows[order], histories.items[order]], axis=1) if not repeats else np.zeros((0, 2), np.int64)
    owners = part.owners
    keys = np.unique(seen[:, 0] * size + seen[:, 1])
    inside = part.targets >= 0
    findable = inside & pool.available[np.where(inside, part.targets, 0)]
    findable &= ~np.isin(owners * size + part.targets, keys)
    slots = np.arange(len(owners)) - part.bounds[:-1][owners]
    places = np.flatnonzero(findable)
    times = asked = None
    if pool.released is not None:
        assert part.times is not None
        times = torch.from_numpy(part.times[places]).to(device)
        asked = torch.from_numpy(part.times[part.bounds[:-1]]).to(device)
    on_device = (torch.from_numpy(owners[places]).to(device), torch.from_numpy(part.targets[places]).to(device))
    return _Chunk(*on_device, slots[places], seen, times, asked), places


def _slots(scores: Scores, chunk: _Chunk) -> list[_Slot]:
    """The targets grouped so that each group has at most one a row; those that come first of every row together."""
    users, count = scores.shape[0], len(chunk.owners)
    if count == 0:
        return []
    goals = _goals(scores, chunk)
    slack = scores.tolerance[chunk.owners]
    found = []
    for number in np.unique(chunk.slots).tolist():
        places = torch.from_numpy(np.flatnonzero(chunk.slots == number)).to(goals.device)
        rows = chunk.owners[places]
        own = (goals[places] - slack[places], goals[places] + slack[places])
        times = None if chunk.times is None else chunk.times[places, None]
        every = len(rows) == users
        found.append(_Slot(None if every else rows, own[0][:, None], own[1][:, None], places, times))
    return found


def _goals(scores: Scores, chunk: _Chunk) -> Tensor:
    """[p] the targets' own scores."""
    widest = int(chunk.slots.max()) + 1
    items = chunk.targets.new_zeros(scores.shape[0], widest)
    slots = torch.from_numpy(chunk.slots).to(items.device)
    items[chunk.owners, slots] = chunk.targets
    return scores.at(items)[chunk.owners, slots]


def _width(scores: Scores) -> int:
    """Columns of a tile, a multiple of the group."""
    return max(_GROUP, _TILE[scores.tolerance.device.type] // max(1, scores.shape[0]) // _GROUP * _GROUP)


def _tiles(scores: Scores, chunk: _Chunk, limits: _Limits) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, scores [B, stop - start]) with -inf for what must not be recommended; one buffer for all."""
    users, size = scores.shape
    device = scores.tolerance.device
    width = _width(scores)
    buffer = torch.empty(users * min(width, size), device=device)
    rows, items = (torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in chunk.seen.T)
    starts = range(0, size, width)
    bounds = np.searchsorted(chunk.seen[:, 1], [*starts, size]).tolist()
    for number, start in enumerate(starts):
        stop = min(start + width, size)
        tile = scores.tile(start, stop, buffer[: users * (stop - start)].view(users, stop - start))
        low, high = bounds[number], bounds[number + 1]
        if high > low:
            tile[rows[low:high], items[low:high] - start] = -torch.inf
        columns = limits.columns(start, stop)
        if columns is not None:
            tile.index_fill_(1, columns, -torch.inf)
        yield start, stop, tile


def _released(tile: Tensor, released: Tensor | None, times: Tensor | None) -> Tensor:
    """The tile with -inf for items released after each row's time. released: [C]; times: [r, 1]."""
    if released is None or times is None or not bool((released > times.min()).any()):
        return tile
    return tile.masked_fill(released > times, -torch.inf)


def _rank_chunk(scores: Scores, chunk: _Chunk, limits: _Limits, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """above, ties [p] of the chunk's targets, and the rows [B, top] of each user's best items."""
    slots = _slots(scores, chunk)
    above = torch.zeros(len(chunk.owners), dtype=torch.float32, device=scores.tolerance.device)
    at_least = torch.zeros_like(above)  # whole numbers, exact below 2^24
    asked = None if chunk.asked is None else chunk.asked[:, None]
    maxima = []
    flags = torch.empty(0, device=above.device)
    for start, stop, tile in _tiles(scores, chunk, limits):
        released = None if limits.released is None else limits.released[start:stop]
        for slot in slots:
            own = _released(tile if slot.rows is None else tile[slot.rows], released, slot.times)
            if len(flags) < own.numel():
                flags = torch.empty(own.numel(), device=above.device)
            compared = flags[: own.numel()].view_as(own)
            above[slot.places] += torch.gt(own, slot.high, out=compared).sum(1)
            at_least[slot.places] += torch.ge(own, slot.low, out=compared).sum(1)
        if top:
            maxima.append(_group_maxima(_released(tile, released, asked)))
    best = _best(scores, chunk, limits, torch.cat(maxima, dim=1), top) if top and maxima else above.new_empty(0)
    above_count = above.long()
    return above_count, at_least.long() - above_count - 1, best


def _group_maxima(tile: Tensor) -> Tensor:
    """[B, ceil(C / 8)] largest score of each group of eight columns, an eighth of the tile apart (that reads whole
    rows at once); the columns that are left over are the last group."""
    each, whole = tile.shape[1] // _GROUP, tile.shape[1] // _GROUP * _GROUP
    maxima = tile[:, :whole].unflatten(1, (_GROUP, each)).amax(1)
    if whole == tile.shape[1]:
        return maxima
    return torch.cat([maxima, tile[:, whole:].amax(1, keepdim=True)], dim=1)


def _groups(size: int, width: int) -> Tensor:
    """[G, 8] the catalog rows of each group of ``_group_maxima`` over all tiles; ``size`` where there is none."""
    found = []
    for start in range(0, size, width):
        columns = torch.arange(start, min(start + width, size))
        each, whole = len(columns) // _GROUP, len(columns) // _GROUP * _GROUP
        found.append(columns[:whole].view(_GROUP, each).T)
        if whole < len(columns):
            rest = torch.full((1, _GROUP), size)
            rest[0, : len(columns) - whole] = columns[whole:]
            found.append(rest)
    return torch.cat(found)


def _best(scores: Scores, chunk: _Chunk, limits: _Limits, maxima: Tensor, top: int) -> Tensor:
    """[B, top] rows of the best items: they lie in the groups with the best maxima, whose items are scored again."""
    users, size = scores.shape
    groups = maxima.topk(min(top, maxima.shape[1]), dim=1).indices
    items = limits.groups(size, _width(scores))[groups].flatten(1)
    beyond = items >= size
    items = items.clamp(max=size - 1)
    gone = beyond | limits.banned_rows[items]
    if len(chunk.seen):
        keys = torch.from_numpy(chunk.seen[:, 0] * size + chunk.seen[:, 1]).to(items.device)
        gone |= torch.isin(torch.arange(users, device=items.device)[:, None] * size + items, keys)
    if limits.released is not None and chunk.asked is not None:
        gone |= limits.released[items] > chunk.asked[:, None]
    found = scores.at(items).masked_fill(gone, -torch.inf).topk(min(top, items.shape[1]), dim=1)
    best = items.gather(1, found.indices).masked_fill(found.values == -torch.inf, -1)
    return torch.nn.functional.pad(best, (0, top - best.shape[1]), value=-1)


def _rank_sampled(scores: Scores, part: Queries, pool: Pool) -> tuple[Tensor, Tensor]:
    """above, ties [B] of one target a user among its negatives; the target may be -1 and is then a miss."""
    assert part.negatives is not None
    drawn = np.concatenate([part.targets[:, None], part.negatives], axis=1)
    known = (drawn >= 0) & pool.available[np.maximum(drawn, 0)]
    device = scores.tolerance.device
    found = scores.at(torch.from_numpy(np.maximum(drawn, 0)).to(device))
    found = found.masked_fill(torch.from_numpy(~known).to(device), -torch.inf)
    goal, slack = found[:, :1], scores.tolerance[:, None]
    above = (found[:, 1:] > goal + slack).sum(1)
    ties = (found[:, 1:] >= goal - slack).sum(1) - above
    missed = goal[:, 0] == -torch.inf
    return above.masked_fill(missed, -1), ties.masked_fill(missed, 0)


def _order(questions: Queries) -> IntArray:
    """Users with much alike work together: by number of targets, then by length of history."""
    return np.lexsort((questions.histories.lengths, np.diff(questions.bounds)))


@torch.inference_mode()
def rank_users(
    recommender: Recommender,
    questions: Queries,
    pool: Pool,
    config: EvaluateConfig,
    *,
    top: int = 0,
    progress: str | None = None,
) -> Ranks:
    """Ranks of all targets among what may be recommended to their users, and each user's ``top`` best items.

    A target that is absent, unavailable, or (without repeats) in the history is a miss. With ``questions.negatives``
    each target stands against these alone, and there are no lists.
    """
    users = len(questions.histories)
    above = np.full(len(questions.targets), -1, dtype=np.int64)
    ties = np.zeros(len(questions.targets), dtype=np.int64)
    top = 0 if questions.negatives is not None else top
    best = np.full((users, top), -1, dtype=np.int64)
    limits: _Limits | None = None
    order = _order(questions)
    starts = range(0, users, config.chunk)
    for start in tqdm(starts, desc=progress, disable=progress is None, unit="chunk", mininterval=2):
        chosen = order[start : start + config.chunk]
        part = questions.select(chosen)
        places = questions.places(chosen)
        if not top and (part.targets < 0).all():
            continue
        scores = recommender.score(part.histories)
        if part.negatives is not None:
            above[places], ties[places] = (found.cpu().numpy() for found in _rank_sampled(scores, part, pool))
            continue
        device = scores.tolerance.device
        limits = limits or _Limits(pool, device)
        chunk, findable = _prepare(part, pool, config.repeats, device)
        found_above, found_ties, lists = _rank_chunk(scores, chunk, limits, top)
        above[places[findable]], ties[places[findable]] = found_above.cpu().numpy(), found_ties.cpu().numpy()
        if top:
            best[chosen] = lists.cpu().numpy()
    return Ranks(above, ties, best)


def rank_targets(
    recommender: Recommender,
    questions: Queries,
    available: NDArray[np.bool_],
    config: EvaluateConfig,
    progress: str | None = None,
) -> Ranks:
    """``rank_users`` over all available items, without lists. available: [N]."""
    return rank_users(recommender, questions, Pool(available), config, progress=progress)


def top_items(
    recommender: Recommender,
    histories: Histories,
    available: NDArray[np.bool_],
    config: EvaluateConfig,
    k: int,
) -> list[list[int]]:
    """The k best catalog rows of each history, best first; fewer where no more candidates are left."""
    nothing = np.full(len(histories), -1, dtype=np.int64)
    best = rank_users(recommender, Queries(histories, nothing), Pool(available), config, top=k).best
    return [[row for row in rows if row >= 0] for rows in best.tolist()]
