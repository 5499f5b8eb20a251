"""Where both towers compute by default, and in which precision: what ``auto`` means."""

from __future__ import annotations

import time
from functools import cache

import torch

from item_tower.decoders.threads import one_thread

_ROUNDS = 10
_WORTH = 1.2  # what rounds must be clearly faster


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are clearly faster than float32 ones on the device.

    So they are on a recent GPU and with AMX. AVX512-BF16 alone does not tell: AMD's cores are twice as fast with it,
    Intel's, whose AMX a virtual machine may hide, half as fast (165 GFLOP/s against 300 on two of them). There
    both are timed, once a process, for a few hundredths of a second, by one thread: that one thread waits for another
    which does other work must not decide a fingerprint.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    return _seconds(device, torch.float32) > _WORTH * _seconds(device, torch.bfloat16)


@torch.inference_mode()
def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of some products [512, 512] x [512, 512], as a batch of tokens meets a layer."""
    x, weight = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    with one_thread():
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - started)
    return best
