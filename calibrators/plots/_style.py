"""The look that all plots share: colours with one meaning each, quiet axes, titles that say the finding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibrators.plots._matplotlib import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, QUIET, FAINT, BAND, PAPER = "#1f2430", "#667085", "#d5dae3", "#e6e9f0", "#ffffff"
OVERCONFIDENT, UNDERCONFIDENT, SHARE = "#d9480f", "#1c6dd0", "#98a2b3"
"""Orange and blue, which the common kinds of colour blindness keep apart; each colour stands for one thing."""

SERIES = ("#667085", "#6941c6", "#0e9384", "#c11574", "#b58105", "#1f2430")
"""Colours of named lines, the first, usually the uncalibrated model, in grey. None says over- or underconfident."""

DASHES = ("dashed", "solid", "dotted", "dashdot")
"""Their strokes, in turn, so that lines differ without colour too."""


def percent(share: float) -> str:
    """0.6204 as "62 %", with one digit more near 0 and 1, where a percent is a lot."""
    digits = 0 if 0.1 <= share <= 0.9 or share in (0, 1) else 1
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure: Figure = import_matplotlib().figure.Figure(figsize=(width, height), facecolor=PAPER)
    return figure


def place_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the lower left corner: text keeps its distance whatever the figure's size."""
    across, up = figure.get_size_inches()
    axes: Axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    style_axes(axes)
    return axes


def draw_title(axes: Axes, name: str, lines: str) -> None:
    """A name above two lines of what there is to see."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    # parse_math off: a dollar sign in a name is a dollar sign.
    axes.annotate(name, (0, 1), (0, 46), color=INK, size=16, weight="bold", parse_math=False, **place)
    axes.annotate(lines, (0, 1), (0, 12), color=QUIET, size=9.5, linespacing=1.5, parse_math=False, **place)


def style_axes(axes: Axes) -> None:
    """No frame, no tick marks, a faint grid."""
    axes.tick_params(colors=QUIET, labelsize=9, length=0, pad=6)
    axes.grid(color=FAINT, linewidth=0.6, zorder=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor(PAPER)


def percent_axis(axis: Axis, decimals: int = 0) -> None:
    """Ticks of shares as percentages."""
    formatter = import_matplotlib().ticker.PercentFormatter(1, decimals=decimals, symbol="\N{NO-BREAK SPACE}%")
    axis.set_major_formatter(formatter)
