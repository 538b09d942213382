"""Reading the journal: one model's predictions with their labels, in their order, behind a watermark.

Where labels of mistakes come later than others, whatever is read in the order of their arrival is wrong. So a
prediction is passed when its label is there, or has been waited for long enough, and nothing behind it is passed before
it. What is said besides: which labels came after their prediction was passed, how many never came, how many predictions
were never kept.

A reader's position is written together with the state that was computed up to it. Which labels were there at each
step is written too, so that `replay` gives again exactly what `read` gave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.errors import Damaged, Stale
from service.store.beside import Signals
from service.store.database import Connection, version_of
from service.store.journal import Journal
from service.store.journal_tables import (
    PACK_COLUMNS,
    PackRow,
    StreamRow,
    checksum,
    find_pack,
    find_stream,
    load_pack,
)
from service.store.packs import Kept, Pack

NO_LABEL = -1
MOST_ROWS = 10_000
LAST = 1 << 62
_PACKS = (
    f"SELECT {', '.join(f'packs.{name}' for name in PACK_COLUMNS.split(', '))} FROM packs "  # noqa: S608
    "JOIN streams ON streams.stream = packs.stream WHERE model = ? AND pack >= ? AND pack <= ?"
)
"""A model's packs from one to another."""


class Position(NamedTuple):
    """How far a reader is: rows of packs before this row of this pack are passed, with the labels of records so far."""

    pack: int = 0
    row: int = 0
    record: int = 0


@dataclass(frozen=True)
class Pairs:
    """Rows that one revision computed for one model file, with their labels, in the order in which they were answered.

    Attributes
    ----------
    times_ms, states : of each row: when it was answered, by which state of the online calibrator (0: none)
    kept : its logits and the probabilities that were served
    labels : (rows,) the class that came true; -1: its label did not come in time
    producers : (rows,) who sent it, a number; 0: nobody
    numbers, rows : which request of the stream, and which row of it: with the stream the row's name
    segment_names : the segments that may occur; the one of rows that belong to none is empty
    segments : (rows,) which of them each row belongs to
    signals : name -> (rows,) float32: `density`, `ood_score`, `set_size`, `input_1`, ...; NaN where a row has none
    """

    stream: StreamRow
    revision: str
    times_ms: NDArray[np.int64]
    states: NDArray[np.uint32]
    kept: Kept
    labels: NDArray[np.int64]
    producers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]
    segment_names: tuple[str, ...]
    segments: NDArray[np.int64]
    signals: Signals

    def __len__(self) -> int:
        return len(self.labels)

    def segment_of(self, row: int) -> str:
        return self.segment_names[int(self.segments[row])]

    def signals_of(self, row: int) -> dict[str, float]:
        """Those that a row has."""
        return {name: float(values[row]) for name, values in self.signals.items() if not np.isnan(values[row])}

    def chosen(self, rows: slice | NDArray[np.intp]) -> Pairs:
        columns = ("times_ms", "states", "labels", "producers", "numbers", "rows", "segments")
        values = {name: getattr(self, name)[rows] for name in columns}
        signals = {name: column[rows] for name, column in self.signals.items()}
        return replace(self, kept=self.kept.rows(rows), signals=signals, **values)


@dataclass(frozen=True)
class Cohort:
    """One step of a reader, from a position to the next.

    Attributes
    ----------
    pairs : what was passed, in order; of rows without a label the label is -1
    late : labels that came after their prediction was passed, in the order of the journal
    missing : rows that were passed without a label
    dropped : rows that were answered and never kept, of those that are known
    """

    number: int
    begin: Position
    end: Position
    pairs: Sequence[Pairs]
    late: Sequence[Pairs]
    dropped: int

    @property
    def missing(self) -> int:
        return sum(int((part.labels == NO_LABEL).sum()) for part in self.pairs)

    def __bool__(self) -> bool:
        """Whether there is anything in it to learn from or to count."""
        return bool(self.pairs or self.late)


class _Nothing(NamedTuple):
    """What a reader found that found nothing: it is so until the journal changes, or a label was waited for enough."""

    version: int
    until_ms: float
    cohort: Cohort

    def is_so(self, version: int) -> bool:
        return version == self.version and 1000 * time.time() < self.until_ms


