"""Which events are clicks, and the labelled examples of each part of a split (paper, section 3.3).

Shapes: U users, E events, P examples, N catalog items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from pipeline.splits import Queries, Split, SplitConfig, queries, training_part
from schemas import tables
from schemas.errors import DataError
from user_tower.candidates import Examples
from user_tower.ranking import RankerConfig
from user_tower.sequences import Histories, IntArray

_ROUNDS = 64  # of drawing again what was not free
CLICK, SHOWN, NEITHER = 1, 0, -1


class RankingConfig(RankerConfig):
    """A ranker, and what its labels are."""

    labels: Literal["column", "events", "sampled"] = "column"
    """``column``: the label of each event, a click from ``positive_from`` on. ``events``: the type of each event.
    ``sampled``: the log has clicks only; ``negatives`` items that the user has not met stand for what was shown."""
    positive_from: float = 1.0
    """For ``column``: the least label that is a click."""
    positive_events: tuple[str, ...] = ("click",)
    """For ``events``: types that are clicks."""
    negative_events: tuple[str, ...] = ("impression",)
    """For ``events``: types that say shown and not clicked; other types are left out, and counted."""
    negatives: int = Field(default=4, gt=0)
    """For ``sampled``: uniform draws for each click, anew in each epoch; the log loss is of that share of clicks."""
    contexts: int = Field(default=8, ge=0)
    """Random places of each user's history from which an epoch asks; 0 for all."""
    candidates: int = Field(default=16, gt=0)
    """Candidates of one context in a batch; more are divided. With ``train.batch_size`` it bounds the memory."""
    retrieval: str = Field(default="tuned-cache", exclude=True)
    """Name of the user tower whose retrieval score is evaluated beside it, where it is there and fits."""

    @property
    def meaning(self) -> str:
        """What a label is, as it stands beside every figure."""
        if self.labels == "column":
            return f"click: label >= {self.positive_from:g}"
        if self.labels == "events":
            return f"click: {', '.join(self.positive_events)}; shown: {', '.join(self.negative_events)}"
        return f"sampled: {self.negatives} items not met beside each event, not comparable with shown ones"


@dataclass(frozen=True)
class Clicks:
    """All events with what each says. kinds: int8 [E], CLICK, SHOWN or NEITHER; rows: [N'] the row of each of the
    data set's items in the catalog that is ranked, -1 where it is not in it."""

    histories: Histories
    kinds: NDArray[np.int8]
    rows: IntArray

    @cached_property
    def _held(self) -> NDArray[np.bool_]:
        """[E] events that may stand in a history: clicks on items of the catalog."""
        return (self.kinds == CLICK) & (self.rows[self.histories.items] >= 0)

    @cached_property
    def _counted(self) -> IntArray:
        """[E + 1] how many of these are among the first events."""
        return np.concatenate([[0], np.cumsum(self._held)]).astype(np.int64)

    def clicked(self, ends: IntArray) -> Histories:
        """Clicks among the first ``ends[u]`` events of each user, in catalog rows; users stay."""
        kept = Histories(
            self.histories.users,
            self._counted[self.histories.offsets],
            self.rows[self.histories.items[self._held]],
            None if self.histories.times is None else self.histories.times[self._held],
        )
        return kept.cut(self._clicks_before(ends))

    def _clicks_before(self, ends: IntArray) -> IntArray:
        """[U] clicks among the first ``ends[u]`` events of each user."""
        begins = self.histories.offsets[:-1]
        return self._counted[begins + ends] - self._counted[begins]

    def earlier(self) -> IntArray:
        """[E] clicks of the same user before each event, at an earlier time: what is shown together is asked
        together, and a click of the same moment tells of the others."""
        owners = np.repeat(np.arange(len(self.histories)), self.histories.lengths)
        first = np.arange(len(owners))
        if self.histories.times is not None and len(owners):
            new = np.append(True, (np.diff(owners) != 0) | (np.diff(self.histories.times) != 0))
            first = np.flatnonzero(new)[np.cumsum(new) - 1]
        return self._counted[first] - self._counted[self.histories.offsets[:-1]][owners]


def event_kinds(table: pa.Table, config: RankingConfig) -> NDArray[np.int8]:
    """int8 [E] of the columns ``event`` and ``label``. Raises DataError when they hold no click, or nothing else."""
    kinds: NDArray[np.int8] = np.full(table.num_rows, NEITHER, dtype=np.int8)
    if config.labels == "sampled":
        return np.full(table.num_rows, CLICK, dtype=np.int8)
    if config.labels == "column":
        labels = table.column(tables.LABEL).to_numpy()
        known = ~np.isnan(labels)
        kinds[known] = labels[known] >= config.positive_from
        where = f"ranker.labels = 'column', ranker.positive_from = {config.positive_from}"
    else:
        types = table.column(tables.EVENT)
        for names, kind in ((config.negative_events, SHOWN), (config.positive_events, CLICK)):
            kinds[_named(types, names)] = kind
        where = f"ranker.labels = 'events' {list(config.positive_events)} against {list(config.negative_events)}"
    clicks, shown = int((kinds == CLICK).sum()), int((kinds == SHOWN).sum())
    if not clicks or not shown:
        raise DataError(
            f"{where}: of {len(kinds)} events {clicks} are clicks and {shown} are not; a ranker needs both. Set what "
            f"a click is, or ranker.labels = sampled for a log of clicks alone"
        )
    return kinds


