"""The report by what a reader, a reader's program and a browser find in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest
from plotly.offline import get_plotlyjs
from scipy.stats import norm

from calibrators.metrics import Estimate, log_loss, reliability_curve, risk_coverage_curve, scores
from calibrators.numerics import Array, softmax
from calibrators.plots import (
    Chart,
    Example,
    classwise_chart,
    classwise_reliability,
    comparison_chart,
    html_report,
    reliability_chart,
    risk_coverage_chart,
    set_chart,
    set_diagram,
    telling_example,
    temperature_chart,
)
from calibrators.plots._page import COLOURS
from calibrators.plots.report import Share
from calibrators.plots.sets import set_quality
from tests import browser

EVIL = "<script>alert('x')</script> & \"co\" {title} <b>"


def overconfident(n_samples: int, n_classes: int, seed: int) -> tuple[Array, Array]:
    """Logits three times too large, and labels drawn from a third of them."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n_samples, n_classes))
    truth = softmax(logits / 3).cumsum(axis=1)
    return logits, (rng.random((n_samples, 1)) > truth).sum(axis=1).clip(max=n_classes - 1)


LOGITS, Y = overconfident(2000, 4, seed=0)
BEFORE, AFTER = softmax(LOGITS), softmax(LOGITS / 3)
HELD = {level: (1 - level) / 2 <= AFTER for level in (0.5, 0.8, 0.9)}
SCORES = {"none": scores(BEFORE, Y), "temperature": scores(AFTER, Y)}


def every_chart(names: dict[str, Array], class_names: list[str] | None = None) -> list[Chart]:
    return [
        reliability_chart(names, Y),
        comparison_chart(dict(zip(names, SCORES.values(), strict=True)), skipped={"slow": "its folds would not end"}),
        classwise_chart(AFTER, Y, class_names=class_names, n_panels=3),
        risk_coverage_chart(names, Y),
        temperature_chart(LOGITS, Y),
        set_chart(HELD, Y, class_names=class_names, n_worst=3),
    ]


