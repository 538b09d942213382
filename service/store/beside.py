"""What monitors read beside the scores: which segment rows belong to, and signals, a number a row.

A pack of requests that say nothing of this takes no byte for it. Otherwise, little endian:

length of the head  4 bytes     head  JSON: names of the segments and of the signals
of each request     its segment (its place among the names), as packs write whole numbers
of each signal      a float32 a row, NaN where a row has none
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.store.columns import Whole, read_column, write_column

NO_SEGMENT, OTHER_SEGMENT = "", "other"
"""Of requests that name none; of those whose segment is one more than are told from one another."""
MOST_SEGMENTS = 64
"""Of a model, that are."""
Floats = NDArray[np.float32]
Signals = Mapping[str, Floats]
_LENGTH_BYTES = 4


@dataclass(frozen=True)
class Beside:
    """Of the requests of a pack.

    Attributes
    ----------
    segments : the names that there are; the one of requests that name none is empty
    segment_indices : (requests,) which of them; empty: all are of the first
    signals : name -> (rows,), NaN where a row has none
    """

    segments: tuple[str, ...] = (NO_SEGMENT,)
    segment_indices: Whole = field(default_factory=lambda: np.zeros(0, np.uint32))
    signals: Signals = field(default_factory=dict)

    @classmethod
    def of(cls, segments: Sequence[str], signals: Sequence[Signals], row_counts: Sequence[int]) -> Self:
        """From the segment of each request, and the signals of so many rows each."""
        if not any(segments) and not any(signals):
            return cls()
        names = tuple(dict.fromkeys(segments))
        places = {name: place for place, name in enumerate(names)}
        known = dict.fromkeys(name for one in signals for name in one)

        def column(name: str) -> Floats:
            return np.concatenate(
                [
                    one[name] if name in one else np.full(rows, np.nan)
                    for one, rows in zip(signals, row_counts, strict=True)
                ],
                dtype=np.float32,
            )

        indices = np.array([places[name] for name in segments], np.uint32)
        return cls(names, indices, {name: column(name) for name in known})

    def __bool__(self) -> bool:
        return bool(self.signals) or self.segments != (NO_SEGMENT,)

    def of_rows(self, request: NDArray[np.intp]) -> NDArray[np.int64]:
        """The segment of each row, given which request each is of."""
        if not len(self.segment_indices):
            return np.zeros(len(request), np.int64)
        return self.segment_indices[request].astype(np.int64)

    def encode(self) -> list[bytes]:
        head = json.dumps({"segments": self.segments, "signals": list(self.signals)}).encode()
        values = [np.ascontiguousarray(column, "<f4").tobytes() for column in self.signals.values()]
        return [len(head).to_bytes(_LENGTH_BYTES, "little"), head, write_column(self.segment_indices), *values]

    @classmethod
    def decode(cls, data: bytes, start: int, requests: int, rows: int) -> Self:
        """ValueError or IndexError if the bytes are not that."""
        position = start + _LENGTH_BYTES
        end = position + int.from_bytes(data[start:position], "little")
        head = json.loads(data[position:end])
        indices, position = read_column(data, end, requests)
        signals = {}
        for name in head["signals"]:
            signals[name] = np.frombuffer(data, "<f4", rows, position)
            position += 4 * rows
        return cls(tuple(head["segments"]), indices, signals)
