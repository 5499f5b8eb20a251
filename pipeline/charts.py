"""Charts as inline SVG, wide enough for a phone: no scripts, no files from elsewhere."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

# Okabe and Ito 2008: told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH = 360  # units of the drawing; a phone shows about one a pixel
_LABEL, _RIGHT, _TOP, _STEP, _GAP = 118, 14, 8, 9, 8


class Series(NamedTuple):
    """One run's figures by category: (mean, low, high), or None where there is none."""

    name: str
    values: list[tuple[float, float, float] | None]


class Curve(NamedTuple):
    """A figure by step of a training."""

    name: str
    points: list[tuple[int, float]]


class Points(NamedTuple):
    """An index at several settings. at: (milliseconds, share, setting); chosen: the configured setting; exact:
    milliseconds of exact search, whose share is 1."""

    name: str
    at: list[tuple[float, float, str]]
    chosen: str
    exact: float


def colour(number: int) -> str:
    """Of the run in that place."""
    return COLOURS[number % len(COLOURS)]


def legend(names: list[str]) -> str:
    """The runs' colours, for all charts of a page."""
    return (
        "<p class=legend>"
        + " ".join(
            f'<span><i style="background:{colour(n)}"></i>{escape(name)}</span>' for n, name in enumerate(names)
        )
        + "</p>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, three to six."""
    rough = (high - low) / 4
    power = 10.0 ** floor(log10(rough))
    step = next(base * power for base in (1, 2, 2.5, 5, 10) if base * power >= 0.999 * rough)
    first, last = ceil(low / step - 1e-6), floor(high / step + 1e-6)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _svg(height: float, body: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def interval_chart(title: str, categories: list[str], series: list[Series]) -> str:
    """A row for each category, in it a dot and its interval for each run. Empty where nothing is known."""
    known = [value for run in series for value in run.values if value is not None]
    if not known:
        return ""
    low, high = min(0.0, *(value[1] for value in known)), max(value[2] for value in known)
    high = high if high > low else low + 1.0

    def x(value: float) -> float:
        return _LABEL + (WIDTH - _LABEL - _RIGHT) * (value - low) / (high - low)

    row = _STEP * len(series) + _GAP
    bottom = _TOP + row * len(categories)
    parts = []
    for tick in _ticks(low, high):
        parts.append(f'<path class=grid d="M{x(tick):.1f} {_TOP}V{bottom:.1f}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 12:.1f}" text-anchor="middle">{tick:g}</text>')
    for place, category in enumerate(categories):
        top = _TOP + row * place
        middle = top + row / 2 + 3
        parts.append(f'<text x="{_LABEL - 6}" y="{middle:.1f}" text-anchor="end">{escape(category)}</text>')
        for number, run in enumerate(series):
            value = run.values[place]
            if value is None:
                continue
            y = top + _GAP / 2 + _STEP * (number + 0.5)
            mean, least, most = value
            parts.append(
                f'<g stroke="{colour(number)}" fill="{colour(number)}">'
                f'<path d="M{x(least):.1f} {y:.1f}H{x(most):.1f}"/>'
                f'<circle cx="{x(mean):.1f}" cy="{y:.1f}" r="2.6"/>'
                f"<title>{escape(run.name)}, {escape(category)}: {mean:.4f} [{least:.4f}, {most:.4f}]</title></g>"
            )
    return _svg(bottom + 18, "".join(parts), title)


def line_chart(title: str, curves: list[tuple[int, Curve]]) -> str:
    """A line for each training. curves: with the place of their run, which gives the colour."""
    if not curves:
        return ""
    steps = [step for _, curve in curves for step, _ in curve.points]
    values = [value for _, curve in curves for _, value in curve.points]
    low, high, last, height = min(0.0, *values), max(*values, 1e-9), max(*steps, 1), 180
    left, base = 40, height - 22

    def at(step: int, value: float) -> str:
        x = left + (WIDTH - left - _RIGHT) * step / last
        return f"{x:.1f} {base - (base - _TOP) * (value - low) / (high - low):.1f}"

    parts = []
    for tick in _ticks(low, high):
        y = at(0, tick).split()[1]
        parts.append(f'<path class=grid d="M{left} {y}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{left - 4}" y="{float(y) + 3:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{height - 6}" text-anchor="end">step {last}</text>')
    for number, curve in curves:
        path = "L".join(at(step, value) for step, value in curve.points)
        parts.append(
            f'<path class=line stroke="{colour(number)}" d="M{path}"><title>{escape(curve.name)}</title></path>'
        )
        end = at(*curve.points[-1]).split()
        parts.append(f'<circle fill="{colour(number)}" cx="{end[0]}" cy="{end[1]}" r="2.6"/>')
    return _svg(height, "".join(parts), title)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten that spans low to high, one beyond at each end."""
    every = [base * 10.0**power for power in range(floor(log10(low)), ceil(log10(high)) + 1) for base in (1, 2, 5)]
    first = max((n for n, tick in enumerate(every) if tick <= low), default=0)
    last = min((n for n, tick in enumerate(every) if tick >= high), default=len(every) - 1)
    return every[first : last + 1]


def trade_off_chart(title: str, runs: list[tuple[int, Points]]) -> str:
    """Share against milliseconds (logarithmic). runs: with the place of their run, which gives the colour."""
    if not runs:
        return ""
    times = [max(time, 1e-4) for _, run in runs for time in (run.exact, *(ms for ms, _, _ in run.at))]
    ticks = _decades(min(times), max(times))
    low = min(share for _, run in runs for _, share, _ in run.at)
    low = floor(10 * min(low, 0.9)) / 10
    left, height = 34, 200
    base = height - 34

    def x(time: float) -> float:
        start, end = log10(ticks[0]), log10(ticks[-1])
        return left + (WIDTH - left - _RIGHT) * (log10(max(time, 1e-4)) - start) / max(end - start, 1e-9)

    def y(share: float) -> float:
        return base - (base - _TOP) * (share - low) / (1 - low)

    parts = [f'<text x="{(left + WIDTH - _RIGHT) / 2}" y="{height - 4}" text-anchor="middle">ms a query</text>']
    for share in _ticks(low, 1):
        parts.append(f'<path class=grid d="M{left} {y(share):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{left - 4}" y="{y(share) + 3:.1f}" text-anchor="end">{share:g}</text>')
    for tick in ticks if len(ticks) < 9 else [tick for tick in ticks if f"{tick:.0e}"[0] == "1"]:
        parts.append(f'<path class=grid d="M{x(tick):.1f} {_TOP}V{base}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{base + 12}" text-anchor="middle">{tick:g}</text>')
    for number, run in runs:
        ink = colour(number)
        line = "L".join(f"{x(time):.1f} {y(share):.1f}" for time, share, _ in run.at)
        parts.append(f'<path class=line stroke="{ink}" d="M{line}"/>')
        for time, share, setting in run.at:
            parts.append(
                f'<circle stroke="{ink}" fill="{ink if setting == run.chosen else "#fff"}" cx="{x(time):.1f}" '
                f'cy="{y(share):.1f}" r="3.2"><title>{escape(run.name)}, {escape(setting)}: {share:.4f} in '
                f"{time:.3g} ms</title></circle>"
            )
        parts.append(
            f'<rect fill="{ink}" x="{x(run.exact) - 3:.1f}" y="{y(1) - 3:.1f}" width="6" height="6">'
            f"<title>{escape(run.name)}, exact: {run.exact:.3g} ms</title></rect>"
        )
    return _svg(height, "".join(parts), title)