class Page(HTMLParser):
    """What a browser would make of a page: elements that must be closed are, texts, scripts, attributes that fetch."""

    VOID = frozenset({"meta"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.data: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.references: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        own = dict(attrs)
        if tag == "script":
            (self.data if own.get("type") == "application/json" else self.scripts).append("")
        if own.get("http-equiv") == "Content-Security-Policy":
            self.policy = own["content"] or ""
        self.references += [own[name] or "" for name in ("src", "href", "xlink:href", "action", "data") if name in own]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            last_opened = self.scripts or self.data
            last_opened[-1] += data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    @property
    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in self.data]


def report(**changed: Any) -> str:
    options: dict[str, Any] = {
        "title": "resnet",
        "scores": SCORES,
        "baseline": "none",
        "served": "temperature",
        "example": telling_example(BEFORE, AFTER, Y),
        "n_calibration_rows": 5000,
        "n_test_rows": 400,
        "charts": (),
    }
    return html_report(**(options | changed))


def with_errors(before: Estimate, after: Estimate) -> dict[str, dict[str, Estimate]]:
    rest = {"log_loss": Estimate(0.5), "brier_score": Estimate(0.2), "accuracy": Estimate(0.9)}
    return {
        "none": {"expected_calibration_error": before, **rest},
        "temperature": {"expected_calibration_error": after, **rest},
    }


def share(n_rows: int, right: float) -> Share:
    return Share(n_rows, Estimate(right, right - 0.05, right + 0.05))


OFF, NEAR, HONEST = Estimate(0.12, 0.10, 0.14), Estimate(0.04, 0.03, 0.05), Estimate(0.01, 0.0, 0.02)
SURE = Example(0.9, before=share(1312, 0.712), after=share(280, 0.89), overconfident=True)
SHY = Example(0.9, before=share(100, 0.97), after=share(280, 0.89), overconfident=False)


# ------------------------------------------------------------------------------------------------- one file


def test_the_report_is_one_page_that_loads_nothing_and_holds_the_script_once() -> None:
    source = report(charts=every_chart({"Before": BEFORE, "After": AFTER}))
    page = Page(source)
    assert page.open == []
    assert page.references == []
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert [script == get_plotlyjs() for script in page.scripts] == [True, False]
    words = source.replace(page.scripts[0], "")
    assert not re.search(r"@import|url\(|https?://", words)


def test_the_policy_runs_the_two_scripts_of_the_page_and_nothing_else() -> None:
    page = Page(report(charts=[reliability_chart({"Before": BEFORE}, Y)]))
    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert not re.search(r"https?:|\*|unsafe-eval", page.policy)


def test_names_and_titles_are_text_and_never_markup() -> None:
    own = {EVIL: SCORES["none"], "after": SCORES["temperature"]}
    charts = every_chart({EVIL: BEFORE, "after": AFTER}, class_names=[EVIL, "b", "c", "d"])
    charts.append(Chart(EVIL, EVIL, [], [(EVIL, "b"), ("c", EVIL)], key=[("band", EVIL)], left_out=EVIL))
    page = Page(report(title=EVIL, scores=own, baseline=EVIL, served="after", charts=charts))
    assert page.open == []
    assert not any("<" in figure for figure in page.data)
    assert page.tags.count("script") == len(page.scripts) + len(page.data)
    assert len(page.scripts) == 2
    assert page.text.count(EVIL) > 10
    # plotly.js reads markup in the labels of an axis.
    labels = [label for figure in page.figures for label in figure["layout"]["yaxis"].get("ticktext", [])]
    assert any(unescape(label).startswith("<script>") for label in labels)
    assert not any("<" in label for label in labels)


def test_a_report_can_do_without_charts_and_then_without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page = Page(report())
    assert page.scripts == []
    assert "script-src 'none'" in page.policy


def test_without_plotly_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'calserve[plots]'")):
        report(charts=[reliability_chart({"Before": BEFORE}, Y)])


def test_the_same_inputs_give_the_same_bytes() -> None:
    charts = [reliability_chart({"Before": BEFORE}, Y)]
    assert report(charts=charts) == report(charts=[reliability_chart({"Before": BEFORE}, Y)])


@pytest.mark.browser
def test_a_browser_draws_every_chart_and_has_nothing_to_complain_of(tmp_path: Path) -> None:
    charts = every_chart({EVIL: BEFORE, "after": AFTER}, class_names=[EVIL, "b", "c", "d"])
    (tmp_path / "report.html").write_text(report(title=EVIL, charts=charts), encoding="utf-8")
    with browser.page((tmp_path / "report.html").as_uri()) as tab:
        assert tab.run("document.querySelectorAll('.plot .svg-container').length") == sum(len(c.panels) for c in charts)
        assert tab.run("document.querySelectorAll('.plot .point').length") > 0
        assert tab.complaints == []


# ------------------------------------------------------------------------------------------------- the charts


def in_light(figure: Any, key: str = "") -> Any:
    """A figure with the page's colours in place of their names."""
    if isinstance(figure, dict):
        return {name: in_light(value, name) for name, value in figure.items()}
    if isinstance(figure, list):
        return [in_light(value, key) for value in figure]
    if key.endswith("color"):
        return COLOURS[figure.removeprefix("--")][0].replace("transparent", "rgba(0,0,0,0)")
    return figure


def test_plotly_knows_every_property_of_every_chart() -> None:
    for chart in every_chart({"Before": BEFORE, "After": AFTER}):
        for panel in chart.panels:
            plotly.graph_objects.Figure(in_light(panel.figure))


def test_every_colour_has_one_for_the_dark() -> None:
    source = report(charts=every_chart({"Before": BEFORE, "After": AFTER}))
    style = source[source.index("<style>") : source.index("</style>")]
    assert "prefers-color-scheme:dark" in style
    declared = re.findall(r"--(\w+):(?=#|transparent)", style)
    assert sorted(declared) == sorted([*COLOURS, *COLOURS])
    assert set(re.findall(r"var\(--(\w+)\)", style)) <= {*COLOURS, "least"}


def by_mode(panel: Any, mode: str) -> list[dict[str, Any]]:
    return [trace for trace in panel.figure["data"] if trace.get("mode") == mode]


def test_a_reliability_chart_shows_the_metrics_of_the_same_rows() -> None:
    chart = reliability_chart({"Before": BEFORE, "After": AFTER}, Y, n_bins=12)
    for panel, p in zip(chart.panels, (BEFORE, AFTER), strict=True):
        curve = reliability_curve(p, Y, 12)
        filled = curve.counts > 0
        (dots,) = by_mode(panel, "markers")
        np.testing.assert_allclose(dots["x"], 100 * curve.confidence[filled])
        np.testing.assert_allclose(dots["y"], 100 * curve.accuracy[filled])
        band, histogram = (trace for trace in panel.figure["data"] if trace["type"] == "bar")
        low, high = (100 * end[filled] for end in curve.consistency_band(0.95))
        np.testing.assert_allclose(band["base"], low)
        np.testing.assert_allclose(np.add(band["base"], band["y"]), high)
        np.testing.assert_allclose(histogram["y"], 100 * curve.counts[filled] / 2000)
    assert sum(int(row[-1].replace(",", "")) for row in chart.numbers[1:]) == 2 * 2000


def test_a_bar_joins_each_dot_to_the_honest_line_in_the_colour_of_its_side() -> None:
    _, over, under = by_mode(reliability_chart({"Before": BEFORE}, Y).panels[0], "lines")
    curve = reliability_curve(BEFORE, Y)
    for bars, side in ((over, curve.accuracy < curve.confidence), (under, curve.accuracy >= curve.confidence)):
        said = (100 * curve.confidence[side]).tolist()
        right = (100 * curve.accuracy[side]).tolist()
        assert bars["x"] == [x for one in said for x in (one, one, None)]
        assert bars["y"] == [y for ends in zip(said, right, strict=True) for y in (*ends, None)]
    assert (over["line"]["color"], under["line"]["color"]) == ("--over", "--under")


def test_the_classes_of_the_report_are_those_of_the_file() -> None:
    chart = classwise_chart(AFTER, Y, class_names=list("abcd"), n_panels=3)
    figure = classwise_reliability(AFTER, Y, class_names=list("abcd"), n_panels=3)
    assert chart.heading == "Reliability of the worst 3 of 4 classes"
    assert "the 1 with the smallest" in chart.left_out
    for panel, axes in zip(chart.panels, figure.axes, strict=True):
        assert panel.title == axes.texts[0].get_text()
        drawn = np.asarray(next(c for c in axes.collections if type(c).__name__ == "PathCollection").get_offsets())
        (dots,) = by_mode(panel, "markers")
        np.testing.assert_allclose(np.transpose([dots["x"], dots["y"]]), 100 * drawn)


def test_a_risk_coverage_chart_shows_points_of_the_curve_to_its_end() -> None:
    (panel,) = risk_coverage_chart({"Before": BEFORE}, Y).panels
    (line,) = panel.figure["data"]
    curve = risk_coverage_curve(BEFORE, Y)
    rank = np.rint(np.array(line["x"]) * 20).astype(int) - 1
    np.testing.assert_allclose(line["y"], 100 * curve.risk[rank])
    assert line["x"][-1] == 100


def test_a_comparison_shows_each_score_with_its_interval_the_best_log_loss_first_and_what_was_not_compared() -> None:
    chart = comparison_chart(SCORES, skipped={"dirichlet": "its folds would not end in time"})
    for panel, column in zip(chart.panels, ("log_loss", "expected_calibration_error"), strict=True):
        (dots,) = panel.figure["data"]
        estimates = [SCORES[name][column] for name in ("temperature", "none")]
        assert panel.figure["layout"]["yaxis"]["ticktext"] == ["temperature", "none"]
        assert dots["x"] == [estimate.value for estimate in estimates]
        np.testing.assert_allclose(np.add(dots["x"], dots["error_x"]["array"]), [one.high for one in estimates])
        np.testing.assert_allclose(
            np.subtract(dots["x"], dots["error_x"]["arrayminus"]), [one.low for one in estimates]
        )
    assert "dirichlet (its folds would not end in time)" in Page(report(charts=[chart])).text


def test_scores_without_intervals_or_with_an_infinite_loss_are_valid_json() -> None:
    found = {
        name: {"log_loss": Estimate(loss), "expected_calibration_error": Estimate(0.1)}
        for name, loss in (("a", np.inf), ("b", 0.5))
    }
    page = Page(report(charts=[comparison_chart(found)]))
    assert page.figures[0]["data"][0]["x"] == [0.5, None]
    assert "∞" in page.text


def test_a_temperature_chart_shows_the_log_loss_and_both_marks() -> None:
    (panel,) = temperature_chart(LOGITS, Y).panels
    for line in by_mode(panel, "lines"):
        np.testing.assert_allclose(line["y"], [log_loss(softmax(LOGITS / t), Y) for t in line["x"]], rtol=1e-10)
    itself, best = by_mode(panel, "markers+text")
    assert (itself["x"], itself["y"]) == ([1.0], [pytest.approx(log_loss(BEFORE, Y))])
    assert best["x"][0] == pytest.approx(3, rel=0.1)  # four standard errors
    assert by_mode(panel, "lines")[0]["x"][-1] == best["x"][0]


@pytest.mark.parametrize(("y", "end"), [([0, 1, 2], "0"), ([1, 2, 0], "infinity")])
def test_where_the_loss_falls_for_ever_no_best_temperature_is_marked(y: list[int], end: str) -> None:
    (panel,) = temperature_chart(3 * np.eye(3), y).panels
    assert len(by_mode(panel, "markers+text")) == 1
    assert f"the loss falls towards T = {end};" in panel.caption


@pytest.mark.parametrize(("n_samples", "n_classes"), [(1, 2), (3, 3), (40, 300)])
def test_few_rows_and_many_classes_make_a_report(n_samples: int, n_classes: int) -> None:
    logits, y = overconfident(n_samples, n_classes, seed=1)
    p = softmax(logits)
    named = {"a name that is far too long to stand beside an axis": p}
    charts = [reliability_chart(named, y), classwise_chart(p, y), risk_coverage_chart(named, y)]
    page = Page(report(charts=charts, example=telling_example(p, p, y)))
    assert len(page.figures) == 2 + min(n_classes, 8)


# ------------------------------------------------------------------------------------------------- the words


def test_what_a_picture_shows_stands_beneath_it_in_numbers_and_without_scripts_the_page_says_so() -> None:
    charts = every_chart({"Before": BEFORE, "After": AFTER})
    source = report(charts=charts)
    text = Page(source).text
    assert "<noscript>" in source
    for chart in charts:
        assert "".join(cell for row in chart.numbers for cell in row).replace("\N{NO-BREAK SPACE}", " ") in text
        assert chart.left_out in text.replace("\N{NO-BREAK SPACE}", " ") or "\N{NO-BREAK SPACE}" in chart.left_out


def test_every_table_cell_names_its_column_for_a_narrow_screen() -> None:
    source = report()
    assert source.count('data-head="Log loss"') == 2
    assert 'name="viewport"' in source


def test_the_table_holds_the_scores_with_their_intervals_and_marks_what_serves() -> None:
    text = Page(report(scores=with_errors(OFF, NEAR), example=SURE)).text
    assert "0.1200[0.1000, 0.1400]" in text
    assert "temperature serving" in text
    assert "none serving" not in text
    assert "Fitted on 5,000 labelled rows, judged on 400 others." in text


@pytest.mark.parametrize(
    ("before", "after", "example", "words"),
    [
        (OFF, HONEST, SURE, "The model was overconfident. Calibration made its probabilities true"),
        (OFF, NEAR, SHY, "The model was underconfident. Calibration made its probabilities truer, though not exact."),
        (OFF, Estimate(0.11, 0.09, 0.13), SURE, "Calibration made no clear difference."),
        (NEAR, OFF, SURE, "Calibration made it worse."),
        (HONEST, HONEST, SURE, "The model was already as honest as these rows can tell."),
        (HONEST, OFF, SURE, "The model was as honest as these rows can tell. Calibration made it worse."),
    ],
)
def test_the_headline_says_what_the_intervals_allow(
    before: Estimate, after: Estimate, example: Example, words: str
) -> None:
    assert words in Page(report(scores=with_errors(before, after), example=example)).text


def test_the_first_sentence_says_what_a_confidence_is_worth_and_what_that_rests_on() -> None:
    text = Page(report(scores=with_errors(OFF, HONEST), example=SURE)).text
    assert "Of 100 predictions made with about 90 % confidence, 71 were right; after calibration 89." in text
    assert "from 85 % to 95 %: 1,312 (66 to 76 right of 100) before calibration and 280 (84 to 94 right of 100)" in text
    assert "was off by 12.0 percentage points on average (between 10.0 and 14.0)" in text


def test_without_a_serving_calibrator_the_report_claims_no_effect() -> None:
    text = Page(report(scores=with_errors(OFF, HONEST), example=SURE, served="none")).text
    assert "The model is overconfident." in text
    assert "71 are right. No calibrator is serving." in text
    assert "after calibration" not in text.lower()


def test_an_infinite_log_loss_is_shown_as_such() -> None:
    own = with_errors(OFF, NEAR)
    own["none"]["log_loss"] = Estimate(float("inf"))
    assert "∞" in Page(report(scores=own)).text


@pytest.mark.parametrize("option", ["baseline", "served"])
def test_a_name_that_was_not_scored_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"must hold 'dirichlet', got \['none', 'temperature'\]"):
        report(**{option: "dirichlet"})


