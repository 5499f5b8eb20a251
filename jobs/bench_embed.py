"""bench embed: the whole Ray job against its encoder, the encoder against the machine, both against
sentence-transformers, on the texts of the configured catalog.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from item_tower.cpu import PackedLinear, can_pack, in_streams, speed_up
from item_tower.decoders.flops import card_name, model_flops
from item_tower.decoders.precision import default_device
from item_tower.embed import EmbedConfig, embed_texts
from item_tower.encoder import ItemEncoder, resolve_model
from item_tower.prompt import render
from jobs.bench_clock import fastest
from jobs.bench_nights import run_nights
from jobs.config import load_config
from jobs.context import Context
from schemas.errors import ConfigError

SAMPLE, ROUNDS = 4_096, 3
BATCH_SIZES = (32, 64, 128, 256)
_CALLS = 16  # of a product, by each thread on its own


@torch.inference_mode()
def roofline(encoder: ItemEncoder, tokens: int) -> float:
    """FLOP/s that the encoder's own matrix products reach by themselves in its dtype, each at its best, [tokens, in].

    The products of one forward pass over the time they take one after the other, the faster of two kernels each, by
    all threads together or by each on its own.
    """
    shapes = [(x.in_features, x.out_features) for x in encoder.model.modules() if isinstance(x, nn.Linear)]
    device, dtype, best = encoder.device, getattr(torch, encoder.config.compute_dtype), {}
    calls = [None] * _CALLS * torch.get_num_threads()
    for shape in sorted(set(shapes)):
        layer = nn.Linear(*shape).to(device, dtype)
        x = torch.randn(tokens, shape[0], dtype=dtype, device=device)
        kernels = [lambda layer=layer, x=x: F.linear(x, layer.weight, layer.bias)]
        if can_pack(device, dtype):
            packed = PackedLinear(layer, dtype)
            kernels.append(lambda packed=packed, x=x: packed(x))
        together = [fastest(kernel, rounds=20, device=device) for kernel in kernels]
        apart = [
            fastest(lambda kernel=kernel: in_streams(device, lambda *_: kernel(), calls), 5, device) / len(calls)  # type: ignore[misc]
            for kernel in kernels
        ]
        best[shape] = min(together + apart)
    seconds = sum(best[shape] for shape in shapes)
    return sum(2 * tokens * a * b for a, b in shapes) / seconds


def _peer(context: Context, precision: torch.dtype) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError as error:
        raise ConfigError("bench embed compares with sentence-transformers; pip install -e '.[bench]'") from error
    config = context.config.encoder
    body = Transformer(resolve_model(config.model), max_seq_length=config.max_length)
    pooling = "lasttoken" if config.pooling == "item_token" else config.pooling
    peer = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), pooling)])
    return peer.to(precision)


def _rates(works: dict[str, Callable[[], object]], texts: int) -> dict[str, float]:
    """Texts per second of each, the best of some rounds in which all take turns."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - started)
            print(f"{name:34s} {texts / best[name]:8.1f} texts/s", file=sys.stderr)
    return {name: texts / seconds for name, seconds in best.items()}


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Print rates and ratios. Raises ConfigError without sentence-transformers, NotFoundError before prepare-data."""
    context = Context(load_config(config, None, [*sets, 'item_tower.use="base"']))
    settings, template = context.config.encoder, context.config.template
    rendered = np.array([text for text in render(context.dataset.items, template) if text], dtype=object)
    rng = np.random.default_rng(0)
    texts = rendered[np.sort(rng.permutation(len(rendered))[:SAMPLE])].tolist()
    embed = EmbedConfig()

    encoder = ItemEncoder.from_config(settings, template).to(default_device())
    reference = ItemEncoder.from_config(settings.model_copy(update={"compute_dtype": "float32"}), template)
    lengths = encoder.tokenise(texts).lengths
    budget = embed.tokens_at_once(encoder.device)
    flops, best_rate = model_flops(encoder.model, lengths), roofline(encoder, budget)
    speed_up(encoder)
    default, other = _peer(context, torch.float32), _peer(context, getattr(torch, encoder.config.compute_dtype))

    def by_peer(batch: int) -> Callable[[], object]:
        return lambda: other.encode(texts, batch_size=batch, show_progress_bar=False, convert_to_tensor=True)

    batch = min(BATCH_SIZES, key=lambda size: fastest(by_peer(size), 1))
    rates = _rates(
        {
            "encoder": lambda: embed_texts(encoder, texts, embed),
            "sentence_transformers": lambda: default.encode(texts, show_progress_bar=False),
            f"sentence_transformers {encoder.config.compute_dtype} x {batch}": by_peer(batch),
        },
        len(texts),
    )
    ours, plain, tuned = rates.values()
    full = EmbedConfig(output_dtype="float32")
    stored = embed_texts(encoder, texts, embed).vectors
    cosine = _cosine(stored, embed_texts(reference.to(default_device()), texts, full).vectors)
    nights = run_nights(context, config, sets)
    done = nights["full"]
    ratio = {
        "job_over_sentence_transformers": done["items_per_second"] / plain,
        "job_over_sentence_transformers_best": done["items_per_second"] / tuned,
        "job_over_encoder": done["items_per_second"] / ours,
        "encoder_over_roofline": flops / len(texts) * ours / best_rate,
        "refresh_share": nights["delta"]["seconds"] / done["seconds"],
    }
    rows = [{"name": name, "items_per_second": round(rate, 1)} for name, rate in rates.items()]
    shown = ("items", "embedded", "reused", "seconds", "items_per_second")
    rows += [{"name": f"job, {name}"} | {key: figures[key] for key in shown} for name, figures in nights.items()]
    return {
        "name": "embed",
        "rows": rows,
        "device": card_name(encoder.device),
        "dtype": encoder.config.compute_dtype,
        "roofline_gflops": round(best_rate / 1e9, 1),
        "cosine_min": round(float(cosine.min()), 6),
        "cosine_mean": round(float(cosine.mean()), 6),
        "padding_waste": done["padding_waste"],
        "ratio": {name: round(value, 3) for name, value in ratio.items()},
    }
