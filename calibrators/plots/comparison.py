"""Calibrators compared: a dot and an interval for each, the best at the top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.metrics import Estimate
from calibrators.plots._style import BAND, INK, QUIET, SHARE, new_figure, place_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {"log_loss": "Log loss", "expected_calibration_error": "Calibration error (ECE)"}
"""The scores shown, the one that orders the rows first; lower is better in both."""


@dataclass(frozen=True)
class Ranked:
    """What is drawn: the names in ascending order of log loss, and for each of `COLUMNS` their scores in that order."""

    names: list[str]
    columns: dict[str, list[Estimate]]


def ranked(scores: Mapping[str, Mapping[str, Estimate]]) -> Ranked:
    """The rows of `calibrator_comparison` and of `comparison_chart`; errors as there."""
    if not scores:
        raise ValueError("scores must hold at least one calibrator, got none")
    for name, estimates in scores.items():
        if missing := [column for column in COLUMNS if column not in estimates]:
            raise ValueError(f"scores of {name!r} lack {', '.join(missing)}")
    names = sorted(scores, key=lambda name: scores[name]["log_loss"].value)
    return Ranked(names, {column: [scores[name][column] for name in names] for column in COLUMNS})


_ROW, _PANEL, _NUMBERS, _GAP = 0.36, 2.5, 0.75, 0.35
_RIGHT, _TOP, _BOTTOM = 0.2, 1.2, 0.6
_LETTER = 0.092
"""Inches; the last for a letter of a name."""


def calibrator_comparison(scores: Mapping[str, Mapping[str, Estimate]], *, level: float = 0.95) -> Figure:
    """Log loss and ECE of each calibrator with their intervals, in ascending order of log loss.

    Parameters
    ----------
    scores : name of each calibrator and what `calibrators.metrics.scores` said of it on the same rows
    level : the confidence level these intervals have, for the caption

    Returns
    -------
    a matplotlib Figure of no particular backend

    Raises
    ------
    ValueError
        if `scores` is empty, or a calibrator lacks `log_loss` or `expected_calibration_error`
    ImportError
        if matplotlib is not installed
    """
    rows = ranked(scores)
    names = rows.names
    left = max(1.2, 0.35 + _LETTER * max(map(len, names)))
    panel_height = _ROW * len(names)
    figure = new_figure(left + 2 * (_PANEL + _NUMBERS) + _GAP + _RIGHT, _TOP + panel_height + _BOTTOM)
    for index, (column, heading) in enumerate(COLUMNS.items()):
        place = left + index * (_PANEL + _NUMBERS + _GAP)
        axes = place_axes(figure, place, _BOTTOM, _PANEL, panel_height)
        _draw_column(axes, heading, rows.columns[column])
        axes.set_yticks(range(len(names)), names if index == 0 else [""] * len(names), parse_math=False)
        axes.get_yticklabels()[0].set(color=INK, weight="bold")
    _draw_heading(figure, level)
    return figure


def _draw_column(axes: Axes, heading: str, estimates: list[Estimate]) -> None:
    """One score: row 0 at the top, the row with the least value in ink and its interval as a band behind all."""
    best = min(estimates, key=lambda estimate: estimate.value)
    if best.has_interval:
        axes.axvspan(best.low, best.high, color=BAND, linewidth=0, zorder=0)
    for row, estimate in enumerate(estimates):
        colour = INK if estimate is best else QUIET
        if estimate.has_interval:
            axes.hlines(row, estimate.low, estimate.high, color=SHARE, linewidth=3.5, zorder=3)
        axes.scatter(estimate.value, row, color=colour, s=42, zorder=4)
        axes.annotate(
            f"{estimate.value:.4f}", (1, row), (10, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", color=colour, size=9.5,
            weight="bold" if estimate is best else "normal", annotation_clip=False,
        )  # fmt: skip
    axes.set(xmargin=0.08, ylim=(len(estimates) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="y", labelsize=10)
    axes.annotate(heading, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", color=INK, size=10.5)


def _draw_heading(figure: Figure, level: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.3 / width, 1 - 0.42 / height, "Calibrators compared", color=INK, size=16, weight="bold", va="center")
    caption = f"lower is better; lines are {100 * level:g}\N{NO-BREAK SPACE}% intervals, the band that of the best"
    figure.text(0.3 / width, 1 - 0.72 / height, caption, color=QUIET, size=9.5, va="center")
