"""Each ingredient changes the fingerprint; what must not matter does not (DESIGN 5)."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers.normalizers import Replace, Sequence
from tokenizers.pre_tokenizers import WhitespaceSplit

from item_tower import fingerprint as module
from item_tower.encoder import ItemEncoder
from item_tower.fingerprint import PROBE_TEXT, fingerprint, ingredients
from item_tower.prompt import TemplateConfig


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_round_trip_changes_nothing(make_encoder, kind, tmp_path):
    encoder = make_encoder(kind, projection_dim=8)
    encoder.save(tmp_path)
    loaded = ItemEncoder.load(tmp_path)
    assert ingredients(loaded, "float16") == ingredients(encoder, "float16")
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert fingerprint(ItemEncoder.load(tmp_path / "again")) == fingerprint(encoder)


def nudge(name: str):
    def change(encoder: ItemEncoder) -> None:
        with torch.no_grad():
            parameter = dict(encoder.named_parameters())[name]
            parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(1e9))

    return change


@pytest.mark.parametrize(
    ("ingredient", "settings", "change"),
    [
        ("weights", {}, nudge("model.norm.weight")),
        ("weights", {}, nudge("item_token")),
        ("weights", {"projection_dim": 8}, nudge("projection.weight")),
        ("architecture", {}, lambda e: setattr(e.model.config, "rms_norm_eps", 1e-3)),
        ("architecture", {}, lambda e: setattr(e.model.config, "num_attention_heads", 4)),
        ("tokenizer", {}, lambda e: e.tokenizer.add_tokens(["new"])),
        ("tokenizer", {}, lambda e: setattr(e.tokenizer.backend_tokenizer, "pre_tokenizer", WhitespaceSplit())),
    ],
)
def test_what_the_model_computes_is_covered(make_encoder, ingredient, settings, change):
    before, encoder = make_encoder("llama", **settings), make_encoder("llama", **settings)
    change(encoder)
    differing = {
        name
        for name, value in ingredients(before, "float16").items()
        if value != ingredients(encoder, "float16")[name]
    }
    assert ingredient in differing
    assert fingerprint(before) != fingerprint(encoder)


@pytest.mark.parametrize(
    ("ingredient", "settings"),
    [
        ("max_length", {"max_length": 31}),
        ("truncation_side", {"truncation_side": "left"}),
        ("pooling", {"pooling": "cls"}),
        ("projection", {"projection_dim": 32}),
        ("compute_dtype", {"compute_dtype": "bfloat16"}),
        ("template", {"template": TemplateConfig(prompt="x: ")}),
        ("template", {"template": TemplateConfig(prompt="", separator="; ")}),
        ("template", {"template": TemplateConfig(prompt="", style="reference")}),
        ("template", {"template": TemplateConfig(prompt="", empty_text="quarantine")}),
        ("fields", {"template": TemplateConfig(prompt="", fields=("title", "year"))}),
    ],
)
def test_every_setting_is_covered(make_encoder, ingredient, settings):
    before, after = make_encoder("bert"), make_encoder("bert", **settings)
    assert ingredients(before, "float16")[ingredient] != ingredients(after, "float16")[ingredient]
    assert fingerprint(before) != fingerprint(after)


def test_field_order_output_dtype_and_render_version_are_covered(make_encoder, monkeypatch):
    first = make_encoder("bert", template=TemplateConfig(fields=("title", "year")))
    second = make_encoder("bert", template=TemplateConfig(fields=("year", "title")))
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first, "float16") != fingerprint(first, "float32")
    before = fingerprint(first)
    monkeypatch.setattr(module, "RENDER_VERSION", 99)
    assert fingerprint(first) != before


def test_names_versions_and_execution_choices_do_not_matter(make_encoder, bert_folder, tmp_path):
    expected = fingerprint(make_encoder("bert"))
    moved = tmp_path / "another-name"
    shutil.copytree(bert_folder, moved)
    config = json.loads((moved / "config.json").read_text())
    changed = {"transformers_version": "9.9", "_name_or_path": "x", "use_cache": False, "architectures": ["Y"]}
    (moved / "config.json").write_text(json.dumps(config | changed))
    assert fingerprint(make_encoder("bert", model=str(moved))) == expected
    eager = make_encoder("bert", model=str(moved))
    eager.model.set_attn_implementation("eager")
    assert fingerprint(eager) == expected


def test_the_probe_is_read_whole_however_short_texts_are_cut(make_encoder):
    """The tail of the probe, with what few texts have, tells tokenizers apart that agree on its start."""
    encoder = make_encoder("bert", max_length=4)
    before = ingredients(encoder, "float16")["tokenizer"]
    assert before == ingredients(make_encoder("bert"), "float16")["tokenizer"]
    backend = encoder.tokenizer.backend_tokenizer
    backend.normalizer = Sequence([backend.normalizer, Replace("end", "red")])
    assert (
        encoder.tokenise([PROBE_TEXT]).input_ids
        == make_encoder("bert", max_length=4).tokenise([PROBE_TEXT]).input_ids
    )
    assert ingredients(encoder, "float16")["tokenizer"] != before
