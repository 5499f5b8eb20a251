"""The comparison of several runs: as text for a terminal, as HTML for a browser."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.best td{font-weight:600}small{color:#666}
article{margin:1rem 0;padding:.2rem 1rem;border-left:3px solid #ddd}"""


def rows(runs: list[dict[str, Any]], metrics: list[str], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells. runs: name, metrics, ci95, and behind: mean, low and high of best minus this, paired."""
    header = ["run", *metrics, f"{metric} 95 %", "best minus this 95 %"]
    cells = []
    for run in runs:
        low, high = run["ci95"][metric]
        figures = [f"{run['metrics'][name]:.4f}" for name in metrics]
        behind = ""
        if run["behind"] is not None:
            mean, least, most = run["behind"]
            behind = f"{mean:+.4f} [{least:+.4f}, {most:+.4f}]"
        cells.append([run["name"], *figures, f"[{low:.4f}, {high:.4f}]", behind])
    return header, cells


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


def _data_section(figures: list[list[str]]) -> str:
    """The data set's profile as a table; figures: name, now, and before where it was another."""
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in figures)
    head = "<tr><th>figure</th><th>now</th><th>before</th></tr>"
    return f"<h2>Data</h2><table>{head}{lines}</table>" if figures else ""


def as_html(
    title: str,
    header: list[str],
    cells: list[list[str]],
    samples: list[dict[str, Any]],
    best: str,
    figures: list[list[str]],
) -> str:
    """One self-contained page. figures: of the data set, see ``_data_section``."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=best' if line[0] == best else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for line in cells
    )
    users = "".join(
        f"<article><h3>user {escape(sample['user'])}</h3><p>did: {escape(' | '.join(sample['history']))}</p>"
        f"<p>did next: {escape(str(sample['target']))}</p>"
        f"<p>recommended by {escape(best)}: {escape(' | '.join(sample['recommended']))}</p></article>"
        for sample in samples
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>Runs</h1><p><small>{escape(title)}</small></p><table><tr>{head}</tr>{body}</table>"
        f"<h2>Samples</h2>{users}{_data_section(figures)}</html>\n"
    )
