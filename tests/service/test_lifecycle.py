"""Start, drain and end of a server, as a process that gets signals."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from calserve.open_inference import messages
from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import resources_pb2 as resources
from grpc_health.v1 import health_pb2
from onnx import TensorProto, helper

from service import lifecycle
from service.errors import Refused
from service.learning.operations import Operation
from service.rpc import tokens
from service.settings import Settings
from service.store.catalogue import OperationRow
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_access import CALIBRATORS, INFER, STREAM_INFER

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
HEALTH = "/grpc.health.v1.Health"
LONG, ENDLESS = 400_000, 2**40
"""Turns of the model `slow`: about two seconds, and for ever."""
SOON = 5.0
"""Seconds, on a busy machine too: a drain that waits until its time is over takes 30."""


def slow(least: int = 2000) -> onnx.ModelProto:
    """x FP32 [1] -> y FP64 [1]: turns round 2000 + x times, so that even its shortest run is one for a thread."""
    body = helper.make_graph(
        [helper.make_node("Add", ["y", "one"], ["next"]), helper.make_node("Identity", ["go_on"], ["still"])],
        "turn",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.DOUBLE, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.DOUBLE, [1]),
        ],
    )
    nodes = [
        helper.make_node("Cast", ["x"], ["more"], to=TensorProto.INT64),
        helper.make_node("Add", ["more", "some"], ["turns"]),
        helper.make_node("Loop", ["turns", "", "zero"], ["y"], body=body),
    ]
    constants = {"one": np.ones(1), "zero": np.zeros(1), "some": np.array([least])}
    return models.model(nodes, [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.DOUBLE, [1])], constants)


def turns(n: int, id_: str = "") -> bytes:
    request = messages.ModelInferRequest(model_name="slow", id=id_)
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    request.raw_input_contents.append(np.array([n], np.float32).tobytes())
    return request.SerializeToString()


class Process:
    """`calserve serve` as its operator starts it."""

    def __init__(self, root: Path, *arguments: str, port: int = 0, **environment: str) -> None:
        command = [sys.executable, "-m", "service", "serve", "--model-repository", str(root), "--device", "cpu"]
        command += ["--threads", "1", "--port", str(port), "--metrics-port", "0", *arguments]
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, cwd=Path(__file__).parents[2]
        )
        self.port, self.lines = port, list[str]()

    def wait_until_ready(self) -> None:
        for line in self._process.stderr or ():
            self.lines.append(line)
            found = re.search(r"gRPC on 127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                return
        pytest.fail("".join(self.lines))

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)])

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """The exit code, when it has ended."""
        self.lines += (self._process.communicate(timeout=60)[1] or "").splitlines(keepends=True)
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        if self._process.stderr and not self._process.stderr.closed:
            self._process.communicate()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers on a repository with the models `mlp` and `slow`."""
    models.write(tmp_path / "models", "mlp", models.classifier())
    models.write(tmp_path / "models", "slow", slow())
    started: list[Process] = []

    def start(*arguments: str, wait: bool = True, port: int = 0, **environment: str) -> Process:
        started.append(Process(tmp_path / "models", *arguments, port=port, **environment))
        if wait:
            started[-1].wait_until_ready()
        return started[-1]

    yield start
    for process in started:
        process.kill()


def watch(channel: grpc.Channel) -> Iterator[int]:
    call = channel.unary_stream(f"{HEALTH}/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString)
    return (answer.status for answer in call(health_pb2.HealthCheckRequest(service="ready").SerializeToString()))


def begin(channel: grpc.Channel, n: int) -> grpc.Future:
    """A call of the model `slow` that the server has: it answers what the same connection asks afterwards."""
    call = channel.unary_unary(INFER).future(turns(n))
    channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"")
    return call


def test_a_drain_says_so_at_once_finishes_what_runs_and_ends_with_zero(start: Start) -> None:
    process = start()
    with process.channel() as channel, ThreadPoolExecutor() as pool:
        statuses = watch(channel)
        assert next(statuses) == SERVING
        to_send: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        stream = channel.stream_stream(STREAM_INFER)(iter(to_send.get, b""))
        to_send.put(turns(1, "first"))
        next(stream)
        call = begin(channel, LONG)
        ended = pool.submit(lambda: (call.code(), time.monotonic()))
        for number in range(5):
            to_send.put(turns(1, str(number)))
        process.send(signal.SIGTERM)
        assert list(statuses) == [NOT_SERVING]
        assert not call.done()
        answers = [messages.ModelStreamInferResponse.FromString(answer) for answer in stream]
        code, over = ended.result(timeout=60)
        assert process.end() == 0
        assert time.monotonic() - over < SOON
        to_send.put(b"")
    assert code == grpc.StatusCode.OK
    assert [(answer.infer_response.id, answer.error_message) for answer in answers] == [(str(n), "") for n in range(5)]
    assert stream.code() == grpc.StatusCode.OK


