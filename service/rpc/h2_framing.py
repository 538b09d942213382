"""gRPC over HTTP/2 as bytes (grpc.io, "gRPC over HTTP2"): what stands in the headers, where a message ends.

Nothing here knows a connection. Whatever a caller may get wrong raises `Relayed`, the status that the call ends with.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

from service.rpc.methods import Metadata
from service.rpc.status import DETAILS_KEY, Code, Relayed, Status, transport_status

Header = tuple[bytes, bytes]

CONTENT_TYPE = b"application/grpc"
FIELD_OVERHEAD = 32
"""What each field counts beyond its bytes (RFC 9113, section 6.5.2)."""
PREFIX = struct.Struct(">BI")
"""Before each message: whether it is compressed, and its length."""
WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
"""Of zlib: which wrapping it looks for."""
ENCODINGS = (b"grpc-accept-encoding", b"identity, deflate, gzip")
RESPONSE = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)]
OK_TRAILERS = [(b"grpc-status", b"0")]
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_NOT_PLAIN = re.compile(rb"[^ -$&-~]")
_BINARY = "-bin"


@dataclass(frozen=True)
class Opening:
    """The headers of a call, read once and remembered, as a caller sends the same ones again and again.

    Attributes
    ----------
    size : of the headers, as HTTP/2 counts them
    timeout : seconds that the caller gives the call, None for ever
    encoding : what its messages may be compressed with, b"" for not at all
    """

    headers: Sequence[Header]
    path: str
    size: int
    http_status: bytes = b"200"
    timeout: float | None = None
    encoding: bytes = b""
    error: Status | None = field(default=None)

    @cached_property
    def _metadata(self) -> Metadata:
        return [entry for name, value in self.headers for entry in _entries(name, value)]

    def metadata(self) -> Metadata:
        """The caller's metadata; values of keys that end in `-bin` are bytes."""
        return self._metadata


def read_headers(headers: Sequence[Header]) -> Opening:
    """What a call's headers say. `error` is set if it ends with them, `http_status` if they are no gRPC at all."""
    fields = dict(headers)
    size = sum(len(name) + len(value) + FIELD_OVERHEAD for name, value in headers)
    path = fields.get(b":path", b"").decode("ascii", "replace")
    kind = fields.get(b"content-type", b"")
    if fields.get(b":method") != b"POST":
        return Opening(headers, path, size, b"405")
    if not (kind == CONTENT_TYPE or kind.startswith((CONTENT_TYPE + b"+", CONTENT_TYPE + b";"))):
        return Opening(headers, path, size, b"415")
    encoding = fields.get(b"grpc-encoding", b"identity")
    timeout = error = None
    try:
        timeout = read_timeout(fields.get(b"grpc-timeout"))
        if encoding != b"identity" and encoding not in WINDOW_BITS:
            fail(Code.UNIMPLEMENTED, "messages may be compressed with gzip or deflate only", "UNKNOWN_ENCODING")
    except Relayed as caught:
        error = caught.status
    return Opening(headers, path, size, b"200", timeout, encoding if encoding in WINDOW_BITS else b"", error)


def read_timeout(value: bytes | None) -> float | None:
    """Seconds, from up to eight digits and a unit."""
    if value is None:
        return None
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        fail(Code.INVALID_ARGUMENT, "grpc-timeout must be up to eight digits and one of HMSmun", "BAD_TIMEOUT")
    return int(match[1]) * _UNITS[match[2]]


