"""The embedding step of the batch job: an Arrow table of texts in, an Arrow table of vectors out.

Texts that cannot be embedded are found by halving their batch; they come back by name, the others as vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from item_tower.cpu import in_streams
from item_tower.decoders.packed import Packing
from item_tower.encoder import ItemEncoder, TokenisedTexts
from schemas import tables

_PIECE_TEXTS, _PIECE_CHARACTERS = 1_024, 1 << 20  # tokenised at once


class EmbedConfig(BaseModel):
    """How the catalog is embedded. Only ``output_dtype`` changes a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_budget: int | None = Field(default=None, gt=0)
    """Tokens of one forward pass, padding included; by default 65,536 on a GPU, and 1,536 on a CPU, whose caches are
    small and which computes a pass a thread."""
    packing: Packing = "auto"
    """Texts of a decoder in one row without padding (``packed``), or padded; ``auto``: packed on a GPU."""
    compile: bool = False
    """``torch.compile`` the layers: on a GPU 1.4 times as fast with a billion weights; the first batch takes half a
    minute more. On a CPU in place of packed weights, which are faster."""
    window: int = Field(default=16_384, gt=0)
    """Texts handed to a worker at once and written to one file; they are sorted by length within it."""
    output_dtype: Literal["float16", "float32"] = "float16"
    workers: int | None = Field(default=None, gt=0)
    """Ray actors, each with a copy of the model; by default one a GPU, else one for the machine."""
    commit_texts: int = Field(default=131_072, gt=0)
    """A killed run loses at most so many finished texts."""
    max_share: float = Field(default=0.5, gt=0, le=1)
    """A larger share of a catalog that has a snapshot is not embedded again without ``--allow-full``."""
    full_from: int = Field(default=10_000, ge=0)
    """Up to so many texts are embedded without that question."""
    retry_failed: bool = False
    """Try again the texts that failed in earlier runs."""

    def tokens_at_once(self, device: torch.device) -> int:
        """``token_budget``, or its default for the device."""
        return self.token_budget or (65_536 if device.type == "cuda" else 1_536)


@dataclass
class Embedded:
    """What became of some texts. Row numbers are those of the texts handed in.

    vectors: [n, D] in the output dtype, of ``rows`` [n]; n_tokens int32 [n]; truncated bool [n]; padded: tokens
    computed, padding included; failed: row -> reason.
    """

    vectors: NDArray[np.floating]
    rows: NDArray[np.int64]
    n_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    padded: int
    failed: dict[int, str] = field(default_factory=dict)