def test_while_it_drains_new_calls_are_unavailable_at_once(start: Start) -> None:
    process = start()
    with process.channel() as channel, process.channel() as other:
        other.unary_unary(INFER)(turns(1))
        statuses = watch(channel)
        next(statuses)
        running = begin(channel, ENDLESS)
        process.send(signal.SIGTERM)
        assert list(statuses) == [NOT_SERVING]
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            other.unary_unary(INFER)(turns(1))
        assert caught.value.code() == UNAVAILABLE
        assert time.monotonic() - begun < SOON
        assert not running.done()


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(start: Start, second: int, code: int) -> None:
    process = start()
    with process.channel() as channel:
        statuses = watch(channel)
        next(statuses)
        begin(channel, ENDLESS)
        process.send(signal.SIGTERM)
        assert list(statuses) == [NOT_SERVING]
        begun = time.monotonic()
        process.send(second)
        assert process.end() == code
    assert time.monotonic() - begun < SOON


def test_calls_that_outlast_the_drain_are_cut(start: Start) -> None:
    process = start("--drain-seconds", "1")
    with process.channel() as channel:
        statuses = watch(channel)
        next(statuses)
        call = begin(channel, ENDLESS)
        process.send(signal.SIGTERM)
        assert list(statuses) == [NOT_SERVING]
        begun = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - begun < 1 + SOON
        assert call.code() in {UNAVAILABLE, grpc.StatusCode.CANCELLED}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_signal_while_models_load_ends_it_with_zero(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "stuck" / "1").mkdir(parents=True)
    os.mkfifo(tmp_path / "models" / "stuck" / "1" / "model.onnx")  # to read it is to wait for ever
    process = start(wait=False, port=free_port())
    with process.channel() as channel:
        check = channel.unary_unary(f"{HEALTH}/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString)
        for service, status in (("", SERVING), ("ready", NOT_SERVING)):
            request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            assert check(request, timeout=60, wait_for_ready=True).status == status
    process.send(signal.SIGTERM)
    assert process.end() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_is_told_of_readiness_after_the_models_are_warm_and_of_the_stop(
    start: Start, tmp_path: Path, workers: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        arguments = ("--workers", workers)
        process = start(*arguments, wait=False, NOTIFY_SOCKET=str(tmp_path / "notify"), port=free_port())
        assert systemd.recv(100) == b"READY=1"
        with process.channel() as channel:
            channel.unary_unary(INFER)(turns(1))
        process.send(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"
    assert process.end() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemds_watchdog_is_told_that_the_loop_turns_until_the_end(
    start: Start, tmp_path: Path, workers: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "50000"}
        process = start("--workers", workers, wait=False, port=free_port(), **environment)
        told = iter(lambda: systemd.recv(100), b"")
        for awaited in (b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"):
            assert awaited in told
        process.send(signal.SIGTERM)
        assert b"STOPPING=1" in told
    assert process.end() == 0


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
def test_a_watchdog_that_was_not_asked_for_or_is_another_processs_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    told: list[str] = []
    monkeypatch.setattr(lifecycle, "notify", told.append)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asyncio.run(lifecycle.keep_watchdog())
    assert not told


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_calls_the_shipped_unit_safe() -> None:
    unit = Path(__file__).parents[2] / "deploy" / "calserve.service"
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]  # an exposure of 2.0
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_hangup_reads_the_tokens_again_and_ends_nothing(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    tokens.add(file, "first", ["infer"], ["*"], None)
    process = start("--token-file", str(file))
    process.send(signal.SIGHUP)
    process.send(signal.SIGTERM)
    assert process.end() == 0
    assert any("token file read again: 1 tokens" in line for line in process.lines)


@pytest.fixture
def collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class Knot:
    """Refers to itself, so that counting references never frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("collector")
def test_the_collector_passes_over_what_was_imported_and_still_frees_what_refers_to_itself() -> None:
    lifecycle.spare_collections()
    assert gc.get_freeze_count() > 10_000
    assert not gc.get_objects(generation=2)
    first = weakref.ref(Knot())
    kept: list[list[int]] = []
    while first() is not None and len(kept) < 2 * lifecycle.COLLECT_AFTER[0]:
        kept.append([])
    assert first() is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", "127.0.0.1.example.org"])  # noqa: S104
def test_an_address_that_others_reach_is_refused_without_tls_and_tokens(host: str) -> None:
    for files in ({}, {"token_file": Path("t")}, {"tls_cert": Path("c"), "tls_key": Path("k")}):
        with pytest.raises(Refused, match=f"host '{host}' can be reached from other machines"):
            Settings(Path("models"), host=host, **files)


def test_it_is_taken_with_tls_and_tokens_or_where_insecure_says_so() -> None:
    files = {"tls_cert": Path("c"), "tls_key": Path("k"), "token_file": Path("t")}
    assert Settings(Path("models"), host="0.0.0.0", **files).metrics_host == "127.0.0.1"  # noqa: S104
    assert Settings(Path("models"), host="0.0.0.0", insecure=True).metrics_host == "127.0.0.1"  # noqa: S104


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_an_address_of_this_machine_alone_needs_neither(host: str) -> None:
    assert Settings(Path("models"), host=host).host == host


@pytest.mark.parametrize(("text", "insecure"), [("true", True), ("1", True), ("False", False), ("0", False)])
def test_a_flag_may_come_from_the_environment(text: str, insecure: bool) -> None:
    flags = {"model_repository": Path("models"), "host": "0.0.0.0", **({} if insecure else {"host": "::1"})}  # noqa: S104
    assert Settings.from_sources(flags, {"CALSERVE_INSECURE": text}).insecure == insecure


def test_a_flag_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(Refused, match="setting insecure must be true or false, got 'maybe'"):
        Settings.from_sources({"model_repository": Path("models")}, {"CALSERVE_INSECURE": "maybe"})


def test_what_keeps_it_from_starting_is_one_line_and_an_exit_code(start: Start) -> None:
    start()
    refusals = {
        "reached from other machines": start("--host", "0.0.0.0", wait=False),  # noqa: S104
        "another calserve server holds this data directory": start(wait=False),
    }
    codes = {text: process.end() for text, process in refusals.items()}
    assert codes == dict.fromkeys(refusals, 2)
    for text, process in refusals.items():
        (told,) = (line for line in process.lines if line.startswith("calserve:"))
        assert text in told
        assert "Traceback" not in "".join(process.lines)


def test_a_token_file_that_is_not_there_keeps_it_from_starting(root: Path) -> None:
    with pytest.raises(Refused, match=r"token file .* cannot be read: No such file"):
        RunningServer(settings_for(root, token_file=root / "missing"))


def test_a_damaged_store_is_refused_with_code_three_and_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models.calserve").mkdir()
    (tmp_path / "models.calserve" / "catalogue.sqlite").write_bytes(b"not a database" * 1000)
    process = start(wait=False)
    assert process.end() == 3
    assert "calserve: the catalogue catalogue.sqlite cannot be read" in process.lines[-1]


def test_during_the_drains_delay_calls_are_still_answered(root: Path) -> None:
    server = RunningServer(settings_for(root, drain_delay_seconds=1.0))
    with grpc.insecure_channel(server.address) as channel:
        statuses = watch(channel)
        next(statuses)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert list(statuses) == [NOT_SERVING]
        request = messages.ModelMetadataRequest(name="mlp").SerializeToString()
        assert channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(request)
        stopping.join()
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(request)


def test_an_upload_that_a_drain_meets_is_taken_whole(server: RunningServer) -> None:
    _, logits, labels = models.labelled_rows(100, seed=1)
    rows = resources.Rows()
    for name, values in (("logits", logits), ("labels", labels)):
        field = getattr(rows, name)
        field.datatype, field.data = {"f": "FP32", "i": "INT64"}[values.dtype.kind], values.tobytes()
        field.shape.extend(values.shape)
    spec = pb.FitCalibratorRequest.Spec(model="mlp", kind="temperature")
    to_send: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.insecure_channel(server.address) as channel:
        statuses = watch(channel)
        next(statuses)
        fit = channel.stream_unary(f"{CALIBRATORS}/FitCalibrator").future(iter(to_send.get, b""))
        to_send.put(pb.FitCalibratorRequest(spec=spec).SerializeToString())
        to_send.put(pb.FitCalibratorRequest(rows=rows).SerializeToString())
        streams = server.app._streams._open
        assert wait_for(lambda: any(stream._messages == 2 for stream in list(streams)))
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert list(statuses) == [NOT_SERVING]
        assert wait_for(lambda: server.app._health.draining)  # the streams that are ended, are
        to_send.put(pb.FitCalibratorRequest(rows=rows).SerializeToString())
        to_send.put(b"")
        operation = resources.Operation.FromString(fit.result(timeout=60))
        stopping.join()
    assert operation.description == "fit temperature on 200 rows"


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if condition():
            return True
    return False


def test_who_waits_for_an_operation_is_told_its_state_when_the_server_drains(server: RunningServer) -> None:
    row = OperationRow("op-long", "fit", "mlp", "fit platt", "running", time.time())
    server.app._operations._operations["op-long"] = Operation(row)
    with grpc.insecure_channel(server.address) as channel:
        statuses = watch(channel)
        next(statuses)
        waiting = channel.unary_unary(f"{CALIBRATORS}/WaitOperation").future(
            pb.WaitOperationRequest(operation="op-long").SerializeToString()
        )
        assert wait_for(lambda: len(server.app._operations._changed._waiters) == 1)
        server.stop()
        assert resources.Operation.FromString(waiting.result(timeout=1)).state == resources.Operation.STATE_RUNNING
