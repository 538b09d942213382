"""What every online kind can do beside `fit`: go on learning, and say what it would have served before each label."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from calibrators.base import Calibrator
from calibrators.numerics import Array, check_labels, check_logits, check_sample_weight


class OnlineCalibrator(Calibrator):
    """A calibrator whose state is a function of the rows in their order: `fit` starts anew, `partial_fit` goes on."""

    def partial_fit(self, logits: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Self:
        """Learn from further rows, in their order; from the start where nothing was learned yet. Raises as `fit`."""
        self.learn(logits, y, sample_weight=sample_weight)
        return self

    def learn(self, logits: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Array:
        """`partial_fit`, which returns the probabilities (n_samples, n_classes) given before each label was seen."""
        z = check_logits(logits, n_classes=getattr(self, "n_classes_", None)).astype(np.float64, copy=False)
        labels = check_labels(y, n_samples=len(z), n_classes=z.shape[1])
        weight = check_sample_weight(sample_weight, n_samples=len(z))
        if not hasattr(self, "n_classes_"):
            self._begin(z.shape[1])
            self.n_classes_ = z.shape[1]
        return self._learn(z, labels, weight)

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        self._begin(logits.shape[1])
        self._learn(logits, y, weight)

    @abstractmethod
    def _begin(self, n_classes: int) -> None:
        """Set the learned attributes to what they are before the first label."""

    @abstractmethod
    def _learn(self, logits: Array, y: Array, weight: Array) -> Array:
        """Learn from checked rows, weights not negative; return the probabilities before each label."""
