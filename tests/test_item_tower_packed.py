"""Packed rows: the vectors of padded ones, no sight of a neighbour, gradients alike, and who may not be packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
)

from item_tower.batching import packed_batches
from item_tower.cpu import can_pack, halve, speed_up
from item_tower.decoders import packed
from item_tower.decoders.packed import allow_packing, pack
from item_tower.embed import EmbedConfig, embed_texts, encode_texts
from item_tower.encoder import ItemEncoder
from item_tower.fingerprint import fingerprint
from schemas.errors import ConfigError
from user_tower.model import UserTower, UserTowerConfig

TEXTS = ["red 1", "the blue 2, year: 3", "a", "red " * 20, "", "blue 5 . 6 7", "the the the the red", "red 1"]
SIZES = {"vocab_size": 10, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "llama, grouped heads": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=48)),
    "qwen3": lambda: Qwen3Model(
        Qwen3Config(**SIZES, num_key_value_heads=4, intermediate_size=48, head_dim=8, tie_word_embeddings=False)
    ),
    "mistral, window 4": lambda: MistralModel(
        MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, sliding_window=4)
    ),
    "gpt2, learned positions": lambda: GPT2Model(GPT2Config(vocab_size=10, n_embd=32, n_layer=2, n_head=4)),
}


def both_ways(encoder: ItemEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors padded, and packed a few texts a row."""
    encoder.packing = "padded"
    padded = encode_texts(encoder, texts, 64)[0]
    encoder.packing = "packed"
    assert encoder.packed
    return padded, encode_texts(encoder, texts, 64)[0]


def test_packed_vectors_equal_padded_ones(make_encoder):
    padded, found = both_ways(make_encoder("llama", projection_dim=8), TEXTS)
    np.testing.assert_allclose(found, padded, atol=1e-5)
    assert np.abs(padded[0] - padded[1]).max() > 1e-2
    np.testing.assert_array_equal(found[0].astype("<f2"), found[-1].astype("<f2"))  # the same text


@pytest.mark.parametrize("name", DECODERS)
def test_any_decoder_gives_each_sequence_what_it_gets_alone(name):
    torch.manual_seed(0)
    model = DECODERS[name]().eval()
    lengths = np.array([7, 1, 5, 5])
    parts = [torch.randn(1, n, 32) * 0.1 for n in lengths]
    with torch.inference_mode():
        alone = torch.cat([model(inputs_embeds=part).last_hidden_state for part in parts], dim=1)
        assert allow_packing(model)
        row = pack(lengths, torch.device("cpu"))
        found = model(inputs_embeds=torch.cat(parts, dim=1), **row.arguments()).last_hidden_state
        padded = model(inputs_embeds=parts[0], attention_mask=torch.ones(1, 7)).last_hidden_state
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded, alone[:, :7], atol=1e-5, rtol=0)


def test_another_text_changes_no_other_vector(make_encoder):
    """Bit for bit where the new text is as long; where it is not, matrix products of another shape may round
    otherwise, by no more than 1e-6."""
    encoder = make_encoder("llama")
    encoder.packing = "packed"
    before = encode_texts(encoder, TEXTS, 4096)[0]
    for place, text, tolerance in ((1, "red red 3, kind : 3", 0.0), (3, "blue " * 11, 1e-6)):
        changed = [text if row == place else other for row, other in enumerate(TEXTS)]
        after = encode_texts(encoder, changed, 4096)[0]
        others = np.arange(len(TEXTS)) != place
        np.testing.assert_allclose(after[others], before[others], atol=tolerance, rtol=0)
        assert np.abs(after[place] - before[place]).max() > 1e-3


def test_a_broken_neighbour_leaves_the_others_finite(make_encoder):
    encoder = make_encoder("llama")
    encoder.packing = "packed"
    word = encoder.tokenizer.convert_tokens_to_ids("50")
    encoder.model.get_input_embeddings().weight.data[word] = float("nan")
    texts = ["red 1", "red 50", "blue 2", "the a"]
    result = embed_texts(encoder, texts, EmbedConfig())
    assert list(result.failed) == [1]
    np.testing.assert_allclose(result.vectors, encode_texts(encoder, [texts[n] for n in (0, 2, 3)], 64)[0], atol=2e-3)


