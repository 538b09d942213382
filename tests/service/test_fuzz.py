"""The fast front under whatever hypothesis makes of gRPC's framing and of HTTP/2's frames.

Well-formed callers are held to what their calls must come to; of others it is asked that nothing is raised, that what
they hold is bounded and let go, and that a neighbour is answered meanwhile. `python -m benchmarks.fuzz` runs the same
tests led by coverage.
"""

from __future__ import annotations

import asyncio
import gzip
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import unquote

import grpc
import ngh2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.rpc.h2_connection import FINAL
from service.rpc.h2_framing import PREFIX, Messages, inflate, percent_encoded, read_headers
from service.rpc.limits import ConnectionLimits
from service.rpc.status import Relayed
from tests.service.h2_pair import CHAT, COUNT, ECHO, NEVER, SUM, TALK, Pair, Turn, front_with, run, turns_until

MOST = 300
LIMITS = ConnectionLimits(message_bytes=MOST, half_sent_bytes=40 * MOST, streams=8)
PACK = {b"gzip": gzip.compress, b"deflate": zlib.compress}
CANCEL = 8
RESOURCE_EXHAUSTED, INTERNAL, UNIMPLEMENTED = (
    grpc.StatusCode[name].value[0] for name in ("RESOURCE_EXHAUSTED", "INTERNAL", "UNIMPLEMENTED")
)

thorough = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
cuts = st.lists(st.integers(0, 2000), max_size=8)
framing = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.builds(
            lambda flag, payload, more: PREFIX.pack(flag, len(payload) + more) + payload,
            st.sampled_from([0, 0, 0, 1, 2]),
            st.binary(max_size=40) | st.integers(0, 2 * MOST).map(bytes),
            st.sampled_from([0, 0, 0, 1, 2**31]),
        ),
    ),
    max_size=6,
).map(b"".join)
"""Messages, whole and cut off, with flags and lengths right and wrong."""


def pieces(data: bytes, at: list[int]) -> Iterator[bytes]:
    """The bytes, cut at these places."""
    for begin, end in pairwise([0, *sorted(min(place, len(data)) for place in at), len(data)]):
        yield data[begin:end]


def by_the_book(data: bytes, most: int) -> tuple[list[bytes], bool | None]:
    """What whole messages stand in plain framing, and whether it ends with the last; None if it is broken."""
    found: list[bytes] = []
    while len(data) >= PREFIX.size:
        flag, length = PREFIX.unpack_from(data)
        if flag or length > most:
            return found, None
        if len(data) < PREFIX.size + length:
            break
        found.append(data[PREFIX.size : PREFIX.size + length])
        data = data[PREFIX.size + length :]
    return found, not data


@thorough
@given(framing, cuts)
def test_framing_is_read_alike_however_it_is_cut(data: bytes, at: list[int]) -> None:
    messages = Messages(MOST, may_be_compressed=False)
    found: list[bytes] = []
    whole: bool | None = None
    try:
        for piece in pieces(data, at):
            found += [message for message, _ in messages.feed(piece)]
            assert messages.held <= messages.wanted <= MOST
        whole = messages.is_whole
    except Relayed:
        pass
    wanted, ends_well = by_the_book(data, MOST)
    assert whole is ends_well
    assert found == wanted if whole is not None else found == wanted[: len(found)]


@thorough
@given(
    st.sampled_from(sorted(PACK)),
    st.binary(max_size=MOST) | st.integers(0, 3 * MOST).map(bytes),
    st.lists(st.tuples(st.integers(0, MOST), st.integers(0, 255)), max_size=3),
    st.binary(max_size=2),
)
def test_a_compressed_message_becomes_what_it_was_or_a_status(
    encoding: bytes, text: bytes, flips: list[tuple[int, int]], behind: bytes
) -> None:
    sent = bytearray(PACK[encoding](text))
    for at, flip in flips:
        sent[at % len(sent)] ^= flip
    untouched = sent + behind == PACK[encoding](text) and len(text) <= MOST
    try:
        plain = inflate(bytes(sent + behind), encoding, MOST)
    except Relayed as error:
        assert not untouched, error
    else:
        assert len(plain) <= MOST
        assert plain == text or flips  # gzip's own header may be flipped unseen


names = st.sampled_from(
    [b":path", b":method", b"content-type", b"grpc-encoding", b"grpc-timeout", b"te", b"x", b"x-bin"]
) | st.binary(max_size=8)
values = st.sampled_from(
    [b"POST", b"application/grpc", b"application/grpc+proto", b"gzip", b"1S", b"99999999H", b"YQ=="]
) | st.binary(max_size=12)


