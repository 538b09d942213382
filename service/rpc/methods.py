"""What a front needs to know of a method, and how a servicer becomes a table of them.

A handler takes bytes and gives bytes (or async iterators of them) and knows no transport. Any exception it raises is
turned into a status by the front.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from service.errors import InvalidRequest
from service.rpc.wire import method_path

M = TypeVar("M", bound=Message)


Metadata = Sequence[tuple[str, str | bytes]]


class Call:
    """What a handler may know of the call besides its messages.

    Attributes
    ----------
    deadline : on time.monotonic(), None if the caller set none
    metadata : gives the call's metadata, keys in lower case
    peer : gives the caller's address
    id : names the call in the log and in an INTERNAL error; made when first asked for
    """

    __slots__ = ("__dict__", "deadline", "metadata", "peer")

    def __init__(
        self,
        deadline: float | None = None,
        metadata: Callable[[], Metadata] = tuple,
        peer: Callable[[], str] = str,
    ) -> None:
        self.deadline, self.metadata, self.peer = deadline, metadata, peer

    @cached_property
    def id(self) -> str:
        return secrets.token_hex(8)

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Method:
    """One method: bytes in, bytes out; a stream of either is an async iterator."""

    path: str
    client_streaming: bool
    server_streaming: bool
    handler: Callable[[Any, Call], Any]


def parse(kind: type[M], data: bytes) -> M:
    """A message from its bytes; InvalidRequest if they are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest(f"the request's bytes are not a {kind.DESCRIPTOR.full_name}") from None


def methods_of(service: ServiceDescriptor, *servicers: object, name: str | None = None) -> list[Method]:
    """The methods of a service, each carried out by the one servicer that has a method of that name in snake case.

    `name` overrides the service's full name in the paths.
    """

    def behaviour(method: MethodDescriptor) -> Callable[..., Any]:
        (found,) = (s for s in servicers if hasattr(s, _snake(method.name)))
        return getattr(found, _snake(method.name))  # type: ignore[no-any-return]

    return [_method(method, behaviour(method), name) for method in service.methods]


def _method(method: MethodDescriptor, behaviour: Callable[..., Any], name: str | None) -> Method:
    request_kind = message_factory.GetMessageClass(method.input_type)

    async def decoded(stream: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for data in stream:
            yield parse(request_kind, data)

    def request_of(data: Any) -> Any:
        return decoded(data) if method.client_streaming else parse(request_kind, data)

    async def answer_one(data: Any, call: Call) -> bytes:
        answer: Message = await behaviour(request_of(data), call)
        return answer.SerializeToString()

    async def answer_many(data: Any, call: Call) -> AsyncIterator[bytes]:
        async for answer in behaviour(request_of(data), call):
            yield answer.SerializeToString()

    path = f"/{name}/{method.name}" if name else method_path(method)
    handler = answer_many if method.server_streaming else answer_one
    return Method(path, method.client_streaming, method.server_streaming, handler)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
