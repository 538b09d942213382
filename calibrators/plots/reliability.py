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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


@dataclass(frozen=True)
class Bins:
    """The bins that hold rows, the lowest confidence first, (n_filled,) each.

    Attributes
    ----------
    left, width : where the bin begins and how far it reaches
    counts : rows
    said, right : their mean confidence, and the share of them that was right
    low, high : the consistency band: where `right` would lie if the model were calibrated
    """

    left: NDArray[np.float64]
    width: NDArray[np.float64]
    counts: NDArray[np.int64]
    said: NDArray[np.float64]
    right: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, curve: ReliabilityCurve, level: float) -> Bins:
        """The filled bins of a curve, with the band of that level."""
        filled = curve.counts > 0
        low, high = curve.consistency_band(level)
        return cls(
            left=curve.edges[:-1][filled],
            width=np.diff(curve.edges)[filled],
            counts=curve.counts[filled],
            said=curve.confidence[filled],
            right=curve.accuracy[filled],
            low=low[filled],
            high=high[filled],
        )

    @property
    def overconfident(self) -> NDArray[np.bool_]:
        return self.right < self.said

    @property
    def within_chance(self) -> NDArray[np.bool_]:
        return (self.low <= self.right) & (self.right <= self.high)

    @property
    def shares(self) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = self.counts / self.counts.sum()
        return shares


@dataclass(frozen=True)
class Reliability:
    """What is drawn of one set of probabilities, in a file or in the report.

    Attributes
    ----------
    name : title of the panel
    bins : its dots, bars, band and histogram
    n_bins : bins in all, empty ones included
    error, log_loss : its ECE over these bins, and its log loss
    """

    name: str
    bins: Bins
    n_bins: int
    error: float
    log_loss: float

    @property
    def said(self) -> float:
        """Mean confidence of all rows."""
        return float(np.average(self.bins.said, weights=self.bins.counts))

    @property
    def right(self) -> float:
        """Accuracy over all rows."""
        return float(np.average(self.bins.right, weights=self.bins.counts))


def reliabilities(named: Mapping[str, ArrayLike], y: ArrayLike, n_bins: int, level: float) -> list[Reliability]:
    """The panels of `reliability_diagram` and of `reliability_chart`; ValueError without any."""
    if not named:
        raise ValueError("named must hold at least one set of probabilities, got none")
    return [
        Reliability(
            name,
            Bins.of(reliability_curve(probabilities, y, n_bins), level),
            n_bins,
            expected_calibration_error(probabilities, y, n_bins),
            log_loss(probabilities, y),
        )
        for name, probabilities in named.items()
    ]


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
    panels = reliabilities(named, y, n_bins, level)
    highest_share = max(float(panel.bins.shares.max()) for panel in panels)
    figure, axes = _panels(len(panels))
    for panel, above, below in zip(panels, axes[0], axes[1], strict=True):
        scores = f"calibration error (ECE) {panel.error:.3f}  ·  log loss {panel.log_loss:.3f}"
        said_and_right = f"says {percent(panel.said)} on average, is right {percent(panel.right)} of the time"
        draw_title(above, panel.name, f"{said_and_right}\n{scores}")
        draw_reliability(above, panel.bins)
        _draw_shares(below, panel.bins, highest_share)
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


def draw_reliability(axes: Axes, bins: Bins, scale: float = 1.0) -> None:
    """Band, diagonal, bars and dots of one panel, bars and dots `scale` times their size in the large diagram."""
    axes.bar(bins.left, bins.high - bins.low, bins.width, bins.low, align="edge", color=BAND, zorder=1)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    colour = np.where(bins.overconfident, OVERCONFIDENT, UNDERCONFIDENT).tolist()
    alpha = np.where(bins.within_chance, 0.2, 0.5)
    axes.vlines(bins.said, bins.said, bins.right, colors=colour, linewidth=5 * scale, alpha=alpha, zorder=3)
    sizes = scale**2 * (26 + 44 * bins.counts / bins.counts.max())
    faces = np.where(bins.within_chance, PAPER, colour)
    axes.scatter(
        bins.said, bins.right, s=sizes, c=faces, edgecolors=colour, linewidths=1.4 * scale, zorder=4, clip_on=False
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    style_axes(axes)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)


def _draw_shares(axes: Axes, bins: Bins, highest_share: float) -> None:
    axes.bar(bins.left + bins.width / 2, bins.shares, bins.width * 0.86, color=SHARE, zorder=3)
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