class Reader:
    """A named reader of one model's journal. Its methods are for any thread but the event loop's, one at a time.

    `wait_seconds` is how long a label is waited for; nothing younger than `hold_seconds` is passed at all. One that
    reads no labels is given none, and is faster.
    """

    def __init__(
        self,
        journal: Journal,
        model: str,
        name: str,
        wait_seconds: float,
        hold_seconds: float = 0.0,
        *,
        reads_labels: bool = True,
    ) -> None:
        self._reads_labels = reads_labels
        self._journal, self._model, self._name, self._wait_ms = journal, model, name, int(1000 * wait_seconds)
        self._hold_ms = int(1000 * hold_seconds)
        self._nothing_late: tuple[Position, int] = Position(), 0
        self._nothing: _Nothing | None = None

    def state(self) -> tuple[Position, int, bytes]:
        """Position, number of steps and the state that was committed with them; of a new reader all are empty."""
        with self._journal.reading() as connection:
            return _state(connection, self._model, self._name)

    def read(self, most_rows: int = MOST_ROWS) -> Cohort:
        """The next step, empty if nothing can be passed. It is read again until it is committed."""
        with self._journal.reading() as connection:
            version = version_of(connection)
            if self._nothing is not None and self._nothing.is_so(version):
                return self._nothing.cohort
            begin, number, _ = _state(connection, self._model, self._name)
            record = self._newest_record(connection)
            end, until_ms = self._watermark(connection, begin, max(record, begin.record), most_rows)
            searched = self._nothing_late[1] if self._nothing_late[0] == begin else begin.record
            cohort = self._cohort(connection, number + 1, begin, end, searched)
        if not cohort:  # labels of other models may come for days
            self._nothing_late = begin, end.record
            self._nothing = _Nothing(version, until_ms, cohort)
        return cohort

    def commit(self, cohort: Cohort, state: bytes = b"") -> None:
        """Write the position and the state, both or neither. Stale if another has committed this step."""
        self._journal.writer.write_now(lambda connection: self.write(connection, cohort, state))

    def write(self, connection: Connection, cohort: Cohort, state: bytes) -> None:
        """The same inside a transaction of the journal's writer: for those who wait in an event loop."""
        begin, number, _ = _state(connection, self._model, self._name)
        if (begin, number + 1) != (cohort.begin, cohort.number):
            raise Stale(f"reader {self._name!r} of model {self._model!r} is elsewhere by now; read again")
        place = (self._model, self._name, cohort.number, *cohort.end)
        connection.execute(
            "INSERT INTO readers VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (model, reader) DO UPDATE SET number = "
            "excluded.number, pack = excluded.pack, row = excluded.row, record = excluded.record, "
            "state = excluded.state, crc = excluded.crc",
            (*place, state, checksum(*place, state)),
        )
        connection.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?, ?)", (*place, checksum(*place)))

    def reset(self, connection: Connection, state: bytes) -> int:
        """Write another state at the position, inside a transaction of the journal's writer; the number of its step."""
        position, number, _ = _state(connection, self._model, self._name)
        place = (self._model, self._name, number, *position)
        connection.execute(
            "INSERT OR REPLACE INTO readers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*place, state, checksum(*place, state))
        )
        return number

    def begin_at_end(self, connection: Connection) -> None:
        """Pass everything that is there by now, in place of what was read under this name before; likewise."""
        self.forget(connection)
        query = "SELECT pack, rows FROM packs JOIN streams ON streams.stream = packs.stream WHERE model = ?"
        end = connection.execute(f"{query} ORDER BY pack DESC LIMIT 1", (self._model,)).fetchone() or (0, 0)
        place = (self._model, self._name, 0, *end, self._newest_record(connection))
        values = (*place, b"", checksum(*place, b""))
        connection.execute("INSERT INTO readers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        connection.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?, ?)", (*place, checksum(*place)))

    def forget(self, connection: Connection) -> None:
        """Forget that there was such a reader; likewise."""
        for table in ("readers", "releases"):
            query = f"DELETE FROM {table} WHERE model = ? AND reader = ?"  # noqa: S608
            connection.execute(query, (self._model, self._name))

    def passed(self, most_packs: int, most_rows: int = LAST) -> list[Pairs]:
        """What the last packs before the position have, with the labels that were there; packs of so many rows."""
        with self._journal.reading() as connection:
            position, _, _ = _state(connection, self._model, self._name)
            record = position.record if self._reads_labels else LAST
            query = f"{_PACKS} ORDER BY pack DESC LIMIT ?"
            found = connection.execute(query, (self._model, 0, position.pack, most_packs)).fetchall()
            packs = list(map(PackRow._make, found))
            rows = accumulate(row.rows for row in packs)
            packs = [row for row, so_far in zip(packs, rows, strict=True) if so_far - row.rows < most_rows]
            pairs: list[Pairs] = []
            for row in reversed(packs):
                stop = position.row if row.pack == position.pack else row.rows
                pairs += pairs_of(connection, row, 0, record, slice(0, stop))
            return pairs

    def is_whole(self) -> bool:
        """Whether no prediction of the model was forgotten yet, so that a replay has every step."""
        with self._journal.reading() as connection:
            query = "SELECT count(*) FROM streams WHERE model = ? AND pruned > 0"
            (forgotten,) = connection.execute(query, (self._model,)).fetchone()
        return bool(forgotten == 0)

    def replay(self) -> Iterator[Cohort]:
        """Every step that was committed, as it was, as far as its predictions are still kept."""
        query = (
            "SELECT model, reader, number, pack, row, record, crc FROM releases WHERE model = ? AND reader = ? "
            "ORDER BY number"
        )
        with self._journal.reading() as connection:
            steps = connection.execute(query, (self._model, self._name)).fetchall()
        begin: Position | None = None
        for *place, crc in steps:
            if checksum(*place) != crc:
                raise Damaged(f"a step of reader {self._name!r} is damaged: its checksum differs")
            number, end = place[2], Position(*place[3:])
            begin = Position() if number == 1 and begin is None else begin
            if begin is not None:  # else what came before it is forgotten
                with self._journal.reading() as connection:
                    cohort = self._cohort(connection, number, begin, end, begin.record)
                yield cohort
            begin = end

    def _newest_record(self, connection: Connection) -> int:
        """Labels up to this record are there to be read."""
        query = "SELECT coalesce(max(record), 0) FROM records"
        return int(connection.execute(query).fetchone()[0]) if self._reads_labels else 0

    def _watermark(
        self, connection: Connection, begin: Position, record: int, most_rows: int
    ) -> tuple[Position, float]:
        """The position after the last row that may be passed, of labels up to `record`; and until when it is that one,
        if nothing comes."""
        now_ms = int(1000 * time.time())
        oldest_ms, held_ms = now_ms - self._wait_ms, now_ms - self._hold_ms if self._hold_ms else LAST
        at, left, until_ms = Position(begin.pack, begin.row, record), most_rows, float("inf")
        for row in self._packs(connection, begin, None):
            pack = self._journal.packs.load(connection, row)
            start = begin.row if row.pack == begin.pack else 0
            labels, _ = _labels_of(connection, row, pack, 0, record)
            times_ms = np.repeat(pack.times_ms, pack.row_counts)
            waited_for = ((labels == NO_LABEL) & (times_ms > oldest_ms)) | (times_ms > held_ms)
            waited_for[:start] = False
            passed = len(labels)
            if waited_for.any():
                passed = int(np.argmax(waited_for))
                until_ms = float(times_ms[passed]) + max(self._hold_ms, (labels[passed] == NO_LABEL) * self._wait_ms)
            passed = min(passed, start + left)
            at = Position(row.pack, passed, record)
            left -= passed - start
            if passed < len(labels) or left <= 0:
                break
        return at, until_ms

    def _cohort(self, connection: Connection, number: int, begin: Position, end: Position, searched: int) -> Cohort:
        pairs: list[Pairs] = []
        dropped = 0
        for row in self._packs(connection, begin, end):
            start = begin.row if row.pack == begin.pack else 0
            stop = end.row if row.pack == end.pack else row.rows
            dropped += row.lost if start == 0 and stop else 0
            if start < stop:
                pairs += self._pairs(connection, row, 0, end.record, slice(start, stop))
        return Cohort(number, begin, end, pairs, self._late(connection, begin, searched, end.record), dropped)

    def _late(self, connection: Connection, begin: Position, after: int, record: int) -> list[Pairs]:
        """Labels of the records after the one and up to the other, for rows that were passed at `begin`."""
        if record <= after:
            return []
        query = (
            "SELECT DISTINCT labels.stream, number FROM labels JOIN streams ON streams.stream = labels.stream "
            "WHERE record > ? AND record <= ? AND model = ? ORDER BY labels.stream, number"
        )
        places = connection.execute(query, (after, record, self._model)).fetchall()
        packs: dict[int, PackRow] = {}
        last: PackRow | None = None
        for stream, number in places:
            if last is None or last.stream != stream or number > last.last:
                last = find_pack(connection, stream, number)
            if last is not None and (last.pack, 0) < begin[:2]:
                packs[last.pack] = last
        late: list[Pairs] = []
        for number in sorted(packs):
            row = packs[number]
            stop = begin.row if number == begin.pack else row.rows
            for part in self._pairs(connection, row, after, record, slice(0, stop)):
                came = np.flatnonzero(part.labels != NO_LABEL)
                late += [part.chosen(came)] if len(came) else []
        return late

    def _pairs(self, connection: Connection, row: PackRow, after: int, record: int, chosen: slice) -> list[Pairs]:
        return pairs_of(connection, row, after, record, chosen, self._journal.packs.load)

    def _packs(self, connection: Connection, begin: Position, end: Position | None) -> Iterator[PackRow]:
        """The model's packs from the position on, in the order of the journal."""
        last = LAST if end is None else end.pack
        for found in connection.execute(f"{_PACKS} ORDER BY pack", (self._model, begin.pack, last)):
            yield PackRow(*found)


