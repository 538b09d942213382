"""A stream of requests for inference: what has come is queued at once, what is done is answered, in order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from service.errors import CalserveError, InvalidRequest
from service.inference.batcher import Answer
from service.rpc import infer_plan
from service.rpc.infer_plan import Reading, varint
from service.rpc.methods import Call, parse
from service.rpc.sessions import Line
from service.rpc.status import status_of
from service.rpc.wire import inference

log = logging.getLogger(__name__)

STREAM_ANSWER_TAG = b"\x12"  # ModelStreamInferResponse.infer_response, field 2
MOST_IN_FLIGHT = 128
"""Requests of one stream that may wait for their answers; more are not read until one is answered."""
MOST_REFUSED = 16
"""Requests that are refused as they are read, in one turn of the loop: each takes longer than one that is queued."""


class Begun(NamedTuple):
    """A request that was run, or whose run is awaited, or told of (`answer` is None)."""

    reading: Reading
    answer: Answer | Awaitable[Answer] | None
    begun_ns: int

    @property
    def needs_task(self) -> bool:
        """Whether more than its run is waited for."""
        return asyncio.iscoroutine(self.answer) or self.reading.plan.waits


class InferStream:
    """The session of one stream: answers in the order of the requests; runs are made meanwhile. An error is an answer.

    `begin` queues a request; `finish` waits for its run and makes the bytes of its answer, `finish_now` makes them when
    the run was made, or could not be.
    """

    def __init__(
        self,
        line: Line,
        call: Call,
        begin: Callable[[bytes], Begun],
        finish: Callable[[Begun], Coroutine[Any, Any, bytes]],
        finish_now: Callable[[Begun, Answer | BaseException], bytes],
    ) -> None:
        self._line, self._call = line, call
        self._begin, self._finish, self._finish_now = begin, finish, finish_now
        self._waiting: deque[tuple[bytes, Begun | asyncio.Future[bytes] | Exception]] = deque()
        self._looked_at: asyncio.Future[Any] | None = None
        self._heard = self._is_over = False
        self._error: Exception | None = None

    def go_on(self, _: object = None) -> None:
        try:
            may_be_more = self._read()
            if self._answer() and may_be_more:  # others have their turn before
                asyncio.get_running_loop().call_soon(self.go_on)
                return
        except Exception as error:
            self.end(error)
        if self._heard and not self._waiting:
            self.end(self._error)

    def end(self, error: BaseException | None) -> None:
        if self._is_over:
            return
        self._is_over = self._heard = True
        for _, begun in self._waiting:
            _abandon(begun)
        self._waiting.clear()
        self._line.over(error)

    def _read(self) -> bool:
        """Queue what has come; whether that is as much as may be queued now."""
        refused = 0
        try:
            while len(self._waiting) < MOST_IN_FLIGHT and refused < MOST_REFUSED:
                data = None if self._heard else self._line.next()
                if data is None:
                    return False
                begun = self._begin_ahead(data)
                refused += isinstance(begun, Exception)
                self._waiting.append((data, begun))
        except StopIteration:
            self._heard = True
        except Exception as error:  # ends the stream when what came before is answered
            self._heard, self._error = True, error
        return not self._heard

    def _answer(self) -> bool:
        """Answer what is done, up to the first request that is not; whether there was anything."""
        answered = False
        while self._waiting and self._line.has_room():
            data, begun = self._waiting[0]
            awaited = begun.answer if isinstance(begun, Begun) else begun
            if isinstance(awaited, asyncio.Future) and not awaited.done():
                if awaited is not self._looked_at:
                    self._looked_at = awaited
                    awaited.add_done_callback(self.go_on)
                break
            self._waiting.popleft()
            self._line.send(self._answer_to(data, begun))
            answered = True
        return answered

    def _begin_ahead(self, data: bytes) -> Begun | asyncio.Future[bytes] | Exception:
        try:
            begun = self._begin(data)
        except Exception as error:
            return error
        return asyncio.ensure_future(self._finish(begun)) if begun.needs_task else begun

    def _answer_to(self, data: bytes, begun: Begun | asyncio.Future[bytes] | Exception) -> bytes:
        try:
            if isinstance(begun, Exception):
                raise begun
            reply = begun.result() if isinstance(begun, asyncio.Future) else self._finish_now(begun, _outcome(begun))
        except Exception as error:
            return _error_in_band(error, data, self._call)
        return STREAM_ANSWER_TAG + varint(len(reply)) + reply


def _outcome(begun: Begun) -> Answer | BaseException:
    """What a run that is over came to."""
    if isinstance(begun.answer, asyncio.Future):
        return begun.answer.exception() or begun.answer.result()
    assert isinstance(begun.answer, Answer)  # noqa: S101 # what needs a task has one
    return begun.answer


def _abandon(begun: Begun | asyncio.Future[bytes] | Exception) -> None:
    """Give up a request whose stream has ended."""
    awaited = begun.answer if isinstance(begun, Begun) else begun
    if isinstance(awaited, asyncio.Future):
        awaited.cancel()


def _error_in_band(error: Exception, data: bytes, call: Call) -> bytes:
    """An error as a stream's answer, under the id of its request if that can be read."""
    if not isinstance(error, CalserveError):
        log.error("call %s failed in a stream", call.id, exc_info=error)
    status = status_of(error, call.id)
    answer = inference.ModelStreamInferResponse(error_message=status.message)
    answer.infer_response.parameters["error_code"].string_param = status.code.name
    try:
        request = parse(inference.ModelInferRequest, data)
    except InvalidRequest:
        return bytes(answer.SerializeToString())
    answer.infer_response.id = request.id
    if infer_plan.wants_final(request):
        answer.infer_response.parameters["triton_final_response"].bool_param = True
    return bytes(answer.SerializeToString())
