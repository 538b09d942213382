"""Callers who mean harm, or behave as if, beside one who does not: it sees no error, and nothing is left behind.

The server is a process of its own, as its operator starts it; both fronts are attacked alike.
"""

from __future__ import annotations

import os
import re
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import ngh2
import pytest

from tests.service import models
from tests.service.test_access import INFER, STREAM_INFER, infer

MOST_GROWTH_BYTES = 64 << 20
RECOVERY_SECONDS = 2.0
CALLS_BESIDE = 20
HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 1, 3, 4, 6, 9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Server:
    """`calserve serve` with one front."""

    def __init__(self, root: Path, front: str) -> None:
        self.front = front
        command = [sys.executable, "-m", "service", "serve", "--model-repository", str(root), "--device", "cpu"]
        command += ["--threads", "1", "--port", "0", "--metrics-port", "0", "--front", front]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert self._process.stderr
        for line in self._process.stderr:
            found = re.search(r"gRPC on 127\.0\.0\.1:(\d+), .*, front (\w+)", line)
            if found:
                break
        assert found
        assert found[2] == front
        self.port = int(found[1])
        self._reader = threading.Thread(target=self._process.stderr.read)  # so that it never waits for us
        self._reader.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def rss(self) -> int:
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def sockets(self) -> int:
        """Connections that it has open."""
        folder = Path(f"/proc/{self._process.pid}/fd")
        found = 0
        for path in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                found += str(path.readlink()).startswith("socket")
        return found

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def stop(self) -> int:
        self._process.terminate()
        code = self._process.wait(timeout=60)
        self._reader.join()
        assert self._process.stderr
        self._process.stderr.close()
        return code


class Attacker:
    """One connection that speaks HTTP/2, and of its own accord reads nothing."""

    def __init__(self, server: Server, settings: dict[int, int] | None = None) -> None:
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

    def listen(self) -> None:
        """Read what is there."""
        while select.select([self.socket], [], [], 0)[0]:
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


def message(size: int = 0) -> bytes:
    body = infer() + bytes(size)
    return b"\0" + struct.pack(">I", len(body)) + body


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


Attack = Callable[[Server, ExitStack], None]


def attacker(server: Server, stack: ExitStack, settings: dict[int, int] | None = None) -> Attacker:
    made = Attacker(server, settings)
    stack.callback(made.close)
    return made


def half_messages(server: Server, stack: ExitStack) -> None:
    one = attacker(server, stack)
    for _ in range(100):
        one.send(one.open(), message()[:-10])
    one.flush()


def slow_bodies(server: Server, stack: ExitStack) -> None:
    slow = [attacker(server, stack) for _ in range(20)]
    numbers = [one.open() for one in slow]
    for byte in message()[:20]:
        for one, number in zip(slow, numbers, strict=True):
            one.send(number, bytes([byte]))
            one.flush()


def zero_windows(server: Server, stack: ExitStack) -> None:
    one = attacker(server, stack, {4: 0})
    for _ in range(200):
        one.send(one.open(), message(), end=True)
    one.flush()


def rapid_resets(server: Server, stack: ExitStack) -> None:
    one = attacker(server, stack)
    for _ in range(3000):
        number = one.open()
        one.send(number, message(), end=True)
        one.flush()
        one.h2.reset_stream(number)
        one.flush()


def continuations(server: Server, stack: ExitStack) -> None:
    one = attacker(server, stack)
    one.write(frame(HEADERS, b"", 0, 1))
    for _ in range(2000):
        one.write(frame(CONTINUATION, bytes(1000), 0, 1))


def pings(server: Server, stack: ExitStack) -> None:
    attacker(server, stack).write(frame(PING, bytes(8)) * 100_000)


def setting_floods(server: Server, stack: ExitStack) -> None:
    attacker(server, stack).write(frame(SETTINGS, struct.pack(">HI", 4, 65535)) * 100_000)


def garbage(server: Server, stack: ExitStack) -> None:
    for index in range(200):
        one = stack.enter_context(server.connect())
        one.sendall(
            [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), PREFACE[:10] + bytes(50), bytes(1)][index % 4]
        )


