"""`calserve serve --workers N`: N servers on one port and one data directory.

Each worker is a whole server with models of its own; the system spreads connections over them. The first is the
learner: it alone writes the store, and the others pass on to it what changes revisions and follow what it makes active.
A worker that dies is started again. Workers end when this process does, however it ends: each holds a pipe to it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NoReturn

from service.errors import NotReady
from service.lifecycle import keep_watchdog, notify
from service.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
SETTLED_SECONDS = 10.0
"""A worker that lived this long is started again after the first pause; one that keeps dying waits longer each time."""
KILL_AFTER_SECONDS = 5.0
"""How long beyond the drain a worker may take to end."""


@dataclass(frozen=True)
class Member:
    """One worker's place among those that share a port."""

    index: int
    port: int
    learner_socket: Path

    @property
    def is_learner(self) -> bool:
        return self.index == 0


Run = Callable[[Settings, Member, Connection], None]
"""What a worker's process does: serve until told to stop or until the pipe closes. It sends "open" once the store is
open and "ready" once it serves."""


@dataclass
class _Worker:
    member: Member
    process: SpawnProcess
    pipe: Connection
    started: float = field(default_factory=time.monotonic)
    pause: float = FIRST_PAUSE_SECONDS
    ready: bool = False


class Supervisor:
    """Starts the workers, starts again those that die, ends them all on SIGTERM or SIGINT."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self._settings, self._run = settings, run
        self._spawn = multiprocessing.get_context("spawn")
        self._reserved = _reserve(settings.host, settings.port)
        self._folder = Path(tempfile.mkdtemp(prefix="calserve-"))  # a socket's path must be short
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self.port: int = self._reserved.getsockname()[1]

    async def supervise(self) -> int:
        """Run until told to stop or until a worker cannot start at all; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        log.info(
            "%d workers on %s:%d, the first is the learner", self._settings.workers, self._settings.host, self.port
        )
        watchdog = asyncio.create_task(keep_watchdog())
        try:
            self._start(0, FIRST_PAUSE_SECONDS)  # the others start when it has opened the store
            await self._stopping.wait()
            await self._end_all()
        finally:
            watchdog.cancel()
            self._reserved.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._exit_code

    def _start(self, index: int, pause: float) -> None:
        ours, theirs = self._spawn.Pipe()
        member = Member(index, self.port, self._folder / "learner")
        process = self._spawn.Process(
            target=self._run, args=(self._settings, member, theirs), name=f"calserve worker {index}"
        )
        process.start()
        theirs.close()
        log.info("worker %d is process %d", index, process.pid)
        worker = self._workers[index] = _Worker(member, process, ours, pause=pause)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._told, worker)
        loop.add_reader(process.sentinel, self._died, worker)

    def _told(self, worker: _Worker) -> None:
        """The worker says how far it is; the end of the pipe is told by its process's end."""
        try:
            worker.ready = worker.pipe.recv() == "ready"
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(worker.pipe.fileno())
            return
        for index in range(len(self._workers), self._settings.workers):
            self._start(index, FIRST_PAUSE_SECONDS)
        if all(worker.ready for worker in self._workers.values()):
            log.info("all %d workers serve", len(self._workers))
            notify("READY=1")

    def _died(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(worker.process.sentinel)
        loop.remove_reader(worker.pipe.fileno())
        worker.pipe.close()
        worker.process.join()
        if self._stopping.is_set():
            return
        code = worker.process.exitcode or 0
        lived = time.monotonic() - worker.started
        if not worker.ready and code > 0:
            log.error("worker %d could not start (exit code %d); the server ends", worker.member.index, code)
            self._exit_code = code
            self._stop()
            return
        pause = FIRST_PAUSE_SECONDS if lived > SETTLED_SECONDS else worker.pause
        log.error("worker %d ended with %d; it is started again in %.1f s", worker.member.index, code, pause)
        loop.call_later(pause, self._restart, worker.member.index, min(2 * pause, LONGEST_PAUSE_SECONDS))

    def _restart(self, index: int, pause: float) -> None:
        if not self._stopping.is_set():
            self._start(index, pause)

    def _stop(self) -> None:
        if self._stopping.is_set():  # the second signal: at once
            for worker in self._workers.values():
                worker.process.kill()
            os._exit(128 + signal.SIGTERM)
        notify("STOPPING=1")
        self._stopping.set()

    def _pass_on(self, number: int) -> None:
        for worker in self._workers.values():
            if worker.process.pid is not None and worker.process.is_alive():
                os.kill(worker.process.pid, number)

    async def _end_all(self) -> None:
        """Let every worker drain; the learner last, since the others pass calls on to it."""
        followers = [worker for index, worker in self._workers.items() if index]
        learner = [worker for index, worker in self._workers.items() if not index]
        for group in (followers, learner):
            for worker in group:
                worker.process.terminate()
            for worker in group:
                await self._end(worker)

    async def _end(self, worker: _Worker) -> None:
        longest = self._settings.drain_seconds + self._settings.drain_delay_seconds + KILL_AFTER_SECONDS
        await asyncio.to_thread(worker.process.join, longest)
        if worker.process.is_alive():
            log.error("worker %d did not end in %.0f s; it is killed", worker.member.index, longest)
            worker.process.kill()
            await asyncio.to_thread(worker.process.join)


def supervise(settings: Settings, run: Run) -> NoReturn:
    """Run the workers until SIGTERM or SIGINT, and exit."""

    async def main() -> int:
        return await Supervisor(settings, run).supervise()

    sys.exit(asyncio.run(main()))


def _reserve(host: str, port: int) -> socket.socket:
    """Hold the port without listening on it, so that it is the workers' alone and known before they start."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    reserved = socket.socket(family, kind, protocol)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        raise NotReady(f"cannot listen on {host}:{port}: is another server running there?") from error
    return reserved
