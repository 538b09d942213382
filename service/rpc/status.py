"""From an error class to a gRPC status: code, message, and google.rpc details for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from service import errors

Code: TypeAlias = grpc.StatusCode
DOMAIN = "calserve"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_CHARACTERS = 2000

CODES: dict[type[errors.CalserveError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Stale: grpc.StatusCode.ABORTED,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Damaged: grpc.StatusCode.DATA_LOSS,
}


@dataclass(frozen=True)
class Status:
    """What a front sends in place of an answer."""

    code: grpc.StatusCode
    message: str
    details: bytes  # a serialized google.rpc.Status, for the trailer `grpc-status-details-bin`


class Relayed(Exception):
    """Another process's status, passed on as it is."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status


def status_of(error: BaseException, request_id: str) -> Status:
    """The status of any exception. Of one that is not ours only the request's id is told."""
    if isinstance(error, Relayed):
        return error.status
    if not isinstance(error, errors.CalserveError):
        text = f"internal error; the server's log has it under request {request_id}"
        return _status(grpc.StatusCode.INTERNAL, text, "INTERNAL", [])
    details: list[Message] = []
    if isinstance(error, errors.Overloaded):
        wait = duration_pb2.Duration()
        wait.FromMilliseconds(int(1000 * error.retry_after_seconds))
        details.append(error_details_pb2.RetryInfo(retry_delay=wait))
    return _status(CODES[type(error)], error.message[:MAX_MESSAGE_CHARACTERS], error.detail_reason, details)


def transport_status(code: Code, message: str, reason: str) -> Status:
    """The status of a call that no handler has seen, or that its front ends."""
    return _status(code, message, reason, [])


def _status(code: grpc.StatusCode, message: str, reason: str, details: list[Message]) -> Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN), *details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Status(code, message, status.SerializeToString())
