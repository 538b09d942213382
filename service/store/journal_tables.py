"""The journal's tables, and what is done in them inside a transaction."""

from __future__ import annotations

import contextlib
import time
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.errors import Damaged
from service.store.database import Connection
from service.store.packs import Pack

SCHEMA_VERSION = 3
SCHEMA = """
CREATE TABLE streams (
    stream INTEGER PRIMARY KEY, model TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    class_count INTEGER NOT NULL, start_time REAL NOT NULL, crc INTEGER NOT NULL, pruned INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE packs (
    pack INTEGER PRIMARY KEY AUTOINCREMENT, stream INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    rows INTEGER NOT NULL, lost INTEGER NOT NULL, time_ms INTEGER NOT NULL, revisions TEXT NOT NULL,
    payload BLOB NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE INDEX packs_by_stream ON packs (stream, first);
CREATE TABLE caller_ids (
    hash INTEGER NOT NULL, stream INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (hash, stream, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE records (record INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL) STRICT;
CREATE TABLE producers (producer INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE labels (
    stream INTEGER NOT NULL, number INTEGER NOT NULL, row INTEGER NOT NULL, label INTEGER NOT NULL,
    producer INTEGER NOT NULL, record INTEGER NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (stream, number, row)
) STRICT, WITHOUT ROWID;
CREATE INDEX labels_by_record ON labels (record);
CREATE TABLE conflicts (
    stream INTEGER NOT NULL, number INTEGER NOT NULL, row INTEGER NOT NULL, label INTEGER NOT NULL,
    producer INTEGER NOT NULL, record INTEGER NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (stream, number, row, label)
) STRICT, WITHOUT ROWID;
CREATE TABLE readers (
    model TEXT NOT NULL, reader TEXT NOT NULL, number INTEGER NOT NULL, pack INTEGER NOT NULL, row INTEGER NOT NULL,
    record INTEGER NOT NULL, state BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (model, reader)
) STRICT;
CREATE TABLE releases (
    model TEXT NOT NULL, reader TEXT NOT NULL, number INTEGER NOT NULL, pack INTEGER NOT NULL, row INTEGER NOT NULL,
    record INTEGER NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (model, reader, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE online_states (
    model TEXT NOT NULL, revision TEXT NOT NULL, number INTEGER NOT NULL, learned INTEGER NOT NULL, time REAL NOT NULL,
    artifact BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (model, revision, number)
) STRICT;
CREATE TABLE online_serving (
    model TEXT NOT NULL, revision TEXT NOT NULL, number INTEGER NOT NULL, best INTEGER NOT NULL,
    suspended INTEGER NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (model, revision)
) STRICT, WITHOUT ROWID;
CREATE TABLE online_setbacks (
    model TEXT NOT NULL, revision TEXT NOT NULL, step INTEGER NOT NULL, number INTEGER NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY (model, revision, step)
) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counters VALUES ('stream', 0), ('packs', 0), ('labels', 0);
"""
SCHEMA_OF_MONITORS = """
CREATE TABLE monitors (
    model TEXT NOT NULL, monitor TEXT NOT NULL, row TEXT NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (model, monitor)
) STRICT;
CREATE TABLE monitor_turns (
    turn INTEGER PRIMARY KEY, model TEXT NOT NULL, monitor TEXT NOT NULL, number INTEGER NOT NULL,
    row TEXT NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE INDEX turns_by_monitor ON monitor_turns (model, monitor, turn);
CREATE TABLE alarms (
    alarm INTEGER PRIMARY KEY, model TEXT NOT NULL, monitor TEXT NOT NULL, change INTEGER NOT NULL,
    row TEXT NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE INDEX alarms_by_change ON alarms (change);
CREATE INDEX alarms_by_monitor ON alarms (model, monitor, alarm);
"""
SCHEMA_OF_SHADOWS = """
CREATE TABLE online_heads (
    model TEXT NOT NULL, revision TEXT NOT NULL, number INTEGER NOT NULL, head TEXT NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY (model, revision, number)
) STRICT;
CREATE TABLE shadows (
    model TEXT NOT NULL, revision TEXT NOT NULL, row TEXT NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (model, revision)
) STRICT;
CREATE TABLE shadow_packs (
    pack INTEGER PRIMARY KEY, model TEXT NOT NULL, revision TEXT NOT NULL, stream INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, payload BLOB NOT NULL, crc INTEGER NOT NULL
) STRICT;
CREATE INDEX shadow_packs_by_place ON shadow_packs (stream, revision, last);
"""
LATER_SCHEMAS = (SCHEMA_OF_MONITORS, SCHEMA_OF_SHADOWS)
"""What each version has more than the one before."""

