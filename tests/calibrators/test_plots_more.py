"""The further plots by what they draw."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from calibrators import create
from calibrators.metrics import Estimate, classwise_calibration_error, log_loss, risk_coverage_curve, scores
from calibrators.numerics import Array, softmax
from calibrators.plots import calibrator_comparison, classwise_reliability, risk_coverage_diagram, temperature_curve
from calibrators.plots._style import INK, OVERCONFIDENT, UNDERCONFIDENT


def overconfident(n_samples: int, n_classes: int, seed: int) -> tuple[Array, Array]:
    """Logits twice too large, and labels drawn from half of them."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n_samples, n_classes))
    truth = softmax(logits / 2).cumsum(axis=1)
    return logits, (rng.random((n_samples, 1)) > truth).sum(axis=1).clip(max=n_classes - 1)


def texts(holder: Any) -> list[str]:
    return [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in holder.texts]


def dots(axes: Any) -> list[Any]:
    return [c for c in axes.collections if type(c).__name__ == "PathCollection"]


def in_hex(rgba: Any) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgba[:3])


def drawn(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ classes


def test_classes_stand_in_descending_order_of_their_calibration_error() -> None:
    logits, y = overconfident(500, 6, seed=0)
    logits[:, 3] += 2  # promised far too often
    figure = classwise_reliability(softmax(logits), y, n_panels=6)
    found = {texts(axes)[0]: float(texts(axes)[1].split()[1]) for axes in figure.axes}
    assert next(iter(found)) == "class 3"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert np.mean(list(found.values())) == pytest.approx(classwise_calibration_error(softmax(logits), y, 10), abs=1e-4)


def test_each_panel_shows_how_often_its_class_came_true() -> None:
    logits, y = overconfident(400, 3, seed=1)
    p = softmax(logits)
    figure = classwise_reliability(p, y, class_names=["a", "b", "c"], n_bins=1)
    for axes in figure.axes:
        k = "abc".index(texts(axes)[0])
        np.testing.assert_allclose(dots(axes)[0].get_offsets(), [[p[:, k].mean(), np.mean(y == k)]])


@pytest.mark.parametrize(
    ("n_classes", "n_panels", "shown", "heading"), [(3, 8, 3, "each class"), (9, 5, 5, "the worst 5 of 9 classes")]
)
def test_the_heading_says_which_classes_are_shown(n_classes: int, n_panels: int, shown: int, heading: str) -> None:
    logits, y = overconfident(50, n_classes, seed=2)
    figure = classwise_reliability(softmax(logits), y, n_panels=n_panels)
    assert len(figure.axes) == shown
    assert f"Reliability of {heading}" in texts(figure)
    assert drawn(figure).startswith(b"\x89PNG")


def test_wrong_names_and_no_panels_are_refused() -> None:
    with pytest.raises(ValueError, match="class_names must hold 2 names, one for each class, got 1"):
        classwise_reliability([[0.5, 0.5]], [0], class_names=["a"])
    with pytest.raises(ValueError, match="n_panels must be at least 1, got 0"):
        classwise_reliability([[0.5, 0.5]], [0], n_panels=0)


# ------------------------------------------------------------------------------------------------ risk and coverage


def test_a_risk_coverage_line_runs_through_points_of_the_curve_to_the_error_rate() -> None:
    logits, y = overconfident(900, 4, seed=3)
    curve = risk_coverage_curve(softmax(logits), y)
    figure = risk_coverage_diagram({"Before": softmax(logits), "After": softmax(logits / 2)}, y)
    line = figure.axes[0].lines[0]
    coverage, risk = line.get_data()
    rank = np.rint(coverage * 900).astype(int) - 1
    np.testing.assert_allclose(risk, curve.risk[rank])
    assert (coverage[0], coverage[-1]) == (pytest.approx(0.02), 1)
    assert risk[-1] == pytest.approx(np.mean(logits.argmax(axis=1) != y))
    assert line.get_label() == f"Before  ·  mean risk (AURC) {curve.risk.mean():.4f}"
    assert len(figure.axes[0].lines) == 2
    assert "After: wrong" in texts(figure.axes[0])[1]


@pytest.mark.parametrize("n_samples", [1, 3, 40])
def test_few_rows_and_names_with_dollars_can_be_drawn(n_samples: int) -> None:
    logits, y = overconfident(n_samples, 3, seed=4)
    assert drawn(risk_coverage_diagram({r"$\frac{1}$": softmax(logits)}, y)).startswith(b"\x89PNG")
    assert drawn(classwise_reliability(softmax(logits), y, class_names=["$", "$$x", "_"])).startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one set of probabilities, got none"):
        risk_coverage_diagram({}, [0])
    with pytest.raises(ValueError, match="at least one calibrator, got none"):
        calibrator_comparison({})


# ------------------------------------------------------------------------------------------------ comparison


def test_calibrators_stand_in_order_of_log_loss_with_dot_interval_and_number() -> None:
    logits, y = overconfident(400, 4, seed=5)
    found = {"as it is": scores(softmax(logits), y), "halved": scores(softmax(logits / 2), y)}
    figure = calibrator_comparison(found)
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["halved", "as it is"]
    for axes, column in ((first, "log_loss"), (second, "expected_calibration_error")):
        for row, name in enumerate(["halved", "as it is"]):
            estimate = found[name][column]
            np.testing.assert_allclose(dots(axes)[row].get_offsets(), [[estimate.value, row]])
            assert f"{estimate.value:.4f}" in texts(axes)
        intervals = [c.get_segments()[0][:, 0] for c in axes.collections if type(c).__name__ == "LineCollection"]
        np.testing.assert_allclose(intervals[0], [found["halved"][column].low, found["halved"][column].high])
        assert in_hex(dots(axes)[0].get_facecolors()[0]) == INK
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the best at the top


def test_scores_without_intervals_or_with_an_infinite_loss_can_be_drawn() -> None:
    found = {
        name: {"log_loss": Estimate(loss), "expected_calibration_error": Estimate(0.1)}
        for name, loss in (("a", np.inf), ("$b$", 0.5))
    }
    figure = calibrator_comparison(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$b$", "a"]
    assert "inf" in texts(figure.axes[0])
    assert drawn(figure).startswith(b"\x89PNG")


def test_a_missing_score_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="scores of 'a' lack expected_calibration_error"):
        calibrator_comparison({"a": {"log_loss": Estimate(0.1)}})


# ------------------------------------------------------------------------------------------------ temperature


def test_the_temperature_curve_is_the_log_loss_and_turns_colour_at_its_lowest_point() -> None:
    logits, y = overconfident(600, 4, seed=6)
    best = float(create("temperature").fit(logits, y).temperature_)  # type: ignore[attr-defined]
    axes = temperature_curve(logits, y).axes[0]
    assert [line.get_color() for line in axes.lines] == [OVERCONFIDENT, UNDERCONFIDENT]
    for line in axes.lines:
        expected = [log_loss(softmax(logits / t), y) for t in line.get_xdata()]
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-10)
    assert axes.lines[0].get_xdata()[-1] == axes.lines[1].get_xdata()[0] == pytest.approx(best)
    marks = np.concatenate([mark.get_offsets() for mark in dots(axes)])
    np.testing.assert_allclose(marks, [[1, log_loss(softmax(logits), y)], [best, log_loss(softmax(logits / best), y)]])
    assert f"best at T = {best:.3g}: log loss {marks[1, 1]:.4f}" in texts(axes)[-1]


@pytest.mark.parametrize(("y", "end"), [([0, 1, 2], "0"), ([1, 2, 0], "infinity")])
def test_where_the_loss_falls_for_ever_no_best_temperature_is_marked(y: list[int], end: str) -> None:
    figure = temperature_curve(3 * np.eye(3), y)
    assert len(dots(figure.axes[0])) == 1
    assert any(f"no best temperature: the loss falls towards T = {end}\n" in text for text in texts(figure.axes[0]))
    assert drawn(figure).startswith(b"\x89PNG")


def test_a_best_temperature_near_one_is_named_once() -> None:
    logits, y = overconfident(4000, 4, seed=7)
    names = [text for text in texts(temperature_curve(logits / 2, y).axes[0]) if text.startswith("T =")]
    assert len(names) == 1
