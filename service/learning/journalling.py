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
from service.inference.model import ServedModel, Snapshot
from service.inference.prediction_sets import SET_SIZE
from service.store.beside import MOST_SEGMENTS, NO_SEGMENT, OTHER_SEGMENT, Floats, Signals
from service.store.database import READ_ONLY
from service.store.journal import Journal, OpenStream
from service.store.packs import Answered

PROBABILITIES = "probabilities"
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
    """What is kept of answers. Those of one run are read together: one by one they cost several times as much."""
    runs = list(_runs(waiting))
    if of_inputs is None:
        return [_answered(run, {}) for run in runs]
    samples = [[np.concatenate(parts) for parts in zip(*(inputs for *_, inputs in run), strict=True)] for run in runs]
    return list(map(_answered, runs, of_inputs.of_each(samples)))


def _runs(waiting: Sequence[Waiting]) -> Iterator[list[Waiting]]:
    """Divided where one does not follow the one before it in its run."""
    run: Run | None = None
    together, stop = list[Waiting](), 0
    for one in waiting:
        answer = one[1]
        if answer.run is not run or answer.start != stop:
            if together:
                yield together
            together, run = [], answer.run
        together.append(one)
        stop = answer.stop
    yield together


def _answered(waiting: Sequence[Waiting], of_inputs: Signals) -> Answered:
    """What one run gave for one or more requests whose rows follow each other."""
    answer, last = waiting[0][1], waiting[-1][1]
    if answer is not last:
        answer = Answer(answer.run, answer.start, last.stop)
    snapshot = answer.run.snapshot
    return Answered(
        snapshot.revision,
        snapshot.online_state or 0,
        answer.part(LOGITS),
        answer.part(PROBABILITIES),
        {**_signals(answer, snapshot), **of_inputs},
        [one[0] // 1_000_000 for one in waiting],
        [one[1].stop - one[1].start for one in waiting],
        [one[2] for one in waiting],
        [one[3] for one in waiting],
    )


def _signals(answer: Answer, snapshot: Snapshot) -> dict[str, Floats]:
    """What the run computed of each row besides; sizes of sets only at the revision's own level: those compare."""
    names = [name for name in NEEDED_IF_THERE if name in answer.run.arrays]
    sets = snapshot.sets
    if sets is not None and SET_SIZE in answer.run.arrays and sets.confidence_level == sets.calibrator.confidence_level:
        names.append(SET_SIZE)
    return {name: answer.part(name).astype(np.float32) for name in names}
