"""One model's queue: requests gathered into runs.

A request that finds the model idle is run at once, unless `Company` expects others to come within a moment; what comes
while the model is busy is the next run. A run that is expected to be short is made in the event loop, where the hop to
a thread would cost more than the run; a longer one in the model's own thread, which takes a batch and wakes the loop
once when it is done.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlinePassed, NotReady, Overloaded
from service.inference.company import Company
from service.inference.fair_queue import FairQueue
from service.inference.pressure import Pressure
from service.inference.run_costs import Costs, RunCosts
from service.inference.session import Stop
from service.inference.statistics import Statistics

log = logging.getLogger(__name__)

SHORT_RUN_NS, SHORT_BATCH = 150_000, 8
"""Runs expected to take less are made in the event loop; those for several requests may take that many times as long:
they hold up the loop less than those requests would one by one."""
HELD_RUN_NS = 1_000_000
"""Runs expected to take less are worth a moment's wait for company; during longer ones company gathers by itself."""
QUICK_RUN_NS, MUCH_LONGER = 2_000_000, 1.5
"""Under overload no more may wait than the next run takes along in this time, or in so many times what a request alone
takes: who is admitted then waits for the run under way and no other."""
LOOK_SECONDS = 0.05
"""How often it is looked whether somebody still waits for the run under way."""


class Lane(NamedTuple):
    """What requests must share to share a run.

    Attributes
    ----------
    outputs : names of what is computed
    snapshot : the one that the requests asked for, None for whichever is active when the run is made
    inputs : (name, dtype, shape) of each input; the shape of a row where requests are joined, else the whole
    joins : whether requests may share a run
    """

    outputs: tuple[str, ...]
    snapshot: Any
    inputs: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
    joins: bool


@dataclass(frozen=True)
class Limits:
    """What a model's queue and its runs may hold.

    Attributes
    ----------
    requests, bytes : the most that may wait
    wait_seconds : a request that would wait longer than this, by what runs take, is refused
    rows : the most in one run
    delay_us : how long every incomplete batch waits for company; 0 leaves it to `Company`
    company_seconds : the longest that `Company` holds a request
    """

    requests: int = 256
    bytes: int = 512 << 20
    wait_seconds: float = 1.0
    rows: int = 64
    delay_us: int = 0
    company_seconds: float = 0.001


class Run:
    """The results of one run, shared by those whose rows are in it."""

    __slots__ = ("_finite", "arrays", "layout", "rows", "snapshot", "times_ns")

    def __init__(
        self,
        outputs: Sequence[str],
        arrays: Sequence[NDArray[Any]],
        snapshot: Any,
        rows: int | None,
        times_ns: tuple[int, int],
    ) -> None:
        self.arrays = dict(zip(outputs, arrays, strict=True))
        self.snapshot = snapshot
        self.rows = rows  # None: the arrays belong to one request and have no rows to divide
        self.times_ns = times_ns  # when it began and ended, on time.perf_counter_ns()
        shapes = [array.shape for array in arrays] if rows is None else [array.shape[1:] for array in arrays]
        self.layout = (snapshot.revision, snapshot.online_state, snapshot.session.provider, *shapes)
        self._finite: bool | None = None

    def finite(self, name: str) -> bool:
        """Whether a vector of probabilities holds neither NaN nor infinity, in all rows of the run."""
        if self._finite is None:
            values = self.arrays[name]
            # Numbers up to 1, so that the product does not overflow. Of one number it is not worth the way to BLAS.
            self._finite = math.isfinite(values.item() if values.size == 1 else np.vdot(values, values))
        return self._finite

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """One request's rows of an output."""
        array = self.arrays[name]
        return array if self.rows is None or stop - start == self.rows else array[start:stop]


class Answer(NamedTuple):
    """What a waiter gets: rows `start` to `stop` of a run."""

    run: Run
    start: int
    stop: int

    def part(self, name: str) -> NDArray[Any]:
        return self.run.part(name, self.start, self.stop)


