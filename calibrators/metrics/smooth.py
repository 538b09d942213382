"""Calibration errors without bins: the gap between confidence and accuracy, smoothed by a kernel.

Sources. smECE: Błasiok and Nakkiran, "Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing", ICLR 2024.
KDE: Zhang, Kailkhura, Han, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty
Calibration in Deep Learning", ICML 2020.

Both spread each row over [0, 1] by a kernel that the ends 0 and 1 reflect. Rows are first laid on `CELLS` equal cells,
each shared between the two nearest centres so that its mean stays where it was; the smoothing is then one fast
transform. Time is O(n_samples + CELLS log CELLS), and the grid's error is of order (cell / kernel width)^2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import dct, idct
from scipy.optimize import brentq
from scipy.signal import oaconvolve

from calibrators.metrics.calibration import top_label
from calibrators.metrics.checks import check_labelled
from calibrators.numerics import Array

CELLS = 1 << 14

_DEVIATIONS_TO_THE_END = 3.0
"""The triweight kernel (1 - t^2)^3 on [-1, 1] has variance 1/9."""


def smooth_calibration_error(probabilities: ArrayLike, y: ArrayLike) -> float:
    """smECE of the top label: the mean absolute gap, smoothed by a Gaussian as wide as the error itself; 0 to 1.

    With c_i the confidence of row i and a_i = 1 where it was right,

        smECE_s = integral over t in [0, 1] of |sum_i (a_i - c_i) K_s(t, c_i)| / n

    K_s the Gaussian density of standard deviation s, reflected at 0 and 1. smECE_s never rises with s (a wider kernel
    is a further averaging), so exactly one s has smECE_s = s, and that is the error: nothing is left to choose. The
    reflected Gaussian multiplies the k-th cosine of the gap by exp(-(pi k s)^2 / 2), so each s costs one transform.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    Always sure, right three times in four: the gap is 1/4 however it is smoothed.

    >>> print(f"{smooth_calibration_error([[1.0, 0.0]] * 4, [0, 0, 0, 1]):.6f}")
    0.250000
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    cosines = dct(_on_grid(confidence, (correct - confidence) / len(correct)), norm="ortho")
    if _smoothed_size(cosines, 0.0) == 0:
        return 0.0
    # At width 0 the size is above the width, at width 2 below: no size exceeds 1.
    width = brentq(lambda s: _smoothed_size(cosines, s) - s, 0.0, 2.0, xtol=1e-9)
    return _smoothed_size(cosines, width)


def kde_calibration_error(probabilities: ArrayLike, y: ArrayLike) -> float:
    """ECE of the top label with densities in place of bins: integral of |t - accuracy(t)| density(t) over [0, 1].

    Both are kernel estimates from the confidences c_i: the triweight kernel, reflected at 0 and 1, with standard
    deviation std(c) (2 n)^(-1/5), and never less than a cell. The density is sum_i K(t - c_i) / n, the accuracy the
    share of it due to right rows. The published code estimates the right rows' density with a bandwidth of its own and
    cuts the accuracy off at 1; one bandwidth for both needs no cut.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1

    Examples
    --------
    >>> print(f"{kde_calibration_error([[0.9, 0.1]] * 10, [0] * 6 + [1] * 4):.6f}")
    0.300000
    """
    confidence, correct = top_label(*check_labelled(probabilities, y))
    n = len(confidence)
    bandwidth = float(np.std(confidence, dtype=np.float64)) * (2 * n) ** -0.2
    density = _triweight(_on_grid(confidence, np.ones(n)), bandwidth)
    right = _triweight(_on_grid(confidence, correct), bandwidth)
    centres = (np.arange(CELLS) + 0.5) / CELLS
    return float(np.abs(centres * density - right).sum() / n)


def _on_grid(confidence: Array, mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mass of each row, shared between the two cells whose centres enclose its confidence, (CELLS,)."""
    place = confidence.astype(np.float64) * CELLS - 0.5
    left = np.floor(place).astype(np.int64)
    share = place - left
    last = CELLS - 1  # beyond the outermost centres reflection puts both shares into the outermost cell
    return np.asarray(
        np.bincount(np.clip(left, 0, last), mass * (1 - share), minlength=CELLS)
        + np.bincount(np.clip(left + 1, 0, last), mass * share, minlength=CELLS)
    )


def _smoothed_size(cosines: NDArray[np.float64], width: float) -> float:
    """smECE at a given width, from the cosine transform of the gaps on the grid."""
    frequency = np.pi * np.arange(CELLS)
    return float(np.abs(idct(cosines * np.exp(-((frequency * width) ** 2) / 2), norm="ortho")).sum())


def _triweight(mass: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Mass on the grid after smoothing by a triweight kernel of this standard deviation, reflected at the ends."""
    radius = max(_DEVIATIONS_TO_THE_END * deviation * CELLS, 1.0)
    reach = int(radius)
    kernel = (1 - (np.arange(-reach, reach + 1) / radius) ** 2) ** 3
    return np.asarray(oaconvolve(np.pad(mass, reach, mode="symmetric"), kernel / kernel.sum(), mode="valid"))
