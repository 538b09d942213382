"""The HTML report: what calibration did to a model, for a reader who has never heard of a calibration error.

One file with nothing to load: styles, charts and the script that draws them (plotly.js, once) are inline, fonts are the
reader's own, and light or dark follows the reader's system. Where scripts are off, the words and the numbers stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from calibrators.metrics import Estimate
from calibrators.metrics.calibration import top_label
from calibrators.metrics.checks import check_labelled
from calibrators.plots._page import DRAW, NO_SCRIPT, page
from calibrators.plots._plotly import plotly_script
from calibrators.plots.charts import Chart, Panel

COLUMNS = {
    "expected_calibration_error": ("Calibration error", "lower is better"),
    "log_loss": ("Log loss", "lower is better"),
    "brier_score": ("Brier score", "lower is better"),
    "accuracy": ("Accuracy", "higher is better"),
}
"""The scores in the table: heading, and which way is up."""

_NEARBY = 0.05
"""A confidence of 88 % is "about 90 %", one of 84 % is not."""

_ENOUGH = 50
"""Predictions that a share in the first sentence should be counted over."""


@dataclass(frozen=True)
class Share:
    """How many of so many predictions were right; `right` with its Wilson interval, all NaN where there are none."""

    n_rows: int
    right: Estimate


@dataclass(frozen=True)
class Example:
    """What one confidence is worth before and after calibration: `telling_example` finds it.

    Attributes
    ----------
    confidence : the one spoken of, such as 0.9
    before, after : the predictions made with about that confidence, uncalibrated and calibrated; not the same rows
    overconfident : whether the uncalibrated model, over all rows, claims more than it holds
    level : confidence level of the intervals
    """

    confidence: float
    before: Share
    after: Share
    overconfident: bool
    level: float = 0.95


def telling_example(
    before: ArrayLike, after: ArrayLike, y: ArrayLike, *, confidence: float = 0.9, level: float = 0.95
) -> Example:
    """How often predictions made with about that confidence were right, before and after calibration.

    Where either makes too few such predictions, the nearest multiple of 10 % with enough of them is spoken of instead;
    where none has enough, the one with the most.

    Parameters
    ----------
    before, after : (n_samples, n_classes) probabilities of the same rows, uncalibrated and calibrated
    y : (n_samples,) class indices 0 .. n_classes-1
    confidence : the one to speak of
    level : confidence level of the intervals of both shares

    Examples
    --------
    >>> y = np.repeat([0, 1], [60, 40])
    >>> z = np.tile([[0.9, 0.1], [0.6, 0.4]], (50, 1))
    >>> example = telling_example(z, z, y)
    >>> example.confidence, example.before.n_rows, example.before.right.value
    (0.9, 50, 0.6)
    """
    labels = check_labelled(before, y)[1]
    said, right = top_label(*check_labelled(before, y))
    said_after, right_after = top_label(check_labelled(after, y)[0], labels)
    levels = [confidence, *(tenth / 10 for tenth in range(11))]

    def worth(candidate: float) -> tuple[int, int, float]:
        n_before, n_after = (min(_ENOUGH, int(_near(values, candidate).sum())) for values in (said, said_after))
        return min(n_before, n_after), n_before, -abs(candidate - confidence)

    chosen = max(levels, key=worth)
    return Example(
        chosen,
        _share(right[_near(said, chosen)], level),
        _share(right_after[_near(said_after, chosen)], level),
        overconfident=bool(said.mean(dtype=np.float64) > right.mean()),
        level=level,
    )


def _near(said: NDArray[np.floating], confidence: float) -> NDArray[np.bool_]:
    return (confidence - _NEARBY < said) & (said <= confidence + _NEARBY)


def _share(right: NDArray[np.float64], level: float) -> Share:
    if not len(right):
        return Share(0, Estimate(math.nan))
    ends = binomtest(int(right.sum()), len(right)).proportion_ci(level, method="wilson")
    return Share(len(right), Estimate(float(right.mean()), float(ends.low), float(ends.high)))


def html_report(
    title: str,
    scores: Mapping[str, Mapping[str, Estimate]],
    *,
    baseline: str,
    served: str,
    example: Example,
    n_calibration_rows: int,
    n_test_rows: int,
    charts: Sequence[Chart] = (),
    level: float = 0.95,
) -> str:
    """One self-contained HTML page: the verdict in words, the charts, the scores, what is not shown, a glossary.

    Parameters
    ----------
    title : heading, for instance the model's name
    scores : what `calibrators.metrics.scores` gave for each calibrator by name, on rows that none was fitted on
    baseline : the name in `scores` of the uncalibrated model
    served : the name in `scores` of the calibrator that serves; `baseline` if none does
    example : what to say in the first sentence
    n_calibration_rows, n_test_rows : rows the calibrators were fitted on, and rows they are judged on
    charts : what `reliability_chart` and its relatives made of the same rows, in the order of the page
    level : confidence level of the intervals in `scores`

    Raises
    ------
    ValueError
        if `baseline` or `served` is not in `scores`, or a score of `COLUMNS` is missing
    ImportError
        if there are charts and plotly is not installed
    """
    for name in (baseline, served):
        if name not in scores:
            raise ValueError(f"scores must hold {name!r}, got {sorted(scores)}")
    for name, own in scores.items():
        if missing := sorted(set(COLUMNS) - set(own)):
            raise ValueError(f"scores of {name!r} lack {missing}")
    before, after = (scores[name]["expected_calibration_error"] for name in (baseline, served))
    calibrated = served != baseline
    body = _BODY.format(
        title=escape(title),
        headline=_headline(example, before, after if calibrated else None),
        example=_example_in_words(example, calibrated),
        counted=_counted_in_words(example, calibrated),
        errors=_errors_in_words(before, after if calibrated else None, n_test_rows),
        no_script=NO_SCRIPT if charts else "",
        charts="".join(map(_section, charts)),
        table=_table(scores, served),
        rows=f"Fitted on {n_calibration_rows:,} labelled rows, judged on {n_test_rows:,} others. "
        f"In brackets: the {100 * level:g}\N{NO-BREAK SPACE}% interval.",
        left_out="".join(f"<li>{escape(chart.left_out)}</li>" for chart in charts if chart.left_out),
        glossary="".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in _GLOSSARY.items()),
    )
    return page(escape(title), body, scripts=(plotly_script(), DRAW) if charts else ())


def _headline(example: Example, before: Estimate, after: Estimate | None) -> str:
    """The verdict in a sentence or two. An interval that reaches 0 means: chance alone could explain the error."""
    honest = before.low <= 0
    direction = "overconfident" if example.overconfident else "underconfident"
    finding = "as honest as these rows can tell" if honest else direction
    if after is None:
        return f"The model is {finding}."
    if honest and not after.low > before.high:
        return f"The model was already {finding}."
    return f"The model was {finding}. {_effect(before, after)}"


def _effect(before: Estimate, after: Estimate) -> str:
    if after.low <= 0:
        return "Calibration made its probabilities true, as far as these rows can tell."
    if after.high < before.low:
        return "Calibration made its probabilities truer, though not exact."
    if after.low > before.high:
        return "Calibration made it worse."
    return "Calibration made no clear difference."


def _example_in_words(example: Example, calibrated: bool) -> str:
    """What a confidence is worth, "Of 100 predictions made with about 90 % confidence, 71 were right"."""
    made = f"Of 100 predictions made with {_about(example.confidence)} confidence"
    before = f"<b>{100 * example.before.right.value:.0f}</b>"
    if not calibrated:
        return f"{made}, {before} are right. No calibrator is serving."
    if not example.after.n_rows:
        return f"{made}, {before} were right; after calibration no prediction claims that confidence."
    return f"{made}, {before} were right; after calibration <b>{100 * example.after.right.value:.0f}</b>."


def _about(confidence: float) -> str:
    low, high = _range(confidence)
    if high == 1:
        return f"more than {_in_percent(low)}"
    return f"less than {_in_percent(high)}" if low == 0 else f"about {_in_percent(confidence)}"


def _range(confidence: float) -> tuple[float, float]:
    return max(0.0, round(confidence - _NEARBY, 4)), min(1.0, round(confidence + _NEARBY, 4))


def _in_percent(share: float) -> str:
    """As short as it can be said exactly: the limits are chosen, not measured."""
    return f"{100 * share:g}\N{NO-BREAK SPACE}%"


def _counted_in_words(example: Example, calibrated: bool) -> str:
    """What the sentence rests on: rows and intervals."""
    low, high = map(_in_percent, _range(example.confidence))
    counts = f"{_rests_on(example.before)} before calibration and {_rests_on(example.after)} after it"
    counted = counts if calibrated else _rests_on(example.before)
    ranges = f"the ranges are {_in_percent(example.level)} intervals"
    return f"That counts the predictions with a confidence from {low} to {high}: {counted}; {ranges}."


def _rests_on(share: Share) -> str:
    if not share.n_rows:
        return "none"
    return f"{share.n_rows:,} ({100 * share.right.low:.0f} to {100 * share.right.high:.0f} right of 100)"


def _errors_in_words(before: Estimate, after: Estimate | None, n_rows: int) -> str:
    measured = f"Over {n_rows:,} answers its confidence"
    if after is None:
        return f"{measured} is off by {_points(before)}."
    return f"{measured} was off by {_points(before)}, and is now off by {_points(after)}."


def _points(error: Estimate) -> str:
    ends = f" (between {100 * error.low:.1f} and {100 * error.high:.1f})" if error.has_interval else ""
    return f"{100 * error.value:.1f} percentage points on average{ends}"


def _table(scores: Mapping[str, Mapping[str, Estimate]], served: str) -> str:
    heads = "".join(f"<th scope=col>{heading}<small>{better}</small></th>" for heading, better in COLUMNS.values())
    rows = "".join(_table_row(name, own, name == served) for name, own in scores.items())
    return (
        f"<table class=scores><thead><tr><th scope=col>Calibrator</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _table_row(name: str, scores: Mapping[str, Estimate], is_served: bool) -> str:
    badge = " <mark>serving</mark>" if is_served else ""
    cells = "".join(f'<td data-head="{COLUMNS[key][0]}">{_cell(scores[key])}</td>' for key in COLUMNS)
    return f"<tr{' class=served' if is_served else ''}><th scope=row>{escape(name)}{badge}</th>{cells}</tr>"


def _cell(estimate: Estimate) -> str:
    value = "∞" if math.isinf(estimate.value) else f"{estimate.value:.4f}"
    ends = f"<small>[{estimate.low:.4f}, {estimate.high:.4f}]</small>" if estimate.has_interval else ""
    return f"<span>{value}{ends}</span>"


def _section(chart: Chart) -> str:
    panels = "".join(_panel(panel) for panel in chart.panels)
    key = "".join(f'<li><i class="{style}"></i>{escape(meaning)}</li>' for style, meaning in chart.key)
    return (
        f"<h2>{escape(chart.heading)}</h2>\n<p class=quiet>{escape(chart.words)}</p>\n"
        f'<div class=panels style="--least:{chart.panel_width}rem">{panels}</div>\n<ul class=key>{key}</ul>\n'
        f"<details><summary>The numbers</summary>{_numbers(chart.numbers)}</details>\n"
    )


def _panel(panel: Panel) -> str:
    said = escape(f"{panel.title}: {panel.caption}")
    # In a script element nothing ends the text but "</script", so no "<" may stand in it.
    figure = json.dumps(panel.figure, allow_nan=False).replace("<", "\\u003c")
    return (
        f"<figure><figcaption><h3>{escape(panel.title)}</h3><small>{escape(panel.caption)}</small></figcaption>"
        f'<div class=plot role=img aria-label="{said}" style="{panel.size}"></div>'
        f'<script type="application/json">{figure}</script></figure>\n'
    )


def _numbers(rows: Sequence[Sequence[str]]) -> str:
    heads, *body = rows
    head = "".join(f"<th scope=col>{escape(one)}</th>" for one in heads)
    lines = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(one)}</td>' for one in rest)}</tr>"
        for first, *rest in body
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


_GLOSSARY = {
    "Confidence": "The probability that the model gives to its answer.",
    "Calibrated": "Of all answers given with confidence 80\N{NO-BREAK SPACE}%, 80\N{NO-BREAK SPACE}% are right. "
    "Overconfident: fewer are. Underconfident: more are.",
    "Calibrator": "A small correction after the model that turns its confidence into an honest one. It learns from "
    "labelled rows that the model was not trained on.",
    "Calibration error": "How far confidence lies from the share of right answers, on average over groups of answers "
    "of like confidence (expected calibration error, ECE). 0 is perfect.",
    "Log loss": "The price of each answer: small if the class that came true had a high probability, large if it had "
    "a low one. It rewards being both right and honest, so calibrators are compared by it.",
    "Brier score": "Another such price: the squared distance between the probabilities and what came true.",
    "Accuracy": "The share of right answers. Calibration is about honesty and leaves it nearly as it was.",
    "Interval": "Where the score would probably lie with unlimited rows. Two calibrators whose intervals overlap may "
    "well be equally good.",
}

_BODY = """<header>
<p class="eyebrow">{title} · calibration report</p>
<h1>{headline}</h1>
<p class="example">{example}</p>
<p class="quiet">{counted} {errors}</p>
{no_script}
</header>
<main>
{charts}
<h2>All scores</h2>
<p class="quiet">{rows}</p>
{table}
<h2>What is not shown</h2>
<ul class="quiet">{left_out}<li>Other rows than these. If what the model meets changes, its confidence can be off \
again: only new labels tell.</li></ul>
<h2>What the words mean</h2>
<dl>{glossary}</dl>
</main>"""
