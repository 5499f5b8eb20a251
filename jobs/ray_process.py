"""Ray in a process of its own, which imports neither torch nor MLflow.

When a raylet dies (killed for memory, a port taken), Ray ends its driver at once, inside its C++ library, without an
exception. Here that is not the command, which commits what is finished and says what happened.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from jobs.memory import uncollected
from jobs.ray_guard import watch
from schemas.errors import ClusterError
from schemas.secrets import keep_secrets

_MODULE = "jobs.embed_ray"  # imported there, not here
_END = signal.SIGUSR1  # to itself; of SIGTERM Ray prints a stack trace
_CONNECT_SECONDS = 10.0
_ENDING_SECONDS = 30.0


def packed(worker: type, **arguments: Any) -> bytes:
    """A class and what to make it with, which is unpacked where it works."""
    return pickle.dumps((worker, arguments))


class RayDriver:
    """Ray's driver, in a process of its own; a session that is open in this process is used, here.

    ahead: the session comes up while the caller does other things, else when there is work. A context manager:
    leaving it ends Ray. Where nothing answers at RAY_ADDRESS, starting it raises ClusterError.
    """

    def __init__(self, ahead: bool = False) -> None:
        ray = sys.modules.get("ray")
        self._here = ray is not None and ray.is_initialized()
        self._process = _Process() if ahead and not self._here else None

    def __enter__(self) -> RayDriver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.end()

    def stream(self, name: str, *arguments: Any) -> Generator[Any, None, None]:
        """Yield what the generator of that name in ``jobs.embed_ray`` yields; once. The arguments are pickled.

        A local session that does not come up is tried once more. After the last value Ray ends beside what the caller
        does, who waits for it at the end of the block. Raises what the generator raises, ClusterError when Ray does
        not start or its session dies; Ray has ended then.
        """
        if self._here:
            module = importlib.import_module(_MODULE)
            with module.session():
                yield from getattr(module, name)(*arguments)
            return
        self._process = self._process or _Process()
        why = self._process.why_not_started()
        if why is not None and not os.environ.get("RAY_ADDRESS"):
            print(f"Ray did not start ({why}); trying once more", file=sys.stderr)
            self._process.end()
            self._process = _Process()
            why = self._process.why_not_started()
        if why is not None:
            raise ClusterError(f"Ray did not start: {why}. {_where_to_look()}")
        try:
            yield from self._process.run(name, arguments)
        except BaseException:
            self._process.end()
            raise


class _Process:
    """The process: told what to do on its standard input, whose end ends it, it answers on a pipe."""

    def __init__(self) -> None:
        """Raises ClusterError when nothing answers at RAY_ADDRESS."""
        _require_cluster()
        reading, writing = os.pipe()
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, _MODULE, str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            start_new_session=True,  # for the guard; and a terminal's Ctrl-C goes to the command alone
            env=os.environ | {"PYTHONPATH": paths},
        )
        os.close(writing)  # the other process holds the only one: its death is the end of the pipe
        self._answers = Connection(reading, writable=False)

    def _next(self) -> tuple[str, Any]:
        """The next message; ("died", how) after the last one."""
        while not self._answers.poll(1.0):  # with MLflow loaded, a read alone did not hear Ctrl-C
            pass
        try:
            return self._answers.recv()
        except EOFError:
            return "died", f"its driver ended with status {self._process.wait()}"

    def why_not_started(self) -> str | None:
        """Wait for the session; None when it is up."""
        kind, value = self._next()
        if kind == "started":
            return None
        return f"{type(value).__name__}: {value}" if kind == "error" else value

    def run(self, name: str, arguments: tuple[Any, ...]) -> Generator[Any, None, None]:
        """Yield the values of a generator. Raises what it raises, ClusterError when the session dies."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            pickle.dump((name, arguments), self._process.stdin)
            self._process.stdin.flush()
        while True:
            kind, value = self._next()
            if kind == "end":
                return
            if kind == "error":
                raise value
            if kind == "died":
                raise ClusterError(
                    f"the Ray session died: {value}, as it does when a raylet is killed, most often for memory. What "
                    f"was finished is kept: run the command again. {_where_to_look()}"
                )
            yield value

    def end(self) -> None:
        """Ask it to shut Ray down, which it may have done; what it then leaves, its guard ends."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


def _require_cluster() -> None:
    """Raises ClusterError at once where Ray itself would try for more than nine minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise ClusterError(
                f"no Ray cluster answers at RAY_ADDRESS {address} ({error}); start it, or unset RAY_ADDRESS to work "
                f"on this machine alone"
            ) from error


def _where_to_look() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return f"RAY_ADDRESS is {address}: see that this cluster is up"
    return f"Ray's logs: {os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"


def _listen(work: SimpleQueue[tuple[str, tuple[Any, ...]]]) -> None:
    """Hand on what comes on the standard input, then wait for its end, which ends this process."""
    with suppress(EOFError, pickle.UnpicklingError):  # the command was killed before it had said all of it
        work.put(pickle.load(sys.stdin.buffer))
        os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), _END)
    time.sleep(_ENDING_SECONDS)
    os._exit(1)


def _drive(driver: str, sender: Connection) -> None:
    """The process: sends ("started", None), ("value", each), then ("end", None) or ("error", the exception)."""
    signal.signal(_END, lambda *_: sys.exit(1))
    guard = watch()  # before anything is started; it goes on when this process ends
    work: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
    threading.Thread(target=_listen, args=(work,), daemon=True).start()
    try:
        keep_secrets()
        with uncollected():
            module = importlib.import_module(driver)
        with module.session():
            sender.send(("started", None))
            name, arguments = work.get()
            for value in getattr(module, name)(*arguments):
                sender.send(("value", value))
            signal.signal(_END, signal.SIG_IGN)
            sender.send(("end", None))
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        sender.send(("error", _portable(error)))
    finally:
        signal.signal(_END, signal.SIG_IGN)
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
    os.set_inheritable(int(sys.argv[2]), False)
    _drive(sys.argv[1], Connection(int(sys.argv[2]), readable=False))
