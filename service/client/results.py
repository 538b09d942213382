"""What the clients return, and how it is read from the messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
from calserve.v1 import feedback_service_pb2 as feedback
from calserve.v1 import online_service_pb2 as online
from calserve.v1 import resources_pb2 as resources
from calserve.v1 import shadow_service_pb2 as shadow
from numpy.typing import NDArray

from calibrators.auto import Candidate
from calibrators.metrics import Estimate

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """What the model said and what the calibrator made of it, on the same labelled rows; intervals at `level`."""

    row_count: int
    level: float
    before: dict[str, Estimate]
    after: dict[str, Estimate]


@dataclass(frozen=True)
class Revision:
    """One immutable fit.

    `held_out` are its scores on rows that the scored fit had not seen, None if none were kept; `ranking` is what kind
    "auto" compared, best first.
    """

    model: str
    revision: str
    kind: str
    params: dict[str, Any]
    model_digest: str
    row_count: int
    class_count: int
    held_out: Evaluation | None
    create_time: datetime
    active: bool
    notes: tuple[str, ...]
    ranking: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Model:
    """What is served, and where signals are read. `logits_tensor` is empty for a model that is no classifier."""

    model: str
    version: str
    digest: str
    class_count: int
    logits_tensor: str
    logits_reason: str
    features_tensor: str
    features_reason: str
    active_revision: str
    provider: str
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Outputs by name, and which revision computed the probabilities.

    `prediction_id` is what labels name, empty if the server does not keep the prediction; `receipt` is there if it was
    asked for. `online_state` is the number of the state of a revision that learns online, None of any other.
    """

    outputs: dict[str, Array]
    calibrator_revision: str
    prediction_id: str = ""
    receipt: str = ""
    online_state: int | None = None

    @property
    def probabilities(self) -> Array:
        return self.outputs["probabilities"]

    @property
    def prediction_set(self) -> Array:
        """Of a conformal revision, bool (n_rows, n_classes)."""
        return self.outputs["prediction_set"]


@dataclass(frozen=True)
class StoredPrediction:
    """One row as it was served, from the server's journal.

    `logits` and `probabilities` are those of `classes`: all in order, or of many the most probable first. `label` is
    the class that came true, None while it is not known. `segment` is the one that the request named; `signals` are
    what else is known of the row: `density`, `ood_score`, `set_size`, `input_1`, ...
    """

    model: str
    model_version: str
    model_digest: str
    calibrator_revision: str
    online_state: int
    time: datetime
    class_count: int
    classes: Array
    logits: Array
    probabilities: Array
    confidence: float
    predicted: int
    label: int | None
    segment: str = ""
    signals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptState:
    """A state that can be rolled back to, which `learned` labels made."""

    online_state: int
    learned: int
    time: datetime


@dataclass(frozen=True)
class OnlineState:
    """What a revision has learned from labels that came, and what of it serves.

    `serving` is the state that computes answers, `newest` the one learned last; `refused` says why that does not serve.
    `rows` counts what became of predictions and labels. The losses are those of the newest state, of the best so far
    and of the revision as it was fitted, on held-out labels; NaN while there are too few. `seconds` is how long it took
    from a label acknowledged to what it taught served, the last time. `gain` is what learning won over the revision as
    it was fitted, in half the Brier score of labels before they were learned; its bounds hold whenever one looks.
    """

    model: str
    revision: str
    serving: int
    newest: int
    suspended: bool
    kept: tuple[KeptState, ...]
    rows: dict[str, int]
    published: int
    refused: str
    refused_count: int
    newest_log_loss: float
    best_log_loss: float
    start_log_loss: float
    waiting: int
    seconds: float
    gain: Estimate


@dataclass(frozen=True)
class Replay:
    """Everything learned again from the first label, or from the kept state `since` where the first are forgotten:
    whether that came to the same bits."""

    steps: int
    learned: int
    equal: bool
    since: int = 0


@dataclass(frozen=True)
class Shadow:
    """A revision compared with the active one on live traffic.

    `gain` is half the Brier score of the champion less that of the challenger, on average over `labels`: positive where
    the challenger is better, with bounds that hold whenever one looks; the log loss's has none. The `verdict` (better,
    worse or undecided) is so since the prediction at `verdict_time`. `contesting` producers have sent labels on which
    the challenger is surely worse. `rows` says what became of predictions and labels, `share` on what share of requests
    it is run, 0 where kept logits are enough. `outcome` is running, promoted or stopped.
    """

    model: str
    revision: str
    champion: str
    policy: str
    level: float
    least_labels: int
    share: float
    outcome: str
    verdict: str
    verdict_time: datetime | None
    labels: int
    gain: Estimate
    log_loss_gain: float
    contesting: int
    rows: dict[str, int]
    start_time: datetime
    compared_since: datetime
    end_time: datetime | None
    started_by: str
    ended_by: str
    note: str


