"""The plots as interactive charts of the HTML report: the same data as the files', as figures of plotly.js.

A figure is the plain object that plotly.js draws (https://plotly.com/javascript/reference/), so that building one
needs no library. Its colours are names of the page's style variables, such as "--ink", which the page replaces by the
colours of its light or dark theme when it draws. Headings and names are plain text and stand in the page, not in the
figure; the labels of an axis are the exception, and escaped, because plotly.js reads markup in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.metrics import Estimate
from calibrators.plots._style import percent
from calibrators.plots.classwise import ClassReliability, worst_classes
from calibrators.plots.comparison import COLUMNS, Ranked, ranked
from calibrators.plots.reliability import Bins, Reliability, reliabilities
from calibrators.plots.selective import SETTLED, RiskCoverage, risk_coverages
from calibrators.plots.sets import SetQuality, set_quality
from calibrators.plots.temperature import TemperatureLoss, temperature_loss

Figure = dict[str, Any]
"""What plotly.js draws: {"data": [..], "layout": {..}}, ready for JSON."""

_STROKES = (("--quiet", "dash"), ("--accent", "solid"), ("--over", "dot"), ("--under", "dashdot"))
_PERCENT = "\N{NO-BREAK SPACE}%"
_SQUARE = "aspect-ratio:1"
_LONGEST_LABEL = 26


@dataclass(frozen=True)
class Panel:
    """One figure with its title and a line of what there is to see; `size` is CSS."""

    title: str
    caption: str
    figure: Figure
    size: str


@dataclass(frozen=True)
class Chart:
    """A section of the report; every text is plain, not HTML.

    Attributes
    ----------
    heading, words : its title, and how to read it
    panels : side by side where there is room, none narrower than `panel_width` rem
    key : what the marks mean: style of the mark (a class of `_page.STYLE`) and meaning
    numbers : the table behind the picture: heads, then rows
    left_out : what the picture does not show; empty if it shows all
    """

    heading: str
    words: str
    panels: Sequence[Panel]
    numbers: Sequence[Sequence[str]]
    key: Sequence[tuple[str, str]] = ()
    left_out: str = ""
    panel_width: int = 19


# ---------------------------------------------------------------------------------------------- reliability


def reliability_chart(named: Mapping[str, ArrayLike], y: ArrayLike, *, n_bins: int = 15, level: float = 0.95) -> Chart:
    """`reliability_diagram` for the report; same arguments, same errors."""
    panels = reliabilities(named, y, n_bins, level)
    top = max(float(panel.bins.shares.max()) for panel in panels)
    empty = ", ".join(f"{n_bins - len(panel.bins.counts)} of {n_bins} in “{panel.name}”" for panel in panels)
    return Chart(
        "What it says, and how often it is right",
        "Each dot is a group of answers of like confidence: to the right what the model said, upwards how often it was "
        "right. Honest dots lie on the dashed line. The columns beneath show how many answers are in each group.",
        [_reliability_panel(panel, top) for panel in panels],
        [("", "it said", "it was right", "chance explains", "answers"), *_reliability_rows(panels)],
        key=_reliability_key(level),
        left_out=f"Groups of confidence without an answer have no dot: {empty}.",
    )


def _reliability_panel(panel: Reliability, top: float) -> Panel:
    bins = panel.bins
    figure = _reliability_figure(bins, step=20)
    shares = {
        "type": "bar",
        "x": _percents(bins.left + bins.width / 2),
        "y": _percents(bins.shares),
        "width": _percents(0.86 * bins.width),
        "yaxis": "y2",
        "marker": {"color": "--share"},
        "hovertext": [
            f"{count:,} answers, {percent(share)}" for count, share in zip(bins.counts, bins.shares, strict=True)
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    layout = figure["layout"]
    layout["yaxis"] |= {"domain": [0.25, 1], "title": _title("How often it is right")}
    layout["xaxis"] |= {"anchor": "y2", "title": _title("What the model says (confidence)")}
    layout["yaxis2"] = _axis("Answers", range=[0, 105 * top], domain=[0, 0.19], tickvals=[100 * top])
    layout["yaxis2"]["ticktext"] = [percent(top)]
    figure["data"].append(shares)
    caption = (
        f"says {percent(panel.said)} on average, is right {percent(panel.right)} of the time · "
        f"calibration error {panel.error:.3f}, log loss {_number(panel.log_loss, 3)}"
    )
    return Panel(panel.name, caption, figure, "aspect-ratio:4/5")


def _reliability_figure(bins: Bins, step: int) -> Figure:
    """Band, dashed line, bars and dots; the axes without names, a tick every so many percent."""
    band = {
        "type": "bar",
        "x": _percents(bins.left + bins.width / 2),
        "y": _percents(bins.high - bins.low),
        "base": _percents(bins.low),
        "width": _percents(bins.width),
        "marker": {"color": "--band"},
        "hoverinfo": "skip",
    }
    line = {"x": [0, 100], "y": [0, 100], "line": {"color": "--quiet", "width": 1, "dash": "dash"}}
    over = bins.overconfident
    bars = [_bars(bins, over, "--over"), _bars(bins, ~over, "--under")]
    colours = np.where(over, "--over", "--under").tolist()
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": _percents(bins.said),
        "y": _percents(bins.right),
        "marker": {
            "size": (7 + 6 * np.sqrt(bins.counts / bins.counts.max())).tolist(),
            "color": np.where(bins.within_chance, "--paper", colours).tolist(),
            "line": {"color": colours, "width": 1.8},
            "opacity": 1,
        },
        "cliponaxis": False,
        "hovertext": _dots_in_words(bins),
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    axis: Figure = {"range": [0, 100], "dtick": step, "ticksuffix": _PERCENT}
    data = [band, {"type": "scatter", "mode": "lines", "hoverinfo": "skip", **line}, *bars, dots]
    return {"data": data, "layout": _layout(_axis(**axis), _axis(**axis), barmode="overlay")}


def _bars(bins: Bins, which: NDArray[np.bool_], colour: str) -> Figure:
    """From each dot to the dashed line, one colour; a None between two keeps them apart."""
    said, right = _percents(bins.said[which]), _percents(bins.right[which])
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for one in said for x in (one, one, None)],
        "y": [y for ends in zip(said, right, strict=True) for y in (*ends, None)],
        "line": {"color": colour, "width": 5},
        "opacity": 0.45,
        "cliponaxis": False,
        "hoverinfo": "skip",
    }


def _dots_in_words(bins: Bins) -> list[str]:
    return [
        f"said {percent(said)}, right {percent(right)}<br>{count:,} answers<br>chance explains {_chance(low, high)}"
        for said, right, low, high, count in _dots(bins)
    ]


def _dots(bins: Bins) -> Iterator[tuple[float, float, float, float, int]]:
    """What was said and right, the ends of the band, the answers: dot by dot."""
    return zip(bins.said, bins.right, bins.low, bins.high, bins.counts, strict=True)


def _chance(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def _reliability_rows(panels: Sequence[Reliability]) -> list[tuple[str, ...]]:
    return [
        (panel.name, percent(said), percent(right), _chance(low, high), f"{count:,}")
        for panel in panels
        for said, right, low, high, count in _dots(panel.bins)
    ]


def _reliability_key(level: float) -> list[tuple[str, str]]:
    return [
        ("dot over", "overconfident: beneath the line"),
        ("dot under", "underconfident: above the line"),
        ("band", f"within chance ({100 * level:g}{_PERCENT}); a hollow dot lies in it"),
    ]


# -------------------------------------------------------------------------------------------------- classes


def classwise_chart(
    probabilities: ArrayLike,
    y: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    n_panels: int = 8,
    n_bins: int = 10,
    level: float = 0.95,
) -> Chart:
    """`classwise_reliability` for the report; same arguments, same errors."""
    worst = worst_classes(probabilities, y, class_names, n_panels, n_bins, level)
    n_hidden = worst.n_classes - len(worst.shown)
    return Chart(
        f"Reliability of {worst}",
        "The probability of one class, in all answers, against how often that class came true. A model can be honest "
        "about its first choice and still promise too much of one class and too little of another. The class with the "
        "largest error comes first.",
        [_class_panel(one) for one in worst.shown],
        [
            ("class", "calibration error", "came true"),
            *((one.name, f"{one.error:.4f}", percent(one.share)) for one in worst.shown),
        ],
        key=_reliability_key(level),
        left_out=f"Of the {worst.n_classes} classes, the {n_hidden} with the smallest errors." if n_hidden else "",
        panel_width=12,
    )


def _class_panel(one: ClassReliability) -> Panel:
    figure = _reliability_figure(one.bins, step=50)
    figure["layout"]["margin"] |= {"l": 64, "r": 22, "b": 52}
    figure["layout"]["xaxis"]["title"] = _title("probability", size=11)
    figure["layout"]["yaxis"]["title"] = _title("came true", size=11)
    return Panel(one.name, f"error {one.error:.4f} · came true {percent(one.share)}", figure, "aspect-ratio:1")


# ------------------------------------------------------------------------------------------- risk and coverage


def risk_coverage_chart(named: Mapping[str, ArrayLike], y: ArrayLike) -> Chart:
    """`risk_coverage_diagram` for the report; same arguments, same errors."""
    curves = risk_coverages(named, y)
    last = curves[-1]
    return Chart(
        "What is gained by declining the unsure answers",
        "Read from the right: there every row is answered. Moving left, the rows that the model is least sure of are "
        "declined, for instance handed to a person, and fewer of the remaining answers are wrong.",
        [Panel("Risk and coverage", _risk_in_words(last), _risk_figure(curves), "height:24rem")],
        [
            ("rows answered, surest first", *(f"wrong: {curve.name}" for curve in curves)),
            *_risk_rows(curves),
        ],
        key=[
            (f"line stroke-{dash} {colour[2:]}", f"{curve.name}: mean risk (AURC) {curve.mean_risk:.4f}")
            for curve, (colour, dash) in zip(curves, cycle(_STROKES))
        ],
        left_out=f"Risk and coverage begin at {percent(SETTLED)} of the rows: before that, luck decides.",
        panel_width=30,
    )


def _risk_in_words(curve: RiskCoverage) -> str:
    return (
        f"{curve.name}: wrong {percent(curve.every)} of the time if it answers every row, "
        f"{percent(curve.half)} if it answers the surest half"
    )


def _risk_figure(curves: Sequence[RiskCoverage]) -> Figure:
    lines = [_risk_line(curve, colour, dash) for curve, (colour, dash) in zip(curves, cycle(_STROKES))]
    highest = max(0.01, *(float(curve.risk.max()) for curve in curves))
    across: Figure = {"range": [0, 100], "dtick": 20, "ticksuffix": _PERCENT, "hoverformat": ".0f"}
    x = _axis("Rows answered, surest first (coverage)", **across)
    y = _axis("Wrong among them (risk)", range=[0, 110 * highest], ticksuffix=_PERCENT)
    return {"data": lines, "layout": _layout(x, y, hovermode="x unified")}


def _risk_line(curve: RiskCoverage, colour: str, dash: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _label(curve.name),
        "x": _percents(curve.coverage),
        "y": _percents(curve.risk),
        "line": {"color": colour, "dash": dash, "width": 2.2},
        "hovertemplate": f"%{{y:.1f}}{_PERCENT} wrong",
    }


def _risk_rows(curves: Sequence[RiskCoverage]) -> list[tuple[str, ...]]:
    """The risks at the drawn points nearest to 10 %, 20 %, .. of the rows."""
    at = [np.abs(curves[0].coverage - tenth / 10).argmin() for tenth in range(1, 11)]
    return [(percent(curves[0].coverage[i]), *(percent(curve.risk[i]) for curve in curves)) for i in dict.fromkeys(at)]


# -------------------------------------------------------------------------------------------- prediction sets


def set_chart(
    by_level: Mapping[float, ArrayLike],
    y: ArrayLike,
    *,
    confidence_level: float = 0.9,
    class_names: Sequence[str] | None = None,
    n_worst: int = 6,
    level: float = 0.95,
) -> Chart:
    """`set_diagram` for the report; same arguments, same errors."""
    quality = set_quality(by_level, y, confidence_level, class_names, n_worst, level)
    asked, curve = percent(confidence_level), quality.curve
    hidden = quality.n_classes - len(quality.by_class)
    size = f"{curve.sizes[quality.place]:.2f} labels on average, {percent(quality.shares[0])} of the sets empty"
    return Chart(
        "Sets of answers that hold the right one",
        "Instead of one answer the model gives a set of them, as large as it takes to hold the right one as often as "
        "asked for. Honest sets lie on the dashed line. That is a promise for all rows together: the last panel shows "
        "whom it fails.",
        [
            Panel("Coverage", f"asked for {asked}, the label is {quality.held}", _coverage_figure(quality), _SQUARE),
            Panel("Size", f"{size}, at {asked}", _size_figure(quality), _SQUARE),
            Panel(
                "By size and class", f"classes are {quality.gap:.3f} off on average", _strata_figure(quality), _SQUARE
            ),
        ],
        [
            ("asked for", "held", "interval", "labels"),
            *(
                (percent(one), percent(found.value), _chance(found.low, found.high), f"{labels:.2f}")
                for one, found, labels in zip(curve.levels, curve.coverage, curve.sizes, strict=True)
            ),
        ],
        key=[
            ("dot over", "fewer are held than was asked for"),
            ("dot under", "more are held"),
            ("dot ink", "as asked, as far as these rows can tell"),
            ("line share", f"{100 * level:g}{_PERCENT} interval"),
        ],
        left_out=f"Coverage by class leaves out the {hidden} classes that are covered best." if hidden > 0 else "",
    )


def _coverage_figure(quality: SetQuality) -> Figure:
    curve = quality.curve
    line: Figure = {"type": "scatter", "mode": "lines", "x": [0, 100], "y": [0, 100], "hoverinfo": "skip"}
    line["line"] = {"color": "--quiet", "width": 1, "dash": "dash"}
    dots = _estimates(curve.coverage, curve.levels, "y") | {"x": _percents(curve.levels)}
    dots["hovertext"] = [
        f"asked for {percent(one)}, held {percent(found.value)}<br>{labels:.2f} labels"
        for one, found, labels in zip(curve.levels, curve.coverage, curve.sizes, strict=True)
    ]
    axis: Figure = {"range": [0, 100], "dtick": 20, "ticksuffix": _PERCENT}
    x, y = _axis("Confidence level asked for", **axis), _axis("Sets that hold the label (coverage)", **axis)
    return {"data": [line, dots], "layout": _layout(x, y)}


def _size_figure(quality: SetQuality) -> Figure:
    bars = {
        "type": "bar",
        "x": list(range(len(quality.shares))),
        "y": _percents(quality.shares),
        "marker": {"color": "--share"},
        "hovertext": [
            f"{name} labels<br>{percent(share)} of rows"
            for name, share in zip(quality.bar_names, quality.shares, strict=True)
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    shown = list(range(0, len(quality.shares), -(-len(quality.shares) // 6)))
    x = _axis("Labels in the set", tickvals=shown, ticktext=[quality.bar_names[place] for place in shown])
    return {"data": [bars], "layout": _layout(x, _axis("Rows", ticksuffix=_PERCENT, rangemode="tozero"))}


def _strata_figure(quality: SetQuality) -> Figure:
    strata = quality.by_size + quality.by_class
    asked = np.full(len(strata), quality.confidence_level)
    dots = _estimates([stratum.coverage for stratum in strata], asked, "x") | {"y": list(range(len(strata)))}
    dots["hovertext"] = [
        f"{_label(one.name)}<br>held {percent(one.coverage.value)} of {one.n_rows:,} rows" for one in strata
    ]
    line: Figure = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    line["line"] = {"color": "--quiet", "width": 1, "dash": "dash"}
    line |= {"x": [100 * quality.confidence_level] * 2, "y": [-0.5, len(strata) - 0.5]}
    names: Figure = {"tickvals": list(range(len(strata))), "ticktext": [_label(stratum.name) for stratum in strata]}
    y = _axis(range=[len(strata) - 0.5, -0.5], automargin=True, **names)
    lowest = min(quality.confidence_level, *(stratum.coverage.low for stratum in strata))
    x = _axis("Coverage", range=[math.floor(10 * lowest - 0.2) * 10, 100], nticks=4, ticksuffix=_PERCENT)
    return {"data": [line, dots], "layout": _layout(x, y)}


def _estimates(estimates: Sequence[Estimate], asked: NDArray[np.float64], axis: str) -> Figure:
    """Dots along one axis with their intervals, coloured by how they compare with what was asked for."""
    values = np.array([one.value for one in estimates])
    ends = {
        "array": _percents(np.array([one.high for one in estimates]) - values),
        "arrayminus": _percents(values - np.array([one.low for one in estimates])),
    }
    colours = [
        "--over" if one.high < wanted else "--under" if one.low > wanted else "--ink"
        for one, wanted in zip(estimates, asked, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        axis: _percents(values),
        f"error_{axis}": {"type": "data", "symmetric": False, "color": "--share", "thickness": 4, "width": 0, **ends},
        "marker": {"color": colours, "size": 9, "opacity": 1},
        "cliponaxis": False,
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


# -------------------------------------------------------------------------------------------------- comparison


def comparison_chart(
    scores: Mapping[str, Mapping[str, Estimate]],
    *,
    level: float = 0.95,
    heading: str = "Calibrators compared",
    judged_on: str = "",
    skipped: Mapping[str, str] | None = None,
) -> Chart:
    """`calibrator_comparison` for the report; same errors.

    Parameters
    ----------
    scores, level : as there
    heading : of the section
    judged_on : a sentence that says which rows the scores are of
    skipped : calibrators that were not compared, and why
    """
    rows = ranked(scores)
    missing = "; ".join(f"{name} ({reason})" for name, reason in (skipped or {}).items())
    columns = ([_with_interval(one) for one in column] for column in rows.columns.values())
    numbers = zip(rows.names, *columns, strict=True)
    return Chart(
        heading,
        f"The best by log loss stands at the top; in both panels further left is better. {judged_on}".strip(),
        [_comparison_panel(rows, column, title) for column, title in COLUMNS.items()],
        [("calibrator", *COLUMNS.values()), *numbers],
        key=[
            ("dot ink", "the best of a panel"),
            ("line share", f"{100 * level:g}{_PERCENT} interval"),
            ("band", "interval of the best: who reaches into it may be as good"),
        ],
        left_out=f"{heading}: not compared were {missing}." if missing else "",
        panel_width=22,
    )


def _comparison_panel(rows: Ranked, column: str, title: str) -> Panel:
    estimates = rows.columns[column]
    best = min(estimates, key=lambda estimate: estimate.value)
    colours = ["--ink" if estimate is best else "--quiet" for estimate in estimates]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [_finite(estimate.value) for estimate in estimates],
        "y": list(range(len(estimates))),
        "marker": {"color": colours, "size": 10},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_finite(estimate.high - estimate.value) for estimate in estimates],
            "arrayminus": [_finite(estimate.value - estimate.low) for estimate in estimates],
            "color": "--share",
            "thickness": 4,
            "width": 0,
        },
        "hovertext": [
            f"{_label(name)}<br>{_with_interval(one)}" for name, one in zip(rows.names, estimates, strict=True)
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    n = len(estimates)
    x = _axis(nticks=4)
    y = _axis(range=[n - 0.5, -0.5], tickvals=list(range(n)), ticktext=[_label(name) for name in rows.names])
    y |= {"showgrid": False, "automargin": True}
    layout = _layout(x, y, shapes=_band_of(best), annotations=_values(estimates, colours))
    layout["margin"] |= {"r": 70, "b": 30}
    return Panel(title, "lower is better", {"data": [dots], "layout": layout}, f"height:{2.2 * n + 2.5:.1f}rem")


def _band_of(best: Estimate) -> list[Figure]:
    if not best.has_interval:
        return []
    ends = {"x0": best.low, "x1": best.high, "y0": 0, "y1": 1, "yref": "paper"}
    return [{"type": "rect", **ends, "fillcolor": "--band", "line": {"width": 0}, "layer": "below"}]


def _values(estimates: Sequence[Estimate], colours: Sequence[str]) -> list[Figure]:
    place = {"xref": "paper", "x": 1, "xanchor": "left", "xshift": 10, "showarrow": False}
    return [
        {**place, "y": row, "text": _number(one.value, 4), "font": {"color": colour, "size": 13}}
        for row, (one, colour) in enumerate(zip(estimates, colours, strict=True))
    ]


def _with_interval(estimate: Estimate) -> str:
    ends = f" [{estimate.low:.4f}, {estimate.high:.4f}]" if estimate.has_interval else ""
    return _number(estimate.value, 4) + ends


# -------------------------------------------------------------------------------------------------- temperature


def temperature_chart(logits: ArrayLike, y: ArrayLike) -> Chart:
    """`temperature_curve` for the report; same arguments, same errors."""
    curve = temperature_loss(logits, y)
    return Chart(
        "How far one number alone would help",
        "Temperature scaling, the simplest calibrator, divides what the model computes by one number T. The lowest "
        "point is the best T for these rows: beyond 1 the model claims too much, beneath 1 too little. The drop from "
        "T = 1 is what this one number gains.",
        [Panel("Log loss over temperature", f"{curve}; as the model is, T = 1: {curve.before:.4f}",
               _temperature_figure(curve), "height:22rem")],
        [
            ("temperature T", "log loss"),
            *((f"{t:.3g}", f"{loss:.4f}") for t, loss in zip(curve.temperatures[::5], curve.losses[::5], strict=True)),
        ],
        key=[("line over", "overconfident"), ("line under", "underconfident")],
        left_out="The curve of the temperature is of these very rows; a fit finds its T on rows of its own.",
        panel_width=30,
    )  # fmt: skip


def _temperature_figure(curve: TemperatureLoss) -> Figure:
    data = [
        _temperature_line(curve, curve.temperatures <= curve.best, "--over"),
        _temperature_line(curve, curve.temperatures >= curve.best, "--under"),
        _temperature_mark(curve, 1.0, curve.before, "--paper", named=curve.names_both),
    ]
    if curve.is_drawn:
        data.append(_temperature_mark(curve, curve.best, curve.after, "--ink", named=True))
    low, high = float(curve.losses.min()), float(curve.losses.max())
    ends = [math.log10(curve.temperatures[0]), math.log10(curve.temperatures[-1])]
    ticks = {"tickvals": curve.ticks, "ticktext": [f"{t:g}" for t in curve.ticks]}
    x = _axis("Temperature T", type="log", range=ends, **ticks)
    y = _axis("Log loss", range=[low - 0.12 * (high - low), high])
    return {"data": data, "layout": _layout(x, y)}


def _temperature_line(curve: TemperatureLoss, side: NDArray[np.bool_], colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": curve.temperatures[side].tolist(),
        "y": curve.losses[side].tolist(),
        "line": {"color": colour, "width": 2.6},
        "hovertemplate": "T = %{x:.3g}<br>log loss %{y:.4f}<extra></extra>",
    }


def _temperature_mark(curve: TemperatureLoss, t: float, loss: float, fill: str, *, named: bool) -> Figure:
    # Beneath the curve, which is convex, and away from the best temperature's name.
    beneath = "bottom left" if curve.best > 1 else "bottom right"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [t],
        "y": [loss],
        "text": [f"  T = {t:.3g}  " if named else ""],
        "textposition": "top center" if t == curve.best else beneath,
        "textfont": {"color": "--ink", "size": 13},
        "marker": {"color": fill, "size": 10, "line": {"color": "--ink", "width": 2}},
        "cliponaxis": False,
        "hovertemplate": "T = %{x:.3g}<br>log loss %{y:.4f}<extra></extra>",
    }


# -------------------------------------------------------------------------------------------------- figures


def _layout(xaxis: Figure, yaxis: Figure, **more: Any) -> Figure:
    return {
        "xaxis": xaxis,
        "yaxis": yaxis,
        "margin": {"l": 70, "r": 26, "t": 12, "b": 56},
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", "color": "--quiet"},
        "paper_bgcolor": "--clear",
        "plot_bgcolor": "--clear",
        "hoverlabel": {"bgcolor": "--paper", "bordercolor": "--quiet", "font": {"color": "--ink"}, "align": "left"},
        "hovermode": "closest",
        "dragmode": False,
        "showlegend": False,
        **more,
    }


def _axis(name: str = "", **more: Any) -> Figure:
    """A quiet axis that does not zoom: a finger that scrolls the page must not move the chart."""
    look = {"gridcolor": "--faint", "zeroline": False, "fixedrange": True, "tickangle": 0}
    # Ticks without colour keep the labels of both axes apart where they meet.
    look |= {"ticks": "outside", "ticklen": 7, "tickcolor": "--clear"}
    return {**look, **({"title": _title(name)} if name else {}), **more}


def _title(name: str, size: int = 13) -> Figure:
    return {"text": name, "font": {"size": size, "color": "--ink"}, "standoff": 8}


def _percents(shares: NDArray[np.float64]) -> list[float]:
    return [float(share) for share in 100 * shares]


def _number(value: float, digits: int) -> str:
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def _finite(value: float) -> float | None:
    """For JSON, which has no name for infinity or "not a number": None, drawn as nothing."""
    return value if math.isfinite(value) else None


def _label(name: str) -> str:
    """A name for plotly.js, which reads markup; a long one is cut, the table has it whole."""
    return escape(name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…")