def test_gradients_are_those_of_padded_texts(make_encoder):
    found = []
    for way in ("padded", "packed"):
        encoder = make_encoder("llama", projection_dim=8)
        encoder.packing = way
        ids = encoder.tokenise(TEXTS).input_ids
        encoder.encode_ids(ids, 40, graph_tokens=20).square().sum().backward()
        found.append({name: p.grad for name, p in encoder.named_parameters()})
    assert found[0]["item_token"].abs().sum() > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_way_is_no_part_of_the_fingerprint_nor_of_what_is_saved(make_encoder, tmp_path):
    encoder = make_encoder("llama")
    before = fingerprint(encoder)
    encoder.packing = "packed"
    assert encoder.packed
    assert fingerprint(encoder) == before
    encoder.save(tmp_path)
    loaded = ItemEncoder.load(tmp_path)
    assert fingerprint(loaded) == before
    assert loaded.model.config._attn_implementation == "sdpa"


def test_encoders_and_the_cpu_stay_padded(make_encoder):
    bert = make_encoder("bert")
    bert.packing = "packed"
    assert not bert.packed
    assert not make_encoder("llama").packed  # auto, on a CPU


def test_the_fast_path_of_a_cpu_takes_packed_rows(make_encoder):
    padded, _ = both_ways(make_encoder("llama"), TEXTS)
    encoder = make_encoder("llama")
    encoder.packing = "packed"
    speed_up(encoder)
    result = embed_texts(encoder, TEXTS, EmbedConfig(output_dtype="float32", token_budget=32))
    np.testing.assert_allclose(result.vectors, padded, atol=1e-5)
    assert result.padded == result.n_tokens.sum()


def test_halved_weights_give_nearly_the_vectors_of_autocast(make_encoder):
    exact, _ = both_ways(make_encoder("llama"), TEXTS)
    encoder = make_encoder("llama", compute_dtype="bfloat16")
    halve(encoder)
    found = encode_texts(encoder, TEXTS, 64)[0]
    assert found.dtype == np.float32
    cosine = (found * exact).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1))
    assert cosine.min() > 0.999


no_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="bfloat16 is packed with AVX-512 alone"
)


