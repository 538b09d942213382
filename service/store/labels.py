"""Recording labels: each is joined to its prediction, once, inside a transaction of the journal's writer."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from service.store import receipts
from service.store.database import Connection
from service.store.journal import Journal
from service.store.journal_tables import (
    PackRow,
    StreamRow,
    append_pack,
    caller_hash,
    change_counter,
    find_pack,
    find_stream,
    insert_stream,
    label_checksum,
    load_pack,
)
from service.store.keys import IdReader, Place
from service.store.packs import Pack
from service.store.reading import Pairs, pairs_of

ROWS_TOGETHER = (512, 64, 8, 1)
"""Labels of one statement: one of many rows lets go of the interpreter once, where one a row would each time."""
MOST_ROWS_UNSEEN = 1 << 16
"""Of a prediction that is not here no more rows are believed to be."""
DELAYS_SECONDS = (1.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0, 259200.0, 604800.0)
_MARKS = "(?, ?, ?, ?, ?, ?, ?)"


class Result(StrEnum):
    """What became of a label."""

    RECORDED = "recorded"
    DUPLICATE = "duplicate"  # it was there already, the same
    CONFLICT = "conflict"  # another label is there, and stays; this one is kept for an audit
    UNKNOWN = "unknown"  # no prediction of this model has that id and row; or, of a caller's own id, several do
    EXPIRED = "expired"  # the prediction is no longer kept
    INVALID_CLASS = "invalid_class"  # the model has no such class


class NewLabel(NamedTuple):
    """A label as it comes. `prediction_id` is the server's or the caller's own; label -1: a class that there is not."""

    prediction_id: str
    row: int
    label: int
    receipt: str = ""


class Labels:
    """Records labels. Its methods are work for the journal's writer.

    Attributes
    ----------
    delays, delay_seconds : how old predictions were when labels came for them: how many up to each of DELAYS_SECONDS,
        more than the one before, then the older ones; and the sum
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._ids = journal, IdReader(journal.keys)
        self.delays, self.delay_seconds = [0] * (len(DELAYS_SECONDS) + 1), 0.0
        self._streams: dict[int, StreamRow] = {}
        self._row_counts = lru_cache(64)(_row_counts)

    def record(self, connection: Connection, model: str, producer: str, labels: Sequence[NewLabel]) -> list[Result]:
        """What became of each label."""
        places = self._ids.read([label.prediction_id for label in labels])
        if None in places:
            places = self._with_callers_own(connection, model, labels, places)
        located = self._row_counts_of(connection, {place for place in places if place})
        if any(label.receipt for label in labels):
            self._take_receipts(connection, model, labels, places, located)
        results = [
            self._check(connection, model, label, place, located) if place else Result.UNKNOWN
            for label, place in zip(labels, places, strict=True)
        ]
        keys = [
            (*place, label.row, label.label)
            for place, label, result in zip(places, labels, results, strict=True)
            if result is Result.RECORDED and place is not None
        ]
        if keys:
            became = iter(_insert(connection, keys, producer))
            results = [next(became) if result is Result.RECORDED else result for result in results]
        return results

    def prediction(self, connection: Connection, model: str, prediction_id: str, row: int) -> Pairs | None:
        """One row of the journal; None if this model has none under that id."""
        (place,) = self._ids.read([prediction_id])
        place = place or self._own(connection, model, prediction_id)
        found = find_pack(connection, *place) if place else None
        stream = self._stream(connection, found.stream) if found else None
        if place is None or found is None or stream is None or stream.model != model:
            return None
        for part in pairs_of(connection, found):
            chosen = np.flatnonzero((part.numbers == place.number) & (part.rows == row))
            if len(chosen):
                return part.chosen(chosen)
        return None

    def _with_callers_own(
        self, connection: Connection, model: str, labels: Sequence[NewLabel], places: Sequence[Place | None]
    ) -> list[Place | None]:
        """The places of what callers named themselves, too. A name that was given twice names nothing."""
        found = list(places)
        for _ in range(2):
            for index, label in enumerate(labels):
                if label.prediction_id and found[index] is None:
                    found[index] = self._own(connection, model, label.prediction_id)
            if all(place or not label.prediction_id for place, label in zip(found, labels, strict=True)):
                break
            self._journal.write_waiting(connection)  # what was answered just now may be on its way
        return found

    def _own(self, connection: Connection, model: str, prediction_id: str) -> Place | None:
        own = prediction_id.encode()
        query = "SELECT stream, number FROM caller_ids WHERE hash = ? LIMIT 2"
        found = [Place(*place) for place in connection.execute(query, (caller_hash(model, own),))]
        return found[0] if len(found) == 1 and _own_id(connection, found[0]) == own else None

    def _row_counts_of(self, connection: Connection, places: set[Place]) -> dict[Place, int]:
        """How many rows each request has, of those that are in the journal."""
        found = dict(self._located(connection, sorted(places)))
        if len(found) < len(places):  # what was answered just now may be on its way
            self._journal.write_waiting(connection)
            found |= self._located(connection, sorted(places - found.keys()))
        return found

    def _take_receipts(
        self,
        connection: Connection,
        model: str,
        labels: Sequence[NewLabel],
        places: list[Place | None],
        located: dict[Place, int],
    ) -> None:
        """Put back what the journal has lost and a receipt brings; where no id was given, the receipt is one."""
        oldest_ms = 1000 * (time.time() - self._journal.retention.seconds)
        for index, label in enumerate(labels):
            receipt = receipts.accept(self._journal.keys, label.receipt) if label.receipt else None
            if receipt is None or receipt.stream.model != model:
                continue
            place = Place(receipt.stream.stream, receipt.pack.first)
            if places[index] not in (None, place):
                continue  # the id says otherwise
            places[index] = place
            if place not in located and receipt.pack.times_ms[0] >= oldest_ms:
                if not (known := self._row_counts_of(connection, {place})):
                    insert_stream(connection, receipt.stream)
                    append_pack(connection, receipt.stream, receipt.pack, 0)
                    known = {place: len(receipt.pack.kept)}
                located |= known

    def _located(self, connection: Connection, places: Sequence[Place]) -> Iterator[tuple[Place, int]]:
        pack: PackRow | None = None
        now = time.time()
        for place in places:
            if pack is None or pack.stream != place.stream or place.number > pack.last:
                pack = find_pack(connection, place.stream, place.number)
            if pack is not None and pack.first <= place.number <= pack.last:
                self._delayed(now - pack.time_ms / 1000)
                single = pack.rows == pack.last - pack.first + 1
                yield place, 1 if single else self._row_counts(connection, pack)[place.number - pack.first]

    def _delayed(self, seconds: float) -> None:
        self.delays[bisect_left(DELAYS_SECONDS, seconds)] += 1
        self.delay_seconds += max(0.0, seconds)  # a clock may have been set

    def _check(
        self, connection: Connection, model: str, label: NewLabel, place: Place, located: dict[Place, int]
    ) -> Result:
        """RECORDED if nothing stands against the label.

        A signed id whose prediction is not here is one that was lost, or that another process has not written yet: its
        label is recorded, and joined if the prediction comes.
        """
        stream = self._stream(connection, place.stream)
        if stream is None or stream.model != model:
            return Result.UNKNOWN
        rows = located.get(place)
        if rows is None and place.number < self._pruned(connection, place.stream):
            return Result.EXPIRED
        if not 0 <= label.row < (MOST_ROWS_UNSEEN if rows is None else rows):
            return Result.UNKNOWN
        return Result.RECORDED if 0 <= label.label < stream.class_count else Result.INVALID_CLASS

    def _stream(self, connection: Connection, stream: int) -> StreamRow | None:
        if stream not in self._streams and (found := find_stream(connection, stream)) is not None:
            self._streams[stream] = found
        return self._streams.get(stream)

    @staticmethod
    def _pruned(connection: Connection, stream: int) -> int:
        found = connection.execute("SELECT pruned FROM streams WHERE stream = ?", (stream,)).fetchone()
        return int(found[0]) if found else 0


