"""What a model has served: counts and times, as Triton's statistics extension has them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

BOUNDS_NS = tuple(
    int(1e3 * us) for us in (50, 100, 250, 500, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 2.5e6, 1e7)
)
"""Durations are counted up to each of these."""


@dataclass
class Duration:
    """How often, and how long together in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


@dataclass
class Spread(Duration):
    """The same, and how many were up to each of BOUNDS_NS, more than the one before; the last are longer than all."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NS) + 1))

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns
        self.counts[bisect_left(BOUNDS_NS, ns)] += 1

    def add_all(self, durations_ns: Collection[int]) -> None:
        self.count += len(durations_ns)
        self.ns += sum(durations_ns)
        for ns in durations_ns:
            self.counts[bisect_left(BOUNDS_NS, ns)] += 1


@dataclass
class Statistics:
    """Counted in the event loop.

    Attributes
    ----------
    success, fail : requests answered and refused, from arrival to answer
    queue, infer : requests waiting for the model, and runs of it
    rows, executions : rows served, runs made
    batches : runs by their number of rows
    dropped : requests that were not run, by why: cancelled, deadline, full; or not to the end: stopped
    last_ms : time of the last success, milliseconds since the epoch
    """

    success: Spread = field(default_factory=Spread)
    fail: Duration = field(default_factory=Duration)
    queue: Spread = field(default_factory=Spread)
    infer: Spread = field(default_factory=Spread)
    rows: int = 0
    executions: int = 0
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))
    dropped: Counter[str] = field(default_factory=Counter)
    last_ms: int = 0

    def ran(self, rows: int, queue_ns: Collection[int], infer_ns: int) -> None:
        """A run, and how long each of its requests had waited for it."""
        self.executions += 1
        self.queue.add_all(queue_ns)
        self.infer.add(infer_ns)
        self.batches[rows].add(infer_ns)

    def answered(self, rows: int, ns: int) -> None:
        self.rows += rows
        self.success.add(ns)
        self.last_ms = int(time.time() * 1000)

    def refused(self, ns: int) -> None:
        self.fail.add(ns)
