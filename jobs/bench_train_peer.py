"""A peer of ``bench train``: RecTools' or RecBole's SASRec, run by file in an environment of its own.

It imports nothing of this project. ``python bench_train_peer.py NAME FOLDER THREADS``; every line of stdin is a
request, every line of stdout its answer, both JSON. FOLDER holds events.npz: users, items int64 [E], in order, and
training bool [E]. All settings but width, layers, length and batch size are the peer's defaults.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, LAYERS, HISTORY = 128, 2, 20
WARMUP, LEAST = 2, 2  # steps before the clock starts; steps that are measured in any case


class Stopwatch:
    """Real target positions per second of whole steps, from the end of the warm-up on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """seconds: to measure, not less than LEAST steps."""
        self._limit, self._clock = seconds, clock
        self.steps, self.positions, self.seconds, self.cpu_seconds = -WARMUP, 0, 0.0, 0.0
        self._started, self._cpu_started = 0.0, 0.0

    def step(self, positions: int) -> bool:
        """A step of so many positions has ended. Returns whether to go on."""
        self.steps += 1
        if self.steps <= 0:
            self._started, self._cpu_started = self._clock(), time.process_time()
            return True
        self.positions += positions
        self.seconds, self.cpu_seconds = self._clock() - self._started, time.process_time() - self._cpu_started
        return self.steps < LEAST or self.seconds < self._limit

    def batches(self, epoch: Callable[[], Iterable[Any]], positions: Callable[[Any], int]) -> Iterator[Any]:
        """Batches of epoch after epoch until the time is over; a step ends when the next batch is asked for."""
        while True:
            for batch in epoch():
                yield batch
                if not self.step(positions(batch)):
                    return

    def answer(self) -> dict[str, Any]:
        """What was measured. cpu_seconds: of all threads; tells more than the clock where other work runs beside."""
        names = ("steps", "positions", "seconds", "cpu_seconds")
        return {name: getattr(self, name) for name in names}


Measure = Callable[[int, float], dict[str, Any]]


def rectools(folder: Path) -> Measure:
    """batch size, seconds -> what was measured: ``SASRecModel.fit`` under Lightning, its defaults (softmax loss)."""
    import pandas as pd
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    events = np.load(folder / "events.npz")
    users, items = events["users"][events["training"]], events["items"][events["training"]]
    times = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(len(users)), unit="s")
    rows = {Columns.User: users, Columns.Item: items, Columns.Weight: 1.0, Columns.Datetime: times}
    dataset = Dataset.construct(pd.DataFrame(rows))

    def measure(batch_size: int, seconds: float) -> dict[str, Any]:
        watch = Stopwatch(seconds)

        class Ends(Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
                trainer.should_stop = not watch.step(int((batch["y"] != 0).sum()))

        def trainer() -> Trainer:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            return Trainer(max_epochs=1_000, min_epochs=0, logger=False, devices=1, callbacks=[Ends()], **quiet)

        size = {"n_factors": WIDTH, "n_blocks": LAYERS, "session_max_len": HISTORY, "batch_size": batch_size}
        SASRecModel(**size, get_trainer_func=trainer).fit(dataset)
        return watch.answer()

    return measure


def recbole(folder: Path) -> Measure:
    """Likewise: ``Trainer._train_epoch`` (cross-entropy over all items); one row and one position for each prefix."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    events = np.load(folder / "events.npz")
    (folder / "events").mkdir(exist_ok=True)
    with (folder / "events" / "events.inter").open("w") as file:
        file.write("user:token\titem:token\ttime:float\n")
        file.writelines(
            f"{user}\t{item}\t{place}\n"
            for place, (user, item) in enumerate(zip(events["users"].tolist(), events["items"].tolist(), strict=True))
        )
    fields = {"USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "TIME_FIELD": "time"}
    settings = {
        **fields,
        "load_col": {"inter": list(fields.values())},
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "hidden_size": WIDTH,
        "n_layers": LAYERS,
        "MAX_ITEM_LIST_LENGTH": HISTORY,
        "train_neg_sample_args": None,  # as its documentation asks for with loss_type CE
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "show_progress": False,
    }

    def measure(batch_size: int, seconds: float) -> dict[str, Any]:
        config = Config("SASRec", "events", config_dict={**settings, "train_batch_size": batch_size})
        init_seed(config["seed"], config["reproducibility"])
        loader, _, _ = data_preparation(config, create_dataset(config))
        trainer = Trainer(config, SASRec(config, loader.dataset).to(config["device"]))
        watch = Stopwatch(seconds)
        trainer._train_epoch(watch.batches(lambda: loader, len), 0)
        return watch.answer()

    return measure


def main() -> None:
    """Answer requests until stdin ends."""
    name, folder, threads = sys.argv[1:]
    sys.argv = sys.argv[:1]  # RecBole reads it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    import torch

    torch.set_num_threads(int(threads))
    os.chdir(folder)  # RecBole writes logs into the working directory
    measure = {"rectools": rectools, "recbole": recbole}[name](Path(folder))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(measure(request["batch_size"], request["seconds"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
