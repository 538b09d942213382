"""Which front serves: the fast one where it can be had, grpc.aio otherwise. Both run the same handlers."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from service.errors import Refused
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Method
from service.rpc.tls import CertificateFiles

FAST, GRPC = "h2", "grpc"


class Front(Protocol):
    """Serves a table of methods."""

    name: str

    async def start(self, host: str, port: int, socket: Path | None = None) -> int:
        """Listen, on a local socket too if one is given; return the port, chosen by the system if `port` is 0.

        NotReady if the address is taken.
        """

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, let those in flight finish, cut them after the grace."""


def front_of(
    name: str, methods: Iterable[Method], limits: ConnectionLimits, certificates: CertificateFiles | None = None
) -> Front:
    """The front of that name; of `auto` the fast one if its library is there. Refused if it is asked for and is not."""
    fast = find_spec("ngh2") is not None
    if name == FAST and not fast:
        raise Refused("front h2 needs the package ngh2: install it, or say front grpc")
    if name == GRPC or not fast:
        from service.rpc.grpc_front import GrpcFront

        return GrpcFront(methods, limits, certificates)
    from service.rpc.h2_front import H2Front

    return H2Front(methods, limits, certificates)
