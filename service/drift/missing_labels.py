"""missing_labels: whether labels stay away more often than they used to.

Of each row it is known, when it is passed, whether its label came in time. The share of missing ones among the first
`reference_rows` rows gives p0, the upper end of the one-sided interval of Clopper and Pearson (Biometrika 26, 1934) but
for a reference of probability `reference_error`, plus `tolerance`. A bet on q > p0 gives the factor

    L = q / p0 for a missing label, (1 - q) / (1 - p0) for one that came

which rises with the label's being missing, so that its mean is at most 1 while labels are missing with probability at
most p0, whatever is known of the past. Four bets, q a tenth to nine tenths of the way from p0 to 1, each of weight 1/4,
make a Shiryaev-Roberts e-detector (Shin, Ramdas, Rinaldo, "E-detectors", NEJSDS 2023)

    M_j <- L_j (M_j + w_j)     R = sum_j M_j     rings when R >= c = horizon / false_alarm_probability

With rows as independent as those of the reference, P(it rings within N rows) <= N / c + reference_error. Where few
labels ever came it hardly rings. It is no detector of drift: it says that the others are blind.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from calibrators.online.compiled import compiled
from service.drift.detectors.base import NO_LABEL, Array, Batch, Detector, number, whole

WAYS = np.array([0.1, 0.3, 0.6, 0.9])
MOST_EXPECTED = 0.999
MOST_WEALTH = 1e250


class MissingLabels(Detector):
    """Rings when labels are missing more often than in its reference. It reads no label, only whether there is one.

    Parameters
    ----------
    reference_rows : rows of the reference
    tolerance : by how much more labels may be missing
    reference_error : probability that the reference says too little
    horizon, false_alarm_probability : within so many rows it rings falsely with at most this probability, but for a bad
        reference

    Examples
    --------
    >>> def rows(n, missing):
    ...     labels = np.where(np.arange(n) % 10 < missing, NO_LABEL, 0)
    ...     return Batch(np.zeros((n, 2)), labels, np.zeros(n, dtype=int))
    >>> detector = MissingLabels()
    >>> print(detector.update(rows(6000, 1)))  # one in ten is missing
    None
    >>> 20 < detector.update(rows(1000, 5)) < 60  # then five
    True
    """

    kind = "missing_labels"
    labelled = False

    def __init__(
        self,
        reference_rows: int = 1000,
        tolerance: float = 0.05,
        reference_error: float = 0.005,
        false_alarm_probability: float = 0.1,
        horizon: float = 100_000,
    ) -> None:
        self.reference_rows = whole("reference_rows", reference_rows, least=1)
        self.tolerance = number("tolerance", tolerance, least=0.0, most=1.0)
        self.reference_error = number("reference_error", reference_error, above=0.0, most=0.5)
        self.false_alarm_probability = number("false_alarm_probability", false_alarm_probability, above=0.0, most=1.0)
        self.horizon = number("horizon", horizon, least=1.0)
        self._reference = np.zeros(2, np.int64)  # rows, missing ones
        self.reset()

    @property
    def ready(self) -> bool:
        return bool(self._reference[0] >= self.reference_rows)

    @property
    def statistic(self) -> float:
        return log10(max(float(self._wealth.sum()), 1.0))

    @property
    def threshold(self) -> float:
        return log10(self.horizon / self.false_alarm_probability)

    @property
    def expected(self) -> float:
        """p0: labels missing no more often than this do not make it ring."""
        rows, missing = self._reference.tolist()
        upper = 1.0 if missing >= rows else float(beta.ppf(1 - self.reference_error, missing + 1, rows - missing))
        return min(MOST_EXPECTED, upper + self.tolerance)

    def update(self, batch: Batch) -> int | None:
        missing = batch.labels == NO_LABEL
        first = int(min(len(missing), self.reference_rows - self._reference[0]))
        self._reference += first, missing[:first].sum()
        if first == len(missing):
            return None
        p0 = self.expected
        q = p0 + WAYS * (1 - p0)
        factors = np.array([(1 - q) / (1 - p0), q / p0])
        limit = self.horizon / self.false_alarm_probability
        read = int(_bet(missing[first:], factors, np.log(factors), self._wealth, self._since, self._gain, limit))
        self.n_rows += read
        return None if self._wealth.sum() < limit else first + read - 1

    def change_point(self) -> int:
        return max(1, int(self._since[int(self._wealth.argmax())]))

    def evidence(self) -> dict[str, float]:
        return {}

    def reset(self) -> None:
        self.n_rows = 0
        self._wealth, self._gain = np.zeros(len(WAYS)), np.zeros(len(WAYS))
        self._since = np.zeros(len(WAYS), np.int64)

    def state(self) -> dict[str, NDArray[np.generic]]:
        own = {"reference": self._reference, "wealth": self._wealth, "gain": self._gain, "since": self._since}
        return self._packed(**own, n_rows=np.array(self.n_rows))

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        names = ("reference", "wealth", "gain", "since", "n_rows")
        found: dict[str, Any] = self._unpacked(state, *names)
        self._reference, self._wealth, self._gain, self._since, n_rows = found.values()
        self.n_rows = int(n_rows)
        return self


@compiled
def _bet(
    missing: NDArray[np.bool_],
    factors: Array,
    logs: Array,
    wealth: Array,
    since: NDArray[np.int64],
    gain: Array,
    limit: float,
) -> int:
    """Read rows up to the one that it rings at; how many those are. `gain` is CUSUM's of each bet, `since` its age."""
    n_bets = len(wealth)
    for row in range(len(missing)):
        came = 1 if missing[row] else 0
        total = 0.0
        for j in range(n_bets):
            wealth[j] = min(factors[came, j] * (wealth[j] + 1.0 / n_bets), MOST_WEALTH)
            total += wealth[j]
            since[j] = since[j] + 1 if gain[j] > 0 else 1
            gain[j] = max(gain[j], 0.0) + logs[came, j]
        if total >= limit:
            return row + 1
    return len(missing)
