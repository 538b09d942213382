"""Reliability diagrams by what they draw, and the report by what a reader's program would find in it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.metrics import Estimate, expected_calibration_error, reliability_curve, scores
from calibrators.numerics import Array, softmax
from calibrators.plots import Example, html_report, reliability_diagram, telling_example
from calibrators.plots.reliability import OVERCONFIDENT, PAPER, UNDERCONFIDENT, percent

ROOT = Path(__file__).parents[2]


def overconfident(n_samples: int, n_classes: int, seed: int) -> tuple[Array, Array, Array]:
    """Probabilities twice too sharp, the true ones, and labels drawn from these."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n_samples, n_classes))
    honest = softmax(logits / 3)
    y = (rng.random((n_samples, 1)) > honest.cumsum(axis=1)).sum(axis=1).clip(max=n_classes - 1)
    return softmax(logits), honest, y


def drawn_text(figure: Any) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts).replace("\N{NO-BREAK SPACE}", " ")


def dots(axes: Any) -> Any:
    """The scatter of a reliability panel; its bars are the other collection."""
    return next(c for c in axes.collections if type(c).__name__ == "PathCollection")


def in_hex(colours: Array) -> list[str]:
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in rgba[:3]) for rgba in colours]


# ------------------------------------------------------------------------------------------------- the diagram


def test_a_diagram_has_a_panel_and_a_histogram_for_each_name() -> None:
    before, after, y = overconfident(300, 4, seed=0)
    figure = reliability_diagram({"Before": before, "After": after}, y)
    assert len(figure.axes) == 4
    text = drawn_text(figure)
    for name, p in (("Before", before), ("After", after)):
        assert name in text
        assert f"calibration error (ECE) {expected_calibration_error(p, y):.3f}" in text
    assert f"says {percent(before.max(axis=1).mean())} on average".replace("\N{NO-BREAK SPACE}", " ") in text


def test_each_dot_stands_at_the_confidence_and_accuracy_of_a_bin() -> None:
    before, _, y = overconfident(300, 4, seed=1)
    curve = reliability_curve(before, y)
    filled = curve.counts > 0
    drawn = dots(reliability_diagram({"Before": before}, y).axes[0]).get_offsets()
    np.testing.assert_allclose(drawn, np.stack([curve.confidence, curve.accuracy], axis=1)[filled])


def test_colour_tells_the_direction_and_a_hollow_dot_that_chance_explains_the_gap() -> None:
    before, _, y = overconfident(400, 4, seed=2)
    curve = reliability_curve(before, y)
    low, high = curve.consistency_band(0.95)
    filled = curve.counts > 0
    scatter = dots(reliability_diagram({"Before": before}, y).axes[0])
    too_sure = (curve.accuracy < curve.confidence)[filled]
    chance = ((low <= curve.accuracy) & (curve.accuracy <= high))[filled]
    edges, faces = in_hex(scatter.get_edgecolors()), in_hex(scatter.get_facecolors())
    assert edges == [OVERCONFIDENT if over else UNDERCONFIDENT for over in too_sure]
    assert [face == PAPER for face in faces] == chance.tolist()
    assert 0 < chance.sum() < len(chance)


def test_the_histogram_shows_the_share_of_rows_and_panels_share_its_scale() -> None:
    before, after, y = overconfident(300, 4, seed=3)
    axes = reliability_diagram({"Before": before, "After": after}, y, n_bins=10).axes
    for panel, p in zip(axes[2:], (before, after), strict=True):
        heights = [bar.get_height() for bar in panel.patches]
        np.testing.assert_allclose(heights, reliability_curve(p, y, 10).counts / 300)
        assert panel.get_ylim() == axes[2].get_ylim()


