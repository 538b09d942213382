"""identity: the model's own probabilities, softmax of its logits. What every other kind has to beat.

It learns nothing, is served when no revision is active, and is a candidate in every comparison ("do no harm").
"""

from __future__ import annotations

from calibrators.base import Calibrator
from calibrators.graph import Graph
from calibrators.numerics import Array, softmax


class Identity(Calibrator):
    """p = softmax(z).

    >>> Identity().fit([[0.0, 0.0], [0.0, 2.0]], [0, 1]).predict_proba([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """

    @classmethod
    def of(cls, n_classes: int) -> Identity:
        """Ready to serve `n_classes` classes, without a fit."""
        identity = cls()
        identity.n_classes_ = n_classes
        return identity

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        del logits, y, weight

    def _predict_proba(self, logits: Array) -> Array:
        return softmax(logits)

    def emit(self, graph: Graph, logits: str) -> str:
        return graph.softmax(logits)
