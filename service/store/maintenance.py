"""What an operator does with a data directory: look, take a copy of the pairs, forget, check, mend."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import CalserveError, Damaged, Refused
from service.store.blobs import Blobs
from service.store.catalogue import Catalogue
from service.store.database import Connection, open_database, reading_errors
from service.store.journal_tables import (
    LATER_SCHEMAS,
    PACK_COLUMNS,
    SCHEMA,
    SCHEMA_VERSION,
    PackRow,
    Retention,
    prune,
)
from service.store.keys import IdMaker, Keys
from service.store.lock import lock_store
from service.store.reading import NO_LABEL, Pairs, pairs_of
from service.store.verification import ROWS, checksum_of, damaged_labels, damaged_packs, problems

JOURNAL, KEYS, CATALOGUE, BLOBS = "journal.sqlite", "journal.keys", "catalogue.sqlite", "blobs"


@dataclass(frozen=True)
class Contents:
    """What the journal has of one model."""

    model: str
    predictions: int
    labels: int
    conflicts: int
    lost: int
    oldest_ms: int
    newest_ms: int


def contents(store: Path) -> list[Contents]:
    query = """
        SELECT model, sum(rows), sum(lost), min(time_ms), max(time_ms) FROM packs
        JOIN streams ON streams.stream = packs.stream GROUP BY model ORDER BY model
    """
    count = "SELECT count(*) FROM {0} JOIN streams ON streams.stream = {0}.stream WHERE model = ?"
    connection = open_journal(store)
    try:
        return [
            Contents(model, rows, *_counts(connection, count, model), lost, oldest, newest)
            for model, rows, lost, oldest, newest in connection.execute(query).fetchall()
        ]
    finally:
        connection.close()


def export(store: Path, model: str) -> Iterator[dict[str, Any]]:
    """Every row that the journal has of a model, with its label where there is one; in the order of the journal."""
    columns = ", ".join(f"packs.{name}" for name in PACK_COLUMNS.split(", "))
    query = f"SELECT {columns} FROM packs JOIN streams ON streams.stream = packs.stream WHERE model = ? ORDER BY pack"  # noqa: S608
    keys, connection = Keys(store / KEYS, may_write=False), open_journal(store)
    try:
        with reading_errors("journal"):
            connection.execute("BEGIN")  # it may be written meanwhile
            for found in connection.execute(query, (model,)).fetchall():
                for part in pairs_of(connection, PackRow(*found)):
                    yield from _rows(part, IdMaker(keys.newest, part.stream.stream))
    finally:
        connection.close()


def forget(store: Path, retention: Retention) -> int:
    """Forget predictions, with their labels, beyond these bounds and give the disk its space back; the bytes given."""
    held = lock_store(store)
    before, connection = (store / JOURNAL).stat().st_size, open_journal(store)
    try:
        more = True
        while more:
            connection.execute("BEGIN IMMEDIATE")
            more = prune(connection, retention)
            connection.execute("COMMIT")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return before - (store / JOURNAL).stat().st_size
    finally:
        connection.close()
        held.close()


def forget_damaged(store: Path) -> list[str]:
    """Forget whatever in the journal is not what was written, so that the rest can be served; what that was."""
    held = lock_store(store)
    connection = open_journal(store)
    try:
        found = list(problems(connection))
        connection.execute("BEGIN IMMEDIATE")
        for pack in list(damaged_packs(connection)):
            connection.execute("DELETE FROM packs WHERE pack = ?", (pack.pack,))
        for table, place in list(damaged_labels(connection)):
            connection.execute(f"DELETE FROM {table} WHERE stream = ? AND number = ? AND row = ?", place)  # noqa: S608
        for table, query in ROWS.items():
            for values in connection.execute(query).fetchall():
                if checksum_of(values) != values[-1]:
                    connection.execute(f"DELETE FROM {table} WHERE crc = ?", values[-1:])  # noqa: S608
        for table in ("packs", "labels"):
            connection.execute(f"UPDATE counters SET value = (SELECT count(*) FROM {table}) WHERE name = '{table}'")  # noqa: S608
        connection.execute("COMMIT")
        return found
    except sqlite3.DatabaseError as error:
        raise Damaged(f"the journal cannot be mended, only replaced by a backup: {error}") from error
    finally:
        connection.close()
        held.close()


def journal_problems(store: Path) -> list[str]:
    connection = open_journal(store)
    try:
        return list(problems(connection))
    finally:
        connection.close()


def store_problems(store: Path) -> Iterator[str]:
    """What is wrong with the whole store, in words, and nothing if all is well. It may be in use."""
    for check in (_in_catalogue, _in_blobs, _in_keys, _in_journal):
        try:
            yield from check(store)
        except CalserveError as error:
            yield error.message


def open_journal(store: Path) -> Connection:
    """Refused if there is none: looking makes nothing."""
    if not (store / JOURNAL).is_file():
        raise Refused(
            f"{store} holds no journal: the data directory is <model repository>.calserve unless you say else"
        )
    return open_database(store / JOURNAL, "journal", SCHEMA, SCHEMA_VERSION, LATER_SCHEMAS)


def _counts(connection: Connection, query: str, model: str) -> tuple[int, int]:
    labels, conflicts = (
        connection.execute(query.format(table), (model,)).fetchone()[0] for table in ("labels", "conflicts")
    )
    return labels, conflicts


def _rows(part: Pairs, ids: IdMaker) -> Iterator[dict[str, Any]]:
    kept = part.kept
    predicted, confidence = kept.label.tolist(), kept.confidence.tolist()
    for index, label in enumerate(part.labels.tolist()):
        yield {
            "prediction_id": ids.make(int(part.numbers[index])).decode(),
            "row": int(part.rows[index]),
            "time_ms": int(part.times_ms[index]),
            "model_version": part.stream.version,
            "calibrator_revision": part.revision,
            "online_state": int(part.states[index]),
            "predicted": predicted[index],
            "confidence": confidence[index],
            "label": None if label == NO_LABEL else label,
            "segment": part.segment_of(index),
            "signals": part.signals_of(index),
            "classes": None if kept.classes is None else kept.classes[index].tolist(),
            "logits": kept.logits[index].tolist(),
            "probabilities": kept.probabilities[index].tolist(),
        }


def _in_catalogue(store: Path) -> Iterator[str]:
    if not (store / CATALOGUE).is_file():
        yield f"the catalogue {CATALOGUE} is missing"
        return
    catalogue = Catalogue(store / CATALOGUE)
    try:
        yield from catalogue.problems()
        blobs = Blobs(store / BLOBS)
        for digest in sorted(catalogue.blobs()):
            try:
                blobs.get(digest)
            except Damaged as error:
                yield error.message
    finally:
        catalogue.close()


def _in_blobs(store: Path) -> Iterator[str]:
    for path in sorted((store / BLOBS).glob("*")):
        if path.name.startswith("."):
            yield f"{path.name} in {BLOBS} was never finished; it may be deleted while no server runs"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
            yield f"blob {path.name} is damaged: its content has another sha256"


def _in_keys(store: Path) -> Iterator[str]:
    if not (store / KEYS).is_file():
        yield f"the file of keys {KEYS} is missing: labels can no longer name predictions by the server's ids"
    Keys(store / KEYS, may_write=False)


def _in_journal(store: Path) -> Iterator[str]:
    yield from journal_problems(store)
