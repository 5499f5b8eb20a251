"""Digests of much data: what they are, and those of stores from before."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipeline import digests
from pipeline.digests import block_digest, file_digest

DIGESTS = (
    "71e0a99173564931c0b8acc52d2685a8e39c64dc52e3d02390fdac2a12b155cb",
    "f7c81701d178dbaa985880a7dd78269aa602efc4ed1fa1ecb31706e6ef20f1d7",
)


def test_a_file_has_the_digest_that_blake3_publishes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_digest(path) == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_the_digest_of_blocks_never_changes(monkeypatch):
    assert block_digest(np.zeros((0, 3), dtype="<f2")) == DIGESTS[0]
    monkeypatch.setattr(digests, "BLOCK_BYTES", 10)
    assert block_digest(np.arange(12, dtype="<u2").reshape(4, 3)) == DIGESTS[1]


@pytest.mark.parametrize("size", [0, 1, 5, 24])
def test_a_digest_of_a_store_from_before_is_one_of_its_kind(monkeypatch, size):
    monkeypatch.setattr(digests, "BLOCK_BYTES", 10)
    data = np.arange(size, dtype=np.uint8)
    parts = [len(data).to_bytes(8, "little")]
    parts += [hashlib.blake2b(data[start : start + 10], digest_size=16).digest() for start in range(0, size, 10)]
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    assert block_digest(data, "0" * 32) == whole.hexdigest()
    assert block_digest(data, block_digest(data)) == block_digest(data) != whole.hexdigest()
