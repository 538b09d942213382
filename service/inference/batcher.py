"""One model's queue: requests gathered into runs.

There is no timer by default: what arrived while the last run was made, or in the same turns of the event loop, is the
next run, so a lone caller never waits for company. A run that is expected to be short is made in the event loop, where
the hop to a thread would cost more than the run; a longer one in the model's own thread, which takes a batch and wakes
the loop once when it is done.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlinePassed, NotReady, Overloaded
from service.inference.statistics import Statistics

SHORT_RUN_NS = 150_000
"""Runs expected to take less are made in the event loop."""
MOST_FORMS = 64
"""Forms of inputs whose costs are kept."""


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

    `rows` is the most in one run, `delay_us` how long an incomplete batch waits for company.
    """

    requests: int = 256
    bytes: int = 512 << 20
    rows: int = 64
    delay_us: int = 0


class Run:
    """The results of one run, shared by those whose rows are in it."""

    __slots__ = ("_finite", "_views", "arrays", "layout", "rows", "snapshot")

    def __init__(self, outputs: Sequence[str], arrays: Sequence[NDArray[Any]], snapshot: Any, rows: int | None) -> None:
        self.arrays = dict(zip(outputs, arrays, strict=True))
        self.snapshot = snapshot
        self.rows = rows  # None: the arrays belong to one request and have no rows to divide
        shapes = [array.shape for array in arrays] if rows is None else [array.shape[1:] for array in arrays]
        self.layout = (snapshot.revision, snapshot.session.provider, *shapes)
        self._views: dict[str, memoryview] = {}
        self._finite: bool | None = None

    def finite(self, name: str) -> bool:
        """Whether a vector of probabilities holds neither NaN nor infinity, in all rows of the run."""
        if self._finite is None:
            values = self.arrays[name]
            self._finite = math.isfinite(np.vdot(values, values))  # numbers up to 1: no overflow
        return self._finite

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """One request's rows of an output."""
        array = self.arrays[name]
        return array if self.rows is None else array[start:stop]

    def raw(self, name: str, start: int, stop: int) -> bytes | memoryview:
        """The bytes of one request's rows of an output of numbers."""
        if not self.rows or stop - start == self.rows:
            return self.arrays[name].tobytes()
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = _byte_view(self.arrays[name])
        stride = len(view) // self.rows
        return view[start * stride : stop * stride]


class Answer(NamedTuple):
    """What a waiter gets: rows `start` to `stop` of a run."""

    run: Run
    start: int
    stop: int

    def part(self, name: str) -> NDArray[Any]:
        return self.run.part(name, self.start, self.stop)


class _Pending:
    """One request in the queue. `feeds` are arrays or bytes-like objects, one for each of the lane's inputs."""

    __slots__ = ("asked_ns", "caller", "deadline", "feeds", "future", "rows", "size")

    def __init__(
        self, feeds: Sequence[Any], rows: int, size: int, deadline: float, caller: str, future: asyncio.Future[Answer]
    ) -> None:
        self.feeds, self.rows, self.size = feeds, rows, size
        self.deadline, self.caller, self.future = deadline, caller, future
        self.asked_ns = time.perf_counter_ns()


