"""vector, matrix, structured_vector, structured_matrix, dirichlet and their solver, against outside optimisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import approx_fprime, minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]  # it ships no types

import calibrators
from calibrators import multinomial
from calibrators.kinds.matrix import MatrixScaling
from calibrators.kinds.structured_matrix import StructuredMatrixScaling
from calibrators.kinds.structured_vector import StructuredVectorScaling
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.kinds.vector import VectorScaling
from calibrators.metrics import expected_calibration_error
from calibrators.multinomial import Ridge, Rows, curvature, fold_of_row, hessian, minimise, value_and_gradient

Array = NDArray[Any]
LINEAR_KINDS = ["vector", "matrix", "structured_vector", "structured_matrix", "dirichlet"]


def draw_rows(n_samples: int, n_classes: int = 3, scale: float = 2.0, seed: int = 7) -> tuple[Array, Array]:
    """Labels from a map with other slopes and biases for each class, rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n_samples, n_classes))
    slopes, biases = np.linspace(0.7, 1.3, n_classes), np.linspace(-0.5, 0.5, n_classes)
    return scale * z, (z * slopes + biases + rng.gumbel(size=z.shape)).argmax(axis=1)


def mean_log_loss(probabilities: Array, y: Array) -> float:
    return float(-np.log(probabilities[np.arange(len(y)), y]).mean())


def problem(width: int, unseen: float = 0.0) -> tuple[Rows, Array, Array, Array]:
    """Weighted rows of 4 classes (class 3 absent), a map that is no optimum, a precision and a centre."""
    x, y = draw_rows(60, 4)
    rng = np.random.default_rng(1)
    y[y == 3] = 0
    rows = Rows.of(x, y, rng.uniform(0.5, 2, size=60), unseen=unseen)
    weights, precision, centre = (
        rng.normal(size=(4, width)),
        rng.uniform(0.1, 1, (4, width)),
        rng.normal(size=(4, width)),
    )
    return rows, weights, precision, centre


# ---- the solver


@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("unseen", [0.0, 0.5])
def test_gradient_and_hessian_are_those_of_finite_differences(width: int, unseen: float) -> None:
    rows, weights, precision, centre = problem(width, unseen)

    def gradient(flat: Array) -> Array:
        return value_and_gradient(rows, flat.reshape(4, width), precision, centre)[1].ravel()

    def value(flat: Array) -> float:
        return value_and_gradient(rows, flat.reshape(4, width), precision, centre)[0]

    np.testing.assert_allclose(gradient(weights.ravel()), approx_fprime(weights.ravel(), value, 1e-7), atol=2e-6)
    second = hessian(rows, weights, precision)
    np.testing.assert_allclose(second, approx_fprime(weights.ravel(), gradient, 1e-7), atol=2e-6)
    np.testing.assert_allclose(curvature(rows, weights, precision).ravel(), np.diag(second), rtol=1e-10)


@pytest.mark.parametrize("width", [2, 5])
def test_newton_and_lbfgs_end_where_the_gradient_vanishes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, start, precision, centre = problem(width, unseen=0.5)
    newton = minimise(rows, precision, centre, start)
    monkeypatch.setattr(multinomial, "MOST_NEWTON_PARAMETERS", 0)
    lbfgs = minimise(rows, precision, centre, start)
    assert newton.converged and lbfgs.converged
    assert np.abs(value_and_gradient(rows, newton.map, precision, centre)[1]).max() <= 1e-9
    assert np.abs(value_and_gradient(rows, lbfgs.map, precision, centre)[1]).max() <= 1e-5
    np.testing.assert_allclose(lbfgs.map, newton.map, atol=1e-4)


