"""Golden texts: a change here needs a new RENDER_VERSION, since it changes every vector."""

from __future__ import annotations

import pyarrow as pa
import pytest

from item_tower.prompt import RENDER_VERSION, TemplateConfig, apply_empty_policy, content_keys, render
from schemas.errors import ConfigError, DataError

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "title": ["Toy Story", "  spaces  ", None, ""],
        "year": [1995.0, None, 2001.5, float("nan")],
        "tags": [["fun", "kids"], [], None, None],
        "available": [True, True, False, True],
    }
)


def test_golden_texts():
    assert RENDER_VERSION == 2
    template = TemplateConfig(fields=("title", "year", "tags"))
    assert render(ITEMS, template) == [
        "Compress the following sentence into embedding: title: Toy Story, year: 1995, tags: fun, kids",
        "Compress the following sentence into embedding: title: spaces",
        "Compress the following sentence into embedding: year: 2001.5",
        "",
    ]
    assert render(ITEMS, TemplateConfig(prompt="", fields=("year", "title"), separator="")) == [
        "year: 1995title: Toy Story",
        "title: spaces",
        "year: 2001.5",
        "",
    ]


def test_golden_texts_of_the_official_code():
    """By hand after REC/data/dataset: prompt, then "key: value" for each value that is true and does not read nan."""
    items = pa.table(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["  Toy &amp; Story\n", None, "nan", "0"],
            "tag": ["x", "y", "", None],
            "description": [None, "two\tlines", "z", "Cafe\u0301"],
        }
    )
    template = TemplateConfig(fields=("title", "tag", "description"), style="reference")
    prompt = "Compress the following sentence into embedding: "
    assert render(items, template) == [
        prompt + "title:   Toy &amp; Story\ntag: x",
        prompt + "tag: ydescription: two\tlines",
        prompt + "description: z",
        prompt + "title: 0description: Cafe\u0301",
    ]


DIRTY = {
    "AT&amp;T &#39;n&#39; more&nbsp;&lt;b&gt;": "AT&T 'n' more <b>",
    "&amp;amp; once": "&amp; once",  # resolved once: what was written twice stays as it was written
    "AT&T & co": "AT&T & co",
    "Cafe\u0301": "Caf\u00e9",  # NFC
    "\ufb01ne \u2160": "\ufb01ne \u2160",  # not NFKC: compatibility forms stay
    "one\x00two\x1bthree\x7ffour\x85five": "one two three four five",
    "  line\r\nbreak\ttab \u00a0 \u3000 wide  ": "line break tab wide",
    "\ufeffmark": "mark",
    "\u65e5\u672c \U0001f600": "\u65e5\u672c \U0001f600",
    "\x00\x01": "",
    "&#0;": "\ufffd",
}


@pytest.mark.parametrize("text", DIRTY)
def test_golden_texts_of_dirty_cells(text):
    (found,) = render(pa.table({"title": [text]}), TemplateConfig(prompt=""))
    assert found == (f"title: {DIRTY[text]}" if DIRTY[text] else "")


@pytest.mark.parametrize("field", ["missing", "item_id", "available"])
def test_an_unknown_field_is_named_with_the_columns_that_are_there(field):
    with pytest.raises(ConfigError, match=rf"names '{field}', the catalog has \['title', 'year', 'tags'\]"):
        render(ITEMS, TemplateConfig(fields=(field,)))


def test_empty_text_policies():
    ids, texts = ["a", "b", "c"], ["x", "", "y"]
    with pytest.raises(DataError, match=r"1 of 3 items have no text.*\['b'\].*empty_text"):
        apply_empty_policy(ids, texts, TemplateConfig())
    assert apply_empty_policy(ids, texts, TemplateConfig(empty_text="quarantine")) == [0, 2]


def test_keys_are_of_the_text_alone():
    first, second, other = content_keys(["x", "x", "y"])
    assert first == second != other
    assert len(first) == 16
