"""The same computation on a CPU in less time: packed weights, GELU within the product before it, plain attention.

For inference only, and after the fingerprint was taken: the weights change their form. Measured with MiniLM and
product titles on two cores (`hllm bench embed`): PyTorch's flash attention is slow on rows of some 20 tokens,
autocast casts and reorders every weight anew for each batch, and what goes from layer to layer to and from float32;
in float32 a product first copies its bias, which with AVX2 costs less than oneDNN's products instead of MKL's. A
batch a thread keeps what is not a product in the core's own cache, and no thread waits for another.

Shapes: B texts, h heads, T tokens, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from item_tower.decoders.threads import single_threads
from item_tower.encoder import ItemEncoder

T = TypeVar("T")
_NAME = "hllm_short"
_REGISTER = 16  # float32 numbers of AVX-512
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
_AVX512 = _CAPABILITY.startswith("AVX512")
_AMX = torch.cpu._is_amx_tile_supported()


def _short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """query, key, value: [B, h, T, d]; attention_mask: [B, 1, T, T], bool or additive. Returns [B, T, h, d].

    Whatever is not self-attention with as many keys as queries, as wide as values, and long texts, go to ``sdpa``.
    """
    causal = attention_mask is None and (getattr(module, "is_causal", False) if is_causal is None else is_causal)
    length = query.shape[2]
    if not causal and not dropout and query.shape == key.shape == value.shape:
        if _takes_products(length, query.dtype):
            return _by_products(query, key, value, attention_mask, scaling), None
        key, value, attention_mask = _padded(key, value, attention_mask)
        is_causal = False
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **rest
    )


def _takes_products(length: int, dtype: torch.dtype) -> bool:
    """Whether plain products are faster than PyTorch's flash attention: on all short texts, but with AVX-512 (in
    bfloat16 with AMX) on rows of up to three registers, whole ones from two on left out."""
    if not (_AMX if dtype == torch.bfloat16 else _AVX512):
        return length <= 8 * _REGISTER
    return length <= 3 * _REGISTER and not (length % _REGISTER == 0 and length >= 2 * _REGISTER)


def _padded(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values up to whole registers, masked: flash attention takes what is over them number by number."""
    batch, heads, length, width = key.shape
    more = -length % _REGISTER
    if not more or not _AVX512:
        return key, value, mask
    both = key.new_zeros(2, batch, length + more, heads, width)
    both[0, :, :length], both[1, :, :length] = key.transpose(1, 2), value.transpose(1, 2)
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool).expand(batch, 1, length, length)
    mask = F.pad(mask, (0, more), value=False if mask.dtype == torch.bool else float("-inf"))
    return both[0].transpose(1, 2), both[1].transpose(1, 2), mask


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scaled = torch.mul(query, scaling, out=query.new_empty(query.shape))  # contiguous in one pass
    scores = torch.matmul(scaled, key.contiguous().transpose(-1, -2))
    if mask is not None:
        # not -inf: a padded query sees no key in a window, and NaN would go on to the texts' own tokens
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill_(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = _softmax(scores).to(value.dtype)
    return torch.matmul(weights, value.contiguous()).transpose(1, 2).contiguous()


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32: [..., T]. PyTorch's takes rows of less than a vector register number by
    number, and those of bfloat16 too unless they are whole registers: three to five times as long."""
    scores, length = scores.float(), scores.shape[-1]
    if length >= _REGISTER:
        return torch.softmax(scores, dim=-1)
    padded = F.pad(scores, (0, _REGISTER - length), value=float("-inf"))
    return torch.softmax(padded, dim=-1)[..., :length]


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN wants it, with the GELU after it where there is one; input of any
    dtype, output in that of the weight."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: str | None = None) -> None:
        """gelu: None, or how it is approximated: ``none`` or ``tanh``."""
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), 4096)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.after: tuple[str, list[float], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, *self.after)


def _gelu(module: nn.Module) -> str | None:
    """How the activation after ``module.dense`` (BERT kind) approximates a GELU; None where it is something else."""
    activation = getattr(module, "intermediate_act_fn", None)
    if activation is None or type(getattr(module, "dense", None)) is not nn.Linear:
        return None
    probe = torch.linspace(-30, 30, 601)  # some are cut off at 10
    ways = (way for way in ("none", "tanh") if torch.equal(activation(probe), F.gelu(probe, approximate=way)))
    return next(ways, None)


def _pack(module: nn.Module, dtype: torch.dtype) -> list[tuple[nn.Module, str, Any]]:
    """Pack all linear layers; returns what was replaced, as (module, name, child)."""
    gelu = _gelu(module)
    replaced: list[tuple[nn.Module, str, Any]] = []
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            replaced.append((module, name, child))
            setattr(module, name, PackedLinear(child, dtype, gelu if name == "dense" else None))
        else:
            replaced += _pack(child, dtype)
    if gelu is not None:
        replaced.append((module, "intermediate_act_fn", module.intermediate_act_fn))
        module.intermediate_act_fn = nn.Identity()
    return replaced


def _runs(encoder: ItemEncoder) -> bool:
    """Whether the model computes a text; some read their linear layers' weights themselves (Mamba, RWKV)."""
    try:
        with torch.inference_mode():
            encoder.encode(encoder.tokenise(["a text"]).input_ids)
        return True
    except Exception:  # whatever a model raises; if it does so unpacked too, the texts' own run says it
        return False


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``PackedLinear`` works there: on a CPU with oneDNN, in bfloat16 with AVX-512 only."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``speed_up`` packs weights there: where ``can_pack`` says so, but for float32 with AVX2, where MKL's
    products and a GELU of its own take less time."""
    return can_pack(device, dtype) and not (dtype == torch.float32 and _CAPABILITY == "AVX2")


def halve(encoder: ItemEncoder) -> None:
    """Keep the model's weights, and what goes from layer to layer, in the compute dtype: autocast reads and writes
    the latter in float32, between products that take hardly longer.

    Buffers stay as they are: a rotary frequency in bfloat16 is another position from some hundred tokens on.
    """
    encoder.packed  # noqa: B018  its trial compares in float32
    dtype = getattr(torch, encoder.config.compute_dtype)
    for weight in encoder.model.parameters():
        weight.data = weight.data.to(dtype)


def speed_up(encoder: ItemEncoder) -> None:
    """Change an encoder in place, for inference alone: half weights on a GPU; on a CPU plain attention, and packed
    and half weights where ``packs`` says so. What a CPU would compute in bfloat16 and cannot pack stays as it is.
    """
    dtype = getattr(torch, encoder.config.compute_dtype)
    if encoder.device.type == "cuda":
        halve(encoder)
    packing = packs(encoder.device, dtype)
    if encoder.device.type != "cpu" or not (packing or dtype == torch.float32):
        return
    if not encoder.packed and encoder.model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _short_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        encoder.model.set_attn_implementation(_NAME)
    if packing:
        replaced = _pack(encoder.model, dtype)
        if _runs(encoder):
            halve(encoder)
            return
        for module, name, child in replaced:
            if not isinstance(child, nn.Module):  # an activation may be a plain function
                delattr(module, name)
            setattr(module, name, child)


def in_streams(device: torch.device, work: Callable[[T, int], object], batches: Iterable[T]) -> None:
    """Call ``work(batch, stream)`` for each: on a CPU as many at once as torch has threads, each computed by one
    thread; elsewhere one after the other, in stream 0. In inference mode.

    Raises what ``work`` raises, when the batches that have begun are done; the others are not begun.
    """
    left = iter(list(batches))

    @torch.inference_mode()
    def stream(number: int) -> None:
        try:
            for batch in left:
                work(batch, number)
        finally:
            list(left)  # the other streams go on to no other either

    if device.type != "cpu":
        stream(0)
        return
    with single_threads() as (pool, count):
        try:
            list(pool.map(stream, range(count)))
        finally:
            list(left)
