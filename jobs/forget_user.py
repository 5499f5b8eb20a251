"""forget-user: take users out of everything in the store and in MLflow that names them, and keep them out.

The user goes on a list first, which prepare-data honours. Then each table that names anybody on it is published again
without these rows, under a record of its own, and the old one is taken away when nothing needs it any more. A killed
run is finished by the next one, also without --user.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.context import Context
from jobs.embed_users import table_inputs
from jobs.refresh import name_release
from jobs.releases import alone
from pipeline.cutoff import forget_cutoffs
from pipeline.dataset import find_dataset
from pipeline.dataset import without_users as without_events
from pipeline.files import UNREADABLE, write_file, write_record
from pipeline.forgotten import ForgottenUsers, read_forgotten, remember_forgotten
from pipeline.release import ARTIFACT, Registry, describe, find_parts
from pipeline.report import without_samples
from pipeline.users import forgotten_rows, without_users
from schemas import tables
from schemas.errors import NotFoundError, StoreError
from schemas.hashing import hash_texts
from schemas.records import Dataset, ItemTower, Ranker, Release, Snapshot, UserTower, UserVectors

_HOUR = 3_600_000
Edit = Callable[[bytes, ForgottenUsers], tuple[bytes, int]]


def _datasets(context: Context, forgotten: ForgottenUsers) -> dict[str, int]:
    """Data sets with their quarantine. Whatever names the old version finds the new one (``find_dataset``)."""
    found = {"datasets": 0, "interactions": 0, "quarantined": 0}
    for record in context.store.all(Dataset):
        new = without_events(context.store, record, forgotten)
        if new is not None:
            context.store.remove(record)
            found["datasets"] += 1
            found["interactions"] += new.interactions
            found["quarantined"] += new.quarantined
    return found


def _version(context: Context, digest: str) -> str:
    """What stands for a data version now."""
    found = find_dataset(context.store, digest)
    return digest if found is None else found.digest


def _vectors(context: Context, forgotten: ForgottenUsers) -> tuple[dict[str, UserVectors], int]:
    """Tables of user vectors to be replaced, with their successors, published; and the rows that are left out.

    A table without these users, but of a data version that is gone, is of the new version too: the vectors of the
    others are the same.
    """
    store, successors, rows = context.store, {}, 0
    for record in store.all(UserVectors):
        dropped, version = forgotten_rows(store, record, forgotten), _version(context, record.dataset)
        if not dropped and version == record.dataset:
            continue
        snapshot = store.all(Snapshot, id=record.snapshot)
        if record.snapshot is not None and not snapshot:  # past retention: nothing will look for its inputs
            inputs = hash_texts(record.inputs, version).hex()
        else:
            content = snapshot[0].content_digest if snapshot else None
            inputs = table_inputs(record.user_tower_fingerprint, record.item_fingerprint, content, version)
        successors[record.id] = without_users(store, record, forgotten, inputs, version)
        rows += dropped
    return successors, rows


def _successor(context: Context, old: Release, vectors: UserVectors) -> Release | None:
    """The release with these user vectors in place of its own, published; None where other parts are gone."""
    store = context.store
    there = [record for record in store.all(Release) if old.id in record.replaces]
    if there:
        return there[0]
    try:
        parts = find_parts(store, old)
    except NotFoundError:  # past retention, it cannot serve
        return None
    parts = replace(parts, user_vectors=vectors)
    parts.require_match()
    version = _version(context, old.dataset)
    name = name_release(version, parts, old.name, old.config_hash)
    if store.all(Release, id=name):  # of a night between a killed run and this one
        name = hash_texts(name, old.id).hex()
    tags = {"dataset": version, "release": name, "replaces": old.id}
    with context.tracker.run("release", old.name, {}, tags) as run:
        new = old.model_copy(
            update={
                "id": name,
                "dataset": version,
                "user_vectors": vectors.id,
                "checksums": old.checksums | {"user_vectors": vectors.checksum},  # the others are checked on opening
                "code_version": context.code,
                "run_id": run.run_id,
                "replaces": (*old.replaces, old.id),
            }
        )
        run.artifact(ARTIFACT, describe(store, new))
        with store.new(Release, name) as folder:
            write_record(folder, new)
    return new


def _releases(context: Context, successors: dict[str, UserVectors]) -> int:
    """Releases that name a table with a successor: another release takes the place of each, its alias included."""
    replaced = 0
    for old in context.store.all(Release):
        vectors = successors.get(old.user_vectors)
        new = None if vectors is None else _successor(context, old, vectors)
        if new is not None:
            Registry(context.tracker.client, old.name).replace(old.id, new)
            context.store.remove(old)
            replaced += 1
    return replaced


def _ranks(data: bytes, forgotten: ForgottenUsers) -> tuple[bytes, int]:
    table = pq.read_table(pa.BufferReader(data))
    gone = forgotten.mask(table.column(tables.USER_ID).to_pylist())
    out = io.BytesIO()
    pq.write_table(table.filter(pa.array(~gone)), out)
    return out.getvalue(), int(gone.sum())


def _samples(data: bytes, forgotten: ForgottenUsers) -> tuple[bytes, int]:
    found = json.loads(data)
    kept = [sample for sample in found if sample["user"] not in forgotten]
    return json.dumps(kept, indent=1).encode(), len(found) - len(kept)


def _report(data: bytes, forgotten: ForgottenUsers) -> tuple[bytes, int]:
    page, dropped = without_samples(data.decode(), forgotten.__contains__)
    return page.encode(), dropped


EDITS: dict[str, tuple[str, Edit]] = {
    "ranks.parquet": ("ranks", _ranks),
    "samples.json": ("samples", _samples),
    "report.html": ("report_samples", _report),
}


def _artifacts(context: Context, forgotten: ForgottenUsers) -> dict[str, int]:
    """What runs stored in MLflow by user. Raises StoreError for an artifact that cannot be read."""
    found = {name: 0 for name, _ in EDITS.values()}
    tracker = context.tracker
    for run_id, name in tracker.artifacts(frozenset(EDITS)):
        count, edit = EDITS[name]
        try:
            data, dropped = edit(tracker.read_bytes(run_id, name), forgotten)
        except (*UNREADABLE, ValueError, KeyError) as error:
            raise StoreError(f"artifact {name} of MLflow run {run_id} cannot be read: {error}; delete it") from error
        if dropped:
            tracker.replace_artifact(run_id, name, data)
            found[count] += dropped
    for path in sorted((context.store.root / "reports").glob("*.html")):
        data, dropped = _report(path.read_bytes(), forgotten)
        if dropped:
            write_file(path, data)
            found["report_samples"] += dropped
    return found


def trained_on(context: Context) -> dict[str, list[str]]:
    """Ids of the towers in the store whose weights saw a data version with a user who is forgotten now, directly or
    through the tower that they began with or read."""
    store = context.store
    versions = {digest for record in store.all(Dataset) for digest in record.replaces}
    items = [record for record in store.all(ItemTower) if record.dataset in versions]
    seen, fingerprints = {record.id for record in items}, {record.fingerprint for record in items}
    users: list[str] = []
    for record in store.all(UserTower):  # oldest first: parents before children
        parent = (record.parent or "").rpartition(" ")[2]  # an id, or "stage I of item tower ID"
        if record.dataset in versions or parent in seen or record.item_fingerprint in fingerprints:
            seen.add(record.id)
            users.append(record.id)
    rankers = [
        record.id
        for record in store.all(Ranker)
        if record.dataset in versions or record.parent in seen or record.item_fingerprint in fingerprints
    ]
    return {"item_towers": [record.id for record in items], "user_towers": users, "rankers": rankers}


REMAINS = """What remains, and what to do about it:
- Weights: {item_towers} item towers, {user_towers} user towers and {rankers} rankers in the store were trained on
  data that held users who are forgotten now; their weights are as they were. Run tune-items, train-user and
  train-ranker to have others.
