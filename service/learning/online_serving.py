"""Serving what online revisions have learned: the state that the store says serves becomes the next batch's.

The learner's process and every other worker do the same: look which state serves, and assign a snapshot that feeds it
to the session that is there. No session is built, and nothing waits.
"""

from __future__ import annotations

import asyncio
from typing import TypeAlias
from weakref import WeakKeyDictionary

import calibrators
from calibrators import Calibrator
from calibrators.online.learner import OnlineCalibrator
from service.inference.model import ServedModel, Snapshot
from service.inference.repository import Repository
from service.store.online_states import START, OnlineStates

ByModel: TypeAlias = WeakKeyDictionary[ServedModel, dict[str, Snapshot]]


class OnlineServing:
    """What a revision was fitted as is kept, for learning that is set back to before any label."""

    def __init__(self, repository: Repository, states: OnlineStates) -> None:
        self._repository, self._states = repository, states
        self._fitted: ByModel = WeakKeyDictionary()

    def learned(self, model: ServedModel, fitted: Snapshot) -> Snapshot:
        """A revision's snapshot as it was fitted, with the state that serves; not for the event loop."""
        if fitted.online_state is None:
            return fitted
        self._fitted.setdefault(model, {})[fitted.revision] = fitted
        return self._next(model, fitted) or fitted

    def calibrator(self, model: str, revision: str, fitted: Calibrator) -> Calibrator:
        """What serves of a revision; not for the event loop."""
        found = self._states.served(model, revision, START) if isinstance(fitted, OnlineCalibrator) else None
        return fitted if found is None else calibrators.loads(found[1])

    async def forget(self, model: str, revision: str) -> None:
        """Delete what the journal has of a revision."""
        await self._states.forget(model, revision)

    async def look(self, name: str | None = None) -> None:
        """Serve the states that the store says serve: of one model, or of all."""
        for model in list(self._repository.models()):
            before = model.active
            if before.online_state is None or name not in (None, model.name):
                continue
            after = await asyncio.to_thread(self._next, model, before)
            if after is not None and model.active is before:
                model.active = after

    def _next(self, model: ServedModel, before: Snapshot) -> Snapshot | None:
        """None if what serves is this state."""
        known = START if before.online_state is None else before.online_state
        found = self._states.served(model.name, before.revision, known)
        if found is None:
            return None
        number, artifact = found
        if number == START:
            return self._fitted[model][before.revision]
        return before.learned(calibrators.loads(artifact), number)
