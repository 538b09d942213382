"""The fast front's connections, byte by byte: what gRPC wants of them, and every bound."""

from __future__ import annotations

import asyncio
import base64
import gzip
import inspect
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import ngh2
import pytest
from google.rpc import error_details_pb2, status_pb2

from service.errors import Overloaded
from service.rpc import h2_connection
from service.rpc.h2_calls import MESSAGE_BYTES, UNREAD_BYTES
from service.rpc.h2_connection import PROMPT_BYTES
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Call, Direct, Tell
from tests.service.h2_pair import (
    CHAT,
    COUNT,
    ECHO,
    NEVER,
    SUM,
    TALK,
    Never,
    Pair,
    Talk,
    Turn,
    front_with,
    run,
    turns_until,
)

Code = grpc.StatusCode
NO_ERROR, CANCEL, CALM = 0, 8, 11


def number(code: grpc.StatusCode) -> int:
    value: int = code.value[0]
    return value


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an asynchronous test, whose parameters pytest gives."""

    def synchronous(**arguments: Any) -> None:
        run(lambda: test(**arguments))  # type: ignore[arg-type, return-value]

    synchronous.__name__, synchronous.__doc__ = test.__name__, test.__doc__
    synchronous.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return synchronous


@in_loop
async def test_all_four_kinds_of_call_are_answered() -> None:
    pair = Pair(front_with())
    calls = {
        pair.ask(ECHO, b"one"): [b"one"],
        pair.ask(COUNT, b"3"): [b"0", b"1", b"2"],
        pair.ask(SUM, b"1", b"2", b"3"): [b"6"],
        pair.ask(CHAT, b"a", b"", b"c"): [b"a", b"", b"c"],
        pair.ask(TALK, b"a", b"", b"c"): [b"a", b"", b"c"],
    }
    for call, wanted in calls.items():
        heard = await pair.answer(call)
        assert heard.headers == {b":status": b"200", b"content-type": b"application/grpc"}
        assert (heard.messages, heard.trailers) == (wanted, {b"grpc-status": b"0"})


@pytest.mark.parametrize("path", [CHAT, TALK])
@in_loop
async def test_a_stream_is_answered_while_it_is_open(path: str) -> None:
    pair = Pair(front_with())
    call = pair.open(path)
    for text in (b"first", b"second"):
        pair.send(call, text)
        await pair.until(lambda text=text: pair.heard[call].messages[-1:] == [text])
    pair.send(call, end=True)
    assert (await pair.answer(call)).status == 0


@in_loop
async def test_calls_of_one_read_are_run_together_and_answered_in_one_write() -> None:
    together: list[bool] = []

    def told(request: bytes, call: Call, tell: Tell) -> None:
        together.append(call.more)
        tell(request, None)

    front = front_with()
    front._methods[ECHO] = replace(front._methods[ECHO], handler=Direct(told))
    pair = Pair(front)
    for index in range(5):
        pair.ask(ECHO, b"%d" % index)
    writes = []
    pair.wire.write = writes.append  # type: ignore[method-assign]
    pair.deliver()
    assert together == [True] * 4 + [False]
    assert len(writes) == 1


class Waiting:
    """What a direct handler leaves behind when it does not answer at once."""

    def __init__(self) -> None:
        self.tells: list[Tell] = []

    def __call__(self, _request: bytes, _call: Call, tell: Tell) -> Waiting:
        self.tells.append(tell)
        return self

    def cancel(self) -> None:
        self.tells.pop()(b"", asyncio.CancelledError())


@in_loop
async def test_a_direct_handler_answers_later_and_is_told_when_its_caller_leaves() -> None:
    front, waiting = front_with(), Waiting()
    front._methods[ECHO] = replace(front._methods[ECHO], handler=Direct(waiting))
    pair = Pair(front)
    answered, failed, left = (pair.ask(ECHO, b"") for _ in range(3))
    pair.deliver()
    pair.caller.reset_stream(left)
    pair.deliver()
    assert len(waiting.tells) == 2
    waiting.tells[0](b"late", None)
    waiting.tells[1](b"", Overloaded("too much"))
    assert (await pair.answer(answered)).messages == [b"late"]
    assert (await pair.answer(failed)).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert not pair.heard[left].messages


@in_loop
async def test_many_bytes_of_answers_do_not_wait_for_the_end_of_the_turn() -> None:
    front, waiting = front_with(), Waiting()
    front._methods[ECHO] = replace(front._methods[ECHO], handler=Direct(waiting))
    pair = Pair(front, settings={4: 1 << 24})
    calls = [pair.ask(ECHO, b"") for _ in range(3)]
    pair.deliver()
    waiting.tells[0](b"a few", None)
    assert not pair.wire.written
    waiting.tells[1](bytes(PROMPT_BYTES), None)
    assert len(pair.wire.written) > 60_000  # all that the caller's window lets through
    waiting.tells[2](b"a few more", None)
    assert [len((await pair.answer(call)).messages[0]) for call in calls] == [
        len(b"a few"),
        PROMPT_BYTES,
        len(b"a few more"),
    ]


@in_loop
async def test_a_direct_handler_is_one_of_tasks_too() -> None:
    waiting = Waiting()
    asked, left = (asyncio.ensure_future(Direct(waiting)(b"", Call())) for _ in range(2))
    await turns_until(lambda: len(waiting.tells) == 2)
    left.cancel()
    await asyncio.wait([left])
    assert len(waiting.tells) == 1
    waiting.tells[0](b"late", None)
    assert await asked == b"late"


@pytest.mark.parametrize("size", [1, 7, 1000])
@in_loop
async def test_requests_come_in_pieces_of_any_size(size: int) -> None:
    pair = Pair(front_with())
    calls = [pair.ask(ECHO, bytes(3000)), *(pair.ask(path, b"x" * 2000, b"y" * 10) for path in (CHAT, TALK))]
    data = pair.caller.data_to_send()
    for at in range(0, len(data), size):
        pair.connection.data_received(data[at : at + size])
    assert (await pair.answer(calls[0])).messages == [bytes(3000)]
    for call in calls[1:]:
        assert (await pair.answer(call)).messages == [b"x" * 2000, b"y" * 10]


@in_loop
async def test_large_messages_pass_through_small_windows_both_ways() -> None:
    pair = Pair(front_with(), settings={4: 65535})
    big = bytes(range(256)) * (40 << 10)  # 10 MiB, beyond both windows of the server too
    heard = await pair.answer(pair.ask(ECHO, big))
    assert heard.status == 0
    assert heard.messages == [big]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({":method": b"GET"}, b"405"),
        ({"content-type": b"text/html"}, b"415"),
        ({"content-type": b"application/grpcx"}, b"415"),
    ],
)
@in_loop
async def test_what_is_not_grpc_gets_an_http_status(fields: dict[str, bytes], status: bytes) -> None:
    pair = Pair(front_with())
    heard = await pair.answer(pair.ask(ECHO, b"", **fields))
    assert heard.headers[b":status"] == status
    assert (await pair.answer(pair.ask(ECHO, b"x"))).messages == [b"x"]


def packed(text: bytes) -> bytes:
    return gzip.compress(text)


@pytest.mark.parametrize(
    ("path", "messages", "named", "code", "says"),
    [
        ("/t/None", [b""], {}, Code.UNIMPLEMENTED, "Method not found!"),
        (ECHO, [], {}, Code.UNIMPLEMENTED, "takes one message"),
        (ECHO, [b"a", b"b"], {}, Code.UNIMPLEMENTED, "takes one message"),
        (COUNT, [], {}, Code.UNIMPLEMENTED, "takes one message"),
        (COUNT, [b"1", b"2"], {}, Code.UNIMPLEMENTED, "takes one message"),
        (
            ECHO,
            [bytes(1001)],
            {},
            Code.RESOURCE_EXHAUSTED,
            "a message of 1001 bytes is larger than the 1000 that max_message_bytes allows",
        ),
        (CHAT, [bytes(1001)], {}, Code.RESOURCE_EXHAUSTED, "larger than the 1000"),
        (TALK, [bytes(1001)], {}, Code.RESOURCE_EXHAUSTED, "larger than the 1000"),
        (COUNT, [b"1"], {"grpc_timeout": b"soon"}, Code.INVALID_ARGUMENT, "grpc-timeout"),
        (COUNT, [b"1"], {"grpc_timeout": b"123456789S"}, Code.INVALID_ARGUMENT, "grpc-timeout"),
        (ECHO, [b"x"], {"grpc_encoding": b"br"}, Code.UNIMPLEMENTED, "gzip or deflate only"),
        (ECHO, [b"x"], {"x": bytes([120]) * 9000}, Code.RESOURCE_EXHAUSTED, "max_metadata_bytes"),
    ],
)
@in_loop
async def test_what_a_caller_gets_wrong_ends_its_call_with_a_status(
    path: str, messages: list[bytes], named: dict[str, bytes], code: grpc.StatusCode, says: str
) -> None:
    pair = Pair(front_with(ConnectionLimits(message_bytes=1000)))
    heard = await pair.answer(pair.ask(path, *messages, **named))
    assert heard.status == number(code)
    assert says in heard.message
    assert (await pair.answer(pair.ask(ECHO, b"still here"))).messages == [b"still here"]
    assert pair.connection._held == pair.front._held == 0


@in_loop
async def test_an_error_comes_with_its_details_and_a_message_in_any_language() -> None:
    async def refuses(request: bytes, call: Call) -> bytes:
        raise Overloaded("voll: 100 % \n größer", retry_after_seconds=2.5)

    pair = Pair(front_with(echo=refuses))
    heard = await pair.answer(pair.ask(ECHO, b""))
    assert (heard.status, heard.message) == (number(Code.RESOURCE_EXHAUSTED), "voll: 100 % \n größer")
    raw = heard.headers[b"grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(raw + b"=" * (-len(raw) % 4)))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500


@in_loop
async def test_an_error_of_the_servers_own_says_nothing_but_the_calls_number(caplog: pytest.LogCaptureFixture) -> None:
    async def breaks(request: bytes, call: Call) -> bytes:
        raise ZeroDivisionError("secret")

    pair = Pair(front_with(echo=breaks))
    heard = await pair.answer(pair.ask(ECHO, b""))
    assert heard.status == number(Code.INTERNAL)
    assert "secret" not in heard.message
    assert "secret" in caplog.text


@in_loop
async def test_a_stream_that_fails_after_answers_ends_with_trailers() -> None:
    async def breaks(requests: Any, call: Call) -> Any:
        async for request in requests:
            yield request
            raise Overloaded("enough")

    pair = Pair(front_with(chat=breaks))
    call = pair.open(CHAT)
    pair.send(call, b"a")
    heard = await pair.answer(call)
    assert (heard.messages, heard.status, heard.message) == ([b"a"], number(Code.RESOURCE_EXHAUSTED), "enough")
    assert heard.reset == NO_ERROR  # the caller need not go on sending


@pytest.mark.parametrize(("encoding", "pack"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
@pytest.mark.parametrize("size", [0, 10, 300_000])
@in_loop
async def test_compressed_requests_are_read(encoding: bytes, pack: Callable[[bytes], bytes], size: int) -> None:
    pair = Pair(front_with())
    text = bytes(range(250)) * (size // 250) + bytes(size % 250)
    for path in (ECHO, CHAT, TALK):
        call = pair.open(path, grpc_encoding=encoding)
        pair.send(call, pack(text), flag=1, end=True)
        assert (await pair.answer(call)).messages == [text]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (gzip.compress(bytes(5000)), Code.RESOURCE_EXHAUSTED),
        (gzip.compress(b"x" * 4000)[:-9], Code.INTERNAL),
        (gzip.compress(b"x") + b"y", Code.INTERNAL),
        (b"no gzip at all", Code.INTERNAL),
    ],
    ids=["bomb", "cut off", "something behind", "nothing"],
)
@in_loop
async def test_a_compressed_message_is_bounded_by_what_it_becomes(message: bytes, code: grpc.StatusCode) -> None:
    pair = Pair(front_with(ConnectionLimits(message_bytes=4096)))
    call = pair.open(ECHO, grpc_encoding=b"gzip")
    pair.send(call, message, flag=1, end=True)
    assert (await pair.answer(call)).status == number(code)


@pytest.mark.parametrize("data", [b"\1\0\0\0\1x", b"\2\0\0\0\1x", b"\0\0\0\0\5x", b"\0\0"])
@pytest.mark.parametrize("path", [ECHO, CHAT, TALK])
@in_loop
async def test_broken_framing_ends_the_call_alone(path: str, data: bytes) -> None:
    pair = Pair(front_with())
    call = pair.open(path)
    pair.caller.send_data(call, data, end_stream=True)
    assert (await pair.answer(call)).status in {number(Code.INTERNAL), number(Code.UNIMPLEMENTED)}
    assert (await pair.answer(pair.ask(ECHO, b"x"))).messages == [b"x"]


@pytest.mark.parametrize("path", [NEVER, CHAT, TALK])
@in_loop
async def test_a_deadline_ends_a_call_and_what_runs_for_it(path: str) -> None:
    never = Never()
    pair = Pair(front_with(never=never))
    call = pair.open(path, grpc_timeout=b"20m")
    pair.send(call, b"", end=path == NEVER)
    heard = await pair.answer(call)
    assert (heard.status, heard.message) == (number(Code.DEADLINE_EXCEEDED), "Deadline Exceeded")
    await pair.until(lambda: not pair.front._tasks)
    assert never.ends == (["cancelled"] if path == NEVER else [])


@in_loop
async def test_a_call_that_is_taken_back_is_cancelled() -> None:
    never = Never()
    pair = Pair(front_with(never=never))
    call = pair.ask(NEVER, b"")
    await pair.until(lambda: never.begun == 1)
    pair.caller.reset_stream(call, CANCEL)
    await pair.until(lambda: never.ends == ["cancelled"])
    assert not pair.connection._calls


@in_loop
async def test_a_call_that_is_taken_back_in_the_read_that_brought_it_is_never_run() -> None:
    never = Never()
    pair = Pair(front_with(never=never))
    numbers = [pair.ask(NEVER, b"") for _ in range(50)]
    data = pair.caller.data_to_send()
    for call in numbers:
        pair.caller.reset_stream(call, CANCEL)
    pair.connection.data_received(data + pair.caller.data_to_send())
    await Turn()
    assert (never.begun, pair.connection._calls, pair.front._tasks) == (0, {}, set())


@pytest.mark.parametrize(
    ("path", "message", "named"),
    [
        (ECHO, bytes(1001), {}),
        (CHAT, bytes(1001), {}),
        (TALK, bytes(1001), {}),
        ("/t/None", b"", {}),
        (ECHO, b"", {"grpc_timeout": b"soon"}),
        (ECHO, b"", {":method": b"GET"}),
    ],
)
@in_loop
async def test_what_is_wrong_and_taken_back_in_one_read_leaves_the_connection_as_it_was(
    path: str, message: bytes, named: dict[str, bytes]
) -> None:
    pair = Pair(front_with(ConnectionLimits(message_bytes=1000)))
    other = pair.open(CHAT)
    call = pair.ask(path, message, **named)
    data = pair.caller.data_to_send()
    pair.caller.reset_stream(call, CANCEL)
    pair.connection.data_received(data + pair.caller.data_to_send())
    pair.send(other, b"goes on", end=True)
    assert (await pair.answer(other)).messages == [b"goes on"]


@in_loop
async def test_a_lost_connection_cancels_what_it_asked_for() -> None:
    never = Never()
    pair = Pair(front_with(never=never))
    for _ in range(100):
        pair.ask(NEVER, b"")
    streams = [pair.open(CHAT) for _ in range(20)]
    for call in streams:
        pair.send(call, b"half")
    await pair.until(lambda: never.begun == 100)
    pair.connection.connection_lost(None)
    await turns_until(lambda: not pair.front._tasks)
    assert never.ends == ["cancelled"] * 100
    assert not pair.front._connections


@in_loop
async def test_half_messages_are_counted_and_bounded_together() -> None:
    limits = ConnectionLimits(message_bytes=1 << 20, half_sent_bytes=4 << 20)
    front = front_with(limits)
    pairs = [Pair(front) for _ in range(3)]
    for pair in pairs:
        for _ in range(4):  # each sends nearly 4 x 1 MiB, and of 2 MiB on one connection it is told no
            call = pair.open(ECHO)
            pair.caller.send_data(call, struct.pack(">BI", 0, 1 << 20) + bytes((1 << 20) - 1))
        await pair.until(lambda pair=pair: any(heard.closed for heard in pair.heard.values()))
        assert {heard.status for heard in pair.heard.values()} == {number(Code.RESOURCE_EXHAUSTED)}
        assert pair.connection._held <= 2 << 20
    assert front._held <= 4 << 20
    small = pairs[0].ask(ECHO, b"small ones pass")
    assert (await pairs[0].answer(small)).messages == [b"small ones pass"]
    for pair in pairs:
        pair.connection.connection_lost(None)
    assert front._held == 0


@pytest.mark.parametrize("path", [ECHO, COUNT, CHAT, TALK])
@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\0\5abc"])
@in_loop
async def test_a_message_that_is_sent_slowly_is_cut(path: str, sent: bytes) -> None:
    if path in (CHAT, TALK) and not sent:
        return  # between two messages a stream has time: see StreamLimits
    pair = Pair(front_with())
    call = pair.open(path)
    pair.caller.send_data(call, sent)
    pair.exchange()
    await Turn()
    now = pair.connection.now
    pair.connection.check(now + 19)
    pair.exchange()
    assert not pair.heard[call].closed
    pair.connection.check(now + 21)
    heard = await pair.answer(call)
    assert heard.status == number(Code.DEADLINE_EXCEEDED)
    assert "was not sent whole within 20 seconds" in heard.message


@in_loop
async def test_messages_that_no_handler_reads_close_the_window_and_open_it_when_read() -> None:
    gate = asyncio.Event()

    async def waits(requests: Any, call: Call) -> Any:
        await gate.wait()
        async for request in requests:
            yield b"%d" % len(request)

    pair = Pair(front_with(chat=waits))
    call = pair.open(CHAT)
    for _ in range(20):
        pair.send(call, bytes(1 << 20))
    for _ in range(50):
        pair.exchange()
        await Turn()
    stream = pair.connection._calls[call]
    assert UNREAD_BYTES < stream._unread <= UNREAD_BYTES + (1 << 20) + MESSAGE_BYTES  # type: ignore[attr-defined]
    assert stream.owed <= h2_connection.STREAM_WINDOW
    assert pair.caller.queued_body_size(call) > 10 << 20
    assert (await pair.answer(pair.ask(ECHO, b"others pass"))).messages == [b"others pass"]
    gate.set()
    pair.send(call, end=True)
    assert (await pair.answer(call)).messages == [b"%d" % (1 << 20)] * 20


@in_loop
async def test_a_session_answers_all_that_a_read_brought_in_one_write_and_without_a_task() -> None:
    together: list[bool] = []

    class Told(Talk):
        def go_on(self) -> None:
            take = self.line.next
            self.line.next = lambda: (take(), together.append(self.call.more))[0]  # type: ignore[method-assign]
            super().go_on()
            self.line.next = take  # type: ignore[method-assign]

    class Reading:
        """The session's line, with a method that may be replaced."""

        def __init__(self, line: Any) -> None:
            self.next, self.send, self.has_room, self.over = line.next, line.send, line.has_room, line.over

    pair = Pair(front_with(talk=lambda line, call: Told(Reading(line), call)))
    call = pair.open(TALK)
    pair.exchange()
    together.clear()
    pair.send(call, b"a", b"b", b"c")
    writes = []
    pair.wire.write = writes.append  # type: ignore[method-assign]
    pair.deliver()
    assert together == [True, True, False, False]  # and then it asked once more
    assert len(writes) == 1
    assert not pair.front._tasks


