"""Whether a request should wait a moment for others to share its run.

A lone caller must never wait for company. Of many callers at once each run serves one, if each is run as it comes: the
transport hands over one request at a time, even when sixteen are on their way. What is on its way cannot be seen, only
waited for. So now and then one request is held for a moment, a probe. If others come meanwhile, as many are waited for
from then on; when they stay away, requests are run as they come again, and probes become rarer.

Waiting saves work and costs time, so nobody waits while the process has time to spare.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_SPACING_SECONDS, LONGEST_SPACING_SECONDS = 0.02, 0.4
"""From one probe to the next; doubled by each that nobody joined. A lone caller loses a hundredth of the time."""
COUNT_EVERY = 8
"""Every so many waits nobody is counted off: then more callers than before show themselves."""
BUSY = 0.5
"""The share of a core from which on the process has no time to spare; it may have to share that core with others."""
LOOK_SECONDS = 0.05


class Company:
    """How many requests come together, learned by waiting for them.

    A request is held for `seconds` at most: as long as the transport takes to hand over those that are on their way.
    Whole milliseconds: the event loop counts no less.
    """

    def __init__(
        self,
        seconds: float,
        now: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
    ) -> None:
        self.expected = 1
        self._seconds = seconds
        self._now, self._load = now, _Load(now, used)
        self._spacing = FIRST_SPACING_SECONDS
        self._next_probe = now() + self._spacing
        self._waits = 0
        self._waiting = False

    def hold_seconds(self) -> float:
        """How long a request that finds the model idle should wait; 0: not at all."""
        if self.expected == 1 and self._now() < self._next_probe:
            return 0.0
        if not self._load.is_high():
            return 0.0
        self._waits += 1
        self._waiting = True
        return self._seconds

    def is_complete(self, waiting: int) -> bool:
        """Whether all that were expected wait."""
        return 1 < self.expected <= waiting and self._waits % COUNT_EVERY > 0

    def came(self, waiting: int) -> None:
        """A run is about to be made, for so many requests that waited."""
        if not self._waiting:
            return
        self._waiting = False
        self.expected = max(1, waiting, 3 * self.expected // 4)  # one that is late has not left
        self._spacing = FIRST_SPACING_SECONDS if waiting > 1 else min(2 * self._spacing, LONGEST_SPACING_SECONDS)
        self._next_probe = self._now() + self._spacing


class _Load:
    """The share of a core that this process uses, looked at now and then."""

    def __init__(self, now: Callable[[], float], used: Callable[[], float]) -> None:
        self._now, self._used = now, used
        self._last = (now(), used())
        self._share = 0.0

    def is_high(self) -> bool:
        now = self._now()
        if now - self._last[0] >= LOOK_SECONDS:
            used = self._used()
            self._share = (used - self._last[1]) / (now - self._last[0])
            self._last = (now, used)
        return self._share >= BUSY
