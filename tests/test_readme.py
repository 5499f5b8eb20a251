"""Every command of the README, on a tiny model: what it says is what runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from jobs.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = {
    "HLLM__ENCODER__COMPUTE_DTYPE": "float32",
    "HLLM__ENCODER__MAX_LENGTH": "16",
    "HLLM__TUNE__WARMUP_EPOCHS": "0",
    "HLLM__TUNE__TRAIN__EPOCHS": "1",
    "HLLM__TRAIN__EPOCHS": "2",
    "HLLM__GATES__MAX_COLLAPSED": "1",  # a random model gives every text nearly one vector
    "HLLM__EVALUATE__BOOTSTRAP": "20",
    "HLLM__EVALUATE__KS": "[5, 10]",
}


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language == kind]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def planned(command: list[str]) -> str:
    """The last line that a make command would run, as in a shell of its own.

    `make test` hands down its flags and ARGS, and makes an inner make announce its folder.
    """
    handed_down = ("MAKE", "MFLAGS", "ARGS", "CONFIG")
    alone = {name: value for name, value in os.environ.items() if not name.startswith(handed_down)}
    shown = subprocess.run(
        ["make", "-n", *command[1:]], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    )
    return shown.stdout.strip().splitlines()[-1]


def as_hllm(command: list[str]) -> list[str]:
    """The hllm arguments of a README line; make is asked what it would run."""
    if command[0] == "hllm":
        return command[1:]
    last = shlex.split(planned(command))
    return last[1:] if last[0].endswith("/hllm") else []


@pytest.fixture
def shop(tmp_path, monkeypatch, bert_folder, embed_here):
    """A folder with the README's shop.toml as it stands there, and data for it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, value in {**TINY, "HLLM__ENCODER__MODEL": str(bert_folder)}.items():
        monkeypatch.setenv(name, value)
    (toml,) = blocks("toml")
    (tmp_path / "shop.toml").write_text(toml)
    rng = np.random.default_rng(0)
    items = {"item_id": range(20), "title": [f"red {n}" for n in range(20)], "description": ["the blue"] * 20}
    pl.DataFrame(items).write_parquet("items.parquet")
    rows = [(u, i, 1_600_000_000 + s) for u in range(30, 50) for s, i in enumerate(rng.permutation(20)[:8])]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv("interactions.csv")
    return tmp_path


def test_the_commands_for_your_own_data_run(shop, capsys):
    ran = []
    for command in commands():
        arguments = as_hllm(command) if command[0] in ("make", "hllm") else []
        if "shop.toml" not in arguments:
            continue
        capsys.readouterr()
        assert main(arguments) == 0, command
        json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        ran.append(arguments[0])
    assert ran[:4] == ["prepare-data", "tune-items", "embed-items", "train-user"]
    assert {"build-index", "evaluate", "compare-runs", "recommend"} <= set(ran)


def test_the_demo_runs_on_a_tiny_configuration(shop, capsys):
    (arguments,) = [as_hllm(command) for command in commands() if command[:2] == ["make", "demo"]]
    assert arguments == ["demo", "--config", "demo.toml"]
    extra = (
        '[variants."frozen-cache"]\n"item_tower.use" = "base"\n[variants."sasrec-id"]\n"user_tower.features" = "id"\n'
    )
    (shop / "demo.toml").write_text((shop / "shop.toml").read_text() + extra)
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(result["runs"]) == 5


def test_every_make_target_named_in_the_readme_exists():
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {line.split()[0] for line in helped.splitlines()}
    named = set(re.findall(r"make ([a-z][a-z-]+)", README))
    assert named <= targets
    assert {"demo", "test", "test-all", "help", "lint", "types"} <= targets


def test_make_test_runs_the_fast_tests():
    (command,) = [command for command in commands() if command[:2] == ["make", "test"]]
    assert "pytest" in planned(command)


def test_every_folder_in_where_things_are_exists():
    (tree,) = [block for block in blocks("") if "schemas/" in block]
    folders = [line.split("/")[0] for line in tree.splitlines() if line]
    made = {"store"}
    assert all((ROOT / folder).is_dir() for folder in folders if folder not in made)


def test_every_test_that_the_docs_name_exists():
    named = {
        name
        for page in ("cache.md", "evaluation.md")
        for name in re.findall(r"::(test_\w+)", (ROOT / "docs" / page).read_text())
    }
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert named
    assert [name for name in sorted(named) if f"def {name}(" not in written] == []
