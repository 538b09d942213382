"""ensemble_temperature against scipy's SLSQP on the triangle, and where the mixture has to say something."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import softmax

from calibrators.kinds.ensemble_temperature import EnsembleTemperatureScaling
from calibrators.kinds.temperature import TemperatureScaling

Array = NDArray[Any]


def draw_rows(n_samples: int, n_classes: int, noise: float = 0.1, seed: int = 0) -> tuple[Array, Array]:
    """Overconfident logits; a share `noise` of the labels is drawn anew, whatever the logits say."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n_samples, n_classes))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    anew = rng.random(n_samples) < noise
    y[anew] = rng.integers(n_classes, size=anew.sum())
    return 3 * z, y


def mean_loss(w: Array, temperature: float, logits: Array, y: Array, weight: Array, loss: str) -> float:
    """The definition, term by term."""
    p = w[0] * softmax(logits / temperature, axis=1) + w[1] * softmax(logits, axis=1) + w[2] / logits.shape[1]
    if loss == "log":
        values = -np.log(p[np.arange(len(y)), y])
    else:
        values = np.square(p - np.eye(logits.shape[1])[y]).sum(axis=1)
    return float(np.average(values, weights=weight))


@pytest.mark.parametrize("loss", ["log", "brier"])
@pytest.mark.parametrize(("n_classes", "noise", "seed"), [(2, 0.3, 0), (3, 0.0, 1), (10, 0.1, 2), (10, 0.5, 3)])
def test_the_weights_are_as_good_as_slsqp_finds(
    loss: Literal["log", "brier"], n_classes: int, noise: float, seed: int
) -> None:
    logits, y = draw_rows(800, n_classes, noise, seed)
    weight = np.random.default_rng(1).uniform(0.1, 3, size=800)
    calibrator = EnsembleTemperatureScaling(loss).fit(logits, y, sample_weight=weight)
    temperature = float(TemperatureScaling().fit(logits, y, sample_weight=weight).temperature_)
    assert float(calibrator.temperature_) == temperature
    problem = (temperature, logits, y, weight, loss)
    oracle = minimize(
        mean_loss,
        np.full(3, 1 / 3),
        args=problem,
        method="SLSQP",
        bounds=[(1e-12, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert calibrator.weights_.sum() == pytest.approx(1, abs=1e-12)
    assert calibrator.weights_.min() >= 0
    assert mean_loss(calibrator.weights_, *problem) <= oracle.fun + 1e-12
    np.testing.assert_allclose(calibrator.weights_, oracle.x, atol=2e-4)


@pytest.mark.parametrize("loss", ["log", "brier"])
def test_no_small_move_within_the_triangle_lowers_the_loss(loss: Literal["log", "brier"]) -> None:
    """The loss is convex: for a w_j that can give, moving weight to w_i has a slope of zero or above."""
    logits, y = draw_rows(500, 5)
    calibrator = EnsembleTemperatureScaling(loss).fit(logits, y)
    w = calibrator.weights_
    problem = (float(calibrator.temperature_), logits, y, np.ones(500), loss)
    assert np.count_nonzero(w > 0.01) >= 2
    for i in range(3):
        for j in np.flatnonzero(w > 0.01):
            moved = w + 1e-5 * (np.eye(3)[i] - np.eye(3)[j])
            assert mean_loss(moved, *problem) >= mean_loss(w, *problem) - 1e-13


def test_labels_that_are_partly_noise_are_found_to_be_so() -> None:
    """p = 0.7 softmax(z / 3) + 0.3 / 5 made the labels. T is fitted first and takes a part, so w2 stays below 0.3."""
    calibrator = EnsembleTemperatureScaling().fit(*draw_rows(20_000, 5, noise=0.3))
    mixture = calibrator.predict_proba(draw_rows(2000, 5, seed=9)[0])
    assert 0.1 < calibrator.weights_[2] < 0.3
    assert mixture.min() > 0.1 * 0.3 / 5


def test_log_loss_never_rises_above_temperature_scaling_on_the_calibration_set() -> None:
    for seed in range(5):
        logits, y = draw_rows(100, 4, seed=seed)
        own = np.arange(100), y
        mixed = EnsembleTemperatureScaling().fit(logits, y).predict_proba(logits)[own]
        scaled = TemperatureScaling().fit(logits, y).predict_proba(logits)[own]
        assert np.log(mixed).sum() >= np.log(scaled).sum() - 1e-9


def test_the_published_weights_of_a_cifar10_resnet50_are_those_of_temperature_scaling(shared_data: Path) -> None:
    rows = np.load(shared_data / "cifar10_resnet50_ce" / "val.npz")
    calibrator = EnsembleTemperatureScaling().fit(rows["logits"], rows["labels"])
    np.testing.assert_allclose(calibrator.weights_, [1, 0, 0], atol=1e-12)


@pytest.mark.parametrize("loss", ["log", "brier"])
def test_the_argmax_is_kept(loss: Literal["log", "brier"]) -> None:
    calibrator = EnsembleTemperatureScaling(loss).fit(*draw_rows(300, 6))
    unseen, _ = draw_rows(1000, 6, seed=1)
    np.testing.assert_array_equal(calibrator.predict_proba(unseen).argmax(axis=1), unseen.argmax(axis=1))


def test_rows_that_say_everything_and_rows_that_say_nothing_have_weights() -> None:
    y = np.arange(30) % 3
    for logits in (20 * np.eye(3)[y], -20 * np.eye(3)[y], np.zeros((30, 3))):
        calibrator = EnsembleTemperatureScaling().fit(logits, y)
        assert calibrator.weights_.sum() == pytest.approx(1)
        own = calibrator.predict_proba(logits)[np.arange(30), y]
        assert own.min() >= 1 / 3 - 1e-6


def test_an_unknown_loss_and_foreign_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="loss must be one of log, brier, got 'ece'"):
        EnsembleTemperatureScaling("ece").fit(*draw_rows(20, 3))  # type: ignore[arg-type]
    calibrator = EnsembleTemperatureScaling().fit(*draw_rows(100, 3))
    for weights in ([0.5, 0.6, 0.0], [1.2, -0.2, 0.0]):
        with pytest.raises(ValueError, match="not be negative and sum to one"):
            calibrator.set_tensors(calibrator.tensors() | {"weights": np.array(weights)})
    with pytest.raises(ValueError, match="temperature must lie in"):
        calibrator.set_tensors(calibrator.tensors() | {"temperature": np.array(0.0)})
