"""The risk-coverage curve: how wrong the model is when it may decline the rows it is least sure of.

Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017. Read from the right: answering
every row costs the error rate; declining the least sure rows moves left and, if confidence means anything, down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics import risk_coverage_curve
from calibrators.plots._style import DASHES, INK, SERIES, draw_title, new_figure, percent, percent_axis, place_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400
"""Points drawn of a curve, evenly spaced in coverage."""

SETTLED = 0.02
"""The risk of the first few rows is all luck: the curve is drawn from this coverage on."""


@dataclass(frozen=True)
class RiskCoverage:
    """What is drawn of one set of probabilities, in a file or in the report.

    Attributes
    ----------
    name : of the line
    coverage, risk : (n_points,) its points, the last the error rate over all rows
    mean_risk : AURC, over all numbers of answered rows
    half : the risk when the surest half is answered
    """

    name: str
    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    mean_risk: float
    half: float

    @property
    def every(self) -> float:
        """The risk when every row is answered."""
        return float(self.risk[-1])


def risk_coverages(named: Mapping[str, ArrayLike], y: ArrayLike) -> list[RiskCoverage]:
    """The lines of `risk_coverage_diagram` and of `risk_coverage_chart`; ValueError without any."""
    if not named:
        raise ValueError("named must hold at least one set of probabilities, got none")
    return [_risk_coverage(name, probabilities, y) for name, probabilities in named.items()]


def _risk_coverage(name: str, probabilities: ArrayLike, y: ArrayLike) -> RiskCoverage:
    curve = risk_coverage_curve(probabilities, y)
    n = len(curve.risk)
    shown = np.unique(np.linspace(np.ceil(SETTLED * n) - 1, n - 1, _POINTS).astype(int))
    half = float(curve.risk[(n - 1) // 2])
    return RiskCoverage(name, curve.coverage[shown], curve.risk[shown], float(curve.risk.mean()), half)


def risk_coverage_diagram(named: Mapping[str, ArrayLike], y: ArrayLike) -> Figure:
    """Risk-coverage curves of named probabilities in one panel, such as {"Before": ..., "After": ...}.

    Parameters
    ----------
    named : name of each curve and its probabilities (n_samples, n_classes)
    y : (n_samples,) class indices 0 .. n_classes-1

    Returns
    -------
    a matplotlib Figure of no particular backend

    Raises
    ------
    ValueError
        if `named` is empty, or for probabilities or labels that are not
    ImportError
        if matplotlib is not installed
    """
    curves = risk_coverages(named, y)
    legend_height = 0.24 * len(curves)
    figure = new_figure(6.4, 5.35 + legend_height)
    axes = place_axes(figure, 0.85, 0.85 + legend_height, 5.2, 3.45)
    for curve, colour, dashes in zip(curves, cycle(SERIES), cycle(DASHES)):
        _draw_curve(axes, curve, colour, dashes)
    highest = max(axes.dataLim.y1, 0.01)
    axes.set(xlim=(0, 1), ylim=(0, 1.1 * highest))
    percent_axis(axes.xaxis)
    # Steps of 1, 2 or 5 of their decade, and as many digits as the smallest of these has.
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
    percent_axis(axes.yaxis, decimals=0 if highest > 0.06 else 1)
    axes.set_xlabel("Rows answered, surest first (coverage)", color=INK, size=10.5, labelpad=7)
    axes.set_ylabel("Wrong among them (risk)", color=INK, size=10.5)
    draw_title(axes, "Risk and coverage", _finding(curves[-1]))
    figure.legend(
        loc="lower left", bbox_to_anchor=(0.12, 0.01), frameon=False, labelcolor=INK, fontsize=9, handlelength=1.7
    )
    return figure


def _draw_curve(axes: Axes, curve: RiskCoverage, colour: str, dashes: str) -> None:
    label = f"{curve.name}  ·  mean risk (AURC) {curve.mean_risk:.4f}"
    (line,) = axes.plot(curve.coverage, curve.risk, color=colour, linewidth=1.8, linestyle=dashes, zorder=3)
    line.set_label(label.replace("$", r"\$"))
    axes.scatter([1], curve.risk[-1:], color=colour, s=30, zorder=4, clip_on=False)


def _finding(curve: RiskCoverage) -> str:
    every, half = percent(curve.every), percent(curve.half)
    return f"{curve.name}: wrong {every} of the time if it answers every row,\n{half} if it answers the surest half"
