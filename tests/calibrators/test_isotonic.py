"""isotonic: its blocks against scikit-learn, what it keeps, and what its departures from the papers buy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from calibrators.graph import signature
from calibrators.kinds.isotonic import GRID_POINTS, LEAST_SLOPE, IsotonicCalibration, _blocks
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.numerics import log_odds, softmax

Array = NDArray[Any]
Method = Literal["one_vs_rest", "accuracy_preserving"]
METHODS: tuple[Method, ...] = ("one_vs_rest", "accuracy_preserving")
both_methods = pytest.mark.parametrize("method", METHODS)


def draw_rows(n_samples: int, n_classes: int, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def log_loss(probabilities: Array, y: Array) -> float:
    return float(-np.log(probabilities[np.arange(len(y)), y]).mean())


def clipped_steps(logits: Array, y: Array, unseen: Array) -> Array:
    """Isotonic one-vs-rest as it is usually done: scikit-learn's maps of the probabilities, clipped, normalised."""
    p, q = softmax(logits.astype(np.float64)), softmax(unseen.astype(np.float64))
    maps = [IsotonicRegression(out_of_bounds="clip").fit(p[:, k], y == k) for k in range(p.shape[1])]
    steps = np.clip(np.column_stack([one.predict(q[:, k]) for k, one in enumerate(maps)]), 1e-6, 1)
    return np.asarray(steps / steps.sum(axis=1, keepdims=True))


# ---- blocks


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(st.integers(-8, 8), st.booleans(), st.sampled_from([0.5, 1.0, 2.0])), min_size=2, max_size=60
    ),
    n_classes=st.integers(2, 50),
)
def test_blocks_are_scikit_learns_with_a_pseudo_row_at_either_end(
    rows: list[tuple[int, bool, float]], n_classes: int
) -> None:
    scores, hits, weight = (np.array(column) for column in zip(*rows, strict=True))
    centres, shares = _blocks(scores.astype(np.float32), hits, weight, n_classes)
    oracle = IsotonicRegression().fit(
        np.concatenate([[-99.0], scores, [99.0]]),
        np.concatenate([[1.0], hits, [0.0]]),
        sample_weight=np.concatenate([[1 / n_classes], weight, [1 - 1 / n_classes]]),
    )
    fitted = oracle.predict(scores.astype(float)).round(12)
    np.testing.assert_allclose(shares, np.unique(fitted), atol=1e-11)
    for share, centre in zip(np.unique(fitted), centres, strict=True):
        inside = fitted == share
        assert centre == pytest.approx(np.average(scores[inside], weights=weight[inside]))


def test_the_map_passes_through_its_blocks_in_log_odds() -> None:
    """By hand, two classes: log-odds 1 right 40 times in 80, 4 right 20 in 20. Below stands half a positive, above half
    a negative: shares 40.5 / 80.5 and 20 / 20.5 of class 1; class 0 mirrors them with 40 and 0 positives."""
    logits = np.repeat([[0.0, 1.0], [0.0, 4.0]], [80, 20], axis=0)
    y = np.concatenate([np.arange(80) % 2, np.ones(20, dtype=int)])
    served = IsotonicCalibration().fit(logits, y).predict_proba([[0.0, 1.0], [0.0, 2.5], [0.0, 4.0]])[:, 1]
    low, high = logit([40.5 / 80.5, 20 / 20.5])
    np.testing.assert_allclose(served, expit([low, (low + high) / 2, high]), atol=2e-3)


def test_neighbours_of_equal_share_are_one_block() -> None:
    """Shares 6/7, then 0.5 + ... + 5 of 6 real rows and half a one: equal, but not in the engine's running means."""
    hits = np.array([int(hit) for hit in "01110111111011111"])
    _, shares = _blocks(np.arange(17, dtype=np.float32), hits, np.ones(17), n_classes=6)
    np.testing.assert_allclose(shares, [1 / 7, 3 / 4, 6 / 7])


@both_methods
def test_rows_that_tie_in_float32_are_one_whatever_the_order_of_their_labels(method: Method) -> None:
    logits, y = draw_rows(300, 3)
    logits = logits.round()
    unseen, _ = draw_rows(50, 3, seed=2)
    one = IsotonicCalibration(method).fit(logits, y).predict_proba(unseen)
    rng = np.random.default_rng(1)
    order = rng.permutation(300)
    nearly = logits[order] + 1e-12 * rng.normal(size=(300, 3))
    other = IsotonicCalibration(method).fit(nearly, y[order]).predict_proba(unseen)
    np.testing.assert_allclose(other, one, atol=1e-6)


# ---- the map


