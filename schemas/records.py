"""The frozen records that describe what lies in the store. Each is one small JSON file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

STORE_FORMAT = 2
Cutoff = Literal["recorded", "unknown"]  # whether the last event of each user that a tower saw lies beside it


class Record(BaseModel):
    """Base: frozen, unknown keys refused, so that a file of a newer store is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    created_at: int  # milliseconds since 1970, UTC; strictly growing among records of one name
    store_format: int = STORE_FORMAT


class Dataset(Record):
    """One prepared, checked and ordered copy of catalog and interactions."""

    name: str
    digest: str  # of the ordered rows: the data version of every figure
    items: int
    users: int
    interactions: int
    quarantined: int
    filtered: dict[str, int]  # reason -> rows
    rows_in: dict[str, int]  # table -> rows read
    carried: int = 0  # items that left the feed and are named by an event; unavailable
    watermark: int  # of both tables: the latest event, milliseconds; the catalog is read before the events
    replaces: tuple[str, ...] = ()  # digests of what it was before users were forgotten


class ItemTower(Record):
    """A tuned Item LLM. One that was imported has no dataset and no split that are known."""

    name: str
    fingerprint: str
    dim: int  # D of its vectors
    output_dtype: str  # of the cached vectors for which ``fingerprint`` was taken
    inputs: str  # hash of everything that decided the weights
    base: str  # the model that it was tuned from
    dataset: str  # digest of the data that it was tuned on
    split: str  # what of that data it saw
    cutoff: Cutoff = "unknown"
    run_id: str
    steps: int
    epochs: int
    items_encoded: int
    items_unique: int
    valid: dict[str, float]


class Snapshot(Record):
    """The immutable map item_id -> key under one fingerprint. Without its file it does not exist."""

    fingerprint: str
    parent: str | None
    content_digest: str  # over fingerprint and sorted (item_id, key, available)
    vectors_digest: str  # over the [N, dim] array in item order
    dim: int
    dtype: str
    items: int
    embedded: int
    reused: int
    removed: int
    quarantined: int
    gates: dict[str, float]  # what the gates measured
    tokens_per_second: float | None  # of the run that made it; None: nothing was embedded
    dataset: str
    code_version: str
    run_id: str


class UserTower(Record):
    """A trained user tower."""

    name: str
    features: str
    inputs: str
    item_fingerprint: str | None  # None: it reads ids only and pairs with any snapshot
    snapshot: str | None  # trained on; a later snapshot of the same fingerprint may serve it
    parent: str | None = None  # the tower whose weights it began with
    dataset: str
    split: str = "leave-last-out"  # whose training part it saw, see ``training_label``
    cutoff: Cutoff = "unknown"
    fingerprint: str
    config: dict[str, Any]
    run_id: str
    steps: int
    positions_per_second: float
    valid: dict[str, float]


class Ranker(Record):
    """A trained ranker: click probabilities of given candidates."""

    name: str
    fusion: str
    features: str
    inputs: str
    item_fingerprint: str | None  # None: it reads ids only
    snapshot: str | None  # trained on; a later snapshot of the same fingerprint may serve it
    parent: str | None = None  # the user tower whose weights it began with
    dataset: str
    split: str
    cutoff: Cutoff
    fingerprint: str
    config: dict[str, Any]
    run_id: str
    steps: int
    examples_per_second: float
    valid: dict[str, float]


class Index(Record):
    """A FAISS index over the available items of one snapshot."""

    kind: str
    snapshot: str | None  # None: the candidates are an ID tower's table
    item_fingerprint: str | None
    user_tower: str | None  # set when the candidates are not the cached vectors themselves
    vectors: int
    dim: int
    bytes: int
    checksum: str
    inputs: str = ""  # hash of vectors, ids, settings and the queries that a setting was chosen by


class UserVectors(Record):
    """The vectors of all users with a known history, made by one user tower over one snapshot."""

    item_fingerprint: str | None  # None: the tower reads ids
    user_tower: str
    user_tower_fingerprint: str
    snapshot: str | None
    dataset: str
    users: int
    dim: int
    dtype: str
    checksum: str  # over users and vectors
    inputs: str  # hash of everything that decided the vectors
    run_id: str


class Release(Record):
    """What serves together; the id is the hash of its inputs, so that the same night ends in the same release."""

    name: str  # of the registered model
    dataset: str  # digest
    item_fingerprint: str | None
    item_tower: str | None  # None: an untuned model, or a tower that reads ids
    snapshot: str | None
    user_tower: str
    index: str
    user_vectors: str
    champion: str | None  # the release that it was compared with
    metrics: dict[str, float]
    gates: list[dict[str, Any]]  # the verdict table
    checksums: dict[str, str]  # part -> digest of its content
    config_hash: str
    code_version: str
    run_id: str
    replaces: tuple[str, ...] = ()  # ids of what it was before users were forgotten


class ForgottenUser(Record):
    """A user who is not taken in again; the id is a hash of the user's."""
