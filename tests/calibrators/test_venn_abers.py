"""venn_abers against isotonic regression refitted with each label added."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from calibrators.binning import logit
from calibrators.kinds.venn_abers import CELLS, VennAbers

Array = NDArray[Any]


def binary(scores: Array) -> Array:
    scores = np.asarray(scores, dtype=np.float32)
    return np.column_stack([np.zeros_like(scores), scores])


def refitted(scores: Array, hits: Array, weight: Array, score: float, label: int) -> float:
    """scikit-learn's isotonic regression of the rows and (score, label), at the score."""
    oracle = IsotonicRegression().fit(
        np.append(scores, score), np.append(hits, label), sample_weight=np.append(weight, 1.0)
    )
    return float(oracle.predict([score])[0])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(st.integers(-6, 6), st.integers(0, 1), st.sampled_from([0.5, 1.0, 2.0])), min_size=2, max_size=40
    )
)
def test_intervals_are_isotonic_regressions_refitted_with_either_label(rows: list[tuple[int, int, float]]) -> None:
    scores, hits, weight = (np.array(column) for column in zip(*rows, strict=True))
    hits[:2] = 0, 1
    calibrator = VennAbers().fit(binary(scores), hits, sample_weight=weight)
    asked = np.arange(-7, 7.5, 0.5)  # on every score, between, and outside all
    p0, p1 = calibrator.predict_interval(binary(asked))
    np.testing.assert_allclose(p0[:, 1], [refitted(scores, hits, weight, s, 0) for s in asked], atol=1e-6)
    np.testing.assert_allclose(p1[:, 1], [refitted(scores, hits, weight, s, 1) for s in asked], atol=1e-6)


def test_the_merged_probability_is_the_minimax_of_log_loss_of_the_interval() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=60)
    calibrator = VennAbers().fit(binary(scores), scores + rng.logistic(size=60) > 0)
    p0, p1 = (bound[:, 1] for bound in calibrator.predict_interval(binary(scores)))
    np.testing.assert_allclose(calibrator.predict_proba(binary(scores))[:, 1], p1 / (1 - p0 + p1), atol=1e-6)


def test_the_two_classes_intervals_mirror_each_other() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=60)
    p0, p1 = VennAbers().fit(binary(scores), scores > rng.normal(size=60)).predict_interval(binary(scores))
    np.testing.assert_allclose(p0[:, 0], 1 - p1[:, 1], atol=1e-7)
    np.testing.assert_allclose(p1[:, 0], 1 - p0[:, 1], atol=1e-7)


def test_each_of_several_classes_is_the_binary_problem_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(50, 3))
    y = (logits / 2 + rng.gumbel(size=logits.shape)).argmax(axis=1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    calibrator = VennAbers().fit(logits, y)
    p0, p1 = calibrator.predict_interval(logits)
    for k in range(3):
        expected = [refitted(p[:, k], y == k, np.ones(50), score, label) for score in p[:, k] for label in (0, 1)]
        np.testing.assert_allclose(np.column_stack([p0[:, k], p1[:, k]]).ravel(), expected, atol=1e-6)
    merged = p1 / (1 - p0 + p1)
    np.testing.assert_allclose(calibrator.predict_proba(logits), merged / merged.sum(axis=1, keepdims=True), atol=1e-6)


def test_joined_cells_keep_log_odds_within_the_stated_distance() -> None:
    """3,000 distinct scores have 6,001 cells; the table has 256."""
    rng = np.random.default_rng(0)
    scores = 2 * rng.normal(size=3000).astype(np.float32)
    hits = (rng.random(3000) < 1 / (1 + np.exp(-scores))).astype(int)
    calibrator = VennAbers().fit(binary(scores), hits)
    asked = scores[::60]
    p0, p1 = (np.array([refitted(scores, hits, np.ones(3000), score, label) for score in asked]) for label in (0, 1))
    served = logit(calibrator.predict_proba(binary(asked).astype(np.float64))[:, 1])
    delta = 2 * np.log(3001) / (CELLS - 1)
    np.testing.assert_allclose(served, logit(p1 / (1 - p0 + p1)), atol=delta + 1e-5)


def test_one_end_of_the_interval_is_calibrated_in_the_mean() -> None:
    """p_Y has mean P(Y = 1) exactly, by exchangeability, even from 10 rows. 4,000 sets, whose deviation of p_Y - Y is
    below 0.5: six standard errors are 0.048, passed by chance less than once in 1e8 seeds."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(4000):
        scores = rng.normal(size=11)
        y = (rng.random(11) < 1 / (1 + np.exp(-3 * scores))).astype(int)
        if len(set(y[:10])) == 2:
            ends = VennAbers().fit(binary(scores[:10]), y[:10]).predict_interval(binary(scores[10:]))
            errors.append(float(ends[y[10]][0, 1]) - y[10])
        else:  # isotonic regression by hand: all of one label
            bounds = [refitted(scores[:10], y[:10], np.ones(10), scores[10], label) for label in (0, 1)]
            errors.append(bounds[y[10]] - y[10])
    assert abs(np.mean(errors)) < 0.048


def test_a_class_without_rows_has_an_interval_from_zero() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 3))
    calibrator = VennAbers().fit(logits, rng.integers(0, 2, size=40))
    p0, p1 = calibrator.predict_interval(logits)
    assert np.all(p0[:, 2] == 0)
    assert np.all(p1[:, 2] > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lower": 1.0}, "intervals must satisfy"),
        ({"upper": 0.0, "lower": 0.0}, "upper ends must be positive"),
        ({"edges": 0.0}, None),
        ({"upper": np.nan}, "not finite"),
    ],
)
def test_tensors_that_no_fit_makes_are_refused(change: dict[str, float], message: str | None) -> None:
    calibrator = VennAbers().fit(binary(np.arange(6.0)), [0, 1, 0, 1, 0, 1])
    tensors = calibrator.tensors() | {
        name: np.full_like(calibrator.tensors()[name], value) for name, value in change.items()
    }
    if message is None:  # equal edges leave empty cells, which do no harm
        calibrator.set_tensors(tensors)
        return
    with pytest.raises(ValueError, match=message):
        calibrator.set_tensors(tensors)
