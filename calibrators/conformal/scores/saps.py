"""saps: the largest probability, then the same price for each rank. Trusts the order of the labels, not their numbers.

Huang, Xi, Zhang, Yao, Qiu, Wei, "Conformal Prediction for Deep Classifier via Label Ranking", ICML 2024, section 3:

    s = u v_1                                for the likeliest label
    s = v_1 + (rank - 2 + u) weight          for the others, rank from 2

`weight` is that of the authors' values with the smallest mean set on the tuning part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.conformal.score import Score
from calibrators.graph import Graph
from calibrators.numerics import Array

WEIGHTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)


class SortedAdaptiveSets(Score):
    """s = u v_1, or v_1 + (rank - 2 + u) weight.

    >>> p = np.array([[0.5, 0.3, 0.2]], dtype=np.float32)
    >>> [SortedAdaptiveSets({"weight": 0.1}).of_labels(p, np.array([y])).round(3).tolist() for y in range(3)]
    [[0.0], [0.5], [0.6000000238418579]]
    """

    parameters = ("weight",)
    uses_share = True

    @classmethod
    def check(cls, values: Mapping[str, float]) -> None:
        if not 0 <= values["weight"] < np.inf:
            raise ValueError(f"weight must be a finite number of 0 or more, got {values['weight']!r}")

    @classmethod
    def candidates(cls, p: Array, y: Array, weight: Array, level: float) -> list[dict[str, float]]:
        del p, y, weight, level
        return [{"weight": weight} for weight in WEIGHTS]

    def profile(self, v: Array, share: Array | np.float32) -> Array:
        weight = np.float32(self.values[0])
        scores: Array = v[:, :1] + self._steps(v.shape[1]) + share * weight
        scores[:, :1] = share * v[:, :1]
        return scores

    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        others = np.ones(n_classes, dtype=np.float32)
        others[0] = 0.0
        largest = graph.node("Mul", graph.column(v, 0), graph.constant(others))
        return graph.node("Add", largest, graph.constant(self._steps(n_classes)))

    def _steps(self, n_classes: int) -> Array:
        """(rank - 2) weight, 0 for the likeliest."""
        steps: Array = self.values[0] * np.maximum(np.arange(n_classes) - 1, 0)
        return steps.astype(np.float32)
