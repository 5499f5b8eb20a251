"""Texts in order: that of their UTF-8 bytes, whatever they begin with and however long they are."""

from __future__ import annotations

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text_order import places_by_text

LETTERS = st.text(st.sampled_from("ab0\0é\U0001f600"), max_size=12)


@given(st.sampled_from(["", "B00", "https://shop.example/", "é"]), st.lists(LETTERS, max_size=40), st.integers(0, 3))
def test_places_are_those_of_the_sorted_bytes(start, texts, cut):
    """cut: the series may be part of a longer one."""
    texts = [start + text for text in texts]
    places = places_by_text(pl.Series([*"x" * cut, *texts], dtype=pl.String)[cut:])
    assert sorted(places.tolist()) == list(range(len(texts)))
    assert [texts[place].encode() for place in places] == sorted(text.encode() for text in texts)