class Follower(Reader):
    """A reader that waits for no label and keeps no position: a row comes when it was answered, its label when it came.

    It begins `most_rows` rows before the end of the journal at most, and is for sums that the order of labels does not
    change: nothing is held back behind a watermark.
    """

    def __init__(self, journal: Journal, model: str, most_rows: int) -> None:
        super().__init__(journal, model, "", 0.0)
        self._most_rows = most_rows
        self._at: Position | None = None
        self._seen = 0, 0

    def read(self, most_rows: int = MOST_ROWS) -> Cohort:
        """The next rows, with the labels that are there, and labels that came for rows read before."""
        with self._journal.reading() as connection:
            record, pack = connection.execute(
                "SELECT coalesce((SELECT max(record) FROM records), 0), coalesce((SELECT max(pack) FROM packs), 0)"
            ).fetchone()
            begin = self._at or Position(self._first_pack(connection), 0, record)
            if self._seen == (record, pack):
                return Cohort(0, begin, begin, (), (), 0)
            end, _ = self._watermark(connection, begin, record, most_rows)
            cohort = self._cohort(connection, 0, begin, end, begin.record)
        self._at = end
        if not cohort:
            self._seen = record, pack
        return cohort

    def commit(self, cohort: Cohort, state: bytes = b"") -> None:
        raise NotImplementedError("a follower keeps no position")

    def _first_pack(self, connection: Connection) -> int:
        first, left = 0, self._most_rows
        for row in map(PackRow._make, connection.execute(f"{_PACKS} ORDER BY pack DESC", (self._model, 0, LAST))):
            left -= row.rows
            if left < 0:
                break
            first = row.pack
        return first


