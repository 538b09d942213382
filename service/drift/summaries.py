"""The summaries of all models, kept up with the journal in the background.

Nothing of them is written down: a server that starts counts again the last `LOOK_BACK_ROWS` rows of each model, in a
few seconds beside its work. What was answered before these is not in its summaries.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable

from calibrators.conformal.calibrator import ConformalCalibrator
from service.drift.summary import Summary, Tally
from service.errors import CalserveError
from service.store.following import next_look
from service.store.journal import Journal
from service.store.reading import Follower, Pairs

log = logging.getLogger(__name__)

LOOK_BACK_ROWS = 500_000
LOOK_SECONDS = 1.0
STEP_ROWS, STEP_VALUES = 10_000, 320_000
"""Rows, and rows times classes, that are counted at a time."""

SetsOf = Callable[[str, str], ConformalCalibrator | None]
"""What makes the prediction sets of a model's revision, if it is known and makes any."""


class Counted:
    """One model's summary. `step` is for one thread at a time, `summary` for any."""

    def __init__(self, journal: Journal, model: str, keep_ms: int, sets_of: SetsOf) -> None:
        self._model, self._keep_ms, self._sets_of = model, keep_ms, sets_of
        self._follower = Follower(journal, model, LOOK_BACK_ROWS)
        self._tally: Tally | None = None
        self._lock = threading.Lock()

    def step(self, now_ms: int) -> bool:
        """Count what comes next, if there is anything; whether there was."""
        classes = self._tally.n_classes if self._tally else 64
        cohort = self._follower.read(max(500, min(STEP_ROWS, STEP_VALUES // classes)))
        with self._lock:
            for part in cohort.pairs:
                self._tally_of(part).add(part, self._sets_of(self._model, part.revision))
            for part in cohort.late:
                if self._tally and self._tally.n_classes == part.stream.class_count:
                    self._tally.add_labels(part, self._sets_of(self._model, part.revision))
            if self._tally:
                self._tally.age(now_ms)
        return bool(cohort)

    def summary(self, since_ms: int, until_ms: int) -> Summary | None:
        """None: nothing was answered yet."""
        with self._lock:
            return self._tally.summary(since_ms, until_ms) if self._tally else None

    def _tally_of(self, part: Pairs) -> Tally:
        """Anew where a model file has other classes than the one before."""
        if self._tally is None or self._tally.n_classes != part.stream.class_count:
            self._tally = Tally(part.stream.class_count, self._keep_ms)
        return self._tally


class Summaries:
    """The summaries of the models that are served. Methods are for the event loop, but for `summary`."""

    def __init__(
        self,
        journal: Journal,
        models: Callable[[], Iterable[str]],
        sets_of: SetsOf,
        keep_seconds: float,
    ) -> None:
        self._journal, self._models, self._sets_of = journal, models, sets_of
        self._keep_ms = int(1000 * keep_seconds)
        self._counted: dict[str, Counted] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def summary(self, model: str, since_ms: int, until_ms: int) -> Summary | None:
        counted = self._counted.get(model)
        return counted.summary(since_ms, until_ms) if counted else None

    async def look(self) -> None:
        """Count what has come since the last look."""
        names = set(self._models())
        self._counted = {
            name: self._counted.get(name) or Counted(self._journal, name, self._keep_ms, self._sets_of)
            for name in sorted(names)
        }
        for name, counted in self._counted.items():
            try:
                while await asyncio.to_thread(counted.step, int(1000 * time.time())):
                    pass
            except CalserveError as error:
                log.error("the summary of model %s is not kept up now: %s", name, error.message)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the summaries could not be kept up; it is tried again")
            await next_look(LOOK_SECONDS)
