"""What runs inside Ray for embed-items: the worker, and the ledger by which a text that kills workers is found."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from item_tower.cpu import speed_up
from item_tower.decoders.layers import compile_layers
from item_tower.embed import EmbedConfig, as_table, embed_texts
from item_tower.encoder import EncoderConfig, ItemEncoder, default_device
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig
from pipeline.catalog import read_texts
from pipeline.embeddings import stamped
from pipeline.store import open_store
from schemas import tables
from schemas.errors import EmbeddingError, FingerprintMismatchError
from schemas.records import Dataset, ItemTower

ROW = "catalog_row"
PROBE = "probe"
MAX_DEATHS = 100
# one row a window, as the driver reads it; vectors: only of a probe
REPORT = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("rows", pa.int64()),
        ("texts", pa.int64()),
        ("tokens", pa.int64()),
        ("padded", pa.int64()),
        ("truncated", pa.int64()),
        ("seconds", pa.float64()),
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


class Ledger:
    """Which batch each window is computing. A window that begins again lost its worker over that batch.

    The batch is then halved until one text is left; a text that two workers died of, alone, is not tried again.
    Rows are places in the window.
    """

    def __init__(self) -> None:
        self.current: dict[int, list[int]] = {}
        self.alone: Counter[tuple[int, int]] = Counter()
        self.done = 0
        self.deaths = 0

    def begin(self, window: int) -> tuple[list[list[int]], list[int]]:
        """Groups to try first, each by itself, and rows not to try. Raises EmbeddingError after 100 deaths."""
        batch = self.current.pop(window, [])
        if batch:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise EmbeddingError(
                    f"{MAX_DEATHS} workers died while embedding; give them more memory, or lower embed.token_budget"
                )
        if len(batch) == 1:
            self.alone[window, batch[0]] += 1
        dead = [row for (of, row), count in self.alone.items() if of == window and count > 1]
        middle = len(batch) // 2
        halves = [batch[:middle], batch[middle:]] if middle else [batch]
        return [half for half in halves if half and half[0] not in dead], dead

    def attempt(self, window: int, rows: list[int]) -> None:
        """The window is about to compute these rows."""
        self.done += len(self.current.get(window, []))
        self.current[window] = rows

    def end(self, window: int) -> None:
        """The window is through."""
        self.done += len(self.current.pop(window, []))

    def progress(self) -> int:
        """Texts computed so far, those of lost workers counted twice."""
        return self.done


class EmbedAndWrite:
    """A Ray actor: loads the item tower once; rows of the catalog in, one uncommitted Parquet file a window out."""

    def __init__(self, order: WorkOrder, ledger: Any) -> None:
        """ledger: a ``Ledger``, or what passes its calls on to one."""
        torch.set_num_threads(order.threads)
        store = open_store(order.store)
        if order.tower is None:
            encoder = ItemEncoder.from_config(order.encoder, order.template)
        else:
            encoder = ItemEncoder.load(store.folder(order.tower))
        self.encoder = encoder.to(default_device())
        self.catalog = store.folder(order.dataset) / "items.parquet"
        self.table = store.embeddings
        self.found = fingerprint(self.encoder, order.embed.output_dtype)
        self.encoder.packing = order.embed.packing
        speed_up(self.encoder)
        if order.embed.compile:
            compile_layers(self.encoder.model)
        self.order, self.ledger = order, ledger

    def __call__(self, window: pa.Table) -> pa.Table:
        """window: catalog_row (int64, ascending), probe (bool, the same in all rows). Returns one row of REPORT.

        A probe's vectors are returned and not written. Raises FingerprintMismatchError when this worker's tower
        is not the driver's (said here, since Ray passes on what a call raises, and of a constructor only that
        the actor died).
        """
        order = self.order
        if self.found != order.fingerprint:
            raise FingerprintMismatchError(
                f"a worker loaded item tower {self.found}, the job embeds for {order.fingerprint}: model files, "
                f"packages or processor differ between driver and workers; make them the same"
            )
        started = time.perf_counter()
        rows = window.column(ROW).to_numpy()
        probe = window.column(PROBE)[0].as_py()
        name = -1 if probe else int(rows[0])
        groups, dead = self.ledger.begin(name)
        texts = read_texts(self.catalog, self.encoder.template, rows)
        result = embed_texts(
            self.encoder,
            texts.column(tables.TEXT).to_pylist(),
            order.embed,
            suspects=groups,
            failed=dict.fromkeys(dead, "two workers died while embedding it"),
            attempt=lambda batch: self.ledger.attempt(name, batch),
        )
        file = {"path": None, "size": 0, "rows": 0}
        if len(result.rows) and not probe:
            vectors = stamped(as_table(texts.column(tables.KEY), result), order.run_id)
            file = self.table.write(order.fingerprint, vectors)
        self.ledger.end(name)
        report = file | {
            "texts": len(rows),
            "tokens": int(result.n_tokens.sum()),
            "padded": result.padded,
            "truncated": int(result.truncated.sum()),
            "seconds": time.perf_counter() - started,
            "failed_rows": [int(rows[row]) for row in result.failed],
            "failed_reasons": list(result.failed.values()),
            "vectors": result.vectors.tobytes() if probe else None,
        }
        return pa.Table.from_pylist([report], schema=REPORT)


def default_threads(workers: int) -> int:
    """Torch threads of each worker on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)
