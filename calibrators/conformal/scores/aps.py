"""aps: the probability of all labels that are likelier. Sets that grow with the row's difficulty.

Romano, Sesia, Candes, "Classification with Valid and Adaptive Coverage", NeurIPS 2020, section 2: if p were true,
taking labels in falling order until their probabilities sum to c would cover each row with probability c, hard or easy.
The threshold found on the calibration set takes the place of c.

    s = sum of p_k over p_k > p_y, plus u p_y

u is uniform where the score is randomised, else 0 (`conformal.score` says why).
"""

from __future__ import annotations

import numpy as np

from calibrators.conformal.score import Score, before, emit_before
from calibrators.graph import Graph
from calibrators.numerics import Array


class AdaptiveSets(Score):
    """s = mass before the label + u p_y.

    >>> p = np.array([[0.5, 0.3, 0.2]], dtype=np.float32)
    >>> AdaptiveSets().of_labels(p, np.array([2])).round(3), AdaptiveSets().of_labels(p, np.array([2]), np.array([0.5]))
    (array([0.8], dtype=float32), array([0.90000004], dtype=float32))
    """

    uses_share = True

    def profile(self, v: Array, share: Array | np.float32) -> Array:
        found: Array = before(v) + share * v
        return found

    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        return emit_before(graph, v, n_classes)