@thorough
@given(st.lists(st.tuples(names, values), max_size=8))
def test_any_headers_are_read(headers: list[tuple[bytes, bytes]]) -> None:
    opening = read_headers(headers)
    assert opening.http_status in {b"200", b"405", b"415"}
    assert opening.timeout is None or 0 <= opening.timeout < 4e11
    for name, value in opening.metadata():
        assert isinstance(value, bytes) == name.endswith("-bin")


@thorough
@given(st.text())
def test_any_text_of_a_status_comes_over(text: str) -> None:
    plain = percent_encoded(text)
    assert all(0x20 <= byte <= 0x7E for byte in plain)
    assert unquote(plain.decode()) == text.encode("utf-8", "replace").decode()


@dataclass
class Plan:
    """One call of a well-formed caller: what it sends, and what must come of it."""

    path: str
    encoding: bytes
    contents: list[tuple[int, str]]
    at: list[int]
    taken_back: bool
    number: int = 0
    steps: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        data = b"".join(self._framed(*content) for content in self.contents)
        self.steps = list(pieces(data, self.at))

    def _framed(self, value: int, how: str) -> bytes:
        text = bytes(MOST + 1) if how in ("large", "bomb") else b"%d" % value
        if how in ("plain", "large"):
            return PREFIX.pack(0, len(text)) + text
        packed = PACK[self.encoding or b"gzip"](text)
        if how == "broken":
            packed = packed[:-1]
        return PREFIX.pack(1, len(packed)) + packed

    def _fault(self, how: str) -> int | None:
        if how == "plain" or (how == "packed" and self.encoding):
            return None
        return RESOURCE_EXHAUSTED if how == "large" or (how == "bomb" and self.encoding) else INTERNAL

    def check(self, status: int | None, messages: list[bytes]) -> None:
        """Any fault may be the one that is told."""
        texts = [b"%d" % value for value, _ in self.contents]
        faults = {fault for _, how in self.contents if (fault := self._fault(how)) is not None}
        if self.path in (ECHO, COUNT) and len(texts) != 1:
            faults.add(UNIMPLEMENTED)
        if faults:
            assert status in faults
        else:
            assert (status, messages) == (0, self._answers(texts))

    def _answers(self, texts: list[bytes]) -> list[bytes]:
        match self.path:
            case "/t/Count":
                return [b"%d" % number for number in range(int(texts[0]))]
            case "/t/Sum":
                return [b"%d" % sum(map(int, texts))]
        return texts


plans = st.builds(
    Plan,
    st.sampled_from([ECHO, COUNT, SUM, CHAT, TALK]),
    st.sampled_from([b"", b"gzip", b"deflate"]),
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from(["plain"] * 5 + ["packed", "large", "bomb", "broken"])),
        max_size=4,
    )
    | st.tuples(st.tuples(st.integers(0, 30), st.just("plain"))).map(list),
    st.lists(st.integers(0, 60), max_size=4),
    st.sampled_from([False] * 4 + [True]),
)


@thorough
@given(
    st.lists(plans, min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", "", "deliver", "take", "turn"])), max_size=40),
    cuts,
    st.sampled_from([{}, {4: 3}]),
)
def test_every_call_of_a_well_formed_caller_comes_to_what_it_must(
    calls: list[Plan], order: list[tuple[int, str]], at: list[int], own: dict[int, int]
) -> None:
    async def test() -> None:
        pair = Pair(front_with(LIMITS), settings=own)
        open_calls = list(calls)
        for which, then in [*order, *((0, "deliver") for _ in range(100))]:
            if open_calls:
                call = open_calls[which % len(open_calls)]
                if not step(pair, call):
                    open_calls.remove(call)
            if then == "deliver":
                for piece in pieces(pair.caller.data_to_send(), at):
                    if piece:
                        pair.connection.data_received(piece)
            elif then == "take":
                pair.take()
            elif then == "turn":
                await Turn()
        assert not open_calls
        for call in calls:
            heard = await pair.answer(call.number)
            if not call.taken_back:
                call.check(heard.status, heard.messages)
        assert not pair.wire.over
        await lets_go(pair)

    run(test)


def step(pair: Pair, call: Plan) -> bool:
    """The next thing that the call has to say; whether there is more."""
    if not call.number:
        named = {"grpc_encoding": call.encoding} if call.encoding else {}
        call.number = pair.open(call.path, **named)
        return True
    if pair.heard[call.number].closed:
        return False
    if call.steps:
        if piece := call.steps.pop(0):
            pair.caller.send_data(call.number, piece)
        return True
    if call.taken_back:
        pair.caller.reset_stream(call.number, CANCEL)
    else:
        pair.caller.end_stream(call.number)
    return False


async def lets_go(pair: Pair) -> None:
    """The connection is lost: nothing of it is left."""
    pair.connection.connection_lost(None)
    await turns_until(lambda: not pair.front._tasks)
    connection = pair.connection
    assert (connection._calls, connection._ready, connection._rooms) == ({}, [], {})
    assert connection._held == 0
    assert pair.front._held == sum(other._held for other in pair.front._connections)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def block(fields: dict[bytes, bytes]) -> bytes:
    """A header block that needs no table: literals all."""
    return b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())


