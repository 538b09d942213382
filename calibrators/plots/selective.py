"""The risk-coverage curve: how wrong the model is when it may decline the rows it is least sure of.

Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017. Read from the right: answering
every row costs the error rate; declining the least sure rows moves left and, if confidence means anything, down.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from calibrators.metrics import RiskCoverageCurve, risk_coverage_curve
from calibrators.plots._style import INK, SERIES, draw_title, new_figure, percent, percent_axis, place_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400
"""Points drawn of a curve, evenly spaced in coverage."""

_SETTLED = 0.02
"""The risk of the first few rows is all luck: the curve is drawn from this coverage on."""


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
    if not named:
        raise ValueError("named must hold at least one set of probabilities, got none")
    curves = {name: risk_coverage_curve(probabilities, y) for name, probabilities in named.items()}
    legend_height = 0.24 * len(curves)
    figure = new_figure(6.4, 5.35 + legend_height)
    axes = place_axes(figure, 0.85, 0.85 + legend_height, 5.2, 3.45)
    for (name, curve), colour in zip(curves.items(), cycle(SERIES)):
        _draw_curve(axes, name, curve, colour)
    highest = max(axes.dataLim.y1, 0.01)
    axes.set(xlim=(0, 1), ylim=(0, 1.1 * highest))
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis, decimals=0 if highest > 0.1 else 1)
    axes.set_xlabel("Rows answered, surest first (coverage)", color=INK, size=10.5, labelpad=7)
    axes.set_ylabel("Wrong among them (risk)", color=INK, size=10.5)
    draw_title(axes, "Risk and coverage", _finding(*next(reversed(curves.items()))))
    figure.legend(
        loc="lower left", bbox_to_anchor=(0.12, 0.01), frameon=False, labelcolor=INK, fontsize=9, handlelength=1.7
    )
    return figure


def _draw_curve(axes: Axes, name: str, curve: RiskCoverageCurve, colour: str) -> None:
    n = len(curve.risk)
    shown = np.unique(np.linspace(np.ceil(_SETTLED * n) - 1, n - 1, _POINTS).astype(int))
    label = f"{name}  ·  mean risk (AURC) {curve.risk.mean():.4f}"
    (line,) = axes.plot(curve.coverage[shown], curve.risk[shown], color=colour, linewidth=1.8, zorder=3)
    line.set_label(label.replace("$", r"\$"))
    axes.scatter([1], curve.risk[-1:], color=colour, s=30, zorder=4, clip_on=False)


def _finding(name: str, curve: RiskCoverageCurve) -> str:
    every, half = percent(float(curve.risk[-1])), percent(float(curve.risk[(len(curve.risk) - 1) // 2]))
    return f"{name}: wrong {every} of the time if it answers every row,\n{half} if it answers the surest half"
