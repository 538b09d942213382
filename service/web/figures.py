"""The page's charts: plain objects that plotly.js draws, as in the HTML report, with names of colours for colours.

What the model says of itself is grey, hollow and dashed; what is served is violet, full and solid; orange is where too
much was promised, and nothing else is. Times are milliseconds since 1970, which the script makes the reader's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.plots._style import percent
from service.drift.states import RAW, SERVED, Alarm, MonitorState
from service.drift.summary import MOST_SET_SIZE, Point, Sums
from service.web.words import interval

Figure = dict[str, Any]

RAW_COLOUR, SERVED_COLOUR = "--quiet", "--accent"
LEAST_LABELS, LEAST_IN_BIN = 60, 10
"""Labels of a stretch, and of a group of like confidence, that gets a point of its own: with fewer chance draws it."""
NBSP = "\N{NO-BREAK SPACE}"
_TIMES = [
    {"dtickrange": [None, 60_000], "value": "%H:%M:%S"},
    {"dtickrange": [60_000, 86_399_999], "value": "%H:%M"},
    {"dtickrange": [86_399_999, None], "value": "%-d %b"},
]
"""How a tick is written, by the milliseconds between two."""


def reliability(total: Sums, *, calibrated: bool) -> Figure:
    """What was said against what came true; the grey band is where an honest model's dots would lie."""
    bins = total.curve(SERVED if calibrated else RAW)
    filled = bins.counts >= LEAST_IN_BIN
    low, high = (values[filled] for values in bins.consistency_band())
    width = np.diff(bins.edges)[filled]
    band = {
        "type": "bar",
        "x": _percents(bins.edges[:-1][filled] + width / 2),
        "y": _percents(high - low),
        "base": _percents(low),
        "width": _percents(width),
        "marker": {"color": "--band"},
        "hoverinfo": "skip",
    }
    line: Figure = {"type": "scatter", "mode": "lines", "x": [0, 100], "y": [0, 100], "hoverinfo": "skip"}
    line["line"] = {"color": "--quiet", "width": 1, "dash": "dot"}
    dots = [_dots(total, RAW)] + ([_dots(total, SERVED)] if calibrated else [])
    share: Figure = {"range": [0, 100], "dtick": 20, "ticksuffix": f"{NBSP}%"}
    x, y = _axis("what it says", **share), _axis("how often it is right", **share)
    layout = _layout(x, y, barmode="overlay", hovermode="closest", bargap=0)
    layout["margin"] |= {"l": 70, "r": 24, "b": 52}
    return {"data": [band, line, *dots], "layout": layout}