@pytest.mark.parametrize(("n_samples", "n_classes", "n_bins"), [(1, 2, 15), (5, 3, 15), (200, 2, 1), (200, 300, 50)])
def test_few_rows_two_classes_and_many_bins_can_be_drawn(n_samples: int, n_classes: int, n_bins: int) -> None:
    before, _, y = overconfident(n_samples, n_classes, seed=4)
    buffer = io.BytesIO()
    reliability_diagram({"Before": before}, y, n_bins=n_bins).savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_certain_rows_and_an_infinite_log_loss_can_be_drawn() -> None:
    figure = reliability_diagram({"Before": np.eye(2)[[0, 0, 1]]}, [0, 1, 1])
    figure.savefig(io.BytesIO(), format="svg")
    assert "log loss inf" in drawn_text(figure)


def test_a_name_is_drawn_as_it_is_written() -> None:
    before, _, y = overconfident(20, 3, seed=5)
    figure = reliability_diagram({r"$\frac{1}$ <b>": before}, y)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    assert r"$\frac{1}$ <b>" in drawn_text(figure)


def test_an_empty_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one set of probabilities, got none"):
        reliability_diagram({}, [0])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'calserve[plots]'")):
        reliability_diagram({"Before": [[0.5, 0.5]]}, [0])


def test_importing_the_plots_loads_no_matplotlib_and_drawing_loads_no_pyplot() -> None:
    program = (
        "import sys, calibrators.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.reliability_diagram({'Before': [[0.5, 0.5]]}, [0])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.6204, "62 %"), (0.9, "90 %"), (0.9841, "98.4 %"), (0.031, "3.1 %"), (1, "100 %"), (0, "0 %")],
)
def test_percentages_have_a_digit_more_near_the_ends(share: float, words: str) -> None:
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == words


# ------------------------------------------------------------------------------------------------- the report


