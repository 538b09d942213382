"""Whether more is asked of a model than it can do.

A long queue does not tell. Sixty-four callers of a slow model who each wait for their answer are a queue that stands:
they ask again as fast as they are answered, and refusing them helps nobody. Overload is a queue that grows, run after
run. It is told by Page's test (E. S. Page, Continuous Inspection Schemes, Biometrika 41, 1954): of what came in each
step the logarithm of how much likelier it is if requests come half as often again as they can be served than if they
come just as often, added up from zero. A burst is over after a step or two, and no step counts for more than a part of
the alarm. The same sum the other way tells when it is over.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

RATIO = 1.5
ALARM, MOST_OF_A_STEP, CALM = 1.5, 0.3, 2.0
"""An alarm takes five steps at twice what can be served, and no fewer at more. Requests that come at random at nine
tenths of it set off one in thousands of runs."""
STEP_SECONDS = 0.01
"""The least that a step lasts: dozens of callers that begin at once take some to arrive."""
PROBE_SECONDS, ALARM_AGAIN = 5.0, 0.9
"""After so long it is looked at anew, with less doubt: callers that ask again at once whenever they are refused are no
more than would wait in turn, but look like any number until they may."""
MOST_CALLERS = 1024
RUNS_REMEMBERED = 8


class Pressure:
    """What comes for one model, held against what it can serve."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._high = False
        self._evidence, self._came, self._taken, self._step_begun = 0.0, 0, 0, now()
        self._alarm_at = -math.inf  # when the last alarm was that was not followed by calm
        self._requests, self._seconds = 0.0, 0.0  # of a run, a moving mean
        self._asked: Counter[str] = Counter()

    def is_high(self) -> bool:
        """Whether there is overload, so that no more may wait than is served at once."""
        if self._high and (now := self._now()) - self._step_begun >= STEP_SECONDS:
            self._look_for_calm(now)
        return self._high

    def came(self, caller: str) -> None:
        """A request came that has to wait, or is going to be refused."""
        self._came += 1
        if self._high:
            if len(self._asked) >= MOST_CALLERS:
                self._asked.clear()
            self._asked[caller] += 1

    def asks_less(self, caller: str, other: str) -> bool:
        """Whether a caller has asked for less than half of what another has, since there is too much of it."""
        return 2 * self._asked[caller] < self._asked[other]

    def refused(self) -> None:
        """One was refused, so that it does not wait. As long as there is no overload what counts is who does: callers
        that ask again and again at a full queue are none the more."""
        if not self._high:
            self._came -= 1

    def ran(self, requests: int, seconds: float) -> None:
        """A run served so many."""
        self._requests += (requests - self._requests) / RUNS_REMEMBERED
        self._seconds += (seconds - self._seconds) / RUNS_REMEMBERED

    def alarm(self, taken: int, waiting: int) -> bool:
        """A run is about to be made, for so many and leaving so many to wait. Whether overload has become evident."""
        now = self._now()
        if self._high:
            return False
        self._taken += taken
        if not waiting:
            self._restart(now)
        elif now - self._step_begun >= STEP_SECONDS:
            self._restart(now, max(0.0, self._evidence + min(self._step(self._taken), MOST_OF_A_STEP)))
            again = now - self._alarm_at < 2 * PROBE_SECONDS
            if self._evidence >= (ALARM_AGAIN if again else ALARM):
                self._high, self._alarm_at = True, now
                self._restart(now)
        return self._high

    def _step(self, served: float) -> float:
        """The logarithm of the likelihoods' ratio, of as many as came since the last step."""
        return self._came * math.log(RATIO) - served * (RATIO - 1)

    def _look_for_calm(self, now: float) -> None:
        # Who is refused leaves the model idle at times: it could have served more than it did.
        could = (now - self._step_begun) * self._requests / self._seconds if self._seconds else 0.0
        self._restart(now, max(0.0, self._evidence - self._step(could)))
        calm = self._evidence >= CALM
        if calm or now - self._alarm_at >= PROBE_SECONDS:
            self._high = False
            self._alarm_at = -math.inf if calm else self._alarm_at
            self._asked.clear()
            self._restart(now)

    def _restart(self, now: float, evidence: float = 0.0) -> None:
        self._evidence, self._came, self._taken, self._step_begun = evidence, 0, 0, now
