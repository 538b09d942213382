"""From answers to the journal: which models' predictions are kept, and how sure a caller can be of it.

off      nothing is kept, and no label can come
async    an answer is kept within a quarter of a second of being given; a crash loses those
sync     an answer is given when it is kept, and refused with STORE_READ_ONLY where it cannot be
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from calibrators.graph import FURTHER_OUTPUTS, LOGITS
from service.errors import NotReady
from service.inference.batcher import Answer, Run
from service.inference.input_signals import InputSignals, Sample
from service.inference.model import ServedModel
from service.inference.prediction_sets import SET_SIZE
from service.store.beside import MOST_SEGMENTS, NO_SEGMENT, OTHER_SEGMENT, Floats
from service.store.database import READ_ONLY
from service.store.journal import Journal, OpenStream
from service.store.packs import VALUES_TOGETHER, Answered, Kept

PROBABILITIES = "probabilities"
ROWS_TOGETHER = 1024
"""Rows of answers that are read in one piece, of many classes fewer."""
NEEDED = (LOGITS, PROBABILITIES)
"""Outputs that a run must compute for its rows to be kept."""
NEEDED_IF_THERE = ("density", "ood_score")
"""Likewise, of a snapshot that has them."""
TELLING = {PROBABILITIES, "confidence", "label", *FURTHER_OUTPUTS}
"""An answer without any of these says nothing that a label could prove wrong."""


class Mode(StrEnum):
    OFF = "off"
    ASYNC = "async"
    SYNC = "sync"


Offer: TypeAlias = Callable[[int, Answer, Callable[[], Mapping[str, Any]], int], None]
"""(number in the stream, answer, what gives the inputs, their bytes)"""


class ModelJournal:
    """Where one served model's answers go.

    Attributes
    ----------
    stream : its number
    shadows : who is told of what was appended
    """

    def __init__(self, journal: Journal, stream: OpenStream, *, waits: bool) -> None:
        self.waits, self.stream = waits, stream.row.stream
        self.shadows: tuple[Offer, ...] = ()
        self._journal, self._stream = journal, stream
        self._segments = {NO_SEGMENT}

    def segment(self, name: str) -> str:
        """Under which name the rows of a segment are kept."""
        if name not in self._segments and len(self._segments) > MOST_SEGMENTS:
            return OTHER_SEGMENT
        self._segments.add(name)
        return name

    def keep(
        self, answer: Answer, caller_id: bytes, segment: str = NO_SEGMENT, inputs: Sample = (), *, receipt: bool = False
    ) -> tuple[bytes, bytes]:
        """Append an answer's rows, with what is kept of their inputs; the prediction's id and, if asked for, its
        receipt. Both are empty if there is no room, or are no rows."""
        rows = answer.stop - answer.start
        if not rows:
            return b"", b""
        if segment is OTHER_SEGMENT:
            self._stream.other_rows += rows
        request = (time.time_ns(), answer, caller_id, segment, inputs)
        prediction_id = self._stream.append(request, rows)
        if not prediction_id and self.waits:
            raise NotReady("the prediction cannot be kept now, which its model asks for", reason=READ_ONLY)
        return prediction_id, self._stream.receipt(request) if receipt and prediction_id else b""

    def offer(self, answer: Answer, inputs: Callable[[], Mapping[str, Any]], size: int) -> None:
        """Tell the shadows of what was appended last; `inputs` gives those of its request, which take `size` bytes."""
        for offer in self.shadows:
            offer(self._stream.newest, answer, inputs, size)

    async def flush(self) -> None:
        """Return when the answers appended so far are on the disk. NotReady if they cannot be written."""
        await self._journal.flush()


ByModel: TypeAlias = WeakKeyDictionary[ServedModel, ModelJournal | None]


class Journalling:
    """Which models' answers are kept, and where. For the event loop."""

    def __init__(self, journal: Journal, default: str) -> None:
        self._journal, self._default = journal, Mode(default)
        self._by_model: ByModel = WeakKeyDictionary()

    def of(self, model: ServedModel) -> ModelJournal | None:
        """Where a model's answers go, None if they are not kept."""
        if model not in self._by_model:
            self._by_model[model] = self._opened(model)
        return self._by_model[model]

    def _opened(self, model: ServedModel) -> ModelJournal | None:
        mode = Mode(model.journal or self._default)
        if mode is Mode.OFF or not model.is_classifier:
            return None
        of_inputs = model.input_signals
        read, more_bytes = partial(_answers, of_inputs), of_inputs.bytes_a_row if of_inputs else 0
        stream = self._journal.open_stream(model.name, model.version, model.digest, model.n_classes, read, more_bytes)
        return ModelJournal(self._journal, stream, waits=mode is Mode.SYNC)


