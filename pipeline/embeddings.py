"""The table of all item vectors: (fingerprint, key) -> embedding (DESIGN 6).

Parquet files under a Delta log, append-only. Keys are passed as uint64 [N, 2], the two halves of the 16 bytes.
Every file is a partition value of its own (column ``file``), so that exactly the named files can be replaced; it
begins with the number of the commit that brought the rows. Of several rows of one key the first in that order counts,
for readers and clean-ups alike, so that no later commit changes what a published snapshot reads, whatever the clocks.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction
from numpy.typing import NDArray

from pipeline.cells import decode_keys
from pipeline.files import UNREADABLE, Folder, Listed, disk_broken, disk_full, on_threads
from schemas import tables
from schemas.errors import DataError, StoreError, first_line, one_line
from schemas.records import STORE_FORMAT

_FORMAT_KEY = "hllm.store_format"
_PARTITIONS = [tables.FINGERPRINT, tables.FILE]
_LOG = "_delta_log/"
_OF = f"partition.{tables.FINGERPRINT}"
_COMMIT_KEY = "hllm.commit"
_ATTEMPTS = 50  # to commit between the commits of others
_BATCH_ROWS = 8_192
_HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


@dataclass(frozen=True)
class EmbeddingFile:
    """One committed file. name: unique in the table; commit: number of the one that brought its rows, 0 in tables of
    before; path: in ``folder``; size: bytes; written_at: milliseconds."""

    name: str
    commit: int
    path: PurePosixPath
    rows: int
    size: int
    written_at: int
    folder: Folder

    def __str__(self) -> str:
        return f"{self.folder}/{self.path}"


class EmbeddingTable:
    """The table in one folder. It need not exist yet; the first commit makes it."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def _log(self) -> tuple[list[Listed], list[str]]:
        """What Delta reads: entries after the newest checkpoint (and always the newest one), and the checkpoint."""
        listed = self.folder.below(_LOG)
        entries = [each for each in listed if re.fullmatch(_LOG + r"\d{20}\.json", each.name)]
        checkpoints = [each.name for each in listed if re.fullmatch(_LOG + r"\d{20}\.checkpoint[^#]*", each.name)]
        newest = checkpoints[-1:]
        after = [each for each in entries[:-1] if not newest or each.name[:-5] > newest[0]]
        return after + entries[-1:], newest

    def _open(self) -> DeltaTable | None:
        entries, _ = self._log()
        if not entries:
            return None
        _check_log(self.folder, entries)
        try:
            table = DeltaTable(str(self.folder))
            found = table.metadata().configuration.get(_FORMAT_KEY)
        except (DeltaError, OSError) as error:
            raise StoreError(
                f"{self.folder}: its log cannot be read: {one_line(error)}; restore it (a damaged checkpoint may "
                f"be removed together with _last_checkpoint while every entry of the log is there)"
            ) from error
        if found != str(STORE_FORMAT):
            raise StoreError(
                f"{self.folder} has store format {found}, this version reads {STORE_FORMAT}; "
                f"use the version that wrote it, or another store"
            )
        return table

    def version(self) -> int:
        """Number of the newest commit; -1 while there is no table."""
        table = self._open()
        return -1 if table is None else int(table.version())

    def fingerprints(self) -> list[str]:
        """Of the item towers that have vectors here, sorted."""
        table = self._open()
        if table is None:
            return []
        return sorted({action[_OF] for action in self._actions(table)})

    def files(self, fingerprint: str) -> list[EmbeddingFile]:
        """The committed files of one item tower, in the order of their commits: of two rows the first counts."""
        table = self._open()
        if table is None:
            return []
        found = [
            EmbeddingFile(
                name=action[f"partition.{tables.FILE}"],
                commit=_commit_of(action[f"partition.{tables.FILE}"]),
                path=PurePosixPath(action["path"]),
                rows=action["num_records"],
                size=action["size_bytes"],
                written_at=action["modification_time"],
                folder=self.folder,
            )
            for action in self._actions(table)
            if action[_OF] == fingerprint
        ]
        return sorted(found, key=lambda file: (file.commit, file.written_at, file.name))

    def _actions(self, table: DeltaTable) -> list[dict[str, Any]]:
        """The committed files as the log describes them, each under the item tower whose folder it lies in."""
        found: list[dict[str, Any]] = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        for action in found:
            if not action["path"].startswith(f"{tables.FINGERPRINT}={action[_OF]}/"):
                raise StoreError(
                    f"{self.folder}: its log names {action['path']} for item tower {action[_OF]}: it is damaged; "
                    f"restore {_LOG[:-1]}"
                )
        return found

    def write(self, fingerprint: str, rows: pa.Table) -> dict[str, Any]:
        """Write one Parquet file into the folder, not yet part of the table; called by workers.

        rows: of ``tables.EMBEDDINGS``. Returns path (relative), size and rows, as ``commit`` reads them.
        """
        path = f"{tables.FINGERPRINT}={fingerprint}/part-{uuid.uuid4().hex}.parquet"
        checked = tables.check(rows, tables.EMBEDDINGS, path)
        data = pa.BufferOutputStream()  # vectors do not compress
        pq.write_table(checked, data, write_page_checksum=True, use_dictionary=False, compression="none")
        content = data.getvalue()
        self.folder.create(path, content)
        return {"path": path, "size": content.size, "rows": rows.num_rows}

    def commit(self, fingerprint: str, files: Sequence[dict[str, Any]]) -> None:
        """Make files that workers wrote part of the table, in one transaction, flushed to the disk.

        files: as ``write`` returned them. Raises StoreError when one is missing, short or of another schema, or when
        others commit all the time; then nothing is committed.
        """
        for file in files:
            _require_as_written(self.folder, file)
        if self.version() < 0:
            self._create()
        for _ in range(_ATTEMPTS):
            version = self.version()
            actions = [_add_action(fingerprint, file, version + 1) for file in files]
            if self._commit_at(version, actions, mode="append"):
                return
        raise StoreError(f"{self.folder} was committed to by others all the time; nothing was committed, run again")

    def _create(self) -> None:
        self.folder.require_conditions()
        try:
            with _written(self.folder):
                DeltaTable.create(
                    str(self.folder),
                    schema=_delta_schema(),
                    mode="ignore",
                    partition_by=_PARTITIONS,
                    configuration={_FORMAT_KEY: str(STORE_FORMAT)},
                    raise_if_key_not_exists=False,
                )
        except (CommitFailedError, StoreError):
            if self.version() < 0:  # else another run made it at the same moment
                raise

    def replace(
        self, fingerprint: str, old: Sequence[EmbeddingFile], new: Sequence[tuple[dict[str, Any], int]], version: int
    ) -> bool:
        """Put new files in the place of old ones, if nobody committed since ``version``.

        new: what ``write`` returned of each, and the commit in whose place it stands, the earliest of the files that
        it is made of: it holds only rows that count. Returns False, having changed nothing, when somebody committed.
        Raises StoreError as ``commit``.
        """
        for file, _ in new:
            _require_as_written(self.folder, file)
        actions = [_add_action(fingerprint, file, commit) for file, commit in new]
        filters = [(tables.FINGERPRINT, "=", fingerprint), (tables.FILE, "in", [file.name for file in old])]
        return self._commit_at(version, actions, mode="overwrite", partition_filters=filters)

    def seal(self, version: int) -> bool:
        """Add an empty commit right after ``version``; False when somebody else committed since.

        What was read at ``version`` and is published after a True cannot have been removed in between: a
        clean-up commits under the same condition and looks for what is about to be published first.
        """
        return self._commit_at(version, [], mode="append")

    def vacuum(self, hours: float) -> list[str]:
        """Delete files that are not, or no longer, in the table and are older; returns them.

        Also folds a long log into a checkpoint and drops entries past Delta's own retention (30 days).
        """
        table = self._open()
        if table is None:
            return []
        with _written(self.folder):
            gone = table.vacuum(
                # whole hours only: rounded up, so that nothing younger goes
                retention_hours=math.ceil(hours),
                enforce_retention_duration=False,
                dry_run=False,
                full=True,
            )
        oldest = time.time_ns() // 1_000_000 - math.ceil(hours) * 3_600_000
        staged = [each for each in self.folder.below(_LOG) if re.search(r"#\d+$|\.tmp$", each.name)]
        self.folder.delete([each.name for each in staged if each.modified <= oldest])  # of killed commits
        table = self._open()
        assert table is not None
        with _written(self.folder):
            table.create_checkpoint()
            self._flush_log()  # what goes next must not be all that is on the disk
            table.cleanup_metadata()
        return list(gone)

    def _commit_at(self, version: int, actions: list[AddAction], **how: Any) -> bool:
        table = self._open()
        if table is None or table.version() != version:
            return False
        ours = uuid.uuid4().hex
        properties = CommitProperties(custom_metadata={_COMMIT_KEY: ours}, max_commit_retries=0)
        try:
            self._write(table, actions, commit_properties=properties, **how)
        except CommitFailedError:  # refused; or done, its answer lost and the put repeated
            with suppress(FileNotFoundError):
                if ours in self.folder.read(f"{_LOG}{version + 1:020d}.json").decode():
                    self._flush_log()
                    return True
            return False
        self._flush_log()
        return True

    def _write(self, table: DeltaTable, actions: list[AddAction], **how: Any) -> None:
        with _written(self.folder):
            table.create_write_transaction(
                actions, schema=_delta_schema(), partition_by=_PARTITIONS, post_commithook_properties=_HOOKS, **how
            )

    def _flush_log(self) -> None:
        """All that is in force: this run may build on a commit that its own writer has not flushed yet."""
        entries, checkpoint = self._log()
        hint = [f"{_LOG}_last_checkpoint"] if checkpoint else []
        self.folder.flush([*(each.name for each in entries), *checkpoint, *hint])


