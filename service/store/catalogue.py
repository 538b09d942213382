"""The catalogue: which revisions exist, which one is active and was before, which operations run. SQLite.

Every row carries a CRC of its content, verified when it is read, because SQLite's own checks do not protect content.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from service.errors import Damaged, NotFound, NotReady, shown
from service.store.database import READ_ONLY, open_database

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE revisions (
    model TEXT NOT NULL, number INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0,
    row TEXT NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY (model, number)
) STRICT;
CREATE TABLE activations (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, model_digest TEXT NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0, row TEXT NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE INDEX activations_by_model ON activations (model, model_digest, sequence);
CREATE TABLE operations (
    operation TEXT PRIMARY KEY, create_time REAL NOT NULL,
    row TEXT NOT NULL, crc INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class _Row:
    """A record kept as canonical JSON beside its CRC."""

    table: ClassVar[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, crc: int) -> Self:
        if zlib.crc32(text.encode()) != crc:
            raise Damaged(f"a row of the catalogue's table {cls.table} is damaged: its checksum differs")
        return cls(**json.loads(text))


@dataclass(frozen=True)
class RevisionRow(_Row):
    """One immutable fit. Digests are sha256 in hex; `held_out` is an evaluation as the worker wrote it."""

    table = "revisions"

    model: str
    number: int  # counts the fits of a model, never used twice; 0 before it is recorded
    kind: str
    params_json: str
    model_digest: str
    artifact_digest: str
    golden_digest: str
    row_count: int
    class_count: int
    held_out: dict[str, Any] | None
    create_time: float
    notes: list[str]
    ranking: list[dict[str, Any]] = field(default_factory=list)

    @property
    def revision(self) -> str:
        return f"{self.kind}-{self.number}"

    @property
    def blobs(self) -> set[str]:
        return {self.artifact_digest, self.golden_digest}


@dataclass(frozen=True)
class ActivationRow(_Row):
    """From `time` on `revision` served."""

    table = "activations"

    model: str
    model_digest: str
    revision: str
    time: float


@dataclass(frozen=True)
class OperationRow(_Row):
    """A long-running job. `state` is running, succeeded, failed or cancelled; `result` depends on `action`."""

    table = "operations"

    operation: str
    action: str  # fit | evaluate
    model: str
    description: str
    state: str
    create_time: float
    error_reason: str = ""
    error_message: str = ""
    result: dict[str, Any] | None = None


R = TypeVar("R", bound=_Row)


class Catalogue:
    """All methods are synchronous, short, durable when they return, and may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = open_database(path, "catalogue", SCHEMA, SCHEMA_VERSION)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def finish_fit(self, row: RevisionRow, operation: OperationRow) -> RevisionRow:
        """Record a fit under the model's next number and its operation as done, both or neither; the numbered row."""
        with self._transaction() as connection:
            query = "SELECT coalesce(max(number), 0) FROM revisions WHERE model = ?"
            (last,) = connection.execute(query, (row.model,)).fetchone()
            numbered = replace(row, number=last + 1)
            text = numbered.to_json()
            connection.execute(
                "INSERT INTO revisions (model, number, row, crc) VALUES (?, ?, ?, ?)",
                (row.model, numbered.number, text, zlib.crc32(text.encode())),
            )
            _put_operation(connection, replace(operation, result={"revision": numbered.revision}))
        return numbered

    def revisions(self, model: str) -> list[RevisionRow]:
        """The revisions of a model, newest first."""
        query = "SELECT row, crc FROM revisions WHERE model = ? AND deleted = 0 ORDER BY number DESC"
        return self._read(RevisionRow, query, (model,))

    def revision(self, model: str, revision: str) -> RevisionRow:
        """NotFound if the model has no such revision."""
        _, _, number = revision.rpartition("-")
        if number.isascii() and number.isdigit() and len(number) < 18:
            query = "SELECT row, crc FROM revisions WHERE model = ? AND number = ? AND deleted = 0"
            for row in self._read(RevisionRow, query, (model, int(number))):
                if row.revision == revision:
                    return row
        raise NotFound(f"model {shown(model)} has no revision {shown(revision)}")

    def delete_revision(self, row: RevisionRow) -> set[str]:
        """Forget a revision; its number stays taken. The digests of its blobs that no other revision uses."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE revisions SET deleted = 1 WHERE model = ? AND number = ?", (row.model, row.number)
            )
            kept = connection.execute("SELECT row FROM revisions WHERE deleted = 0").fetchall()
        used = {digest for (text,) in kept for digest in RevisionRow(**json.loads(text)).blobs}
        return row.blobs - used

    def record_activation(self, row: ActivationRow) -> None:
        text = row.to_json()
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO activations (model, model_digest, row, crc) VALUES (?, ?, ?, ?)",
                (row.model, row.model_digest, text, zlib.crc32(text.encode())),
            )

    def undo_activation(self, model: str, model_digest: str) -> None:
        """Mark the newest activation as undone, so that the one before it is the newest again. Nothing is erased."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE activations SET undone = 1 WHERE sequence = "
                "(SELECT max(sequence) FROM activations WHERE model = ? AND model_digest = ? AND undone = 0)",
                (model, model_digest),
            )

    def activations(self, model: str, model_digest: str) -> list[ActivationRow]:
        """What was activated on this model file and not undone, newest first."""
        query = """
            SELECT row, crc FROM activations
            WHERE model = ? AND model_digest = ? AND undone = 0 ORDER BY sequence DESC
        """
        return self._read(ActivationRow, query, (model, model_digest))

    def put_operation(self, row: OperationRow) -> None:
        """Insert or replace."""
        with self._transaction() as connection:
            _put_operation(connection, row)

    def operations(self) -> list[OperationRow]:
        """All operations, newest first."""
        return self._read(OperationRow, "SELECT row, crc FROM operations ORDER BY create_time DESC", ())

    def prune_operations(self, *, keep: int) -> None:
        """Forget all but the newest `keep` operations."""
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM operations WHERE operation NOT IN "
                "(SELECT operation FROM operations ORDER BY create_time DESC LIMIT ?)",
                (keep,),
            )

    def changes(self) -> int:
        """Another number after another process has written."""
        with self._lock:
            (number,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(number)

    def problems(self) -> Iterator[str]:
        """What is wrong with the rows, in words."""
        for kind in (RevisionRow, ActivationRow, OperationRow):
            with self._lock:
                rows = self._connection.execute(f"SELECT row, crc FROM {kind.table}").fetchall()  # noqa: S608
            damaged = sum(zlib.crc32(text.encode()) != crc for text, crc in rows)
            if damaged:
                yield f"{damaged} rows of the catalogue's table {kind.table} are damaged: their checksums differ"

    def blobs(self) -> set[str]:
        """The digests of all blobs that revisions use."""
        rows = self._read(RevisionRow, "SELECT row, crc FROM revisions WHERE deleted = 0", ())
        return {digest for row in rows for digest in row.blobs}

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):  # disk full, input/output error, read-only
                    raise NotReady("the store cannot be written now", reason=READ_ONLY) from error
                raise

    def _read(self, kind: type[R], query: str, arguments: tuple[Any, ...]) -> list[R]:
        with self._lock:
            rows = self._connection.execute(query, arguments).fetchall()
        return [kind.from_json(text, crc) for text, crc in rows]


def _put_operation(connection: sqlite3.Connection, row: OperationRow) -> None:
    text = row.to_json()
    connection.execute(
        "INSERT OR REPLACE INTO operations (operation, create_time, row, crc) VALUES (?, ?, ?, ?)",
        (row.operation, row.create_time, text, zlib.crc32(text.encode())),
    )
