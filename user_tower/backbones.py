"""What reads the sequence: causal networks from [B, T, H] to [B, T, H].

Shapes: B histories, T positions, H hidden width. Batches are right-padded, so a causal mask is all that is
needed: no real position sees a padded one.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaModel

from schemas.errors import ConfigError


class Backbone(Protocol):
    """positions: int64 [B, T], right-aligned (see ``UserTower``); padded positions hold any value."""

    def __call__(self, x_BTH: Tensor, positions_BT: Tensor) -> Tensor: ...


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.feed_norm = nn.LayerNorm(hidden)
        self.feed = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTH: Tensor) -> Tensor:
        B, T, H = x_BTH.shape
        qkv = self.qkv(self.attention_norm(x_BTH)).view(B, T, 3, self.heads, H // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x_BTH = x_BTH + self.drop(self.out(mixed.transpose(1, 2).reshape(B, T, H)))
        return x_BTH + self.drop(self.feed(self.feed_norm(x_BTH)))


class SASRec(nn.Module):
    """Causal transformer with learned positions (Kang and McAuley 2018), in today's pre-norm form."""

    def __init__(self, hidden: int, layers: int, heads: int, dropout: float, history: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(history, hidden)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """x_BTH: inputs; positions_BT: int64, 0 to history - 1. Returns [B, T, H]."""
        x_BTH = self.drop(x_BTH + self.positions(positions_BT))
        for block in self.blocks:
            x_BTH = block(x_BTH)
        return self.norm(x_BTH)


class CausalLM(nn.Module):
    """Any Hugging Face causal language model, fed by inputs_embeds; pretrained or small from a config."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.model.config.use_cache = False

    def forward(self, x_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """x_BTH: inputs; positions_BT: int64 position ids. Returns [B, T, H]."""
        return self.model(inputs_embeds=x_BTH, position_ids=positions_BT).last_hidden_state


def make_backbone(
    kind: Literal["sasrec", "llm"],
    *,
    hidden: int,
    layers: int,
    heads: int,
    dropout: float,
    history: int,
    pretrained: str | None,
) -> tuple[nn.Module, int]:
    """The backbone and its hidden width (that of the pretrained model where one is named).

    Raises ConfigError when the width is not a multiple of the heads, or the model cannot be loaded.
    """
    if hidden % heads:
        raise ConfigError(f"user_tower.hidden = {hidden} is not a multiple of user_tower.heads = {heads}")
    if kind == "sasrec":
        return SASRec(hidden, layers, heads, dropout, history), hidden
    if pretrained is None:
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=history,
            attention_dropout=dropout,
            vocab_size=1,
        )
        return CausalLM(LlamaModel(config)), hidden
    try:
        model = AutoModel.from_pretrained(pretrained, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"user_tower.pretrained = {pretrained!r} cannot be loaded: {reason}") from error
    return CausalLM(model), model.config.hidden_size
