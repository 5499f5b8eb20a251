"""bench cache: planning and opening at a size that no test may have, each in a process of its own for its memory."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from item_tower.prompt import TemplateConfig
from jobs.config import load_config, local_store
from jobs.memory import keep_pages
from pipeline.cache import create_snapshot, open_snapshot, plan_embedding, snapshot_items
from pipeline.catalog import SLICE_ROWS, CatalogScan, scan_catalog
from pipeline.cells import encode_keys
from pipeline.embeddings import stamped
from pipeline.gates import GateConfig
from pipeline.store import Store
from schemas import tables
from schemas.records import Snapshot

PLAN_ITEMS, CHANGED = 10_000_000, 0.01
OPEN_ITEMS, OPEN_DIM = 1_000_000, 384
TOWER = "b" * 32
_FILE = 250_000
_TEMPLATE = TemplateConfig(fields=("title",))


def write_catalog(path: Path, items: int, changed: float) -> None:
    """A prepared catalog of made-up titles; every 1 / changed-th one has another title."""
    schema = pa.schema([(tables.ITEM_ID, pa.string()), ("title", pa.string()), (tables.AVAILABLE, pa.bool_())])
    every = round(1 / changed) if changed else items + 1
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, items, SLICE_ROWS):
            numbers = range(start, min(items, start + SLICE_ROWS))
            titles = [
                f"{'New' if n % every == 0 else 'Old'} made-up item number {n} of a large shop" for n in numbers
            ]
            ids = [f"item{n:09}" for n in numbers]
            file.write_table(pa.table([ids, titles, [True] * len(ids)], schema=schema))


def fill(store: Store, scan: CatalogScan, dim: int, rows: int = _FILE, run_id: str = "bench") -> None:
    """Random vectors of every key, as workers write them, so many rows a file."""
    rng = np.random.default_rng(0)
    for start in range(0, len(scan.keys), rows):
        keys = scan.keys[start : start + rows]
        vectors = rng.standard_normal((len(keys), dim), dtype=np.float32).astype("<f2")
        cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * dim), len(keys), [None, pa.py_buffer(vectors)])
        made = pa.table(
            {
                tables.KEY: encode_keys(keys),
                tables.EMBEDDING: cells.cast(pa.binary()),
                tables.N_TOKENS: np.full(len(keys), 9, dtype=np.int32),
                tables.TRUNCATED: np.zeros(len(keys), dtype=bool),
            }
        )
        file = store.embeddings.write(TOWER, stamped(made, run_id))
        store.embeddings.commit(TOWER, [file])


def _make_plan_store(root: Path) -> None:
    write_catalog(root / "old.parquet", PLAN_ITEMS, 0)
    fill(Store(root), scan_catalog(root / "old.parquet", _TEMPLATE), 4)
    write_catalog(root / "new.parquet", PLAN_ITEMS, CHANGED)


def _plan(root: Path) -> dict[str, Any]:
    started = time.perf_counter()
    plan = plan_embedding(Store(root), TOWER, scan_catalog(root / "new.parquet", _TEMPLATE), {})
    seconds = time.perf_counter() - started
    return {"items": PLAN_ITEMS, "missing": plan.embedded, "seconds": round(seconds, 2)}


def _make_open_store(root: Path) -> None:
    store = Store(root)
    write_catalog(root / "items.parquet", OPEN_ITEMS, 0)
    scan = scan_catalog(root / "items.parquet", _TEMPLATE)
    fill(store, scan, OPEN_DIM)
    facts = {
        "embedded": OPEN_ITEMS, "reused": 0, "tokens_per_second": None, "dataset": "", "code_version": "",
        "run_id": "bench",
    }  # fmt: skip
    items, left_out = snapshot_items(scan, set()), tables.LEFT_OUT.empty_table()
    limits = GateConfig(max_collapsed=1)
    record = create_snapshot(
        store, TOWER, items, left_out, dtype="float16", dim=OPEN_DIM, limits=limits, gates={}, facts=facts
    )
    np.save(root / "same.npy", open_snapshot(store, record).vectors)
    shutil.rmtree(store.matrices)


def _npload(root: Path) -> dict[str, Any]:
    np.load(root / "same.npy")
    started = time.perf_counter()
    array = np.load(root / "same.npy")
    return {"seconds": round(time.perf_counter() - started, 3), "bytes": array.nbytes}


def _copy(root: Path) -> dict[str, Any]:
    """What writing a local file of the vectors takes at least."""
    started = time.perf_counter()
    shutil.copyfile(root / "same.npy", root / "copy.npy")
    seconds = time.perf_counter() - started
    (root / "copy.npy").unlink()
    return {"seconds": round(seconds, 3)}


def _open(root: Path) -> dict[str, Any]:
    store = Store(root)
    started = time.perf_counter()
    matrix = open_snapshot(store, store.require(Snapshot))
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "mapped": isinstance(matrix.vectors, np.memmap)}


def _measured(work: Callable[[Path], dict[str, Any] | None], root: Path) -> dict[str, Any]:
    keep_pages()  # as every command does
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # the interpreter with its libraries
    found = work(root) or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return found | {"start_mib": start, "peak_mib": peak}


def apart(name: str, work: Callable[[Path], dict[str, Any] | None], root: Path) -> dict[str, Any]:
    """The work in a fresh process, with its peak memory in MiB. Raises what it raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return {"name": name} | process.submit(_measured, work, root).result()


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Print rows and ratios: a plan of 10M items, 1 % changed; opening 1M x 384 in fp16 against np.load."""
    parent = local_store(load_config(config, None, sets)).resolve().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-cache-") as folder:
        root = Path(folder)
        apart("make", _make_open_store, root)
        works = {"np.load": _npload, "copy of the file": _copy, "first open": _open, "second open": _open}
        rows = [apart(name, work, root) for name, work in works.items()]
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-cache-") as folder:
        apart("make", _make_plan_store, Path(folder))
        rows.append(apart("plan", _plan, Path(folder)))
    loaded, copied, first, second, plan = rows
    ratio = {
        "first_open_over_npload": round(first["seconds"] / loaded["seconds"], 2),
        "first_open_over_copy": round(first["seconds"] / copied["seconds"], 2),
        "second_open_seconds": second["seconds"],
        "first_open_memory_over_matrix": round((first["peak_mib"] - first["start_mib"]) * 2**20 / loaded["bytes"], 2),
        "plan_seconds": plan["seconds"],
        "plan_gib": round(plan["peak_mib"] / 1024, 2),
    }
    return {"name": "cache", "rows": rows, "ratio": ratio}
