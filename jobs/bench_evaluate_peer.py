"""The peer of ``bench evaluate``: RecBole's own full-sort evaluation, run by file in an environment of its own.

It imports nothing of this project. ``python bench_evaluate_peer.py FOLDER THREADS TRIED``. FOLDER holds inputs.npz:
queries float32 [U, D], candidates float32 [N, D], offsets int64 [U + 1], items int64 [E] (histories) and targets
int64 [U]. The model has these vectors and nothing to learn, so what is measured is scoring, masking, top-k and
metrics. Each number of users a batch is tried on the first TRIED users, all users are evaluated with the best; the
last line of stdout is the answer as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (64, 128, 256, 512)  # users a batch
KS = [5, 10, 50, 200]


def write_events(folder: Path, inputs: Any, users: int) -> None:
    """RecBole's files of the first users: their events in order, the target last, and every item of the catalog."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user:token\titem:token\ttime:float"]
    offsets = inputs["offsets"]
    for user in range(users):
        events = [*inputs["items"][offsets[user] : offsets[user + 1]].tolist(), int(inputs["targets"][user])]
        lines += [f"{user}\t{item}\t{place}" for place, item in enumerate(events)]
    (folder / f"{folder.name}.inter").write_text("\n".join(lines) + "\n")
    items = "\n".join(map(str, range(len(inputs["candidates"]))))
    (folder / f"{folder.name}.item").write_text(f"item:token\n{items}\n")


def evaluation(folder: Path, inputs: Any) -> Any:
    """users a batch -> seconds, CPU seconds and metrics of ``Trainer.evaluate`` on the data of a folder."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.abstract_recommender import GeneralRecommender
    from recbole.trainer import Trainer
    from recbole.utils import InputType

    class Known(GeneralRecommender):
        """Inner products of given vectors; row 0 is RecBole's padding."""

        input_type = InputType.PAIRWISE

        def __init__(self, config: Any, dataset: Any) -> None:
            super().__init__(config, dataset)
            users, items = (
                np.array([int(token) for token in dataset.field2id_token[field][1:]])
                for field in (self.USER_ID, self.ITEM_ID)
            )
            self.queries, self.candidates = (
                torch.from_numpy(np.concatenate([np.zeros_like(rows[:1]), rows[order]]))
                for rows, order in ((inputs["queries"], users), (inputs["candidates"], items))
            )
            self.nothing = torch.nn.Parameter(torch.zeros(1))  # an optimiser wants a parameter

        def full_sort_predict(self, interaction: Any) -> Any:
            return self.queries[interaction[self.USER_ID]] @ self.candidates.T

    def measure(users: int) -> dict[str, Any]:
        settings = {
            "data_path": str(folder.parent),
            "USER_ID_FIELD": "user",
            "ITEM_ID_FIELD": "item",
            "TIME_FIELD": "time",
            "load_col": {"inter": ["user", "item", "time"], "item": ["item"]},
            "eval_args": {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"},
            "metrics": ["Recall", "NDCG", "MRR"],
            "topk": KS,
            "valid_metric": "Recall@10",
            "eval_batch_size": users * (len(inputs["candidates"]) + 1),  # RecBole counts scores
            "checkpoint_dir": str(folder.parent / "saved"),
            "use_gpu": False,
            "state": "ERROR",
            "show_progress": False,
        }
        config = Config(model=Known, dataset=folder.name, config_dict=settings)
        dataset = create_dataset(config)
        _, _, test = data_preparation(config, dataset)
        trainer = Trainer(config, Known(config, test.dataset))
        started, busy = time.perf_counter(), time.process_time()
        found = trainer.evaluate(test, load_best_model=False)
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - busy,
            "users": len(test.uid_list),
            "users_per_batch": users,
            "metrics": {name: float(value) for name, value in found.items()},
        }

    return measure


def main() -> None:
    """Try each batch on some users, evaluate all with the best."""
    import torch

    folder, threads, tried = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    inputs = dict(np.load(folder / "inputs.npz"))
    users = len(inputs["targets"])
    write_events(folder / "some", inputs, min(tried, users))
    write_events(folder / "all", inputs, users)
    some = evaluation(folder / "some", inputs)
    best = min(BATCHES, key=lambda size: some(size)["seconds"])
    print(json.dumps(evaluation(folder / "all", inputs)(best)), flush=True)


if __name__ == "__main__":
    main()