@pytest.mark.parametrize(
    ("ridge", "centred_on_identity"),
    [
        (Ridge(off_diagonal=0.1, diagonal=0.0, bias=0.1), False),
        (Ridge(off_diagonal=0.05, diagonal=0.05, bias=0.05), True),
        (Ridge(off_diagonal=0.3, diagonal=0.1, bias=0.2), True),
    ],
    ids=["odir", "matrix", "structured_matrix"],
)
def test_fewer_rows_than_classes_are_solved_in_their_span_with_the_same_answer(
    ridge: Ridge, centred_on_identity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multinomial, "LBFGS_TOLERANCE", 1e-9)
    monkeypatch.setattr(multinomial, "LBFGS_STEPS", 5000)
    logits, y = draw_rows(15, 25)
    rows = Rows.of(logits, y, np.linspace(0.5, 2, 15), unseen=0.5)
    identity, precision = multinomial.identity_map(25, diagonal=False), ridge.precision(25)
    centre = identity if centred_on_identity else np.zeros_like(identity)
    assert Ridge.of(precision, centre) == ridge
    in_span = minimise(rows, precision, centre, identity)
    monkeypatch.setattr(Ridge, "of", lambda *_: None)
    in_full = minimise(rows, precision, centre, identity)
    assert not np.array_equal(in_span.map, in_full.map)  # two ways, not one
    assert np.abs(value_and_gradient(rows, in_span.map, precision, centre)[1]).max() < 1e-7
    unseen = draw_rows(200, 25, seed=1)[0]
    expected = softmax(multinomial.scores(unseen, in_full.map), axis=1)
    np.testing.assert_allclose(softmax(multinomial.scores(unseen, in_span.map), axis=1), expected, atol=1e-6)


def test_without_a_penalty_the_span_of_the_rows_loses_nothing() -> None:
    """The least loss is then that of many maps; the smaller problem must come as near to it."""
    logits, y = draw_rows(15, 25)
    rows, centre = Rows.of(logits, y, np.ones(15), unseen=0.5), np.zeros((25, 26))
    free = np.zeros_like(centre)

    def objective(flat: Array) -> tuple[float, Array]:
        value, gradient = value_and_gradient(rows, flat.reshape(centre.shape), free, centre)
        return value, gradient.ravel()

    oracle = minimize(objective, centre.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "gtol": 1e-9})
    found = minimise(rows, free, centre)
    assert value_and_gradient(rows, found.map, free, centre)[0] == pytest.approx(oracle.fun, abs=1e-6)


def test_only_a_penalty_of_three_numbers_is_a_ridge_of_the_span() -> None:
    identity = multinomial.identity_map(25, diagonal=False)
    ridge = Ridge(off_diagonal=0.3, diagonal=0.1, bias=0.2)
    uneven = ridge.precision(25)
    uneven[3, 4] = 0.4
    assert Ridge.of(uneven, identity) is None
    assert Ridge.of(Ridge(off_diagonal=0.1, diagonal=0.3, bias=0.2).precision(25), identity) is None
    assert Ridge.of(ridge.precision(25), np.ones((25, 26))) is None
    assert Ridge.of(np.ones((25, 2)), multinomial.identity_map(25, diagonal=True)) is None


def test_small_products_are_left_to_one_thread_and_large_ones_as_they_were() -> None:
    def threads() -> list[int]:
        """Of numpy and scipy; other libraries that a test has loaded bring pools of their own."""
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        return [pool["num_threads"] for pool in pools if "faiss" not in pool["filepath"]]

    with threadpool_limits(2, user_api="blas"):
        with multinomial.limited_threads(np.zeros((400, 100))):
            assert set(threads()) == {1}
        with multinomial.limited_threads(np.zeros((1000, 1000))):
            assert set(threads()) == {2}
        assert set(threads()) == {2}


def test_separable_rows_without_a_penalty_are_told_apart_from_a_minimum() -> None:
    y = np.random.default_rng(0).integers(0, 3, size=60)
    logits = np.eye(3)[y] + 0.1 * np.random.default_rng(1).normal(size=(60, 3))
    logits[:, 0] -= 10 * (y == 0)  # ranked last when right: a temperature cannot separate it, a map can
    for cls in (VectorScaling, MatrixScaling):
        assert not cls(penalty=0).fit(logits, y).converged_
        assert cls(penalty=1).fit(logits, y).converged_


def test_equal_rows_share_a_fold_whatever_their_order() -> None:
    logits, y = draw_rows(100)
    fold = fold_of_row(logits, y, seed=0)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 2))
    np.testing.assert_array_equal(fold_of_row(logits[order], y[order], seed=0), fold[order])
    assert np.bincount(fold).tolist() == [20] * 5
    assert not np.array_equal(fold_of_row(logits, y, seed=1), fold)


# ---- each kind minimises what it says


@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_matrix_is_scikit_learns_ridge_around_temperature_scaling(penalty: float) -> None:
    """scikit-learn draws W to zero and b not at all: take the rows in units of T, a centre of zero, free biases."""
    logits, y = draw_rows(300)
    oracle = LogisticRegression(C=1 / penalty, solver="lbfgs", tol=1e-10, max_iter=10_000).fit(logits, y)
    centre, precision = np.zeros((3, 4)), np.full((3, 4), penalty / 300)
    precision[:, -1] = 0
    found = minimise(Rows.of(logits, y, np.ones(300)), precision, centre)
    np.testing.assert_allclose(found.map[:, :-1], oracle.coef_, atol=1e-5)
    expected = oracle.predict_proba(logits)
    np.testing.assert_allclose(softmax(multinomial.scores(logits, found.map), axis=1), expected, atol=1e-6)


