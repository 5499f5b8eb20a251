"""Training that goes on after a kill, adapters, warm starts, long histories."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, get_cosine_schedule_with_warmup

from schemas.errors import ConfigError, TrainingError
from user_tower.lora import LoraSettings
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batches, Histories, training_batches
from user_tower.steps import UserStep
from user_tower.train import TrainConfig, fit, has_checkpoint, is_main_process

SMALL = {"hidden": 16, "layers": 1, "heads": 2, "dropout": 0.3, "history": 6}
ITEMS = 30


class Killed(Exception):
    """Stands for the end of the process."""


def histories(users: int = 20) -> Histories:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 15, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories([f"u{n}" for n in range(users)], offsets, rng.integers(0, ITEMS, offsets[-1]))


def train(checkpoints, die_at: int | None = None, features: str = "text+id", **settings):
    """A training of 4 epochs of 8 steps; the third validation is the best one. Returns tower and result."""
    torch.manual_seed(0)
    tower = UserTower(UserTowerConfig(features=features, **SMALL), 8, [f"i{n}" for n in range(ITEMS)])
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 8))
    catalog = tower.catalog([f"i{n}" for n in range(ITEMS)], vectors, np.arange(ITEMS))
    step = UserStep(tower, catalog, NegativeSampler(torch.arange(ITEMS), torch.ones(ITEMS), 12, "mixed"))
    config = TrainConfig(
        **({"epochs": 4, "batch_size": 4, "precision": "float32", "checkpoint_steps": 3, "seed": 7} | settings)
    )
    drawn = 0

    def batches(epoch):
        whole = training_batches(histories(), 6, 4, np.random.default_rng(epoch))

        def make(rows):
            nonlocal drawn
            if drawn == die_at:
                raise Killed
            drawn += 1
            return whole.make(rows)

        return Batches(whole.cuts, make)

    def validate():
        return {"recall@10": float(tower.ids.weight.detach().sum())}

    parameters = [{"params": list(tower.parameters())}]
    result = fit(step, parameters, batches, validate, config, name="t", metric="recall@10", checkpoints=checkpoints)
    return tower, result


@pytest.mark.parametrize("kills", [[1], [4], [9, 2, 6], [3, 3, 3, 3], [30]])
def test_a_killed_training_ends_in_the_weights_of_one_that_was_not(tmp_path, kills):
    whole, expected = train(None)
    for number in kills:
        with pytest.raises(Killed):
            train(tmp_path, die_at=number)
    assert has_checkpoint(tmp_path) == any(number >= 3 for number in kills)
    resumed, result = train(tmp_path)
    assert resumed.fingerprint() == whole.fingerprint()
    assert (result.steps, result.positions, result.curve) == (expected.steps, expected.positions, expected.curve)
    again, same = train(tmp_path)  # finished: nothing is left to do
    assert (again.fingerprint(), same.steps) == (whole.fingerprint(), expected.steps)


def test_max_steps_early_stopping_and_the_learning_rate_are_remembered(tmp_path):
    for settings in ({"max_steps": 7}, {"patience": 1}, {"decay": 0.7}, {"decay": 1.0, "max_steps": 7}):
        whole, expected = train(None, **settings)
        folder = tmp_path / str(settings)
        with pytest.raises(Killed):
            train(folder, die_at=5, **settings)
        resumed, result = train(folder, **settings)
        assert (result.steps, resumed.fingerprint()) == (expected.steps, whole.fingerprint())


class Falling(torch.nn.Module):
    """A weight whose gradient is always 1: AdamW takes the learning rate off it, to rounding."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.before = []

    def forward(self, batch, own, seed):
        self.before.append(self.weight.item())
        return self.weight.sum()


def rates(epochs: int, users: list[int], **settings) -> np.ndarray:
    """The learning rate of each step; epoch e is of so many users, in batches of two."""
    step = Falling()
    fit(
        step,
        [{"params": list(step.parameters())}],
        lambda epoch: training_batches(histories(users[epoch]), 20, 2, np.random.default_rng(0)),
        lambda: {"fallen": -step.weight.item()},  # the last weights are the best
        TrainConfig(epochs=epochs, weight_decay=0.0, patience=epochs, precision="float32", **settings),
        name="t",
        metric="fallen",
    )
    return -np.diff([*step.before, step.weight.item()])


