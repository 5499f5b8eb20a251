"""EIO and ENOSPC wherever a night reads or writes: no success unless all reads back, and the next one goes on."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from night import TOWER, night, vector

from pipeline.cache import open_snapshot
from pipeline.files import disk_broken, disk_full
from pipeline.store import Store
from schemas.errors import PipelineError
from schemas.records import Snapshot

NIGHT = Path(__file__).with_name("night.py")
TEXTS = [f"t{n}" for n in range(50)]
NUMBERS = [errno.EIO, pytest.param(errno.ENOSPC, marks=pytest.mark.slow)]
PLACES: list[Any] = [
    (os, "fsync"),
    (os, "pwrite"),
    (os, "posix_fallocate"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (io, "open"),
    pytest.param(os, "open", marks=pytest.mark.slow),
    (pq, "write_table"),
    (pq, "ParquetFile"),
]


def failing(call: Callable[..., Any], at: int, number: int, seen: list[int]) -> Callable[..., Any]:
    """``call``, whose ``at``-th time raises; counts all of them."""

    def instead(*values: Any, **named: Any) -> Any:
        seen.append(1)
        if len(seen) == at:
            named_file = next((str(value) for value in values if isinstance(value, str | Path)), None)
            raise OSError(number, os.strerror(number), named_file)
        return call(*values, **named)

    return instead


def rows_of(store: Store) -> int:
    return sum(file.rows for file in store.embeddings.files(TOWER))


def check(store: Store) -> None:
    """Every visible snapshot is whole and right."""
    shutil.rmtree(store.matrices, ignore_errors=True)
    for record in store.all(Snapshot):
        opened = open_snapshot(store, record)
        assert np.array_equal(opened.vectors, np.stack([vector(text) for text in opened.item_ids]))


def go_on(store: Store) -> None:
    """The next night: embeds what is not committed, and publishes the one snapshot of this content."""
    committed, published = rows_of(store), store.all(Snapshot)
    check(store)
    record = night(store, "next", TEXTS)
    assert published in ([], [record])
    if not published:
        assert record.embedded == len(TEXTS) - committed
    assert rows_of(store) == len(TEXTS)
    assert len(store.all(Snapshot)) == 1
    assert [path.name for path in store.root.glob("*/.*") if "wanted" not in path.name] == []
    check(store)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize(("module", "name"), PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_a_failing_call_ends_the_night_and_the_next_one_goes_on(tmp_path, monkeypatch, module, name, number):
    """Each call in its turn, until a night makes fewer of them."""
    failures = 0
    for at in range(1, 200):
        store, seen, error = Store(tmp_path / str(at) / "store"), [], None
        store.root.mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), at, number, seen))
            try:
                night(store, "broken", TEXTS)
            except (PipelineError, OSError) as caught:
                error = caught
        if len(seen) < at:
            assert error is None
            break
        failures += error is not None
        if error is None:
            assert len(store.all(Snapshot)) == 1
        elif not isinstance(error, PipelineError):
            known = disk_broken(error) if number == errno.EIO else disk_full(error)
            assert known is not None
            in_memory = name == "write_table"  # a worker's file, before it is written
            assert number != errno.EIO or in_memory or str(tmp_path) in str(known)
        go_on(store)
        shutil.rmtree(store.root)
    assert failures > 0


def test_an_input_output_error_is_found_inside_what_libraries_raise():
    rust = RuntimeError(
        "Kernel error: Generic LocalFileSystem error:\n /x/1.json: Input/output error (os error 5)\n 0: x"
    )
    assert "/x/1.json" in str(disk_broken(rust))
    wrapped = ValueError("task failed")
    wrapped.__cause__ = OSError(errno.EIO, "Input/output error", "/x/2")
    assert str(disk_broken(wrapped)).startswith("/x/2: the disk reports")
    assert disk_broken(ValueError("something else")) is None


def traced(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One night as a process of its own, some of its system calls failing."""
    command = ["strace", "-f", "-qq", "-o", str(folder / "trace"), *options]
    night_ = [sys.executable, str(NIGHT), str(folder / "store"), "traced", *TEXTS]
    root = str(NIGHT.parent.parent)
    return subprocess.run(
        [*command, *night_], capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": root}
    )


@pytest.fixture
def strace(tmp_path) -> None:
    if shutil.which("strace") is None or traced(tmp_path, "-e", "trace=fsync").returncode:
        pytest.skip("no strace here")
    shutil.rmtree(tmp_path / "store")


