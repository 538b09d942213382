"""What is kept of monitors: what was asked for, what befell each of them between steps, and the alarms that they gave.

How far a monitor has read, with its state, is with the journal's readers. Rows are JSON of those who write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from service.errors import Damaged
from service.store.database import Connection
from service.store.journal_tables import checksum

MOST_ALARMS = 10_000
"""Of all models; the oldest are forgotten beyond that."""


class AlarmRow(NamedTuple):
    """An alarm as it is; `change` counts all changes of alarms, and is that of its last."""

    number: int
    model: str
    monitor: str
    change: int
    row: str


def write_monitor(connection: Connection, model: str, monitor: str, row: str) -> None:
    values = (model, monitor, row)
    connection.execute("INSERT OR REPLACE INTO monitors VALUES (?, ?, ?, ?)", (*values, checksum(*values)))


def read_monitors(connection: Connection) -> list[str]:
    """The rows of all monitors of all models, in the order of their names."""
    found = connection.execute("SELECT model, monitor, row, crc FROM monitors ORDER BY model, monitor").fetchall()
    return [_checked(values)[2] for values in found]


def forget_monitor(connection: Connection, model: str, monitor: str) -> None:
    """Forget what was asked for and what befell it. Its alarms stay."""
    for table in ("monitors", "monitor_turns"):
        connection.execute(f"DELETE FROM {table} WHERE model = ? AND monitor = ?", (model, monitor))  # noqa: S608


def write_turn(connection: Connection, model: str, monitor: str, number: int, row: str) -> None:
    """Write down what befell a monitor after this step of its reader."""
    (last,) = connection.execute("SELECT coalesce(max(turn), 0) FROM monitor_turns").fetchone()
    values = (last + 1, model, monitor, number, row)
    connection.execute("INSERT INTO monitor_turns VALUES (?, ?, ?, ?, ?, ?)", (*values, checksum(*values)))


def read_turns(connection: Connection, model: str, monitor: str) -> list[tuple[int, str]]:
    """After which step each turn came, and what it was; in their order."""
    query = (
        "SELECT turn, model, monitor, number, row, crc FROM monitor_turns WHERE model = ? AND monitor = ? ORDER BY turn"
    )
    found = connection.execute(query, (model, monitor)).fetchall()
    return [(number, row) for *_, number, row in map(_checked, found)]


def add_alarm(connection: Connection, model: str, monitor: str, row: str) -> AlarmRow:
    """Write a new alarm, under the next number."""
    number, change = connection.execute(
        "SELECT 1 + coalesce(max(alarm), 0), 1 + coalesce(max(change), 0) FROM alarms"
    ).fetchone()
    connection.execute("DELETE FROM alarms WHERE alarm <= ?", (number - MOST_ALARMS,))
    return _write(connection, AlarmRow(number, model, monitor, change, row))


def change_alarm(connection: Connection, alarm: AlarmRow, row: str) -> AlarmRow:
    """Write an alarm as it is now."""
    return _write(connection, alarm._replace(change=last_change(connection) + 1, row=row))


def last_change(connection: Connection) -> int:
    (change,) = connection.execute("SELECT coalesce(max(change), 0) FROM alarms").fetchone()
    return int(change)


def read_alarm(connection: Connection, number: int) -> AlarmRow | None:
    found = _alarms(connection, "alarm = ?", (number,))
    return found[0] if found else None


def alarms_of(connection: Connection, model: str, monitor: str, most: int) -> list[AlarmRow]:
    """The last of one monitor, newest first."""
    return _alarms(connection, "model = ? AND monitor = ? ORDER BY alarm DESC LIMIT ?", (model, monitor, most))


def alarms_before(connection: Connection, model: str, number: int, most: int) -> list[AlarmRow]:
    """The last alarms of a model (empty: of all) with smaller numbers, newest first."""
    return _alarms(connection, "alarm < ? AND ? IN (model, '') ORDER BY alarm DESC LIMIT ?", (number, model, most))


def alarms_after(connection: Connection, model: str, number: int, most: int) -> list[AlarmRow]:
    """The first alarms with larger numbers, oldest first."""
    return _alarms(connection, "alarm > ? AND ? IN (model, '') ORDER BY alarm LIMIT ?", (number, model, most))


def alarms_changed(connection: Connection, model: str, change: int, most: int) -> list[AlarmRow]:
    """The first alarms that changed after this change, in the order of their changes."""
    return _alarms(connection, "change > ? AND ? IN (model, '') ORDER BY change LIMIT ?", (change, model, most))


def _write(connection: Connection, alarm: AlarmRow) -> AlarmRow:
    connection.execute("INSERT OR REPLACE INTO alarms VALUES (?, ?, ?, ?, ?, ?)", (*alarm, checksum(*alarm)))
    return alarm


def _alarms(connection: Connection, where: str, values: Sequence[object]) -> list[AlarmRow]:
    query = f"SELECT alarm, model, monitor, change, row, crc FROM alarms WHERE {where}"  # noqa: S608
    return [AlarmRow(*_checked(row)) for row in connection.execute(query, values).fetchall()]


def _checked(values: Sequence[Any]) -> Sequence[Any]:
    """A row without its checksum."""
    if checksum(*values[:-1]) != values[-1]:
        raise Damaged("a row of monitors or alarms is damaged: its checksum differs; see `calserve doctor`")
    return values[:-1]
