"""MLflow: runs, figures, artifacts. The only file that imports mlflow."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline.files import write_file
from schemas.errors import NotFoundError, TrackingError
from schemas.secrets import redact

EXPERIMENT = "hllm"
_ARTIFACTS = "mlartifacts"


class TrackingConfig(BaseModel):
    """Where runs are logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = None
    """An MLflow tracking URI; by default SQLite inside the store. MLFLOW_TRACKING_URI goes before it."""
    experiment: str = EXPERIMENT


@contextmanager
def known_error(what: str) -> Iterator[None]:
    """What MLflow raises inside the block becomes a NotFoundError, or a TrackingError that names ``what``."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = str(error).splitlines()[0][:300]
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or "not found" in reason:
            raise NotFoundError(f"{what}: {reason}; `hllm releases list` names what is there") from error
        raise TrackingError(f"{what}: {reason}; check MLFLOW_TRACKING_URI and the server") from error


def open_client(uri: str | None) -> Any:
    """An MLflow client; uri None: MLFLOW_TRACKING_URI. Raises TrackingError when there is neither."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # else it prints the address of each run, password included, between the lines of our stdout
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it logs what it raises, at full length
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        raise TrackingError("no tracking server is named; set MLFLOW_TRACKING_URI or pass tracking_uri")
    return MlflowClient(tracking_uri=chosen)


class Run:
    """One MLflow run being written."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log figures; '@' becomes '_at_', which MLflow accepts."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        logged = [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=logged)

    def curve(self, points: Iterable[dict[str, float]]) -> None:
        """Log the figures of each point of a training at its ``step``."""
        for point in points:
            self.metrics({key: value for key, value in point.items() if key != "step"}, int(point["step"]))

    def tags(self, values: dict[str, str]) -> None:
        """Set tags."""
        for name, value in values.items():
            self._client.set_tag(self.run_id, name, redact(value))

    def artifact(self, name: str, content: str | pa.Table) -> None:
        """Log text, or an Arrow table as Parquet, under a file name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            if isinstance(content, str):
                path.write_text(redact(content))
            else:
                pq.write_table(content, path)
            self._client.log_artifact(self.run_id, str(path))


class FoundRun(BaseModel):
    """A finished run as read back."""

    run_id: str
    name: str
    tags: dict[str, str]


def _follow(database: Path, experiment: str, artifacts: str) -> None:
    """MLflow writes down where each run's files lie: in a store that was moved or copied, the place before. There
    they would be read, written and, of a forgotten user, removed."""
    if not database.exists():
        return
    # of a database that another command is just making, or that is only to be read, MLflow itself says what there is
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database)) as connection, connection:
        found = connection.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,))
        places = (place for (place,) in found if place.startswith("file:") and place.endswith(f"/{_ARTIFACTS}"))
        before = next(places, artifacts)
        if before == artifacts:
            return
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                (artifacts, len(before) + 1, len(before) + 1, f"{before}/"),
            )


class Tracker:
    """The runs of one store."""

    def __init__(self, config: TrackingConfig, store: Path) -> None:
        root = store.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri
        self._artifacts = None
        if uri is None:
            root.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{root / 'mlflow.db'}"
            self._artifacts = (root / _ARTIFACTS).as_uri()
            _follow(root / "mlflow.db", config.experiment, self._artifacts)
        self.uri = uri
        self.client = self._client = open_client(uri)
        self._experiment = config.experiment

    def ping(self) -> None:
        """Raises TrackingError when the server does not answer."""
        with known_error(f"MLflow at {self.uri}"):
            self._client.search_experiments(max_results=1)

    def _experiment_id(self) -> str:
        with known_error(f"MLflow at {self.uri}"):
            found = self._client.get_experiment_by_name(self._experiment)
            if found is not None:
                return str(found.experiment_id)
            return str(self._client.create_experiment(self._experiment, artifact_location=self._artifacts))

    @contextmanager
    def run(self, kind: str, name: str, config: dict[str, Any], tags: dict[str, str]) -> Iterator[Run]:
        """A run that ends FINISHED, or FAILED (KILLED on Ctrl-C) with the exception passed on.

        config: logged whole as config.json, and its leaves as parameters.
        """
        from mlflow.entities import Param

        created = self._client.create_run(
            self._experiment_id(),
            run_name=name,
            tags={key: redact(value) for key, value in {"kind": kind, "mlflow.runName": name, **tags}.items()},
        )
        run = Run(self._client, created.info.run_id)
        status = "FAILED"
        try:
            parameters = [Param(key, value) for key, value in _leaves(config)]
            self._client.log_batch(run.run_id, params=parameters)
            run.artifact("config.json", json.dumps(config, indent=1))
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._client.set_terminated(run.run_id, status)

    def find(self, **tags: str) -> list[FoundRun]:
        """Finished runs with these tags, newest first."""
        wanted = " and ".join([*(f"tags.{key} = '{value}'" for key, value in tags.items()), "status = 'FINISHED'"])
        runs = self._client.search_runs([self._experiment_id()], wanted, order_by=["attributes.start_time DESC"])
        return [FoundRun(run_id=r.info.run_id, name=r.info.run_name, tags=dict(r.data.tags)) for r in runs]

    def spent(self, run_id: str) -> tuple[float, dict[str, float]] | None:
        """Seconds from begin to end of a run, and its last figures; None where it is gone or has not ended."""
        try:
            with known_error(f"run {run_id}"):
                found = self._client.get_run(run_id)
        except NotFoundError:
            return None
        if found.info.end_time is None:
            return None
        return (found.info.end_time - found.info.start_time) / 1000, dict(found.data.metrics)

    def curve(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of a figure that a run logged, in order; empty where it did not."""
        points = self._client.get_metric_history(run_id, name.replace("@", "_at_"))
        return sorted((int(point.step), float(point.value)) for point in points)

    def artifacts(self, names: frozenset[str]) -> Iterator[tuple[str, str]]:
        """(run id, file name) of every run's artifacts of these names; deleted and failed runs too."""
        from mlflow.entities import ViewType

        token = None
        with known_error(f"the artifacts of MLflow at {self.uri}"):
            while True:
                page = self._client.search_runs(
                    [self._experiment_id()], run_view_type=ViewType.ALL, max_results=500, page_token=token
                )
                for run in page:
                    for each in self._client.list_artifacts(run.info.run_id):
                        if each.path in names:
                            yield run.info.run_id, each.path
                token = page.token
                if not token:
                    return

    def read_bytes(self, run_id: str, name: str) -> bytes:
        """An artifact of a run as it is."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, name, folder)).read_bytes()

    def replace_artifact(self, run_id: str, name: str, data: bytes) -> None:
        """Put another file in the place of an artifact; on a local disk a reader sees the one or the other."""
        where = str(self._client.get_run(run_id).info.artifact_uri)
        if where.startswith(("file:", "/")):
            write_file(Path(urllib.parse.unquote(where.removeprefix("file://"))) / name, data)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_bytes(data)
            self._client.log_artifact(run_id, str(Path(folder) / name))

    def read_json(self, run_id: str, name: str) -> Any:
        """A JSON artifact of a run."""
        return json.loads(self.read_bytes(run_id, name))

    def read_table(self, run_id: str, name: str) -> pa.Table:
        """A Parquet artifact of a run."""
        with tempfile.TemporaryDirectory() as folder:
            return pq.read_table(self._client.download_artifacts(run_id, name, folder))


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", redact(str(value))[:500]
