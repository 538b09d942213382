"""A monitor: a detector that reads what one model predicted and what came true, and a state that survives a restart.

All that a monitor comes to is a function of the rows that it read, in the order of the predictions, and of what befell
it between steps (its turns): a replay gives the same alarms, to the bit. Position, state and alarms are written in one
transaction.

A ring is followed by a reset of the detector and by `cooldown_rows` rows that are not read. While an alarm of the
monitor is not acknowledged, it is said of that one that it rang again; the acknowledgement resets the detector, so that
the next alarm comes of what is predicted after it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from service.drift.baseline import Baseline
from service.drift.detectors import registry
from service.drift.detectors.base import NO_LABEL, Array, Batch, Detector, Lumped
from service.drift.detectors.score_shift import OF_LOGITS, PREDICTED_CLASS
from service.drift.missing_labels import MissingLabels
from service.drift.nowcasting import HIDDEN, KINDS
from service.drift.states import RAW, MonitorSpec, MonitorState
from service.errors import InvalidRequest
from service.store.database import Connection
from service.store.journal import Journal
from service.store.monitors import read_turns, write_turn
from service.store.packs import Kept, logit_of_others, probability_of_others
from service.store.reading import Cohort, Pairs, Position, Reader

STEP_ROWS = 5000
VALUES_TOGETHER = 4000
"""Logits that a detector reads in one piece, for which all threads may have to wait: a millisecond or two."""
MOST_PACKS = 5000
MOST_POINTS = 400
"""Of a history; beyond that every other is dropped."""
LEAST_PROBABILITY = 1e-30
LABELS, SCORES, INPUTS = "labels", "scores", "inputs"
FRESH, RESET, CHANGED = "fresh", "reset", "changed"
"""What a turn does: all anew, with a new reference; anew with the reference that is there; nothing but the spec."""

Point = tuple[int, float]
Cohorts = dict[tuple[Position, bool], Cohort]
"""What was read already: monitors that are at the same place share a step."""


@dataclass(frozen=True)
class Turn:
    """What befell a monitor: from then on it is of this spec and watches this subject."""

    spec: MonitorSpec
    subject: str
    what: str
    time_ms: int

    def encode(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Self:
        said = json.loads(text)
        return cls(spec=spec_of(said.pop("spec")), **said)


class Ring(NamedTuple):
    """A detector rang, at a row predicted at `time_ms`."""

    time_ms: int
    since_ms: int
    since_rows: int
    statistic: float
    threshold: float
    evidence: Mapping[str, float]


def spec_of(said: Mapping[str, object]) -> MonitorSpec:
    return MonitorSpec(**said)  # type: ignore[arg-type]


def subject_of(watched: str, digest: str, revision: str) -> str:
    """What is watched of a model that is served so: its file's own probabilities, or what a revision makes of them.

    With another subject a monitor begins anew, reference and all: what it knew was of another forecaster.
    """
    return digest if watched == RAW else f"{digest} {revision}"


def detector_of(spec: MonitorSpec) -> Detector:
    """A detector that has read nothing. InvalidRequest if there is no such kind, or it takes no such parameters."""
    try:
        if spec.detector == MissingLabels.kind:
            return MissingLabels(**spec.parameters)  # type: ignore[arg-type]
        if spec.name.startswith(HIDDEN):
            return KINDS[spec.detector]()
        return registry.create(spec.detector, **spec.parameters)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"detector: {error}") from error


def waits_for_labels(detector: Detector) -> bool:
    """Whether rows are held back until it is known that their label has come, or has not come in time."""
    return detector.labelled or isinstance(detector, MissingLabels)


def reads_of(spec: MonitorSpec) -> str:
    """What a monitor that reads no label looks at: LABELS of one that does."""
    if waits_for_labels(detector_of(spec)):
        return LABELS
    signals = {name.strip() for name in str(spec.parameters.get("signals", "confidence")).split(",")}
    return SCORES if signals <= {*OF_LOGITS, PREDICTED_CLASS} else INPUTS


def promise(detector: Detector) -> str:
    """In words, how seldom it rings while nothing has changed."""
    said = detector.parameters()
    horizon, probability = said.get("horizon"), said.get("false_alarm_probability")
    if not isinstance(horizon, int | float) or not isinstance(probability, int | float):
        return "none: nothing is promised of how often this detector rings falsely"
    rows = "labelled rows" if detector.labelled else "rows"
    error = said.get("reference_error", 0)
    beside = f", and {error:g} for a reference unlike its source" if error else ""
    return f"rings falsely within {horizon:,.0f} {rows} with probability {probability:g} at most{beside}"


class Watching:
    """How far a monitor is, apart from the journal."""

    def __init__(self, turn: Turn) -> None:
        self.spec, self.subject = turn.spec, turn.subject
        self.history: list[Point] = []
        self._begin(turn)

    def _begin(self, turn: Turn) -> None:
        self.detector, self.baseline = detector_of(self.spec), Baseline(self.spec.baseline_rows)
        self.begun_ms, self._segments = turn.time_ms, list[str]()
        self._start()

    def _start(self) -> None:
        self.missing = self.late = self.cooling = 0
        self._marks: list[tuple[int, int]] = []  # rows read since the reset, and when the last was predicted

    def turn(self, turn: Turn) -> None:
        self.spec, self.subject = turn.spec, turn.subject
        if turn.what == FRESH:
            self._begin(turn)
        elif turn.what == RESET:
            self.detector.reset()
            self._start()

    def take(self, cohort: Cohort) -> list[Ring]:
        """Read a step; where it rang."""
        rings = [ring for part in cohort.pairs if self.is_of(part) for ring in self._read(part)]
        self.late += sum(int((part.times_ms >= self.begun_ms).sum()) for part in cohort.late if self.is_of(part))
        return rings

    def encode(self) -> bytes:
        head = {
            "begun_ms": self.begun_ms, "cooling": self.cooling, "history": self.history, "late": self.late,
            "marks": self._marks, "missing": self.missing, "segments": self._segments, "spec": asdict(self.spec),
            "subject": self.subject,
        }  # fmt: skip
        arrays = self.detector.state() | (self.baseline.state() if self.spec.baseline_rows else {})
        packed = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        return json.dumps(head, sort_keys=True).encode() + b"\n" + bytes(packed)

    @classmethod
    def decode(cls, state: bytes) -> Self:
        """ValueError if the detector no longer knows its state."""
        head, _, packed = state.partition(b"\n")
        said = json.loads(head)
        self = cls(Turn(spec_of(said["spec"]), said["subject"], FRESH, said["begun_ms"]))
        self.history, self._marks = [(ms, value) for ms, value in said["history"]], list(map(tuple, said["marks"]))
        self.missing, self.late, self.cooling = (said[name] for name in ("missing", "late", "cooling"))
        self._segments = said["segments"]
        arrays = safetensors.numpy.load(packed)
        if self.spec.baseline_rows:
            self.baseline.restore({name: arrays.pop(name) for name in self.baseline.state()})
        self.detector.restore(arrays)
        return self

    def is_of(self, part: Pairs) -> bool:
        """Whether these rows are of what is watched."""
        return subject_of(self.spec.watched, part.stream.digest, part.revision) == self.subject

    def _read(self, part: Pairs) -> Iterator[Ring]:
        whole, times = self.batch_of(part)
        batch = self.baseline.take(whole)
        taken, start = len(whole) - len(batch), 0
        times = times[taken:]
        self._count(whole.labels[:taken])
        while start < len(batch):
            if self.cooling:
                passed = min(self.cooling, len(batch) - start)
                self.cooling, start = self.cooling - passed, start + passed
                continue
            rows = batch.rows(slice(start, self._stop(batch, start)))
            at = self._update(rows)
            if at is None:
                self._count(rows.labels)
                start += len(rows)
            else:
                yield self._rang(times[start : start + at + 1], rows.labels[: at + 1])
                start += at + 1
        if len(batch) and not self.cooling:
            self._mark(int(times[-1]))

    def _stop(self, batch: Batch, start: int) -> int:
        """Where rows from `start` on end that the detector may read in one piece."""
        is_read = batch.labels[start:] != NO_LABEL if self.detector.labelled else np.ones(len(batch) - start, np.bool_)
        values = batch.n_classes if self.detector.labelled else batch.width
        return start + int(np.searchsorted(np.cumsum(is_read), max(1, VALUES_TOGETHER // values), side="right"))

    def _update(self, rows: Batch) -> int | None:
        """Let the detector read rows, of many classes only those that it has use for; where it rang."""
        if not self.detector.labelled:
            return self.detector.update(self.baseline.mapped(rows))
        labelled = np.flatnonzero(rows.labels != NO_LABEL)
        if not len(labelled):
            return None
        at = self.detector.update(self.baseline.mapped(rows.rows(labelled)))
        return None if at is None else int(labelled[at])

    def _count(self, labels: NDArray[np.int64]) -> None:
        if waits_for_labels(self.detector):
            self.missing += int((labels == NO_LABEL).sum())

    def batch_of(self, part: Pairs) -> tuple[Batch, NDArray[np.int64]]:
        """The rows as detectors read them, and when each was predicted."""
        scores = scores_of(part.kept, part.stream.class_count, self.spec.watched)
        self._segments += [name for name in part.segment_names if name not in self._segments]
        segments = np.array([self._segments.index(name) for name in part.segment_names], np.int64)[part.segments]
        signals = {name: values.astype(np.float64) for name, values in part.signals.items()}
        rows = np.flatnonzero(scores.finite if isinstance(scores, Lumped) else np.isfinite(scores).all(axis=1))
        return Batch(scores, part.labels, segments, signals).rows(rows), part.times_ms[rows]

    def _rang(self, times: NDArray[np.int64], labels: NDArray[np.int64]) -> Ring:
        """What there is to say of a ring at the last of these rows; the detector begins anew."""
        detector, time_ms = self.detector, int(times[-1])
        since_rows = detector.change_point()
        ring = Ring(
            time_ms,
            self._when(since_rows, times[labels != NO_LABEL] if detector.labelled else times),
            since_rows,
            detector.statistic,
            detector.threshold,
            {self.named(part): share for part, share in detector.evidence().items()},
        )
        self._add(time_ms)
        detector.reset()
        self._start()
        self._add(time_ms)
        self.cooling = self.spec.cooldown_rows
        return ring

    def named(self, text: str) -> str:
        """With the names of segments in place of their numbers."""
        return re.sub(r"(?<=[Ss]egment )\d+", lambda found: self._segment(int(found[0])), text)

    def _segment(self, number: int) -> str:
        return (self._segments[number] or "none") if number < len(self._segments) else str(number)

    def numbered(self, evidence: Mapping[str, float]) -> dict[str, float]:
        """What `named` was given."""
        numbers = {f"segment {self._segment(number)}": f"segment {number}" for number in range(len(self._segments))}
        return {numbers.get(part, part): share for part, share in evidence.items()}

    def _when(self, rows: int, times: NDArray[np.int64]) -> int:
        """When the row was predicted that lies so many rows back, between marks about when."""
        if rows <= len(times):
            return int(times[len(times) - rows])
        counts, marks = zip(*(self._marks or [(0, times[0] if len(times) else self.begun_ms)]), strict=True)
        return int(np.interp(self.detector.n_rows - rows, counts, marks))

    def _mark(self, time_ms: int) -> None:
        self._add(time_ms)
        self._marks.append((self.detector.n_rows, time_ms))
        if len(self._marks) > MOST_POINTS:
            del self._marks[1::2]

    def _add(self, time_ms: int) -> None:
        """A point of the history."""
        self.history.append((time_ms, float(self.detector.statistic)))
        if len(self.history) > MOST_POINTS:
            del self.history[1::2]


class Step(NamedTuple):
    """A step that was read and is to be written, with what rang in it and the state that it led to."""

    cohort: Cohort
    rings: list[Ring]
    state: bytes


class Monitor:
    """One monitor at work on a journal. Its methods are for any thread but the event loop's, one at a time."""

    def __init__(self, journal: Journal, spec: MonitorSpec, wait_seconds: float) -> None:
        self.spec, self._journal = spec, journal
        self.waits = waits_for_labels(detector_of(spec))
        wait_seconds = wait_seconds if self.waits else 0.0
        name = f"monitor/{spec.name}"
        self.reader = Reader(journal, spec.model, name, wait_seconds, reads_labels=self.waits)
        self.reads = reads_of(spec)
        self.rows = 0

    def begin(self, connection: Connection, subject: str) -> None:
        """Make it new, from what is predicted from now on."""
        self.reader.begin_at_end(connection)
        turn = Turn(self.spec, subject, FRESH, _now_ms())
        write_turn(connection, self.spec.model, self.spec.name, 0, turn.encode())
        self.reader.reset(connection, Watching(turn).encode())

    def load(self) -> None:
        """Go on where the store says. ValueError if the detector no longer knows its state."""
        self.position, self.number, state = self.reader.state()
        self.watching = Watching.decode(state)
        self.spec = self.watching.spec

    def turn(self, connection: Connection, what: str, subject: str = "", spec: MonitorSpec | None = None) -> None:
        """Let something befall it, inside a transaction of the journal's writer; `load` afterwards."""
        _, number, state = self.reader.state()
        turn = Turn(spec or self.spec, subject or self.watching.subject, what, _now_ms())
        try:
            watching = Watching.decode(state)
            watching.turn(turn)
        except ValueError:  # of another release
            watching = Watching(turn)
        write_turn(connection, self.spec.model, self.spec.name, number, turn.encode())
        self.reader.reset(connection, watching.encode())

    def step(self, known: Cohorts, least_rows: int = 1) -> Step | None:
        """Read on, if there are so many rows; to be written with `write`, or to be read again after `load`."""
        cohort = known.get((self.position, self.waits))
        if cohort is None:
            cohort = known[self.position, self.waits] = self.reader.read(STEP_ROWS)
        if sum(map(len, (*cohort.pairs, *cohort.late))) < least_rows:
            return None
        cohort = replace(cohort, number=self.number + 1)
        return Step(cohort, self.watching.take(cohort), self.watching.encode())

    def write(self, connection: Connection, step: Step) -> None:
        self.reader.write(connection, step.cohort, step.state)

    def written(self, step: Step) -> None:
        self.position, self.number = step.cohort.end, step.cohort.number
        self.rows += sum(map(len, step.cohort.pairs))

    def around(self, since_ms: int, most_values: int) -> tuple[Batch, Batch]:
        """What it watched before a change, and from then on: the last rows, of so many values at most."""
        parts = self.reader.passed(MOST_PACKS, most_values)
        n_classes = parts[-1].stream.class_count if parts else 1
        rows = [part for part in parts if self.watching.is_of(part)]
        while sum(map(len, rows)) * n_classes > most_values:
            rows.pop(0)
        batches = [self.watching.batch_of(part) for part in rows]
        whole = joined([batch for batch, _ in batches], n_classes)
        whole = self.watching.baseline.mapped(whole)
        begins = int(sum((times < since_ms).sum() for _, times in batches))
        return whole.rows(slice(begins)), whole.rows(slice(begins, None))

    def replay(self) -> tuple[bool, list[Ring]]:
        """Everything again from the first row: whether it came to the same state, and where it rang."""
        with self._journal.reading() as connection:
            turns = read_turns(connection, self.spec.model, self.spec.name)
        watching, rings = Watching(Turn.decode(turns[0][1])), list[Ring]()
        later = [(number, Turn.decode(text)) for number, text in turns[1:]]
        number = 0
        for cohort in self.reader.replay():
            while later and later[0][0] < cohort.number:
                watching.turn(later.pop(0)[1])
            rings += watching.take(cohort)
            number = cohort.number
        for _, turn in later:
            watching.turn(turn)
        return number == self.number and watching.encode() == self.watching.encode(), rings

    def state(self, alarms: tuple[str, ...]) -> MonitorState:
        watching, detector = self.watching, self.watching.detector
        return MonitorState(
            spec=watching.spec,
            ready=detector.ready and watching.baseline.ready,
            statistic=detector.statistic,
            threshold=detector.threshold,
            n_rows=detector.n_rows,
            missing=watching.missing,
            late=watching.late,
            alarms=alarms,
            history=watching.history,
            false_alarms=promise(detector),
        )


