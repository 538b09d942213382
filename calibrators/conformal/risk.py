"""Conformal risk control: sets whose expected loss, not only whose misses, stays below a target.

Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control", ICLR 2024, section 2.1. Losses L_i(t) in 0..B that
fall with the threshold t, or at least never grow, of n exchangeable rows and one more. Then with

    t = the smallest with   (n mean of L_i(t) + B) / (n + 1) <= target

the expected loss of the next row is at most the target. Missing the label, B = 1, is split conformal prediction again.
A loss that grows with t, such as the size of the set, is controlled in the same way by the largest such t.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.conformal.scores import create_score
from calibrators.numerics import to_numpy


def controlled(
    losses: ArrayLike, thresholds: ArrayLike, target: float, *, bound: float = 1.0, growing: bool = False
) -> float:
    """The threshold of least sets, or where the loss grows of the largest, whose risk is controlled.

    Parameters
    ----------
    losses : (n_samples, n_thresholds) in 0..bound, along a row never growing, or never falling where `growing`
    thresholds : (n_thresholds,) ascending; what they mean is the caller's affair
    target : the most that the expected loss may be
    bound : B

    Returns
    -------
    infinite where no threshold will do, minus infinity where `growing`

    Raises
    ------
    ValueError
        for losses outside or of the wrong order, and thresholds that do not ascend

    Examples
    --------
    >>> controlled(np.repeat([[1.0, 0.5, 0.0]], 99, axis=0), [0.1, 0.2, 0.3], target=0.6)
    0.2
    >>> p, grid = np.tile([[0.6, 0.3, 0.1]], (99, 1)), [-0.5, -0.2, 0.0]
    >>> controlled(set_sizes(p, grid), grid, target=2.5, bound=3, growing=True)
    -0.2
    """
    found, grid = (to_numpy(values).astype(np.float64) for values in (losses, thresholds))
    if found.ndim != 2 or not len(found) or grid.shape != found.shape[1:]:
        raise ValueError(f"losses must have shape (n_samples, n_thresholds), got {found.shape} and {grid.shape}")
    if (np.diff(grid) < 0).any():
        raise ValueError("thresholds must ascend")
    if not (found.min() >= 0 and found.max() <= bound):
        raise ValueError(f"losses must lie in 0..{bound}, got {found.min()}..{found.max()}")
    if ((-1 if growing else 1) * np.diff(found, axis=1) > 0).any():
        raise ValueError(f"losses must {'not fall' if growing else 'not grow'} with the threshold")
    within = np.flatnonzero((found.sum(axis=0) + bound) / (len(found) + 1) <= target)
    if growing:
        return float(grid[within[-1]]) if len(within) else float("-inf")
    return float(grid[within[0]]) if len(within) else float("inf")


def false_negative_rates(probabilities: ArrayLike, labels: ArrayLike, thresholds: ArrayLike) -> NDArray[np.float64]:
    """(n_samples, n_thresholds) the share of each row's true labels that {k: -p_k <= t} misses.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows need not sum to one, a row may have several labels
    labels : (n_samples, n_classes) bool; a row without labels misses none
    thresholds : (n_thresholds,) of the score `lac`
    """
    p, true = to_numpy(probabilities), to_numpy(labels)
    if true.dtype != bool or true.shape != p.shape or p.ndim != 2:
        raise ValueError(f"labels must be bool of shape {p.shape}, got {true.dtype} of shape {true.shape}")
    n_true = np.maximum(true.sum(axis=1), 1)
    missed = [(true & (-p > t)).sum(axis=1) / n_true for t in to_numpy(thresholds)]
    return np.stack(missed, axis=1)


def set_sizes(probabilities: ArrayLike, thresholds: ArrayLike, score: str = "lac") -> NDArray[np.int64]:
    """(n_samples, n_thresholds) how many labels each row's set holds."""
    p, grid = np.asarray(to_numpy(probabilities), dtype=np.float32), np.asarray(thresholds, dtype=np.float32)
    cuts = create_score(score).cuts(p, grid)
    ascending = np.sort(p, axis=1)
    beneath = [np.searchsorted(row, own) for row, own in zip(ascending, cuts, strict=True)]
    return np.asarray(p.shape[1] - np.stack(beneath))
