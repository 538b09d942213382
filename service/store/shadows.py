"""What is kept of shadows: what was asked for and what came of it, and the probabilities that challengers gave.

How far a comparison has read, with its state, is with the journal's readers. A challenger whose probabilities cannot be
computed from the journal is run beside what serves; what it gave is here, under the names of the rows that were served,
a pack for what gathered in a moment, and goes when they go. A pack, little endian:

of each request   its number in the stream (8 bytes), its rows (4 bytes)
of each row       the classes that are kept, unless all are, then their probabilities, as `packs` keeps them
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import Damaged
from service.store.database import Connection
from service.store.journal_tables import checksum
from service.store.packs import Kept, probabilities_of
from service.store.reading import Pairs

RUNNING, PROMOTED, STOPPED = "running", "promoted", "stopped"
_HEAD = struct.Struct("<IIH?")
_ROW_BITS = np.uint64(24)


@dataclass(frozen=True)
class ShadowRow:
    """One challenger, as it was asked for.

    Attributes
    ----------
    champion : the revision that it is compared with
    share : of requests that are computed by the challenger too; 0: the journal's logits are enough
    start_ms, since_ms : when it was started; rows predicted from then on are compared
    since_step : of the reader; steps up to it belong to an earlier comparison
    started_by, ended_by : whose token, or what policy
    outcome : RUNNING, PROMOTED or STOPPED
    promoting : who is about to promote it: a crash between the activation and the end of the shadow leaves this
    note : what befell it, in words
    final : of a shadow that has ended, how the comparison stood
    """

    model: str
    revision: str
    model_digest: str
    champion: str
    policy: str
    level: float
    least_labels: int
    share: float
    start_ms: int
    since_ms: int
    since_step: int = 0
    started_by: str = ""
    outcome: str = RUNNING
    promoting: str = ""
    ended_by: str = ""
    end_ms: int = 0
    note: str = ""
    final: dict[str, Any] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.outcome == RUNNING


class ShadowPack(NamedTuple):
    """Requests in the order of their numbers: of each its number and its rows, and what a challenger gave."""

    numbers: NDArray[np.uint64]
    row_counts: NDArray[np.uint32]
    kept: Kept

    @classmethod
    def of(cls, requests: Sequence[tuple[int, NDArray[np.float32]]]) -> Self:
        """From the number and the probabilities, of all classes, of each request."""
        probabilities = np.concatenate([given for _, given in requests], dtype=np.float32)
        return cls(
            np.array([number for number, _ in requests], np.uint64),
            np.array([len(given) for _, given in requests], np.uint32),
            Kept.of(probabilities, probabilities),
        )

    def encode(self) -> bytes:
        classes, given = self.kept.classes, self.kept.probabilities
        head = _HEAD.pack(len(self.numbers), len(given), given.shape[1], classes is not None)
        columns = [self.numbers, self.row_counts, *([] if classes is None else [classes]), given]
        return b"".join([head, *(np.ascontiguousarray(column).tobytes() for column in columns)])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        requests, rows, kept, partial = _HEAD.unpack_from(data)
        position = _HEAD.size

        def column(dtype: str, *shape: int) -> NDArray[Any]:
            nonlocal position
            values = np.frombuffer(data, dtype, int(np.prod(shape)), position).reshape(shape)
            position += values.nbytes
            return values

        numbers, row_counts = column("<u8", requests), column("<u4", requests)
        classes = column("<u4", rows, kept) if partial else None
        given = column("<f4", rows, kept)
        return cls(numbers, row_counts, Kept(given, given, classes))

    @property
    def names(self) -> NDArray[np.uint64]:
        """Of each row, in order: request and row as one number."""
        starts = np.cumsum(self.row_counts, dtype=np.int64) - self.row_counts
        rows = np.arange(len(self.kept)) - np.repeat(starts, self.row_counts)
        return _names(np.repeat(self.numbers, self.row_counts), rows)


def write_shadow(connection: Connection, row: ShadowRow) -> None:
    values = (row.model, row.revision, json.dumps(asdict(row), sort_keys=True))
    connection.execute("INSERT OR REPLACE INTO shadows VALUES (?, ?, ?, ?)", (*values, checksum(*values)))


def read_shadows(connection: Connection, model: str = "") -> list[ShadowRow]:
    """Those of a model (empty: of all), running or not, by their names."""
    query = "SELECT model, revision, row, crc FROM shadows WHERE model = ? OR ? = '' ORDER BY model, revision"
    found = connection.execute(query, (model, model)).fetchall()
    for *values, crc in found:
        _check(values, crc)
    return [ShadowRow(**json.loads(row)) for _, _, row, _ in found]


def append_shadow_pack(connection: Connection, model: str, revision: str, stream: int, pack: ShadowPack) -> None:
    values = (model, revision, stream, int(pack.numbers[0]), int(pack.numbers[-1]), pack.encode())
    connection.execute(
        "INSERT INTO shadow_packs (model, revision, stream, first, last, payload, crc) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*values, checksum(*values)),
    )


def forget_given(connection: Connection, row: ShadowRow) -> None:
    """Delete what a challenger gave."""
    connection.execute("DELETE FROM shadow_packs WHERE model = ? AND revision = ?", (row.model, row.revision))


def given_to(connection: Connection, revision: str, part: Pairs) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which rows a challenger was run on, and the probabilities (n_rows, n_classes) that it gave: 0 for the others."""
    n_classes = part.stream.class_count
    there, given = np.zeros(len(part), bool), np.zeros((len(part), n_classes), np.float32)
    names = _names(part.numbers.astype(np.uint64), part.rows)
    query = (
        "SELECT model, revision, stream, first, last, payload, crc FROM shadow_packs "
        "WHERE stream = ? AND revision = ? AND last >= ? AND first <= ?"
    )
    bounds = (int(part.numbers.min()), int(part.numbers.max()))
    for *values, crc in connection.execute(query, (part.stream.stream, revision, *bounds)).fetchall():
        _check(values, crc)
        pack = ShadowPack.decode(values[5])
        known = pack.names
        places = np.minimum(np.searchsorted(known, names), len(known) - 1)
        found = known[places] == names
        given[found] = probabilities_of(pack.kept, n_classes)[places[found]]
        there |= found
    return there, given


def _names(numbers: NDArray[np.uint64], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    names: NDArray[np.uint64] = (numbers << _ROW_BITS) | rows.astype(np.uint64)
    return names


def _check(values: Sequence[Any], crc: int) -> None:
    if checksum(*values) != crc:
        raise Damaged("a row of the shadows is damaged: its checksum differs; see `calserve doctor`")
