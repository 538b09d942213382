"""calserve.v1.MonitorService: monitors, and the alarms that they give."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calserve.v1 import monitor_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from service.drift.alarms import PAGE, number_of
from service.drift.defaults import PROMISE
from service.drift.nowcasts import Nowcast
from service.drift.states import RAW, REFIT, ROLL_BACK, SERVED, SUSPEND, TELL, Alarm, MonitorSpec, MonitorState
from service.errors import InvalidRequest, shown
from service.learning.monitoring import Monitoring
from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import MONITOR_SERVICE

MOST_ALARMS = 1000
"""Of one page."""
MOST_PARAMS_BYTES = 16 << 10
WATCHED = {RAW: pb.WATCHED_RAW, SERVED: pb.WATCHED_SERVED}
POLICIES = {
    TELL: pb.POLICY_TELL,
    SUSPEND: pb.POLICY_SUSPEND,
    ROLL_BACK: pb.POLICY_ROLL_BACK,
    REFIT: pb.POLICY_REFIT,
}
_WATCHED = {value: name for name, value in WATCHED.items()} | {pb.WATCHED_UNSPECIFIED: SERVED}
_POLICIES = {value: name for name, value in POLICIES.items()} | {pb.POLICY_UNSPECIFIED: TELL}
_FIELDS = {
    "params_json": "parameters",
    **dict.fromkeys(("detector", "watched", "policy", "cooldown_rows", "baseline_rows")),
}
"""What of a spec may be updated, and its name here where that differs."""


@dataclass(frozen=True)
class MonitorService:
    """Servicer of calserve.v1.MonitorService.

    `page` makes a model's page of a window as a file, in any thread; ValueError for no window.
    """

    monitoring: Monitoring
    page: Callable[[str, str], str]

    def methods(self) -> list[Method]:
        return methods_of(MONITOR_SERVICE, self)

    async def create_monitor(self, request: pb.CreateMonitorRequest, call: Call) -> pb.Monitor:
        return monitor_message(await self.monitoring.create(_spec(request.spec)))

    async def get_monitor(self, request: pb.GetMonitorRequest, call: Call) -> pb.Monitor:
        return monitor_message(await self.monitoring.get(request.model, request.monitor))

    async def list_monitors(self, request: pb.ListMonitorsRequest, call: Call) -> pb.ListMonitorsResponse:
        return pb.ListMonitorsResponse(monitors=map(monitor_message, await self.monitoring.of_model(request.model)))

    async def update_monitor(self, request: pb.UpdateMonitorRequest, call: Call) -> pb.Monitor:
        paths = list(request.update_mask.paths)
        if not paths or not set(paths) <= _FIELDS.keys():
            raise InvalidRequest(f"update_mask must name some of {', '.join(_FIELDS)}, got {shown(', '.join(paths))}")
        fields = [_FIELDS[path] or path for path in paths]
        return monitor_message(await self.monitoring.update(_spec(request.spec), fields))

    async def delete_monitor(self, request: pb.DeleteMonitorRequest, call: Call) -> pb.DeleteMonitorResponse:
        await self.monitoring.delete(request.model, request.monitor, _who(call))
        return pb.DeleteMonitorResponse()

    async def list_alarms(self, request: pb.ListAlarmsRequest, call: Call) -> pb.ListAlarmsResponse:
        size = request.page_size or PAGE
        if not 1 <= size <= MOST_ALARMS:
            raise InvalidRequest(f"page_size must be in 1..{MOST_ALARMS}, got {request.page_size}")
        _check_alarm("page_token", request.page_token)
        found = await self.monitoring.list_alarms(request.model, request.page_token, size)
        token = found[-1].id if len(found) == size else ""
        return pb.ListAlarmsResponse(alarms=map(alarm_message, found), next_page_token=token)

    async def watch_alarms(self, request: pb.WatchAlarmsRequest, call: Call) -> AsyncIterator[pb.Alarm]:
        _check_alarm("after", request.after)
        async for alarm in self.monitoring.watch(request.model, request.after):
            yield alarm_message(alarm)

    async def acknowledge_alarm(self, request: pb.AcknowledgeAlarmRequest, call: Call) -> pb.Alarm:
        who, rebaseline = _who(call), request.rebaseline
        return alarm_message(
            await self.monitoring.acknowledge(request.model, request.alarm, who, rebaseline=rebaseline)
        )

    async def get_report(self, request: pb.GetReportRequest, call: Call) -> pb.MonitorReport:
        states = await self.monitoring.of_model(request.model)
        alarms = await self.monitoring.list_alarms(request.model)
        page = ""
        if request.page_window:
            try:
                page = await asyncio.to_thread(self.page, request.model, request.page_window)
            except ValueError as error:
                raise InvalidRequest(f"page_window: {error}") from error
        return pb.MonitorReport(
            model=request.model,
            monitors=map(monitor_message, states),
            alarms=map(alarm_message, alarms),
            false_alarms=PROMISE if any(state.spec.is_default for state in states) else "",
            nowcasts=[_nowcast(*told) for told in (await self.monitoring.nowcasts(request.model))._asdict().items()],
            page_html=page,
        )


def monitor_message(state: MonitorState) -> pb.Monitor:
    spec = state.spec
    message = pb.Monitor(
        spec=pb.MonitorSpec(
            model=spec.model,
            monitor=spec.name,
            detector=spec.detector,
            watched=WATCHED[spec.watched],
            params_json=json.dumps(dict(spec.parameters), sort_keys=True),
            policy=POLICIES[spec.policy],
            cooldown_rows=spec.cooldown_rows,
            baseline_rows=spec.baseline_rows,
            is_default=spec.is_default,
        ),
        ready=state.ready,
        statistic=state.statistic,
        threshold=state.threshold,
        row_count=state.n_rows,
        missing_count=state.missing,
        late_count=state.late,
        alarms=state.alarms,
        false_alarms=state.false_alarms,
    )
    for time_ms, statistic in list(state.history):
        message.history.add(time=_time(time_ms), statistic=statistic)
    return message


def alarm_message(alarm: Alarm) -> pb.Alarm:
    cause = alarm.cause
    return pb.Alarm(
        alarm=alarm.id,
        model=alarm.model,
        monitor=alarm.monitor,
        watched=WATCHED[alarm.watched],
        time=_time(alarm.time_ms),
        notice_time=_time(alarm.noticed_ms),
        change_time=_time(alarm.since_ms),
        change_row_count=alarm.since_rows,
        statistic=alarm.statistic,
        threshold=alarm.threshold,
        revision=alarm.revision,
        cause=None if cause is None else pb.Cause(**vars(cause)),
        policy=POLICIES[alarm.policy],
        outcome=alarm.outcome,
        acknowledged_by=alarm.acknowledged_by,
        acknowledge_time=_time(alarm.acknowledged_ms),
        evidence=alarm.evidence,
        repeat_count=alarm.repeats,
        repeat_time=_time(alarm.repeated_ms),
    )


def _nowcast(name: str, told: Nowcast) -> pb.Nowcast:
    return pb.Nowcast(
        name=name,
        estimate=told.estimate,
        low=told.low,
        high=told.high,
        valid=told.valid,
        row_count=told.n_rows,
        label_count=told.n_labels,
        why_not=told.why_not,
    )


def _spec(message: pb.MonitorSpec) -> MonitorSpec:
    return MonitorSpec(
        model=message.model,
        name=message.monitor,
        detector=message.detector,
        watched=_WATCHED.get(message.watched, str(message.watched)),
        parameters=_parameters(message.params_json),
        policy=_POLICIES.get(message.policy, str(message.policy)),
        cooldown_rows=message.cooldown_rows,
        baseline_rows=message.baseline_rows,
    )


def _parameters(text: str) -> Mapping[str, Any]:
    """A detector's keywords: numbers and texts."""
    try:
        said = json.loads(text or "{}") if len(text) <= MOST_PARAMS_BYTES else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or any(not isinstance(value, int | float | str) for value in said.values()):
        raise InvalidRequest(f"params_json must be a JSON object of numbers and texts, got {shown(text)}")
    return said


def _check_alarm(field: str, value: str) -> None:
    if value and number_of(value) < 0:
        raise InvalidRequest(f"{field} must be an alarm's name, got {shown(value)}")


def _who(call: Call) -> str:
    """Whose token it was; without tokens somebody's."""
    return call.owner or "somebody"


def _time(ms: int) -> Timestamp | None:
    """None of 0: it has not come."""
    if not ms:
        return None
    time = Timestamp()
    time.FromMilliseconds(ms)
    return time
