"""What hostile callers do, and callers that behave as if: attacks on a server, for tests and for soaks.

An attack ends soon; what it holds open stays so until the stack is closed.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Protocol

import ngh2

INFER, STREAM_INFER = (f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ModelStreamInfer"))
HEADERS, SETTINGS, PING, CONTINUATION = 1, 4, 6, 9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Target(Protocol):
    """A server, by one of its fronts, and a request that it answers."""

    front: str
    request: bytes

    def connect(self) -> socket.socket: ...


class Attacker:
    """One connection that speaks HTTP/2, and of its own accord reads nothing."""

    def __init__(self, server: Target, settings: dict[int, int] | None = None) -> None:
        self.socket = server.connect()
        self.h2 = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration(max_outbound_ack=10**6))
        self.h2.initiate_connection(settings or {})
        self.flush()

    def open(self, path: str = INFER) -> int:
        fields = {b":method": b"POST", b":scheme": b"http", b":path": path.encode(), b":authority": b"here"}
        return self.h2.send_request([*fields.items(), (b"content-type", b"application/grpc"), (b"te", b"trailers")])

    def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(number, data, end_stream=end)

    def flush(self) -> None:
        self.write(self.h2.data_to_send())

    def write(self, data: bytes) -> None:
        """As much of it as is taken; a server that hangs up is no surprise here."""
        with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            self.socket.sendall(data)

    def listen(self, seconds: float = 0) -> None:
        """Read what is there, or comes so soon."""
        while select.select([self.socket], [], [], seconds)[0]:
            try:
                data = self.socket.recv(1 << 16)
                if not data:
                    return
                self.h2.receive_data(data)
            except (ConnectionResetError, ngh2.NGH2Error):
                return

    def close(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at once, by RST
        self.socket.close()


def message(server: Target) -> bytes:
    return b"\0" + struct.pack(">I", len(server.request)) + server.request


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


Attack = Callable[[Target, ExitStack], None]


def attacker(server: Target, stack: ExitStack, settings: dict[int, int] | None = None) -> Attacker:
    made = Attacker(server, settings)
    stack.callback(made.close)
    return made


def half_messages(server: Target, stack: ExitStack) -> None:
    one = attacker(server, stack)
    for _ in range(100):
        one.send(one.open(), message(server)[:-10])
    one.flush()


def slow_bodies(server: Target, stack: ExitStack) -> None:
    slow = [attacker(server, stack) for _ in range(20)]
    numbers = [one.open() for one in slow]
    for byte in message(server)[:20]:
        for one, number in zip(slow, numbers, strict=True):
            one.send(number, bytes([byte]))
            one.flush()


def zero_windows(server: Target, stack: ExitStack) -> None:
    one = attacker(server, stack, {4: 0})
    for _ in range(200):
        one.send(one.open(), message(server), end=True)
    one.flush()


def rapid_resets(server: Target, stack: ExitStack) -> None:
    one = attacker(server, stack)
    for _ in range(3000):
        number = one.open()
        one.send(number, message(server), end=True)
        one.flush()
        one.h2.reset_stream(number)
        one.flush()


def continuations(server: Target, stack: ExitStack) -> None:
    one = attacker(server, stack)
    one.write(frame(HEADERS, b"", 0, 1))
    for _ in range(2000):
        one.write(frame(CONTINUATION, bytes(1000), 0, 1))


def pings(server: Target, stack: ExitStack) -> None:
    attacker(server, stack).write(frame(PING, bytes(8)) * 100_000)


def setting_floods(server: Target, stack: ExitStack) -> None:
    attacker(server, stack).write(frame(SETTINGS, struct.pack(">HI", 4, 65535)) * 100_000)


def garbage(server: Target, stack: ExitStack) -> None:
    for index in range(200):
        one = stack.enter_context(server.connect())
        one.sendall(
            [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), PREFACE[:10] + bytes(50), bytes(1)][index % 4]
        )


def never_reads(server: Target, stack: ExitStack) -> None:
    for _ in range(5):
        one = attacker(server, stack, {3: 10_000, 4: 1 << 30})
        one.h2.set_local_window_size(1 << 30)
        one.socket.settimeout(0.2)
        for _ in range(1000):
            one.send(one.open(), message(server), end=True)
        one.flush()


def never_reads_a_stream(server: Target, stack: ExitStack) -> None:
    one = attacker(server, stack, {4: 1 << 30})
    one.h2.set_local_window_size(1 << 30)
    one.socket.settimeout(0.2)
    number = one.open(STREAM_INFER)
    for _ in range(20_000):
        one.send(number, message(server))
    one.flush()


def messages_of_nothing(server: Target, stack: ExitStack) -> None:
    one = attacker(server, stack, {4: 0})
    number = one.open(STREAM_INFER)
    with suppress(ngh2.StreamProtocolError):  # it was cut
        for _ in range(40):
            one.send(number, bytes(500_000))
            one.flush()
            one.listen(0.02)


def connections_that_do_nothing(server: Target, stack: ExitStack) -> None:
    # grpc-core takes some 36 KB for each: of 2,000 the memory is beyond what this suite allows
    for index in range(2000 if server.front == "h2" else 1000):
        one = stack.enter_context(server.connect())
        if index % 2:
            one.sendall(PREFACE + frame(SETTINGS))


def gone_with_calls_in_flight(server: Target, stack: ExitStack) -> None:
    for _ in range(10):
        one = Attacker(server)
        for _ in range(100):
            one.send(one.open(), message(server), end=True)
        one.flush()
        one.close()


def connections_in_a_row(server: Target, stack: ExitStack) -> None:
    for _ in range(500):
        one = Attacker(server)
        one.send(one.open(), message(server), end=True)
        one.flush()
        one.close()


ATTACKS: list[Attack] = [
    half_messages,
    slow_bodies,
    zero_windows,
    rapid_resets,
    continuations,
    pings,
    setting_floods,
    garbage,
    never_reads,
    never_reads_a_stream,
    messages_of_nothing,
    connections_that_do_nothing,
    gone_with_calls_in_flight,
    connections_in_a_row,
]
