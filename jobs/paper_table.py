"""paper-table: the rows of the paper's comparison on one data set, each trained row with the same tuning budget.

One resumable command: what is finished is found again by the hash of its inputs. Points of the grid are compared on
validation; the test split is asked once a row, with the best of them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jobs import embed_items, evaluate, prepare_data, train_user, tune_items
from jobs.compare_runs import user_values
from jobs.config import Config, data_sets, find_toml, load_config, local_store
from jobs.context import Context
from pipeline.baselines import BASELINES
from pipeline.files import write_file
from pipeline.metrics import paired_difference
from pipeline.published import published_rows
from schemas.errors import ConfigError

ID_ROWS = ("sasrec-id", "hstu-id")
TRAINED = (*ID_ROWS, "frozen-cache", "tuned-cache", "tuned-cache+time", "tuned-cache+id")
# what is tried for every trained row, in this order, until its budget is spent
GRID: dict[str, tuple[float, ...]] = {"train.learning_rate": (1e-3, 2e-3), "user_tower.dropout": (0.2, 0.5)}
COLD = "cold: not in user training"
_SPENT = "paper-table.json"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class _Ledger:
    """Seconds that each point of the grid took, beside the store, so that a resumed run keeps to the same budget."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, label: str, seconds: float) -> None:
        """Keep the time of a finished point."""
        self.seconds[label] = round(seconds, 1)
        write_file(self._path, json.dumps(self.seconds, indent=1).encode())


@dataclass(frozen=True)
class Row:
    """One row: its evaluation, and how it was chosen. tried: valid figure by point; cut: the budget ended before the
    grid did."""

    name: str
    result: dict[str, Any]
    best: str | None = None
    tried: dict[str, float] | None = None
    cut: bool = False


def _settings(toml: str, data: str | None, name: str, sets: list[str]) -> Config:
    own = [] if data is None else data_sets(data, load_config(toml, name, []).store)
    return load_config(toml, name, [*own, *sets])


def _trained_row(settings: Config, budget: float, ledger: _Ledger) -> Row:
    """Train points of the grid until the budget (seconds) is spent, the first one in any case; evaluate the best."""
    metric, spent = settings.evaluate.metric, 0.0
    tried: dict[str, float] = {}
    points = [dict(zip(GRID, point, strict=True)) for point in product(*GRID.values())]
    configs = {}
    for point in points:
        if tried and spent >= budget:
            break
        label = " ".join([settings.name, *(f"{key.split('.')[1]}={value:g}" for key, value in point.items())])
        configs[label] = settings.model_copy(
            update={
                "name": label,
                "user_tower": settings.user_tower.model_copy(update={"dropout": point["user_tower.dropout"]}),
                "train": settings.train.model_copy(update={"learning_rate": point["train.learning_rate"]}),
            }
        )
        started = time.perf_counter()
        trained = train_user.run(Context(configs[label]))
        if not trained["reused"]:
            ledger.add(label, time.perf_counter() - started)
        spent += ledger.seconds.get(label, 0.0)
        tried[label] = trained["valid"][metric]
        _say(f"{label}: valid {metric} {tried[label]:.4f}, {spent / 60:.1f} of {budget / 60:g} minutes spent")
    best = max(tried, key=lambda label: tried[label])
    return Row(settings.name, evaluate.run(Context(configs[best])), best, tried, len(tried) < len(points))


def _rows(toml: str, data: str | None, sets: list[str], budget: float, names: tuple[str, ...]) -> list[Row]:
    """All rows, the cheap ones first."""
    first = _settings(toml, data, names[0], sets)
    prepare_data.run(Context(first))
    ledger = _Ledger(local_store(first) / _SPENT)
    rows, embedded = [], set()
    for name in names:
        settings = _settings(toml, data, name, sets)
        if name in BASELINES:
            rows.append(Row(name, evaluate.run(Context(settings))))
            continue
        tower = settings.item_tower.use
        if name not in ID_ROWS and tower not in embedded:
            if name != "frozen-cache":
                tuned = tune_items.run(Context(settings))
                _say(f"tune-items: {tuned['steps']} steps, valid {tuned['valid'].get(settings.evaluate.metric)}")
            embed_items.run(Context(settings), allow_full=True)
            embedded.add(tower)
        rows.append(_trained_row(settings, budget, ledger))
    return rows


