"""The comparison of several runs: as text for a terminal, as one self-contained HTML page, also for a phone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape, unescape
from typing import Any

from pipeline.charts import Curve, Points, Series, interval_chart, legend, line_chart, trade_off_chart

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:76rem;padding:0 1rem;color:#222;
background:#fff}p,article{max-width:46rem}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem;margin:.6rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}tr.best td{font-weight:600}
small{color:#555}article{margin:1rem 0;padding:.2rem 1rem;border-left:3px solid #ddd}
svg{display:block;width:100%;max-width:40rem;font:10px system-ui,sans-serif}svg text{fill:#333}
svg .grid{stroke:#ddd;fill:none}svg .line{fill:none;stroke-width:1.6}svg g path{stroke-width:1.4}
.legend span{display:inline-block;margin-right:1rem}.legend i{display:inline-block;width:.7rem;height:.7rem;
margin-right:.3rem;border-radius:50%}"""

# heading -> how the labels of its slices begin
FAMILIES = {
    "By popularity of the target": "popularity decile",
    "By length of the history": "history",
    "Cold items": "cold",
}


COST_NOTE = (
    "Seconds of the newest run of each step that made the row, each on the machine on which it ran; a training "
    "that was killed and went on counts from then. items/s: texts through the Item LLM when the snapshot was "
    "embedded; positions/s: through the user tower in training."
)
# heading -> figure of a run's cost: texts embedded and positions trained on
COSTS = {"items/s": "items_per_second", "positions/s": "positions_per_second"}


