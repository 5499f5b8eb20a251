"""embed-users: the vector of every user with a known history, computed where the history or a tower is new."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from jobs.config import Config
from jobs.context import Context, ServingTower, inputs_hash
from jobs.ray_process import RayDriver, packed
from jobs.train_user import catalog_rows
from pipeline.baselines import TowerRecommender
from pipeline.cache import read_items
from pipeline.cells import decode_keys
from pipeline.files import next_created_at, record_id, write_record
from pipeline.users import DTYPE, Reusable, TableWriter, encode_user_vectors, history_digests
from schemas import tables
from schemas.errors import DataError
from schemas.hashing import hash_texts
from schemas.records import Dataset, UserVectors
from user_tower.sequences import Histories, IntArray

USER_ROW = "user_row"


class UserWorker:
    """User rows in, their vectors out, Arrow tables both; in this process, or as a Ray actor that loads once."""

    def __init__(
        self, config: Config, dataset: Dataset, snapshot: str | None, tower: str, threads: int | None
    ) -> None:
        """config: with the store's full path; threads: of PyTorch, None leaves them as they are."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.context = Context(config, dataset)
        self.serving = self.context.serving_tower(snapshot, tower)
        self.histories = known_histories(self.context, self.serving)

    @cached_property
    def recommender(self) -> TowerRecommender:
        """The tower over its catalog."""
        return TowerRecommender(self.serving.tower, self.serving.catalog)

    def __call__(self, window: pa.Table) -> pa.Table:
        """One column of user rows; returns them with EMBEDDING, float16 bytes, in the order given."""
        users = window.column(USER_ROW).to_numpy()
        order = np.argsort(self.histories.lengths[users], kind="stable")  # alike lengths, little padding
        vectors = np.empty((len(users), self.recommender.candidates.shape[1]), dtype=np.float32)
        size = self.context.config.users.batch
        for start in range(0, len(users), size):
            chosen = order[start : start + size]
            vectors[chosen] = self.recommender.queries(self.histories.select(users[chosen])).cpu().numpy()
        return pa.table({USER_ROW: users, tables.EMBEDDING: encode_user_vectors(vectors).cast(pa.binary())})


def known_histories(context: Context, serving: ServingTower) -> Histories:
    """All users' events in rows of the tower's catalog; those of items that it lacks are left out."""
    dataset = context.dataset
    return dataset.histories.map_items(catalog_rows(dataset.item_ids, serving.item_ids))


def item_keys(context: Context, serving: ServingTower) -> NDArray[np.uint64]:
    """uint64 [N, 2] of the tower's catalog: the texts' keys, for ids a hash of the id."""
    if serving.snapshot is not None:
        return decode_keys(read_items(context.store, serving.snapshot).column(tables.KEY))
    joined = b"".join(hash_texts(item_id) for item_id in serving.item_ids)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def _on_ray(config: Config, arguments: dict[str, Any], windows: list[pa.Table]) -> Iterator[pa.Table]:
    """The windows through Ray."""
    work = packed(UserWorker, config=config, **arguments)
    with RayDriver() as driver:
        yield from driver.stream("map_windows", work, windows, "embed-users", config.embed.workers)


def _answers(context: Context, arguments: dict[str, Any], fresh: list[IntArray]) -> Iterator[pa.Table]:
    """The vectors of each window that has fresh users, in order."""
    windows = [pa.table({USER_ROW: rows}) for rows in fresh if len(rows)]
    if not windows:
        return iter(())
    config = context.config.model_copy(update={"store": context.store.url})
    if sum(window.num_rows for window in windows) < config.users.ray_from:
        return map(UserWorker(config, **arguments, threads=None), windows)
    return _on_ray(config, {**arguments, "threads": 1}, windows)


def table_inputs(user_tower: str, item_tower: str | None, content: str | None, dataset: str) -> str:
    """Hash of all that decides a table: the towers' fingerprints, the snapshot's content, the data version."""
    return inputs_hash(user_tower, item_tower, content, dataset, DTYPE)


