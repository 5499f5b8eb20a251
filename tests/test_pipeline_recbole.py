"""The same atomic files through RecBole's own loader and through ours; runs where RecBole is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.ingest import ingest
from pipeline.intake import DataConfig

recbole = pytest.importorskip("recbole", reason="pip install recbole==1.2.1 in an environment of its own")


def sequences(events: pl.DataFrame) -> dict[str, list[tuple[int, list[str]]]]:
    """User -> moments in order, each with its items; the order within a moment is a choice, and ours is another."""
    found = {}
    for (user,), rows in events.group_by("user_id", maintain_order=True):
        moments = rows.group_by("timestamp", maintain_order=True)
        found[user] = [(moment, sorted(at["item_id"].to_list())) for (moment,), at in moments]
    return found


@pytest.mark.slow
def test_users_items_and_sequences_are_those_of_recbole(monkeypatch):
    old_names = {"float_": np.float64, "bool8": np.bool_, "unicode_": np.str_, "complex_": np.complex128}
    for name, kind in old_names.items():  # which NumPy 2 has no more and RecBole 1.2.1 asks for
        monkeypatch.setattr(np, name, kind, raising=False)
    from recbole.config import Config
    from recbole.data.dataset import Dataset

    folder = Path(recbole.__file__).parent / "dataset_example"
    settings = {"data_path": str(folder), "normalize_all": False, "train_neg_sample_args": None}
    loaded = Dataset(Config(model="SASRec", dataset="ml-100k", config_dict=settings))
    # as a data frame: RecBole's tensors hold times as float32, which moves them by up to 64 seconds
    table = loaded.inter_feat.sort_values(["user_id", "timestamp"], kind="stable")
    theirs = pl.DataFrame(
        {
            "user_id": [str(user) for user in loaded.id2token("user_id", table["user_id"].to_numpy())],
            "item_id": [str(item) for item in loaded.id2token("item_id", table["item_id"].to_numpy())],
            "timestamp": [int(seconds) * 1000 for seconds in table["timestamp"]],
        }
    )
    data = folder / "ml-100k"
    ours = ingest(DataConfig(format="recbole", items=data / "ml-100k.item", interactions=data / "ml-100k.inter"))
    assert ours.interactions.height == 100_000
    assert sequences(ours.interactions) == sequences(theirs)