PRUNED_TOGETHER = 16
"""Packs that are forgotten in one transaction: so that nobody waits long for it."""


@dataclass(frozen=True)
class Retention:
    """What is kept: predictions no older than this, with their labels, and no more bytes than that."""

    seconds: float = 7 * 86400.0
    bytes: float = 1 << 30


@dataclass(frozen=True)
class StreamRow:
    """The requests of one served model in one process. Of those before `pruned` nothing is kept any more."""

    stream: int
    model: str
    version: str
    digest: str
    class_count: int
    start_time: float
    pruned: int = 0

    @property
    def crc(self) -> int:
        return checksum(self.stream, self.model, self.version, self.digest, self.class_count, self.start_time)


class PackRow(NamedTuple):
    """A pack as the table has it, without its bytes."""

    pack: int
    stream: int
    first: int
    last: int
    rows: int
    lost: int
    time_ms: int
    revisions: str  # with spaces between; a revision has none

    def crc(self, payload: bytes) -> int:
        return zlib.crc32(payload, checksum(*self[1:]))


PACK_COLUMNS = ", ".join(PackRow._fields)
_LABEL = np.dtype("V48")
"""Six whole numbers of 8 bytes."""


_FORGET_RELEASES = """
    DELETE FROM releases WHERE pack <= ? AND number < (
        SELECT max(number) FROM releases AS other
        WHERE other.model = releases.model AND other.reader = releases.reader AND pack <= ?
    )
"""
"""The last one stays, as the place where a replay begins."""


_OF_REVISIONS = ("online_states", "online_heads", "online_serving", "online_setbacks", "shadows", "shadow_packs")
_READERS_OF_REVISIONS = ("online", "coverage", "shadow")


def checksum(*values: object) -> int:
    """The CRC of a row's values: whole numbers, times, texts."""
    return zlib.crc32(repr(values).encode())