def never_reads(server: Server, stack: ExitStack) -> None:
    for _ in range(5):
        one = attacker(server, stack, {3: 10_000, 4: 1 << 30})
        one.h2.set_local_window_size(1 << 30)
        one.socket.settimeout(0.2)
        for _ in range(1000):
            one.send(one.open(), message(), end=True)
        one.flush()


def never_reads_a_stream(server: Server, stack: ExitStack) -> None:
    one = attacker(server, stack, {4: 1 << 30})
    one.h2.set_local_window_size(1 << 30)
    one.socket.settimeout(0.2)
    number = one.open(STREAM_INFER)
    for _ in range(20_000):
        one.send(number, message())
    one.flush()


def connections_that_do_nothing(server: Server, stack: ExitStack) -> None:
    # grpc-core takes some 36 KB for each: of 2,000 the memory is beyond what this suite allows
    for index in range(2000 if server.front == "h2" else 1000):
        one = stack.enter_context(server.connect())
        if index % 2:
            one.sendall(PREFACE + frame(SETTINGS))


def gone_with_calls_in_flight(server: Server, stack: ExitStack) -> None:
    for _ in range(10):
        one = Attacker(server)
        for _ in range(100):
            one.send(one.open(), message(), end=True)
        one.flush()
        one.close()


def connections_in_a_row(server: Server, stack: ExitStack) -> None:
    for _ in range(500):
        one = Attacker(server)
        one.send(one.open(), message(), end=True)
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
    connections_that_do_nothing,
    gone_with_calls_in_flight,
    connections_in_a_row,
]


class Neighbour(threading.Thread):
    """A caller that behaves, one call after the other, until it is told to stop."""

    def __init__(self, server: Server) -> None:
        super().__init__(name="neighbour")
        self._channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        self._over = threading.Event()
        self._call = self._channel.unary_unary(INFER)
        self.answer = self._call(infer(), timeout=10)
        self.answered, self.errors = 0, list[grpc.RpcError]()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self._call(infer(), timeout=10)
                self.answered += 1
            except grpc.RpcError as error:
                self.errors.append(error)

    def wait_for(self, calls: int) -> None:
        wanted, end = self.answered + calls, time.monotonic() + 60
        while self.answered < wanted and not self.errors:
            assert time.monotonic() < end
            self.join(0.01)

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._channel.close()


@pytest.fixture(scope="module")
def many_files() -> Iterator[None]:
    """Room for 2,000 connections here and in the server, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module", params=["h2", "grpc"])
def server(
    request: pytest.FixtureRequest, many_files: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    root = tmp_path_factory.mktemp(f"hostile_{request.param}") / "models"
    models.write(root, "mlp", models.classifier())
    server = Server(root, request.param)
    with grpc.insecure_channel(
        server.address
    ) as channel:  # what it takes for its first work is not held against callers
        calls = [channel.unary_unary(INFER).future(infer(), timeout=30) for _ in range(200)]
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_caller_that_behaves_sees_nothing_of_one_that_does_not(server: Server, attack: Attack) -> None:
    neighbour = Neighbour(server)
    neighbour.start()
    before, open_before = server.rss(), server.sockets()
    try:
        with ExitStack() as stack:
            attack(server, stack)
            neighbour.wait_for(CALLS_BESIDE)
            grown = server.rss() - before
        begun = time.monotonic()
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            assert channel.unary_unary(INFER)(infer(), timeout=RECOVERY_SECONDS)
        assert time.monotonic() - begun < RECOVERY_SECONDS
    finally:
        neighbour.stop()
    assert neighbour.errors == []
    assert grown < MOST_GROWTH_BYTES
    end = time.monotonic() + 20
    while server.sockets() > open_before:  # all that attacked were let go
        assert time.monotonic() < end


def test_a_thousand_messages_that_are_none_leave_their_connection_as_it_was(server: Server) -> None:
    before = server.rss()
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER)
        for index in range(1000):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff" * (index % 50 + 1), timeout=10)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert call(infer(), timeout=10)
    assert server.rss() - before < MOST_GROWTH_BYTES
