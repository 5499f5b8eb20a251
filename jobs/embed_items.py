"""embed-items: plan, the missing texts through the Item LLM on Ray, commits in chunks, gates, one snapshot."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from item_tower.embed import EmbedConfig
from item_tower.encoder import tokenise_texts
from item_tower.prompt import require_text
from jobs.config import Config
from jobs.context import Context, TowerInForce
from jobs.embed_worker import PROBE, ROW, EmbedAndWrite, WorkOrder, default_threads
from jobs.ray_process import RayDriver, packed
from pipeline.cache import (
    EmbeddingPlan,
    announced,
    create_snapshot,
    find_snapshot,
    plan_embedding,
    remembered_failures,
    snapshot_items,
)
from pipeline.catalog import CatalogScan, read_texts, scan_catalog
from pipeline.gates import GateConfig, check_truncated, choose_probes, lowest_agreement, pass_gate
from schemas import tables
from schemas.errors import ConfigError, DataError
from schemas.records import Snapshot

_SAMPLE = 1_000  # texts tokenised for the estimate of --plan


@dataclass
class Totals:
    """What the reports of tonight's windows add up to."""

    tokens: int = 0
    padded: int = 0
    truncated: int = 0
    agreement: float | None = None  # not measured where no text has a stored vector
    failed: dict[int, str] = field(default_factory=dict)  # catalog row -> reason

    def add(self, report: dict[str, Any]) -> None:
        """Count one window."""
        self.tokens += report["tokens"]
        self.padded += report["padded"]
        self.truncated += report["truncated"]
        self.failed |= dict(zip(report["failed_rows"], report["failed_reasons"], strict=True))


def _window(rows: NDArray[np.int64], probe: bool) -> pa.Table:
    return pa.table({ROW: pa.array(rows), PROBE: pa.array(np.full(len(rows), probe))})


def _embed_missing(
    context: Context, tower: TowerInForce, plan: EmbeddingPlan, run_id: str, driver: RayDriver
) -> Totals:
    """Embed what is missing, committing as windows come in. Raises GateError before the first commit when the
    texts of stored vectors come out different tonight, or when too many texts fail."""
    config, limits, table = context.config.embed, context.config.gates, context.store.embeddings
    totals = Totals()
    probes, stored = choose_probes(table, plan.fingerprint, plan.scan, config.output_dtype, tower.dim)
    order_of = np.argsort(plan.scan.rows[probes], kind="stable")
    probes, stored = probes[order_of], stored[order_of]
    rows = plan.scan.rows[plan.missing]
    windows = [_window(rows[start : start + config.window], False) for start in range(0, len(rows), config.window)]
    if len(probes):
        windows.insert(0, _window(plan.scan.rows[probes], True))
    workers = config.workers
    order = WorkOrder(
        store=context.store.url,
        dataset=context.dataset_record,
        tower=tower.record,
        encoder=tower.encoder,
        template=tower.template,
        embed=config,
        fingerprint=tower.fingerprint,
        run_id=run_id,
        threads=default_threads(workers or 1),
    )
    waiting: list[dict[str, Any]] = []
    agreed = not len(probes)

    def commit() -> None:
        files = [report for report in waiting if report["path"]]
        if files:
            table.commit(plan.fingerprint, files)
        waiting.clear()

    reports = driver.stream("embed_windows", packed(EmbedAndWrite, order=order), windows, workers)
    with closing(reports):  # ends Ray before an error is shown
        try:
            for report in reports:
                if report["vectors"] is not None:
                    kind = np.dtype(config.output_dtype).newbyteorder("<")
                    tonight = np.frombuffer(report["vectors"], dtype=kind).reshape(-1, tower.dim)
                    _check_agreement(totals, plan.scan, stored, tonight, report, limits)
                    agreed = True
                    continue
                totals.add(report)
                _check_failures([*plan.refused.values(), *totals.failed.values()], plan.scan, limits)
                waiting.append(report)
                if agreed and sum(report["rows"] for report in waiting) >= config.commit_texts:
                    commit()
        finally:  # what is finished is kept, whatever ended the run
            if agreed:
                commit()
    return totals


def _check_agreement(
    totals: Totals,
    scan: CatalogScan,
    stored: NDArray[np.floating],
    tonight: NDArray[np.floating],
    report: dict[str, Any],
    limits: GateConfig,
) -> None:
    way_out = (
        "A library, a kernel or the processor changed since: bring it back, or embed everything anew into "
        "another store"
    )
    if report["failed_rows"]:
        first = scan.item_ids[int(np.searchsorted(scan.rows, report["failed_rows"][0]))].as_py()
        raise DataError(
            f"{len(report['failed_rows'])} texts that have a stored vector fail in the item tower tonight, that of "
            f"item {first!r} with: {report['failed_reasons'][0]}; nothing was committed. {way_out}"
        )
    agreement = lowest_agreement(stored, tonight)
    totals.agreement = pass_gate("agreement", agreement, limits.min_agreement, way_out, at_least=True)


