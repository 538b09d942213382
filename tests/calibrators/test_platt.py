"""platt against logistic regression and scikit-learn's sigmoid calibration, and where the rows say too little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, logsumexp, softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from calibrators.kinds.platt import PlattScaling

Array = NDArray[Any]


def draw_rows(n_samples: int, n_classes: int, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def one_vs_rest(logits: Array, k: int) -> Array:
    """z_k - logsumexp of the others, term by term."""
    return np.asarray(logits[:, k] - logsumexp(np.delete(logits, k, axis=1), axis=1))


def targets(y: Array, k: int, weight: Array) -> Array:
    positive = weight[y == k].sum()
    return np.where(y == k, (positive + 1) / (positive + 2), 1 / (weight.sum() - positive + 2))


def mean_gradient(calibrator: PlattScaling, logits: Array, y: Array, k: int, weight: Array) -> Array:
    """Gradient of class k's mean log loss, in (a, b) of standardised log-odds."""
    s = one_vs_rest(logits, k)
    residual = weight * (expit(calibrator.slope_[k] * s + calibrator.intercept_[k]) - targets(y, k, weight))
    return np.array([residual @ (s - s.mean()) / s.std(), residual.sum()]) / weight.sum()


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.1, 2.0, 500.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_reached_in_every_class(n_classes: int, scale: float, weighted: bool) -> None:
    logits, y = draw_rows(300, n_classes, scale)
    weight = np.random.default_rng(1).uniform(0.1, 3, size=300) if weighted else np.ones(300)
    calibrator = PlattScaling().fit(logits, y, sample_weight=weight)
    for k in range(n_classes):
        assert calibrator.slope_[k] > 0
        assert np.abs(mean_gradient(calibrator, logits, y, k, weight)).max() <= 1e-10


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_class_is_an_unpenalised_logistic_regression_on_soft_targets(n_classes: int, weighted: bool) -> None:
    """A soft target is a row of each label, weighted with the target."""
    logits, y = draw_rows(400, n_classes)
    weight = np.random.default_rng(1).uniform(0.1, 3, size=400) if weighted else np.ones(400)
    calibrator = PlattScaling().fit(logits, y, sample_weight=weight)
    for k in range(n_classes):
        s, tau = one_vs_rest(logits, k), targets(y, k, weight)
        oracle = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(
            np.tile(s, 2)[:, None],
            np.repeat([1, 0], 400),
            sample_weight=np.concatenate([weight * tau, weight * (1 - tau)]),
        )
        assert calibrator.slope_[k] == pytest.approx(oracle.coef_[0, 0], rel=1e-7)
        assert calibrator.intercept_[k] == pytest.approx(oracle.intercept_[0], rel=1e-7)


def test_two_classes_are_scikit_learns_sigmoid_calibration() -> None:
    X, y = make_classification(3000, n_features=8, n_informative=4, flip_y=0.1, random_state=0)
    classifier = LogisticRegression().fit(X[:500], y[:500])
    oracle = CalibratedClassifierCV(FrozenEstimator(classifier), method="sigmoid").fit(X[500:2000], y[500:2000])

    def logits(rows: Array) -> Array:
        margin = classifier.decision_function(rows)
        return np.column_stack([np.zeros_like(margin), margin])

    calibrator = PlattScaling().fit(logits(X[500:2000]), y[500:2000])
    # scikit-learn stops at a gradient of 1e-6 in sums over 1,500 rows.
    np.testing.assert_allclose(calibrator.predict_proba(logits(X[2000:])), oracle.predict_proba(X[2000:]), atol=1e-5)


def test_two_classes_mirror_each_other() -> None:
    logits, y = draw_rows(300, 2)
    calibrator = PlattScaling().fit(logits, y)
    assert calibrator.slope_[0] == pytest.approx(calibrator.slope_[1], rel=1e-8)
    assert calibrator.intercept_[0] == pytest.approx(-calibrator.intercept_[1], rel=1e-8)
    margin = calibrator.slope_[1] * (logits[:, 1] - logits[:, 0]) + calibrator.intercept_[1]
    np.testing.assert_allclose(calibrator.predict_proba(logits)[:, 1], expit(margin), atol=1e-9)


def test_several_classes_are_normalised_one_vs_rest_sigmoids() -> None:
    logits, y = draw_rows(300, 5)
    calibrator = PlattScaling().fit(logits, y)
    scores = np.column_stack([one_vs_rest(logits, k) for k in range(5)])
    sigmoids = expit(calibrator.slope_ * scores + calibrator.intercept_)
    expected = sigmoids / sigmoids.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibrator.predict_proba(logits), expected, atol=1e-12)


def test_separable_rows_have_a_finite_answer_at_their_targets() -> None:
    """By hand: two scores and two parameters, so the curve meets both targets, (3+1)/(3+2) and 1/(2+2)."""
    calibrator = PlattScaling().fit([[0, 9], [0, 9], [0, 9], [9, 0], [9, 0]], [1, 1, 1, 0, 0])
    np.testing.assert_allclose(calibrator.predict_proba([[0.0, 9.0], [9.0, 0.0]])[:, 1], [0.8, 0.25], atol=1e-9)


