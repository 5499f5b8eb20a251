"""Whether a model heeds its attention mask: a text's vector must not depend on the texts beside it (DESIGN 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from schemas.errors import ConfigError

_TEXT = "Compress: a text, and what is padded"
_TOLERANCE = 1e-4  # of the largest value; 49 kinds of models differ by less than 1e-6, four by more than 1e-3


@torch.inference_mode()
def require_isolated(model: nn.Module, tokenizer: Any, name: str, max_length: int) -> None:
    """Compare a short text alone with the same one padded, by a model as it was loaded, on the CPU.

    name: of the model, for the message. Raises ConfigError where they differ.
    """
    least = tokenizer.num_special_tokens_to_add() + 1
    ids = tokenizer(_TEXT, truncation=True, max_length=max(least, max_length // 2))["input_ids"]
    padded = ids + [tokenizer.pad_token_id or 0] * min(len(ids), max_length - len(ids))
    hidden = []
    for row in (ids, padded):
        mask = [1] * len(ids) + [0] * (len(row) - len(ids))
        given = {"input_ids": torch.tensor([row]), "attention_mask": torch.tensor([mask])}
        hidden.append(model(**given).last_hidden_state[0, : len(ids)])
    alone, beside = hidden
    if (alone - beside).abs().max() > _TOLERANCE * alone.abs().max():  # never where they are NaN, a matter of gates
        raise ConfigError(
            f"encoder.model = {name!r}: it does not heed its attention mask, so a text's vector would depend on the "
            f"longer texts beside it; take another model"
        )
