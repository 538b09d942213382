"""beta and quadratic against logistic regression on their features, and what each is for."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logsumexp
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from calibrators.kinds.beta import BetaCalibration
from calibrators.kinds.platt import PlattScaling
from calibrators.kinds.quadratic import QuadraticCalibration

Array = NDArray[Any]


def draw_rows(n_samples: int, n_classes: int, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def binary(scores: Array) -> Array:
    return np.column_stack([np.zeros(len(scores)), scores])


def one_vs_rest(logits: Array, k: int) -> Array:
    return np.asarray(logits[:, k] - logsumexp(np.delete(logits, k, axis=1), axis=1))


def regression(features: Array, y: Array, k: int, weight: Array, intercept: bool = True) -> LogisticRegression:
    """Unpenalised, on soft targets: a row of each label, weighted with the target."""
    positive = weight[y == k].sum()
    tau = np.where(y == k, (positive + 1) / (positive + 2), 1 / (weight.sum() - positive + 2))
    return LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, fit_intercept=intercept).fit(
        np.tile(features, (2, 1)),
        np.repeat([1, 0], len(y)),
        sample_weight=np.concatenate([weight * tau, weight * (1 - tau)]),
    )


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("form", ["abm", "ab"])
@pytest.mark.parametrize("weighted", [False, True])
def test_beta_is_a_logistic_regression_on_log_p_and_minus_log_of_its_complement(
    n_classes: int, form: Literal["abm", "ab"], weighted: bool
) -> None:
    logits, y = draw_rows(500, n_classes)
    weight = np.random.default_rng(1).uniform(0.1, 3, size=500) if weighted else np.ones(500)
    calibrator = BetaCalibration(form).fit(logits, y, sample_weight=weight)
    for k in range(n_classes):
        s = one_vs_rest(logits, k)
        features = np.column_stack([-np.logaddexp(0, -s), np.logaddexp(0, s)])
        if form == "ab":
            features += np.log([2, 0.5])  # zero at p = 1/2, where no intercept leaves a half
        oracle = regression(features, y, k, weight, intercept=form == "abm")
        assert oracle.coef_.min() > 0
        np.testing.assert_allclose(calibrator.slopes_[k], oracle.coef_[0], rtol=1e-6)
        constant = oracle.intercept_ if form == "abm" else oracle.coef_[0] @ np.log([2, 0.5])
        np.testing.assert_allclose(calibrator.intercept_[k], constant, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("abm", [0.23058427395, 0.40704703198, 0.48898442347, 0.56399582933, 0.70994228494]),
        ("ab", [0.22497183423, 0.41488084291, 0.5, 0.57302602614, 0.70639670338]),
        ("am", [0.24870768269, 0.40419750260, 0.48050408033, 0.55773116297, 0.72100820691]),
    ],
)
def test_beta_agrees_with_the_authors_package(form: Literal["abm", "am", "ab"], expected: list[float]) -> None:
    """betacal 1.1.0 on the rows below, each given with both labels, weighted with its soft target (7 + 1) / (7 + 2) or
    1 / (7 + 2) and the complement. Its solver stops at a gradient of 1e-4 in sums over the rows."""
    scores = np.array([-4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 5])
    y = [0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1]
    p = np.array([0.01, 0.2, 0.5, 0.8, 0.99])
    served = BetaCalibration(form).fit(binary(scores), y).predict_proba(binary(np.log(p / (1 - p))))[:, 1]
    np.testing.assert_allclose(served, expected, atol=5e-4)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_with_equal_slopes_beta_is_platt(n_classes: int) -> None:
    logits, y = draw_rows(300, n_classes)
    np.testing.assert_allclose(
        BetaCalibration("am").fit(logits, y).predict_proba(logits),
        PlattScaling().fit(logits, y).predict_proba(logits),
        atol=1e-9,
    )


def test_a_negative_coefficient_is_dropped_and_the_other_fitted_again() -> None:
    """Shares rise below log-odds 0 and fall above, so b would be negative; a is then the regression on log p alone."""
    scores = np.repeat([-3.0, -1.0, 1.0, 3.0], 50)
    y = np.concatenate([np.arange(50) < hits for hits in (2, 15, 30, 27)]).astype(int)
    features = np.column_stack([-np.logaddexp(0, -scores), np.logaddexp(0, scores)])
    assert regression(features, y, 1, np.ones(200)).coef_[0, 1] < 0
    oracle = regression(features[:, :1], y, 1, np.ones(200))
    calibrator = BetaCalibration().fit(binary(scores), y)
    assert calibrator.slopes_[1, 1] == 0
    assert calibrator.slopes_[1, 0] == pytest.approx(oracle.coef_[0, 0], rel=1e-6)
    assert calibrator.intercept_[1] == pytest.approx(oracle.intercept_[0], rel=1e-6)


def test_scores_that_point_the_wrong_way_get_a_constant() -> None:
    logits, y = draw_rows(200, 2)
    np.testing.assert_array_equal(BetaCalibration().fit(-logits, y).slopes_, 0.0)


@pytest.mark.parametrize("kind", [BetaCalibration, QuadraticCalibration])
def test_two_classes_mirror_each_other(kind: type[BetaCalibration | QuadraticCalibration]) -> None:
    logits, y = draw_rows(300, 2)
    p = kind().fit(logits, y).predict_proba(logits)
    np.testing.assert_allclose(kind().fit(logits[:, ::-1], 1 - y).predict_proba(logits[:, ::-1])[:, ::-1], p, atol=1e-8)


def test_a_skewed_miscalibration_is_mended_by_beta_and_not_by_platt() -> None:
    """True log-odds are 2 log p - 0.2 log(1 - p) + 1. 20,000 rows: a correct fit of three parameters errs by about
    sqrt(3 / 20,000) / 2 = 0.006 in p; 0.02 fails by chance less than once in 1e6 seeds."""
    rng = np.random.default_rng(0)
    s = 3 * rng.normal(size=20_000)
    truth = expit(-2 * np.logaddexp(0, -s) + 0.2 * np.logaddexp(0, s) + 1)
    y = (rng.random(20_000) < truth).astype(int)
    errors = [
        np.abs(calibrator.fit(binary(s), y).predict_proba(binary(s))[:, 1] - truth).max()
        for calibrator in (BetaCalibration(), PlattScaling())
    ]
    assert errors[0] < 0.02 < errors[1]


@pytest.mark.parametrize("n_classes", [2, 4])
def test_quadratic_is_a_logistic_regression_on_the_log_odds_and_their_square(n_classes: int) -> None:
    logits, y = draw_rows(500, n_classes)
    calibrator = QuadraticCalibration().fit(logits, y)
    sigmoids = []
    for k in range(n_classes):
        s = one_vs_rest(logits, k)
        features = np.column_stack([s, s * s])
        sigmoids.append(regression(features, y, k, np.ones(500)).predict_proba(features)[:, 1])
    expected = np.column_stack(sigmoids)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibrator.predict_proba(logits), expected, atol=1e-7)


def test_quadratic_finds_the_posterior_of_two_normals_of_different_variance() -> None:
    """Its log-odds are exactly a parabola, here with a vertex inside the range: not monotone. 20,000 rows, as above."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, size=20_000)
    s = np.where(y == 1, rng.normal(0.5, 1, size=20_000), rng.normal(0, 2, size=20_000))
    grid = np.linspace(-3, 4, 50)
    truth = norm.pdf(grid, 0.5, 1) / (norm.pdf(grid, 0.5, 1) + norm.pdf(grid, 0, 2))
    served = QuadraticCalibration().fit(binary(s), y).predict_proba(binary(grid))[:, 1]
    assert np.abs(served - truth).max() < 0.02
    assert served[0] < served[25] > served[-1]