def test_a_missing_score_is_named() -> None:
    own = with_errors(OFF, NEAR)
    del own["temperature"]["log_loss"]
    with pytest.raises(ValueError, match=r"scores of 'temperature' lack \['log_loss'\]"):
        report(scores=own)


# ------------------------------------------------------------------------------------------------- the example


def test_the_example_counts_each_side_over_its_own_predictions_of_about_that_confidence() -> None:
    example = telling_example(BEFORE, AFTER, Y, confidence=0.72)
    assert example.confidence == 0.72
    assert example.overconfident
    for found, p in ((example.before, BEFORE), (example.after, AFTER)):
        near = (p.max(axis=1) > 0.67) & (p.max(axis=1) <= 0.77)
        right, n = np.mean(p.argmax(axis=1)[near] == Y[near]), near.sum()
        assert found.n_rows == n
        assert found.right.value == pytest.approx(right)
        # Wilson, "Probable Inference", 1927: the ends are the shares that a normal test at this level just allows.
        for end in (found.right.low, found.right.high):
            assert abs(right - end) == pytest.approx(norm.ppf(0.975) * np.sqrt(end * (1 - end) / n))


def test_where_few_predictions_have_that_confidence_the_nearest_with_enough_is_spoken_of() -> None:
    p = np.repeat([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]], [49, 50, 400], axis=0)
    assert telling_example(p, p, np.zeros(499, dtype=int)).confidence == 0.7
    assert telling_example(p[1:], p[1:], np.zeros(498, dtype=int), confidence=0.93).confidence == 0.7
    assert telling_example(p[:49], p[:49], np.zeros(49, dtype=int)).confidence == 0.9


