"""Whether the journal is what was written: every checksum, and that no row is missing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from service.errors import Damaged
from service.store.database import Connection
from service.store.journal_tables import PACK_COLUMNS, PackRow, checksum, label_checksums

ROWS_TOGETHER = 4096
ROWS = {
    "readers": "SELECT model, reader, number, pack, row, record, state, crc FROM readers",
    "releases": "SELECT model, reader, number, pack, row, record, crc FROM releases",
    "online_states": "SELECT model, revision, number, learned, time, artifact, crc FROM online_states",
    "online_serving": "SELECT model, revision, number, best, suspended, crc FROM online_serving",
    "online_setbacks": "SELECT model, revision, step, number, crc FROM online_setbacks",
    "monitors": "SELECT model, monitor, row, crc FROM monitors",
    "monitor_turns": "SELECT turn, model, monitor, number, row, crc FROM monitor_turns",
    "alarms": "SELECT alarm, model, monitor, change, row, crc FROM alarms",
    "online_heads": "SELECT model, revision, number, head, crc FROM online_heads",
    "shadows": "SELECT model, revision, row, crc FROM shadows",
    "shadow_packs": "SELECT model, revision, stream, first, last, payload, crc FROM shadow_packs",
    "streams": "SELECT stream, model, version, digest, class_count, start_time, crc FROM streams",
}


def verify(connection: Connection) -> None:
    """Damaged, with the first problem that there is."""
    for problem in problems(connection):
        raise Damaged(f"{problem}; see `calserve doctor`")


def problems(connection: Connection) -> Iterator[str]:
    """What is wrong, in words, with one state of the journal; it may be written meanwhile."""
    try:
        connection.execute("BEGIN")
        yield from _in_packs(connection)
        yield from _in_labels(connection)
        for table, query in ROWS.items():
            bad = sum(checksum_of(values) != values[-1] for values in connection.execute(query))
            if bad:
                yield f"{bad} rows of the journal's table {table} are damaged: their checksums differ"
    except sqlite3.DatabaseError as error:
        yield f"the journal cannot be read: {error}"
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def checksum_of(values: Sequence[Any]) -> int:
    """The checksum that a row of `ROWS` must end in."""
    return checksum(*values[:-1])


def damaged_packs(connection: Connection) -> Iterator[PackRow]:
    query = f"SELECT {PACK_COLUMNS}, payload, crc FROM packs ORDER BY pack"  # noqa: S608
    for *values, payload, crc in connection.execute(query):
        row = PackRow(*values)
        if row.crc(payload) != crc:
            yield row


def damaged_labels(connection: Connection) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Which table each is in, and its key there: stream, number, row."""
    for table in ("labels", "conflicts"):
        query = f"SELECT stream, number, row, label, producer, record, crc FROM {table}"  # noqa: S608
        cursor = connection.execute(query)
        while found := cursor.fetchmany(ROWS_TOGETHER):
            yield from ((table, (row[0], row[1], row[2])) for row in _damaged(found))


def _damaged(labels: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    try:
        rows = np.array(labels, np.int64)
    except (TypeError, ValueError, OverflowError):  # one of them is no whole number any more
        half = len(labels) // 2
        return _damaged(labels[:half]) + _damaged(labels[half:]) if half else list(labels)
    return [labels[index] for index in np.flatnonzero(label_checksums(rows[:, :6]) != rows[:, 6]).tolist()]


def _in_packs(connection: Connection) -> Iterator[str]:
    damaged = [row.pack for row in damaged_packs(connection)]
    if damaged:
        yield f"{len(damaged)} packs of the journal are damaged, the first is {damaged[0]}: their checksums differ"
    yield from _miscounted(connection, "packs")


def _in_labels(connection: Connection) -> Iterator[str]:
    if damaged := sum(1 for _ in damaged_labels(connection)):
        yield f"{damaged} labels of the journal are damaged: their checksums differ"
    yield from _miscounted(connection, "labels")


def _miscounted(connection: Connection, table: str) -> Iterator[str]:
    (found,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608
    (wanted,) = connection.execute("SELECT value FROM counters WHERE name = ?", (table,)).fetchone() or (None,)
    if found != wanted:
        yield f"the journal has {found} {table}, and counted {wanted}"
