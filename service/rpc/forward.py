"""Calls that only the learner carries out, passed on to it by a worker that is not the learner.

Bytes go through as they come, with the caller's token and deadline; so does the learner's status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from service.errors import NotReady
from service.rpc.methods import Call, Metadata, Method
from service.rpc.status import DETAILS_KEY, Relayed, Status

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]  # the front's limits hold


class Forward:
    """A channel to the learner. `after` is awaited before an answer is given: what a call changed is then in effect."""

    def __init__(self, socket: Path, after: Callable[[], Awaitable[None]]) -> None:
        self._address, self._after = f"unix:{socket}", after
        self._channel: grpc.aio.Channel | None = None

    def method(self, method: Method, before: Callable[[], Awaitable[None]] | None = None) -> Method:
        """The same method, carried out by the learner; `before` is awaited before it is asked."""
        return replace(method, handler=self._many(method) if method.server_streaming else self._one(method, before))

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _one(
        self, method: Method, before: Callable[[], Awaitable[None]] | None
    ) -> Callable[[Any, Call], Awaitable[bytes]]:
        async def one(request: Any, call: Call) -> bytes:
            if before is not None:
                await before()
            with _relayed():
                answer: bytes = await self._call(method, request, call)
            await self._after()
            return answer

        return one

    def _many(self, method: Method) -> Callable[[Any, Call], AsyncIterator[bytes]]:
        async def many(request: Any, call: Call) -> AsyncIterator[bytes]:
            with _relayed():
                async for answer in self._call(method, request, call):
                    yield answer

        return many

    def _call(self, method: Method, request: Any, call: Call) -> Any:
        if self._channel is None:  # a channel belongs to the loop that it is made in
            self._channel = grpc.aio.insecure_channel(self._address, options=OPTIONS)
        arity = {
            (False, False): self._channel.unary_unary,
            (True, False): self._channel.stream_unary,
            (False, True): self._channel.unary_stream,
            (True, True): self._channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        return arity(method.path)(request, timeout=call.seconds_left(), metadata=_token(call.metadata()))


def _token(metadata: Metadata) -> Metadata:
    return tuple((key, value) for key, value in metadata if key == "authorization")


@contextmanager
def _relayed() -> Iterator[None]:
    """The learner's status as this worker's. One that comes without details is the transport's: the learner is away."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
        if details is None and error.code() is grpc.StatusCode.UNAVAILABLE:
            raise NotReady("the learner is being started; what changes revisions waits for it") from None
        raise Relayed(Status(error.code(), error.details() or "", details or b"")) from None