def test_matrix_without_a_penalty_is_maximum_likelihood() -> None:
    logits, y = draw_rows(300)
    oracle = LogisticRegression(C=np.inf, solver="lbfgs", tol=1e-10, max_iter=10_000).fit(logits, y)
    served = MatrixScaling(penalty=0).fit(logits, y).predict_proba(logits)
    np.testing.assert_allclose(served, oracle.predict_proba(logits), atol=1e-6)


def stated_loss(kind: str, params: dict[str, Any], logits: Array, y: Array, weights: Array, bias: Array) -> Any:
    """The objective of the kind's first docstring, term by term."""
    n, k = logits.shape
    full = np.diag(weights) if weights.ndim == 1 else weights
    diagonal, rest = np.diag(full), full - np.diag(np.diag(full))
    temperature = float(TemperatureScaling().fit(logits, y).temperature_)
    if kind in ("vector", "matrix"):
        away = temperature * full - np.eye(k)
        p = softmax(logits @ full.T + bias, axis=1)
        return mean_log_loss(p, y) + params["penalty"] / 2 / n * (np.sum(away**2) + bias @ bias)
    if kind == "dirichlet":
        p = softmax(log_softmax(logits, axis=1) @ full.T + bias, axis=1)
        if params["regularisation"] == "l2":
            return mean_log_loss(p, y) + params["strength"] * (np.sum(full**2) + bias @ bias)
        odir = params["strength"] / (k * (k - 1)) * np.sum(rest**2) + params["bias_strength"] / k * bias @ bias
        return mean_log_loss(p, y) + odir
    mixed = np.log((1 - 1 / (n + 1)) * softmax(logits / temperature, axis=1) + 1 / (n + 1) / k)
    p = softmax(mixed @ full.T + bias, axis=1)
    terms = params["lambda_bias"] * bias @ bias + params["lambda_diagonal"] * np.sum((diagonal - 1) ** 2)
    factor, rho = 1 / n ** params["tau"], params["rho"]
    off = params.get("lambda_off_diagonal", 0.0) * (k * (k - 1)) ** rho * np.sum(rest**2)
    return mean_log_loss(p, y) + factor * (k**rho * terms + off)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("vector", {"penalty": 3.0}),
        ("matrix", {"penalty": 3.0}),
        ("structured_vector", {"lambda_bias": 0.3, "lambda_diagonal": 2.0, "rho": 0.5, "tau": 0.8}),
        (
            "structured_matrix",
            {"lambda_bias": 0.3, "lambda_diagonal": 2.0, "lambda_off_diagonal": 0.7, "rho": 0.5, "tau": 0.8},
        ),
        ("dirichlet", {"regularisation": "odir", "strength": 0.05, "bias_strength": 0.2}),
        ("dirichlet", {"regularisation": "l2", "strength": 0.01, "bias_strength": 0.0}),
    ],
)
def test_scipy_finds_no_lower_value_of_the_stated_objective(kind: str, params: dict[str, Any]) -> None:
    logits, y = draw_rows(120)
    calibrator: Any = calibrators.create(kind, **params).fit(logits, y)
    assert calibrator.converged_
    shape = calibrator.weight_.shape

    def objective(flat: Array) -> float:
        return float(stated_loss(kind, params, logits, y, flat[:-3].reshape(shape), flat[-3:]))

    ours = np.concatenate([calibrator.weight_.ravel(), calibrator.bias_])
    start = np.concatenate([(np.ones(3) if len(shape) == 1 else np.eye(3)).ravel(), np.zeros(3)])
    oracle = minimize(objective, start, method="BFGS", options={"gtol": 1e-6})
    assert objective(ours) <= oracle.fun + 1e-12
    np.testing.assert_allclose(ours, oracle.x, atol=1e-3)


GOLDEN_ROWS = np.array([[1.0, 0, 0], [0, 2, 0], [-1, 0, 3], [4, 4, -4]])


