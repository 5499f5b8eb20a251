"""bench ingest: 20 million made-up interactions and 2 million items from gz CSV, against polars' own scan."""

from __future__ import annotations

import gzip
import tempfile
import time
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from item_tower.prompt import TemplateConfig
from jobs.bench_cache import apart
from jobs.config import load_config, local_store
from pipeline.dataset import write_dataset
from pipeline.importers import bare_scan
from pipeline.ingest import ingest
from pipeline.intake import DataConfig
from pipeline.profile import profile
from pipeline.store import Store
from schemas import tables

EVENTS, ITEMS, USERS = 20_000_000, 2_000_000, 1_000_000
_PART = 1_000_000
_ROUNDS = 3  # of all in turn; the median counts
_SCAN = "polars scan to Parquet"
_START = 1_500_000_000  # seconds; 20 events a second, as a log has them: in order of time, some at one time


def _write(path: Path, parts: Any) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number, part in enumerate(parts):
            pc.write_csv(part, file, pc.WriteOptions(include_header=number == 0, quoting_style="needed"))


def _named(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pa.array([f"{prefix}{number}" for number in numbers.tolist()])


def make(root: Path) -> None:
    """Both files. Items are wanted as 1 / rank, users as the square of a uniform number: few do much."""
    rng = np.random.default_rng(0)

    def items() -> Any:
        for start in range(0, ITEMS, _PART):
            numbers = np.arange(start, min(ITEMS, start + _PART))
            titles = [f"Made-up item, number {number} of a large shop" for number in numbers.tolist()]
            yield pa.table({tables.ITEM_ID: _named("B00", numbers), "title": titles})

    def events() -> Any:
        for start in range(0, EVENTS, _PART):
            count = min(_PART, EVENTS - start)
            item = (ITEMS ** rng.random(count)).astype(np.int64) - 1
            user = (USERS * rng.random(count) ** 2).astype(np.int64)
            times = _START + (start + np.arange(count)) // 20
            yield pa.table(
                {tables.USER_ID: _named("user", user), tables.ITEM_ID: _named("B00", item), tables.TIMESTAMP: times}
            )

    _write(root / "items.csv.gz", items())
    _write(root / "interactions.csv.gz", events())


def _timed(work: Any) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    work()
    seconds = time.perf_counter() - started
    return {
        "rows": EVENTS + ITEMS,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "rows_per_second": round((EVENTS + ITEMS) / seconds),
    }


def _bare(root: Path, orders: dict[str, list[str]] | None = None) -> dict[str, Any]:
    def work() -> None:
        for name in ("items", "interactions"):
            bare_scan(root / f"{name}.csv.gz", root / f"{name}.parquet", (orders or {}).get(name, []))

    return _timed(work)


def _sorted(root: Path) -> dict[str, Any]:
    return _bare(root, {"items": [tables.ITEM_ID], "interactions": [tables.USER_ID, tables.TIMESTAMP]})


def _prepare(root: Path) -> dict[str, Any]:
    config = DataConfig(items=root / "items.csv.gz", interactions=root / "interactions.csv.gz")

    with tempfile.TemporaryDirectory(dir=root) as store:  # a new one: what is there already is not written again

        def work() -> None:
            clean = ingest(config)
            describe = partial(profile, clean, TemplateConfig(), None, None, {})
            write_dataset(Store(Path(store)), "bench", clean, describe)

        return _timed(work)


def run(config: str, sets: list[str]) -> dict[str, Any]:
    """Print rows and ratios: all of prepare-data but the tokenizer; polars' scan to Parquet, bare and sorted.

    Each is the median of three, run in turn.
    """
    parent = local_store(load_config(config, None, sets)).resolve().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-ingest-") as folder:
        root = Path(folder)
        apart("make", make, root)
        works = {_SCAN: _bare, f"{_SCAN}, sorted": _sorted, "prepare-data": _prepare}
        runs = [{name: apart(name, work, root) for name, work in works.items()} for _ in range(_ROUNDS)]
        by_time = [sorted((run[name] for run in runs), key=itemgetter("seconds")) for name in works]
        bare, ordered, ours = (rows[_ROUNDS // 2] for rows in by_time)
    ratio = {
        "ingest_over_polars_scan": round(ours["rows_per_second"] / bare["rows_per_second"], 2),
        "ingest_over_polars_scan_and_sort": round(ours["rows_per_second"] / ordered["rows_per_second"], 2),
        "ingest_gib": round(ours["peak_mib"] / 1024, 2),
    }
    return {"name": "ingest", "rows": [bare, ordered, ours], "ratio": ratio}
