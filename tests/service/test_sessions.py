"""Streams that are answered by a session: in order, so many at once, and the same through iterators."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import Overloaded
from service.rpc import sessions
from service.rpc.infer_stream import MOST_IN_FLIGHT, MOST_REFUSED, STREAM_ANSWER_TAG, Begun, InferStream
from service.rpc.methods import Call, Method
from service.rpc.observed import observed
from service.rpc.sessions import iterated
from tests.service.h2_pair import Talk, Turn, run, turns_until


class Desk:
    """A stream's two sides: what its caller does, and the runs of what it asks for."""

    def __init__(self, *requests: bytes, waits: bool = False) -> None:
        self.requests, self.answers = deque(requests), list[bytes]()
        self.heard, self.room = False, MOST_IN_FLIGHT
        self.runs: dict[bytes, asyncio.Future[Any]] = {}
        self.ends: list[BaseException | None] = []
        self._reading: Any = SimpleNamespace(plan=SimpleNamespace(waits=waits))
        self.stream = InferStream(self, Call(), self._begin, self._finish, self._finish_now)

    def next(self) -> bytes | None:
        if self.requests:
            return self.requests.popleft()
        if self.heard:
            raise StopIteration
        return None

    def send(self, answer: bytes) -> None:
        self.answers.append(answer.removeprefix(STREAM_ANSWER_TAG)[1:])

    def has_room(self) -> bool:
        return len(self.answers) < self.room

    def over(self, error: BaseException | None) -> None:
        self.ends.append(error)

    def done(self, *requests: bytes) -> None:
        for request in requests:
            self.runs[request].set_result(request)

    def _begin(self, request: bytes) -> Begun:
        if request == b"bad":
            raise Overloaded("no")
        run = self.runs[request] = asyncio.get_running_loop().create_future()
        return Begun(self._reading, run, 0)

    async def _finish(self, begun: Begun) -> bytes:
        answer: Any = await begun.answer  # type: ignore[misc]
        return bytes(answer)

    def _finish_now(self, _: Begun, answer: Any) -> bytes:
        if isinstance(answer, BaseException):
            raise answer
        return bytes(answer)


def test_answers_come_in_the_order_of_the_requests_whatever_is_done_first() -> None:
    async def test() -> None:
        desk = Desk(b"a", b"b", b"c")
        desk.stream.go_on()
        desk.done(b"c", b"b")
        await Turn()
        assert desk.answers == []
        desk.done(b"a")
        await turns_until(lambda: desk.answers == [b"a", b"b", b"c"])
        assert desk.ends == []
        desk.heard = True
        desk.stream.go_on()
        assert desk.ends == [None]

    run(test)


def test_the_answers_of_one_run_are_given_in_one_go() -> None:
    async def test() -> None:
        desk = Desk(b"a", b"b", b"c")
        desk.stream.go_on()
        assert [len(run._callbacks or ()) for run in desk.runs.values()] == [1, 0, 0]  # type: ignore[attr-defined]
        desk.stream.go_on()
        assert [len(run._callbacks or ()) for run in desk.runs.values()] == [1, 0, 0]  # type: ignore[attr-defined]
        desk.done(b"a", b"b", b"c")
        await Turn()
        assert desk.answers == [b"a", b"b", b"c"]

    run(test)


def test_an_error_is_an_answer_and_the_stream_goes_on() -> None:
    async def test() -> None:
        desk = Desk(b"bad", b"a")
        desk.stream.go_on()
        desk.done(b"a")
        await turns_until(lambda: len(desk.answers) == 2)
        assert b"no" in desk.answers[0]
        assert desk.answers[1] == b"a"

    run(test)


def test_so_many_wait_and_one_more_is_read_when_one_is_answered() -> None:
    async def test() -> None:
        names = [b"%d" % number for number in range(2 * MOST_IN_FLIGHT)]
        desk = Desk(*names)
        desk.stream.go_on()
        assert len(desk.runs) == MOST_IN_FLIGHT
        desk.done(names[0])
        await turns_until(lambda: len(desk.runs) == MOST_IN_FLIGHT + 1)

    run(test)


def test_of_a_flood_so_many_are_answered_before_others_have_their_turn() -> None:
    async def test() -> None:
        desk = Desk(*[b"bad"] * (3 * MOST_IN_FLIGHT))
        desk.room, desk.heard = 4 * MOST_IN_FLIGHT, True
        desk.stream.go_on()
        counts = [len(desk.answers)]
        while not desk.ends:
            await Turn()
            counts.append(len(desk.answers))
        assert counts[:3] == [MOST_REFUSED, 2 * MOST_REFUSED, 3 * MOST_REFUSED]
        assert counts[-1] == 3 * MOST_IN_FLIGHT
        assert desk.ends == [None]

    run(test)


def test_what_the_caller_does_not_take_waits_and_no_more_is_read() -> None:
    async def test() -> None:
        names = [b"%d" % number for number in range(2 * MOST_IN_FLIGHT)]
        desk = Desk(*names)
        desk.room = 2
        desk.stream.go_on()
        desk.done(*names[:MOST_IN_FLIGHT])
        await turns_until(lambda: len(desk.answers) == 2)
        await turns_until(lambda: len(desk.runs) == MOST_IN_FLIGHT + 2)
        await Turn()
        assert len(desk.runs) == MOST_IN_FLIGHT + 2
        desk.room = 3
        desk.stream.go_on()
        assert desk.answers == names[:3]

    run(test)


