"""import-checkpoint and what follows it: the cache, the figures and the user vectors of the paper's own weights."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from official import PROMPT, model_folder, official_state, official_text, plain_item, plain_user

from jobs.config import load_config
from jobs.context import Context
from pipeline.baselines import TowerRecommender
from pipeline.cache import open_snapshot
from pipeline.store import Store
from schemas.records import Snapshot, UserTower

MAX_TEXT, LONGEST = 16, 8
TOML = """
store = "{folder}/store"
name = "official"
[data]
name = "board"
items = "{folder}/items.csv"
interactions = "{folder}/events.csv"
[checkpoint]
weights = "{folder}/pytorch_model.bin"
[template]
style = "reference"
fields = ["title", "year"]
[encoder]
model = "{folder}/llm"
pooling = "item_token"
max_length = {text}
compute_dtype = "float32"
[item_tower]
use = "imported"
[embed]
output_dtype = "float32"
[user_tower]
backbone = "llm"
projections = false
history = {longest}
[train]
epochs = 1
precision = "float32"
[evaluate]
ks = [1, 5, 10]
bootstrap = 50
"""


@pytest.fixture
def official(workspace):
    """The checkerboard, a configuration of the paper's shape, and a random state dict in the official layout."""
    config = model_folder(workspace.folder / "llm")
    state = official_state(config)
    torch.save(state, workspace.folder / "pytorch_model.bin")
    workspace.toml.write_text(TOML.format(folder=workspace.folder, text=MAX_TEXT, longest=LONGEST))
    return workspace, state


def plain_items(workspace, state) -> torch.Tensor:
    """[N, H] of the catalog's items, in the order of the file."""
    items = pl.read_csv(workspace.data("items"), infer_schema=False).to_dicts()
    return torch.stack([plain_item(state, official_text(item, ["title", "year"]), MAX_TEXT) for item in items])


def plain_histories(workspace) -> dict[str, list[int]]:
    """User -> rows of the catalog, oldest first."""
    events = pl.read_csv(workspace.data("events")).sort("timestamp")
    grouped = events.group_by("user_id", maintain_order=True).agg("item_id").rows()
    return {user: [int(item[1:]) for item in items] for user, items in grouped}


def plain_ranks(state, items: torch.Tensor, histories: list[list[int]]) -> list[int]:
    """Leave-last-out over the full catalog, as the official code scores: cosines, seen items out."""
    ranks = []
    for *history, target in histories:
        scores = F.normalize(items, dim=-1) @ plain_user(state, items, history, LONGEST)
        scores[history] = -torch.inf
        ranks.append(int((scores > scores[target]).sum()))
    return ranks


def test_an_imported_checkpoint_goes_through_the_normal_commands(official, embed_here):
    workspace, state = official
    workspace.run("prepare-data")
    imported = workspace.run("import-checkpoint")
    assert (imported["name"], imported["cutoff"], imported["reused"]) == ("official", "unknown", False)
    before = workspace.published()
    assert workspace.run("import-checkpoint") == imported | {"reused": True}
    assert workspace.published() == before

    embedded = workspace.run("embed-items")
    assert (embedded["fingerprint"], embedded["embedded"]) == (imported["fingerprint"], 24)
    assert embed_here[0][0].startswith(f"{PROMPT}title: The ")
    store = Store(workspace.store)
    matrix = open_snapshot(store, store.require(Snapshot))
    items = plain_items(workspace, state)
    by_id = dict(zip(matrix.item_ids, matrix.vectors, strict=True))
    found = np.stack([by_id[f"i{n}"] for n in range(len(items))])
    np.testing.assert_allclose(found, items.numpy(), atol=1e-5)

    torch.set_num_threads(1)  # the embedding worker took all of them
    histories = plain_histories(workspace)
    context = Context(load_config(str(workspace.toml), None, []))
    users = served_users(context)
    for user, history in list(histories.items())[:10]:
        np.testing.assert_allclose(users[user], plain_user(state, items, history, LONGEST).numpy(), atol=1e-5)

    evaluated = workspace.run("evaluate")
    assert evaluated["cutoff"] == "unknown"
    ranks = np.array(plain_ranks(state, items, list(histories.values())))
    for k in (1, 5, 10):
        assert evaluated["metrics"][f"recall@{k}"] == pytest.approx((ranks < k).mean())
    workspace.run("build-index")
    best = workspace.run("recommend", "--user", "u0", "--k", "3")["items"]
    scores = F.normalize(items, dim=-1) @ torch.from_numpy(users["u0"])
    scores[histories["u0"]] = -torch.inf
    assert [item["item_id"] for item in best] == [f"i{n}" for n in scores.topk(3).indices.tolist()]
    assert workspace.run("embed-users")["embedded"] == 60

    # and stage II goes on from it
    first = ("--set", f"train.warm_start={imported['user_tower']}")
    trained = workspace.run("train-user", *first)
    assert trained["parent"] == imported["user_tower"]
    record = store.get(UserTower, trained["user_tower"])
    assert (record.cutoff, record.item_fingerprint) == ("unknown", imported["fingerprint"])
    assert workspace.run("import-checkpoint")["reused"] is False  # the trained one is the newest of the name now


def served_users(context: Context) -> dict[str, np.ndarray]:
    """Every user's vector as evaluate and embed-users compute it, before it is stored in half precision."""
    serving = context.serving_tower(None)
    rows = {item_id: row for row, item_id in enumerate(serving.item_ids)}
    places = np.array([rows[item_id] for item_id in context.dataset.item_ids])
    histories = context.dataset.histories.map_items(places)
    vectors = TowerRecommender(serving.tower, serving.catalog).queries(histories).numpy()
    return dict(zip(histories.users, vectors, strict=True))


def test_errors_are_one_line(official):
    workspace, state = official
    workspace.run("prepare-data")
    assert "run hllm import-checkpoint first" in workspace.fails("embed-items")["error"]
    error = workspace.fails("import-checkpoint", "--weights", str(workspace.folder / "no.bin"))
    assert error["kind"] == "Data"
    assert "no.bin': there is no such file or folder" in error["error"]
    gone = "item_llm.model.layers.0.mlp.gate_proj.weight"
    del state[gone]
    torch.save(state, workspace.folder / "other.bin")
    error = workspace.fails("import-checkpoint", "--weights", str(workspace.folder / "other.bin"))
    assert error["error"].endswith(f"missing: {gone}")
    assert workspace.published() == {path for path in workspace.published() if path.startswith("datasets/")}


@pytest.mark.slow
@pytest.mark.ray
def test_ray_embeds_with_an_imported_tower(official):
    workspace, state = official
    workspace.run("prepare-data")
    imported = workspace.run("import-checkpoint")
    embedded = workspace.run("embed-items")
    assert (embedded["fingerprint"], embedded["embedded"]) == (imported["fingerprint"], 24)
    store = Store(workspace.store)
    matrix = open_snapshot(store, store.require(Snapshot))
    by_id = dict(zip(matrix.item_ids, matrix.vectors, strict=True))
    found = np.stack([by_id[f"i{n}"] for n in range(24)])
    np.testing.assert_allclose(found, plain_items(workspace, state).numpy(), atol=1e-5)