def opened(stream: int, path: str, encoding: bytes, timeout: bytes, flags: int) -> bytes:
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path.encode(), b"content-type": b"application/grpc"}
    fields |= {b"grpc-encoding": encoding} if encoding else {}
    fields |= {b"grpc-timeout": timeout} if timeout else {}
    return frame(1, flags, stream, block(fields))


streams = st.sampled_from([1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21])
frames = st.one_of(
    st.builds(
        opened,
        streams,
        st.sampled_from([ECHO, COUNT, SUM, CHAT, TALK, NEVER, "/t/None"]),
        st.sampled_from([b"", b"gzip", b"br"]),
        st.sampled_from([b"", b"0n", b"1m", b"soon"]),
        st.sampled_from([4, 4, 4, 5, 0]),  # END_HEADERS, END_STREAM
    ),
    st.builds(frame, st.just(0), st.sampled_from([0, 0, 1]), streams, framing),
    st.builds(frame, st.just(0), st.sampled_from([8, 9]), streams, st.binary(max_size=30)),  # padded
    st.builds(lambda last: frame(7, 0, 0, struct.pack(">II", last, 0)), st.sampled_from([0, 1, 2**31 - 1])),
    st.builds(lambda flags, data: frame(6, flags, 0, data), st.integers(0, 1), st.sampled_from([FINAL, bytes(8)])),
    st.builds(lambda stream, code: frame(3, 0, stream, struct.pack(">I", code)), streams, st.integers(0, 14)),
    st.builds(
        lambda name, value: frame(4, 0, 0, struct.pack(">HI", name, value)),
        st.integers(1, 9),
        st.sampled_from([0, 1, 100, 16384, 65535, 2**31 - 1, 2**32 - 1]),
    ),
    st.builds(
        lambda stream, more: frame(8, 0, stream, struct.pack(">I", more)),
        streams | st.just(0),
        st.sampled_from([0, 1, 1000, 2**31 - 1]),
    ),
    st.builds(frame, st.integers(0, 16), st.integers(0, 255), streams | st.just(0), st.binary(max_size=40)),
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def spoken() -> bytes:
    """What a caller says who knows tables and Huffman's code."""
    caller = ngh2.Connection(ngh2.Role.CLIENT)
    caller.initiate_connection({})
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", CHAT.encode()), (b":authority", b"here")]
    for _ in range(3):
        number = caller.send_request([*fields, (b"content-type", b"application/grpc"), (b"te", b"trailers")])
        caller.send_data(number, PREFIX.pack(0, 5) + b"abcde", end_stream=number < 5)
    return caller.data_to_send()


GREETING = PREFACE + frame(4, 0, 0, b"")


@settings(thorough, max_examples=500)
@given(
    st.sampled_from([GREETING] * 6 + [spoken()] * 3 + [b""]),
    st.lists(frames, max_size=20).map(b"".join),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), max_size=2),
    cuts,
    st.sampled_from([1 << 30, 1 << 30, 100]),
    st.booleans(),
)
def test_whatever_comes_nothing_is_raised_or_kept_and_neighbours_are_answered(
    begin: bytes, data: bytes, flips: list[tuple[int, int]], at: list[int], most_written: int, retired: bool
) -> None:
    sent = bytearray(data if retired else begin + data)
    for place, flip in flips:
        if place < len(sent):
            sent[place] ^= flip

    async def test() -> None:
        front = front_with(LIMITS)
        neighbour, pair = Pair(front), Pair(front, greet=False, most=most_written)
        if retired:
            pair.connection.data_received(GREETING)
            pair.connection.retire()
        for piece in pieces(bytes(sent), at):
            if piece:
                pair.connection.data_received(piece)
            assert len(pair.connection._calls) <= LIMITS.streams
            assert pair.connection._held <= LIMITS.half_sent_bytes // 2
            assert (await neighbour.answer(neighbour.ask(ECHO, b"x"))).messages == [b"x"]
        if most_written == 100 and pair.connection._paused and not pair.wire.over:
            pair.wire.written.clear()
            pair.connection.resume_writing()
        pair.connection.check(asyncio.get_running_loop().time() + 1000)
        await Turn()
        await lets_go(pair)
        assert (await neighbour.answer(neighbour.ask(ECHO, b"y"))).messages == [b"y"]

    run(test)