@in_loop
async def test_a_session_goes_on_when_its_caller_takes_answers_again() -> None:
    pair = Pair(front_with(), settings={4: 0})
    call = pair.open(TALK)
    for _ in range(100):
        pair.send(call, bytes(100_000))
    pair.send(call, end=True)
    for _ in range(200):
        pair.exchange()
        await Turn()
    assert pair.connection._h2.queued_body_size(call) < UNREAD_BYTES + 200_000
    pair.caller.set_local_window_size(1 << 24, stream_id=call)
    pair.caller.set_local_window_size(1 << 24)
    heard = await pair.answer(call)
    assert (len(heard.messages), heard.status) == (100, 0)
    assert pair.front._held == 0


@pytest.mark.parametrize(
    ("end", "reset", "status"),
    [(Overloaded("enough"), NO_ERROR, number(Code.RESOURCE_EXHAUSTED)), (asyncio.CancelledError(), CANCEL, None)],
)
@in_loop
async def test_a_session_that_ends_by_itself_ends_its_stream(
    end: BaseException, reset: int, status: int | None
) -> None:
    sessions: list[Talk] = []

    def opened(line: Any, call: Call) -> Talk:
        sessions.append(Talk(line, call))
        return sessions[0]

    pair = Pair(front_with(talk=opened))
    call = pair.open(TALK)
    pair.send(call, b"a")
    pair.exchange()
    sessions[0].end(end)
    heard = await pair.answer(call)
    assert (heard.messages, heard.status, heard.reset) == ([b"a"], status, reset)


