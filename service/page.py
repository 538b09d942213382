"""What the page tells of the models that are served, read from the repository, the catalogue and the monitors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from calibrators.conformal.calibrator import ConformalCalibrator
from service.drift.states import MonitorState
from service.drift.summaries import Summaries
from service.inference.model import NO_REVISION, ServedModel
from service.inference.repository import Repository
from service.learning.monitoring import Monitoring
from service.learning.shadows import AUTOMATIC, Shadows, ShadowState
from service.store.catalogue import Catalogue, RevisionRow
from service.web.facts import ModelFacts, RevisionFacts, ShadowFacts, Sources

MOST_ALARMS = 50


class PageFacts:
    """Answers the page's questions. Methods may be called from any thread."""

    def __init__(self, repository: Repository, catalogue: Catalogue, journal: str) -> None:
        self._repository, self._catalogue, self._journal = repository, catalogue, journal

    def sources(self, summaries: Summaries, monitoring: Monitoring, shadows: Shadows) -> Sources:
        def monitors(model: str) -> list[MonitorState]:
            return [state for state, _ in monitoring.states() if state.spec.model == model]

        return Sources(
            self.models,
            summaries.summary,
            monitors,
            lambda model: monitoring.alarms.before(model, "", MOST_ALARMS),
            lambda model: dict(monitoring.accuracies()).get(model),
            lambda model: [_shadow(state) for state in shadows.standing(model)],
        )

    def names(self) -> list[str]:
        return [model.name for model in self._newest() if model.is_classifier]

    def models(self) -> list[ModelFacts]:
        """Classifiers, each by its newest version."""
        return [self._facts(model) for model in self._newest() if model.is_classifier]

    def sets_of(self, model: str, revision: str) -> ConformalCalibrator | None:
        """What makes the sets of a revision, while it is active."""
        active = (one.active for one in self._repository.models() if one.name == model)
        return next((one.sets.calibrator for one in active if one.sets and one.revision == revision), None)

    def _newest(self) -> list[ServedModel]:
        return list({model.name: model for model in self._repository.models()}.values())

    def _facts(self, model: ServedModel) -> ModelFacts:
        history = self._catalogue.activations(model.name, model.digest)
        earlier = history[1].revision if len(history) > 1 else NO_REVISION
        active = model.active
        return ModelFacts(
            model.name,
            model.version,
            model.class_names,
            active.revision,
            earlier if history else "",
            active.sets.confidence_level if active.sets else None,
            [_revision(row, model.digest) for row in self._catalogue.revisions(model.name)],
            kept=(model.journal or self._journal) != "off",
        )


def _revision(row: RevisionRow, digest: str) -> RevisionFacts:
    scores = row.held_out or {}
    losses = _log_loss(scores.get("before", [])), _log_loss(scores.get("after", []))
    return RevisionFacts(
        row.revision, row.kind, int(1000 * row.create_time), row.row_count, losses, row.model_digest == digest
    )


def _shadow(state: ShadowState) -> ShadowFacts:
    row, gain = state.row, state.comparison.gain
    return ShadowFacts(
        row.revision,
        row.champion,
        gain.n_labels,
        (gain.mean, *gain.interval(row.level)),
        state.comparison.verdict,
        row.least_labels if row.policy == AUTOMATIC else 0,
        "" if row.is_running else row.outcome,
        row.end_ms,
        row.note,
    )


def _log_loss(scores: Sequence[Sequence[Any]]) -> float:
    return next((float(value) for name, value, *_ in scores if name == "log_loss" and value is not None), math.nan)