class Page(HTMLParser):
    """What a browser would make of a page: elements that must be closed are, texts, attributes that fetch."""

    VOID = frozenset({"meta"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def report(**changed: Any) -> str:
    before, after, y = overconfident(400, 4, seed=6)
    options: dict[str, Any] = {
        "title": "resnet",
        "scores": {"none": scores(before, y), "temperature": scores(after, y)},
        "baseline": "none",
        "served": "temperature",
        "example": telling_example(before, after, y),
        "n_calibration_rows": 5000,
        "n_test_rows": 400,
        "figures": [reliability_diagram({"Before": before}, y), reliability_diagram({"After": after}, y)],
    }
    return html_report(**(options | changed))


def with_errors(before: Estimate, after: Estimate) -> dict[str, dict[str, Estimate]]:
    rest = {"log_loss": Estimate(0.5), "brier_score": Estimate(0.2), "accuracy": Estimate(0.9)}
    return {
        "none": {"expected_calibration_error": before, **rest},
        "temperature": {"expected_calibration_error": after, **rest},
    }


OFF, NEAR, HONEST = Estimate(0.12, 0.10, 0.14), Estimate(0.04, 0.03, 0.05), Estimate(0.01, 0.0, 0.02)
SURE = Example(n_rows=100, said_before=0.9, right_before=0.62, said_after=0.63, right_after=0.62)
SHY = Example(n_rows=100, said_before=0.5, right_before=0.62, said_after=0.63, right_after=0.62)


def test_the_report_is_one_page_that_loads_nothing() -> None:
    source = report()
    page = Page(source)
    assert page.open == []
    assert page.tags.count("svg") == 2
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", source)
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", source))


def test_every_colour_of_the_diagrams_has_one_for_the_dark() -> None:
    source = report()
    diagrams = source[source.index("<svg") : source.rindex("</svg>")]
    assert "prefers-color-scheme:dark" in source
    assert not re.search(r"#[0-9a-f]{6}\b", diagrams)
    declared = set(re.findall(r"--(\w+):#", source))
    assert set(re.findall(r"var\(--(\w+)\)", source)) == declared


def test_every_table_cell_names_its_column_for_a_narrow_screen() -> None:
    source = report()
    assert source.count('data-head="Log loss"') == 2
    assert 'name="viewport"' in source


def test_the_table_holds_the_scores_with_their_intervals_and_marks_what_serves() -> None:
    source = report(scores=with_errors(OFF, NEAR), example=SURE)
    text = Page(source).text
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


def test_the_first_sentence_compares_what_was_said_with_what_came_true() -> None:
    text = Page(report(scores=with_errors(OFF, HONEST), example=SURE)).text
    assert "When the model said 90 %, it was right 62 % of the time." in text
    assert "After calibration it says 63 % for the same answers." in text
    assert "was off by 12.0 percentage points on average (between 10.0 and 14.0)" in text


def test_a_changed_accuracy_is_told() -> None:
    changed = Example(n_rows=100, said_before=0.9, right_before=0.62, said_after=0.63, right_after=0.65)
    assert "for the same answers, and is right 65 % of the time." in Page(report(example=changed)).text


def test_without_a_serving_calibrator_the_report_claims_no_effect() -> None:
    text = Page(report(scores=with_errors(OFF, HONEST), example=SURE, served="none")).text
    assert "The model is overconfident." in text
    assert "No calibrator is serving." in text
    assert "After calibration" not in text


def test_names_and_titles_are_text_and_never_markup() -> None:
    evil = "<script>alert('x')</script> & \"co\" {title}"
    before, after, y = overconfident(50, 3, seed=7)
    own = {evil: scores(before, y), "after": scores(after, y)}
    figure = reliability_diagram({evil: before}, y)
    page = Page(report(title=evil, scores=own, baseline=evil, served="after", figures=[figure]))
    assert "script" not in page.tags
    assert page.text.count(evil) == 4  # <title>, the line above the headline, the table, the diagram


def test_an_infinite_log_loss_is_shown_as_such() -> None:
    own = with_errors(OFF, NEAR)
    own["none"]["log_loss"] = Estimate(float("inf"))
    assert "∞" in Page(report(scores=own)).text


def test_a_report_can_do_without_diagrams_and_then_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = html_report(
        "resnet",
        with_errors(OFF, NEAR),
        baseline="none",
        served="temperature",
        example=SURE,
        n_calibration_rows=1,
        n_test_rows=1,
    )
    assert "svg" not in Page(source).tags


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert report() == report()


@pytest.mark.parametrize("option", ["baseline", "served"])
def test_a_name_that_was_not_scored_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"must hold 'dirichlet', got \['none', 'temperature'\]"):
        report(**{option: "dirichlet"})


def test_a_missing_score_is_named() -> None:
    own = with_errors(OFF, NEAR)
    del own["temperature"]["log_loss"]
    with pytest.raises(ValueError, match=r"scores of 'temperature' lack \['log_loss'\]"):
        report(scores=own)


def test_the_telling_example_is_the_bin_that_adds_most_to_the_error() -> None:
    # Ten rows at .95, eight right: 1.5 too many said. Four at .65, none right: 2.6 too many. Nine at .55, all right:
    # 4.05 too few.
    before = np.repeat([[0.95, 0.05], [0.65, 0.35], [0.55, 0.45]], [10, 4, 9], axis=0)
    after = np.repeat([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]], [10, 4, 9], axis=0)
    y = np.array([0] * 8 + [1] * 2 + [1] * 4 + [0] * 9)
    shy = telling_example(before, after, y)
    assert shy.n_rows == 9
    assert (shy.said_before, shy.right_before) == pytest.approx((0.55, 1.0))
    assert (shy.said_after, shy.right_after) == pytest.approx((0.9, 1.0))
    sure = telling_example(before[:14], after[:14], y[:14])
    assert sure.n_rows == 4
    assert (sure.said_before, sure.right_before) == pytest.approx((0.65, 0.0))
    assert (sure.said_after, sure.right_after) == pytest.approx((0.6, 1.0))
