"""Spans of OpenTelemetry: one a request for inference, and inside it what it waited, its run, its way to the journal.

Off unless a collector is named. A caller's `traceparent` makes its span the parent, and its flag says whether the
request is traced at all; without one every request is (the SDK's variable OTEL_TRACES_SAMPLER says otherwise). Spans
are made after the answer, from times that are taken then, and sent by the SDK's own thread, which drops what the
collector does not take.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service import __version__
from service.errors import Refused
from service.inference.batcher import Run
from service.rpc.methods import Call
from service.rpc.status import status_of

if TYPE_CHECKING:
    from service.rpc.infer_plan import Plan

HEADERS = ("traceparent", "tracestate")
CLOSE_MS = 2000
"""How long a drain waits for the collector to take the last spans."""
SERVERS_FAULT = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
"""Codes that make a span an error, by OpenTelemetry's conventions for servers."""


class Tracing:
    """Makes the spans. Refused if OpenTelemetry is not installed, or `endpoint` is no address of a collector."""

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise Refused(f"traces_endpoint must begin with http:// or https://, got {endpoint!r}")
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise Refused("traces_endpoint needs OpenTelemetry: pip install 'calserve[tracing]'") from error
        self._api, self._propagator = trace, TraceContextTextMapPropagator()
        name = os.environ.get("OTEL_SERVICE_NAME", "calserve")
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("calserve", __version__)

    def close(self) -> None:
        """Send what waits, for a moment."""
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()

    def answered(self, method: str, call: Call, begun_ns: int, plan: Plan, run: Run, kept_ns: tuple[int, int]) -> None:
        """A request that was answered: `kept_ns` is when its way to the journal began and ended."""
        to_epoch = time.time_ns() - time.perf_counter_ns()
        span = self._begun(method, call, to_epoch + begun_ns, plan)
        if span.is_recording():
            span.set_attributes({"calserve.revision": run.snapshot.revision, "rpc.grpc.status_code": 0})
            inside = self._api.set_span_in_context(span)
            rows = {} if run.rows is None else {"calserve.batch_rows": run.rows}
            self._inside("queue", inside, to_epoch, (begun_ns, run.times_ns[0]), {})
            provider = {"calserve.provider": run.snapshot.session.provider}
            self._inside("run", inside, to_epoch, run.times_ns, rows | provider)
            if plan.journal is not None:
                self._inside("journal", inside, to_epoch, kept_ns, {})
        span.end(time.time_ns())

    def refused(self, method: str, call: Call, begun_ns: int, error: Exception, plan: Plan | None = None) -> None:
        """A request that was answered with an error."""
        span = self._begun(method, call, time.time_ns() - time.perf_counter_ns() + begun_ns, plan)
        if span.is_recording():
            status = status_of(error, call.id)
            span.set_attribute("rpc.grpc.status_code", status.code.value[0])
            if status.code.name in SERVERS_FAULT:
                span.set_status(self._api.StatusCode.ERROR, status.message)
        span.end(time.time_ns())

    def _begun(self, method: str, call: Call, start_ns: int, plan: Plan | None) -> Any:
        headers = {key: str(value) for key, value in call.metadata() if key in HEADERS}
        attributes: dict[str, Any] = {
            "rpc.system": "grpc",
            "rpc.service": "inference.GRPCInferenceService",
            "rpc.method": method,
        }
        if plan is not None:
            attributes |= {"calserve.model": plan.model.name, "calserve.model_version": plan.model.version}
            attributes |= {"calserve.rows": plan.rows} | ({"calserve.segment": plan.segment} if plan.segment else {})
        return self._tracer.start_span(
            f"inference.GRPCInferenceService/{method}",
            self._propagator.extract(headers),
            self._api.SpanKind.SERVER,
            attributes,
            start_time=start_ns,
        )

    def _inside(
        self, name: str, context: Any, to_epoch: int, times_ns: tuple[int, int], attributes: Mapping[str, Any]
    ) -> None:
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=to_epoch + times_ns[0])
        span.end(to_epoch + times_ns[1])
