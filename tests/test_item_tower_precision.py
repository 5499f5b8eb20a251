"""What ``auto`` means on a CPU: bfloat16 where it is clearly faster, float32 elsewhere."""

from __future__ import annotations

import pytest
import torch

from item_tower.decoders import precision
from item_tower.decoders.precision import fast_bfloat16
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.prompt import TemplateConfig
from user_tower.train import _mixed_precision

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine(amx, avx512_bf16, seconds): a CPU with these, and the seconds of a product by dtype."""

    def pretend(amx: bool, avx512: bool, seconds: dict[torch.dtype, float] | None = None) -> None:
        fast_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(precision, "_seconds", lambda device, dtype: seconds[dtype])

    yield pretend
    fast_bfloat16.cache_clear()


INTEL = {torch.float32: 0.9e-3, torch.bfloat16: 1.6e-3}  # AMX hidden
AMD = {torch.float32: 2e-3, torch.bfloat16: 1e-3}


@pytest.mark.parametrize(
    ("amx", "avx512", "seconds", "expected"),
    [(False, False, None, False), (True, True, None, True), (False, True, INTEL, False), (False, True, AMD, True)],
)
def test_bfloat16_where_it_is_clearly_faster(machine, amx, avx512, seconds, expected):
    machine(amx, avx512, seconds)
    assert fast_bfloat16(CPU) is expected
    assert _mixed_precision("auto") == ("bf16" if expected else "no")
    assert (_mixed_precision("bfloat16"), _mixed_precision("float32")) == ("bf16", "no")


def test_a_tower_keeps_what_auto_meant_where_it_was_made(machine, tmp_path, make_encoder):
    machine(False, True, AMD)
    made = make_encoder("bert", compute_dtype="auto")
    assert made.config.compute_dtype == "bfloat16"
    made.save(tmp_path)
    machine(False, True, INTEL)
    assert ItemEncoder.load(tmp_path).config.compute_dtype == "bfloat16"
    settings = EncoderConfig(model=str(tmp_path / "model"), pooling="mean", max_length=32)
    assert ItemEncoder.from_config(settings, TemplateConfig()).config.compute_dtype == "float32"


def test_both_precisions_are_timed(monkeypatch):
    """By one thread: two that wait for each other are told apart by what else runs."""
    threads, seen = torch.get_num_threads(), []
    linear = torch.nn.functional.linear

    def counted(*values):
        seen.append(torch.get_num_threads())
        return linear(*values)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    assert all(0 < precision._seconds(CPU, dtype) < 10 for dtype in (torch.float32, torch.bfloat16))
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads
