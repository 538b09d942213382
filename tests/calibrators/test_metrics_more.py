"""The further metrics against hand-computed answers, the authors' code, double loops over rows, and uniform p-values."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.isotonic

from calibrators import create, metrics
from calibrators.metrics.binned import BIN_COUNTS
from calibrators.metrics.smooth import CELLS
from calibrators.numerics import Array, softmax

ERRORS = {
    "aurc": metrics.aurc,
    "debiased_squared_error": metrics.debiased_squared_error,
    "kde_calibration_error": metrics.kde_calibration_error,
    "mmce": metrics.mmce,
    "nll_gap": metrics.nll_gap,
    "smooth_calibration_error": metrics.smooth_calibration_error,
    "top_label_calibration_error": metrics.top_label_calibration_error,
}
TESTS = {
    "hosmer_lemeshow": metrics.hosmer_lemeshow,
    "skce_test": metrics.skce_test,
    "spiegelhalter_z": metrics.spiegelhalter_z,
}


def labels_from(p: Array, rng: np.random.Generator) -> Array:
    return (rng.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=p.shape[1] - 1)


def rows(n_samples: int, n_classes: int, seed: int, temperature: float = 2.0) -> tuple[Array, Array]:
    """Probabilities whose labels were drawn at another temperature; temperature 1: perfectly calibrated."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n_samples, n_classes))
    return softmax(logits), labels_from(softmax(logits / temperature), rng)


def two_classes(confidence: Array, correct: Array) -> tuple[Array, Array]:
    return np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1)


# ------------------------------------------------------------------------------------------------ golden vectors

# Rows i = 1 .. n: confidence 0.5 + u/2 and right where v < f(confidence), with
# u = frac(0.6180339887498949 i + 0.137) and v = frac(0.7548776662466927 i + 0.311).
# smECE: relplot 1.0.3 (Błasiok and Nakkiran), `smECE`, on a mesh of 200 points and ten bisections.
# debiased: uncertainty-calibration 0.1.4 (Kumar, Liang, Ma), `unbiased_square_ce(bin(data, get_equal_bins(c, 10)))`.
GOLDEN: list[tuple[int, Any, float, float]] = [
    (500, lambda c: c - 0.15, 0.15024169678477992, 0.0194397244851721),
    (2000, lambda c: c**2, 0.16753684123721294, 0.03317559727817514),
    (1000, lambda c: c, 0.01145249825459045, -0.0015362294561143358),
    (3000, lambda c: 0.75 + 0 * c, 0.10369473409914207, 0.019923127591911997),
]


def golden_rows(n: int, accuracy_at: Any) -> tuple[Array, Array]:
    i = np.arange(1, n + 1, dtype=np.float64)
    confidence = 0.5 + 0.5 * ((0.6180339887498949 * i + 0.137) % 1)
    return confidence, (0.7548776662466927 * i + 0.311) % 1 < accuracy_at(confidence)


@pytest.mark.parametrize(("n", "accuracy_at", "smooth", "debiased"), GOLDEN)
def test_smooth_and_debiased_errors_are_those_of_the_authors_code(
    n: int, accuracy_at: Any, smooth: float, debiased: float
) -> None:
    p, y = two_classes(*golden_rows(n, accuracy_at))
    assert metrics.smooth_calibration_error(p, y) == pytest.approx(smooth, rel=5e-3)
    assert metrics.debiased_squared_error(p, y, n_bins=10) == pytest.approx(debiased, rel=1e-10)


# ------------------------------------------------------------------------------------------------ by definition


def reflected(kernel: Any, at: Array, centres: Array) -> Array:
    """sum over images of each centre at the mirrors 0 and 1, (n_at, n_centres)."""
    return sum(kernel(at[:, None] - (2 * m + sign * centres)) for m in range(-3, 4) for sign in (1, -1))


