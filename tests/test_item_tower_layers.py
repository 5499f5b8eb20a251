"""Checkpointed and compiled layers: the same loss and gradients, and each layer computed a second time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.joint import JointConfig, JointStep
from user_tower.lora import LoraSettings, add_lora
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Histories, training_batches
from user_tower.steps import UserStep
from user_tower.train import TrainConfig

ITEMS = 20
TEXTS = [f"the {'red' if n % 2 else 'blue'} {n} {'a ' * (n % 7)}" for n in range(ITEMS)]


def one_batch():
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 9, 12))])
    items = rng.integers(0, ITEMS, offsets[-1])
    histories = Histories([str(n) for n in range(12)], offsets, items, np.arange(offsets[-1]) * 1000)
    return next(iter(training_batches(histories, 8, 12, np.random.default_rng(0))))


def counted(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def slopes(step: torch.nn.Module) -> dict[str, torch.Tensor]:
    batch = one_batch()
    torch.manual_seed(5)
    loss = step.train()(batch, batch, 3)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in step.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backbone", ["sasrec", "hstu", "llm"])
def test_a_checkpointed_user_tower_has_the_same_gradients_dropout_included(backbone):
    def step(**settings):
        torch.manual_seed(0)
        shape = UserTowerConfig(backbone=backbone, hidden=16, layers=2, heads=2, dropout=0.3, history=8)
        tower = UserTower(shape, 6, None)
        vectors = np.random.default_rng(0).standard_normal((ITEMS, 6))
        catalog = tower.catalog([str(n) for n in range(ITEMS)], vectors, np.arange(ITEMS))
        sampler = NegativeSampler(torch.arange(ITEMS), torch.ones(ITEMS), 0, "uniform")
        made = UserStep(tower, catalog, sampler, TrainConfig(**settings))
        layer = (tower.backbone.model.layers if backbone == "llm" else tower.backbone.blocks)[0]
        first = {"llm": "input_layernorm", "sasrec": "attention_norm", "hstu": "norm"}[backbone]
        return made, counted(getattr(layer, first))

    plain, once = step()
    checkpointed, twice = step(gradient_checkpointing=True)
    assert_same(slopes(checkpointed), slopes(plain))
    assert (len(once), len(twice)) == (1, 2)


def joint(encoder, **settings) -> JointStep:
    torch.manual_seed(0)
    shape = UserTowerConfig(hidden=16, layers=1, heads=2, dropout=0.0, history=8)
    train = TrainConfig(**settings)
    config = JointConfig(user_tower=shape, train=train, token_budget=60, graph_tokens=80, collapse_floor=0.0)
    tower = UserTower(shape, encoder.dim, None)
    return JointStep(encoder, tower, encoder.tokenise(TEXTS).input_ids, torch.arange(ITEMS), config)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpointed_item_tower_has_the_same_gradients_and_no_dropout(make_encoder, kind, lora):
    def step(**settings):
        encoder = make_encoder(kind)
        torch.manual_seed(1)
        if lora:
            encoder.model = add_lora(encoder.model, LoraSettings(rank=2))
        inner = encoder.model.get_base_model() if lora else encoder.model
        layer = inner.encoder.layer[0].attention if kind == "bert" else inner.layers[0].input_layernorm
        return joint(encoder, **settings), counted(layer)

    (plain, once), (checkpointed, more) = step(), step(gradient_checkpointing=True)
    expected = slopes(plain)
    assert_same(slopes(checkpointed), expected)
    assert len(more) > len(once)
    if kind == "llama":
        assert_same(slopes(step(gradient_checkpointing=True, packing="packed")[0]), expected)


def test_what_is_compiled_keeps_its_names(make_encoder, monkeypatch):
    """Nothing is generated before the first call, so this costs nothing; what is computed, a GPU's test says."""
    plain, compiled = joint(make_encoder("llama")), joint(make_encoder("llama"), compile=True)
    assert all(layer._compiled_call_impl is not None for layer in compiled.encoder.model.layers)
    assert all(layer._compiled_call_impl is None for layer in plain.encoder.model.layers)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
