"""temperature against minimisers from outside, the published number, and the ends of its range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from calibrators.kinds.temperature import TemperatureScaling

Array = NDArray[Any]

PROBLEMS = [(n, k, scale) for n, k in ((40, 2), (300, 3), (2000, 10)) for scale in (1e-6, 1.0, 300.0)]


def draw_rows(n_samples: int, n_classes: int, scale: float = 3.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def log_loss(logits: Array, y: Array, beta: float) -> float:
    return float(np.mean(logsumexp(beta * logits, axis=1) - beta * logits[np.arange(len(y)), y]))


@pytest.mark.parametrize(("n_samples", "n_classes", "scale"), PROBLEMS)
def test_the_slope_of_the_log_loss_vanishes(n_samples: int, n_classes: int, scale: float) -> None:
    """|dL / d log beta| <= 1e-9 in arithmetic of its own: beta (E_softmax[z] - z_y), averaged."""
    logits, y = draw_rows(n_samples, n_classes, scale)
    calibrator = TemperatureScaling().fit(logits, y)
    beta = 1 / float(calibrator.temperature_)
    p = np.exp(beta * logits - logsumexp(beta * logits, axis=1, keepdims=True))
    slope = beta * np.mean((p * logits).sum(axis=1) - logits[np.arange(n_samples), y])
    assert abs(slope) <= 1e-9
    assert calibrator.converged_


@pytest.mark.parametrize(("n_samples", "n_classes", "scale"), PROBLEMS)
def test_the_log_loss_is_what_scipy_reaches(n_samples: int, n_classes: int, scale: float) -> None:
    logits, y = draw_rows(n_samples, n_classes, scale)
    found = minimize_scalar(lambda u: log_loss(logits, y, np.exp(u) / scale), bounds=(-8, 8), options={"xatol": 1e-10})
    temperature = float(TemperatureScaling().fit(logits, y).temperature_)
    assert log_loss(logits, y, 1 / temperature) <= found.fun + 1e-15
    assert temperature == pytest.approx(scale / np.exp(found.x), rel=1e-6)  # a minimum fixes its place to sqrt(eps)


def test_the_temperature_is_what_torch_finds() -> None:
    """The published procedure with its faults mended: LBFGS on log T with strong Wolfe line search, to convergence."""
    logits, y = draw_rows(500, 5)
    z, labels = torch.tensor(logits), torch.tensor(y)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [log_t], max_iter=100, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(z / log_t.exp(), labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(TemperatureScaling().fit(logits, y).temperature_) == pytest.approx(np.exp(log_t.item()), rel=1e-8)


def test_probabilities_are_scikit_learns() -> None:
    X, y = load_digits(return_X_y=True)
    classifier = LogisticRegression(max_iter=5000).fit(X[:300], y[:300])
    oracle = CalibratedClassifierCV(FrozenEstimator(classifier), method="temperature").fit(X[300:1000], y[300:1000])
    calibrator = TemperatureScaling().fit(classifier.decision_function(X[300:1000]), y[300:1000])
    served = calibrator.predict_proba(classifier.decision_function(X[1000:]))
    np.testing.assert_allclose(served, oracle.predict_proba(X[1000:]), atol=1e-6)


def test_the_published_temperature_of_a_cifar10_resnet50(shared_data: Path) -> None:
    """Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020: T = 2.5 on a grid of 0.1."""
    rows = np.load(shared_data / "cifar10_resnet50_ce" / "val.npz")
    calibrator = TemperatureScaling().fit(rows["logits"], rows["labels"])
    assert float(calibrator.temperature_) == pytest.approx(2.4975, abs=5e-5)


def test_temperature_is_in_the_units_of_the_logits() -> None:
    logits, y = draw_rows(200, 4)
    temperature = float(TemperatureScaling().fit(logits, y).temperature_)
    for factor in (1e-12, 0.1, 3.0, 1e12):
        assert float(TemperatureScaling().fit(factor * logits, y).temperature_) == pytest.approx(factor * temperature)


def test_an_offset_in_a_row_changes_nothing() -> None:
    logits, y = draw_rows(200, 4)
    shifted = logits + np.random.default_rng(1).integers(-64, 64, size=(200, 1))
    one, other = TemperatureScaling().fit(logits, y), TemperatureScaling().fit(shifted, y)
    assert float(other.temperature_) == pytest.approx(float(one.temperature_), rel=1e-10)
    np.testing.assert_allclose(other.predict_proba(shifted), one.predict_proba(logits), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rows_that_are_all_right_end_at_the_lowest_temperature(scale: float) -> None:
    y = np.arange(30) % 3
    calibrator = TemperatureScaling().fit(scale * np.eye(3)[y], y)
    assert float(calibrator.temperature_) == pytest.approx(scale * np.exp(-16))
    assert not calibrator.converged_
    np.testing.assert_array_equal(calibrator.predict_proba(scale * np.eye(3)), np.eye(3))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rows_that_are_all_wrong_end_at_the_highest_temperature(scale: float) -> None:
    y = np.arange(30) % 3
    calibrator = TemperatureScaling().fit(-scale * np.eye(3)[y], y)
    assert float(calibrator.temperature_) == pytest.approx(scale * np.exp(16))
    assert not calibrator.converged_
    np.testing.assert_allclose(calibrator.predict_proba(scale * np.eye(3)), 1 / 3, atol=1e-6)


def test_the_argmax_is_kept() -> None:
    calibrator = TemperatureScaling().fit(*draw_rows(200, 6))
    unseen, _ = draw_rows(1000, 6, seed=1)
    np.testing.assert_array_equal(calibrator.predict_proba(unseen).argmax(axis=1), unseen.argmax(axis=1))