def scores_of(kept: Kept, n_classes: int, watched: str) -> Array | Lumped:
    """The logits of the forecaster that is watched."""
    if kept.classes is None or kept.rest is None:
        return kept.logits.astype(np.float64) if watched == RAW else _logarithms(kept.probabilities)
    others = n_classes - kept.classes.shape[1]
    if watched == RAW:
        named, other = kept.logits.astype(np.float64), logit_of_others(kept.rest, others)
    else:
        named, other = map(_logarithms, (kept.probabilities, probability_of_others(kept.probabilities, others)))
    return Lumped(named, kept.classes.astype(np.int64), other, n_classes)


def _logarithms(probabilities: NDArray[np.float32]) -> Array:
    return np.asarray(np.log(np.maximum(probabilities, LEAST_PROBABILITY).astype(np.float64)))


def joined(batches: Sequence[Batch], n_classes: int) -> Batch:
    """One batch of several, with the signals that all have."""
    names = set.intersection(*(set(batch.signals) for batch in batches)) if batches else set()
    none = Batch(np.empty((0, n_classes)), np.empty(0, np.int64), np.empty(0, np.int64))
    whole = [none, *batches]
    lumped = [batch.scores for batch in batches if isinstance(batch.scores, Lumped)]
    return Batch(
        Lumped.joined(lumped) if lumped and len(lumped) == len(batches) else np.concatenate([b.logits for b in whole]),
        np.concatenate([batch.labels for batch in whole]),
        np.concatenate([batch.segments for batch in whole]),
        {name: np.concatenate([batch.signals[name] for batch in batches]) for name in sorted(names)},
    )


def _now_ms() -> int:
    return int(1000 * time.time())
