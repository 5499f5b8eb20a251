"""What makes two item towers the same tower: one hash over everything that decides a vector (DESIGN 5)."""

from __future__ import annotations

import json
from typing import Any

import torch

from item_tower.encoder import ItemEncoder
from item_tower.prompt import RENDER_VERSION, TemplateConfig
from schemas.hashing import Digest

# Keys of a model's config.json that do not change its output: names, versions, execution choices.
NEUTRAL_KEYS = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "dtype",
        "torch_dtype",
        "use_cache",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)
# Exercises case, accents, digits, punctuation, unknown scripts and whitespace of a tokenizer.
PROBE_TEXT = "Compress: Ünïcode CAFÉ 12,345.67 — don't_stop\t<b>tag</b> 日本語 😀  end"


def _weights(encoder: ItemEncoder) -> str:
    digest = Digest()
    for name, tensor in sorted(encoder.state_dict().items()):
        data = tensor.detach().contiguous().cpu()
        digest.add(name).add(str(data.dtype)).add(json.dumps(list(data.shape)))
        digest.add(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _architecture(encoder: ItemEncoder) -> str:
    config: dict[str, Any] = encoder.model.config.to_diff_dict()
    kept = {key: value for key, value in config.items() if key not in NEUTRAL_KEYS}
    return json.dumps(kept, sort_keys=True, default=str)


def _tokenizer(encoder: ItemEncoder) -> str:
    digest = Digest()
    for token, number in sorted(encoder.tokenizer.get_vocab().items()):
        digest.add(token).add(str(number))
    whole = encoder.tokenizer(PROBE_TEXT, truncation=False)["input_ids"]  # whatever the length that texts are cut to
    digest.add(json.dumps([whole]))
    return digest.hexdigest()


def ingredients(encoder: ItemEncoder, output_dtype: str) -> dict[str, str]:
    """Everything that the fingerprint covers, by name, each as text or as a digest of it."""
    config, template = encoder.config, encoder.template
    return {
        "weights": _weights(encoder),
        "architecture": _architecture(encoder),
        "tokenizer": _tokenizer(encoder),
        "render_version": str(RENDER_VERSION),
        "template": json.dumps([template.prompt, template.separator, template.empty_text, *_style(template)]),
        "fields": json.dumps(template.fields),
        "max_length": str(config.max_length),
        "truncation_side": config.truncation_side,
        "pooling": config.pooling,
        "projection": str(config.projection_dim),
        "compute_dtype": config.compute_dtype,
        "output_dtype": output_dtype,
        "output_dim": str(encoder.dim),
    }


def fingerprint(encoder: ItemEncoder, output_dtype: str = "float16") -> str:
    """BLAKE2b-128 over ``ingredients``; 32 hexadecimal characters.

    Not covered, because it must not matter: batch size, device, file names, paths, library versions.
    """
    digest = Digest()
    for name, value in sorted(ingredients(encoder, output_dtype).items()):
        digest.add(name).add(value)
    return digest.hexdigest()


def _style(template: TemplateConfig) -> list[str]:
    """Nothing for ``clean``, which was there before there was another: what it embedded stays valid."""
    return [] if template.style == "clean" else [template.style]
