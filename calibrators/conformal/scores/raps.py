"""raps: aps with a price for every label beyond the first few. Smaller sets, less adaptive.

Angelopoulos, Bates, Malik, Jordan, "Uncertainty Sets for Image Classifiers using Conformal Prediction", ICLR 2021,
section 2: the tail of many unlikely labels is noise, and labels there cost more than their probability.

    s = mass before the label + u p_y + penalty max(0, rank - free_ranks)          rank of the likeliest: 1

`free_ranks` is the c quantile of the label's rank on the tuning part, and `penalty` that of five (the authors') with
the smallest mean set there, as the authors tune them for size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.conformal.score import Score, before, emit_before
from calibrators.conformal.thresholds import Thresholds
from calibrators.graph import Graph
from calibrators.numerics import Array

PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)


class RegularisedAdaptiveSets(Score):
    """s = mass before the label + u p_y + penalty max(0, rank - free_ranks).

    >>> p = np.array([[0.5, 0.3, 0.2]], dtype=np.float32)
    >>> RegularisedAdaptiveSets({"penalty": 0.1, "free_ranks": 1}).of_labels(p, np.array([2])).round(3)
    array([1.], dtype=float32)
    """

    parameters = ("penalty", "free_ranks")
    uses_share = True

    @classmethod
    def check(cls, values: Mapping[str, float]) -> None:
        if not 0 <= values["penalty"] < np.inf:
            raise ValueError(f"penalty must be a finite number of 0 or more, got {values['penalty']!r}")
        if values["free_ranks"] < 0 or values["free_ranks"] != int(values["free_ranks"]):
            raise ValueError(f"free_ranks must be a whole number of 0 or more, got {values['free_ranks']!r}")

    @classmethod
    def candidates(cls, p: Array, y: Array, weight: Array, level: float) -> list[dict[str, float]]:
        ranks = 1 + (p > p[np.arange(len(p)), y][:, None]).sum(axis=1)
        free_ranks = float(min(Thresholds.of(ranks, weight).at(level)[0], p.shape[1]))
        return [{"penalty": penalty, "free_ranks": free_ranks} for penalty in PENALTIES]

    def profile(self, v: Array, share: Array | np.float32) -> Array:
        found: Array = before(v) + share * v + self._prices(v.shape[1])
        return found

    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        return graph.node("Add", emit_before(graph, v, n_classes), graph.constant(self._prices(n_classes)))

    def _prices(self, n_classes: int) -> Array:
        penalty, free_ranks = self.values
        prices: Array = penalty * np.maximum(np.arange(1, n_classes + 1) - free_ranks, 0)
        return prices.astype(np.float32)
