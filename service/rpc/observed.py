"""Counting calls: wraps a method so that each call's code and duration are told to whoever keeps the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from service.rpc.methods import Begin, Call, Cancellable, Direct, Method, Tell
from service.rpc.sessions import Line, Session
from service.rpc.status import status_of

Record = Callable[[str, float], None]
"""(name of the gRPC code, seconds)"""


def observed(method: Method, recorder: Callable[[str], Record]) -> Method:
    """The same method, with the record that `recorder` has for its path called at the end of each call."""
    record = recorder(method.path)

    async def one(request: Any, call: Call) -> bytes:
        begun = time.perf_counter()
        try:
            answer: bytes = await method.handler(request, call)
        except BaseException as error:
            record(_code_of(error), time.perf_counter() - begun)
            raise
        record("OK", time.perf_counter() - begun)
        return answer

    async def many(request: Any, call: Call) -> AsyncIterator[bytes]:
        begun = time.perf_counter()
        try:
            async for answer in method.handler(request, call):
                yield answer
        except BaseException as error:
            record(_code_of(error), time.perf_counter() - begun)
            raise
        record("OK", time.perf_counter() - begun)

    def session(line: Line, call: Call) -> Session:
        watched = _Watched(line, record)
        try:
            opened: Session = method.handler(watched, call)
        except Exception as error:
            watched.record(error)
            raise
        return opened

    if method.by_session:
        return replace(method, handler=session)
    if isinstance(method.handler, Direct):
        return replace(method, handler=Direct(partial(_told, method.handler.begin, record)))
    return replace(method, handler=many if method.server_streaming else one)


def _told(begin: Begin, record: Record, request: bytes, call: Call, tell: Tell) -> Cancellable | None:
    begun = time.perf_counter()

    def told(answer: bytes, error: BaseException | None) -> None:
        record("OK" if error is None else _code_of(error), time.perf_counter() - begun)
        tell(answer, error)

    try:
        return begin(request, call, told)
    except Exception as error:
        record(_code_of(error), time.perf_counter() - begun)
        raise


class _Watched:
    """A line whose end is recorded."""

    def __init__(self, line: Line, record: Record) -> None:
        self.next, self.send, self.has_room, self._over = line.next, line.send, line.has_room, line.over
        self._record, self._begun = record, time.perf_counter()

    def record(self, error: BaseException | None) -> None:
        self._record("OK" if error is None else _code_of(error), time.perf_counter() - self._begun)

    def over(self, error: BaseException | None) -> None:
        self.record(error)
        self._over(error)


def _code_of(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    code: str = status_of(error, "").code.name
    return code