@pytest.mark.parametrize("lost", [True, False])
@in_loop
async def test_a_session_is_told_when_nobody_waits_any_more(lost: bool) -> None:
    ends: list[BaseException | None] = []

    class Told(Talk):
        def end(self, error: BaseException | None) -> None:
            ends.append(error)
            super().end(error)

    pair = Pair(front_with(talk=Told))
    call = pair.open(TALK)
    pair.send(call, b"a")
    pair.exchange()
    if lost:
        pair.connection.connection_lost(None)
    else:
        pair.caller.reset_stream(call, CANCEL)
        pair.exchange()
    assert [type(end) for end in ends] == [asyncio.CancelledError]


async def reads_nothing(requests: Any, call: Call) -> Any:
    await asyncio.get_running_loop().create_future()
    yield b""


@in_loop
async def test_messages_of_nothing_that_no_handler_reads_are_left_as_they_came() -> None:
    pair = Pair(front_with(chat=reads_nothing))
    call = pair.open(CHAT)
    pair.caller.send_data(call, bytes(5) * (2 << 20))
    for _ in range(50):
        pair.exchange()
        await Turn()
    stream = pair.connection._calls[call]
    assert len(stream._ready) * MESSAGE_BYTES == pair.front._held < 8 << 20  # type: ignore[attr-defined]
    assert sum(map(len, stream._raw)) == stream.owed <= h2_connection.STREAM_WINDOW  # type: ignore[attr-defined]
    assert pair.caller.queued_body_size(call) > 4 << 20
    pair.caller.reset_stream(call, CANCEL)
    pair.exchange()
    assert pair.front._held == 0


