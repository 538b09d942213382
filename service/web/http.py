"""The HTTP port for operators: /metrics, /health/live, /health/ready. Read-only, a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from service import __version__
from service.errors import NotReady

Page = Callable[[], tuple[HTTPStatus, str, bytes]]
"""Gives status, content type and body."""

IDLE_SECONDS = 10


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
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise NotReady(f"cannot listen on {host}:{port}: is another server running there?") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def text(body: str, status: HTTPStatus = HTTPStatus.OK) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", body.encode()


def _not_found() -> tuple[HTTPStatus, str, bytes]:
    return text("not found; there are /metrics, /health/live, /health/ready\n", HTTPStatus.NOT_FOUND)
