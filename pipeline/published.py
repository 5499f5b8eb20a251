"""Published figures to set beside our own, where the protocol is the same (``published.csv``, figures in percent)."""

from __future__ import annotations

import csv
from pathlib import Path

from schemas.errors import StoreError

_FILE = Path(__file__).with_name("published.csv")
FIGURES = ("recall@10", "ndcg@10", "hr@5")


def published_rows(dataset: str, protocol: str) -> list[dict[str, str | float]]:
    """Rows of the family that the data set's name speaks of (such as ``book``), under exactly this protocol.

    protocol: as ``protocol_label`` gives it; the seed of sampled negatives is nobody's in particular. Each row has
    dataset, method, setting, source, and its figures as shares. The data is never the same: who prints them says so.
    Raises StoreError when the file that comes with the package is damaged.
    """
    found: list[dict[str, str | float]] = []
    name, asked = dataset.lower().replace("-", ""), protocol.partition(" (seed ")[0]
    with _FILE.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            if row["family"] not in name or row["protocol"] != asked:
                continue
            texts: dict[str, str | float] = {key: row[key] for key in ("dataset", "method", "setting", "source")}
            try:
                found.append(texts | {key: round(float(row[key]) / 100, 6) for key in FIGURES if row[key]})
            except ValueError as error:
                raise StoreError(f"{_FILE}, line {number}: {error}; install the package again") from error
    return found
