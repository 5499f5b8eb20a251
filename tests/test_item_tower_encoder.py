"""An item's vector is its own: alone, in any batch, in any order, after a load."""

from __future__ import annotations

import json
import shutil
import threading
import time
import weakref

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from item_tower import cpu
from item_tower.batching import token_budget_batches
from item_tower.cpu import PackedLinear, _short_attention, in_streams, packs, speed_up
from item_tower.embed import EmbedConfig, as_table, embed_texts, encode_texts
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.prompt import TemplateConfig
from schemas.errors import ConfigError, StoreError

TEXTS = ["red 1", "the blue 2, year: 3", "a", "red " * 20, "blue 5 . 6 7", "the the the the red"]
# Cosine of a bfloat16 vector alone and in a batch: another shape may take another kernel and rounds otherwise.
BF16_COSINE = 0.999


def vectors(encoder: ItemEncoder, texts: list[str], token_budget: int = 4096) -> np.ndarray:
    return encode_texts(encoder, texts, token_budget)[0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_vector_does_not_depend_on_its_batch(make_encoder, kind):
    encoder = make_encoder(kind)
    together = vectors(encoder, TEXTS)
    alone = np.concatenate([vectors(encoder, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(vectors(encoder, TEXTS[::-1], token_budget=30)[::-1], alone, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 1e-2  # the texts differ at all


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_bfloat16_vector_hardly_depends_on_its_batch(make_encoder, kind):
    encoder = make_encoder(kind, compute_dtype="bfloat16")
    together = vectors(encoder, TEXTS)
    alone = np.concatenate([vectors(encoder, [text]) for text in TEXTS])
    exact = vectors(make_encoder(kind), TEXTS)
    for other in (alone, exact):
        norms = np.linalg.norm(together, axis=1) * np.linalg.norm(other, axis=1)
        assert ((together * other).sum(1) / norms).min() > BF16_COSINE


def test_the_item_token_is_read_after_the_text(make_encoder):
    """Against Hugging Face by hand: [ITEM] appended to the embedded text, its last hidden state."""
    encoder = make_encoder("llama")
    ids = encoder.tokenise(TEXTS[:1]).input_ids[0]
    with torch.inference_mode():
        embedded = encoder.model.get_input_embeddings()(torch.tensor([ids]))
        whole = torch.cat([embedded, encoder.item_token[None, None]], dim=1)
        expected = encoder.model(inputs_embeds=whole).last_hidden_state[0, -1]
    np.testing.assert_allclose(vectors(encoder, TEXTS)[0], expected.numpy(), atol=1e-5)


def test_mean_and_cls_pooling_by_hand(make_encoder):
    encoder, cls = make_encoder("bert"), make_encoder("bert", pooling="cls")
    with torch.inference_mode():
        hidden = encoder.model(torch.tensor([encoder.tokenise(TEXTS[:1]).input_ids[0]])).last_hidden_state[0]
    np.testing.assert_allclose(vectors(encoder, TEXTS)[0], hidden.mean(0).numpy(), atol=1e-5)
    np.testing.assert_allclose(vectors(cls, TEXTS)[0], hidden[0].numpy(), atol=1e-5)


def test_gradients_reach_the_item_token_and_the_weights(make_encoder):
    encoder = make_encoder("llama", projection_dim=8)
    encoder.encode_ids(encoder.tokenise(TEXTS).input_ids, 64).square().sum().backward()
    assert encoder.item_token.grad.abs().sum() > 0
    assert encoder.projection.weight.grad.abs().sum() > 0
    assert encoder.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_truncation_is_counted_and_leaves_room_for_the_item_token(make_encoder):
    encoder = make_encoder("llama", max_length=6)
    tokens = encoder.tokenise(["red 1", "red " * 6, "red " * 7])
    assert tokens.truncated.tolist() == [False, False, True]
    assert tokens.lengths.tolist() == [2, 6, 6]
    padded, mask = encoder.pad(tokens.input_ids)
    assert padded.shape == (3, 7)
    assert mask.sum(1).tolist() == [3, 7, 7]


def test_truncation_side(make_encoder):
    text = ["red blue 1 2 3"]
    right = make_encoder("llama", max_length=2).tokenise(text).input_ids
    left = make_encoder("llama", max_length=2, truncation_side="left").tokenise(text).input_ids
    plain = make_encoder("llama").tokenise(text).input_ids[0]
    assert (right[0], left[0]) == (plain[:2], plain[-2:])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_save_and_load(make_encoder, kind, tmp_path):
    encoder = make_encoder(kind, projection_dim=8, template=TemplateConfig(fields=("year", "title")))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    encoder.save(tmp_path)
    loaded = ItemEncoder.load(tmp_path)
    np.testing.assert_array_equal(vectors(loaded, TEXTS), vectors(encoder, TEXTS))
    assert (loaded.config, loaded.template) == (encoder.config, encoder.template)
    (tmp_path / "head.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="cannot be read"):
        ItemEncoder.load(tmp_path)


def test_batches_hold_the_budget_and_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    batches = token_budget_batches(lengths, 256, max_items=20)
    assert sorted(np.concatenate(batches)) == list(range(500))
    for batch in batches:
        assert len(batch) == 1 or lengths[batch].max() * len(batch) <= 256
        assert len(batch) <= 20
    assert [len(batch) for batch in token_budget_batches(np.array([300, 1]), 256)] == [1, 1]


def test_embedded_texts_become_little_endian_bytes(make_encoder):
    encoder = make_encoder("bert")
    keys = pa.array([b"k" * 16, b"l" * 16])
    table = as_table(keys, embed_texts(encoder, TEXTS[:2], EmbedConfig(output_dtype="float32")))
    stored = np.stack([np.frombuffer(cell, "<f4") for cell in table.column("embedding").to_pylist()])
    np.testing.assert_array_equal(stored, vectors(encoder, TEXTS[:2]))
    assert table.column("key").to_pylist() == [b"k" * 16, b"l" * 16]
    assert table.column("n_tokens").to_pylist() == encoder.tokenise(TEXTS[:2]).lengths.tolist()
    half = as_table(keys, embed_texts(encoder, TEXTS[:2], EmbedConfig()))
    assert [len(cell) for cell in half.column("embedding").to_pylist()] == [64, 64]


@pytest.fixture
def poisoned(make_encoder, monkeypatch):
    """An encoder for which the numbers 50 to 59 are poison, each in its own way; and the batches it saw."""
    encoder = make_encoder("bert")
    number = encoder.tokenizer.convert_tokens_to_ids
    raises, infinite, huge, zero = (number(str(n)) for n in (50, 51, 52, 53))
    forward, tokenise, seen = encoder.forward, encoder.tokenise, []

    def model(ids, mask):
        seen.append(len(ids))
        if (ids == raises).any():
            raise RuntimeError("the model\ncannot")
        found = forward(ids, mask)
        for bad, value in ((infinite, float("nan")), (huge, 1e6), (zero, 0.0)):
            found[(ids == bad).any(1)] = value
        return found

    def split(texts):
        if any("59" in text for text in texts):
            raise ValueError("cannot split")
        return tokenise(texts)

    monkeypatch.setattr(encoder, "forward", model)
    monkeypatch.setattr(encoder, "tokenise", split)
    return encoder, seen


def test_poison_is_found_and_the_rest_is_embedded(poisoned):
    encoder, _ = poisoned
    texts = [f"red {n} " + "blue " * (n % 7) for n in range(60)]
    result = embed_texts(encoder, texts, EmbedConfig(token_budget=128))
    assert result.failed == {
        50: "RuntimeError: the model",
        51: "its vector is zero or not finite in float16",
        52: "its vector is zero or not finite in float16",
        53: "its vector is zero or not finite in float16",
        59: "ValueError: cannot split",
    }
    good = [row for row in range(60) if row not in result.failed]
    assert result.rows.tolist() == good
    expected = vectors(encoder, [texts[row] for row in good])
    np.testing.assert_allclose(result.vectors.astype(np.float32), expected, atol=2e-3)
    assert 53 not in embed_texts(encoder, texts, EmbedConfig(output_dtype="float32"), failed={53: "known"}).rows
    assert 52 in embed_texts(encoder, texts, EmbedConfig(output_dtype="float32")).rows


def test_a_failed_pass_keeps_nothing_while_its_halves_are_tried(make_encoder, monkeypatch):
    """It may have failed for want of memory."""
    encoder, encode = make_encoder("bert"), ItemEncoder.encode
    held: list[weakref.ref] = []

    def full(self, ids):
        assert all(each() is None for each in held)
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        if len(ids) > 1:
            raise MemoryError(tensor.shape)
        return encode(self, ids)

    monkeypatch.setattr(ItemEncoder, "encode", full)
    assert embed_texts(encoder, [f"red {n}" for n in range(8)], EmbedConfig()).failed == {}
    assert len(held) == 15


def test_suspects_are_tried_first_and_by_themselves(poisoned):
    encoder, _ = poisoned
    told = []
    texts = [f"red {n}" for n in range(20)]
    result = embed_texts(
        encoder, texts, EmbedConfig(), suspects=[[3, 4], [5]], attempt=lambda *told_of: told.append(told_of)
    )
    assert told[:2] == [([3, 4], 0), ([5], 0)]
    assert sorted(told[2][0]) == [n for n in range(20) if n not in (3, 4, 5)]
    assert result.rows.tolist() == list(range(20))
    assert result.padded >= int(result.n_tokens.sum())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_fast_path_on_a_cpu_computes_the_same(make_encoder, kind):
    texts = [f"red {n} " + "blue " * (n % 9) for n in range(60)]
    exact = vectors(make_encoder(kind), texts)
    encoder = make_encoder(kind, compute_dtype="bfloat16")
    speed_up(encoder)
    config = EmbedConfig(output_dtype="float32")
    fast = embed_texts(encoder, texts, config).vectors
    alone = np.concatenate([embed_texts(encoder, [text], config).vectors for text in texts])
    for other in (exact, alone):
        cosine = (fast * other).sum(1) / (np.linalg.norm(fast, axis=1) * np.linalg.norm(other, axis=1))
        assert cosine.min() > 0.999
        assert cosine.mean() > 0.9998
    plain = make_encoder(kind)
    speed_up(plain)
    packed = [module for module in plain.modules() if isinstance(module, PackedLinear)]
    packing = packs(plain.device, torch.float32)
    assert bool(packed) == packing
    assert any(module.after[0] == "gelu" for module in packed) == (packing and kind == "bert")
    np.testing.assert_allclose(vectors(plain, texts), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 32, 47, 48, 50, 64, 100, 128, 130])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_short_attention_is_attention(length, mask):
    generator = torch.Generator().manual_seed(length)
    query, key, value = torch.randn(3, 4, length, 2, 8, generator=generator).transpose(2, 3)
    real = torch.arange(length) < torch.tensor([length, max(1, length - 3), 1, length])[:, None]
    given = {"bool": real[:, None, None], "additive": torch.where(real, 0.0, -1e9)[:, None, None], None: None}[mask]
    given = None if given is None else given.expand(4, 1, length, length)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=given).transpose(1, 2)
    found, _ = _short_attention(nn.Module(), query, key, value, given)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    half, _ = _short_attention(nn.Module(), *(x.bfloat16() for x in (query, key, value)), given)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_query_without_a_key_in_its_window_is_no_nan(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_AVX512", False)  # plain products for all short texts
    monkeypatch.setattr(cpu, "_AMX", False)
    query, key, value = torch.randn(3, 2, 2, 12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    near = (torch.arange(12)[:, None] - torch.arange(12)).abs() < 4
    mask = (near & (torch.arange(12) < torch.tensor([12, 3])[:, None, None]))[:, None]
    found, _ = _short_attention(nn.Module(), query, key, value, mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1, :3], expected[1, :3], atol=0.03, rtol=0)


@pytest.mark.parametrize(("name", "way"), [("gelu", "none"), ("gelu_10", None), ("relu", None)])
def test_an_activation_is_taken_for_a_gelu_only_where_it_is_one(name, way):
    module = nn.Module()
    module.dense, module.intermediate_act_fn = nn.Linear(2, 2), ACT2FN[name]
    assert cpu._gelu(module) == way


def test_values_of_another_width_than_keys_are_attended_to(monkeypatch):
    query, key = torch.randn(2, 2, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    value, mask = key[..., :6], (torch.arange(50) < 40).expand(2, 1, 50, 50)
    found, _ = _short_attention(nn.Module(), query, key, value, mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def threads():
    """Set torch's threads; they are as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_stream_a_thread_computes_the_same(make_encoder, threads):
    encoder = make_encoder("bert")
    texts = [f"red {n} " + "blue " * (n % 9) for n in range(60)]
    told, found = [], []
    for count in (1, 3):
        threads(count)
        attempts = []
        config = EmbedConfig(output_dtype="float32", token_budget=32)
        found.append(embed_texts(encoder, texts, config, attempt=lambda *of, told_of=attempts: told_of.append(of)))
        told.append(attempts)
        assert torch.get_num_threads() == count
    np.testing.assert_array_equal(found[0].vectors, found[1].vectors)
    assert found[0].padded == found[1].padded
    assert {stream for _, stream in told[0]} == {0}
    assert {stream for _, stream in told[1]} <= {0, 1, 2}
    assert sorted(rows for rows, _ in told[0]) == sorted(rows for rows, _ in told[1])


def test_streams_share_the_batches_and_end_with_an_error(threads):
    threads(2)
    meeting, seen, begun = threading.Barrier(2, timeout=30), [], []

    def work(batch: int, stream: int) -> None:
        meeting.wait()  # two at once
        seen.append((batch, stream, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    def failing(batch: int, stream: int) -> None:
        begun.append(batch)
        if batch == 2:
            raise ValueError("the third")
        time.sleep(0.01)

    in_streams(torch.device("cpu"), work, range(4))
    assert sorted(batch for batch, *_ in seen) == [0, 1, 2, 3]
    assert {stream for _, stream, *_ in seen} == {0, 1}
    assert {(count, inference) for *_, count, inference in seen} == {(1, True)}
    with pytest.raises(ValueError, match="the third"):
        in_streams(torch.device("cpu"), failing, range(1_000))
    assert len(begun) < 100
    assert torch.get_num_threads() == 2


CODE = """
from pathlib import Path
from transformers.activations import ACT2FN
from transformers import LlamaConfig, LlamaModel
(Path(__file__).parent / "ran").touch()
class HouseConfig(LlamaConfig):
    model_type = "house"
class HouseModel(LlamaModel):
    config_class = HouseConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_trusted(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(llama_folder, tmp_path / "house")
    (tmp_path / "house" / "house.py").write_text(CODE)
    config = json.loads((llama_folder / "config.json").read_text())
    config |= {
        "model_type": "house",
        "auto_map": {"AutoConfig": "house.HouseConfig", "AutoModel": "house.HouseModel"},
    }
    (tmp_path / "house" / "config.json").write_text(json.dumps(config))
    settings = {"model": str(tmp_path / "house"), "pooling": "item_token", "compute_dtype": "float32"}
    with pytest.raises(ConfigError, match=r"if you trust its source, set encoder\.trust_remote_code = true"):
        ItemEncoder.from_config(EncoderConfig(**settings), TemplateConfig())
    assert list(tmp_path.rglob("ran")) == []
    encoder = ItemEncoder.from_config(EncoderConfig(**settings, trust_remote_code=True), TemplateConfig())
    assert type(encoder.model).__name__ == "HouseModel"
    assert list(tmp_path.rglob("ran"))
    (tmp_path / "tower").mkdir()
    encoder.save(tmp_path / "tower")
    np.testing.assert_array_equal(vectors(ItemEncoder.load(tmp_path / "tower"), TEXTS), vectors(encoder, TEXTS))