def test_quadratic_holds_its_end_values_beyond_the_calibration_set() -> None:
    logits, y = draw_rows(300, 2)
    calibrator = QuadraticCalibration().fit(logits, y)
    s = logits[:, 1] - logits[:, 0]
    ends = calibrator.predict_proba(binary(np.array([s.min(), s.max()])))
    np.testing.assert_allclose(calibrator.predict_proba(binary(np.array([-1e6, 1e6]))), ends, atol=1e-12)


@pytest.mark.parametrize("kind", [BetaCalibration, QuadraticCalibration])
def test_a_class_without_rows_is_served_its_prior(kind: type[BetaCalibration | QuadraticCalibration]) -> None:
    logits, y = draw_rows(300, 4)
    y[y == 3] = 0
    assert 0 < kind().fit(logits, y).predict_proba(logits)[:, 3].mean() < 0.02


@pytest.mark.parametrize("kind", [BetaCalibration, QuadraticCalibration])
def test_separable_rows_have_a_finite_answer(kind: type[BetaCalibration | QuadraticCalibration]) -> None:
    scores = np.array([-9.0, -4.0, -2.0, 2.0, 4.0, 9.0])
    p = kind().fit(binary(scores), [0, 0, 0, 1, 1, 1]).predict_proba(binary(scores))
    assert p.min() > 0.05


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be one of abm, am, ab, got 'abc'"):
        BetaCalibration("abc").fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])  # type: ignore[arg-type]