@pytest.mark.parametrize(
    ("calibrator", "expected"),
    [
        (
            StructuredVectorScaling(),
            [[0.395040, 0.350108, 0.254852], [0.160354, 0.658435, 0.181211], [0.071512, 0.209772, 0.718716], [0.414899, 0.577979, 0.007122]],
        ),
        (
            StructuredVectorScaling(lambda_bias=0.3, lambda_diagonal=2.0, rho=0.5, tau=0.8),
            [[0.390712, 0.351440, 0.257848], [0.158426, 0.662779, 0.178795], [0.075925, 0.207544, 0.716531], [0.403826, 0.588453, 0.007721]],
        ),
        (
            StructuredMatrixScaling(),
            [[0.395002, 0.356463, 0.248535], [0.166439, 0.658940, 0.174621], [0.065310, 0.214101, 0.720589], [0.476479, 0.516968, 0.006552]],
        ),
        (
            StructuredMatrixScaling(lambda_bias=0.3, lambda_diagonal=2.0, rho=0.5, tau=0.8),
            [[0.388784, 0.363250, 0.247966], [0.163027, 0.665508, 0.171466], [0.068129, 0.214616, 0.717255], [0.478030, 0.514848, 0.007122]],
        ),
    ],
)  # fmt: skip
def test_structured_kinds_are_the_authors_implementation(calibrator: Any, expected: list[list[float]]) -> None:
    """probmetrics 1.3.0, SVSCalibrator and SMSCalibrator, on softmax(logits); their BFGS stops at a gradient of 1e-5."""
    rng = np.random.default_rng(7)
    z = 1.5 * rng.normal(size=(200, 3))
    y = (z * [1, 0.7, 1.3] + [0, 0.5, 0] + rng.gumbel(size=z.shape)).argmax(axis=1)
    np.testing.assert_allclose(calibrator.fit(2 * z, y).predict_proba(GOLDEN_ROWS), expected, atol=3e-4)


# ---- choices, absences, limits


@pytest.mark.parametrize("slope", [1.0, -2.0, 50.0])  # from 50 on a row's largest score must be found
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_structured_vector_is_its_formula_whether_scores_lie_near_or_far(slope: float, dtype: Any) -> None:
    logits = np.array([[0.0, -2.0, 3.0], [200.0, 0.0, -300.0], [-1e4, 0.0, 1.0]], dtype=dtype)
    weight, bias, mix = slope * np.array([0.9, 1.0, 1.2]), np.array([0.3, -5.0, 2.0]), 0.01
    learned = {"temperature": 2.0, "mix": mix, "weight": weight, "bias": bias}
    tensors = {name: np.asarray(array) for name, array in learned.items()} | {"n_classes": np.asarray(3)}
    calibrator = StructuredVectorScaling().set_tensors(tensors)
    mixed = np.log((1 - mix) * softmax(logits.astype(float) / 2, axis=1) + mix / 3)
    expected = softmax(weight * mixed + bias, axis=1)
    rtol, underflow = (1e-3, 1e-37) if dtype == np.float32 else (1e-12, 1e-290)
    np.testing.assert_allclose(calibrator.predict_proba(logits), expected, rtol=rtol, atol=underflow)


def test_a_penalty_beyond_all_measure_is_temperature_scaling() -> None:
    logits, y = draw_rows(300)
    expected = TemperatureScaling().fit(logits, y).predict_proba(logits)
    for kind in ("vector", "matrix"):
        served = calibrators.create(kind, penalty=1e12).fit(logits, y).predict_proba(logits)
        np.testing.assert_allclose(served, expected, atol=1e-6)


def test_what_a_temperature_explains_is_left_to_it_and_what_it_cannot_is_learned() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 5))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    explained, swapped = MatrixScaling().fit(2 * z, y), MatrixScaling().fit(2 * z[:, [1, 0, 2, 3, 4]], y)
    assert explained.penalty_ >= 1000
    assert swapped.penalty_ <= 100
    assert MatrixScaling().fit(2 * z, y).penalty_ == explained.penalty_


