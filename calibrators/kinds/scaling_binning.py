"""scaling_binning: Platt's curve, then the mean of its values in bins of equal mass.

Kumar, Liang, Ma, "Verified Uncertainty Calibration", NeurIPS 2019, section 4.1: fit a parametric map g, cut its values
into B bins of equal mass, serve the mean of g in the bin. A binned map takes B values, so its calibration error can be
estimated from data, where that of a continuous map is only bounded from below; and the mean of g needs fewer rows than
the mean of labels: O(1/eps^2 + B) for an error of eps, where histogram binning needs O(B/eps^2) (theorem 4.1).

Here g_k(s) = sigmoid(a_k s + b_k) is Platt's curve of the log-odds of class k (the kind `platt`); rows are normalised
(the paper's marginal calibration, section 2). g never falls, so bins of its values are bins of s, with edges midway
between neighbouring rows. With three classes or more the paper's statement is about each class before that
normalisation.

It is worth its steps only where the error must be verified: within a bin all rows are served alike, and in the
comparisons of CalArena (arXiv 2605.30188) it loses to its own first half.
"""

from __future__ import annotations

import numpy as np

from calibrators.binning import LARGEST_LEVEL, OneVsRestSteps, Steps, Ties, power_of_two, scores, table
from calibrators.kinds.platt import PlattScaling
from calibrators.numerics import Array, sigmoid


class ScalingBinning(OneVsRestSteps):
    """Platt's curve in steps. May change the argmax, and ties rows that fall into the same bins.

    Parameters
    ----------
    n_bins : bins of each map, 1..4096; fewer where there are fewer distinct scores

    Attributes
    ----------
    edges_ : (n_maps, n_cells - 1) float32, log-odds; n_maps is n_classes, or 1 for two classes
    levels_ : (n_maps, n_cells) float32, calibrated log-odds

    Examples
    --------
    Two bins of two rows each: the mean of Platt's values at log-odds -3 and -1, and at 1 and 3.

    >>> logits = [[0, -3], [0, -1], [0, 1], [0, 3]]
    >>> ScalingBinning(n_bins=2).fit(logits, [0, 1, 0, 1]).predict_proba(logits)[:, 1].round(1).tolist()
    [0.4, 0.4, 0.6, 0.6]
    """

    def __init__(self, n_bins: int = 100) -> None:
        self.n_bins = n_bins

    def check_params(self) -> None:
        if not (isinstance(self.n_bins, int) and 1 <= self.n_bins <= 4096):
            raise ValueError(f"n_bins must be an integer in 1..4096, got {self.n_bins!r}")

    @property
    def n_cells(self) -> int:
        return power_of_two(self.n_bins)

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        platt = PlattScaling().fit(logits, y, sample_weight=weight)
        s, unlabelled = scores(logits), np.zeros(len(y))
        curves = zip(s.T, platt.slope_[-s.shape[1] :], platt.intercept_[-s.shape[1] :], strict=True)
        maps = [_binned_curve(Ties.of(score, unlabelled, weight), a, b, self.n_bins) for score, a, b in curves]
        self.edges_, self.levels_ = table(maps, self.n_cells)


def _binned_curve(rows: Ties, slope: float, intercept: float, n_bins: int) -> Steps:
    """Log-odds of the mean of sigmoid(slope s + intercept) over the rows of each bin."""
    starts = rows.equal_mass_starts(n_bins)
    # Both tails summed by themselves: one minus a mean near one has no digits left.
    t = np.clip(slope * rows.score.astype(np.float64) + intercept, -LARGEST_LEVEL, LARGEST_LEVEL)
    positive, negative = (np.add.reduceat(rows.mass * sigmoid(side), starts) for side in (t, -t))
    return Steps(rows.edges(starts), np.log(positive) - np.log(negative))
