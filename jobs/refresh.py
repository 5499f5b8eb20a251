"""refresh: one night, from the new files to a promoted or held release (DESIGN 10).

A composition of the other jobs. Each finds its own output for the same inputs again, so a killed night goes on where
it was, and ends in the same release.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import build_index, embed_items, embed_users, evaluate, prepare_data, train_user
from jobs.config import Config
from jobs.context import Context, TowerInForce, inputs_hash
from jobs.release_check import Candidate, data_gates, index_gate, quality_gates
from pipeline.cleanup import clean
from pipeline.dataset import find_dataset
from pipeline.files import exclusive, next_created_at, write_record
from pipeline.oplog import Step, StepLog, write_metrics
from pipeline.release import ARTIFACT, Parts, current_release, describe
from pipeline.release_gates import Gate, held_by
from schemas.errors import ConfigError, NotFoundError, StoreError
from schemas.records import Dataset, Index, Release, Snapshot, UserTower, UserVectors

_DAY = 86_400_000
_SPARE = 1.5  # free disk over what a new generation of vectors needs


@contextmanager
def _lock(context: Context) -> Iterator[bool]:
    if context.config.refresh.lock and "://" not in context.store.url:
        with exclusive(context.store.root / ".refresh.lock") as ours:
            yield ours
    else:  # correctness rests on immutable names; on a bucket the scheduler must not overlap runs
        yield True


def _place(context: Context, name: str) -> Path:
    return context.store.root / name


def newest_tower(context: Context) -> UserTower | None:
    """The newest user tower of the name, but for those that nights held or an operator rolled back.

    Where nothing may be trained and all were held, the newest of them: a held night is then tried again with it.
    """
    towers, rejected = context.store.all(UserTower, name=context.config.name), context.rejected_towers()
    usable = [tower for tower in towers if tower.id not in rejected]
    if not usable and context.config.refresh.train == "never":
        usable = towers
    return usable[-1] if usable else None


def why_train(context: Context, fingerprint: str | None) -> str | None:
    """Why tonight trains a user tower, None when the newest stays. Raises ConfigError when it must and may not."""
    config, store = context.config.refresh, context.store
    newest = newest_tower(context)
    reason = None
    if newest is None:
        held = context.store.newest(UserTower, name=context.config.name) is not None
        what = "each one was held or rolled back" if held else "none was trained yet"
        reason = f"there is no user tower called {context.config.name} to go on with: {what}"
    elif newest.item_fingerprint != fingerprint:
        reason = f"user tower {newest.id} reads item tower {newest.item_fingerprint}, tonight's is {fingerprint}"
    if reason is not None:
        if config.train == "never":
            raise ConfigError(f"refresh.train = never, but {reason}; run train-user, or set refresh.train = auto")
        return reason
    if config.train == "never":
        return None
    assert newest is not None
    if config.train == "always":
        return "refresh.train = always"
    now = context.dataset_record
    days = (now.created_at - newest.created_at) / _DAY
    if days >= config.train_days:
        return f"the newest user tower is {days:.1f} days old"
    trained = find_dataset(store, newest.dataset)
    grown = now.interactions / trained.interactions - 1 if trained else 0.0
    return f"the events grew by {grown:.1%}" if grown >= config.train_share else None


def _fingerprint(context: Context) -> tuple[TowerInForce | None, str | None]:
    """The item tower in force and its fingerprint; none for a tower that reads ids."""
    if context.config.user_tower.features == "id":
        return None, None
    tower = context.item_tower()
    return tower, tower.fingerprint


def _require_disk(context: Context, tower: TowerInForce) -> None:
    """A new item tower needs all vectors anew beside the old ones. Raises StoreError before anything is embedded."""
    if "://" in context.store.url or context.store.newest(Snapshot, fingerprint=tower.fingerprint):
        return
    need = int(_SPARE * 2 * tower.dim * (2 * context.dataset_record.items + context.dataset_record.users))
    free = shutil.disk_usage(context.store.root).free
    if free < need:
        raise StoreError(
            f"item tower {tower.fingerprint} is new: its vectors need about {need >> 20} MiB beside the old ones, "
            f"{context.store.root} has {free >> 20} MiB free; free space, or keep the old tower (item_tower.use)"
        )


def plan(context: Context) -> dict[str, Any]:
    """What a night would do with the newest prepared data; new files are not looked at."""
    tower, fingerprint = _fingerprint(context)
    items = {} if tower is None else embed_items.run(context, plan_only=True)
    try:
        training = why_train(context, fingerprint)
    except ConfigError as error:
        training = f"error: {error}"
    return {
        "dry_run": True,
        "dataset": context.dataset_record.id,
        "embed_items": {
            key: items.get(key) for key in ("items", "embedded", "reused", "tokens", "estimated_seconds")
        },
        "train": training,
        "champion": context.registry.champion(),
        "users": context.dataset_record.users,
    }


class _Reached(Exception):
    """The step that the run goes up to is done."""


class _Night:
    """One refresh while it runs. until: the step that it ends after, None for all of them."""

    def __init__(self, config: Config, log: StepLog, until: str | None) -> None:
        self.config, self.log, self.until = config, log, until
        self.items_embedded = self.users_embedded = 0

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """A logged step. Raises _Reached after the one that the run goes up to."""
        with self.log.step(name) as step:
            yield step
        if name == self.until:
            raise _Reached

    def prepare(self) -> Context:
        """Ingest what is new; everything after reads exactly this data set."""
        with self.step("prepare-data") as step:
            context = Context(self.config)
            found = prepare_data.run(context)
            step.counts(**{key: found[key] for key in ("items", "users", "interactions", "quarantined")})
        return Context(self.config, context.store.get(Dataset, found["dataset"]))

    def embed(self, context: Context) -> tuple[Snapshot | None, str | None]:
        """Embed the delta, or everything for a new item tower."""
        tower, fingerprint = _fingerprint(context)
        if tower is None:
            return None, None
        _require_disk(context, tower)
        with self.step("embed-items") as step:
            # a tuned tower in the store is meant to be used; another base model may be a slip of the configuration
            found = embed_items.run(context, allow_full=tower.record is not None)
            step.counts(**{key: found[key] for key in ("snapshot", "items", "embedded", "reused", "removed")})
            self.items_embedded = found["embedded"]
        return context.store.get(Snapshot, found["snapshot"]), fingerprint

    def train(self, context: Context, snapshot: Snapshot | None, fingerprint: str | None) -> UserTower:
        """Train a user tower if the policy says so."""
        with self.step("train-user") as step:
            reason = why_train(context, fingerprint)
            tower = newest_tower(context)
            if reason is not None or tower is None:
                found = train_user.run(context, None if snapshot is None else snapshot.id)
                tower = context.store.get(UserTower, found["user_tower"])
            step.counts(why=reason, user_tower=tower.id)
        return tower

    def make(self, context: Context, snapshot: Snapshot | None, tower: UserTower) -> tuple[Parts, Candidate]:
        """Index, user vectors, evaluation."""
        place = None if snapshot is None else snapshot.id
        with self.step("build-index") as step:
            index = build_index.run(context, place, tower.id)
            step.counts(index=index["index"], vectors=index["vectors"])
        with self.step("embed-users") as step:
            users = embed_users.run(context, place, tower.id)
            step.counts(**{key: users[key] for key in ("table", "users", "embedded", "taken_over")})
            self.users_embedded = users["embedded"]
        with self.step("evaluate") as step:
            evaluated = evaluate.run(context, "test", place, tower.id)
            step.counts(metrics=evaluated["metrics"], users=evaluated["users"])
        store = context.store
        parts = Parts(tower, snapshot, store.get(Index, index["index"]), store.get(UserVectors, users["table"]))
        parts.require_match()
        return parts, Candidate(context.dataset_record, snapshot, index, evaluated)

    def publish(self, context: Context, parts: Parts, candidate: Candidate) -> tuple[Release, bool]:
        """The release of these parts, and whether it was there: gates, files, record, model version."""
        store, config = context.store, self.config
        config_hash = inputs_hash(config.evaluate, config.refresh.gates, config.index, config.retention)
        snapshot = parts.snapshot
        release_id = name_release(candidate.dataset.digest, parts, config.refresh.model, config_hash)
        found = store.all(Release, id=release_id)
        champion_id = context.registry.champion()
        if found:
            context.registry.register(found[0])
            return found[0], True
        champion = None if champion_id is None else store.get(Release, champion_id)
        tags = {"dataset": candidate.dataset.digest, "release": release_id}
        settings = context.settings("refresh", "evaluate", "data", "name")
        with (
            self.log.step("gates") as step,
            context.tracker.run("release", config.refresh.model, settings, tags) as run,
        ):
            quality, theirs = quality_gates(context, candidate, champion)
            gates = [*data_gates(context, candidate, champion), index_gate(candidate, config.refresh.gates), *quality]
            step.counts(gates=[gate.row() for gate in gates])
            record = Release(
                id=release_id,
                created_at=next_created_at(store.all(Release)),
                name=config.refresh.model,
                dataset=candidate.dataset.digest,
                item_fingerprint=parts.user_tower.item_fingerprint,
                item_tower=_tuned(context, snapshot),
                snapshot=None if snapshot is None else snapshot.id,
                user_tower=parts.user_tower.id,
                index=parts.index.id,
                user_vectors=parts.user_vectors.id,
                champion=champion_id,
                metrics=candidate.evaluated["metrics"],
                gates=[gate.row() for gate in gates],
                checksums=parts.checksums(),
                config_hash=config_hash,
                code_version=context.code,
                run_id=run.run_id,
            )
            run.artifact(ARTIFACT, describe(store, record))
            run.artifact("gates.txt", verdicts(record))
            run.metrics(record.metrics | {f"champion_{k}": v for k, v in theirs.get("metrics", {}).items()})
            with store.new(Release, release_id) as folder:
                write_record(folder, record)
        record = store.get(Release, release_id)  # a night beside this one may have been faster with the same release
        context.registry.register(record)
        return record, False

    def decide(self, context: Context, record: Release, known: bool) -> tuple[bool, list[str]]:
        """Promote or hold; (promoted or champion already, names of the gates that hold it)."""
        registry = context.registry
        if registry.champion() == record.id:
            return True, []
        holding = held_by([Gate(**row) for row in record.gates], self.config.refresh.gates)
        version = registry.find(record.id)
        if known and version is not None and version["rolled_back_at"]:
            holding.append("rolled back before")
        if holding:
            return False, holding
        with self.log.step("promote") as step:
            expected = None if record.champion is None else current_release(context.store, record.champion).id
            registry.promote(record.id, expected)
            step.counts(release=record.id)
        return True, []


def name_release(dataset: str, parts: Parts, model: str, config_hash: str) -> str:
    """The id of a release: the hash of its inputs. dataset: the data version."""
    return inputs_hash(
        dataset,
        None if parts.snapshot is None else parts.snapshot.content_digest,
        parts.user_tower.fingerprint,
        parts.index.inputs,
        parts.user_vectors.inputs,
        model,
        config_hash,
    )


def _tuned(context: Context, snapshot: Snapshot | None) -> str | None:
    towers = [] if snapshot is None else context.item_towers(snapshot)
    return towers[-1].id if towers else None


def verdicts(record: Release) -> str:
    """The verdict table as text."""
    lines = [f"{'gate':32} {'figure':>12} {'limit':>12}  verdict"]
    for row in record.gates:
        value = "" if row["value"] is None else f"{row['value']:.6g}"
        lines.append(f"{row['name']:32.32} {value:>12} {row['limit']:>12}  {row['verdict']}  {row['note']}".rstrip())
    return "\n".join(lines)


def _monitor(context: Context, log: StepLog, result: dict[str, Any]) -> None:
    """The Prometheus file of a finished night."""
    values = {
        "refresh_last_success_timestamp_seconds": ("When a refresh last ended without an error.", time.time()),
        "refresh_promoted": ("Whether its release serves.", float(result["promoted"])),
        "refresh_gates_holding": ("Gates that hold it.", float(len(result["held_by"]))),
        "refresh_items_embedded": ("Texts embedded.", float(result["embedded"])),
        "refresh_users_embedded": ("User vectors computed.", float(result["users_embedded"])),
        "refresh_seconds": ("Duration of all steps.", sum(log.seconds.values())),
    }
    for row in result["gates"]:
        if row["value"] is not None:
            name = "".join(letter if letter.isalnum() else "_" for letter in row["name"].lower())
            values[f"refresh_gate_{name}"] = (f"Gate: {row['name']}, {row['limit']}.", float(row["value"]))
    write_metrics(
        _place(context, context.config.refresh.metrics_file), values, {"model": context.config.refresh.model}
    )


def _night(context: Context, log: StepLog, until: str | None) -> dict[str, Any]:
    context.tracker.ping()
    night = _Night(context.config, log, until)
    tonight = night.prepare()
    snapshot, fingerprint = night.embed(tonight)
    tower = night.train(tonight, snapshot, fingerprint)
    parts, candidate = night.make(tonight, snapshot, tower)
    record, known = night.publish(tonight, parts, candidate)
    promoted, holding = night.decide(tonight, record, known)
    with log.step("clean") as step:
        done = clean(tonight.store, context.config.retention, kept=tonight.kept_ids())
        step.counts(snapshots=done.snapshots, rows=done.rows)
    print(f"\nrelease {record.id}\n{verdicts(record)}\n", file=sys.stderr)
    if holding:
        way_out = f"to serve it all the same: hllm releases promote --release {record.id}"
        print(f"held by: {', '.join(holding)}; the champion serves on. {way_out}", file=sys.stderr)
    result = {
        "release": record.id,
        "promoted": promoted,
        "held_by": holding,
        "champion": tonight.registry.champion(),
        "snapshot": record.snapshot,
        "user_tower": record.user_tower,
        "index": record.index,
        "user_vectors": record.user_vectors,
        "embedded": night.items_embedded,
        "users_embedded": night.users_embedded,
        "gates": record.gates,
        "metrics": record.metrics,
        "steps": log.seconds,
        "reused": known,
    }
    log.write("night", release=record.id, promoted=promoted, held_by=holding)
    _monitor(tonight, log, result)
    return result


def run(context: Context, dry_run: bool = False, until: str | None = None) -> dict[str, Any]:
    """One night, or its steps up to ``until``. held_by not empty: the champion serves on, exit status 3.

    Raises what the steps raise; the champion is then as it was. TrackingError when MLflow does not answer.
    """
    if dry_run:
        try:
            return plan(context)
        except NotFoundError as error:
            raise NotFoundError(f"{error}; a dry run plans with data that was prepared before") from error
    with _lock(context) as ours:
        if not ours:
            print("another refresh of this store is running", file=sys.stderr)
            return {"skipped": "another refresh of this store is running"}
        log = StepLog(_place(context, context.config.refresh.log), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
        try:
            return _night(context, log, until)
        except _Reached:
            return {"until": until, "steps": log.seconds}
