"""Stage I: what an item's vector is, gradient caching, several processes, the guard against collapse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from item_tower.encoder import ItemEncoder
from item_tower.prompt import TemplateConfig, render
from pipeline.joint import JointConfig, JointStep
from schemas.errors import TrainingError
from user_tower.lora import LoraSettings, add_lora, merge_lora
from user_tower.loss import info_nce, share_apart
from user_tower.model import UserTower, UserTowerConfig
from user_tower.sequences import Batch, Histories, training_batches
from user_tower.train import TrainConfig, fit

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"the {colour} {n} {'a ' * (n % 7)}" for n in range(20) for colour in ("red", "blue")]
SHAPE = {"hidden": 16, "layers": 1, "heads": 2, "dropout": 0.0, "history": 8}


def histories(users: int = 12, seed: int = 0) -> Histories:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(0, len(TEXTS), offsets[-1])
    return Histories([f"u{n}" for n in range(users)], offsets, items, np.arange(offsets[-1]) * 1000)


def joint_step(encoder: ItemEncoder, shape: dict = SHAPE, **settings) -> JointStep:
    torch.manual_seed(0)
    config = JointConfig(user_tower=UserTowerConfig(**shape), **settings)
    tower = UserTower(config.user_tower, encoder.dim, None)
    groups = torch.arange(len(TEXTS))
    return JointStep(encoder, tower, encoder.tokenise(TEXTS).input_ids, groups, config)


def one_batch(seed: int = 0) -> Batch:
    return next(iter(training_batches(histories(), 8, 12, np.random.default_rng(seed))))


def gradients(step: JointStep, batch: Batch, rank: int = 0, world: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    own = batch.share(rank, world)
    loss = step.train()(batch, own, 3)
    loss.backward()
    found = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_vector_is_that_of_a_plain_unbatched_forward(make_encoder, kind):
    encoder = make_encoder(kind).eval()
    with torch.inference_mode():
        found = encoder.encode_ids(encoder.tokenise(TEXTS).input_ids, 64)
        for text, vector in zip(TEXTS, found, strict=True):
            ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
            if kind == "bert":
                expected = encoder.model(input_ids=ids).last_hidden_state[0].mean(0)
            else:
                words = encoder.model.get_input_embeddings()(ids)
                inputs = torch.cat([words, encoder.item_token[None, None]], dim=1)
                expected = encoder.model(inputs_embeds=inputs).last_hidden_state[0, -1]
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_a_reference_vector_is_that_of_the_official_forward(make_encoder):
    """The whole text's ids cut to max_length, then [ITEM], positions so that all texts end at the same one."""
    template = TemplateConfig(fields=("title", "year"), style="reference")
    encoder = make_encoder("llama", template=template, max_length=8).eval()
    cells = ["The red 1", "the blue title of the year 2 and a red one"]
    items = pa.table({"item_id": ["a", "b"], "title": cells, "year": ["3", None]})
    texts = render(items, template)
    assert texts[0].endswith("title: The red 1year: 3")
    with torch.inference_mode():
        found = encoder.encode_ids(encoder.tokenise(texts).input_ids, 64)
        for text, vector in zip(texts, found, strict=True):
            ids = encoder.tokenizer.encode(text)[:8]
            words = encoder.model.get_input_embeddings()(torch.tensor([ids]))
            inputs = torch.cat([words, encoder.item_token[None, None]], dim=1)
            positions = torch.arange(len(ids) + 1)[None] + 8 - len(ids)
            expected = encoder.model(inputs_embeds=inputs, position_ids=positions).last_hidden_state[0, -1]
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projections", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_joint_loss_is_the_plain_one(make_encoder, kind, projections):
    """Every text encoded by itself, the loss by cross_entropy over the distinct items of the batch."""
    step = joint_step(make_encoder(kind), SHAPE if projections else {**SHAPE, "hidden": 32, "projections": False})
    batch = one_batch()
    loss, found = gradients(step, batch)
    seen = sorted(
        {int(item) for item in np.concatenate([batch.items[batch.targets >= 0], batch.targets.ravel()])} - {-1}
    )
    vectors = torch.cat([step.encoder(*step.encoder.pad([step.token_ids[item]])) for item in seen])
    place = {item: row for row, item in enumerate(seen)}
    catalog = step.tower.catalog([str(item) for item in seen], np.zeros((len(seen), 1)), np.arange(len(seen)))
    catalog = catalog._replace(vectors=F.normalize(vectors, dim=-1), norms=vectors.norm(dim=-1))
    logits, goals = [], []
    for row, length in enumerate(batch.lengths):
        items = torch.tensor([[place[int(item)] for item in batch.items[row, :length]]])
        times = torch.from_numpy(batch.times[row : row + 1, :length])
        queries = step.tower(catalog, items, torch.tensor([length]), times)[0]
        logits.append(queries @ catalog.vectors.T * step.tower.scale())
        goals += [place[int(item)] for item in batch.targets[row, :length]]
    goals = torch.tensor(goals)
    same = catalog.vectors[goals] @ catalog.vectors.T > step.config.near
    same[torch.arange(len(goals)), goals] = False
    assert same.any()
    plain = F.cross_entropy(torch.cat(logits).masked_fill(same, -torch.inf), goals)
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    plain.backward()
    for name, parameter in step.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["float32", "dropout", "bfloat16", "lora"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradient_caching_changes_no_gradient(make_encoder, kind, mode):
    """Also with dropout (the random state of each chunk is repeated), in bfloat16 and with adapters."""
    settings = {"compute_dtype": "bfloat16"} if mode == "bfloat16" else {}
    encoder = make_encoder(kind, **settings)
    if mode == "lora":
        encoder.model = add_lora(encoder.model, LoraSettings(rank=2, dropout=0.3))
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the other half
                torch.nn.init.normal_(parameter, std=0.1)
    ids = encoder.tokenise(TEXTS).input_ids
    encoder.train(mode in ("dropout", "lora"))
    upstream = torch.randn(len(TEXTS), encoder.dim, generator=torch.Generator().manual_seed(1))
    results = []
    for graph_tokens in (None, 100, 1):
        torch.manual_seed(5)
        vectors = encoder.encode_ids(ids, 60, graph_tokens)
        (vectors * upstream).sum().backward()
        results.append((vectors.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]))
        encoder.zero_grad()
    # in bfloat16 too the same products are computed twice: the only difference is the order of the sums
    atol = 2e-2 if mode == "bfloat16" else 1e-5
    for vectors, grads in results[1:]:
        torch.testing.assert_close(vectors, results[0][0])
        assert len(grads) == len(results[0][1]) > 0
        for found, expected in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(found, expected, atol=atol * max(1.0, float(expected.abs().max())), rtol=0)
    if mode == "dropout" and kind == "bert":
        assert not torch.equal(encoder.encode_ids(ids, 60), results[0][0])


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_items(make_encoder):
    encoder = make_encoder("bert")
    kept = {}
    for graph_tokens in (None, 64):
        for copies in (1, 4):
            ids = encoder.tokenise([f"{text} {n}" for n in range(copies) for text in TEXTS]).input_ids
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
                vectors = encoder.encode_ids(ids, 64, graph_tokens)
            kept[graph_tokens, copies] = sum(sizes) / 1e3
            del vectors
    assert kept[None, 4] > 3.5 * kept[None, 1]
    assert kept[64, 4] < 1.6 * kept[64, 1] < kept[None, 4] / 4


