"""What every job starts from: configuration, store, tracker, and the item tower in force."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from item_tower.decoders.precision import default_device
from item_tower.encoder import EncoderConfig, ItemEncoder, read_settings
from item_tower.fingerprint import fingerprint
from item_tower.prompt import TemplateConfig
from jobs.config import Config
from pipeline.cache import open_snapshot, require_fingerprint
from pipeline.dataset import OpenDataset, open_dataset
from pipeline.files import exclusive
from pipeline.release import Registry, kept_ids, rejected_towers
from pipeline.store import Store, open_store
from pipeline.tracking import Tracker
from schemas.hashing import Digest
from schemas.records import Dataset, ItemTower, Snapshot, UserTower
from user_tower.model import Catalog
from user_tower.model import UserTower as UserTowerModel


def code_version() -> str:
    """The package's version and, in a git checkout, the commit."""
    try:
        number = version("hllm-pipeline")
    except PackageNotFoundError:
        number = "unpackaged"
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return number
    return f"{number}+{done.stdout.strip()}" if done.returncode == 0 else number


def inputs_hash(*parts: str | BaseModel | None) -> str:
    """One hash of everything that decides an output: texts, and settings as JSON."""
    digest = Digest()
    for part in parts:
        digest.add(json.dumps(part.model_dump(mode="json") if isinstance(part, BaseModel) else part))
    return digest.hexdigest()


@contextmanager
def checkpoint_folder(store: Store, inputs: str) -> Iterator[Path]:
    """Where a training keeps its checkpoints: where a killed one of the same inputs left them; while another process
    is at the same training a temporary folder, since two writers would mix theirs; a line on stderr says so."""
    place = store.root / "checkpoints" / inputs
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun: these processes write together
        yield place
        return
    lock = place.with_name(f"{inputs}.lock")
    with exclusive(lock) as ours, tempfile.TemporaryDirectory() as aside:
        if not ours:
            print(f"another process is at this training and holds {lock}: this one begins anew", file=sys.stderr)
        yield place if ours else Path(aside)
        if ours:
            lock.unlink(missing_ok=True)


@dataclass(frozen=True)
class TowerInForce:
    """The item tower in force: what it is and how it reads. record: of a tuned one, None for the untuned one."""

    fingerprint: str
    encoder: EncoderConfig
    template: TemplateConfig
    dim: int
    record: ItemTower | None

    def folder(self, store: Store) -> Path | None:
        """Where the files of a tuned one lie."""
        return None if self.record is None else store.folder(self.record)


@dataclass(frozen=True)
class ServingTower:
    """A user tower bound to the catalog that it scores: the items of one snapshot, or of the data set (ids).

    item_ids, available: N, by catalog row; snapshot: None for a tower that reads ids.
    """

    record: UserTower
    tower: UserTowerModel
    catalog: Catalog
    item_ids: list[str]
    available: NDArray[np.bool_]
    snapshot: Snapshot | None


