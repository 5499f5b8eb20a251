"""The Ray Data side of embed-items: start or join a session, run the workers over the windows, show progress.

Runs in a process of its own (``jobs.ray_process``), so nothing that the workers alone need, such as PyTorch, is
imported here.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from jobs.embed_ledger import Ledger
from jobs.memory import keep_pages, uncollected
from schemas.errors import PipelineError

_POLL_SECONDS = 1.0
tqdm.set_lock(threading.RLock())  # its lock between processes is reported as leaked where Ray ends this one


class Worker:
    """The actor: makes what ``packed`` describes, in the process where it runs and in the thread that calls it."""

    def __init__(self, work: bytes, **more: Any) -> None:
        keep_pages()
        self._work, self._more = work, more

    @cached_property
    def _worker(self) -> Callable[[pa.Table], pa.Table]:
        with uncollected():  # it imports PyTorch
            worker, arguments = pickle.loads(self._work)
        return worker(**arguments, **self._more)

    def __call__(self, window: pa.Table) -> pa.Table:
        return self._worker(window)


class _RemoteLedger:
    """Passes a worker's calls on to the ledger's actor, each answered before the worker goes on."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return lambda *values: ray.get(getattr(self.actor, name).remote(*values))

    def __reduce__(self) -> tuple[Any, ...]:
        return _RemoteLedger, (self.actor,)


@contextmanager
def session() -> Iterator[None]:
    """A Ray session: the open one, left open; else the cluster of RAY_ADDRESS or a local one, ended afterwards."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = False
        settings.raise_original_map_exception = True
        settings.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised below, in one line if known
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PipelineError):
            raise cause from None
        raise
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def _progress(ledger: Any, total: int) -> Iterator[tqdm]:
    """A bar of texts per second that looks at the ledger every second, since a window takes long."""
    ended = threading.Event()
    with tqdm(total=total, desc="embed-items", unit="text", mininterval=1, smoothing=0.05) as bar:

        def watch() -> None:
            while not ended.wait(_POLL_SECONDS):
                try:
                    bar.update(min(ray.get(ledger.progress.remote()), total) - bar.n)
                except ray.exceptions.RayError:
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()
        bar.update(total - bar.n)


def _mapped(windows: list[pa.Table], workers: int | None, **arguments: Any) -> ray.data.Dataset:
    """The windows through actors, with a GPU each where there are any."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return ray.data.from_arrow(windows).map_batches(
        Worker,
        fn_constructor_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=workers or max(1, gpus)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )


def embed_windows(work: bytes, windows: list[pa.Table], workers: int | None) -> Generator[dict[str, Any], None, None]:
    """Run Ray Data over windows of catalog rows; yields the report of each as it is done (``embed_worker.REPORT``).
    work: ``packed`` of a worker that takes a ``ledger`` too. In a ``session``.

    Workers, with a GPU each where there are any, must see the catalog's and the table's folder. A worker that dies
    is started again, and its window with it. Raises what the item tower raised.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
    reports = _mapped(windows, workers, work=work, ledger=_RemoteLedger(ledger))
    with _progress(ledger, sum(window.num_rows for window in windows)) as bar:
        tokens = padded = 0
        for report in reports.iter_rows():
            tokens, padded = tokens + report["tokens"], padded + report["padded"]
            waste = f"{1 - tokens / max(1, padded):.1%}"
            speed = f"{tokens / max(1e-9, bar.format_dict['elapsed']):.0f}"
            bar.set_postfix({"tokens/s": speed, "padding": waste}, refresh=False)
            yield report


def map_windows(work: bytes, windows: list[pa.Table], label: str, workers: int | None) -> Iterator[pa.Table]:
    """Run a worker (``packed``) over windows on Ray Data, an Arrow table each way; yields the answers in their order.
    In a ``session``.

    Workers get a GPU each where there are any. Raises what the worker raised.
    """
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answers = _mapped(windows, workers, work=work)
    with tqdm(total=sum(window.num_rows for window in windows), desc=label, mininterval=1) as bar:
        for answer in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            bar.update(answer.num_rows)
            yield answer
