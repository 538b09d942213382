"""What Prometheus reads. Label values are the server's own names, never a caller's words: their number is bounded."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from service import __version__

ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True)
class Durations:
    """How many took how long: for each bound in seconds, those longer than the one before; then all longer ones."""

    bounds: Sequence[float]
    counts: Sequence[int]
    seconds: float


@dataclass(frozen=True)
class ModelState:
    """One loaded version of a model.

    Attributes
    ----------
    queued : requests that wait for a run
    rows, runs : served and made since it was loaded
    requests : by result -> how many
    dropped : why requests were not run -> how many
    batches : rows of a run -> how many such runs
    request, queue, run : durations of requests that were answered, of their waiting, and of runs
    """

    model: str
    version: str
    revision: str
    provider: str
    queued: int
    rows: int
    runs: int
    requests: Mapping[str, int]
    dropped: Mapping[str, int]
    batches: Mapping[int, int]
    request: Durations
    queue: Durations
    run: Durations


@dataclass(frozen=True)
class JournalState:
    """The journal of predictions and labels, as this process sees it.

    Attributes
    ----------
    writable : whether it can be written; otherwise labels are refused and predictions lost
    kept, lost : rows of predictions by model; by model and why
    other : rows by model, of segments beyond those that are told apart
    labels : what became of labels -> how many
    delay : how old predictions were when labels came for them
    """

    writable: bool
    bytes: int
    queued_bytes: int
    commits: int
    kept: Mapping[str, int]
    lost: Mapping[tuple[str, str], int]
    other: Mapping[str, int]
    labels: Mapping[str, int]
    delay: Durations


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
class ShadowStanding:
    """How a challenger stands against what serves.

    Attributes
    ----------
    labels : that were judged, by what became of rows -> how many
    gain, low, high : of half the Brier score, and its bounds
    verdict : 1 better, -1 worse, 0 undecided
    """

    model: str
    revision: str
    labels: Mapping[str, int]
    gain: float
    low: float
    high: float
    verdict: int


@dataclass(frozen=True)
class ShadowRunning:
    """What this process runs in shadow: rows by what became of them, and the seconds that runs took."""

    model: str
    revision: str
    rows: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class MonitorMetrics:
    """One monitor.

    Attributes
    ----------
    statistic, threshold : it rings when the first reaches the second
    rows, alarms : that it read and gave since the start
    open_alarms : that nobody has acknowledged
    """

    model: str
    monitor: str
    statistic: float
    threshold: float
    rows: int
    alarms: int
    open_alarms: int


@dataclass(frozen=True)
class NowcastMetrics:
    """The accuracy of a model on what it answers now, estimated from its confidence.

    `valid` is whether the estimate can be believed: no alarm says that the confidence is wrong.
    """

    model: str
    accuracy: float
    low: float
    high: float
    valid: bool


@dataclass(frozen=True)
class WebhookMetrics:
    """What became of alarms that were to be posted; tries made again; and how many alarms wait."""

    results: Mapping[str, int]
    retried: int
    waiting: int


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
        monitors: Callable[[], Iterable[MonitorMetrics]] = tuple,
        nowcasts: Callable[[], Iterable[NowcastMetrics]] = tuple,
        webhook: Callable[[], WebhookMetrics | None] = lambda: None,
        shadows: Callable[[], Iterable[ShadowStanding]] = tuple,
        shadow_runs: Callable[[], Iterable[ShadowRunning]] = tuple,
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._calls: dict[str, CallCounts] = {}
        self._registry.register(_Calls(self._calls))
        self._registry.register(_Journal(journal))
        self._registry.register(_Online(online))
        self._registry.register(_Coverage(coverage))
        self._registry.register(_Shadows(shadows, shadow_runs))
        self._registry.register(_Monitors(monitors, nowcasts, webhook))
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


def buckets(bounds: Sequence[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Upper bound and how many were no more, as Prometheus writes them."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))


def _runs_by_rows(batches: Mapping[int, int]) -> list[tuple[str, float]]:
    counts = [0] * (len(ROWS_BUCKETS) + 1)
    for rows, runs in batches.items():
        counts[bisect_left(ROWS_BUCKETS, rows)] += runs
    return buckets(ROWS_BUCKETS, counts)


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
                handling.add_metric([method], buckets(SECONDS_BUCKETS, counts.by_duration), counts.seconds)
        yield from (handled, handling)


class _State(Collector):
    def __init__(
        self, models: Callable[[], Iterable[ModelState]], ready: Callable[[], bool], device_lost: Callable[[], bool]
    ) -> None:
        self._models, self._ready, self._device_lost = models, ready, device_lost

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("calserve_build", "The release that runs.", value={"version": __version__})
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
        requests = CounterMetricFamily(
            "calserve_requests", "Requests for inference, by result.", labels=[*of_model, "result"]
        )
        states = list(self._models())
        for state in states:
            name = [state.model, state.version]
            active.add_metric([*name, state.revision, state.provider], 1.0)
            queued.add_metric(name, state.queued)
            rows.add_metric(name, state.rows)
            runs.add_metric(name, state.runs)
            for why, count in list(state.dropped.items()):
                dropped.add_metric([*name, why], count)
            for result, count in state.requests.items():
                requests.add_metric([*name, result], count)
        yield from (active, queued, rows, runs, requests, dropped)
        yield from _histograms(states)


def _histograms(states: Sequence[ModelState]) -> Iterator[Metric]:
    of_model = ["model", "version"]
    batches = HistogramMetricFamily("calserve_batch_rows", "Rows of a run.", labels=of_model)
    durations = {
        name: HistogramMetricFamily(f"calserve_{name}_seconds", text, labels=of_model)
        for name, text in (
            ("request", "From a request's arrival to its answer, of those that were answered."),
            ("queue", "What a request waited for its run."),
            ("run", "What a run took."),
        )
    }
    for state in states:
        name = [state.model, state.version]
        in_runs = sum(rows * runs for rows, runs in state.batches.items())
        batches.add_metric(name, _runs_by_rows(state.batches), in_runs)
        for what, family in durations.items():
            spread: Durations = getattr(state, what)
            family.add_metric(name, buckets(spread.bounds, spread.counts), spread.seconds)
    yield from (batches, *durations.values())


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
        other = CounterMetricFamily(
            "calserve_journal_other_segment_rows",
            "Rows kept under the segment 'other', since too many segments are told apart already.",
            labels=["model"],
        )
        for model, rows in state.other.items():
            other.add_metric([model], rows)
        labels = CounterMetricFamily("calserve_labels", "Labels that came, by what became of them.", labels=["result"])
        for result, count in state.labels.items():
            labels.add_metric([result], count)
        delay = HistogramMetricFamily(
            "calserve_label_delay_seconds", "Age of a prediction when a label came for it, to a quarter of a second."
        )
        delay.add_metric([], buckets(state.delay.bounds, state.delay.counts), state.delay.seconds)
        yield from (kept, lost, other, labels, delay)


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


class _Shadows(Collector):
    def __init__(
        self, standings: Callable[[], Iterable[ShadowStanding]], running: Callable[[], Iterable[ShadowRunning]]
    ) -> None:
        self._standings, self._running = standings, running

    def collect(self) -> Iterator[Metric]:
        of_revision = ["model", "revision"]
        labels = CounterMetricFamily(
            "calserve_shadow_labels",
            "Labels that a challenger in shadow was compared on, and rows that it was not, by why.",
            labels=[*of_revision, "what"],
        )
        gain = GaugeMetricFamily(
            "calserve_shadow_gain",
            "Half the Brier score of what serves less that of the challenger, and its bounds.",
            labels=[*of_revision, "bound"],
        )
        verdict = GaugeMetricFamily(
            "calserve_shadow_verdict", "Whether the challenger is better: 1, worse: -1, or 0.", labels=of_revision
        )
        for standing in self._standings():
            name = [standing.model, standing.revision]
            verdict.add_metric(name, standing.verdict)
            for bound, value in (("mean", standing.gain), ("low", standing.low), ("high", standing.high)):
                gain.add_metric([*name, bound], value)
            for what, count in standing.labels.items():
                labels.add_metric([*name, what], count)
        rows = CounterMetricFamily(
            "calserve_shadow_rows", "Rows that a challenger was to be run on.", labels=[*of_revision, "what"]
        )
        seconds = CounterMetricFamily("calserve_shadow_run_seconds", "Time of such runs.", labels=of_revision)
        for running in self._running():
            name = [running.model, running.revision]
            seconds.add_metric(name, running.seconds)
            for what, count in list(running.rows.items()):
                rows.add_metric([*name, what], count)
        yield from (labels, gain, verdict, rows, seconds)


class _Monitors(Collector):
    def __init__(
        self,
        monitors: Callable[[], Iterable[MonitorMetrics]],
        nowcasts: Callable[[], Iterable[NowcastMetrics]],
        webhook: Callable[[], WebhookMetrics | None],
    ) -> None:
        self._monitors, self._nowcasts, self._webhook = monitors, nowcasts, webhook

    def collect(self) -> Iterator[Metric]:
        yield from self._of_monitors()
        yield from self._of_nowcasts()
        yield from self._of_webhook()

    def _of_monitors(self) -> Iterator[Metric]:
        labels = ["model", "monitor"]
        gauges = {
            "statistic": ("calserve_monitor_statistic", "A monitor's statistic: it rings at the threshold."),
            "threshold": ("calserve_monitor_threshold", "What a monitor's statistic must reach for it to ring."),
            "open_alarms": ("calserve_alarms_open", "Alarms that are not acknowledged yet."),
        }
        counters = {
            "rows": ("calserve_monitor_rows", "Rows that a monitor has read."),
            "alarms": ("calserve_alarms", "Alarms that a monitor gave."),
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            **{name: GaugeMetricFamily(*said, labels=labels) for name, said in gauges.items()},
            **{name: CounterMetricFamily(*said, labels=labels) for name, said in counters.items()},
        }
        for one in self._monitors():
            for name, family in families.items():
                family.add_metric([one.model, one.monitor], getattr(one, name))
        yield from families.values()

    def _of_nowcasts(self) -> Iterator[Metric]:
        said = {
            "accuracy": ("", "A model's accuracy on what it answers now, estimated from its confidence."),
            "low": ("_low", "The lower end of that estimate's interval."),
            "high": ("_high", "The upper end of that estimate's interval."),
            "valid": ("_valid", "1 while that estimate can be believed."),
        }
        families = {
            name: GaugeMetricFamily(f"calserve_nowcast_accuracy{ending}", text, labels=["model"])
            for name, (ending, text) in said.items()
        }
        for one in self._nowcasts():
            for name, family in families.items():
                family.add_metric([one.model], float(getattr(one, name)))
        yield from families.values()

    def _of_webhook(self) -> Iterator[Metric]:
        alarms = CounterMetricFamily(
            "calserve_webhook_alarms", "Alarms that were to be posted, by what became of them.", labels=["result"]
        )
        retries = CounterMetricFamily("calserve_webhook_retries", "Posts of alarms that were tried again.")
        waiting = GaugeMetricFamily("calserve_webhook_waiting_alarms", "Alarms that wait to be posted.")
        if (state := self._webhook()) is not None:
            for result, count in state.results.items():
                alarms.add_metric([result], count)
            retries.add_metric([], state.retried)
            waiting.add_metric([], state.waiting)
        yield from (alarms, retries, waiting)


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
