"""Ends a local Ray session whose driver was killed: two of its agents outlive it by more than half a minute.

Run as a process of its own, by ``watch``: waits for the end of its standard input, which comes with the driver's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_GRACE_SECONDS = 5.0
_SESSION = 3  # among the fields of /proc/N/stat from the state on


def _members(session: int) -> list[int]:
    """The processes of a session of the system (setsid), none of which can be of another one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[_SESSION]) == session:
                found.append(int(entry.name))
    return found


def watch() -> subprocess.Popen[bytes] | None:
    """Start a guard over all that this process starts, which must lead a session of the system; None without /proc.

    When this process is gone, or closes the guard's standard input, the guard ends what is left after 5 seconds.
    """
    if not Path("/proc/self/stat").exists():
        return None
    command = [sys.executable, __file__, str(os.getsid(0))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def main(session: int) -> None:
    """Wait for the end of standard input, then kill what is left of the session."""
    sys.stdin.buffer.read()
    time.sleep(_GRACE_SECONDS)
    for number in _members(session):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
