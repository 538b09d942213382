"""Health, reflection, metrics: what orchestrators, grpcurl and Prometheus ask."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service import errors
from service.client import Client
from service.inference.repository import Repository
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def check(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )
        return call(health_pb2.HealthCheckRequest(service=service).SerializeToString()).status


def page(server: RunningServer, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{server.app.metrics_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("service", ["", "ready", "mlp", "mean"])
def test_process_readiness_and_every_model_have_a_health_entry(shared_server: RunningServer, service: str) -> None:
    assert check(shared_server.address, service) == SERVING


def test_the_health_of_an_unknown_service_is_not_found(shared_server: RunningServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(shared_server.address, "nobody")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_watch_tells_the_status_now_and_the_change_at_the_end(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(
            "/grpc.health.v1.Health/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )
        watch = call(health_pb2.HealthCheckRequest(service="mlp").SerializeToString())
        assert next(watch).status == SERVING
        server.stop()
        assert [answer.status for answer in watch] == [NOT_SERVING]


def test_a_server_with_a_model_that_cannot_load_serves_the_others_and_is_not_ready(root: Path) -> None:
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    server = RunningServer(settings_for(root))
    statuses = [check(server.address, service) for service in ("", "ready", "mlp", "broken")]
    with Client(server.address, show_progress=False) as client:
        with pytest.raises(errors.NotReady, match=r"'broken' is not served: .* is not an ONNX"):
            client.predict("broken", {})
        with pytest.raises(errors.NotReady, match="not every model"):
            client.wait_until_ready(1.0)
    ready, metrics = page(server, "/health/ready"), page(server, "/metrics")[1]
    server.stop()
    assert statuses == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]
    assert ready == (503, "not ready\n")
    assert "calserve_ready 0.0" in metrics


def test_while_models_load_the_server_answers_that_it_is_not_ready_and_then_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    load_all = Repository.load_all

    def held_up(repository: Repository) -> None:
        loading.set()
        go_on.wait(30)
        load_all(repository)

    monkeypatch.setattr(Repository, "load_all", held_up)
    server = RunningServer(settings_for(root), wait=False)
    assert loading.wait(30)
    with Client(server.address, show_progress=False) as client:
        assert (check(server.address, ""), check(server.address, "ready")) == (SERVING, NOT_SERVING)
        with pytest.raises(errors.NotReady, match="loading its models"):
            client.predict("mlp", {"x": models.labelled_rows(1, 0)[0]})
        with pytest.raises(errors.NotReady, match="not every model is served"):
            client.wait_until_ready(1.0)
        go_on.set()
        client.wait_until_ready()
        assert client.predict("mlp", {"x": models.labelled_rows(1, 0)[0]}).probabilities.shape == (1, 4)
    server.stop()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services_and_gives_files_that_build(shared_server: RunningServer, version: str) -> None:
    def ask(*requests: reflection_pb2.ServerReflectionRequest) -> list[reflection_pb2.ServerReflectionResponse]:
        with grpc.insecure_channel(shared_server.address) as channel:
            call = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            return list(call(iter(request.SerializeToString() for request in requests)))

    (listed,) = ask(reflection_pb2.ServerReflectionRequest(list_services="*"))
    services = [service.name for service in listed.list_services_response.service]
    assert {"inference.GRPCInferenceService", "calserve.v1.CalibratorService", "grpc.health.v1.Health"} <= set(services)
    answers = ask(*(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in services))
    for name, answer in zip(services, answers, strict=True):
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(file)
            for file in answer.file_descriptor_response.file_descriptor_proto
        ]
        offered = {f"{file.package}.{service.name}" for file in files for service in file.service}
        assert name in offered, answer
        assert {imported for file in files for imported in file.dependency} <= {file.name for file in files}
    (unknown,) = ask(reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"))
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_metrics_count_calls_by_code_and_name_the_active_revision(shared_server: RunningServer) -> None:
    with Client(shared_server.address, show_progress=False) as client, pytest.raises(errors.NotFound):
        client.predict("nobody", {"x": models.labelled_rows(1, 0)[0]})
    status, text = page(shared_server, "/metrics")
    assert status == 200
    assert 'grpc_server_handled_total{grpc_code="NOT_FOUND",grpc_method="ModelInfer"}' in text
    assert (
        'calserve_active_revision_info{model="mlp",provider="CPUExecutionProvider",revision="none",version="1"} 1.0'
        in text
    )
    assert "nobody" not in text


def test_metrics_tell_rows_runs_and_what_was_not_run(server: RunningServer, client: Client) -> None:
    client.predict("mlp", {"x": models.labelled_rows(3, 0)[0]})
    text = page(server, "/metrics")[1]
    assert 'calserve_rows_total{model="mlp",version="1"} 3.0' in text
    assert 'calserve_runs_total{model="mlp",version="1"} 1.0' in text
    assert 'calserve_queued_requests{model="mlp",version="1"} 0.0' in text


def test_http_answers_liveness_readiness_and_nothing_else(shared_server: RunningServer) -> None:
    assert page(shared_server, "/health/live") == (200, "live\n")
    assert page(shared_server, "/health/ready") == (200, "ready\n")
    assert page(shared_server, "/etc/passwd")[0] == 404


def test_a_port_that_is_taken_is_a_clear_error(server: RunningServer, root: Path, tmp_path: Path) -> None:
    taken = settings_for(root, data_dir=tmp_path / "other")
    with pytest.raises(errors.NotReady, match="is another server running there"):
        RunningServer(type(taken)(**{**vars(taken), "port": server.app.port}))
