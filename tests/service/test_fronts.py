"""Which front a server starts with, and what both keep alike."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from pathlib import Path

import grpc
import pytest

from service.errors import NotReady, Refused
from service.rpc.fronts import front_of
from service.rpc.limits import ConnectionLimits
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_access import INFER, infer

FRONTS = pytest.mark.parametrize("front", ["h2", "grpc"])


@pytest.mark.parametrize(("front", "runs"), [("h2", "h2"), ("grpc", "grpc"), ("auto", "h2")])
def test_the_front_that_runs_is_told_and_says_how_long_company_is_waited_for(
    root: Path, front: str, runs: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        server = RunningServer(settings_for(root, front=front))
    try:
        assert re.search(rf"gRPC on 127\.0\.0\.1:{server.app.port}, .*, front {runs}", caplog.text)
        with grpc.insecure_channel(server.address) as channel:
            assert channel.unary_unary(INFER)(infer(), timeout=10)
        held = {model.batcher.limits.company_seconds for model in server.app.repository.models()}
        assert held == {{"h2": 0.001, "grpc": 0.004}[runs]}
    finally:
        server.stop()


def test_without_ngh2_auto_is_grpc_and_h2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def name(asked: str) -> str:  # grpc.aio wants a running loop
        return front_of(asked, [], ConnectionLimits()).name

    monkeypatch.setattr("service.rpc.fronts.find_spec", lambda _: None)
    assert asyncio.run(name("auto")) == "grpc"
    with pytest.raises(Refused, match="front h2 needs the package ngh2"):
        front_of("h2", [], ConnectionLimits())


def test_another_front_is_refused(root: Path) -> None:
    with pytest.raises(Refused, match="front must be one of auto, h2, grpc"):
        settings_for(root, front="http3")


@FRONTS
def test_a_port_that_is_taken_is_refused(root: Path, front: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NotReady, match=f"cannot listen on .*{port}"):
            RunningServer(settings_for(root, front=front, port=port))


@FRONTS
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_server_listens_where_it_is_told(root: Path, front: str, host: str) -> None:
    server = RunningServer(settings_for(root, front=front, host=host))
    address = f"[{host}]" if ":" in host else host
    try:
        with grpc.insecure_channel(f"{address}:{server.app.port}") as channel:
            assert channel.unary_unary(INFER)(infer(), timeout=10)
    finally:
        server.stop()


@FRONTS
def test_stock_clients_keep_their_calls_while_connections_are_retired(root: Path, front: str) -> None:
    """grpc-core with keepalive, through GOAWAY after GOAWAY: no call fails."""
    server = RunningServer(
        settings_for(root, front=front, connection_age_seconds=0.5, connection_age_grace_seconds=5.0)
    )
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 11_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    seen: list[grpc.ChannelConnectivity] = []
    try:
        with grpc.insecure_channel(server.address, options) as channel:
            channel.subscribe(seen.append)
            call = channel.unary_unary(INFER)
            while seen.count(grpc.ChannelConnectivity.READY) < 4:
                answers = [call.future(infer(), timeout=20) for _ in range(20)]
                assert {answer.code() for answer in answers} == {grpc.StatusCode.OK}
    finally:
        server.stop()