@in_loop
async def test_messages_that_no_handler_reads_are_bounded_over_all_streams() -> None:
    pair = Pair(front_with(ConnectionLimits(message_bytes=1 << 20, half_sent_bytes=8 << 20), chat=reads_nothing))
    calls = [pair.open(CHAT) for _ in range(8)]
    for call in calls:
        pair.send(call, bytes(1 << 20))
    await pair.until(lambda: any(pair.heard[call].closed for call in calls))
    assert pair.front._held <= 4 << 20
    assert {pair.heard[call].status for call in calls} == {None, number(Code.RESOURCE_EXHAUSTED)}


@in_loop
async def test_a_message_is_not_cut_while_it_is_the_handler_that_keeps_it_from_coming() -> None:
    gate = asyncio.Event()

    async def waits(requests: Any, call: Call) -> Any:
        await gate.wait()
        async for request in requests:
            yield b"%d" % len(request)

    pair = Pair(front_with(ConnectionLimits(keepalive_seconds=1e6), chat=waits))
    call = pair.open(CHAT)
    sizes = 2 << 20, 1 << 20, 8 << 20
    pair.send(call, *map(bytes, sizes), end=True)
    for _ in range(50):
        pair.exchange()
        await Turn()
    for seconds in (1, 100, 1000):
        pair.connection.check(pair.connection.now + seconds)
    pair.connection.now -= 1000  # so long ago did anything come
    gate.set()
    for _ in range(10):
        await Turn()
    assert not pair.connection._calls[call].owed
    pair.connection.check(asyncio.get_running_loop().time() + 1)
    heard = await pair.answer(call)
    assert (heard.status, heard.messages) == (0, [b"%d" % size for size in sizes])


