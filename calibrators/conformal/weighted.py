"""Thresholds where the inputs served are distributed otherwise than those of the calibration set.

Tibshirani, Barber, Candes, Ramdas, "Conformal Prediction under Covariate Shift", NeurIPS 2019, section 2: with w(x) the
ratio of densities, served over calibration, the row served has its own threshold, the smallest t with

    sum of w_i over scores s_i <= t     >=   c (sum of all w_i + w)           w the row's own weight

and an infinite one where the calibration rows do not reach that. Labels must depend on inputs as before.

`domain_weights` estimates w by a classifier that tells served inputs from calibration ones (their section 2.3): with p
the probability of "served" and as many rows as there are of each, w = p / (1 - p) x n_calibration / n_served. Any
factor in w cancels. How much is left to go by is the effective number of rows, (sum w)^2 / sum w^2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.conformal.level import as_written
from calibrators.numerics import to_numpy

ROUNDING = 1e-12
"""Of the sum of weights: sums in another order may differ by so much."""


def weighted_thresholds(
    scores: ArrayLike, weights: ArrayLike, row_weights: ArrayLike, confidence_level: float
) -> NDArray[np.float64]:
    """(n_rows,) the threshold of each row served.

    Parameters
    ----------
    scores, weights : (n_samples,) score and weight of each calibration row
    row_weights : (n_rows,) weight of each row served
    confidence_level : c

    Raises
    ------
    ValueError
        if shapes differ, or weights are negative, not finite, or all zero

    Examples
    --------
    Of weight one each, it is the split threshold. A row that counts for more than the others needs more of them.

    >>> weighted_thresholds(np.arange(9), np.ones(9), [1.0, 0.0, 2.0], 0.5)
    array([4., 4., 5.])
    """
    s, w = (to_numpy(values).astype(np.float64) for values in (scores, weights))
    own = to_numpy(row_weights).astype(np.float64)
    if s.ndim != 1 or s.shape != w.shape or own.ndim != 1:
        raise ValueError(f"scores and weights must have one length, got shapes {s.shape}, {w.shape} and {own.shape}")
    for values in (w, own):
        if not np.all(np.isfinite(values)) or values.min(initial=0.0) < 0:
            raise ValueError("weights must be finite and not negative")
    if not w.sum() > 0:
        raise ValueError("the weights of the calibration rows are all zero: nothing is known of the rows served")
    order = np.argsort(s, kind="stable")
    reached = np.cumsum(w[order])
    needed = float(as_written(confidence_level)) * (reached[-1] + own)
    places = np.searchsorted(reached, needed * (1 - ROUNDING))
    return np.asarray(np.append(s[order], np.inf)[places])


def domain_weights(
    calibration: ArrayLike, served: ArrayLike, rows: ArrayLike | None = None, *, strength: float = 1.0
) -> NDArray[np.float64]:
    """How much likelier each row is among those served than in the calibration set.

    Parameters
    ----------
    calibration, served : (n_calibration, n_features), (n_served, n_features): logits, features, or what else tells them
        apart
    rows : (n_rows, n_features) rows to weigh; by default the calibration rows
    strength : of the ridge on the classifier, in its inverse (scikit-learn's C); smaller draws the weights to one

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> weights = domain_weights(rng.normal(size=(500, 1)), 1 + rng.normal(size=(500, 1)), [[-1.0], [0.5], [2.0]])
    >>> bool(weights[0] < 0.5 < weights[1] < 2 < weights[2])
    True
    """
    here, there = (to_numpy(values).astype(np.float64) for values in (calibration, served))
    if here.ndim != 2 or there.ndim != 2 or here.shape[1] != there.shape[1]:
        raise ValueError(f"both must have shape (n_rows, n_features), got {here.shape} and {there.shape}")
    from sklearn.linear_model import LogisticRegression  # a server, which needs neither, is 20 MB smaller without
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(np.concatenate([here, there]))
    is_served = np.repeat([0, 1], [len(here), len(there)])
    classifier = LogisticRegression(C=strength, max_iter=1000)
    classifier.fit(scaler.transform(np.concatenate([here, there])), is_served)
    log_odds = classifier.decision_function(scaler.transform(here if rows is None else to_numpy(rows)))
    return np.asarray(np.exp(np.clip(log_odds, -30, 30)) * len(here) / len(there))


def effective_rows(weights: ArrayLike) -> float:
    """(sum w)^2 / sum w^2: with so many rows of equal weight one would know as much.

    >>> effective_rows([1.0, 1.0, 0.0])
    2.0
    """
    w = to_numpy(weights).astype(np.float64)
    return float(w.sum() ** 2 / np.square(w).sum())
