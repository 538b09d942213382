"""What a model has served: counts and times, as Triton's statistics extension has them."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass
class Duration:
    """How often, and how long together in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


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

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    rows: int = 0
    executions: int = 0
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))
    dropped: Counter[str] = field(default_factory=Counter)
    last_ms: int = 0

    def ran(self, rows: int, requests: int, queue_ns: int, infer_ns: int) -> None:
        self.executions += 1
        self.queue.count += requests
        self.queue.ns += queue_ns
        self.infer.add(infer_ns)
        self.batches[rows].add(infer_ns)

    def answered(self, rows: int, ns: int) -> None:
        self.rows += rows
        self.success.add(ns)
        self.last_ms = int(time.time() * 1000)

    def refused(self, ns: int) -> None:
        self.fail.add(ns)
