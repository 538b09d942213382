"""The calls of an HTTP/2 connection: requests gathered, handlers run, answers given back.

A handler that is `Direct` costs no task, nor does a stream that a session answers; any other has a task of its own (see
`streams`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, Self

from service.errors import CalserveError
from service.rpc.h2_framing import OK_TRAILERS, Header, Messages, Opening, fail, inflate, trailers
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Call, Cancellable, Direct, Method
from service.rpc.sessions import Session
from service.rpc.status import Code, Relayed, Status, status_of, transport_status

log = logging.getLogger(__name__)

UNREAD_BYTES = 1 << 20
"""Of one stream's messages that its handler has not read; beyond that what comes is left as it came, and the caller's
window is not opened again."""
MESSAGE_BYTES = 100
"""What a message that waits to be read takes beside its own bytes: a caller may send millions of empty ones."""
UNTAKEN_BYTES = 1 << 20
"""Of one stream's answers that its caller has not taken; beyond that its handler waits."""
INFLATED_IN_LOOP = 1 << 10
"""Longer messages are decompressed in a thread: a thousandfold of them is too much for the loop."""


class Connection(Protocol):
    """What a call asks of its connection."""

    limits: ConnectionLimits
    loop: asyncio.AbstractEventLoop
    now: float
    """Of the latest read, on the loop's clock."""

    def peer(self) -> str: ...

    def start(self, call: Exchange) -> None: ...
    def answer(self, call: Exchange, message: bytes) -> None: ...
    def send(self, call: Exchange, message: bytes) -> None: ...
    def end(self, call: Exchange, fields: list[Header] = OK_TRAILERS) -> None: ...
    def reset(self, call: Exchange) -> None: ...
    def acknowledge(self, call: Exchange, size: int) -> None: ...
    def hold(self, size: int) -> None: ...
    def has_room(self, call: Exchange, size: int) -> bool: ...
    def when_room(self, call: Exchange, then: Callable[[], None]) -> None: ...
    def keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]: ...
    async def in_thread(self, work: Callable[..., bytes], *arguments: Any) -> bytes: ...


