"""Ray in a process of its own, which imports neither torch nor MLflow.

When a raylet dies (killed for memory, a port taken), Ray ends its driver at once, inside its C++ library, without an
exception. Here that is not the command, which commits what is finished and says what happened.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from jobs.ray_guard import watch
from schemas.errors import ClusterError
from schemas.secrets import keep_secrets

_MODULE = "jobs.embed_ray"  # imported there, not here
_END = signal.SIGUSR1  # to itself; of SIGTERM Ray prints a stack trace
_ENDING_SECONDS = 30.0


def packed(worker: type, **arguments: Any) -> bytes:
    """A class and what to make it with, which is unpacked where it works."""
    return pickle.dumps((worker, arguments))


def on_ray(name: str, *arguments: Any) -> Generator[Any, None, None]:
    """Yield what the generator of that name in ``jobs.embed_ray`` yields; closing this one ends Ray.

    A session that is open in this process is used, here. Else the generator runs in a process of its own, which must
    be able to unpickle the arguments. A local session that does not come up is tried once more. Raises what the
    generator raises, ClusterError when Ray does not start or its session dies.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield from getattr(importlib.import_module(_MODULE), name)(*arguments)
        return
    tries = 1 if os.environ.get("RAY_ADDRESS") else 2
    for attempt in range(1, tries + 1):
        answers, process = _start(name, arguments)
        try:
            why = yield from _answers(answers, process)
        finally:
            answers.close()
            _end(process)
        if why is None:
            return
        if attempt < tries:
            print(f"Ray did not start ({why}); trying once more", file=sys.stderr)
    raise ClusterError(f"Ray did not start: {why}. {_where_to_look()}")


def _answers(answers: Connection, process: subprocess.Popen[bytes]) -> Generator[Any, None, str | None]:
    """Yield the values; returns why there is no session, None after the last value."""
    started = False
    while True:
        while not answers.poll(1.0):  # with MLflow loaded, a read alone did not hear Ctrl-C
            pass
        try:
            kind, value = answers.recv()
        except EOFError:
            ended = f"its driver ended with status {process.wait()}"
            if not started:
                return ended
            raise ClusterError(
                f"the Ray session died: {ended}, as it does when a raylet is killed, most often for memory. What was "
                f"finished is kept: run the command again. {_where_to_look()}"
            ) from None
        if kind == "error":
            if not started:
                return f"{type(value).__name__}: {value}"
            raise value
        if kind == "end":
            return None
        if kind == "started":
            started = True
        else:
            yield value


def _where_to_look() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return f"RAY_ADDRESS is {address}: see that this cluster is up"
    return f"Ray's logs: {os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"


def _start(name: str, arguments: tuple[Any, ...]) -> tuple[Connection, subprocess.Popen[bytes]]:
    """The process, told what to do on its standard input, whose end tells it to end."""
    reading, writing = os.pipe()
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(writing)],
        stdin=subprocess.PIPE,
        pass_fds=[writing],
        start_new_session=True,  # for the guard; and a terminal's Ctrl-C goes to the command alone
        env=os.environ | {"PYTHONPATH": paths},
    )
    os.close(writing)  # the other process holds the only one: its death is the end of the pipe
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        pickle.dump((_MODULE, name, arguments), process.stdin)
        process.stdin.flush()
    return Connection(reading, writable=False), process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to shut Ray down, which it may have done; what it then leaves, its guard ends."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), _END)
    time.sleep(_ENDING_SECONDS)
    os._exit(1)


def _drive(sender: Connection) -> None:
    """The process: sends ("started", None), ("value", each), then ("end", None) or ("error", the exception)."""
    signal.signal(_END, lambda *_: sys.exit(1))
    guard = watch()  # before anything is started; it goes on when this process ends
    driver, name, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        keep_secrets()
        module = importlib.import_module(driver)
        with module.session():
            sender.send(("started", None))
            for value in getattr(module, name)(*arguments):
                sender.send(("value", value))
        sender.send(("end", None))
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        sender.send(("error", _portable(error)))
    finally:
        if guard is not None and guard.stdin is not None:
            guard.stdin.close()


def _portable(error: Exception) -> Exception:
    """The error as another process can read it, its traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        portable = pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(trace)
    return portable


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    _drive(Connection(int(sys.argv[1]), readable=False))
