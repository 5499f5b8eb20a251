"""What must not be written anywhere: keys, tokens and passwords of the environment, and those inside of addresses."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
import urllib.parse
from typing import Any

MASK = "***"
_SHORTEST = 8  # of a value that is looked for: a shorter one would be found in ordinary words
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|APIKEY|SAS)$|(ACCESS|SECRET|API|ACCOUNT|STORAGE|PRIVATE)_KEY(_ID)?$"
)
# the container of abfs://container@account is not secret
_USERINFO = re.compile(r"(?<!abfs)(?<!abfss)(?<!wasbs)://[^/\s'\"<>?#]*@")
_ARGUMENT = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:token|secret|password|signature|credential)|sig|pwd|access_?key(?:_?id)?)=)[^&\s'\"<>\\]+"
)


def secret_values() -> list[str]:
    """Values of the environment whose names say that they are secret, as they are, in an address and in JSON; longest
    first."""
    plain = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    plain = {value for value in plain if len(value) >= _SHORTEST}
    found = plain | {urllib.parse.quote(value, safe="") for value in plain} | {json.dumps(v)[1:-1] for v in plain}
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """The text with ``***`` in place of secrets of the environment, of user and password in an address, and of
    arguments of an address that sign or name a key."""
    for value in secret_values():
        text = text.replace(value, MASK)
    if "://" not in text:
        return text
    return _ARGUMENT.sub(rf"\1{MASK}", _USERINFO.sub(f"://{MASK}@", text))


class _Masked(logging.LogRecord):
    """What any library logs, without secrets."""

    def getMessage(self) -> str:
        """The message, its arguments put in."""
        return redact(super().getMessage())


def _traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An error that nobody expected, at full length and without secrets."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def keep_secrets() -> None:
    """From here on no log line and no traceback of this process shows one."""
    logging.setLogRecordFactory(_Masked)
    sys.excepthook = _traceback
