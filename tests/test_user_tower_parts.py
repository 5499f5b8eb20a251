"""Backbones against plain implementations, times, negatives and their correction, ids beside text."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from user_tower.backbones import HSTU, SASRec
from user_tower.loss import info_nce
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import DRAWS, WHOLE, NegativeSampler
from user_tower.sequences import Histories, last_events, target_counts, training_batches
from user_tower.times import TIME_BUCKETS, TimeFeatures, calendar, time_buckets
from user_tower.train import TrainConfig

H, HEADS, HISTORY = 8, 2, 6


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Every weight random, those too that begin at one or zero."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return module.eval()


def norm(layer: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias


def test_hstu_is_its_formula_written_out_event_by_event():
    torch.manual_seed(0)
    model = perturbed(HSTU(H, 2, HEADS, 0.5, HISTORY))
    x, times = torch.randn(1, 4, H), torch.tensor([[0, 3_000, 3_500, 90_000_000]])
    positions = torch.arange(2, 6)[None]
    found = model(x, positions, times)[0]
    state = [x[0, n] + model.positions.weight[2 + n] for n in range(4)]
    width = H // HEADS
    for block in model.blocks:
        parts = [F.silu(block.uvqk.weight @ norm(block.norm, event) + block.uvqk.bias) for event in state]
        u, v, q, k = ([part[n * H : (n + 1) * H] for part in parts] for n in range(4))
        after = []
        for i in range(4):
            mixed = torch.zeros(H)
            for head in range(HEADS):
                part = slice(head * width, (head + 1) * width)
                for j in range(i + 1):
                    seconds = abs(int(times[0, i] - times[0, j])) // 1000
                    bucket = 0 if seconds <= 1 else 1 + int(math.log2(seconds))
                    score = q[i][part] @ k[j][part] + block.position_bias[i - j] + block.time_bias[bucket]
                    mixed[part] += F.silu(score) / HISTORY * v[j][part]
            gated = u[i] * norm(block.mixed_norm, mixed)
            after.append(state[i] + block.out.weight @ gated + block.out.bias)
        state = after
    expected = torch.stack([norm(model.norm, event) for event in state])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sasrec_is_its_formula_written_out_event_by_event():
    torch.manual_seed(0)
    model = perturbed(SASRec(H, 2, HEADS, 0.5, HISTORY))
    x, positions = torch.randn(1, 4, H), torch.arange(2, 6)[None]
    found = model(x, positions, torch.zeros(1, 4, dtype=torch.int64))[0]
    state = [x[0, n] + model.positions.weight[2 + n] for n in range(4)]
    width = H // HEADS
    for block in model.blocks:
        joined = [block.qkv.weight @ norm(block.attention_norm, event) + block.qkv.bias for event in state]
        after = []
        for i in range(4):
            mixed = torch.zeros(H)
            for head in range(HEADS):
                q, k, v = (slice(n * H + head * width, n * H + (head + 1) * width) for n in range(3))
                scores = torch.stack([joined[i][q] @ joined[j][k] / math.sqrt(width) for j in range(i + 1)])
                weights = scores.exp() / scores.exp().sum()
                total = sum(weight * joined[j][v] for j, weight in enumerate(weights))
                mixed[head * width : (head + 1) * width] = total
            event = state[i] + block.out.weight @ mixed + block.out.bias
            first, _, second = block.feed
            inner = F.gelu(first.weight @ norm(block.feed_norm, event) + first.bias)
            after.append(event + second.weight @ inner + second.bias)
        state = after
    expected = torch.stack([norm(model.norm, event) for event in state])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@given(st.integers(-2_000_000_000_000, 4_000_000_000_000))
def test_the_calendar_is_the_calendar(milliseconds):
    day = datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=milliseconds)
    expected = [min(max(day.year - 1995, 0), 63), day.month - 1, day.day - 1, day.weekday(), day.hour]
    assert calendar(torch.tensor([milliseconds]))[0].tolist() == expected


def test_time_buckets_double():
    seconds = torch.tensor([0, 1, 2, 3, 4, 7, 8, 3600, 2**40])
    assert time_buckets(seconds * 1000).tolist() == [0, 0, 2, 2, 3, 3, 4, 12, TIME_BUCKETS - 1]
    assert time_buckets(-seconds * 1000).tolist() == time_buckets(seconds * 1000).tolist()


def test_a_year_that_training_never_met_says_nothing():
    torch.manual_seed(0)
    features = TimeFeatures(4)
    optimizer = torch.optim.AdamW(features.parameters(), lr=0.1, weight_decay=0.1)
    met, new_year = (torch.tensor([[int(datetime.datetime(year, 5, 3, 7, tzinfo=datetime.UTC).timestamp() * 1000)]])
                     for year in (2025, 2026))  # fmt: skip
    for _ in range(3):
        optimizer.zero_grad()
        (features(met).sum() - 1).square().backward()
        optimizer.step()
    year, *others = (part.weight for part in features.parts)
    assert year[2025 - 1995].abs().min() > 0.01
    assert year[2026 - 1995].abs().max() == 0
    weekday = others[2]
    torch.testing.assert_close(features(new_year), features(met) - year[30] - weekday[5])  # a Saturday, then a Sunday


def test_times_follow_their_events():
    events = Histories(["a", "b"], np.array([0, 3, 5]), np.arange(5), np.arange(5) * 10)
    assert events.cut(np.array([1, 2])).times.tolist() == [0, 30, 40]
    assert events.select(np.array([1, 0])).times.tolist() == [30, 40, 0, 10, 20]
    assert events.map_items(np.array([0, -1, 2, 3, -1])).times.tolist() == [0, 20, 30]
    assert last_events(events, 2).times.tolist() == [[10, 20], [30, 40]]
    batch = next(iter(training_batches(events, 4, 2, np.random.default_rng(0))))
    assert sorted(batch.times.tolist()) == [[0, 10], [30, 0]]
    assert events.times_of(1).tolist() == [30, 40]
    assert target_counts(events, 6).tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(("sampling", "count"), [("popularity", 3), ("in-batch", 0), ("mixed", 3), ("uniform", 3)])
def test_q_is_how_often_an_item_is_drawn(sampling, count):
    torch.manual_seed(0)
    counts = torch.tensor([40.0, 30.0, 20.0, 5.0, 4.0, 1.0])
    sampler = NegativeSampler(torch.arange(6), counts, count, sampling)
    seen, rounds = torch.zeros(6), 4_000
    for seed in range(rounds):
        targets = torch.multinomial(counts, 4, replacement=True)
        negatives = sampler.draw(targets, seed)
        assert len(negatives.rows.unique()) == len(negatives.rows)
        seen[negatives.rows] += 1
    if sampling == "uniform":
        assert negatives.log_q is None
        assert (seen / rounds - seen.mean() / rounds).abs().max() < 0.03
    else:
        torch.testing.assert_close(seen / rounds, negatives.log_q.exp(), atol=0.03, rtol=0)


def test_zero_uniform_negatives_are_all_candidates():
    sampler = NegativeSampler(torch.tensor([1, 3, 4]), torch.ones(6), 0, "uniform")
    assert sampler.draw(torch.tensor([0]), 0).rows.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("candidates", "count", "sampling", "expected"),
    [
        (WHOLE, None, "uniform", WHOLE),
        (WHOLE + 1, None, "uniform", DRAWS),
        (WHOLE + 1, 0, "uniform", WHOLE + 1),
        (WHOLE + 1, 5, "uniform", 5),
        (WHOLE + 1, None, "mixed", DRAWS),
    ],
)
def test_how_many_stand_against_a_target_follows_the_catalog_unless_it_is_said(candidates, count, sampling, expected):
    sampler = NegativeSampler(torch.arange(candidates), torch.ones(candidates), count, sampling)
    rows = sampler.draw(torch.tensor([0]), 0).rows
    assert len(rows) - expected in ((0, 1) if sampling == "mixed" else (0,))  # mixed: and the batch's own target


def test_popularity_always_draws():
    drawn = NegativeSampler(torch.arange(50), torch.ones(50), None, "popularity").draw(torch.tensor([0]), 0)
    assert len(drawn.rows) == 50
    with pytest.raises(
        ValidationError, match="negatives = 0 is the whole catalog, and sampling = 'popularity' draws"
    ):
        TrainConfig(sampling="popularity", negatives=0)


@pytest.mark.parametrize(("sampling", "count"), [("popularity", 4), ("in-batch", 0), ("mixed", 4)])
def test_corrected_sampling_converges_to_the_optimum_of_the_full_softmax(sampling, count):
    """One query whose next item has known probabilities: the full softmax learns their logarithms."""
    torch.manual_seed(0)
    truth = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.05, 0.05])
    sampler = NegativeSampler(torch.arange(6), truth * 1000, count, sampling)
    scores, query = torch.zeros(6, 1, requires_grad=True), torch.ones(64, 1)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))
    mean = torch.zeros(6)
    for step in range(3_000):
        targets = torch.multinomial(truth, 64, replacement=True)
        rows, log_q = sampler.draw(targets, step)
        loss = info_nce(
            query, scores[targets], scores[rows], targets, rows, torch.tensor(1.0), log_q[targets], log_q[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= 1_500:
            mean += scores.detach()[:, 0].softmax(0) / 1_500
    torch.testing.assert_close(mean, truth, atol=0.02, rtol=0.05)


def test_the_correction_changes_logits_and_keeps_gradients_exact():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(12, 4, generator=generator, requires_grad=True)
    items = torch.randn(9, 4, generator=generator, requires_grad=True)
    scale, log_q = torch.tensor(2.0, requires_grad=True), torch.randn(9, generator=generator)
    targets, groups = torch.arange(12) % 9, torch.arange(9)
    found = info_nce(queries, items[targets], items, targets, groups, scale, log_q[targets], log_q)
    expected = F.cross_entropy(queries @ items.T * scale - log_q, targets)
    inputs = (queries, items, scale)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_ids_beside_text_move_known_items_and_leave_new_ones_near_their_text():
    torch.manual_seed(0)
    config = UserTowerConfig(features="text+id", hidden=16, layers=1, heads=2, history=6)
    tower = UserTower(config, 8, ["a", "b"]).eval()
    vectors = np.eye(4, 8, dtype=np.float32)
    catalog = tower.catalog(["a", "b", "new", "newer"], vectors, np.arange(4))
    found = tower.item_vectors(catalog)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    assert (found * catalog.vectors).sum(-1).min() > 0.9
    torch.testing.assert_close(tower.item_vectors(catalog, torch.tensor([2, 0])), found[[2, 0]])
    raw = catalog.vectors + tower.ids.weight[torch.tensor([0, 1, 2, 2])]
    torch.testing.assert_close(found, F.normalize(raw, dim=-1))
    tower.train()
    hidden = torch.stack([tower.item_vectors(catalog) for _ in range(200)])
    cold = F.normalize(catalog.vectors[0] + tower.ids.weight[2], dim=-1)
    share = (hidden[:, 0] - cold).abs().amax(-1).lt(1e-6).float().mean()
    assert 0.03 < share < 0.2
