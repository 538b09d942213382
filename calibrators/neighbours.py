"""How far a row lies from a reference set: distances to its k nearest neighbours, by numpy and as ONNX.

With x a row and r_1 .. r_m the reference, |x - r|^2 = |x|^2 - 2 (x r - |r|^2 / 2), so the nearest are those with the
largest x r - |r|^2 / 2: one matrix product finds them. Its rounding is of the order of |x| |r|, which would drown a
small distance, so what is given back is computed from the differences to the rows that were found.

The reference is float16, half the bytes of a graph and an artifact; both sides read these same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from calibrators.graph import Graph
from calibrators.numerics import Array

NUMBERS_AT_ONCE = 1 << 17
FARTHEST = 1e15
"""Coordinates are cut off here: their squares, summed, must be float32 numbers."""


def nearest(x: Array, reference: Array, k: int, own: Array | None = None) -> Array:
    """Squared distances (n_samples, k) of each row of x to its k nearest reference rows, in rising order.

    Parameters
    ----------
    x : (n_samples, width)
    reference : (n_reference, width), k <= n_reference
    own : (n_samples,) the reference row that is the row itself and does not count, -1 for none

    Examples
    --------
    >>> nearest(np.array([[0.0], [10.0]]), np.array([[0.0], [1.0], [3.0]]), 2, own=np.array([0, -1])).tolist()
    [[1.0, 9.0], [49.0, 81.0]]
    """
    reference = reference.astype(x.dtype)
    half_squares = np.einsum("ij,ij->i", reference, reference) / 2
    found = np.empty((len(x), k), x.dtype)
    step = max(1, NUMBERS_AT_ONCE // max(len(reference), k * x.shape[1]))
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        score = rows @ reference.T - half_squares
        if own is not None:
            own_of_rows = own[start : start + step]
            score[np.flatnonzero(own_of_rows >= 0), own_of_rows[own_of_rows >= 0]] = -np.inf
        index = np.argpartition(score, -k, axis=1)[:, -k:]
        difference = rows[:, None] - reference[index]
        found[start : start + step] = np.einsum("ikd,ikd->ik", difference, difference)
    found.sort(axis=1)
    return found


def emit_nearest(graph: Graph, x: str, reference: Array, k: int, *, only_last: bool = False) -> str:
    """The same as FLOAT [B, k], in rising order up to float32's rounding; `only_last`: [B, 1], of the k-th alone."""
    width = reference.shape[1]
    rows = graph.cast(graph.constant(reference.astype(np.float16)), np.float32)
    exact = reference.astype(np.float64)
    half_squares = graph.constant(-np.einsum("ij,ij->i", exact, exact) / 2)
    score = graph.node("Gemm", x, rows, half_squares, transB=1)
    index = graph.largest_index(score, k)
    if only_last:
        index = graph.column(index, k - 1)
    found = graph.node("Gather", rows, index, axis=0)
    difference = graph.node("Sub", graph.reshape(x, (-1, 1, width)), found)
    return graph.reduce("ReduceSum", graph.node("Mul", difference, difference), axis=2, keepdims=False)


def own_rows(x: Array, reference: Array) -> Array:
    """For each row of x the place of an equal row in the reference, -1 where there is none."""
    places = {row.tobytes(): place for place, row in reversed(list(enumerate(reference)))}
    return np.array([places.get(row.tobytes(), -1) for row in x.astype(reference.dtype)], dtype=np.int64)


def drawn_rows(n_rows: int, most: int, seed: int) -> Array:
    """Places, in rising order, of all rows or of `most` of them at random."""
    if n_rows <= most:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, most, replace=False))


def centres_of_clusters(rows: Array, n_clusters: int, seed: int) -> Array:
    """k-means centres (n_clusters, width) of the rows, in batches; deterministic by seed."""
    clusters: Any = MiniBatchKMeans(n_clusters, random_state=seed, n_init=1, max_iter=5, batch_size=4096)
    centres: Array = clusters.fit(rows.astype(np.float32)).cluster_centers_
    return centres
