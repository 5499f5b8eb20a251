"""Several sequences in one row without padding, each attending to itself alone, positions counted for each.

transformers (5.23) finds packed rows by their position ids (``masking_utils.find_packed_sequence_indices``) and then
makes a block mask [P, P] for ``sdpa``, quadratic in the row: 4 GiB at 65,536 tokens. Only its flash-attention
path reads the ends of the sequences, given as ``FlashAttentionKwargs``. So one attention is registered here, which
reads the same keywords and takes the first of: flash-attn, ``torch.nn.attention.varlen``, or plain SDPA over the
sequences padded for the attention only, which is all that a CPU or float32 has.

Shapes: n sequences, P tokens of them all, T tokens of the longest, h heads, d width of a head, H hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from schemas.errors import ConfigError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    _VARLEN = frozenset[str]()
else:
    _VARLEN = frozenset(inspect.signature(varlen_attn).parameters)

Packing = Literal["auto", "padded", "packed"]
"""``auto``: packed on a GPU. On a CPU rows sorted by length have hardly any padding, and ``padded`` is faster."""

_NAME = "hllm_packed"
_REFUSED = "hllm_takes_no_packed_rows"  # of a model that was tried
_Kernel = Callable[..., Tensor]


class Packed(NamedTuple):
    """Where the sequences of a row lie.

    positions: int64 [1, P]; ends: int32 [n + 1], sequence i is ends[i] to ends[i + 1]; longest: T.
    """

    positions: Tensor
    ends: Tensor
    longest: int

    def arguments(self) -> dict[str, Any]:
        """What a decoder is called with beside its inputs; no cache."""
        names = {"cu_seq_lens_q": self.ends, "cu_seq_lens_k": self.ends}
        longest = {"max_length_q": self.longest, "max_length_k": self.longest}
        # a mask of four dimensions is taken as it is: no [P, P] is made, and the attention below does not look at it
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.ends.device)
        return {
            "position_ids": self.positions, "attention_mask": unread, "use_cache": False, **names, **longest
        }  # fmt: skip


def pack(lengths: NDArray[np.int64], device: torch.device, first: NDArray[np.int64] | None = None) -> Packed:
    """Lay out sequences of these lengths, at least 1 each; first: [n] position of each one's first token, or 0."""
    assert len(lengths)
    assert lengths.min() > 0
    ends = np.concatenate([[0], np.cumsum(lengths)])
    shift = -ends[:-1] if first is None else first - ends[:-1]
    positions = torch.from_numpy(np.arange(ends[-1]) + np.repeat(shift, lengths))
    where = torch.from_numpy(ends.astype(np.int32))
    return Packed(positions[None].to(device), where.to(device), int(lengths.max()))


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, dropout: float, window: int
) -> Tensor:
    """Any device and dtype: the sequences padded to [n, h, T, d]. A causal row sees no padding, which is zero."""
    steps = torch.arange(longest, device=query.device)
    real_nT = steps < ends.diff()[:, None]

    def unpacked(x_Phd: Tensor) -> Tensor:
        x_nThd = x_Phd.new_zeros(*real_nT.shape, *x_Phd.shape[1:])
        x_nThd[real_nT] = x_Phd
        return x_nThd.transpose(1, 2)

    apart_TT = steps[:, None] - steps
    band = None if window >= longest else (apart_TT >= 0) & (apart_TT < window)
    mixed = F.scaled_dot_product_attention(
        unpacked(query), unpacked(key), unpacked(value), attn_mask=band, is_causal=band is None,
        dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return mixed.transpose(1, 2)[real_nT]


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, dropout: float, window: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    left = -1 if window >= longest else window - 1
    mixed: Tensor = flash_attn_varlen_func(
        query, key, value, ends, ends, longest, longest,
        dropout_p=dropout, softmax_scale=scale, causal=True, window_size=(left, 0 if left >= 0 else -1),
    )  # fmt: skip
    return mixed


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, dropout: float, window: int
) -> Tensor:
    left = -1 if window >= longest else window - 1
    # 2.11 takes grouped heads without being told
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _VARLEN else {}
    mixed = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=(left, 0), **grouped
    )  # fmt: skip
    assert isinstance(mixed, Tensor)
    return mixed


