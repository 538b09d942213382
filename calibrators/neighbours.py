"""How far a row lies from a reference set: distances to its k nearest neighbours, by numpy and as ONNX.

With x a row and r_1 .. r_m the reference, |x - r|^2 = |x|^2 - 2 (x r - |r|^2 / 2), so the nearest are those with the
largest x r - |r|^2 / 2: one matrix product finds them. Its rounding is of the order of |x| |r|, which would drown a
small distance, so what is given back is computed from the differences to the rows that were found.

The reference is float16, half the bytes of a graph and an artifact; both sides read these same numbers.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from calibrators.graph import Graph
from calibrators.numerics import Array

NUMBERS_AT_ONCE = 1 << 17
ROWS_AT_ONCE, REFERENCE_AT_ONCE = 1 << 11, 1 << 14
"""Of a reference that is longer, a block of which is compared with a block of rows."""
GROUP = 32
"""Scores of which only the best is looked at first."""
PASSES = 8
"""Of the k-means, which gains little in further ones."""
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
    if len(reference) > REFERENCE_AT_ONCE:
        return _nearest_of_many(x, reference, k, np.full(len(x), -1) if own is None else own)
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


def _nearest_of_many(x: Array, reference: Array, k: int, own: Array) -> Array:
    """The same in float32's product, a block of the reference at a time: a million rows are never there as floats."""
    found = np.empty((len(x), k), x.dtype)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE]
        index = _places_of_nearest(rows.astype(np.float32), reference, k, own[start : start + ROWS_AT_ONCE])
        difference = rows[:, None] - reference[index].astype(x.dtype)
        found[start : start + ROWS_AT_ONCE] = np.einsum("ikd,ikd->ik", difference, difference)
    found.sort(axis=1)
    return found


def _places_of_nearest(rows: Array, reference: Array, k: int, own: Array) -> Array:
    """(n_samples, k) places in the reference, in no order."""
    best, places = np.full((len(rows), k), -np.inf, np.float32), np.zeros((len(rows), k), np.int64)
    for start in range(0, len(reference), REFERENCE_AT_ONCE):
        block = reference[start : start + REFERENCE_AT_ONCE].astype(np.float32)
        score = rows @ block.T - np.einsum("ij,ij->i", block, block) / 2
        here = np.flatnonzero((own >= start) & (own < start + len(block)))
        score[here, own[here] - start] = -np.inf
        index = _highest(score, min(k, len(block)))
        score = np.concatenate([best, np.take_along_axis(score, index, axis=1)], axis=1)
        index = np.concatenate([places, index + start], axis=1)
        kept = np.argpartition(score, -k, axis=1)[:, -k:]
        best, places = (np.take_along_axis(array, kept, axis=1) for array in (score, index))
    return places


def _highest(score: Array, k: int) -> Array:
    """(n_samples, k) columns of the highest scores, in no order.

    Columns are first compared in groups, by their best: the k highest lie in the k groups whose best are highest. One
    reading of the scores does this, where to part all of them takes as long as the product that they came from.
    """
    n_rows, n_groups = len(score), score.shape[1] // GROUP
    if n_groups * GROUP < score.shape[1] or n_groups < 4 * k:
        return np.argpartition(score, -k, axis=1)[:, -k:]
    grouped = score.reshape(n_rows, GROUP, n_groups)
    groups = np.argpartition(grouped.max(axis=1), -k, axis=1)[:, -k:]
    within = np.take_along_axis(grouped, groups[:, None], axis=2).reshape(n_rows, -1)
    member, place = np.divmod(np.argpartition(within, -k, axis=1)[:, -k:], k)
    columns: Array = member * n_groups + np.take_along_axis(groups, place, axis=1)
    return columns


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
    rows = [row.tobytes() for row in x.astype(reference.dtype)]
    places = dict.fromkeys(rows, -1)
    for place, row in enumerate(reference):
        if places.get(found := row.tobytes(), 0) < 0:
            places[found] = place
    return np.array([places[row] for row in rows], dtype=np.int64)


def drawn_rows(n_rows: int, most: int, seed: int) -> Array:
    """Places, in rising order, of all rows or of `most` of them at random."""
    if n_rows <= most:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, most, replace=False))


def centres_of_clusters(rows: Array, n_clusters: int, seed: int) -> Array:
    """k-means centres (n_clusters, width) float32 of no fewer rows; deterministic by seed.

    Lloyd's passes from rows at random. Where centres are many, starting from rows chosen to lie apart (k-means++) costs
    a hundred times what it saves: a million rows of 512 kept it from ending.
    """
    rows = rows.astype(np.float32)
    centres = rows[drawn_rows(len(rows), n_clusters, seed)]
    for _ in range(PASSES):
        of_centre = csr_matrix((np.ones(len(rows), np.float32), (nearest_centre(rows, centres), np.arange(len(rows)))),
                               (n_clusters, len(rows)))  # fmt: skip
        counts = np.asarray(of_centre.sum(axis=1))
        centres = np.where(counts > 0, of_centre @ rows / np.maximum(counts, 1), centres)
    return centres


def nearest_centre(rows: Array, centres: Array) -> Array:
    """(n_samples,) which of the centres (n_clusters, width) float32 is nearest to each row."""
    half_squares = np.einsum("ij,ij->i", centres, centres) / 2
    found = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE].astype(np.float32)
        found[start : start + ROWS_AT_ONCE] = (block @ centres.T - half_squares).argmax(axis=1)
    return found