def _state(connection: Connection, model: str, name: str) -> tuple[Position, int, bytes]:
    query = "SELECT model, reader, number, pack, row, record, state, crc FROM readers WHERE model = ? AND reader = ?"
    found = connection.execute(query, (model, name)).fetchone()
    if found is None:
        return Position(), 0, b""
    *values, crc = found
    if checksum(*values) != crc:
        raise Damaged(f"the state of reader {name!r} is damaged: its checksum differs; see `calserve doctor`")
    return Position(*values[3:6]), values[2], values[6]


def _labels_of(
    connection: Connection, row: PackRow, pack: Pack, after: int, record: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Label and producer of each row of a pack, of labels after the one record and up to the other."""
    labels, producers = np.full(len(pack.kept), NO_LABEL, np.int64), np.zeros(len(pack.kept), np.int64)
    if record <= after:
        return labels, producers
    query = (
        "SELECT number, row, label, producer FROM labels "
        "WHERE stream = ? AND number BETWEEN ? AND ? AND record > ? AND record <= ?"
    )
    found = connection.execute(query, (row.stream, row.first, row.last, after, record)).fetchall()
    if found:
        numbers, rows, values, by = np.array(found, np.int64).T
        real = rows < pack.row_counts[numbers - row.first]  # a label that came first could name any row
        places = (pack.starts[numbers - row.first] + rows)[real]
        labels[places], producers[places] = values[real], by[real]
    return labels, producers


def pairs_of(
    connection: Connection,
    row: PackRow,
    after: int = 0,
    record: int = LAST,
    chosen: slice | None = None,
    load: Callable[[Connection, PackRow], Pack] = load_pack,
) -> list[Pairs]:
    """A pack's rows, a part for each stretch that one revision computed; labels after one record, up to another."""
    stream = find_stream(connection, row.stream)
    if stream is None:
        raise Damaged(f"stream {row.stream} of the journal is missing; see `calserve doctor`")
    pack = load(connection, row)
    labels, producers = _labels_of(connection, row, pack, after, record)
    request = np.repeat(np.arange(len(pack.row_counts)), pack.row_counts)
    whole = Pairs(
        stream,
        "",
        pack.times_ms[request],
        pack.states[request],
        pack.kept,
        labels,
        producers,
        pack.first + request,
        np.arange(len(request)) - pack.starts[request],
        pack.beside.segments,
        pack.beside.of_rows(request),
        pack.beside.signals,
    )
    revisions = pack.revision_indices[request]
    ends = [*(np.flatnonzero(np.diff(revisions)) + 1).tolist(), len(request)]
    parts = []
    for start, stop in zip([0, *ends], ends, strict=False):
        revision = pack.revisions[int(revisions[start])]
        if chosen is not None:
            start, stop = max(start, chosen.start), min(stop, chosen.stop)
        if start < stop:
            part = whole.chosen(slice(start, stop))
            there = {name: values for name, values in part.signals.items() if not np.isnan(values).all()}
            parts.append(replace(part, revision=revision, signals=there))
    return parts
