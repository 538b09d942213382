"""Classes put together whose scores are alike, so that few rows of each give a threshold for all of them.

Ding, Angelopoulos, Bates, Jordan, Tibshirani, "Class-Conditional Conformal Prediction with Many Classes", NeurIPS 2023,
section 2.3 and appendix B: each class is embedded by quantiles of its true-class scores and the classes are clustered
by k-means, weighted by the root of their number of rows. Classes with too few rows to have a finite threshold of their
own form the null cluster, whose threshold is that of all rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrators.numerics import Array

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Quantiles that a class is embedded by."""

BALANCE = 75
"""The authors' rule for K classes: the share K / (75 + K) of a class's rows is for the clustering."""


def clustering_share(n_classes: int) -> float:
    """The share of each class's rows that is for the clustering."""
    return n_classes / (BALANCE + n_classes)


def cluster(
    scores: Array, y: Array, weight: Array, n_classes: int, least_rows: int, n_clusters: int | None = None
) -> NDArray[np.int64]:
    """(n_classes,) the cluster of each class, -1 for the null cluster, which has all where there are too few rows.

    Parameters
    ----------
    scores, y, weight : (n_samples,) score, class and weight (above 0) of the rows set aside for this
    n_classes : K
    least_rows : a class with fewer belongs to the null cluster
    n_clusters : by default half of the rows of the smallest class that is clustered, and at most one for two classes
    """
    counts = np.bincount(y, weights=weight, minlength=n_classes)
    clustered = np.flatnonzero(counts >= least_rows)
    found = np.full(n_classes, -1, dtype=np.int64)
    if n_clusters is None:
        n_clusters = int(min(counts[clustered].min(initial=np.inf), len(clustered))) // 2
    if min(n_clusters, len(clustered)) < 2:
        return found
    embedding = np.stack([_quantiles(scores[y == k], weight[y == k]) for k in clustered])
    most = len(np.unique(embedding, axis=0))
    from sklearn.cluster import KMeans  # a server, which never fits, is smaller without

    fitted = KMeans(min(n_clusters, most), n_init=10, random_state=0).fit(
        embedding, sample_weight=np.sqrt(counts[clustered])
    )
    found[clustered] = np.unique(fitted.labels_, return_inverse=True)[1]
    return found


def _quantiles(scores: Array, weight: Array) -> Array:
    """Of one class: the smallest scores with so much of the weight at or below them."""
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weight[order])
    return np.asarray(scores[order][np.searchsorted(reached, np.array(LEVELS) * reached[-1] - 1e-9)], dtype=np.float64)
