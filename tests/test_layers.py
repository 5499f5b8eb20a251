"""The walls between the rooms, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("schemas", "item_tower", "user_tower", "pipeline", "jobs")
MAY_IMPORT = {
    "schemas": set(),
    "item_tower": {"schemas"},
    "user_tower": {"schemas"},
    "pipeline": {"schemas", "item_tower", "user_tower"},
    "jobs": {"schemas", "item_tower", "user_tower", "pipeline"},
}
# what both towers do alike with a Hugging Face decoder; all that the user tower may take from the item tower's room
SHARED = "item_tower.decoders"
# heavy or foreign packages, and the files that may import them
KEEPERS = {
    "ray": {"jobs/embed_ray.py"},
    "mlflow": {"pipeline/release.py", "pipeline/tracking.py"},
    "faiss": {"pipeline/ann.py"},
    "deltalake": {"pipeline/embeddings.py"},
    "accelerate": {"user_tower/train.py"},
    "peft": {"user_tower/lora.py"},
    "polars": {
        "pipeline/cache.py",
        "pipeline/cells.py",
        "pipeline/cleanup.py",
        "pipeline/coding.py",
        "pipeline/columns.py",
        "pipeline/dataset.py",
        "pipeline/delimited.py",
        "pipeline/events.py",
        "pipeline/filters.py",
        "pipeline/importers.py",
        "pipeline/ingest.py",
        "pipeline/intake.py",
        "pipeline/items.py",
        "pipeline/matrix.py",
        "pipeline/profile.py",
        "pipeline/readers.py",
        "pipeline/text_order.py",
        "pipeline/vocabulary.py",
    },
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too; not those of SHARED."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if not f"{node.module}.".startswith(f"{SHARED}."):
                names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path):
    room = path.relative_to(ROOT).parts[0]
    forbidden = set(ROOMS) - MAY_IMPORT[room] - {room}
    assert not imported(path) & forbidden


def test_what_the_towers_share_knows_no_room_but_schemas():
    for path in (ROOT / "item_tower" / "decoders").glob("*.py"):
        assert imported(path) & set(ROOMS) <= {"schemas"}, path


@pytest.mark.parametrize("package", KEEPERS)
def test_heavy_packages_stay_in_the_files_named_here(package):
    users = {str(path.relative_to(ROOT)) for path in SOURCES if package in imported(path)}
    assert users == KEEPERS[package]


def test_every_room_says_what_it_is_for():
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert "May import" in text, room


def test_column_names_are_literals_in_one_file_only():
    """schemas/tables.py is their home; words that also are other things are not looked for."""
    names = {"item_id", "user_id", "n_tokens", "created_at", "updated_at", "available"}
    for path in SOURCES:
        if path.name in ("tables.py", "records.py"):
            continue
        literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        found = {value for value in literals if isinstance(value, str)} & names
        assert not found, path
