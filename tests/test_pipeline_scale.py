"""The formulas of docs/scale.md against what they are of, at a thousandth of its size: files, indexes, schedules."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pyarrow as pa
import pytest

from item_tower.prompt import TemplateConfig
from jobs import bench_scale
from jobs.bench_cache import fill, write_catalog
from pipeline import scale
from pipeline.ann import IndexConfig, make, serialized_bytes, set_threads
from pipeline.cache import create_snapshot, open_snapshot, snapshot_items
from pipeline.catalog import scan_catalog
from pipeline.gates import GateConfig
from pipeline.store import Store
from pipeline.users import TableWriter, encode_user_vectors
from schemas import tables
from user_tower.sequences import Histories, training_batches, training_windows

SIZES = scale.Sizes()  # 10 million items, 100 million users
ITEMS, USERS = SIZES.items // 1000, SIZES.users // 1000
DIM, WINDOW, TOWER = 32, 4_096, "b" * 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> tuple[Store, pa.Table]:
    """A store with 10,000 made-up vectors, written as workers write them."""
    root = tmp_path_factory.mktemp("scale")
    store = Store(root)
    write_catalog(root / "items.parquet", ITEMS, 0)
    scan = scan_catalog(root / "items.parquet", TemplateConfig(fields=("title",)))
    fill(store, scan, DIM, rows=WINDOW, run_id="r" * scale.RUN_ID)
    return store, snapshot_items(scan, set())


def test_the_embedding_table(cache):
    store, _ = cache
    found = sum(file.size for file in store.embeddings.files(TOWER))
    assert found == pytest.approx(scale.embedding_bytes(ITEMS, DIM, 2, WINDOW), rel=0.01)


def test_a_snapshot_and_its_matrix(cache):
    store, items = cache
    facts = {
        "embedded": ITEMS, "reused": 0, "tokens_per_second": None, "dataset": "", "code_version": "", "run_id": ""
    }  # fmt: skip
    record = create_snapshot(
        store, TOWER, items, tables.LEFT_OUT.empty_table(), dtype="float16", dim=DIM,
        limits=GateConfig(max_collapsed=1), gates={}, facts=facts,
    )  # fmt: skip
    vectors = open_snapshot(store, record).vectors
    assert store.matrix_file(record.vectors_digest).stat().st_size == scale.matrix_bytes(ITEMS, DIM, 2)
    assert vectors.shape == (ITEMS, DIM)
    wide = len(items.column(tables.ITEM_ID)[0].as_py())
    found = (store.folder(record) / "items.parquet").stat().st_size
    most = scale.snapshot_bytes(ITEMS, wide)
    assert 0.6 * most < found < 1.02 * most  # "at most": ids that count up compress well


def test_the_table_of_user_vectors(tmp_path):
    writer = TableWriter(tmp_path)
    rng = np.random.default_rng(0)
    for start in range(0, USERS, 16_384):
        users = [f"user{n:08}" for n in range(start, min(USERS, start + 16_384))]
        drawn = rng.bytes(16 * len(users))
        digests = [drawn[16 * n : 16 * n + 16] for n in range(len(users))]
        writer.write(users, digests, encode_user_vectors(rng.standard_normal((len(users), 8))))
    writer.close()
    found = (tmp_path / "users.parquet").stat().st_size
    assert found == pytest.approx(scale.user_table_bytes(USERS, 8, 2, 12), rel=0.01)


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", pytest.param("ivf-pq", marks=pytest.mark.slow), "hnsw"])
def test_an_index(kind):
    vectors = np.random.default_rng(0).standard_normal((ITEMS, DIM)).astype(np.float32)
    set_threads(1)  # several would wait for each other
    config = IndexConfig(kind=kind, ef_construction=16, pq_bytes=2)
    found = serialized_bytes(make(config, vectors))
    assert found == pytest.approx(scale.index_bytes(config, ITEMS, DIM), rel=0.01, abs=4_096)


def test_windows_on_workers_take_the_hours_of_the_formula():
    """Texts of random length, windows handed to whichever worker is free first."""
    rng = np.random.default_rng(0)
    tokens = rng.poisson(20, ITEMS)
    windows = [tokens[start : start + 512].sum() for start in range(0, ITEMS, 512)]
    for gpus in (1, 8, 64):
        free = [0.0] * gpus
        for window in windows:
            heapq.heappush(free, heapq.heappop(free) + window / 1000.0)
        found = max(free) / 3600
        assert scale.embed_hours(ITEMS, tokens.mean(), 1000.0, gpus, 512) == pytest.approx(found, rel=0.05)


def test_a_training_has_the_positions_and_stage_one_the_items_of_the_formula():
    """Against the real windows and batches of 20,000 users over a large catalog."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.poisson(SIZES.user_events, 20_000))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(0, SIZES.items, offsets[-1])
    histories = Histories([str(n) for n in range(20_000)], offsets, items)
    real = sum(batch.positions for batch in training_batches(histories, 50, 64, rng))
    assert scale.positions(20_000, lengths.mean()) == pytest.approx(real, rel=1e-9)
    assert len(training_windows(histories, 50, rng)) >= 20_000
    distinct = 0
    for batch in training_batches(histories, 50, 64, rng):
        real_places = batch.targets >= 0
        distinct += len(np.unique(np.concatenate([batch.items[real_places], batch.targets[real_places]])))
    sizes = scale.Sizes(users=20_000, user_events=lengths.mean(), item_tokens=1, tune_epochs=1)
    assert scale.tune_tokens(sizes) == pytest.approx(distinct, rel=0.01)


