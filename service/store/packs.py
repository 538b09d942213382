"""Predictions as they are kept: a pack is the requests that one stream answered one after the other.

A row each would cost an index entry, a row header and a checksum for forty bytes of content; a pack has these once for
hundreds. Its columns, one after the other, little endian:

of each request   rows, milliseconds since the pack's time, revision (its place in the pack's list), state number,
                  length of the caller's own id; then the ids
of each row       the classes that are kept, unless all are; their logits; their probabilities; log of the sum of the
                  exponentials of the logits that are not kept, unless all are

and, where requests say any, their segments and signals (`beside`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import Damaged
from service.store.beside import NO_SEGMENT, Beside, Floats, Signals
from service.store.columns import Whole, read_column, write_column
from service.store.most_probable import log_sum_exp_of_others, most_probable

ALL_UP_TO = 64
"""Classes of which every logit and probability is kept ..."""
MOST_PROBABLE = 32
"""... and beyond, how many are: those that are served as most probable."""
VALUES_TOGETHER = 1 << 16
"""Rows times classes that are looked at in one piece: more would leave the processor's cache on the way."""
LONGEST_CALLER_ID = 127
"""A caller's own id that is longer is not kept: the server's is there."""

LONGEST_MS = 2**32 - 1
_HEAD = struct.Struct("<HIIB")
_PARTIAL, _BESIDE = 1, 2
"""What a pack has, in the last byte of its head: not all classes; segments or signals."""


@dataclass(frozen=True)
class Kept:
    """Rows of logits and probabilities: of all classes, or of the most probable.

    Attributes
    ----------
    classes : (rows, kept) which classes they are, most probable first; None: all, in their order
    rest : (rows,) log-sum-exp of the logits that are not kept; None: all are
    """

    logits: Floats
    probabilities: Floats
    classes: Whole | None = None
    rest: Floats | None = None

    @classmethod
    def of(cls, logits: Floats, probabilities: Floats) -> Self:
        """What is kept of all classes' values."""
        n_rows, n_classes = logits.shape
        if n_classes <= ALL_UP_TO:
            return cls(logits, probabilities)
        step = max(1, VALUES_TOGETHER // n_classes)
        pieces = [slice(start, start + step) for start in range(0, n_rows, step)]
        return cls.joined([cls._most_probable(logits[piece], probabilities[piece]) for piece in pieces])

    @classmethod
    def _most_probable(cls, logits: Floats, probabilities: Floats) -> Self:
        classes = most_probable(probabilities, MOST_PROBABLE)
        rest = log_sum_exp_of_others(logits, classes)
        own, served = (np.take_along_axis(values, classes, 1) for values in (logits, probabilities))
        return cls(own, served, classes.astype(np.uint32), rest.astype(np.float32))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """What is kept of rows that follow each other, all of as many classes."""

        def column(name: str, dtype: Any = np.float32) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts], dtype=dtype)

        if parts[0].classes is None:
            return cls(column("logits"), column("probabilities"))
        return cls(column("logits"), column("probabilities"), column("classes", np.uint32), column("rest"))

    @property
    def label(self) -> NDArray[np.int64]:
        """The class that was served as most probable."""
        first = np.argmax(self.probabilities, axis=1) if self.classes is None else self.classes[:, 0]
        return first.astype(np.int64)

    @property
    def confidence(self) -> Floats:
        highest: Floats = self.probabilities.max(axis=1)
        return highest

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, chosen: slice | NDArray[np.intp]) -> Kept:
        rest = None if self.rest is None else self.rest[chosen]
        classes = None if self.classes is None else self.classes[chosen]
        return Kept(self.logits[chosen], self.probabilities[chosen], classes, rest)

    def encode(self) -> list[bytes]:
        columns = [self.classes, self.logits, self.probabilities, self.rest]
        return [np.ascontiguousarray(column).tobytes() for column in columns if column is not None]

    @classmethod
    def decode(cls, data: bytes, start: int, rows: int, kept: int, *, partial: bool) -> tuple[Self, int]:
        """What is kept, and where what follows it begins."""

        def column(dtype: str, *shape: int) -> NDArray[np.generic]:
            nonlocal start
            values = np.frombuffer(data, dtype, int(np.prod(shape)), start).reshape(shape)
            start += values.nbytes
            return values

        classes = column("<u4", rows, kept) if partial else None
        logits, probabilities = column("<f4", rows, kept), column("<f4", rows, kept)
        rest = column("<f4", rows) if partial else None
        return cls(logits, probabilities, classes, rest), start  # type: ignore[arg-type]


def logit_of_others(rest: Floats, others: int) -> NDArray[np.float64]:
    """(n_rows,) of each of so many classes that are not kept: an equal part of their sum of exponentials."""
    return np.asarray(rest.astype(np.float64) - np.log(float(others)))


def probability_of_others(probabilities: Floats, others: int) -> Floats:
    """(n_rows,) of each of so many classes that are not kept, as it was served: an equal part of what is left."""
    left = np.maximum(0.0, 1.0 - probabilities.sum(axis=1, dtype=np.float64))
    return np.asarray((left / others).astype(np.float32))


def logits_of(kept: Kept, n_classes: int) -> NDArray[np.float64]:
    """(n_rows, n_classes)"""
    own = kept.logits.astype(np.float64)
    if kept.classes is None or kept.rest is None:
        return own
    others = logit_of_others(kept.rest, n_classes - own.shape[1])
    logits = np.repeat(others[:, None], n_classes, axis=1)
    np.put_along_axis(logits, kept.classes.astype(np.int64), own, 1)
    return logits