class Exchange:
    """One call: what came of it, what runs for it, what was said.

    Attributes
    ----------
    owed : bytes that came and that the caller's window was not opened for again
    responding : whether the answer's headers were sent
    said : whether all of the answer was handed over, or there will be none
    heard : whether the caller has sent its last
    """

    __slots__ = (
        "_begun",
        "_connection",
        "_held",
        "_messages",
        "_method",
        "_runner",
        "_single",
        "_stuck",
        "_timer",
        "call",
        "heard",
        "id",
        "opening",
        "owed",
        "responding",
        "said",
    )

    def __init__(self, connection: Connection, number: int, opening: Opening, method: Method) -> None:
        self.id, self.opening = number, opening
        self._connection, self._method = connection, method
        timeout = opening.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        self.call = Call(deadline, opening.metadata, connection.peer)
        self._messages: Messages | None = None
        self._runner: Cancellable | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._single = not method.client_streaming
        self._begun = connection.now if self._single else None
        self._stuck: tuple[int, float] | None = None
        self._held = self.owed = 0
        self.responding = self.said = self.heard = False

    def received(self, data: bytes) -> None:
        """Bytes of the request."""
        raise NotImplementedError

    def ended(self) -> None:
        """The caller has sent its last."""
        raise NotImplementedError

    def run(self, *, more: bool) -> None:
        """What was asked for with `connection.start`. `more`: other calls are about to be run."""
        raise NotImplementedError

    def gone(self) -> None:
        """The stream is closed: nobody waits any more."""
        self.said = self.heard = True
        if self._messages is not None or self._timer is not None:
            self._let_go()
        if self._runner is not None:
            self._runner.cancel()

    def fail(self, error: BaseException) -> None:
        """End the call with an error's status."""
        if not isinstance(error, CalserveError | Relayed):
            log.error("call %s of %s failed", self.call.id, self._method.path, exc_info=error)
        self.refuse(status_of(error, self.call.id))

    def refuse(self, status: Status) -> None:
        """End the call with a status."""
        if not self.said:
            self._let_go()
            self._connection.end(self, trailers(status))

    def cut(self, status: Status) -> None:
        """The same from outside, whatever runs for it."""
        self.refuse(status)
        self._stop()

    def check(self, now: float, queued: int) -> None:
        """Cut a call that has passed a bound of time; `queued` bytes of its answer wait for the caller."""
        limits = self._connection.limits
        if not self.said and self.call.deadline is not None and time.monotonic() >= self.call.deadline:
            self.expire()
        elif self.owed and self._begun is not None:
            self._begun = now  # it is not the caller who keeps the rest from coming
        elif not self.heard and self._begun is not None:
            most = limits.seconds_for(self._messages.wanted if self._messages else 0)
            if now - self._begun > most:
                text = f"a message was not sent whole within {most:.0f} seconds"
                self.cut(transport_status(Code.DEADLINE_EXCEEDED, text, "MESSAGE_TOO_SLOW"))
        if not queued:
            self._stuck = None
        elif self._stuck is None or (not self.said and queued != self._stuck[0]):
            self._stuck = queued, now
        elif now - self._stuck[1] > limits.seconds_for(self._stuck[0] if self.said else 0):
            self._connection.reset(self)

    def expire(self) -> None:
        """The caller's time is up."""
        self.cut(transport_status(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", "DEADLINE_PASSED"))

    def _stop(self) -> None:
        if self._runner is not None:
            self._runner.cancel()

    def _feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """The messages that are whole now; what is held of the next is counted."""
        messages = self._messages
        if messages is None:
            messages = self._begin_messages()
        found = messages.feed(data)
        if messages.held != self._held:
            self._connection.hold(messages.held - self._held)
            self._held = messages.held
        if found or self._begun is None:
            self._begun = None if messages.is_whole and not self._single else self._connection.now
        return found

    def _begin_messages(self) -> Messages:
        most = self._connection.limits.message_bytes
        self._messages = Messages(most, may_be_compressed=bool(self.opening.encoding))
        return self._messages

    def _let_go(self) -> None:
        """Give back what is held of a message that nobody wants any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            self._connection.hold(-self._held)
            self._held = 0
        self._messages = self._begun = None

    def _set_timer(self) -> None:
        seconds = self.call.seconds_left()
        if seconds is not None and not self.said:
            self._timer = self._connection.loop.call_later(seconds, self.expire)

    async def _plain(self, message: bytes, compressed: bool) -> bytes:
        if not compressed:
            return message
        arguments = message, self.opening.encoding, self._connection.limits.message_bytes
        if len(message) <= INFLATED_IN_LOOP:
            return inflate(*arguments)
        return await self._connection.in_thread(inflate, *arguments)


class Unary(Exchange):
    """One request, one answer."""

    __slots__ = ("_compressed", "_count", "_request")

    def __init__(self, connection: Connection, number: int, opening: Opening, method: Method) -> None:
        super().__init__(connection, number, opening, method)
        self._request, self._compressed, self._count = b"", False, 0

    @property
    def is_begun(self) -> bool:
        """Whether a part of the request came already."""
        return self._messages is not None

    def received(self, data: bytes) -> None:
        for request, compressed in self._feed(data):
            self._request, self._compressed = request, compressed
            self._count += 1
            if self._count > 1:
                fail(Code.UNIMPLEMENTED, f"{self._method.path} takes one message", "ONE_MESSAGE")

    def received_whole(self, message: bytes) -> None:
        """All of the request at once, as most come."""
        self._request, self.heard = message, True
        self._connection.start(self)

    def ended(self) -> None:
        self.heard = True
        if self._messages is None or not self._messages.is_whole or not self._count:
            fail(Code.UNIMPLEMENTED, f"{self._method.path} takes one message, and it did not come whole", "ONE_MESSAGE")
        self._messages = None
        self._connection.start(self)

    def run(self, *, more: bool) -> None:
        call, request = self.call, self._request
        self._request = b""
        call.more = more
        handler = self._method.handler
        if self._compressed or not isinstance(handler, Direct):
            self._runner = self._connection.keep(self._connection.loop.create_task(self._in_task(request)))
            self._set_timer()
            return
        try:
            self._runner = handler.begin(request, call, self._done)
        except Exception as error:
            self._done(b"", error)

    async def _in_task(self, request: bytes) -> None:
        try:
            answer = await self._method.handler(await self._plain(request, self._compressed), self.call)
        except asyncio.CancelledError as error:
            self._done(b"", error)
            raise
        except Exception as error:
            self._done(b"", error)
        else:
            self._done(answer, None)

    def _done(self, answer: bytes, error: BaseException | None) -> None:
        self._runner = None
        if self.said:
            return  # it was ended from outside
        if self._timer is not None:
            self._let_go()
        if error is None:
            self._connection.answer(self, answer)
        elif isinstance(error, asyncio.CancelledError):
            self._connection.reset(self)
        else:
            self.fail(error)


class Streaming(Exchange):
    """A stream of requests, of answers, or of both."""

    __slots__ = ("_raw", "_ready", "_unread", "_waiter")

    def __init__(self, connection: Connection, number: int, opening: Opening, method: Method) -> None:
        super().__init__(connection, number, opening, method)
        self._ready: deque[tuple[bytes, bool]] = deque()
        self._raw: deque[bytes] = deque()
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._begin_messages()
        connection.start(self)

    def received(self, data: bytes) -> None:
        if self._raw or self._unread > UNREAD_BYTES:
            self._raw.append(data)
            self.owed += len(data)
        else:
            self._cut_up(data)
        self._wake()

    def ended(self) -> None:
        self.heard = True
        self._wake()

    def run(self, *, more: bool) -> None:
        self._runner = self._connection.keep(self._connection.loop.create_task(self._serve()))
        self._set_timer()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._has_next():
            if self.heard:
                raise StopAsyncIteration
            await self._told()
        message, compressed = self._ready.popleft()
        self._count(-len(message) - MESSAGE_BYTES)
        self.call.more = bool(self._ready)
        return await self._plain(message, compressed) if compressed else message

    async def _told(self) -> None:
        self._waiter = self._connection.loop.create_future()
        await self._waiter

    async def _serve(self) -> None:
        try:
            if self._method.server_streaming:
                await self._answer_many()
            else:
                request: Any = self if self._method.client_streaming else await self._only_request()
                self._connection.send(self, await self._method.handler(request, self.call))
        except asyncio.CancelledError:
            if not self.said:
                self._connection.reset(self)  # by the server itself: the caller takes not even an error
            raise
        except Exception as error:
            self.fail(error)
        else:
            if not self.said:
                self._let_go()
                self._connection.end(self)

    async def _answer_many(self) -> None:
        request: Any = self if self._method.client_streaming else await self._only_request()
        async with aclosing(self._method.handler(request, self.call)) as answers:
            async for answer in answers:
                if self.said:
                    return
                self._connection.send(self, answer)
                if not self._connection.has_room(self, UNTAKEN_BYTES):
                    room = self._connection.loop.create_future()
                    self._connection.when_room(self, partial(_tell, room))
                    await room

    async def _only_request(self) -> bytes:
        only: bytes | None = None
        async for request in self:
            if only is not None:
                only = None
                break
            only = request
        if only is None:
            fail(Code.UNIMPLEMENTED, f"{self._method.path} takes one message", "ONE_MESSAGE")
        return only

    def _has_next(self) -> bool:
        """Whether a message is there. Relayed if the caller has sent its last, and not to its end."""
        while not self._ready and self._raw:
            self._cut_up_next()
        if self._ready:
            return True
        if self.heard and self._messages is not None and not self._messages.is_whole:
            fail(Code.INTERNAL, "the last message did not come whole", "BAD_FRAMING")
        return False

    def _cut_up(self, data: bytes) -> None:
        found = self._feed(data)
        if found:
            self._count(sum([len(message) + MESSAGE_BYTES for message, _ in found]))
            self._ready.extend(found)

    def _cut_up_next(self) -> None:
        data = self._raw.popleft()
        self.owed -= len(data)
        self._connection.acknowledge(self, len(data))
        self._cut_up(data)
        if self._begun is not None:
            self._begun = self._connection.loop.time()  # the rest may come from now on

    def _count(self, size: int) -> None:
        self._connection.hold(size)
        self._unread += size

    def _let_go(self) -> None:
        super()._let_go()
        self._count(-self._unread)
        self._ready.clear()
        self._raw.clear()

    def _wake(self) -> None:
        """Something came."""
        if self._waiter is not None:
            _tell(self._waiter)


class Conversation(Streaming):
    """A stream of both that a session answers: it reads with the read that brought something, and has no task."""

    __slots__ = ("_inflated", "_inflating", "_others", "_session", "_started")

    def __init__(self, connection: Connection, number: int, opening: Opening, method: Method) -> None:
        self._started, self._others, self._inflating = True, False, False
        self._session: Session | None = None
        self._inflated: bytes | Exception | None = None
        super().__init__(connection, number, opening, method)

    def run(self, *, more: bool) -> None:
        self._started, self._others = False, more
        if self._session is None:
            try:
                self._session = self._method.handler(self, self.call)
            except Exception as error:
                self.fail(error)
                return
            self._set_timer()
        self._go_on()

    def gone(self) -> None:
        super().gone()
        self._stop()

    def next(self) -> bytes | None:
        if self._inflating:
            return None
        if self._inflated is not None:
            inflated, self._inflated = self._inflated, None
            if isinstance(inflated, Exception):
                raise inflated
            return inflated
        if not self._ready and not self._has_next():
            if self.heard:
                raise StopIteration
            return None
        message, compressed = self._ready.popleft()
        if not self._ready:
            self._count(-self._unread)
        self.call.more = self._others or bool(self._ready)
        if not compressed:
            return message
        self._inflating = True
        self._runner = self._connection.keep(self._connection.loop.create_task(self._inflate(message)))
        return None

    def send(self, answer: bytes) -> None:
        self._connection.send(self, answer)

    def has_room(self) -> bool:
        if self._connection.has_room(self, UNTAKEN_BYTES):
            return True
        self._connection.when_room(self, self._go_on)
        return False

    def over(self, error: BaseException | None) -> None:
        if self.said:
            return
        if error is None:
            self._let_go()
            self._connection.end(self)
        elif isinstance(error, asyncio.CancelledError):
            self._connection.reset(self)
        else:
            self.fail(error)

    def _go_on(self) -> None:
        if self._session is not None:
            self._session.go_on()
        self._others = False

    def _stop(self) -> None:
        super()._stop()
        if self._session is not None:
            self._session.end(asyncio.CancelledError())

    def _wake(self) -> None:
        if not self._started:
            self._started = True
            self._connection.start(self)

    async def _inflate(self, message: bytes) -> None:
        try:
            self._inflated = await self._plain(message, compressed=True)
        except Exception as error:
            self._inflated = error
        self._inflating = False
        self._go_on()


def _tell(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