# the log's entries are written by Delta, in Rust: no Python function can fail in their place
INJECTIONS = [
    *[("linkat", when, None) for when in range(1, 6)],
    *[("fsync", when, None) for when in (1, 2, 3, 5, 8, 13, 21)],
    ("fallocate", 1, None),
    ("pwrite64", 1, "matrices"),
    ("rename", 1, None),
    ("rename", 2, None),
    *[("write", 1, f"item_embeddings/_delta_log/{version:020}.json#1") for version in range(5)],
    *[("openat", 1, f"item_embeddings/_delta_log/{version:020}.json") for version in range(5)],
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", ["EIO", "ENOSPC"])
def test_a_failing_system_call_ends_the_night_and_the_next_one_goes_on(tmp_path, strace, number):
    failed = 0
    for call, when, path in INJECTIONS:
        options = ["-e", f"trace={call}", "-e", f"inject={call}:error={number}:when={when}"]
        if path is not None and path != "matrices":
            options += ["-P", str(tmp_path / "store" / path)]
        done = traced(tmp_path, *options)
        store = Store(tmp_path / "store")
        if done.returncode == 0:
            assert len(store.all(Snapshot)) == 1
        else:
            failed += 1
            words = os.strerror(getattr(errno, number))
            assert words in done.stderr, (call, when, path, done.stderr[-2000:])
        go_on(store)
        shutil.rmtree(store.root)
    assert failed > len(INJECTIONS) // 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_that_cannot_be_read_is_named(tmp_path, strace):
    """EIO of every file that the next night reads, one by one."""
    store = Store(tmp_path / "store")
    night(store, "one", TEXTS[:30])
    files = [*store.root.glob("item_embeddings/*/*.parquet"), *store.root.glob("item_embeddings/*/*.json")]
    files += store.root.glob("snapshots/[!.]*/record.json")
    whole = tmp_path / "whole"
    shutil.copytree(store.root, whole)
    for file in files:
        done = traced(tmp_path, "-e", "trace=read,pread64", "-P", str(file), "-e", "inject=read,pread64:error=EIO")
        assert done.returncode == 1, file
        last = done.stderr.strip().splitlines()[-1]
        assert "Input/output error" in done.stderr or re.search("damaged|cannot be read", last), last
        assert len(store.all(Snapshot)) == 1
        committed = rows_of(store)
        assert night(store, "next", TEXTS).embedded == len(TEXTS) - committed
        check(store)
        shutil.rmtree(store.root)
        shutil.copytree(whole, store.root)


@pytest.mark.slow
def test_fsync_of_data_log_and_folders_comes_before_success_is_printed(tmp_path, strace):
    done = traced(tmp_path, "-y", "-e", "trace=fsync,fdatasync,linkat,rename,write")
    assert done.returncode == 0
    lines = (tmp_path / "trace").read_text().splitlines()
    store = Store(tmp_path / "store")
    (record,) = store.all(Snapshot)
    printed = next(n for n, line in enumerate(lines) if re.search(rf' write\(1<.*"{record.id}', line))
    parts = [file for file in (tmp_path / "store").rglob("*") if file.suffix in (".parquet", ".json")]
    wanted = [str(part) for part in parts if record.id not in part.parts]
    wanted += [str(part) for part in {part.parent for part in parts if record.id not in part.parts}]
    wanted += [str(store.root / "item_embeddings"), str(store.root / "snapshots"), str(store.root)]
    synced = [re.search(r" f(?:data)?sync\(\d+<(.*?)>", line) for line in lines[:printed]]
    names = [found.group(1) for found in synced if found]
    assert [path for path in wanted if path not in names] == []
    aside = str(store.root / "snapshots" / f".{record.id}.")
    for file in ("items.parquet", "quarantine.parquet", "record.json"):
        assert any(name.startswith(aside) and name.endswith(f"/{file}") for name in names)
    # its folder gets its name after that, and the name is flushed
    (named,) = [n for n, line in enumerate(lines) if " rename(" in line and line.endswith(f'/{record.id}") = 0')]
    assert all(aside not in line for line in lines[named + 1 : printed] if "fsync" in line)
    assert any(re.search(rf"fsync\(\d+<{store.root}/snapshots>", line) for line in lines[named:printed])