@pytest.mark.parametrize("kind", ["matrix", "dirichlet"])
def test_few_rows_of_ten_classes_do_not_explode(kind: str) -> None:
    """Maximum likelihood with 110 parameters on 100 rows; held out on 5,000."""
    fit, unseen = draw_rows(100, 10), draw_rows(5000, 10, seed=1)
    limit = mean_log_loss(TemperatureScaling().fit(*fit).predict_proba(unseen[0]), unseen[1])
    chosen = calibrators.create(kind).fit(*fit)
    assert mean_log_loss(chosen.predict_proba(unseen[0]), unseen[1]) < limit + 0.15
    exploded = MatrixScaling(penalty=0).fit(*fit).predict_proba(unseen[0])
    assert mean_log_loss(np.maximum(exploded, 1e-300), unseen[1]) > limit + 1


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_class_without_rows_keeps_a_finite_bias_and_a_small_probability(kind: str) -> None:
    logits, y = draw_rows(400, 4)
    y[y == 3] = 0
    calibrator: Any = calibrators.create(kind).fit(logits, y)
    p = calibrator.predict_proba(logits)
    assert p[:, 3].min() > 0
    assert p[:, 3].mean() < 0.03
    assert calibrator.converged_


@pytest.mark.parametrize("cls", [VectorScaling, MatrixScaling])
def test_half_a_row_is_what_an_unpenalised_absent_class_gets(cls: type[VectorScaling | MatrixScaling]) -> None:
    """With free biases the mean probability of each class is its share of the rows: (1/2) / (400 + 1/2)."""
    logits, y = draw_rows(400, 4)
    y[y == 3] = 0
    p = cls(penalty=0).fit(logits, y).predict_proba(logits)
    assert p[:, 3].mean() == pytest.approx(0.5 / 400.5, rel=1e-4)


def test_a_full_map_of_too_many_numbers_is_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multinomial, "MOST_WORK", 1000)
    logits, y = draw_rows(112)
    for kind in ("matrix", "structured_matrix", "dirichlet"):
        with pytest.raises(
            ValueError, match=rf"{kind} is fitted for n_samples \* n_classes\^2 up to 1000, got 112 rows"
        ):
            calibrators.create(kind).fit(logits, y)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("vector", {"penalty": -1.0}, 'penalty must be "cv" or a finite number of 0 or more, got -1.0'),
        ("matrix", {"penalty": "auto"}, "penalty must be .* got 'auto'"),
        ("structured_vector", {"lambda_bias": -1}, "lambda_bias must be a finite number of 0 or more, got -1"),
        ("structured_matrix", {"rho": np.nan}, "rho must be a finite number, got nan"),
        ("dirichlet", {"strength": np.inf}, "strength must be"),
        ("dirichlet", {"regularisation": "l1"}, "regularisation must be one of odir, l2, got 'l1'"),
    ],
)
def test_a_parameter_outside_its_range_is_refused(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.create(kind, **params)


# ---- published and recorded numbers


def cifar10(shared_data: Path) -> tuple[Array, Array, Array, Array]:
    folder = shared_data / "cifar10_resnet50_ce"
    parts = [np.load(folder / f"{part}.npz") for part in ("val", "test")]
    return parts[0]["logits"], parts[0]["labels"], parts[1]["logits"], parts[1]["labels"]


def test_vector_scaling_of_cifar10_is_the_published_one(shared_data: Path) -> None:
    """Maximum likelihood on Mukhoti et al.'s ResNet-50 logits: accuracy .9498, ECE .01441, log loss .19798."""
    logits, y, unseen, labels = cifar10(shared_data)
    p = VectorScaling(penalty=0).fit(logits, y).predict_proba(unseen)
    assert (p.argmax(axis=1) == labels).mean() == pytest.approx(0.9498, abs=1e-4)
    assert mean_log_loss(p, labels) == pytest.approx(0.19798, abs=5e-5)
    assert expected_calibration_error(p, labels, n_bins=15) == pytest.approx(0.01441, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("vector", 0.1979), ("matrix", 0.1934), ("structured_vector", 0.1996), ("structured_matrix", 0.1935)],
)
def test_cifar10_log_loss_stays_where_it_was_measured(shared_data: Path, kind: str, expected: float) -> None:
    """Temperature scaling: .2038. probmetrics 1.3.0 gives .19962 (SVS) and .19353 (SMS)."""
    logits, y, unseen, labels = cifar10(shared_data)
    served = calibrators.create(kind).fit(logits, y).predict_proba(unseen)
    assert mean_log_loss(served, labels) == pytest.approx(expected, abs=2e-4)


def test_dirichlet_with_either_penalty_beats_temperature_scaling_on_cifar10(shared_data: Path) -> None:
    logits, y, unseen, labels = cifar10(shared_data)
    for regularisation in ("odir", "l2"):
        calibrator = calibrators.create("dirichlet", regularisation=regularisation).fit(logits, y)
        assert mean_log_loss(calibrator.predict_proba(unseen), labels) < 0.2