def test_a_request_that_cannot_be_read_ends_the_stream_after_the_answers_before_it() -> None:
    async def test() -> None:
        desk = Desk(b"a")
        desk.stream.go_on()

        def fails() -> bytes:
            raise Overloaded("one too many")

        desk.next = fails  # type: ignore[method-assign]
        desk.stream.go_on()
        assert desk.ends == []
        desk.done(b"a")
        await turns_until(lambda: bool(desk.ends))
        assert desk.answers == [b"a"]
        assert isinstance(desk.ends[0], Overloaded)

    run(test)


@pytest.mark.parametrize("waits", [False, True])
def test_an_end_from_outside_gives_up_what_waits_and_is_told_once(waits: bool) -> None:
    async def test() -> None:
        desk = Desk(b"a", b"b", waits=waits)
        desk.stream.go_on()
        await Turn()
        desk.stream.end(Overloaded("enough"))
        desk.stream.end(asyncio.CancelledError())
        desk.stream.go_on()
        await turns_until(lambda: all(run.cancelled() for run in desk.runs.values()))
        assert [type(end) for end in desk.ends] == [Overloaded]
        assert desk.answers == []

    run(test)


def test_what_waits_for_the_disk_is_answered_in_order_too() -> None:
    async def test() -> None:
        desk = Desk(b"a", b"b", waits=True)
        desk.stream.go_on()
        await Turn()
        desk.done(b"b")
        await Turn()
        desk.done(b"a")
        await turns_until(lambda: desk.answers == [b"a", b"b"])

    run(test)


async def sent(*requests: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    for request in requests:
        yield request
    if then is not None:
        raise then


def test_through_iterators_a_session_answers_the_same() -> None:
    async def test() -> None:
        names = [b"%d" % number for number in range(300)]
        assert [answer async for answer in iterated(Talk)(sent(*names), Call())] == names

    run(test)


def test_through_iterators_an_error_comes_after_the_answers() -> None:
    async def test() -> None:
        answers = iterated(Talk)(sent(b"a", then=Overloaded("enough")), Call())
        assert await anext(answers) == b"a"
        with pytest.raises(Overloaded, match="enough"):
            await anext(answers)

    run(test)


@pytest.mark.parametrize(
    ("end", "code"),
    [(None, "OK"), (Overloaded("enough"), "RESOURCE_EXHAUSTED"), (asyncio.CancelledError(), "CANCELLED")],
)
def test_the_end_of_a_session_is_counted_once(end: BaseException | None, code: str) -> None:
    counted: list[str] = []
    method = Method("/t/Talk", True, True, Talk, bytes, by_session=True)  # type: ignore[arg-type]
    line: Any = SimpleNamespace(next=None, send=None, has_room=None, over=lambda _: None)
    session = observed(method, lambda _: lambda name, _: counted.append(name)).handler(line, Call())
    session.end(end)
    session.end(asyncio.CancelledError())
    assert counted == [code]


def test_a_session_that_is_refused_is_counted() -> None:
    counted: list[str] = []

    def refuses(line: Any, call: Call) -> Any:
        raise Overloaded("no")

    method = Method("/t/Talk", True, True, refuses, bytes, by_session=True)  # type: ignore[arg-type]
    line: Any = SimpleNamespace(next=None, send=None, has_room=None, over=lambda _: None)
    with pytest.raises(Overloaded):
        observed(method, lambda _: lambda name, _: counted.append(name)).handler(line, Call())
    assert counted == ["RESOURCE_EXHAUSTED"]


class Opened:
    """Opens sessions and keeps them."""

    def __init__(self) -> None:
        self.opened: list[Talk] = []

    def __call__(self, line: Any, call: Call) -> Talk:
        self.opened.append(Talk(line, call))
        return self.opened[0]


async def endless(read: list[int]) -> AsyncIterator[bytes]:
    while True:
        read.append(1)
        yield b""


def test_through_iterators_a_caller_who_takes_nothing_is_not_read_and_one_who_leaves_ends_the_session() -> None:
    async def test() -> None:
        read: list[int] = []
        handler = Opened()
        answers: Any = iterated(handler)(endless(read), Call())
        await anext(answers)
        for _ in range(20):
            await Turn()
        assert len(read) <= 3
        await answers.aclose()
        assert handler.opened[0].is_over

    run(test)


def test_through_iterators_a_caller_who_takes_not_even_an_error_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TAKE_SECONDS", 0.0)

    async def test() -> None:
        handler = Opened()
        taken = asyncio.Event()

        async def front() -> None:
            async for _ in iterated(handler)(endless([]), Call()):
                taken.set()
                await asyncio.get_running_loop().create_future()  # the caller takes nothing

        task = asyncio.create_task(front())
        await taken.wait()
        handler.opened[0].end(Overloaded("enough"))
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)
