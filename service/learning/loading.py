"""Models that come and go while the server runs.

A reload loses no request: the new versions are loaded and warmed beside the old, what was active is made active on
them, one assignment swaps them in, and the old finish what they have. A load that fails changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from service.errors import CalserveError, InvalidRequest, NotFound, NotReady, Refused, shown
from service.inference.model import ServedModel
from service.inference.repository import MODEL_NAME, Fingerprint, Repository, fingerprint, folders
from service.learning.revisions import Revisions

log = logging.getLogger(__name__)

T = TypeVar("T")


class Loading:
    """Loads, reloads and unloads models, one at a time. Methods are for the event loop."""

    def __init__(self, repository: Repository, revisions: Revisions, changed: Callable[[str], Awaitable[None]]) -> None:
        self._repository, self._revisions, self._changed = repository, revisions, changed
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Load what is to be served from the start, and make active on it what was active before the restart."""
        await asyncio.to_thread(self._repository.load_all)
        await self._revisions.restore()
        self._repository.loaded = True

    async def load(self, name: str, config: Any = None) -> None:
        """Load a model, or load it again from disk. `config` (inference.ModelConfig) stands in for its config.pbtxt.

        A caller who leaves does not undo it.

        Raises
        ------
        InvalidRequest, NotFound, Refused, Stale
            no name of a model; no such model; one that cannot be served, then what served before goes on serving
        """
        if not MODEL_NAME.fullmatch(name):
            raise InvalidRequest(f"{shown(name)} is no name of a model")
        await self._to_its_end(self._load(name, config))

    async def unload(self, name: str) -> None:
        """Serve a model no more; requests in flight are answered. NotFound if there is no such model."""
        if name not in self._repository.names():
            raise NotFound(f"no model {shown(name)} is loaded")
        await self._to_its_end(self._unload(name, keep_name=True))

    async def forget(self, name: str) -> None:
        """Unload a model whose files are gone."""
        await self._to_its_end(self._unload(name, keep_name=False))

    async def settle(self, seconds: float) -> None:
        """Return when what was begun has ended, or this time has passed."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def _load(self, name: str, config: Any) -> None:
        async with self._lock:
            self._check_started()
            try:
                versions = await asyncio.to_thread(self._repository.load, name, config)
                before = await self._swap(name, versions)
            except Exception as error:
                if not isinstance(error, NotFound) or self._repository.serves(name):
                    known = isinstance(error, CalserveError)
                    self._repository.fail(name, str(error) if known else "internal error; the server's log has it")
                    await self._changed(name)
                raise
            await self._changed(name)
        log.info("model %s: versions %s are served", name, ", ".join(versions))
        self._retire(before)

    async def _swap(self, name: str, versions: dict[str, ServedModel]) -> list[ServedModel]:
        try:
            return await self._revisions.restore_then(versions.values(), lambda: self._repository.put(name, versions))
        except BaseException:
            for model in versions.values():
                model.close()
            raise

    async def _unload(self, name: str, *, keep_name: bool) -> None:
        async with self._lock:
            self._check_started()
            before = self._repository.remove(name, keep_name=keep_name)
            await self._changed(name)
        log.info("model %s is unloaded", name)
        self._retire(before)

    def _check_started(self) -> None:
        if not self._repository.loaded:
            raise NotReady("the server is loading its models")

    def _retire(self, models: Iterable[ServedModel]) -> None:
        async def retire(model: ServedModel) -> None:
            await self._revisions.left(model)
            await model.retire()

        for model in models:
            self._begin(retire(model))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._begin(work))


class Poll:
    """Follows the repository's folder: changed models are loaded again, new ones loaded, vanished ones unloaded.

    A folder must be found the same twice before it is believed: what is half written changes between two looks.
    """

    def __init__(self, repository: Repository, loading: Loading, seconds: float) -> None:
        self._repository, self._loading, self._seconds = repository, loading, seconds
        self._seen: dict[str, Fingerprint] = {}
        self._followed: dict[str, Fingerprint] = {}  # the state that was last loaded, or tried
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, before anything is loaded, then again and again."""
        self._seen = self._followed = await asyncio.to_thread(self._fingerprints)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def look(self) -> None:
        """Compare the folder with what was followed, and follow what has settled."""
        found = await asyncio.to_thread(self._fingerprints)
        before, self._seen = self._seen, found
        for name in sorted({*found, *self._followed}):
            now = found.get(name)
            if now == before.get(name) and now != self._followed.get(name):
                await self._follow(name, now)

    async def _follow(self, name: str, now: Fingerprint | None) -> None:
        if now is None:
            self._followed = {other: state for other, state in self._followed.items() if other != name}
            await self._loading.forget(name)
            return
        self._followed = {**self._followed, name: now}
        with contextlib.suppress(CalserveError):  # the repository has logged and kept the reason
            await self._loading.load(name)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                if self._repository.loaded:
                    await self.look()
            except Refused as error:
                log.error("%s; what is served stays", error.message)
            except Exception:
                log.exception("the model repository could not be followed")

    def _fingerprints(self) -> dict[str, Fingerprint]:
        return {path.name: fingerprint(path) for path in folders(self._repository.root)}
