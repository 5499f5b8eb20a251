"""An S3-compatible server on loopback for test_pipeline_bucket.py. One request at a time, so that conditions hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class _Silent(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[tuple[str, list[dict[str, str]], list[tuple[str, str]]]]:
    """(address, requests so far: method, path, condition, copy_source; faults: ("lost" or "denied", word): the
    answer to the next put of a path with this word is lost, or it is refused)."""
    backend, requests, faults = DomainDispatcherApplication(create_backend_app), [], []

    def application(environ, start_response):
        requests.append(
            {
                "method": environ["REQUEST_METHOD"],
                "path": environ["PATH_INFO"],
                "condition": environ.get("HTTP_IF_NONE_MATCH", ""),
                "copy_source": environ.get("HTTP_X_AMZ_COPY_SOURCE", ""),
            }
        )
        if faults and environ["REQUEST_METHOD"] == "PUT" and faults[0][1] in environ["PATH_INFO"]:
            kind, _ = faults.pop(0)
            if kind == "lost":
                list(backend(environ, lambda *_: None))
            status = {"lost": "503 Service Unavailable", "denied": "403 Forbidden"}[kind]
            start_response(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{status}</Code></Error>".encode()]
        return backend(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=False, request_handler=_Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests, faults
    finally:
        server.shutdown()
        thread.join()