def test_smooth_error_is_the_width_at_which_the_smoothed_gap_is_as_large_as_the_width() -> None:
    confidence, correct = golden_rows(400, lambda c: 0.75 + 0 * c)
    width = metrics.smooth_calibration_error(*two_classes(confidence, correct))
    t = (np.arange(2000) + 0.5) / 2000
    density = reflected(lambda d: scipy.stats.norm.pdf(d, scale=width), t, confidence)
    assert np.abs(density @ (correct - confidence)).mean() / 400 == pytest.approx(width, rel=1e-6)


def test_kde_error_is_the_integral_of_its_definition() -> None:
    confidence, correct = golden_rows(400, lambda c: c**2)
    radius = 3 * confidence.std() * 800**-0.2
    t = (np.arange(8000) + 0.5) / 8000
    kernel = reflected(lambda d: 35 / 32 / radius * np.maximum(1 - (d / radius) ** 2, 0) ** 3, t, confidence)
    density, right = kernel.mean(axis=1), kernel @ correct / 400
    assert density.mean() == pytest.approx(1, rel=1e-6)
    with np.errstate(invalid="ignore"):
        integrand = np.where(density > 0, np.abs(t - right / density) * density, 0)
    assert metrics.kde_calibration_error(*two_classes(confidence, correct)) == pytest.approx(integrand.mean(), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 57])
def test_mmce_is_its_double_sum(n: int) -> None:
    p, y = rows(n, 3, seed=n)
    c, g = p.max(axis=1), (p.argmax(axis=1) == y) - p.max(axis=1)
    square = np.sum(np.outer(g, g) * np.exp(-np.abs(c[:, None] - c) / 0.4)) / n**2
    assert metrics.mmce(p, y) == pytest.approx(math.sqrt(square), rel=1e-12)


@pytest.mark.parametrize("estimator", ["linear", "quadratic"])
def test_skce_is_the_mean_over_pairs_of_its_kernel(estimator: Any) -> None:
    p, y = rows(41, 4, seed=3)
    residual = np.eye(4)[y] - p
    width = np.median([np.linalg.norm(p[i] - p[i + 1]) for i in range(40)])
    pairs = (
        list(itertools.combinations(range(41), 2))
        if estimator == "quadratic"
        else [(i, i + 1) for i in range(0, 40, 2)]
    )
    h = [np.exp(-np.linalg.norm(p[i] - p[j]) / width) * (residual[i] @ residual[j]) for i, j in pairs]
    found = metrics.skce_test(p, y, estimator=estimator)
    assert found.statistic == pytest.approx(np.mean(h), rel=1e-10)
    if estimator == "linear":
        z = np.mean(h) / (np.std(h, ddof=1) / math.sqrt(20))
        assert found.p_value == pytest.approx(scipy.stats.norm.sf(z), rel=1e-10)


def test_top_label_error_is_the_weighted_ece_of_each_predicted_class() -> None:
    p, y = rows(600, 4, seed=4)
    predicted = p.argmax(axis=1)
    parts = [
        np.mean(predicted == k) * metrics.expected_calibration_error(p[predicted == k], y[predicted == k], 10)
        for k in range(4)
    ]
    found = metrics.top_label_calibration_error(p, y, n_bins=10)
    assert found == pytest.approx(sum(parts), rel=1e-12)
    assert found >= metrics.expected_calibration_error(p, y, n_bins=10)


def test_top_label_error_sees_classes_whose_errors_cancel_in_the_ece() -> None:
    p = [[0.7, 0.2, 0.1]] * 10 + [[0.1, 0.7, 0.2]] * 10
    y = [0] * 9 + [2] + [1] * 5 + [2] * 5
    assert metrics.expected_calibration_error(p, y) == pytest.approx(0, abs=1e-12)
    assert metrics.top_label_calibration_error(p, y) == pytest.approx(0.2, rel=1e-12)


def test_errors_by_bins_are_the_two_binned_errors_at_each_number() -> None:
    p, y = rows(700, 5, seed=5)
    found = metrics.calibration_errors_by_bins(p, y)
    assert BIN_COUNTS == (5, 10, 15, 20, 25, 50, 100, 200, 500)
    for n in BIN_COUNTS:
        assert found["equal_width"][n] == pytest.approx(metrics.expected_calibration_error(p, y, n), abs=1e-14)
        assert found["equal_mass"][n] == pytest.approx(metrics.adaptive_calibration_error(p, y, n), abs=1e-14)


