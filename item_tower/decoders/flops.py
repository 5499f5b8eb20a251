"""How much a transformers model computes: floating-point operations of a forward pass, for MFU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def model_flops(model: Any, lengths: NDArray[np.int64], causal: bool = False) -> float:
    """Operations to encode sequences of these lengths, without padding, embedding tables and elementwise work.

    Every linear layer 2 in x out a token; attention 4 T^2 x width of all heads a layer, half of it where causal
    (Chowdhery et al. 2022, appendix B). A backward pass is twice as much again.
    """
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    per_token = sum(2 * layer.in_features * layer.out_features for layer in linears)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = (lengths.astype(np.float64) ** 2).sum() * (0.5 if causal else 1.0)
    attention = 4 * config.num_hidden_layers * head * config.num_attention_heads * pairs
    return float(per_token * lengths.sum() + attention)


def card_name(device: torch.device) -> str:
    """The chip that a figure is of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
