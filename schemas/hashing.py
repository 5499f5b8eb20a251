"""Stable hashes: BLAKE2b-128 over length-prefixed bytes, the same on every machine and version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

DIGEST_BYTES = 16


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
    """A running BLAKE2b-128 over length-prefixed parts, for tensors too large to join.

    state: another hash of the kind of hashlib's; 16 bytes of it are taken.
    """

    def __init__(self, state: Any = None) -> None:
        self._state = state or hashlib.blake2b(digest_size=DIGEST_BYTES)

    def add(self, part: bytes | memoryview | str) -> Digest:
        """Add one part (bytes, a buffer, or text as UTF-8); returns itself."""
        return self.add_parts([memoryview(part.encode() if isinstance(part, str) else part)])

    def add_parts(self, parts: Sequence[memoryview]) -> Digest:
        """As ``add`` of buffers joined; returns itself."""
        self._state.update(sum(part.nbytes for part in parts).to_bytes(8, "little"))
        for part in parts:
            self._state.update(part.cast("B"))
        return self

    def hexdigest(self) -> str:
        """32 hexadecimal characters."""
        digest: bytes = self._state.digest()
        return digest[:DIGEST_BYTES].hex()
