"""lac: minus the label's probability. The smallest sets on average.

Sadinle, Lei, Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels", JASA 2019: among all sets
of one coverage, {y: p_y >= t} is the smallest on average where p is true. It buys that with hard rows: their sets are
too small, even empty, while easy ones are covered more often than asked (`metrics.size_stratified_coverage` shows it).

The score 1 - p_y of the paper is -p_y here: the same order and the same sets, and float32 keeps small p_y exact.
"""

from __future__ import annotations

import numpy as np

from calibrators.conformal.score import SLACK, Score
from calibrators.graph import Graph
from calibrators.numerics import Array


class LeastAmbiguous(Score):
    """s = -p_y; the set needs no sorting, for its cut is the threshold itself.

    >>> p = np.array([[0.5, 0.3, 0.2]], dtype=np.float32)
    >>> LeastAmbiguous().of_labels(p, np.array([1]))
    array([-0.3], dtype=float32)
    """

    def profile(self, v: Array, share: Array | np.float32) -> Array:
        del share
        return -v

    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        del n_classes
        return graph.node("Neg", v)

    def of_labels(self, p: Array, y: Array, share: Array | None = None) -> Array:
        del share
        return -np.asarray(p, dtype=np.float32)[np.arange(len(p)), y]

    def cuts(self, p: Array, thresholds: Array, share: Array | None = None) -> Array:
        del share
        return np.broadcast_to(self._cuts(thresholds), (len(p), np.shape(thresholds)[-1]))

    def emit_cuts(self, graph: Graph, p: str, thresholds: Array, n_classes: int) -> str:
        del p, n_classes
        return graph.constant(self._cuts(thresholds)[None, :])

    def slack(self, thresholds: Array) -> Array:
        """Relative, so that among a thousand classes a probability of 0.00001 is not taken for another."""
        return np.float32(SLACK) * np.abs(thresholds)

    def _cuts(self, thresholds: Array) -> Array:
        finite = np.isfinite(thresholds)
        kept = np.where(finite, thresholds, np.float32(0.0))
        return np.where(finite, -kept - self.slack(kept), -thresholds)
