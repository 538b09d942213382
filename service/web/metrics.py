"""What Prometheus reads. Label values are the server's own names, never a caller's words: their number is bounded."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True)
class ModelState:
    """One loaded version of a model.

    Attributes
    ----------
    queued : requests that wait for a run
    rows, runs : served and made since it was loaded
    dropped : why requests were not run -> how many
    """

    model: str
    version: str
    revision: str
    provider: str
    queued: int
    rows: int
    runs: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class JournalState:
    """The journal of predictions and labels, as this process sees it.

    Attributes
    ----------
    writable : whether it can be written; otherwise labels are refused and predictions lost
    kept, lost : rows of predictions by model; by model and why
    labels : what became of labels -> how many
    """

    writable: bool
    bytes: int
    queued_bytes: int
    commits: int
    kept: Mapping[str, int]
    lost: Mapping[tuple[str, str], int]
    labels: Mapping[str, int]


@dataclass(frozen=True)
class OnlineLearning:
    """What one revision learned online.

    Attributes
    ----------
    state : the one that serves
    suspended : whether it learns nothing now
    rows, states : by what became of them -> how many
    waiting : labels that are not learned yet
    seconds_sum, seconds_count : of the times from a label's acknowledgement to what it taught being served
    """

    model: str
    revision: str
    state: int
    suspended: bool
    rows: Mapping[str, int]
    states: Mapping[str, int]
    waiting: int
    seconds_sum: float
    seconds_count: int


@dataclass(frozen=True)
class SetCoverage:
    """How often the prediction sets of one revision held the label.

    Attributes
    ----------
    covered, missed : labels that were in the set of their row, and that were not
    recent : the share that was, of the last ones
    """

    model: str
    revision: str
    confidence_level: float
    covered: int
    missed: int
    recent: float


@dataclass(frozen=True)
class MonitorReading:
    """What a monitor says.

    Attributes
    ----------
    statistic, threshold : it rings when the first reaches the second
    rows, alarms : read and given since the start
    open : alarms that nobody has acknowledged
    """

    model: str
    monitor: str
    statistic: float
    threshold: float
    rows: int
    alarms: int
    open: int


class Metrics:
    """Counters of calls, and the state of the models read when somebody asks."""

    def __init__(
        self,
        models: Callable[[], Iterable[ModelState]],
        ready: Callable[[], bool],
        device_lost: Callable[[], bool],
        journal: Callable[[], JournalState],
        online: Callable[[], Iterable[OnlineLearning]],
        coverage: Callable[[], Iterable[SetCoverage]],
        monitors: Callable[[], Iterable[MonitorReading]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._calls: dict[str, CallCounts] = {}
        self._registry.register(_Calls(self._calls))
        self._registry.register(_Journal(journal))
        self._registry.register(_Online(online))
        self._registry.register(_Coverage(coverage))
        self._registry.register(_Monitors(monitors))
        self._registry.register(_State(models, ready, device_lost))

    def recorder(self, path: str) -> Callable[[str, float], None]:
        """What counts the calls of one method: called with code and seconds at the end of each."""
        return self._calls.setdefault(path.rpartition("/")[2], CallCounts()).record

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class CallCounts:
    """The calls of one method, by code and by duration. Counted in the event loop, so without a lock."""

    def __init__(self) -> None:
        self.by_code: Counter[str] = Counter()
        self.by_duration = [0] * (len(SECONDS_BUCKETS) + 1)
        self.seconds = 0.0

    def record(self, code: str, seconds: float) -> None:
        self.by_code[code] += 1
        self.by_duration[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self.seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and how many calls took no longer, as Prometheus writes them."""
        bounds = [*map(str, SECONDS_BUCKETS), "+Inf"]
        return list(zip(bounds, accumulate(self.by_duration), strict=True))


class _Calls(Collector):
    def __init__(self, calls: Mapping[str, CallCounts]) -> None:
        self._calls = calls

    def collect(self) -> Iterator[Metric]:
        handled = CounterMetricFamily(
            "grpc_server_handled", "Calls answered, by method and gRPC code.", labels=["grpc_method", "grpc_code"]
        )
        handling = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Time to answer a call.", labels=["grpc_method"]
        )
        for method, counts in self._calls.items():
            for code, count in list(counts.by_code.items()):  # the loop counts on meanwhile
                handled.add_metric([method, code], count)
            if counts.by_code:
                handling.add_metric([method], counts.buckets(), counts.seconds)
        yield from (handled, handling)


class _State(Collector):
    def __init__(
        self, models: Callable[[], Iterable[ModelState]], ready: Callable[[], bool], device_lost: Callable[[], bool]
    ) -> None:
        self._models, self._ready, self._device_lost = models, ready, device_lost

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("calserve_ready", "1 when every configured model serves.", value=float(self._ready()))
        yield GaugeMetricFamily(
            "calserve_device_lost", "1 once the device was lost that models ran on.", value=float(self._device_lost())
        )
        active = GaugeMetricFamily(
            "calserve_active_revision_info",
            "1 for the revision that computes a model's probabilities now; 'none' is the model's own.",
            labels=["model", "version", "revision", "provider"],
        )
        of_model = ["model", "version"]
        queued = GaugeMetricFamily("calserve_queued_requests", "Requests that wait for a run.", labels=of_model)
        rows = CounterMetricFamily("calserve_rows", "Rows answered.", labels=of_model)
        runs = CounterMetricFamily("calserve_runs", "Runs of the model: rows over runs is the batch.", labels=of_model)
        dropped = CounterMetricFamily(
            "calserve_dropped",
            "Requests not run: cancelled, too late, or the queue was full.",
            labels=[*of_model, "why"],
        )
        for state in self._models():
            name = [state.model, state.version]
            active.add_metric([*name, state.revision, state.provider], 1.0)
            queued.add_metric(name, state.queued)
            rows.add_metric(name, state.rows)
            runs.add_metric(name, state.runs)
            for why, count in list(state.dropped.items()):
                dropped.add_metric([*name, why], count)
        yield from (active, queued, rows, runs, dropped)


