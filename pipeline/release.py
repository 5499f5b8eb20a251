"""Releases: what serves together, as a verified set, and the registry alias by which it is found (DESIGN 10)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ann import IndexConfig
from pipeline.cache import open_snapshot
from pipeline.files import parse_record
from pipeline.index import OpenIndex, open_index
from pipeline.matrix import ItemMatrix
from pipeline.store import Store, open_store
from pipeline.tracking import known_error, open_client
from pipeline.users import open_user_vectors
from schemas.errors import NotFoundError, ReleaseError, StoreError
from schemas.records import Index, Release, Snapshot, UserTower, UserVectors
from user_tower.model import UserTower as UserTowerModel

CHAMPION = "champion"
ARTIFACT = "release.json"
_TAG, _PROMOTED, _WITHDRAWN = "release", "promoted_at", "rolled_back_at"


@dataclass(frozen=True)
class Parts:
    """The records that a release names. snapshot: None for a tower that reads ids."""

    user_tower: UserTower
    snapshot: Snapshot | None
    index: Index
    user_vectors: UserVectors

    def checksums(self) -> dict[str, str]:
        """Part -> digest of its content."""
        found = {
            "user_tower": self.user_tower.fingerprint,
            "index": self.index.checksum,
            "user_vectors": self.user_vectors.checksum,
        }
        if self.snapshot is not None:
            found |= {"snapshot": self.snapshot.content_digest, "vectors": self.snapshot.vectors_digest}
        return found

    def require_match(self) -> None:
        """Raises ReleaseError naming the two parts that do not belong together."""
        tower, snapshot, users = self.user_tower, self.snapshot, self.user_vectors
        item = None if snapshot is None else snapshot.fingerprint
        place = None if snapshot is None else snapshot.id
        if tower.item_fingerprint != item:
            raise ReleaseError(
                f"user tower {tower.id} reads item tower {tower.item_fingerprint}, the snapshot is of {item}"
            )
        if users.user_tower_fingerprint != tower.fingerprint or users.item_fingerprint != item:
            raise ReleaseError(
                f"user vectors {users.id} were made by user tower {users.user_tower}, not by {tower.id}"
            )
        if self.index.snapshot != place or users.snapshot != place:
            raise ReleaseError(f"index {self.index.id} and user vectors {users.id} must be of snapshot {place}")
        if self.index.user_tower not in (None, tower.id):
            raise ReleaseError(f"index {self.index.id} holds candidates of user tower {self.index.user_tower}")


@dataclass(frozen=True)
class OpenRelease:
    """A verified set. matrix: None for a tower that reads ids; users [U] and user_vectors float16 [U, D] by row."""

    record: Release
    store: Store
    tower: UserTowerModel
    matrix: ItemMatrix | None
    index: OpenIndex
    users: list[str]
    user_vectors: NDArray[np.floating]


def find_parts(store: Store, record: Release) -> Parts:
    """The records of a release. Raises NotFoundError when one is gone."""
    return Parts(
        store.get(UserTower, record.user_tower),
        None if record.snapshot is None else store.get(Snapshot, record.snapshot),
        store.get(Index, record.index),
        store.get(UserVectors, record.user_vectors),
    )


def open_parts(store: Store, record: Release) -> OpenRelease:
    """Load every part and check it against the release. Raises ReleaseError, StoreError, NotFoundError."""
    parts = find_parts(store, record)
    parts.require_match()
    for part, digest in parts.checksums().items():
        if record.checksums.get(part) != digest:
            raise ReleaseError(f"release {record.id}: {part} is not what was released ({digest}); roll back")
    tower = UserTowerModel.load(store.folder(parts.user_tower))
    if tower.fingerprint() != parts.user_tower.fingerprint:
        raise ReleaseError(f"release {record.id}: the weights of user tower {parts.user_tower.id} changed; roll back")
    matrix = None if parts.snapshot is None else open_snapshot(store, parts.snapshot)
    users, vectors = open_user_vectors(store, parts.user_vectors)
    index = open_index(store, parts.index, IndexConfig())
    return OpenRelease(record, store, tower, matrix, index, users, vectors)


def open_release(uri: str, tracking_uri: str | None = None) -> OpenRelease:
    """The release that a registry alias or version names, ``models:/NAME@champion`` or ``models:/NAME/3``, or the
    folder of one in a store; read whole and checked.

    tracking_uri: of the registry; by default MLFLOW_TRACKING_URI. Raises NotFoundError, ReleaseError, StoreError.
    An alias that moves meanwhile is followed: what it named before may be taken away then (``hllm forget-user``).
    """
    if not uri.startswith("models:/"):
        folder = Path(uri)
        store = open_store(str(folder.parent.parent))
        return open_parts(store, store.get(Release, folder.name))
    name = uri.removeprefix("models:/")
    client = open_client(tracking_uri)
    version = _version(client, name)
    while True:
        try:
            return _open_version(client, uri, version)
        except (NotFoundError, ReleaseError, StoreError):
            before, version = version, _version(client, name)
            if version.version == before.version:
                raise


def _version(client: Any, name: str) -> Any:
    """The model version of ``NAME@alias`` or ``NAME/3``. Raises NotFoundError, TrackingError."""
    with known_error(f"models:/{name} in the registry"):
        if "@" in name:
            return client.get_model_version_by_alias(*name.split("@", 1))
        return client.get_model_version(*name.split("/", 1))


def _open_version(client: Any, uri: str, version: Any) -> OpenRelease:
    with known_error(f"{uri} in the registry"), tempfile.TemporaryDirectory() as aside:
        found = json.loads(Path(client.download_artifacts(version.run_id, ARTIFACT, aside)).read_text())
    record = parse_record(json.dumps(found["release"]).encode(), f"{uri}: {ARTIFACT}", Release)
    store = open_store(found["store"])
    if store.get(Release, record.id) != record:
        raise ReleaseError(f"{uri}: release {record.id} in {store} is another one than the registry's; roll back")
    return open_parts(store, record)


def describe(store: Store, record: Release) -> str:
    """The artifact behind a model version: where the store is, and the whole record."""
    return json.dumps({"store": store.url, "release": record.model_dump(mode="json")}, indent=1)


class Registry:
    """The versions of one registered model: each is a release, and an alias says which one serves."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self.name = client, name

    def _versions(self) -> list[Any]:
        with known_error(f"model {self.name} in the registry"):
            return list(self._client.search_model_versions(f"name='{self.name}'"))

    def releases(self) -> list[dict[str, Any]]:
        """Version, release id, when it was promoted and rolled back (milliseconds, None: never), oldest first."""
        rows = [
            {
                "version": int(each.version),
                "release": each.tags.get(_TAG),
                _PROMOTED: each.tags.get(_PROMOTED),
                _WITHDRAWN: each.tags.get(_WITHDRAWN),
            }
            for each in self._versions()
        ]
        return sorted(rows, key=lambda row: int(str(row["version"])))

    def find(self, release: str) -> dict[str, Any] | None:
        """The version of a release, or None."""
        return next((row for row in self.releases() if row["release"] == release), None)

    def champion(self) -> str | None:
        """The release that serves, or None."""
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_model_version_by_alias(self.name, CHAMPION)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            with known_error(f"model {self.name} in the registry"):
                raise
        found: str = version.tags[_TAG]
        return found

    def register(self, release: Release) -> int:
        """The model version of a release, made once. Its run holds the artifact. Raises TrackingError."""
        known = self.find(release.id)
        if known is not None:
            return int(known["version"])
        from mlflow.exceptions import MlflowException

        with known_error(f"model {self.name} in the registry"):
            try:
                self._client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"runs:/{release.run_id}/{ARTIFACT}"
            made = self._client.create_model_version(
                self.name, source, run_id=release.run_id, tags={_TAG: release.id}
            )
        return int(made.version)

    def promote(self, release: str, expected: str | None) -> None:
        """Move the alias in one call, when the champion is still the expected one; checked again after it.

        Raises NotFoundError, ReleaseError.
        """
        target = self.find(release)
        if target is None:
            raise NotFoundError(f"no version of model {self.name} is release {release}; see `hllm releases list`")
        before = self.champion()
        if before not in (expected, release):
            raise ReleaseError(
                f"the champion is {before}, not {expected}: somebody else promoted; look, then try again"
            )
        version = str(target["version"])
        with known_error(f"model {self.name} in the registry"):
            self._client.set_registered_model_alias(self.name, CHAMPION, version)
            self._client.set_model_version_tag(self.name, version, _PROMOTED, _now())
        after = self.champion()
        if after != release:
            raise ReleaseError(f"the champion is {after} right after {release} was promoted; somebody else promoted")

    def replace(self, old: str, new: Release) -> None:
        """Put a release in the place of another one: the alias and the times go over, then the old version goes.

        Can be repeated after a kill at any moment. Raises ReleaseError, TrackingError.
        """
        known = self.find(old)
        if known is None:  # never registered, or replaced before
            return
        version = str(self.register(new))
        if self.champion() == old:
            self.promote(new.id, old)
        with known_error(f"model {self.name} in the registry"):
            for tag in (_PROMOTED, _WITHDRAWN):
                if known[tag]:
                    self._client.set_model_version_tag(self.name, version, tag, known[tag])
            self._client.delete_model_version(self.name, str(known["version"]))

    def withdraw(self, release: str) -> None:
        """Remember that a release was rolled back, so that no refresh promotes it again by itself."""
        target = self.find(release)
        if target is not None:
            with known_error(f"model {self.name} in the registry"):
                self._client.set_model_version_tag(self.name, str(target["version"]), _WITHDRAWN, _now())


