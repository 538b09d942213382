"""Long-running operations: watched, cancelled, bounded, and not lost when the server dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import resources_pb2 as resources

from service import errors
from service.client import Client
from service.learning import operations
from service.rpc.wire import CALIBRATOR_SERVICE, Stub
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

_, LOGITS, LABELS = models.labelled_rows(2000, seed=1)
STUCK = "tests.service.stuck_worker"


@pytest.fixture
def stub(server: RunningServer):  # type: ignore[no-untyped-def]
    with grpc.insecure_channel(server.address) as channel:
        yield Stub(channel, CALIBRATOR_SERVICE)


def array(values: np.ndarray) -> resources.Array:
    word = {"float64": "FP64", "float32": "FP32", "int64": "INT64"}[values.dtype.name]
    return resources.Array(datatype=word, shape=values.shape, data=values.tobytes())


def fit_requests(n: int = 2000) -> list[pb.FitCalibratorRequest]:
    rows = resources.Rows(logits=array(LOGITS[:n]), labels=array(LABELS[:n]))
    spec = pb.FitCalibratorRequest.Spec(model="mlp", kind="temperature")
    return [pb.FitCalibratorRequest(spec=spec), pb.FitCalibratorRequest(rows=rows)]


def test_a_fit_is_acknowledged_when_its_rows_are_here_and_can_be_waited_for(stub: Stub) -> None:
    operation = stub.FitCalibrator(iter(fit_requests()))
    assert operation.state == resources.Operation.STATE_RUNNING
    done = stub.WaitOperation(pb.WaitOperationRequest(operation=operation.operation))
    assert done.state == resources.Operation.STATE_SUCCEEDED
    assert done.revision.revision == "temperature-1"
    assert stub.GetOperation(pb.GetOperationRequest(operation=operation.operation)) == done
    assert [o.operation for o in stub.ListOperations(pb.ListOperationsRequest()).operations] == [operation.operation]


def test_waiting_ends_with_its_timeout_and_reports_progress_on_the_way(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "WORKER", STUCK)
    operation = stub.FitCalibrator(iter(fit_requests()))
    request = pb.WaitOperationRequest(operation=operation.operation, until_progress_above=0.2)
    progressed = stub.WaitOperation(request)
    assert (progressed.progress, progressed.stage) == (0.25, "stuck")
    request = pb.WaitOperationRequest(operation=operation.operation)
    request.timeout.FromMilliseconds(50)
    assert stub.WaitOperation(request).state == resources.Operation.STATE_RUNNING
    stub.CancelOperation(pb.CancelOperationRequest(operation=operation.operation))


def test_a_cancelled_operation_ends_at_once_and_leaves_no_process_and_no_rows(
    server: RunningServer, stub: Stub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "WORKER", STUCK)
    operation = stub.FitCalibrator(iter(fit_requests()))
    stub.WaitOperation(pb.WaitOperationRequest(operation=operation.operation, until_progress_above=0.2))
    folder = root.parent / "models.calserve" / "jobs" / operation.operation
    pid = int((folder / "pid").read_text())
    cancelled = stub.CancelOperation(pb.CancelOperationRequest(operation=operation.operation))
    assert cancelled.state == resources.Operation.STATE_CANCELLED
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert stub.CancelOperation(pb.CancelOperationRequest(operation=operation.operation)) == cancelled


def test_a_fit_that_takes_too_long_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "WORKER", STUCK)
    server = RunningServer(settings_for(root, fit_seconds=0.5))
    with (
        Client(server.address, show_progress=False) as client,
        pytest.raises(errors.Refused, match="not done after") as caught,
    ):
        client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    server.stop()
    assert caught.value.detail_reason == "TOO_SLOW"


def test_a_worker_that_dies_is_a_failed_operation(root: Path) -> None:
    server = RunningServer(settings_for(root, fit_memory_bytes=1 << 26))
    with Client(server.address, show_progress=False) as client, pytest.raises(errors.Refused):
        client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    server.stop()


def test_too_many_operations_are_refused_with_a_time_to_retry(
    server: RunningServer, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "WORKER", STUCK)
    begun = [stub.FitCalibrator(iter(fit_requests(50))) for _ in range(operations.Limits().waiting)]
    with pytest.raises(grpc.RpcError) as caught:
        stub.FitCalibrator(iter(fit_requests(50)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for operation in begun:
        stub.CancelOperation(pb.CancelOperationRequest(operation=operation.operation))


def test_a_stream_cut_short_leaves_no_rows_behind(root: Path, server: RunningServer, stub: Stub) -> None:
    """Ended by the client after its rows: the server removes them when it learns of it, at the latest when it stops."""
    sent, ended = threading.Event(), threading.Event()

    def requests() -> Iterator[pb.FitCalibratorRequest]:
        yield from fit_requests()
        sent.set()
        ended.wait(10)

    call = stub.FitCalibrator.future(requests())
    assert sent.wait(10)
    call.cancel()
    ended.set()
    done = stub.FitCalibrator(iter(fit_requests()))
    stub.WaitOperation(pb.WaitOperationRequest(operation=done.operation))
    server.stop()
    assert not list((root.parent / "models.calserve" / "jobs").iterdir())


@pytest.mark.parametrize(
    ("requests", "text"),
    [
        ([], "first message"),
        (fit_requests()[1:], "first message"),
        (fit_requests()[:1], "no rows"),
        (fit_requests()[:1] * 2, "only the first message"),
        ([fit_requests()[0], pb.FitCalibratorRequest(rows=resources.Rows())], "either logits or the model's inputs"),
    ],
)
def test_a_stream_in_the_wrong_order_is_refused(stub: Stub, requests: list[pb.FitCalibratorRequest], text: str) -> None:
    with pytest.raises(grpc.RpcError, match=text) as caught:
        stub.FitCalibrator(iter(requests))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def serve_in_a_process(root: Path, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """`python -m service serve` as its user starts it; the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--model-repository", str(root), "--port", "0", "--metrics-port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "gRPC on " in line:
            return process, line.partition("gRPC on ")[2].split(",")[0]
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("attempt", range(3))
def test_an_acknowledged_fit_and_activation_survive_kill_9(root: Path, attempt: int) -> None:
    """Killed while the fit runs: after the restart the fit is taken up again, and what was active is active."""
    process, address = serve_in_a_process(root)
    with grpc.insecure_channel(address) as channel:
        stub = Stub(channel, CALIBRATOR_SERVICE)
        first = stub.FitCalibrator(iter(fit_requests()))
        stub.WaitOperation(pb.WaitOperationRequest(operation=first.operation))
        stub.ActivateRevision(pb.ActivateRevisionRequest(model="mlp", revision="temperature-1"))
        second = stub.FitCalibrator(iter(fit_requests(1000)))
        if attempt:
            stub.WaitOperation(pb.WaitOperationRequest(operation=second.operation, until_progress_above=0.1 * attempt))
        process.send_signal(signal.SIGKILL)
        process.wait()
    process.stderr.close()  # type: ignore[union-attr]

    server = RunningServer(settings_for(root))
    with grpc.insecure_channel(server.address) as channel:
        stub = Stub(channel, CALIBRATOR_SERVICE)
        done = stub.WaitOperation(pb.WaitOperationRequest(operation=second.operation))
        assert done.state == resources.Operation.STATE_SUCCEEDED
        revisions = stub.ListRevisions(pb.ListRevisionsRequest(model="mlp")).revisions
        assert [(r.revision, r.active) for r in revisions] == [("temperature-2", False), ("temperature-1", True)]
    server.stop()


def test_sigterm_drains_and_exits_with_0(root: Path) -> None:
    process, address = serve_in_a_process(root)
    with grpc.insecure_channel(address) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        next(watch)  # an open stream must not hold up the stop
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    process.stderr.close()  # type: ignore[union-attr]
