"""margin: how far the label's probability lies beneath the largest of the others.

Johansson, Linusson, Lofstrom, Bostrom, "Model-Agnostic Nonconformity Functions for Conformal Classification", IJCNN
2017, section 2: s = max of p_k over k != y, less p_y; beneath 0 for the likeliest label alone.
"""

from __future__ import annotations

import numpy as np

from calibrators.conformal.score import Score
from calibrators.graph import Graph
from calibrators.numerics import Array


class Margin(Score):
    """s = (the largest of the others) - p_y.

    >>> p = np.array([[0.5, 0.3, 0.2]], dtype=np.float32)
    >>> [round(float(Margin().of_labels(p, np.array([y]))[0]), 3) for y in range(3)]
    [-0.2, 0.2, 0.3]
    """

    def profile(self, v: Array, share: Array | np.float32) -> Array:
        del share
        scores: Array = v[:, :1] - v
        scores[:, 0] = v[:, 1] - v[:, 0]
        return scores

    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        first, second = graph.column(v, 0), graph.column(v, 1)
        is_first = np.zeros(n_classes, dtype=bool)
        is_first[0] = True
        largest_other = graph.node("Where", graph.constant(is_first), second, first)
        return graph.node("Sub", largest_other, v)
