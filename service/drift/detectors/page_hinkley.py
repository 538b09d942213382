"""Page's cumulative sums of what a row's confidence missed, upwards and downwards.

The signal is x = correct - confidence, of mean zero while the confidence is true. With zero as the reference

    up <- max(0, up + x - slack)        down <- max(0, down - x - slack)

(Page, "Continuous inspection schemes", Biometrika 41, 1954, section 3); it rings when either reaches the limit. With
the mean of the rows so far in the place of zero it is the Page-Hinkley test (Hinkley, "Inference about the
change-point from cumulative sum tests", Biometrika 58, 1971) as river has it, in which a model that is wrong from the
first row is right. How often it rings falsely depends on how confidences are spread: the defaults were tried out,
they promise nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array
from calibrators.online.compiled import compiled
from service.drift.detectors.base import Batch, Detector, number, one_of, whole
from service.drift.detectors.top_label import confidence_and_correct

REFERENCES = ("zero", "mean")


class PageHinkley(Detector):
    """Rings when a cumulative sum of correct - confidence has risen by the limit.

    Parameters
    ----------
    limit : of a sum
    slack : what a row may miss without being counted
    reference : what is taken from the signal: zero, or the mean of the rows so far
    first_rows : in which it does not ring

    Examples
    --------
    >>> logits, labels = np.log([[0.9, 0.1]] * 100), np.arange(100) % 2
    >>> detector = PageHinkley(limit=10)
    >>> detector.update(Batch(logits, labels, np.zeros(100, np.int64)))
    29
    >>> detector.change_point(), detector.evidence()
    (29, {'overconfidence': 1.0})
    """

    kind = "page_hinkley"
    labelled = True
    ready = True

    def __init__(
        self,
        limit: float = 18.0,
        slack: float = 0.05,
        reference: str = "zero",
        first_rows: float = 30,
    ) -> None:
        self.limit = number("limit", limit, above=0)
        self.slack = number("slack", slack, least=0, most=1)
        self.reference = one_of("reference", reference, REFERENCES)
        self.first_rows = whole("first_rows", first_rows)
        self.reset()

    def reset(self) -> None:
        self.n_rows = 0
        self._sums = np.zeros(3)  # up, down, and of the signal
        self._since = np.zeros(2, np.int64)

    @property
    def statistic(self) -> float:
        return float(self._sums[:2].max())

    @property
    def threshold(self) -> float:
        return self.limit

    def update(self, batch: Batch) -> int | None:
        rows, confidence, correct = confidence_and_correct(batch)
        read, rang = _read(
            self._sums, self._since, correct - confidence, self.n_rows, self.reference == "mean", self.slack,
            self.limit, self.first_rows,
        )  # fmt: skip
        self.n_rows += read
        return int(rows[read - 1]) if rang else None

    def change_point(self) -> int:
        return max(1, self.n_rows - int(self._since[self._sums[:2].argmax()]))

    def evidence(self) -> dict[str, float]:
        total = self._sums[:2].sum()
        parts = zip(("underconfidence", "overconfidence"), self._sums[:2], strict=True)
        return {name: float(part / total) for name, part in parts if part > 0}

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._packed(n_rows=self.n_rows, sums=self._sums, since=self._since)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        arrays = self._unpacked(state, "n_rows", "sums", "since")
        self.n_rows, self._sums, self._since = int(arrays["n_rows"]), arrays["sums"], arrays["since"]
        return self


@compiled
def _read(
    sums: Array, since: NDArray[np.int64], signal: Array, n_rows: int, centred: bool, slack: float,
    limit: float, first_rows: int,
) -> tuple[int, bool]:  # fmt: skip
    """How many were read, and whether the last of them made it ring."""
    for t in range(len(signal)):
        sums[2] += signal[t]
        n = n_rows + t + 1
        x = signal[t] - sums[2] / n if centred else signal[t]
        for side in range(2):
            if sums[side] <= 0.0:
                since[side] = n - 1
            sums[side] = max(0.0, sums[side] + (x if side == 0 else -x) - slack)
        if n >= first_rows and max(sums[0], sums[1]) >= limit:
            return t + 1, True
    return len(signal), False