- Figures: metrics, intervals and gates that were computed with these users, in MLflow and in records.
- The list itself: a hash of each user's id, against which a known id can be checked.
- Beyond the store: the files of the feed, exports, backups, earlier versions that a bucket keeps, local copies of a
  bucket on other machines (~/.cache/hllm), what a consumer holds in memory, output that a scheduler kept."""


def run(context: Context, user: str | None = None) -> dict[str, Any]:
    """Forget a user; without one, everybody on the list again: after a kill, or for what others wrote meanwhile.

    A rerun finds nothing. Raises ConfigError, DataError (nobody else in a data set), ReleaseError (a refresh is
    running), StoreError, TrackingError; then the next run goes on.
    """
    store = context.store
    context.tracker.ping()
    with alone(context):
        known = user is not None and not remember_forgotten(store, user)
        forgotten = read_forgotten(store)
        found: dict[str, Any] = {"datasets": 0, "interactions": 0, "quarantined": 0}
        if forgotten:
            found = _datasets(context, forgotten)
            successors, rows = _vectors(context, forgotten)
            found |= {"user_vectors": rows, "releases": _releases(context, successors)}
            for record in store.all(UserVectors):
                if record.id in successors:
                    store.remove(record)
            towers: list[UserTower | ItemTower | Ranker] = [
                *store.all(UserTower),
                *store.all(ItemTower),
                *store.all(Ranker),
            ]
            found["cutoffs"] = sum(forget_cutoffs(store, tower, forgotten) for tower in towers)
            found |= _artifacts(context, forgotten)
            store.sweep(time.time_ns() // 1_000_000 - int(context.config.retention.job_hours * _HOUR))
    if user is not None and not known and not any(found.values()):
        print(f"no row of user {user!r} was found here; what comes of them later is left out", file=sys.stderr)
    remains = trained_on(context)
    print(REMAINS.format(**{kind: len(ids) for kind, ids in remains.items()}), file=sys.stderr)
    return {
        "forgotten": len(forgotten),
        "known_before": known,
        "removed": found,
        "champion": context.registry.champion() if store.all(Release) else None,
        "remains": remains,
    }