def _dots(total: Sums, which: str) -> Figure:
    curve = total.curve(which)
    filled = curve.counts >= LEAST_IN_BIN
    counts, said, right = curve.counts[filled], curve.confidence[filled], curve.accuracy[filled]
    colour = RAW_COLOUR if which == RAW else SERVED_COLOUR
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": _percents(said),
        "y": _percents(right),
        "line": {"color": colour, "width": 1.5, "dash": "dash" if which == RAW else "solid"},
        "marker": {
            "size": (6 + 8 * np.sqrt(counts / counts.max(initial=1))).tolist(),
            "color": "--paper" if which == RAW else colour,
            "line": {"color": colour, "width": 1.8},
            "opacity": 1,
        },
        "cliponaxis": False,
        "hovertext": [
            f"{'the model' if which == RAW else 'as served'} said {percent(one)}<br>right {percent(came)} "
            f"({interval(*wilson(came * count, count))})<br>{count:,} answers with labels"
            for one, came, count in zip(said.tolist(), right.tolist(), counts.tolist(), strict=True)
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def confidences(total: Sums, *, calibrated: bool) -> Figure:
    """How sure the answers were, of all rows, labelled or not."""
    middles = (np.arange(20) + 0.5) * 5
    raw, served = (
        total[f"{which}.answers"].reshape(20, 3).sum(axis=1) / max(1, total.answers) for which in (RAW, SERVED)
    )
    bars = _bars(middles, served if calibrated else raw, SERVED_COLOUR if calibrated else RAW_COLOUR, 4.4)
    bars["hovertext"] = [
        f"{middle - 2.5:g} to {middle + 2.5:g}{NBSP}%<br>as served {percent(now)}, the model itself {percent(before)}"
        for middle, now, before in zip(middles.tolist(), served.tolist(), raw.tolist(), strict=True)
    ]
    steps = {
        "type": "scatter",
        "mode": "lines",
        "x": [edge for middle in middles.tolist() for edge in (middle - 2.5, middle + 2.5)],
        "y": [value for one in _percents(raw) for value in (one, one)],
        "line": {"color": RAW_COLOUR, "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
    }
    x = _axis(range=[0, 100], dtick=20, ticksuffix=f"{NBSP}%")
    y = _axis(ticksuffix=f"{NBSP}%", rangemode="tozero", nticks=4)
    return {"data": [bars, *([steps] if calibrated else [])], "layout": _layout(x, y, hovermode="closest")}


def set_sizes(total: Sums) -> Figure:
    sizes = np.arange(MOST_SET_SIZE + 1)
    shares = total["set_sizes"] / max(1, total.sets)
    last = max(3, int(np.flatnonzero(shares)[-1]) if shares.any() else 0)
    names = [f"{size}" if size < MOST_SET_SIZE else f"{size}+" for size in sizes.tolist()][: last + 1]
    bars = _bars(sizes[: last + 1], shares[: last + 1], SERVED_COLOUR, 0.8)
    bars["hovertext"] = [f"{name} labels<br>{percent(one)} of sets" for name, one in zip(names, shares, strict=False)]
    x = _axis(tickvals=sizes[: last + 1].tolist(), ticktext=names)
    y = _axis(ticksuffix=f"{NBSP}%", rangemode="tozero", nticks=4)
    return {"data": [bars], "layout": _layout(x, y, hovermode="closest")}


# ------------------------------------------------------------------------------------------------ over time


def error_over_time(points: Sequence[Point], alarms: Sequence[Alarm], *, calibrated: bool) -> Figure:
    """Calibration error; in the grey is what chance alone explains."""
    points = enough(points)
    chance = _curve(points, [point.sums.chance_error(SERVED if calibrated else RAW) for point in points])
    chance |= {"line": {"width": 0, "color": "--clear"}, "fill": "tozeroy", "fillcolor": "--band", "hoverinfo": "skip"}
    chance.pop("hovertemplate")
    lines = [_series(points, which, [p.sums.calibration_error(which) for p in points]) for which in _shown(calibrated)]
    return _over_time([chance, *lines], alarms, ticksuffix=f"{NBSP}%")


def right_over_time(points: Sequence[Point], alarms: Sequence[Alarm], *, calibrated: bool) -> Figure:
    """How often the answers were right, with its interval, and what was said of them."""
    points = enough(points)
    ends = [wilson(p.sums["served.right"].sum(), p.sums.labels) for p in points]
    band = _band(points, ends)
    said = [
        _series(points, which, [p.sums[f"{which}.said"].sum() / p.sums.labels for p in points], "said")
        for which in _shown(calibrated)
    ]
    right = _curve(points, [p.sums.accuracy(SERVED) for p in points])
    right |= {"line": {"color": "--ink", "width": 2.2}, "hovertemplate": f"right %{{y:.1f}}{NBSP}%<extra></extra>"}
    figure = _over_time([*band, *said, right], alarms, ticksuffix=f"{NBSP}%")
    figure["layout"]["yaxis"].pop("rangemode")
    return figure


def loss_over_time(points: Sequence[Point], alarms: Sequence[Alarm], *, calibrated: bool) -> Figure:
    points = enough(points)
    lines = [
        _series(points, which, [p.sums.log_loss(which) / 100 for p in points], unit="") for which in _shown(calibrated)
    ]
    return _over_time(lines, alarms)


def coverage_over_time(points: Sequence[Point], alarms: Sequence[Alarm], confidence_level: float) -> Figure:
    """How often the sets held the label, with its interval; the dashed line is what was asked for."""
    points = enough([point for point in points if point.sums["sets"][0]])
    ends = [wilson(p.sums["covered"][0], p.sums["sets"][0]) for p in points]
    held = _curve(points, [p.sums.coverage for p in points])
    held |= {"line": {"color": SERVED_COLOUR, "width": 2.2}, "hovertemplate": f"held %{{y:.1f}}{NBSP}%<extra></extra>"}
    figure = _over_time([*_band(points, ends), held], alarms, ticksuffix=f"{NBSP}%")
    figure["layout"]["yaxis"].pop("rangemode")
    figure["layout"]["shapes"].append(_level(100 * confidence_level, "--ink"))
    return figure


def answers_over_time(points: Sequence[Point], alarms: Sequence[Alarm]) -> Figure:
    """Answers of each stretch, and those of them whose label is known by now."""
    width = [point.until_ms - point.since_ms for point in points]
    middle = [(point.since_ms + point.until_ms) / 2 for point in points]

    def bars(counts: list[int], colour: str, what: str) -> Figure:
        return {
            "type": "bar",
            "x": middle,
            "y": counts,
            "width": [0.86 * one for one in width],
            "marker": {"color": colour},
            "hovertemplate": f"%{{y:,}} {what}<extra></extra>",
        }

    data = [
        bars([p.sums.answers for p in points], "--share", "answers"),
        bars([p.sums.labels for p in points], SERVED_COLOUR, "with a label"),
    ]
    figure = _over_time(data, alarms)
    figure["layout"] |= {"barmode": "overlay"}
    return figure


def evidence(monitor: MonitorState) -> Figure:
    """A monitor's statistic against its threshold."""
    ringing = monitor.statistic >= monitor.threshold or bool(monitor.alarms)
    colour = "--over" if ringing else SERVED_COLOUR
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [time for time, _ in monitor.history],
        "y": [_finite(value) for _, value in monitor.history],
        "line": {"color": colour, "width": 1.8},
        "hovertemplate": "%{y:.2f}<extra></extra>",
    }
    values = [value for _, value in monitor.history if math.isfinite(value)]
    highest, lowest = max([monitor.threshold, *values]), min([0.0, *values])
    figure = _over_time([line], [])
    figure["layout"]["yaxis"] |= {"range": [lowest, 1.12 * highest], "nticks": 3, "tickvals": [0, monitor.threshold]}
    figure["layout"]["yaxis"]["ticktext"] = ["0", f"{monitor.threshold:.3g}"]
    figure["layout"]["shapes"].append(_level(monitor.threshold, "--over"))
    figure["layout"]["margin"] |= {"t": 8, "b": 24}
    figure["layout"]["xaxis"]["nticks"] = 3
    return figure


def enough(points: Sequence[Point]) -> list[Point]:
    """Points joined until each has labels enough to say something."""
    joined: list[Point] = []
    open_, since = Sums(), 0
    for point in points:
        since = since or point.since_ms
        open_.add(point.sums)
        if open_.labels >= LEAST_LABELS:
            joined.append(Point(since, point.until_ms, open_))
            open_, since = Sums(), 0
    return joined


def wilson(hits: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, of level 95 %."""
    if not trials:
        return 0.0, 1.0
    share, spread = hits / trials, z * z / trials
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


def _shown(calibrated: bool) -> tuple[str, ...]:
    return (RAW, SERVED) if calibrated else (RAW,)


def _series(points: Sequence[Point], which: str, values: list[float], verb: str = "", unit: str = f"{NBSP}%") -> Figure:
    name = "the model" if which == RAW else "as served"
    served = which == SERVED
    line = {"color": SERVED_COLOUR if served else RAW_COLOUR, "width": 2.2 if served else 1.6}
    line["dash"] = "solid" if served else "dash"
    digits = ".1f" if unit else ".3f"
    words = f"{name} {verb}".strip()
    return _curve(points, values) | {"line": line, "hovertemplate": f"{words} %{{y:{digits}}}{unit}<extra></extra>"}


def _curve(points: Sequence[Point], values: list[float]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "x": [(point.since_ms + point.until_ms) / 2 for point in points],
        "y": [_finite(100 * value) for value in values],
        "marker": {"size": 8},
        "hovertemplate": "",
    }


def _band(points: Sequence[Point], ends: Sequence[tuple[float, float]]) -> list[Figure]:
    """Between two curves."""
    edges = []
    for place in (0, 1):
        edge = _curve(points, [pair[place] for pair in ends]) | {"hoverinfo": "skip"}
        edge.pop("hovertemplate")
        edges.append(edge | {"mode": "lines", "line": {"width": 0, "color": "--clear"}})
    edges[1] |= {"fill": "tonexty", "fillcolor": "--band"}
    return edges


def _over_time(data: list[Figure], alarms: Sequence[Alarm], **axis: Any) -> Figure:
    x = _axis(type="date", showgrid=False, nticks=5, hoverformat="%-d %b, %H:%M:%S", tickformatstops=_TIMES)
    y = _axis(rangemode="tozero", nticks=5, **axis)
    layout = _layout(x, y, hovermode="x unified", shapes=[shape for alarm in alarms for shape in _marks(alarm)])
    return {"data": data, "layout": layout | {"meta": {"times": True}}}


def _marks(alarm: Alarm) -> list[Figure]:
    """Where it rang, and from when on the change is reckoned."""
    upright = {"yref": "paper", "y0": 0, "y1": 1}
    rang = {
        "type": "line",
        **upright,
        "x0": alarm.time_ms,
        "x1": alarm.time_ms,
        "line": {"color": "--over", "width": 1.5},
    }
    if not alarm.since_ms or alarm.since_ms >= alarm.time_ms:
        return [rang]
    between = {"type": "rect", **upright, "x0": alarm.since_ms, "x1": alarm.time_ms, "fillcolor": "--over"}
    begun = {"type": "line", **upright, "x0": alarm.since_ms, "x1": alarm.since_ms}
    return [
        between | {"opacity": 0.12, "line": {"width": 0}, "layer": "below"},
        begun | {"line": {"color": "--over", "width": 1.5, "dash": "dot"}},
        rang,
    ]


def _level(value: float, colour: str) -> Figure:
    line = {"color": colour, "width": 1.2, "dash": "dash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line}


def _bars(x: NDArray[Any], shares: NDArray[np.float64], colour: str, width: float) -> Figure:
    return {
        "type": "bar",
        "x": x.tolist(),
        "y": _percents(shares),
        "width": [width] * len(x),
        "marker": {"color": colour},
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _layout(xaxis: Figure, yaxis: Figure, **more: Any) -> Figure:
    font = "Inter, system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif"
    return {
        "xaxis": xaxis,
        "yaxis": yaxis,
        "margin": {"l": 46, "r": 14, "t": 10, "b": 28},
        "font": {"family": font, "size": 12, "color": "--quiet"},
        "paper_bgcolor": "--clear",
        "plot_bgcolor": "--clear",
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--ink"}, "align": "left"},
        "dragmode": False,
        "showlegend": False,
        **more,
    }


def _axis(name: str = "", **more: Any) -> Figure:
    """A quiet axis that does not zoom: a finger that scrolls the page must not move the chart."""
    look = {"gridcolor": "--faint", "zeroline": False, "fixedrange": True, "tickangle": 0, "ticklen": 6}
    look |= {"ticks": "outside", "tickcolor": "--clear"}
    title = {"title": {"text": name, "font": {"size": 12, "color": "--quiet"}, "standoff": 6}} if name else {}
    return {**look, **title, **more}


def _percents(shares: NDArray[np.float64]) -> list[float]:
    return [float(share) for share in 100 * shares]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
