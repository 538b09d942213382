"""Spans of inferences, as a collector gets them over the wire."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from calserve.open_inference import messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector

from service.app import App
from service.client import AsyncClient, Client
from service.errors import InvalidRequest, Refused
from service.rpc.wire import INFERENCE_SERVICE, Stub
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X, _, _ = models.labelled_rows(200, seed=0)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(grpc.GenericRpcHandler):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self._server = grpc.server(ThreadPoolExecutor(2), handlers=[self])
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        assert details.method == "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
        return grpc.unary_unary_rpc_method_handler(
            self._take,
            collector.ExportTraceServiceRequest.FromString,
            collector.ExportTraceServiceResponse.SerializeToString,
        )

    def _take(self, request: Any, _: grpc.ServicerContext) -> Any:
        for part in request.resource_spans:
            self.services |= {a.value.string_value for a in part.resource.attributes if a.key == "service.name"}
            self.spans += [span for scope in part.scope_spans for span in scope.spans]
        return collector.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def roots(self) -> list[Any]:
        return [span for span in self.spans if span.name.startswith("inference.")]

    def inside(self, root: Any) -> dict[str, Any]:
        return {span.name: span for span in self.spans if span.parent_span_id == root.span_id}


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture
def traced(root: Path) -> Iterator[Callable[[Callable[[RunningServer], object]], Collector]]:
    """Runs something against a server that is traced; what the collector has when the server has stopped."""
    taking = Collector()

    def run(work: Callable[[RunningServer], object]) -> Collector:
        server = RunningServer(settings_for(root, traces_endpoint=taking.endpoint))
        try:
            work(server)
        finally:
            server.stop()
        return taking

    yield run
    taking.stop()


Traced = Callable[[Callable[[RunningServer], object]], Collector]


def infer(server: RunningServer, *metadata: tuple[str, str]) -> None:
    request = messages.ModelInferRequest(model_name="mlp", raw_input_contents=[X[:2].tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[2, 6])
    with grpc.insecure_channel(server.address) as channel:
        Stub(channel, INFERENCE_SERVICE).ModelInfer(request, metadata=metadata)


def test_a_callers_span_is_the_parent_of_one_with_queue_run_and_journal_in_it(traced: Traced) -> None:
    taken = traced(lambda server: infer(server, ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "a=b")))
    (root,) = taken.roots()
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.trace_state) == (TRACE, PARENT, "a=b")
    assert root.kind == 2  # a server's
    said = attributes(root)
    assert said["rpc.method"] == "ModelInfer"
    assert (said["rpc.system"], said["rpc.grpc.status_code"]) == ("grpc", 0)
    assert (said["calserve.model"], said["calserve.rows"], said["calserve.revision"]) == ("mlp", 2, "none")
    inside = taken.inside(root)
    assert set(inside) == {"queue", "run", "journal"}
    assert attributes(inside["run"]) == {"calserve.batch_rows": 2, "calserve.provider": "CPUExecutionProvider"}
    order = [inside[name] for name in ("queue", "run", "journal")]
    times = [time for span in order for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    assert root.start_time_unix_nano == times[0] and times[-1] <= root.end_time_unix_nano
    assert taken.services == {"calserve"}


def test_a_caller_who_does_not_trace_is_not_traced(traced: Traced) -> None:
    taken = traced(lambda server: infer(server, ("traceparent", f"00-{TRACE}-{PARENT}-00")))
    assert taken.spans == []


def test_without_a_parent_or_with_a_broken_one_a_trace_begins(traced: Traced) -> None:
    def work(server: RunningServer) -> None:
        infer(server)
        infer(server, ("traceparent", "nonsense"))

    first, second = traced(work).roots()
    assert first.parent_span_id == second.parent_span_id == b""
    assert len({first.trace_id, second.trace_id}) == 2


def test_every_request_of_a_stream_has_its_span_and_so_has_one_of_many_rows(traced: Traced) -> None:
    async def stream(server: RunningServer) -> None:
        async with AsyncClient(server.address, show_progress=False) as client, client.stream("mlp") as stream:
            await asyncio.gather(*(stream.predict(X[:1], segment="ios") for _ in range(3)))
            await client.predict("mlp", X)

    taken = traced(lambda server: asyncio.run(stream(server)))
    said = [attributes(root) for root in taken.roots()]
    assert sorted(one["calserve.rows"] for one in said) == [1, 1, 1, 200]
    assert [one["rpc.method"] for one in said].count("ModelStreamInfer") == 3
    assert [one.get("calserve.segment") for one in said].count("ios") == 3
    assert all(set(taken.inside(root)) == {"queue", "run", "journal"} for root in taken.roots())


def test_a_refused_request_says_why_and_is_an_error_only_if_the_server_is_at_fault(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(server: RunningServer) -> None:
        with Client(server.address, show_progress=False) as client:
            for rows in (np.ones((1, 5), np.float32), np.full((1, 6), np.nan, np.float32)):
                with pytest.raises(InvalidRequest):
                    client.predict("mlp", rows)
            monkeypatch.setattr("service.rpc.infer_response.Encoder.encode", lambda *_, **__: 1 / 0)
            with pytest.raises(Exception, match=r"INTERNAL|internal"):
                client.predict("mlp", X[:1])

    taken = traced(work)
    codes = [attributes(root)["rpc.grpc.status_code"] for root in taken.roots()]
    assert codes == [3, 3, 13]
    assert [root.status.code for root in taken.roots()] == [0, 0, 2]
    assert "division" not in taken.roots()[2].status.message


def test_without_the_extra_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(Refused, match=r"pip install 'calserve\[tracing\]'"):
        App(settings_for(tmp_path, traces_endpoint="http://127.0.0.1:4317"))


def test_an_endpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="must begin with http:// or https://, got 'localhost:4317'"):
        App(settings_for(tmp_path, traces_endpoint="localhost:4317"))