def test_hours_by_hand_and_none_without_a_rate():
    sizes = scale.Sizes(items=36_000, users=7_200, item_tokens=10, user_events=3, changed=0.1, active=0.5,
                        train_epochs=2, tune_epochs=1, dim=50)  # fmt: skip
    rates = scale.Rates(embed_tokens=100, tune_tokens=50, train_positions=4, user_vectors=1, plan_items=10,
                        matrix_bytes=1000, index_flops=1e9, scaling=0.5)  # fmt: skip
    flat = IndexConfig(kind="flat")
    one = scale.hours(sizes, rates, flat, 1, 100)
    assert one["embed_all"] == pytest.approx(36_000 * 10 / 100 / 3600)
    assert one["tune"] == pytest.approx(7_200 * 3 * 10 / 50 / 3600)
    assert one["train"] == pytest.approx(2 * 7_200 * 2 / 4 / 3600)
    assert one["night"] == pytest.approx(1.0 + 0.1 + 1.0 + 0.0 + 1.0)
    four = scale.hours(sizes, rates, flat, 4, 100)
    assert four["embed_all"] == pytest.approx(one["embed_all"] / 2)
    assert four["plan"] == one["plan"]
    unknown = scale.hours(sizes, scale.Rates(plan_items=10), flat, 8, 100)
    assert unknown["night"] is None
    assert unknown["embed_all"] is None
    assert scale.tokens_for(sizes, one["embed_all"], 1) == pytest.approx(100)


def test_the_work_of_an_ivf_grows_as_stated():
    config = IndexConfig(kind="ivf-flat")
    nlist = int(8 * math.sqrt(100_000_000))
    flops = scale.index_build_flops(config, 100_000_000, 384)
    assert flops == 2 * 384 * nlist * (100_000_000 + 6 * 40 * nlist)
    assert scale.index_build_flops(IndexConfig(kind="hnsw"), 1000, 8) == 0


def test_bench_scale_takes_given_rates_and_measures_the_others(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scale, "_rate", lambda work, amount, seconds=0: (work(), amount)[1])
    monkeypatch.setattr(bench_scale, "_ITEMS", 400)
    monkeypatch.setattr(bench_scale, "IndexConfig", lambda **rest: IndexConfig(kind="ivf-flat", nlist=4))
    sets = [
        f'encoder.model="{bert_folder}"', "encoder.compute_dtype=float32", "bench.scale.dim=32", "train.negatives=8",
        "bench.rates.user_vectors=1000", "index.kind=flat",
    ]  # fmt: skip
    result = bench_scale.run("demo.toml", sets)
    assert len(result["rows"]) == 6
    assert "user_vectors" not in result["measured_here"]
    assert {"embed_tokens", "tune_tokens", "plan_items", "index_flops"} <= set(result["measured_here"])
    one, eight, most = (row["hours"] for row in result["rows"][:3])
    assert one["all_users"] == round(SIZES.users / 1000 / 3600, 2)
    assert one["embed_all"] > eight["embed_all"] > most["embed_all"] > 0
    assert all(
        row["gib"]["index"] == round(n * 1e6 * 32 * 4 / 2**30, 1)
        for row, n in zip(result["rows"], [10] * 3 + [100] * 3, strict=True)
    )