class Waiter(Protocol):
    """Who waits for an answer: a future, or what is told in its place."""

    def done(self) -> bool: ...
    def set_result(self, answer: Answer, /) -> None: ...
    def set_exception(self, error: Exception, /) -> None: ...


W = TypeVar("W", bound=Waiter)


class _Pending:
    """One request in the queue. `feeds` are arrays or bytes-like objects, one for each of the lane's inputs."""

    __slots__ = ("asked_ns", "caller", "deadline", "feeds", "rows", "size", "waiter")

    def __init__(
        self, feeds: Sequence[Any], rows: int, size: int, deadline: float, caller: str, waiter: Waiter
    ) -> None:
        self.feeds, self.rows, self.size = feeds, rows, size
        self.deadline, self.caller, self.waiter = deadline, caller, waiter
        self.asked_ns = time.perf_counter_ns()


@dataclass(slots=True)
class _Batch:
    lane: Lane
    waiting: list[_Pending]
    rows: int
    stop: Stop = field(default_factory=Stop)


@dataclass(slots=True)
class _Outcome:
    """Of each of a batch's requests an answer or an error; when the run began, how long it took, what it cost."""

    answers: list[Answer | Exception]
    begun_ns: int
    took_ns: int
    cost_ns: int


Execute = Callable[[Any, Sequence[str], Mapping[str, NDArray[Any]]], tuple[Any, Sequence[NDArray[Any]]]]
"""(snapshot asked for, outputs, feeds) -> (the snapshot that computed, arrays)"""