class Messages:
    """Cuts the bytes of a stream into messages, however they come.

    Attributes
    ----------
    held : bytes of a message that is not yet whole
    wanted : length of that message, 0 before it is known
    """

    __slots__ = ("_compressed", "_may_be_compressed", "_most", "_parts", "_prefix", "held", "wanted")

    def __init__(self, most: int, *, may_be_compressed: bool) -> None:
        self._most, self._may_be_compressed = most, may_be_compressed
        self._prefix = b""
        self._parts: list[bytes] = []
        self._compressed = False
        self.held = self.wanted = 0

    @property
    def is_whole(self) -> bool:
        """Whether the bytes so far end where a message does."""
        return not self._prefix

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """The messages that these bytes complete, and of each whether it is compressed."""
        if not self._prefix and len(data) >= PREFIX.size:
            flag, length = PREFIX.unpack_from(data)
            if not flag and length == len(data) - PREFIX.size <= self._most:  # just one, as most come
                return [(data[PREFIX.size :], False)]
        found: list[tuple[bytes, bool]] = []
        at = 0
        while at < len(data):
            if len(self._prefix) < PREFIX.size:
                took = min(PREFIX.size - len(self._prefix), len(data) - at)
                self._prefix += data[at : at + took]
                at += took
                if len(self._prefix) < PREFIX.size:
                    break
                self._begin()
            took = min(self.wanted - self.held, len(data) - at)
            if took:
                self._parts.append(data[at : at + took])  # a copy: a view would keep all of `data`
                self.held += took
                at += took
            if self.held == self.wanted:
                found.append((b"".join(self._parts), self._compressed))
                self._prefix, self.held, self.wanted = b"", 0, 0
                self._parts = []
        return found

    def _begin(self) -> None:
        flag, self.wanted = PREFIX.unpack(self._prefix)
        if flag > 1:
            fail(Code.INTERNAL, "the first byte of a message must be 0, or 1 if it is compressed", "BAD_FRAMING")
        if flag and not self._may_be_compressed:
            fail(Code.INTERNAL, "a message is compressed and grpc-encoding does not say how", "BAD_FRAMING")
        if self.wanted > self._most:
            too_large("a message", self.wanted, self._most)
        self._compressed = bool(flag)


def inflate(data: bytes, encoding: bytes, most: int) -> bytes:
    """A message as it was before it was compressed; never more than `most` bytes are made of it."""
    machine = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        plain = machine.decompress(data, most + 1)
    except zlib.error:
        plain = b""
    if len(plain) > most:
        too_large("a decompressed message", len(plain), most, at_least=True)
    if not machine.eof or machine.unused_data:
        fail(Code.INTERNAL, f"a message is not what {encoding.decode()} makes", "BAD_COMPRESSION")
    return plain


def trailers(status: Status) -> list[Header]:
    """A status as the fields that end a call."""
    fields = [(b"grpc-status", b"%d" % status.code.value[0])]
    if status.message:
        fields.append((b"grpc-message", percent_encoded(status.message)))
    if status.details:
        fields.append((DETAILS_KEY.encode(), base64.b64encode(status.details).rstrip(b"=")))
    return fields


def percent_encoded(text: str) -> bytes:
    return _NOT_PLAIN.sub(lambda byte: b"%%%02X" % byte[0][0], text.encode("utf-8", "replace"))


def too_large(what: str, size: int, most: int, *, at_least: bool = False) -> NoReturn:
    more = "at least " if at_least else ""
    text = f"{what} of {more}{size} bytes is larger than the {most} that max_message_bytes allows"
    fail(Code.RESOURCE_EXHAUSTED, text, "MESSAGE_TOO_LARGE")


def fail(code: Code, text: str, reason: str) -> NoReturn:
    raise Relayed(transport_status(code, text, reason))


def _entries(name: bytes, value: bytes) -> Iterable[tuple[str, str | bytes]]:
    """What a field is as metadata: pseudo-headers and what the transport reads itself are none."""
    key = name.decode("ascii", "replace")
    if key.startswith((":", "grpc-")) or key in {"content-type", "te"}:
        return
    if not key.endswith(_BINARY):
        yield key, value.decode("ascii", "replace")
        return
    for part in value.split(b","):
        try:
            yield key, base64.b64decode(part.strip() + b"=" * (-len(part.strip()) % 4), validate=True)
        except binascii.Error:
            continue  # no metadata, like a header that is not gRPC's
