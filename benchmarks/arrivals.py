"""Calls that begin when their time has come, drawn beforehand (Poisson), however many are waiting.

What callers who do not know of each other do, and what a closed loop never shows: a latency counts from the time that
was drawn, so a call that could not even be sent has waited too. The client speaks HTTP/2 through ngh2, a fifth of what
grpc's own costs, since else it would be the limit.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import grpc
import ngh2
import numpy as np

if TYPE_CHECKING:
    from benchmarks.load import Answers, Command

CONNECTIONS = 8
WINDOW_BYTES, READ_BYTES = 1 << 24, 1 << 18
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class Connection:
    """One connection to a server, with the calls that wait on it."""

    def __init__(self, command: Command, path: str, answers: Answers) -> None:
        host, _, port = command.address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.unsent = b""
        self.waiting: dict[int, tuple[int, float, list[bytes]]] = {}
        self._answers = answers
        self._bodies = [b"\0" + len(request).to_bytes(4, "big") + request for request in answers.requests]
        self._h2 = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration())
        self._h2.initiate_connection({})
        self._h2.set_local_window_size(WINDOW_BYTES)
        self._fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", command.address.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"grpc-timeout", b"%dm" % (1000 * command.deadline_seconds)),
        ]

    def begin(self, index: int, due: float) -> None:
        number = self._h2.send_request(self._fields)
        self._h2.send_data(number, self._bodies[index], end_stream=True)
        self.waiting[number] = index, due, []

    def write(self) -> None:
        """As much of what there is to say as the system takes."""
        self.unsent += self._h2.data_to_send()
        if self.unsent:
            with suppress(BlockingIOError):
                self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def read(self) -> None:
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the server closed a connection with calls on it")
        self._h2.receive_data(data)
        for event in self._h2.events():
            self._hear(event)

    def _hear(self, event: ngh2.Event) -> None:
        match event:
            case ngh2.DataReceived(number, data, _):
                self.waiting[number][2].append(bytes(data))
            case ngh2.ResponseReceived(number, headers, _) | ngh2.TrailersReceived(number, headers):
                fields = dict(headers)
                if b"grpc-status" in fields:
                    self._end(number, int(fields[b"grpc-status"]), fields.get(b"grpc-message", b"").decode())
            case ngh2.StreamReset(number, code) if number in self.waiting:
                self._end(number, grpc.StatusCode.UNAVAILABLE.value[0], f"stream reset with {code}")

    def _end(self, number: int, status: int, text: str) -> None:
        index, due, parts = self.waiting.pop(number)
        if status:
            self._answers.refused(CODES[status], text, due)
        else:
            self._answers.answered(index, b"".join(parts)[5:], due)


def poisson(command: Command, path: str, answers: Answers) -> None:
    """Arrivals at `rate` a second for `seconds`."""
    gaps = np.random.default_rng(0).exponential(1 / command.rate, max(1, int(command.rate * command.seconds)))
    with ExitStack() as stack:
        connections = [Connection(command, path, answers) for _ in range(CONNECTIONS)]
        for connection in connections:
            stack.enter_context(connection.socket)
        answers.result.late = 1000 * float(np.median(_run(connections, gaps, command, answers)))
        for connection in connections:
            for _, due, _ in connection.waiting.values():
                answers.refused("DEADLINE_EXCEEDED", "no answer in time", due)


def _run(connections: list[Connection], gaps: Any, command: Command, answers: Answers) -> list[float]:
    """How late each call was begun, in seconds: what the client itself is to blame for."""
    times = (time.perf_counter() + np.cumsum(gaps)).tolist()
    end, late = times[-1] + command.deadline_seconds, list[float]()
    while len(late) < len(times) or any(connection.waiting for connection in connections):
        now = time.perf_counter()
        if now > end:
            break
        while len(late) < len(times) and (due := times[len(late)]) <= now:
            number = len(late)
            connections[number % CONNECTIONS].begin(number % len(answers.requests), due)
            late.append(now - due)
        for connection in connections:
            connection.write()
        next_time = times[len(late)] if len(late) < len(times) else end
        writers = [connection.socket for connection in connections if connection.unsent]
        readers = {connection.socket: connection for connection in connections}
        readable, _, _ = select.select(readers, writers, [], max(0.0, next_time - time.perf_counter()))
        for one in readable:
            readers[one].read()
    return late
