"""Long-running jobs: begun, watched, cancelled, and taken up again after a restart.

Each runs in a process of its own (`service.learning.worker`), so that a fit neither slows nor endangers what is served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from service.errors import NotFound, Overloaded, shown
from service.learning.job import ARTIFACT, GOLDEN, RESULT, JobSpec, RowWriter
from service.store.blobs import Blobs
from service.store.catalogue import Catalogue, OperationRow, RevisionRow
from service.store.files import write_whole

log = logging.getLogger(__name__)

KEPT_OPERATIONS = 1000
WORKER = "service.learning.worker"


@dataclass(frozen=True)
class Limits:
    """Bounds of the work that callers can cause."""

    processes: int = 1
    waiting: int = 16
    seconds: float = 3600.0
    memory_bytes: int = 8 << 30
    bytes_per_job: int = 4 << 30


@dataclass
class Operation:
    """An operation as it stands now. `progress` and `stage` live in memory only."""

    row: OperationRow
    progress: float = 0.0
    stage: str = "waiting"
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        return self.row.state == "running"


class Operations:
    """All operations of a server. Methods are for its event loop."""

    def __init__(self, catalogue: Catalogue, blobs: Blobs, root: Path, limits: Limits) -> None:
        self._catalogue, self._blobs, self._root, self.limits = catalogue, blobs, root, limits
        self._operations: dict[str, Operation] = {}
        self._slots = asyncio.Semaphore(limits.processes)
        self._changed = asyncio.Condition()
        self._released = False
        root.mkdir(parents=True, exist_ok=True)

    async def resume(self) -> None:
        """After a restart: know the ended operations, run the interrupted ones again, drop what nobody waits for."""
        for row in await asyncio.to_thread(self._catalogue.operations):
            operation = self._operations[row.operation] = Operation(row)
            if operation.running:
                self._start(operation)
        for folder in self._root.iterdir():
            known = self._operations.get(folder.name)
            if known is None or not known.running:
                shutil.rmtree(folder, ignore_errors=True)

    @asynccontextmanager
    async def rows(self, name: str = "") -> AsyncIterator[tuple[str, RowWriter]]:
        """A name for an operation to come, and a writer for its rows. Unless submitted within, all is discarded.

        Who gives the name knows after a crash whether it was submitted.
        """
        if sum(operation.running for operation in self._operations.values()) >= self.limits.waiting:
            raise Overloaded(f"{self.limits.waiting} operations are running or waiting already", retry_after_seconds=5)
        name = name or f"op-{secrets.token_hex(8)}"
        # Not in a thread: a caller leaving meanwhile would leave open files.
        writer = RowWriter(self._root / name)
        try:
            yield name, writer
        finally:
            writer.close()
            if name not in self._operations:
                await asyncio.to_thread(shutil.rmtree, self._root / name, ignore_errors=True)

    async def submit(
        self, name: str, writer: RowWriter, spec: JobSpec, description: str, files: Mapping[str, bytes]
    ) -> Operation:
        """Begin the job whose rows `writer` holds, with these files beside them. When this returns, the operation
        survives a crash."""
        for file, content in files.items():
            await asyncio.to_thread(write_whole, self._root / name / file, content)
        await asyncio.to_thread(writer.finish, spec)
        row = OperationRow(name, spec.action, spec.model, description, "running", time.time())
        await asyncio.to_thread(self._catalogue.put_operation, row)
        await asyncio.to_thread(self._catalogue.prune_operations, keep=KEPT_OPERATIONS)
        operation = self._operations[name] = Operation(row)
        for old in [o for o in self.of_model("") if not o.running][KEPT_OPERATIONS:]:
            del self._operations[old.row.operation]
        self._start(operation)
        return operation

    def get(self, name: str) -> Operation:
        try:
            return self._operations[name]
        except KeyError:
            raise NotFound(f"no operation {shown(name)}") from None

    def of_model(self, model: str) -> list[Operation]:
        """Operations of a model (of all, if empty), newest first."""
        chosen = [o for o in self._operations.values() if model in ("", o.row.model)]
        return sorted(chosen, key=lambda operation: -operation.row.create_time)

    async def wait(self, name: str, timeout_seconds: float | None, until_progress_above: float | None) -> Operation:
        """The operation when it has ended, when it has got further than asked for, or when the time is over."""
        operation = self.get(name)

        def enough() -> bool:
            further = until_progress_above is not None and operation.progress > until_progress_above
            return further or not operation.running or self._released

        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(enough)
        except TimeoutError:
            pass  # the caller looks at `state`
        return operation

    async def cancel(self, name: str) -> Operation:
        """End the work; an operation that has ended stays as it is."""
        operation = self.get(name)
        if operation.task is not None and operation.running:
            await self._end(operation, replace(operation.row, state="cancelled"))
            operation.task.cancel()
            await asyncio.wait([operation.task])
        return operation

    async def release(self) -> None:
        """Let nobody wait any longer: they learn the state as it is, and ask the next server."""
        await self._change(lambda: setattr(self, "_released", True))

    async def close(self) -> None:
        """Stop the workers. Their operations stay `running` in the catalogue and are taken up at the next start."""
        tasks = [o.task for o in self._operations.values() if o.task is not None and not o.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, operation: Operation) -> None:
        operation.task = asyncio.create_task(self._run(operation), name=operation.row.operation)

    async def _run(self, operation: Operation) -> None:
        folder = self._root / operation.row.operation
        try:
            async with self._slots:
                result = await self._work(operation, folder)
            if "error" in result:
                await self._fail(operation, "CANNOT_FIT", result["error"])
            elif operation.row.action == "fit":
                await self._finish_fit(operation, folder, result)
            else:
                await self._end(operation, replace(operation.row, state="succeeded", result=result))
        except TimeoutError:
            await self._fail(operation, "TOO_SLOW", f"not done after {self.limits.seconds:g} seconds")
        except Exception:
            log.exception("operation %s failed", operation.row.operation)
            await self._fail(operation, "INTERNAL", "internal error; the server's log has it")
        finally:
            if not operation.running:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _work(self, operation: Operation, folder: Path) -> dict[str, Any]:
        """Run the worker on the folder; its result."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", WORKER, str(folder), str(self.limits.memory_bytes),
            stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for line in _lines(process):
                    await self._progress(operation, json.loads(line))
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0 or not (folder / RESULT).exists():
            return {"error": f"the fit's process ended without a result (exit code {process.returncode})"}
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return result

    async def _finish_fit(self, operation: Operation, folder: Path, result: dict[str, Any]) -> None:
        spec = JobSpec.read(folder)

        def store() -> OperationRow:
            row = RevisionRow(
                model=spec.model,
                number=0,
                model_digest=spec.model_digest,
                artifact_digest=self._blobs.put((folder / ARTIFACT).read_bytes()),
                golden_digest=self._blobs.put((folder / GOLDEN).read_bytes()),
                create_time=time.time(),
                **result,
            )
            done = replace(operation.row, state="succeeded")
            return replace(done, result={"revision": self._catalogue.finish_fit(row, done).revision})

        await self._end(operation, await asyncio.to_thread(store), stored=True)

    async def _fail(self, operation: Operation, reason: str, message: str) -> None:
        await self._end(operation, replace(operation.row, state="failed", error_reason=reason, error_message=message))

    async def _end(self, operation: Operation, row: OperationRow, *, stored: bool = False) -> None:
        if not stored:
            await asyncio.to_thread(self._catalogue.put_operation, row)
        await self._change(lambda: setattr(operation, "row", row))

    async def _progress(self, operation: Operation, message: dict[str, Any]) -> None:
        def apply() -> None:
            operation.progress, operation.stage = float(message["progress"]), str(message["stage"])

        await self._change(apply)

    async def _change(self, change: Callable[[], None]) -> None:
        """Change an operation and wake who waits: one condition serves all, each waiter looks at its own."""
        async with self._changed:
            change()
            self._changed.notify_all()


async def _lines(process: asyncio.subprocess.Process) -> AsyncIterator[bytes]:
    while process.stdout is not None and (line := await process.stdout.readline()):
        yield line
