"""What online calibrators learned: which state serves, those that can be rolled back to, where learning was set back.

A state's number is that of the reader's step that made it; 0 is the revision as it was fitted. Beside the state that
serves, and the best one, about one a minute is kept.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from service.errors import Damaged, NotFound
from service.store.database import Connection
from service.store.journal import Journal
from service.store.journal_tables import checksum, forget_revision

START = 0
"""The number of a revision's state before any label."""
KEEP_SECONDS = 60.0
MOST_KEPT = 100


class Serving(NamedTuple):
    """Of one revision: the state that serves, the best so far, and whether learning is suspended."""

    number: int = START
    best: int = START
    suspended: int = 0


class KeptState(NamedTuple):
    """A state that can be rolled back to; `learned` labels made it, at `time`."""

    number: int
    learned: int
    time: float


class OnlineStates:
    """The states in a journal. Reads are for any thread but the event loop's; writes are inside a transaction."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def serving(self, model: str, revision: str) -> Serving:
        with self._journal.reading() as connection:
            return read_serving(connection, model, revision)

    def served(self, model: str, revision: str, known: int) -> tuple[int, bytes] | None:
        """Number and artifact of the state that serves; None if that is the `known` one. Of START it has no bytes."""
        with self._journal.reading() as connection:
            number = read_serving(connection, model, revision).number
            return None if number == known else (number, read_state(connection, model, revision, number))

    def kept(self, model: str, revision: str) -> list[KeptState]:
        """What can be rolled back to besides START, newest first."""
        query = "SELECT number, learned, time FROM online_states WHERE model = ? AND revision = ? ORDER BY number DESC"
        with self._journal.reading() as connection:
            return [KeptState(*found) for found in connection.execute(query, (model, revision))]

    async def forget(self, model: str, revision: str) -> None:
        """Delete all that was learned by a revision, and how it was compared."""
        await self._journal.writer.write(lambda connection: forget_revision(connection, model, revision))

    def heads(self, model: str, revision: str) -> dict[int, str]:
        """Of the kept states from which a replay can go on, oldest first, what it needs besides."""
        query = (
            "SELECT model, revision, number, head, crc FROM online_heads WHERE model = ? AND revision = ? "
            "ORDER BY number"
        )
        with self._journal.reading() as connection:
            found = connection.execute(query, (model, revision)).fetchall()
        for *values, crc in found:
            _check(values, crc)
        return {number: head for _, _, number, head, _ in found}

    def setbacks(self, model: str, revision: str) -> dict[int, int]:
        """After which steps learning went on from an earlier state, and from which."""
        query = "SELECT model, revision, step, number, crc FROM online_setbacks WHERE model = ? AND revision = ?"
        with self._journal.reading() as connection:
            found = connection.execute(query, (model, revision)).fetchall()
        for *values, crc in found:
            _check(values, crc)
        return {step: number for _, _, step, number, _ in found}


def read_serving(connection: Connection, model: str, revision: str) -> Serving:
    query = "SELECT model, revision, number, best, suspended, crc FROM online_serving WHERE model = ? AND revision = ?"
    found = connection.execute(query, (model, revision)).fetchone()
    if found is None:
        return Serving()
    _check(found[:-1], found[-1])
    return Serving(*found[2:-1])


def read_state(connection: Connection, model: str, revision: str, number: int) -> bytes:
    """A kept state's artifact; nothing of START. NotFound if it is not kept."""
    if number == START:
        return b""
    query = (
        "SELECT model, revision, number, learned, time, artifact, crc FROM online_states "
        "WHERE model = ? AND revision = ? AND number = ?"
    )
    found = connection.execute(query, (model, revision, number)).fetchone()
    if found is None:
        raise NotFound(f"state {number} of revision {revision} is not kept; see `calserve online show {model}`")
    _check(found[:-1], found[-1])
    artifact: bytes = found[5]
    return artifact


def write_serving(connection: Connection, model: str, revision: str, serving: Serving) -> None:
    values = (model, revision, *serving)
    connection.execute("INSERT OR REPLACE INTO online_serving VALUES (?, ?, ?, ?, ?, ?)", (*values, checksum(*values)))


def keep_state(
    connection: Connection, model: str, revision: str, serving: Serving, learned: int, artifact: bytes, head: str
) -> None:
    """Make a new state serve, and thin out the earlier ones. `head` is what a replay needs to go on from it."""
    values = (model, revision, serving.number, learned, time.time(), artifact)
    connection.execute("INSERT INTO online_states VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, checksum(*values)))
    values_of_head = (model, revision, serving.number, head)
    connection.execute("INSERT INTO online_heads VALUES (?, ?, ?, ?, ?)", (*values_of_head, checksum(*values_of_head)))
    write_serving(connection, model, revision, serving)
    query = "SELECT number, time FROM online_states WHERE model = ? AND revision = ? ORDER BY number"
    last = 0.0
    spaced: list[int] = []
    for number, at in connection.execute(query, (model, revision)).fetchall():
        if number in serving[:2]:
            continue
        if at - last < KEEP_SECONDS:
            _forget(connection, model, revision, number)
        else:
            last = at
            spaced.append(number)
    for number in spaced[:-MOST_KEPT]:
        _forget(connection, model, revision, number)


def set_back(connection: Connection, model: str, revision: str, step: int, number: int) -> None:
    """Write down that after this step learning goes on from that state."""
    values = (model, revision, step, number)
    connection.execute("INSERT OR REPLACE INTO online_setbacks VALUES (?, ?, ?, ?, ?)", (*values, checksum(*values)))


def _forget(connection: Connection, model: str, revision: str, number: int) -> None:
    for table in ("online_states", "online_heads"):
        query = f"DELETE FROM {table} WHERE model = ? AND revision = ? AND number = ?"  # noqa: S608
        connection.execute(query, (model, revision, number))


def _check(values: object, crc: int) -> None:
    if checksum(*values) != crc:  # type: ignore[misc]
        raise Damaged("a state of an online calibrator is damaged: its checksum differs; see `calserve doctor`")
