"""The journal: every prediction that is kept, the labels that came for them, and how far each reader has read. SQLite.

Labels are on the disk before they are acknowledged. Predictions wait in memory for a moment and are written together;
what cannot be kept is counted. The order of the journal is that of its packs, and within a pack that of its rows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from service.store import receipts
from service.store.database import Connection, open_database, reading_errors
from service.store.journal_tables import (
    LATER_SCHEMAS,
    SCHEMA,
    SCHEMA_VERSION,
    RecentPacks,
    Retention,
    StreamRow,
    append_pack,
    change_counter,
    insert_stream,
    prune,
)
from service.store.keys import IdMaker, Key, Keys
from service.store.packs import Answered, Pack
from service.store.verification import verify
from service.store.writer import Writer

STREAM_BLOCK = 256
"""Stream numbers that a process takes at once: a new stream then waits for no disk. 2^32 of them last."""
FLUSH_SECONDS = 0.25
"""How long a prediction waits for company on its way to the disk. A crash loses no more than that of them."""
MOST_REQUESTS_IN_PACK = 4096
OVERHEAD_BYTES, BYTES_OF_CLASS = 400, 8
"""What a waiting request takes: besides its numbers; of each class of each row."""
IDS_AHEAD = 32
"""Ids that are made together: in a loop each costs a fraction."""
LOST = ("full", "disk")
"""Why a prediction is not kept: too many wait, or the disk has failed."""
PRUNE_SECONDS = 10.0
RECENT_BYTES = 8 << 20
"""Of packs that are kept in memory once they are read."""
KEY_SECONDS = 30 * 86400.0
"""After this ids and receipts are signed with a new key. Old keys are known as long as what they signed may be kept."""


Read: TypeAlias = Callable[[Sequence[Any]], list[Answered]]


class OpenStream:
    """The requests of one served model on their way to the journal. `append` is for one thread.

    `read` makes of what is appended, many at once, what is kept, in the same order: in the writer's thread, since every
    line in the path of a request costs several times what it does in a loop.
    """

    def __init__(self, journal: Journal, row: StreamRow, read: Read, more_bytes: int) -> None:
        self.row, self.read = row, read
        self.waiting: deque[Any] = deque()
        self.written, self.recorded = 0, False  # requests that are past; whether the stream's row is there
        self.lost_rows: Counter[str] = Counter()  # why -> how many
        self.other_rows = 0  # of segments beyond those that are told from one another
        self.kept_rows = self.told_lost = 0
        self._journal, self._next, self._ids = journal, 0, list[bytes]()
        self._maker = IdMaker(journal.keys.newest, row.stream)
        self.row_bytes = BYTES_OF_CLASS * row.class_count + more_bytes

    def sign_with(self, key: Key) -> None:
        if self._maker.key is not key:
            self._maker = IdMaker(key, self.row.stream)

    def append(self, request: Any, rows: int) -> bytes:
        """The prediction's id; empty if there is no room, which is counted."""
        if refused := self._journal.refusal(OVERHEAD_BYTES + rows * self.row_bytes):
            self.lost_rows[refused] += rows
            return b""
        self.waiting.append(request)
        number, self._next = self._next, self._next + 1
        if not self._ids:
            self._ids = [self._maker.make(later) for later in range(number + IDS_AHEAD - 1, number - 1, -1)]
        return self._ids.pop()

    @property
    def newest(self) -> int:
        """The number of what was appended last."""
        return self._next - 1

    def receipt(self, request: Any) -> bytes:
        """The receipt of what was appended last."""
        return receipts.issue(self._maker.key, self.row, self.newest, self.read([request])[0])


class _Flight(NamedTuple):
    """What a transaction writes of a stream: it is there, lost, or waits again, when the transaction has ended."""

    stream: OpenStream
    requests: list[Any]
    rows: int
    told_lost: int


