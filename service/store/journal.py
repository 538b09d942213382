"""The journal: every prediction that is kept, the labels that came for them, and how far each reader has read. SQLite.

Labels are on the disk before they are acknowledged. Predictions wait in memory for a moment and are written together;
what cannot be kept is counted. The order of the journal is that of its packs, and within a pack that of its rows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from service.store import receipts
from service.store.database import Connection, open_database, reading_errors
from service.store.journal_tables import (
    SCHEMA,
    SCHEMA_VERSION,
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
OVERHEAD_BYTES = 400
"""What a waiting request takes besides its numbers."""
LOST = ("full", "disk")
"""Why a prediction is not kept: too many wait, or the disk has failed."""
PRUNE_SECONDS = 10.0
KEY_SECONDS = 30 * 86400.0
"""After this ids and receipts are signed with a new key. Old keys are known as long as what they signed may be kept."""


class OpenStream:
    """The requests of one served model on their way to the journal. `append` is for one thread."""

    def __init__(self, journal: Journal, row: StreamRow) -> None:
        self.row = row
        self.waiting: deque[Answered] = deque()
        self.written, self.recorded = 0, False  # requests that are past; whether the stream's row is there
        self.lost_rows: Counter[str] = Counter()  # why -> how many
        self.kept_rows = self.told_lost = 0
        self._journal, self._next = journal, 0
        self._key: Key | None = None
        self.sign_with(journal.keys.newest)

    def sign_with(self, key: Key) -> None:
        if self._key is not key:
            self._ids, self._key = IdMaker(key, self.row.stream), key

    def append(self, request: Answered) -> int | None:
        """The request's number in the stream; None if there is no room, which is counted."""
        if refused := self._journal.refusal(size_of(request)):
            self.lost_rows[refused] += len(request.logits)
            return None
        number, self._next = self._next, self._next + 1
        self.waiting.append(request)
        return number

    def prediction_id(self, number: int) -> bytes:
        return self._ids.make(number)

    def receipt(self, number: int, request: Answered) -> bytes:
        return receipts.issue(self._key or self._journal.keys.newest, self.row, number, request)


class Journal:
    """The predictions, labels and readers of a data directory.

    Several processes may each have one on the same file: each writes what it answered; one of them, which `learns`,
    records labels and forgets what is too old.

    Attributes
    ----------
    writer : what writes it
    keys : what signs its ids
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
        self._in_flight: list[tuple[OpenStream, list[Answered], int]] = []  # of this transaction; rows told as lost
        self._flush_at: float | None = None
        self._prune_at = time.monotonic() + PRUNE_SECONDS if learns else float("inf")
        self._reading = threading.Lock()
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
        return open_database(self.path, "journal", SCHEMA, SCHEMA_VERSION)

    def start(self) -> None:
        self.writer.start()

    def close(self) -> None:
        """Write what waits, then close."""
        if self._flush_at is not None and self.writer.writable:
            self._flush_at = 0.0
        self.writer.close()
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

    def open_stream(self, model: str, version: str, digest: str, class_count: int) -> OpenStream:
        """A stream for what this process answers with one model file."""
        number = next(self._numbers, None)
        if number is None:
            self._numbers = self._take_numbers()
            number = next(self._numbers)
        row = StreamRow(number, model, version, digest, class_count, time.time())
        stream = OpenStream(self, row)
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
            waiting = [stream.waiting.popleft() for _ in range(len(stream.waiting))]
            if waiting:
                before = [flight for flight in self._in_flight if flight[0] is stream]
                first = stream.written + sum(len(requests) for _, requests, _ in before)
                lost = stream.lost_rows.total()
                self._in_flight.append((stream, waiting, lost))
                self._write_packs(
                    connection, stream, waiting, first, lost - (before[-1][2] if before else stream.told_lost)
                )

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the journal, and may not write."""
        with self._reading:
            if self._read_connection is None:
                self._read_connection = self.connect()
                self._read_connection.execute("PRAGMA query_only=ON")
            self._read_connection.execute("BEGIN")
            try:
                with reading_errors("journal"):
                    yield self._read_connection
            finally:
                self._read_connection.execute("COMMIT")

    @staticmethod
    def _write_packs(
        connection: Connection, stream: OpenStream, waiting: list[Answered], first: int, lost: int
    ) -> None:
        if not stream.recorded:
            insert_stream(connection, stream.row)
        for start in range(0, len(waiting), MOST_REQUESTS_IN_PACK):
            pack = Pack.of(first + start, waiting[start : start + MOST_REQUESTS_IN_PACK])
            append_pack(connection, stream.row, pack, lost if start == 0 else 0)

    def _ended(self, committed: bool, disk: bool) -> None:
        """A transaction of the writer's has ended: what it wrote is there, is lost, or waits again."""
        flights, self._in_flight = self._in_flight, []
        if not committed:
            flights.reverse()
        for stream, waiting, told in flights:
            rows = sum(len(request.logits) for request in waiting)
            if not committed and not disk:
                stream.waiting.extendleft(reversed(waiting))
                self._flush_at = time.monotonic() + FLUSH_SECONDS
                continue
            stream.written += len(waiting)
            self._taken += sum(map(size_of, waiting))
            if committed:
                stream.recorded = True
                stream.kept_rows += rows
                stream.told_lost = told
            else:
                stream.lost_rows["disk"] += rows

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


def size_of(request: Answered) -> int:
    """The memory that a waiting request takes, about."""
    return OVERHEAD_BYTES + 8 * request.logits.size
