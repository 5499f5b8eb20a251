"""bench gpu at a tiny size on whatever device there is, and what it may import."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from item_tower.decoders.flops import model_flops
from item_tower.embed import EmbedConfig
from jobs import bench_gpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_row_is_there_and_plausible(capsys):
    pytest.importorskip("sentence_transformers")
    assert bench_gpu.main(["--shape", "tiny", "--texts", "24", "--tokens", "6", "--windows", "8"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = [row["name"] for row in result["rows"]]
    assert names == ["stage II", "stage I", "embed padded", "embed packed", "sentence-transformers, best"]
    assert all(0 < row["mfu"] < 1.5 for row in result["rows"] if "mfu" in row)
    assert result["ratio"]["embed_over_sentence_transformers"] > 0
    assert result["device"]


def test_the_operations_of_a_forward_pass_by_hand():
    model = bench_gpu._encoder("tiny", "float32").model
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # q, k and v of half as many heads, o, the MLP
    assert model_flops(model, np.array([5, 3]), causal=True) == 2 * (8 * linear + 4 * 32 * (25 + 9) / 2)


def test_the_budgets_are_those_of_the_configuration():
    settings = tomllib.loads((ROOT / "jobs" / "configs" / "gpu-1b.toml").read_text())
    embed, tune, train = settings["embed"], settings["tune"], settings["train"]
    assert embed["token_budget"] == EmbedConfig().tokens_at_once(torch.device("cuda"))
    assert tune["token_budget"] == bench_gpu.TOKEN_BUDGET
    assert tune["graph_tokens"] == bench_gpu.GRAPH_TOKENS
    assert train["negatives"] == bench_gpu.NEGATIVES
    assert train["batch_size"] == bench_gpu.WINDOWS
    assert tune["train"]["batch_size"] == bench_gpu.WINDOWS // 8
    assert all(section["compile"] for section in (embed, tune["train"], train))


@pytest.mark.slow
def test_it_runs_where_only_the_model_packages_are():
    code = (
        "import sys, jobs.bench_gpu\n"
        "kept_out = {'ray', 'polars', 'faiss', 'mlflow', 'deltalake', 'pydantic_settings', 'obstore'}\n"
        "heavy = kept_out & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_bench_on_a_gpu(capsys):
    assert bench_gpu.main(["--shape", "tiny", "--texts", "256", "--tokens", "20", "--windows", "32"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert "embed packed, compiled" in [row["name"] for row in result["rows"]]
