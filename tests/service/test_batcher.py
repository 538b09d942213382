"""The queue of one model: who shares a run, who is refused, and that each waiter meets its own fate."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import DeadlinePassed, InvalidRequest, NotReady, Overloaded
from service.inference.batcher import SHORT_RUN_NS, Answer, Batcher, Lane, Limits
from service.inference.company import Company
from service.inference.pressure import Pressure
from service.inference.run_costs import MOST_FORMS, Costs, RunCosts
from service.inference.statistics import Statistics

LANE = Lane(("y",), None, (("x", np.dtype("<f4"), (2,)),), joins=True)


class FakeSnapshot:
    session = SimpleNamespace(provider="CPUExecutionProvider")

    def __init__(self, revision: str) -> None:
        self.revision, self.online_state = revision, None


SNAPSHOT = FakeSnapshot("r1")


class CompanyOfThree(Company):
    """Holds every request for an hour, unless three wait."""

    def hold_seconds(self) -> float:
        return 3600

    def is_complete(self, waiting: int) -> bool:
        return waiting == 3


class Model:
    """y = 2 x, and a record of the runs. A row that begins with 666 cannot be computed."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    async def hold(self) -> None:
        """Return when a run has begun, which ends when `go_on` is set."""
        assert await asyncio.to_thread(self.entered.wait, 60)

    def __call__(
        self, asked: Any, _outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> tuple[Any, list[NDArray[Any]]]:
        self.entered.set()
        assert self.go_on.wait(timeout=60)
        self.threads.add(threading.current_thread().name)
        self.batches.append(len(feeds["x"]))
        if (feeds["x"][:, 0] == 666).any():
            raise InvalidRequest("666 is out of range")
        return asked or SNAPSHOT, [2 * feeds["x"]]


def rows(*firsts: float) -> NDArray[np.float32]:
    return np.array([[first, 0] for first in firsts], np.float32)


def submit(
    batcher: Batcher, *firsts: float, caller: str = "a", deadline: float = math.inf, lane: Lane = LANE
) -> asyncio.Future[Answer]:
    answer = batcher.submit(lane, [rows(*firsts)], len(firsts), deadline, lambda: caller)
    if not isinstance(answer, Answer):
        return answer
    done = asyncio.get_running_loop().create_future()
    done.set_result(answer)
    return done


def doubled(answer: Answer) -> list[float]:
    return [float(value) for value in answer.part("y")[:, 0]]


def batcher_of(model: Model, *, short: bool = True, **limits: int) -> Batcher:
    """`short` runs are made in the loop, others in the thread. A first request waits a moment for company."""
    batcher = Batcher("m/1", model, Limits(**{"delay_us": 1000, **limits}), Statistics(), lambda: 0)
    for size in range(12):
        batcher.costs.of(LANE.inputs).learn(2**size, 0 if short else 10 * SHORT_RUN_NS)
    return batcher


@pytest.fixture
def model() -> Model:
    return Model()


def running(test: Callable[[Model], Coroutine[Any, Any, None]]) -> Callable[[Model], None]:
    def run(model: Model) -> None:
        asyncio.run(asyncio.wait_for(test(model), timeout=60))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@running
async def test_requests_that_come_together_share_a_run_and_each_gets_its_rows(model: Model) -> None:
    batcher = batcher_of(model)
    answers = await asyncio.gather(submit(batcher, 1), submit(batcher, 2, 3), submit(batcher, 4))
    assert model.batches == [4]
    assert [doubled(answer) for answer in answers] == [[2], [4, 6], [8]]


@running
async def test_who_is_told_in_place_of_a_future_is_told_when_the_run_is_made(model: Model) -> None:
    class Told:
        def __init__(self) -> None:
            self.of: list[Answer | Exception] = []
            self.set_exception = self.set_result = self.of.append

        def done(self) -> bool:
            return bool(self.of)

    batcher, one, bad, left = batcher_of(model), Told(), Told(), Told()
    for first, told in ((1, one), (666, bad), (2, left)):
        assert batcher.submit_for(told, LANE, [rows(first)], 1, math.inf) is told
    left.of.append(NotReady("its caller left"))
    await batcher.drain()
    assert isinstance(one.of[0], Answer)
    assert doubled(one.of[0]) == [2]
    assert isinstance(bad.of[0], InvalidRequest)
    assert len(left.of) == 1
    assert sum(model.batches[1:]) == 2


@running
async def test_what_comes_during_a_run_makes_the_next_run(model: Model) -> None:
    batcher = batcher_of(model, short=False)
    model.go_on.clear()
    first = submit(batcher, 1)
    await model.hold()
    others = [submit(batcher, n) for n in (2, 3, 4)]
    model.go_on.set()
    await asyncio.gather(first, *others)
    assert model.batches == [1, 3]
    assert model.threads == {"model m/1"}


@running
async def test_a_short_run_is_made_in_the_loops_own_thread(model: Model) -> None:
    await submit(batcher_of(model), 1)
    assert model.threads == {threading.current_thread().name}


@running
async def test_a_request_that_finds_the_model_idle_is_answered_at_once(model: Model) -> None:
    batcher = batcher_of(model, delay_us=0)
    answer = batcher.submit(LANE, [rows(3)], 1, math.inf)
    assert isinstance(answer, Answer)
    assert doubled(answer) == [6]
    with pytest.raises(InvalidRequest):
        batcher.submit(LANE, [rows(666)], 1, math.inf)


@running
async def test_as_many_as_are_expected_are_waited_for_and_no_longer(model: Model) -> None:
    batcher = batcher_of(model, delay_us=0)
    batcher._company = CompanyOfThree(0.001)
    for _ in range(2):
        await asyncio.gather(*[submit(batcher, n) for n in range(3)])
    assert model.batches == [3, 3]


@running
async def test_who_would_wait_too_long_is_refused(model: Model) -> None:
    batcher = batcher_of(model)
    batcher._row_seconds = 0.6
    waiting = [submit(batcher, 1), submit(batcher, 2)]
    with pytest.raises(Overloaded):
        submit(batcher, 3)
    await asyncio.gather(*waiting)


@running
async def test_a_run_holds_no_more_rows_than_its_limit(model: Model) -> None:
    batcher = batcher_of(model, rows=4)
    await asyncio.gather(*[submit(batcher, 1, 2) for _ in range(5)])
    assert model.batches == [4, 4, 2]


@running
async def test_requests_of_another_form_have_a_run_of_their_own(model: Model) -> None:
    batcher = batcher_of(model)
    other = LANE._replace(snapshot=FakeSnapshot("r2"))
    answers = await asyncio.gather(submit(batcher, 1), submit(batcher, 2, lane=other))
    assert model.batches == [1, 1]
    assert [answer.run.snapshot.revision for answer in answers] == ["r1", "r2"]


@running
async def test_requests_that_cannot_be_joined_run_one_by_one(model: Model) -> None:
    batcher = batcher_of(model)
    lane = LANE._replace(joins=False, inputs=(("x", np.dtype("<f4"), (1, 2)),))
    answers = await asyncio.gather(*[submit(batcher, n, lane=lane) for n in (1, 2)])
    assert model.batches == [1, 1]
    assert [doubled(answer) for answer in answers] == [[2], [4]]


@pytest.mark.parametrize("short", [True, False])
def test_a_request_that_fails_fails_alone(model: Model, short: bool) -> None:
    async def test() -> None:
        batcher = batcher_of(model, short=short)
        good, bad, fine = await asyncio.gather(
            submit(batcher, 1), submit(batcher, 666), submit(batcher, 3), return_exceptions=True
        )
        assert (doubled(good), doubled(fine)) == ([2], [6])
        assert isinstance(bad, InvalidRequest)

    asyncio.run(test())


@running
async def test_what_was_cancelled_or_came_too_late_is_not_run(model: Model) -> None:
    batcher = batcher_of(model)
    left, late, good = submit(batcher, 1), submit(batcher, 2, deadline=time.monotonic() - 1), submit(batcher, 3)
    left.cancel()
    assert doubled(await good) == [6]
    assert model.batches == [1]
    with pytest.raises(DeadlinePassed):
        await late
    assert batcher._statistics.dropped == {"cancelled": 1, "deadline": 1}


@running
async def test_a_caller_that_leaves_during_the_run_harms_nobody(model: Model) -> None:
    batcher = batcher_of(model, short=False)
    model.go_on.clear()
    left, stays = submit(batcher, 1), submit(batcher, 2)
    await model.hold()
    left.cancel()
    model.go_on.set()
    assert doubled(await stays) == [4]
    assert doubled(await submit(batcher, 3)) == [6]


@running
async def test_a_run_is_ended_when_the_last_of_its_callers_has_left_or_run_out_of_time(model: Model) -> None:
    batcher = batcher_of(model, short=False)
    model.go_on.clear()
    waiting = [submit(batcher, 1), submit(batcher, 2), submit(batcher, 3, deadline=time.monotonic() + 60)]
    await model.hold()
    batch = batcher._in_thread
    assert batch is not None
    waiting[0].cancel()
    batcher._look_after(batch)
    assert not batch.stop.asked
    waiting[1].cancel()
    batch.waiting[-1].deadline = time.monotonic()
    batcher._look_after(batch)
    assert batch.stop.asked
    model.go_on.set()
    await batcher.drain()
    assert batcher._statistics.dropped["stopped"] == len(batch.waiting)


@running
async def test_closing_ends_the_run_under_way(model: Model) -> None:
    batcher = batcher_of(model, short=False)
    model.go_on.clear()
    submit(batcher, 1)
    await model.hold()
    batch = batcher._in_thread
    batcher.close()
    assert batch is not None
    assert batch.stop.asked
    model.go_on.set()


@running
async def test_a_full_queue_refuses_and_empties_again(model: Model) -> None:
    batcher = batcher_of(model, requests=2)
    waiting = [submit(batcher, 1), submit(batcher, 2)]
    with pytest.raises(Overloaded, match="2 requests are waiting already"):
        submit(batcher, 3)
    await asyncio.gather(*waiting)
    assert doubled(await submit(batcher, 4)) == [8]
    assert batcher._statistics.dropped == {"full": 1}


@running
async def test_bytes_are_bounded_too_but_one_request_always_enters(model: Model) -> None:
    batcher = batcher_of(model, bytes=10)
    large = submit(batcher, 1, 2)
    with pytest.raises(Overloaded):
        submit(batcher, 3)
    await large


@running
async def test_who_fills_the_queue_gives_way_to_a_caller_with_less(model: Model) -> None:
    batcher = batcher_of(model, requests=4)
    greedy = [submit(batcher, n, caller="greedy") for n in range(4)]
    modest = submit(batcher, 9, caller="modest")
    with pytest.raises(Overloaded):
        submit(batcher, 5, caller="greedy")
    assert doubled(await modest) == [18]
    outcomes = await asyncio.gather(*greedy, return_exceptions=True)
    assert [isinstance(outcome, Overloaded) for outcome in outcomes] == [False, False, False, True]


class Overload(Pressure):
    """Says that there is overload from the first run on that leaves somebody waiting."""

    def is_high(self) -> bool:
        return self._high

    def alarm(self, _taken: int, waiting: int) -> bool:
        before, self._high = self._high, self._high or waiting > 0
        return self._high and not before


def overloaded(model: Model, *, run_ns: Callable[[int], int]) -> Batcher:
    """Runs of so many rows take so long, by what was learned."""
    batcher = batcher_of(model, short=False)
    batcher._pressure = Overload()
    batcher._pressure._high = True
    batcher.costs = Costs()
    for size in range(7):
        batcher.costs.of(LANE.inputs).learn(2**size, run_ns(2**size))
    return batcher


@running
async def test_under_overload_one_may_wait_where_each_row_makes_a_run_longer(model: Model) -> None:
    batcher = overloaded(model, run_ns=lambda rows: rows * 10_000_000)
    model.go_on.clear()
    under_way = submit(batcher, 1)
    await model.hold()
    waits = submit(batcher, 2)
    with pytest.raises(Overloaded):
        submit(batcher, 3)
    model.go_on.set()
    assert [doubled(await under_way), doubled(await waits)] == [[2], [4]]


@running
async def test_under_overload_all_may_wait_whom_one_run_of_the_usual_length_takes_along(model: Model) -> None:
    batcher = overloaded(model, run_ns=lambda rows: 10_000_000 + rows * 50_000)
    model.go_on.clear()
    answers = [submit(batcher, 1)]
    await model.hold()
    answers += [submit(batcher, n) for n in range(63)]
    with pytest.raises(Overloaded):
        [submit(batcher, n) for n in range(65)]
    model.go_on.set()
    await asyncio.gather(*answers)


@running
async def test_under_overload_one_may_wait_of_those_that_cannot_share_a_run_or_whose_runs_nobody_knows(
    model: Model,
) -> None:
    alone = LANE._replace(joins=False, inputs=(("x", np.dtype("<f4"), (1, 2)),))
    for lane, costs in ((alone, 1_500_000), (LANE, None)):
        batcher = overloaded(model, run_ns=lambda rows: rows)
        batcher.costs = Costs()
        if costs:
            batcher.costs.of(lane.inputs).learn(1, costs)
        model.go_on.clear()
        model.entered.clear()
        answers = [submit(batcher, 1, lane=lane)]
        await model.hold()
        answers.append(submit(batcher, 2, lane=lane))
        with pytest.raises(Overloaded):
            submit(batcher, 3, lane=lane)
        model.go_on.set()
        assert [doubled(answer) for answer in await asyncio.gather(*answers)] == [[2], [4]]


@running
async def test_under_overload_who_asks_for_less_takes_the_place_of_who_asks_for_more(model: Model) -> None:
    batcher = overloaded(model, run_ns=lambda rows: rows * 10_000_000)
    model.go_on.clear()
    submit(batcher, 1)
    await model.hold()
    greedy = submit(batcher, 2, caller="greedy")
    for _ in range(3):
        with pytest.raises(Overloaded):
            submit(batcher, 2, caller="greedy")
    modest = submit(batcher, 3, caller="modest")
    model.go_on.set()
    assert doubled(await modest) == [6]
    with pytest.raises(Overloaded):
        await greedy


@running
async def test_when_overload_shows_itself_those_who_waited_longest_are_refused(model: Model) -> None:
    batcher = overloaded(model, run_ns=lambda rows: rows * 10_000_000)
    batcher.limits = Limits(rows=1, delay_us=1000)
    batcher._pressure._high = False
    model.go_on.clear()
    under_way = submit(batcher, 9)
    await model.hold()
    waiting = [submit(batcher, n) for n in range(6)]
    model.go_on.set()
    refused = await asyncio.gather(*waiting[1:5], return_exceptions=True)
    assert all(isinstance(error, Overloaded) for error in refused)
    assert doubled(await under_way) == [18]
    assert [doubled(await waiting[n]) for n in (0, 5)] == [[0], [10]]
    assert batcher._statistics.dropped == {"full": 4}


@running
async def test_callers_take_turns(model: Model) -> None:
    batcher = batcher_of(model, rows=1, short=False)
    model.go_on.clear()
    under_way = submit(batcher, 9, caller="d")
    await model.hold()
    order: list[str] = []
    waiting = [submit(batcher, n, caller=caller) for n, caller in enumerate("aaabc")]
    for caller, future in zip("aaabc", waiting, strict=True):
        future.add_done_callback(lambda _, caller=caller: order.append(caller))
    model.go_on.set()
    await asyncio.gather(under_way, *waiting)
    assert "".join(order) == "abcaa"


@running
async def test_a_delay_gathers_company_until_the_batch_is_full(model: Model) -> None:
    batcher = batcher_of(model, rows=3, delay_us=60_000_000)
    waiting = [submit(batcher, n) for n in range(3)]  # the third one makes the batch full: nobody waits the minute
    await asyncio.gather(*waiting)
    assert model.batches == [3]


@running
async def test_an_idle_model_refuses_nothing_however_much_one_turn_of_the_loop_brings(model: Model) -> None:
    batcher = batcher_of(model, rows=3, requests=4, delay_us=60_000_000)
    answers = await asyncio.gather(*[submit(batcher, n) for n in range(30)])
    assert [doubled(answer) for answer in answers] == [[2 * n] for n in range(30)]
    assert model.batches == [3] * 10


@running
async def test_an_answer_that_cannot_be_given_is_logged_and_the_others_get_theirs(model: Model) -> None:
    class Broken(asyncio.Future[Answer]):
        def set_result(self, _: Answer) -> None:
            raise RuntimeError("nobody is there")

    batcher = batcher_of(model)
    waiting = [submit(batcher, 1)]
    batcher.submit_for(Broken(), LANE, [rows(2)], 1, math.inf)
    waiting.append(submit(batcher, 3))
    assert [doubled(answer) for answer in await asyncio.gather(*waiting)] == [[2], [6]]
    assert doubled(await submit(batcher, 4)) == [8]


@running
async def test_draining_waits_for_what_is_queued_and_for_what_runs(model: Model) -> None:
    batcher = batcher_of(model, short=False)
    model.go_on.clear()
    waiting = [submit(batcher, 1)]
    await model.hold()
    waiting.append(submit(batcher, 2))
    drained = asyncio.ensure_future(batcher.drain())
    await asyncio.wait([drained], timeout=0.01)
    assert not drained.done()
    model.go_on.set()
    await drained
    assert all(future.done() for future in waiting)
    batcher.close()
    with pytest.raises(NotReady):
        submit(batcher, 3)


@running
async def test_closing_refuses_what_is_queued(model: Model) -> None:
    batcher = batcher_of(model)
    waiting = submit(batcher, 1)
    batcher.close()
    with pytest.raises(NotReady):
        await waiting


@running
async def test_runs_are_counted_with_their_rows(model: Model) -> None:
    batcher = batcher_of(model)
    await asyncio.gather(submit(batcher, 1), submit(batcher, 2, 3))
    statistics = batcher._statistics
    assert (statistics.executions, statistics.queue.count) == (1, 2)
    assert statistics.batches[3].count == 1


def test_the_cost_of_a_run_is_unknown_until_one_was_made_and_falls_faster_than_it_rises() -> None:
    costs = RunCosts()
    assert costs.expected_ns(4) == math.inf
    costs.learn(4, 1000)
    assert costs.expected_ns(7) == costs.expected_ns(1) == 1000
    assert costs.expected_ns(8) == math.inf
    costs.learn(5, 0)
    assert costs.expected_ns(4) == 500
    costs.learn(5, 1500)
    assert costs.expected_ns(4) == 550


def test_a_pause_of_the_machine_does_not_make_a_run_long() -> None:
    costs = RunCosts()
    costs.learn(1, 20_000)
    costs.learn(1, 10_000_000)
    assert costs.expected_ns(1) == 23_000
    for _ in range(100):
        costs.learn(1, 1_000_000)
    assert costs.expected_ns(1) > 900_000


def test_costs_are_kept_by_the_form_of_the_inputs_and_forms_are_bounded() -> None:
    costs = Costs()
    costs.of("small").learn(1, 5)
    assert (costs.of("small").expected_ns(1), costs.of("large").expected_ns(1)) == (5, math.inf)
    for form in range(3 * MOST_FORMS):
        costs.of(form)
    assert len(costs._by_form) <= MOST_FORMS


@running
async def test_a_model_whose_inputs_say_how_long_it_runs_never_runs_in_the_loop(model: Model) -> None:
    batcher = batcher_of(model)
    batcher._in_loop = False
    await submit(batcher, 1)
    assert model.threads == {"model m/1"}
