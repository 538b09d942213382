"""One HTTP/2 connection: libnghttp2's state machine (`ngh2`) between a transport and the calls.

What one read brought is looked at whole: first what came, then what is to be run, then one write. Everything that waits
is bounded: what the caller does not take, what it sends by halves, what it sends to no purpose.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, cast

import ngh2
from ngh2 import ErrorCode, Setting

from service.rpc.h2_calls import UNTAKEN_BYTES, Conversation, Exchange, Streaming, Unary
from service.rpc.h2_framing import (
    ENCODINGS,
    OK_TRAILERS,
    PREFIX,
    RESPONSE,
    Header,
    Opening,
    fail,
    too_large,
    trailers,
)
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Method
from service.rpc.status import Code, Relayed, Status, transport_status

log = logging.getLogger(__name__)

STREAM_WINDOW, CONNECTION_WINDOW, FRAME_BYTES = 4 << 20, 32 << 20, 256 << 10
"""What a caller may send ahead on one stream and on all, and in one frame."""
WRITE_BYTES = 1 << 20
"""Given to the transport at a time; as much may wait in it."""
PROMPT_BYTES = 128 << 10
"""Of answers in a turn of the loop: so many are written before it ends, while they are in the processor's cache."""
NOISE, NOISE_A_MESSAGE = 10_000, 8
"""Frames that bring nothing, between two looks: so many, and so many more for each frame that brings something."""
RESETS = 1_000, 200
"""Streams that a caller may take back at once, and those a second."""
AGE_SPREAD = 0.1
"""Connections that were made together do not all end together."""
FINAL, ALIVE = b"goaway\0\0", b"alive\0\0\0"
"""Pings: when the first is answered the last GOAWAY is sent; the second asks whether the caller is there."""


class Front(Protocol):
    """What a connection asks of the front that it is made to."""

    limits: ConnectionLimits
    loop: asyncio.AbstractEventLoop
    stopping: bool

    def open(self, connection: Http2Connection) -> None: ...
    def lost(self, connection: Http2Connection) -> None: ...
    def opening(self, headers: tuple[Header, ...]) -> tuple[Opening, Method | None]: ...
    def hold(self, size: int) -> bool: ...
    def keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]: ...
    async def in_thread(self, work: Callable[..., bytes], *arguments: Any) -> bytes: ...


