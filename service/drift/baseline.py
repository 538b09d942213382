"""What a monitor takes as given: the map from a model's logits to what came true, as it was in the first rows.

Few models are calibrated by themselves, and a monitor of one that is not would ring at once and for ever. Drift is a
change of the map, so what is watched is softmax(z / T + b), with temperature and class biases fitted on the first
labelled rows and then frozen. What the fit misses has to be within the detector's tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import calibrators
from service.drift.detectors.base import NO_LABEL, Array, Batch

MOST_VALUES, LEAST_ROWS = 200_000, 500
"""Of many classes fewer rows are taken than asked for: they are in the monitor's state until there are enough."""


class Baseline:
    """Takes `wanted` labelled rows, then maps what follows."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._logits: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._labels: NDArray[np.int64] = np.zeros(0, np.int64)
        self._temperature, self._bias = 0.0, np.zeros(0)

    @property
    def ready(self) -> bool:
        return self._wanted == 0 or self._temperature > 0

    @property
    def rows(self) -> int:
        """Taken so far."""
        return len(self._labels)

    def take(self, batch: Batch) -> Batch:
        """What is left of the rows, to be mapped."""
        return batch if self.ready else self._gather(batch)

    def mapped(self, batch: Batch) -> Batch:
        """Rows that are left, as they are once the map is known."""
        if not self._temperature or not len(batch):
            return batch
        return replace(batch, scores=batch.logits / self._temperature + self._bias)

    def state(self) -> dict[str, NDArray[np.generic]]:
        head = np.array([self._temperature, *self._bias])
        return {"baseline": head, "baseline_logits": self._logits, "baseline_labels": self._labels}

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        self._temperature, self._bias = float(state["baseline"][0]), np.array(state["baseline"][1:], np.float64)
        self._logits, self._labels = np.array(state["baseline_logits"]), np.array(state["baseline_labels"])
        return self

    def _gather(self, batch: Batch) -> Batch:
        """The rows behind those that are taken."""
        n_classes = batch.n_classes
        wanted = min(self._wanted, max(LEAST_ROWS, MOST_VALUES // n_classes))
        labelled = np.flatnonzero(batch.labels != NO_LABEL)[: wanted - len(self._labels)]
        logits = batch.rows(labelled).logits.astype(np.float32)
        self._logits = np.concatenate([self._logits.reshape(-1, n_classes), logits])
        self._labels = np.concatenate([self._labels, batch.labels[labelled]])
        if len(self._labels) < wanted:
            return batch.rows(slice(len(batch), None))
        self._fit(self._logits.astype(np.float64))
        return batch.rows(slice(int(labelled[-1]) + 1, None))

    def _fit(self, logits: Array) -> None:
        temperature: Any = calibrators.create("temperature").fit(logits, self._labels)
        self._temperature = float(temperature.temperature_)
        prior: Any = calibrators.create("class_prior").fit(logits / self._temperature, self._labels)
        self._bias = prior.bias_
        self._logits, self._labels = self._logits[:0], self._labels[:0]
