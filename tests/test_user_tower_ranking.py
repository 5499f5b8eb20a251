"""Rankers: what late and early fusion read, what they cost, the loss, and an effect that a retrieval score misses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import DIM, planted_clicks
from torch.utils.flop_counter import FlopCounterMode

from pipeline.baselines import TowerRecommender
from pipeline.click_metrics import auc, click_figures
from pipeline.clicks import asked_examples, training_examples
from pipeline.ranking import retrieval_scores
from pipeline.splits import SplitConfig
from schemas.errors import ConfigError, StoreError
from user_tower.candidates import Examples, candidate_batches, contexts_of, draw_contexts
from user_tower.model import UserTower, UserTowerConfig
from user_tower.negatives import NegativeSampler
from user_tower.ranking import CandidateScorer, Ranker, RankerConfig, RankingStep, click_loss
from user_tower.sequences import Histories, training_batches
from user_tower.steps import UserStep
from user_tower.train import TrainConfig, fit

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "dropout": 0.0, "history": 6}
ITEMS = 40
IDS = [f"i{n}" for n in range(ITEMS)]
FUSIONS = ("late", "early")


def make_ranker(fusion: str = "late", **settings):
    torch.manual_seed(0)
    config = UserTowerConfig(**(SMALL | settings))
    item_dim = None if config.features == "id" else 8
    vocabulary = None if config.features == "text" else IDS[:-1]
    ranker = Ranker(UserTower(config, item_dim, vocabulary), fusion, 5).eval()
    return ranker, open_catalog(ranker)


def open_catalog(ranker: Ranker):
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 8)).astype(np.float32)
    return ranker.tower.catalog(IDS, None if ranker.tower.item_dim is None else vectors, np.arange(ITEMS))


def make_examples(count: int = 60, seed: int = 0) -> Examples:
    """Examples of five users with 0, 1, 3, 9 and 20 events, at random places."""
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, 0, 1, 3, 9, 20])
    times = 1_600_000_000_000 + np.arange(33) * 3_600_000
    histories = Histories([f"u{n}" for n in range(5)], offsets, rng.integers(0, ITEMS, 33), times)
    users = rng.integers(0, 5, count)
    before = (rng.random(count) * (histories.lengths[users] + 1)).astype(np.int64)
    return Examples(histories, users, before, rng.integers(0, ITEMS, count), rng.integers(0, 2, count))


def test_batches_hold_each_example_once_after_its_own_context():
    examples = make_examples()
    for shuffle in (None, np.random.default_rng(0)):
        met = []
        for batch in candidate_batches(examples, 4, 3, 2, shuffle):
            assert len(batch.context.lengths) <= 3
            assert np.bincount(batch.owners).max() <= 2
            assert (batch.owners[batch.first] == np.arange(len(batch.context.lengths))).all()
            for owner, example in zip(batch.owners, batch.examples, strict=True):
                user, until = examples.users[example], int(examples.before[example])
                events = examples.histories.of(user)
                length = batch.context.lengths[owner]
                assert length == min(4, until)
                assert batch.context.items[owner, :length].tolist() == events[:until][-4:].tolist()
                following = [*events[1:], -1][until - length : until]
                assert batch.context.targets[owner, :length].tolist() == following
                assert (batch.context.targets[owner, length:] == -1).all()
            met += batch.examples.tolist()
            assert (examples.items[batch.examples] == batch.candidates).all()
            assert (examples.labels[batch.examples] == batch.labels).all()
        assert sorted(met) == list(range(60))


def test_an_epoch_draws_some_contexts_of_each_user_with_all_their_examples():
    examples = make_examples(200)
    contexts, place = contexts_of(examples)
    drawn = draw_contexts(examples, 2, np.random.default_rng(0))
    own, _ = contexts_of(drawn)
    for user in set(contexts.users):
        assert own.users.count(user) == min(2, contexts.users.count(user))
    kept = {(user, before) for user, before in zip(drawn.users, drawn.before, strict=True)}
    whole = [pair in kept for pair in zip(examples.users, examples.before, strict=True)]
    assert sum(whole) == len(drawn)
    assert len(draw_contexts(examples, 0, np.random.default_rng(0))) == 200
    other = draw_contexts(examples, 2, np.random.default_rng(1))
    assert other.before.tolist() != drawn.before.tolist()
    assert len(place) == 200


@pytest.mark.parametrize("backbone", ["sasrec", "hstu", "llm"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_score_depends_on_its_own_context_and_candidate_alone(fusion, backbone):
    ranker, catalog = make_ranker(fusion, backbone=backbone, timestamps=True)
    for weight in ranker.parameters():  # time features start at zero, and so must not here
        weight.data.add_(torch.randn(weight.shape) * 0.05)
    examples, scorer = make_examples(), CandidateScorer(ranker, catalog)
    together = scorer.score(examples, 64, 64)
    alone = np.concatenate([scorer.score(examples.select(np.array([n])), 1, 1) for n in range(60)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(scorer.score(examples, 3, 2), alone, atol=1e-5)
    later = Examples(
        Histories(examples.histories.users, examples.histories.offsets, np.roll(examples.histories.items, 1)),
        *(getattr(examples, name) for name in ("users", "before", "items", "labels")),
    )
    assert np.abs(scorer.score(later, 64, 64) - alone).max() > 1e-3  # and on both of them
    assert len(set(alone.round(6))) > 50


@pytest.mark.parametrize("features", ["id", "text+id"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_rankers_read_ids_too_and_come_back_from_their_files(tmp_path, fusion, features):
    ranker, catalog = make_ranker(fusion, features=features)
    scores = CandidateScorer(ranker, catalog).score(make_examples(), 8, 8)
    ranker.save(tmp_path)
    loaded = Ranker.load(tmp_path)
    assert loaded.fingerprint() == ranker.fingerprint()
    np.testing.assert_array_equal(CandidateScorer(loaded, open_catalog(loaded)).score(make_examples(), 8, 8), scores)
    (tmp_path / "ranker.safetensors").write_bytes(b"half")
    with pytest.raises(StoreError, match=r"cannot be read: .*train it again"):
        Ranker.load(tmp_path)


def test_a_history_without_a_place_for_the_token_is_refused():
    with pytest.raises(ConfigError, match=r"user_tower\.history = 1: a ranker needs 2"):
        make_ranker(history=1)


def count_passes(ranker: Ranker) -> list[int]:
    """Rows of each pass of the tower, as they happen."""
    rows: list[int] = []
    ranker.tower.backbone.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    return rows


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_late_fusion_reads_the_history_once_and_a_candidate_costs_an_inner_product():
    found = {}
    for fusion in FUSIONS:
        ranker, catalog = make_ranker(fusion)
        scorer, rows = CandidateScorer(ranker, catalog), count_passes(ranker)

        def work(count: int, scorer=scorer) -> None:
            user = Histories(["u"], np.array([0, 5]), np.arange(5))
            one = np.zeros(count, dtype=np.int64)
            scorer.score(Examples(user, one, one + 5, np.arange(count) % ITEMS, one), 1, count)

        found[fusion] = (flops(lambda: work(1000)) - flops(lambda: work(500))) / 500
        assert rows == ([1, 1] if fusion == "late" else [1000, 500])
    assert found["late"] == 2 * (5 + 1)  # a multiplication and an addition of each factor and of the bias
    assert found["early"] > 1000 * found["late"]


def test_the_cached_factors_are_the_score():
    """The same number from the two tables, as any index of inner products would have it."""
    ranker, catalog = make_ranker("late")
    examples = make_examples()
    (batch,) = candidate_batches(examples, ranker.context_length, 60, 60)
    with torch.no_grad():
        users, items = ranker.user_factors(catalog, batch.context), ranker.item_factors(catalog)
    assert (users.shape[1], items.shape) == (6, (ITEMS, 6))
    cached = (users.numpy()[batch.owners] * items.numpy()[batch.candidates]).sum(-1)
    with torch.no_grad():
        trained, _ = ranker(catalog, batch)
    np.testing.assert_allclose(cached, trained.numpy(), atol=1e-6)
    np.testing.assert_allclose(
        CandidateScorer(ranker, catalog).score(examples, 9, 9)[batch.examples], cached, atol=1e-6
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_next_item_loss_is_that_of_the_tower_alone(fusion):
    """lambda adds InfoNCE of the same contexts; the appended token or candidate changes nothing before it."""
    ranker, catalog = make_ranker(fusion)
    sampler = NegativeSampler(torch.arange(ITEMS), torch.ones(ITEMS), 0, "uniform")
    (batch,) = candidate_batches(make_examples(), ranker.context_length, 60, 60)
    losses = {weight: RankingStep(ranker, catalog, sampler, weight)(batch, batch, 0).item() for weight in (0.0, 1, 3)}
    read = ranker.tower.read
    ranker.tower.read = lambda x, lengths, times: read(x, lengths + 1, times)  # the token has the newest place
    alone = UserStep(ranker.tower, catalog, sampler)(batch.context, batch.context, 0).item()
    with torch.no_grad():
        ranker.tower.read = read
        logits, _ = ranker(catalog, batch)
    clicks = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels).float()).item()
    assert losses[0.0] == pytest.approx(clicks, rel=1e-5)
    assert losses[1] == pytest.approx(clicks + alone, rel=1e-5)
    assert losses[3] == pytest.approx(clicks + 3 * alone, rel=1e-5)


def test_a_training_decides_how_the_tower_computes_and_no_figure():
    ranker, catalog = make_ranker("early")
    sampler = NegativeSampler(torch.arange(ITEMS), torch.ones(ITEMS), 0, "uniform")
    (batch,) = candidate_batches(make_examples(), ranker.context_length, 60, 60)
    kept = RankingStep(ranker, catalog, sampler, 1.0)(batch, batch, 0)
    again = RankingStep(ranker, catalog, sampler, 1.0, TrainConfig(gradient_checkpointing=True))
    assert ranker.tower.backbone.checkpointing
    assert torch.equal(again(batch, batch, 0), kept)


@pytest.mark.parametrize("world", [2, 3, 40])
def test_the_loss_of_all_processes_is_that_of_one(world):
    ranker, catalog = make_ranker("late")
    step = RankingStep(ranker, catalog, NegativeSampler(torch.arange(ITEMS), torch.ones(ITEMS), 9, "mixed"), 0.7)
    batch = next(iter(candidate_batches(make_examples(), ranker.context_length, 10, 4, np.random.default_rng(2))))
    whole = step(batch, batch, 5).item()
    parts = [batch.share(rank, world) for rank in range(world)]
    assert sum(part.positions for part in parts) == batch.positions
    # as the loop does: each weighed by its share of the positions, then averaged over the processes
    weighed = [step(batch, part, 5).item() * world * part.positions / batch.positions for part in parts]
    assert np.mean(weighed) == pytest.approx(whole, rel=1e-5)


def test_what_only_fills_has_no_loss():
    assert click_loss(torch.tensor([3.0, -8.0]), torch.tensor([-1, -1])).item() == 0
    assert click_loss(torch.zeros(3), torch.tensor([1, 0, -1])).item() == pytest.approx(np.log(2))


@pytest.fixture(scope="module")
def planted():
    """The planted log, its split by time, and the AUC of a user tower's retrieval score on the test part."""
    clicks, vectors = planted_clicks()
    split = SplitConfig(protocol="temporal")
    training, valid, test = (
        training_examples(clicks, split),
        *(asked_examples(clicks, part, split).examples for part in ("valid", "test")),
    )
    torch.manual_seed(0)
    tower = UserTower(TOWER, DIM, None)
    catalog = bind(tower, vectors)
    step = UserStep(tower, catalog, every(len(vectors)))
    train(step, lambda rng: training_batches(training.histories, 24, 32, rng), lambda: {"recall": 0.0}, "recall")
    scores = retrieval_scores(TowerRecommender(tower, catalog), test, np.arange(len(vectors)), 32)
    return training, valid, test, vectors, click_figures(scores, test.labels, test.users, 100, logits=False)