@in_loop
async def test_streams_whose_answers_are_not_taken_are_bounded_together() -> None:
    made: list[int] = []

    async def many(request: bytes, call: Call) -> Any:
        for _ in range(40):
            made.append(1)
            yield bytes(25_000)

    pair = Pair(front_with(ConnectionLimits(message_bytes=1 << 20), count=many), settings={4: 0})
    calls = [pair.ask(COUNT, b"") for _ in range(60)]
    for _ in range(100):
        pair.exchange()
        await Turn()
    waits = pair.connection._h2.queued_body_size()
    assert 2 << 20 < waits < (2 << 20) + 61 * 25_005  # and one of each besides
    assert len(made) < 200
    for call in calls:
        pair.caller.set_local_window_size(1 << 24, stream_id=call)
    pair.caller.set_local_window_size(1 << 28)
    for call in calls:
        heard = await pair.answer(call)
        assert (len(heard.messages), heard.status) == (40, 0)


@in_loop
async def test_a_handler_waits_for_a_caller_that_does_not_take_its_answers() -> None:
    made = 0

    async def many(request: bytes, call: Call) -> Any:
        nonlocal made
        for made in range(1, 101):  # noqa: B007
            yield bytes(100_000)

    pair = Pair(front_with(count=many), settings={4: 0})
    call = pair.ask(COUNT, b"")
    for _ in range(200):
        pair.exchange()
        await Turn()
    assert made == 11  # a MiB and no more
    pair.caller.set_local_window_size(1 << 24, stream_id=call)
    pair.caller.set_local_window_size(1 << 24)
    heard = await pair.answer(call)
    assert (len(heard.messages), heard.status) == (100, 0)


