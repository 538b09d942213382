"""A caller and a connection of the fast front, joined in memory: every byte between them is in the test's hands."""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import ngh2

from service.rpc.h2_connection import Http2Connection
from service.rpc.h2_front import H2Front
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Call, Method
from service.rpc.sessions import Line

ECHO, COUNT, SUM, CHAT, NEVER = "/t/Echo", "/t/Count", "/t/Sum", "/t/Chat", "/t/Never"
TALK = "/t/Talk"
"""The same as a chat, answered by a session."""


async def echo(request: bytes, call: Call) -> bytes:
    return request


async def count(request: bytes, call: Call) -> Any:
    for number in range(int(request)):
        yield b"%d" % number


async def total(requests: Any, call: Call) -> bytes:
    return b"%d" % sum([int(request) async for request in requests])


async def chat(requests: Any, call: Call) -> Any:
    async for request in requests:
        yield request


class Talk:
    """The session that gives back what it gets."""

    def __init__(self, line: Line, call: Call) -> None:
        self.line, self.call, self.is_over = line, call, False

    def go_on(self) -> None:
        try:
            while not self.is_over and self.line.has_room() and (request := self.line.next()) is not None:
                self.line.send(request)
        except StopIteration:
            self.end(None)
        except Exception as error:
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        if not self.is_over:
            self.is_over = True
            self.line.over(error)


class Never:
    """A handler that waits for ever, and says how that ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.begun = 0

    async def __call__(self, *_: object) -> bytes:
        self.begun += 1
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        return b""


class Wire(asyncio.Transport):
    """Keeps what is written; full when more than `most` bytes were not taken."""

    def __init__(self, most: int = 1 << 30) -> None:
        super().__init__()
        self.most, self.written, self.over = most, bytearray(), False
        self.reading, self.protocol = True, None

    def write(self, data: Any) -> None:
        self.written += data
        if len(self.written) > self.most:
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.written)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.over = True

    abort = close


@dataclass
class Heard:
    """What the caller heard of one call."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    reset: int | None = None
    closed: bool = False

    @property
    def status(self) -> int | None:
        value = self.trailers.get(b"grpc-status", self.headers.get(b"grpc-status"))
        return None if value is None else int(value)

    @property
    def message(self) -> str:
        return unquote(self.trailers.get(b"grpc-message", self.headers.get(b"grpc-message", b"")).decode())

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.data):
            (length,) = struct.unpack_from(">I", self.data, at + 1)
            found.append(bytes(self.data[at + 5 : at + 5 + length]))
            at += 5 + length
        return found


class Pair:
    """The two ends. `settings` are the caller's own."""

    def __init__(
        self, front: H2Front, *, settings: dict[int, int] | None = None, most: int = 1 << 30, greet: bool = True
    ) -> None:
        self.front, self.wire = front, Wire(most)
        self.connection = self.wire.protocol = Http2Connection(front)
        self.connection.connection_made(self.wire)
        self.caller = ngh2.Connection(
            ngh2.Role.CLIENT, ngh2.Configuration(max_outbound_ack=10**6, max_send_header_block_length=1 << 20)
        )
        self.caller.initiate_connection(settings or {})
        self.heard: defaultdict[int, Heard] = defaultdict(Heard)
        self.goaways: list[tuple[int, int, bytes]] = []
        self.pings: list[bytes] = []
        if greet:
            self.exchange()

    def open(self, path: str, *, extra: Iterable[tuple[bytes, bytes]] = (), end: bool = False, **named: bytes) -> int:
        fields = {b":method": b"POST", b":scheme": b"http", b":path": path.encode(), b":authority": b"here"}
        fields |= {b"content-type": b"application/grpc", b"te": b"trailers"}
        fields |= {name.replace("_", "-").encode(): value for name, value in named.items()}
        return self.caller.send_request([*fields.items(), *extra], end_stream=end)

    def send(self, number: int, *messages: bytes, end: bool = False, flag: int = 0) -> None:
        for message in messages:
            self.caller.send_data(number, struct.pack(">BI", flag, len(message)) + message)
        if end:
            self.caller.end_stream(number)

    def ask(self, path: str, *messages: bytes, **named: bytes) -> int:
        number = self.open(path, **named)
        self.send(number, *messages, end=True)
        return number

    def deliver(self) -> None:
        """What the caller has to say, in one read."""
        data = self.caller.data_to_send()
        if data and not self.connection._closing:
            self.connection.data_received(data)

    def take(self) -> None:
        """The caller reads all that was written."""
        data, self.wire.written = bytes(self.wire.written), bytearray()
        if data:
            self.caller.receive_data(data)
        for event in self.caller.events():
            self._note(event)
        if self.connection._paused and not self.wire.over:
            self.connection.resume_writing()

    def exchange(self) -> None:
        """Both ends say all that they have to say."""
        for _ in range(20):
            self.deliver()
            self.take()

    async def until(self, over: Callable[[], bool]) -> None:
        """Turn the loop and let both ends talk, until something has happened."""
        async with asyncio.timeout(20):
            while not over():
                self.exchange()
                await Turn()

    async def answer(self, number: int) -> Heard:
        await self.until(lambda: self.heard[number].closed or (self.wire.over and not self.wire.written))
        return self.heard[number]

    def _note(self, event: ngh2.Event) -> None:
        match event:
            case ngh2.ResponseReceived(number, headers, _):
                self.heard[number].headers = dict(headers)
            case ngh2.DataReceived(number, data, _):
                self.heard[number].data += data
            case ngh2.TrailersReceived(number, headers):
                self.heard[number].trailers = dict(headers)
            case ngh2.StreamReset(number, code):
                self.heard[number].reset = code
            case ngh2.StreamClosed(number, _, _):
                self.heard[number].closed = True
            case ngh2.GoAwayReceived(last, code, why):
                self.goaways.append((last, code, why))
            case ngh2.PingReceived(data):
                self.pings.append(data)


def front_with(limits: ConnectionLimits | None = None, **handlers: Callable[..., Any]) -> H2Front:
    """A front that does not listen, with the methods above; must be made in a running loop."""
    methods = [
        Method(ECHO, False, False, handlers.get("echo", echo), bytes),  # type: ignore[arg-type]
        Method(COUNT, False, True, handlers.get("count", count), bytes),  # type: ignore[arg-type]
        Method(SUM, True, False, handlers.get("total", total), bytes),  # type: ignore[arg-type]
        Method(CHAT, True, True, handlers.get("chat", chat), bytes),  # type: ignore[arg-type]
        Method(TALK, True, True, handlers.get("talk", Talk), bytes, by_session=True),  # type: ignore[arg-type]
        Method(NEVER, False, False, handlers.get("never", Never()), bytes),  # type: ignore[arg-type]
    ]
    front = H2Front(methods, limits or ConnectionLimits())
    front.loop = asyncio.get_running_loop()
    return front


class Turn:
    """Awaited: one turn of the loop."""

    def __await__(self) -> Iterator[None]:
        yield


async def turns_until(over: Callable[[], bool]) -> None:
    """Turn the loop until something has happened."""
    async with asyncio.timeout(20):
        while not over():
            await Turn()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """An asynchronous test; what goes wrong in a callback fails it too."""
    wrong: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        await test()

    asyncio.run(watched())
    assert not wrong
