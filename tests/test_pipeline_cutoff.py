"""Which targets a tower has been trained on, found again in data that has grown since."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.cutoff import seen_events, seen_targets, write_cutoff
from pipeline.splits import SplitConfig, queries, training_part
from schemas.errors import StoreError
from user_tower.sequences import Histories

ITEMS = ["a", "b", "c", "d", "e"]
SPLIT = SplitConfig()


def histories(**events: list[tuple[int, str]]) -> Histories:
    """user=[(time, item), ...]."""
    lengths = [len(each) for each in events.values()]
    flat = [event for each in events.values() for event in each]
    return Histories(
        list(events),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([ITEMS.index(item) for _, item in flat], dtype=np.int64),
        np.array([time for time, _ in flat], dtype=np.int64),
    )


FIRST = histories(u=[(1, "a"), (2, "b"), (2, "c"), (4, "d"), (5, "e")], v=[(1, "a"), (2, "b")])


def test_targets_of_the_same_data_are_not_among_what_was_trained_on(tmp_path):
    write_cutoff(tmp_path, training_part(FIRST, SPLIT), ITEMS)
    assert seen_events(tmp_path, FIRST, ITEMS).tolist() == [3, 2]
    for split in ("valid", "test"):
        assert not seen_targets(tmp_path, queries(FIRST, split, SPLIT), FIRST, ITEMS).any()


def test_a_tower_that_saw_everything_has_seen_the_targets(tmp_path):
    write_cutoff(tmp_path, FIRST, ITEMS)
    assert seen_targets(tmp_path, queries(FIRST, "test", SPLIT), FIRST, ITEMS).tolist() == [True]


def test_later_events_are_new_and_late_ones_do_not_hide_an_old_one(tmp_path):
    """A late event at time 1 moves all others by one; the event trained on last is found again by time and item."""
    write_cutoff(tmp_path, training_part(FIRST, SPLIT), ITEMS)
    grown = histories(
        v=[(1, "a"), (2, "b"), (9, "c"), (10, "d")],
        w=[(1, "a"), (2, "b"), (3, "c")],
        u=[(1, "a"), (1, "e"), (2, "b"), (2, "c"), (4, "d"), (5, "e")],
    )
    assert seen_events(tmp_path, grown, ITEMS).tolist() == [2, 0, 4]
    assert not seen_targets(tmp_path, queries(grown, "test", SPLIT), grown, ITEMS).any()
    shortened = histories(u=[(1, "a"), (2, "b"), (2, "c")])  # its target was trained on when there was more
    assert seen_targets(tmp_path, queries(shortened, "test", SPLIT), shortened, ITEMS).tolist() == [True]


def test_where_the_last_event_is_gone_all_up_to_its_time_count(tmp_path):
    write_cutoff(tmp_path, FIRST, ITEMS)
    rest = histories(u=[(1, "a"), (2, "b"), (5, "d"), (6, "a")])
    assert seen_events(tmp_path, rest, ITEMS).tolist() == [3]


def test_what_the_parent_saw_counts_as_seen(tmp_path):
    parent, child = tmp_path / "parent", tmp_path / "child"
    parent.mkdir()
    child.mkdir()
    write_cutoff(parent, FIRST, ITEMS)
    earlier = histories(u=[(1, "a")], x=[(7, "b"), (8, "c")])
    write_cutoff(child, earlier, ITEMS, parent)
    both = histories(u=[(1, "a"), (2, "b"), (2, "c"), (4, "d"), (5, "e")], x=[(7, "b"), (8, "c"), (9, "a")])
    assert seen_events(child, both, ITEMS).tolist() == [5, 2]


def test_a_lost_or_damaged_table_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="train that tower again"):
        seen_events(tmp_path, FIRST, ITEMS)
    (tmp_path / "cutoff.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(StoreError, match=r"cutoff\.parquet cannot be read"):
        write_cutoff(tmp_path, FIRST, ITEMS, tmp_path)
