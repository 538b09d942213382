"""Labels arrive, the active online revision learns, what it learned is served.

For each model whose active revision learns online one task follows the journal: a step of the reader, the rows learned
in their order, state and position written in one transaction, and where the gate lets it pass, served. It runs in the
process that learns, beside the event loop; nothing of it is on the way of a request.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import numpy as np

import calibrators
from calibrators.online.comparison import Difference, half_brier
from calibrators.online.learner import OnlineCalibrator
from service.errors import CalserveError, Refused, shown
from service.inference.repository import Repository
from service.learning.gate import Gate, Verdict
from service.learning.online_serving import OnlineServing
from service.learning.progress import Progress, rows_apart
from service.learning.revisions import Revisions
from service.learning.whole import to_its_end
from service.store.catalogue import RevisionRow
from service.store.database import Connection
from service.store.following import next_look
from service.store.journal import Journal
from service.store.online_states import (
    START,
    KeptState,
    OnlineStates,
    Serving,
    keep_state,
    read_serving,
    read_state,
    set_back,
    write_serving,
)
from service.store.reading import NO_LABEL, Cohort, Reader

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS = 1.0
"""How often a learner looks without being told of labels: predictions pass the watermark with time alone."""
RETRY_SECONDS = 10.0
STEP_ROWS = 10_000
PACKS_BACK = 500
"""How far a start looks back for held-out rows."""


@dataclass(frozen=True)
class OnlineState:
    """How far the online learning of one revision is.

    Attributes
    ----------
    serving : which state serves, which is the best so far, whether learning is suspended
    step : of the reader; the state learned last has this number
    counts : rows by what became of them, and `published` and `refused` states, since learning began or this start
    verdict : of the gate on the last state
    kept : what can be rolled back to besides 0, newest first
    waiting : labels acknowledged to this process that are not learned yet
    gain : what learning won over the revision as it was fitted, in half the Brier score before each label
    seconds : from a label's acknowledgement to what it taught being served, the last time; NaN: never yet. The sum is
        over as many times as `counts` has as `timed`
    """

    model: str
    revision: str
    serving: Serving
    step: int
    counts: Counter[str]
    verdict: Verdict
    kept: list[KeptState]
    waiting: int
    gain: Difference
    seconds: float
    seconds_sum: float


class Replayed(NamedTuple):
    """What a replay came to: of so many steps and labels, after the state `since`, as far back as the journal goes."""

    steps: int
    learned: int
    equal: bool
    since: int = START


class Learner:
    """One revision's learning. `step` and what else is not `async` is not for the event loop, one call at a time."""

    def __init__(
        self, journal: Journal, row: RevisionRow, start: OnlineCalibrator, wait_seconds: float, quota: int
    ) -> None:
        self.model, self.revision, self.digest, self.start = row.model, row.revision, row.model_digest, start
        self.busy = asyncio.Lock()
        self.wake = asyncio.Event()
        self.counts: Counter[str] = Counter()
        self.acknowledged = self.taken = 0
        self.asked: float | None = None  # when the first label came that is not learned
        self.seconds, self.seconds_sum = float("nan"), 0.0
        self.verdict, self.gain = Verdict("", best=False), Difference()
        self._journal, self._quota = journal, quota
        self._reader = Reader(journal, row.model, f"online/{row.revision}", wait_seconds)

    def load(self) -> None:
        """Go on where the store says that learning is."""
        _, self.number, state = self._reader.state()
        self.progress = Progress.decode(state) if state else Progress.begin(self.start, self._quota)
        with self._journal.reading() as connection:
            self.serving = read_serving(connection, self.model, self.revision)
            best = read_state(connection, self.model, self.revision, self.serving.best)
        self._gate = Gate(self.start, self._calibrator(best))
        self._gate.add(rows_apart(self._reader.passed(PACKS_BACK), self.digest, self.start))
        self.taken = self.acknowledged = 0
        copy.deepcopy(self.start).learn(np.zeros((1, self.start.n_classes_)), [0])  # compiled before a label waits

    def step(self) -> bool:
        """Take the next step, if there is one; whether another is worth a look at once.

        Rows without labels pass all the time: those that have passed since are left for the next look.
        """
        cohort = self._reader.read(STEP_ROWS)
        if not cohort:
            return False
        before = _taken(self.progress.counts)
        learned, forecasts, held_out = self.progress.take(cohort, self.digest)
        self._gate.add(held_out)
        news = len(learned.labels) + len(held_out.labels)
        verdict = self._gate.judge(self.progress.calibrator) if news else None
        self._commit(cohort, verdict)
        fitted = self.start.predict_proba(learned.logits)
        self.gain = self.gain.after(half_brier(fitted, learned.labels) - half_brier(forecasts, learned.labels))
        taken = _taken(self.progress.counts) - before
        self.taken += taken
        return taken > 0 or sum(map(len, cohort.pairs)) >= STEP_ROWS

    def set_back(self, number: int) -> None:
        """Serve an earlier state, and learn on from it."""
        progress = Progress.decode(self.progress.encode())

        def write(connection: Connection) -> None:
            progress.set_back(read_state(connection, self.model, self.revision, number), self.start)
            step = self._reader.reset(connection, progress.encode())
            set_back(connection, self.model, self.revision, step, number)
            write_serving(connection, self.model, self.revision, self.serving._replace(number=number, best=number))

        self._journal.writer.write_now(write)
        self.load()

    def timed(self, is_served: bool, begun: float) -> None:
        """Labels were dealt with by a step that began then: how long the first of them waited for what it taught."""
        if is_served and self.asked is not None:
            self.seconds = time.perf_counter() - self.asked
            self.seconds_sum += self.seconds
            self.counts["timed"] += 1
        self.asked = begun if self.acknowledged > self.taken else None

    def suspend(self, suspended: bool) -> None:
        serving = self.serving._replace(suspended=int(suspended))
        self._journal.writer.write_now(lambda c: write_serving(c, self.model, self.revision, serving))
        self.serving = serving

    def skip(self) -> None:
        """Pass the labels that wait as if they had taught nothing: learning is set back to before them."""
        number, artifact = self.number, self.progress.artifact
        while cohort := self._reader.read(STEP_ROWS):
            before = _taken(self.progress.counts)
            self._gate.add(self.progress.take(cohort, self.digest).held_out)
            self._commit(cohort, None)
            self.taken += _taken(self.progress.counts) - before
            if sum(map(len, cohort.pairs)) < STEP_ROWS:
                break
        self.progress.set_back(artifact, self.start)

        def write(connection: Connection) -> None:
            set_back(
                connection, self.model, self.revision, self._reader.reset(connection, self.progress.encode()), number
            )

        self._journal.writer.write_now(write)

    def replay(self, setbacks: dict[int, int], heads: dict[int, str]) -> Replayed:
        """Learn everything again beside what serves: from the revision's start, or where its first labels are forgotten
        from the oldest kept state of which all that followed is there. Refused if there is none."""
        if self._reader.is_whole():
            return self._learned_again(START, Progress.begin(self.start, self.progress.quota), setbacks)
        since = self._whole_since(setbacks, heads)
        if since is None:
            raise Refused(f"the journal no longer has what {self.revision} has learned from since any kept state")
        with self._journal.reading() as connection:
            artifact = read_state(connection, self.model, self.revision, since)
        return self._learned_again(since, Progress.going_on(heads[since], artifact), setbacks)

    def _learned_again(self, since: int, progress: Progress, setbacks: dict[int, int]) -> Replayed:
        number, before, made = since, progress.counts["learned"], {START: b""}
        for cohort in self._reader.replay():
            if cohort.number <= since:
                continue
            number = cohort.number
            progress.take(cohort, self.digest)
            if number in setbacks.values():
                made[number] = progress.artifact
            if number in setbacks:
                progress.set_back(made[setbacks[number]], self.start)
        equal = progress.encode() == self.progress.encode()
        return Replayed(number - since, progress.counts["learned"] - before, equal, since)

    def _whole_since(self, setbacks: dict[int, int], heads: dict[int, str]) -> int | None:
        """The oldest kept state, behind every setback, after which the journal has each label that was dealt with.

        A step whose rows are forgotten in part gives fewer: as many must be there as were counted since the state.
        """
        there, rows = {}, 0
        for cohort in self._reader.replay():
            rows += sum(int((part.labels != NO_LABEL).sum()) for part in (*cohort.pairs, *cohort.late))
            there[cohort.number] = rows
        forgotten = _taken(self.progress.counts) - rows
        for number, head in heads.items():
            counted = _taken(Counter(json.loads(head)["counts"]))
            if number in there and counted - there[number] == forgotten and number > max(setbacks, default=START):
                return number
        return None

    def _commit(self, cohort: Cohort, verdict: Verdict | None) -> None:
        """Write state and position, and what serves, both or neither."""
        state, serving = self.progress.encode(), self.serving
        if verdict is not None and not verdict.refused:
            serving = serving._replace(number=cohort.number, best=cohort.number if verdict.best else serving.best)

        def write(connection: Connection) -> None:
            self._reader.write(connection, cohort, state)
            if serving is not self.serving:
                learned, artifact, head = self.progress.counts["learned"], self.progress.artifact, self.progress.head
                keep_state(connection, self.model, self.revision, serving, learned, artifact, head)

        self._journal.writer.write_now(write)
        self.number = cohort.number
        if verdict is not None:
            self._settle(verdict, serving)

    def _settle(self, verdict: Verdict, serving: Serving) -> None:
        if verdict.refused and not self.verdict.refused:
            log.warning("model %s goes on with state %d: %s", self.model, serving.number, verdict.refused)
        self.verdict, self.serving = verdict, serving
        self.counts["refused" if verdict.refused else "published"] += 1
        if verdict.best:
            self._gate.best = copy.deepcopy(self.progress.calibrator)

    def _calibrator(self, artifact: bytes) -> OnlineCalibrator:
        return cast(OnlineCalibrator, calibrators.loads(artifact)) if artifact else self.start