_KERNELS: dict[str, _Kernel] = {
    "flash-attn": _flash_attention, "varlen": _varlen_attention, "padded": _padded_attention
}  # fmt: skip


@torch.compiler.assume_constant_result
def _fused(device: torch.device) -> str | None:
    """The kernel for half precision there, None where there is none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if is_flash_attn_2_available():
        return "flash-attn"
    return "varlen" if {"scale", "window_size"} <= _VARLEN else None


def kernel(device: torch.device, dtype: torch.dtype, width: int, dropout: float) -> str:
    """Which of ``_KERNELS`` is the fastest over packed rows for a head's width there; varlen_attn has no dropout."""
    found = _fused(device)
    half = dtype in (torch.float16, torch.bfloat16)
    if found is None or not half or width > 256 or (found == "varlen" and dropout > 0):
        return "padded"
    return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query: [1, h, P, d]; key, value: [1, h or fewer, P, d]. Returns [1, P, h, d]. Rows that are not packed go to
    ``sdpa``. Raises ValueError for what no kernel here computes."""
    ends, longest = rest.get("cu_seq_lens_q"), rest.get("max_length_q")
    if ends is None or longest is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
        )
        return found
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    if unknown or key.shape[-1] != value.shape[-1]:
        raise ValueError(f"packed attention knows no {unknown or 'values of another width than keys'}")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    # rotary embeddings leave float32 under autocast
    parts = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    chosen = _KERNELS[kernel(query.device, dtype, query.shape[-1], dropout)]
    return chosen(*parts, ends, longest, scale, dropout, sliding_window or longest)[None], None


@torch.no_grad()
def _isolates(model: Any) -> bool:
    """Whether two made-up sequences in one row get the states that each gets alone, with this model's code."""
    table = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, length, model.config.hidden_size, generator=generator) * 0.02 for length in (5, 3)]
    parts = [part.to(table.device, table.dtype) for part in parts]
    with torch.autocast(table.device.type, enabled=False):
        alone = [model(inputs_embeds=part, use_cache=False).last_hidden_state for part in parts]
        row = pack(np.array([5, 3]), table.device)
        both = model(inputs_embeds=torch.cat(parts, dim=1), **row.arguments()).last_hidden_state
    expected = torch.cat(alone, dim=1)
    tolerance = 1e-4 if table.dtype == torch.float32 else 3e-2
    return bool((both - expected).abs().max() <= tolerance * expected.abs().max())


def allow_packing(model: Any) -> bool:
    """Make a transformers decoder take packed rows beside padded ones; False, and nothing changed, where it cannot.

    It cannot where the attention is not ``sdpa`` (soft-capped scores), or where a short trial with two sequences
    shows that one sees the other (recurrent layers) or that positions are counted through. Tried once a model.
    """
    before = model.config._attn_implementation
    if before == _NAME:
        return True
    if before != "sdpa" or getattr(model, _REFUSED, False):
        return False
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    training = model.training
    model.eval()
    try:
        model.set_attn_implementation(_NAME)
        allowed = _isolates(model)
    except (ValueError, TypeError, NotImplementedError, RuntimeError):  # what models raise on arguments they lack
        allowed = False
    finally:
        model.train(training)
    if not allowed:
        model.set_attn_implementation(before)
        setattr(model, _REFUSED, True)
    return allowed


def takes_packed(model: Any, packing: Packing, device: torch.device) -> bool:
    """Whether a decoder's sequences are to be packed there. Raises ConfigError where they must be and cannot."""
    if packing == "padded" or (packing == "auto" and device.type != "cuda"):
        return False
    allowed = allow_packing(model)
    if packing == "packed" and not allowed:
        kind = model.config.model_type
        raise ConfigError(f"packing is set to packed, which a model of type {kind} does not take; set it to auto")
    return allowed
