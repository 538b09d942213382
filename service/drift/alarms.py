"""The alarms that monitors gave: kept in the journal, changed while they are dealt with, followed by who watches."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any

from service.drift.monitors import Ring
from service.drift.states import RAW, TELL, Alarm, Cause, MonitorSpec
from service.errors import NotFound, shown
from service.store import monitors as store
from service.store.database import Connection
from service.store.journal import Journal
from service.store.monitors import AlarmRow

PREFIX = "alarm-"
_ID = re.compile(r"alarm-[0-9]{1,17}")
PENDING = "pending"
"""How the outcome of a policy begins that is not carried out yet."""
PAGE = 100


class Alarms:
    """Of all models. Reads are for any thread but the event loop's; writes are inside a transaction of the writer."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, model: str, alarm: str) -> Alarm:
        """NotFound if the model has no such alarm."""
        with self._journal.reading() as connection:
            return alarm_of(_row(connection, model, alarm))

    def before(self, model: str, alarm: str = "", most: int = PAGE) -> list[Alarm]:
        """The last alarms of a model (empty: of all) before this one, newest first."""
        number = number_of(alarm) if alarm else 1 << 62
        with self._journal.reading() as connection:
            return [alarm_of(row) for row in store.alarms_before(connection, model, number, most)]

    def after(self, model: str, alarm: str) -> tuple[list[Alarm], int]:
        """The first alarms after this one, oldest first, as they are; and the last change that they show."""
        with self._journal.reading() as connection:
            rows = store.alarms_after(connection, model, number_of(alarm), PAGE)
            return [alarm_of(row) for row in rows], store.last_change(connection)

    def changed(self, model: str, change: int) -> tuple[list[Alarm], int]:
        """The first alarms that are new or otherwise since this change, and the last change that they show."""
        with self._journal.reading() as connection:
            rows = store.alarms_changed(connection, model, change, PAGE)
        return [alarm_of(row) for row in rows], rows[-1].change if rows else change

    def last_change(self) -> int:
        with self._journal.reading() as connection:
            return store.last_change(connection)

    def open_of(self, model: str, monitor: str) -> tuple[str, ...]:
        """The alarms of a monitor that nobody has acknowledged, of the last ones; oldest first."""
        with self._journal.reading() as connection:
            rows = store.alarms_of(connection, model, monitor, PAGE)
        return tuple(alarm.id for alarm in map(alarm_of, reversed(rows)) if not alarm.acknowledged_ms)

    def pending(self) -> list[Alarm]:
        """Those whose policy is still to be carried out, oldest first."""
        with self._journal.reading() as connection:
            rows = store.alarms_before(connection, "", 1 << 62, store.MOST_ALARMS)
        return [alarm for row in reversed(rows) if (alarm := alarm_of(row)).outcome.startswith(PENDING)]


def add(connection: Connection, spec: MonitorSpec, ring: Ring, revision: str, noticed_ms: int) -> Alarm:
    """A new alarm; while the monitor's last one is not acknowledged, that one, which rang again.

    One of what another revision served is not of this: it stays open beside it.
    """
    for last in store.alarms_of(connection, spec.model, spec.name, 1):
        before = alarm_of(last)
        if not before.acknowledged_ms and (spec.watched == RAW or before.revision == revision):
            again = replace(before, repeats=before.repeats + 1, repeated_ms=ring.time_ms)
            return alarm_of(store.change_alarm(connection, last, _encode(again)))
    alarm = Alarm(
        id="",
        model=spec.model,
        monitor=spec.name,
        watched=spec.watched,
        time_ms=ring.time_ms,
        noticed_ms=noticed_ms,
        since_ms=ring.since_ms,
        since_rows=ring.since_rows,
        statistic=ring.statistic,
        threshold=ring.threshold,
        revision=revision,
        cause=None,
        policy=spec.policy,
        outcome="told" if spec.policy == TELL else PENDING,
        acknowledged_by="",
        acknowledged_ms=0,
        evidence=dict(ring.evidence),
    )
    return alarm_of(store.add_alarm(connection, spec.model, spec.name, _encode(alarm)))


def change(connection: Connection, model: str, alarm: str, **changes: Any) -> Alarm:
    """Write what has become of an alarm. NotFound if the model has no such alarm."""
    row = _row(connection, model, alarm)
    return alarm_of(store.change_alarm(connection, row, _encode(replace(alarm_of(row), **changes))))


def number_of(alarm: str) -> int:
    """They count from 1, so that `alarm-0` comes before all; -1 for what is no alarm's id."""
    return int(alarm.removeprefix(PREFIX)) if _ID.fullmatch(alarm) else -1


def alarm_of(row: AlarmRow) -> Alarm:
    said = json.loads(row.row)
    cause = said.pop("cause")
    return Alarm(**{**said, "id": f"{PREFIX}{row.number}"}, cause=Cause(**cause) if cause else None)


def _encode(alarm: Alarm) -> str:
    return json.dumps(asdict(alarm), sort_keys=True)


def _row(connection: Connection, model: str, alarm: str) -> AlarmRow:
    row = store.read_alarm(connection, number_of(alarm))
    if row is None or row.model != model:
        raise NotFound(f"model {shown(model)} has no alarm {shown(alarm)}")
    return row