def test_a_near_negative_is_masked_and_pairs_apart_are_counted():
    items = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.02], [0.0, 1.0]]), dim=-1)
    query, groups, scale = items[:1], torch.arange(3), torch.tensor(1.0)
    found = info_nce(query, items[:1], items, groups[:1], groups, scale, near=0.99)
    assert found.item() == pytest.approx(np.log(1 + np.exp(-1)))
    assert share_apart(items, 0.99) == pytest.approx(4 / 6)
    assert share_apart(items, 1.0) == 1.0
    assert share_apart(items[:1], 0.99) == 1.0


def test_a_collapse_stops_the_training_with_its_figure_and_advice(make_encoder):
    """Negatives made degenerate on purpose: a projection that maps every text to nearly the same vector."""
    encoder = make_encoder("bert")
    encoder.model.encoder.layer[-1].output.LayerNorm.weight.data.mul_(1e-3)
    encoder.model.encoder.layer[-1].output.LayerNorm.bias.data.fill_(1.0)
    step = joint_step(encoder, collapse_steps=4, item_learning_rate=1e-7, train=TrainConfig(precision="float32"))
    batches = lambda epoch: training_batches(histories(), 8, 3, np.random.default_rng(epoch))  # noqa: E731
    with pytest.raises(
        TrainingError, match=r"collapsed: .* only 0.0% .* for 4 steps .*lower tune.item_learning_rate"
    ):
        fit(step, step.parameter_groups(), batches, lambda: {"r": 0.0}, step.config.train, name="t", metric="r")
    assert len(step.apart) == 4


