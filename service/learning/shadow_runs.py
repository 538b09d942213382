"""Challengers that must be run to be judged: on a share of what is served, after it was answered.

A request that is taken waits in a bounded queue for a thread of its own, of low priority, which is busy for no more
than a tenth of the time; one that has waited too long is given up. So a shadow costs what it may cost, and under load
it judges fewer rows. A calibrator that reads logits alone is given those of the answer, many requests at a time; any
other is run through the model again, in its own session. What it gave is written under the names of the rows served.

Each process runs the shadows of what it serves itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

import calibrators
from calibrators import Calibrator
from calibrators.graph import LOGITS
from calibrators.numerics import MAX_ABS_LOGIT
from calibrators.online.learner import OnlineCalibrator
from service.errors import CalserveError
from service.inference.batcher import Answer
from service.inference.model import ServedModel, Snapshot
from service.inference.repository import Repository
from service.learning.journalling import Journalling, ModelJournal
from service.learning.revisions import Revisions
from service.learning.shadow import reads_logits
from service.store.following import next_look
from service.store.journal import Journal
from service.store.online_states import START, OnlineStates
from service.store.shadows import ShadowPack, ShadowRow, append_shadow_pack, read_shadows

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
GATHER_SECONDS = 0.25
"""How long requests wait for company: what they were given is one row of the store."""
LATEST_SECONDS = 2.0
"""A request that has waited longer is given up; one that takes as long again too. Its row is judged not before
`shadow.HOLD_SECONDS`, so it is known then whether there is anything to judge."""
MOST_BUSY = 0.1
"""Of the time of one core."""
MOST_ROWS, MOST_REQUESTS, MOST_BYTES = 16_384, 4096, 16 << 20
"""That wait."""
NICENESS = 10

Inputs: TypeAlias = Callable[[], Mapping[str, NDArray[Any]]]


class _Given(NamedTuple):
    """What a challenger gave a request that was answered at `time`."""

    number: int
    time: float
    probabilities: NDArray[np.float32]


class _Taken(NamedTuple):
    """A request that was answered, and what is to compute it: an online challenger as it was then, before its label.

    `inputs` are None for a challenger that reads logits alone.
    """

    number: int
    time: float
    answer: Answer
    inputs: Inputs | None
    size: int
    challenger: Calibrator | Snapshot

    @property
    def rows(self) -> int:
        return self.answer.stop - self.answer.start


class ShadowRun:
    """One challenger beside one served model in this process. `offer` is for the event loop.

    Attributes
    ----------
    counts : rows by what became of them: `run`, `full` (there was no room), `late` (they waited too long), `failed`
    seconds : of runs
    """

    def __init__(
        self, journal: Journal, row: ShadowRow, model: ServedModel, stream: int, challenger: Calibrator | Snapshot
    ) -> None:
        self.row, self.model, self.challenger = row, model, challenger
        self.counts = Counter(dict.fromkeys(("run", "full", "late", "failed"), 0))
        self.seconds, self.online_state = 0.0, START
        self.fitted = challenger
        self._journal, self._stream = journal, stream
        self._waiting: deque[_Taken] = deque()
        self._added_rows = self._added_bytes = self._taken_rows = self._taken_bytes = 0  # by the loop, by the thread
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"shadow of {row.model}", daemon=True)
        self._thread.start()

    def offer(self, number: int, answer: Answer, inputs: Inputs, size: int) -> None:
        """Take a request of the champion's that was answered, by chance, if there is room."""
        if answer.run.snapshot.revision != self.row.champion or random.random() >= self.row.share:  # noqa: S311
            return
        rows, reads_inputs = answer.stop - answer.start, isinstance(self.challenger, Snapshot)
        size = (size if reads_inputs else 0) + 4 * rows * self.model.n_classes
        if (
            len(self._waiting) >= MOST_REQUESTS
            or self._added_rows - self._taken_rows + rows > MOST_ROWS
            or self._added_bytes - self._taken_bytes + size > MOST_BYTES
        ):
            self.counts["full"] += rows
            return
        self._added_rows += rows
        self._added_bytes += size
        kept = inputs if reads_inputs else None
        self._waiting.append(_Taken(number, time.monotonic(), answer, kept, size, self.challenger))

    def close(self) -> None:
        """End the thread; what waits is nobody's any more."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of a thread alone only where the system can
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while not self._closing.wait(GATHER_SECONDS):
            while self._waiting and not self._closing.is_set():
                try:
                    given, pause = self._gather()
                    self._write(given)
                    self._closing.wait(pause)
                except CalserveError as error:
                    log.warning("shadow %s of model %s: %s", self.row.revision, self.row.model, error.message)
                except Exception:
                    log.exception("shadow %s of model %s failed once", self.row.revision, self.row.model)

    def _gather(self) -> tuple[list[_Given], float]:
        """What requests were given in a moment, and how long to be idle then."""
        given, pause, until = list[_Given](), 0.0, time.monotonic() + GATHER_SECONDS
        while self._waiting:
            begun = time.monotonic()
            given += self._given(self._next())
            took = time.monotonic() - begun
            self.seconds += took
            pause = took * (1 / MOST_BUSY - 1)
            if begun + took + pause > until or self._closing.wait(pause):
                break
        return given, pause

    def _write(self, given: Sequence[_Given]) -> None:
        oldest = time.monotonic() - 2 * LATEST_SECONDS
        in_time = [(one.number, one.probabilities) for one in given if one.time >= oldest]
        rows = sum(len(probabilities) for _, probabilities in in_time)
        self.counts["late"] += sum(len(one.probabilities) for one in given) - rows
        if not in_time:
            return
        pack, place = ShadowPack.of(in_time), (self.row.model, self.row.revision, self._stream)
        try:
            self._journal.writer.write_now(lambda connection: append_shadow_pack(connection, *place, pack))
        except Exception:
            self.counts["failed"] += rows
            raise
        self.counts["run"] += rows

    def _next(self) -> Sequence[_Taken]:
        """The requests of the next run: one, or all that wait for the same state where no session is run."""
        taken = [self._waiting.popleft()]
        challenger = taken[0].challenger
        while self._waiting and not isinstance(challenger, Snapshot) and self._waiting[0].challenger is challenger:
            taken.append(self._waiting.popleft())
        self._taken_rows += sum(one.rows for one in taken)
        self._taken_bytes += sum(one.size for one in taken)
        oldest = time.monotonic() - LATEST_SECONDS
        self.counts["late"] += sum(one.rows for one in taken if one.time < oldest)
        return [one for one in taken if one.time >= oldest]

    def _given(self, taken: Sequence[_Taken]) -> list[_Given]:
        try:
            values = self._computed(taken) if taken else []
        except Exception:
            self.counts["failed"] += sum(one.rows for one in taken)
            raise
        return [_Given(one.number, one.time, of_one) for one, of_one in zip(taken, values, strict=True)]

    def _computed(self, taken: Sequence[_Taken]) -> Sequence[NDArray[np.float32]]:
        challenger = taken[0].challenger
        if isinstance(challenger, Snapshot):
            return [self._run(challenger, one.inputs()) for one in taken if one.inputs is not None]
        logits = np.concatenate([one.answer.part(LOGITS) for one in taken], dtype=np.float32)
        good = (np.abs(logits) <= MAX_ABS_LOGIT).all(axis=1)  # others are not judged
        given = np.zeros(logits.shape, np.float32)
        given[good] = challenger.predict_proba(logits[good])
        return np.split(given, np.cumsum([one.rows for one in taken])[:-1])

    def _run(self, snapshot: Snapshot, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        feeds = {spec.name: inputs[spec.name] for spec in self.model.inputs if spec.name in inputs}
        rows, most = self.model.row_count(feeds), self.model.batcher.limits.rows
        step = most if self.model.joins_requests else max(1, rows)
        parts = [
            snapshot.run(["probabilities"], {name: array[start : start + step] for name, array in feeds.items()})[0]
            for start in range(0, rows, step)
        ]
        return np.concatenate(parts, dtype=np.float32)


class ShadowRuns:
    """The challengers that this process runs. Methods are for the event loop."""

    def __init__(
        self, journal: Journal, repository: Repository, revisions: Revisions, journalling: Journalling
    ) -> None:
        self._journal, self._repository, self._revisions = journal, repository, revisions
        self._journalling, self._states = journalling, OnlineStates(journal)
        self._runs: dict[tuple[str, str], ShadowRun] = {}
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for key in list(self._runs):
            await self._end(key)

    def runs(self) -> list[ShadowRun]:
        return list(self._runs.values())

    async def look(self) -> None:
        """Run what the store says is to be run beside what is served here, and nothing else."""
        async with self._looking:
            rows = {(row.model, row.revision): row for row in await asyncio.to_thread(self._wanted)}
            for key, run in list(self._runs.items()):
                row = rows.get(key)
                if row is None or self._served(row) is not run.model or row.start_ms != run.row.start_ms:
                    await self._end(key)
                else:
                    run.row = row
            for key, row in rows.items():
                if key not in self._runs and (model := self._served(row)) is not None:
                    await self._begin(row, model)
            for run in self._runs.values():
                if isinstance(run.challenger, OnlineCalibrator):
                    await asyncio.to_thread(self._learned, run)

    def _wanted(self) -> list[ShadowRow]:
        with self._journal.reading() as connection:
            return [row for row in read_shadows(connection) if row.is_running and row.share]

    def _served(self, row: ShadowRow) -> ServedModel | None:
        models = self._repository.models()
        return next((m for m in models if m.name == row.model and m.digest == row.model_digest), None)

    async def _begin(self, row: ShadowRow, model: ServedModel) -> None:
        kept = self._journalling.of(model)
        if kept is None:
            return
        calibrator = await self._revisions.challenger(model, row.revision)
        snapshot = None if reads_logits(calibrator) else await self._revisions.snapshot(model, row.revision)
        run = ShadowRun(self._journal, row, model, kept.stream, snapshot or calibrator)
        self._runs[row.model, row.revision] = run
        kept.shadows = (*kept.shadows, run.offer)
        log.info("model %s: %s is run in shadow on a share of %g", row.model, row.revision, row.share)

    async def _end(self, key: tuple[str, str]) -> None:
        run = self._runs.pop(key)
        kept: ModelJournal | None = self._journalling.of(run.model)
        if kept is not None:
            kept.shadows = tuple(offer for offer in kept.shadows if offer != run.offer)
        await asyncio.to_thread(run.close)

    def _learned(self, run: ShadowRun) -> None:
        """What the challenger has learned by now, as it would serve."""
        found = self._states.served(run.row.model, run.row.revision, run.online_state)
        if found is not None:
            run.challenger = calibrators.loads(found[1]) if found[1] else run.fitted
            run.online_state = found[0]

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except CalserveError as error:
                log.error("shadows are not followed now: %s", error.message)
            except Exception:
                log.exception("shadows could not be followed; it is tried again")
            await next_look(LOOK_SECONDS)
