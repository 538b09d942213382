"""energy_temperature: the published formula, by scipy, and never worse than one temperature on its own rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from scipy.stats import norm

import calibrators
from calibrators.graph import stage
from calibrators.kinds.energy_temperature import LEAST_SCALE, MOST_OFF, EnergyTemperature
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.metrics import log_loss

Array = NDArray[Any]


def drawn_rows(n: int, seed: int = 0, wrong_energy: float = 6.0) -> tuple[Array, Array]:
    """Rows of two kinds: of low energy and right where they say so, of high energy and mostly wrong."""
    rng = np.random.default_rng(seed)
    unsure = rng.random(n) < 0.4
    z = 2 * rng.normal(size=(n, 5))
    y = np.where(unsure, rng.integers(0, 5, n), (z + 0.3 * rng.gumbel(size=z.shape)).argmax(axis=1))
    return z + np.where(unsure, 0.0, wrong_energy)[:, None], y


def test_the_temperature_is_the_papers_with_densities_by_scipy() -> None:
    z, y = drawn_rows(2000)
    calibrator = EnergyTemperature().fit(z, y)
    energy, right = -logsumexp(z, axis=1), z.argmax(axis=1) == y
    peaks = []
    temperature = np.full(len(z), float(calibrator.temperature_))
    for sign, weight, rows in zip((-1, 1), calibrator.weights_, (right, ~right), strict=True):
        density = norm(*norm.fit(energy[rows]))
        peaks.append(float(density.pdf(density.mean())))
        theta = float(calibrator.temperature_) * weight / peaks[-1]
        temperature += sign * theta * density.pdf(energy)
    np.testing.assert_allclose(calibrator.predict_proba(z), softmax(z / temperature[:, None], axis=1), atol=1e-9)
    assert calibrator.weights_.max() > 0.05 and temperature.min() > 0


def test_where_energy_tells_right_from_wrong_other_rows_gain() -> None:
    calibrator, plain = (cls().fit(*drawn_rows(2000)) for cls in (EnergyTemperature, TemperatureScaling))
    z, y = drawn_rows(5000, seed=1)
    assert log_loss(calibrator.predict_proba(z), y) < log_loss(plain.predict_proba(z), y) - 0.03


@pytest.mark.parametrize("seed", range(5))
def test_its_own_rows_never_lose_against_one_temperature(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(200, 4)) * rng.exponential(2, size=(200, 1)) + rng.normal(size=(200, 1))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    calibrator, plain = (cls().fit(z, y) for cls in (EnergyTemperature, TemperatureScaling))
    assert log_loss(calibrator.predict_proba(z), y) <= log_loss(plain.predict_proba(z), y) + 1e-12


def test_no_small_change_of_the_fit_lowers_its_loss() -> None:
    z, y = drawn_rows(1000)
    calibrator = EnergyTemperature().fit(z, y)
    least = log_loss(calibrator.predict_proba(z), y)
    learned = calibrator.tensors()
    for name, index in (("temperature", ()), ("weights", 0), ("weights", 1)):
        for step in (-1e-3, 1e-3):
            changed = {key: value.copy() for key, value in learned.items()}
            changed[name][index] = np.clip(changed[name][index] + step, 0.0, MOST_OFF if name == "weights" else np.inf)
            other = EnergyTemperature().set_tensors(changed)
            assert log_loss(other.predict_proba(z), y) >= least - 1e-8


def test_probabilities_as_logarithms_are_scaled_by_one_temperature() -> None:
    z, y = drawn_rows(500)
    log_p = z - logsumexp(z, axis=1, keepdims=True)
    calibrator, plain = (cls().fit(log_p, y) for cls in (EnergyTemperature, TemperatureScaling))
    np.testing.assert_allclose(calibrator.predict_proba(log_p), plain.predict_proba(log_p), atol=1e-4)
    assert calibrator.scale_.tolist() == [LEAST_SCALE, LEAST_SCALE]


@pytest.mark.parametrize("offset", [0.0, -60.0, 60.0])
def test_the_score_of_foreign_rows_is_the_energy_in_numpy_and_in_the_graph(offset: float) -> None:
    calibrator = EnergyTemperature().fit(*drawn_rows(500))
    z = (drawn_rows(50, seed=2)[0] + offset).astype(np.float32)
    expected = -logsumexp(z.astype(np.float64), axis=1)
    np.testing.assert_allclose(calibrator.predict_further(z)["ood_score"], expected, atol=1e-5)
    session = onnxruntime.InferenceSession(stage(calibrator).to_bytes(), providers=["CPUExecutionProvider"])
    (score,) = session.run(["ood_score"], {"logits": z})
    assert score.shape == (50,) and score.dtype == np.float32
    np.testing.assert_allclose(score, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": np.asarray(0.0)}, "temperature must lie in"),
        ({"weights": np.array([1.0, 0.0])}, r"weights must lie in 0\.\.0\.9 and 0\.\.9"),
        ({"weights": np.array([0.1, -1.0])}, r"weights must lie in"),
        ({"scale": np.array([1.0, 0.0])}, r"scales must lie in 0\.01"),
        ({"centre": np.array([np.nan, 0.0])}, "not finite"),
    ],
)
def test_arrays_that_no_fit_makes_are_refused(change: dict[str, Array], message: str) -> None:
    learned = EnergyTemperature().fit(*drawn_rows(200)).tensors()
    with pytest.raises(ValueError, match=message):
        calibrators.create("energy_temperature").set_tensors(learned | change)