@dataclass(slots=True)
class _Batch:
    lane: Lane
    waiting: list[_Pending]
    rows: int


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
        self._lanes: OrderedDict[Lane, FairQueue] = OrderedDict()
        self._queued, self._bytes = 0, 0
        self._held: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Handle | None = None
        self._in_thread = False
        self._batches: SimpleQueue[_Batch | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._idle: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def queued(self) -> int:
        """Requests that wait for a run."""
        return self._queued

    def submit(
        self, lane: Lane, feeds: Sequence[Any], rows: int, deadline: float, caller: str = ""
    ) -> asyncio.Future[Answer]:
        """Queue one request; the future of its answer.

        `deadline` is on time.monotonic(). A request whose deadline passes, or whose future is cancelled, before its run
        is made is not run.

        Raises
        ------
        Overloaded
            if the queue is full and this caller holds no less of it than the others
        NotReady
            if the model was unloaded
        """
        if self._closed:
            raise NotReady(f"model {self._name} is being unloaded")
        loop = self._loop = self._loop or asyncio.get_running_loop()
        size = sum(feed.nbytes if hasattr(feed, "nbytes") else len(feed) for feed in feeds)
        self._admit(caller, size)
        pending = _Pending(feeds, rows, size, deadline, caller, loop.create_future())
        queue = self._lanes.get(lane)
        if queue is None:
            queue = self._lanes[lane] = FairQueue()
        queue.push(caller, pending)
        self._queued += 1
        self._bytes += size
        self._held[caller] += 1
        if not self._in_thread:
            self._wake(loop)
        return pending.future

    async def drain(self) -> None:
        """Return when nothing is queued and nothing runs."""
        while self._queued or self._in_thread:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            await self._idle

    def close(self) -> None:
        """Refuse what is queued and what comes; end the thread after its present run."""
        self._closed = True
        self._execute = _closed  # else model and batcher keep each other, and the sessions, in memory
        for queue in self._lanes.values():
            while queue:
                _fail(queue.pop(), NotReady(f"model {self._name} is being unloaded"))
        self._lanes.clear()
        self._queued, self._bytes = 0, 0
        self._held.clear()
        self._batches.put(None)

    def _admit(self, caller: str, size: int) -> None:
        """Make room for one more request; the caller who holds most gives way to one who holds less."""
        if self._queued < self.limits.requests and (self._bytes + size <= self.limits.bytes or not self._queued):
            return
        self._statistics.dropped["full"] += 1
        greediest, most = self._held.most_common(1)[0]
        full = Overloaded(f"model {self._name}: {self._queued} requests are waiting already")
        if self._held[caller] + 1 >= most:
            raise full
        for queue in reversed(self._lanes.values()):
            if (newest := queue.give_way(greediest)) is not None:
                self._left(newest)
                _fail(newest, full)
                return

    def _left(self, pending: _Pending) -> None:
        self._queued -= 1
        self._bytes -= pending.size
        self._held[pending.caller] -= 1
        if not self._held[pending.caller]:
            del self._held[pending.caller]

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """See to it that the next run is made: once the loop falls quiet, or after the delay where one is set."""
        if self._timer is not None:
            if self.limits.delay_us and self._queued >= self.limits.rows:
                self._timer.cancel()
                self._timer = loop.call_soon(self._next)
        elif self.limits.delay_us:
            self._timer = loop.call_later(self.limits.delay_us / 1e6, self._next)
        else:
            self._timer = loop.call_soon(self._when_quiet, loop, 0)

    def _when_quiet(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        """Make the next run unless the loop's last turn brought more requests: then its next turn may bring more."""
        if seen < self._queued < self.limits.rows:
            self._timer = loop.call_soon(self._when_quiet, loop, self._queued)
        else:
            self._next()

    def _next(self) -> None:
        self._timer = None
        if self._in_thread:
            return
        batch = self._gather()
        if batch is None:
            self._tell_idle()
        elif self._in_loop and self.costs.of(batch.lane.inputs).expected_ns(batch.rows) < SHORT_RUN_NS:
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
            while queue and (not waiting or rows + queue.peek().rows <= most):
                pending = queue.pop()
                self._left(pending)
                if pending.future.done():
                    self._statistics.dropped["cancelled"] += 1
                    continue
                if pending.deadline <= now:
                    self._statistics.dropped["deadline"] += 1
                    _fail(pending, DeadlinePassed("the deadline passed while the request waited for the model"))
                    continue
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
        self._in_thread = True
        self._batches.put(batch)

    def _work(self) -> None:
        """The model's thread: batch in, one wake-up of the loop out."""
        while (batch := self._batches.get()) is not None:
            outcome = self._make(batch)
            loop = self._loop
            if loop is None or loop.is_closed():
                return
            try:
                loop.call_soon_threadsafe(self._back, batch, outcome)
            except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
                return

    def _back(self, batch: _Batch, outcome: _Outcome) -> None:
        self._in_thread = False
        self._settle(batch, outcome)

    def _settle(self, batch: _Batch, outcome: _Outcome) -> None:
        """Tell each waiter its own fate, then go on with what came meanwhile."""
        for pending, answer in zip(batch.waiting, outcome.answers, strict=True):
            if pending.future.done():
                continue  # its caller left
            if isinstance(answer, Answer):
                pending.future.set_result(answer)
            else:
                pending.future.set_exception(answer)
        self.costs.of(batch.lane.inputs).learn(batch.rows, outcome.cost_ns)
        queue_ns = sum(outcome.begun_ns - pending.asked_ns for pending in batch.waiting)
        self._statistics.ran(batch.rows, len(batch.waiting), queue_ns, outcome.took_ns)
        if self._queued and self._loop is not None:
            self._timer = self._timer or self._loop.call_soon(self._next)
        else:
            self._tell_idle()

    def _tell_idle(self) -> None:
        if self._idle is not None and not self._queued and not self._in_thread:
            self._idle.set_result(None)
            self._idle = None

    def _make(self, batch: _Batch) -> _Outcome:
        """Run a batch. If the run fails each request is run by itself, so that only the one at fault is refused."""
        begun, cost = time.perf_counter_ns(), self._clock()
        waiting = batch.waiting
        try:
            answers: list[Answer | Exception] = list(self._run(batch.lane, waiting))
        except Exception as error:
            answers = [error] if len(waiting) == 1 else [self._run_alone(batch.lane, pending) for pending in waiting]
        return _Outcome(answers, begun, time.perf_counter_ns() - begun, self._clock() - cost)

    def _run_alone(self, lane: Lane, pending: _Pending) -> Answer | Exception:
        try:
            return self._run(lane, [pending])[0]
        except Exception as error:
            return error

    def _run(self, lane: Lane, waiting: Sequence[_Pending]) -> list[Answer]:
        rows = sum(pending.rows for pending in waiting)
        feeds = {
            name: _joined([pending.feeds[index] for pending in waiting], dtype, (rows, *shape) if lane.joins else shape)
            for index, (name, dtype, shape) in enumerate(lane.inputs)
        }
        snapshot, arrays = self._execute(lane.snapshot, lane.outputs, feeds)
        if not lane.joins:
            return [Answer(Run(lane.outputs, arrays, snapshot, None), 0, rows)]
        run, answers, start = Run(lane.outputs, arrays, snapshot, rows), [], 0
        for pending in waiting:
            answers.append(Answer(run, start, start + pending.rows))
            start += pending.rows
        return answers


class FairQueue:
    """First come, first served for each caller; the callers take turns."""

    __slots__ = ("_callers",)

    def __init__(self) -> None:
        self._callers: OrderedDict[str, deque[_Pending]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._callers)

    def push(self, caller: str, pending: _Pending) -> None:
        own = self._callers.get(caller)
        if own is None:
            own = self._callers[caller] = deque()
        own.append(pending)

    def peek(self) -> _Pending:
        return next(iter(self._callers.values()))[0]

    def pop(self) -> _Pending:
        caller, own = next(iter(self._callers.items()))
        pending = own.popleft()
        if own:
            self._callers.move_to_end(caller)
        else:
            del self._callers[caller]
        return pending

    def give_way(self, caller: str) -> _Pending | None:
        """Take back the caller's newest request, None if it has none here."""
        own = self._callers.get(caller)
        if own is None:
            return None
        newest = own.pop()
        if not own:
            del self._callers[caller]
        return newest


class Costs:
    """What runs take, by the form of their inputs: an image of twice the side is another run."""

    def __init__(self) -> None:
        self._by_form: dict[Any, RunCosts] = {}

    def of(self, inputs: Any) -> RunCosts:
        """Of a lane's inputs. Forms are callers' choices, so they are bounded and then forgotten."""
        costs = self._by_form.get(inputs)
        if costs is None:
            if len(self._by_form) >= MOST_FORMS:
                self._by_form.clear()
            costs = self._by_form[inputs] = RunCosts()
        return costs


class RunCosts:
    """What a run takes, nanoseconds, by the power of two of its rows, learned from the runs that were made."""

    def __init__(self) -> None:
        self._ns: dict[int, float] = {}

    def expected_ns(self, rows: int) -> float:
        """What a run of about this size took, or the next larger one; infinite if no such run was made."""
        size = rows.bit_length()
        if size in self._ns:
            return self._ns[size]
        return min((ns for larger, ns in self._ns.items() if larger > size), default=math.inf)

    def learn(self, rows: int, ns: int) -> None:
        """A moving mean that follows faster runs quickly and slower ones slowly: the machine's pauses are no cost."""
        size = rows.bit_length()
        known = self._ns.get(size)
        self._ns[size] = ns if known is None else known + (ns - known) * (0.5 if ns < known else 0.05)


def _closed(*_: Any) -> NoReturn:
    raise NotReady("the model is being unloaded")


def _fail(pending: _Pending, error: Exception) -> None:
    if not pending.future.done():
        pending.future.set_exception(error)


def _joined(parts: Sequence[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The rows of several requests, one after the other, as one array of `shape`."""
    if len(parts) == 1 and isinstance(parts[0], np.ndarray):
        return parts[0]
    if dtype.kind == "O":
        return np.concatenate(parts)
    buffer = parts[0] if len(parts) == 1 else b"".join(parts)
    return np.frombuffer(buffer, dtype).reshape(shape) if len(buffer) else np.empty(shape, dtype)


def _byte_view(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")  # 0 has no cast
