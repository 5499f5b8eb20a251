"""A model that cannot be loaded as it was trained, or cannot read the texts, is refused in one line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, FNetConfig, FNetModel, MambaConfig, MambaModel, MPNetConfig, MPNetModel

from item_tower.cpu import speed_up
from item_tower.embed import encode_texts
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig
from schemas.errors import ConfigError

TEXTS = ["red 1", "the blue 2, year: 3"]
NOWHERE = [
    "no/such-folder-or-hub-name",
    "",
    "/no/such/folder",
    "./no/such/folder",
    "package:no_such_package/x",
    "package:torch/no",
    "package:no.such/x",
]


@pytest.mark.parametrize("name", NOWHERE)
def test_an_unknown_model_is_a_clear_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it is read once, at the import
    with pytest.raises(ConfigError, match=r"encoder\.model = "):
        ItemEncoder.from_config(EncoderConfig(model=name), TemplateConfig())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("weights", r"no weights for \d+ of its parameters, such as encoder\.layer\.1\."),
        ("tokenizer", "has no tokenizer"),
        ("bytes", "cannot be loaded"),
    ],
)
def test_a_model_that_would_be_random_or_read_nothing_is_a_clear_error(bert_folder, tmp_path, damage, reason):
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    weights = folder / "model.safetensors"
    if damage == "weights":
        tensors = {name: tensor for name, tensor in load_file(weights).items() if ".layer.1." not in name}
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "tokenizer":
        for path in folder.glob("*tok*"):
            path.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=reason):
        ItemEncoder.from_config(EncoderConfig(model=str(folder), max_length=32), TemplateConfig())


def test_a_pooler_that_is_never_read_is_left_out(bert_folder, tmp_path):
    """Of MPNet's a masked language model has none: it would be random, and the fingerprint with it."""
    config = MPNetConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    MPNetModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    for path in bert_folder.glob("*tok*"):
        shutil.copy(path, tmp_path)
    config = EncoderConfig(model=str(tmp_path), max_length=32)
    made = [ItemEncoder.from_config(config, TemplateConfig()) for _ in range(2)]
    assert fingerprint(made[0]) == fingerprint(made[1])
    first, second = (encode_texts(encoder, TEXTS, 64)[0] for encoder in made)
    np.testing.assert_array_equal(first, second)


def test_texts_longer_than_the_model_are_refused_beforehand(make_encoder):
    assert make_encoder("bert", max_length=64).config.max_length == 64
    with pytest.raises(ConfigError, match=r"max_length = 65: .* has positions for 64 tokens"):
        make_encoder("bert", max_length=65)
    with pytest.raises(ConfigError, match="max_length = 2 leaves no room beside 2 special tokens"):
        make_encoder("bert", max_length=2)
    assert make_encoder("llama", max_length=1000).config.max_length == 1000  # rotary positions end nowhere


def test_a_model_whose_vectors_depend_on_the_texts_beside_them_is_refused(bert_folder, tmp_path):
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(bert_folder)
    FNetModel(
        FNetConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    ).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"encoder\.model = .*does not heed its attention mask"):
        ItemEncoder.from_config(EncoderConfig(model=str(tmp_path), max_length=32), TemplateConfig())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_the_weights_of_its_layers_itself_stays_unpacked(llama_folder, tmp_path, dtype):
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(llama_folder)
    config = MambaConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
    MambaModel(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    settings = EncoderConfig(model=str(tmp_path), max_length=32, pooling="item_token", compute_dtype=dtype)
    encoder = ItemEncoder.from_config(settings, TemplateConfig(prompt=""))
    before, *_ = encode_texts(encoder, TEXTS, 256)
    speed_up(encoder)
    after, *_ = encode_texts(encoder, TEXTS, 256)
    assert np.array_equal(after, before)