@contextmanager
def _written(folder: Folder) -> Iterator[None]:
    """What the Delta library raises but for a refused commit, and a disk's own errors, as a StoreError."""
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError) as error:
        if disk_full(error) or disk_broken(error):
            raise
        raise StoreError(
            f"{folder} cannot be written: {first_line(error)}; see to it and run the command again"
        ) from error


def _check_log(folder: Folder, entries: Sequence[Listed]) -> None:
    """Delta takes an empty entry for a commit that did nothing: a power cut would hide what it held."""
    damaged = next((each.name for each in entries if each.size == 0), None)
    try:
        newest = folder.read(entries[-1].name)
    except OSError as error:  # it may be whole
        raise StoreError(
            f"{folder}/{entries[-1].name} cannot be read: {error}; see to it and run the command again"
        ) from error
    try:
        for line in newest.decode().splitlines():
            json.loads(line)
    except ValueError:
        damaged = damaged or entries[-1].name
    if damaged is not None:
        raise StoreError(
            f"{folder}/{damaged} is cut short or damaged; restore it, or, if it is the newest, remove it: the texts "
            f"of that commit are embedded again"
        )


def _delta_schema() -> Schema:
    partitions = [pa.field(name, pa.string(), False) for name in _PARTITIONS]
    return Schema.from_arrow(pa.schema([*tables.EMBEDDINGS, *partitions]))


