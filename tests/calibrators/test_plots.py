"""Reliability diagrams by what they draw."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.metrics import expected_calibration_error, reliability_curve
from calibrators.numerics import Array, softmax
from calibrators.plots import reliability_diagram
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
        counts = reliability_curve(p, y, 10).counts
        np.testing.assert_allclose(heights, counts[counts > 0] / 300)
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


def test_importing_the_plots_loads_neither_matplotlib_nor_plotly_and_drawing_loads_no_pyplot() -> None:
    program = (
        "import sys, calibrators.plots as plots\n"
        "assert not {'matplotlib', 'plotly'} & set(sys.modules)\n"
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
