"""The arithmetic that kinds share, against scipy's; and how `predict_proba` works through many rows."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logsumexp
from scipy.special import softmax as scipy_softmax

import calibrators
from calibrators import Calibrator
from calibrators.kinds.identity import Identity
from calibrators.numerics import FEW_COLUMNS, by_blocks, log_odds, normalised_sigmoid, softmax, softmax_in_place
from tests.calibrators.fits import fit

Array = NDArray[Any]

every_kind = pytest.mark.parametrize("kind", calibrators.kinds())

SLOW_TO_FIT = {"adaptive_temperature", "dirichlet", "empirical_bayes", "matrix", "structured_matrix"}
"""With hundreds of classes."""


def draw_logits(n_samples: int, n_classes: int, *, scale: float = 3.0, seed: int = 0) -> Array:
    return scale * np.random.default_rng(seed).normal(size=(n_samples, n_classes))


def fitted(kind: str, n_classes: int, n_samples: int = 150) -> Calibrator:
    labels = np.random.default_rng(1).integers(0, n_classes, size=n_samples)
    return fit(kind, {}, draw_logits(n_samples, n_classes), labels)


ROWS = {
    "drawn": draw_logits(40, 7),
    "far apart": draw_logits(40, 7, scale=1e4),
    "close": draw_logits(40, 7, scale=1e-9),
    "ties": np.random.default_rng(0).integers(-1, 2, size=(40, 7)).astype(float),
    "two classes": draw_logits(40, 2, scale=300.0),
    "smallest numbers": np.finfo(float).tiny * draw_logits(40, 3),
}
every_row = pytest.mark.parametrize("logits", ROWS.values(), ids=ROWS)
every_order = pytest.mark.parametrize("order", ["C", "F"])


@every_row
@every_order
def test_softmax_is_scipys_and_leaves_the_logits_as_they_are(logits: Array, order: Any) -> None:
    rows = np.array(logits, order=order)
    np.testing.assert_allclose(softmax(rows), scipy_softmax(logits, axis=1), rtol=1e-13)
    np.testing.assert_array_equal(rows, logits)
    np.testing.assert_array_equal(softmax_in_place(rows), rows)
    np.testing.assert_allclose(rows, scipy_softmax(logits, axis=1), rtol=1e-13)


@every_row
@every_order
def test_log_odds_are_a_logit_less_the_log_sum_of_the_others(logits: Array, order: Any) -> None:
    others = [logsumexp(np.delete(logits, k, axis=1), axis=1) for k in range(logits.shape[1])]
    found = log_odds(np.array(logits, order=order))
    np.testing.assert_allclose(found, logits - np.column_stack(others), rtol=1e-12, atol=1e-13)


@every_order
def test_tied_logits_have_the_same_log_odds(order: Any) -> None:
    s = log_odds(np.array([[1.0, 3.0, 3.0, -2.0], [5.0, 5.0, 5.0, 5.0]], order=order))
    assert s[0, 1] == s[0, 2]
    assert np.ptp(s[1]) == 0


@every_row
@every_order
def test_a_normalised_sigmoid_is_scipys_divided_by_its_sum(logits: Array, order: Any) -> None:
    log_odds = np.clip(logits, -600, 600)  # so far, no sigmoid of scipy's underflows
    expected = expit(log_odds) / expit(log_odds).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(normalised_sigmoid(np.array(log_odds, order=order)), expected, rtol=1e-12)


def test_a_row_whose_every_sigmoid_underflows_is_a_distribution() -> None:
    np.testing.assert_allclose(normalised_sigmoid(np.array([[-2000.0, -2000.0, -3000.0]])), [[0.5, 0.5, 0.0]])


@every_order
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-4), (np.float64, 1e-11)])
def test_sigmoids_that_near_underflow_lose_no_digits(dtype: Any, rtol: float, order: Any) -> None:
    """Far below zero a sigmoid is an exponential, so its row is the softmax; other rows are left as they were."""
    far = np.linspace(-50, -2000, 40)[:, None] + np.array([0.0, -1.0, -2.0])
    rows = np.array(np.vstack([far, [[1.0, 0.0, -1.0]]]), dtype=dtype, order=order)
    p = normalised_sigmoid(rows)
    np.testing.assert_allclose(p[:-1], np.tile(softmax(np.array([[0.0, -1.0, -2.0]])), (40, 1)), rtol=rtol)
    np.testing.assert_array_equal(p[-2:], normalised_sigmoid(rows[-2:]))


@every_kind
def test_a_row_by_itself_is_served_as_among_others_to_the_last_bit(kind: str) -> None:
    calibrator, logits = fitted(kind, 10), draw_logits(33, 10, seed=2)
    for rows in (logits, logits.astype(np.float32)):
        whole = calibrator.predict_proba(rows)
        np.testing.assert_array_equal(np.vstack([calibrator.predict_proba(row[None]) for row in rows]), whole)


@pytest.mark.parametrize("kind", ["temperature", "vector", "platt", "isotonic", "histogram_binning", "spline"])
def test_many_columns_are_served_one_by_one_as_together(kind: str) -> None:
    n_classes = FEW_COLUMNS + 1
    calibrator, logits = fitted(kind, n_classes), draw_logits(9, n_classes, seed=2)
    whole = calibrator.predict_proba(logits)
    np.testing.assert_array_equal(np.vstack([calibrator.predict_proba(row[None]) for row in logits]), whole)


@pytest.mark.parametrize(
    ("kind", "n_classes"),
    [(kind, n) for kind in calibrators.kinds() for n in (5, FEW_COLUMNS + 1) if n == 5 or kind not in SLOW_TO_FIT],
)
def test_rows_in_any_order_of_memory_are_served_alike_and_never_written_on(kind: str, n_classes: int) -> None:
    calibrator, logits = fitted(kind, n_classes, n_samples=60), draw_logits(20, n_classes, seed=2)
    expected = calibrator.predict_proba(logits)
    wide = np.repeat(logits, 2, axis=1)
    for rows in (logits, np.asfortranarray(logits), wide[:, ::2], logits[::-1].copy()[::-1]):
        rows.setflags(write=False)
        np.testing.assert_array_equal(calibrator.predict_proba(rows), expected)


def test_a_value_that_is_not_finite_is_named_by_its_place_among_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrators.numerics.ELEMENTS_AT_ONCE", 12)
    logits = draw_logits(50, 3)
    for value in (np.nan, np.inf, -np.inf, -2e30):
        logits[41, 2] = value
        with pytest.raises(ValueError, match=r"finite.* at \[41, 2\]"):
            Identity.of(3).predict_proba(logits)


def test_arrays_beside_the_logits_are_cut_and_doubled_like_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrators.numerics.ELEMENTS_AT_ONCE", 12)
    logits, factor = draw_logits(5, 3), np.arange(5.0)  # blocks of four rows and of one
    found = by_blocks(lambda z, factor: z * factor[:, None], logits, {"factor": factor})
    np.testing.assert_array_equal(found, logits * factor[:, None])


@every_kind
def test_many_rows_take_little_more_memory_than_their_probabilities(kind: str) -> None:
    calibrator = fitted(kind, 4)
    logits = draw_logits(400_000, 4).astype(np.float32)
    tracemalloc.start()
    try:
        calibrator.predict_proba(logits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * logits.nbytes