def run(
    context: Context, snapshot: str | None = None, tower: str | None = None, everyone: bool = False
) -> dict[str, Any]:
    """Publish a table; nothing is done when one of the same inputs is there. everyone: take no vector over.

    Raises NotFoundError, FingerprintMismatchError, DataError, EmbeddingError, StoreError.
    """
    started, store, config = time.perf_counter(), context.store, context.config
    serving = context.serving_tower(snapshot, tower)
    content = serving.snapshot.content_digest if serving.snapshot else None
    digest, made = context.dataset_record.digest, serving.record.fingerprint
    inputs = table_inputs(made, serving.record.item_fingerprint, content, digest)
    place = serving.snapshot.id if serving.snapshot else None
    # two nights at once may have published the same snapshot twice; a release holds to one of the two
    found = store.newest(UserVectors, inputs=inputs, snapshot=place)
    if found is not None:
        return _report(found, 0, found.users, 0, started, reused=True)
    histories = known_histories(context, serving)
    digests = history_digests(histories, item_keys(context, serving), serving.tower.config.history)
    same = {"user_tower_fingerprint": made, "item_fingerprint": serving.record.item_fingerprint}
    known = Reusable(store, None if everyone else store.newest(UserVectors, **same))
    asked = np.flatnonzero(histories.lengths)
    if len(asked) == 0:
        raise DataError(f"no user has a known item in its history; snapshot {serving.snapshot} lacks them all")
    parts = np.split(asked, range(config.users.window, len(asked), config.users.window))
    fresh = [
        np.array([user for user in part.tolist() if digests[user] not in known], dtype=np.int64) for part in parts
    ]
    arguments = {
        "dataset": context.dataset_record,
        "snapshot": place,
        "tower": serving.record.id,
    }
    sections, tags = context.settings("users", "data"), {"dataset": digest, "user_tower": serving.record.id}
    with context.tracker.run("embed-users", config.name, sections, tags) as logged:
        created_at = next_created_at(store.all(UserVectors))
        name = record_id(created_at, inputs)
        with store.new(UserVectors, name) as folder:
            writer, answers, dim = TableWriter(folder), _answers(context, arguments, fresh), 0
            for part, new in zip(parts, fresh, strict=True):
                cells = _cells(next(answers) if len(new) else None, part, digests, known)
                dim = len(cells[0]) // np.dtype(DTYPE).itemsize
                users = part.tolist()
                writer.write(
                    [histories.users[u] for u in users], [digests[u] for u in users], pa.array(cells, pa.binary())
                )
            record = UserVectors(
                id=name,
                created_at=created_at,
                item_fingerprint=serving.record.item_fingerprint,
                user_tower=serving.record.id,
                user_tower_fingerprint=made,
                snapshot=arguments["snapshot"],
                dataset=digest,
                users=writer.rows,
                dim=dim,
                dtype=DTYPE,
                checksum=writer.close(),
                inputs=inputs,
                run_id=logged.run_id,
            )
            write_record(folder, record)
        embedded = sum(map(len, fresh))
        result = _report(
            record, embedded, record.users - embedded, len(histories) - record.users, started, reused=False
        )
        logged.metrics({key: result[key] for key in ("users", "embedded", "seconds")})
    return result


def _cells(answer: pa.Table | None, part: IntArray, digests: list[bytes], known: Reusable) -> list[bytes]:
    """The stored bytes of each user of a window: computed tonight, or as before."""
    tonight: dict[int, bytes] = {}
    if answer is not None:
        rows = answer.column(USER_ROW).to_pylist()
        tonight = dict(zip(rows, answer.column(tables.EMBEDDING).to_pylist(), strict=True))
    return [tonight[user] if user in tonight else known.cell(digests[user]) for user in part.tolist()]


def _report(
    record: UserVectors, embedded: int, taken: int, without: int, started: float, *, reused: bool
) -> dict[str, Any]:
    return {
        "users": record.users,
        "table": record.id,
        "embedded": embedded,
        "taken_over": taken,
        "without_history": without,
        "user_tower": record.user_tower,
        "snapshot": record.snapshot,
        "seconds": round(time.perf_counter() - started, 3),
        "reused": reused,
    }
