"""Texts are tokenised some at a time, so that memory is bounded, and whoever kills the tokenizer is among few."""

from __future__ import annotations

import numpy as np

from item_tower import embed
from item_tower.embed import EmbedConfig, embed_texts, tokenise_safely

TEXTS = [f"red {n} " + "blue " * (n % 7) for n in range(40)]


def test_pieces_are_bounded_and_make_no_difference(make_encoder, monkeypatch):
    encoder = make_encoder("bert")
    whole = encoder.tokenise(TEXTS)
    monkeypatch.setattr(embed, "_PIECE_TEXTS", 8)
    monkeypatch.setattr(embed, "_PIECE_CHARACTERS", 150)
    told: list[list[int]] = []
    tokens = tokenise_safely(encoder, TEXTS, {}, tokenising=told.append)
    assert tokens.input_ids == whole.input_ids
    assert np.array_equal(tokens.truncated, whole.truncated)
    assert [row for rows in told for row in rows] == list(range(40))
    assert told[-1] == []
    assert max(map(len, told)) <= 8
    assert max(sum(len(TEXTS[row]) for row in rows) for rows in told) <= 150
    assert len(told) > 6
    long = tokenise_safely(encoder, ["red " * 100, "blue"], {})  # one longer than a piece is a piece
    assert long.truncated.tolist() == [True, False]


def test_suspects_are_tokenised_by_themselves_and_the_dead_not_at_all(make_encoder):
    encoder = make_encoder("bert")
    told: list[list[int]] = []
    found = embed_texts(
        encoder,
        TEXTS,
        EmbedConfig(),
        suspects=[[3, 4], [7, 8]],
        failed={8: "died", 11: "died"},
        tokenising=told.append,
    )
    assert told == [[3, 4], [7], [row for row in range(40) if row not in (3, 4, 7, 8, 11)], []]
    assert found.failed == {8: "died", 11: "died"}
    assert len(found.rows) == 38
