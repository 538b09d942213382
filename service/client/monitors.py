"""Monitors and alarms as the clients give them, and the requests that ask for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from calserve.v1 import monitor_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from service import errors

FIRST = "alarm-0"
"""Comes before all alarms."""


@dataclass(frozen=True)
class Monitor:
    """A detector that watches one model.

    Attributes
    ----------
    watched : "raw", the model's own probabilities, or "served"
    ready : whether it has the reference that it compares with; it cannot ring before
    statistic, threshold : it rings when the first reaches the second
    rows, missing, late : rows read since it last began; whose label did not come in time; labels that came after that
    alarms : that nobody has acknowledged
    history : what the statistic was, oldest first
    false_alarms : what is promised of how seldom it rings while nothing has changed
    """

    model: str
    name: str
    detector: str
    watched: str
    params: dict[str, Any]
    policy: str
    cooldown_rows: int
    baseline_rows: int
    is_default: bool
    ready: bool
    statistic: float
    threshold: float
    rows: int
    missing: int
    late: int
    alarms: tuple[str, ...]
    history: tuple[tuple[datetime, float], ...]
    false_alarms: str


@dataclass(frozen=True)
class Cause:
    """What is behind an alarm: which kind of change, in which class or segment (empty: everywhere), what says so, and
    what to do about it."""

    kind: str
    where: str
    evidence: tuple[str, ...]
    action: str


@dataclass(frozen=True)
class Alarm:
    """A monitor rang.

    Attributes
    ----------
    alarm : its name
    time, notice_time : when the row was predicted that it rang at; when it rang
    change_time, change_rows : when the change is estimated to have come, and how many rows before
    revision : what was active
    cause : None until it is told
    outcome : what became of the policy; it begins with "pending" while that is under way
    acknowledge_time : None while nobody has seen it
    evidence : what the statistic was made of, in shares
    repeats : how often the monitor rang again before anybody had seen it
    """

    alarm: str
    model: str
    monitor: str
    watched: str
    time: datetime
    notice_time: datetime
    change_time: datetime
    change_rows: int
    statistic: float
    threshold: float
    revision: str
    cause: Cause | None
    policy: str
    outcome: str
    acknowledged_by: str
    acknowledge_time: datetime | None
    evidence: dict[str, float]
    repeats: int


@dataclass(frozen=True)
class Nowcast:
    """A figure of what is served now, with its interval; `why_not` says why that does not hold, if it does not."""

    estimate: float
    low: float
    high: float
    valid: bool
    rows: int
    labels: int
    why_not: str


@dataclass(frozen=True)
class MonitorReport:
    """What all monitors of a model say, and its last alarms, newest first.

    `false_alarms` is what is promised of the default monitors together. `nowcasts` are `accuracy_without_labels`,
    `accuracy` and `calibration_error` of what is served.
    """

    model: str
    monitors: tuple[Monitor, ...]
    alarms: tuple[Alarm, ...]
    false_alarms: str
    nowcasts: dict[str, Nowcast]


def number_of(alarm: str) -> int:
    """Alarms are numbered as they come."""
    return int(alarm.rpartition("-")[2])


def spec_of(model: str, name: str, fields: Mapping[str, Any]) -> pb.MonitorSpec:
    """The message of these fields of a `Monitor`. InvalidRequest for a word that there is not."""
    said = {name: value for name, value in fields.items() if name not in ("watched", "policy", "params")}
    if "params" in fields:
        said["params_json"] = json.dumps(fields["params"])
    for field, words in (("watched", pb.Watched), ("policy", pb.Policy)):
        if field in fields:
            said[field] = _number(words, field, fields[field])
    return pb.MonitorSpec(model=model, monitor=name, **said)


def update_request(model: str, name: str, fields: Mapping[str, Any]) -> pb.UpdateMonitorRequest:
    """Of those fields that are not None."""
    given = {field: value for field, value in fields.items() if value is not None}
    request = pb.UpdateMonitorRequest(spec=spec_of(model, name, given))
    request.update_mask.paths.extend("params_json" if field == "params" else field for field in given)
    return request


def monitor_of(message: pb.Monitor) -> Monitor:
    spec = message.spec
    return Monitor(
        model=spec.model,
        name=spec.monitor,
        detector=spec.detector,
        watched=_word(pb.Watched, spec.watched),
        params=json.loads(spec.params_json or "{}"),
        policy=_word(pb.Policy, spec.policy),
        cooldown_rows=spec.cooldown_rows,
        baseline_rows=spec.baseline_rows,
        is_default=spec.is_default,
        ready=message.ready,
        statistic=message.statistic,
        threshold=message.threshold,
        rows=message.row_count,
        missing=message.missing_count,
        late=message.late_count,
        alarms=tuple(message.alarms),
        history=tuple((_datetime(point.time), point.statistic) for point in message.history),
        false_alarms=message.false_alarms,
    )


def alarm_of(message: pb.Alarm) -> Alarm:
    cause = message.cause
    return Alarm(
        alarm=message.alarm,
        model=message.model,
        monitor=message.monitor,
        watched=_word(pb.Watched, message.watched),
        time=_datetime(message.time),
        notice_time=_datetime(message.notice_time),
        change_time=_datetime(message.change_time),
        change_rows=message.change_row_count,
        statistic=message.statistic,
        threshold=message.threshold,
        revision=message.revision,
        cause=Cause(cause.kind, cause.where, tuple(cause.evidence), cause.action)
        if message.HasField("cause")
        else None,
        policy=_word(pb.Policy, message.policy),
        outcome=message.outcome,
        acknowledged_by=message.acknowledged_by,
        acknowledge_time=_datetime(message.acknowledge_time) if message.HasField("acknowledge_time") else None,
        evidence=dict(message.evidence),
        repeats=message.repeat_count,
    )


def report_of(message: pb.MonitorReport) -> MonitorReport:
    monitors, alarms = tuple(map(monitor_of, message.monitors)), tuple(map(alarm_of, message.alarms))
    nowcasts = {
        now.name: Nowcast(now.estimate, now.low, now.high, now.valid, now.row_count, now.label_count, now.why_not)
        for now in message.nowcasts
    }
    return MonitorReport(message.model, monitors, alarms, message.false_alarms, nowcasts)


def _number(words: Any, field: str, word: str) -> int:
    """The number of an enum's word: POLICY_ROLL_BACK of `roll_back`."""
    known = {name.removeprefix(f"{field.upper()}_").lower(): value for name, value in words.items() if value}
    if word not in known:
        raise errors.InvalidRequest(f"{field} must be one of {', '.join(known)}, got {word!r}")
    return int(known[word])


def _word(words: Any, number: int) -> str:
    name: str = words.Name(number)
    return name.partition("_")[2].lower()


def _datetime(time: Timestamp) -> datetime:
    return time.ToDatetime(tzinfo=UTC)
