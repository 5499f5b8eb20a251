"""Candidates with click labels after histories, and batches of them.

Shapes: U users, P examples, B contexts of a batch (a context is a history up to some event), T events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from user_tower.sequences import Batch, Batches, Histories, IntArray, context_batch, length_cuts


@dataclass(frozen=True)
class Examples:
    """What a ranker learns from and is asked.

    histories: U, the events that may stand in a context; users: [P] row in histories; before: [P] how many of that
    user's events the context holds; items: [P] catalog row of the candidate; labels: [P] 1 clicked, 0 not.
    """

    histories: Histories
    users: IntArray
    before: IntArray
    items: IntArray
    labels: IntArray

    def __len__(self) -> int:
        return len(self.items)

    def select(self, rows: IntArray | NDArray[np.bool_]) -> Examples:
        """Some of the examples, over the same histories."""
        return Examples(self.histories, self.users[rows], self.before[rows], self.items[rows], self.labels[rows])


class CandidateBatch(NamedTuple):
    """Contexts with their candidates.

    context: B right-padded rows, of length 0 where nothing came before, targets the next event of each position;
    owners: [P] the context of each candidate, ascending; candidates: [P] catalog rows; labels: [P] 1, 0, or -1 for
    one that only fills; examples: [P] which example of the ``Examples`` each is.
    """

    context: Batch
    owners: IntArray
    candidates: IntArray
    labels: IntArray
    examples: IntArray

    @property
    def positions(self) -> int:
        """The labelled candidates, over which the loss is a mean."""
        return int((self.labels >= 0).sum())

    @property
    def first(self) -> IntArray:
        """[B] the first candidate of each context; each has one."""
        return np.searchsorted(self.owners, np.arange(len(self.context.lengths)))

    def share(self, rank: int, world: int) -> CandidateBatch:
        """The contexts of one of ``world`` processes; where there are none, one that only fills."""
        if rank >= len(self.context.lengths):
            own = self.owners == 0
            filling = np.full(int(own.sum()), -1)
            return CandidateBatch(
                self.context.share(rank, world), self.owners[own], self.candidates[own], filling, self.examples[own]
            )
        own = self.owners % world == rank
        return CandidateBatch(
            self.context.share(rank, world),
            self.owners[own] // world,
            self.candidates[own],
            self.labels[own],
            self.examples[own],
        )


def contexts_of(examples: Examples) -> tuple[Histories, IntArray]:
    """The distinct contexts, one row each, and [P] the row of each example."""
    _, first, place = np.unique(_keys(examples), return_index=True, return_inverse=True)
    return examples.histories.select(examples.users[first]).cut(examples.before[first]), place


def draw_contexts(examples: Examples, count: int, rng: np.random.Generator) -> Examples:
    """The examples of at most ``count`` random contexts of each user; all of them for 0."""
    if not count or not len(examples):
        return examples
    keys, place = np.unique(_keys(examples), return_inverse=True)
    users = keys // _span(examples)
    order = np.lexsort((rng.random(len(keys)), users))
    starts = np.searchsorted(users, users)  # the first of the same user
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[order] = np.arange(len(keys)) - starts < count
    return examples.select(chosen[place])


def candidate_batches(
    examples: Examples, length: int, contexts: int, most: int, rng: np.random.Generator | None = None
) -> Batches[CandidateBatch]:
    """Batches of so many contexts of similar length, shuffled under ``rng``.

    length: events of a context, the newest; most: candidates of one context in a batch, more are divided among
    several rows.
    """
    keys = _keys(examples)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    within = np.arange(len(keys)) - np.searchsorted(keys, keys)
    new_row = (within % most == 0) if len(keys) else np.zeros(0, dtype=bool)
    starts = np.append(np.flatnonzero(new_row), len(order))
    rows = np.arange(len(starts) - 1)
    lengths = np.minimum(examples.before[order[starts[:-1]]], length)
    ranked = rng.permutation(rows) if rng else rows
    pool = contexts * 16 if rng else max(1, len(rows))
    cuts = length_cuts(ranked, lengths, contexts, pool)
    if rng:
        cuts = [cuts[number] for number in rng.permutation(len(cuts))]
    return Batches(cuts, lambda rows: _batch(examples, order, starts, rows, length))


def _batch(examples: Examples, order: IntArray, starts: IntArray, rows: IntArray, length: int) -> CandidateBatch:
    counts = (starts[1:] - starts[:-1])[rows]
    owners = np.repeat(np.arange(len(rows)), counts)
    ends = np.cumsum(counts)
    chosen = order[np.arange(ends[-1]) + np.repeat(starts[rows] - (ends - counts), counts)]
    first = order[starts[rows]]
    context = context_batch(examples.histories, examples.users[first], examples.before[first], length)
    return CandidateBatch(context, owners, examples.items[chosen], examples.labels[chosen], chosen)


def _span(examples: Examples) -> int:
    return int(examples.before.max(initial=0)) + 1


def _keys(examples: Examples) -> IntArray:
    """[P] a number of each example's context."""
    return examples.users * _span(examples) + examples.before