class Batcher:
    """The queue and the runs of one model. All methods are for the event loop."""

    def __init__(
        self,
        name: str,
        execute: Execute,
        limits: Limits,
        statistics: Statistics,
        clock: Callable[[], int] = time.thread_time_ns,
        in_loop: bool = True,
    ) -> None:
        self.limits = limits
        self._clock, self._in_loop = clock, in_loop
        self.costs = Costs()
        self._name, self._execute, self._statistics = name, execute, statistics
        self._lanes: OrderedDict[Lane, FairQueue[_Pending]] = OrderedDict()
        self._queued, self._rows, self._bytes = 0, 0, 0
        self._row_seconds = 0.0  # what a row took in the runs made lately
        self._company, self._pressure = Company(limits.company_seconds), Pressure()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Handle | None = None
        self._in_thread: _Batch | None = None
        self._look: asyncio.TimerHandle | None = None
        self._batches: SimpleQueue[_Batch | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._idle: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def queued(self) -> int:
        """Requests that wait for a run."""
        return self._queued

    def submit(
        self,
        lane: Lane,
        feeds: Sequence[Any],
        rows: int,
        deadline: float,
        caller: Callable[[], str] = str,
        *,
        more: bool = False,
    ) -> Answer | asyncio.Future[Answer]:
        """Run one request or queue it: its answer, or the future of it.

        `deadline` is on time.monotonic(); `caller` gives the name under which it takes its turn; `more` says that other
        requests are about to be submitted, so that this one waits for the end of the loop's turn. A request whose
        deadline passes, or whose future is cancelled, before its run is made is not run; a run in the thread that
        is for no others is ended.

        Raises
        ------
        Overloaded
            if the queue is full and this caller holds no less of it than the others
        NotReady
            if the model was unloaded
        InvalidRequest
            if it is run at once and the graph cannot compute its inputs
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        return self.submit_for(future, lane, feeds, rows, deadline, caller, more=more)

    def submit_for(
        self,
        waiter: W,
        lane: Lane,
        feeds: Sequence[Any],
        rows: int,
        deadline: float,
        caller: Callable[[], str] = str,
        *,
        more: bool = False,
    ) -> Answer | W:
        """The same with a waiter of one's own. It is returned if it waits, or was told: of a run that it made full."""
        if self._closed:
            raise NotReady(f"model {self._name} is being unloaded")
        if self._timer is not None or self._in_thread or self._queued:
            self._queue(waiter, lane, feeds, rows, deadline, caller())
            if self._timer is not None and self._is_complete():
                self._timer.cancel()
                if self._rows >= self.limits.rows:
                    self._next()  # at once: one read may bring more than may wait
                else:
                    self._wait(0.0)
            return waiter
        costs = self.costs.of(lane.inputs)
        expected_ns = costs.expected_ns(rows)
        hold = self._hold_seconds(lane, rows, expected_ns)
        if not (hold or more) and self._in_loop and expected_ns < SHORT_RUN_NS:
            return self._run_now(lane, feeds, rows, costs)
        self._queue(waiter, lane, feeds, rows, deadline, caller())
        self._wait(hold)
        return waiter

    def _hold_seconds(self, lane: Lane, rows: int, expected_ns: float) -> float:
        """How long a request that finds the model idle waits for company."""
        if self.limits.delay_us:
            return self.limits.delay_us / 1e6
        may_gain = expected_ns < HELD_RUN_NS and lane.joins and rows < self.limits.rows
        return self._company.hold_seconds() if may_gain else 0.0

    def _is_complete(self) -> bool:
        """Whether nobody else is waited for."""
        return self._rows >= self.limits.rows or (not self.limits.delay_us and self._company.is_complete(self._queued))

    def _is_short(self, batch: _Batch) -> bool:
        longest = SHORT_RUN_NS * min(len(batch.waiting), SHORT_BATCH)
        return self._in_loop and self.costs.of(batch.lane.inputs).expected_ns(batch.rows) < longest

    def _run_now(self, lane: Lane, feeds: Sequence[Any], rows: int, costs: RunCosts) -> Answer:
        """Run one request in the event loop, past the queue."""
        begun = time.perf_counter_ns()
        answer = self._run(lane, [feeds], [rows])[0]
        took = time.perf_counter_ns() - begun
        costs.learn(rows, took)
        self._statistics.ran(rows, (0,), took)
        return answer

    def _queue(self, waiter: Waiter, lane: Lane, feeds: Sequence[Any], rows: int, deadline: float, caller: str) -> None:
        size = bytes_of(feeds)
        self._pressure.came(caller)
        self._admit(lane, rows, caller, size)
        queue = self._lanes.get(lane)
        if queue is None:
            queue = self._lanes[lane] = FairQueue()
        queue.push(caller, _Pending(feeds, rows, size, deadline, caller, waiter))
        self._queued += 1
        self._rows += rows
        self._bytes += size

    def _wait(self, seconds: float) -> None:
        """Make the next run after this time, or at the end of this turn of the loop with all that it brings."""
        loop = self._loop = self._loop or asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._next) if seconds else loop.call_soon(self._next)

    async def drain(self) -> None:
        """Return when nothing is queued and nothing runs."""
        while self._queued or self._in_thread:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            await self._idle

    def close(self) -> None:
        """Refuse what is queued and what comes; end the run under way, and the thread."""
        self._closed = True
        self._execute = _closed  # else model and batcher keep each other, and the sessions, in memory
        for queue in self._lanes.values():
            while taken := queue.take(0, one=True):
                for pending in taken:
                    _fail(pending, NotReady(f"model {self._name} is being unloaded"))
        self._lanes.clear()
        self._queued, self._rows, self._bytes = 0, 0, 0
        if self._in_thread:
            self._in_thread.stop.now()
        self._batches.put(None)

    def _admit(self, lane: Lane, rows: int, caller: str, size: int) -> None:
        """Make room for one more request; the caller who holds most gives way to one who holds less."""
        if not self._queued or (
            self._queued < self.limits.requests
            and self._bytes + size <= self.limits.bytes
            and self._rows * self._row_seconds <= self.limits.wait_seconds
            and (not self._pressure.is_high() or self._is_quick(lane, self._rows + rows, self._queued + 1))
        ):
            return
        held = self._held()
        greediest, most = held.most_common(1)[0]
        if held[caller] + 1 < most or self._pressure.asks_less(caller, greediest):
            self._give_way(greediest)
        else:
            raise self._full()

    def _is_quick(self, lane: Lane, rows: int, requests: int) -> bool:
        """Whether so many requests of so many rows together are served in little more than the time of one alone."""
        costs = self.costs.of(lane.inputs)
        alone = costs.expected_ns(rows // requests)
        together = costs.expected_ns(rows) if lane.joins else requests * alone
        return alone < math.inf and together <= max(QUICK_RUN_NS, MUCH_LONGER * alone)

    def _full(self) -> Overloaded:
        """The refusal of one request, counted."""
        self._statistics.dropped["full"] += 1
        self._pressure.refused()
        return Overloaded(f"model {self._name}: {self._queued} requests are waiting already")

    def _give_way(self, caller: str, *, oldest: bool = False) -> None:
        """Refuse the caller's newest request, or its oldest."""
        given = (queue.give_way(caller, oldest=oldest) for queue in reversed(self._lanes.values()))
        pending = next(found for found in given if found is not None)
        self._left([pending])
        _fail(pending, self._full())

    def _held(self) -> Counter[str]:
        """How many requests each caller has waiting."""
        held: Counter[str] = Counter()
        for queue in self._lanes.values():
            for caller, count in queue.held():
                held[caller] += count
        return held

    def _shed(self) -> None:
        """Refuse what may not wait under overload: the oldest of who holds most, as long as it is late already."""
        while self._queued > 1:
            if self._is_quick(next(iter(self._lanes)), self._rows, self._queued):
                return
            self._give_way(self._held().most_common(1)[0][0], oldest=True)

    def _left(self, taken: Sequence[_Pending]) -> None:
        self._queued -= len(taken)
        for pending in taken:
            self._rows -= pending.rows
            self._bytes -= pending.size

    def _next(self) -> None:
        self._timer = None
        if self._in_thread:
            return
        self._company.came(self._queued)
        batch = self._gather()
        if batch is not None and self._pressure.alarm(len(batch.waiting), self._queued):
            self._shed()
        if batch is None:
            self._tell_idle()
        elif self._is_short(batch):
            self._settle(batch, self._make(batch))
        else:
            self._hand_over(batch)

    def _gather(self) -> _Batch | None:
        """The next batch: one lane's requests up to the most rows, without those that left or came too late."""
        now = time.monotonic()
        while self._lanes:
            lane, queue = next(iter(self._lanes.items()))
            most = self.limits.rows if lane.joins else 0
            waiting: list[_Pending] = []
            rows = 0
            while taken := queue.take(most - rows, one=not waiting):
                self._left(taken)
                for pending in taken:
                    if pending.waiter.done():
                        self._statistics.dropped["cancelled"] += 1
                    elif pending.deadline <= now:
                        self._statistics.dropped["deadline"] += 1
                        _fail(pending, DeadlinePassed("the deadline passed while the request waited for the model"))
                    else:
                        waiting.append(pending)
                        rows += pending.rows
            if queue:
                self._lanes.move_to_end(lane)
            else:
                del self._lanes[lane]
            if waiting:
                return _Batch(lane, waiting, rows)
        return None

    def _hand_over(self, batch: _Batch) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"model {self._name}", daemon=True)
            self._thread.start()
        self._in_thread = batch
        self._look_after(batch)
        self._batches.put(batch)

    def _look_after(self, batch: _Batch) -> None:
        """End a run that nobody waits for any more."""
        now = time.monotonic()
        if all(pending.waiter.done() or pending.deadline <= now for pending in batch.waiting):
            batch.stop.now()
        else:
            loop = self._loop or asyncio.get_running_loop()
            self._look = loop.call_later(LOOK_SECONDS, self._look_after, batch)

    def _work(self) -> None:
        """The model's thread: batch in, one wake-up of the loop out."""
        while (batch := self._batches.get()) is not None:
            with batch.stop:
                outcome = self._make(batch)
            loop = self._loop
            if loop is None or loop.is_closed():
                return
            try:
                loop.call_soon_threadsafe(self._back, batch, outcome)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
                return

    def _back(self, batch: _Batch, outcome: _Outcome) -> None:
        self._in_thread = None
        if self._look:
            self._look.cancel()
        self._settle(batch, outcome)

    def _settle(self, batch: _Batch, outcome: _Outcome) -> None:
        """Tell each waiter its own fate, then go on with what came meanwhile."""
        for pending, answer in zip(batch.waiting, outcome.answers, strict=True):
            if pending.waiter.done():
                continue  # its caller left
            try:
                if isinstance(answer, Answer):
                    pending.waiter.set_result(answer)
                else:
                    pending.waiter.set_exception(answer)
            except Exception:  # the others must get theirs
                log.exception("model %s: an answer could not be given", self._name)
        if batch.stop.asked:
            self._statistics.dropped["stopped"] += len(batch.waiting)
        else:
            self._learn(batch, outcome)
        if not self._queued:
            self._tell_idle()
        elif self._timer is None:
            self._wait(0.0)

    def _learn(self, batch: _Batch, outcome: _Outcome) -> None:
        self.costs.of(batch.lane.inputs).learn(batch.rows, outcome.cost_ns)
        queue_ns = [outcome.begun_ns - pending.asked_ns for pending in batch.waiting]
        self._statistics.ran(batch.rows, queue_ns, outcome.took_ns)
        self._pressure.ran(len(batch.waiting), 1e-9 * outcome.took_ns)
        self._row_seconds += (1e-9 * outcome.took_ns / max(1, batch.rows) - self._row_seconds) / 8

    def _tell_idle(self) -> None:
        if self._idle is not None and not self._queued and not self._in_thread:
            self._idle.set_result(None)
            self._idle = None

    def _make(self, batch: _Batch) -> _Outcome:
        """Run a batch. If the run fails each request is run by itself, so that only the one at fault is refused."""
        begun, cost = time.perf_counter_ns(), self._clock()
        waiting = batch.waiting
        try:
            answers: list[Answer | Exception] = list(
                self._run(batch.lane, [pending.feeds for pending in waiting], [pending.rows for pending in waiting])
            )
        except DeadlinePassed as error:
            answers = [error] * len(waiting)
        except Exception as error:
            answers = [error] if len(waiting) == 1 else [self._run_alone(batch.lane, pending) for pending in waiting]
        return _Outcome(answers, begun, time.perf_counter_ns() - begun, self._clock() - cost)

    def _run_alone(self, lane: Lane, pending: _Pending) -> Answer | Exception:
        try:
            return self._run(lane, [pending.feeds], [pending.rows])[0]
        except Exception as error:
            return error

    def _run(self, lane: Lane, feeds: Sequence[Sequence[Any]], rows: Sequence[int]) -> list[Answer]:
        """One run for several requests: the inputs of each, and its rows."""
        total = sum(rows)
        joined = {
            name: _joined([own[index] for own in feeds], dtype, (total, *shape) if lane.joins else shape)
            for index, (name, dtype, shape) in enumerate(lane.inputs)
        }
        begun = time.perf_counter_ns()
        snapshot, arrays = self._execute(lane.snapshot, lane.outputs, joined)
        times = begun, time.perf_counter_ns()
        if not lane.joins:
            return [Answer(Run(lane.outputs, arrays, snapshot, None, times), 0, total)]
        run, answers, start = Run(lane.outputs, arrays, snapshot, total, times), [], 0
        for own_rows in rows:
            answers.append(Answer(run, start, start + own_rows))
            start += own_rows
        return answers


def bytes_of(feeds: Sequence[Any]) -> int:
    """What inputs take: arrays, or bytes-like objects."""
    size = 0
    for feed in feeds:
        size += len(feed) if type(feed) is bytes else feed.nbytes
    return size


def _closed(*_: Any) -> NoReturn:
    raise NotReady("the model is being unloaded")


def _fail(pending: _Pending, error: Exception) -> None:
    if not pending.waiter.done():
        pending.waiter.set_exception(error)


def _joined(parts: Sequence[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The rows of several requests, one after the other, as one array of `shape`."""
    if len(parts) == 1 and isinstance(parts[0], np.ndarray):
        return parts[0]
    if dtype.kind == "O":
        return np.concatenate(parts)
    buffer = parts[0] if len(parts) == 1 else b"".join(parts)
    return np.frombuffer(buffer, dtype).reshape(shape) if len(buffer) else np.empty(shape, dtype)