Waiting: TypeAlias = tuple[int, Answer, bytes, str, Sample]


def _answers(of_inputs: InputSignals | None, waiting: Sequence[Waiting]) -> list[Answered]:
    """What is kept of answers. Many are read together: one by one they cost ten times as much."""
    return [_answered(together, of_inputs) for together in _together(waiting)]


def _together(waiting: Sequence[Waiting]) -> Iterator[list[Waiting]]:
    """Divided where another snapshot begins to answer, or to compute other outputs, and where they are many."""
    run: Run | None = None
    together, room = list[Waiting](), 0
    for one in waiting:
        answer = one[1]
        if answer.run is not run and not (run and _are_alike(answer.run, run)):
            room = 0
        run = answer.run
        rows = answer.stop - answer.start
        if rows > room:
            if together:
                yield together
            together, room = [], max(1, min(ROWS_TOGETHER, VALUES_TOGETHER // run.arrays[LOGITS].shape[1]))
        together.append(one)
        room -= rows
    yield together


def _are_alike(one: Run, other: Run) -> bool:
    return one.snapshot is other.snapshot and one.arrays.keys() == other.arrays.keys()


def _answered(waiting: Sequence[Waiting], of_inputs: InputSignals | None) -> Answered:
    """What one snapshot gave for one or more requests."""
    stretches = list(_stretches([one[1] for one in waiting]))
    run = stretches[0].run
    signals = {name: _column(stretches, name) for name in _signals_of(run)}
    if of_inputs is not None:
        samples = zip(*(one[4] for one in waiting), strict=True)
        signals |= of_inputs.of([np.concatenate(parts) for parts in samples])
    return Answered(
        run.snapshot.revision,
        run.snapshot.online_state or 0,
        Kept.of(_column(stretches, LOGITS), _column(stretches, PROBABILITIES)),
        signals,
        [one[0] // 1_000_000 for one in waiting],
        [one[1].stop - one[1].start for one in waiting],
        [one[2] for one in waiting],
        [one[3] for one in waiting],
    )


def _stretches(answers: Sequence[Answer]) -> Iterator[Answer]:
    """Those whose rows follow each other in a run as one."""
    run, start, stop = answers[0]
    for answer in answers[1:]:
        if answer.run is not run or answer.start != stop:
            yield Answer(run, start, stop)
            run, start = answer.run, answer.start
        stop = answer.stop
    yield Answer(run, start, stop)


def _column(stretches: Sequence[Answer], name: str) -> Floats:
    """An output of all of their rows."""
    parts = [run.part(name, start, stop) for run, start, stop in stretches]
    return parts[0].astype(np.float32, copy=False) if len(parts) == 1 else np.concatenate(parts, dtype=np.float32)


def _signals_of(run: Run) -> list[str]:
    """What a run computed of each row besides; sizes of sets only at the revision's own level: those compare."""
    names = [name for name in NEEDED_IF_THERE if name in run.arrays]
    sets = run.snapshot.sets
    if sets is not None and SET_SIZE in run.arrays and sets.confidence_level == sets.calibrator.confidence_level:
        names.append(SET_SIZE)
    return names
