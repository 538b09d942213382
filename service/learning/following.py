"""How a worker that is not the learner comes to serve what the learner made active."""

from __future__ import annotations

import asyncio
import logging

from service.learning.online_serving import OnlineServing
from service.learning.revisions import Revisions
from service.store.catalogue import Catalogue
from service.store.following import next_look

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""How often the catalogue is asked whether anything changed: what is active everywhere is so within a second."""


class Following:
    """Looks at the catalogue and at the online states, which another process writes."""

    def __init__(self, catalogue: Catalogue, revisions: Revisions, online: OnlineServing) -> None:
        self._catalogue, self._revisions, self._online = catalogue, revisions, online
        self._seen: int | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def look(self) -> None:
        """Serve what is active, if that changed since the last look, and what it has learned."""
        changed = await asyncio.to_thread(self._catalogue.changes)
        if changed != self._seen:
            await self._revisions.follow()
            self._seen = changed
        await self._online.look()

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the catalogue could not be followed; what is served stays")
            await next_look(LOOK_SECONDS)
