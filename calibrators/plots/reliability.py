"""Reliability diagrams: what the model says against how often it is right.

DeGroot and Fienberg, "The Comparison and Evaluation of Forecasters", The Statistician 32 (1983); consistency bands as
Bröcker and Smith, "Increasing the Reliability of Reliability Diagrams", Weather and Forecasting 22 (2007).

One panel per named set of probabilities. A dot stands at the mean confidence and the accuracy of a bin, and a bar joins
it to the diagonal, where it belongs: the bar is the bin's error, orange where the model claims too much and blue where
it claims too little. The grey band is where the dots of a perfectly calibrated model would fall, 95 times in 100, with
this many rows. A dot outside it is solid, a dot inside it hollow: chance alone explains that one. The histogram beneath
shows where the rows are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from calibrators.metrics import ReliabilityCurve, expected_calibration_error, log_loss, reliability_curve
from calibrators.plots._matplotlib import import_matplotlib
from calibrators.plots._style import (
    BAND,
    INK,
    OVERCONFIDENT,
    PAPER,
    QUIET,
    SHARE,
    UNDERCONFIDENT,
    draw_title,
    percent,
    percent_axis,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _HISTOGRAM, _GAP = 3.7, 0.75, 0.6
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.85, 0.3, 1.05, 1.0
"""Inches."""


def reliability_diagram(
    named: Mapping[str, ArrayLike], y: ArrayLike, *, n_bins: int = 15, level: float = 0.95
) -> Figure:
    """Reliability diagrams side by side, such as {"Before": ..., "After": ...}, on the same labelled rows.

    Parameters
    ----------
    named : title of each panel and its probabilities (n_samples, n_classes)
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : number of bins of equal width over [0, 1]
    level : of the consistency band

    Returns
    -------
    a matplotlib Figure of no particular backend: `figure.savefig("reliability.png", dpi=200)`

    Raises
    ------
    ValueError
        if `named` is empty, or for probabilities or labels that are not
    ImportError
        if matplotlib is not installed
    """
    if not named:
        raise ValueError("named must hold at least one set of probabilities, got none")
    curves = {name: reliability_curve(probabilities, y, n_bins) for name, probabilities in named.items()}
    highest_share = max(float((curve.counts / curve.counts.sum()).max()) for curve in curves.values())
    figure, axes = _panels(len(named))
    for (name, curve), above, below in zip(curves.items(), axes[0], axes[1], strict=True):
        scores = (
            f"calibration error (ECE) {expected_calibration_error(named[name], y, n_bins):.3f}"
            f"  ·  log loss {log_loss(named[name], y):.3f}"
        )
        draw_title(above, name, f"{_said_and_right(curve)}\n{scores}")
        draw_reliability(above, curve, level)
        _draw_shares(below, curve, highest_share)
    axes[0, 0].set_ylabel("How often it is right", color=INK, size=10.5)
    axes[1, 0].set_ylabel("Rows", color=INK, size=10.5)
    draw_legend(figure, level)
    return figure


def _panels(n_panels: int) -> tuple[Figure, Any]:
    """A figure of fixed measures, so that titles and square panels keep their size whatever their number."""
    width = _LEFT + n_panels * _PANEL + (n_panels - 1) * _GAP + _RIGHT
    height = _TOP + _PANEL + _GAP / 3 + _HISTOGRAM + _BOTTOM
    figure = import_matplotlib().figure.Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.subplots(
        2,
        n_panels,
        sharex=True,
        sharey="row",
        squeeze=False,
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - _RIGHT / width,
            "top": 1 - _TOP / height,
            "bottom": _BOTTOM / height,
            "height_ratios": [_PANEL, _HISTOGRAM],
            "wspace": _GAP / _PANEL,
            "hspace": (_GAP / 3) / ((_PANEL + _HISTOGRAM) / 2),
        },
    )
    return figure, axes


def _said_and_right(curve: ReliabilityCurve) -> str:
    filled = curve.counts > 0
    said, right = (
        np.average(means[filled], weights=curve.counts[filled]) for means in (curve.confidence, curve.accuracy)
    )
    return f"says {percent(said)} on average, is right {percent(right)} of the time"


def draw_reliability(axes: Axes, curve: ReliabilityCurve, level: float, scale: float = 1.0) -> None:
    """Band, diagonal, bars and dots of one panel, bars and dots `scale` times their size in the large diagram."""
    filled = curve.counts > 0
    said, right = curve.confidence[filled], curve.accuracy[filled]
    low, high = (end[filled] for end in curve.consistency_band(level))
    left, width = curve.edges[:-1][filled], np.diff(curve.edges)[filled]
    axes.bar(left, high - low, width, low, align="edge", color=BAND, zorder=1)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    colour = np.where(right < said, OVERCONFIDENT, UNDERCONFIDENT).tolist()
    chance = (low <= right) & (right <= high)
    axes.vlines(said, said, right, colors=colour, linewidth=5 * scale, alpha=np.where(chance, 0.2, 0.5), zorder=3)
    sizes = scale**2 * (26 + 44 * curve.counts[filled] / curve.counts.max())
    faces = np.where(chance, PAPER, colour)
    axes.scatter(said, right, s=sizes, c=faces, edgecolors=colour, linewidths=1.4 * scale, zorder=4, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    style_axes(axes)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)


def _draw_shares(axes: Axes, curve: ReliabilityCurve, highest_share: float) -> None:
    shares = curve.counts / curve.counts.sum()
    centres = (curve.edges[:-1] + curve.edges[1:]) / 2
    axes.bar(centres, shares, np.diff(curve.edges) * 0.86, color=SHARE, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.05 * highest_share), yticks=[0, highest_share])
    axes.set_xlabel("What the model says (confidence)", color=INK, size=10.5, labelpad=7)
    style_axes(axes)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)


def draw_legend(figure: Figure, level: float) -> None:
    """What colours, band and hollow dots mean, along the foot of the figure."""
    lines, patches = import_matplotlib().lines, import_matplotlib().patches
    over, under = (
        lines.Line2D([], [], color=colour, linewidth=5, alpha=0.6, marker="o", markersize=6)
        for colour in (OVERCONFIDENT, UNDERCONFIDENT)
    )
    hollow = lines.Line2D([], [], color=QUIET, linewidth=0, marker="o", markersize=6, markerfacecolor=PAPER)
    handles: list[Any] = [over, under, (patches.Patch(color=BAND), hollow)]
    figure.legend(
        handles,
        ["overconfident", "underconfident", f"within chance ({100 * level:g}\N{NO-BREAK SPACE}%)"],
        loc="lower center",
        borderaxespad=1,
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        handlelength=1.7,
        columnspacing=1.4,
    )
