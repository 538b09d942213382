"""Recording labels: each is joined to its prediction, once, inside a transaction of the journal's writer."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import chain, groupby, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    label_checksums,
    load_pack,
)
from service.store.keys import NOWHERE, IdReader
from service.store.packs import Pack
from service.store.reading import Pairs, pairs_of

Whole = NDArray[np.int64]
ROWS_TOGETHER = (512, 64, 8, 1)
"""Labels of one statement: one of many rows lets go of the interpreter once, where one a row would each time."""
MOST_ROWS_UNSEEN = 1 << 16
"""Of a prediction that is not here no more rows are believed to be."""
UNSEEN = -1
"""The row count of a prediction that is not here."""
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


_RESULTS = tuple(Result)
_RECORDED, _UNKNOWN, _EXPIRED, _INVALID_CLASS = map(
    _RESULTS.index, (Result.RECORDED, Result.UNKNOWN, Result.EXPIRED, Result.INVALID_CLASS)
)


class NewLabel(NamedTuple):
    """A label as it comes. `prediction_id` is the server's or the caller's own; label -1: a class that there is not."""

    prediction_id: str
    row: int
    label: int
    receipt: str = ""


class NewLabels(NamedTuple):
    """Labels as they come, a column for each thing that a `NewLabel` says: of ten thousand in a message none is a
    Python object of its own."""

    prediction_ids: Sequence[str]
    rows: Whole
    classes: Whole
    receipts: Sequence[str]

    @classmethod
    def of(cls, labels: Sequence[NewLabel]) -> NewLabels:
        ids, rows, classes, texts = zip(*labels, strict=True) if labels else ((), (), (), ())
        return cls(ids, np.array(rows, np.int64), np.array(classes, np.int64), texts)

    @classmethod
    def joined(cls, messages: Sequence[NewLabels]) -> NewLabels:
        if len(messages) == 1:
            return messages[0]
        ids, rows, classes, texts = zip(*messages, strict=True)
        return cls([*chain(*ids)], np.concatenate(rows), np.concatenate(classes), [*chain(*texts)])


class Message(NamedTuple):
    """Labels of one model from one producer."""

    model: str
    producer: str
    labels: NewLabels


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

    def record_all(self, connection: Connection, messages: Sequence[Message]) -> list[list[Result]]:
        """What became of each label of messages that came together, as if each had come after the one before."""
        results: list[list[Result]] = []
        for (model, producer), group in groupby(messages, key=lambda message: message[:2]):
            parts = [message.labels for message in group]
            became = iter(self.record(connection, model, producer, NewLabels.joined(parts)))
            results += [list(islice(became, len(part.rows))) for part in parts]
        return results

    def record(self, connection: Connection, model: str, producer: str, labels: NewLabels) -> list[Result]:
        """What became of each label."""
        places = self._ids.read(labels.prediction_ids)
        if places.min(initial=0) == NOWHERE:
            self._find_callers_own(connection, model, labels.prediction_ids, places)
        row_counts = self._row_counts_of(connection, places)
        if any(labels.receipts):
            self._take_receipts(connection, model, labels.receipts, places, row_counts)
        became = self._judge(connection, model, labels, places, row_counts)
        new = np.flatnonzero(became == _RECORDED)
        if len(new):
            keys = np.column_stack([places, labels.rows, labels.classes])[new]
            became[new] = _insert(connection, keys, _producer(connection, producer))
        return [_RESULTS[result] for result in became.tolist()]

    def prediction(self, connection: Connection, model: str, prediction_id: str, row: int) -> Pairs | None:
        """One row of the journal; None if this model has none under that id."""
        places = self._ids.read([prediction_id])
        if places[0, 0] == NOWHERE:
            places[0] = self._own(connection, model, prediction_id)
        number, at = places[0].tolist()
        found = find_pack(connection, number, at)
        stream = self._stream(connection, number) if found else None
        if found is None or stream is None or stream.model != model:
            return None
        for part in pairs_of(connection, found):
            chosen = np.flatnonzero((part.numbers == at) & (part.rows == row))
            if len(chosen):
                return part.chosen(chosen)
        return None

    def _find_callers_own(self, connection: Connection, model: str, ids: Sequence[str], places: Whole) -> None:
        """Put in the places of what callers named themselves. A name that was given twice names nothing."""
        for _ in range(2):
            unknown = [index for index in np.flatnonzero(places[:, 0] == NOWHERE).tolist() if ids[index]]
            for index in unknown:
                places[index] = self._own(connection, model, ids[index])
            if (places[unknown, 0] != NOWHERE).all():
                break
            self._journal.write_waiting(connection)  # what was answered just now may be on its way

    def _own(self, connection: Connection, model: str, prediction_id: str) -> tuple[int, int]:
        own = prediction_id.encode()
        query = "SELECT stream, number FROM caller_ids WHERE hash = ? LIMIT 2"
        found = connection.execute(query, (caller_hash(model, own),)).fetchall()
        return found[0] if len(found) == 1 and _own_id(connection, *found[0]) == own else (NOWHERE, NOWHERE)

    def _row_counts_of(self, connection: Connection, places: Whole) -> Whole:
        """How many rows each request has; UNSEEN of those that are not in the journal."""
        row_counts = np.full(len(places), UNSEEN)
        if self._locate(connection, places, row_counts):  # what was answered just now may be on its way
            self._journal.write_waiting(connection)
            self._locate(connection, places, row_counts)
        return row_counts

    def _locate(self, connection: Connection, places: Whole, row_counts: Whole) -> bool:
        """Put in the row counts that are not known; whether one is still unknown, of a place that is one."""
        wanted = np.flatnonzero((row_counts == UNSEEN) & (places[:, 0] != NOWHERE))
        if len(wanted) > 1:
            wanted = wanted[np.lexsort((places[wanted, 1], places[wanted, 0]))]
        streams, numbers = places[wanted].T
        now, start, missing = time.time(), 0, False
        while start < len(wanted):
            stream, number = int(streams[start]), int(numbers[start])
            pack = find_pack(connection, stream, number)
            last = number if pack is None else pack.last
            stop = start + int(np.searchsorted(streams[start:], stream, side="right"))
            stop = start + int(np.searchsorted(numbers[start:stop], last, side="right"))
            if pack is None:
                missing = True
            else:
                here = numbers[start:stop]
                self._delayed(now - pack.time_ms / 1000, 1 + int(np.count_nonzero(here[1:] > here[:-1])))
                single = pack.rows == pack.last - pack.first + 1
                row_counts[wanted[start:stop]] = 1 if single else self._row_counts(connection, pack)[here - pack.first]
            start = stop
        return missing

    def _take_receipts(
        self, connection: Connection, model: str, texts: Sequence[str], places: Whole, row_counts: Whole
    ) -> None:
        """Put back what the journal has lost and a receipt brings; where no id was given, the receipt is one."""
        oldest_ms = 1000 * (time.time() - self._journal.retention.seconds)
        for index, text in enumerate(texts):
            receipt = receipts.accept(self._journal.keys, text) if text else None
            if receipt is None or receipt.stream.model != model:
                continue
            place = receipt.stream.stream, receipt.pack.first
            if tuple(places[index]) not in ((NOWHERE, NOWHERE), place):
                continue  # the id says otherwise
            places[index] = place
            if row_counts[index] == UNSEEN and receipt.pack.times_ms[0] >= oldest_ms:
                one = slice(index, index + 1)
                row_counts[one] = self._row_counts_of(connection, places[one])
                if row_counts[index] == UNSEEN:
                    insert_stream(connection, receipt.stream)
                    append_pack(connection, receipt.stream, receipt.pack, 0)
                    row_counts[index] = len(receipt.pack.kept)

    def _delayed(self, seconds: float, requests: int) -> None:
        self.delays[bisect_left(DELAYS_SECONDS, seconds)] += requests
        self.delay_seconds += requests * max(0.0, seconds)  # a clock may have been set

    def _judge(
        self, connection: Connection, model: str, labels: NewLabels, places: Whole, row_counts: Whole
    ) -> NDArray[np.int8]:
        """Of each label the number of its result: RECORDED if nothing stands against it.

        A signed id whose prediction is not here is one that was lost, or that another process has not written yet: its
        label is recorded, and joined if the prediction comes.
        """
        became = np.full(len(places), _UNKNOWN, np.int8)
        for number in set(places[:, 0].tolist()):
            stream = self._stream(connection, number)
            if stream is None or stream.model != model:
                continue
            own, unseen = places[:, 0] == number, row_counts == UNSEEN
            rows = np.where(unseen, MOST_ROWS_UNSEEN, row_counts)
            there = own & (labels.rows >= 0) & (labels.rows < rows)
            in_class = (labels.classes >= 0) & (labels.classes < stream.class_count)
            became[there] = np.where(in_class, _RECORDED, _INVALID_CLASS)[there]
            if unseen.any():
                became[own & unseen & (places[:, 1] < self._pruned(connection, number))] = _EXPIRED
        return became

    def _stream(self, connection: Connection, stream: int) -> StreamRow | None:
        if stream not in self._streams and (found := find_stream(connection, stream)) is not None:
            self._streams[stream] = found
        return self._streams.get(stream)

    @staticmethod
    def _pruned(connection: Connection, stream: int) -> int:
        found = connection.execute("SELECT pruned FROM streams WHERE stream = ?", (stream,)).fetchone()
        return int(found[0]) if found else 0


def _row_counts(connection: Connection, pack: PackRow) -> Whole:
    return load_pack(connection, pack).row_counts.astype(np.int64)


def _own_id(connection: Connection, stream: int, number: int) -> bytes:
    """The id that its caller gave a request."""
    row = find_pack(connection, stream, number)
    content: Pack | None = None if row is None else load_pack(connection, row)
    return b"" if content is None else content.caller_ids[number - content.first]


def _insert(connection: Connection, keys: Whole, producer: int) -> NDArray[np.int8]:
    """Write (stream, number, row, class) where none is; the number of what became of each."""
    record = connection.execute("INSERT INTO records (time) VALUES (?)", (time.time(),)).lastrowid or 0
    rows = np.empty((len(keys), 7), np.int64)
    rows[:, :4], rows[:, 4], rows[:, 5] = keys, producer, record
    rows[:, 6] = label_checksums(rows[:, :6])
    inserted, start = 0, 0
    for together in ROWS_TOGETHER:
        statement = f"INSERT INTO labels VALUES {', '.join([_MARKS] * together)} ON CONFLICT DO NOTHING"  # noqa: S608
        while len(rows) - start >= together:
            inserted += connection.execute(statement, rows[start : start + together].ravel().tolist()).rowcount
            start += together
    change_counter(connection, "labels", inserted)
    became = np.full(len(rows), _RECORDED, np.int8)
    if inserted < len(rows):
        became[:] = [_RESULTS.index(result) for result in _compared(connection, rows.tolist(), record)]
    return became


def _compared(connection: Connection, rows: Sequence[Sequence[int]], record: int) -> Iterator[Result]:
    """What became of each of the rows, now that there is a label for all of them; conflicts are kept."""
    own = set()
    for row in rows:
        key = tuple(row[:3])
        label, by = connection.execute(
            "SELECT label, record FROM labels WHERE stream = ? AND number = ? AND row = ?", key
        ).fetchone()
        if label != row[3]:
            connection.execute("INSERT INTO conflicts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
            yield Result.CONFLICT
        else:
            yield Result.RECORDED if by == record and key not in own else Result.DUPLICATE
        own.add(key)


def _producer(connection: Connection, name: str) -> int:
    connection.execute("INSERT INTO producers (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
    (number,) = connection.execute("SELECT producer FROM producers WHERE name = ?", (name,)).fetchone()
    return int(number)