@torch.inference_mode()
def encode_texts(
    encoder: ItemEncoder, texts: list[str], token_budget: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Vectors [N, D] float32, tokens per text [N] int64, and whether each was truncated [N] bool."""
    if not texts:
        empty = np.zeros((0, encoder.dim), dtype=np.float32)
        return empty, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    encoder.eval()
    tokens = encoder.tokenise(texts)
    vectors = encoder.encode_ids(tokens.input_ids, token_budget)
    return vectors.cpu().numpy(), tokens.lengths, tokens.truncated


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]


def _unusable(vectors: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)


def _pieces(texts: list[str], rows: list[int]) -> Iterator[list[int]]:
    """Rows in order, some at a time: a tokenizer keeps 34 bytes for each of text, cut off or not, till its end."""
    piece: list[int] = []
    size = 0
    for row in rows:
        if piece and (len(piece) == _PIECE_TEXTS or size + len(texts[row]) > _PIECE_CHARACTERS):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += len(texts[row])
    if piece:
        yield piece


def tokenise_safely(
    encoder: ItemEncoder,
    texts: list[str],
    failed: dict[int, str],
    groups: Sequence[list[int]] = (),
    tokenising: Callable[[list[int]], None] = lambda rows: None,
) -> TokenisedTexts:
    """As ``encoder.tokenise``, some at a time; texts on which it raises get no tokens and a line in ``failed``, those
    that are in it already are not tried. groups, tokenising: see ``embed_texts``."""
    found: list[list[int]] = [[] for _ in texts]
    truncated = np.zeros(len(texts), dtype=bool)

    def half(rows: list[int]) -> None:
        try:
            tokens = encoder.tokenise([texts[row] for row in rows])
        except Exception as error:  # whatever a tokenizer raises, it must not stop the other texts
            if len(rows) == 1:
                failed[rows[0]] = _reason(error)
                return
            middle = len(rows) // 2
            half(rows[:middle])
            half(rows[middle:])
            return
        truncated[rows] = tokens.truncated
        for row, ids in zip(rows, tokens.input_ids, strict=True):
            found[row] = ids

    left_out = {row for group in groups for row in group} | set(failed)
    rest = [row for row in range(len(texts)) if row not in left_out]
    for rows in (*groups, *_pieces(texts, rest)):
        tokenising(rows)
        half(rows)
    tokenising([])
    return TokenisedTexts(found, truncated)


@torch.inference_mode()
def embed_texts(
    encoder: ItemEncoder,
    texts: list[str],
    config: EmbedConfig,
    *,
    suspects: list[list[int]] | None = None,
    failed: dict[int, str] | None = None,
    tokenising: Callable[[list[int]], None] = lambda rows: None,
    attempt: Callable[[list[int], int], None] = lambda rows, stream: None,
) -> Embedded:
    """Embed texts in length-sorted batches, leaving out and naming those that fail twice.

    suspects: groups of rows to be embedded by themselves and first, since a worker died over them; failed: rows
    not to be tried, with the reason; ``tokenising`` is told the rows before they are tokenised, and none at the end;
    ``attempt`` is told the rows of every batch before it is computed, and its stream (see ``in_streams``), whose
    batch before it is done; suspects are alone, in stream 0. A row whose model call raises, or whose vector is not
    finite in ``output_dtype`` or is zero, fails once in its batch and once alone.
    """
    encoder.eval()
    failed = dict(failed or {})
    groups = [[row for row in group if row not in failed] for group in suspects or []]
    tokens = tokenise_safely(encoder, texts, failed, [group for group in groups if group], tokenising)
    lengths = tokens.lengths
    stored = np.zeros((len(texts), encoder.dim), dtype=np.dtype(config.output_dtype).newbyteorder("<"))
    padded: list[int] = []

    def embed(rows: list[int], stream: int = 0) -> None:
        attempt(rows, stream)
        padded.append(encoder.computed(lengths[rows]))
        reason = None
        try:
            found = encoder.encode([tokens.input_ids[row] for row in rows]).cpu().numpy()
        except Exception as error:  # any failure of a model on a text: halve until the text is found
            reason = _reason(error)  # the error itself keeps what the pass had in memory, which may be why it failed
        if reason is not None:
            if len(rows) == 1:
                failed[rows[0]] = reason
                return
            middle = len(rows) // 2
            embed(rows[:middle], stream)
            embed(rows[middle:], stream)
            return
        with np.errstate(over="ignore"):
            stored[rows] = found
        bad = _unusable(stored[rows])
        if len(rows) > 1:
            for row in np.asarray(rows)[bad].tolist():
                embed([row], stream)
        elif bad.any():
            failed[rows[0]] = f"its vector is zero or not finite in {config.output_dtype}"

    groups = [[row for row in group if row not in failed] for group in groups]
    apart = {row for group in groups for row in group} | set(failed)
    rest = np.array([row for row in range(len(texts)) if row not in apart], dtype=np.int64)
    for group in groups:
        if group:
            embed(group)
    batches = encoder.batches(lengths[rest], config.tokens_at_once(encoder.device))
    in_streams(encoder.device, embed, [rest[batch].tolist() for batch in batches])
    rows = np.array([row for row in range(len(texts)) if row not in failed], dtype=np.int64)
    return Embedded(stored[rows], rows, lengths[rows].astype(np.int32), tokens.truncated[rows], sum(padded), failed)


def as_table(keys: pa.ChunkedArray | pa.Array, result: Embedded) -> pa.Table:
    """key, embedding, n_tokens, truncated of the rows that have a vector; keys: of all texts handed in.

    embedding: the little-endian bytes of D values of the output dtype.
    """
    stored = np.ascontiguousarray(result.vectors)
    width = stored.shape[1] * stored.itemsize
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(stored), [None, pa.py_buffer(stored)])
    return pa.table(
        {
            tables.KEY: keys.take(pa.array(result.rows)).cast(pa.binary()),
            tables.EMBEDDING: fixed.cast(pa.binary()),
            tables.N_TOKENS: pa.array(result.n_tokens, pa.int32()),
            tables.TRUNCATED: pa.array(result.truncated, pa.bool_()),
        }
    )
