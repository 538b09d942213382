"""What an online calibrator makes of the journal: which rows it learns from, which are held out, what is counted.

All of it is a function of the rows in their order, however they were divided into steps: a replay comes to the same
bits. Scores are the journal's, never a caller's.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self, cast

import numpy as np

import calibrators
from calibrators.numerics import MAX_ABS_LOGIT, Array
from calibrators.online.learner import OnlineCalibrator
from service.store.packs import logits_of
from service.store.reading import NO_LABEL, Cohort, Pairs

HELD_OUT_EVERY = 5
"""One labelled row in so many is never learned from: what judges the states."""
QUOTA_MS = 3_600_000
"""The hour of the predictions of which one producer's labels are limited."""
VALUES_TOGETHER = 4000
"""Logits that are learned from in one piece, for which all threads may have to wait: a few milliseconds."""
COUNTED = ("learned", "held_out", "late", "missing", "dropped", "over_quota", "unusable")
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


class Rows(NamedTuple):
    """Labelled rows in their order: logits of all classes, class, who sent the label, when it was predicted."""

    logits: Array
    labels: Array
    producers: Array
    times_ms: Array

    def chosen(self, rows: Array | slice) -> Rows:
        return Rows(*(column[rows] for column in self))


class Taken(NamedTuple):
    """Of a step: rows that were learned from, the probabilities given before each was, rows that are held out."""

    learned: Rows
    forecasts: Array
    held_out: Rows


@dataclass
class Progress:
    """How far learning is.

    Attributes
    ----------
    calibrator : as it has learned so far
    quota : labels an hour that are learned of one producer, as it was when learning began
    counts : rows by what became of them: COUNTED
    """

    calibrator: OnlineCalibrator
    quota: int
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    _used: dict[str, list[int]] = field(default_factory=dict)  # producer -> hour, labels learned in it

    @classmethod
    def begin(cls, start: OnlineCalibrator, quota: int) -> Self:
        return cls(copy.deepcopy(start), quota)

    @classmethod
    def decode(cls, state: bytes) -> Self:
        head, _, artifact = state.partition(b"\n")
        return cls.going_on(head.decode(), artifact)

    @classmethod
    def going_on(cls, head: str, artifact: bytes) -> Self:
        """From a kept state and its head."""
        said = json.loads(head)
        calibrator = cast(OnlineCalibrator, calibrators.loads(artifact))
        return cls(calibrator, said["quota"], Counter(said["counts"]), said["used"])

    def encode(self) -> bytes:
        return self.head.encode() + b"\n" + self.artifact

    @property
    def head(self) -> str:
        """All but the calibrator."""
        return json.dumps({"quota": self.quota, "counts": self.counts, "used": self._used}, sort_keys=True)

    @property
    def artifact(self) -> bytes:
        return calibrators.dumps(self.calibrator)

    def set_back(self, artifact: bytes, start: OnlineCalibrator) -> None:
        """Go on from an earlier state: `start` where it has no bytes. What was counted stays counted."""
        self.calibrator = cast(OnlineCalibrator, calibrators.loads(artifact)) if artifact else copy.deepcopy(start)

    def take(self, cohort: Cohort, digest: str) -> Taken:
        """Learn from a step of the reader."""
        self.counts["missing"] += cohort.missing
        self.counts["dropped"] += cohort.dropped
        self.counts["late"] += sum(map(len, cohort.late))
        n_classes = self.calibrator.n_classes_
        taken, held = [], []
        for part in (*cohort.pairs, *cohort.late):
            rows, apart = self._usable(part, digest, n_classes)
            held.append(rows.chosen(apart))
            taken.append(self._within_quota(rows.chosen(~apart)))
        rows = _joined(taken, n_classes)
        together = max(1, VALUES_TOGETHER // n_classes)
        forecasts = [np.empty((0, n_classes))]
        for start in range(0, len(rows.labels), together):
            few = rows.chosen(slice(start, start + together))
            forecasts.append(self.calibrator.learn(few.logits, few.labels))
        held_out = _joined(held, n_classes)
        self.counts["learned"] += len(rows.labels)
        self.counts["held_out"] += len(held_out.labels)
        return Taken(rows, np.concatenate(forecasts), held_out)

    def _usable(self, part: Pairs, digest: str, n_classes: int) -> tuple[Rows, Array]:
        """The labelled rows that this model file gave, and which of them are held out."""
        labelled = np.flatnonzero(part.labels != NO_LABEL)
        if part.stream.digest != digest:
            self.counts["unusable"] += len(labelled)
            labelled = labelled[:0]
        part = part.chosen(labelled)
        rows = Rows(logits_of(part.kept, n_classes), part.labels, part.producers, part.times_ms)
        usable: Array = np.all(np.abs(rows.logits) <= MAX_ABS_LOGIT, axis=1, keepdims=True)[:, 0]
        self.counts["unusable"] += int((~usable).sum())
        return rows.chosen(usable), held_out(part)[usable]

    def _within_quota(self, rows: Rows) -> Rows:
        allowed = within_quota(self.quota, self._used, rows.producers, rows.times_ms)
        self.counts["over_quota"] += int((~allowed).sum())
        return rows.chosen(allowed)


def within_quota(quota: int, used_of: dict[str, list[int]], producers: Array, times_ms: Array) -> Array:
    """Which rows are not beyond their producer's labels an hour; `used_of`, of each its hour and labels, goes along."""
    allowed: Array = np.ones(len(producers), bool)
    for producer in np.unique(producers).tolist():
        own = np.flatnonzero(producers == producer)
        hour, used = used_of.get(str(producer), [0, 0])
        hours = np.maximum.accumulate(np.maximum(times_ms[own] // QUOTA_MS, hour))
        for begun in np.unique(hours).tolist():
            within = own[hours == begun]
            used = used if begun == hour else 0
            allowed[within[max(0, quota - used) :]] = False
            used_of[str(producer)] = [hour, used] = [begun, min(quota, used + len(within))]
    return allowed


def rows_apart(pairs: list[Pairs], digest: str, calibrator: OnlineCalibrator) -> Rows:
    """The rows of these pairs that are held out."""
    progress, n_classes = Progress(calibrator, 0), calibrator.n_classes_
    found = (progress._usable(part, digest, n_classes) for part in pairs)
    return _joined([rows.chosen(apart) for rows, apart in found], n_classes)


def held_out(part: Pairs) -> Array:
    """Which rows are held out: a function of what a row is called, which no caller chooses."""
    place: Array = np.stack([np.full(len(part), part.stream.stream), part.numbers, part.rows]).astype(np.uint64)
    mixed: Array = (place * _MIX[:, None]).sum(axis=0, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX[1]
    apart: Array = (mixed >> np.uint64(33)) % np.uint64(HELD_OUT_EVERY) == 0
    return apart


def _joined(parts: list[Rows], n_classes: int) -> Rows:
    empty = Rows(np.empty((0, n_classes)), *(np.empty(0, np.int64) for _ in range(3)))
    return Rows(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


def by_producer(rows: Rows) -> Iterator[tuple[int, Rows]]:
    for producer in np.unique(rows.producers).tolist():
        yield producer, rows.chosen(rows.producers == producer)
