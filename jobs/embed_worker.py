"""The worker that runs inside Ray for embed-items."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from item_tower.cpu import speed_up
from item_tower.decoders.layers import compile_layers
from item_tower.decoders.precision import default_device
from item_tower.embed import EmbedConfig, as_table, embed_texts
from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig
from pipeline.catalog import read_texts
from pipeline.embeddings import stamped
from pipeline.store import open_store
from schemas import tables
from schemas.errors import FingerprintMismatchError
from schemas.records import Dataset, ItemTower

ROW = "catalog_row"
PROBE = "probe"
# one row a window, as the driver reads it; vectors: only of a probe
REPORT = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("padded", pa.int64()),
        ("truncated", pa.int64()),
        ("failed_rows", pa.list_(pa.int64())),
        ("failed_reasons", pa.list_(pa.string())),
        ("vectors", pa.binary()),
    ]
)


@dataclass(frozen=True)
class WorkOrder:
    """What a worker needs to know. store: for ``open_store``; tower: a tuned one, None for the untuned one."""

    store: str
    dataset: Dataset
    tower: ItemTower | None
    encoder: EncoderConfig
    template: TemplateConfig
    embed: EmbedConfig
    fingerprint: str
    run_id: str
    threads: int


class EmbedAndWrite:
    """A Ray actor: loads the item tower once; rows of the catalog in, one uncommitted Parquet file a window out."""

    def __init__(self, order: WorkOrder, ledger: Any) -> None:
        """ledger: a ``Ledger``, or what passes its calls on to one."""
        self.order, self.ledger = order, ledger
        self.store = open_store(order.store)
        self.catalog = self.store.folder(order.dataset) / "items.parquet"

    @cached_property
    def encoder(self) -> ItemEncoder:
        """The item tower, loaded by the first call. Raises FingerprintMismatchError when it is not the driver's.

        Not by the constructor, which Ray runs in another thread: OpenMP would keep a team for each of the two, and
        with more threads than cores its barriers sleep where they would spin. Of a constructor that raises, Ray says
        only that the actor died.
        """
        order = self.order
        torch.set_num_threads(order.threads)
        if order.tower is None:
            encoder = ItemEncoder.from_config(order.encoder, order.template)
        else:
            encoder = ItemEncoder.load(self.store.folder(order.tower))
        encoder.to(default_device())
        found = fingerprint(encoder, order.embed.output_dtype)
        if found != order.fingerprint:
            raise FingerprintMismatchError(
                f"a worker loaded item tower {found}, the job embeds for {order.fingerprint}: model files, "
                f"packages or processor differ between driver and workers; make them the same"
            )
        encoder.packing = order.embed.packing
        compiles = order.embed.compile
        if encoder.device.type == "cuda" or not compiles:  # packed weights cannot be compiled
            speed_up(encoder)
        if compiles:
            compile_layers(encoder.model)
        return encoder

    def __call__(self, window: pa.Table) -> pa.Table:
        """window: catalog_row (int64, ascending), probe (bool, the same in all rows). Returns one row of REPORT.

        A probe's vectors are returned and not written. Raises FingerprintMismatchError, and what ``Ledger.begin``
        raises.
        """
        order = self.order
        rows = window.column(ROW).to_numpy()
        probe = window.column(PROBE)[0].as_py()
        name = -1 if probe else int(rows[0])
        groups, dead = self.ledger.begin(name)
        encoder = self.encoder
        texts = read_texts(self.catalog, encoder.template, rows)
        result = embed_texts(
            encoder,
            texts.column(tables.TEXT).to_pylist(),
            order.embed,
            suspects=groups,
            failed=dict.fromkeys(dead, "two workers died while embedding it"),
            tokenising=lambda some: self.ledger.tokenise(name, some),
            attempt=lambda batch, stream: self.ledger.attempt(name, batch, stream),
        )
        file = {"path": None, "size": 0, "rows": 0}
        if len(result.rows) and not probe:
            vectors = stamped(as_table(texts.column(tables.KEY), result), order.run_id)
            file = self.store.embeddings.write(order.fingerprint, vectors)
        self.ledger.end(name)
        report = file | {
            "tokens": int(result.n_tokens.sum()),
            "padded": result.padded,
            "truncated": int(result.truncated.sum()),
            "failed_rows": [int(rows[row]) for row in result.failed],
            "failed_reasons": list(result.failed.values()),
            "vectors": result.vectors.tobytes() if probe else None,
        }
        return pa.Table.from_pylist([report], schema=REPORT)


def default_threads(workers: int) -> int:
    """Torch threads of each worker on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)