def online_state_of(message: online.OnlineState) -> OnlineState:
    return OnlineState(
        model=message.model,
        revision=message.revision,
        serving=message.serving,
        newest=message.newest,
        suspended=message.suspended,
        kept=tuple(
            KeptState(kept.online_state, kept.learned_count, kept.time.ToDatetime(tzinfo=UTC)) for kept in message.kept
        ),
        rows=dict(message.rows),
        published=message.published_count,
        refused=message.refused,
        refused_count=message.refused_count,
        newest_log_loss=message.newest_log_loss,
        best_log_loss=message.best_log_loss,
        start_log_loss=message.start_log_loss,
        waiting=message.waiting_count,
        seconds=message.seconds,
        gain=Estimate(message.gain, message.gain_low, message.gain_high),
    )


def replay_of(message: online.ReplayLearningResponse) -> Replay:
    return Replay(message.step_count, message.learned_count, message.equal, message.since)


def shadow_of(message: shadow.Shadow) -> Shadow:
    def time(name: str) -> datetime | None:
        return getattr(message, name).ToDatetime(tzinfo=UTC) if message.HasField(name) else None

    return Shadow(
        model=message.model,
        revision=message.revision,
        champion=message.champion,
        policy=_word(shadow.PromotionPolicy.Name(message.policy)),
        level=message.level,
        least_labels=message.least_label_count,
        share=message.share,
        outcome=_word(shadow.ShadowOutcome.Name(message.outcome)),
        verdict=_word(shadow.ShadowVerdict.Name(message.verdict)),
        verdict_time=time("verdict_time"),
        labels=message.label_count,
        gain=Estimate(message.gain, message.gain_low, message.gain_high),
        log_loss_gain=message.log_loss_gain,
        contesting=message.contesting_count,
        rows=dict(message.rows),
        start_time=message.start_time.ToDatetime(tzinfo=UTC),
        compared_since=message.compared_since.ToDatetime(tzinfo=UTC),
        end_time=time("end_time"),
        started_by=message.started_by,
        ended_by=message.ended_by,
        note=message.note,
    )


def _word(name: str) -> str:
    """Of an enum's name what tells its values apart."""
    return name.rpartition("_")[2].lower()


def stored_prediction_of(message: feedback.StoredPrediction) -> StoredPrediction:
    return StoredPrediction(
        model=message.model,
        model_version=message.model_version,
        model_digest=message.model_digest,
        calibrator_revision=message.calibrator_revision,
        online_state=message.online_state,
        time=message.time.ToDatetime(tzinfo=UTC),
        class_count=message.class_count,
        classes=np.array(message.classes or range(message.class_count), np.int64),
        logits=np.array(message.logits, np.float32),
        probabilities=np.array(message.probabilities, np.float32),
        confidence=message.confidence,
        predicted=message.predicted,
        label=message.label if message.HasField("label") else None,
        segment=message.segment,
        signals=dict(message.signals),
    )


def revision_of(message: resources.Revision) -> Revision:
    return Revision(
        model=message.model,
        revision=message.revision,
        kind=message.kind,
        params=json.loads(message.params_json or "{}"),
        model_digest=message.model_digest,
        row_count=message.row_count,
        class_count=message.class_count,
        held_out=evaluation_of(message.held_out) if message.HasField("held_out") else None,
        create_time=message.create_time.ToDatetime(tzinfo=UTC),
        active=message.active,
        notes=tuple(message.notes),
        ranking=tuple(map(_candidate, message.ranking)),
    )


def evaluation_of(message: resources.Evaluation) -> Evaluation:
    return Evaluation(message.row_count, message.level, _scores(message.before), _scores(message.after))


def model_of(message: resources.Model) -> Model:
    return Model(
        model=message.model,
        version=message.version,
        digest=message.digest,
        class_count=message.class_count,
        logits_tensor=message.logits_tensor,
        logits_reason=message.logits_reason,
        features_tensor=message.features_tensor,
        features_reason=message.features_reason,
        active_revision=message.active_revision,
        provider=message.provider,
        class_names=tuple(message.class_names),
    )


def _scores(messages: Iterable[resources.Score]) -> dict[str, Estimate]:
    return {score.name: _estimate(score) for score in messages}


def _candidate(message: resources.Candidate) -> Candidate:
    gain = (message.gain, message.gain_error)
    return Candidate(message.kind, _scores(message.scores), gain, message.seconds, message.skipped)


def _estimate(score: resources.Score) -> Estimate:
    if not score.HasField("low"):
        return Estimate(score.value)
    return Estimate(score.value, score.low, score.high)
