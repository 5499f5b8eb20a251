"""Configuration: where values come from, and what is refused."""

from __future__ import annotations

import pickle

import pytest

from jobs.config import SHIPPED, load_config
from schemas.errors import ConfigError


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_toml_loads_under_every_name_in_it(path):
    config = load_config(path.name, None, [])
    assert load_config(path.stem, None, []).model_dump() == config.model_dump()
    for name in config.variants:
        assert load_config(path.name, name, []).name == name


def test_another_process_gets_the_same_configuration(tmp_path):
    toml = tmp_path / "own.toml"
    toml.write_text("[train]\nepochs = 2\n")
    config = load_config(str(toml), "x", ["train.seed=7"])
    there = pickle.loads(pickle.dumps(config))
    assert there == config
    assert (there.name, there.train.epochs, there.train.seed) == ("x", 2, 7)


def test_later_sources_win(tmp_path, monkeypatch):
    toml = tmp_path / "own.toml"
    toml.write_text(
        '[train]\nepochs = 2\nbatch_size = 8\nseed = 1\nnegatives = 5\n[variants."x"]\n"train.seed" = 3\n'
        '"train.negatives" = 6\n'
    )
    monkeypatch.setenv("HLLM__TRAIN__BATCH_SIZE", "16")
    monkeypatch.setenv("HLLM__TRAIN__SEED", "2")
    config = load_config(str(toml), "x", ["train.negatives=7", "store=elsewhere"])
    assert config.name == "x"
    assert config.train.patience == 5  # default
    assert config.train.epochs == 2  # TOML over default
    assert config.train.batch_size == 16  # environment over TOML
    assert config.train.seed == 3  # variant over environment
    assert config.train.negatives == 7  # --set over variant
    assert str(config.store) == "elsewhere"
    assert load_config(str(toml), None, []).train.negatives == 5


def test_set_takes_toml_values_and_bare_words():
    config = load_config(None, None, ["evaluate.ks=[1, 10]", "data.name=shop", "evaluate.repeats=true"])
    assert config.evaluate.ks == (1, 10)
    assert config.data.name == "shop"
    assert config.evaluate.repeats is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 3", r"own\.toml: train\.epoch: Extra inputs .*got 3"),
        ("[trains]\nepochs = 3", r"own\.toml: trains: Extra inputs"),
        ("[train]\nepochs = 'many'", r"train\.epochs: .*valid integer.*got 'many'"),
        ("[train]\nepochs = 0", r"train\.epochs: .*greater than 0 \(got 0\)"),
        ("[train\nepochs = 3", r"own\.toml: is not TOML"),
    ],
)
def test_bad_toml_names_file_key_and_value(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path), None, [])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs", "expected key=value"),
        ("train.speed=3", r"train\.speed: Extra inputs"),
        ("train=3", r"train: .*got 3"),
        ("store.folder=3", "store: "),
    ],
)
def test_bad_assignments_are_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, None, [assignment])


def test_an_assignment_below_a_value_is_named():
    with pytest.raises(ConfigError, match=r"train\.epochs: train was set to 3 before"):
        load_config(None, None, ["train=3", "train.epochs=2"])


def test_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("HLLM__TRAIN__EPOCHS", "many")
    with pytest.raises(ConfigError, match=r"environment, HLLM__TRAIN__EPOCHS: train\.epochs: .*many"):
        load_config("demo.toml", None, [])


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HLLM__TRIAN__EPOCHS", "3", "HLLM__TRIAN__EPOCHS: there is no 'trian'; there are"),
        ("HLLM__TRAIN", "three", "set its parts, as in HLLM__TRAIN__EPOCHS=3"),
    ],
)
def test_an_environment_variable_of_no_section_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"environment.*{message}"):
        load_config(None, None, [])


def test_a_missing_toml_is_named_with_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file; shipped are .*demo\.toml"):
        load_config("nowhere.toml", None, [])
