"""bench train: what it counts, against hand-made batches and against what a step really encodes; its JSON."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from jobs import bench_train
from jobs.bench_stage1 import Encoded, official_encoded, own_encoded, stage1_rows, tiny_step
from jobs.bench_train_peer import HISTORY, LAYERS, WIDTH, Stopwatch
from pipeline.joint import JointConfig, JointStep
from user_tower.model import UserTower, UserTowerConfig
from user_tower.sequences import Batch, Histories
from user_tower.train import TrainConfig

PADDED = -1
# two windows over five items: 0 1 2 3 and 2 4; items 3 and 4 have the same text
BATCH = Batch(
    np.array([[0, 1, 2], [2, 0, 0]]),
    np.array([3, 1]),
    np.array([[1, 2, 3], [4, PADDED, PADDED]]),
    np.zeros((2, 3), dtype=np.int64),
)
GROUPS = np.array([0, 1, 2, 3, 3])
LENGTHS = np.array([5, 7, 2, 9, 9])


def test_our_step_encodes_each_distinct_text_once():
    config = JointConfig(token_budget=45)  # one pass, padded to the longest
    assert own_encoded(BATCH, LENGTHS, GROUPS, config, 0, False) == Encoded(4, 9 + 7 + 5 + 2, 4 * 9)
    assert own_encoded(BATCH, LENGTHS, GROUPS, config, 0, True) == Encoded(4, 10 + 8 + 6 + 3, 4 * 10)


def test_the_official_step_encodes_every_place_and_as_many_negatives():
    alike = np.full(5, 4)
    found = official_encoded(BATCH, alike, 6, np.random.default_rng(0), False)
    assert found == Encoded(2 * 7 * 2, 2 * 7 * 2 * 4, 2 * 7 * 2 * 4)
    assert official_encoded(BATCH, alike, 6, np.random.default_rng(0), True).tokens == 2 * 7 * 2 * 5
    # six real items, of which item 2 stands in both windows; the other places are random
    only_real = np.array([1, 10, 100, 1000, 10_000])
    drawn = np.random.default_rng(3).integers(5, size=2 * 4 * 2 - 6)
    real = 1 + 10 + 100 + 1000 + 100 + 10_000
    found = official_encoded(BATCH, only_real, 3, np.random.default_rng(3), False)
    assert found.tokens == real + int(only_real[drawn].sum())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_tokens_counted_are_those_that_a_step_encodes(make_encoder, kind, monkeypatch):
    encoder = make_encoder(kind)
    token_ids = encoder.tokenise(["the red 1", "the blue", "a", "red red red red", "red red red red"]).input_ids
    config = JointConfig(
        user_tower=UserTowerConfig(hidden=16, layers=1, history=4), train=TrainConfig(negatives=2), token_budget=12
    )
    tower = UserTower(config.user_tower, encoder.dim, None)
    step = JointStep(encoder, tower, token_ids, torch.from_numpy(GROUPS), config).train()
    seen = []
    plain = encoder.forward

    def spy(input_ids, attention_mask):
        seen.append((len(input_ids), int(attention_mask.sum()), input_ids.numel()))
        return plain(input_ids, attention_mask)

    monkeypatch.setattr(encoder, "forward", spy)
    step(BATCH, BATCH, 3)
    lengths = np.array([len(ids) for ids in token_ids])
    counted = own_encoded(BATCH, lengths, GROUPS, config, 3, encoder.item_token is not None)
    assert counted == Encoded(*np.sum(seen, axis=0).tolist())


def test_stage1_rows_compare_configured_as_many_candidates_and_full_windows():
    users, length = 70, 6
    rng = np.random.default_rng(0)
    training = Histories(
        [str(user) for user in range(users)], np.arange(users + 1) * length, rng.integers(400, size=users * length)
    )
    config = JointConfig(user_tower=UserTowerConfig(history=length - 1), token_budget=64)
    rows = stage1_rows(training, np.full(400, 8), np.arange(400), config, False)
    configured, many, full = rows
    assert configured["steps"] == 2  # 64 windows, then 6
    assert configured["official_tokens"] == round(users * 2 * length * 8 / 2)
    assert configured["tokens_over_official"] == pytest.approx(
        configured["tokens"] / configured["official_tokens"], abs=1e-3
    )
    assert full == configured | {"name": full["name"]}  # every window is full here
    assert configured["tokens"] < many["tokens"] < many["official_tokens"]


def test_the_tiny_step_meets_as_many_items_as_it_says():
    step, batch = tiny_step(128, 100)
    step(batch, batch, 0).backward()
    assert step.items_encoded == 128


def test_the_clock_runs_from_the_end_of_the_warm_up_over_whole_steps():
    now = iter([2.0, 10.0, 13.0, 14.0, 15.5])  # the end of each step; two of them are warm-up
    watch = Stopwatch(5.0, clock=lambda: next(now))
    batches = watch.batches(lambda: [[1] * 100, [1] * 50], len)
    assert [len(batch) for batch in batches] == [100, 50, 100, 50, 100]
    found = watch.answer()
    assert found.pop("cpu_seconds") >= 0
    assert found == {"steps": 3, "positions": 250, "seconds": 5.5}


def test_the_floor_counts_three_products_for_each_weight_and_item():
    tower = bench_train.id_step([str(item) for item in range(30)]).tower
    block = WIDTH * 3 * WIDTH + WIDTH * WIDTH + 2 * WIDTH * 4 * WIDTH
    assert bench_train.position_flops(tower, 30) == 3 * 2 * (LAYERS * block + 30 * WIDTH)


def test_peers_get_all_events_and_which_are_of_training(tmp_path):
    histories = Histories(["a", "b"], np.array([0, 3, 5]), np.array([4, 1, 2, 0, 3]))
    bench_train.write_events(tmp_path, histories, histories.cut(np.array([1, 2])))
    found = np.load(tmp_path / "events.npz")
    assert found["users"].tolist() == [0, 0, 0, 1, 1]
    assert found["items"].tolist() == [4, 1, 2, 0, 3]
    assert found["training"].tolist() == [True, False, False, True, True]


def test_bench_train_prints_its_rows_and_ratios(workspace, monkeypatch):
    asked = []

    @contextmanager
    def peer(name, python, folder):
        assert (folder / "events.npz").exists()

        def measure(batch_size, seconds):
            asked.append((name, batch_size))
            return {"steps": 1, "positions": batch_size, "seconds": 1.0, "cpu_seconds": 2.0}

        yield measure

    monkeypatch.setattr(bench_train, "_peer", peer)
    monkeypatch.setattr(bench_train, "peer_python", lambda name, pins, store: store / name)
    monkeypatch.setattr(bench_train, "memory_rows", lambda root: [])
    monkeypatch.setattr(bench_train, "BATCHES", {"ours": (8,), "rectools": (10, 20), "recbole": (40,)})
    for name in ("GRID_SECONDS", "ROUND_SECONDS"):
        monkeypatch.setattr(bench_train, name, 0.01)
    result = workspace.run("bench train", "--set", "tune.train.negatives=0")
    by_name = {row["name"]: row for row in result["rows"]}
    assert list(by_name)[:4] == [
        "floor: the products alone", "training, ours", "training, rectools", "training, recbole"
    ]  # fmt: skip
    assert set(result["ratio"]) == {
        "over_rectools", "over_recbole", "training_over_floor", "stage1_tokens_over_official"
    }  # fmt: skip
    assert by_name["training, rectools"]["batch_size"] == 20
    assert by_name["training, rectools"]["positions_per_cpu_second"] == 10
    assert asked == [("rectools", 10), ("rectools", 20), ("recbole", 40)] + [("rectools", 20), ("recbole", 40)] * 3
    rates = {name: by_name[f"training, {name}"]["positions_per_second"] for name in ("ours", "rectools", "recbole")}
    assert result["ratio"]["over_rectools"] == pytest.approx(rates["ours"] / rates["rectools"], rel=1e-2, abs=1e-3)
    assert result["ratio"]["over_recbole"] == pytest.approx(rates["ours"] / rates["recbole"], rel=1e-2, abs=1e-3)
    assert result["shape"]["history"] == HISTORY
    assert json.loads(json.dumps(result)) == result


def test_data_is_for_bench_train_and_holds_both_tables(workspace, tmp_path):
    assert "takes its data from --config" in workspace.fails("bench cache", "--data", str(tmp_path))["error"]
    assert "items.parquet" in workspace.fails("bench train", "--data", str(tmp_path))["error"]
