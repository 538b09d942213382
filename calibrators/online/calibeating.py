"""Calibeating: forecasts that are calibrated whatever comes, made from forecasts that are sharp.

Foster, Hart, "Calibeating: beating forecasters at their own game", Theoretical Economics 18, 2023; Gupta, Ramdas, ICML
2023, section 3. The sharp forecasts are put into bins of equal width, and in each bin another forecaster plays:

- tracking says the mean of the labels that the bin has seen;
- hedging plays the game of Foster, "A proof of calibration via Blackwell's approachability theorem", Games and Economic
  Behavior 29, 1999: of ten intervals it names one whose own past labels average inside it, or else one of two
  neighbours at random such that neither error can grow in the mean. Its calibration error goes to half an interval
  against any adversary; the price is that it may only say ten numbers.

Both as in the authors' code, on which their published figures rest: a forecast on an edge belongs to the bin below it;
tracking's first means are each bin's upper edge less .05 of its width (the paper: the middle), with the weight of one
label.
"""

from __future__ import annotations

import numpy as np

from calibrators.numerics import Array
from calibrators.online.compiled import compiled

N_BINS = 10
FIRST_MEAN_BELOW_EDGE = 0.05  # of a bin's width


def bins_of(forecasts: Array, n_bins: int = N_BINS) -> Array:
    """The bin of each forecast, (n_samples,) int64: how many upper edges are strictly below it."""
    edges = np.linspace(1 / n_bins, 1, n_bins)
    return np.searchsorted(edges, forecasts, side="left").astype(np.int64)


def tracked(forecasts: Array, y: Array, n_bins: int = N_BINS) -> Array:
    """What tracking says before each label, (n_samples,), of forecasts (n_samples,) and labels 0 or 1.

    Examples
    --------
    >>> tracked(np.full(4, 0.95), np.array([1, 0, 0, 0])).round(3).tolist()
    [0.995, 0.998, 0.665, 0.499]
    """
    means = np.linspace(1 / n_bins, 1, n_bins) - FIRST_MEAN_BELOW_EDGE / n_bins
    return _tracked(bins_of(forecasts, n_bins), np.asarray(y, dtype=np.float64), means)


def hedged(forecasts: Array, y: Array, uniforms: Array, n_bins: int = N_BINS) -> Array:
    """What hedging says before each label, (n_samples,). `uniforms` (n_samples,) in [0, 1) decide where it must draw.

    They are used up bin after bin, in the order of the rows in each, as the authors' code draws them.
    """
    bins, labels = bins_of(forecasts, n_bins), np.asarray(y, dtype=np.float64)
    said, drawn = np.zeros(len(labels)), 0
    for pivot in range(n_bins):
        (rows,) = np.nonzero(bins == pivot)
        if len(rows) != 1:  # of a bin with a single row the authors' code says zero
            said[rows], drawn = _game(labels[rows], pivot, uniforms, drawn, *_intervals(n_bins))
    return said


def _intervals(n: int) -> tuple[Array, Array, Array]:
    """Lower ends, middles, upper ends, on the authors' grid of floating point numbers."""
    half = 1 / (2 * n)
    low = np.arange(0, 1, 2 * half)
    return low, low + half, low + 2 * half


@compiled
def _tracked(bins: Array, y: Array, means: Array) -> Array:
    said, counts = np.empty(len(y)), np.ones(len(means))
    for t in range(len(y)):
        k = bins[t]
        said[t] = means[k]
        means[k] = (counts[k] * means[k] + y[t]) / (counts[k] + 1.0)
        counts[k] += 1.0
    return said


@compiled
def _game(
    y: Array, pivot: int, uniforms: Array, drawn: int, low: Array, middle: Array, high: Array
) -> tuple[Array, int]:
    said, means, counts = np.empty(len(y)), middle.copy(), np.zeros(len(middle))
    for t in range(len(y)):
        chosen = -1
        if low[pivot] - means[pivot] <= 0 and means[pivot] - high[pivot] <= 0:
            chosen = pivot
        else:
            for i in range(len(means)):
                if low[i] - means[i] <= 0 and means[i] - high[i] <= 0:
                    chosen = i
                    break
        if chosen < 0:  # the first interval whose labels average below it, and the one before, above which they do
            i = 0
            while low[i] - means[i] <= 0:
                i += 1
            deficit, excess = low[i] - means[i], means[i - 1] - high[i - 1]
            chosen = i - 1 if uniforms[drawn] * (deficit + excess) <= deficit else i
            drawn += 1
        said[t] = middle[chosen]
        means[chosen] = (means[chosen] * counts[chosen] + y[t]) / (counts[chosen] + 1.0)
        counts[chosen] += 1.0
    return said, drawn