TOWER = UserTowerConfig(hidden=32, layers=2, heads=2, dropout=0.0, history=24)


def bind(tower: UserTower, vectors: np.ndarray):
    return tower.catalog([f"i{n}" for n in range(len(vectors))], vectors, np.arange(len(vectors)))


def every(items: int) -> NegativeSampler:
    return NegativeSampler(torch.arange(items), torch.ones(items), 0, "uniform")


def train(step, batches, validate, metric: str, epochs: int = 6) -> None:
    config = TrainConfig(
        epochs=epochs, batch_size=64, learning_rate=1e-2, patience=epochs, warmup_steps=5, precision="float32"
    )
    groups = [{"params": list(step.parameters())}]
    fit(step, groups, lambda epoch: batches(np.random.default_rng(epoch)), validate, config, name="p", metric=metric)


def trained(planted, fusion: str, weight: float, epochs: int):
    training, valid, test, vectors, _ = planted
    torch.manual_seed(0)
    ranker = Ranker(UserTower(TOWER, DIM, None), fusion, 8)
    catalog = bind(ranker.tower, vectors)
    step = RankingStep(ranker, catalog, every(len(vectors)), weight)

    def batches(rng):
        return candidate_batches(draw_contexts(training, 8, rng), ranker.context_length, 64, 16, rng)

    def validate():
        return {"auc": auc(CandidateScorer(ranker, catalog).score(valid, 256, 16), valid.labels)}

    train(step, batches, validate, "auc", epochs)
    return click_figures(CandidateScorer(ranker, catalog).score(test, 256, 16), test.labels, test.users, 100)


def test_early_fusion_finds_what_an_inner_product_with_the_items_vector_cannot(planted):
    retrieval, early = planted[-1], trained(planted, "early", weight=0.1, epochs=6)
    assert 0.4 < retrieval.values["auc"] < 0.6
    assert early.values["auc"] > 0.9
    assert early.minus(retrieval, "auc")[1][0] > 0.25  # the lower end of the paired interval
    assert early.minus(retrieval, "user_auc")[1][0] > 0.25
    assert early.values["log_loss"] < 0.5 < np.log(2)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_both_fusions_find_it_with_the_default_lambda(planted, fusion):
    """Late as well: the item's head is not linear, and the product of the two signs fits into one factor."""
    assert trained(planted, fusion, RankerConfig().next_item_weight, epochs=20).values["auc"] > 0.95
