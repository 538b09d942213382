"""Champion and challenger: any revision in shadow on live traffic, until it is shown better, worse, or is stopped.

A shadow compares a challenger with whichever revision is active: when another becomes active the comparison begins anew
and says so. An online challenger learns meanwhile, as it would if it served, and serves what it has learned once it is
promoted. To promote is to activate, by the same checks, on two conditions: the challenger is shown better, and the
champion is still the one that it was compared with.

A crash anywhere promotes once or not at all: who promotes is written down before the activation, and an activation is
made in place of the champion alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass, replace
from typing import TypeAlias

from calibrators.online.learner import OnlineCalibrator
from service.errors import AlreadyExists, CalserveError, InvalidRequest, NotFound, NotReady, Refused, Stale, shown
from service.inference.model import ServedModel
from service.inference.repository import Repository
from service.learning.journalling import Journalling
from service.learning.online import Online
from service.learning.revisions import Revisions
from service.learning.shadow import BETTER, Comparison, Judge, from_journal, reads_logits
from service.learning.shadow_runs import ShadowRuns
from service.learning.whole import to_its_end
from service.store.following import next_look
from service.store.journal import Journal
from service.store.shadows import PROMOTED, STOPPED, ShadowRow, read_shadows

log = logging.getLogger(__name__)

MANUAL, AUTOMATIC = "manual", "automatic"
POLICIES = (MANUAL, AUTOMATIC)
BY_POLICY = "the policy"
LEVEL, LEAST_LABELS = 0.95, 500
SHARE = 0.1
"""Of requests on which a challenger is run through the model again, where nobody says how many; any other is given the
logits of all."""
MOST_SHADOWS = 8
"""Of one model."""
LOOK_SECONDS = 1.0
STEPS_TOGETHER = 20

Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class ShadowState:
    """A shadow, and how its comparison stands, or stood when it ended."""

    row: ShadowRow
    comparison: Comparison


class Shadows:
    """The shadows of all models, in the process that learns. Methods are for the event loop."""

    def __init__(
        self,
        journal: Journal,
        repository: Repository,
        revisions: Revisions,
        online: Online,
        runs: ShadowRuns,
        journalling: Journalling,
        *,
        wait_seconds: float,
        quota: int,
    ) -> None:
        self._journal, self._repository, self._revisions = journal, repository, revisions
        self._online, self._runs, self._journalling = online, runs, journalling
        self._options = (wait_seconds, quota)
        self._judges: dict[Key, Judge] = {}
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        online.in_shadow = self._learning

    def begin(self) -> None:
        """Go on with what the store says is in shadow."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @to_its_end
    async def start(
        self,
        model: str,
        revision: str,
        *,
        policy: str = MANUAL,
        level: float = LEVEL,
        least_labels: int = LEAST_LABELS,
        share: float = 0.0,
        by: str = "",
    ) -> ShadowState:
        """Compare a revision (or `none`) with what is active, on what is predicted from now on.

        Parameters
        ----------
        policy : `automatic` promotes it as soon as it is shown better on `least_labels` or more
        level : the probability with which the bounds hold, at all times at once
        share : of requests on which it is run, where it must be; 0: as is usual for its kind
        by : who asks, for the audit

        Raises
        ------
        NotFound, AlreadyExists, InvalidRequest, Refused
        """
        _check_options(policy, level, least_labels, share)
        async with self._changing:
            served = await self._revisions.model_for(model, revision)
            row = ShadowRow(
                served.name,
                revision,
                served.digest,
                served.active.revision,
                policy,
                level,
                least_labels,
                share,
                start_ms=(now := int(1000 * time.time())),
                since_ms=now,
                started_by=by,
            )
            judge = await self._new_judge(served, row)
            await asyncio.to_thread(judge.begin)
            await asyncio.to_thread(judge.load)
            self._judges[row.model, row.revision] = judge
        log.info("model %s: %s is in shadow beside %s, asked for by %s", model, revision, row.champion, by or "anybody")
        await self._took_effect()
        return ShadowState(judge.row, judge.comparison)

    async def get(self, model: str, revision: str) -> ShadowState:
        """NotFound if this revision never was in shadow."""
        for state in await self.of_model(model):
            if state.row.revision == revision:
                return state
        raise NotFound(f"revision {shown(revision)} of model {shown(model)} is not in shadow")

    async def of_model(self, model: str) -> list[ShadowState]:
        """Those that are in shadow, and those that were."""
        return await asyncio.to_thread(self.standing, model)

    def standing(self, model: str) -> list[ShadowState]:
        """The same, for any thread but the event loop's."""
        return [self._state(row) for row in self._rows(model)]

    def states(self) -> list[ShadowState]:
        """Those that are in shadow now."""
        return [ShadowState(judge.row, judge.comparison) for judge in list(self._judges.values())]

    @to_its_end
    async def stop(self, model: str, revision: str, by: str = "") -> ShadowState:
        """End a shadow. What an online challenger has learned stays."""
        async with self._changing:
            judge = self._running(model, revision)
            await self._end(judge, STOPPED, by)
        await self._took_effect()
        return await self.get(model, revision)

    @to_its_end
    async def promote(self, model: str, revision: str, by: str = "") -> ShadowState:
        """Make a challenger serve that is shown better.

        Raises
        ------
        Refused
            if it is not shown better; or as `Revisions.activate` does
        Stale
            if another revision is active by now than the one that it was compared with
        """
        async with self._changing:
            judge = self._running(model, revision)
            if judge.comparison.verdict != BETTER:
                low, high = judge.comparison.gain.interval(judge.row.level)
                raise Refused(
                    f"{revision} is not shown better than {judge.row.champion}: its gain is between {low:.4f} and "
                    f"{high:.4f}; `activate` makes it serve nevertheless",
                    reason="NOT_SHOWN_BETTER",
                )
            await self._promote(judge, by)
        await self._took_effect()
        return await self.get(model, revision)

    @to_its_end
    async def delete_revision(self, model: str, revision: str) -> None:
        """`Revisions.delete`, of a revision that may be in shadow: nothing follows it any more when its rows go."""
        async with self._changing:
            self._judges.pop((model, revision), None)
            await self._online.look()
            await self._revisions.delete(model, revision)
        await self._runs.look()

    async def look(self) -> None:
        """Judge what has come since the last look, and do what follows from it."""
        async with self._changing:
            await self._adopt()
            for key, judge in list(self._judges.items()):
                try:
                    await self._follow(key, judge)
                except CalserveError as error:
                    log.error("shadow %s of model %s is not followed now: %s", key[1], key[0], error.message)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("shadows could not be looked after; it is tried again")
            await next_look(LOOK_SECONDS)

    async def _adopt(self) -> None:
        """A judge for each shadow that the store says is running on a model that is served."""
        for row in await asyncio.to_thread(self._rows, ""):
            served = self._served(row)
            if not row.is_running or served is None or (row.model, row.revision) in self._judges:
                continue
            try:
                calibrator = await self._revisions.challenger(served, row.revision)
                judge = Judge(self._journal, row, calibrator, *self._options)
                await asyncio.to_thread(judge.load)
                self._judges[row.model, row.revision] = judge
            except CalserveError as error:
                log.error("shadow %s of model %s cannot go on now: %s", row.revision, row.model, error.message)

    async def _follow(self, key: Key, judge: Judge) -> None:
        row, served = judge.row, self._served(judge.row)
        if served is None:  # adopted again when it is back
            del self._judges[key]
            return
        active = served.active.revision
        if active == row.revision:
            promoted = bool(row.promoting)
            note = "" if promoted else "it was made active by another call"
            await self._end(judge, PROMOTED if promoted else STOPPED, row.promoting, note)
            return
        if row.promoting:  # the process ended before the activation
            await asyncio.to_thread(judge.change, promoting="")
        if active != row.champion:
            note = f"compared with {active} since that is active; before that with {row.champion}"
            log.warning("model %s: %s in shadow is %s", row.model, row.revision, note)
            await asyncio.to_thread(judge.begin_anew, active, int(1000 * time.time()), note)
        for _ in range(STEPS_TOGETHER):
            if not await asyncio.to_thread(judge.step):
                break
        found = judge.comparison
        if row.policy == AUTOMATIC and found.verdict == BETTER and found.gain.n_labels >= row.least_labels:
            await self._promote_by_policy(judge)

    async def _promote_by_policy(self, judge: Judge) -> None:
        try:
            await self._promote(judge, BY_POLICY)
        except (Stale, NotReady) as error:
            log.warning("model %s: %s is not promoted yet: %s", judge.row.model, judge.row.revision, error.message)
        except CalserveError as error:
            note = f"could not be promoted by the policy, which is {MANUAL} from now on: {error.message}"
            log.error("model %s: %s %s", judge.row.model, judge.row.revision, note)
            await asyncio.to_thread(judge.change, policy=MANUAL, note=note)

    async def _promote(self, judge: Judge, by: str) -> None:
        row = judge.row
        served = self._served(row)
        await asyncio.to_thread(judge.change, promoting=by or "anybody")
        try:
            version = "" if served is None else served.version
            await self._revisions.activate(row.model, row.revision, version, instead_of=row.champion)
        except CalserveError:
            await asyncio.to_thread(judge.change, promoting="")
            raise
        await self._end(judge, PROMOTED, by)

    async def _end(self, judge: Judge, outcome: str, by: str, note: str = "") -> None:
        row, gain = judge.row, judge.comparison.gain
        await asyncio.to_thread(judge.end, outcome, by, note or row.note)
        self._judges.pop((row.model, row.revision), None)
        log.info(
            "model %s: the shadow %s is %s by %s after %d labels, gain %.4f over %s",
            row.model, row.revision, outcome, by or "anybody", gain.n_labels, gain.mean, row.champion,
        )  # fmt: skip

    async def _new_judge(self, served: ServedModel, row: ShadowRow) -> Judge:
        """Refused, AlreadyExists or NotReady unless this can be in shadow."""
        if not served.is_classifier or self._journalling.of(served) is None:
            raise Refused(f"predictions of model {shown(row.model)} are not kept: nothing can be compared with labels")
        if row.revision == row.champion:
            raise Refused(f"{row.revision} is active: it cannot be in its own shadow")
        if (row.model, row.revision) in self._judges:
            raise AlreadyExists(f"{row.revision} is in shadow already")
        if sum(model == row.model for model, _ in self._judges) >= MOST_SHADOWS:
            raise Refused(f"{MOST_SHADOWS} revisions of model {shown(row.model)} are in shadow already; stop one")
        calibrator = await self._revisions.challenger(served, row.revision)
        share = row.share or (1.0 if reads_logits(calibrator) else SHARE)
        if not reads_logits(calibrator):
            await self._revisions.snapshot(served, row.revision)  # proved now, and not when somebody is served
        share = 0.0 if from_journal(calibrator, served.n_classes) else share
        return Judge(self._journal, replace(row, share=share), calibrator, *self._options)

    def _running(self, model: str, revision: str) -> Judge:
        judge = self._judges.get((model, revision))
        if judge is None:
            raise NotFound(f"revision {shown(revision)} of model {shown(model)} is not in shadow")
        return judge

    def _learning(self) -> set[Key]:
        return {key for key, judge in self._judges.items() if isinstance(judge.calibrator, OnlineCalibrator)}

    async def _took_effect(self) -> None:
        await self._online.look()
        await self._runs.look()

    def _served(self, row: ShadowRow) -> ServedModel | None:
        models = self._repository.models()
        return next((m for m in models if m.name == row.model and m.digest == row.model_digest), None)

    def _rows(self, model: str) -> list[ShadowRow]:
        with self._journal.reading() as connection:
            return read_shadows(connection, model)

    def _state(self, row: ShadowRow) -> ShadowState:
        judge = self._judges.get((row.model, row.revision))
        if row.is_running and judge is not None:
            return ShadowState(judge.row, judge.comparison)
        return ShadowState(row, Comparison.decode(json.dumps(row.final).encode()) if row.final else Comparison())


def _check_options(policy: str, level: float, least_labels: int, share: float) -> None:
    if policy not in POLICIES:
        raise InvalidRequest(f"policy must be one of {', '.join(POLICIES)}, got {shown(policy)}")
    if not 0.5 <= level < 1:
        raise InvalidRequest(f"level must be from 0.5 to below 1, got {level}")
    if least_labels < 1:
        raise InvalidRequest(f"least_labels must be 1 or more, got {least_labels}")
    if not 0 <= share <= 1:
        raise InvalidRequest(f"share must be from 0 to 1, got {share}")
