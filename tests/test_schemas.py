"""Hashes that must never change, and the check every table passes."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from pydantic import ValidationError

from schemas import errors, tables
from schemas.hashing import Digest, hash_bytes, hash_texts, tie_hashes
from schemas.records import Index


def test_hash_is_blake2b_128_over_length_prefixed_parts():
    expected = hashlib.blake2b(b"\x02" + b"\0" * 7 + b"ab" + b"\x01" + b"\0" * 7 + b"c", digest_size=16).digest()
    assert hash_bytes(b"ab", b"c") == hash_texts("ab", "c") == expected
    assert Digest().add("ab").add(b"c").hexdigest() == expected.hex()
    assert hash_texts("ab", "c") != hash_texts("a", "bc")


def test_hashes_are_the_same_on_every_machine():
    assert hash_texts("The red 0").hex() == "11238df327ab857413b37f64e03b3b17"
    assert tie_hashes(["u1"], ["i1"]) == [hash_texts("u1", "i1")]


def test_lone_surrogates_hash():
    assert len(hash_texts("a\ud800b")) == 16


def test_check_casts_orders_and_fills_optional_columns():
    table = pa.table({"timestamp": pa.array([1], pa.int32()), "item_id": ["i"], "user_id": ["u"], "more": [0]})
    checked = tables.check(table, tables.INTERACTIONS, "file")
    assert checked.schema == tables.INTERACTIONS
    assert checked.to_pylist()[0] == {
        "user_id": "u", "item_id": "i", "timestamp": 1, "sequence": None, "event": None, "label": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["i"], "timestamp": [1]}, "file: column 'user_id' is missing"),
        ({"user_id": [None], "item_id": ["i"], "timestamp": [1]}, "file: column 'user_id' holds 1 nulls"),
        ({"user_id": ["u"], "item_id": ["i"], "timestamp": ["x"]}, "file: column 'timestamp' is string"),
    ],
)
def test_check_names_file_and_column(columns, message):
    with pytest.raises(errors.DataError, match=message):
        tables.check(pa.table(columns), tables.INTERACTIONS, "file")


def test_records_are_frozen_and_refuse_unknown_keys():
    values = {
        "id": "a", "created_at": 1, "kind": "flat", "snapshot": None, "item_fingerprint": None,
        "user_tower": None, "vectors": 1, "dim": 2, "bytes": 3, "checksum": "c",
    }  # fmt: skip
    record = Index(**values)
    assert record.model_dump_json() == (
        '{"id":"a","created_at":1,"store_format":2,"kind":"flat","snapshot":null,"item_fingerprint":null,'
        '"user_tower":null,"vectors":1,"dim":2,"bytes":3,"checksum":"c","inputs":""}'
    )
    with pytest.raises(ValidationError):
        Index(**values, newer=1)
    with pytest.raises(ValidationError):
        record.dim = 3


def test_kind_is_the_class_name():
    assert errors.FingerprintMismatchError("x").kind == "FingerprintMismatch"
