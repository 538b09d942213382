"""score_shift: whether what the model says is distributed as it was, without a label.

Each watched signal is compared with its first `reference_rows` values, r_1 .. r_m, which are then frozen. A value s
gives

    u = (#{r_i < s} + U (#{r_i = s} + 1)) / (m + 1)          U uniform, a function of the number of rows read
    phi_1 = 2 u - 1     phi_2 = (3 (2 u - 1)^2 - 1) / 2      the probability integral transform, Legendre's polynomials
    L = 1 + e phi_d - |e| delta_d                            for stakes e on a shift (d = 1) and on a spread (d = 2)

and the predicted class, a signal of its own, L = f^[class k] / (1 + q_k (f - 1)) for factors f on the odds of each
class. While the signal keeps its law, no L exceeds 1 in the mean, whatever is known of the past, and the mixture

    M_j <- L_j (M_j + w_j)     sum_j w_j = 1     R = sum_j M_j     rings when R >= c

is a Shiryaev-Roberts e-detector (Shin, Ramdas, Rinaldo, "E-detectors", NEJSDS 2, 2024): R grows by 1 a row in the mean
at most, so by Doob's inequality P(it rings within N rows) <= N / c. Several signals share the one clock and the one
threshold, each with an equal part of the weights.

The slack delta is for the reference being a sample: a stream of the same law as the reference's source is not of the
law of the reference, and without slack most references of 2000 rows ring within 100,000 rows. Given the reference, the
mean of phi_d is, up to a term of order 1/m, the mean of -phi_d over m uniform numbers, of variance 1/(3m) and 1/(5m),
and delta bounds it; q_k is the upper end for f > 1, the lower for f < 1, of the interval of Clopper and Pearson
(Biometrika 26, 1934). All bounds hold together but with probability `reference_error`. `normal`: delta by the central
limit theorem. `exact`: for every m and every law, with l = log(6 signals / reference_error),

    delta_1 = sqrt(2 l / (3 m))                              a uniform number is sub-Gaussian with its own variance
    delta_2 = sqrt(2 l / (5 m)) + l / (3 m) + 3 / (m + 1) + 6 (sqrt(l / (2 m)) + 1 / (m + 1))^2
                                                             Bernstein; the square of the inequality of Dvoretzky,
                                                             Kiefer, Wolfowitz (Massart, Annals of Probability 18, 1990)

So, with rows drawn independently as the reference was,

    P(it rings within N rows) <= N / c + reference_error     c = horizon / false_alarm_probability

It cannot see a change of what the labels are given the scores. State: reference_rows float32 and 14 bets a signal, of
the predicted class 6 bets for each of the 32 most frequent classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log, log10, sqrt
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm

from calibrators.online.compiled import compiled
from service.drift.detectors.base import Array, Batch, Detector, Lumped, number, one_of, whole

OF_LOGITS = ("confidence", "margin", "entropy")
PREDICTED_CLASS = "predicted_class"
SLACKS = ("normal", "exact", "none")

STAKES_ON_SHIFT = (-0.8, -0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.8)
STAKES_ON_SPREAD = (-0.8, -0.4, -0.2, 0.2, 0.4, 0.8)
MOST_SLACK = 0.25
"""From here on a stake of .8 could lose more than there is."""
LOG_FACTORS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
MOST_CLASSES = 32
"""Of the predicted classes so many, the most frequent of the reference, are bet on."""
MOST_REFERENCE_ROWS = 10_000_000
MOST_WEALTH = 1e250
"""Of one bet, so that a detector which is not reset after it rang stays finite."""


class ScoreShift(Detector):
    """Rings when the law of one of its signals has moved from that of its reference.

    Rows in which a watched signal is missing or not a finite number pass it by.

    Parameters
    ----------
    signals : names, separated by commas: confidence, margin (between the two top probabilities), entropy,
        predicted_class, or any of `Batch.signals`
    reference_rows : m, rows of the reference
    slack : normal, exact, or none, which holds only where the reference is no sample but the whole
    reference_error : probability that the reference is outside its bounds
    horizon, false_alarm_probability : within so many rows it rings falsely with at most this probability, but for a bad
        reference

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(6000, 3))
    >>> y, segments = np.full(6000, -1), np.zeros(6000, dtype=int)
    >>> detector = ScoreShift("confidence,predicted_class")
    >>> print(detector.update(Batch(z, y, segments)))  # 2000 rows of reference, 4000 like them
    None
    >>> rang_at = detector.update(Batch(1.6 * z, y, segments))
    >>> rang_at < 200, detector.statistic >= detector.threshold, max(detector.evidence(), key=detector.evidence().get)
    (True, True, 'confidence')
    """

    kind = "score_shift"
    labelled = False

    def __init__(
        self,
        signals: str = "confidence",
        *,
        reference_rows: int = 2000,
        slack: str = "normal",
        reference_error: float = 0.005,
        false_alarm_probability: float = 0.1,
        horizon: float = 100_000,
    ) -> None:
        self.signals, self._names = signals, tuple(name.strip() for name in str(signals).split(","))
        is_names = isinstance(signals, str) and all(name.isidentifier() for name in self._names)
        if not is_names or len({*self._names}) < len(self._names):
            raise ValueError(f"signals must be different names, separated by commas, got {signals!r}")
        self.reference_rows = whole("reference_rows", reference_rows, most=MOST_REFERENCE_ROWS)
        self.slack = one_of("slack", slack, SLACKS)
        self.reference_error = number("reference_error", reference_error, above=0.0, most=0.5)
        self.false_alarm_probability = number("false_alarm_probability", false_alarm_probability, above=0.0, most=1.0)
        self.horizon = number("horizon", horizon, least=1.0)
        self._most = self.horizon / self.false_alarm_probability
        self._error = self.reference_error / len(self._names)
        self._deltas = _slacks(self.slack, self.reference_rows, self._error)
        if max(self._deltas) >= MOST_SLACK:
            raise ValueError(
                f"reference_rows must be more for slack {slack} and this reference_error, got {reference_rows}"
            )
        self._numbers = tuple(name for name in self._names if name != PREDICTED_CLASS)
        self._reference = np.zeros((len(self._numbers), self.reference_rows), dtype=np.float32)
        self._classes = np.zeros(0, dtype=np.int64)  # rows of the reference that each was predicted in
        self._n_read = 0
        self._begin(_Bets.none())

    @property
    def ready(self) -> bool:
        return self._n_read >= self.reference_rows

    @property
    def statistic(self) -> float:
        return log10(max(float(self._wealth.sum()), 1.0))

    @property
    def threshold(self) -> float:
        return log10(self._most)

    def update(self, batch: Batch) -> int | None:
        values, classes = self._read(batch)
        (rows,) = np.nonzero(np.isfinite(values).all(axis=0))
        if len(rows) < len(classes):
            values, classes = values[:, rows], classes[rows]
        start = self._learn(values, classes)
        if start == len(rows):
            return None
        read = _bet(
            np.ascontiguousarray(values[:, start:]), classes[start:], _uniforms(self._n_read, len(rows) - start),
            self._reference, *self._bets, self._wealth, self._best, self._since, self.n_rows, self._most,
        )  # fmt: skip
        rang = read < 0
        self.n_rows += abs(read)
        self._n_read += abs(read)
        return int(rows[start - read - 1]) if rang else None

    def change_point(self) -> int:
        return max(1, self.n_rows - int(self._since[np.argmax(self._wealth)])) if self.n_rows else 1

    def evidence(self) -> dict[str, float]:
        total = float(self._wealth.sum())
        if not total:
            return {}
        shares: dict[str, float] = {}
        for part, wealth in zip(self._parts(), self._wealth.tolist(), strict=True):
            shares[part] = shares.get(part, 0.0) + wealth / total
        return shares

    def reset(self) -> None:
        self._begin(self._bets)

    def state(self) -> dict[str, NDArray[np.generic]]:
        counts = np.array([self._n_read, self.n_rows])
        return self._packed(
            counts=counts, reference=self._reference, classes=self._classes, wealth=self._wealth, best=self._best,
            since=self._since,
        )  # fmt: skip

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        kept: dict[str, NDArray[Any]] = self._unpacked(
            state, "counts", "reference", "classes", "wealth", "best", "since"
        )
        self._n_read, n_rows = kept["counts"].tolist()
        self._reference, self._classes = kept["reference"], kept["classes"]
        self._begin(self._make_bets() if self.ready else _Bets.none())
        self.n_rows, self._wealth, self._best, self._since = n_rows, kept["wealth"], kept["best"], kept["since"]
        return self

    # ---- signals and the reference

    def _read(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(numbers, n_rows) and the predicted class (n_rows,)."""
        values = np.full((len(self._numbers), len(batch)), np.nan, dtype=np.float32)
        classes = np.zeros(len(batch), dtype=np.int64)
        if {*self._names} & {*OF_LOGITS, PREDICTED_CLASS}:
            of_logits, classes = signals_of(batch.scores)
        for row, name in enumerate(self._numbers):
            if name in OF_LOGITS:
                values[row] = of_logits[OF_LOGITS.index(name)]
            elif name in batch.signals:
                with np.errstate(over="ignore"):  # beyond float32 is not a finite number
                    values[row] = batch.signals[name]
        if PREDICTED_CLASS in self._names:
            n_classes = batch.n_classes
            if not len(self._classes):
                self._classes = np.zeros(n_classes, dtype=np.int64)
            elif n_classes != len(self._classes):
                raise ValueError(f"logits must have {len(self._classes)} columns as those before, got {n_classes}")
        return values, classes

    def _learn(self, values: NDArray[np.float32], classes: NDArray[np.int64]) -> int:
        """Complete the reference; how many of the rows went into it."""
        if self.ready:
            return 0
        n = min(self.reference_rows - self._n_read, len(classes))
        self._reference[:, self._n_read : self._n_read + n] = values[:, :n]
        if len(self._classes):
            self._classes += np.bincount(classes[:n], minlength=len(self._classes))
        self._n_read += n
        if self.ready:
            self._reference.sort(axis=1)
            self._begin(self._make_bets())
        return n

    # ---- bets

    def _make_bets(self) -> _Bets:
        weight, (shift, spread) = 1 / len(self._names), self._deltas
        stakes = np.array(STAKES_ON_SHIFT + STAKES_ON_SPREAD)
        is_spread = np.arange(len(stakes)) >= len(STAKES_ON_SHIFT)
        numbers = np.stack(
            [
                1 - np.abs(stakes) * np.where(is_spread, spread, shift),
                np.where(is_spread, 0, stakes),
                np.where(is_spread, stakes, 0),
                np.full(len(stakes), weight / len(stakes)),
            ]
        )
        if not len(self._classes):
            return _Bets(numbers, np.zeros((3, 0)), np.zeros(0, dtype=np.int64))
        bet_on = np.sort(np.argsort(-self._classes, kind="stable")[:MOST_CLASSES])
        factors = np.exp(np.tile(LOG_FACTORS, len(bet_on)))
        low, high = (np.repeat(ends[bet_on], len(LOG_FACTORS)) for ends in self._bounds())
        mean = 1 + np.where(factors > 1, high, low) * (factors - 1)
        classes = np.stack([factors / mean, 1 / mean, np.full(len(factors), weight / len(factors))])
        return _Bets(numbers, classes, np.repeat(bet_on, len(LOG_FACTORS)))

    def _bounds(self) -> tuple[Array, Array]:
        """Of the probability of each class to be the predicted one: all hold but with probability `_error`."""
        counts, tail = self._classes, self._error / (2 * len(self._classes))
        if self.slack == "none":
            return counts / self.reference_rows, counts / self.reference_rows
        low, high = (
            beta.ppf(tail, counts, self.reference_rows - counts + 1),
            beta.isf(tail, counts + 1, self.reference_rows - counts),
        )
        return np.where(counts > 0, low, 0.0), np.where(counts < self.reference_rows, high, 1.0)

    def _parts(self) -> list[str]:
        """What each bet is on."""
        numbers = [name for name in self._numbers for _ in range(self._bets.numbers.shape[1])]
        return numbers + [f"class {k}" for k in self._bets.of_class]

    def _begin(self, bets: _Bets) -> None:
        self._bets, self.n_rows = bets, 0
        n_bets = len(self._numbers) * bets.numbers.shape[1] + len(bets.of_class)
        self._wealth, self._best = np.zeros(n_bets), np.zeros(n_bets)
        self._since = np.zeros(n_bets, dtype=np.int64)


