"""The grpc.aio front: compatibility with everything that speaks gRPC.

Messages pass as bytes (identity deserialisers): a message that cannot be decoded is then INVALID_ARGUMENT from the
handler, where grpc would answer UNKNOWN with the exception's text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from service.errors import CalserveError, NotReady
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Call, Method
from service.rpc.sessions import iterated
from service.rpc.status import DETAILS_KEY, Relayed, status_of
from service.rpc.tls import CertificateFiles, Certificates

log = logging.getLogger(__name__)


class GrpcFront:
    """Serves a table of methods on one address, over TLS if there are certificates."""

    name = "grpc"

    def __init__(
        self, methods: Iterable[Method], limits: ConnectionLimits, certificates: CertificateFiles | None = None
    ) -> None:
        self._certificates = certificates
        self._server = grpc.aio.server(options=_options(limits))
        self._server.add_generic_rpc_handlers((_Table({method.path: method for method in methods}),))

    async def start(self, host: str, port: int, socket: Path | None = None) -> int:
        """Listen, on a local socket too if one is given; return the port, chosen by the system if `port` is 0.

        NotReady if the address is taken.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._bind(address)
            if socket is not None:
                self._server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise NotReady(f"cannot listen on {address}: is another server running there?") from error
        await self._server.start()
        return bound

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, let those in flight finish, cut them after the grace."""
        await self._server.stop(grace_seconds)

    def _bind(self, address: str) -> int:
        if self._certificates is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, _credentials(self._certificates)))


def _options(limits: ConnectionLimits) -> list[tuple[str, int]]:
    """The limits, as grpc-core names them; of a message that is sent slowly it knows none."""
    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        ("grpc.max_metadata_size", limits.metadata_bytes),
        # Between the two sizes grpc-core refuses at random; equal, there is one limit.
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.handshake_seconds)),
        ("grpc.max_connection_idle_ms", int(1000 * limits.idle_seconds)),
        ("grpc.max_connection_age_ms", int(1000 * limits.age_seconds)),
        ("grpc.max_connection_age_grace_ms", int(1000 * limits.age_grace_seconds)),
        ("grpc.keepalive_time_ms", int(1000 * limits.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", int(1000 * limits.keepalive_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),  # callers ping idle connections through proxies that forget
        ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * limits.ping_interval_seconds)),
        ("grpc.http2.max_ping_strikes", limits.ping_strikes),
        ("grpc.so_reuseport", int(limits.shared_port)),
    ]


def _credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Credentials that look at the files again for each new connection."""

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        changed = files.changed()
        return None if changed is None else _configuration(changed)

    first = files.current
    return grpc.dynamic_ssl_server_credentials(
        _configuration(first), fetch, require_client_authentication=first.client_ca is not None
    )


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    pair = (certificates.key, certificates.chain)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=certificates.client_ca)


class _Table(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    def __init__(self, methods: dict[str, Method]) -> None:
        self._handlers = {path: _rpc_handler(method) for path, method in methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


def _rpc_handler(method: Method) -> grpc.RpcMethodHandler:
    handler: Callable[[Any, Call], Any] = iterated(method.handler) if method.by_session else method.handler

    async def answer_one(request: Any, context: grpc.aio.ServicerContext) -> bytes:
        call = _call(context)
        try:
            answer: bytes = await handler(request, call)
        except Exception as error:
            await _abort(context, error, call, method.path)
            raise  # not reached: abort raises
        return answer

    async def answer_many(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        call = _call(context)
        try:
            async for answer in handler(request, call):
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


def _call(context: grpc.aio.ServicerContext) -> Call:
    remaining = context.time_remaining()
    deadline = None if remaining is None else time.monotonic() + remaining
    return Call(deadline, context.invocation_metadata, context.peer)


async def _abort(context: grpc.aio.ServicerContext, error: Exception, call: Call, path: str) -> None:
    if not isinstance(error, CalserveError | Relayed):
        log.error("call %s of %s failed", call.id, path, exc_info=error)
    status = status_of(error, call.id)
    await context.abort(status.code, status.message, ((DETAILS_KEY, status.details),))
