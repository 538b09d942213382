"""Counting calls: wraps a method so that each call's code and duration are told to whoever keeps the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from service.rpc.methods import Call, Method
from service.rpc.status import status_of

Record = Callable[[str, str, float], None]
"""(path, name of the gRPC code, seconds)"""


def observed(method: Method, record: Record) -> Method:
    """The same method, with `record` called at the end of each call."""

    @contextmanager
    def measured() -> Any:
        begun, code = time.perf_counter(), "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except Exception as error:
            code = status_of(error, "").code.name
            raise
        finally:
            record(method.path, code, time.perf_counter() - begun)

    async def one(request: Any, call: Call) -> bytes:
        with measured():
            answer: bytes = await method.handler(request, call)
            return answer

    async def many(request: Any, call: Call) -> AsyncIterator[bytes]:
        with measured():
            async for answer in method.handler(request, call):
                yield answer

    return replace(method, handler=many if method.server_streaming else one)
