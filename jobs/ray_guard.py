"""Ends a local Ray session whose driver was killed: two of its agents outlive it by more than half a minute.

Run as a process of its own, by ``watch``: waits for the end of its standard input, which comes with the driver's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_GRACE_SECONDS = 5.0


def _stat(number: int) -> list[str]:
    """Fields of a process from its state on; [] when there is none. [1] is its parent, [19] its start."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdigit() else []
        if fields:
            parents[int(entry.name)] = int(fields[1])
    found: list[int] = []
    wanted = {root}
    while wanted:
        wanted = {number for number, parent in parents.items() if parent in wanted}
        found.extend(wanted)
    return found


def watch() -> subprocess.Popen[bytes] | None:
    """Start a guard over all processes that this one has started so far; None where there is no /proc.

    Close its standard input when they are to be gone.
    """
    if not Path("/proc/self/stat").exists():
        return None
    marked = [f"{number}:{_stat(number)[19]}" for number in _descendants(os.getpid()) if _stat(number)]
    command = [sys.executable, __file__, *marked]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def main(marked: list[str]) -> None:
    """Wait for the end of standard input, then kill what is left of the marked processes (number:start)."""
    sys.stdin.buffer.read()
    time.sleep(_GRACE_SECONDS)
    for mark in marked:
        number, start = mark.split(":")
        fields = _stat(int(number))
        if fields and fields[19] == start:
            os.kill(int(number), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