@pytest.mark.parametrize("far", [100.0, 1e3, 1e5])
def test_the_only_row_of_a_class_far_from_all_others_does_not_stop_the_solver(far: float) -> None:
    """Full Newton steps, without the halving, diverge here."""
    margin = np.append(0.05 * np.random.default_rng(0).normal(size=30), far)
    logits, y = np.column_stack([np.zeros(31), margin]), np.repeat([0, 1], [30, 1])
    calibrator = PlattScaling().fit(logits, y)
    assert calibrator.slope_[1] > 0
    assert np.abs(mean_gradient(calibrator, logits, y, 1, np.ones(31))).max() <= 1e-10


def test_scores_that_point_the_wrong_way_get_slope_zero_and_the_targets_mean() -> None:
    logits, y = draw_rows(200, 2)
    calibrator = PlattScaling().fit(-logits, y)
    np.testing.assert_array_equal(calibrator.slope_, 0.0)
    expected = targets(y, 1, np.ones(200)).mean()
    np.testing.assert_allclose(calibrator.predict_proba(logits)[:, 1], expected, atol=1e-10)


def test_a_class_without_rows_takes_the_pooled_slope_and_its_prior() -> None:
    logits, y = draw_rows(300, 4)
    y[y == 3] = 0
    calibrator = PlattScaling().fit(logits, y)
    counts = np.bincount(y)
    assert calibrator.slope_[3] == pytest.approx(np.average(calibrator.slope_[:3], weights=counts), rel=1e-12)
    mean = expit(calibrator.slope_[3] * one_vs_rest(logits, 3) + calibrator.intercept_[3]).mean()
    assert mean == pytest.approx(1 / (300 + 2), rel=1e-8)
    assert calibrator.predict_proba(logits)[:, 3].min() > 0


def test_a_class_whose_score_never_varies_takes_the_pooled_slope() -> None:
    """Columns 1 to 3 hold the same logits in another order, so only the sum against class 0 is the same in each row."""
    rng = np.random.default_rng(0)
    others = rng.permuted(np.tile([-1.0, 0.0, 2.0], (200, 1)), axis=1)
    logits = np.column_stack([np.zeros(200), others])
    y = (log_softmax(logits, axis=1) + rng.gumbel(size=(200, 4))).argmax(axis=1)
    calibrator = PlattScaling().fit(logits, y)
    assert calibrator.slope_[0] == pytest.approx(np.average(calibrator.slope_[1:], weights=np.bincount(y)[1:]))
    mean = expit(calibrator.slope_[0] * one_vs_rest(logits, 0) + calibrator.intercept_[0]).mean()
    assert mean == pytest.approx(targets(y, 0, np.ones(200)).mean(), rel=1e-8)


def test_rows_that_are_all_alike_leave_the_slope_at_one() -> None:
    """The intercept then says the targets' mean, (2+1)/(2+2) and 1/(1+2) of two rows and one, at those rows."""
    calibrator = PlattScaling().fit([[0.0, 3.0]] * 3, [1, 1, 0])
    np.testing.assert_array_equal(calibrator.slope_, 1.0)
    assert calibrator.predict_proba([[0.0, 3.0]])[0, 1] == pytest.approx((2 * 3 / 4 + 1 / 3) / 3)


def test_rows_whose_every_sigmoid_underflows_are_distributions() -> None:
    """There sigmoid(t) is exp(t) to all digits, so the row is softmax(t); float32 holds t near -1e4 to 1e-3."""
    calibrator = PlattScaling().fit(*draw_rows(300, 3))
    calibrator.set_tensors(calibrator.tensors() | {"intercept": np.full(3, -1e4)})
    logits = np.array([[2.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    expected = softmax(calibrator.slope_ * np.column_stack([one_vs_rest(logits, k) for k in range(3)]), axis=1)
    np.testing.assert_allclose(calibrator.predict_proba(logits), expected, atol=1e-9)
    np.testing.assert_allclose(calibrator.predict_proba(logits.astype(np.float32)), expected, atol=2e-3)


def test_classes_solved_in_blocks_are_classes_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, y = draw_rows(100, 12)
    together = PlattScaling().fit(logits, y)
    monkeypatch.setattr("calibrators.numerics.ELEMENTS_AT_ONCE", 250)
    apart = PlattScaling().fit(logits, y)
    np.testing.assert_allclose(apart.slope_, together.slope_, rtol=1e-9)
    np.testing.assert_allclose(apart.intercept_, together.intercept_, rtol=1e-9, atol=1e-12)


def test_a_thousand_classes_each_reach_their_optimum() -> None:
    logits, y = draw_rows(2000, 1000, scale=6.0)
    calibrator = PlattScaling().fit(logits, y)
    present = np.unique(y)
    inner = [k for k in present[:40] if calibrator.slope_[k] > 0]
    assert len(inner) > 20
    for k in inner:
        assert np.abs(mean_gradient(calibrator, logits, y, k, np.ones(2000))).max() <= 1e-10
