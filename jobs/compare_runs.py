"""compare-runs: the newest evaluation of each name, on the same data and protocol, in one table and one report."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.build_index import RESULT as INDEX_RESULT
from jobs.context import Context
from jobs.evaluate import RESULT_FORMAT, protocol
from pipeline.charts import Curve
from pipeline.dataset import read_profile
from pipeline.files import write_file
from pipeline.metrics import FloatArray, IntArray, paired_difference, per_user
from pipeline.profile import drift_rows
from pipeline.report import Page, as_html, as_text, rows, samples_as_text
from pipeline.splits import Split
from pipeline.tracking import FoundRun
from schemas import tables
from schemas.errors import NotFoundError, StoreError
from schemas.records import Snapshot
from schemas.secrets import redact

# what must be the same of all runs of a table; figures that differ in one of these say nothing about the runs
SAME = ("protocol", "split", "data", "users")


def newest_runs(context: Context, split: Split) -> list[FoundRun]:
    """The newest finished evaluation of each name on the current data set. Raises NotFoundError."""
    record = context.dataset.record
    wanted = {"dataset": record.digest, "protocol": protocol(context), "split": split, "format": RESULT_FORMAT}
    newest: dict[str, FoundRun] = {}
    for run in context.tracker.find(kind="evaluate", **wanted):
        newest.setdefault(run.name, run)
    if not newest:
        raise NotFoundError(
            f"no evaluation of data set {record.id} on split {split} under protocol {wanted['protocol']!r}; "
            f"run hllm evaluate first"
        )
    return list(newest.values())


def left_out(context: Context, split: Split, shown: set[str]) -> list[dict[str, str]]:
    """Names that were evaluated, but never as the table asks: they cannot be ranked in it."""
    others: dict[str, FoundRun] = {}
    for run in context.tracker.find(kind="evaluate", split=split):
        if run.name not in shown:
            others.setdefault(run.name, run)
    return [
        {"name": name, "run_id": run.run_id, "protocol": run.tags["protocol"], "dataset": run.tags["dataset"]}
        for name, run in sorted(others.items())
    ]


def user_offsets(users: list[str]) -> IntArray:
    """[U + 1] where each user's targets begin in ``ranks.parquet``, in which they lie together."""
    starts = [place for place, user in enumerate(users) if place == 0 or user != users[place - 1]]
    return np.array([*starts, len(users)], dtype=np.int64)


def user_values(context: Context, run_id: str, metric: str) -> tuple[pa.Table, FloatArray]:
    """User and item of every target, and the users' values of one metric, from the ranks that the run stored."""
    ranks = context.tracker.read_table(run_id, "ranks.parquet")
    above: NDArray[np.int64] = ranks.column(tables.ABOVE).to_numpy()
    ties: NDArray[np.int64] = ranks.column(tables.TIES).to_numpy()
    users = ranks.column(tables.USER_ID).to_pylist()
    offsets = user_offsets(users)
    catalog = len(context.dataset.item_ids)
    values = per_user(above, ties, context.config.evaluate.ks, catalog, offsets)
    return ranks.select([tables.USER_ID, tables.TARGET]), values[metric]


def require_comparable(results: list[dict[str, Any]]) -> None:
    """Raises StoreError naming the two runs and what differs: protocol, split, data or users."""
    for result in results[1:]:
        for key in SAME:
            if result.get(key) != results[0].get(key):
                raise StoreError(
                    f"runs {results[0]['run_id']} ({results[0]['name']}) and {result['run_id']} ({result['name']}) "
                    f"differ in {key}: {results[0].get(key)!r} and {result.get(key)!r}; they cannot be ranked in one "
                    f"table, evaluate both again"
                )


def _indexes(context: Context, found: list[FoundRun]) -> list[tuple[int, dict[str, Any]]]:
    """Place of each run whose tower and snapshot have an index that was measured, with the index's newest report."""
    reports = []
    for place, run in enumerate(found):
        if "user_tower" not in run.tags:
            continue
        same = {key: run.tags[key] for key in ("user_tower", "snapshot", "dataset")}
        for built in context.tracker.find(kind="index", **same)[:1]:
            result = context.tracker.read_json(built.run_id, INDEX_RESULT)
            if "model_recall" in result["ann"]:
                reports.append((place, result))
    return reports


def _against_best(context: Context, found: list[FoundRun], metric: str) -> list[list[float] | None]:
    """Best minus each run (the best comes first): mean, low, high, p; None for the best itself."""
    asked, best_values = user_values(context, found[0].run_id, metric)
    behind: list[list[float] | None] = [None]
    for run in found[1:]:
        others, values = user_values(context, run.run_id, metric)
        if not others.equals(asked):
            raise StoreError(
                f"runs {run.run_id} ({run.name}) and {found[0].run_id} ({found[0].name}) do not answer the same "
                f"questions ({others.num_rows} and {asked.num_rows} targets); they cannot be ranked in one table. "
                f"Where evaluate.trained_targets left some out, evaluate the others on a protocol that none has seen"
            )
        behind.append(list(paired_difference(best_values, values, context.config.evaluate.bootstrap)))
    return behind