class _Bets(NamedTuple):
    """Attributes
    ----------
    numbers : (4, 14) of a number: L is the first + the second phi_1 + the third phi_2; the fourth is w
    classes : (3, n) of the predicted class: L where it is the bet's own, L where it is not, w
    of_class : (n,) what each bets on
    """

    numbers: Array
    classes: Array
    of_class: NDArray[np.int64]

    @classmethod
    def none(cls) -> Self:
        return cls(np.zeros((4, 0)), np.zeros((3, 0)), np.zeros(0, dtype=np.int64))


def _slacks(slack: str, m: int, error: float) -> tuple[float, float]:
    """delta_1, delta_2 of one signal, whose bounds may fail with probability `error`."""
    if slack == "none":
        return 0.0, 0.0
    if slack == "normal":
        z = float(norm.isf(error / 4))
        return z / sqrt(3 * m), z / sqrt(5 * m)
    bound = log(6 / error)
    remainder = 3 / (m + 1) + 6 * (sqrt(bound / (2 * m)) + 1 / (m + 1)) ** 2
    return sqrt(2 * bound / (3 * m)), sqrt(2 * bound / (5 * m)) + bound / (3 * m) + remainder


def _uniforms(first: int, n: int) -> Array:
    """U of rows first .. first + n - 1, in (0, 1): SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of their number."""
    x = np.arange(first + 1, first + 1 + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.asarray(((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def signals_of(scores: Array | Lumped) -> tuple[Array, NDArray[np.int64]]:
    """Confidence, margin and entropy (3, n_rows), and the predicted class (n_rows,), of logits.

    >>> numbers, classes = signals_of(np.log([[0.2, 0.5, 0.3], [1.0, 1.0, 2.0]]))
    >>> numbers.round(3).tolist(), classes.tolist()
    ([[0.5, 0.5], [0.2, 0.25], [1.03, 1.04]], [1, 2])
    >>> lumped = Lumped(np.log([[0.5, 0.3]]), np.array([[1, 2]]), np.log([0.1]), 4)
    >>> all(np.allclose(*pair) for pair in zip(signals_of(lumped), signals_of(lumped.whole), strict=True))
    True
    """
    if not isinstance(scores, Lumped):
        return _computed(scores, 1)
    numbers, classes = _computed(
        np.concatenate([scores.named, scores.other[:, None]], axis=1), scores.n_classes - scores.named.shape[1]
    )
    largest = scores.named.max(axis=1)
    classes = np.where(scores.named == largest[:, None], scores.classes, scores.n_classes).min(axis=1)
    (unnamed,) = np.nonzero(scores.other >= largest)  # one of those is the predicted class, or may be
    if len(unnamed):
        numbers[:, unnamed], classes[unnamed] = signals_of(scores[unnamed].whole)
    return numbers, classes


def _computed(logits: Array, times: int) -> tuple[Array, NDArray[np.int64]]:
    """The same, with the column of the largest; the last column stands for so many classes."""
    numbers, largest = np.empty((len(OF_LOGITS), len(logits))), np.empty(len(logits), dtype=np.int64)
    _signals(np.ascontiguousarray(logits, np.float64), float(times), numbers, largest)
    return numbers, largest


@compiled
def _signals(logits: Array, times: float, numbers: Array, classes: NDArray[np.int64]) -> None:
    n_rows, n_columns = logits.shape
    for t in range(n_rows):
        top, second, first = -np.inf, -np.inf, 0
        for k in range(n_columns):
            z = logits[t, k]
            if z > top:
                top, second, first = z, top, k
            elif z > second:
                second = z
        total, weighted = 1.0, 0.0
        for k in range(n_columns):
            if k != first:
                below = logits[t, k] - top
                e = exp(below) * (times if k == n_columns - 1 else 1.0)
                total += e
                if e > 0.0:
                    weighted += below * e
        numbers[0, t] = 1.0 / total
        numbers[1, t] = (1.0 - exp(second - top)) / total
        numbers[2, t] = log(total) - weighted / total
        classes[t] = first


@compiled
def _bet(
    values: NDArray[np.float32], classes: NDArray[np.int64], uniforms: Array, reference: NDArray[np.float32],
    of_numbers: Array, of_classes: Array, of_class: NDArray[np.int64],
    wealth: Array, best: Array, since: NDArray[np.int64], n_rows: int, most: float,
) -> int:  # fmt: skip
    """Change wealth, best and since by rows; how many were read, negative if it rang at the last of them.

    best is the largest product of L over the rows since some row, and since that row: where the bet's change most
    likely came.
    """
    n_bets, m = of_numbers.shape[1], reference.shape[1]
    for t in range(len(uniforms)):
        total = 0.0
        for i in range(len(values)):
            s, ascending = values[i, t], reference[i]
            low, high = 0, m
            while low < high:
                middle = (low + high) >> 1
                if ascending[middle] < s:
                    low = middle + 1
                else:
                    high = middle
            if low < m and ascending[low] == s:
                high = m
                first = low
                while first < high:
                    middle = (first + high) >> 1
                    if ascending[middle] <= s:
                        first = middle + 1
                    else:
                        high = middle
            x = 2.0 * (low + uniforms[t] * (high - low + 1)) / (m + 1) - 1.0
            spread = 1.5 * x * x - 0.5
            for j in range(n_bets):
                ratio = of_numbers[0, j] + of_numbers[1, j] * x + of_numbers[2, j] * spread
                b = i * n_bets + j
                wealth[b] = min(ratio * (wealth[b] + of_numbers[3, j]), MOST_WEALTH)
                if best[b] <= 1.0:
                    best[b], since[b] = 1.0, n_rows + t
                best[b] = min(best[b] * ratio, MOST_WEALTH)
                total += wealth[b]
        first = len(values) * n_bets
        for j in range(len(of_class)):
            ratio = of_classes[0, j] if of_class[j] == classes[t] else of_classes[1, j]
            b = first + j
            wealth[b] = min(ratio * (wealth[b] + of_classes[2, j]), MOST_WEALTH)
            if best[b] <= 1.0:
                best[b], since[b] = 1.0, n_rows + t
            best[b] = min(best[b] * ratio, MOST_WEALTH)
            total += wealth[b]
        if total >= most:
            return -(t + 1)
    return len(uniforms)