class Online:
    """The learners of all models whose active revision learns online, and of revisions that do so in shadow: nothing of
    these serves. Methods are for the event loop.

    Attributes
    ----------
    in_shadow : gives models and revisions of the latter
    """

    def __init__(
        self,
        journal: Journal,
        repository: Repository,
        revisions: Revisions,
        serving: OnlineServing,
        *,
        wait_seconds: float,
        quota: int,
    ) -> None:
        self._journal, self._repository, self._revisions, self._serving = journal, repository, revisions, serving
        self._options = (wait_seconds, quota)
        self._states = OnlineStates(journal)
        self._learners: dict[tuple[str, str], tuple[Learner, asyncio.Task[None]]] = {}
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.in_shadow: Callable[[], set[tuple[str, str]]] = set

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for key in list(self._learners):
            await self._stop(key)

    def labelled(self, model: str, count: int) -> None:
        """So many labels of a model are on the disk."""
        for learner, _ in list(self._learners.values()):
            if learner.model == model and count:
                learner.acknowledged += count
                learner.asked = learner.asked or time.perf_counter()
                learner.wake.set()

    async def state(self, model: str) -> OnlineState:
        """Of the active revision. Refused if it does not learn online."""
        learner = await self._find(model)
        async with learner.busy:
            kept = await asyncio.to_thread(self._states.kept, model, learner.revision)
            return _said(learner, kept)

    async def roll_back(self, model: str, number: int) -> OnlineState:
        """Serve an earlier state, and learn on from it. NotFound if it is not kept."""
        await self._change(model, lambda learner: learner.set_back(number))
        return await self.state(model)

    async def suspend(self, model: str, *, suspended: bool, skip_waiting: bool = False) -> OnlineState:
        """Learn no more, or go on: with what has come since, unless that is to be skipped."""

        def work(learner: Learner) -> None:
            if skip_waiting:
                learner.skip()
            learner.suspend(suspended)

        await self._change(model, work)
        return await self.state(model)

    async def replay(self, model: str) -> Replayed:
        """Learn everything again, and compare with what was learned, bit for bit."""

        def work(learner: Learner) -> Replayed:
            place = learner.model, learner.revision
            return learner.replay(self._states.setbacks(*place), self._states.heads(*place))

        return await self._change(model, work)

    def states(self) -> list[OnlineState]:
        """Of all learners, without what is kept."""
        return [_said(learner, []) for learner, _ in list(self._learners.values())]

    @to_its_end
    async def _change(self, model: str, work: Callable[[Learner], T]) -> T:
        learner = await self._find(model)
        async with learner.busy:
            try:
                result = await asyncio.to_thread(work, learner)
            except BaseException:
                await asyncio.to_thread(learner.load)
                raise
        await self._serving.look(model)
        learner.wake.set()
        return result

    async def _find(self, model: str) -> Learner:
        active = self._repository.get(model).active
        if active.online_state is None:
            raise Refused(f"{active.revision}, which is active on model {shown(model)}, does not learn online")
        await self.look()
        return self._learners[model, active.revision][0]

    async def _run(self) -> None:
        while True:
            pause = LOOK_SECONDS / 4
            try:
                await self.look()
                await self._serving.look()
            except Exception:
                log.exception("the online learners could not be looked after; what is served stays")
                pause = RETRY_SECONDS
            await next_look(pause)

    async def look(self) -> None:
        """A learner for each revision that learns, and no other."""
        async with self._changing:
            wanted = {
                (model.name, model.active.revision)
                for model in list(self._repository.models())
                if model.active.online_state is not None
            }
            served = {model.name for model in self._repository.models()}
            wanted |= {key for key in self.in_shadow() if key[0] in served}
            for key in self._learners.keys() - wanted:
                await self._stop(key)
            for key in wanted - self._learners.keys():
                await self._begin(*key)

    async def _begin(self, model: str, revision: str) -> None:
        row = await self._revisions.get(model, revision)
        start = cast(OnlineCalibrator, await self._revisions.calibrator(row))
        learner = Learner(self._journal, row, start, *self._options)
        await asyncio.to_thread(learner.load)
        self._learners[model, revision] = learner, asyncio.create_task(self._learn(learner))
        log.info("model %s: %s learns online, from state %d on", model, revision, learner.number)

    async def _stop(self, key: tuple[str, str]) -> None:
        learner, task = self._learners.pop(key)
        async with learner.busy:  # a step that is under way ends
            task.cancel()
        await asyncio.wait([task])

    async def _learn(self, learner: Learner) -> None:
        while True:
            more = False
            try:
                async with learner.busy:
                    learner.wake.clear()
                    more = not learner.serving.suspended and await self._step(learner)
            except CalserveError as error:
                log.error("model %s learns nothing now: %s", learner.model, error.message)
            except Exception:
                log.exception("a step of learning of model %s failed; it is tried again", learner.model)
            if not more:
                try:
                    await asyncio.wait_for(learner.wake.wait(), LOOK_SECONDS)
                except TimeoutError:
                    continue

    async def _step(self, learner: Learner) -> bool:
        begun, taken, published = time.perf_counter(), learner.taken, learner.counts["published"]
        try:
            more = await asyncio.to_thread(learner.step)
        except BaseException:
            await asyncio.to_thread(learner.load)  # what was learned and not written is learned again
            raise
        is_new = learner.counts["published"] > published
        if is_new:
            await self._serving.look(learner.model)
        if learner.taken > taken:
            learner.timed(is_new, begun)
        return more


def _taken(counts: Counter[str]) -> int:
    """Labels that were dealt with."""
    return sum(counts[name] for name in ("learned", "held_out", "over_quota", "unusable"))


def _said(learner: Learner, kept: list[KeptState]) -> OnlineState:
    return OnlineState(
        learner.model,
        learner.revision,
        learner.serving,
        learner.number,
        learner.progress.counts + learner.counts,
        learner.verdict,
        kept,
        max(0, learner.acknowledged - learner.taken),
        learner.gain,
        learner.seconds,
        learner.seconds_sum,
    )
