"""An item row becomes the text that the Item LLM reads, and that text's content key."""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from schemas import tables
from schemas.errors import ConfigError, DataError
from schemas.hashing import hash_texts

# Part of the fingerprint. Any change to what render() returns for any row needs a new number here;
# tests/test_item_tower_prompt.py holds the golden texts.
RENDER_VERSION = 2
# white space of every kind, control characters, the byte order mark
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ufeff]+")


class TemplateConfig(BaseModel):
    """How an item's columns become text (DESIGN 5). The defaults follow the paper's prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = "Compress the following sentence into embedding: "
    fields: tuple[str, ...] = Field(default=("title",), min_length=1)
    """Item columns, in the order in which they are written."""
    separator: str = ", "
    """Between fields."""
    style: Literal["clean", "reference"] = "clean"
    """``reference`` reproduces the text of the paper's code byte for byte: cells as they are, nothing between fields,
    an empty cell and one that reads "nan" left out. With a decoder its token ids are the official ones too: those of
    the whole text cut to ``encoder.max_length``, then [ITEM]."""
    empty_text: Literal["error", "quarantine"] = "error"
    """An item all of whose fields are empty stops the job, or is left out, counted."""


def clean_text(text: str) -> str:
    """A text as the Item LLM reads it: HTML entities resolved once, Unicode in composed form (NFC), control
    characters and runs of white space as one space, none at the ends.
    """
    if text.isascii() and text.isprintable() and "&" not in text and "  " not in text:
        return text.strip()  # most texts
    return _BLANKS.sub(" ", unicodedata.normalize("NFC", html.unescape(text))).strip()


def _value_text(value: Any) -> str:
    """One cell as text (``clean_text``): lists are joined by commas, nothing is the empty string."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(text for text in map(_value_text, value) if text)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = clean_text(str(value))
    return "" if text == "nan" else text


def render(items: pa.Table, template: TemplateConfig) -> list[str]:
    """The text of each row, "<prompt>key: value, key: value"; the empty string where no field has text.

    Raises ConfigError when a field is not a column of ``items``.
    """
    usable = [name for name in items.column_names if name not in tables.RESERVED_ITEM_COLUMNS]
    for field in template.fields:
        if field not in usable:
            raise ConfigError(
                f"template.fields names {field!r}, the catalog has {usable}; "
                f"set template.fields to columns of the catalog"
            )
    raw = template.style == "reference"
    as_text, separator = (_raw_text, "") if raw else (_value_text, template.separator)
    columns = [[as_text(value) for value in items.column(field).to_pylist()] for field in template.fields]
    texts = []
    for values in zip(*columns, strict=True):
        parts = [f"{field}: {value}" for field, value in zip(template.fields, values, strict=True) if value]
        texts.append(template.prompt + separator.join(parts) if parts else "")
    return texts


def _raw_text(value: Any) -> str:
    """One cell as the official code writes it."""
    return str(value) if value and str(value) != "nan" else ""


def require_text(empty: list[str], total: int, template: TemplateConfig) -> None:
    """Raise DataError under the policy ``error`` when items (ids) have no text, naming the first ones."""
    if empty and template.empty_text == "error":
        raise DataError(
            f"{len(empty)} of {total} items have no text in {list(template.fields)}, first "
            f'{empty[:3]}; give them text or set template.empty_text = "quarantine"'
        )


def apply_empty_policy(item_ids: list[str], texts: list[str], template: TemplateConfig) -> list[int]:
    """Row numbers of the items that have text, in order. Raises DataError as ``require_text``."""
    require_text([item for item, text in zip(item_ids, texts, strict=True) if not text], len(texts), template)
    return [row for row, text in enumerate(texts) if text]


def content_keys(texts: list[str]) -> list[bytes]:
    """The content key of each rendered text: BLAKE2b-128 over the text; a list of 16-byte values."""
    return [hash_texts(text) for text in texts]
