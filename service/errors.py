"""Every error a caller can meet, sorted by what the caller does next.

    CalserveError
    ├── InvalidRequest    fixes the request
    ├── Unauthenticated   shows a token that is known and valid now
    ├── Forbidden         asks the operator for a token that may
    ├── NotFound          fixes the name
    ├── AlreadyExists     stops
    ├── Stale             rereads, retries
    ├── Refused           changes the state
    ├── Overloaded        waits, retries
    ├── NotReady          retries
    ├── DeadlinePassed    asks for more time
    ├── Cancelled         left; nobody reads it
    └── Damaged           calls the operator

`rpc/status.py` maps each class to its gRPC code. Anything else that is raised becomes INTERNAL and says nothing but the
request's id. A message is output: it names the field, what was wanted and what came, and holds no path and no
exception text of a library.
"""

from __future__ import annotations

from typing import ClassVar

MAX_NAME_IN_MESSAGE = 200
"""Longer names are cut: an error must fit in a 16 KiB HTTP/2 header."""


class CalserveError(Exception):
    """Base of all. `reason` is stable, for programs; the message is for people."""

    reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail_reason = reason or self.reason


class InvalidRequest(CalserveError):
    reason = "INVALID_REQUEST"


class Unauthenticated(CalserveError):
    reason = "UNAUTHENTICATED"


class Forbidden(CalserveError):
    reason = "FORBIDDEN"


class NotFound(CalserveError):
    reason = "NOT_FOUND"


class AlreadyExists(CalserveError):
    reason = "ALREADY_EXISTS"


class Stale(CalserveError):
    reason = "STALE"


class Refused(CalserveError):
    reason = "REFUSED"


class Overloaded(CalserveError):
    """Carries how long to wait before the next try, in seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class NotReady(CalserveError):
    reason = "NOT_READY"


class DeadlinePassed(CalserveError):
    reason = "DEADLINE_PASSED"


class Cancelled(CalserveError):
    reason = "CANCELLED"


class Damaged(CalserveError):
    reason = "DAMAGED"


def shown(name: object) -> str:
    """A caller's own word, quoted and cut for use in a message."""
    text = repr(name)
    return text if len(text) <= MAX_NAME_IN_MESSAGE else f"{text[:MAX_NAME_IN_MESSAGE]}... ({len(text)} characters)"
