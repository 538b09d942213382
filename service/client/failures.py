"""gRPC's status as the error class it was on the server, and when a call is worth making again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from service import errors
from service.rpc.status import CODES, DETAILS_KEY

ERRORS = {code: error for error, code in CODES.items()}
BY_CODE_NAME = {code.name: error for code, error in ERRORS.items()}


@dataclass(frozen=True)
class Retries:
    """How often a call that changes nothing is made again, always within its deadline.

    The server must have said that it helps: UNAVAILABLE, or RESOURCE_EXHAUSTED with a time to wait, which is kept to.
    Pauses double, and are drawn at random so that callers who were refused together do not come back together.

    Retries()                     three more tries: up to 0.1, 0.2 and 0.4 s apart
    Retries(most=0)               none
    Retries(longest_seconds=1.0)  a bound on the pauses that the server has not asked for
    """

    most: int = 3
    first_seconds: float = 0.1
    longest_seconds: float = 5.0

    def pause(self, error: grpc.RpcError, tried: int, seconds_left: float) -> float | None:
        """Seconds to wait before the next try; None: there is none."""
        asked = _asked_seconds(error)
        if asked is None or tried > self.most:
            return None
        drawn = random.uniform(0.0, min(self.longest_seconds, self.first_seconds * 2 ** (tried - 1)))  # noqa: S311
        return asked + drawn if asked + drawn < seconds_left else None


DEFAULT_RETRIES = Retries()


@contextmanager
def translated() -> Iterator[None]:
    """Raise what gRPC raises as the error class it was on the server."""
    try:
        yield
    except grpc.RpcError as error:
        raise translation(error) from None


def translation(error: grpc.RpcError) -> errors.CalserveError:
    kind, text = ERRORS.get(error.code(), errors.CalserveError), error.details() or ""
    if kind is errors.Overloaded:
        asked = _asked_seconds(error)
        return errors.Overloaded(text) if asked is None else errors.Overloaded(text, retry_after_seconds=asked)
    info = _detail(error, error_details_pb2.ErrorInfo)
    return kind(text, reason=info.reason) if info else kind(text)


def is_cut_off(error: grpc.RpcError) -> bool:
    """Whether grpc.aio lost the answer of a call that ended before all was sent.

    It makes up this status when a message cannot be sent, though the server's own is on its way. The server never
    heard the end of such a stream and began nothing, so that all may be sent again.
    """
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"


def in_band(answer: Any) -> errors.CalserveError:
    """The error of one answer of a stream; its code travels as the parameter `error_code`."""
    code = answer.infer_response.parameters["error_code"].string_param
    return BY_CODE_NAME.get(code, errors.CalserveError)(answer.error_message)


def _asked_seconds(error: grpc.RpcError) -> float | None:
    """How long the server wants callers to wait; None if another try would not help."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return 0.0
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        info = _detail(error, error_details_pb2.RetryInfo)
        return info.retry_delay.ToMilliseconds() / 1000 if info else None
    return None


def _detail(error: grpc.RpcError, kind: Any) -> Any | None:
    """The detail of that kind in the status, if the server sent one."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for packed in status_pb2.Status.FromString(value).details:
                detail = kind()
                if packed.Unpack(detail):
                    return detail
    return None