def _check_failures(reasons: Collection[str], scan: CatalogScan, limits: GateConfig) -> float:
    """The share of the catalog that fails, tonight or remembered. Raises GateError."""
    way_out = ""
    if reasons:
        first = next(iter(reasons))
        way_out = f"The first of {len(reasons)} failed with: {first}. Repair it, or raise gates.max_failed"
    return pass_gate("failed", len(reasons) / max(1, len(scan.keys)), limits.max_failed, way_out)


def _left_out(plan: EmbeddingPlan, totals: Totals) -> tuple[dict[int, str], pa.Table]:
    """Places of the scan without a vector with the reason of each, and the quarantine of the snapshot."""
    scan = plan.scan
    reasons = dict(plan.refused)
    if totals.failed:
        rows = np.array(list(totals.failed), dtype=np.int64)
        failed_keys = {
            scan.keys[place].tobytes(): totals.failed[int(scan.rows[place])]
            for place in np.searchsorted(scan.rows, rows)
        }
        candidates = np.flatnonzero(np.isin(scan.keys[:, 0], scan.keys[np.searchsorted(scan.rows, rows), 0]))
        for place in candidates.tolist():  # every item of a failed text
            reason = failed_keys.get(scan.keys[place].tobytes())
            if reason is not None:
                reasons[place] = reason
    places = sorted(reasons)
    empty = len(scan.empty)
    quarantine = pa.table(
        [
            pa.array([*scan.empty, *(scan.item_ids[place].as_py() for place in places)], pa.string()),
            pa.array([None] * empty + [scan.keys[place].tobytes() for place in places], pa.binary()),
            pa.array(
                ["no text in the template's fields"] * empty + [reasons[place] for place in places], pa.string()
            ),
        ],
        schema=tables.LEFT_OUT,
    )
    return reasons, quarantine


def _items(plan: EmbeddingPlan, reasons: dict[int, str], quarantine: pa.Table) -> pa.Table:
    items = snapshot_items(plan.scan, set(reasons))
    if not items.num_rows:
        first = quarantine.slice(0, 1).to_pylist()[0]
        raise DataError(
            f"all {quarantine.num_rows} items are left out, {first[tables.ITEM_ID]!r} for: {first[tables.REASON]}; "
            f"repair them, or name columns with text in template.fields"
        )
    return items


def _guard(context: Context, plan: EmbeddingPlan, config: EmbedConfig) -> None:
    share = plan.embedded / max(1, len(plan.scan.keys))
    known = context.store.newest(Snapshot, fingerprint=plan.fingerprint) or context.store.newest(Snapshot)
    if known is not None and plan.embedded > config.full_from and share > config.max_share:
        same = known.fingerprint == plan.fingerprint
        raise ConfigError(
            f"{plan.embedded} of {len(plan.scan.keys)} texts have no vector of item tower {plan.fingerprint} "
            f"({'as' if same else 'of ' + known.fingerprint + ','} the newest snapshot is); if "
            f"{'so many texts' if same else 'model or template'} were meant to change, run again with --allow-full"
        )


def _estimate(context: Context, tower: TowerInForce, plan: EmbeddingPlan) -> dict[str, Any]:
    """Counts, tokens and time of a plan, from a sample of its texts and the speed of the largest run."""
    rng = np.random.default_rng(0)
    sample = np.sort(rng.permutation(plan.missing)[:_SAMPLE])
    catalog = context.store.folder(context.dataset_record) / "items.parquet"
    texts = read_texts(catalog, tower.template, plan.scan.rows[sample]).column(tables.TEXT).to_pylist()
    per_text = tokenise_texts(tower.folder(context.store), tower.encoder, texts).lengths.mean() if texts else 0.0
    tokens = round(per_text * plan.embedded)
    runs = context.store.all(Snapshot, fingerprint=plan.fingerprint) or context.store.all(Snapshot)
    # of the largest run: of a small one it is that of the start of Ray
    speed = max(((run.embedded, run.tokens_per_second) for run in runs if run.tokens_per_second), default=None)
    return {
        "plan": True,
        "fingerprint": plan.fingerprint,
        "items": len(plan.scan.keys) - len(plan.refused),
        "embedded": plan.embedded,
        "reused": plan.reused,
        "quarantined": len(plan.scan.empty) + len(plan.refused),
        "tokens": tokens,
        "estimated_seconds": round(tokens / speed[1], 1) if speed else None,
    }


