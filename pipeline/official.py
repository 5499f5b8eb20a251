"""A checkpoint of the paper's own code (github.com/bytedance/HLLM) as our two towers.

Its state dict holds ``item_llm.*`` and ``user_llm.*`` (two causal language models), ``item_emb_tokens`` [1, 1, H]
(the [ITEM] embedding; absent with mean pooling) and ``logit_scale``. The user LLM reads the item vectors as they are
and its hidden states are the queries, which is ``user_tower.projections = false``.

Shapes: H hidden width of both models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Size, Tensor
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

from item_tower.encoder import EncoderConfig, ItemEncoder, loading, resolve_model
from item_tower.prompt import TemplateConfig
from pipeline.state_dict import read_state_dict
from schemas.errors import ConfigError, DataError
from user_tower.model import UserTower, UserTowerConfig

ITEM, USER, ITEM_TOKEN, LOGIT_SCALE = "item_llm.", "user_llm.", "item_emb_tokens", "logit_scale"
# Models whose positions are relative. The official code counts an item's positions so that [ITEM] is always at
# MAX_TEXT_LENGTH; for these that is the same as counting from 0. The last one is read as a Llama, see _baichuan.
RELATIVE = ("llama", "mistral", "qwen2", "qwen3", "baichuan")
# In the state dict and never read: the heads over the vocabulary, and what the configuration gives anyway.
_UNREAD = re.compile(r"(item_llm|user_llm)\.(lm_head\.|.*rotary_emb\.inv_freq$)|user_llm\.model\.embed_tokens\.")
_NAMED = 12


class CheckpointConfig(BaseModel):
    """What import-checkpoint reads. The models' configurations and the tokenizer are those of ``encoder.model``; that
    of the user LLM, where it is another, is of ``user_tower.pretrained``. Their own weights are not read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str | None = None
    """``pytorch_model.bin``; or a .pt, .pth or .safetensors file, the index of a sharded one, or a folder."""


def import_towers(
    checkpoint: CheckpointConfig, encoder: EncoderConfig, template: TemplateConfig, user_tower: UserTowerConfig
) -> tuple[ItemEncoder, UserTower]:
    """Both towers, float32, on the CPU.

    Raises ConfigError when the settings describe other towers, DataError when a key is missing, unexpected or of
    another shape, naming it.
    """
    _require_settings(checkpoint, encoder, user_tower)
    assert checkpoint.weights is not None
    state = read_state_dict(Path(checkpoint.weights))
    state = {name: tensor for name, tensor in state.items() if not _UNREAD.match(name)}
    trust = encoder.trust_remote_code
    item_llm = user_llm = _architecture("encoder.model", encoder.model, trust)
    if user_tower.pretrained is not None:
        user_llm = _architecture("user_tower.pretrained", user_tower.pretrained, trust)
    expected = _layout(ITEM, item_llm) | _layout(USER, user_llm) | {LOGIT_SCALE: Size([])}
    expected = {name: shape for name, shape in expected.items() if not _UNREAD.match(name)}
    if encoder.pooling == "item_token":
        expected[ITEM_TOKEN] = Size([1, 1, item_llm.config.hidden_size])
    _require_layout(state, expected, checkpoint.weights)
    items = _item_tower(item_llm.config, state, encoder, template)
    return items, _user_tower(user_llm.config, state, user_tower, items.dim)


def _item_tower(
    config: PretrainedConfig, state: dict[str, Tensor], encoder: EncoderConfig, template: TemplateConfig
) -> ItemEncoder:
    model = AutoModel.from_config(config, dtype=torch.float32)
    model.load_state_dict(_plain(state, ITEM))
    token = state[ITEM_TOKEN].float().flatten() if encoder.pooling == "item_token" else None
    return ItemEncoder.from_weights(model.eval(), token, encoder, template)