def test_brier_parts_are_differences_of_squared_errors_of_scikit_learns_isotonic_regression() -> None:
    p, y = rows(300, 3, seed=6)
    p = np.round(p, 2)  # ties
    p[:, 0] = np.abs(np.round(1 - p[:, 1:].sum(axis=1), 2))
    said = mapped = base = 0.0
    for k in range(3):
        came = (y == k).astype(float)
        q = sklearn.isotonic.IsotonicRegression().fit_transform(p[:, k], came)
        said += np.mean((p[:, k] - came) ** 2)
        mapped += np.mean((q - came) ** 2)
        base += np.mean((came.mean() - came) ** 2)
    parts = metrics.brier_decomposition(p, y)
    assert parts.calibration == pytest.approx(said - mapped, rel=1e-10)
    assert parts.resolution == pytest.approx(base - mapped, rel=1e-10)
    assert parts.uncertainty == pytest.approx(base, rel=1e-12)
    assert parts.refinement == pytest.approx(mapped, rel=1e-10)


@pytest.mark.parametrize(("n", "n_classes"), [(1, 2), (7, 3), (500, 2), (500, 40)])
def test_brier_parts_sum_to_the_brier_score_and_none_is_negative(n: int, n_classes: int) -> None:
    p, y = rows(n, n_classes, seed=n)
    parts = metrics.brier_decomposition(p, y)
    assert parts.brier_score == pytest.approx(metrics.brier_score(p, y), rel=1e-12)
    assert parts.calibration - parts.resolution + parts.uncertainty == pytest.approx(parts.brier_score, rel=1e-12)
    assert min(parts.calibration, parts.resolution, parts.uncertainty) >= 0


def test_nll_gap_is_what_temperature_scaling_of_the_log_probabilities_gains() -> None:
    p, y = rows(500, 4, seed=7)
    after = create("temperature").fit(np.log(p), y).predict_proba(np.log(p))
    assert metrics.nll_gap(p, y) == pytest.approx(metrics.log_loss(p, y) - metrics.log_loss(after, y), rel=1e-9)
    assert metrics.nll_gap(after, y) == pytest.approx(0, abs=1e-9)


def test_nll_gap_of_an_infinite_loss_is_infinite_and_other_zeros_do_no_harm() -> None:
    assert metrics.nll_gap([[1.0, 0.0]], [1]) == math.inf
    assert 0 <= metrics.nll_gap([[1.0, 0.0], [0.3, 0.7], [0.3, 0.7]], [0, 1, 0]) < 1


def test_risk_is_the_mean_over_every_order_of_tied_rows() -> None:
    confidence = np.array([0.6, 0.9, 0.6, 0.6, 0.8])
    wrong = np.array([1, 0, 0, 1, 1])
    ranked = [
        np.cumsum(wrong[list(order)]) / np.arange(1, 6)
        for order in itertools.permutations(range(5))
        if np.all(np.diff(confidence[list(order)]) <= 0)
    ]
    p, y = two_classes(confidence, 1 - wrong)
    curve = metrics.risk_coverage_curve(p, y)
    np.testing.assert_allclose(curve.risk, np.mean(ranked, axis=0), rtol=1e-12)
    assert metrics.aurc(p, y) == pytest.approx(np.mean(ranked), rel=1e-12)
    np.testing.assert_array_equal(curve.confidence, [0.9, 0.8, 0.6, 0.6, 0.6])
    np.testing.assert_allclose(curve.coverage, [0.2, 0.4, 0.6, 0.8, 1.0])


def test_aurc_of_a_confidence_that_says_nothing_is_the_error_rate() -> None:
    assert metrics.aurc([[0.6, 0.4]] * 10, [0] * 7 + [1] * 3) == pytest.approx(0.3)


# ------------------------------------------------------------------------------------------------ bias and tests