@in_loop
async def test_a_caller_that_reads_nothing_is_read_no_more_and_cut() -> None:
    pair = Pair(front_with(), settings={4: 1 << 30}, most=100_000)
    pair.caller.set_local_window_size(1 << 30)
    for _ in range(300):
        pair.ask(ECHO, bytes(10_000))
    pair.deliver()
    await turns_until(lambda: pair.connection._paused)
    assert not pair.wire.reading
    assert len(pair.wire.written) < 300 * 10_000  # the rest waits for the caller
    now = asyncio.get_running_loop().time()
    pair.connection.check(now)
    pair.connection.check(now + 19)
    assert not pair.wire.over
    pair.connection.check(now + 21)
    assert pair.wire.over


@in_loop
async def test_answers_that_are_not_taken_are_bounded_and_cut() -> None:
    pair = Pair(front_with(ConnectionLimits(message_bytes=1 << 20, streams=100)), settings={4: 0})
    calls = [pair.ask(ECHO, bytes(1 << 19)) for _ in range(12)]
    await pair.until(lambda: sum(pair.heard[call].status is not None for call in calls) == 8)
    waits = [call for call in calls if pair.heard[call].status is None]
    assert {pair.heard[call].status for call in {*calls} - {*waits}} == {number(Code.RESOURCE_EXHAUSTED)}
    assert pair.connection._h2.queued_body_size() == 4 * ((1 << 19) + 5)  # what is more than 2 MiB
    for _ in range(8):
        assert (await pair.answer(pair.ask(ECHO, b""))).status == number(Code.RESOURCE_EXHAUSTED)
    now = asyncio.get_running_loop().time()
    pair.connection.check(now)
    pair.connection.check(now + 30)
    await pair.until(lambda: all(pair.heard[call].closed for call in waits))
    assert not pair.connection._calls