def run(context: Context, plan_only: bool = False, allow_full: bool = False) -> dict[str, Any]:
    """Plan, embed what is missing, commit, publish. plan_only: say what would be done, and do nothing.

    Raises DataError, ConfigError, EmbeddingError, GateError, StoreError.
    """
    started = time.perf_counter()
    store, config, dataset = context.store, context.config, context.dataset_record
    tower = context.item_tower()
    # a tuned tower is read the way it was tuned; only the untuned one takes its template from the configuration
    scan = scan_catalog(store.folder(dataset) / "items.parquet", tower.template)
    _say_what_is_not_in_force(config, tower)
    policy = {"empty_text": config.template.empty_text}
    require_text(scan.empty, len(scan.rows) + len(scan.empty), tower.template.model_copy(update=policy))
    failed = {} if config.embed.retry_failed else remembered_failures(store, tower.fingerprint)
    plan = plan_embedding(store, tower.fingerprint, scan, failed)
    if plan_only:
        return _estimate(context, tower, plan) | {"seconds": round(time.perf_counter() - started, 3)}
    if not plan.embedded:
        reasons, quarantine = _left_out(plan, Totals())
        items = _items(plan, reasons, quarantine)
        snapshot = find_snapshot(store, tower.fingerprint, items, quarantine)
        if snapshot is not None:
            print(f"nothing to embed: {snapshot.items} items are in snapshot {snapshot.id}", file=sys.stderr)
            return _report(snapshot, plan, Totals(), time.perf_counter() - started)
    if not allow_full:
        _guard(context, plan, config.embed)
    sections = context.settings("embed", "encoder", "template", "item_tower", "data", "gates")
    tags = {"fingerprint": tower.fingerprint, "dataset": dataset.digest}
    with (
        RayDriver(ahead=plan.embedded > 0) as driver,
        announced(store, snapshot_items(scan, set())),
        context.tracker.run("embed-items", f"embed-items-{config.item_tower.use}", sections, tags) as run,
    ):
        plan = plan_embedding(store, tower.fingerprint, scan, failed)  # now that no clean-up takes what it reuses
        snapshot, totals = _publish(context, tower, plan, run.run_id, driver)
        if snapshot.quarantined:
            print(
                f"{snapshot.quarantined} items are left out; why: hllm snapshots show --snapshot {snapshot.id}",
                file=sys.stderr,
            )
        result = _report(snapshot, plan, totals, time.perf_counter() - started)
        run.tags({"snapshot": snapshot.id})
        run.metrics({name: value for name, value in result.items() if isinstance(value, int | float)})
        return result


def _say_what_is_not_in_force(config: Config, tower: TowerInForce) -> None:
    """A tuned tower is read as it was tuned, whatever the configuration says now."""
    if tower.record is None:
        return
    pairs = (("encoder", config.encoder, tower.encoder), ("template", config.template, tower.template))
    for section, mine, its in pairs:
        for key in sorted(mine.model_fields_set - {"empty_text", "trust_remote_code"}):
            if getattr(mine, key) not in (getattr(its, key), "auto"):
                print(
                    f"{section}.{key} = {getattr(mine, key)!r} is not in force: item tower {tower.record.id} was "
                    f"made with {getattr(its, key)!r}; tune-items makes one with the new value",
                    file=sys.stderr,
                )


def _publish(
    context: Context, tower: TowerInForce, plan: EmbeddingPlan, run_id: str, driver: RayDriver
) -> tuple[Snapshot, Totals]:
    config, limits = context.config, context.config.gates
    started, totals = time.perf_counter(), Totals()
    if plan.embedded:
        totals = _embed_missing(context, tower, plan, run_id, driver)
    reasons, quarantine = _left_out(plan, totals)
    gates = {
        "failed": _check_failures(reasons.values(), plan.scan, limits),
        "truncated": check_truncated(context.store.embeddings, plan.fingerprint, plan.scan.keys, limits),
    }
    if totals.agreement is not None:
        gates["agreement"] = totals.agreement
    items = _items(plan, reasons, quarantine)
    snapshot = create_snapshot(
        context.store,
        tower.fingerprint,
        items,
        quarantine,
        dtype=config.embed.output_dtype,
        dim=tower.dim,
        limits=limits,
        gates=gates,
        facts={
            "embedded": plan.embedded - len(totals.failed),
            "reused": plan.reused,
            "tokens_per_second": totals.tokens / (time.perf_counter() - started) if plan.embedded else None,
            "dataset": context.dataset_record.digest,
            "code_version": context.code,
            "run_id": run_id,
        },
    )
    return snapshot, totals


def _report(snapshot: Snapshot, plan: EmbeddingPlan, totals: Totals, seconds: float) -> dict[str, Any]:
    return {
        "snapshot": snapshot.id,
        "fingerprint": snapshot.fingerprint,
        "items": snapshot.items,
        "embedded": plan.embedded - len(totals.failed),
        "reused": plan.reused,
        "removed": snapshot.removed,
        "quarantined": snapshot.quarantined,
        "tokens": totals.tokens,
        "truncated": totals.truncated,
        "padding_waste": round(1 - totals.tokens / totals.padded, 4) if totals.padded else 0.0,
        "seconds": round(seconds, 3),
        "items_per_second": round(plan.embedded / seconds, 1),
        "tokens_per_second": round(totals.tokens / seconds, 1),
    }
