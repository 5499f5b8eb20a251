"""compare-runs: the newest evaluation of each name, on the same data and protocol, in one table."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.context import Context
from jobs.evaluate import protocol
from pipeline.dataset import read_profile
from pipeline.files import write_file
from pipeline.metrics import FloatArray, paired_difference, per_user
from pipeline.profile import drift_rows
from pipeline.report import as_html, as_text, rows, samples_as_text
from pipeline.splits import Split
from pipeline.tracking import FoundRun
from schemas import tables
from schemas.errors import NotFoundError, StoreError


def newest_runs(context: Context, split: Split) -> list[FoundRun]:
    """The newest finished evaluation of each name on the current data set. Raises NotFoundError."""
    record = context.dataset.record
    wanted = {"dataset": record.digest, "protocol": protocol(context.config.evaluate), "split": split}
    newest: dict[str, FoundRun] = {}
    for run in context.tracker.find(kind="evaluate", **wanted):
        newest.setdefault(run.name, run)
    if not newest:
        raise NotFoundError(f"no evaluation of data set {record.id} on split {split}; run hllm evaluate first")
    return list(newest.values())


def user_values(context: Context, run_id: str, metric: str) -> tuple[list[str], FloatArray]:
    """Users and their values of one metric, from the ranks that the run stored."""
    ranks = context.tracker.read_table(run_id, "ranks.parquet")
    above: NDArray[np.int64] = ranks.column(tables.ABOVE).to_numpy()
    ties: NDArray[np.int64] = ranks.column(tables.TIES).to_numpy()
    values = per_user(above, ties, context.config.evaluate.ks, len(context.dataset.item_ids))
    return ranks.column(tables.USER_ID).to_pylist(), values[metric]


def run(context: Context, split: Split = "test") -> dict[str, Any]:
    """Print the table and some users' recommendations; write the HTML report. Raises NotFoundError."""
    metric = context.config.evaluate.metric
    found = newest_runs(context, split)
    results = [context.tracker.read_json(run.run_id, "result.json") for run in found]
    order = sorted(range(len(found)), key=lambda place: (-results[place]["metrics"][metric], found[place].name))
    leader = order[0]
    users, best_values = user_values(context, found[leader].run_id, metric)
    runs = []
    for place in order:
        behind = None
        if place != leader:
            others, values = user_values(context, found[place].run_id, metric)
            if others != users:
                raise StoreError(f"runs {found[place].run_id} and {found[leader].run_id} asked different users")
            behind = list(paired_difference(best_values, values, context.config.evaluate.bootstrap))
        result = results[place]
        kept = {key: result[key] for key in ("name", "run_id", "users", "metrics", "ci95")}
        runs.append({**kept, "behind": behind})
    best = found[leader]
    samples = context.tracker.read_json(best.run_id, "samples.json")
    largest = sorted(context.config.evaluate.ks)
    shown = [f"{kind}@{k}" for k in largest for kind in ("recall", "ndcg")]
    header, cells = rows(runs, shown, metric)
    data = context.dataset.record
    title = f"{data.name} {data.digest[:12]}, {protocol(context.config.evaluate)}, {split}, {runs[0]['users']} users"
    print(f"{title}\n\n{as_text(header, cells)}\n\n{best.name} recommends:\n\n{samples_as_text(samples)}\n")
    path = context.store.root / "reports" / f"{data.name}-{split}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = drift_rows(read_profile(context.store, data))
    write_file(path, as_html(title, header, cells, samples, best.name, figures).encode())
    print(f"report: {path}", file=sys.stderr)
    return {"runs": runs, "best": best.name, "report": str(path)}