def _row_counts(connection: Connection, pack: PackRow) -> list[int]:
    row_counts: list[int] = load_pack(connection, pack).row_counts.tolist()
    return row_counts


def _own_id(connection: Connection, place: Place) -> bytes:
    """The id that its caller gave a request."""
    row = find_pack(connection, *place)
    content: Pack | None = None if row is None else load_pack(connection, row)
    return b"" if content is None else content.caller_ids[place.number - content.first]


def _insert(connection: Connection, keys: Sequence[tuple[int, int, int, int]], producer: str) -> Iterator[Result]:
    """Write (stream, number, row, label) where none is; say which were new."""
    record = connection.execute("INSERT INTO records (time) VALUES (?)", (time.time(),)).lastrowid or 0
    number = _producer(connection, producer)
    rows = [(*key, number, record, label_checksum(*key, number, record)) for key in keys]
    inserted, start = 0, 0
    for together in ROWS_TOGETHER:
        statement = f"INSERT INTO labels VALUES {', '.join([_MARKS] * together)} ON CONFLICT DO NOTHING"  # noqa: S608
        while len(rows) - start >= together:
            values = [value for row in rows[start : start + together] for value in row]
            inserted += connection.execute(statement, values).rowcount
            start += together
    change_counter(connection, "labels", inserted)
    if inserted == len(rows):
        yield from [Result.RECORDED] * len(rows)
        return
    own = set()
    for row in rows:
        label, by = connection.execute(
            "SELECT label, record FROM labels WHERE stream = ? AND number = ? AND row = ?", row[:3]
        ).fetchone()
        if label != row[3]:
            connection.execute("INSERT INTO conflicts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
            yield Result.CONFLICT
        else:
            yield Result.RECORDED if by == record and row[:3] not in own else Result.DUPLICATE
        own.add(row[:3])


def _producer(connection: Connection, name: str) -> int:
    connection.execute("INSERT INTO producers (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
    (number,) = connection.execute("SELECT producer FROM producers WHERE name = ?", (name,)).fetchone()
    return int(number)