def test_a_confidence_that_calibration_leaves_to_no_prediction_is_told() -> None:
    before, after = np.tile([[0.9, 0.1]], (100, 1)), np.tile([[0.6, 0.4]], (100, 1))
    example = telling_example(before, after, np.repeat([0, 1], [60, 40]))
    assert (example.before.n_rows, example.after.n_rows) == (100, 0)
    text = Page(report(example=example)).text
    assert "60 were right; after calibration no prediction claims that confidence." in text


@pytest.mark.parametrize(("confidence", "words"), [(0.999, "more than 95 %"), (0.01, "less than 5 %")])
def test_at_the_ends_the_confidence_is_named_by_its_limit(confidence: float, words: str) -> None:
    p = np.full((60, 101), (1 - confidence) / 100)
    p[:, 0] = confidence
    if confidence < 0.5:
        p[:] = 1 / 101
    example = telling_example(p, p, np.zeros(60, dtype=int))
    assert f"made with {words} confidence" in Page(report(example=example)).text


def test_a_set_chart_shows_what_the_sets_hold() -> None:
    chart = set_chart(HELD, Y, n_worst=3)
    curve = by_mode(chart.panels[0], "markers")[0]
    held = [float(HELD[level][np.arange(len(Y)), Y].mean()) for level in HELD]
    assert curve["x"] == pytest.approx([50, 80, 90])
    assert curve["y"] == pytest.approx([100 * one for one in held])
    sizes = HELD[0.9].sum(axis=1)
    (bars,) = chart.panels[1].figure["data"]
    assert bars["y"] == pytest.approx(100 * np.bincount(sizes) / len(Y))
    assert f"{sizes.mean():.2f} labels on average" in chart.panels[1].caption
    strata = by_mode(chart.panels[2], "markers")[0]
    worst = min(float(HELD[0.9][k == Y, k].mean()) for k in range(4))
    assert 100 * worst == pytest.approx(strata["x"][-3])  # the first of the three worst classes
    assert chart.left_out == "Coverage by class leaves out the 1 classes that are covered best."
    assert [row[0] for row in chart.numbers[1:]] == [
        "50\N{NO-BREAK SPACE}%",
        "80\N{NO-BREAK SPACE}%",
        "90\N{NO-BREAK SPACE}%",
    ]


