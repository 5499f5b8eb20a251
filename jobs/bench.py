"""bench: measurements that take longer than a test may; each name prints its rows and its ratios."""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs import demo
from jobs.compare_runs import newest_runs, user_values
from jobs.config import load_config
from pipeline.metrics import bootstrap, paired_difference

SEEDS = (0, 1, 2)


def seeds(config: str, sets: list[str]) -> dict[str, Any]:
    """The demo's runs under three seeds, each in a store of its own: per-user values are averaged over the
    seeds, then users are resampled. Resumable: finished steps are reused.
    """
    base = load_config(config, None, sets)
    metric = base.evaluate.metric
    by_name: dict[str, list[np.ndarray]] = {}
    rows = []
    for seed in SEEDS:
        store = base.store.with_name(f"{base.store.name}-seeds") / f"seed-{seed}"
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


BENCHES = {"seeds": seeds}
