"""What reads the sequence: causal networks from [B, T, H] to [B, T, H].

Shapes: B histories, T positions, H hidden width. Batches are right-padded, so a causal mask is all that is
needed: no real position sees a padded one.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel

from item_tower.decoders.packed import Packed, Packing, takes_packed
from schemas.errors import ConfigError
from user_tower.times import TIME_BUCKETS, time_buckets


class Backbone(Protocol):
    """positions: int64 [B, T], right-aligned (see ``UserTower``); times: int64 [B, T], milliseconds. Padded positions
    hold any value."""

    def __call__(self, x_BTH: Tensor, positions_BT: Tensor, times_BT: Tensor) -> Tensor: ...


def _layer(backbone: SASRec | HSTU, block: nn.Module, *inputs: Tensor) -> Tensor:
    """The block of these inputs; under ``checkpointing`` it is computed again in the backward pass."""
    if backbone.checkpointing and torch.is_grad_enabled():
        found: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return found
    return block(*inputs)


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

    checkpointing = False

    def __init__(self, hidden: int, layers: int, heads: int, dropout: float, history: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(history, hidden)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x_BTH: Tensor, positions_BT: Tensor, times_BT: Tensor) -> Tensor:
        """x_BTH: inputs; positions_BT: int64, 0 to history - 1; times are not read. Returns [B, T, H]."""
        x_BTH = self.drop(x_BTH + self.positions(positions_BT))
        for block in self.blocks:
            x_BTH = _layer(self, block, x_BTH)
        return self.norm(x_BTH)


class _HSTUBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float, history: int) -> None:
        super().__init__()
        self.heads, self.history = heads, history
        self.norm = nn.LayerNorm(hidden)
        self.uvqk = nn.Linear(hidden, 4 * hidden)
        self.mixed_norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(dropout)
        self.position_bias = nn.Parameter(torch.randn(history) * 0.02)
        self.time_bias = nn.Parameter(torch.randn(TIME_BUCKETS) * 0.02)

    def forward(self, x_BTH: Tensor, apart_TT: Tensor, buckets_BTT: Tensor, causal_TT: Tensor) -> Tensor:
        B, T, H = x_BTH.shape
        u, v, q, k = F.silu(self.uvqk(self.norm(x_BTH))).chunk(4, dim=-1)
        q, k, v_heads = (part.view(B, T, self.heads, H // self.heads).transpose(1, 2) for part in (q, k, v))
        bias_BTT = self.position_bias[apart_TT] + self.time_bias[buckets_BTT]
        weights = F.silu(q @ k.transpose(-1, -2) + bias_BTT[:, None]) / self.history
        mixed = (weights.masked_fill(~causal_TT, 0) @ v_heads).transpose(1, 2).reshape(B, T, H)
        return x_BTH + self.out(self.drop(u * self.mixed_norm(mixed)))


class HSTU(nn.Module):
    """Pointwise attention with SiLU, gated, with relative position and time bias (Zhai et al. 2024, eq. 1 to 4).

    The bias of an earlier event j at event i counts i - j places, and log2 of the seconds between the two; the time
    of the event to come is not read.
    """

    checkpointing = False

    def __init__(self, hidden: int, layers: int, heads: int, dropout: float, history: int) -> None:
        super().__init__()
        self.history = history
        self.positions = nn.Embedding(history, hidden)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_HSTUBlock(hidden, heads, dropout, history) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x_BTH: Tensor, positions_BT: Tensor, times_BT: Tensor) -> Tensor:
        """x_BTH: inputs; positions_BT: int64, 0 to history - 1; times_BT: milliseconds. Returns [B, T, H]."""
        steps = torch.arange(x_BTH.shape[1], device=x_BTH.device)
        between_TT = steps[:, None] - steps
        buckets_BTT = time_buckets(times_BT[:, :, None] - times_BT[:, None, :])
        x_BTH = self.drop(x_BTH + self.positions(positions_BT))
        for block in self.blocks:
            x_BTH = _layer(self, block, x_BTH, between_TT.clamp(0, self.history - 1), buckets_BTT, between_TT >= 0)
        return self.norm(x_BTH)


class CausalLM(nn.Module):
    """Any Hugging Face causal language model, fed by inputs_embeds; pretrained or small from a config."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.model.config.use_cache = False
        self.packing: Packing = "auto"  # how histories share a forward pass; decides no figure

    @property
    def packed(self) -> bool:
        """Whether histories go through the model without padding. Raises ConfigError where they must and cannot."""
        return takes_packed(self.model, self.packing, next(self.parameters()).device)

    def forward_packed(self, x_PH: Tensor, row: Packed) -> Tensor:
        """x_PH: the inputs of all histories, one after the other; row: where each lies. Returns [P, H]."""
        states: Tensor = self.model(inputs_embeds=x_PH[None], **row.arguments()).last_hidden_state[0]
        return states

    def forward(self, x_BTH: Tensor, positions_BT: Tensor, times_BT: Tensor) -> Tensor:
        """x_BTH: inputs; positions_BT: int64 position ids; times are not read. Returns [B, T, H]."""
        return self.model(inputs_embeds=x_BTH, position_ids=positions_BT).last_hidden_state

    def architecture(self) -> dict[str, Any]:
        """The model's Hugging Face configuration, from which ``make_backbone`` builds it without its weights."""
        architecture: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        return architecture


def make_backbone(
    kind: Literal["sasrec", "hstu", "llm"],
    *,
    hidden: int,
    layers: int,
    heads: int,
    dropout: float,
    history: int,
    pretrained: str | None,
    architecture: dict[str, Any] | None = None,
) -> tuple[nn.Module, int]:
    """The backbone and its hidden width (that of the pretrained model where one is named).

    architecture: of a saved ``llm`` backbone, its Hugging Face configuration; then nothing is loaded. Raises
    ConfigError when the width is not a multiple of the heads, or the model cannot be loaded.
    """
    if hidden % heads:
        raise ConfigError(f"user_tower.hidden = {hidden} is not a multiple of user_tower.heads = {heads}")
    if kind != "llm":
        return {"sasrec": SASRec, "hstu": HSTU}[kind](hidden, layers, heads, dropout, history), hidden
    if architecture is not None:
        model = AutoModel.from_config(AutoConfig.for_model(**architecture), dtype=torch.float32)
        return CausalLM(model), model.config.hidden_size
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
        model = AutoModel.from_pretrained(pretrained, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"user_tower.pretrained = {pretrained!r} cannot be loaded: {reason}") from error
    return CausalLM(model), model.config.hidden_size
