"""top_k: the label's rank. Sets of one size for all rows.

Angelopoulos, Bates, Malik, Jordan, "Uncertainty Sets for Image Classifiers using Conformal Prediction", ICLR 2021,
appendix: the smallest k for which the k likeliest labels hold the true one often enough. A yardstick more than a tool:
an easy row gets as many labels as a hard one, and whole ranks overshoot the level unless the score is randomised.
"""

from __future__ import annotations

import numpy as np

from calibrators.conformal.score import Score
from calibrators.graph import Graph
from calibrators.numerics import Array


class TopK(Score):
    """s = rank - 1 + u, the rank of the likeliest being 1; labels of equal probability share the lower rank.

    >>> p = np.array([[0.5, 0.3, 0.2]], dtype=np.float32)
    >>> TopK().of_labels(np.repeat(p, 3, axis=0), np.arange(3))
    array([0., 1., 2.], dtype=float32)
    """

    uses_share = True

    def profile(self, v: Array, share: Array | np.float32) -> Array:
        found: Array = np.broadcast_to(np.arange(v.shape[1], dtype=np.float32), v.shape) + share
        return found

    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        ranks = graph.constant(np.arange(n_classes, dtype=np.float32))
        return graph.node("Add", graph.node("Mul", v, graph.constant(0.0)), ranks)
