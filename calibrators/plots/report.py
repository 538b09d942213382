"""The HTML report: what calibration did to a model, for a reader who has never heard of a calibration error.

One file with nothing to load: styles and diagrams are inline, fonts are the reader's own, and light or dark follows the
reader's system.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from calibrators.metrics import Estimate
from calibrators.metrics.calibration import bin_index, equal_width_edges, top_label
from calibrators.metrics.checks import check_labelled
from calibrators.plots._matplotlib import import_matplotlib
from calibrators.plots._style import BAND, FAINT, INK, OVERCONFIDENT, PAPER, QUIET, SHARE, UNDERCONFIDENT, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "expected_calibration_error": ("Calibration error", "lower is better"),
    "log_loss": ("Log loss", "lower is better"),
    "brier_score": ("Brier score", "lower is better"),
    "accuracy": ("Accuracy", "higher is better"),
}
"""The scores in the table: heading, and which way is up."""


@dataclass(frozen=True)
class Example:
    """One group of answers that shows what calibration did: `telling_example` picks it.

    Attributes
    ----------
    n_rows : answers in the group
    said_before, said_after : their mean confidence, uncalibrated and calibrated
    right_before, right_after : the share of them that was right
    """

    n_rows: int
    said_before: float
    right_before: float
    said_after: float
    right_after: float


def telling_example(before: ArrayLike, after: ArrayLike, y: ArrayLike, n_bins: int = 15) -> Example:
    """The rows of the bin that adds most to the calibration error of `before`, as both see them.

    Parameters
    ----------
    before, after : (n_samples, n_classes) probabilities of the same rows, uncalibrated and calibrated
    y : (n_samples,) class indices 0 .. n_classes-1
    n_bins : bins of equal width over the confidence of `before`

    Examples
    --------
    >>> y = np.repeat([0, 1], [38, 62])
    >>> example = telling_example(np.tile([[0.1, 0.9]], (100, 1)), np.tile([[0.4, 0.6]], (100, 1)), y)
    >>> print(f"said {example.said_before:.2f}, right {example.right_before:.2f}, now says {example.said_after:.2f}")
    said 0.90, right 0.62, now says 0.60
    """
    p, labels = check_labelled(before, y)
    q, _ = check_labelled(after, y)
    said_before, right_before = top_label(p, labels)
    said_after, right_after = top_label(q, labels)
    bins = bin_index(said_before, equal_width_edges(n_bins, said_before.dtype))
    rows = bins == np.abs(np.bincount(bins, weights=said_before - right_before)).argmax()
    means = (values[rows].mean(dtype=np.float64) for values in (said_before, right_before, said_after, right_after))
    return Example(int(rows.sum()), *map(float, means))


def html_report(
    title: str,
    scores: Mapping[str, Mapping[str, Estimate]],
    *,
    baseline: str,
    served: str,
    example: Example,
    n_calibration_rows: int,
    n_test_rows: int,
    figures: Sequence[Figure] = (),
    level: float = 0.95,
) -> str:
    """One self-contained HTML page: the verdict in words, the diagrams, the calibrators compared, a glossary.

    Parameters
    ----------
    title : heading, for instance the model's name
    scores : what `calibrators.metrics.scores` gave for each calibrator by name, on rows that none was fitted on
    baseline : the name in `scores` of the uncalibrated model
    served : the name in `scores` of the calibrator that serves; `baseline` if none does
    example : what to say in the first sentence
    n_calibration_rows, n_test_rows : rows the calibrators were fitted on, and rows they are judged on
    figures : diagrams, side by side where there is room and one under the other on a phone; one panel each reads best
    level : confidence level of the intervals in `scores`

    Raises
    ------
    ValueError
        if `baseline` or `served` is not in `scores`, or a score of `COLUMNS` is missing
    ImportError
        if there are figures and matplotlib is not installed
    """
    for name in (baseline, served):
        if name not in scores:
            raise ValueError(f"scores must hold {name!r}, got {sorted(scores)}")
    for name, own in scores.items():
        if missing := sorted(set(COLUMNS) - set(own)):
            raise ValueError(f"scores of {name!r} lack {missing}")
    before, after = (scores[name]["expected_calibration_error"] for name in (baseline, served))
    calibrated = served != baseline
    diagrams = "".join(f"<figure>{_inline_svg(figure, number)}</figure>" for number, figure in enumerate(figures))
    return _PAGE.format(
        style=_STYLE,
        title=escape(title),
        headline=_headline(example, before, after if calibrated else None),
        example=_example_in_words(example, calibrated),
        errors=_errors_in_words(before, after if calibrated else None, n_test_rows),
        diagrams=diagrams and _DIAGRAMS.format(diagrams=diagrams),
        table=_table(scores, served),
        rows=f"Fitted on {n_calibration_rows:,} labelled rows, judged on {n_test_rows:,} others. "
        f"In brackets: the {100 * level:g}\N{NO-BREAK SPACE}% interval.",
        glossary="".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in _GLOSSARY.items()),
    )


def _headline(example: Example, before: Estimate, after: Estimate | None) -> str:
    """The verdict in a sentence or two. An interval that reaches 0 means: chance alone could explain the error."""
    honest = before.low <= 0
    direction = "overconfident" if example.said_before > example.right_before else "underconfident"
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
    said = (
        f"When the model said <b>{percent(example.said_before)}</b>, "
        f"it was right <b>{percent(example.right_before)}</b> of the time."
    )
    if not calibrated:
        return f"{said} No calibrator is serving."
    now = f"After calibration it says <b>{percent(example.said_after)}</b> for the same answers"
    if percent(example.right_after) == percent(example.right_before):
        return f"{said} {now}."
    return f"{said} {now}, and is right <b>{percent(example.right_after)}</b> of the time."


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
    return f"<table><thead><tr><th scope=col>Calibrator</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _table_row(name: str, scores: Mapping[str, Estimate], is_served: bool) -> str:
    badge = " <mark>serving</mark>" if is_served else ""
    cells = "".join(f'<td data-head="{COLUMNS[key][0]}">{_cell(scores[key])}</td>' for key in COLUMNS)
    return f"<tr{' class=served' if is_served else ''}><th scope=row>{escape(name)}{badge}</th>{cells}</tr>"


def _cell(estimate: Estimate) -> str:
    value = "∞" if math.isinf(estimate.value) else f"{estimate.value:.4f}"
    ends = f"<small>[{estimate.low:.4f}, {estimate.high:.4f}]</small>" if estimate.has_interval else ""
    return f"<span>{value}{ends}</span>"


def _inline_svg(figure: Figure, number: int) -> str:
    """The figure as an <svg> element whose text is text and whose colours follow the page's."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # A salt of its own keeps the ids of several figures on a page apart, and the bytes the same from run to run.
    with import_matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": f"calserve-{number}"}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    # matplotlib names groups axes_1, patch_2, ..: the same in every figure, and referred to by nothing.
    svg = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"', "", buffer.getvalue())
    # Wide enough to read, and no wider than its measures deserve: 7 rem for an inch.
    start = f'<svg role="img" aria-label="Reliability diagram" style="max-width:{7 * figure.get_figwidth():.0f}rem"'
    svg = svg[svg.index("<svg") :].replace("<svg", start, 1)
    for name, (light, _) in _COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg


