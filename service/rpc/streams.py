"""Open streams: bounded while they run, and ended from outside at a bound, at a revoked token, at a drain.

A session is told its end. Any other stream is ended by cancelling the task that runs it, as `asyncio.timeout` does:
that costs nothing per message and needs no word of the handler. A front therefore runs each of those in its own task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from service.errors import CalserveError, DeadlinePassed, Overloaded
from service.rpc.methods import Call, Method
from service.rpc.sessions import Line, Session

QUIET_SECONDS = 0.1
"""At a drain, requests that were sent already are read until nothing more has come for so long ..."""
MOST_QUIET_SECONDS = 0.5
"""... but no longer than this: some callers never pause."""

Admit = Callable[[str, Call], None]
"""(method path, call): raises if the call may no longer go on."""


@dataclass(frozen=True)
class StreamLimits:
    """Bounds of one stream of requests. `idle_seconds` is the time in which neither side sends anything."""

    idle_seconds: float = 60.0
    seconds: float = 3600.0
    messages: int = 10_000_000
    bytes: int = 256 << 30


class Streams:
    """All open streams of a server."""

    def __init__(self, limits: StreamLimits) -> None:
        self._limits = limits
        self._open: set[_Stream | _Session] = set()

    def guarded(self, method: Method) -> Method:
        """The same method; a stream of it can be ended from outside, and one of requests is bounded."""
        if not (method.client_streaming or method.server_streaming):
            return method

        def session(line: Line, call: Call) -> Session:
            return _Session(method, call, self._limits, line, self._open)

        async def one(requests: Any, call: Call) -> bytes:
            with self._opened(method, call) as stream:
                answer: bytes = await method.handler(stream.reading(requests), call)
                return answer

        async def many(requests: Any, call: Call) -> AsyncIterator[bytes]:
            with self._opened(method, call) as stream:
                async with aclosing(method.handler(stream.reading(requests), call)) as answers:
                    async for answer in answers:
                        stream.last = time.monotonic()
                        stream.sending = True
                        yield answer
                        stream.sending = False
                        if stream.error is not None:
                            raise stream.error

        if method.by_session:
            return replace(method, handler=session)
        return replace(method, handler=many if method.server_streaming else one)

    def sweep(self, admit: Admit | None) -> None:
        """End the streams that have passed a bound of time, or that `admit` no longer lets go on."""
        for stream in list(self._open):
            try:
                stream.check_time()
                if admit is not None:
                    admit(stream.method.path, stream.call)
            except CalserveError as error:
                stream.end(error)

    async def drain(self) -> None:
        """Let every stream of requests that is answered one by one come to its end: what was sent is still answered.

        A stream with one answer goes on to its own end: cut short, an upload would pass for a whole one.
        """
        begun = time.monotonic()
        while reading := [stream for stream in self._open if stream.endable]:
            now = time.monotonic()
            for stream in reading:
                if now - max(begun, stream.last_read) >= QUIET_SECONDS or now - begun >= MOST_QUIET_SECONDS:
                    stream.end_requests()
            await asyncio.sleep(QUIET_SECONDS / 4)

    @contextmanager
    def _opened(self, method: Method, call: Call) -> Iterator[_Stream]:
        stream = _Stream(method, call, self._limits)
        self._open.add(stream)
        try:
            yield stream
        except asyncio.CancelledError:
            if stream.error is None or stream.task.uncancel() > 0:
                raise
            raise stream.error from None
        finally:
            self._open.discard(stream)


class _Open:
    """What is known of an open stream, and counted of its requests."""

    def __init__(self, method: Method, call: Call, limits: StreamLimits) -> None:
        self.method, self.call, self._limits = method, call, limits
        self.begun = self.last = self.last_read = time.monotonic()
        self._messages = self._bytes = 0
        self._over = False

    @property
    def endable(self) -> bool:
        """Whether its requests are answered one by one and may still come."""
        return self.method.client_streaming and self.method.server_streaming and not self._over

    def check_time(self) -> None:
        """DeadlinePassed if the stream has been open, or idle, for too long."""
        if not self.method.client_streaming:
            return  # a watch may well say nothing for hours
        now = time.monotonic()
        if self._may_be_idle() and now - self.last > self._limits.idle_seconds:
            raise DeadlinePassed(f"nothing was sent for {self._limits.idle_seconds:g} seconds; open a new stream")
        if now - self.begun > self._limits.seconds:
            raise DeadlinePassed(f"a stream lasts at most {self._limits.seconds:g} seconds; open a new one")

    def _may_be_idle(self) -> bool:
        return True

    def _came(self, size: int) -> None:
        """Count a request of so many bytes. Overloaded if it is one too many."""
        self._messages += 1
        self._bytes += size
        if self._messages > self._limits.messages or self._bytes > self._limits.bytes:
            what = f"{self._limits.messages} messages and {self._limits.bytes} bytes"
            raise Overloaded(f"a stream takes at most {what}; open a new one", retry_after_seconds=0.0)
        self.last = self.last_read = time.monotonic()


class _Session(_Open):
    """An open session, and the line that it is given: between it and its caller."""

    def __init__(self, method: Method, call: Call, limits: StreamLimits, line: Line, opened: set[Any]) -> None:
        super().__init__(method, call, limits)
        self._line, self._opened = line, opened
        self.has_room = line.has_room
        self._session: Session = method.handler(self, call)
        self.go_on, self.end = self._session.go_on, self._session.end
        opened.add(self)

    def end_requests(self) -> None:
        """Make the requests come to an end, as if the caller had sent its last."""
        self._over = True
        self.go_on()

    def next(self) -> bytes | None:
        if self._over:
            raise StopIteration
        data = self._line.next()
        if data is not None:
            self._came(len(data))
        return data

    def send(self, answer: bytes) -> None:
        self.last = time.monotonic()
        self._line.send(answer)

    def over(self, error: BaseException | None) -> None:
        self._opened.discard(self)
        self._line.over(error)


class _Stream(_Open):
    """An open stream in a task, and the iterator of its requests."""

    def __init__(self, method: Method, call: Call, limits: StreamLimits) -> None:
        super().__init__(method, call, limits)
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]  # a call runs in one
        self.error: CalserveError | None = None
        self.sending = False
        self._requests: Any = None
        self._iterator: AsyncIterator[bytes] | None = None
        self._reader: asyncio.Task[Any] | None = None

    def reading(self, requests: Any) -> Any:
        """The requests, counted; a single request as it is."""
        if not self.method.client_streaming:
            return requests
        self._requests = requests
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        reader = self._reader = asyncio.current_task()
        try:
            if self._iterator is None:  # made not before it is read: grpc.aio warns of one that never is
                self._iterator = aiter(self._requests)
            data = await anext(self._iterator)
            self._came(len(data))
        except asyncio.CancelledError:
            if not self._over or reader is None or reader.uncancel() > 0:
                raise
            raise StopAsyncIteration from None
        except CalserveError as error:
            if reader is not self.task:
                self.end(error)  # the handler reads ahead, and may not look at what its reader meets
            raise
        finally:
            self._reader = None
        return data

    def end(self, error: CalserveError) -> None:
        """End the stream with an error.

        While an answer is being sent the task is the front's, which would take its cancellation for the caller's and
        tell the caller nothing; the error is then raised after that answer. A caller that takes not even that is cut
        off at the next look.
        """
        again = self.error is not None
        self.error = self.error or error
        if again == self.sending:
            self.task.cancel()

    def end_requests(self) -> None:
        """Make the requests come to an end, as if the caller had sent its last."""
        self._over = True
        if self._reader is not None:
            self._reader.cancel()

    def _may_be_idle(self) -> bool:
        """An upload is idle while its caller is waited for, and not while the server works on what came."""
        return self.method.server_streaming or self._reader is not None