def test_lora_trains_adapters_and_merges_into_one_tower(make_encoder, tmp_path):
    encoder = make_encoder("llama")
    names = set(encoder.state_dict())
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.model = add_lora(encoder.model, LoraSettings(rank=2))
    config = TrainConfig(epochs=1, batch_size=6, learning_rate=1e-2, warmup_steps=0, precision="float32")
    step = joint_step(encoder, train=config, item_learning_rate=1e-2)
    trained = {name for name, p in step.encoder.named_parameters() if p.requires_grad}
    assert trained == {name for name in trained if "lora_" in name} | {"item_token"}
    batches = lambda epoch: training_batches(histories(), 8, 6, np.random.default_rng(epoch))  # noqa: E731
    fit(step, step.parameter_groups(), batches, lambda: {"r": 0.0}, config, name="t", metric="r")
    ids = encoder.tokenise(TEXTS).input_ids
    with torch.inference_mode():
        adapted = encoder.eval().encode_ids(ids, 64)
        encoder.model = merge_lora(encoder.model)
        merged = encoder.encode_ids(ids, 64)
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert set(encoder.state_dict()) == names
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"item_token", "model.layers.0.self_attn.q_proj.weight"} <= changed
    assert not any("norm" in name or "embed" in name for name in changed)
    encoder.save(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(ItemEncoder.load(tmp_path).encode_ids(ids, 64), merged)


WORKER = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import torch.distributed as dist
from test_pipeline_joint import *
from item_tower.encoder import EncoderConfig
from item_tower.prompt import TemplateConfig
from user_tower.train import fit, is_main_process

settings = EncoderConfig(model=sys.argv[1], pooling="mean", compute_dtype="float32", max_length=32)
encoder = ItemEncoder.from_config(settings, TemplateConfig(prompt=""))
world = int(os.environ["WORLD_SIZE"])
assert is_main_process() == (os.environ["RANK"] == "0")
assert world == 1 or dist.get_world_size() == world
train = TrainConfig(epochs=1, batch_size=5, negatives=6, precision="float32", warmup_steps=0, clip_norm=1e9)
step = joint_step(encoder, train=train, graph_tokens=80, token_budget=60, item_learning_rate=1e-3)
seen = []
from torch.optim.optimizer import register_optimizer_step_pre_hook
register_optimizer_step_pre_hook(
    lambda *_: seen.append({{name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}})
)
batches = lambda epoch: training_batches(histories(), 8, 5, np.random.default_rng(epoch))
result = fit(step, step.parameter_groups(), batches, lambda: {{"r": 0.5}}, train, name="t", metric="r")
if is_main_process():
    torch.save((seen, {{k: v for k, v in step.state_dict().items()}}, result.curve), sys.argv[2])
"""


def test_two_processes_give_the_gradients_of_one(bert_folder, tmp_path):
    """Over gloo: each encodes half of the texts, and the last batch has rows for one of them only."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    results = []
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0", "--standalone"]
        command = [sys.executable, *launch, str(script), str(bert_folder), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=False))
    (alone, weights, curve), (together, both_weights, both_curve) = results
    assert len(alone) == len(together) == curve[0]["step"]
    assert curve[0]["loss"] == pytest.approx(both_curve[0]["loss"], rel=1e-5)
    for number, (one, two) in enumerate(zip(alone, together, strict=True)):
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, atol=2e-5, rtol=1e-4, msg=f"step {number}, {name}")
    assert torch.equal(weights["counts"], both_weights["counts"])