_COLOURS = {
    "ink": (INK, "#e8ebf2"),
    "quiet": (QUIET, "#9aa5b8"),
    "faint": (FAINT, "#2b3342"),
    "band": (BAND, "#252d3c"),
    "paper": (PAPER, "#141923"),
    "over": (OVERCONFIDENT, "#ff8b4d"),
    "under": (UNDERCONFIDENT, "#6fb1ff"),
    "share": (SHARE, "#5d6880"),
}
"""Colours of the page and of its diagrams: in light, in dark."""

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
    "Diagram": "Each dot is a group of answers of like confidence: to the right what the model said, upwards how often "
    "it was right. Honest dots lie on the dashed line; the coloured bar is the error; a hollow dot in the grey range "
    "is off by no more than chance. The columns beneath show how many answers are in each group.",
}

_STYLE = (
    "".join(
        f"{start}{''.join(f'--{name}:{pair[which]};' for name, pair in _COLOURS.items())}{end}"
        for which, start, end in (
            (0, ":root{color-scheme:light dark;", "}"),
            (1, "@media(prefers-color-scheme:dark){:root{", "}}"),
        )
    )
    + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:clamp(1.25rem,5vw,4rem);background:var(--paper);color:var(--ink);
 font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.eyebrow{margin:0;color:var(--quiet);overflow-wrap:anywhere}
h1{margin:.4rem 0 1.2rem;font-size:clamp(1.6rem,5vw,2.5rem);line-height:1.2;letter-spacing:-.015em;text-wrap:balance}
h2{margin:3.5rem 0 .75rem;font-size:1.25rem}
.example{max-width:46rem;font-size:clamp(1.1rem,2.6vw,1.35rem);line-height:1.5}
.example b{white-space:nowrap}
.quiet,small{color:var(--quiet)}
.diagrams{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:1rem 2rem}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.7rem .75rem;border-bottom:1px solid var(--faint);text-align:right;vertical-align:top}
th:first-child{padding-left:0;text-align:left;overflow-wrap:anywhere}
thead th{font-weight:600;vertical-align:bottom}
small{display:block;font-size:.8rem;font-weight:400}
tbody th{font-weight:500}
.served th,.served td{font-weight:700}
mark{margin-left:.4rem;padding:.1rem .5rem;border-radius:1rem;background:var(--under);color:var(--paper);
 font-size:.75rem;font-weight:600;white-space:nowrap}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.7rem 2rem;margin:0}
dt{font-weight:600}
dd{margin:0;max-width:44rem;color:var(--quiet)}
@media(max-width:40rem){
 thead{display:none}
 tr{display:block;padding:.9rem 0;border-bottom:1px solid var(--faint)}
 th,td{display:flex;justify-content:space-between;gap:1rem;padding:.2rem 0;border:0}
 tbody th{justify-content:flex-start;font-weight:700}
 td::before{content:attr(data-head);color:var(--quiet);font-weight:400}
 dl{display:block}
 dd{margin:0 0 1rem}
}
"""
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: calibration report</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="eyebrow">{title} · calibration report</p>
<h1>{headline}</h1>
<p class="example">{example}</p>
<p class="quiet">{errors}</p>
</header>
<main>
{diagrams}
<h2>Calibrators compared</h2>
<p class="quiet">{rows}</p>
{table}
<h2>What the words mean</h2>
<dl>{glossary}</dl>
</main>
</body>
</html>
"""

_DIAGRAMS = """<h2>What it says, and how often it is right</h2>
<div class="diagrams">{diagrams}</div>"""