class Http2Connection(asyncio.Protocol):
    """A caller's connection, from the first byte to the last."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.limits, self.loop, self.keep, self.in_thread = front.limits, front.loop, front.keep, front.in_thread
        self._calls: dict[int, Exchange] = {}
        self._ready: list[Exchange] = []
        self._early: list[Exchange] = []
        self._rooms: dict[Exchange, Callable[[], None]] = {}
        self._paused = self._flush_asked = self._reading = self._closing = False
        self._greeted = False  # the caller has said something; before that it costs next to nothing
        self._settled = False  # it was HTTP/2
        self._noise = self._strikes = self._held = self._fresh = 0
        self._pinged_at: float | None = None
        self._heard_ping = float("-inf")
        self._retired_at: float | None = None
        self._stuck: tuple[int, float] | None = None
        self.now = self._begun = self._idle_since = self.loop.time()
        self._retire_at = self._begun + self.limits.age_seconds * random.uniform(1 - AGE_SPREAD, 1 + AGE_SPREAD)  # noqa: S311 # no secret
        self._peer = ""
        self._headers: tuple[Header, ...] = ()

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self._transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(WRITE_BYTES)
        self._front.open(self)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._close()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self.now = self.loop.time()
        if not self._greeted:
            self._greet()
        h2 = self._h2
        try:
            h2.receive_data(data)
        except ngh2.NGH2Error as error:
            self._broken(error)
            return
        self._reading = True
        useful = 0
        for event in self._events():
            kind = type(event)
            if kind is ngh2.DataReceived:
                useful += self._data(event.stream_id, event.data, event.end_stream)
            elif kind is ngh2.RequestReceived:
                self._request(event.stream_id, event.headers, event.end_stream)
                useful += 1
            elif kind is ngh2.StreamClosed:
                self._closed_stream(event.stream_id)
            else:
                self._event(event)
        self._noise -= NOISE_A_MESSAGE * useful
        if self._ready:
            self._run()
        self._reading = False
        self._flush()
        if self._noise > NOISE:
            self._goodbye(ErrorCode.ENHANCE_YOUR_CALM, b"too_many_frames")

    def pause_writing(self) -> None:
        """The caller does not read: neither is anything read of it, until it does."""
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._stuck = None
        if not self._closing:
            self._transport.resume_reading()
            self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._drop_calls()
        self._front.lost(self)

    # For the calls

    def peer(self) -> str:
        if not self._peer:
            name = self._transport.get_extra_info("peername")
            if isinstance(name, tuple):
                host = name[0]
                self._peer = f"ipv6:[{host}]:{name[1]}" if ":" in host else f"ipv4:{host}:{name[1]}"
            else:
                self._peer = "unix:"
        return self._peer

    def start(self, call: Exchange) -> None:
        """Run the call when all that this read brought is known."""
        self._ready.append(call)

    def answer(self, call: Exchange, message: bytes) -> None:
        """The one answer of a call, and its end."""
        if len(message) > self.limits.message_bytes:
            call.refuse(_too_large_answer(message, self.limits.message_bytes))
            return
        if self._takes_too_little():
            call.refuse(_NOT_TAKEN)
            return
        number = call.id
        call.said = True
        self._h2.send_response(number, RESPONSE)
        self._send_body(number, message)
        self._h2.send_trailers(number, OK_TRAILERS)
        self._sent(call)

    def send(self, call: Exchange, message: bytes) -> None:
        """One of several answers."""
        if call.said:
            return
        if len(message) > self.limits.message_bytes:
            raise Relayed(_too_large_answer(message, self.limits.message_bytes))
        if not call.responding:
            call.responding = True
            self._h2.send_response(call.id, RESPONSE)
        self._send_body(call.id, message)
        self._strikes, self._heard_ping = 0, float("-inf")
        self._ask_flush()

    def end(self, call: Exchange, fields: list[Header] = OK_TRAILERS) -> None:
        """The end of a call, be there an answer or not."""
        call.said = True
        with suppress(ngh2.StreamUnavailableError):  # what is wrong with it came with its reset, in one read
            if call.responding:
                self._h2.send_trailers(call.id, fields)
            else:
                self._h2.send_response(call.id, [*RESPONSE, ENCODINGS, *fields], end_stream=True)
        self._sent(call)

    def reset(self, call: Exchange) -> None:
        """Cut the stream off."""
        call.said = True
        self._h2.reset_stream(call.id, ErrorCode.CANCEL)
        self._ask_flush()

    def acknowledge(self, call: Exchange, size: int) -> None:
        """Let the caller send as much again."""
        if not self._closing:
            self._h2.acknowledge_received_data(size, call.id)
            self._ask_flush()

    def hold(self, size: int) -> None:
        """Count bytes of messages that are not yet whole, or not yet read. Raises if there are too many of them."""
        if (size > 0 and self._held + size > self.limits.half_sent_bytes // 2) or not self._front.hold(size):
            fail(Code.RESOURCE_EXHAUSTED, "too many messages are on their way at once", "TOO_MUCH_ON_ITS_WAY")
        self._held += size

    def has_room(self, call: Exchange, size: int) -> bool:
        """Whether the caller takes what is sent: fewer than so many bytes wait, none if those of all are too many."""
        if self._paused or self._closing:
            return self._closing
        waits = self._h2.queued_body_size(call.id)
        return waits < size and (not waits or not self._takes_too_little())

    def _takes_too_little(self) -> bool:
        """Whether more answers wait for the caller than may."""
        return self._h2.queued_body_size() > self.limits.message_bytes + UNTAKEN_BYTES

    def when_room(self, call: Exchange, then: Callable[[], None]) -> None:
        """Call `then` when the caller has taken most of what waits for it, or its stream is closed."""
        self._rooms[call] = then

    # For the front

    def check(self, now: float) -> None:
        """Look at everything that is bounded by time."""
        limits = self.limits
        self._noise = 0
        if self._closing or self._paused:
            self._check_taken(now)
            return
        if not self._settled:
            if now - self._begun > limits.handshake_seconds:
                self._goodbye(ErrorCode.NO_ERROR, b"handshake timeout")
            return
        waits = self._h2.queued_body_size() > 0
        for call in list(self._calls.values()):
            call.check(now, self._h2.queued_body_size(call.id) if waits else 0)
        if not self._calls and now - self._idle_since > limits.idle_seconds:
            self._goodbye(ErrorCode.NO_ERROR, b"max_idle")
        elif self._retired_at is not None:
            self._check_retired(now)
        elif now > self._retire_at:
            self.retire()
        else:
            self._check_alive(now)
        self._flush()

    def retire(self) -> None:
        """Ask the caller to go: it makes no new calls, and those it has end (RFC 9113, section 6.8)."""
        if self._closing or self._retired_at is not None:
            return
        self._retired_at = self.loop.time()
        if self._settled:
            self._h2.send_shutdown_notice()
            self._h2.ping(FINAL)
            self._flush()
        else:
            self._close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    # Events

    def _events(self) -> list[Any]:
        """What happened; `type` is faster than isinstance, and tells mypy nothing."""
        events: list[Any] = self._h2.events()
        if events and type(events[-1]) is ngh2.ConnectionClosed:
            self._close()  # both sides have said goodbye and no call is open: what else happened concerns nobody
            return []
        return events

    def _request(self, number: int, headers: tuple[Header, ...], end: bool) -> None:
        if headers != self._headers:  # which costs less than to look them up
            self._headers, self._opened = headers, self._front.opening(headers)
        opening, method = self._opened
        if opening.http_status != b"200":
            with suppress(ngh2.StreamUnavailableError):
                self._h2.send_response(number, [(b":status", opening.http_status)], end_stream=True)
            self._sent(self._unknown(number, opening, heard=end))
            return
        error = opening.error or self._refusal(opening, method)
        if method is None or error is not None:
            call = self._unknown(number, opening, heard=end)
            self._calls[number] = call
            self.end(call, trailers(error or _UNKNOWN_METHOD))
            return
        kind: type[Exchange] = Unary
        if method.client_streaming or method.server_streaming:
            kind = Conversation if method.by_session else Streaming
        call = self._calls[number] = kind(self, number, opening, method)
        if end:
            self._guarded(call, call.ended)

    def _refusal(self, opening: Opening, method: Method | None) -> Status | None:
        """Why a call is not taken, whatever it brings."""
        if opening.size > self.limits.metadata_bytes:
            text = f"metadata of {opening.size} bytes is larger than the {self.limits.metadata_bytes} of"
            return transport_status(Code.RESOURCE_EXHAUSTED, f"{text} max_metadata_bytes", "METADATA_TOO_LARGE")
        if method is None:
            return _UNKNOWN_METHOD
        if self._takes_too_little():
            return _NOT_TAKEN
        return None

    def _unknown(self, number: int, opening: Opening, *, heard: bool) -> Exchange:
        """A call that no handler sees."""
        call = Exchange(self, number, opening, _NO_METHOD)
        call.said, call.heard = True, heard
        return call

    def _data(self, number: int, data: bytes, end: bool) -> int:
        """A frame of a request's bytes; 0 if it brings nothing."""
        call = self._calls.get(number)
        if call is None or call.said:
            if data:
                self._h2.acknowledge_received_data(len(data), number)
            if call is not None:
                call.heard = call.heard or end
            return 0
        size = len(data)
        if end and type(call) is Unary and size >= PREFIX.size and not call.is_begun:
            flag, length = PREFIX.unpack_from(data)
            if not flag and length == size - PREFIX.size and length <= self.limits.message_bytes:
                self._h2.acknowledge_received_data(size, number)
                call.received_whole(data[PREFIX.size :])
                return 1
        owed = call.owed
        if data:
            self._guarded(call, call.received, data)
            if call.owed == owed:
                self._h2.acknowledge_received_data(size, number)
        if end and not call.said:
            self._guarded(call, call.ended)
        return 1 if data or end else 0

    def _guarded(self, call: Exchange, action: Callable[..., None], *arguments: Any) -> None:
        """Whatever is wrong with what came ends the call, and no other."""
        try:
            action(*arguments)
        except Relayed as error:
            call.cut(error.status)

    def _event(self, event: Any) -> None:
        """What is neither of a request nor its end."""
        kind = type(event)
        self._noise += 1
        if kind is ngh2.WindowUpdated:
            return  # what waited for it is sent at the end of the read
        if kind is ngh2.PingReceived:
            self._heard_a_ping()
        elif kind is ngh2.PingAcknowledged:
            self._pinged_at = None
            if event.opaque_data == FINAL:
                self._h2.send_goaway(ErrorCode.NO_ERROR)
        elif kind is ngh2.SettingsReceived:
            self._settled = True
        elif kind is ngh2.TrailersReceived:
            call = self._calls.get(event.stream_id)
            if call is not None and not call.said:
                self._guarded(call, call.ended)

    def _closed_stream(self, number: int) -> None:
        call = self._calls.pop(number, None)
        if call is None:
            return
        if call.owed and not self._closing:
            self._h2.acknowledge_received_data(call.owed, number)
        call.gone()
        if self._rooms:
            self._wake(call)
        if not self._calls:
            self._idle_since = self.now

    def _heard_a_ping(self) -> None:
        """A caller that pings more often than it may, and is not answered meanwhile, is sent away."""
        if self.now - self._heard_ping < self.limits.ping_interval_seconds:
            self._strikes += 1
        self._heard_ping = self.now
        if self._strikes > self.limits.ping_strikes:
            self._goodbye(ErrorCode.ENHANCE_YOUR_CALM, b"too_many_pings")

    # Runs and writes

    def _greet(self) -> None:
        self._greeted = True
        self._h2 = ngh2.Connection(ngh2.Role.SERVER, _configuration(self.limits))
        self._h2.initiate_connection(_settings(self.limits))
        self._h2.set_local_window_size(CONNECTION_WINDOW)

    def _run(self) -> None:
        """Run the calls that this read made ready, those of them that have not been taken back since."""
        ready, self._ready = self._ready, []
        last = len(ready) - 1
        for index, call in enumerate(ready):
            if not call.said:
                call.run(more=index < last)

    def _send_body(self, number: int, message: bytes) -> None:
        self._fresh += len(message)
        if len(message) < WRITE_BYTES:
            self._h2.send_data(number, PREFIX.pack(0, len(message)) + message)
        else:  # spares a copy
            self._h2.send_data(number, PREFIX.pack(0, len(message)))
            self._h2.send_data(number, message)

    def _sent(self, call: Exchange) -> None:
        """An answer was handed over to its end; a caller that has not sent its last need not go on."""
        if not call.heard:
            self._early.append(call)
        self._strikes, self._heard_ping = 0, float("-inf")
        if self._reading:
            return
        if self._fresh > PROMPT_BYTES:
            self._flush()
        else:
            self._ask_flush()

    def _ask_flush(self) -> None:
        """Write at the end of this turn of the loop, with all that it brings."""
        if not self._flush_asked and not self._reading:
            self._flush_asked = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_asked, self._fresh = False, 0
        if self._paused or self._closing:
            return
        h2, transport = self._h2, self._transport
        while True:
            much = h2.queued_body_size() > WRITE_BYTES
            data = h2.data_to_send(WRITE_BYTES if much else None)
            if data:
                transport.write(data)
            for event in self._events():
                if type(event) is ngh2.StreamClosed:
                    self._closed_stream(event.stream_id)
                else:
                    self._event(event)
            if not (much and data) or self._paused or self._closing:
                break
        if self._early:
            self._end_early()
        if self._rooms:
            self._make_room()

    def _end_early(self) -> None:
        """Tell callers whose call has ended to send no more; not before the end itself is on its way."""
        early, self._early = self._early, []
        for call in early:
            if call.heard or call.id not in self._calls or self._closing:
                continue
            if self._paused or self._h2.queued_body_size(call.id):
                self._early.append(call)
            else:
                self._h2.reset_stream(call.id, ErrorCode.NO_ERROR)
                self._ask_flush()

    def _make_room(self) -> None:
        for call in list(self._rooms):
            if self.has_room(call, UNTAKEN_BYTES // 2):
                self._wake(call)

    def _wake(self, call: Exchange) -> None:
        then = self._rooms.pop(call, None)
        if then is not None:
            then()

    # Ends

    def _check_taken(self, now: float) -> None:
        """Cut a caller that reads nothing at all."""
        size = self._transport.get_write_buffer_size()
        if self._stuck is None or size < self._stuck[0]:
            self._stuck = size, now
        elif now - self._stuck[1] > self.limits.stall_seconds:
            self.abort()

    def _check_retired(self, now: float) -> None:
        assert self._retired_at is not None  # noqa: S101 # asked before
        if now - self._retired_at > self.limits.age_grace_seconds and not self._front.stopping:
            self._goodbye(ErrorCode.NO_ERROR, b"max_age")

    def _check_alive(self, now: float) -> None:
        """Ping a caller that says nothing, close the connection of one that does not answer."""
        if self._pinged_at is not None:
            if now - max(self._pinged_at, self.now) > self.limits.keepalive_timeout_seconds:
                self._goodbye(ErrorCode.NO_ERROR, b"keepalive_timeout")
        elif now - self.now > self.limits.keepalive_seconds:
            self._pinged_at = now
            self._h2.ping(ALIVE)

    def _goodbye(self, code: ErrorCode, why: bytes) -> None:
        """A last GOAWAY that says why, and the end of the connection."""
        if self._closing:
            return
        if not self._greeted:
            self._greet()
        self._h2.send_goaway(code, debug_data=why)
        if not self._paused:
            self._transport.write(self._h2.data_to_send(WRITE_BYTES))
        self._close()

    def _broken(self, error: ngh2.NGH2Error) -> None:
        """The caller does not speak HTTP/2, or not as it should."""
        log.debug("connection of %s closed: %s", self.peer(), error)
        self._close()

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            self._drop_calls()
            self._transport.close()

    def _drop_calls(self) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.gone()
            self._wake(call)
        self._ready, self._early = [], []


def _no_handler(*_: object) -> None:
    raise AssertionError("a call without a method is never run")


_NO_METHOD = Method("", False, False, _no_handler, object)  # type: ignore[arg-type]


def _configuration(limits: ConnectionLimits) -> ngh2.Configuration:
    """Bounds of the state machine itself. Metadata beyond its own limit costs a call; far beyond it, the connection."""
    return ngh2.Configuration(
        auto_window_update=False,
        max_inbound_header_list_size=max(64 << 10, 4 * limits.metadata_bytes),
        max_send_header_block_length=64 << 10,
        stream_reset_rate_limit=RESETS,
    )


def _settings(limits: ConnectionLimits) -> dict[Setting, int]:
    return {
        Setting.MAX_CONCURRENT_STREAMS: limits.streams,
        Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        Setting.MAX_FRAME_SIZE: FRAME_BYTES,
        Setting.MAX_HEADER_LIST_SIZE: limits.metadata_bytes,
        Setting.NO_RFC7540_PRIORITIES: 1,
    }


_UNKNOWN_METHOD = transport_status(Code.UNIMPLEMENTED, "Method not found!", "UNKNOWN_METHOD")
_NOT_TAKEN = transport_status(Code.RESOURCE_EXHAUSTED, "answers wait to be taken", "ANSWERS_NOT_TAKEN")


def _too_large_answer(message: bytes, most: int) -> Status:
    try:
        too_large("the answer", len(message), most)
    except Relayed as error:
        return error.status
