"""Files in a bucket (s3://, gs://, az://): each appears whole or not at all, and under the condition that it is new.

The only file that imports obstore. Addresses and secrets come from the environment (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, ...), as the Delta library reads them too.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from pipeline.files import Listed
from schemas.errors import ConfigError, StoreError, first_line


class _Reader(io.RawIOBase):
    """An object as a file that asks for the ranges it is asked for, so that a column costs no more than itself."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name, self._at = bucket, name, 0
        self._size = bucket.size(name)

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """One request for what is left of ``buffer``'s length."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._bucket.read_range(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Bucket:
    """Objects under one URL; names are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.url,)  # a worker has credentials of its own

    @cached_property
    def _store(self) -> Any:
        try:
            return from_url(self.url)
        except (BaseError, ValueError) as error:
            raise ConfigError(f"store = {self.url!r} cannot be opened: {first_line(error)}") from error

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise StoreError(f"{self.url}/{name} is missing; restore it") from error
            raise StoreError(f"{self.url}/{name}: {first_line(error)}") from error

    def below(self, prefix: str) -> list[Listed]:
        """All objects below a prefix that ends at a slash, by name; of ``""``, all."""
        with self._named(prefix):
            found = [each for page in obstore.list(self._store, prefix) for each in page]
        return sorted(Listed(e["path"], e["size"], int(e["last_modified"].timestamp() * 1000)) for e in found)

    def read(self, name: str) -> bytes:
        """A whole object. Raises StoreError when it is missing or out of reach."""
        with self._named(name):
            return obstore.get(self._store, name).bytes().to_bytes()

    def read_range(self, name: str, start: int, end: int) -> memoryview:
        """Bytes from start to end, without the end."""
        with self._named(name):
            return memoryview(obstore.get_range(self._store, name, start=start, end=end))

    def source(self, name: str) -> BinaryIO:
        """What Parquet readers open. Raises StoreError when it is missing."""
        return io.BufferedReader(_Reader(self, name), 1 << 16)

    def size(self, name: str) -> int:
        """Bytes of an object. Raises StoreError when it is missing."""
        with self._named(name):
            return int(obstore.head(self._store, name)["size"])

    def create(self, name: str, data: Any) -> None:
        """Write a new object, there for all readers when this returns. Raises StoreError if the name is taken."""
        content = memoryview(data).cast("B")
        with self._named(name):
            try:
                obstore.put(self._store, name, content, mode="create")
            except AlreadyExistsError as error:
                if self.read(name) != content:  # else it is ours: the first answer was lost, and the put repeated
                    raise StoreError(f"{self.url}/{name} is another run's; run the command again") from error

    def overwrite(self, name: str, data: bytes) -> None:
        """Put an object in the place of another; a reader sees the one or the other."""
        with self._named(name):
            obstore.put(self._store, name, data)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        with self._named(", ".join(names[:1])):
            try:
                if names:
                    obstore.delete(self._store, list(names))
            except FileNotFoundError:  # gs:// and az:// say so, and leave the others
                for name in names:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._store, [name])

    def require_conditions(self) -> None:
        """See ``Folder``."""
        name = f".{uuid.uuid4().hex}"
        try:
            self.create(name, b"1")
            with self._named(name), suppress(AlreadyExistsError):
                obstore.put(self._store, name, b"2", mode="create")
                raise ConfigError(
                    f"store = {self.url!r}: this server ignores If-None-Match, so that of two runs at once one would "
                    f"overwrite what the other wrote; use one with conditional writes, or a path"
                )
        finally:
            self.delete([name])

    def upload(self, folder: Path, prefix: str, last: str) -> None:
        """Create an object for each file below a local folder, the one called ``last`` after all others."""
        paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == last)
        for path in paths:
            with path.open("rb") as file:
                self.create(f"{prefix}/{path.relative_to(folder).as_posix()}", file.read())

    def download(self, prefix: str, folder: Path) -> None:
        """Write all objects below a prefix into a local folder. Raises StoreError when there are none."""
        found = self.below(f"{prefix}/")
        if not found:
            raise StoreError(f"{self.url}/{prefix} is missing; restore it")
        for each in found:
            path = folder / each.name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in self._chunks(each.name):
                    file.write(chunk)

    def _chunks(self, name: str) -> Iterator[memoryview]:
        with self._named(name):
            for chunk in obstore.get(self._store, name).stream(min_chunk_size=1 << 23):
                yield memoryview(chunk)

    def flush(self, names: Sequence[str]) -> None:
        """Nothing to do: what was put is durable."""