def label_checksums(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The CRC of each row of labels: stream, number, row, label, producer, record."""
    values = np.ascontiguousarray(rows, "<i8").view(_LABEL)[:, 0]
    return np.fromiter(map(zlib.crc32, values.tolist()), np.int64, len(rows))


def caller_hash(model: str, caller_id: bytes) -> int:
    """Under which a caller's own id is found: a whole number of 63 bits."""
    digest = blake2b(model.encode() + b"\0" + caller_id, digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def insert_stream(connection: Connection, row: StreamRow) -> None:
    values = (row.stream, row.model, row.version, row.digest, row.class_count, row.start_time, row.crc)
    connection.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?, ?, ?, 0) ON CONFLICT DO NOTHING", values)


def append_pack(connection: Connection, stream: StreamRow, pack: Pack, lost: int) -> None:
    """Write a pack, and under which ids of callers its requests are found. `lost`: rows before it that are not kept."""
    revisions = " ".join(pack.revisions)
    payload = pack.encode()
    row = PackRow(0, stream.stream, pack.first, pack.last, len(pack.kept), lost, int(pack.times_ms[0]), revisions)
    columns = PACK_COLUMNS.partition(", ")[2]
    connection.execute(
        f"INSERT INTO packs ({columns}, payload, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        (*row[1:], payload, row.crc(payload)),
    )
    change_counter(connection, "packs", 1)
    connection.executemany("INSERT INTO caller_ids VALUES (?, ?, ?)", _hashes(stream, pack))


def find_pack(connection: Connection, stream: int, number: int) -> PackRow | None:
    """The pack that holds a request."""
    query = f"SELECT {PACK_COLUMNS} FROM packs WHERE stream = ? AND first <= ? ORDER BY first DESC LIMIT 1"  # noqa: S608
    found = connection.execute(query, (stream, number)).fetchone()
    return PackRow(*found) if found is not None and number <= found[3] else None


def load_pack(connection: Connection, row: PackRow) -> Pack:
    """A pack's content, verified."""
    return _decoded(row, _payload(connection, row))


def _payload(connection: Connection, row: PackRow) -> bytes:
    payload: bytes
    payload, crc = connection.execute("SELECT payload, crc FROM packs WHERE pack = ?", (row.pack,)).fetchone()
    if row.crc(payload) != crc:
        raise Damaged(f"pack {row.pack} of the journal is damaged: its checksum differs; see `calserve doctor`")
    return payload


def _decoded(row: PackRow, payload: bytes) -> Pack:
    return Pack.decode(row.first, row.time_ms, row.revisions.split(" "), payload)


class RecentPacks:
    """The packs that were read last, of so many bytes, or one: those who follow the journal read the same ones, and
    most of them several times."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._packs: dict[int, tuple[Pack, int]] = {}

    def load(self, connection: Connection, row: PackRow) -> Pack:
        """A pack's content, verified when it was read. For one thread at a time."""
        found = self._packs.pop(row.pack, None)
        if found is None:
            payload = _payload(connection, row)
            found = _decoded(row, payload), len(payload)
            self._bytes += len(payload)
        self._packs[row.pack] = found
        while self._bytes > self._most_bytes and len(self._packs) > 1:
            _, size = self._packs.pop(next(iter(self._packs)))
            self._bytes -= size
        return found[0]


def find_stream(connection: Connection, stream: int) -> StreamRow | None:
    query = "SELECT stream, model, version, digest, class_count, start_time, pruned, crc FROM streams WHERE stream = ?"
    found = connection.execute(query, (stream,)).fetchone()
    if found is None:
        return None
    row = StreamRow(*found[:7])
    if row.crc != found[7]:
        raise Damaged(f"stream {stream} of the journal is damaged: its checksum differs; see `calserve doctor`")
    return row


def prune(connection: Connection, retention: Retention, most: int = PRUNED_TOGETHER) -> bool:
    """Forget the oldest packs, with their labels, of those that are too old or too many; whether there are more."""
    oldest_ms = 1000 * (time.time() - retention.seconds)
    query = f"SELECT {PACK_COLUMNS} FROM packs ORDER BY pack LIMIT ?"  # noqa: S608
    packs = [PackRow(*found) for found in connection.execute(query, (most,))]
    over = used_bytes(connection) > retention.bytes
    forgotten = packs if over else [pack for pack in packs if pack.time_ms < oldest_ms]
    for pack in forgotten:
        forget_pack(connection, pack)
    if forgotten:
        connection.execute("DELETE FROM records WHERE record < (SELECT min(record) FROM labels)")
        connection.execute(_FORGET_RELEASES, (forgotten[-1].pack,) * 2)
    return bool(forgotten) and len(forgotten) == most


def forget_pack(connection: Connection, pack: PackRow) -> None:
    """Delete a pack, the labels of its predictions and its callers' ids. Its ids are expired from now on."""
    stream = find_stream(connection, pack.stream)
    if stream is not None:
        with contextlib.suppress(Damaged):  # ids that cannot be read any more lead nowhere
            own_ids = _hashes(stream, load_pack(connection, pack))
            connection.executemany("DELETE FROM caller_ids WHERE hash = ? AND stream = ? AND number = ?", own_ids)
    range_of = (pack.stream, pack.last)
    forgotten = connection.execute("DELETE FROM labels WHERE stream = ? AND number <= ?", range_of).rowcount
    connection.execute("DELETE FROM conflicts WHERE stream = ? AND number <= ?", range_of)
    connection.execute("DELETE FROM shadow_packs WHERE stream = ? AND last <= ?", range_of)
    connection.execute("DELETE FROM packs WHERE pack = ?", (pack.pack,))
    connection.execute("UPDATE streams SET pruned = ? WHERE stream = ?", (pack.last + 1, pack.stream))
    change_counter(connection, "packs", -1)
    change_counter(connection, "labels", -forgotten)


def forget_revision(connection: Connection, model: str, revision: str) -> None:
    """Delete what was learned by a revision, how it was compared, and how far those who followed it have read."""
    for table in _OF_REVISIONS:
        connection.execute(f"DELETE FROM {table} WHERE model = ? AND revision = ?", (model, revision))  # noqa: S608
    for table in ("readers", "releases"):
        for name in _READERS_OF_REVISIONS:
            query = f"DELETE FROM {table} WHERE model = ? AND reader = ?"  # noqa: S608
            connection.execute(query, (model, f"{name}/{revision}"))


def _hashes(stream: StreamRow, pack: Pack) -> list[tuple[int, int, int]]:
    """Under which hash each request with a caller's own id is found."""
    ids = enumerate(pack.caller_ids, pack.first)
    return [(caller_hash(stream.model, own), stream.stream, number) for number, own in ids if own]


def used_bytes(connection: Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def change_counter(connection: Connection, name: str, change: int) -> int:
    connection.execute("UPDATE counters SET value = value + ? WHERE name = ?", (change, name))
    (value,) = connection.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
    return int(value)
