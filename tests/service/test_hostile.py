"""Callers who mean harm, or behave as if, beside one who does not: it sees no error, and nothing is left behind.

The server is a process of its own, as its operator starts it; both fronts are attacked alike.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from tests.service import models
from tests.service.attacks import ATTACKS, Attack
from tests.service.test_access import INFER, infer

MOST_GROWTH_BYTES = 64 << 20
RECOVERY_SECONDS = 2.0
CALLS_BESIDE = 20


class Server:
    """`calserve serve` with one front."""

    def __init__(self, root: Path, front: str, port: int = 0) -> None:
        self.front, self.request = front, infer()
        command = [sys.executable, "-m", "service", "serve", "--model-repository", str(root), "--device", "cpu"]
        command += ["--threads", "1", "--port", str(port), "--metrics-port", "0", "--front", front]
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