def _compared(context: Context, rows: list[Row], metric: str) -> dict[str, list[float] | None]:
    """Each row minus the better ID row, paired over users: mean, low, high, p."""
    ids = [row for row in rows if row.name in ID_ROWS]
    if not ids:
        return {}
    better = max(ids, key=lambda row: row.result["metrics"][metric])
    _, reference = user_values(context, better.result["run_id"], metric)
    found: dict[str, list[float] | None] = {better.name: None}
    for row in rows:
        if row.name != better.name:
            _, values = user_values(context, row.result["run_id"], metric)
            found[row.name] = list(paired_difference(values, reference, context.config.evaluate.bootstrap))
    return found


def _markdown(rows: list[Row], over: dict[str, list[float] | None], metric: str) -> str:
    ndcg = metric.replace("recall", "ndcg")
    lines = [
        f"| run | {metric} | 95 % | {ndcg} | minus the better ID row, 95 % | cold items | rarest tenth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures, slices = row.result["metrics"], row.result["slices"]
        low, high = row.result["ci95"][metric]
        behind = over.get(row.name)
        minus = "" if behind is None else f"{behind[0]:+.4f} [{behind[1]:+.4f}, {behind[2]:+.4f}]"
        rare = [slices.get(label, {}).get(metric) for label in (COLD, "popularity decile 1")]
        cells = ["" if value is None else f"{value:.4f}" for value in rare]
        lines.append(
            f"| {row.name}{' (grid cut)' if row.cut else ''} | {figures[metric]:.4f} | {low:.4f} to {high:.4f} | "
            f"{figures[ndcg]:.4f} | {minus} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _published(rows: list[dict[str, Any]], ours: dict[str, Any], metric: str) -> str:
    """Published rows as a table of their own, with what is different about the data."""
    mine = f"{ours['data']['name']}: {ours['users']} users, {ours['counts']['items']} items"
    lines = [
        f"Published, same protocol, other data (here {mine}):",
        "",
        f"| run | {metric} | source |",
    ]
    lines.append("|---|---|---|")
    hit_rate = metric.replace("recall", "hr")  # the same where a user has one target
    for row in rows:
        figure = row.get(metric, row.get(hit_rate))
        if figure is not None:
            lines.append(f"| {row['method']}, {row['dataset']}, {row['setting']} | {figure:.4f} | {row['source']} |")
    return "\n".join(lines)


def run(config: str, sets: list[str], data: str | None, budget_minutes: float, only: str | None) -> dict[str, Any]:
    """Print the table as Markdown on stderr; return its rows. only: names with commas between, None for all.

    Raises ConfigError for an unknown name or a folder without the two tables, and what the steps raise.
    """
    names = (*BASELINES, *TRAINED)
    chosen = tuple(only.split(",")) if only else names
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(f"--only {only}: {unknown[0]!r} is no row; the rows are {', '.join(names)}")
    find_toml(config)
    order = tuple(name for name in names if name in chosen)
    rows = _rows(config, data, sets, 60 * budget_minutes, order)
    context = Context(_settings(config, data, order[0], sets))
    metric = context.config.evaluate.metric
    over = _compared(context, rows, metric)
    first = rows[0].result
    data_version = f"{first['data']['name']} {first['data']['digest'][:12]}"
    print(f"\n{data_version}, {first['protocol']}, test, {first['users']} users\n", file=sys.stderr)
    print(_markdown(rows, over, metric), file=sys.stderr, flush=True)
    published = published_rows(first["data"]["name"], first["protocol"])
    if published:
        print(f"\n{_published(published, first, metric)}", file=sys.stderr, flush=True)
    return {
        "name": "paper-table",
        "data": first["data"],
        "protocol": first["protocol"],
        "budget_minutes": budget_minutes,
        "published": published,
        "rows": [
            {
                "name": row.name,
                "run_id": row.result["run_id"],
                "metrics": row.result["metrics"],
                "ci95": row.result["ci95"][metric],
                "over_better_id": over.get(row.name),
                "cold": row.result["slices"].get(COLD),
                "best": row.best,
                "tried": row.tried,
                "grid_cut": row.cut,
                "cutoff": row.result["cutoff"],
            }
            for row in rows
        ],
    }
