"""clustered_conformal: a threshold for each cluster of classes whose scores are alike.

Ding, Angelopoulos, Bates, Jordan, Tibshirani, "Class-Conditional Conformal Prediction with Many Classes", NeurIPS 2023.
Between one threshold for all classes, which serves hard classes badly, and one a class, which few rows of a class make
useless: the coverage is as asked for each cluster, and for a class up to the distance (Kolmogorov and Smirnov's)
between its scores and its cluster's. The rule for the classes is in `conformal.clusters`.

The clustering reads the tuning part, which is K / (75 + K) of the rows of each class if that is more than
`tuning_share`; where it finds no clusters, one threshold serves all classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.conformal.clusters import cluster, clustering_share
from calibrators.conformal.division import divide
from calibrators.conformal.level import least_rows
from calibrators.conformal.thresholds import Thresholds
from calibrators.numerics import Array


class ClusteredConformal(ConformalCalibrator):
    """{y: s(p, y) <= t of y's cluster}.

    Parameters
    ----------
    n_clusters : None takes half of the number of rows of the smallest class clustered, as the authors do
    others : as the base class
    """

    def __init__(
        self,
        base: str = "temperature",
        base_params: dict[str, Any] | None = None,
        score: str = "lac",
        score_params: dict[str, float] | None = None,
        confidence_level: float = 0.9,
        randomised: bool = False,
        allow_empty: bool = True,
        tuning_share: float = 0.25,
        n_clusters: int | None = None,
    ) -> None:
        super().__init__(
            base, base_params, score, score_params, confidence_level, randomised, allow_empty, tuning_share
        )
        self.n_clusters = n_clusters

    def check_params(self) -> None:
        super().check_params()
        wanted = self.n_clusters
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 2):
            raise ValueError(f"n_clusters must be a whole number of 2 or more, or none, got {wanted!r}")

    @property
    def _tunes(self) -> bool:
        return True

    def _divide(self, hashes: Array, y: Array, weight: Array, n_classes: int) -> tuple[Array, Array]:
        """Each class is divided by itself."""
        return divide(hashes, weight, max(self.tuning_share, clustering_share(n_classes)), strata=y)

    def _groups(self, scores: Array, y: Array, tuning: Array, ranking: Array, n_classes: int) -> NDArray[np.int64]:
        """Group 0 is the null cluster, whether a class belongs to it or not."""
        del ranking
        kept = tuning > 0
        least = least_rows(self.confidence_level)
        return 1 + cluster(scores[kept], y[kept], tuning[kept], n_classes, least, self.n_clusters)

    def _thresholds(self, scores: Array, weight: Array, group: Array, n_groups: int) -> Thresholds:
        """Of each cluster its own rows, of the null cluster all rows."""
        own = group > 0
        return Thresholds.of(
            np.concatenate([scores, scores[own]]),
            np.concatenate([weight, weight[own]]),
            np.concatenate([np.zeros_like(group), group[own]]),
            n_groups,
        )
