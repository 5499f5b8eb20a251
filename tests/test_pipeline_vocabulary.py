"""Texts as codes: told apart whatever their hashes, in parts, with a table that grows."""

from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from pipeline.vocabulary import Vocabulary


@given(
    parts=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=60), max_size=4),
    alike=st.integers(1, 31),
    first=st.booleans(),
)
def test_texts_of_which_one_hash_agrees_have_codes_of_their_own(parts, alike, first):
    vocabulary, seen = Vocabulary(), {}
    for part in parts:
        texts, before = np.array(part, dtype=np.uint64), len(vocabulary)
        hashes, others = (texts % alike, texts) if first else (texts, texts % alike | texts << 32)
        slots, new = vocabulary._find(hashes << 1 | 1, others)
        codes = vocabulary._codes[slots]
        assert [seen.setdefault(text, code) for text, code in zip(part, codes, strict=True)] == codes.tolist()
        assert codes[new].tolist() == list(range(before, len(vocabulary)))
    assert sorted(seen.values()) == list(range(len(vocabulary)))


def test_a_growing_vocabulary_keeps_each_text_once_by_its_code():
    vocabulary, rng = Vocabulary(), np.random.default_rng(0)
    texts = [
        pl.Series([f"number {number} of many" for number in (rng.random(20_000) ** 2 * 60_000).astype(int)]),
        pl.Series(["", "é", "a\0b", "a", ""]),
        pl.Series([f"{number}" for number in range(30_000)]),
    ] * 2
    codes = [vocabulary.encode(part) for part in texts]
    assert len(vocabulary) == len(vocabulary.texts) == pl.concat(texts).n_unique()
    assert all(vocabulary.texts.gather(found).equals(part) for found, part in zip(codes, texts, strict=True))
    assert vocabulary.encode(pl.Series([], dtype=pl.String)).tolist() == []


def test_slots_keep_their_codes_while_the_table_grows():
    vocabulary = Vocabulary()
    texts = [pl.Series([f"{number}" for number in range(start, start + 3_000)]) for start in range(0, 30_000, 1_000)]
    found = [vocabulary.look_up(part) for part in texts]
    assert len({id(codes) for _, codes in found}) > 3
    assert all(
        vocabulary.texts.gather(codes.take(slots)).equals(part)
        for (slots, codes), part in zip(found, texts, strict=True)
    )
