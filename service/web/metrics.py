"""What Prometheus reads. Label values are the server's own names, never a caller's words: their number is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
ModelInfo = tuple[str, str, str, str]
"""(model, version, active revision, provider)"""


class Metrics:
    """Counters of calls, and the state of the models read when somebody asks."""

    def __init__(self, models: Callable[[], Iterable[ModelInfo]], ready: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "grpc_server_handled",
            "Calls answered, by method and gRPC code.",
            ["grpc_method", "grpc_code"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time to answer a call.",
            ["grpc_method"],
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_State(models, ready))

    def record_call(self, path: str, code: str, seconds: float) -> None:
        method = path.rpartition("/")[2]
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class _State(Collector):
    def __init__(self, models: Callable[[], Iterable[ModelInfo]], ready: Callable[[], bool]) -> None:
        self._models, self._ready = models, ready

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("calserve_ready", "1 when every configured model serves.", value=float(self._ready()))
        active = GaugeMetricFamily(
            "calserve_active_revision_info",
            "1 for the revision that computes a model's probabilities now; 'none' is the model's own.",
            labels=["model", "version", "revision", "provider"],
        )
        for labels in self._models():
            active.add_metric(list(labels), 1.0)
        yield active