@pytest.mark.parametrize(("epochs", "max_steps"), [(5, None), (50, 20)])
def test_the_learning_rate_falls_as_in_the_paper_s_code(epochs, max_steps):
    """Against the same schedule of transformers, after whose ramp the cosine begins at once."""
    found = rates(epochs, [8] * epochs, learning_rate=1e-2, warmup_steps=0, decay=1.0, max_steps=max_steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 20)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(np.array(expected), rel=1e-5)


def test_the_learning_rate_rises_stays_and_falls_in_its_last_share():
    found = rates(4, [8, 8, 8, 16], learning_rate=1e-2, warmup_steps=3, decay=0.25) / 1e-2
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1], rel=1e-5)
    assert found[4:12] == pytest.approx(np.ones(8), rel=1e-5)
    last = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))  # the last quarter is the last epoch, however long
    assert found[12:] == pytest.approx(last, rel=1e-5)
    assert rates(2, [8, 8], learning_rate=1e-2, warmup_steps=0) == pytest.approx(np.full(8, 1e-2), rel=1e-5)


def test_a_damaged_checkpoint_is_named_and_half_a_one_is_not_there(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, die_at=7)
    (folder,) = tmp_path.glob("step-*")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model.bin").write_bytes(b"half")
    for path in folder.glob("optimizer*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=rf"checkpoint {folder} cannot be read .* remove the folder"):
        train(tmp_path)


@pytest.mark.parametrize("command", ["train-user", pytest.param("tune-items", marks=pytest.mark.slow)])
def test_a_command_killed_at_any_moment_ends_in_the_same_tower(workspace, embed_here, command):
    """SIGKILL to a process of its own, twice; the third run finishes what they began."""
    sets = ["--set", "train.checkpoint_steps=2", "--set", "tune.train.checkpoint_steps=1"]
    sets += ["--set", "train.epochs=30", "--set", "train.patience=30", "--set", "tune.train.epochs=6"]
    workspace.run("prepare-data")
    if command == "train-user":
        sets += ["--set", "user_tower.features=id"]
    checkpoints = workspace.store / "checkpoints"
    arguments = [command, "--config", str(workspace.toml), *sets]
    threads = torch.get_num_threads()  # another number of threads adds in another order
    code = f"import torch; torch.set_num_threads({threads}); from jobs.cli import main; main({arguments})"

    def found() -> set[Path]:
        try:
            return set(checkpoints.glob("*/**/step-*"))
        except FileNotFoundError:  # the training took the last checkpoint away while its folder was being listed
            return set()

    for kill in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        seen = found()
        until = time.monotonic() + 120
        while process.poll() is None and not found() - seen:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.05 * kill)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed = workspace.run(command, *sets)
    assert not list(checkpoints.glob("*"))
    assert workspace.run(command, *sets)["reused"]
    other = [*sets, "--set", f"store={workspace.folder / 'other'}"]
    workspace.run("prepare-data", *other)
    whole = workspace.run(command, *other)
    key = "user_tower" if command == "train-user" else "item_tower"
    prints = []
    for store, result in ((workspace.store, resumed), (workspace.folder / "other", whole)):
        (record,) = store.glob(f"*/{result[key]}/record.json")
        prints.append(json.loads(record.read_text())["fingerprint"])
    assert prints[0] == prints[1]
    assert (resumed["steps"], resumed["valid"]) == (whole["steps"], whole["valid"])


def llama_tower(folder=None, **settings) -> UserTower:
    config = UserTowerConfig(**(SMALL | {"backbone": "llm", "dropout": 0.0, "pretrained": folder} | settings))
    torch.manual_seed(0)
    return UserTower(config, 8, None)


