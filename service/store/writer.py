"""One thread that writes a database: what many callers want written together is one transaction, and one fsync.

After an error of the disk nothing is retried blindly. Everything that waited is refused, and so is what comes, until
the database was opened again, its log written back and emptied, its content verified and a first write committed: after
a failed fsync the system may believe pages written that are not.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from service.errors import CalserveError, Damaged, NotReady, Overloaded
from service.store.database import READ_ONLY, Connection

log = logging.getLogger(__name__)

P = TypeVar("P")
T = TypeVar("T")
Work = Callable[[Connection], T]
"""What is done inside a transaction. It may raise an error of ours, then nothing of it is written."""
WorkOnPieces = Callable[[Connection, Sequence[P]], Sequence[T]]
"""What is done for several callers at once: a result for each piece."""

MOST_TOGETHER = 4096
MOST_WAITING = 20_000
"""Pieces of work that wait; more are refused."""
CLOSE_SECONDS = 20.0
RETRY_SECONDS = 1.0
"""Time between two tries to write again."""


@dataclass(eq=False)
class _Job:
    work: Callable[..., Any]
    piece: Any = None
    future: Future[Any] = field(default_factory=Future)
    loop: asyncio.AbstractEventLoop | None = None
    waiter: asyncio.Future[Any] | None = None

    def settle(self, value: Any) -> None:
        """In the caller's loop, or in the writer's thread for a caller without one."""
        if self.waiter is None:
            _settle(self.future, value)
        elif not self.waiter.done():
            _settle(self.waiter, value)


class Writer:
    """The thread, and the work that waits for it.

    `connect` opens the database; `verify` raises Damaged if its content is not what was written; `probe` writes
    something. `due` is work of the database's own, done when `due_seconds` says that it is time; `ended` is told of
    each transaction whether it was committed, and if not, whether the disk is to blame.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Connection],
        verify: Callable[[Connection], None],
        probe: Work[object],
        due_seconds: Callable[[], float | None] = lambda: None,
        due: Work[None] = lambda _: None,
        ended: Callable[[bool, bool], None] = lambda _committed, _disk: None,
    ) -> None:
        self._name, self._connect, self._verify, self._probe = name, connect, verify, probe
        self._due_seconds, self._due, self._ended = due_seconds, due, ended
        self._connection: Connection | None = connect()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = False
        self.writable, self.commits, self.failures = True, 0, 0
        self._thread = threading.Thread(target=self._run, name=f"writer of the {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Write what waits, then close the database. A disk that hangs is not waited for without end."""
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("the %s could not be closed in %.0f s: the disk does not answer", self._name, CLOSE_SECONDS)
            return
        if self._connection is not None:
            self._connection.close()

    def wake(self) -> None:
        """Look at what is due."""
        self._jobs.put(None)

    async def write(self, work: Work[T]) -> T:
        """The result of the work once it is on the disk.

        Raises
        ------
        NotReady
            with reason STORE_READ_ONLY: the disk is full or failed; whether this was written is not known
        Overloaded
            if too much waits
        """
        result: T = await self._write(_Job(work))
        return result

    async def write_piece(self, work: WorkOnPieces[P, T], piece: P) -> T:
        """The same, of work that is done once for the pieces of all who wait; alone for each if it raises."""
        result: T = await self._write(_Job(work, piece))
        return result

    async def _write(self, job: _Job) -> Any:
        job.loop = asyncio.get_running_loop()
        job.waiter = job.loop.create_future()
        self._put(job)
        return await job.waiter

    def write_now(self, work: Work[T]) -> T:
        """The same for a caller without an event loop, who waits."""
        job = _Job(work)
        self._put(job)
        result: T = job.future.result()
        return result

    def _put(self, job: _Job) -> None:
        if not self.writable or self._closing:
            raise self._refusal()
        if self._jobs.qsize() >= MOST_WAITING:
            raise Overloaded(f"the {self._name} has {MOST_WAITING} writes waiting already")
        self._jobs.put(job)

    def _refusal(self) -> NotReady:
        return NotReady(f"the {self._name} cannot be written now; nothing was recorded", reason=READ_ONLY)

    def _run(self) -> None:
        while True:
            jobs = self._gather()
            if self.writable:
                self._commit(jobs)
            else:
                self._settle(jobs, [self._refusal()] * len(jobs))
                self._mend()
            if self._closing and self._jobs.empty():
                return

    def _gather(self) -> list[_Job]:
        """What waits: at least one piece, or none when something is due."""
        seconds = self._due_seconds() if self.writable else RETRY_SECONDS
        gathered = []
        try:
            gathered.append(self._jobs.get(timeout=None if seconds is None else max(0.0, seconds)))
            while len(gathered) < MOST_TOGETHER:
                gathered.append(self._jobs.get_nowait())
        except Empty:
            pass
        return [job for job in gathered if job is not None]

    def _commit(self, jobs: list[_Job]) -> None:
        if not jobs and not self._is_due():
            return
        try:
            results = self._transact(jobs)
        except sqlite3.Error as error:
            log.error("the %s cannot be written: %s; writes are refused until it is verified", self._name, error)
            self.writable = False
            self.failures += 1
            self._ended(False, True)
            self._settle(jobs, [self._refusal()] * len(jobs))
        except Exception as error:
            self._ended(False, False)
            self._blame(jobs, error)
        else:
            self.commits += 1
            self._ended(True, False)
            self._settle(jobs, results)

    def _blame(self, jobs: list[_Job], error: Exception) -> None:
        """Of several pieces of work each is done again by itself, so that only the one at fault is refused."""
        if len(jobs) > 1:
            for job in jobs:
                self._commit([job])
            return
        if not isinstance(error, CalserveError):
            log.exception("a piece of work in the %s failed", self._name)
        self._settle(jobs, [error] * len(jobs))

    def _is_due(self) -> bool:
        seconds = self._due_seconds()
        return seconds is not None and seconds <= 0

    def _transact(self, jobs: Iterable[_Job]) -> list[Any]:
        connection = self._connection
        if connection is None:
            raise sqlite3.OperationalError("it is closed")
        try:
            connection.execute("BEGIN IMMEDIATE")
            if self._is_due():
                self._due(connection)
            results = list(_results(connection, jobs))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return results

    def _settle(self, jobs: list[_Job], values: list[Any]) -> None:
        """Tell every waiter its own fate; each loop is woken once."""
        by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[_Job, Any]]] = {}
        for job, value in zip(jobs, values, strict=True):
            by_loop.setdefault(job.loop, []).append((job, value))
        for loop, settled in by_loop.items():
            if loop is None:
                _settle_all(settled)
                continue
            try:
                loop.call_soon_threadsafe(_settle_all, settled)
            except RuntimeError:
                log.debug("a loop was closed before its writes were done")

    def _mend(self) -> None:
        """Open again, write the log back and empty it, verify, commit a first write; else stay as it is."""
        begun = time.monotonic()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        try:
            connection = self._connect()
        except CalserveError as error:
            log.debug("the %s cannot be opened: %s", self._name, error.message)
            return
        try:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise sqlite3.OperationalError("another process reads it")
            self._verify(connection)
            connection.execute("BEGIN IMMEDIATE")
            self._probe(connection)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            log.debug("the %s cannot be written yet: %s", self._name, error)
            connection.close()
        except Damaged as error:
            log.error("%s; writes stay refused: see `calserve doctor`", error.message)
            connection.close()
        else:
            self._connection, self.writable = connection, True
            log.info("the %s is written again, verified in %.1f s", self._name, time.monotonic() - begun)


def _results(connection: Connection, jobs: Iterable[_Job]) -> Iterator[Any]:
    for work, group in groupby(jobs, key=attrgetter("work")):
        pieces = [job.piece for job in group]
        yield from (work(connection) for _ in pieces) if pieces[0] is None else work(connection, pieces)


def _settle_all(settled: Iterable[tuple[_Job, Any]]) -> None:
    for job, value in settled:
        job.settle(value)


def _settle(future: Any, value: Any) -> None:
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
