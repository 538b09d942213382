"""class_prior against scipy, against counts by hand, and against the shift that made the labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from calibrators.kinds.class_prior import ClassPrior

Array = NDArray[Any]


def draw_rows(n_samples: int, bias: Array, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z + bias)."""
    rng = np.random.default_rng(seed)
    z = scale * rng.normal(size=(n_samples, len(bias)))
    return z, (z + bias + rng.gumbel(size=z.shape)).argmax(axis=1)


def objective(bias: Array, logits: Array, y: Array, weight: Array, pseudo_count: float) -> float:
    """The definition, term by term."""
    own = log_softmax(logits + bias, axis=1)[np.arange(len(y)), y]
    return float(-(weight @ own) - pseudo_count * log_softmax(bias).sum())


@pytest.mark.parametrize("pseudo_count", [0.01, 1.0, 20.0])
def test_logits_that_say_nothing_give_the_smoothed_frequencies(pseudo_count: float) -> None:
    y = np.repeat([0, 1, 2], [30, 9, 1])
    calibrator = ClassPrior(pseudo_count).fit(np.full((40, 4), -7.0), y)
    expected = (np.array([30, 9, 1, 0]) + pseudo_count) / (40 + 4 * pseudo_count)
    np.testing.assert_allclose(calibrator.predict_proba(np.zeros((1, 4)))[0], expected, rtol=1e-7)


@pytest.mark.parametrize("pseudo_count", [0.1, 5.0])
@pytest.mark.parametrize("n_classes", [2, 3, 8])
def test_the_bias_is_what_scipy_finds(n_classes: int, pseudo_count: float) -> None:
    logits, y = draw_rows(300, np.linspace(-1, 1, n_classes))
    weight = np.random.default_rng(1).uniform(0.1, 3, size=300)
    calibrator = ClassPrior(pseudo_count).fit(logits, y, sample_weight=weight)
    problem = (logits, y, weight, pseudo_count)
    oracle = minimize(objective, np.zeros(n_classes), args=problem, method="BFGS", options={"gtol": 1e-4})
    assert calibrator.converged_
    assert objective(calibrator.bias_, *problem) <= oracle.fun + 1e-9
    np.testing.assert_allclose(calibrator.bias_, oracle.x - oracle.x.mean(), atol=1e-4)


def test_the_expected_counts_are_the_counts() -> None:
    """The gradient in arithmetic of its own: sum_i w_i p_ik + c K softmax(b)_k = N_k + c for each class."""
    logits, y = draw_rows(500, np.array([0.0, 1.0, -2.0, 0.5]))
    calibrator = ClassPrior(2.0).fit(logits, y)
    expected = softmax(logits + calibrator.bias_, axis=1).sum(axis=0) + 8 * softmax(calibrator.bias_)
    np.testing.assert_allclose(expected, np.bincount(y, minlength=4) + 2, atol=1e-7)
    assert calibrator.bias_.sum() == pytest.approx(0, abs=1e-12)


def test_a_shift_of_the_prior_is_found() -> None:
    """20,000 rows: the standard error of each bias is below 0.05, the bound is four of them."""
    bias = np.array([-1.5, 0.0, 0.5, 1.0])
    calibrator = ClassPrior().fit(*draw_rows(20_000, bias))
    np.testing.assert_allclose(calibrator.bias_, bias, atol=0.2)


def test_no_rows_but_two_leave_the_model_almost_as_it_is() -> None:
    """Against pseudo-counts of 10,000 two rows weigh nothing."""
    calibrator = ClassPrior(10_000.0).fit([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], [0, 1])
    np.testing.assert_allclose(calibrator.bias_, 0.0, atol=2e-4)


def test_a_class_that_never_occurs_is_made_rarer_and_not_impossible() -> None:
    logits, y = draw_rows(400, np.zeros(3))
    calibrator = ClassPrior().fit(logits[y != 2], y[y != 2])
    assert -10 < calibrator.bias_[2] < -2
    assert calibrator.predict_proba(logits).min() > 0


@pytest.mark.parametrize("far", [1e2, 1e4, 1e6])
def test_a_class_whose_logit_is_far_off_is_brought_back(far: float) -> None:
    logits, y = draw_rows(300, np.zeros(3))
    near = ClassPrior(1e-3).fit(logits, y)
    shifted = ClassPrior(1e-3).fit(logits + np.array([0, 0, -far]), y)
    assert shifted.converged_
    assert shifted.bias_[2] - shifted.bias_[0] == pytest.approx(far + near.bias_[2] - near.bias_[0], abs=0.1)


def test_a_thousand_classes_reach_their_optimum() -> None:
    logits, y = draw_rows(2000, np.random.default_rng(5).normal(size=1000))
    calibrator = ClassPrior().fit(logits, y)
    assert calibrator.converged_
    expected = softmax(logits + calibrator.bias_, axis=1).sum(axis=0) + 1000 * softmax(calibrator.bias_)
    np.testing.assert_allclose(expected, np.bincount(y, minlength=1000) + 1, atol=1e-6)


@pytest.mark.parametrize("pseudo_count", [0, -1.0, np.inf, np.nan, True, "1"])
def test_a_pseudo_count_that_is_not_above_zero_is_refused(pseudo_count: Any) -> None:
    with pytest.raises(ValueError, match="pseudo_count must be a finite number above 0"):
        ClassPrior(pseudo_count).fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])


def test_biases_that_no_fit_makes_are_refused() -> None:
    calibrator = ClassPrior().fit(*draw_rows(50, np.zeros(3)))
    with pytest.raises(ValueError, match=r"biases must lie within ±1e\+31"):
        calibrator.set_tensors(calibrator.tensors() | {"bias": np.array([0.0, 1e32, 0.0])})
