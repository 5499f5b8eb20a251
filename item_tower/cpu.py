"""The same computation on a CPU in less time: packed bfloat16 weights, and attention by plain products.

For inference only, and after the fingerprint was taken: the weights change their form. Measured with MiniLM and
product titles on two cores (`hllm bench embed`): PyTorch's flash attention is slow on rows of some 20 tokens, and
autocast casts and reorders every weight anew for each batch.

Shapes: B texts, h heads, T tokens, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from item_tower.encoder import ItemEncoder

_NAME = "hllm_short"
_SHORT = 128  # tokens up to which the products are faster


def _short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """query, key, value: [B, h, T, d]; attention_mask: [B, 1, T, T], bool or additive. Returns [B, T, h, d].

    Whatever is not short self-attention with as many keys as queries goes to ``sdpa``.
    """
    causal = attention_mask is None and getattr(module, "is_causal", False)
    if causal or dropout or query.shape != key.shape or query.shape[2] > _SHORT:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill_(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    with torch.autocast(query.device.type, enabled=False):  # it would compute the softmax in float32
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


class PackedLinear(nn.Module):
    """A linear layer whose bfloat16 weight lies as oneDNN wants it; input of any dtype, output bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), 4096)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], "")


def _pack(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)


def speed_up(encoder: ItemEncoder) -> None:
    """Change an encoder on a CPU with AVX-512 in place, for inference alone; elsewhere, or in float32, do nothing."""
    if encoder.device.type != "cpu" or encoder.config.compute_dtype != "bfloat16":
        return
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # oneDNN refuses to pack where there is no AVX-512
        return
    if encoder.model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _short_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        encoder.model.set_attn_implementation(_NAME)
    _pack(encoder.model)
