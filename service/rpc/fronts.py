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
COMPANY_SECONDS = {FAST: 0.001, GRPC: 0.004}
"""How long a request waits for others that are on their way: one front hands over all that a read brought, the other
each by itself, a tenth of a millisecond apart and more."""


class Front(Protocol):
    """Serves a table of methods."""

    name: str

    async def start(self, host: str, port: int, socket: Path | None = None) -> int:
        """Listen, on a local socket too if one is given; return the port, chosen by the system if `port` is 0.

        NotReady if the address is taken.
        """

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, let those in flight finish, cut them after the grace."""


def chosen(name: str) -> str:
    """The front that serves; of `auto` the fast one if its library is there. Refused as `front_of`."""
    fast = find_spec("ngh2") is not None
    if name == FAST and not fast:
        raise Refused("front h2 needs the package ngh2: install it, or say front grpc")
    return FAST if fast and name != GRPC else GRPC


def front_of(
    name: str, methods: Iterable[Method], limits: ConnectionLimits, certificates: CertificateFiles | None = None
) -> Front:
    """The front of that name. Refused if it is asked for and its library is not there."""
    if chosen(name) == GRPC:
        from service.rpc.grpc_front import GrpcFront

        return GrpcFront(methods, limits, certificates)
    from service.rpc.h2_front import H2Front

    return H2Front(methods, limits, certificates)
