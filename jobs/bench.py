"""bench: measurements that take longer than a test may; each name prints its rows and its ratios."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from jobs import (
    bench_cache,
    bench_embed,
    bench_evaluate,
    bench_gpu,
    bench_ingest,
    bench_rank,
    bench_retrieve,
    bench_scale,
    demo,
    train_user,
)
from jobs.compare_runs import newest_runs, user_values
from jobs.config import load_config, local_store
from jobs.context import Context
from pipeline.metrics import bootstrap, paired_difference

SEEDS = (0, 1, 2)
# the same budget for the ID baseline and for the tower on cached text
GRID = {"user_tower.hidden": (64, 128), "user_tower.dropout": (0.2, 0.5), "train.learning_rate": (1e-3, 2e-3)}
GRID_NAMES = ("sasrec-id", "tuned-cache")


def seeds(config: str, sets: list[str]) -> dict[str, Any]:
    """The demo's runs under three seeds, each in a store of its own: per-user values are averaged over the
    seeds, then users are resampled. Resumable: finished steps are reused.
    """
    base = load_config(config, None, sets)
    metric = base.evaluate.metric
    by_name: dict[str, list[np.ndarray]] = {}
    rows = []
    for seed in SEEDS:
        store = local_store(base).with_name(f"{local_store(base).name}-seeds") / f"seed-{seed}"
        own = [f'store="{store}"', f"train.seed={seed}", f"tune.train.seed={seed}"]
        context = demo.run_steps(config, [*sets, *own])
        figures = {}
        for run in newest_runs(context, "test"):
            _, values = user_values(context, run.run_id, metric)
            by_name.setdefault(run.name, []).append(values)
            figures[run.name] = round(float(values.mean()), 4)
        rows.append({"seed": seed, metric: figures})
        print(f"seed {seed}  " + "  ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items())))
    pooled = {name: np.mean(values, axis=0) for name, values in by_name.items()}
    means = {name: float(values.mean()) for name, values in pooled.items()}
    intervals = {name: list(bootstrap(values)) for name, values in pooled.items()}
    gain = paired_difference(pooled["tuned-cache"], pooled["frozen-cache"])
    over_ids = paired_difference(pooled["tuned-cache"], pooled["sasrec-id"])
    ratio = {
        "tuned_over_popularity": round(means["tuned-cache"] / means["popularity"], 3),
        "tuned_over_frozen": round(means["tuned-cache"] / means["frozen-cache"], 3),
        "tuned_over_sasrec_id": round(means["tuned-cache"] / means["sasrec-id"], 3),
    }
    print(f"{metric} tuned-cache minus frozen-cache {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]")
    print(f"{metric} tuned-cache minus sasrec-id {over_ids.mean:+.4f} [{over_ids.low:+.4f}, {over_ids.high:+.4f}]")
    return {
        "name": "seeds",
        "rows": rows,
        "pooled": intervals,
        "tuned_minus_frozen": list(gain),
        "tuned_minus_sasrec_id": list(over_ids),
        "ratio": ratio,
    }


def grid(config: str, sets: list[str]) -> dict[str, Any]:
    """Validation figures of every point of GRID, for both names, after the demo has run. Test is never asked.

    Resumable: a finished point is reused.
    """
    metric, rows = load_config(config, None, sets).evaluate.metric, []
    for name, point in product(GRID_NAMES, product(*GRID.values())):
        values = dict(zip(GRID, point, strict=True))
        settings = load_config(config, name, [*sets, *(f"{key}={value}" for key, value in values.items())])
        label = f"{name} {' '.join(str(value) for value in point)}"
        trained = train_user.run(Context(settings.model_copy(update={"name": label})))
        rows.append({"name": name, **values, f"valid {metric}": trained["valid"][metric]})
        print(f"{label}  valid {metric} {trained['valid'][metric]:.4f}", flush=True)
    best = {
        name: max((r for r in rows if r["name"] == name), key=lambda r: r[f"valid {metric}"]) for name in GRID_NAMES
    }
    return {"name": "grid", "rows": rows, "best": best, "ratio": {}}


BENCHES = {
    "seeds": seeds,
    "grid": grid,
    "embed": bench_embed.run,
    "cache": bench_cache.run,
    "ingest": bench_ingest.run,
    "retrieve": bench_retrieve.run,
    "evaluate": bench_evaluate.run,
    "rank": bench_rank.run,
    "gpu": bench_gpu.run_here,
    "scale": bench_scale.run,
}
