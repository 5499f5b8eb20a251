"""The embedding step of the batch job: an Arrow table of texts in, an Arrow table of vectors out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from item_tower.encoder import ItemEncoder
from schemas import tables
from schemas.errors import EmbeddingError


class EmbedConfig(BaseModel):
    """How the catalog is embedded. Only ``output_dtype`` changes a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_budget: int = Field(default=16_384, gt=0)
    """Padded tokens of one forward pass."""
    window: int = Field(default=8_192, gt=0)
    """Texts handed to a worker at once; they are sorted by length within it."""
    output_dtype: Literal["float16", "float32"] = "float16"
    workers: int | None = Field(default=None, gt=0)
    """Ray actors, each with a copy of the model; by default one a GPU, else one for the machine."""


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


def check_vectors(vectors: NDArray[np.floating], texts: list[str]) -> None:
    """Raise EmbeddingError, quoting the first bad text, for NaN, infinity, overflow or a zero vector."""
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise EmbeddingError(
            f"{int(bad.sum())} of {len(texts)} vectors are not finite in {vectors.dtype} or are zero, first for "
            f'the text {texts[row][:80]!r}; check the item tower, or set embed.output_dtype = "float32"'
        )


def embed_table(encoder: ItemEncoder, texts: pa.Table, config: EmbedConfig) -> pa.Table:
    """texts: columns key (binary), text (string). Returns key, embedding, n_tokens, truncated.

    embedding: little-endian bytes of D values of ``output_dtype``. Raises EmbeddingError as ``check_vectors``.
    """
    rows = texts.column(tables.TEXT).to_pylist()
    vectors, n_tokens, truncated = encode_texts(encoder, rows, config.token_budget)
    stored = vectors.astype(np.dtype(config.output_dtype).newbyteorder("<"))
    check_vectors(stored, rows)
    width = stored.shape[1] * stored.itemsize
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(stored)])
    return pa.table(
        {
            tables.KEY: texts.column(tables.KEY).cast(pa.binary()),
            tables.EMBEDDING: fixed.cast(pa.binary()),
            tables.N_TOKENS: pa.array(n_tokens, pa.int32()),
            tables.TRUNCATED: pa.array(truncated, pa.bool_()),
        }
    )
