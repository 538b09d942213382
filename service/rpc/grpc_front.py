"""The grpc.aio front: compatibility with everything that speaks gRPC.

Messages pass as bytes (identity deserialisers): a message that cannot be decoded is then INVALID_ARGUMENT from the
handler, where grpc would answer UNKNOWN with the exception's text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from service.errors import CalserveError, NotReady
from service.rpc.methods import Call, Method
from service.rpc.status import DETAILS_KEY, status_of

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 8 << 10
HANDSHAKE_TIMEOUT_MS = 5_000
MAX_CONCURRENT_STREAMS = 1024


class GrpcFront:
    """Serves a table of methods on one address."""

    def __init__(self, methods: Iterable[Method], *, max_message_bytes: int) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
                ("grpc.so_reuseport", 0),  # two servers on one port would share it in silence
            ]
        )
        self._server.add_generic_rpc_handlers((_Table({method.path: method for method in methods}),))

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, chosen by the system if `port` is 0. NotReady if the address is taken."""
        try:
            bound: int = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise NotReady(f"cannot listen on {host}:{port}: is another server running there?") from error
        await self._server.start()
        return bound

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, let those in flight finish, cut them after the grace."""
        await self._server.stop(grace_seconds)


class _Table(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    def __init__(self, methods: dict[str, Method]) -> None:
        self._handlers = {path: _rpc_handler(method) for path, method in methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


def _rpc_handler(method: Method) -> grpc.RpcMethodHandler:
    async def answer_one(request: Any, context: grpc.aio.ServicerContext) -> bytes:
        call = _call(context)
        try:
            answer: bytes = await method.handler(_request(method, request), call)
        except Exception as error:
            await _abort(context, error, call, method.path)
            raise  # not reached: abort raises
        return answer

    async def answer_many(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        call = _call(context)
        try:
            async for answer in method.handler(_request(method, request), call):
                yield answer
        except Exception as error:
            await _abort(context, error, call, method.path)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    return make(answer_many if method.server_streaming else answer_one)


def _request(method: Method, request: Any) -> Any:
    return aiter(request) if method.client_streaming else request


def _call(context: grpc.aio.ServicerContext) -> Call:
    remaining = context.time_remaining()
    deadline = None if remaining is None else time.monotonic() + remaining
    return Call(deadline, context.invocation_metadata, context.peer)


async def _abort(context: grpc.aio.ServicerContext, error: Exception, call: Call, path: str) -> None:
    if not isinstance(error, CalserveError):
        log.error("call %s of %s failed", call.id, path, exc_info=error)
    status = status_of(error, call.id)
    await context.abort(status.code, status.message, ((DETAILS_KEY, status.details),))
