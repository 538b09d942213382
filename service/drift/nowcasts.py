"""How good the model is now: its accuracy before labels come and with a few of them, and how far its word is off.

- Without labels: a calibrated model's mean confidence is its accuracy. The variance of the mean of W rows is that of
  the labels to come, mean c (1 - c) / W, and that of the calibration itself, known from n labels, Var(c - correct) / n.
  It holds as long as the model is calibrated and not a row longer: under noise in the inputs or the labels it is off by
  ten points while its interval is two wide. So it has a flag, which goes down when an alarm with labels rings.
- With few labels: mean confidence of all rows + mean of (correct - confidence) of those with labels (Angelopoulos et
  al., "Prediction-powered inference", Science 382, 2023), whatever the calibration; the second term in a confidence
  sequence by betting, which holds at every look.
- The calibration error of the last cohort of labels: the root of the squared error over fixed bins of the confidence,
  less what noise adds, with an interval for each of `LOOKS` looks at a cohort that hold together.

The betting sequence (Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024,
with constant stakes, mixed): for x_i in [0, 1] of mean at most m, the mean over stakes g of prod_i (1 - g + g x_i / m)
is a non-negative supermartingale that starts at 1, so it passes 2 / (1 - level) with half the probability allowed. It
falls with m, so the m at which it does not are an interval, whose end is found by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, nan, sqrt
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from calibrators.metrics.binned import debiased_squared_gap
from calibrators.metrics.calibration import ReliabilityCurve, binned_curve, equal_width_edges
from calibrators.numerics import softmax
from service.drift.detectors.base import NO_LABEL, Array, Batch, Lumped, number, whole
from service.drift.detectors.score_shift import OF_LOGITS, signals_of

FEWEST_ROWS = 100
"""Of which there is a mean confidence at all."""
LOOKS = 8
"""At a cohort's labels: after each eighth."""
N_BINS = 15
STAKES = np.array([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.95])
BISECTIONS = 30


@dataclass(frozen=True)
class Nowcast:
    """A figure as of now.

    Attributes
    ----------
    estimate, low, high : the figure and its interval, NaN while there is none
    valid : whether the interval holds
    n_rows, n_labels : what it rests on
    why_not : why it is not valid, in a sentence; empty where it is
    """

    estimate: float
    low: float
    high: float
    valid: bool
    n_rows: int
    n_labels: int
    why_not: str


