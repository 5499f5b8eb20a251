"""A checkpoint in the layout of the paper's own code, and what that code computes from it, written out by hand.

Nothing of ours and nothing of Hugging Face's models is used for the latter. Shapes: T positions, H hidden, S the
longest history (MAX_ITEM_LIST_LENGTH).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import WORDS, build_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 2, 4, 2
PROMPT = "Compress the following sentence into embedding: "


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The words of conftest, and as Llama's a token before each text."""
    tokenizer = build_tokenizer(specials=False)
    first = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.backend_tokenizer.post_processor = first
    return tokenizer


def model_folder(folder: Path, kv_heads: int = KV_HEADS, **more: object) -> LlamaConfig:
    """A Hugging Face folder with a configuration and a tokenizer, and no weights."""
    config = LlamaConfig(
        vocab_size=4 + len(WORDS), hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=64, **more,
    )  # fmt: skip
    config.save_pretrained(folder)
    bos_tokenizer().save_pretrained(folder)
    return config


def official_state(config: LlamaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, large enough that attention and positions matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    state = {
        f"{llm}.{name}": torch.randn(shape, generator=generator) * (1.0 if "embed" in name else 0.4)
        for llm in ("item_llm", "user_llm")
        for name, shape in shapes.items()
    }
    state["item_emb_tokens"] = torch.randn(1, 1, HIDDEN, generator=generator) * 0.1
    state["logit_scale"] = torch.tensor(3.25)
    return state


def official_text(item: dict[str, object], keys: list[str]) -> str:
    """Prompt, then each key and value, nothing between."""
    return PROMPT + "".join(f"{key}: {item[key]}" for key in keys if item[key] and str(item[key]) != "nan")


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x: [heads, T, d]; positions: [T]."""
    half = x.shape[-1] // 2
    angles = positions.float()[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def plain_llm(state: dict[str, Tensor], llm: str, x_TH: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """The last hidden states [T, H], after the norm. positions: int64 [T]; real: bool [T], False where padded."""
    T = len(x_TH)
    seen = torch.ones(T, T, dtype=torch.bool).tril() & real
    seen |= torch.eye(T, dtype=torch.bool)  # so that a padded row is defined; nothing reads it
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"{llm}.model.layers.{layer}."): tensor.float()
            for name, tensor in state.items()
            if name.startswith(f"{llm}.model.layers.{layer}.")
        }
        h = _rms(x_TH, own["input_layernorm.weight"])
        if "self_attn.W_pack.weight" in own:
            parts = (h @ own["self_attn.W_pack.weight"].T).chunk(3, dim=-1)
        else:
            parts = [h @ own[f"self_attn.{name}_proj.weight"].T for name in "qkv"]
        q, k, v = (part.view(T, -1, HIDDEN // HEADS).transpose(0, 1) for part in parts)
        k, v = (part.repeat_interleave(len(q) // len(part), dim=0) for part in (k, v))
        scores = _rotate(q, positions) @ _rotate(k, positions).transpose(1, 2) / (HIDDEN // HEADS) ** 0.5
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x_TH = x_TH + mixed.transpose(0, 1).reshape(T, HIDDEN) @ own["self_attn.o_proj.weight"].T
        h = _rms(x_TH, own["post_attention_layernorm.weight"])
        gate = F.silu(h @ own["mlp.gate_proj.weight"].T) * (h @ own["mlp.up_proj.weight"].T)
        x_TH = x_TH + gate @ own["mlp.down_proj.weight"].T
    return _rms(x_TH, state[f"{llm}.model.norm.weight"].float())


def plain_item(state: dict[str, Tensor], text: str, max_text: int) -> Tensor:
    """The item's vector [H]: ids cut to max_text, the learned embedding after them, always at position max_text; or
    without that embedding the mean over the text."""
    ids = bos_tokenizer().encode(text)[:max_text]
    embedded = state["item_llm.model.embed_tokens.weight"].float()[ids]
    token = state.get("item_emb_tokens")
    if token is not None:
        embedded = torch.cat([embedded, token[0].float()])
    positions = torch.arange(len(embedded)) + max_text - len(ids)
    hidden = plain_llm(state, "item_llm", embedded, positions, torch.ones(len(embedded), dtype=torch.bool))
    return hidden.mean(0) if token is None else hidden[-1]


def plain_user(state: dict[str, Tensor], items_NH: Tensor, history: list[int], longest: int) -> Tensor:
    """The user's vector [H], L2-normalised: the newest events, left-padded to ``longest`` with any item's vector."""
    history = history[-longest:]
    rows = [0] * (longest - len(history)) + history
    real = torch.arange(longest) >= longest - len(history)
    hidden = plain_llm(state, "user_llm", items_NH[rows], torch.arange(longest), real)
    return F.normalize(hidden[-1], dim=-1)
