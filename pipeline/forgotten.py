"""Users who asked to be forgotten, known by a hash: found in tables, in rejected rows, in samples and reports.

The list outlives the data, so that a feed which still holds a user does not bring the user back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.files import next_created_at, write_record
from pipeline.store import Store
from schemas.errors import ConfigError
from schemas.hashing import hash_texts
from schemas.records import ForgottenUser

FILTER = "forgotten users"  # the name of the rows in a data set's counts
_QUOTED = re.compile(r'"([^"]*)"')
_SEPARATORS = (re.compile(r"[,\t;|]"), re.compile(r"[\s,;:|{}\[\]()]+"))


def user_hash(user: str) -> str:
    """32 hexadecimal characters. Whoever holds the list can check an id against it, not read ids from it."""
    return hash_texts("forgotten user", user).hex()


class ForgottenUsers:
    """A set of users by their hashes."""

    def __init__(self, hashes: Iterable[str]) -> None:
        self._hashes = frozenset(hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, user: str) -> bool:
        return user_hash(user) in self._hashes

    def mask(self, users: Sequence[str]) -> NDArray[np.bool_]:
        """[n] bool: which of the ids are of forgotten users."""
        return np.fromiter((user in self for user in users), dtype=bool, count=len(users))

    def in_row(self, raw: str) -> bool:
        """Whether a row that was rejected names one of them: in any cell, and where it has no cells in any word."""
        if not self._hashes:
            return False
        try:
            cells = set(_cells(json.loads(raw)))
        except ValueError:
            cells = {word.strip(" \"'") for pattern in _SEPARATORS for word in pattern.split(raw)}
            cells |= set(_QUOTED.findall(raw))
        return any(cell in self for cell in cells if cell)


def _cells(value: Any) -> Iterator[str]:
    """The texts and numbers of a JSON value, spelled as ids are."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _cells(each)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))
    elif value is not None:
        yield str(value)


def read_forgotten(store: Store) -> ForgottenUsers:
    """Everybody who was forgotten in a store."""
    return ForgottenUsers(record.id for record in store.all(ForgottenUser))


def remember_forgotten(store: Store, user: str) -> bool:
    """Add a user to the list; False: was there. Raises ConfigError for an id that no user can have."""
    user = user.strip()
    if not user:
        raise ConfigError("forget-user --user: the id is empty; name a user")
    name, known = user_hash(user), store.all(ForgottenUser)
    if any(record.id == name for record in known):
        return False
    with store.new(ForgottenUser, name) as folder:
        write_record(folder, ForgottenUser(id=name, created_at=next_created_at(known)))
    return True
