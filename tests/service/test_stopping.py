"""Runs that nobody waits for any more are ended, be they endless."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.errors import DeadlinePassed, Refused
from service.inference import repository
from service.inference.session import Device, Session, Stop, at_most
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_access import INFER
from tests.service.test_durability import until
from tests.service.test_lifecycle import ENDLESS, slow, turns

DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
FOR_EVER = {"x": np.full(1, ENDLESS, np.float32)}
SHORT = {"x": np.ones(1, np.float32)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    models.write(tmp_path / "models", "slow", slow())
    server = RunningServer(settings_for(tmp_path / "models", default_deadline_seconds=1.0))
    yield server
    server.stop()


@pytest.fixture
def session() -> Session:
    return Session(slow().SerializeToString(), Device("CPUExecutionProvider", {}, threads=1))


def stopped(server: RunningServer) -> int:
    return server.app.repository.get("slow").statistics.dropped["stopped"]


def test_an_endless_run_ends_at_its_callers_deadline_and_the_next_is_served(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(INFER)
        with pytest.raises(grpc.RpcError) as caught:
            infer(turns(ENDLESS), timeout=2)
        assert caught.value.code() == DEADLINE_EXCEEDED
        assert infer(turns(1), timeout=60)
    assert stopped(server) == 1


def test_an_endless_run_whose_caller_set_no_deadline_ends_at_the_servers(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(INFER)
        with pytest.raises(grpc.RpcError) as caught:
            infer(turns(ENDLESS))
        assert caught.value.code() == DEADLINE_EXCEEDED
        assert caught.value.details() == "the deadline passed while the model ran"
        assert infer(turns(1), timeout=60)


def test_an_endless_run_ends_when_its_caller_leaves(tmp_path: Path) -> None:
    models.write(tmp_path / "models", "slow", slow())
    server = RunningServer(settings_for(tmp_path / "models", default_deadline_seconds=3600.0))
    try:
        with grpc.insecure_channel(server.address) as channel:
            infer = channel.unary_unary(INFER)
            calls = [infer.future(turns(ENDLESS)) for _ in range(20)]
            batcher = server.app.repository.get("slow").batcher
            until(lambda: batcher.queued == 19)  # and one under way
            for call in calls:
                call.cancel()
            assert infer(turns(1), timeout=60)
        assert server.app.repository.get("slow").statistics.dropped == {"stopped": 1, "cancelled": 19}
    finally:
        server.stop()


def test_other_runs_of_the_thread_are_not_ended(session: Session) -> None:
    stop = Stop()
    timer = threading.Timer(0.1, stop.now)
    timer.start()
    with stop, pytest.raises(DeadlinePassed):
        session.run(["y"], FOR_EVER)
    assert session.run(["y"], SHORT)[0] == 2001


def test_runs_through_bindings_are_ended_too(session: Session) -> None:
    bound = Session(slow().SerializeToString(), dataclasses.replace(session._device, bound=True))
    with pytest.raises(Refused, match=r"so many turns takes more than 0\.1 seconds"), at_most(0.1, "so many turns"):
        bound.run(["y"], FOR_EVER)
    assert bound.run(["y"], SHORT)[0] == 2001


def test_a_model_that_loops_for_ever_on_made_up_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write(tmp_path / "models", "endless", slow(least=2**62))
    models.write(tmp_path / "models", "mlp", models.classifier())
    monkeypatch.setattr(repository, "LOAD_SECONDS", 8.0)
    server = RunningServer(settings_for(tmp_path / "models"))
    try:
        assert "takes more than 8 seconds" in server.app.repository.failures["endless"]
        assert server.app.repository.serves("mlp")
    finally:
        server.stop()
