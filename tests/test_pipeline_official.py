"""A checkpoint of the paper's own code becomes our towers, and they compute what that code computes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official import HIDDEN, model_folder, official_state, official_text, plain_item, plain_user
from safetensors.torch import save_file
from torch import Tensor

from item_tower.embed import encode_texts
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig
from pipeline.baselines import TowerRecommender
from pipeline.official import CheckpointConfig, import_towers
from pipeline.state_dict import read_state_dict
from schemas.errors import ConfigError, DataError
from user_tower.model import UserTower, UserTowerConfig
from user_tower.sequences import Histories

MAX_TEXT, LONGEST = 12, 6
KEYS = ["title", "year", "kind"]
ITEMS = [
    {"title": "The red 1", "year": 1, "kind": "nan"},
    {"title": "blue , the 5", "year": 7, "kind": "a"},
    {"title": "a " * 30, "year": 9, "kind": ""},  # cut
    {"title": "red", "year": 0, "kind": None},
    {"title": "12 13 14 the blue", "year": 20, "kind": "red"},
]
TEXTS = [official_text(item, KEYS) for item in ITEMS]
HISTORIES = [[0, 1, 2, 3, 4, 0, 1], [3], [4, 4, 2]]
TOWER = UserTowerConfig(backbone="llm", projections=False, history=LONGEST)
TEMPLATE = TemplateConfig(style="reference", fields=tuple(KEYS))


@pytest.fixture
def llama(tmp_path):
    """A folder with a configuration, and a random state dict that fits."""
    config = model_folder(tmp_path / "llm")
    return str(tmp_path / "llm"), official_state(config)


def encoder_config(model: str, **settings) -> EncoderConfig:
    values = {"pooling": "item_token", "max_length": MAX_TEXT, "compute_dtype": "float32"} | settings
    return EncoderConfig(model=model, **values)


def towers(weights: Path, model: str, **settings) -> tuple[ItemEncoder, UserTower]:
    return import_towers(CheckpointConfig(weights=str(weights)), encoder_config(model, **settings), TEMPLATE, TOWER)


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def user_vectors(tower: UserTower, items: np.ndarray) -> np.ndarray:
    catalog = tower.catalog([str(n) for n in range(len(items))], items, np.arange(len(items)))
    offsets = np.cumsum([0, *map(len, HISTORIES)])
    histories = Histories(["a", "b", "c"], offsets, np.concatenate(HISTORIES).astype(np.int64))
    return TowerRecommender(tower, catalog).queries(histories).numpy()


def same_as_the_plain_forward(encoder: ItemEncoder, tower: UserTower, state: dict[str, Tensor]) -> None:
    items = torch.stack([plain_item(state, text, MAX_TEXT) for text in TEXTS])
    users = torch.stack([plain_user(state, items, history, LONGEST) for history in HISTORIES])
    found, _, _ = encode_texts(encoder, TEXTS, 64)
    np.testing.assert_allclose(found, items.numpy(), atol=1e-5)
    np.testing.assert_allclose(user_vectors(tower, found), users.numpy(), atol=1e-5)
    # what must matter does: which items, and that the user LLM reads vectors of their own length
    assert (users @ users.T - 2 * torch.eye(3)).max() < 0.9999
    assert (plain_user(state, F.normalize(items, dim=-1), HISTORIES[0], LONGEST) - users[0]).abs().max() > 1e-2


def test_vectors_equal_those_of_the_paper_s_code(llama, tmp_path):
    """Grouped keys and values; [ITEM] at position 12 there, after the text here; padding left there, right here."""
    model, state = llama
    encoder, tower = towers(saved(state, tmp_path), model)
    same_as_the_plain_forward(encoder, tower, state)
    assert tower.scale().item() == pytest.approx(np.exp(3.25))
    assert max(parameter.numel() for parameter in tower.parameters()) == 48 * HIDDEN  # its vocabulary is not kept


def test_both_towers_survive_a_save_and_a_load(llama, tmp_path):
    model, state = llama
    encoder, tower = towers(saved(state, tmp_path), model)
    (tmp_path / "items").mkdir()
    (tmp_path / "users").mkdir()
    encoder.save(tmp_path / "items")
    tower.save(tmp_path / "users")
    loaded, loaded_tower = ItemEncoder.load(tmp_path / "items"), UserTower.load(tmp_path / "users")
    assert fingerprint(loaded) == fingerprint(encoder)
    assert loaded_tower.fingerprint() == tower.fingerprint()
    same_as_the_plain_forward(loaded, loaded_tower, state)


def test_weights_in_bfloat16(llama, tmp_path):
    model, state = llama
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    same_as_the_plain_forward(*towers(saved(state, tmp_path), model), state)


def test_without_an_item_token_the_text_is_pooled(llama, tmp_path):
    model, state = llama
    path = saved(state, tmp_path)
    with pytest.raises(DataError, match="unexpected: item_emb_tokens"):
        towers(path, model, pooling="mean")
    del state["item_emb_tokens"]
    path = saved(state, tmp_path)
    with pytest.raises(DataError, match="missing: item_emb_tokens"):
        towers(path, model)
    same_as_the_plain_forward(*towers(path, model, pooling="mean"), state)


def test_baichuan_is_read_without_its_code(tmp_path):
    config = model_folder(tmp_path / "llm", kv_heads=4)
    raw = json.loads((tmp_path / "llm" / "config.json").read_text())
    raw |= {"model_type": "baichuan", "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}}
    state = official_state(config)
    for name in [name for name in state if "q_proj" in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("q_proj", "W_pack")] = torch.cat(parts)
    path = saved(state, tmp_path)
    (tmp_path / "llm" / "config.json").write_text(json.dumps(raw))
    same_as_the_plain_forward(*towers(path, str(tmp_path / "llm")), state)
    del raw["max_position_embeddings"]
    (tmp_path / "llm" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="without rotary positions"):
        towers(path, str(tmp_path / "llm"))


def shards(state: dict[str, Tensor], folder: Path, suffix: str) -> Path:
    """As zero_to_fp32.py writes them: two files, and an index that names the file of each tensor."""
    names, stem = sorted(state), {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    where = {name: f"{stem}-0000{1 + n % 2}-of-00002.{suffix}" for n, name in enumerate(names)}
    folder.mkdir()
    for file in set(where.values()):
        part = {name: state[name].clone() for name in names if where[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_and_wrapped_names_hold_the_same_state_dict(llama, tmp_path, suffix):
    _, state = llama
    wrapped = {f"_forward_module.module.{name}": tensor for name, tensor in state.items()}
    for found in (
        read_state_dict(shards(state, tmp_path / "whole", suffix)),
        read_state_dict(shards(wrapped, tmp_path / "wrapped", suffix) / next(iter(_indexes(suffix)))),
    ):
        assert set(found) == set(state)
        assert all(torch.equal(found[name], state[name]) for name in state)
    next((tmp_path / "whole").glob("*-00002-of-*")).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_state_dict(tmp_path / "whole")


def _indexes(suffix: str) -> list[str]:
    return [{"bin": "pytorch_model.bin.index.json", "safetensors": "model.safetensors.index.json"}[suffix]]


def test_an_index_that_lies_is_refused(llama, tmp_path):
    _, state = llama
    index = shards(state, tmp_path / "s", "bin") / "pytorch_model.bin.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"item_llm.model.extra": where["logit_scale"]}}))
    with pytest.raises(DataError, match=r"names \['item_llm\.model\.extra'\]"):
        read_state_dict(index.parent)
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../elsewhere.bin"}}))
    with pytest.raises(DataError, match="not a file beside it"):
        read_state_dict(index.parent)


def test_a_container_and_the_format_before_zip_are_opened(llama, tmp_path):
    _, state = llama
    torch.save({"module": {f"module.{name}": t for name, t in state.items()}, "step": 3}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pth"):
        found = read_state_dict(tmp_path / name)
        assert all(torch.equal(found[key], state[key]) for key in state)


class Harm:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return exec, ("open('harm', 'w').close()",)


def test_nothing_pickled_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"logit_scale": torch.ones(()), "x": Harm()}, tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Harm(), protocol=2))
    for name in ("a.bin", "b.bin"):
        with pytest.raises(DataError, match="holds more than tensors, which is not opened"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_what_is_no_state_dict_is_one_clear_error(llama, tmp_path):
    _, state = llama
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_state_dict(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds none of"):
        read_state_dict(tmp_path / "empty")
    (tmp_path / "empty" / "zero_to_fp32.py").touch()
    with pytest.raises(DataError, match=r"run `python zero_to_fp32\.py"):
        read_state_dict(tmp_path / "empty")
    torch.save(state | {"epoch": 3}, tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"\['epoch'\] are not tensors"):
        read_state_dict(tmp_path / "a.bin")
    torch.save([1, 2], tmp_path / "a.bin")
    with pytest.raises(DataError, match="holds list, not a state dict"):
        read_state_dict(tmp_path / "a.bin")
    path = saved(state, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cannot be read|damaged"):
        read_state_dict(path)


def test_every_key_that_does_not_fit_is_named(llama, tmp_path):
    model, state = llama
    gone = "user_llm.model.layers.1.mlp.up_proj.weight"
    del state[gone]
    state["item_llm.model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    state["item_mlp.weight"] = torch.zeros(2)
    state["item_emb_tokens"] = torch.zeros(1, 2, HIDDEN)
    with pytest.raises(DataError) as caught:
        towers(saved(state, tmp_path), model)
    assert str(caught.value).endswith(
        f"missing: {gone}; unexpected: item_llm.model.layers.2.mlp.up_proj.weight, item_mlp.weight; "
        f"of another shape: item_emb_tokens [1, 2, {HIDDEN}] in place of [1, 1, {HIDDEN}]"
    )


def test_what_is_never_read_may_be_there_or_not(llama, tmp_path):
    model, state = llama
    unread = ["item_llm.lm_head.weight", "user_llm.lm_head.weight", "user_llm.model.embed_tokens.weight"]
    state = {name: tensor for name, tensor in state.items() if name not in unread}
    state["item_llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    same_as_the_plain_forward(*towers(saved(state, tmp_path), model), state)


def test_a_user_llm_of_another_shape(llama, tmp_path):
    model, state = llama
    other = official_state(model_folder(tmp_path / "other", kv_heads=1), seed=1)
    state |= {name: tensor for name, tensor in other.items() if name.startswith("user_llm.")}
    path = saved(state, tmp_path)
    with pytest.raises(DataError, match="of another shape: user_llm"):
        towers(path, model)
    tower = TOWER.model_copy(update={"pretrained": str(tmp_path / "other")})
    found = import_towers(CheckpointConfig(weights=str(path)), encoder_config(model), TEMPLATE, tower)
    same_as_the_plain_forward(*found, state)


def test_settings_of_another_tower_are_refused_by_name(llama, tmp_path):
    model, state = llama
    path = saved(state, tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint\.weights is not set; .*projections must be false"):
        import_towers(CheckpointConfig(), encoder_config(model), TEMPLATE, UserTowerConfig(backbone="llm"))
    with pytest.raises(ConfigError, match=r"encoder\.projection_dim must not be set"):
        towers(path, model, projection_dim=8)
    config = json.loads((Path(model) / "config.json").read_text())
    (Path(model) / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="is of type 'gpt2'"):
        towers(path, model)


def test_towers_from_before_the_choice_of_projections_keep_their_fingerprint():
    tower = UserTower(UserTowerConfig(hidden=8, layers=1, heads=1, history=4), 4, None)
    for parameter in tower.parameters():
        parameter.data.zero_()
    assert tower.fingerprint() == "ea0880f819575fa511d44535b4477c49"


def test_a_tower_without_projections_needs_text_and_the_width(llama):
    with pytest.raises(ValueError, match="projections = false needs features = 'text'"):
        UserTowerConfig(projections=False, features="text+id")
    with pytest.raises(ConfigError, match="the backbone is 128 wide, the item vectors 32"):
        UserTower(UserTowerConfig(projections=False), HIDDEN, None)
