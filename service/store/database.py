"""How the store's SQLite databases are opened: durable, and of a schema that this release knows.

WAL with `synchronous=FULL`, asserted: with NORMAL a power cut loses what was acknowledged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import Damaged, NotReady, Refused

Connection = sqlite3.Connection
SYNCHRONOUS = "FULL"
READ_ONLY = "STORE_READ_ONLY"
"""The reason of every refusal to write: the disk is full, or an error of it has not been mended yet."""
BUSY_SECONDS = 30.0
"""How long a write waits for another process's: workers of one server share the store."""
LOG_PAGES = 4000
"""Pages of the write-ahead log that are written back together: 16 MB."""
_NUMBERS = {"NORMAL": 1, "FULL": 2}


def open_database(path: Path, what: str, schema: str, version: int, later: Sequence[str] = ()) -> Connection:
    """A connection for any thread, one at a time; the tables are made in a new file.

    `schema` makes version 1, and each of the `later` scripts the next one of what the one before made: an older file is
    brought up to date in one transaction.

    Raises
    ------
    Damaged, NotReady, Refused
        if the file is no database; cannot be opened now; is of a newer release or cannot be made durable
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = None
    try:
        connection = sqlite3.connect(path, BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        _make_durable(connection, what)
        _settle_schema(connection, (schema, *later), version)
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise NotReady(f"the {what} {path.name} cannot be opened: {error}", reason=READ_ONLY) from error
        if isinstance(error, sqlite3.DatabaseError):
            raise Damaged(f"the {what} {path.name} cannot be read: {error}") from error
        raise
    return connection


def version_of(connection: Connection) -> int:
    """Of what a connection sees: another number whenever another connection has written since."""
    (version,) = connection.execute("PRAGMA data_version").fetchone()
    return int(version)


@contextmanager
def reading_errors(what: str) -> Iterator[None]:
    """What cannot be read is Damaged."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise Damaged(f"the {what} cannot be read: {error}; see `calserve doctor`") from error


def _make_durable(connection: Connection, what: str) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
    connection.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    durable = tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
    if durable != ("wal", _NUMBERS[SYNCHRONOUS]):
        raise Refused(f"the {what} needs journal_mode=wal and synchronous=FULL, got {durable}")


def _settle_schema(connection: Connection, scripts: Sequence[str], version: int) -> None:
    if _version(connection) > version:
        raise Refused(
            f"the store was written by a newer calserve (schema {_version(connection)}, this one knows {version})"
        )
    if _version(connection) < version:
        connection.execute("BEGIN IMMEDIATE")
        for script in scripts[_version(connection) :]:  # asked again: another process may have come first
            for statement in script.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version={version}")
        connection.execute("COMMIT")


def _version(connection: Connection) -> int:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    return int(found)