@pytest.mark.parametrize("way", [halve, pytest.param(speed_up, marks=no_packing)])
def test_frequencies_of_positions_are_not_halved(make_encoder, way):
    encoder = make_encoder("llama", compute_dtype="bfloat16")
    before = {name: buffer.clone() for name, buffer in encoder.model.named_buffers()}
    way(encoder)
    assert {weight.dtype for weight in encoder.model.parameters()} == {torch.bfloat16}
    assert "rotary_emb.inv_freq" in before
    for name, buffer in encoder.model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_model_that_carries_a_state_along_is_not_packed(make_encoder):
    mamba = MambaModel(MambaConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not allow_packing(mamba)
    eager = DECODERS["llama, grouped heads"]()
    eager.set_attn_implementation("eager")
    assert not allow_packing(eager)
    assert eager.config._attn_implementation == "eager"
    encoder = make_encoder("llama")
    encoder.model.set_attn_implementation("eager")
    encoder.packing = "packed"
    with pytest.raises(ConfigError, match="a model of type llama does not take; set it to auto"):
        encoder.encode_ids([[5, 6]], 64)


def test_one_that_sees_its_neighbour_is_found_by_the_trial(monkeypatch):
    padded = packed._padded_attention

    def leaking(query, key, value, ends, longest, scale, dropout, window):
        whole = torch.tensor([0, len(query)])
        return padded(query, key, value, whole, len(query), scale, dropout, len(query))

    monkeypatch.setitem(packed._KERNELS, "padded", leaking)
    model = DECODERS["llama, grouped heads"]()
    assert not allow_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_is_traced_whole_and_once_for_rows_of_any_length(monkeypatch):
    """A graph that breaks at the attention is compiled anew for every layer and length; the kernel stands in for a
    GPU's, which is one operator."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.library.custom_op("hllm_test::attention", mutates_args={})
    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        return packed._padded_attention(query, key, value, ends, longest, scale, 0.0, longest)

    attention.register_fake(lambda query, *rest: torch.empty_like(query))
    monkeypatch.setitem(packed._KERNELS, "padded", lambda *values: attention(*values[:6]))
    model = DECODERS["llama, grouped heads"]()
    assert allow_packing(model)

    def states(lengths):
        row = pack(np.array(lengths), torch.device("cpu"))
        inputs = torch.randn(1, sum(lengths), SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return model(inputs_embeds=inputs, **row.arguments()).last_hidden_state

    rows = [[5, 3], [7, 9, 2], [4] * 6, [21, 1]]
    expected = [states(row) for row in rows]
    for layer in model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=keep)
    for row, plain in zip(rows, expected, strict=True):
        torch.testing.assert_close(states(row), plain)
    assert len(model.layers) > 1
    assert len(graphs) <= 2


def test_packed_batches_hold_the_budget_and_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    batches = packed_batches(lengths, 256, max_items=20)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(lengths[batch].sum() <= 256 and len(batch) <= 20 for batch in batches)
    full = [lengths[batch].sum() for batch in batches if len(batch) < 20][:-1]
    assert min(full) > 256 - 50
    assert [batch.tolist() for batch in packed_batches(np.array([3, 300, 1]), 256)] == [[1], [0, 2]]


@pytest.mark.parametrize("features", ["text", "text+id"])
def test_histories_packed_equal_histories_padded(features):
    torch.manual_seed(0)
    config = UserTowerConfig(backbone="llm", features=features, hidden=16, heads=2, dropout=0.0, history=6)
    vocabulary = [f"i{n}" for n in range(9)] if features != "text" else None
    tower = UserTower(config, 12, vocabulary).eval()
    before = tower.fingerprint()
    vectors = np.random.default_rng(0).standard_normal((9, 12))
    catalog = tower.catalog([f"i{n}" for n in range(9)], vectors, np.arange(9))
    lengths = torch.tensor([3, 6, 1, 2, 0])
    items = torch.randint(0, 9, (5, 6))
    real = torch.arange(6) < lengths[:, None]
    found, slopes = {}, {}
    for way in ("padded", "packed"):
        tower.backbone.packing = way
        assert tower.backbone.packed == (way == "packed")
        queries = tower(catalog, items, lengths, torch.zeros_like(items))[real]
        (queries * torch.arange(12.0)).sum().backward()
        found[way], slopes[way] = queries.detach(), {n: p.grad for n, p in tower.named_parameters()}
        tower.zero_grad()
    torch.testing.assert_close(found["packed"], found["padded"], atol=1e-5, rtol=0)
    for name, slope in slopes["padded"].items():
        if slope is not None:
            torch.testing.assert_close(slopes["packed"][name], slope, atol=1e-5, rtol=1e-4, msg=name)
    assert tower.fingerprint() == before


def test_another_history_changes_no_other_query():
    torch.manual_seed(0)
    tower = UserTower(UserTowerConfig(backbone="llm", hidden=16, heads=2, dropout=0.0, history=6), 12, None).eval()
    tower.backbone.packing = "packed"
    vectors = np.random.default_rng(0).standard_normal((9, 12))
    catalog = tower.catalog([f"i{n}" for n in range(9)], vectors, np.arange(9))
    lengths, items = torch.tensor([3, 6, 2]), torch.randint(0, 9, (3, 6))
    changed = items.clone()
    changed[1] = (changed[1] + 1) % 9
    with torch.inference_mode():
        before, after = (tower.queries(catalog, rows, lengths, torch.zeros_like(rows)) for rows in (items, changed))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1], atol=1e-3)
