"""Arithmetic shared by every kind: checked inputs, softmax, and log-odds class against the rest.

float32 stays float32 (the arithmetic of the fused graph), everything else becomes float64. A torch tensor is taken as
the array it holds. Nothing here knows a calibrator.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]

MAX_ABS_LOGIT = 1e30
"""Largest magnitude accepted in a logit: beyond it float32 arithmetic overflows."""

ELEMENTS_AT_ONCE = 1 << 17


def to_numpy(values: ArrayLike) -> Array:
    """The array behind numpy arrays, nested sequences and torch tensors (on any device, with or without gradient)."""
    if hasattr(values, "detach"):  # a torch tensor, recognised without importing torch
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def check_logits(logits: ArrayLike, *, n_classes: int | None = None) -> Array:
    """Logits as a 2-D array of float32 or float64, finite, with `n_classes` columns where that is known.

    Raises
    ------
    TypeError
        if the values are not real numbers
    ValueError
        if the array is not (n_samples, n_classes) with two classes or more, or holds a NaN or an infinity
    """
    array = to_numpy(logits)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"logits must be real numbers, got dtype {array.dtype}")
    if array.dtype != np.float32:
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64, copy=False)
    if array.ndim != 2:
        raise ValueError(f"logits must have shape (n_samples, n_classes), got shape {array.shape}")
    if array.shape[1] < 2:
        raise ValueError(
            f"logits must have at least 2 columns, got shape {array.shape}; "
            "for a single score s per row pass the two columns [0, s]"
        )
    if n_classes is not None and array.shape[1] != n_classes:
        raise ValueError(f"this calibrator was fitted on {n_classes} classes, got logits with {array.shape[1]} columns")
    # One pass without a temporary of the array's size: a NaN or an infinity shows in the extremes.
    if array.size and not (array.min() >= -MAX_ABS_LOGIT and array.max() <= MAX_ABS_LOGIT):
        row, column = np.argwhere(~(np.abs(array) <= MAX_ABS_LOGIT))[0]
        raise ValueError(
            f"logits must be finite and within ±{MAX_ABS_LOGIT:g}, got {array[row, column]} at [{row}, {column}];"
            " for the logarithm of probabilities clip these away from 0 first"
        )
    return array


def check_labels(y: ArrayLike, *, n_samples: int, n_classes: int) -> NDArray[np.int64]:
    """Labels as class indices 0 .. n_classes-1, one for each row.

    Raises
    ------
    TypeError
        if the labels are not numbers
    ValueError
        if their number differs from `n_samples`, or one is not a whole number in 0 .. n_classes-1
    """
    array = to_numpy(y)
    if array.ndim != 1 or len(array) != n_samples:
        raise ValueError(f"y must have shape ({n_samples},), one label for each row of logits, got shape {array.shape}")
    if array.dtype.kind not in "iubf":
        raise TypeError(f"y must hold class indices (integers), got dtype {array.dtype}")
    whole = array == np.floor(array) if array.dtype.kind == "f" else True
    bad = ~(whole & (array >= 0) & (array < n_classes))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"y must hold class indices 0..{n_classes - 1}, got {array[row]} at row {row}")
    return array.astype(np.int64)


def check_sample_weight(sample_weight: ArrayLike | None, *, n_samples: int) -> NDArray[np.float64]:
    """Weights as float64, ones by default; finite, not negative, with a positive sum (else ValueError)."""
    if sample_weight is None:
        return np.ones(n_samples)
    weight = to_numpy(sample_weight).astype(np.float64)
    if weight.shape != (n_samples,):
        raise ValueError(f"sample_weight must have shape ({n_samples},), got shape {weight.shape}")
    if not np.all(np.isfinite(weight)) or weight.min(initial=0.0) < 0:
        raise ValueError("sample_weight must be finite and not negative")
    if not 0 < weight.sum() < np.inf:
        raise ValueError(f"sample_weight must have a positive, finite sum, got {weight.sum()}")
    return weight


def blocks(length: int, width: int) -> list[slice]:
    """Slices, one or more, that cut `length` rows of `width` numbers into pieces which fit a processor's cache."""
    size = max(1, ELEMENTS_AT_ONCE // width)
    return [slice(start, start + size) for start in range(0, max(length, 1), size)]


def softmax(logits: Array) -> Array:
    """exp(z_k) / sum_j exp(z_j) for each row, shifted by the row's maximum so that nothing overflows."""
    shifted: Array = logits - logits.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def log_softmax(logits: Array) -> Array:
    """Logarithm of `softmax`, exact where the probability itself underflows."""
    shifted: Array = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def log_odds(logits: Array) -> Array:
    """s_k = log(p_k / (1 - p_k)) = z_k - log sum_{j != k} exp(z_j), with p the softmax; (n_samples, n_classes).

    Computed from the logits, so exact where p or 1 - p underflows. With g the gap of the two largest logits,
    v = z - (the second largest) and R = sum of exp(min(v, 0)) over all classes but one largest:

        s = g - log R                                        for the largest logit
        s = v - g - log(1 + (R - exp(v)) exp(-g))            for every other

    R >= 1, and R - exp(v) >= 0 is a sum of terms of one sign, so nothing overflows and nothing cancels. Where several
    logits are the largest, g = 0 and the two lines agree.
    """
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T[:, :, None]
    above, gap = logits - second, first - second
    terms = np.exp(np.minimum(above, 0))
    total = terms.sum(axis=1, keepdims=True) - 1
    others = np.log1p((total - terms) * np.exp(-gap))
    scores: Array = np.where(above > 0, gap - np.log(total), above - gap - others)
    return scores


def normalised_sigmoid(log_odds: Array) -> Array:
    """Rows of sigmoid(t_k) / sum_j sigmoid(t_j): one-vs-rest probabilities made into a distribution.

    sigmoid(t) = exp(min(t, 0)) / (1 + exp(-|t|)); the numerators are shifted by the row's largest, so a row whose every
    sigmoid underflows is a distribution like any other.
    """
    p = softmax(np.minimum(log_odds, 0))
    p /= 1 + np.exp(-np.abs(log_odds))
    p /= p.sum(axis=1, keepdims=True)
    return p
