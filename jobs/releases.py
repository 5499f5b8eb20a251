"""releases list | show | promote | rollback: what was released, and which of it serves (DESIGN 10)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.context import Context
from pipeline.files import exclusive
from pipeline.release import current_release, find_parts, open_parts
from schemas.errors import ConfigError, ReleaseError
from schemas.records import Release


@contextmanager
def alone(context: Context) -> Iterator[None]:
    """Keep refreshes of a local store away while the block runs. Raises ReleaseError where one is running."""
    if "://" in context.store.url:
        yield
        return
    with exclusive(context.store.root / ".refresh.lock") as ours:
        if not ours:
            raise ReleaseError("a refresh of this store is running, it may promote; wait for it, then try again")
        yield


def _one(context: Context, release: str | None, action: str) -> Release:
    if release is None:
        raise ConfigError(f"releases {action}: name one with --release; `hllm releases list` names all")
    return context.store.get(Release, release)


def run(context: Context, action: str, release: str | None) -> dict[str, Any]:
    """show reads and checks every part. rollback moves the alias to the release before the champion.

    Raises ConfigError, NotFoundError, ReleaseError, StoreError, TrackingError.
    """
    if release is not None and action not in ("show", "promote"):
        raise ConfigError(
            f"releases {action} takes no --release: rollback goes to the release before the champion, "
            f"`releases promote --release {release}` to another one"
        )
    registry, store = context.registry, context.store
    if action == "show":
        record = _one(context, release or registry.champion(), action)
        found = open_parts(store, record)
        return {"releases": [record.model_dump()], "champion": registry.champion(), "users": len(found.users)}
    if action == "promote":
        record = _one(context, release, action)
        with alone(context):
            find_parts(store, record).require_match()
            registry.promote(record.id, registry.champion())
    if action == "rollback":
        with alone(context):
            current = _one(context, registry.champion(), "rollback: there is no champion,")
            if current.champion is None:
                raise ReleaseError(f"release {current.id} is the first one; there is none before it")
            before = current_release(store, current.champion)
            find_parts(store, before).require_match()
            registry.withdraw(current.id)
            registry.promote(before.id, current.id)
    champion = registry.champion()
    versions = {row["release"]: row for row in registry.releases()}
    rows = [
        {
            "release": record.id,
            "made_at": record.created_at,
            "snapshot": record.snapshot,
            "user_tower": record.user_tower,
            "before": record.champion,
            "serves": record.id == champion,
            **{key: versions.get(record.id, {}).get(key) for key in ("version", "promoted_at", "rolled_back_at")},
        }
        for record in store.all(Release, name=registry.name)
    ]
    return {"releases": rows, "champion": champion}