def test_a_pretrained_backbone_is_tuned_by_adapters_and_loads_without_its_source(tmp_path):
    source = tmp_path / "hub"
    torch.manual_seed(3)
    LlamaModel(
        LlamaConfig(
            vocab_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            num_key_value_heads=1,
        )
    ).save_pretrained(source)  # fmt: skip
    tower = llama_tower(str(source))
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.add_lora(LoraSettings(rank=2))
    catalog = tower.catalog([f"i{n}" for n in range(ITEMS)], np.eye(ITEMS, 8) + 0.1, np.arange(ITEMS))
    step = UserStep(tower, catalog, NegativeSampler(torch.arange(ITEMS), torch.ones(ITEMS), 0, "uniform"))
    config = TrainConfig(epochs=1, learning_rate=1e-2, warmup_steps=0, precision="float32")
    batches = lambda epoch: training_batches(histories(), 6, 4, np.random.default_rng(epoch))  # noqa: E731
    parameters = [{"params": list(tower.parameters())}]
    fit(step, parameters, batches, lambda: {"r": 0.0}, config, name="t", metric="r")
    tower.merge_lora()
    changed = {name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "backbone.model.layers.1.mlp.up_proj.weight" in changed
    assert not any("norm.weight" in name and "backbone" in name for name in changed)
    folder = tmp_path / "saved"
    folder.mkdir()
    tower.save(folder)
    source.rename(tmp_path / "gone")
    assert UserTower.load(folder).fingerprint() == tower.fingerprint()
    with pytest.raises(ConfigError, match=r"train\.lora is for backbone llm; user_tower\.backbone is sasrec"):
        UserTower(UserTowerConfig(**SMALL), 8, None).add_lora(LoraSettings())


def test_a_warm_start_takes_over_weights_and_the_ids_that_both_know():
    config = UserTowerConfig(features="text+id", **SMALL)
    old, new = UserTower(config, 8, ["a", "b", "c"]), UserTower(config, 8, ["c", "x", "a"])
    new.start_from(old)
    assert torch.equal(new.ids.weight, old.ids.weight[[2, 3, 0, 3]])
    assert torch.equal(new.input[0].weight, old.input[0].weight)


def test_train_user_begins_with_an_earlier_tower(workspace, embed_here):
    workspace.run("prepare-data")
    sets = ["--set", "item_tower.use=base", "--set", "user_tower.dropout=0.1"]
    workspace.run("embed-items", *sets)
    first = workspace.run("train-user", *sets)
    assert first["parent"] is None
    warm = [*sets, "--set", "train.warm_start=newest", "--set", "train.epochs=1", "--set", "train.learning_rate=1e-9"]
    second = workspace.run("train-user", *warm)
    assert second["parent"] == first["user_tower"]
    assert second["valid"]["recall@1"] == pytest.approx(first["valid"]["recall@1"], abs=0.05)
    assert workspace.run("train-user", *warm)["reused"]
    other = [*warm, "--set", "user_tower.hidden=16"]
    assert workspace.run("train-user", *other)["parent"] is None
    named = [*other, "--set", f"train.warm_start={first['user_tower']}"]
    assert "has another shape than [user_tower] asks for" in workspace.fails("train-user", *named)["error"]


def test_a_step_of_8_histories_of_1000_events_fits_in_8_gib():
    """The llm backbone of the demo's size against a catalog of 10,000; measured as the growth of the peak."""
    code = """
import resource, numpy as np, torch
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Histories, training_batches
from user_tower.steps import UserStep
N = 10_000
tower = UserTower(UserTowerConfig(backbone="llm", history=1000), 384, None)
rng = np.random.default_rng(0)
catalog = tower.catalog([str(n) for n in range(N)], rng.normal(size=(N, 384)), np.arange(N))
step = UserStep(tower, catalog, NegativeSampler(torch.arange(N), torch.ones(N), 0, "uniform")).train()
events = Histories([str(n) for n in range(8)], np.arange(9) * 1001, rng.integers(0, N, 8 * 1001))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batch = next(iter(training_batches(events, 1000, 8, rng)))
assert batch.positions == 8000
step(batch, batch, 0).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True)
    assert float(done.stdout) < 8


def test_a_launch_that_shards_the_weights_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="cannot shard its weights"):
        is_main_process()
