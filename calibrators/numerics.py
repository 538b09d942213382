"""Arithmetic shared by every kind: checked inputs, softmax, and log-odds class against the rest.

float32 stays float32 (the arithmetic of the fused graph), everything else becomes float64. A torch tensor is taken as
the array it holds. Nothing here knows a calibrator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]

MAX_ABS_LOGIT = 1e30
"""Largest magnitude accepted in a logit: beyond it float32 arithmetic overflows."""

ELEMENTS_AT_ONCE = 1 << 16

FEW_COLUMNS = 128
"""Up to here a block of logits is transformed with each column in one piece of memory."""

FAINT = {"f": 1e-30, "d": 1e-290}
"""Sums of numbers in float32 and float64 below which some of them may have lost digits to underflow."""


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
    array = check_shape(logits, n_classes=n_classes)
    check_finite(array)
    return array


def check_shape(logits: ArrayLike, *, n_classes: int | None = None) -> Array:
    """`check_logits` without a look at the values."""
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
    return array


def check_finite(logits: Array) -> None:
    """Raise ValueError, naming the first, for logits that are not finite or beyond `MAX_ABS_LOGIT`."""
    if not _is_finite(logits):
        row, column = np.argwhere(~(np.abs(logits) <= MAX_ABS_LOGIT))[0]
        raise ValueError(
            f"logits must be finite and within ±{MAX_ABS_LOGIT:g}, got {logits[row, column]} at [{row}, {column}];"
            " for the logarithm of probabilities clip these away from 0 first"
        )


def _is_finite(logits: Array) -> bool:
    """Without a temporary of the array's size: a NaN or an infinity shows in the extremes."""
    return not logits.size or bool(logits.min() >= -MAX_ABS_LOGIT and logits.max() <= MAX_ABS_LOGIT)


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


def memory_order(width: int) -> Literal["F", "C"]:
    """Order in memory of a block of rows of `width` numbers."""
    return "F" if width <= FEW_COLUMNS else "C"


def by_blocks(transform: Callable[..., Array], logits: Array, beside: Mapping[str, Array]) -> Array:
    """Rows of finite logits (n_samples, n_classes), and of the arrays beside them, transformed a block at a time.

    So what is in between stays in a processor's cache. `transform` is given a copy of the rows, which it may write on
    and return. Where columns are few, the copy holds them one after the other: the sum of ten numbers in a row costs
    numpy ten times what it costs in ten columns added up. Where they are many, the copy lies where the result is
    wanted, and what is computed in its memory is there already.
    """
    order = memory_order(logits.shape[1])
    transformed = np.empty(logits.shape, logits.dtype)
    for block in blocks(*logits.shape):
        rows, result = logits[block], transformed[block]
        if not _is_finite(rows):
            check_finite(logits)  # names the place in the whole
        # A row by itself is doubled: numpy would sum it in another order than it does among others.
        chosen = [0, 0] if len(rows) == 1 else slice(None)
        of_rows = {name: array[block][chosen] for name, array in beside.items()}
        if len(rows) == 1 or order == "F":
            result[...] = transform(np.array(rows[chosen], order=order), **of_rows)[: len(rows)]
            continue
        result[...] = rows
        found = transform(result, **of_rows)
        if found is not result:
            result[...] = found
    return transformed


def row_maxima(logits: Array) -> Array:
    """The largest of each row (n_samples, 1). Along rows of memory numpy finds its place in half the time."""
    if not logits.flags.c_contiguous:
        return np.asarray(logits.max(axis=1, keepdims=True))
    return np.asarray(logits[np.arange(len(logits)), logits.argmax(axis=1)][:, None])


def row_sums(p: Array) -> Array:
    """The sum of each row (n_samples, 1). Along rows of memory einsum is quicker; it needs the digits of float64."""
    if p.flags.c_contiguous and p.dtype == np.float64:
        return np.asarray(np.einsum("ik->i", p)[:, None])
    return np.asarray(p.sum(axis=1, keepdims=True))


def centre(logits: Array) -> Array:
    """Logits less their row's largest."""
    difference: Array = logits - row_maxima(logits)
    return difference


def softmax(logits: Array) -> Array:
    """exp(z_k) / sum_j exp(z_j) for each row, shifted by the row's maximum so that nothing overflows."""
    return softmax_of_centred(centre(logits))


def softmax_in_place(logits: Array) -> Array:
    """`softmax`, computed in the memory of the logits."""
    logits -= row_maxima(logits)
    return softmax_of_centred(logits)


def softmax_of_centred(logits: Array) -> Array:
    """`softmax` of rows whose largest is 0, computed in their own memory."""
    np.exp(logits, out=logits)
    return normalise(logits)


def normalise(p: Array) -> Array:
    """Rows divided by their sums, in their own memory."""
    p /= row_sums(p)
    return p


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
    logits are the largest, g = 0 and the second line is taken.
    """
    top = logits.argmax(axis=1)
    terms = logits.copy(order="K")
    first, second = _take_largest(terms, top)
    gap = first - second
    above = logits - second
    np.exp(np.minimum(above, 0, out=terms), out=terms)
    total = terms.sum(axis=1, keepdims=True) - 1
    np.subtract(total, terms, out=terms)
    terms *= np.exp(-gap)
    above -= gap
    above -= np.log1p(terms, out=terms)
    alone = np.flatnonzero(gap > 0)
    above[alone, top[alone]] = gap[alone, 0] - np.log(total[alone, 0])
    return above


def two_largest(logits: Array, top: Array) -> tuple[Array, Array]:
    """The largest of each row, which stands in the column `top`, and the largest of the others; (n_samples, 1) each."""
    return _take_largest(logits.copy(order="K"), top)


def _take_largest(logits: Array, top: Array) -> tuple[Array, Array]:
    """`two_largest`, of logits the largest of which are overwritten."""
    places = np.arange(len(logits)), top  # a third of the time of take_along_axis and put_along_axis
    first = logits[places][:, None]
    logits[places] = -np.inf
    return first, logits.max(axis=1, keepdims=True)


def sigmoid(log_odds: Array) -> Array:
    """1 / (1 + exp(-t)), exact to the last digits unless it underflows."""
    p = np.negative(log_odds)
    with np.errstate(over="ignore"):  # one over infinity is the zero that it underflows to
        np.exp(p, out=p)
    p += 1
    return np.reciprocal(p, out=p)


def normalised_sigmoid(log_odds: Array) -> Array:
    """Rows of sigmoid(t_k) / sum_j sigmoid(t_j): one-vs-rest probabilities made into a distribution.

    A row whose every sigmoid nears underflow is shifted by its largest first, so it is a distribution like any other.
    """
    p = sigmoid(log_odds)
    total = p.sum(axis=1, keepdims=True)
    faint = total < FAINT[log_odds.dtype.char]
    if faint.any():  # there exp(t) is sigmoid(t)
        p, total = np.where(faint, softmax(log_odds), p), np.where(faint, 1, total)
    p /= total
    return p