@dataclass(frozen=True)
class Page:
    """What the report shows. runs: best first, each with name, metrics, ci95, slices, lists, candidates, behind and
    cost; figures: of the data set, name, now, and before where it was another; curves: of the trainings; indexes:
    place of a run, and what build-index answered for its tower and snapshot."""

    title: str
    candidates: str
    metric: str
    runs: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    figures: list[list[str]]
    curves: list[Curve]
    indexes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the runs."""
        return [run["name"] for run in self.runs]


def rows(runs: list[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells. runs: name, metrics, ci95, lists, cost, and behind: mean, low, high and p of best minus
    this."""
    metrics, lists = list(runs[0]["metrics"]), [name for name in runs[0]["lists"] if not name.startswith("items_")]
    header = ["run", *metrics, f"{metric} 95 %", "best minus this 95 %", "p", *lists, *COSTS, "wall s"]
    cells = []
    for run in runs:
        low, high = run["ci95"][metric]
        figures = [f"{run['metrics'][name]:.4f}" for name in metrics]
        behind, chance = "", ""
        if run["behind"] is not None:
            mean, least, most, p = run["behind"]
            behind, chance = f"{mean:+.4f} [{least:+.4f}, {most:+.4f}]", f"{p:.3f}"
        whole = [f"{run['lists'][name]:.4g}" for name in lists]
        spent = [_plain(run["cost"][name]) for name in (*COSTS.values(), "wall_seconds")]
        cells.append([run["name"], *figures, f"[{low:.4f}, {high:.4f}]", behind, chance, *whole, *spent])
    return header, cells


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def cost_rows(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the seconds of each step behind each run, and the speeds."""
    steps = list(dict.fromkeys(step for run in runs for step in run["cost"]["seconds"]))
    cells = [
        [
            run["name"],
            *(_plain(run["cost"]["seconds"].get(step)) for step in steps),
            *(_plain(run["cost"][name]) for name in ("wall_seconds", *COSTS.values())),
        ]
        for run in runs
    ]
    return ["run", *(f"{step} s" for step in steps), "wall s", *COSTS], cells


def slice_rows(runs: list[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line for each slice that any run has, with its users, and each run's figure."""
    labels = list(dict.fromkeys(label for run in runs for label in run["slices"]))
    cells = []
    for label in labels:
        found = [run["slices"].get(label) for run in runs]
        users = [str(part["users"]) for part in found if part is not None]
        cells.append([label, users[0], *(_cell(part, metric) for part in found)])
    return ["slice", "users", *(run["name"] for run in runs)], cells


def _cell(part: dict[str, Any] | None, metric: str) -> str:
    if part is None or part.get(metric) is None:  # slices know the metric that decided their own evaluation
        return "-"
    low, high = part["ci95"]
    return f"{part[metric]:.4f} [{low:.4f}, {high:.4f}]"


def as_text(header: list[str], cells: list[list[str]]) -> str:
    """Columns padded to their widest cell, the first one to the left."""
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    lines = []
    for line in [header, ["-" * width for width in widths], *cells]:
        first = line[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def samples_as_text(samples: list[dict[str, Any]]) -> str:
    """Each user's last events, the held-out one, and what was recommended."""
    blocks = []
    for sample in samples:
        lines = [f"user {sample['user']}", "  did          " + " | ".join(sample["history"])]
        lines.append(f"  did next     {sample['target']}")
        lines.append("  recommended  " + " | ".join(sample["recommended"]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _table(header: list[str], cells: list[list[str]], best: str | None = None) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=best' if line[0] == best else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for line in cells
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def tables_page(title: str, notes: list[str], sections: list[tuple[str, list[str], list[list[str]]]]) -> str:
    """One self-contained page of tables. sections: heading, header and cells of each."""
    parts = "".join(f"<h2>{escape(name)}</h2>{_table(header, cells)}" for name, header, cells in sections if cells)
    told = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    return _document(title, f"<h1>{escape(title)}</h1>{told}{parts}")


def _document(title: str, body: str) -> str:
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{body}</html>\n"
    )


def _whole_charts(page: Page) -> str:
    """The deciding metric of each run with its interval, and how far the others are behind the best."""
    every = [Series(run["name"], [(run["metrics"][page.metric], *run["ci95"][page.metric])]) for run in page.runs]
    charts = f"<h3>{escape(page.metric)}, 95 %</h3>" + interval_chart(page.metric, ["all users"], every)
    behind = [
        Series(run["name"], [None if run["behind"] is None else (run["behind"][0], *run["behind"][1:3])])
        for run in page.runs
    ]
    difference = interval_chart("best minus this", ["best minus this"], behind)
    return charts + (
        f"<h3>{escape(page.names[0])} minus each, paired over users, 95 %</h3>{difference}" if difference else ""
    )


def _slice_charts(page: Page) -> str:
    parts = []
    for heading, start in FAMILIES.items():
        labels = list(dict.fromkeys(name for run in page.runs for name in run["slices"] if name.startswith(start)))
        series = [
            Series(run["name"], [_point(run["slices"].get(name), page.metric) for name in labels])
            for run in page.runs
        ]
        kept = [place for place in range(len(labels)) if any(run.values[place] is not None for run in series)]
        shown = [Series(run.name, [run.values[place] for place in kept]) for run in series]
        names = [labels[place].removeprefix("cold: ").removeprefix("popularity ") for place in kept]
        chart = interval_chart(heading, names, shown)
        if chart:
            parts.append(f"<h2>{heading}</h2>{legend(page.names)}{chart}")
    return "".join(parts)


def _point(part: dict[str, Any] | None, metric: str) -> tuple[float, float, float] | None:
    return None if part is None or part.get(metric) is None else (part[metric], *part["ci95"])


def _curves(page: Page) -> str:
    placed = [(page.names.index(curve.name), curve) for curve in page.curves]
    chart = line_chart(f"{page.metric} on validation", placed)
    return f"<h2>Training: {escape(page.metric)} on validation</h2>{legend(page.names)}{chart}" if chart else ""


INDEX_HEADER = ["run", "index", "setting", "queries", "k", "model recall", "index recall", "ANN loss", "ms a query",
                "exact, ms", "MiB"]  # fmt: skip


def index_rows(page: Page) -> list[list[str]]:
    """A line for each measured index: what the model finds by exact search, and what the index loses of that."""
    cells = []
    for place, index in page.indexes:
        ann = index["ann"]
        shares = [f"{ann[key]:.4f}" for key in ("model_recall", "index_recall", "ann_loss")]
        times = [f"{ann[key]:.3g}" for key in ("milliseconds", "exact_milliseconds")]
        what = [page.names[place], index["kind"], ann["setting"] or "-", str(ann["queries"]), str(ann["k"])]
        cells.append([*what, *shares, *times, f"{index['bytes'] / 2**20:.1f}"])
    return cells


def _indexes(page: Page) -> str:
    if not page.indexes:
        return ""
    points = [
        Points(
            page.names[place],
            [(at["milliseconds"], 1 - at["ann_loss"], at["setting"]) for at in index["ann"]["trade_off"]],
            index["ann"]["setting"],
            index["ann"]["exact_milliseconds"],
        )
        for place, index in page.indexes
    ]
    k = page.indexes[0][1]["ann"]["k"]
    title = f"Share of the exact {k} that the index finds, by milliseconds a query"
    places = [place for place, _ in page.indexes]
    chart = trade_off_chart(title, [(place, one) for place, one in zip(places, points, strict=True) if one.at])
    note = (
        "Validation histories, searched in one batch. Model recall: share of the targets that exact search has among "
        "its k best, which no index can better. ANN loss: share of these k that the index does not find."
    )
    more = f"<h3>{title}</h3>{legend(page.names)}{chart}" if chart else ""
    filled = "Filled: as configured. Square: exact search." if chart else ""
    return (
        f"<h2>Index: model recall and ANN loss</h2>{_table(INDEX_HEADER, index_rows(page))}"
        f"<p><small>{note} {filled}</small></p>{more}"
    )


def _samples(page: Page) -> str:
    users = "".join(
        f"<article><h3>user {escape(sample['user'])}</h3><p>did: {escape(' | '.join(sample['history']))}</p>"
        f"<p>did next: {escape(str(sample['target']))}</p>"
        f"<p>recommended by {escape(page.names[0])}: {escape(' | '.join(sample['recommended']))}</p></article>"
        for sample in page.samples
    )
    return f"<h2>Samples</h2>{users}"


def without_samples(page: str, forgotten: Callable[[str], bool]) -> tuple[str, int]:
    """A finished page without the samples of some users, and how many these were."""
    dropped = 0

    def judge(found: re.Match[str]) -> str:
        nonlocal dropped
        gone = forgotten(unescape(found[1]))
        dropped += gone
        return "" if gone else found[0]

    return re.sub(r"<article><h3>user (.*?)</h3>.*?</article>", judge, page, flags=re.DOTALL), dropped


def _notes(page: Page) -> str:
    counts = {run["candidates"] for run in page.runs}
    notes = [f"Candidates: {page.candidates}."]
    if len(counts) > 1:
        each = ", ".join(f"{run['name']} {run['candidates']}" for run in page.runs)
        notes.append(f"The runs choose among different numbers of items: {each}.")
    notes.append("p: bootstrap test of no difference from the best, not corrected for the number of runs.")
    return "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)


def as_html(page: Page) -> str:
    """One self-contained page: no scripts, nothing fetched."""
    data = _table(["figure", "now", "before"], page.figures) if page.figures else ""
    return _document(
        page.title,
        f"<h1>Runs</h1><p><small>{escape(page.title)}</small></p>"
        f"{_table(*rows(page.runs, page.metric), page.names[0])}{_notes(page)}"
        f"{legend(page.names)}{_whole_charts(page)}{_slice_charts(page)}"
        f"<h2>{escape(page.metric)} by slice</h2>{_table(*slice_rows(page.runs, page.metric))}"
        f"{_indexes(page)}<h2>Cost</h2>{_table(*cost_rows(page.runs))}<p><small>{COST_NOTE}</small></p>"
        f"{_curves(page)}{_samples(page)}{'<h2>Data</h2>' + data if data else ''}",
    )