class Nowcasts:
    """Of one forecaster: the model, or what was served. Its state is of fixed size.

    Parameters
    ----------
    window_rows : the last so many rows are now
    cohort_labels : labels of a cohort, of which the calibration error is told; a multiple of `LOOKS`
    reference_labels : the first so many labels tell how well the mean confidence is known to be the accuracy
    level : of the intervals

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = 2 * rng.normal(size=(4000, 3))
    >>> y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    >>> now = Nowcasts()
    >>> batch = Batch(z, y, np.zeros(4000, dtype=int))
    >>> now.read(batch), now.read_labels(batch.rows(slice(1000)))
    (None, None)
    >>> told = now.accuracy_without_labels(ringing=False)
    >>> f"{told.estimate:.2f} [{told.low:.2f}, {told.high:.2f}]"
    '0.74 [0.70, 0.78]'
    >>> now.accuracy_without_labels(ringing=True).valid
    False
    """

    def __init__(
        self,
        *,
        window_rows: int = 2000,
        cohort_labels: int = 2000,
        reference_labels: int = 500,
        level: float = 0.95,
    ) -> None:
        self.window_rows = whole("window_rows", window_rows, least=FEWEST_ROWS)
        self.cohort_labels = whole("cohort_labels", cohort_labels, least=LOOKS * N_BINS)
        self.reference_labels = whole("reference_labels", reference_labels, least=FEWEST_ROWS)
        self.level = number("level", level, least=0.5, most=0.9999)
        if self.cohort_labels % LOOKS:
            raise ValueError(f"cohort_labels must be a multiple of {LOOKS}, got {cohort_labels}")
        self.reset()

    def reset(self) -> None:
        """Forget everything: another model or another calibrator serves."""
        self._window, self._n_rows = np.zeros(self.window_rows), 0
        self._n_labels = 0
        self._reference = np.zeros(3)  # count, mean and squared deviations of confidence - correct
        self.begin_cohort()

    def begin_cohort(self) -> None:
        """Judge labels to come apart from those before: a change was noticed."""
        self._last = np.zeros((2, 0))  # the cohort before
        self._empty_cohort()

    def _empty_cohort(self) -> None:
        self._cohort = np.zeros((2, self.cohort_labels))  # confidence, and 1 where it was right
        self._n_cohort = 0

    def read(self, batch: Batch) -> None:
        """Rows as they are predicted, with labels or without; a row without finite probabilities passes by."""
        if isinstance(batch.scores, Lumped):
            confidence = signals_of(batch.scores)[0][OF_LOGITS.index("confidence")]
            confidence = confidence[np.isfinite(confidence)]
        else:
            confidence = softmax(batch.scores[_is_finite(batch.scores)]).max(axis=1)
        places = (self._n_rows + np.arange(len(confidence))) % self.window_rows
        self._window[places[-self.window_rows :]] = confidence[-self.window_rows :]
        self._n_rows += len(confidence)

    def read_labels(self, batch: Batch) -> None:
        """Rows that are waited for no longer, in the order of their prediction; those without a label pass by."""
        labelled = batch.rows(np.flatnonzero(batch.labels != NO_LABEL))
        finite = _is_finite(logits := labelled.logits)
        p = softmax(logits[finite])
        rows = np.stack([p.max(axis=1), p.argmax(axis=1) == labelled.labels[finite]])
        self._n_labels += len(p)
        self._learn_reference(rows[:, : self.reference_labels - int(self._reference[0])])
        while rows.shape[1]:
            if self._n_cohort == self.cohort_labels:
                self._last = self._cohort
                self._empty_cohort()
            n = min(rows.shape[1], self.cohort_labels - self._n_cohort)
            self._cohort[:, self._n_cohort : self._n_cohort + n] = rows[:, :n]
            self._n_cohort, rows = self._n_cohort + n, rows[:, n:]

    # ---- figures

    def accuracy_without_labels(self, *, ringing: bool) -> Nowcast:
        """Mean confidence of the last rows. `ringing`: whether an alarm with labels of this forecaster rings."""
        confidence = self._recent()
        if len(confidence) < FEWEST_ROWS:
            return self._none(f"{len(confidence)} rows have come, {FEWEST_ROWS} are needed.")
        count, _, squares = self._reference
        variance = float((confidence * (1 - confidence)).mean()) / len(confidence)
        variance += (squares / (count - 1) if count > 1 else 0.25) / max(count, 1)
        half, estimate = float(norm.isf((1 - self.level) / 2)) * sqrt(variance), float(confidence.mean())
        why_not = ""
        if ringing:
            why_not = "The labels say that the confidence is not the accuracy now: an alarm rings."
        elif count < self.reference_labels:
            why_not = (
                f"{int(count)} labels have come, {self.reference_labels} are needed to know what confidence is worth."
            )
        low, high = max(0.0, estimate - half), min(1.0, estimate + half)
        return Nowcast(estimate, low, high, not why_not, len(confidence), self._n_labels, why_not)

    def accuracy(self) -> Nowcast:
        """Of the last rows, by the labels of the current cohort, however few; valid at every look."""
        confidence, (said, right) = self._recent(), self._cohort[:, : self._n_cohort]
        if len(confidence) < FEWEST_ROWS or not self._n_cohort:
            return self._none("There must be a label since the last change, and some rows.")
        mean, correction = float(confidence.mean()), right - said
        low, high = betting_interval((1 + correction) / 2, self.level)
        return Nowcast(
            float(np.clip(mean + correction.mean(), 0, 1)),
            max(0.0, mean + 2 * low - 1),
            min(1.0, mean + 2 * high - 1),
            True,
            len(confidence),
            self._n_cohort,
            "",
        )

    def calibration_error(self) -> Nowcast:
        """Of the labels of the current cohort at the last look, or of the one before while it has not half of them."""
        look = self.cohort_labels // LOOKS
        n = self._n_cohort // look * look
        rows = self._last if self._last.shape[1] and n < self.cohort_labels // 2 else self._cohort[:, :n]
        if not rows.shape[1]:
            return self._none(f"{self._n_cohort} labels have come, {look} are needed.")
        curve = binned_curve(rows[0], rows[1], equal_width_edges(N_BINS, np.dtype(np.float64)))
        low, high = squared_gap_interval(curve, 1 - (1 - self.level) / LOOKS)
        estimate, low, high = (sqrt(max(0.0, squared)) for squared in (debiased_squared_gap(curve), low, high))
        return Nowcast(estimate, low, high, True, rows.shape[1], rows.shape[1], "")

    # ---- state

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Everything that rows have changed, as arrays."""
        return {
            "counts": np.array([self._n_rows, self._n_labels, self._n_cohort]),
            "window": self._window.copy(),
            "reference": self._reference.copy(),
            "cohort": self._cohort.copy(),
            "last": self._last.copy(),
        }

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        """Go on from what `state` gave; ValueError if it is of other parameters."""
        kept: dict[str, NDArray[Any]] = {name: np.array(state.get(name, ())) for name in self.state()}
        if kept["window"].shape != self._window.shape or kept["cohort"].shape != self._cohort.shape:
            raise ValueError(f"the state must be of window_rows={self.window_rows}, cohort_labels={self.cohort_labels}")
        self._n_rows, self._n_labels, self._n_cohort = kept["counts"].tolist()
        self._window, self._reference, self._cohort, self._last = (
            kept[name] for name in ("window", "reference", "cohort", "last")
        )
        return self

    def _recent(self) -> Array:
        return self._window[: min(self._n_rows, self.window_rows)]

    def _none(self, why_not: str) -> Nowcast:
        return Nowcast(nan, nan, nan, False, min(self._n_rows, self.window_rows), self._n_labels, why_not)

    def _learn_reference(self, rows: Array) -> None:
        """Welford's update, row by row: the same bits however the rows are divided."""
        count, mean, squares = self._reference.tolist()
        for gap in (rows[0] - rows[1]).tolist():
            count += 1
            delta = gap - mean
            mean += delta / count
            squares += delta * (gap - mean)
        self._reference = np.array([count, mean, squares])