class Context:
    """One command's surroundings."""

    def __init__(self, config: Config, dataset: Dataset | None = None) -> None:
        """dataset: in place of the newest of the configured name."""
        self.config = config
        self.store = open_store(config.store)
        self._dataset = dataset

    @cached_property
    def tracker(self) -> Tracker:
        """MLflow, opened when first needed."""
        return Tracker(self.config.tracking, self.store.root)

    @cached_property
    def registry(self) -> Registry:
        """The registered model of the configuration."""
        return Registry(self.tracker.client, self.config.refresh.model)

    def kept_ids(self) -> frozenset[str]:
        """What no clean-up takes: everything that the champion and its parent name."""
        return frozenset(kept_ids(self.store, lambda: self.registry))

    def rejected_towers(self) -> set[str]:
        """User towers whose releases were all held or rolled back."""
        return rejected_towers(self.store, lambda: self.registry)

    @cached_property
    def code(self) -> str:
        """See ``code_version``."""
        return code_version()

    @cached_property
    def dataset_record(self) -> Dataset:
        """The newest prepared data set of the configured name. Raises NotFoundError."""
        return self._dataset or self.store.require(Dataset, name=self.config.data.name)

    def dataset_or_none(self) -> Dataset | None:
        """``dataset_record``, None where there is none."""
        return self._dataset or self.store.newest(Dataset, name=self.config.data.name)

    @cached_property
    def dataset(self) -> OpenDataset:
        """That data set, opened. Raises NotFoundError, StoreError."""
        return open_dataset(self.store, self.dataset_record)

    def item_tower_record(self) -> ItemTower | None:
        """The tuned or imported tower in force, None for the untuned one. Raises NotFoundError."""
        use = self.config.item_tower.use
        if use == "base":
            return None
        if use in ("tuned", "imported"):
            return self.store.require(ItemTower, name=use)
        return self.store.get(ItemTower, use)

    def item_fingerprint(self) -> str:
        """Fingerprint of the item tower in force, its weights read only where no record tells it."""
        return self.item_tower().fingerprint

    def item_tower(self) -> TowerInForce:
        """What the item tower in force is. A tuned one is told by its record; who loads it checks it.

        Raises NotFoundError, ConfigError, StoreError.
        """
        record = self.item_tower_record()
        output_dtype = self.config.embed.output_dtype
        if record is None:
            # under either policy for items without text the same tower: it decides no vector
            template = self.config.template.model_copy(update={"empty_text": "error"})
            encoder = ItemEncoder.from_config(self.config.encoder, template)
            return TowerInForce(
                fingerprint(encoder, output_dtype), encoder.config, encoder.template, encoder.dim, None
            )
        folder = self.store.folder(record)
        settings, template = read_settings(folder)
        found = record.fingerprint
        if output_dtype != record.output_dtype:
            found = fingerprint(ItemEncoder.load(folder), output_dtype)
        return TowerInForce(found, settings, template, record.dim, record)

    def item_towers(self, snapshot: Snapshot) -> list[ItemTower]:
        """The tuned towers whose vectors a snapshot holds, oldest first; none for an untuned model.

        One that was published for another output dtype has another fingerprint there: its weights are read.
        """
        found = []
        for record in self.store.all(ItemTower):
            own = record.fingerprint
            if record.output_dtype != snapshot.dtype:
                own = fingerprint(ItemEncoder.load(self.store.folder(record)), snapshot.dtype)
            if own == snapshot.fingerprint:
                found.append(record)
        return found

    def snapshot(self, fingerprint: str, reader: str, snapshot_id: str | None) -> Snapshot:
        """The named snapshot, or the newest one of that item tower.

        Raises NotFoundError; FingerprintMismatchError when the named one belongs to another item tower.
        """
        if snapshot_id is None:
            return self.store.require(Snapshot, fingerprint=fingerprint)
        chosen = self.store.get(Snapshot, snapshot_id)
        require_fingerprint(chosen, fingerprint, reader)
        return chosen

    def serving_tower(self, snapshot_id: str | None, tower_id: str | None = None) -> ServingTower:
        """A user tower, by default the newest of the configured name, over a snapshot of its item tower.

        Raises NotFoundError, FingerprintMismatchError, StoreError.
        """
        if tower_id is not None:
            record = self.store.get(UserTower, tower_id)
        else:
            record = self.store.require(UserTower, name=self.config.name)
        tower = UserTowerModel.load(self.store.folder(record)).to(default_device())
        if record.item_fingerprint is None:
            item_ids, available = self.dataset.item_ids, self.dataset.available
            catalog = tower.catalog(item_ids, None, np.arange(len(item_ids)))
            return ServingTower(record, tower, catalog, item_ids, available, None)
        reader = f"user tower {record.id} ({record.name})"
        chosen = self.snapshot(record.item_fingerprint, reader, snapshot_id)
        matrix = open_snapshot(self.store, chosen)
        catalog = tower.catalog(matrix.item_ids, matrix.vectors, matrix.groups)
        return ServingTower(record, tower, catalog, matrix.item_ids, matrix.available, chosen)

    def titles(self) -> dict[str, str]:
        """What to print for each item: its first template field, or its id where that is empty."""
        ids = self.dataset.item_ids
        field = self.config.template.fields[0]
        if field not in self.dataset.items.column_names:
            return dict(zip(ids, ids, strict=True))
        texts = self.dataset.items.column(field).to_pylist()
        return {item_id: str(text) if text else item_id for item_id, text in zip(ids, texts, strict=True)}

    def settings(self, *sections: str) -> dict[str, Any]:
        """Some sections of the configuration as plain values, for the run's record."""
        return self.config.model_dump(mode="json", include=set(sections))
