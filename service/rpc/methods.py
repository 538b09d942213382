"""What a front needs to know of a method, and how a servicer becomes a table of them.

A handler takes bytes and gives bytes (or async iterators of them) and knows no transport. Any exception it raises is
turned into a status by the front.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias, TypeVar

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from service.errors import Forbidden, InvalidRequest, shown
from service.rpc.tokens import Token

M = TypeVar("M", bound=Message)


Metadata = Sequence[tuple[str, str | bytes]]


class Call:
    """What a handler may know of the call besides its messages.

    Attributes
    ----------
    deadline : on time.monotonic(), None if the caller set none
    metadata : gives the call's metadata, keys in lower case
    peer : gives the caller's address
    grant : what the caller's token allows, None on a server without tokens
    more : whether other requests have come already and are about to be run: they may share a run with this one
    id : names the call in the log and in an INTERNAL error; made when first asked for
    """

    __slots__ = ("__dict__", "deadline", "grant", "metadata", "more", "peer")

    def __init__(
        self,
        deadline: float | None = None,
        metadata: Callable[[], Metadata] = tuple,
        peer: Callable[[], str] = str,
    ) -> None:
        self.deadline, self.metadata, self.peer = deadline, metadata, peer
        self.grant: Token | None = None
        self.more = False

    @cached_property
    def id(self) -> str:
        return secrets.token_hex(8)

    @property
    def owner(self) -> str:
        """Whose is what the call leaves behind: the token's, all callers' on a server without tokens."""
        return "" if self.grant is None else self.grant.name

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def may_use(self, model: str) -> bool:
        return self.grant is None or self.grant.may_use(model)

    def check_model(self, model: str) -> None:
        """Forbidden if the caller's token is not for this model, whether it exists or not."""
        if not self.may_use(model):
            named = f"the token is not for model {shown(model)}"
            raise Forbidden(named if model else "the token is for some models only; name one of them")


Tell: TypeAlias = Callable[[bytes, BaseException | None], None]
"""(the answer, why there is none)"""


class Cancellable(Protocol):
    """What waits for an answer."""

    def cancel(self) -> object: ...


Begin: TypeAlias = "Callable[[bytes, Call, Tell], Cancellable | None]"


class Direct:
    """The handler of one request that takes no task: it tells its answer to whoever asks.

    Attributes
    ----------
    begin : (request, call, tell): `tell` is called once, at once or later. What it returns while nothing was told can
        be cancelled, and then tells CancelledError. It may raise instead.
    """

    __slots__ = ("begin",)

    def __init__(self, begin: Begin) -> None:
        self.begin = begin

    async def __call__(self, request: bytes, call: Call) -> bytes:
        """The same for a front that has tasks."""
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def tell(answer: bytes, error: BaseException | None) -> None:
            if answered.done():
                return  # its caller left
            if error is None:
                answered.set_result(answer)
            else:
                answered.set_exception(error)

        begun = self.begin(request, call, tell)
        try:
            return await answered
        finally:
            if begun is not None and answered.cancelled():
                begun.cancel()


def in_task(answer: Coroutine[Any, Any, bytes], tell: Tell) -> Cancellable:
    """What a `Direct` begins where it has to wait for more than it is told."""

    def ended(task: asyncio.Task[bytes]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        tell(b"" if error else task.result(), error)

    task = asyncio.ensure_future(answer)
    task.add_done_callback(ended)
    return task


@dataclass(frozen=True)
class Method:
    """One method: bytes in, bytes out; a stream of either is an async iterator.

    `by_session`: the handler of a stream of both opens a session instead (`sessions.Open`).
    """

    path: str
    client_streaming: bool
    server_streaming: bool
    handler: Callable[[Any, Call], Any]
    request: type[Message]
    by_session: bool = False


def parse(kind: type[M], data: bytes) -> M:
    """A message from its bytes; InvalidRequest if they are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest(f"the request's bytes are not a {kind.DESCRIPTOR.full_name}") from None


def methods_of(service: ServiceDescriptor, *servicers: object, name: str | None = None) -> list[Method]:
    """The methods of a service, each carried out by the one servicer that has a method of that name in snake case.

    The servicer's method takes and gives messages; one whose name ends in `_bytes` takes and gives their bytes, one
    whose name ends in `_direct` is what a `Direct` begins with, one in `_session` opens a session. `name` overrides the
    service's full name in the paths.
    """
    return [_method(method, servicers, f"/{name or service.full_name}/{method.name}") for method in service.methods]


def _method(method: MethodDescriptor, servicers: Sequence[object], path: str) -> Method:
    snake = _snake(method.name)
    makers: dict[str, Callable[..., Any]] = {
        snake: partial(_of_bytes, method),
        f"{snake}_bytes": _as_it_is,
        f"{snake}_direct": Direct,
        f"{snake}_session": _as_it_is,
    }
    ((name, handler),) = (
        (name, make(getattr(servicer, name)))
        for servicer in servicers
        for name, make in makers.items()
        if hasattr(servicer, name)
    )
    request = message_factory.GetMessageClass(method.input_type)
    return Method(
        path, method.client_streaming, method.server_streaming, handler, request, by_session=name == f"{snake}_session"
    )


def _as_it_is(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    return behaviour


def _of_bytes(method: MethodDescriptor, behaviour: Callable[..., Any]) -> Callable[[Any, Call], Any]:
    """A behaviour of messages as a handler of bytes."""
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

    return answer_many if method.server_streaming else answer_one


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
