"""The user tower: sequences, loss, causality, training, and its file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ConfigError, StoreError, TrainingError
from user_tower import loss as loss_module
from user_tower.loss import info_nce
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Histories, last_events, training_batches, training_windows
from user_tower.steps import UserStep
from user_tower.train import TrainConfig, fit

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "dropout": 0.0, "history": 6}


def histories(*rows: list[int]) -> Histories:
    flat = np.array([item for row in rows for item in row], dtype=np.int64)
    return Histories([f"u{n}" for n in range(len(rows))], np.cumsum([0, *map(len, rows)]), flat)


def text_tower(backbone: str = "sasrec", items: int = 10, **settings):
    torch.manual_seed(0)
    tower = UserTower(UserTowerConfig(backbone=backbone, **(SMALL | settings)), 8, None).eval()
    vectors = np.random.default_rng(0).normal(size=(items, 8)).astype(np.float32)
    return tower, tower.catalog([f"i{n}" for n in range(items)], vectors, np.arange(items))


def every(items: int, count: int = 0) -> NegativeSampler:
    return NegativeSampler(torch.arange(items), torch.ones(items), count, "uniform")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(2, 12), st.integers(0, 3))
@settings(deadline=None)
def test_every_event_but_the_first_is_a_target_once(lengths, window, seed):
    events = histories(*[list(range(100 * user, 100 * user + n)) for user, n in enumerate(lengths)])
    targets = []
    for batch in training_batches(events, window, 3, np.random.default_rng(seed)):
        assert batch.items.shape[1] <= window
        for row, length in enumerate(batch.lengths):
            assert (batch.targets[row, :length] == batch.items[row, :length] + 1).all()
            assert (batch.targets[row, length:] == -1).all()
            targets += batch.targets[row, :length].tolist()
    expected = [100 * user + n for user, count in enumerate(lengths) for n in range(1, count)]
    assert sorted(targets) == expected


def test_windows_are_the_same_for_the_same_seed():
    events = histories(list(range(30)), list(range(50)))
    first, second = (training_windows(events, 7, np.random.default_rng(1)) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_last_events_are_the_newest():
    batch = last_events(histories([1, 2, 3, 4], [5], []), 2)
    assert batch.items.tolist() == [[3, 4], [5, 0], [0, 0]]
    assert batch.lengths.tolist() == [2, 1, 0]


def test_cut_map_and_select():
    events = histories([1, 2, 3], [4, 5])
    assert events.cut(np.array([1, 0])).offsets.tolist() == [0, 1, 1]
    mapped = events.map_items(np.array([0, 7, -1, 9, -1, 3]))
    assert [mapped.of(0).tolist(), mapped.of(1).tolist()] == [[7, 9], [3]]
    chosen = events.select(np.array([1, 0]))
    assert (chosen.users, chosen.items.tolist()) == (["u1", "u0"], [4, 5, 1, 2, 3])


@pytest.mark.parametrize("chunk", [1 << 24, 9 * 5])
def test_info_nce_and_its_gradients_are_cross_entropys_in_any_chunks(monkeypatch, chunk):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(12, 4, generator=generator, requires_grad=True)
    items = torch.randn(9, 4, generator=generator, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    targets, groups = torch.arange(12) % 9, torch.arange(9)
    found = info_nce(queries, items[targets], items, targets, groups, scale)
    expected = torch.nn.functional.cross_entropy(queries @ items.T * scale, targets)
    torch.testing.assert_close(found, expected)
    inputs = (queries, items, scale)
    torch.testing.assert_close(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs))


def test_info_nce_is_finite_where_the_positives_probability_underflows():
    queries = torch.tensor([[1.0, 0.0]], requires_grad=True)
    items = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    loss = info_nce(queries, items[:1], items, torch.tensor([0]), torch.tensor([0, 1]), torch.tensor(100.0))
    assert loss.item() == pytest.approx(200.0)
    assert torch.autograd.grad(loss, queries)[0].tolist() == [[200.0, 0.0]]


def test_info_nce_under_autocast_is_close_to_float32():
    generator = torch.Generator().manual_seed(0)
    unit = [torch.nn.functional.normalize(torch.randn(n, 32, generator=generator), dim=-1) for n in (64, 50)]
    queries, items = unit[0].requires_grad_(), unit[1]
    arguments = (
        queries,
        items[torch.arange(64) % 50],
        items,
        torch.arange(64) % 50,
        torch.arange(50),
        torch.tensor(14.0),
    )
    exact = info_nce(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        fast = info_nce(*arguments)
    assert fast.item() == pytest.approx(exact.item(), rel=1e-3)
    one, other = torch.autograd.grad(exact, queries)[0], torch.autograd.grad(fast, queries)[0]
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9999


def test_a_negative_with_the_positives_text_is_masked():
    queries = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = info_nce(queries, items[:1], items, torch.tensor([7]), torch.tensor([7, 7, 8]), torch.tensor(1.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("backbone", ["sasrec", "hstu", "llm"])
def test_a_query_sees_neither_the_future_nor_padding(backbone):
    tower, catalog = text_tower(backbone, timestamps=True)
    long, times = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[10, 20, 40, 900]]) * 10_000
    later = times + torch.tensor([[0, 0, 1, 2]]) * 86_400_000
    with torch.inference_mode():
        outputs = tower(catalog, long, torch.tensor([4]), times)
        changed = tower(catalog, torch.tensor([[1, 2, 9, 9]]), torch.tensor([4]), later)
        torch.testing.assert_close(outputs[:, :2], changed[:, :2], atol=1e-5, rtol=1e-5)
        assert (outputs[:, 2] - changed[:, 2]).abs().max() > 1e-3
        alone = tower.queries(catalog, torch.tensor([[5, 6]]), torch.tensor([2]), times[:, :2])
        both = torch.cat([times, torch.cat([times[:, :2], times[:, :2] * 0], dim=1)])
        batch = tower.queries(catalog, torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2]), both)
    torch.testing.assert_close(alone[0], batch[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"backbone": "llm"}, {"features": "id", "similarity": "dot"}, {"features": "text+id", "timestamps": True}],
)
def test_save_and_load(settings, tmp_path):
    config = UserTowerConfig(**(SMALL | settings))
    text, ids = config.features != "id", config.features != "text"
    tower = UserTower(config, 8 if text else None, ["a", "b"] if ids else None).eval()
    vectors = np.eye(3, 8, dtype=np.float32) if text else None
    tower.save(tmp_path)
    loaded = UserTower.load(tmp_path)
    assert loaded.fingerprint() == tower.fingerprint()
    found = [
        each.queries(
            each.catalog(["a", "b", "new"], vectors, np.arange(3)),
            torch.tensor([[0, 2]]),
            torch.tensor([2]),
            torch.tensor([[5, 6]]),
        )
        for each in (tower, loaded)
    ]
    torch.testing.assert_close(found[0], found[1])
    (tmp_path / "user_tower.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="cannot be read"):
        UserTower.load(tmp_path)


def test_an_unknown_id_gets_the_cold_vector():
    tower = UserTower(UserTowerConfig(features="id", **SMALL), None, ["a", "b"])
    catalog = tower.catalog(["new", "b", "a", "other"], None, np.arange(4))
    assert catalog.id_rows.tolist() == [2, 1, 0, 2]


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"hidden = 10 is not a multiple of user_tower\.heads = 4"):
        UserTower(UserTowerConfig(hidden=10, heads=4), 8, None)


def test_fit_keeps_the_best_weights_stops_early_and_repeats_itself():
    events = histories(*[[(start + step) % 10 for step in range(12)] for start in range(10)])
    config = TrainConfig(epochs=9, batch_size=4, learning_rate=1e-2, patience=2, warmup_steps=1, precision="float32")
    scores = [0.1, 0.5, 0.3, 0.2, 0.9]

    def train():
        tower, catalog = text_tower()
        step = UserStep(tower, catalog, every(10))
        seen = []

        def validate():
            seen.append(tower.fingerprint())
            return {"recall@10": scores[len(seen) - 1]}

        batches = lambda epoch: training_batches(events, 6, 4, np.random.default_rng(epoch))  # noqa: E731
        result = fit(
            step, [{"params": list(tower.parameters())}], batches, validate, config, name="t", metric="recall@10"
        )
        return result, seen, tower

    result, seen, tower = train()
    assert (result.epochs, result.best["recall@10"]) == (4, 0.5)
    assert tower.fingerprint() == seen[1]  # the weights of the second validation
    assert result.positions == 4 * 10 * 11
    losses = [point["loss"] for point in result.curve]
    assert losses[-1] < losses[0] / 1.5
    assert train()[1] == seen


def test_max_steps_ends_training_and_each_training_has_its_own_precision():
    events = histories(*[[0, 1, 2, 3]] * 20)
    for precision in ("float32", "bfloat16"):
        tower, catalog = text_tower()
        result = fit(
            UserStep(tower, catalog, every(10, 3)),
            [{"params": list(tower.parameters())}],
            lambda epoch: training_batches(events, 6, 2, np.random.default_rng(epoch)),
            lambda: {"recall@10": 0.0},
            TrainConfig(epochs=9, batch_size=2, max_steps=3, precision=precision),
            name="t",
            metric="recall@10",
        )
        assert result.steps == 3


def test_a_loss_that_is_not_finite_stops_training():
    tower, catalog = text_tower()
    broken = catalog._replace(vectors=torch.full_like(catalog.vectors, float("nan")))
    step = UserStep(tower, broken, every(10))
    events = histories(*[[0, 1, 2, 3]] * 4)
    with pytest.raises(TrainingError, match="t: the loss is nan at step 0"):
        fit(
            step,
            [{"params": list(tower.parameters())}],
            lambda epoch: training_batches(events, 6, 2, np.random.default_rng(epoch)),
            lambda: {"recall@10": 0.0},
            TrainConfig(precision="float32"),
            name="t",
            metric="recall@10",
        )
