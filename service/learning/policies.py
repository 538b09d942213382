"""What is done when a monitor rings: nothing, learning stops, the revision before serves, or a calibrator is fitted.

An alarm is committed with the outcome `pending` and what is done is done afterwards, again after a crash between the
two. So each policy first looks whether it was carried out: learning that is suspended stays so, a revision is rolled
back only while it is the one that was active at the alarm, and a fit has a name that follows from its alarm.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

import calibrators
from service.drift.alarms import PENDING
from service.drift.states import REFIT, ROLL_BACK, SUSPEND, TELL, Alarm
from service.errors import AlreadyExists, CalserveError, NotFound, NotReady, Overloaded, Stale
from service.inference.model import NO_REVISION, ServedModel
from service.inference.repository import Repository
from service.learning.job import JobSpec
from service.learning.looking_back import Window
from service.learning.online import Online
from service.learning.operations import Operations
from service.learning.revisions import Revisions

log = logging.getLogger(__name__)

REFIT_ROWS = 500
"""Labelled rows since the change that a fit waits for."""
HELD_OUT_FRACTION = 0.2
DEFAULT_KIND = "temperature"
"""What is fitted where no revision is active, or one that reads more than logits, which is all that the journal has."""


class Shadows(Protocol):
    """What compares a revision with the one that serves, without serving it."""

    async def start(self, model: str, revision: str, *, by: str) -> object:
        """Begin to. AlreadyExists if it does already."""


class Policies:
    """Carries out the policies of alarms. Methods are for the event loop."""

    def __init__(
        self,
        repository: Repository,
        revisions: Revisions,
        online: Online,
        operations: Operations,
        shadows: Shadows | None = None,
    ) -> None:
        self._repository, self._revisions, self._online = repository, revisions, online
        self._operations, self._shadows = operations, shadows
        self._of_policy = {SUSPEND: self._suspend, ROLL_BACK: self._roll_back, REFIT: self._refit}

    async def carry_out(self, alarm: Alarm, window: Callable[[], Window]) -> str:
        """The outcome in words, which begins with PENDING while there is more to do. `window` is not for the loop."""
        if alarm.policy == TELL:
            return alarm.outcome
        if alarm.acknowledged_ms:
            return "not done: the alarm was acknowledged before"
        try:
            return await self._of_policy[alarm.policy](alarm, window)
        except (NotReady, Overloaded):
            return alarm.outcome  # another try helps
        except CalserveError as error:
            return f"not done: {error.message}"
        except Exception:
            log.exception("policy %s of %s failed", alarm.policy, alarm.id)
            return "not done: internal error; the server's log has it"

    async def _suspend(self, alarm: Alarm, window: Callable[[], Window]) -> str:
        del window
        state = await self._online.suspend(alarm.model, suspended=True)
        return f"{state.revision} learns nothing until it is resumed; its state {state.serving.number} serves"

    async def _roll_back(self, alarm: Alarm, window: Callable[[], Window]) -> str:
        del window
        try:
            active, before = await self._revisions.roll_back(alarm.model, only=alarm.revision)
        except Stale:
            active, before = self._repository.get(alarm.model).active.revision, alarm.revision
        return f"{active} is active, before {before}"

    async def _refit(self, alarm: Alarm, window: Callable[[], Window]) -> str:
        name = f"op-{alarm.id}-{alarm.noticed_ms}"
        try:
            row = self._operations.get(name).row
        except NotFound:
            return await self._fit(alarm, name, await asyncio.to_thread(window))
        if row.state == "running":
            return f"{PENDING}: {row.description} is under way as {name}"
        if row.state != "succeeded" or row.result is None:
            return f"not done: {row.description} {row.state}: {row.error_message}"
        revision = row.result["revision"]
        return f"{revision} was fitted on rows since the change; {await self._compare(alarm, revision)}"

    async def _compare(self, alarm: Alarm, revision: str) -> str:
        """Let a fitted revision run in shadow, once."""
        if self._shadows is None:
            return "it is not active"
        try:
            await self._shadows.start(alarm.model, revision, by=alarm.id)
        except AlreadyExists:
            pass  # before a crash
        except (NotReady, Overloaded):
            raise
        except CalserveError as error:
            return f"it is not active, and not in shadow: {error.message}"
        return "it was put in shadow beside what served"

    async def _fit(self, alarm: Alarm, name: str, window: Window) -> str:
        count = len(window.labels)
        if count < REFIT_ROWS:
            return f"{PENDING}: {count} of {REFIT_ROWS} labelled rows since the change are there to fit on"
        model = self._repository.get(alarm.model)
        kind, params_json = await self._kind_of(model)
        job = JobSpec("fit", model.name, model.digest, model.n_classes, kind, params_json, HELD_OUT_FRACTION, seed=0)
        what = f"fit {kind} on {count} rows since the change that {alarm.id} told"
        async with self._operations.rows(name) as (_, writer):
            signals = {"logits": window.logits}
            writer.expect(signals)
            await asyncio.to_thread(writer.append, signals, window.labels, np.ones(count))
            await self._operations.submit(name, writer, job, what, {})
        return f"{PENDING}: {what} is under way as {name}"

    async def _kind_of(self, model: ServedModel) -> tuple[str, str]:
        """What to fit, and its parameters: those of the active revision where the journal has all that it reads."""
        if model.active.revision != NO_REVISION:
            row = await self._revisions.get(model.name, model.active.revision)
            calibrator = await self._revisions.calibrator(row)
            if not calibrator.signal_shapes(model.n_classes) and not calibrator.fit_needs:
                return row.kind, row.params_json
        params = calibrators.create(DEFAULT_KIND).get_params(deep=False)
        return DEFAULT_KIND, json.dumps(params, sort_keys=True, separators=(",", ":"))
