"""Clients that know nothing of us, on both fronts: grpcurl's way, other languages, and connections that are let go."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from service.client import Client
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_access import INFER, infer
from tests.service.test_hostile import Server

FOREIGN = Path(__file__).parent / "foreign"
PROTOS = Path(__file__).parents[2] / "protos"
OUTPUTS = ["scores", "probabilities", "confidence", "label"]
ROW = np.arange(6, dtype=np.float32)[None]
SECONDS = 120
RETRY = {"maxAttempts": 5, "initialBackoff": "0.2s", "maxBackoff": "2s", "backoffMultiplier": 2}


@pytest.fixture(scope="module", params=["h2", "grpc"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Its connections are asked to go after half a second."""
    root = tmp_path_factory.mktemp("stock") / "models"
    models.write(root, "mlp", models.classifier())
    ages = {"connection_age_seconds": 0.5, "connection_age_grace_seconds": 20.0}
    server = RunningServer(settings_for(root, front=request.param, **ages))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def probabilities(server: RunningServer) -> np.ndarray:
    """What our own client gets for `ROW`."""
    with Client(server.address, show_progress=False) as client:
        return client.predict("mlp", ROW).probabilities.ravel()


def saw(*command: object) -> dict[str, Any]:
    """What another program printed as JSON."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_who_knows_no_message_finds_them_by_reflection_and_is_answered(
    server: RunningServer, probabilities: np.ndarray
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]
        asks, answers = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        request = asks(model_name="mlp", raw_input_contents=[ROW.tobytes()])
        request.inputs.add(name="x", datatype="FP32", shape=ROW.shape)
        call = channel.unary_unary(INFER, asks.SerializeToString, answers.FromString)
        answer = call(request, timeout=SECONDS)
    assert [output.name for output in answer.outputs] == OUTPUTS
    np.testing.assert_allclose(np.frombuffer(answer.raw_output_contents[1], np.float32), probabilities, atol=1e-6)


def test_a_probe_is_told_that_it_serves_and_a_watch_outlives_the_age_of_its_connection(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="ready"), timeout=SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        seen: list[grpc.ChannelConnectivity] = []
        channel.subscribe(seen.append)
        while seen.count(grpc.ChannelConnectivity.READY) < 2:
            asked = health_pb2.HealthCheckRequest(service="mlp")
            assert stub.Check(asked, timeout=SECONDS).status == health_pb2.HealthCheckResponse.SERVING
        assert watch.is_active()
        watch.cancel()


def test_grpc_js_is_answered_and_loses_no_call_while_connections_are_retired(
    server: RunningServer, probabilities: np.ndarray, node: str
) -> None:
    found = saw(node, FOREIGN / "grpc_js.mjs", server.address, PROTOS)
    assert (found["ready"], found["outputs"]) == (True, OUTPUTS)
    for name in ("probabilities", "packed"):
        np.testing.assert_allclose(found[name], probabilities, atol=1e-6)
    assert found["refused"] == ["NOT_FOUND", "no model 'nobody'; there are: mlp", 1]
    assert found["streamed"] == [str(number) for number in range(50)]
    assert (found["lost"], found["retired"]) == (0, 3)


def test_kserves_client_is_answered(server: RunningServer, probabilities: np.ndarray, kserve: str) -> None:
    found = saw(kserve, FOREIGN / "kserve_client.py", server.address)
    assert (found["ready"], found["outputs"], found["answered"]) == (True, OUTPUTS, 20)
    np.testing.assert_allclose(found["probabilities"], probabilities, atol=1e-6)
    assert "no model 'nobody'" in found["refused"]


@pytest.mark.parametrize(
    ("front", "codes"),
    [("h2", ["UNAVAILABLE"]), ("grpc", ["UNAVAILABLE", "CANCELLED"])],  # grpc.aio cancels what comes as it stops
)
def test_a_client_that_may_try_again_loses_no_call_while_the_server_is_replaced(
    root: Path, front: str, codes: list[str]
) -> None:
    again = {"name": [{}], "waitForReady": True, "retryPolicy": RETRY | {"retryableStatusCodes": codes}}
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 11_000),
        ("grpc.service_config", json.dumps({"methodConfig": [again]})),
    ]
    replaced = Event()
    server = Server(root, front)  # a process of its own: what it leaves undone ends with it
    with grpc.insecure_channel(server.address, options) as channel, ThreadPoolExecutor() as pool:
        call = channel.unary_unary(INFER)

        def calls() -> None:
            while not replaced.is_set():
                call(infer(), timeout=SECONDS)

        try:
            callers = [pool.submit(calls) for _ in range(4)]
            call(infer(), timeout=SECONDS)
            server.stop()
            server = Server(root, front, server.port)
            replaced.set()
            for caller in callers:
                caller.result()
        finally:
            replaced.set()
            server.stop()


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> str:
    """Node.js, where it has grpc-js; what needs it is skipped otherwise, unless --need-node."""
    found = shutil.which("node")
    if found and (FOREIGN / "node_modules" / "@grpc" / "grpc-js").is_dir():
        return found
    lacking = f"no Node.js with grpc-js: install nodejs and npm, then `npm ci --ignore-scripts --prefix {FOREIGN}`"
    if request.config.getoption("--need-node"):
        pytest.fail(lacking)
    pytest.skip(lacking)


@pytest.fixture(scope="module")
def kserve(request: pytest.FixtureRequest) -> str:
    python: str | None = request.config.getoption("--kserve")
    return python or pytest.skip("no Python that has KServe's client was named: see --kserve")