def _commit_of(name: str) -> int:
    number, dot, _ = name.partition(".")
    return int(number) if dot else 0


def _require_as_written(folder: Folder, file: dict[str, Any]) -> None:
    path = f"{folder}/{file['path']}"
    try:
        found = pq.ParquetFile(folder.source(file["path"]))
        whole = found.metadata.num_rows == file["rows"] and folder.size(file["path"]) == file["size"]
        if not whole or not found.schema_arrow.equals(tables.EMBEDDINGS):
            raise StoreError(f"{path} is not what its worker reported; nothing was committed, run again")
    except UNREADABLE as error:
        raise StoreError(f"{path} cannot be read back: {error}; nothing was committed, run again") from error


def _add_action(fingerprint: str, file: dict[str, Any], commit: int) -> AddAction:
    name = f"{commit}.{PurePosixPath(file['path']).stem}"
    return AddAction(
        path=file["path"],
        size=file["size"],
        partition_values={tables.FINGERPRINT: fingerprint, tables.FILE: name},
        modification_time=time.time_ns() // 1_000_000,
        data_change=True,
        stats=json.dumps({"numRecords": file["rows"]}),
    )


def stamped(rows: pa.Table, run_id: str) -> pa.Table:
    """rows: key, embedding, n_tokens, truncated; returns them with created_at (now, milliseconds) and run_id."""
    now = pa.array(np.full(rows.num_rows, time.time_ns() // 1_000_000, dtype=np.int64))
    run = pa.array([run_id]).take(pa.array(np.zeros(rows.num_rows, dtype=np.int32)))
    return rows.append_column(tables.CREATED_AT, now).append_column(tables.RUN_ID, run)


def read_file(file: EmbeddingFile, columns: list[str], *, verify: bool = True) -> pa.Table:
    """Some columns of one file. Raises StoreError when it is damaged or missing.

    verify: check the page checksums, which takes ten times as long; without it what is read must be checked against
    a digest.
    """
    try:
        source = file.folder.source(str(file.path))
        part = pq.ParquetFile(source, page_checksum_verification=verify).read(columns=columns, use_threads=False)
    except UNREADABLE as error:
        raise StoreError(f"embedding file {file} is damaged or missing: {error}; restore it") from error
    if part.num_rows != file.rows:
        raise StoreError(f"embedding file {file} has {part.num_rows} rows, its commit {file.rows}; restore it")
    try:
        return tables.check(part, _only(*columns), f"embedding file {file}")
    except DataError as error:
        raise StoreError(f"{error}; restore it") from error


def read_column(file: EmbeddingFile, column: str, *, verify: bool) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """(first row, values) of one column in small parts, which are decoded into the same memory again and again.

    Raises StoreError as ``read_file``; verify: as there.
    """
    at = 0
    try:
        source = file.folder.source(str(file.path))
        opened = pq.ParquetFile(source, page_checksum_verification=verify)
        for batch in opened.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
            part = tables.check(pa.Table.from_batches([batch]), _only(column), f"embedding file {file}")
            yield at, part.column(column)
            at += batch.num_rows
    except UNREADABLE as error:
        raise StoreError(f"embedding file {file} is damaged or missing: {error}; restore it") from error
    except DataError as error:
        raise StoreError(f"{error}; restore it") from error
    if at != file.rows:
        raise StoreError(f"embedding file {file} has {at} rows, its commit {file.rows}; restore it")


def _only(*columns: str) -> pa.Schema:
    return pa.schema([tables.EMBEDDINGS.field(name) for name in columns])


def read_keys(files: Sequence[EmbeddingFile]) -> NDArray[np.uint64]:
    """Keys of all rows, file after file; uint64 [rows, 2]. Raises StoreError as ``read_file``."""
    parts = on_threads(lambda file: decode_keys(read_file(file, [tables.KEY]).column(tables.KEY)), files)
    return np.concatenate([np.zeros((0, 2), dtype=np.uint64), *parts])