def test_debiased_error_of_a_calibrated_model_is_zero_on_average() -> None:
    # Within five standard errors of the mean of 400 data sets: false-failure rate under 1e-6. The plain squared error
    # of 15 bins of 20 rows is over ten times as far away.
    rng = np.random.default_rng(8)
    p = np.tile([[0.7, 0.3]], (300, 1)) + np.linspace(-0.15, 0.15, 300)[:, None] * [1, -1]
    found = np.array([metrics.debiased_squared_error(p, labels_from(p, rng)) for _ in range(400)])
    assert abs(found.mean()) < 5 * found.std() / 20


def test_kernel_smoothed_and_binned_errors_agree_on_many_rows() -> None:
    p, y = rows(20000, 3, seed=9)
    ece = metrics.expected_calibration_error(p, y)
    assert metrics.smooth_calibration_error(p, y) == pytest.approx(ece, rel=0.05)
    assert metrics.kde_calibration_error(p, y) == pytest.approx(ece, rel=0.05)
    assert math.sqrt(metrics.debiased_squared_error(p, y)) == pytest.approx(ece, rel=0.2)


@pytest.mark.parametrize(
    ("name", "params", "n", "repeats"),
    [
        ("spiegelhalter_z", {}, 1000, 600),
        ("hosmer_lemeshow", {}, 1000, 600),
        ("skce_test", {"estimator": "linear"}, 2000, 600),
        ("skce_test", {"estimator": "quadratic", "n_resamples": 99}, 30, 600),
    ],
)
def test_p_values_of_a_calibrated_model_are_uniform(name: str, params: dict[str, Any], n: int, repeats: int) -> None:
    # The largest distance of 600 p-values' distribution from the uniform exceeds 0.095 with probability below
    # 2 exp(-2 * 600 * 0.095^2) = 4e-5 (Dvoretzky, Kiefer, Wolfowitz). The approximations of the first three take up to
    # 0.015 more (measured on 8000 data sets), the steps of 1/100 of the fourth 0.01 more: so 0.11.
    rng = np.random.default_rng(10)
    p = softmax(1.5 * rng.normal(size=(n, 3)))
    # One set of draws for all data sets would put all their p-values off by the same chance.
    seeds = [{"seed": i} if name == "skce_test" else {} for i in range(repeats)]
    found = [TESTS[name](p, labels_from(p, rng), **params, **seed).p_value for seed in seeds]
    assert scipy.stats.kstest(found, "uniform").statistic < 0.11


@pytest.mark.parametrize(
    ("name", "params", "n"),
    [
        ("spiegelhalter_z", {}, 500),
        ("hosmer_lemeshow", {}, 500),
        ("skce_test", {"estimator": "linear"}, 200_000),
        ("skce_test", {"estimator": "quadratic", "n_resamples": 199}, 500),
    ],
)
def test_a_model_twice_too_sharp_is_rejected(name: str, params: dict[str, Any], n: int) -> None:
    p, y = rows(n, 3, seed=11)
    assert TESTS[name](p, y, **params).p_value <= 0.005


def test_spiegelhalters_z_of_two_classes_is_the_published_formula_and_its_sign_the_direction() -> None:
    p, y = rows(400, 2, seed=12)
    one = p[:, 1]
    z = np.sum((y - one) * (1 - 2 * one)) / math.sqrt(np.sum((1 - 2 * one) ** 2 * one * (1 - one)))
    found = metrics.spiegelhalter_z(p, y)
    assert found.statistic == pytest.approx(z, rel=1e-10)
    assert found.statistic > 2
    assert metrics.spiegelhalter_z(*rows(400, 2, seed=12, temperature=0.5)).statistic < -2


def test_hosmer_lemeshow_of_two_bins_is_the_sum_computed_by_hand() -> None:
    p, y = two_classes(np.repeat([0.6, 0.9], 50), np.repeat([1, 0, 1, 0], [20, 30, 40, 10]))
    found = metrics.hosmer_lemeshow(p, y, n_bins=2)
    assert found.statistic == pytest.approx(50 * 0.2**2 / 0.24 + 50 * 0.1**2 / 0.09, rel=1e-10)
    assert found.p_value == pytest.approx(math.exp(-found.statistic / 2), rel=1e-10)  # chi-square with two degrees


