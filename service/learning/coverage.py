"""How often the prediction sets of what serves hold the label that came: coverage, as it goes.

For each model whose active revision makes sets one reader follows the journal and makes again, at the revision's own
confidence level, the sets of the rows that this revision answered. It runs in the process that learns, beside the event
loop. Of more than 64 classes the journal has the most probable; the others share what is left of the probability alike.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from dataclasses import dataclass

import numpy as np

from calibrators.conformal.calibrator import ConformalCalibrator
from service.errors import CalserveError
from service.inference.repository import Repository
from service.store.following import next_look
from service.store.journal import Journal
from service.store.packs import probabilities_of
from service.store.reading import NO_LABEL, Pairs, Reader

log = logging.getLogger(__name__)

WINDOW = 500
"""Labels whose share is the recent coverage."""
LOOK_SECONDS = 1.0
STEP_ROWS = 10_000


@dataclass(frozen=True)
class CoverageState:
    """What the sets of one revision held.

    Attributes
    ----------
    covered, missed : labels that were in the set of their row, and that were not, since it was first active
    recent : the share that was, of the last WINDOW; NaN before the first
    """

    model: str
    revision: str
    confidence_level: float
    covered: int
    missed: int
    recent: float


class Watch:
    """One revision's coverage. `load` and `step` are not for the event loop, one call at a time."""

    def __init__(
        self, journal: Journal, model: str, revision: str, calibrator: ConformalCalibrator, wait_seconds: float
    ) -> None:
        self._model, self._revision, self._calibrator = model, revision, calibrator
        self._reader = Reader(journal, model, f"coverage/{revision}", wait_seconds)
        self._counts, self._recent = {"covered": 0, "missed": 0}, deque[bool](maxlen=WINDOW)
        self._shares = np.random.default_rng(0)  # a randomised set is not kept; one of the same law is made

    @property
    def state(self) -> CoverageState:
        recent = float(np.mean(self._recent)) if self._recent else float("nan")
        level = self._calibrator.confidence_level
        return CoverageState(self._model, self._revision, level, **self._counts, recent=recent)

    def load(self) -> None:
        """Go on where the store says."""
        _, _, state = self._reader.state()
        if state:
            said = json.loads(state)
            self._counts = {name: said[name] for name in self._counts}
            self._recent.extend(mark == "1" for mark in said["recent"])

    def step(self) -> bool:
        """Judge the next labels, if there are any; whether there were."""
        cohort = self._reader.read(STEP_ROWS)
        if not cohort:
            return False
        for part in (*cohort.pairs, *cohort.late):
            if part.revision == self._revision:
                self._judge(part)
        marks = "".join("01"[held] for held in self._recent)
        self._reader.commit(cohort, json.dumps(self._counts | {"recent": marks}).encode())
        return True

    def _judge(self, part: Pairs) -> None:
        part = part.chosen(np.flatnonzero(part.labels != NO_LABEL))
        if not len(part):
            return
        shares = self._shares.random(len(part)) if self._calibrator.randomised else None
        sets = self._calibrator.sets(probabilities_of(part.kept, self._calibrator.n_classes_), shares=shares)
        held = sets[np.arange(len(part)), part.labels]
        self._counts["covered"] += int(held.sum())
        self._counts["missed"] += int((~held).sum())
        self._recent.extend(held.tolist())


class Coverage:
    """The watches of all models whose active revision makes sets. Methods are for the event loop."""

    def __init__(self, journal: Journal, repository: Repository, wait_seconds: float) -> None:
        self._journal, self._repository, self._wait_seconds = journal, repository, wait_seconds
        self._watches: dict[tuple[str, str], Watch] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def states(self) -> list[CoverageState]:
        return [watch.state for watch in list(self._watches.values())]

    async def look(self) -> None:
        """Judge what has come since the last look, of the revisions that are active now."""
        active = {(model.name, model.active.revision): model.active.sets for model in self._repository.models()}
        wanted = {key: sets.calibrator for key, sets in active.items() if sets is not None}
        self._watches = {key: watch for key, watch in self._watches.items() if key in wanted}
        for key in wanted.keys() - self._watches.keys():
            watch = Watch(self._journal, *key, wanted[key], self._wait_seconds)
            await asyncio.to_thread(watch.load)
            self._watches[key] = watch
        for watch in list(self._watches.values()):
            while await asyncio.to_thread(watch.step):
                pass

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except CalserveError as error:
                log.error("coverage is not followed now: %s", error.message)
            except Exception:
                log.exception("coverage could not be followed; it is tried again")
            await next_look(LOOK_SECONDS)
