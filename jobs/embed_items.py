"""embed-items: the texts that have no vector yet through the Item LLM on Ray, one commit, one snapshot."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm import tqdm

from item_tower.embed import EmbedConfig, embed_table
from item_tower.encoder import EncoderConfig, ItemEncoder, default_device
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig, apply_empty_policy, content_keys, render
from jobs.context import Context, TowerInForce
from pipeline.cache import (
    EmbeddingPlan,
    commit_files,
    create_snapshot,
    find_snapshot,
    plan_embedding,
    snapshot_items,
    write_embedding_file,
)
from schemas import tables
from schemas.errors import FingerprintMismatchError, PipelineError
from schemas.records import Snapshot


class EmbedAndWrite:
    """A Ray actor: loads the item tower once, then texts in, one uncommitted Parquet file a batch out."""

    def __init__(
        self,
        folder: Path | None,
        encoder: EncoderConfig,
        template: TemplateConfig,
        embed: EmbedConfig,
        expected: str,
        table: Path,
        run_id: str,
        threads: int,
    ) -> None:
        """folder: of a tuned tower, None for the untuned one."""
        torch.set_num_threads(threads)
        tower = ItemEncoder.from_config(encoder, template) if folder is None else ItemEncoder.load(folder)
        self.encoder = tower.to(default_device())
        self.found, self.expected = fingerprint(self.encoder, embed.output_dtype), expected
        self.embed, self.table, self.run_id = embed, table, run_id

    def __call__(self, texts: pa.Table) -> pa.Table:
        """texts: key, text. Returns one row about the file written, as ``commit_files`` reads it.

        Raises EmbeddingError; FingerprintMismatchError when this worker's tower is not the driver's (said here,
        since Ray passes on what a call raises, and of a constructor only that the actor died).
        """
        if self.found != self.expected:
            raise FingerprintMismatchError(
                f"a worker loaded item tower {self.found}, the job embeds for {self.expected}: model files, "
                f"packages or processor differ between driver and workers; make them the same"
            )
        rows = embed_table(self.encoder, texts, self.embed)
        info = write_embedding_file(self.table, self.expected, self.run_id, rows)
        return pa.Table.from_pylist([info])


def embed_missing(context: Context, tower: TowerInForce, texts: pa.Table, run_id: str) -> list[dict[str, Any]]:
    """Run Ray Data over the texts (key, text); returns the uncommitted files.

    Ray starts here and nowhere else, locally or on the cluster of RAY_ADDRESS; a session that is already open
    is used and left open. Every worker must see the store's folder. Raises what the item tower raised.
    """
    import ray

    config = context.config.embed
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = False
        settings.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised below, in one line if known
        settings.print_on_execution_start = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = config.workers or max(1, gpus)
        windows = [texts.slice(start, config.window) for start in range(0, texts.num_rows, config.window)]
        infos = ray.data.from_arrow(windows).map_batches(
            EmbedAndWrite,
            fn_constructor_kwargs={
                "folder": tower.folder.resolve() if tower.folder else None,
                "encoder": context.config.encoder,
                "template": context.config.template,
                "embed": config,
                "expected": tower.fingerprint,
                "table": context.store.embeddings.resolve(),
                "run_id": run_id,
                "threads": max(1, (os.cpu_count() or 1) // workers),
            },
            batch_size=config.window,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        files = []
        with tqdm(total=texts.num_rows, desc="embed-items", unit="text", mininterval=2) as progress:
            for info in infos.iter_rows():
                files.append(info)
                progress.update(info["rows"])
        return files
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PipelineError):
            raise cause from None
        raise
    finally:
        if started_here:
            ray.shutdown()


def run(context: Context) -> dict[str, Any]:
    """Plan, embed what is missing, commit, publish. Raises DataError, EmbeddingError, StoreError."""
    started = time.perf_counter()
    store, config = context.store, context.config
    dataset, tower = context.dataset, context.item_tower()
    # a tuned tower is read the way it was tuned; only the untuned one takes template from the configuration
    texts = render(dataset.items, tower.encoder.template)
    kept = apply_empty_policy(dataset.item_ids, texts, tower.encoder.template)
    ids = dataset.item_ids
    keys = content_keys([texts[row] for row in kept])
    plan = plan_embedding(store, tower.fingerprint, [ids[row] for row in kept], keys)
    items = snapshot_items(plan, dataset.available[kept])
    snapshot, files = find_snapshot(store, plan, items), []
    if snapshot is None or plan.missing:
        sections = context.settings("embed", "encoder", "template", "item_tower", "data")
        tags = {"fingerprint": tower.fingerprint, "dataset": dataset.record.digest}
        with context.tracker.run("embed-items", f"embed-items-{config.item_tower.use}", sections, tags) as run:
            if plan.missing:
                missing = pa.table(
                    {
                        tables.KEY: pa.array([keys[row] for row in plan.missing], pa.binary()),
                        tables.TEXT: pa.array([texts[kept[row]] for row in plan.missing], pa.string()),
                    }
                )
                files = embed_missing(context, tower, missing, run.run_id)
                commit_files(store, tower.fingerprint, files)
            snapshot = create_snapshot(
                store,
                plan,
                items,
                dtype=config.embed.output_dtype,
                dim=tower.encoder.dim,
                dataset=dataset.record.digest,
                quarantined=[ids[row] for row in sorted(set(range(len(ids))) - set(kept))],
                code_version=context.code,
                run_id=run.run_id,
            )
            result = _report(snapshot, plan, files, time.perf_counter() - started)
            run.tags({"snapshot": snapshot.id})
            run.metrics({name: value for name, value in result.items() if isinstance(value, int | float)})
            return result
    print(f"nothing to embed: {snapshot.items} items are in snapshot {snapshot.id}", file=sys.stderr)
    return _report(snapshot, plan, files, time.perf_counter() - started)


def _report(snapshot: Snapshot, plan: EmbeddingPlan, files: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    return {
        "snapshot": snapshot.id,
        "fingerprint": snapshot.fingerprint,
        "items": snapshot.items,
        "embedded": plan.embedded,
        "reused": plan.reused,
        "removed": snapshot.removed,
        "quarantined": snapshot.quarantined,
        "tokens": sum(file["tokens"] for file in files),
        "truncated": sum(file["truncated"] for file in files),
        "seconds": round(seconds, 3),
        "items_per_second": round(plan.embedded / seconds, 1),
    }
