"""Prediction sets judged: how often they hold the label at each level, how large they are, and whom they fail.

Three panels. Coverage against the confidence level asked for, with exact intervals: honest sets lie on the dashed line.
The sizes of the sets at one level. The coverage at that level among sets of like size and in the worst classes: a
threshold for all rows promises nothing there (`metrics.sets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics.sets import (
    CoverageCurve,
    Stratum,
    class_coverage,
    coverage_curve,
    coverage_gap,
    set_size_counts,
    size_stratified_coverage,
)
from calibrators.plots._style import (
    FAINT,
    INK,
    OVERCONFIDENT,
    QUIET,
    SHARE,
    UNDERCONFIDENT,
    draw_title,
    new_figure,
    percent,
    percent_axis,
    place_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 25
"""Larger sets share bars of several sizes."""


@dataclass(frozen=True)
class SetQuality:
    """What is drawn, in a file or in the report.

    Attributes
    ----------
    curve : coverage and size by level
    confidence_level : the level of all that follows
    first, last, shares : (n_bars,) the sizes that a bar stands for and its share of the rows
    by_size : coverage among sets of like size
    by_class : the least covered classes, of `n_classes` that occur
    gap : mean distance of the classes' coverage from the level
    """

    curve: CoverageCurve
    confidence_level: float
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    shares: NDArray[np.float64]
    by_size: list[Stratum]
    by_class: list[Stratum]
    n_classes: int
    gap: float

    @property
    def place(self) -> int:
        """Of the level on the curve."""
        return int(np.flatnonzero(self.curve.levels == self.confidence_level)[0])

    @property
    def held(self) -> str:
        """The coverage at the level, in words."""
        found = self.curve.coverage[self.place]
        return f"held by {percent(found.value)} of rows ({percent(found.low)} to {percent(found.high)})"

    @property
    def bar_names(self) -> list[str]:
        return [str(a) if a == b else f"{a}-{b}" for a, b in zip(self.first, self.last, strict=True)]


def set_quality(
    by_level: Mapping[float, ArrayLike],
    y: ArrayLike,
    confidence_level: float,
    class_names: Sequence[str] | None,
    n_worst: int,
    level: float,
) -> SetQuality:
    """The panels of `set_diagram` and of `set_chart`; errors as there."""
    if confidence_level not in by_level:
        raise ValueError(f"by_level must hold the sets of level {confidence_level}, got {sorted(by_level)}")
    if n_worst < 1:
        raise ValueError(f"n_worst must be at least 1, got {n_worst}")
    sets = by_level[confidence_level]
    classes = class_coverage(sets, y, class_names=class_names, level=level)
    counts = set_size_counts(sets)
    largest = int(np.flatnonzero(counts)[-1])
    width = max(1, -(-largest // MOST_BARS))
    first = np.concatenate([[0], np.arange(1, largest + 1, width)])  # empty sets have a bar of their own
    last = np.append(first[1:] - 1, largest)
    shares = np.add.reduceat(counts, first) / counts.sum()
    return SetQuality(
        coverage_curve(by_level, y, level=level),
        confidence_level,
        first,
        last,
        shares,
        size_stratified_coverage(sets, y, level=level),
        classes[:n_worst],
        len(classes),
        coverage_gap(sets, y, confidence_level),
    )


def set_diagram(
    by_level: Mapping[float, ArrayLike],
    y: ArrayLike,
    *,
    confidence_level: float = 0.9,
    class_names: Sequence[str] | None = None,
    n_worst: int = 6,
    level: float = 0.95,
) -> Figure:
    """Coverage by level, sizes of sets, and coverage by size and class, in three panels.

    Parameters
    ----------
    by_level : confidence level -> (n_samples, n_classes) bool sets of the same rows, `confidence_level` among them
    y : (n_samples,) class indices 0 .. n_classes-1
    confidence_level : the level whose sets the second and third panel show
    class_names : n_classes names; "class 0", "class 1", .. by default
    n_worst : how many of the least covered classes to show
    level : of the intervals

    Returns
    -------
    a matplotlib Figure of no particular backend

    Raises
    ------
    TypeError, ValueError
        for sets or labels that are not, and if `confidence_level` is not in `by_level`
    ImportError
        if matplotlib is not installed
    """
    quality = set_quality(by_level, y, confidence_level, class_names, n_worst, level)
    strata = quality.by_size + quality.by_class
    figure = new_figure(14.2, 5.2)
    _draw_curve(place_axes(figure, 0.85, 0.8, 3.3, 3.3), quality)
    _draw_sizes(place_axes(figure, 5.1, 0.8, 3.3, 3.3), quality)
    left = 9.0 + min(0.085 * max(len(stratum.name) for stratum in strata), 1.9)
    _draw_strata(place_axes(figure, left, 0.8, 13.3 - left, 3.3), quality)
    return figure


def _draw_curve(axes: Axes, quality: SetQuality) -> None:
    curve = quality.curve
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for asked, found in zip(curve.levels, curve.coverage, strict=True):
        colour = _colour(found.low, found.high, asked)
        axes.vlines(asked, found.low, found.high, color=SHARE, linewidth=3.5, zorder=3)
        axes.scatter(asked, found.value, s=42, color=colour, zorder=4, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.set_xlabel("Confidence level asked for", color=INK, size=10.5, labelpad=7)
    axes.set_ylabel("Sets that hold the label (coverage)", color=INK, size=10.5)
    draw_title(axes, "Coverage", f"asked for {percent(quality.confidence_level)}, the label is\n{quality.held}")


def _draw_sizes(axes: Axes, quality: SetQuality) -> None:
    places = np.arange(len(quality.shares))
    axes.bar(places, quality.shares, width=0.8, color=SHARE, zorder=2)
    shown = places[:: -(-len(places) // 6)]
    axes.set_xticks(shown, [quality.bar_names[place] for place in shown])
    axes.grid(visible=False, axis="x")
    percent_axis(axes.yaxis)
    axes.set_xlabel("Labels in the set", color=INK, size=10.5, labelpad=7)
    axes.set_ylabel("Rows", color=INK, size=10.5)
    mean = quality.curve.sizes[quality.place]
    empty = percent(quality.shares[0])
    lines = f"{mean:.2f} labels on average at {percent(quality.confidence_level)}\n{empty} of the sets are empty"
    draw_title(axes, "Size", lines)


def _draw_strata(axes: Axes, quality: SetQuality) -> None:
    strata = quality.by_size + quality.by_class
    for row, stratum in enumerate(strata):
        found = stratum.coverage
        axes.hlines(row, found.low, found.high, color=SHARE, linewidth=3.5, zorder=3)
        colour = _colour(found.low, found.high, quality.confidence_level)
        axes.scatter(found.value, row, s=42, color=colour, zorder=4, clip_on=False)
        axes.annotate(
            f"{stratum.n_rows:,}", (1, row), (10, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", color=QUIET, size=9, annotation_clip=False,
        )  # fmt: skip
    axes.axvline(quality.confidence_level, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if quality.by_class:
        axes.axhline(len(quality.by_size) - 0.5, color=FAINT, linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(len(strata) - 0.5, -0.5))
    axes.set_yticks(range(len(strata)), [stratum.name[:24] for stratum in strata], parse_math=False)
    axes.grid(visible=False, axis="y")
    percent_axis(axes.xaxis)
    axes.set_xlabel("Coverage; on the right the rows", color=INK, size=10.5, labelpad=7)
    shown = len(quality.by_class)
    which = f"the worst {shown} of {quality.n_classes} classes" if shown < quality.n_classes else "each class"
    draw_title(
        axes, "By size and class", f"sets of like size, then {which};\nclasses are {quality.gap:.3f} off on average"
    )


def _colour(low: float, high: float, asked: float) -> str:
    """Orange where fewer are held than was asked for, blue where more are, ink where chance explains the difference."""
    return OVERCONFIDENT if high < asked else UNDERCONFIDENT if low > asked else INK