@both_methods
@pytest.mark.parametrize("n_classes", [2, 3, 30])
def test_maps_rise_everywhere(method: Method, n_classes: int) -> None:
    calibrator = IsotonicCalibration(method).fit(*draw_rows(400, n_classes))
    spacing = (calibrator.high_ - calibrator.low_)[:, None] / (GRID_POINTS - 1)
    assert np.all(np.diff(calibrator.levels_, axis=1) >= 0.99 * LEAST_SLOPE * spacing)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_classes=st.integers(2, 30),
    n_rows=st.integers(4, 200),
    scale=st.sampled_from([0.1, 2.0, 50.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_accuracy_preserving_keeps_the_argmax(
    n_classes: int, n_rows: int, scale: float, dtype: type[np.floating[Any]], seed: int
) -> None:
    """Of any two largest logits 1e-3 apart; rows are drawn on both sides of what the calibration set held."""
    logits, y = draw_rows(n_rows, n_classes, scale, seed)
    y[:2] = 0, 1
    calibrator = IsotonicCalibration("accuracy_preserving").fit(logits, y)
    unseen = np.vstack([factor * draw_rows(50, n_classes, scale, seed + 1)[0] for factor in (0.01, 1.0, 100.0)])
    gap = np.diff(np.partition(unseen, -2, axis=1)[:, -2:], axis=1)[:, 0]
    clear = unseen[gap > 1e-3].astype(dtype)
    np.testing.assert_array_equal(calibrator.predict_proba(clear).argmax(axis=1), clear.argmax(axis=1))


@both_methods
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neither_zero_nor_one_is_ever_served(method: Method, dtype: type[np.floating[Any]]) -> None:
    y = np.arange(40) % 4
    always_right = 20.0 * np.eye(4)[y]
    calibrator = IsotonicCalibration(method).fit(always_right, y)
    unseen = np.array([[1e4, -1e4, -1e4, 0.0], [0.0, 0.0, 1e4, 0.0], [20.0, 0.0, 0.0, 0.0]], dtype=dtype)
    probabilities = calibrator.predict_proba(unseen)
    assert probabilities.min() > 1e-4
    assert probabilities.max() < 1 - 1e-4


def test_a_class_without_rows_keeps_its_ranking_at_the_level_of_the_pseudo_row() -> None:
    logits, y = draw_rows(500, 5)
    y[y == 4] = 0
    calibrator = IsotonicCalibration().fit(logits, y)
    p = calibrator.predict_proba(logits)[:, 4]
    assert p.min() > 0
    odds = p / (1 - p)
    assert np.corrcoef(np.log(odds), log_odds(logits)[:, 4])[0, 1] > 0.9
    assert 0.2 / 5 / 501 < p.mean() < 5 / 5 / 501  # rows are normalised afterwards, so not to the digit


def test_different_fits_share_a_graph() -> None:
    """However many blocks a fit has, so that a refit is served by the session that is there."""
    for method in METHODS:
        few, many = (IsotonicCalibration(method).fit(*draw_rows(n, 4)) for n in (10, 3000))
        assert signature(few) == signature(many)


# ---- what it is for


@both_methods
@pytest.mark.parametrize(("n_samples", "n_classes"), [(300, 3), (1000, 10), (3000, 2)])
def test_held_out_log_loss_is_below_that_of_clipped_steps(method: Method, n_samples: int, n_classes: int) -> None:
    logits, y = draw_rows(n_samples, n_classes)
    unseen, labels = draw_rows(5000, n_classes, seed=1)
    ours = log_loss(IsotonicCalibration(method).fit(logits, y).predict_proba(unseen), labels)
    assert ours < log_loss(clipped_steps(logits, y, unseen), labels)


@both_methods
def test_a_crooked_but_monotone_miscalibration_is_straightened(method: Method) -> None:
    """True log-odds are a cube of the score: no temperature mends that. 20,000 rows, so that the mean error of a correct
    fit is near 0.005 (blocks of about n^(2/3) rows); 0.015 fails for chance alone less than once in 1e6 seeds."""
    rng = np.random.default_rng(0)
    score = rng.uniform(-2, 2, size=40_000)
    truth = expit(score**3)
    logits = np.column_stack([np.zeros_like(score), score])
    y = (rng.random(40_000) < truth).astype(int)
    half = slice(0, 20_000)
    calibrated = IsotonicCalibration(method).fit(logits[half], y[half]).predict_proba(logits[20_000:])[:, 1]
    tempered = TemperatureScaling().fit(logits[half], y[half]).predict_proba(logits[20_000:])[:, 1]
    assert np.abs(calibrated - truth[20_000:]).mean() < 0.015 < np.abs(tempered - truth[20_000:]).mean()


def test_cifar10_log_loss_stays_where_it_was_measured(shared_data: Path) -> None:
    """ResNet-50, 5,000 rows to fit, 10,000 held out. Clipped steps 0.2089, temperature scaling 0.2038."""
    rows = {part: np.load(shared_data / "cifar10_resnet50_ce" / f"{part}.npz") for part in ("val", "test")}
    logits, y = rows["val"]["logits"], rows["val"]["labels"]
    unseen, labels = rows["test"]["logits"], rows["test"]["labels"]
    assert log_loss(clipped_steps(logits, y, unseen), labels) == pytest.approx(0.2089, abs=1e-4)
    measured: dict[Method, float] = {"one_vs_rest": 0.1909, "accuracy_preserving": 0.1916}
    for method, expected in measured.items():
        found = IsotonicCalibration(method).fit(logits, y).predict_proba(unseen)
        assert log_loss(found, labels) == pytest.approx(expected, abs=1e-4)


def test_an_unknown_method_is_refused_by_fit() -> None:
    with pytest.raises(ValueError, match="method must be one of one_vs_rest, accuracy_preserving, got 'ovr'"):
        IsotonicCalibration("ovr").fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])  # type: ignore[arg-type]
