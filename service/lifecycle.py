"""The process around a server: its signals, and what systemd is told of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)

COLLECT_AFTER = 50_000, 20, 20
"""Objects made and not freed, and younger collections, before the collector looks at each of its generations."""


def spare_collections() -> None:
    """Make the garbage collector look seldom, and never at what was imported, which is no garbage.

    Counting references frees all of a request. What waits for the journal outlives it by a quarter of a second, which
    the collector takes for objects that stay: left alone it looks through the whole heap for them many times a minute.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


class Signals:
    """The first SIGTERM or SIGINT sets `stopping`, the second ends the process at once. SIGHUP calls `reload`."""

    def __init__(self, reload: Callable[[], None]) -> None:
        self.stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._loop.add_signal_handler(signal.SIGHUP, reload)

    def _stop(self) -> None:
        self.stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
            # Not the default effect: process 1 of a container is spared that. Not the loop: it may hang.
            signal.signal(number, _exit)


def notify(state: str) -> None:
    """Tell systemd, if it started this process as Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as error:
        log.warning("systemd could not be told %s: %s", state, error.strerror)


async def keep_watchdog() -> None:
    """Tell systemd twice in each WatchdogSec that the loop turns, if its unit has one (sd_watchdog_enabled(3))."""
    asked, of = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    while asked.isdecimal() and int(asked) and of == str(os.getpid()):
        notify("WATCHDOG=1")
        await asyncio.sleep(int(asked) / 2e6)


def end_process() -> NoReturn:
    """Exit with 0 and without the interpreter's end: that waits for threads that run or load a model, or aborts."""
    logging.shutdown()
    os._exit(0)


def _exit(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
