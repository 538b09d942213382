"""order_preserving against scipy's bounded minimiser on the definition, and the order of every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from calibrators.kinds.order_preserving import CELLS, LEAST_SLOPE, OrderPreserving
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.metrics import log_loss

Array = NDArray[Any]


def draw_rows(n_samples: int, n_classes: int, scale: float = 6.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z / 2) half of the time, evenly otherwise; rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.normal(size=(n_samples, n_classes))
    y = (z / 2 + rng.gumbel(size=z.shape)).argmax(axis=1)
    anew = rng.random(n_samples) < 0.2
    y[anew] = rng.integers(n_classes, size=anew.sum())
    return scale * z, y


def ramps(logits: Array, temperature: float) -> Array:
    """phi_j(v) for each logit, (n_samples, n_classes, CELLS), term by term."""
    v = (logits.max(axis=1, keepdims=True) - logits) / temperature
    beyond = np.maximum(v[:, :, None] - np.arange(CELLS), 0)
    return np.concatenate([np.minimum(beyond[:, :, :-1], 1), beyond[:, :, -1:]], axis=2)


def objective(slope: Array, phi: Array, y: Array, weight: Array, penalty: float) -> tuple[float, Array]:
    """L and its gradient from the definition."""
    rows, share = np.arange(len(y)), weight / weight.sum()
    log_p = log_softmax(-(phi @ slope), axis=1)
    value = -share @ log_p[rows, y] + penalty * np.square(slope - 1).sum() / weight.sum() / 2
    mean = np.einsum("ik,ikj->ij", np.exp(log_p), phi)
    return value, share @ (phi[rows, y] - mean) + penalty * (slope - 1) / weight.sum()


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("penalty", [0.1, 1.0, 50.0])
def test_the_slopes_are_what_scipy_finds(n_classes: int, penalty: float) -> None:
    logits, y = draw_rows(400, n_classes)
    weight = np.random.default_rng(1).uniform(0.1, 3, size=400)
    calibrator = OrderPreserving(penalty).fit(logits, y, sample_weight=weight)
    problem = (ramps(logits, float(calibrator.temperature_)), y, weight, penalty)
    oracle = minimize(
        objective,
        np.ones(CELLS),
        args=problem,
        jac=True,
        method="L-BFGS-B",
        bounds=[(LEAST_SLOPE, None)] * CELLS,
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000},
    )
    assert objective(calibrator.slope_, *problem)[0] <= oracle.fun + 1e-12
    np.testing.assert_allclose(calibrator.slope_, oracle.x, atol=1e-3)


def test_the_optimum_is_reached_under_its_bounds() -> None:
    """Gradient zero where a slope is free, zero or above where it is at its least; some slopes are, some are not."""
    logits, y = draw_rows(1000, 4)
    lead = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0]
    y = np.where(lead < np.median(lead), logits.argmax(axis=1), y)  # right where it leads by little: f wants to fall
    calibrator = OrderPreserving(0.01).fit(logits, y)
    phi = ramps(logits, float(calibrator.temperature_))
    gradient = objective(calibrator.slope_, phi, y, np.ones(1000), 0.01)[1]
    bound = calibrator.slope_ == LEAST_SLOPE
    assert 0 < bound.sum() < CELLS
    assert gradient[bound].min() >= -1e-9
    np.testing.assert_allclose(gradient[~bound], 0, atol=1e-8)


def test_probabilities_are_the_softmax_of_the_definition() -> None:
    calibrator = OrderPreserving().fit(*draw_rows(300, 5))
    unseen, _ = draw_rows(100, 5, scale=30.0, seed=1)
    expected = softmax(-(ramps(unseen, float(calibrator.temperature_)) @ calibrator.slope_), axis=1)
    np.testing.assert_allclose(calibrator.predict_proba(unseen), expected, atol=1e-12)


def test_a_strong_penalty_is_temperature_scaling() -> None:
    logits, y = draw_rows(300, 4)
    scaled = TemperatureScaling().fit(logits, y).predict_proba(logits)
    np.testing.assert_allclose(OrderPreserving(1e12).fit(logits, y).predict_proba(logits), scaled, atol=1e-8)


def test_the_order_of_every_row_is_kept() -> None:
    """Among logits that lie within what float64 probabilities resolve."""
    calibrator = OrderPreserving(0.01).fit(*draw_rows(500, 8))
    unseen, _ = draw_rows(500, 8, seed=1)
    after = calibrator.predict_proba(unseen)
    order = np.argsort(unseen, axis=1)
    assert np.diff(np.take_along_axis(after, order, axis=1), axis=1).min() > 0


def test_an_offset_and_the_unit_of_the_logits_change_nothing() -> None:
    logits, y = draw_rows(300, 4)
    expected = OrderPreserving().fit(logits, y).predict_proba(logits)
    moved = 1000 * logits + np.random.default_rng(1).integers(-64, 64, size=(300, 1))
    np.testing.assert_allclose(OrderPreserving().fit(moved, y).predict_proba(moved), expected, atol=1e-7)


def test_a_cifar10_resnet50_is_served_better_than_by_temperature_scaling(shared_data: Path) -> None:
    """Held-out log loss, 10,000 rows: .2038 by temperature scaling, .1867 here."""
    fit, held = (np.load(shared_data / "cifar10_resnet50_ce" / f"{name}.npz") for name in ("val", "test"))
    calibrator = OrderPreserving().fit(fit["logits"], fit["labels"])
    assert log_loss(calibrator.predict_proba(held["logits"].astype(np.float64)), held["labels"]) < 0.188


@pytest.mark.parametrize("penalty", [0, -1.0, np.inf, np.nan, True, "1"])
def test_a_penalty_that_is_not_above_zero_is_refused(penalty: Any) -> None:
    with pytest.raises(ValueError, match="penalty must be a finite number above 0"):
        OrderPreserving(penalty).fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])


def test_slopes_that_no_fit_makes_are_refused() -> None:
    calibrator = OrderPreserving().fit(*draw_rows(50, 3))
    with pytest.raises(ValueError, match=r"slopes must lie in 0\.01"):
        calibrator.set_tensors(calibrator.tensors() | {"slope": np.zeros(CELLS)})
    with pytest.raises(ValueError, match="temperature must lie in"):
        calibrator.set_tensors(calibrator.tensors() | {"temperature": np.array(-1.0)})
