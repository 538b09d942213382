"""What a model's journal says of a window of time, in sums that add up: of the raw model and of what was served.

A page that is opened every second cannot read a million rows. So each row is counted once, when it was answered, and
its label once, when it comes, in the bucket of the time at which the row was predicted. Buckets are short while they
are young and are joined as they age, so that their number is bounded; classes and segments, of which there may be many,
are counted in a few long ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.metrics import ReliabilityCurve
from service.drift.states import RAW, SERVED
from service.store.beside import MOST_SEGMENTS, OTHER_SEGMENT
from service.store.packs import Kept, probabilities_of
from service.store.reading import NO_LABEL, Pairs

Array = NDArray[np.float64]
Whole = NDArray[np.int64]

FINE_BINS = 60
"""Bins of confidence; joined by threes and fours they are the twenty and the fifteen that people know."""
MOST_SET_SIZE = 11
"""Sets of so many labels or more are counted together."""
MOST_CELLS = 400_000
"""Counters of classes kept in memory of one model; of many classes the blocks are longer."""
LEVELS_MS = ((2_000, 600_000), (20_000, 7_200_000), (300_000, 86_400_000))
"""Width of a bucket, and the age up to which it stays so; older ones are an hour wide."""
OLDEST_MS = 3_600_000
"""Width of the oldest buckets."""
MOST_POINTS = 60
"""Points of a curve over time."""
STEPS_MS = tuple(
    1000 * s for s in (2, 10, 20, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 604_800)
)
LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)
"""What a probability of zero counts as where its logarithm is taken."""

_FORECAST = {"answers": FINE_BINS, "labels": FINE_BINS, "said": FINE_BINS, "right": FINE_BINS, "log_loss": 1}
_FIELDS = {
    **{f"{which}.{name}": size for which in (RAW, SERVED) for name, size in _FORECAST.items()},
    "set_sizes": MOST_SET_SIZE + 1,
    "sets": 1,  # with a label
    "covered": 1,
}
_ENDS = np.cumsum([0, *_FIELDS.values()]).tolist()
_PLACES = {name: slice(*ends) for name, ends in zip(_FIELDS, pairwise(_ENDS), strict=True)}
_EDGES = np.arange(FINE_BINS + 1) / FINE_BINS

GROUP_FIELDS = ("raw_labels", "raw_said", "raw_right", "labels", "said", "right", "promised", "came")
"""Of a class: labelled rows of which it is the raw model's answer, their confidence, how many are right; the same of
the answer that was served; how often it was promised in all rows (the sum of its probabilities), and came true. Of a
segment the same of its rows, without the last two."""


@dataclass(eq=False)
class Sums:
    """Counters of some rows."""

    values: Array = field(default_factory=lambda: np.zeros(_ENDS[-1]))

    def __getitem__(self, name: str) -> Array:
        return self.values[_PLACES[name]]

    def add(self, other: Sums) -> None:
        self.values += other.values

    @property
    def answers(self) -> int:
        return int(self["served.answers"].sum())

    @property
    def labels(self) -> int:
        return int(self["served.labels"].sum())

    @property
    def sets(self) -> int:
        return int(self["set_sizes"].sum())

    def curve(self, which: str, n_bins: int = 15) -> ReliabilityCurve:
        """Of labelled rows, over bins of equal width, whose number divides `FINE_BINS`."""
        counts, said, right = (
            self[f"{which}.{name}"].reshape(n_bins, -1).sum(axis=1) for name in ("labels", "said", "right")
        )
        divisor = np.where(counts > 0, counts, np.nan)
        return ReliabilityCurve(
            np.arange(n_bins + 1) / n_bins, counts.astype(np.int64), said / divisor, right / divisor
        )

    def calibration_error(self, which: str) -> float:
        """The expected calibration error over fifteen bins; NaN without labels."""
        curve = self.curve(which)
        gaps = np.nan_to_num(np.abs(curve.accuracy - curve.confidence))
        return float(gaps @ curve.counts / self.labels) if self.labels else math.nan

    def chance_error(self, which: str) -> float:
        """What the calibration error of so many labels of a calibrated model is at most, with probability .99 or so.

        The gap of a bin is then normal of mean zero, so its size is half-normal; bins are independent.
        """
        curve = self.curve(which)
        said = np.nan_to_num(curve.confidence)
        variances = curve.counts * said * (1 - said)
        mean = math.sqrt(2 / math.pi) * np.sqrt(variances).sum()
        spread = math.sqrt((1 - 2 / math.pi) * variances.sum())
        return float((mean + 2.33 * spread) / self.labels) if self.labels else math.nan

    def accuracy(self, which: str) -> float:
        return float(self[f"{which}.right"].sum() / self.labels) if self.labels else math.nan

    def log_loss(self, which: str) -> float:
        return float(self[f"{which}.log_loss"][0] / self.labels) if self.labels else math.nan

    @property
    def coverage(self) -> float:
        return float(self["covered"][0] / self["sets"][0]) if self["sets"][0] else math.nan

    @property
    def mean_set_size(self) -> float:
        """Sets of `MOST_SET_SIZE` or more count as that."""
        return float(self["set_sizes"] @ np.arange(MOST_SET_SIZE + 1) / self.sets) if self.sets else math.nan


@dataclass(eq=False)
class Groups:
    """Counters of classes, (n_classes, fields), and of segments by name, (fields,)."""

    classes: Array
    segments: dict[str, Array] = field(default_factory=dict)

    def add(self, other: Groups) -> None:
        self.classes += other.classes
        for name, values in other.segments.items():
            self.add_to_segment(name, values)

    def add_to_segment(self, name: str, values: Array) -> None:
        if name not in self.segments:
            name = name if len(self.segments) <= MOST_SEGMENTS else OTHER_SEGMENT
            self.segments.setdefault(name, np.zeros(len(GROUP_FIELDS)))
        self.segments[name] += values


T = TypeVar("T", Sums, Groups)


class Timeline(Generic[T]):
    """Buckets by time. Those of each level are joined to wider ones when they are older than its horizon.

    `levels` are pairs of width and horizon, each width a multiple of the one before; buckets older than the last
    horizon are `oldest` wide, and forgotten when they are older than `keep_ms`.
    """

    def __init__(self, levels: Sequence[tuple[int, int]], oldest: int, keep_ms: int, new: Callable[[], T]) -> None:
        self._widths = [*(width for width, _ in levels), oldest]
        self._horizons = [*(horizon for _, horizon in levels), keep_ms]
        self._new: Callable[[], T] = new
        self._buckets: list[dict[int, T]] = [{} for _ in self._widths]
        self._begins = [0] * len(self._widths)  # where each level begins: what is before it is of the next one

    def at(self, time_ms: int) -> T:
        """The bucket of a time."""
        level = next(
            (level for level, begin in enumerate(self._begins[:-1]) if time_ms >= begin), len(self._widths) - 1
        )
        start = time_ms - time_ms % self._widths[level]
        if start not in self._buckets[level]:
            self._buckets[level][start] = self._new()
        return self._buckets[level][start]

    def width_at(self, time_ms: int) -> int:
        """How wide the bucket of a time is."""
        return next(
            (width for width, begin in zip(self._widths, self._begins[:-1], strict=False) if time_ms >= begin),
            self._widths[-1],
        )

    def age(self, now_ms: int) -> None:
        """Join and forget what is old by now."""
        for level, horizon in enumerate(self._horizons):
            wider = self._widths[min(level + 1, len(self._widths) - 1)]
            begin = (now_ms - horizon) // wider * wider
            if begin <= self._begins[level]:
                continue
            self._begins[level] = begin
            old = [start for start in self._buckets[level] if start < begin]
            for start in sorted(old):
                bucket = self._buckets[level].pop(start)
                if level + 1 < len(self._widths):
                    wide = start - start % wider
                    if wide in self._buckets[level + 1]:
                        self._buckets[level + 1][wide].add(bucket)
                    else:
                        self._buckets[level + 1][wide] = bucket

    def between(self, since_ms: int, until_ms: int) -> Iterator[tuple[int, int, T]]:
        """Begin, end and content of the buckets that begin then, oldest first."""
        found = [
            (start, start + width, bucket)
            for width, buckets in zip(self._widths, self._buckets, strict=True)
            for start, bucket in list(buckets.items())
            if since_ms < start + width and start < until_ms
        ]
        yield from sorted(found, key=lambda one: one[0])

    def __len__(self) -> int:
        return sum(map(len, self._buckets))


@dataclass(frozen=True)
class Point:
    """A stretch of a window: from when, until when, its sums."""

    since_ms: int
    until_ms: int
    sums: Sums


@dataclass(frozen=True)
class Summary:
    """A model in a window of time.

    Attributes
    ----------
    since_ms, until_ms : the window, wholly counted
    counted_ms : when the first row was predicted that is counted at all; 0: none was
    total : sums of the window
    points : the same in stretches, oldest first, none where nothing was answered
    groups : classes and segments, from `groups_since_ms` on, as they are counted in longer stretches
    """

    since_ms: int
    until_ms: int
    counted_ms: int
    total: Sums
    points: Sequence[Point]
    groups: Groups
    groups_since_ms: int


class Tally:
    """The counters of one model. It holds no lock."""

    def __init__(self, n_classes: int, keep_ms: int) -> None:
        self.n_classes = n_classes
        self._sums = Timeline(LEVELS_MS, OLDEST_MS, keep_ms, Sums)
        self._block_ms = _block_width(n_classes, keep_ms)
        self._groups = Timeline((), self._block_ms, keep_ms, lambda: Groups(np.zeros((n_classes, len(GROUP_FIELDS)))))
        self._counted_ms = self._last_ms = 0
        self._shares = np.random.default_rng(0)  # a randomised set is not kept; one of the same law is made

    def add(self, part: Pairs, sets: ConformalCalibrator | None = None) -> None:
        """Rows that were answered, with the labels that are there. `sets` made their prediction sets, if any were."""
        self._counted_ms = min(self._counted_ms or int(part.times_ms.min()), int(part.times_ms.min()))
        self._last_ms = max(self._last_ms, int(part.times_ms.max()))
        self._count(part, sets, answered=True)

    def add_labels(self, part: Pairs, sets: ConformalCalibrator | None = None) -> None:
        """Labels that came later, for rows that are counted already."""
        counted = np.flatnonzero(part.times_ms >= self._counted_ms)
        if self._counted_ms and len(counted):
            self._count(part.chosen(counted), sets, answered=False)

    def age(self, now_ms: int) -> None:
        self._sums.age(now_ms)
        self._groups.age(now_ms)

    def summary(self, since_ms: int, until_ms: int) -> Summary:
        """The window from a time to another; it begins where a bucket begins."""
        found = list(self._sums.between(since_ms, until_ms))
        begin = found[0][0] if found else since_ms
        points = _joined(found, _step(begin, min(until_ms, self._last_ms + 1)))
        total = Sums()
        for point in points:
            total.add(point.sums)
        groups = Groups(np.zeros((self.n_classes, len(GROUP_FIELDS))))
        groups_since = since_ms
        for start, _, block in self._groups.between(since_ms, until_ms):
            groups_since = min(groups_since, start)
            groups.add(block)
        return Summary(since_ms, until_ms, self._counted_ms, total, points, groups, max(groups_since, self._counted_ms))

    def _count(self, part: Pairs, sets: ConformalCalibrator | None, *, answered: bool) -> None:
        """Rows without NaN and +inf, one of which would make a NaN of every sum that it is added to."""
        whole = np.isfinite(part.kept.probabilities).all(axis=1) & (part.kept.logits < np.inf).all(axis=1)
        part = part.chosen(np.flatnonzero(whole))
        if not len(part):
            return
        rows = Rows.of(part, self.n_classes, sets, self._shares)
        for chosen in _runs(part.times_ms, self._sums):
            rows.add_to(self._sums.at(int(part.times_ms[chosen.start])), chosen, answered=answered)
        labelled = np.flatnonzero(part.labels != NO_LABEL)
        blocks = part.times_ms[labelled] // self._block_ms
        for block in np.unique(blocks).tolist():
            groups = self._groups.at(block * self._block_ms)
            rows.add_to_groups(groups, labelled[blocks == block], self.n_classes)


@dataclass(frozen=True)
class Rows:
    """What is counted of rows: of each forecaster confidence, answer and log-probability of the label (0 without)."""

    part: Pairs
    confidence: Mapping[str, Array]
    answer: Mapping[str, Whole]
    log_probability: Mapping[str, Array]
    set_sizes: Whole | None
    covered: NDArray[np.bool_] | None

    @classmethod
    def of(cls, part: Pairs, n_classes: int, sets: ConformalCalibrator | None, shares: np.random.Generator) -> Self:
        kept = part.kept
        row = np.arange(len(part))
        logits = kept.logits.astype(np.float64)
        largest = logits.max(axis=1)
        normaliser = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        if kept.rest is not None:
            normaliser = np.logaddexp(normaliser, kept.rest)
        place, has_place = _place_of(kept, part.labels)
        left_raw, left_served = _left_over(kept, normaliser, n_classes)
        raw = np.where(has_place, logits[row, place] - normaliser, left_raw)
        served = np.where(has_place, kept.probabilities[row, place].astype(np.float64), left_served)
        size, covered = _sets(kept, part.labels, n_classes, sets, shares)
        first = logits.argmax(axis=1)
        return cls(
            part,
            {RAW: np.exp(largest - normaliser), SERVED: kept.confidence.astype(np.float64)},
            {RAW: first if kept.classes is None else kept.classes[row, first].astype(np.int64), SERVED: kept.label},
            {
                RAW: np.maximum(raw, math.log(LEAST_PROBABILITY)),
                SERVED: np.log(np.maximum(served, LEAST_PROBABILITY)),
            },
            size,
            covered,
        )

    def add_to(self, sums: Sums, chosen: slice, *, answered: bool) -> None:
        labels = self.part.labels[chosen]
        labelled = labels != NO_LABEL
        for which in (RAW, SERVED):
            confidence = self.confidence[which][chosen]
            bins = np.clip(np.searchsorted(_EDGES, confidence, side="left") - 1, 0, FINE_BINS - 1)
            if answered:
                sums[f"{which}.answers"][:] += np.bincount(bins, minlength=FINE_BINS)
            bins, right = bins[labelled], (self.answer[which][chosen] == labels)[labelled]
            for name, weights in (("labels", None), ("said", confidence[labelled]), ("right", right)):
                sums[f"{which}.{name}"][:] += np.bincount(bins, weights, FINE_BINS)
            sums[f"{which}.log_loss"][0] -= self.log_probability[which][chosen][labelled].sum()
        if self.set_sizes is not None and self.covered is not None:
            if answered:
                sizes = np.minimum(self.set_sizes[chosen], MOST_SET_SIZE)
                sums["set_sizes"][:] += np.bincount(sizes, minlength=MOST_SET_SIZE + 1)
            sums["sets"][0] += labelled.sum()
            sums["covered"][0] += self.covered[chosen][labelled].sum()

    def add_to_groups(self, groups: Groups, rows: NDArray[np.intp], n_classes: int) -> None:
        labels, segment, names = self.part.labels[rows], self.part.segments[rows], self.part.segment_names
        of_segment = np.zeros((len(names), len(GROUP_FIELDS)))
        for which, first in ((RAW, 0), (SERVED, 3)):
            answer, said = self.answer[which][rows], self.confidence[which][rows]
            for column, weights in ((first, None), (first + 1, said), (first + 2, answer == labels)):
                groups.classes[:, column] += np.bincount(answer, weights, n_classes)
                of_segment[:, column] += np.bincount(segment, weights, len(names))
        groups.classes[:, 6] += _promised(self.part.kept.rows(rows), n_classes)
        groups.classes[:, 7] += np.bincount(labels, minlength=n_classes)
        for name, values in zip(names, of_segment, strict=True):
            if values[0]:
                groups.add_to_segment(name, values)


def _place_of(kept: Kept, labels: Whole) -> tuple[Whole, NDArray[np.bool_]]:
    """Where each label stands among the classes that are kept, and whether it does."""
    if kept.classes is None:
        return np.maximum(labels, 0), np.ones(len(labels), np.bool_)
    found = kept.classes == labels[:, None]
    return found.argmax(axis=1), found.any(axis=1)


def _left_over(kept: Kept, normaliser: Array, n_classes: int) -> tuple[Array | float, Array | float]:
    """Raw log-probability and served probability of each class that is not kept: an equal part of what is left."""
    if kept.classes is None or kept.rest is None:
        return 0.0, 0.0
    others = n_classes - kept.classes.shape[1]
    left = np.maximum(0.0, 1.0 - kept.probabilities.sum(axis=1, dtype=np.float64))
    return kept.rest - math.log(others) - normaliser, left / others


def _promised(kept: Kept, n_classes: int) -> Array:
    """The sum of the probabilities of each class, (n_classes,)."""
    if kept.classes is None:
        return np.asarray(kept.probabilities.sum(axis=0, dtype=np.float64))
    classes = kept.classes.ravel().astype(np.int64)
    each = _left_over(kept, np.zeros(len(kept)), n_classes)[1]
    promised = np.bincount(classes, kept.probabilities.ravel().astype(np.float64), n_classes) + np.sum(each)
    return promised - np.bincount(classes, np.repeat(each, kept.classes.shape[1]), n_classes)


def _sets(
    kept: Kept, labels: Whole, n_classes: int, sets: ConformalCalibrator | None, shares: np.random.Generator
) -> tuple[Whole | None, NDArray[np.bool_] | None]:
    """How large the prediction set of each row is, and whether it holds the label."""
    if sets is None:
        return None, None
    members = sets.sets(probabilities_of(kept, n_classes), shares=shares.random(len(kept)) if sets.randomised else None)
    covered: NDArray[np.bool_] = members[np.arange(len(labels)), np.maximum(labels, 0)]
    return members.sum(axis=1), covered


def _runs(times_ms: Whole, timeline: Timeline[Sums]) -> Iterator[slice]:
    """Stretches of rows that belong to one bucket."""
    start = 0
    while start < len(times_ms):
        width = timeline.width_at(int(times_ms[start]))
        bucket = times_ms[start] // width
        others = np.flatnonzero(times_ms[start:] // width != bucket)
        stop = start + int(others[0]) if len(others) else len(times_ms)
        yield slice(start, stop)
        start = stop


def _block_width(n_classes: int, keep_ms: int) -> int:
    """Whole hours, so long that the counters of all classes take no more than `MOST_CELLS`, and 48 blocks at most."""
    blocks = min(48, max(1, MOST_CELLS // (n_classes * len(GROUP_FIELDS))))
    return -(-keep_ms // (blocks * OLDEST_MS)) * OLDEST_MS


def _step(begin_ms: int, end_ms: int) -> int:
    """The least round stretch of which `MOST_POINTS` span the window."""
    return next((step for step in STEPS_MS if (end_ms - begin_ms) / step <= MOST_POINTS), STEPS_MS[-1])


def _joined(found: Sequence[tuple[int, int, Sums]], step: int) -> list[Point]:
    """Buckets by stretches of one width, or of their own where that is wider."""
    points: dict[int, Point] = {}
    for start, end, sums in found:
        begin = start - start % step
        if begin not in points:
            points[begin] = Point(start, end, Sums())
        points[begin].sums.add(sums)
        points[begin] = Point(points[begin].since_ms, max(end, points[begin].until_ms), points[begin].sums)
    return list(points.values())
