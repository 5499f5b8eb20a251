"""bench gpu: both towers of a 1B Llama shape with random weights on one GPU, against sentence-transformers.

``python -m jobs.bench_gpu`` needs torch, transformers, accelerate, pydantic, pyarrow and sentence-transformers only.
MFU is the model's own operations over the rate of one large product in bfloat16, measured in the same run; nothing is
counted twice for layers that are computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from item_tower.cpu import speed_up
from item_tower.decoders.flops import card_name, model_flops
from item_tower.decoders.layers import compile_layers
from item_tower.decoders.precision import default_device
from item_tower.embed import EmbedConfig, embed_texts
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.prompt import TemplateConfig
from jobs.bench_clock import fastest
from pipeline.joint import JointConfig, JointStep, distinct_texts
from schemas.errors import ConfigError
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batch, Histories, training_batches
from user_tower.steps import UserStep
from user_tower.train import TrainConfig

WORDS = 1_000
# 1b: TinyLlama-1.1B
SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2_048, "intermediate_size": 5_632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": WORDS + 2,
    },
}  # fmt: skip
BATCH_SIZES = (32, 128, 512)
ROUNDS = 3
TEXTS, MEDIAN_WORDS, WINDOWS = 8_192, 40, 512
# of gpu-1b.toml
TOKEN_BUDGET, GRAPH_TOKENS, NEGATIVES = 16_384, 49_152, 8_192


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of one product [size, size] x [size, size], at its best."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, 10, device)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{n}": n + 2 for n in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def _texts(count: int, tokens: int) -> list[str]:
    """Made-up words, log-normal in number as titles and descriptions are."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(tokens), 0.5, count), 4, 256).astype(int)
    return [" ".join(f"w{n}" for n in rng.integers(0, WORDS, length)) for length in lengths]


def _encoder(shape: str, dtype: str) -> ItemEncoder:
    torch.manual_seed(0)
    config = EncoderConfig(model=f"random {shape}", pooling="item_token", compute_dtype=dtype)
    with default_device():
        model = LlamaModel(LlamaConfig(**SHAPES[shape], max_position_embeddings=512))
    return ItemEncoder(model, _tokenizer(), config, TemplateConfig(prompt="")).to(default_device()).eval()


def _histories(users: int, events: int, items: int) -> Histories:
    rng = np.random.default_rng(0)
    offsets = np.arange(users + 1, dtype=np.int64) * events
    return Histories([str(n) for n in range(users)], offsets, rng.integers(0, items, users * events))


def _training() -> TrainConfig:
    return TrainConfig(compile=default_device().type == "cuda")