def _user_tower(
    config: PretrainedConfig, state: dict[str, Tensor], user_tower: UserTowerConfig, item_dim: int
) -> UserTower:
    architecture: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # it reads vectors: of its vocabulary one row stays, which its class asks for
    architecture |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    tower = UserTower(user_tower, item_dim, None, architecture)
    weights = _plain(state, USER) | {"embed_tokens.weight": torch.zeros(1, config.hidden_size)}
    weights = {f"backbone.model.{name}": tensor for name, tensor in weights.items()}
    tower.load_state_dict(weights | {LOGIT_SCALE: state[LOGIT_SCALE]})
    return tower.eval()


def _require_settings(checkpoint: CheckpointConfig, encoder: EncoderConfig, user_tower: UserTowerConfig) -> None:
    wanted = {
        "checkpoint.weights is not set": checkpoint.weights is not None,
        "encoder.pooling must be item_token, or mean for item_emb_token_n = 0": encoder.pooling != "cls",
        "encoder.truncation_side must be right": encoder.truncation_side == "right",
        "encoder.projection_dim must not be set": encoder.projection_dim is None,
        "user_tower.backbone must be llm": user_tower.backbone == "llm",
        "user_tower.projections must be false": not user_tower.projections,
        "user_tower.timestamps must be false": not user_tower.timestamps,
        "user_tower.similarity must be cosine": user_tower.similarity == "cosine",
    }
    wrong = [text for text, holds in wanted.items() if not holds]
    if wrong:
        raise ConfigError(f"import-checkpoint: {'; '.join(wrong)} (official-1b.toml has these settings)")


class _Architecture(NamedTuple):
    """packed: the three projections of attention are one matrix, W_pack [3 H, H]."""

    config: PretrainedConfig
    packed: bool


def _architecture(setting: str, name: str, trust: bool) -> _Architecture:
    """The configuration of a model by name or folder. Raises ConfigError."""
    source = resolve_model(name)
    with loading(setting, name):
        raw, _ = PretrainedConfig.get_config_dict(source)
        kind = raw.get("model_type")
        if kind not in RELATIVE:
            raise ConfigError(f"{setting} = {name!r} is of type {kind!r}; a checkpoint is read into {list(RELATIVE)}")
        if kind == "baichuan":
            return _Architecture(_baichuan(raw, f"{setting} = {name!r}"), packed=True)
        return _Architecture(AutoConfig.from_pretrained(source, trust_remote_code=trust), packed=False)


def _baichuan(raw: dict[str, Any], label: str) -> PretrainedConfig:
    """Baichuan 7B as the Llama that it is, but for its three projections in one matrix; so none of its code runs."""
    if "max_position_embeddings" not in raw:
        raise ConfigError(f"{label}: a Baichuan without rotary positions (13B) is not read")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*sizes, "hidden_act", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id")
    return LlamaConfig(**{name: raw[name] for name in (*names, "eos_token_id") if name in raw})


def _layout(prefix: str, architecture: _Architecture) -> dict[str, Size]:
    """Key -> shape of one of the two models in the official state dict."""
    with torch.device("meta"):
        model = AutoModel.from_config(architecture.config)
    shapes = {f"{prefix}model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    if not architecture.packed:
        return shapes
    packed = {}
    for name, shape in shapes.items():
        name = re.sub(r"\.[qkv]_proj\.", ".W_pack.", name)
        packed[name] = Size([3 * shape[0], *shape[1:]]) if ".W_pack." in name else shape
    return packed


def _require_layout(state: dict[str, Tensor], expected: dict[str, Size], label: str) -> None:
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    shapes = [
        f"{name} {list(state[name].shape)} in place of {list(shape)}"
        for name, shape in expected.items()
        if name in state and (state[name].shape != shape or not state[name].is_floating_point())
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(found.values()):
        raise DataError(
            f"{label} does not fit the models' configurations and encoder.pooling: "
            + "; ".join(f"{what}: {_some(names)}" for what, names in found.items() if names)
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _plain(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One of the two models under the names of ``AutoModel``, in the precision of the file."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(f"{prefix}model.")
        if ".W_pack." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("W_pack", f"{part}_proj")] = rows
        else:
            found[name] = tensor
    return found