@in_loop
async def test_more_streams_than_allowed_are_refused_by_a_caller_that_does_not_listen() -> None:
    never = Never()
    pair = Pair(front_with(ConnectionLimits(streams=10), never=never), greet=False)
    for _ in range(30):  # in the first read, before the server's settings were seen
        pair.ask(NEVER, b"")
    pair.exchange()
    await Turn()
    await Turn()
    assert never.begun <= 10
    assert len(pair.connection._calls) <= 10


@in_loop
async def test_streams_that_are_opened_and_taken_back_fast_end_the_connection() -> None:
    pair = Pair(front_with())
    for _ in range(3000):
        if pair.wire.over:
            break
        call = pair.open(CHAT)
        pair.deliver()
        pair.caller.reset_stream(call, CANCEL)
        pair.deliver()
    assert pair.wire.over
    assert not pair.connection._calls


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


@pytest.mark.parametrize(
    "flood",
    [
        frame(6, bytes(8)),  # PING
        frame(4, struct.pack(">HI", 4, 65535)),  # SETTINGS
        frame(8, struct.pack(">I", 1)),  # WINDOW_UPDATE
        frame(0, b"", stream=1),  # DATA, empty
        frame(3, bytes(4), stream=1),  # RST_STREAM
        frame(9, b"", stream=1),  # CONTINUATION out of place
    ],
    ids=["ping", "settings", "window", "data", "reset", "continuation"],
)
@in_loop
async def test_floods_of_frames_that_bring_nothing_end_the_connection(flood: bytes) -> None:
    pair = Pair(front_with())
    pair.open(CHAT)
    pair.exchange()
    for _ in range(200):
        if pair.wire.over:
            break
        pair.connection.data_received(flood * 500)
        pair.wire.written.clear()
    assert pair.wire.over


@in_loop
async def test_a_header_block_without_end_ends_the_connection() -> None:
    pair = Pair(front_with())
    pair.connection.data_received(frame(1, b"", stream=1))
    for _ in range(100):
        if pair.wire.over:
            break
        pair.connection.data_received(frame(9, bytes(100), stream=1))
    assert pair.wire.over


@in_loop
async def test_headers_that_grow_out_of_little_end_the_connection() -> None:
    pair = Pair(front_with())
    big = (b"x", b"y" * 3500)
    for _ in range(2):  # then it is one byte on the wire
        pair.caller.send_request([(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), *[big] * 60])
        pair.deliver()
    assert pair.wire.over


@in_loop
async def test_garbage_closes_the_connection_and_raises_nothing() -> None:
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(100), bytes(1000), b"PRI * HTTP/2.0\r\n\r\nXX"):
        pair = Pair(front_with(), greet=False)
        pair.connection.data_received(garbage)
        assert pair.wire.over
        pair.connection.data_received(garbage)


@in_loop
async def test_pings_are_answered_and_too_many_of_them_are_not() -> None:
    pair = Pair(front_with())
    for _ in range(2):
        pair.caller.ping()
        pair.exchange()
    assert not pair.wire.over
    for _ in range(20):  # while answers flow a caller may measure the way, as grpc-core does
        pair.ask(ECHO, b"")
        await Turn()
        await Turn()
        pair.caller.ping()
        pair.exchange()
    assert not pair.wire.over
    for _ in range(5):
        pair.caller.ping()
        pair.deliver()
    pair.take()
    assert pair.goaways[-1][1:] == (CALM, b"too_many_pings")
    assert pair.wire.over


@in_loop
async def test_a_silent_caller_is_pinged_and_one_that_does_not_answer_is_closed() -> None:
    pair = Pair(front_with(ConnectionLimits(idle_seconds=1e6)))
    now = pair.connection.now
    pair.connection.check(now + 59)
    pair.take()
    assert pair.pings == []
    pair.connection.check(now + 61)
    pair.take()
    assert len(pair.pings) == 1
    pair.connection.check(now + 80)
    assert not pair.wire.over
    pair.connection.check(now + 82)
    assert pair.wire.over


@in_loop
async def test_a_connection_ends_when_it_is_idle_and_not_while_it_has_a_call() -> None:
    pair = Pair(front_with(ConnectionLimits(idle_seconds=10, keepalive_seconds=1e6)))
    call = pair.open(CHAT)
    pair.exchange()
    now = pair.connection.now
    pair.connection.check(now + 15)
    assert not pair.wire.over
    pair.send(call, end=True)
    await pair.answer(call)
    pair.connection.check(now + 100)
    pair.take()
    assert pair.wire.over
    assert pair.goaways[-1][1:] == (NO_ERROR, b"max_idle")


@in_loop
async def test_a_connection_that_says_nothing_is_told_that_the_handshake_took_too_long() -> None:
    pair = Pair(front_with(), greet=False)
    now = pair.connection.now
    pair.connection.check(now + 4)
    assert not pair.wire.over
    pair.connection.check(now + 6)
    assert pair.wire.over
    assert b"handshake timeout" in pair.wire.written