def _now() -> str:
    return str(time.time_ns() // 1_000_000)


def current_release(store: Store, release: str) -> Release:
    """The release of that id, or what stands for it since users were forgotten. Raises NotFoundError."""
    found = [record for record in store.all(Release) if release in record.replaces]
    return found[-1] if found else store.get(Release, release)


def serving_now(store: Store, registry: Registry) -> list[Release]:
    """The champion and the release before it, which are never collected."""
    found: list[Release] = []
    wanted = registry.champion()
    for _ in range(2):
        if wanted is None:
            break
        record = current_release(store, wanted)
        found.append(record)
        wanted = record.champion
    return found


def rejected_towers(store: Store, registry: Callable[[], Registry]) -> set[str]:
    """User towers that were released and never served, or were rolled back: no night builds on one of them.

    Nothing is asked where there is no release.
    """
    if not store.all(Release):
        return set()
    own = registry()
    served = {row["release"] for row in own.releases() if row[_PROMOTED] and not row[_WITHDRAWN]} | {own.champion()}
    releases = store.all(Release, name=own.name)
    return {each.user_tower for each in releases} - {each.user_tower for each in releases if each.id in served}


def kept_ids(store: Store, registry: Callable[[], Registry]) -> set[str]:
    """Ids of every record that the champion and its parent name; nothing is asked where there is no release."""
    if not store.all(Release):
        return set()
    named: set[str | None] = set()
    for record in serving_now(store, registry()):
        named |= {record.snapshot, record.index, record.user_vectors, record.user_tower, record.item_tower, record.id}
    return {each for each in named if each is not None}
