"""One night of a small shop, run as a process of its own by test_pipeline_races.py: plan, vectors, commits, snapshot.

python night.py STORE RUN_ID TEXT [TEXT ...]; vectors are made from the text, so that any of them can be checked.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pyarrow as pa

from pipeline.cache import announced, create_snapshot, plan_embedding, snapshot_items
from pipeline.catalog import CatalogScan
from pipeline.cells import encode_keys
from pipeline.embeddings import stamped
from pipeline.gates import GateConfig
from pipeline.matrix import ItemMatrix
from pipeline.store import Store, open_store
from schemas import tables
from schemas.records import Snapshot

TOWER, DIM = "f" * 32, 8


def vector(text: str) -> np.ndarray:
    """float16 [8], decided by the text but for the last bit of each number, which is 0."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return (np.random.default_rng(seed).normal(size=DIM).astype("<f2").view("<u2") & 0xFFFE).view("<f2")


def right(matrix: ItemMatrix) -> bool:
    """Whether each vector is that of its text, whichever run it came from."""
    expected = np.stack([vector(text) for text in matrix.item_ids]).view("<u2")
    return np.array_equal(matrix.vectors.view("<u2") & 0xFFFE, expected)


def scan(texts: list[str]) -> CatalogScan:
    """A catalog whose items are called like their texts."""
    keys = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return CatalogScan(
        item_ids=pa.array(texts),
        keys=np.frombuffer(keys, dtype="<u8").reshape(-1, 2),
        available=np.ones(len(texts), dtype=bool),
        rows=np.arange(len(texts)),
        empty=[],
    )


def night(store: Store, run_id: str, texts: list[str]) -> Snapshot:
    """Embed what is missing in chunks of 20 texts, then publish."""
    catalog = scan(texts)
    with announced(store, snapshot_items(catalog, set())):
        return _embed_and_publish(store, run_id, catalog, texts)


def _embed_and_publish(store: Store, run_id: str, catalog: CatalogScan, texts: list[str]) -> Snapshot:
    plan = plan_embedding(store, TOWER, catalog, {})
    for start in range(0, plan.embedded, 20):
        rows = plan.missing[start : start + 20]
        last_bit = np.uint16(run_id.endswith("-1"))  # of another run, as from other batches
        cells = [(vector(texts[row]).view("<u2") | last_bit).tobytes() for row in rows]
        table = pa.table(
            {
                tables.KEY: encode_keys(catalog.keys[rows]),
                tables.EMBEDDING: pa.array(cells, pa.binary()),
                tables.N_TOKENS: np.ones(len(rows), dtype=np.int32),
                tables.TRUNCATED: np.zeros(len(rows), dtype=bool),
            }
        )
        store.embeddings.commit(TOWER, [store.embeddings.write(TOWER, stamped(table, run_id))])
    facts = {"embedded": plan.embedded, "reused": plan.reused, "tokens_per_second": None, "dataset": ""}
    return create_snapshot(
        store, TOWER, snapshot_items(catalog, set()), tables.LEFT_OUT.empty_table(), dtype="float16", dim=DIM,
        limits=GateConfig(), gates={}, facts=facts | {"code_version": "", "run_id": run_id},
    )  # fmt: skip


if __name__ == "__main__":
    print(night(open_store(sys.argv[1]), sys.argv[2], sys.argv[3:]).id)