def test_the_files_panels_show_the_same() -> None:
    figure = set_diagram(HELD, Y, n_worst=3)
    chart = set_chart(HELD, Y, n_worst=3)
    dots = [c.get_offsets()[0] for c in figure.axes[0].collections if type(c).__name__ == "PathCollection"]
    assert [100 * dot[1] for dot in dots] == pytest.approx(by_mode(chart.panels[0], "markers")[0]["y"])
    heights = [100 * patch.get_height() for patch in figure.axes[1].patches]
    assert heights == pytest.approx(chart.panels[1].figure["data"][0]["y"])
    with pytest.raises(ValueError, match=r"must hold the sets of level 0\.7, got \[0\.5, 0\.8, 0\.9\]"):
        set_diagram(HELD, Y, confidence_level=0.7)
    with pytest.raises(ValueError, match="n_worst must be at least 1"):
        set_chart(HELD, Y, n_worst=0)


def test_many_sizes_share_bars_and_the_empty_set_has_its_own() -> None:
    rng = np.random.default_rng(0)
    sets = rng.random((200, 300)) < rng.random((200, 1))
    sets[:5] = False
    quality = set_quality({0.9: sets}, rng.integers(0, 300, size=200), 0.9, None, 3, 0.95)
    assert (quality.first[0], quality.last[0], quality.first[1]) == (0, 0, 1)
    assert len(quality.shares) <= 26
    assert quality.shares[0] == (sets.sum(axis=1) == 0).mean()
    assert quality.shares.sum() == pytest.approx(1)
    assert (quality.first[1:] == quality.last[:-1] + 1).all()
