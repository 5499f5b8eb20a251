"""Three nights of the real embed-items for ``bench embed``: everything, nothing, and what a day changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import embed_items
from jobs.bench_clock import clocked
from jobs.config import load_config, local_store
from jobs.context import Context
from pipeline.catalog import SLICE_ROWS
from pipeline.files import next_created_at, record_id, write_record
from pipeline.store import Store
from schemas import tables
from schemas.records import Dataset

CHANGED, NEW, REMOVED = 0.01, 0.01, 0.005  # shares of the catalog


def _next_day(store: Store, dataset: Dataset, field: str) -> int:
    """Publish the data set with 1 % of the texts changed, 1 % new and 0.5 % of the items gone; returns the texts that
    no item had before."""
    items = pq.read_table(store.folder(dataset) / "items.parquet")
    count, rng = items.num_rows, np.random.default_rng(0)
    places = rng.permutation(count)
    changed, gone = places[: round(CHANGED * count)], places[count - round(REMOVED * count) :]
    new = np.sort(places[len(changed) : len(changed) + round(NEW * count)])
    texts = items.column(field).to_pylist()
    for place in changed.tolist():
        texts[place] = f"{texts[place]} (changed {place})"
    column = items.column_names.index(field)
    kept = items.set_column(column, items.schema.field(field), pa.array(texts, items.schema.field(field).type))
    added = items.take(pa.array(new)).set_column(
        column, items.schema.field(field), pa.array([f"new {place} {texts[place]}" for place in new.tolist()])
    )
    ids = pa.array([f"{item} new" for item in added.column(tables.ITEM_ID).to_pylist()])
    place_of_id = items.column_names.index(tables.ITEM_ID)
    added = added.set_column(place_of_id, items.schema.field(tables.ITEM_ID), ids)
    both = pa.concat_tables([kept.take(pa.array(np.setdiff1d(np.arange(count), gone))), added])
    created_at = next_created_at([dataset])
    digest = f"{dataset.digest[:-1]}x"  # of a bench
    update = dict(id=record_id(created_at, digest), created_at=created_at, digest=digest, items=both.num_rows)  # noqa: C408
    record = dataset.model_copy(update=update)
    with store.new(Dataset, record.id) as folder:
        pq.write_table(both.sort_by(tables.ITEM_ID), folder / "items.parquet", row_group_size=SLICE_ROWS)
        write_record(folder, record)
    return len(changed) + len(new)


def run_nights(context: Context, config: str, sets: list[str]) -> dict[str, dict[str, Any]]:
    """full, nothing, delta: what embed-items prints on each night, in a store of its own that is removed afterwards.

    Asserts that the second embeds nothing and the third exactly the new and changed texts.
    """
    dataset = context.dataset_record
    root = local_store(context.config).with_name(f"{local_store(context.config).name}-bench")
    shutil.rmtree(root, ignore_errors=True)
    own = [*sets, f'store="{root}"', 'item_tower.use="base"']

    def night() -> dict[str, Any]:
        done = clocked(lambda: embed_items.run(Context(load_config(config, None, own))))  # with the end of Ray
        rate = round(done.found["embedded"] / done.seconds, 1)
        return done.found | {"seconds": round(done.seconds, 3), "items_per_second": rate}

    try:
        shutil.copytree(context.store.folder(dataset), Store(Path(root)).folder(dataset))
        nights = {"full": night(), "nothing": night()}
        expected = _next_day(Store(Path(root)), dataset, context.config.template.fields[0])
        nights["delta"] = night()
        assert nights["nothing"]["embedded"] == 0, nights["nothing"]
        assert nights["delta"]["embedded"] == expected, (nights["delta"], expected)
        return nights
    finally:
        shutil.rmtree(root, ignore_errors=True)