def _curves(context: Context, found: list[FoundRun], metric: str) -> list[Curve]:
    """Validation figures of the trainings behind the runs, where they were logged."""
    curves = []
    for run in found:
        training = run.tags.get("training_run")
        points = context.tracker.curve(training, metric) if training else []
        if points:
            curves.append(Curve(run.name, points))
    return curves


def _embedding(context: Context, snapshot_id: str | None) -> Snapshot | None:
    """The newest snapshot up to this one for which something was embedded; None where it is gone."""
    while snapshot_id is not None:
        found = context.store.all(Snapshot, id=snapshot_id)
        if not found or found[0].embedded:
            return found[0] if found else None
        snapshot_id = found[0].parent
    return None


def cost(context: Context, run: FoundRun) -> dict[str, Any]:
    """What a row took: seconds of the run of each step behind it, their sum, and the speeds of the two long ones.

    None is what a row does not have, or whose run or snapshot is gone.
    """
    embedded = _embedding(context, run.tags.get("snapshot"))
    towers = [] if embedded is None else context.item_towers(embedded)
    behind = {
        "tune-items": towers[-1].run_id if towers else None,
        "embed-items": None if embedded is None else embedded.run_id,
        "train-user": run.tags.get("training_run"),
        "evaluate": run.run_id,
    }
    spent = {step: None if run_id is None else context.tracker.spent(run_id) for step, run_id in behind.items()}
    seconds = {step: round(found[0], 1) for step, found in spent.items() if found is not None}

    def speed(step: str, name: str) -> float | None:
        found = spent[step]
        return None if found is None else found[1].get(name)

    return {
        "items_per_second": speed("embed-items", "items_per_second"),
        "positions_per_second": speed("train-user", "positions_per_second"),
        "seconds": seconds,
        "wall_seconds": round(sum(seconds.values()), 1),
    }


def _read(context: Context, found: list[FoundRun]) -> list[dict[str, Any]]:
    results = [context.tracker.read_json(run.run_id, "result.json") for run in found]
    require_comparable(results)
    return results


def run(context: Context, split: Split = "test") -> dict[str, Any]:
    """Print the table and some users' recommendations; write and log the HTML report.

    Raises NotFoundError, StoreError.
    """
    metric = context.config.evaluate.metric
    unordered = newest_runs(context, split)
    read = _read(context, unordered)
    order = sorted(range(len(unordered)), key=lambda place: (-read[place]["metrics"][metric], unordered[place].name))
    found, results = [unordered[place] for place in order], [read[place] for place in order]
    runs = []
    for run, result, behind in zip(found, results, _against_best(context, found, metric), strict=True):
        kept = {
            key: result[key] for key in ("name", "run_id", "users", "metrics", "ci95", "slices", "lists", "cutoff")
        }
        own = {"behind": behind, "candidates": result["counts"]["candidates"], "cost": cost(context, run)}
        runs.append({**kept, **own})
    best, data = found[0], context.dataset.record
    samples = context.tracker.read_json(best.run_id, "samples.json")
    counts = results[0]["counts"]
    title = (
        f"{data.name} {data.digest[:12]}, {results[0]['protocol']}, {split}, {counts['users']} users, "
        f"{counts['targets']} targets"
    )
    header, cells = rows(runs, metric)
    others = left_out(context, split, {run.name for run in found})
    print(f"{title}\n\n{as_text(header, cells)}\n\n{best.name} recommends:\n\n{samples_as_text(samples)}\n")
    unknown = ", ".join(each["name"] for each in runs if each["cutoff"] == "unknown")
    if unknown:
        print(f"what the Item LLM had seen before is not known, its weights are from elsewhere: {unknown}")
    if others:
        names = ", ".join(other["name"] for other in others)
        print(f"not in the table, for other data, another protocol or an older version: {names}")
    figures = drift_rows(read_profile(context.store, data))
    curves, indexes = _curves(context, found, metric), _indexes(context, found)
    page = as_html(Page(title, results[0]["candidates"], metric, runs, samples, figures, curves, indexes))
    path = context.store.root / "reports" / f"{data.name}-{context.config.evaluate.protocol}-{split}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, redact(page).encode())
    tags = {"dataset": data.digest, "data": data.name, "protocol": results[0]["protocol"], "split": split}
    with context.tracker.run("compare-runs", "comparison", context.settings("evaluate", "data"), tags) as logged:
        logged.artifact("report.html", page)
    print(f"report: {path}", file=sys.stderr)
    return {
        "protocol": results[0]["protocol"], "split": split, "data": results[0]["data"], "counts": counts,
        "runs": runs, "best": best.name, "left_out": others, "report": str(path),
    }  # fmt: skip