def probabilities_of(kept: Kept, n_classes: int) -> Floats:
    """(n_rows, n_classes) as they were served."""
    if kept.classes is None:
        return kept.probabilities
    others = probability_of_others(kept.probabilities, n_classes - kept.classes.shape[1])
    probabilities = np.repeat(others[:, None], n_classes, axis=1)
    np.put_along_axis(probabilities, kept.classes.astype(np.int64), kept.probabilities, axis=1)
    return probabilities


class Answered(NamedTuple):
    """Requests as one snapshot answered them, one after the other: of all rows what is kept, and signals, each a number
    a row; of each request when, how many rows, the caller's own id, the segment."""

    revision: str
    state: int
    kept: Kept
    signals: Signals
    times_ms: Sequence[int]
    row_counts: Sequence[int]
    caller_ids: Sequence[bytes]
    segments: Sequence[str]

    @classmethod
    def one(
        cls,
        time_ms: int,
        revision: str,
        state: int,
        logits: Floats,
        probabilities: Floats,
        caller_id: bytes = b"",
        segment: str = NO_SEGMENT,
        signals: Signals = MappingProxyType({}),
    ) -> Self:
        """A single request."""
        kept = Kept.of(logits, probabilities)
        return cls(revision, state, kept, signals, [time_ms], [len(logits)], [caller_id], [segment])


@dataclass(frozen=True)
class Pack:
    """Requests `first`, `first + 1`, ... of a stream.

    Attributes
    ----------
    row_counts, times_ms, revision_indices, states : of each request
    caller_ids : of each request, or none at all
    kept : of each row
    beside : segments and signals
    """

    first: int
    revisions: tuple[str, ...]
    row_counts: Whole
    times_ms: NDArray[np.int64]
    revision_indices: Whole
    states: Whole
    kept: Kept
    caller_ids: Sequence[bytes] = field(default=())
    beside: Beside = field(default_factory=Beside)

    @classmethod
    def of(cls, first: int, answered: Sequence[Answered]) -> Self:
        revisions = tuple(dict.fromkeys(run.revision for run in answered))
        places = {revision: place for place, revision in enumerate(revisions)}
        requests = [len(run.row_counts) for run in answered]
        ids = [own if len(own) <= LONGEST_CALLER_ID else b"" for run in answered for own in run.caller_ids]
        return cls(
            first,
            revisions,
            np.fromiter(chain.from_iterable(run.row_counts for run in answered), np.uint32),
            np.fromiter(chain.from_iterable(run.times_ms for run in answered), np.int64),
            np.repeat(np.array([places[run.revision] for run in answered], np.uint32), requests),
            np.repeat(np.array([run.state for run in answered], np.uint32), requests),
            Kept.joined([run.kept for run in answered]),
            ids if any(ids) else (),
            Beside.of(
                list(chain.from_iterable(run.segments for run in answered)),
                [run.signals for run in answered],
                [len(run.kept) for run in answered],
            ),
        )

    @property
    def last(self) -> int:
        return self.first + len(self.row_counts) - 1

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first row of each request."""
        return np.cumsum(self.row_counts, dtype=np.int64) - self.row_counts

    def encode(self) -> bytes:
        begun = int(self.times_ms[0])
        after: NDArray[np.int64] = np.clip(self.times_ms - begun, 0, LONGEST_MS)  # a clock may have been set
        flags = _PARTIAL * (self.kept.classes is not None) + _BESIDE * bool(self.beside)
        head = _HEAD.pack(self.kept.logits.shape[1], len(self.row_counts), len(self.kept), flags)
        lengths = [len(caller_id) for caller_id in self.caller_ids] or [0] * len(self.row_counts)
        columns: list[NDArray[Any]] = [self.row_counts, after, self.revision_indices, self.states, np.array(lengths)]
        beside = self.beside.encode() if self.beside else []
        return b"".join([head, *map(write_column, columns), *self.caller_ids, *self.kept.encode(), *beside])

    @classmethod
    def decode(cls, first: int, time_ms: int, revisions: Sequence[str], data: bytes) -> Self:
        """Damaged if the bytes are not as long as they say: a checksum is verified before, so this is a writer's."""
        try:
            kept, count, rows, flags = _HEAD.unpack_from(data)
            if flags > _PARTIAL + _BESIDE:
                raise Damaged("a pack of predictions in the journal is of a newer calserve")
            position, columns = _HEAD.size, []
            for _ in range(5):
                column, position = read_column(data, position, count)
                columns.append(column)
            row_counts, after, revision_indices, states, lengths = columns
            own_ids: Sequence[bytes] = ()
            if lengths.any():
                ends = position + np.cumsum(lengths, dtype=np.int64)
                position = int(ends[-1])
                own_ids = [data[end - size : end] for end, size in zip(ends.tolist(), lengths.tolist(), strict=True)]
            content, end = Kept.decode(data, position, rows, kept, partial=bool(flags & _PARTIAL))
            beside = Beside.decode(data, end, count, rows) if flags & _BESIDE else Beside()
        except (ValueError, KeyError, struct.error, IndexError) as error:
            raise Damaged("a pack of predictions in the journal cannot be read") from error
        times = time_ms + after.astype(np.int64)
        return cls(first, tuple(revisions), row_counts, times, revision_indices, states, content, own_ids, beside)