@in_loop
async def test_a_connection_is_retired_in_two_steps_and_its_calls_end_well() -> None:
    never = Never()
    pair = Pair(front_with(never=never))
    open_call = pair.open(CHAT)
    pair.send(open_call, b"a")
    await pair.until(lambda: pair.heard[open_call].messages == [b"a"])
    pair.connection.retire()
    late = pair.open(ECHO)  # it was on its way
    pair.send(late, b"late", end=True)
    assert (await pair.answer(late)).messages == [b"late"]
    assert [last for last, *_ in pair.goaways] == [2**31 - 1, late]
    assert not pair.wire.over
    pair.send(open_call, b"b", end=True)
    assert (await pair.answer(open_call)).messages == [b"a", b"b"]
    await pair.until(lambda: pair.wire.over)


@in_loop
async def test_a_caller_that_says_goodbye_itself_when_it_is_asked_to_go_is_let_go() -> None:
    """As grpc-js does: its GOAWAY comes with its answer to the ping, and nothing is left to be said."""
    pair = Pair(front_with())
    pair.connection.retire()
    pair.take()
    pair.caller.send_goaway(NO_ERROR)
    pair.deliver()
    assert pair.wire.over


@in_loop
async def test_a_retired_connection_whose_calls_do_not_end_is_cut_after_the_grace() -> None:
    pair = Pair(front_with(ConnectionLimits(age_seconds=100, age_grace_seconds=50, keepalive_seconds=1e6)))
    call = pair.open(CHAT)
    pair.exchange()
    now = asyncio.get_running_loop().time()
    pair.connection.check(now + 89)
    pair.exchange()
    assert not pair.goaways
    pair.connection.check(now + 111)
    pair.exchange()
    assert pair.goaways
    pair.connection.check(now + 49)
    assert not pair.wire.over
    pair.connection.check(now + 52)
    assert pair.wire.over
    assert call not in pair.connection._calls


@in_loop
async def test_metadata_reaches_the_handler_and_headers_of_the_transport_do_not() -> None:
    seen: list[Any] = []

    async def looks(request: bytes, call: Call) -> bytes:
        seen.extend(call.metadata())
        return b""

    pair = Pair(front_with(echo=looks))
    value = base64.b64encode(b"\0\xff").rstrip(b"=")
    extra = [(b"authorization", b"Bearer x"), (b"two", b"1"), (b"two", b"2"), (b"raw-bin", value + b"," + value)]
    call = pair.open(ECHO, extra=extra)
    pair.send(call, b"", end=True)
    assert (await pair.answer(call)).status == 0
    assert seen == [
        ("authorization", "Bearer x"),
        ("two", "1"),
        ("two", "2"),
        ("raw-bin", b"\0\xff"),
        ("raw-bin", b"\0\xff"),
    ]


@in_loop
async def test_a_token_of_one_caller_is_never_taken_for_anothers() -> None:
    """Headers are remembered; whole sets of them are compared, and their memory is bounded."""

    async def who(request: bytes, call: Call) -> bytes:
        return dict(call.metadata())["authorization"].encode()  # type: ignore[union-attr]

    front = front_with(echo=who)
    pairs = Pair(front), Pair(front)
    for turn in range(1000):
        pair = pairs[turn % 2]
        call = pair.ask(ECHO, b"", authorization=b"Bearer %d" % (turn % 400))
        assert (await pair.answer(call)).messages == [b"Bearer %d" % (turn % 400)]
    assert len(front._openings) <= 256


@in_loop
async def test_an_answer_beyond_the_limit_is_a_status() -> None:
    async def large(request: bytes, call: Call) -> bytes:
        return bytes(1001)

    async def larger(requests: Any, call: Call) -> Any:
        yield b"first"
        yield bytes(1001)

    pair = Pair(front_with(ConnectionLimits(message_bytes=1000), echo=large, chat=larger))
    for call in (pair.ask(ECHO, b""), pair.ask(CHAT, b"")):
        heard = await pair.answer(call)
        assert heard.status == number(Code.RESOURCE_EXHAUSTED)
        assert "the answer of 1001 bytes" in heard.message


@in_loop
async def test_calls_with_nothing_wrong_leave_nothing_behind() -> None:
    pair = Pair(front_with())
    for _ in range(300):
        calls = [pair.ask(ECHO, b"x"), pair.ask(CHAT, b"y"), pair.ask(COUNT, b"2"), pair.ask(SUM, b"1")]
        for call in calls:
            await pair.answer(call)
    connection = pair.connection
    assert (connection._calls, connection._rooms, connection._ready, connection._early) == ({}, {}, [], [])
    assert connection._h2.queued_body_size() == 0
    assert isinstance(connection._h2, ngh2.Connection)
    assert connection._h2.local_window_size > h2_connection.CONNECTION_WINDOW // 2
