"""What a caller asked for and did not wait for: it is done whole, in memory as on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from service.client import Client
from tests.service.conftest import RunningServer
from tests.service.test_durability import until
from tests.service.test_monitoring import LABELS, LOGITS, QUICK, X, alarm_of, come, drifted, eager, watched

__all__ = ["eager", "watched"]  # fixtures


def leave(server: RunningServer, call: Callable[[], Any], at: tuple[object, str]) -> None:
    """Make a call whose caller leaves as soon as this method has done its work."""

    async def made() -> None:
        loop, caller = asyncio.get_running_loop(), asyncio.current_task()
        assert caller is not None
        done = getattr(*at)

        def and_left(*arguments: Any) -> Any:
            result = done(*arguments)
            loop.call_soon_threadsafe(caller.cancel)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*at, and_left)
            await call()

    with pytest.raises(CancelledError):
        server._run(made())


def test_an_acknowledgement_reaches_the_detector(watched: tuple[RunningServer, Client]) -> None:
    server, client = watched
    monitoring = server.app._monitoring
    client.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 500)))
    alarm = alarm_of(client, "scores").alarm
    monitor = monitoring._watched["mlp", "scores"].monitor
    leave(server, lambda: monitoring.acknowledge("mlp", alarm, "me"), (monitor, "turn"))
    assert until(lambda: client.alarms("mlp")[0].acknowledged_by) == "me"
    assert until(lambda: client.monitor("mlp", "scores").alarms == ())
    come(client, X[600:1200])
    assert until(lambda: monitor.replay()[0])


def test_an_activation_that_is_written_serves(watched: tuple[RunningServer, Client]) -> None:
    server, client = watched
    revision = client.fit("mlp", "temperature", logits=LOGITS[:500], labels=LABELS[:500]).revision
    revisions = server.app._revisions
    leave(server, lambda: revisions.activate("mlp", revision), (revisions._catalogue, "record_activation"))
    until(lambda: client.predict("mlp", X[:1]).calibrator_revision == revision)
