"""The HTTP port for operators: /metrics, /health/live, /health/ready. Read-only, a thread of its own.

It knows neither TLS nor tokens, and tells the models' names, their revisions and how much they are used: it listens
where the operator says, by default for this machine alone.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from service import __version__
from service.errors import NotReady

Page = Callable[[], tuple[HTTPStatus, str, bytes]]
"""Gives status, content type and body."""

IDLE_SECONDS = 10
STOP_SECONDS = 0.05
MOST_CONNECTIONS = 32
"""Each takes a thread; a further one is closed at once."""


class HttpServer:
    """Serves a table of pages by path."""

    def __init__(self, host: str, port: int, pages: dict[str, Page]) -> None:
        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = f"calserve/{__version__}", ""
            timeout = IDLE_SECONDS  # of a connection that sends nothing

            def do_GET(self) -> None:
                page = pages.get(self.path.partition("?")[0], _not_found)
                status, content_type, body = page()
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Nothing: scrapes are not news."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise NotReady(f"cannot listen on {host}:{port}: is another server running there?") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": STOP_SECONDS}, name="http", daemon=True
        )

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002  # as the base class calls it
        return self._places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


def text(body: str, status: HTTPStatus = HTTPStatus.OK) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", body.encode()


def _not_found() -> tuple[HTTPStatus, str, bytes]:
    return text("not found; there are /metrics, /health/live, /health/ready\n", HTTPStatus.NOT_FOUND)
