"""The HTTP port for operators: /metrics, /health/live, /health/ready, and the page. Read-only, a thread of its own.

It knows neither TLS nor tokens, and tells the models' names, their revisions, how much they are used and how well they
do: it listens where the operator says, by default for this machine alone.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from service import __version__
from service.errors import NotReady, shown

log = logging.getLogger(__name__)

Page = Callable[[], tuple[HTTPStatus, str, bytes]]
"""Gives status, content type and body."""

IDLE_SECONDS = 10
MOST_CONNECTIONS = 32
"""Each takes a thread; a further one is closed at once."""
LEAST_COMPRESSED = 1400
"""Bytes of a body that is worth compressing: what a packet holds."""


@dataclass(frozen=True)
class Response:
    """What a site answers. `compressed` is the body as gzip, if it is there already."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    compressed: bytes = b""


Site = Callable[[str, str], Response | None]
"""Answers a path and a query; None: there is no such page."""


class HttpServer:
    """Serves a table of pages by path, and a site beneath it."""

    def __init__(self, host: str, port: int, pages: dict[str, Page], site: Site | None = None) -> None:
        def _answer(path: str, query: str) -> Response:
            if path in pages:
                return Response(*pages[path]())
            return (site(path, query) if site else None) or Response(*_not_found([*pages]))

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = f"calserve/{__version__}", ""
            timeout = IDLE_SECONDS  # of a connection that sends nothing

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                try:
                    response = _answer(path, query)
                except Exception:
                    log.exception("%s could not be answered", shown(path))
                    response = Response(*text("failed; the log says why\n", HTTPStatus.INTERNAL_SERVER_ERROR))
                self._send(response)

            def _send(self, response: Response) -> None:
                tag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
                if response.headers and self.headers.get("If-None-Match") == tag:
                    self.send_response(HTTPStatus.NOT_MODIFIED)
                    self.send_header("ETag", tag)
                    self.end_headers()
                    return
                body, packed = self._packed(response)
                self.send_response(response.status)
                headers = {"Content-Type": response.content_type, "Content-Length": str(len(body)), **response.headers}
                if response.headers:
                    headers |= {"ETag": tag, "Vary": "Accept-Encoding"}
                if packed:
                    headers["Content-Encoding"] = "gzip"
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def _packed(self, response: Response) -> tuple[bytes, bool]:
                accepted = "gzip" in self.headers.get("Accept-Encoding", "")
                if not (accepted and response.headers) or len(response.body) < LEAST_COMPRESSED:
                    return response.body, False
                return response.compressed or gzip.compress(response.body, 5, mtime=0), True

            def log_message(self, *args: object) -> None:
                """Nothing: scrapes are not news."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise NotReady(f"cannot listen on {host}:{port}: is another server running there?") from error
        self._thread = threading.Thread(target=self._server.serve_until_told, name="http", daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.tell_to_stop()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    timeout = 0  # who knocked may be gone when it is answered

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._told, self._tell = socket.socketpair()
        super().__init__(address, handler)

    def serve_until_told(self) -> None:
        """Waits as long as nobody comes: the base class looks up all the time to see whether it is to stop."""
        with DefaultSelector() as selector:
            selector.register(self.socket, EVENT_READ)
            selector.register(self._told, EVENT_READ)
            while all(key.fileobj is not self._told for key, _ in selector.select()):
                self.handle_request()

    def tell_to_stop(self) -> None:
        self._tell.close()

    def server_close(self) -> None:
        super().server_close()
        self._told.close()
        self._tell.close()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002  # as the base class calls it
        return self._places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


def text(body: str, status: HTTPStatus = HTTPStatus.OK) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", body.encode()


def _not_found(paths: Sequence[str]) -> tuple[HTTPStatus, str, bytes]:
    return text(f"not found; there are {', '.join(paths)}\n", HTTPStatus.NOT_FOUND)
