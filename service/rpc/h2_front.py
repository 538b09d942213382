"""The fast front: an asyncio Protocol over libnghttp2, where grpc-core costs more than everything else of a call.

It runs the same handlers as the grpc.aio front and keeps the same limits; besides, it knows those of slow senders.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from ssl import SSLContext, SSLObject, SSLSocket
from typing import Any

from service.errors import NotReady
from service.rpc.h2_connection import Http2Connection
from service.rpc.h2_framing import Header, Opening, read_headers
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Method
from service.rpc.tls import CertificateFiles
from service.store.following import seconds_left

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often bounds of time are looked at, or a quarter of the shortest of them."""
REMEMBERED, REMEMBERED_BYTES = 256, 1024
"""Sets of headers that are read once only, and the longest of those."""
BACKLOG = 1024
ABORT_SECONDS = 1.0
"""What is aborted is lost in the next turn of the loop."""


class H2Front:
    """Serves a table of methods on one address, over TLS if there are certificates."""

    name = "h2"

    def __init__(
        self, methods: Iterable[Method], limits: ConnectionLimits, certificates: CertificateFiles | None = None
    ) -> None:
        self.limits, self.stopping = limits, False
        self._methods = {method.path: method for method in methods}
        self._certificates = certificates
        self._connections: set[Http2Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._openings: dict[tuple[Header, ...], tuple[Opening, Method | None]] = {}
        self._held = 0
        self._servers: list[asyncio.Server] = []
        self._socket: Path | None = None
        self._inflater: ThreadPoolExecutor | None = None
        self._all_lost: asyncio.Future[None] | None = None
        self._sweep: asyncio.TimerHandle | None = None
        bounds = limits.handshake_seconds, limits.idle_seconds, limits.stall_seconds, limits.keepalive_seconds
        self._look_seconds = min(LOOK_SECONDS, *(bound / 4 for bound in (*bounds, limits.age_seconds)))

    async def start(self, host: str, port: int, socket: Path | None = None) -> int:
        """Listen, on a local socket too if one is given; return the port, chosen by the system if `port` is 0.

        NotReady if the address is taken.
        """
        self.loop = asyncio.get_running_loop()
        tls = None if self._certificates is None else _context(self._certificates)
        seconds = None if tls is None else self.limits.handshake_seconds
        try:
            for listening in await self._listen(host, port):
                self._servers.append(
                    await self.loop.create_server(
                        self._new, sock=listening, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=seconds
                    )
                )
                port = listening.getsockname()[1]
            if socket is not None:
                self._servers.append(await self.loop.create_unix_server(self._new, socket, backlog=BACKLOG))
                self._socket = socket
        except OSError as error:
            raise NotReady(f"cannot listen on {host}:{port}: is another server running there?") from error
        self._look()
        return port

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new connections, ask those there are to go when their calls have ended, cut them after the grace."""
        self.stopping = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.retire()
        await self._wait_for_all(grace_seconds)
        for connection in list(self._connections):
            connection.abort()
        await self._wait_for_all(ABORT_SECONDS)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ABORT_SECONDS)
        if self._sweep is not None:
            self._sweep.cancel()
        if self._inflater is not None:
            self._inflater.shutdown(wait=False, cancel_futures=True)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    async def _wait_for_all(self, seconds: float) -> None:
        """Return when every connection is lost, or after so many seconds."""
        if self._connections:
            self._all_lost = self.loop.create_future()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._all_lost, seconds)

    # For the connections

    def open(self, connection: Http2Connection) -> None:
        self._connections.add(connection)
        if self.stopping:
            connection.abort()

    def lost(self, connection: Http2Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._all_lost is not None and not self._all_lost.done():
            self._all_lost.set_result(None)

    def opening(self, headers: tuple[Header, ...]) -> tuple[Opening, Method | None]:
        """What headers say, and the method they name; callers send the same ones again and again."""
        known = self._openings.get(headers)
        if known is None:
            opening = read_headers(headers)
            known = opening, self._methods.get(opening.path)
            if opening.size <= REMEMBERED_BYTES:
                if len(self._openings) >= REMEMBERED:
                    self._openings.clear()
                self._openings[headers] = known
        return known

    def hold(self, size: int) -> bool:
        """Count bytes of messages that are not yet whole, or not yet read; whether there is room for them."""
        if size > 0 and self._held + size > self.limits.half_sent_bytes:
            return False
        self._held += size
        return True

    def keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """A task that must not be lost, as the loop itself holds none."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def in_thread(self, work: Callable[..., bytes], *arguments: Any) -> bytes:
        """In one thread, so that not all cores are kept busy by messages that are to be decompressed."""
        if self._inflater is None:
            self._inflater = ThreadPoolExecutor(1, "inflate")
        return await self.loop.run_in_executor(self._inflater, work, *arguments)

    def _new(self) -> Http2Connection:
        return Http2Connection(self)

    def _look(self) -> None:
        now = self.loop.time()
        for connection in list(self._connections):
            try:
                connection.check(now)
            except Exception:
                log.exception("a connection could not be looked after and is closed")
                connection.abort()
        self._sweep = self.loop.call_later(seconds_left(self._look_seconds, now), self._look)

    async def _listen(self, host: str, port: int) -> list[socket.socket]:
        """Sockets on every address of the host, on one port."""
        found = await self.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening: list[socket.socket] = []
        for family, address in _distinct((info[0], info[4]) for info in found):
            taken = (address[0], listening[0].getsockname()[1] if listening else address[1])
            both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
            listening.append(
                socket.create_server(
                    taken, family=family, backlog=BACKLOG, reuse_port=self.limits.shared_port, dualstack_ipv6=both
                )
            )
        return listening


def _distinct(addresses: Iterator[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    return dict.fromkeys(addresses)


def _context(files: CertificateFiles) -> SSLContext:
    """A context that shows each new connection the certificate as the files have it then."""
    first = files.current.context

    def renew(connection: SSLObject | SSLSocket, _name: str | None, _context: SSLContext) -> None:
        files.changed()
        if connection.context is not files.current.context:
            connection.context = files.current.context

    first.sni_callback = renew
    return first