def _is_finite(logits: Array) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(logits.max(axis=1)))


def betting_interval(x: Array, level: float) -> tuple[float, float]:
    """Bounds of the mean of what x, (n,) in [0, 1] and in order, are drawn from, that hold for all n at once.

    Of x whose means differ: not all are below the lower bound, nor all above the upper one.

    >>> low, high = betting_interval(np.tile([0.0, 1.0, 1.0], 100), 0.95)
    >>> round(low, 2), round(high, 2)
    (0.57, 0.75)
    """
    most = log(2 / (1 - level)) + log(len(STAKES))
    return _lower(x, most), 1 - _lower(1 - x, most)


def _lower(x: Array, most: float) -> float:
    """The m where sum over stakes of prod (1 - g + g x / m) is exp(most); 0 where it is less everywhere."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        logs = np.log1p(STAKES[:, None] * (x / middle - 1)).sum(axis=1)
        if float(np.logaddexp.reduce(logs)) > most:
            low = middle
        else:
            high = middle
    return low


def squared_gap_interval(curve: ReliabilityCurve, level: float) -> tuple[float, float]:
    """Bounds of E = sum_b P_b g_b^2, g_b the true gap of bin b, by the normal law of its debiased estimate e.

    e has the variance 4 E s / n + v: s is that of a label, as the bins' gaps weigh it, and v = 2 sum_b (s_b / n)^2 is
    left where there is no gap. The bounds are the two E at which |e - E| is z of these deviations; v is that of a sum
    of squares, whose deviations upwards are taken from the chi-square law of as many terms.
    """
    several = curve.counts > 1
    counts, said, right = curve.counts[several], curve.confidence[several], curve.accuracy[several]
    n, estimate = float(curve.counts.sum()), debiased_squared_gap(curve)
    if not len(counts):
        return 0.0, 1.0
    smooth = (counts * right + 1) / (counts + 2)
    spread = smooth * (1 - smooth)
    weights = counts * (said - right) ** 2 + spread
    of_label = float(weights @ spread / weights.sum())
    tail, terms = (1 - level) / 2, float((spread**2).sum() ** 2 / (spread**4).sum())
    z2 = float(norm.isf(tail)) ** 2
    upwards = (float(chi2.isf(tail, terms)) - terms) ** 2 / (2 * terms)
    middle = estimate + 2 * z2 * of_label / n
    below, above = (
        sqrt(max(0.0, middle**2 - estimate**2 + 2 * deviations * float((spread**2).sum()) / n**2))
        for deviations in (upwards, z2)
    )
    return max(0.0, middle - below), min(1.0, max(0.0, middle + above))
