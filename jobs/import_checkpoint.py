"""import-checkpoint: both towers out of a checkpoint of the paper's own code. What they were tuned on is unknown."""

from __future__ import annotations

from typing import Any

from item_tower.encoder import ItemEncoder
from item_tower.fingerprint import fingerprint
from jobs.context import Context, inputs_hash
from pipeline.files import next_created_at, record_id, write_record
from pipeline.official import import_towers
from pipeline.store import IMPORTED
from schemas.records import ItemTower, UserTower
from user_tower.model import UserTower as UserTowerModel

_UNKNOWN = "unknown"  # the data, the split and the events that made the weights


def run(context: Context) -> dict[str, Any]:
    """Read, convert, publish an item tower called ``imported`` and a user tower of the configured name; what is
    already the newest of its name is left as it is.

    Raises ConfigError, DataError, StoreError.
    """
    config, store = context.config, context.store
    encoder, tower = import_towers(config.checkpoint, config.encoder, config.template, config.user_tower)
    made = fingerprint(encoder, config.embed.output_dtype)
    user_inputs = inputs_hash("import-checkpoint", made, tower.fingerprint())
    items = store.newest(ItemTower, name=IMPORTED)
    users = store.newest(UserTower, name=config.name)
    known_items = items if items is not None and items.fingerprint == made else None
    known_users = users if users is not None and users.inputs == user_inputs else None
    if known_items is None or known_users is None:
        sections = context.settings("name", "checkpoint", "encoder", "template", "user_tower", "embed")
        with context.tracker.run("import-checkpoint", config.name, sections, {"inputs": user_inputs}) as run:
            known_items = known_items or _publish_items(context, encoder, made, run.run_id)
            known_users = known_users or _publish_users(context, tower, made, user_inputs, run.run_id)
            run.tags({"item_tower": known_items.id, "user_tower": known_users.id, "fingerprint": made})
    return {
        "run_id": known_users.run_id,
        "item_tower": known_items.id,
        "user_tower": known_users.id,
        "name": known_users.name,
        "fingerprint": made,
        "dim": known_items.dim,
        "weights": config.checkpoint.weights,
        "cutoff": known_items.cutoff,
        "reused": known_items is items and known_users is users,
    }


def _publish_items(context: Context, encoder: ItemEncoder, made: str, run_id: str) -> ItemTower:
    created_at = next_created_at(context.store.all(ItemTower, name=IMPORTED))
    record = ItemTower(
        id=record_id(created_at, made),
        created_at=created_at,
        name=IMPORTED,
        fingerprint=made,
        dim=encoder.dim,
        output_dtype=context.config.embed.output_dtype,
        inputs=inputs_hash("import-checkpoint", made),
        base=context.config.encoder.model,
        dataset=_UNKNOWN,
        split=_UNKNOWN,
        run_id=run_id,
        steps=0,
        epochs=0,
        items_encoded=0,
        items_unique=0,
        valid={},
    )
    with context.store.new(ItemTower, record.id) as folder:
        encoder.save(folder)
        write_record(folder, record)
    return record


def _publish_users(context: Context, tower: UserTowerModel, made: str, inputs: str, run_id: str) -> UserTower:
    name, own = context.config.name, tower.fingerprint()
    created_at = next_created_at(context.store.all(UserTower, name=name))
    record = UserTower(
        id=record_id(created_at, own),
        created_at=created_at,
        name=name,
        features=tower.config.features,
        inputs=inputs,
        item_fingerprint=made,
        snapshot=None,
        dataset=_UNKNOWN,
        split=_UNKNOWN,
        fingerprint=own,
        config=tower.config.model_dump(mode="json"),
        run_id=run_id,
        steps=0,
        positions_per_second=0.0,
        valid={},
    )
    with context.store.new(UserTower, record.id) as folder:
        tower.save(folder)
        write_record(folder, record)
    return record
