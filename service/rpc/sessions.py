"""Streams of requests and answers without a task: a session is told when it may go on, and asks for what it wants.

A handler that is an async iterator is woken for each message, through every layer around it. A session is called: with
all requests that one read brought, and with all answers that one run gave.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeAlias

from service.rpc.methods import Call

TAKE_SECONDS = 1.0
"""How long a caller that takes nothing keeps a stream that has failed: it is told of its error with the next answer."""


class Line(Protocol):
    """A session's caller, as the session sees it."""

    def next(self) -> bytes | None:
        """The next request, None if there is none yet. StopIteration: the caller has sent its last; any other error:
        what comes cannot be read."""

    def send(self, answer: bytes) -> None: ...

    def has_room(self) -> bool:
        """Whether the caller takes another answer now. If not, the session is told to go on when it does again."""

    def over(self, error: BaseException | None) -> None:
        """The end of the session, told once: all is answered, or what it failed with; CancelledError: nobody waits."""


class Session(Protocol):
    """What answers one open stream."""

    def go_on(self) -> None:
        """Requests have come, or there will be none any more, or there is room for answers again."""

    def end(self, error: BaseException) -> None:
        """End it at once, whatever waits; nothing if it is over."""


Open: TypeAlias = Callable[[Line, Call], Session]
"""The handler of a method that is answered by sessions: opens one, which reads nothing before it is told to go on."""


def iterated(handler: Open) -> Callable[[AsyncIterator[bytes], Call], AsyncIterator[bytes]]:
    """The same as a handler that takes and gives async iterators, for a front that knows no sessions."""

    async def answers(requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        line = _Iterators()
        session = handler(line, call)
        reader = asyncio.create_task(line.read(requests, session))
        try:
            while True:
                while line.answers:
                    line.sending = True
                    yield line.answers.popleft()
                    line.sending = False
                    session.go_on()
                if line.is_over:
                    break
                await line.told.wait()
            if line.error is not None:
                raise line.error
        finally:
            reader.cancel()
            session.end(asyncio.CancelledError())
            line.close()

    return answers


class _Signal:
    """Something that one task waits for and another tells it."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class _Iterators:
    """A line between iterators: reads a request when the one before it was taken, gives one answer at a time."""

    def __init__(self) -> None:
        self.answers: deque[bytes] = deque()
        self.told, self._taken = _Signal(), _Signal()
        self.is_over = self.sending = False
        self.error: BaseException | None = None
        self._task = asyncio.current_task()
        self._cut: asyncio.TimerHandle | None = None
        self._requests: deque[bytes] = deque()
        self._end: Exception | None = None

    async def read(self, requests: AsyncIterator[bytes], session: Session) -> None:
        try:
            async for data in requests:
                self._requests.append(data)
                session.go_on()
                while self._requests:
                    await self._taken.wait()
        except Exception as error:
            self._end = error
        else:
            self._end = StopIteration()
        session.go_on()

    def next(self) -> bytes | None:
        if self._requests:
            self._taken.tell()
            return self._requests.popleft()
        if self._end is not None:
            raise self._end
        return None

    def send(self, answer: bytes) -> None:
        self.answers.append(answer)
        self.told.tell()

    def has_room(self) -> bool:
        return not (self.answers or self.sending)

    def over(self, error: BaseException | None) -> None:
        self.is_over, self.error = True, error
        self.told.tell()
        if self.sending and error is not None and self._task is not None:
            self._cut = asyncio.get_running_loop().call_later(TAKE_SECONDS, self._task.cancel)

    def close(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
