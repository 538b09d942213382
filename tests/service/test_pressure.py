"""Overload is told from callers who wait for each other, from bursts, and from chance; and when it is over."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from service.inference.pressure import MOST_CALLERS, PROBE_SECONDS, Pressure

RUN_SECONDS = 0.008


class Model:
    """Serves one request a run; under overload one may wait. `answered` is told of each answer and each refusal."""

    def __init__(self, answered: Callable[[], None] = lambda: None, room: float = math.inf) -> None:
        self.seconds = 0.0
        self.pressure = Pressure(lambda: self.seconds)
        self.waiting: deque[float] = deque()
        self.waits: list[float] = []
        self.alarms: list[float] = []
        self.refusals: list[float] = []
        self._answered, self._room = answered, room
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._busy = False

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._numbers), event))

    def until(self, end: float) -> None:
        while self._events and self._events[0][0] < end:
            self.seconds, _, event = heapq.heappop(self._events)
            event()
        self.seconds = end

    def ask(self) -> None:
        if self._busy:
            self.pressure.came("caller")
            if self.waiting and (self.pressure.is_high() or len(self.waiting) >= self._room):
                self.refuse()
                return
        self.waiting.append(self.seconds)
        self.run()

    def refuse(self) -> None:
        self.refusals.append(self.seconds)
        self.pressure.refused()
        self._answered()

    def run(self) -> None:
        if self._busy or not self.waiting:
            return
        self._busy = True
        self.waits.append(self.seconds - self.waiting.popleft())
        if self.pressure.alarm(1, len(self.waiting)):
            self.alarms.append(self.seconds)
            while len(self.waiting) > 1:
                self.waiting.popleft()
                self.refuse()
        self.at(self.seconds + RUN_SECONDS, self.end)

    def end(self) -> None:
        self._busy = False
        self.pressure.ran(1, RUN_SECONDS)
        self._answered()
        self.run()

    def offer(self, load: float, begin: float, end: float, chance: np.random.Generator | None = None) -> None:
        """Calls from `begin` to `end` at so many times what can be served, evenly or by chance."""
        while begin < end:
            self.at(begin, self.ask)
            begin += chance.exponential(RUN_SECONDS / load) if chance else RUN_SECONDS / load


def callers(n: int, begin: float, apart: float = 0.0003, pause: float = 0.001, room: float = math.inf) -> Model:
    """So many who each ask again when they are answered or refused."""
    model = Model(lambda: model.at(model.seconds + pause, model.ask), room)
    for number in range(n):
        model.at(begin + number * apart, model.ask)
    return model


@pytest.mark.parametrize("n", [2, 16, 64, 100])
def test_callers_who_wait_for_each_other_are_no_overload(n: int) -> None:
    model = callers(n, begin=0.5)
    model.until(20)
    assert not model.alarms
    assert min(model.waits[-n:]) > (n - 2) * RUN_SECONDS


def test_callers_who_hammer_at_a_full_queue_do_not_turn_out_those_who_wait() -> None:
    model = callers(20, begin=0.5, room=10)
    model.until(3)
    assert model.refusals
    assert not model.alarms


@pytest.mark.parametrize("size", [10, 64, 500])
def test_a_burst_is_no_overload(size: int) -> None:
    model = Model()
    model.offer(0.3, 0, 10)
    for number in range(size):
        model.at(1 + 0.00005 * number, model.ask)
    model.until(10)
    assert not model.refusals


@pytest.mark.parametrize(("load", "steps"), [(1.5, 11), (2, 8), (4, 7), (20, 7)])
def test_more_than_can_be_served_is_noticed_within_a_few_runs(load: float, steps: int) -> None:
    model = Model()
    model.offer(load, 0, 1)
    model.until(1)
    assert model.alarms[0] <= steps * 2 * RUN_SECONDS  # a step is two of these runs
    later = model.waits[-int(0.5 / RUN_SECONDS) :]
    assert max(later) <= 2 * RUN_SECONDS
    assert len(model.waits) >= 0.95 / RUN_SECONDS  # it serves what it can


def test_calls_at_random_are_refused_only_where_there_are_about_too_many() -> None:
    """By chance queues grow too: of 37,500 calls at nine tenths of what can be served three in a hundred are refused
    at most, and none in a thousand at six tenths."""
    refused = {}
    for load in (0.6, 0.9):
        model = Model()
        model.offer(load, 0, 300, np.random.default_rng(1))
        model.until(300)
        refused[load] = len(model.refusals) / (300 * load / RUN_SECONDS)
    assert refused[0.6] < 0.001
    assert refused[0.9] < 0.03


def test_when_less_comes_again_everybody_is_admitted() -> None:
    model = Model()
    model.offer(3, 0, 1)
    model.offer(0.5, 1, 5)
    model.until(5)
    assert model.alarms
    assert max(model.refusals) < 1.3
    assert not model.pressure.is_high()


def test_after_a_rest_a_burst_is_admitted_at_once() -> None:
    model = Model()
    model.offer(3, 0, 1)
    for number in range(50):
        model.at(1.5 + 0.0001 * number, model.ask)
    model.until(5)
    assert max(model.refusals) < 1


def test_callers_who_hammer_when_they_are_refused_are_let_in_by_a_probe() -> None:
    model = callers(32, begin=0.5)
    model.offer(4, 0, 1)
    model.until(5.5)
    before = len(model.refusals)
    model.until(10)
    assert len(model.refusals) == before
    assert max(model.refusals) < 1 + PROBE_SECONDS + 0.2


def test_who_asks_for_much_is_known_while_there_is_too_much_and_callers_are_bounded() -> None:
    model = Model()
    model.offer(4, 0, 1)
    model.until(0.9)
    assert model.pressure.is_high()
    assert model.pressure.asks_less("modest", "caller")
    assert not model.pressure.asks_less("caller", "modest")
    for number in range(3 * MOST_CALLERS):
        model.pressure.came(str(number))
    assert len(model.pressure._asked) <= MOST_CALLERS
