"""Sets of labels, made in numpy from the probabilities of a run: a graph has one confidence level, requests any, and
sorting a thousand values costs a tenth of what it costs the runtime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.graph import PREFIX
from service.inference.session import TensorSpec

SET_OUTPUTS = PREDICTION_SET, SET_SIZE = "prediction_set", "set_size"
SHARES = f"{PREFIX}shares"
"""The feed of one uniform number a row, for a calibrator whose sets are randomised."""


@dataclass(frozen=True, eq=False)
class PredictionSets:
    """What makes the sets of one revision, at one confidence level."""

    calibrator: ConformalCalibrator
    confidence_level: float

    @property
    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(PREDICTION_SET, "BOOL", (-1, self.calibrator.n_classes_)),
            TensorSpec(SET_SIZE, "INT32", (-1,)),
        ]

    def needed(self, outputs: Sequence[str]) -> bool:
        return any(name in outputs for name in SET_OUTPUTS)

    def drawn(self, outputs: Sequence[str]) -> bool:
        """Whether these outputs take a number for each row."""
        return self.calibrator.randomised and self.needed(outputs)

    def beside(self, arrays: Mapping[str, NDArray[Any]], shares: NDArray[np.float64] | None) -> dict[str, NDArray[Any]]:
        """The arrays of a run, the sets of its probabilities with them."""
        sets = self.calibrator.sets(arrays["probabilities"], self.confidence_level, shares=shares)
        return {**arrays, PREDICTION_SET: sets, SET_SIZE: sets.sum(axis=1, dtype=np.int32)}


def shares_of(id_field: bytes, rows: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each row of a request, always the same for its id. A request without one gets new ones:
    if all of these shared a number, their coverage would be that number's."""
    key = hashlib.blake2b(id_field or os.urandom(16), digest_size=16).digest()
    words: NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(rows)
    return np.asarray((words >> np.uint64(11)) * 2.0**-53)