class _Journal(Collector):
    def __init__(self, state: Callable[[], JournalState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        for name, text, value in (
            ("store_writable", "1 while labels can be recorded and predictions kept.", float(state.writable)),
            ("journal_bytes", "What the journal takes on the disk.", state.bytes),
            ("journal_queued_bytes", "Predictions that wait to be written.", state.queued_bytes),
        ):
            yield GaugeMetricFamily(f"calserve_{name}", text, value=value)
        yield CounterMetricFamily("calserve_journal_commits", "Transactions of the journal.", value=state.commits)
        kept = CounterMetricFamily("calserve_journal_rows", "Rows of predictions kept.", labels=["model"])
        for model, rows in state.kept.items():
            kept.add_metric([model], rows)
        lost = CounterMetricFamily(
            "calserve_journal_lost_rows",
            "Rows of predictions not kept: the queue was full, or the disk failed.",
            labels=["model", "why"],
        )
        for (model, why), rows in state.lost.items():
            lost.add_metric([model, why], rows)
        labels = CounterMetricFamily("calserve_labels", "Labels that came, by what became of them.", labels=["result"])
        for result, count in state.labels.items():
            labels.add_metric([result], count)
        yield from (kept, lost, labels)


class _Coverage(Collector):
    def __init__(self, coverage: Callable[[], Iterable[SetCoverage]]) -> None:
        self._coverage = coverage

    def collect(self) -> Iterator[Metric]:
        of_revision = ["model", "revision"]
        level = GaugeMetricFamily(
            "calserve_set_confidence_level", "How often prediction sets are to hold the label.", labels=of_revision
        )
        recent = GaugeMetricFamily(
            "calserve_set_coverage", "How often they held it, of the last 500 labels.", labels=of_revision
        )
        labels = CounterMetricFamily(
            "calserve_set_labels", "Labels, by whether the prediction set held them.", labels=[*of_revision, "held"]
        )
        for one in self._coverage():
            name = [one.model, one.revision]
            level.add_metric(name, one.confidence_level)
            recent.add_metric(name, one.recent)
            labels.add_metric([*name, "yes"], one.covered)
            labels.add_metric([*name, "no"], one.missed)
        yield from (level, recent, labels)


class _Monitors(Collector):
    def __init__(self, monitors: Callable[[], Iterable[MonitorReading]]) -> None:
        self._monitors = monitors

    def collect(self) -> Iterator[Metric]:
        of_monitor = ["model", "monitor"]
        statistic = GaugeMetricFamily(
            "calserve_monitor_statistic", "It rings when this reaches its threshold.", labels=of_monitor
        )
        threshold = GaugeMetricFamily("calserve_monitor_threshold", "What a monitor rings at.", labels=of_monitor)
        rows = CounterMetricFamily("calserve_monitor_rows", "Rows that a monitor passed.", labels=of_monitor)
        alarms = CounterMetricFamily("calserve_alarms", "Alarms given.", labels=of_monitor)
        unseen = GaugeMetricFamily("calserve_alarms_open", "Alarms that nobody acknowledged.", labels=of_monitor)
        for one in self._monitors():
            name = [one.model, one.monitor]
            for family, value in (
                (statistic, one.statistic),
                (threshold, one.threshold),
                (rows, one.rows),
                (alarms, one.alarms),
                (unseen, one.open),
            ):
                family.add_metric(name, value)
        yield from (statistic, threshold, rows, alarms, unseen)


class _Online(Collector):
    def __init__(self, learning: Callable[[], Iterable[OnlineLearning]]) -> None:
        self._learning = learning

    def collect(self) -> Iterator[Metric]:
        of_revision = ["model", "revision"]
        state = GaugeMetricFamily("calserve_online_state", "The online state that serves.", labels=of_revision)
        suspended = GaugeMetricFamily(
            "calserve_online_suspended", "1 while an online revision learns nothing.", labels=of_revision
        )
        waiting = GaugeMetricFamily(
            "calserve_online_waiting_labels", "Labels that came and are not learned yet.", labels=of_revision
        )
        rows = CounterMetricFamily(
            "calserve_online_rows",
            "Rows that online learning passed, by what became of them.",
            labels=[*of_revision, "what"],
        )
        states = CounterMetricFamily(
            "calserve_online_states",
            "Online states learned: published, or refused because they do harm.",
            labels=[*of_revision, "what"],
        )
        seconds = SummaryMetricFamily(
            "calserve_online_seconds", "From a label acknowledged to what it taught served.", labels=of_revision
        )
        for one in self._learning():
            name = [one.model, one.revision]
            state.add_metric(name, one.state)
            suspended.add_metric(name, float(one.suspended))
            waiting.add_metric(name, one.waiting)
            seconds.add_metric(name, one.seconds_count, one.seconds_sum)
            for what, count in one.rows.items():
                rows.add_metric([*name, what], count)
            for what, count in one.states.items():
                states.add_metric([*name, what], count)
        yield from (state, suspended, waiting, rows, states, seconds)