def _train_row(
    name: str,
    step: torch.nn.Module,
    groups: list[dict],
    batch: Batch,
    flops: float,
    amount: dict[str, float],
    peak: float,
) -> dict[str, Any]:
    """Seconds, memory and MFU of a whole step: forward, backward, AdamW."""
    device = default_device()
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    step.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def once() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            loss = step(batch, batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = fastest(once, ROUNDS, device)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    rates = {f"{key}_per_second": round(value / seconds, 1) for key, value in amount.items()}
    return {
        "name": name,
        "seconds": round(seconds, 4),
        **rates,
        "mfu": round(3 * flops / seconds / peak, 3),
        "gib": None if memory is None else round(memory, 1),
    }


def embed_rows(encoder: ItemEncoder, texts: list[str], peak: float, budget: int | None) -> list[dict[str, Any]]:
    """Padded and packed embedding, tokens a second with MFU, on a GPU compiled as well; the encoder is changed for
    inference."""
    lengths = encoder.tokenise(texts).lengths + 1
    tokens = lengths.sum() - len(lengths)  # [ITEM] is work, but no token of the text
    flops = model_flops(encoder.model, lengths, causal=True)
    encoder.packing = "packed"
    speed_up(encoder)
    rows = []
    compiled = [("packed", True)] if encoder.device.type == "cuda" else []
    for packing, compile_too in (("padded", False), ("packed", False), *compiled):
        encoder.packing = packing  # type: ignore[assignment]
        if compile_too:
            compile_layers(encoder.model)
        config = EmbedConfig(token_budget=budget, output_dtype="float32")
        seconds = fastest(lambda config=config: embed_texts(encoder, texts, config), ROUNDS, encoder.device)  # type: ignore[misc]
        name = f"embed {packing}{', compiled' if compile_too else ''}"
        rows.append(
            {"name": name, "tokens_per_second": round(tokens / seconds), "mfu": round(flops / seconds / peak, 3)}
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def peer_row(encoder: ItemEncoder, texts: list[str], lengths: NDArray[np.int64]) -> dict[str, Any]:
    """sentence-transformers on the same weights and texts, in the same dtype, the best of some batch sizes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        attention = encoder.model.config._attn_implementation
        encoder.model.set_attn_implementation("sdpa")
        encoder.model.save_pretrained(Path(folder))
        encoder.model.set_attn_implementation(attention)
        encoder.tokenizer.save_pretrained(folder)
        body = Transformer(folder, max_seq_length=256)
    peer = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "lasttoken")])
    peer = peer.to(encoder.device, getattr(torch, encoder.config.compute_dtype))

    def encode(size: int) -> Callable[[], object]:
        return lambda: peer.encode(texts, batch_size=size, show_progress_bar=False, convert_to_tensor=True)

    best = min(fastest(encode(size), 1, encoder.device) for size in BATCH_SIZES)
    return {"name": "sentence-transformers, best", "tokens_per_second": round(lengths.sum() / best)}


def stage_one_row(encoder: ItemEncoder, texts: list[str], windows: int, peak: float) -> dict[str, Any]:
    """Stage I on made-up histories of 50 events, all weights, a user tower 128 wide; budgets of ``gpu-1b.toml``."""
    ids = encoder.tokenise(texts).input_ids
    batch = next(iter(training_batches(_histories(windows, 51, len(ids)), 50, windows, np.random.default_rng(0))))
    shape = UserTowerConfig(hidden=128, layers=2, heads=2, dropout=0.0)
    config = JointConfig(
        user_tower=shape, train=_training(), token_budget=TOKEN_BUDGET, graph_tokens=GRAPH_TOKENS, collapse_floor=0.0
    )
    tower = UserTower(shape, encoder.dim, None).to(encoder.device)
    step = JointStep(encoder, tower, ids, torch.arange(len(ids)), config).to(encoder.device)
    needed, _, _ = distinct_texts(batch, step.groups, config.train.negatives, 0)
    lengths = np.array([len(ids[row]) + 1 for row in needed])
    flops = model_flops(encoder.model, lengths, causal=True)
    return _train_row("stage I", step, step.parameter_groups(), batch, flops, {"tokens": float(lengths.sum())}, peak)


def stage_two_row(shape: str, windows: int, items: int, peak: float) -> dict[str, Any]:
    """Stage II: a user LLM of the same shape on cached vectors, histories of 50, negatives of ``gpu-1b.toml``."""
    device, dim = default_device(), SHAPES[shape]["hidden_size"]
    torch.manual_seed(0)
    settings = UserTowerConfig(backbone="llm", hidden=dim, layers=1, heads=4, history=50, dropout=0.0)
    architecture = LlamaConfig(**SHAPES[shape] | {"vocab_size": 1}).to_dict()
    with device:
        tower = UserTower(settings, dim, None, architecture)
    tower = tower.to(device)
    vectors = np.random.default_rng(0).standard_normal((items, dim), dtype=np.float32)
    catalog = tower.catalog([str(n) for n in range(items)], vectors, np.arange(items))
    sampler = NegativeSampler(
        torch.arange(items, device=device), torch.ones(items, device=device), min(NEGATIVES, items - 1), "uniform"
    )
    step = UserStep(tower, catalog, sampler, _training())
    batch = next(iter(training_batches(_histories(windows, 51, items), 50, windows, np.random.default_rng(0))))
    flops = model_flops(tower.backbone.model, batch.lengths, causal=True)
    groups = [{"params": list(tower.parameters())}]
    return _train_row("stage II", step, groups, batch, flops, {"positions": float(batch.positions)}, peak)


def run_here(config: str, sets: list[str]) -> dict[str, Any]:
    """``hllm bench gpu``: the 1B shape at its default sizes. Raises ConfigError where there is no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: there is no CUDA device; python -m jobs.bench_gpu --shape tiny runs on a CPU")
    return run("1b", TEXTS, MEDIAN_WORDS, WINDOWS, None)


def run(shape: str, texts: int, tokens: int, windows: int, budget: int | None) -> dict[str, Any]:
    """Rows and ratios; ``texts`` of about ``tokens`` words each, ``windows`` histories a step of stage II, an eighth
    of them in stage I."""
    device = default_device()
    on_gpu = device.type == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    peak = matmul_rate(device, getattr(torch, dtype), 8_192 if on_gpu else 256)
    made = _texts(texts, tokens)
    rows = [stage_two_row(shape, windows, max(texts, 64), peak)]
    rows.append(stage_one_row(_encoder(shape, dtype), made, max(1, windows // 8), peak))
    print(*rows, sep="\n", file=sys.stderr, flush=True)
    encoder = _encoder(shape, dtype).requires_grad_(False)
    lengths = encoder.tokenise(made).lengths
    rows += embed_rows(encoder, made, peak, budget)
    ours = max(row["tokens_per_second"] for row in rows if row["name"].startswith("embed"))
    rows.append(peer_row(encoder, made, lengths))
    by_name = {row["name"]: row for row in rows}
    ratio = {
        "embed_mfu": max(row["mfu"] for row in rows if row["name"].startswith("embed")),
        "stage1_mfu": by_name["stage I"]["mfu"],
        "stage2_mfu": by_name["stage II"]["mfu"],
        "embed_over_sentence_transformers": round(ours / rows[-1]["tokens_per_second"], 3),
    }
    facts = {"device": card_name(device), "dtype": dtype, "peak_tflops": round(peak / 1e12, 3), "shape": shape}
    return {"name": "gpu", "rows": rows, **facts, "ratio": ratio}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; the last line is the JSON of ``run``."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench_gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--tokens", type=int, default=MEDIAN_WORDS, help="median words of a text")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="histories of a step; an eighth in stage I")
    parser.add_argument("--budget", type=int, help="tokens of a forward pass")
    given = parser.parse_args(argv)
    print(json.dumps(run(given.shape, given.texts, given.tokens, given.windows, given.budget)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
