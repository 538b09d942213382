"""Reliability of each class on its own: small panels, the worst class first.

Kull et al., "Beyond Temperature Scaling", NeurIPS 2019: a model can be calibrated in its top label and promise too much
of one class and too little of another. Each panel sets the probability of one class, in all rows, against how often
that class came true, drawn as in `reliability_diagram`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from calibrators.metrics.calibration import binned_curve, equal_width_edges, weighted_gaps
from calibrators.metrics.checks import check_labelled
from calibrators.plots._style import INK, QUIET, new_figure, percent, place_axes
from calibrators.plots.reliability import Bins, draw_legend, draw_reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ClassReliability:
    """What is drawn of one class: `error` is its binned calibration error, `share` how often it came true in all."""

    name: str
    bins: Bins
    error: float
    share: float


@dataclass(frozen=True)
class WorstClasses:
    """The classes shown, the largest error first, of so many in all."""

    shown: list[ClassReliability]
    n_classes: int

    def __str__(self) -> str:
        n_shown = len(self.shown)
        return "each class" if n_shown == self.n_classes else f"the worst {n_shown} of {self.n_classes} classes"


def worst_classes(
    probabilities: ArrayLike, y: ArrayLike, class_names: Sequence[str] | None, n_panels: int, n_bins: int, level: float
) -> WorstClasses:
    """The panels of `classwise_reliability` and of `classwise_chart`; errors as there."""
    p, labels = check_labelled(probabilities, y)
    n_classes = p.shape[1]
    names = [f"class {k}" for k in range(n_classes)] if class_names is None else list(class_names)
    if len(names) != n_classes:
        raise ValueError(f"class_names must hold {n_classes} names, one for each class, got {len(names)}")
    if n_panels < 1:
        raise ValueError(f"n_panels must be at least 1, got {n_panels}")
    edges = equal_width_edges(n_bins, p.dtype)
    curves = [binned_curve(p[:, k], (labels == k).astype(np.float64), edges) for k in range(n_classes)]
    errors = np.array([weighted_gaps(curve, len(p)).sum() for curve in curves])
    worst = np.argsort(-errors, kind="stable")[:n_panels]
    shown = [
        ClassReliability(names[k], Bins.of(curves[k], level), float(errors[k]), float(np.mean(labels == k)))
        for k in worst
    ]
    return WorstClasses(shown, n_classes)


_COLUMNS = 4
_PANEL, _GAP, _HEADING = 1.85, 0.5, 0.55
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.85, 0.35, 0.85, 1.15
"""Inches."""


def classwise_reliability(
    probabilities: ArrayLike,
    y: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    n_panels: int = 8,
    n_bins: int = 10,
    level: float = 0.95,
) -> Figure:
    """A grid of reliability diagrams, a class each, in descending order of calibration error.

    Parameters
    ----------
    probabilities : (n_samples, n_classes); rows sum to one
    y : (n_samples,) class indices 0 .. n_classes-1
    class_names : n_classes titles; "class 0", "class 1", .. by default
    n_panels : how many classes to show, at most
    n_bins : number of bins of equal width over [0, 1]
    level : of the consistency band

    Returns
    -------
    a matplotlib Figure of no particular backend

    Raises
    ------
    ValueError
        if `class_names` are not n_classes names, or `n_panels` is less than 1
    ImportError
        if matplotlib is not installed
    """
    worst = worst_classes(probabilities, y, class_names, n_panels, n_bins, level)
    figure, panels = _grid(len(worst.shown))
    for axes, one in zip(panels, worst.shown, strict=True):
        draw_reliability(axes, one.bins, scale=0.7)
        _describe(axes, one)
    _draw_words(figure, str(worst))
    draw_legend(figure, level)
    return figure


def _grid(n_panels: int) -> tuple[Figure, list[Axes]]:
    n_columns, n_rows = min(n_panels, _COLUMNS), math.ceil(n_panels / _COLUMNS)
    # At least as wide as the legend.
    width = _LEFT + max(n_columns, 2.5) * (_PANEL + _GAP) - _GAP + _RIGHT
    height = _TOP + n_rows * (_HEADING + _PANEL) + (n_rows - 1) * _GAP + _BOTTOM
    figure = new_figure(width, height)
    panels = []
    for index in range(n_panels):
        row, column = divmod(index, _COLUMNS)
        bottom = height - _TOP - (row + 1) * (_HEADING + _PANEL) - row * _GAP
        axes = place_axes(figure, _LEFT + column * (_PANEL + _GAP), bottom, _PANEL, _PANEL)
        lowest_of_its_column = index + n_columns >= n_panels
        axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.tick_params(labelbottom=lowest_of_its_column, labelleft=column == 0)
        panels.append(axes)
    return figure, panels


def _describe(axes: Axes, one: ClassReliability) -> None:
    lines = f"error {one.error:.4f}  ·  {percent(one.share)} of rows"
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(one.name, (0, 1), (0, 22), color=INK, size=11, weight="bold", parse_math=False, **place)
    axes.annotate(lines, (0, 1), (0, 8), color=QUIET, size=8.5, **place)


def _draw_words(figure: Figure, which: str) -> None:
    """Heading and the names of the axes, which all panels share."""
    width, height = figure.get_size_inches()
    heading: dict[str, Any] = {"color": INK, "size": 16, "weight": "bold", "va": "center"}
    figure.text(_LEFT / width, 1 - 0.5 / height, f"Reliability of {which}", **heading)
    axis: dict[str, Any] = {"color": INK, "size": 10.5, "ha": "center", "va": "center"}
    middle = (_BOTTOM + (height - _TOP - _HEADING)) / 2
    figure.text(0.2 / width, middle / height, "How often it came true", rotation="vertical", **axis)
    figure.text(0.5, 0.68 / height, "What the model says (probability of the class)", **axis)
