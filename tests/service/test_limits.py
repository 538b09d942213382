"""What one connection and one stream may take, and that a caller who takes more is cut while others are served."""

from __future__ import annotations

import queue
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from calserve.open_inference import messages

import service.app
from service.rpc.limits import ConnectionLimits
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_access import CALIBRATORS, INFER, STREAM_INFER, infer

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING = 4, 6
EXHAUSTED, TOO_LATE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """An HTTP/2 frame of the connection."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4) + payload


def until_closed(connection: socket.socket) -> tuple[bytes, float]:
    """What the server sent before it closed, and how long that took."""
    begun, heard = time.monotonic(), b""
    try:
        while data := connection.recv(1 << 16):
            heard += data
    except ConnectionResetError:
        pass
    return heard, time.monotonic() - begun


@pytest.fixture
def start(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunningServer]]:
    """Starts a server with limits, which it looks at often."""
    monkeypatch.setattr(service.app, "WATCH_SECONDS", 0.05)
    started: list[RunningServer] = []

    def start(**limits: object) -> RunningServer:
        started.append(RunningServer(settings_for(root, **limits)))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.app.port), timeout=20)


def test_a_connection_that_never_says_http2_is_closed(
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ConnectionLimits(handshake_seconds=1.0)
    monkeypatch.setattr(service.app, "_connection_limits", lambda _: quick)
    with connect(start()) as connection:
        heard, seconds = until_closed(connection)
    assert 0.5 < seconds < 10
    assert b"handshake timeout" in heard


def test_a_connection_without_calls_is_closed_after_its_idle_time(start: Callable[..., RunningServer]) -> None:
    server = start(connection_idle_seconds=1.0)
    with connect(server) as connection:
        connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
        _, seconds = until_closed(connection)
    assert 0.5 < seconds < 15


def test_a_connection_is_asked_to_go_at_its_age_and_its_calls_are_served_on_a_new_one(
    start: Callable[..., RunningServer],
) -> None:
    server = start(connection_age_seconds=1.0, connection_age_grace_seconds=1.0)
    with grpc.insecure_channel(server.address) as channel:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            channel.unary_unary(INFER)(infer())
    with connect(server) as connection:
        connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
        _, seconds = until_closed(connection)
    assert 0.5 < seconds < 10


def test_a_flood_of_pings_is_cut(start: Callable[..., RunningServer]) -> None:
    with connect(start()) as connection:
        connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
        try:
            for _ in range(200):
                connection.sendall(frame(PING, bytes(8)))
        except (BrokenPipeError, ConnectionResetError):
            pass
        _, seconds = until_closed(connection)
    assert seconds < 5


def test_metadata_beyond_the_limit_is_refused_and_within_it_passes(start: Callable[..., RunningServer]) -> None:
    server = start(max_metadata_bytes=8 << 10)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER)
        assert call(infer(), metadata=[("x", "y" * 6000)])
        with pytest.raises(grpc.RpcError) as caught:
            call(infer(), metadata=[("x", "y" * 9000)])
        assert caught.value.code() == EXHAUSTED
        assert call(infer())


class Open:
    """An open stream of inferences."""

    def __init__(self, server: RunningServer) -> None:
        self._requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(server.address)
        self._answers = self._channel.stream_stream(STREAM_INFER)(iter(self._requests.get, b""), timeout=30)

    def ask(self) -> str:
        """The error of one answer, empty if there is none."""
        self._requests.put(infer())
        return messages.ModelStreamInferResponse.FromString(next(self._answers)).error_message

    def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends."""
        with pytest.raises(grpc.RpcError) as caught:
            next(self._answers)
        self._requests.put(b"")
        self._channel.close()
        return caught.value.code(), caught.value.details()


def test_a_stream_on_which_nothing_is_sent_is_ended(start: Callable[..., RunningServer]) -> None:
    stream = Open(start(stream_idle_seconds=1.0))
    assert stream.ask() == ""
    assert stream.status() == (TOO_LATE, "nothing was sent for 1 seconds; open a new stream")


def test_a_stream_lasts_no_longer_than_its_limit_however_busy(start: Callable[..., RunningServer]) -> None:
    stream = Open(start(stream_seconds=1.0))
    with pytest.raises(grpc.RpcError) as caught:
        while stream.ask() == "":
            pass
    assert (caught.value.code(), caught.value.details()) == (
        TOO_LATE,
        "a stream lasts at most 1 seconds; open a new one",
    )
    stream._requests.put(b"")


@pytest.mark.parametrize("limit", [{"stream_messages": 3}, {"stream_bytes": 3 * len(infer())}])
def test_a_stream_takes_no_more_than_its_limit(start: Callable[..., RunningServer], limit: dict[str, int]) -> None:
    stream = Open(start(**limit))
    assert [stream.ask() for _ in range(3)] == [""] * 3
    stream._requests.put(infer())
    code, text = stream.status()
    assert code == EXHAUSTED
    assert "a stream takes at most" in text


def test_an_upload_is_bounded_too_and_leaves_nothing_behind(start: Callable[..., RunningServer]) -> None:
    server = start(stream_idle_seconds=1.0)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(f"{CALIBRATORS}/FitCalibrator")(iter(requests.get, b""), timeout=30)
        requests.put(b"")
    assert caught.value.code() == TOO_LATE
    assert list((server.app.settings.store / "jobs").iterdir()) == []


def test_a_watch_may_say_nothing_for_longer_than_a_stream_may_idle(start: Callable[..., RunningServer]) -> None:
    server = start(stream_idle_seconds=0.05, stream_seconds=0.05)
    with grpc.insecure_channel(server.address) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=1)
        next(watch)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() == TOO_LATE
        assert "Deadline" in caught.value.details()  # the caller's own, after a second
