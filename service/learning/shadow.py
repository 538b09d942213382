"""A challenger beside what serves: which of the two was better on the labels that came, at any time that one looks.

Each label scores two forecasts of the same row: what the champion served, which the journal has, and what the
challenger would have served. That is computed from the journal's logits where these are enough; otherwise the
challenger was run beside, and the journal has what it gave (`shadow_runs`). No forecast knows a label that came after
its row was predicted, so the interval of `calibrators.online.comparison` holds for all times at once.

As elsewhere one producer of labels can keep a challenger from being called better, by labels on which it is surely
worse; and of one producer no more than a quota an hour counts.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias

import numpy as np

from calibrators import Calibrator
from calibrators.numerics import MAX_ABS_LOGIT, Array
from calibrators.online.comparison import Difference, half_brier
from calibrators.online.learner import OnlineCalibrator
from service.learning.progress import within_quota
from service.store.database import Connection
from service.store.journal import Journal
from service.store.packs import ALL_UP_TO, logits_of, probabilities_of
from service.store.reading import NO_LABEL, Cohort, Pairs, Reader
from service.store.shadows import ShadowRow, forget_given, given_to, write_shadow

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
COUNTED = ("judged", "late", "missing", "dropped", "not_run", "other", "over_quota", "unusable")
HOLD_SECONDS = 5.0
"""Rows that a challenger may still be run on are not judged yet."""
STEP_ROWS = 10_000
MOST_PRODUCERS = 64
LEAST_PROBABILITY = 1e-12

Forecast: TypeAlias = Callable[[Pairs], tuple[Array, Array]]
"""Of rows that were served: which of them the challenger has a forecast for, and its probabilities (n, n_classes)."""


@dataclass
class Comparison:
    """How far a comparison is, of rows predicted since a time that one champion answered for one model file.

    Attributes
    ----------
    gain : of half the Brier score, champion less challenger: positive where the challenger is better
    log_loss_gain : the same of the log loss, summed; it has no bounds, and decides nothing
    by_producer : the gain on the labels of each
    counts : rows by what became of them: COUNTED
    verdict, verdict_ms : what the bounds say, and when the row was predicted that made them say so; 0: no row yet
    """

    gain: Difference = field(default_factory=Difference)
    log_loss_gain: float = 0.0
    by_producer: dict[str, Difference] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    verdict: str = UNDECIDED
    verdict_ms: int = 0
    _used: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def decode(cls, state: bytes) -> Self:
        said = json.loads(state)
        producers = {producer: Difference(*values) for producer, values in said["by_producer"].items()}
        return cls(
            Difference(*said["gain"]),
            said["log_loss_gain"],
            producers,
            Counter(said["counts"]),
            said["verdict"],
            said["verdict_ms"],
            said["used"],
        )

    def encode(self) -> bytes:
        said = {
            "gain": self.gain,
            "log_loss_gain": self.log_loss_gain,
            "by_producer": self.by_producer,
            "counts": self.counts,
            "verdict": self.verdict,
            "verdict_ms": self.verdict_ms,
            "used": self._used,
        }
        return json.dumps(said, sort_keys=True).encode()

    def take(self, cohort: Cohort, row: ShadowRow, forecast: Forecast, quota: int) -> None:
        """Judge a step of the reader."""
        newest = 0
        for part in cohort.pairs:
            newest = max(newest, self._take(part, row, forecast, quota))
        for part in cohort.late:
            before = self.counts["judged"]
            newest = max(newest, self._take(part, row, forecast, quota))
            self.counts["late"] += self.counts["judged"] - before
        self.counts["dropped"] += cohort.dropped
        verdict = self._decide(row.level)
        if newest and verdict != self.verdict:
            self.verdict, self.verdict_ms = verdict, newest

    def _take(self, part: Pairs, row: ShadowRow, forecast: Forecast, quota: int) -> int:
        """Judge rows that one revision computed; when the last of them was predicted, 0 if none counts."""
        part = part.chosen(np.flatnonzero(part.times_ms >= row.since_ms))
        labelled = part.labels != NO_LABEL
        self.counts["missing"] += int((~labelled).sum())
        part = part.chosen(np.flatnonzero(labelled))
        if not len(part):
            return 0
        if part.revision != row.champion or part.stream.digest != row.model_digest:
            self.counts["other"] += len(part)
            return 0
        part = part.chosen(np.flatnonzero(self._counting("unusable", _usable(part))))
        part = part.chosen(
            np.flatnonzero(self._counting("over_quota", within_quota(quota, self._used, part.producers, part.times_ms)))
        )
        if not len(part):
            return 0
        there, challenger = forecast(part)
        chosen = np.flatnonzero(self._counting("not_run", there))
        self._score(part.chosen(chosen), challenger[chosen])
        return int(part.times_ms.max()) if len(chosen) else 0

    def _counting(self, what: str, good: Array) -> Array:
        self.counts[what] += int((~good).sum())
        return good

    def _score(self, part: Pairs, challenger: Array) -> None:
        labels = part.labels
        champion = _scores(probabilities_of(part.kept, part.stream.class_count), labels)
        gains, of_log_loss = champion - _scores(challenger, labels)
        self.gain = self.gain.after(gains)
        self.log_loss_gain += float(of_log_loss.sum())
        self.counts["judged"] += len(labels)
        for producer in np.unique(part.producers).tolist():
            before = self.by_producer.pop(str(producer), Difference())
            self.by_producer[str(producer)] = before.after(gains[part.producers == producer])
        while len(self.by_producer) > MOST_PRODUCERS:
            del self.by_producer[min(self.by_producer, key=lambda name: (self.by_producer[name].n_labels, name))]

    def _decide(self, level: float) -> str:
        low, high = self.gain.interval(level)
        if high < 0:
            return WORSE
        return BETTER if low > 0 and not self.contesting(level) else UNDECIDED

    def contesting(self, level: float) -> int:
        """Producers on whose labels the challenger is surely worse."""
        return sum(gain.interval(level)[1] < 0 for gain in self.by_producer.values())


class Judge:
    """One shadow's comparison as it goes on. Nothing of it is for the event loop; one call at a time."""

    def __init__(
        self, journal: Journal, row: ShadowRow, calibrator: Calibrator, wait_seconds: float, quota: int
    ) -> None:
        self.row, self.comparison = row, Comparison()
        self.calibrator = calibrator
        self._journal, self._quota, self._number = journal, quota, 0
        hold = HOLD_SECONDS if row.share else 0.0
        self._reader = Reader(journal, row.model, f"shadow/{row.revision}", wait_seconds, hold)

    def begin(self) -> None:
        """Write the shadow down; what was predicted before is not read."""

        def write(connection: Connection) -> None:
            self._reader.begin_at_end(connection)
            write_shadow(connection, self.row)

        self._journal.writer.write_now(write)

    def load(self) -> None:
        """Go on where the store says."""
        _, self._number, state = self._reader.state()
        self.comparison = Comparison.decode(state) if state else Comparison()

    def step(self) -> bool:
        """Judge the next rows, if there are any; whether there may be more."""
        cohort = self._reader.read(STEP_ROWS)
        if not cohort:
            return False
        comparison = copy.deepcopy(self.comparison)
        comparison.take(cohort, self.row, self._forecast, self._quota)
        self._reader.commit(cohort, comparison.encode())
        self.comparison, self._number = comparison, cohort.number
        return sum(map(len, cohort.pairs)) >= STEP_ROWS

    def begin_anew(self, champion: str, since_ms: int, note: str) -> None:
        """Compare with another champion, from now on."""
        row = replace(self.row, champion=champion, since_ms=since_ms, since_step=self._number, note=note)
        comparison = Comparison()

        def write(connection: Connection) -> None:
            self._reader.reset(connection, comparison.encode())
            write_shadow(connection, row)

        self._journal.writer.write_now(write)
        self.comparison, self.row = comparison, row

    def change(self, **changes: Any) -> None:
        """Write the shadow down with these fields changed."""
        row = replace(self.row, **changes)
        self._journal.writer.write_now(lambda connection: write_shadow(connection, row))
        self.row = row

    def end(self, outcome: str, by: str, note: str) -> None:
        """Write down what came of it; what it had read and what its challenger was given are forgotten."""
        final = json.loads(self.comparison.encode())
        now = int(1000 * time.time())
        row = replace(self.row, outcome=outcome, ended_by=by, end_ms=now, promoting="", note=note, final=final)

        def write(connection: Connection) -> None:
            write_shadow(connection, row)
            forget_given(connection, row)
            self._reader.forget(connection)

        self._journal.writer.write_now(write)
        self.row = row

    def replay(self) -> Comparison:
        """The comparison made again from the journal, as far as its rows are still kept."""
        comparison = Comparison()
        for cohort in self._reader.replay():
            if cohort.number > self.row.since_step:
                comparison.take(cohort, self.row, self._forecast, self._quota)
        return comparison

    def _forecast(self, part: Pairs) -> tuple[Array, Array]:
        if self.row.share:
            with self._journal.reading() as connection:
                return given_to(connection, self.row.revision, part)
        given = self.calibrator.predict_proba(logits_of(part.kept, part.stream.class_count))
        return np.ones(len(part), bool), given


def from_journal(calibrator: Calibrator, n_classes: int) -> bool:
    """Whether the journal's logits say exactly what this calibrator would have served with them."""
    return reads_logits(calibrator) and n_classes <= ALL_UP_TO and not isinstance(calibrator, OnlineCalibrator)


def reads_logits(calibrator: Calibrator) -> bool:
    return calibrator.needs == {"logits"} and not calibrator.has_index


def _usable(part: Pairs) -> Array:
    """Rows whose numbers are numbers: a model may give others."""
    usable: Array = np.all(np.abs(part.kept.logits) <= MAX_ABS_LOGIT, axis=1)
    return usable & np.isfinite(part.kept.probabilities).all(axis=1)


def _scores(probabilities: Array, labels: Array) -> Array:
    """Half the Brier score and the log loss of each row, (2, n_rows); the worst of what are no numbers."""
    good: Array = np.isfinite(probabilities.sum(axis=1, keepdims=True))
    given: Array = np.where(good, probabilities, 0.0)
    losses = -np.log(np.maximum(given[np.arange(len(labels)), labels], LEAST_PROBABILITY))
    scores: Array = np.stack([np.where(good[:, 0], half_brier(given, labels), 1.0), losses])
    return scores
