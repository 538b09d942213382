"""grpc.health.v1: Check and Watch.

Service names: "" is the process, "ready" is the server with every configured model warm, and each model has its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2

from service.errors import NotFound, shown
from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import HEALTH_SERVICE

PROCESS, READY = "", "ready"
_Response = health_pb2.HealthCheckResponse


class Health:
    """The statuses, and the streams that watch them.

    Attributes
    ----------
    drained : set when the server begins to drain: what only watches ends itself then
    draining : new requests are refused
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self.drained = asyncio.Event()
        self.draining = False

    def methods(self) -> list[Method]:
        return methods_of(HEALTH_SERVICE, self)

    def serving(self, service: str) -> bool:
        return bool(self._statuses.get(service) == _Response.SERVING)

    async def set(self, service: str, *, serving: bool) -> None:
        async with self._changed:
            self._statuses[service] = _Response.SERVING if serving else _Response.NOT_SERVING
            self._changed.notify_all()

    async def drain(self) -> None:
        """NOT_SERVING for everything, and the end of every Watch: an open one would hold up the server's stop."""
        async with self._changed:
            self.drained.set()
            self._statuses = dict.fromkeys(self._statuses, _Response.NOT_SERVING)
            self._changed.notify_all()

    async def check(self, request: health_pb2.HealthCheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
        if request.service not in self._statuses:
            # Everybody may ask, so the answer names no service that is there.
            raise NotFound(f"no service {shown(request.service)}; there are '', 'ready' and one a model")
        return _Response(status=self._statuses[request.service])

    async def list(self, request: health_pb2.HealthListRequest, call: Call) -> health_pb2.HealthListResponse:
        statuses = {service: _Response(status=status) for service, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def watch(
        self, request: health_pb2.HealthCheckRequest, call: Call
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, then every change of it. A service that is not known is SERVICE_UNKNOWN and may come."""
        told = None
        while True:
            status = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
            if status != told:
                yield _Response(status=status)
                told = status
            async with self._changed:
                current = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
                if current == told:
                    if self.drained.is_set():
                        return
                    await self._changed.wait()
