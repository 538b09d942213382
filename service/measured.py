"""What /metrics tells, read from those who count it when somebody asks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from service.drift.webhook import RESULTS, Webhook
from service.inference.device_loss import DeviceLoss
from service.inference.repository import Repository
from service.inference.statistics import BOUNDS_NS, Spread
from service.learning.coverage import Coverage
from service.learning.monitoring import Monitoring
from service.learning.online import Online
from service.learning.progress import COUNTED
from service.learning.shadow import BETTER, WORSE
from service.learning.shadow_runs import ShadowRuns
from service.learning.shadows import Shadows
from service.rpc.feedback_service import FeedbackService
from service.rpc.health import READY, Health
from service.store.journal import LOST, Journal
from service.store.labels import DELAYS_SECONDS, Result
from service.web.metrics import (
    Durations,
    JournalState,
    Metrics,
    ModelState,
    MonitorMetrics,
    NowcastMetrics,
    OnlineLearning,
    SetCoverage,
    ShadowRunning,
    ShadowStanding,
    WebhookMetrics,
)


@dataclass(frozen=True)
class Measured:
    """Those who count. Methods are called by threads of the HTTP port."""

    repository: Repository
    health: Health
    loss: DeviceLoss
    journal: Journal
    feedback: FeedbackService
    online: Online
    coverage: Coverage
    monitoring: Monitoring
    shadows: Shadows
    shadow_runs: ShadowRuns
    webhook: Webhook | None

    def metrics(self) -> Metrics:
        return Metrics(
            self._models,
            lambda: self.health.serving(READY),
            lambda: self.loss.lost,
            self._journal,
            self._online_learning,
            self._set_coverage,
            self._monitors,
            self._nowcasts,
            self._webhook,
            self._shadow_standings,
            self._shadows_running,
        )

    def _models(self) -> list[ModelState]:
        return [
            ModelState(
                model.name,
                model.version,
                model.active.revision,
                model.active.session.provider,
                model.batcher.queued,
                said.rows,
                said.executions,
                {"answered": said.success.count, "refused": said.fail.count},
                said.dropped,
                {rows: runs.count for rows, runs in list(said.batches.items())},
                _durations(said.success),
                _durations(said.queue),
                _durations(said.infer),
            )
            for model, said in [(model, model.statistics) for model in self.repository.models()]
        ]

    def _journal(self) -> JournalState:
        kept: Counter[str] = Counter()
        other: Counter[str] = Counter()
        lost: Counter[tuple[str, str]] = Counter()
        for stream in self.journal.streams():
            kept[stream.row.model] += stream.kept_rows
            other[stream.row.model] += stream.other_rows
            for why in LOST:
                lost[stream.row.model, why] += stream.lost_rows[why]
        labels, joined = {str(result): self.feedback.counts[result] for result in Result}, self.feedback.labels
        writer = self.journal.writer
        return JournalState(
            writer.writable,
            self.journal.bytes(),
            self.journal.queued_bytes,
            writer.commits,
            kept,
            lost,
            other,
            labels,
            Durations(DELAYS_SECONDS, list(joined.delays), joined.delay_seconds),
        )

    def _online_learning(self) -> list[OnlineLearning]:
        return [
            OnlineLearning(
                state.model,
                state.revision,
                state.serving.number,
                bool(state.serving.suspended),
                {name: state.counts[name] for name in COUNTED},
                {name: state.counts[name] for name in ("published", "refused")},
                state.waiting,
                state.seconds_sum,
                state.counts["timed"],
            )
            for state in self.online.states()
        ]

    def _set_coverage(self) -> list[SetCoverage]:
        return [SetCoverage(**vars(state)) for state in self.coverage.states()]

    def _monitors(self) -> list[MonitorMetrics]:
        counts = self.monitoring.alarm_counts
        return [
            MonitorMetrics(
                state.spec.model,
                state.spec.name,
                state.statistic,
                state.threshold,
                rows,
                counts[state.spec.model, state.spec.name],
                len(state.alarms),
            )
            for state, rows in self.monitoring.states()
        ]

    def _nowcasts(self) -> list[NowcastMetrics]:
        return [
            NowcastMetrics(model, now.estimate, now.low, now.high, now.valid)
            for model, now in self.monitoring.accuracies()
        ]

    def _webhook(self) -> WebhookMetrics | None:
        if self.webhook is None:
            return None
        counts = self.webhook.counts
        return WebhookMetrics({name: counts[name] for name in RESULTS}, counts["retried"], self.webhook.waiting)

    def _shadow_standings(self) -> list[ShadowStanding]:
        return [
            ShadowStanding(
                state.row.model,
                state.row.revision,
                state.comparison.counts,
                state.comparison.gain.mean,
                *state.comparison.gain.interval(state.row.level),
                {BETTER: 1, WORSE: -1}.get(state.comparison.verdict, 0),
            )
            for state in self.shadows.states()
        ]

    def _shadows_running(self) -> list[ShadowRunning]:
        return [
            ShadowRunning(run.row.model, run.row.revision, run.counts, run.seconds) for run in self.shadow_runs.runs()
        ]


def _durations(spread: Spread) -> Durations:
    return Durations([ns / 1e9 for ns in BOUNDS_NS], list(spread.counts), 1e-9 * spread.ns)