def _named(types: pa.ChunkedArray, names: tuple[str, ...]) -> NDArray[np.bool_]:
    """[E] the events of some types; types: dictionary-encoded, so that no text is looked at twice."""
    found = [np.zeros(0, dtype=bool)]
    for chunk in types.chunks:
        wanted = pc.is_in(chunk.dictionary, pa.array(names, pa.string())).to_numpy(zero_copy_only=False)
        found.append(np.append(wanted, False)[chunk.indices.fill_null(len(wanted)).to_numpy(zero_copy_only=False)])
    return np.concatenate(found)


def training_examples(clicks: Clicks, config: SplitConfig) -> Examples:
    """Every labelled event of the training part (see ``training_part``) after the clicks before it."""
    ends = training_part(clicks.histories, config).lengths
    owners = np.repeat(np.arange(len(clicks.histories)), clicks.histories.lengths)
    number = np.arange(len(owners)) - clicks.histories.offsets[:-1][owners]
    items = clicks.rows[clicks.histories.items]
    chosen = np.flatnonzero((number < ends[owners]) & (items >= 0) & (clicks.kinds != NEITHER))
    before, labels = clicks.earlier()[chosen], clicks.kinds[chosen].astype(np.int64)
    return Examples(clicks.clicked(ends), owners[chosen], before, items[chosen], labels)


@dataclass(frozen=True)
class Questions:
    """asked: every event of the split's part, in the data set's rows; kept: [P] which of its targets the examples
    are of; examples: over the clicks that the protocol lets a recommender know."""

    asked: Queries
    kept: IntArray
    examples: Examples

    @property
    def users(self) -> IntArray:
        """[P] the user of each example, in the rows of ``asked.histories``."""
        return self.asked.owners[self.kept]


def asked_examples(clicks: Clicks, split: Split, config: SplitConfig) -> Questions:
    """The labelled events that the protocol asks about. Raises DataError when nobody can be asked."""
    asked = queries(clicks.histories, split, config, distinct=False)
    assert asked.numbers is not None
    places = {user: number for number, user in enumerate(clicks.histories.users)}
    users = np.array([places[user] for user in asked.histories.users], dtype=np.int64)
    events = clicks.histories.offsets[:-1][users][asked.owners] + asked.numbers
    items = clicks.rows[clicks.histories.items[events]]
    kept = np.flatnonzero((items >= 0) & (clicks.kinds[events] != NEITHER))
    ends = np.zeros(len(clicks.histories), dtype=np.int64)
    ends[users] = asked.histories.lengths
    known = clicks.clicked(ends).select(users)
    owners, events = asked.owners[kept], events[kept]
    before = np.minimum(clicks.earlier()[events], known.lengths[owners])
    examples = Examples(known, owners, before, items[kept], clicks.kinds[events].astype(np.int64))
    return Questions(asked, kept, examples)


def with_sampled(
    examples: Examples, met: tuple[IntArray, IntArray], available: NDArray[np.bool_], count: int, seed: list[int]
) -> tuple[Examples, IntArray]:
    """Clicks with ``count`` random items each that are available and that the user has not met, labelled 0; and [P]
    the click that each example stands by.

    met: users and catalog rows of the pairs that are not drawn; in training those of the training part alone, or what
    is never drawn would tell of the test. A user who has met nearly everything gets fewer. available: [N].
    """
    rng, pool, size = np.random.default_rng(seed), np.flatnonzero(available), len(available)
    taken = np.unique(met[0] * size + met[1])
    clicks = np.repeat(np.arange(len(examples)), count)
    drawn = np.full(len(clicks), -1, dtype=np.int64)
    if len(pool):
        left = np.arange(len(clicks))
        for _ in range(_ROUNDS):
            drawn[left] = pool[rng.integers(0, len(pool), len(left))]
            left = left[np.isin(examples.users[clicks[left]] * size + drawn[left], taken)]
            if not len(left):
                break
        drawn[left] = -1
    clicks, drawn = clicks[drawn >= 0], drawn[drawn >= 0]
    both = np.concatenate([np.arange(len(examples)), clicks])
    items, labels = np.concatenate([examples.items, drawn]), np.repeat([CLICK, SHOWN], [len(examples), len(drawn)])
    return replace(examples.select(both), items=items, labels=labels.astype(np.int64)), both
