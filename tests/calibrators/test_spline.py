"""spline against the published procedure on many rows, and the promises about the rest of the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.special import softmax

from calibrators.kinds.spline import SplineCalibration
from calibrators.metrics import ks_error, log_loss

Array = NDArray[Any]


def draw_rows(n_samples: int, n_classes: int, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def published(confidence: Array, correct: Array, unseen: Array) -> Array:
    """Gupta and co-authors' procedure, term by term: cumulative sums, least squares over the rows, slope added."""
    order = np.argsort(confidence)
    s, n = confidence[order], len(confidence)
    t = np.linspace(0, 1, n)
    h = np.cumsum(correct[order]) / n - np.cumsum(s) / n
    knots = np.linspace(0, 1, 6)
    basis = CubicSpline(knots, np.eye(6), bc_type="natural")(t)
    spline = CubicSpline(knots, np.linalg.lstsq(basis, h, rcond=None)[0], bc_type="natural")
    return np.interp(unseen, s, np.clip(s + spline(t, 1), 0, 1))


@pytest.mark.parametrize("n_classes", [2, 5])
def test_confidences_are_the_published_procedures(n_classes: int) -> None:
    """Up to 1/n (sum against integral) and the table's straight lines; clipped confidences aside."""
    logits, y = draw_rows(20_000, n_classes)
    p = softmax(logits, axis=1)
    unseen = draw_rows(2000, n_classes, seed=1)[0]
    expected = published(p.max(axis=1), p.argmax(axis=1) == y, softmax(unseen, axis=1).max(axis=1))
    gap = np.diff(np.sort(unseen, axis=1)[:, -2:])[:, 0]
    clear = gap > 1
    served = SplineCalibration().fit(logits, y).predict_proba(unseen).max(axis=1)
    np.testing.assert_allclose(served[clear], expected[clear], atol=2e-3)


def test_only_the_confidence_changes_and_the_others_share_the_rest_as_they_did() -> None:
    calibrator = SplineCalibration().fit(*draw_rows(1000, 5))
    unseen, _ = draw_rows(200, 5, seed=1)
    before, after = softmax(unseen, axis=1), calibrator.predict_proba(unseen)
    for p, q in zip(before, after, strict=True):
        rest = p != p.max()
        np.testing.assert_allclose(q[rest] / q[rest].sum(), p[rest] / p[rest].sum(), rtol=1e-9)
    assert np.abs(after.max(axis=1) - before.max(axis=1)).max() > 0.05


def test_the_top_never_falls_to_its_runner_up() -> None:
    """A model that is wrong more often than not: its confidence would fall below the runner-up's probability."""
    rng = np.random.default_rng(0)
    logits = np.column_stack([np.full(500, 2.0), rng.uniform(0, 1.9, 500), np.full(500, -9.0)])
    y = np.where(rng.random(500) < 0.1, 0, 1)
    calibrator = SplineCalibration().fit(logits, y)
    after = calibrator.predict_proba(logits.astype(np.float32))
    np.testing.assert_array_equal(after.argmax(axis=1), 0)
    np.testing.assert_allclose(after[:, 0] / after[:, 1], np.exp(1e-3), rtol=1e-5)
    nearer = calibrator.predict_proba([[2.0, 1.9999, -9.0]])[0]
    assert nearer[0] / nearer[1] == pytest.approx(np.exp(1e-4), rel=1e-9)


def test_the_argmax_is_kept_even_where_rows_are_ties() -> None:
    calibrator = SplineCalibration().fit(*draw_rows(300, 4))
    unseen = np.random.default_rng(1).integers(-3, 4, size=(1000, 4)).astype(float)
    after = calibrator.predict_proba(unseen)
    assert np.all(after[np.arange(1000), unseen.argmax(axis=1)] == after.max(axis=1))


def test_rows_that_are_all_right_leave_room_for_one_that_is_not() -> None:
    """By hand: accuracy is one, so confidence ends at (N + 1/K) / (N + 1)."""
    y = np.arange(40) % 4
    after = SplineCalibration().fit(9 * np.eye(4)[y], y).predict_proba(9 * np.eye(4))
    np.testing.assert_allclose(after.max(axis=1), 40.25 / 41, rtol=1e-6)


def test_the_order_of_rows_with_one_confidence_changes_nothing() -> None:
    logits = np.repeat([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]], 50, axis=0)
    y = np.r_[np.repeat([1, 0], [30, 20]), np.repeat([2, 1], [40, 10])]
    order = np.random.default_rng(0).permutation(100)
    one, other = SplineCalibration().fit(logits, y), SplineCalibration().fit(logits[order], y[order])
    np.testing.assert_allclose(one.levels_, other.levels_, atol=1e-5)


def test_rows_with_one_confidence_are_read_in_the_middle_of_their_share() -> None:
    """Accuracy rises evenly over five confidences, 0.55 to 0.95; read at the end of a share, each would be 0.05 off."""
    lead = np.repeat([0.5, 1.5, 2.5, 3.5, 4.5], 400)
    y = (np.tile(np.arange(400), 5) < np.repeat([220, 260, 300, 340, 380], 400)).astype(int)
    calibrator = SplineCalibration().fit(np.column_stack([0 * lead, lead]), y)
    after = calibrator.predict_proba(np.column_stack([0 * lead, lead]))[::400, 1]
    np.testing.assert_allclose(after, [0.55, 0.65, 0.75, 0.85, 0.95], atol=0.02)


def test_the_kolmogorov_smirnov_error_of_a_cifar10_resnet50_falls(shared_data: Path) -> None:
    """Held out, 10,000 rows: .0434 before, .0111 after; temperature scaling reaches .01745."""
    fit, held = (np.load(shared_data / "cifar10_resnet50_ce" / f"{name}.npz") for name in ("val", "test"))
    p = SplineCalibration().fit(fit["logits"], fit["labels"]).predict_proba(held["logits"].astype(np.float64))
    assert ks_error(p, held["labels"]) < 0.0125
    assert log_loss(p, held["labels"]) < 0.21


def test_tables_that_no_fit_makes_are_refused() -> None:
    calibrator = SplineCalibration().fit(*draw_rows(100, 3))
    tensors = calibrator.tensors()
    with pytest.raises(ValueError, match="scores must not decrease"):
        calibrator.set_tensors(tensors | {"scores": tensors["scores"][::-1]})
    with pytest.raises(ValueError, match="levels must lie within ±60"):
        calibrator.set_tensors(tensors | {"levels": np.full_like(tensors["levels"], 61)})
