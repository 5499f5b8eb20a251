"""What only a GPU can show. Needs the model packages alone: ``pytest --noconftest -m gpu tests/test_gpu.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from item_tower.cpu import speed_up
from item_tower.decoders import packed
from item_tower.decoders.layers import compile_layers
from item_tower.embed import encode_texts
from jobs import bench_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS = bench_gpu._texts(200, 12)


def vectors(encoder, packing: str, texts: list[str] = TEXTS) -> np.ndarray:
    encoder.packing = packing
    assert encoder.packed == (packing == "packed")
    return encode_texts(encoder, texts, 2_048)[0]


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return F.cosine_similarity(torch.from_numpy(a).double(), torch.from_numpy(b).double()).min().item()


def test_packed_equals_padded_in_float32():
    encoder = bench_gpu._encoder("tiny", "float32")
    np.testing.assert_allclose(vectors(encoder, "packed"), vectors(encoder, "padded"), atol=1e-5)


def test_packed_is_the_default_and_equals_padded_in_bfloat16_within_its_rounding():
    encoder = bench_gpu._encoder("tiny", "bfloat16")
    assert encoder.packed
    exact = vectors(bench_gpu._encoder("tiny", "float32"), "padded")
    for found in (vectors(encoder, "packed"), vectors(encoder, "padded")):
        assert least_cosine(found, exact) > 0.999
    speed_up(encoder)
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    assert least_cosine(vectors(encoder, "packed"), exact) > 0.999


def test_another_text_of_the_same_length_changes_no_other_vector():
    encoder = bench_gpu._encoder("tiny", "bfloat16")
    changed = [" ".join("w7" for _ in TEXTS[0].split()), *TEXTS[1:]]
    before, after = vectors(encoder, "packed"), vectors(encoder, "packed", changed)
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.abs(before[0] - after[0]).max() > 1e-3


@pytest.mark.parametrize("window", [0, 4])
def test_each_kernel_gives_what_the_padded_attention_gives_and_its_gradients(window):
    lengths = np.array([5, 1, 17, 8])
    row = packed.pack(lengths, torch.device("cuda"))
    kernels = ["varlen"] if {"scale", "window_size"} <= packed._VARLEN else []
    kernels += ["flash-attn"] if packed.is_flash_attn_2_available() else []
    assert packed.kernel(torch.device("cuda"), torch.bfloat16, 16, 0.0) in kernels
    found = []
    for kernel in ("padded", *kernels):
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(int(lengths.sum()), heads, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)  # grouped, as Llama's are
        )
        mixed = packed._KERNELS[kernel](q, k, v, row.ends, row.longest, 0.25, 0.0, window or row.longest)
        mixed.float().square().sum().backward()
        found.append([mixed.detach(), q.grad, k.grad, v.grad])
    for other in found[1:]:
        for mine, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=5e-2, rtol=5e-2)


def test_a_compiled_model_computes_the_same():
    encoder = bench_gpu._encoder("tiny", "bfloat16")
    plain = vectors(encoder, "packed")
    compile_layers(encoder.model)
    assert least_cosine(vectors(encoder, "packed"), plain) > 0.999