def test_rows_that_could_not_surprise_say_nothing_until_one_does() -> None:
    certain = np.eye(2)[[0, 1, 0, 1]]
    for test in TESTS.values():
        assert test(certain, [0, 1, 0, 1]).p_value >= 0.5
    for name in ("spiegelhalter_z", "hosmer_lemeshow"):
        assert TESTS[name](certain, [0, 1, 0, 0]).p_value == 0


def test_the_quadratic_test_repeats_with_its_seed() -> None:
    p, y = rows(60, 3, seed=13, temperature=1)
    found = [metrics.skce_test(p, y, estimator="quadratic", seed=s).p_value for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------------------------------------------ edges and refusals


@pytest.mark.parametrize("name", ERRORS)
def test_perfect_sure_rows_have_no_error_and_a_sure_wrong_row_is_finite_or_infinite(name: str) -> None:
    sure = np.eye(3)[[0, 1, 2, 0]]
    half_a_cell = 0.5 / CELLS if name == "kde_calibration_error" else 1e-12
    assert ERRORS[name](sure, [0, 1, 2, 0]) == pytest.approx(0, abs=1.01 * half_a_cell)
    assert ERRORS[name](sure, [1, 2, 0, 1]) == (math.inf if name == "nll_gap" else pytest.approx(1, rel=1e-4))


@pytest.mark.parametrize("name", [*ERRORS, *TESTS])
def test_the_order_of_the_rows_and_the_precision_have_no_say(name: str) -> None:
    metric: Any = ERRORS.get(name) or TESTS[name]
    p, y = rows(200, 4, seed=14)
    order = np.random.default_rng(15).permutation(200) if name != "skce_test" else np.arange(200)
    first, second = metric(p, y), metric(p[order].astype(np.float32), y[order])
    values = (first, second) if name in ERRORS else (first.statistic, second.statistic)
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("name", ["aurc", "kde_calibration_error", "mmce", "smooth_calibration_error"])
def test_one_row_has_an_answer(name: str) -> None:
    assert ERRORS[name]([[0.8, 0.2]], [0]) == pytest.approx(0 if name == "aurc" else 0.2)


def test_a_bin_of_one_row_adds_nothing_to_the_debiased_error() -> None:
    assert metrics.debiased_squared_error([[0.8, 0.2]], [0]) == 0


def test_what_the_tests_cannot_take_is_refused_by_name() -> None:
    p, y = rows(5, 3, seed=16)
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        metrics.skce_test(p[:3], y[:3])
    with pytest.raises(ValueError, match="one of linear, quadratic, got 'cubic'"):
        metrics.skce_test(p, y, estimator="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_resamples must be at least 1, got 0"):
        metrics.skce_test(p, y, estimator="quadratic", n_resamples=0)
    with pytest.raises(ValueError, match="at most 4000 rows, got 4001"):
        metrics.skce_test([[0.5, 0.5]] * 4001, [0] * 4001, estimator="quadratic")
    for metric in (metrics.debiased_squared_error, metrics.top_label_calibration_error, metrics.hosmer_lemeshow):
        with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
            metric(p, y, n_bins=0)


@pytest.mark.parametrize("name", [*ERRORS, *TESTS])
def test_logits_are_refused(name: str) -> None:
    metric: Any = ERRORS.get(name) or TESTS[name]
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        metric([[3.0, -2.0]] * 5, [0] * 5)


@pytest.mark.parametrize(
    "name",
    ["accuracy", "brier_score", "classwise_calibration_error", "expected_calibration_error", "log_loss", *ERRORS],
)
def test_no_metric_copies_many_classes_more_than_twice(name: str) -> None:
    """In float64, which the fits within some metrics need; what is small beside the probabilities is a fifth of them."""
    p, y = rows(3000, 500, seed=0)
    metric: Any = getattr(metrics, name)
    tracemalloc.start()
    try:
        metric(p, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * p.nbytes