class Journal:
    """The predictions, labels and readers of a data directory.

    Several processes may each have one on the same file: each writes what it answered; one of them, which `learns`,
    records labels and forgets what is too old.

    Attributes
    ----------
    writer : what writes it
    keys : what signs its ids
    packs : those that were read last; to be asked inside `reading`
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention | None = None,
        *,
        queue_bytes: int = 64 << 20,
        learns: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path, self.retention, self._learns = folder / "journal.sqlite", retention or Retention(), learns
        self.keys = Keys(folder / "journal.keys", may_write=learns)
        self._queue_bytes, self._added, self._taken = queue_bytes, 0, 0
        self._streams: list[OpenStream] = []
        self._in_flight: list[_Flight] = []
        self._flush_at: float | None = None
        self._prune_at = time.monotonic() + PRUNE_SECONDS if learns else float("inf")
        self._reading = threading.Lock()
        self.packs = RecentPacks(RECENT_BYTES)
        self._read_connection: Connection | None = None
        probe = partial(change_counter, name="stream", change=0)
        self.writer = Writer("journal", self.connect, verify, probe, self._due_in, self._do_due, self._ended)
        try:
            self._numbers = self._take_numbers(first=True)
        except BaseException:
            self.writer.close()
            raise

    def _take_numbers(self, *, first: bool = False) -> Iterator[int]:
        """Stream numbers for this process. What is in the journal is verified first, once."""
        connection = self.connect()
        try:
            if first and self._learns:
                verify(connection)
            connection.execute("BEGIN IMMEDIATE")
            end = change_counter(connection, "stream", STREAM_BLOCK)
            connection.execute("COMMIT")
        finally:
            connection.close()
        return iter(range(end - STREAM_BLOCK + 1, end + 1))

    def connect(self) -> Connection:
        return open_database(self.path, "journal", SCHEMA, SCHEMA_VERSION, LATER_SCHEMAS)

    def start(self) -> None:
        self.writer.start()

    def close(self) -> None:
        """Write what waits, then close."""
        if self._flush_at is not None and self.writer.writable:
            self._flush_at = 0.0
        self.writer.close()
        with self._reading:  # a look that was called off may still be under way in its thread
            if self._read_connection is not None:
                self._read_connection.close()

    @property
    def queued_bytes(self) -> int:
        return self._added - self._taken

    def bytes(self) -> int:
        """What the journal takes on the disk."""
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def streams(self) -> Sequence[OpenStream]:
        """Those of this process."""
        return list(self._streams)

    def open_stream(
        self,
        model: str,
        version: str,
        digest: str,
        class_count: int,
        read: Read = list,
        more_bytes: int = 0,
    ) -> OpenStream:
        """A stream for what this process answers with one model file. `more_bytes` is what a row that waits takes
        beside its numbers."""
        number = next(self._numbers, None)
        if number is None:
            self._numbers = self._take_numbers()
            number = next(self._numbers)
        row = StreamRow(number, model, version, digest, class_count, time.time())
        stream = OpenStream(self, row, read, more_bytes)
        self._streams.append(stream)
        return stream

    def refusal(self, size: int) -> str:
        """Why there is no room for so many bytes more; empty: they count, and are written within FLUSH_SECONDS."""
        if not self.writer.writable:
            return "disk"
        if self._added - self._taken + size > self._queue_bytes:
            return "full"
        self._added += size
        if self._flush_at is None:
            self._flush_at = time.monotonic() + FLUSH_SECONDS
            self.writer.wake()
        return ""

    async def flush(self) -> None:
        """Return when everything that was appended is on the disk. NotReady if it cannot be written."""
        if self.queued_bytes:
            await self.writer.write(self.write_waiting)

    def write_waiting(self, connection: Connection) -> None:
        """Write what was appended, inside a transaction of the writer's."""
        self._flush_at = None
        self.keys.refresh()
        newest = self.keys.newest
        for stream in self._streams:
            stream.sign_with(newest)
            requests = [stream.waiting.popleft() for _ in range(len(stream.waiting))]
            if requests:
                self._write_packs(connection, stream, requests)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the journal, and may not write."""
        with self._reading:
            if self._read_connection is None:
                self._read_connection = self.connect()
                self._read_connection.execute("PRAGMA query_only=ON")
            with reading_errors("journal"):  # of a damaged file even the end of reading may fail
                self._read_connection.execute("BEGIN")
                try:
                    yield self._read_connection
                finally:
                    self._read_connection.execute("COMMIT")

    def _write_packs(self, connection: Connection, stream: OpenStream, requests: list[Any]) -> None:
        before = [flight for flight in self._in_flight if flight.stream is stream]
        told, lost = before[-1].told_lost if before else stream.told_lost, stream.lost_rows.total()
        answers = stream.read(requests)
        self._in_flight.append(_Flight(stream, requests, sum(len(answer.kept) for answer in answers), lost))
        if not stream.recorded:
            insert_stream(connection, stream.row)
        first = stream.written + sum(len(flight.requests) for flight in before)
        lost -= told
        for together in _packed(answers):
            pack = Pack.of(first, together)
            append_pack(connection, stream.row, pack, lost)
            first, lost = pack.last + 1, 0

    def _ended(self, committed: bool, disk: bool) -> None:
        """A transaction of the writer's has ended."""
        flights, self._in_flight = self._in_flight, []
        for flight in flights if committed else reversed(flights):
            stream = flight.stream
            if not committed and not disk:
                stream.waiting.extendleft(reversed(flight.requests))
                self._flush_at = time.monotonic() + FLUSH_SECONDS
                continue
            stream.written += len(flight.requests)
            self._taken += OVERHEAD_BYTES * len(flight.requests)
            self._taken += stream.row_bytes * flight.rows
            if committed:
                stream.recorded = True
                stream.kept_rows += flight.rows
                stream.told_lost = flight.told_lost
            else:
                stream.lost_rows["disk"] += flight.rows

    def _due_in(self) -> float | None:
        """Seconds until something is due; None: nothing will be."""
        due = min(self._prune_at, float("inf") if self._flush_at is None else self._flush_at)
        return None if due == float("inf") else due - time.monotonic()

    def _do_due(self, connection: Connection) -> None:
        now = time.monotonic()
        if self._flush_at is not None and self._flush_at <= now:
            self.write_waiting(connection)
        if self._prune_at <= now:
            more = prune(connection, self.retention)
            self._prune_at = now if more else now + PRUNE_SECONDS
            self.keys.rotate(KEY_SECONDS, 2 * KEY_SECONDS + self.retention.seconds)


def _packed(answers: list[Answered]) -> Iterator[list[Answered]]:
    """What goes into a pack each; what was read together is not divided."""
    together, requests = list[Answered](), 0
    for run in answers:
        if together and requests + len(run.row_counts) > MOST_REQUESTS_IN_PACK:
            yield together
            together, requests = [], 0
        together.append(run)
        requests += len(run.row_counts)
    yield together
