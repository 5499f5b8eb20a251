"""Stable hashes: BLAKE2b-128 over length-prefixed bytes, the same on every machine and version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DIGEST_BYTES = 16
BLOCK_BYTES = 1 << 23


def _prefixed(parts: Iterable[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def hash_bytes(*parts: bytes) -> bytes:
    """BLAKE2b-128 of the parts, each preceded by its length (8 bytes, little endian); 16 bytes.

    The length prefix keeps ("ab", "c") and ("a", "bc") apart.
    """
    return hashlib.blake2b(_prefixed(parts), digest_size=DIGEST_BYTES).digest()


def hash_texts(*parts: str) -> bytes:
    """``hash_bytes`` of the UTF-8 forms of the parts; 16 bytes. Lone surrogates hash as '?'."""
    return hash_bytes(*(part.encode("utf-8", "replace") for part in parts))


def tie_hashes(users: Sequence[str], items: Sequence[str]) -> list[bytes]:
    """The tie-breaking hash of each event, hash(user, item); a list of 16-byte values."""
    return [hash_texts(user, item) for user, item in zip(users, items, strict=True)]


class Digest:
    """A running BLAKE2b-128 over length-prefixed parts, for tensors too large to join."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def add(self, part: bytes | memoryview | str) -> Digest:
        """Add one part (bytes, a buffer, or text as UTF-8); returns itself."""
        data = memoryview(part.encode() if isinstance(part, str) else part).cast("B")
        self._state.update(len(data).to_bytes(8, "little"))
        self._state.update(data)
        return self

    def hexdigest(self) -> str:
        """32 hexadecimal characters."""
        return self._state.hexdigest()


def block_digest(array: Any) -> str:
    """BLAKE2b-128 over the BLAKE2b-128 of each 8 MiB of a contiguous array; 32 hexadecimal characters.

    As safe as one hash over all of it, and as fast as there are cores.
    """
    data = memoryview(array).cast("B") if array.size else memoryview(b"")
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run meanwhile
        digests = list(pool.map(hash_block, blocks))
    return join_blocks(len(data), digests)


def hash_block(block: bytes | memoryview) -> bytes:
    """BLAKE2b-128 of one block of ``block_digest``; 16 bytes."""
    return hashlib.blake2b(block, digest_size=DIGEST_BYTES).digest()


def join_blocks(length: int, digests: Sequence[bytes]) -> str:
    """``block_digest`` of ``length`` bytes from the ``hash_block`` of each 8 MiB of them, in order."""
    return hash_bytes(length.to_bytes(8, "little"), *digests).hex()


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file's bytes; 32 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
