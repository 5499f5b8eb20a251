"""The report's charts and its index section; the page in a real browser, at a phone's width and a desk's."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from pipeline.charts import WIDTH, Points, trade_off_chart
from pipeline.report import Page, as_html, index_rows

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
# what a page says of itself in its frame: width there, width of its content, texts beyond the edge of their chart
PROBE = """<script>parent.document.documentElement.dataset.found = [document.documentElement.clientWidth,
document.documentElement.scrollWidth, [...document.querySelectorAll("svg text")].filter(
t => {const b = t.getBBox(); return b.x < 0 || b.x + b.width > %d}).length].join()</script>"""


COST = {"items_per_second": 5.0, "positions_per_second": None, "seconds": {"evaluate": 2.0}, "wall_seconds": 2.0}


def run(name: str, recall: float) -> dict:
    interval = [recall - 0.1, recall + 0.1]
    return {
        "name": name, "metrics": {"recall@10": recall}, "ci95": {"recall@10": interval}, "slices": {}, "lists": {},
        "candidates": 9, "cost": COST, "behind": None if recall > 0.4 else [0.1, 0.0, 0.2, 0.04],
    }  # fmt: skip


def index(kind: str, chosen: str, at: list[tuple[float, float, str]]) -> dict:
    ann = {
        "k": 100, "queries": 60, "model_recall": 0.5, "index_recall": 0.4, "ann_loss": 0.2, "milliseconds": 0.5,
        "exact_milliseconds": 8.0, "setting": chosen,
        "trade_off": [{"milliseconds": ms, "ann_loss": 1 - share, "setting": name} for ms, share, name in at],
    }  # fmt: skip
    return {"kind": kind, "bytes": 3 << 20, "ann": ann}


POINTS = [(0.03, 0.71, "nprobe 20"), (0.5, 0.8, "nprobe 40"), (1.7, 0.99, "nprobe 80")]


def test_model_recall_and_the_loss_of_the_index_stand_apart():
    measured = [(1, index("ivf-flat", "nprobe 40", POINTS)), (0, index("flat", "", []))]
    page = Page("data, leave-last-out", "all", "recall@10", [run("a", 0.5), run("b", 0.3)], [], [], [], measured)
    assert index_rows(page) == [
        ["b", "ivf-flat", "nprobe 40", "60", "100", "0.5000", "0.4000", "0.2000", "0.5", "8", "3.0"],
        ["a", "flat", "-", "60", "100", "0.5000", "0.4000", "0.2000", "0.5", "8", "3.0"],
    ]
    text = as_html(page)
    assert "Share of the exact 100 that the index finds" in text
    assert "b, nprobe 80: 0.9900 in 1.7 ms" in text
    without = as_html(Page("data", "all", "recall@10", [run("a", 0.5)], [], [], []))
    assert "ANN loss" not in without


def test_the_trade_off_rises_to_the_right_and_fills_the_configured_setting():
    chart = trade_off_chart("title", [(0, Points("a", POINTS, "nprobe 40", 8.0))])
    circles = re.findall(r'<circle stroke="(\S+)" fill="(\S+)" cx="(\S+)" cy="(\S+)"', chart)
    xs, ys = [float(c[2]) for c in circles], [float(c[3]) for c in circles]
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True)
    assert [fill == stroke for stroke, fill, _, _ in circles] == [False, True, False]
    (square,) = re.findall(r'<rect fill="\S+" x="(\S+)"', chart)
    assert xs[-1] < float(square) < WIDTH
    assert trade_off_chart("title", []) == ""


def look(page: Path, width: int, folder: Path) -> list[int]:
    """Width, width of the content, and texts of charts that are cut off, as a browser lays the page out.

    In a frame of that width: a window without a screen is never narrower than 500.
    """
    text = page.read_text().replace("</html>", PROBE % WIDTH + "</html>")
    frame = folder / f"{width}.html"
    frame.write_text(f'<!doctype html><iframe width={width} height=844 style="border:0" srcdoc="{escape(text)}">')
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / str(width)}", "--window-size=1400,900", "--dump-dom"]
    shown = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    (found,) = re.findall(r'data-found="([0-9,]+)"', shown)
    return [int(number) for number in found.split(",")]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_the_report_whole_on_a_phone_and_on_a_desk(workspace, embed_here, tmp_path):
    frozen = ("--name", "frozen-cache")
    workspace.run("prepare-data")
    workspace.run("embed-items", *frozen)
    workspace.run("train-user", *frozen, "--set", "train.epochs=2")
    workspace.run("build-index", *frozen, "--set", "index.kind=ivf-flat", "--set", "index.nlist=8")
    for name in ("popularity", "item-knn", "frozen-cache"):
        workspace.run("evaluate", "--name", name)
    page = Path(workspace.run("compare-runs")["report"])
    assert "Share of the exact" in page.read_text()
    for width in (390, 1280):
        inner, content, cut = look(page, width, tmp_path)
        assert width - 20 <= inner <= width  # a scroll bar
        assert content <= inner
        assert cut == 0
