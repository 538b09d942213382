"""Thresholds for shifted inputs, risks other than misses, and declining to answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from calibrators.conformal import (
    Thresholds,
    controlled,
    domain_weights,
    false_negative_rates,
    select,
    set_sizes,
    weighted_thresholds,
)
from calibrators.conformal.selective import upper_bound
from calibrators.conformal.weighted import effective_rows

Array = NDArray[Any]


# ---- weighted


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_equal_weights_are_split_conformal(level: float) -> None:
    scores = np.random.default_rng(0).normal(size=60).astype(np.float32)
    found = weighted_thresholds(scores, np.full(60, 0.3), [0.3, 0.3], level)
    assert (found == Thresholds.of(scores).at(level)[0]).all()


def test_a_row_that_outweighs_the_calibration_set_has_no_finite_threshold() -> None:
    found = weighted_thresholds(np.arange(10), np.ones(10), [0.0, 1.0, 100.0], 0.9)
    assert found.tolist() == [8.0, 9.0, np.inf]


def test_coverage_holds_under_a_shift_of_the_inputs_where_plain_thresholds_fail() -> None:
    """x is normal in calibration and normal around 1 when served; scores grow with x. Over 50 draws of 300 rows the
    weights of a classifier keep .9 within .03 (a standard error of .005), plain thresholds cover less than .8."""
    rng = np.random.default_rng(0)
    plain, weighted = [], []
    for _ in range(50):
        x, served = rng.normal(size=(300, 1)), 1 + rng.normal(size=(300, 1))
        scores, own = (values[:, 0] + 0.3 * rng.normal(size=300) for values in (x, served))
        thresholds = weighted_thresholds(
            scores, domain_weights(x, served), domain_weights(x, served, served), confidence_level=0.9
        )
        weighted.append((own <= thresholds).mean())
        plain.append((own <= Thresholds.of(scores).at(0.9)[0]).mean())
    assert np.mean(plain) < 0.8
    assert abs(np.mean(weighted) - 0.9) < 0.03


def test_rows_of_one_kind_have_weights_of_about_one() -> None:
    rng = np.random.default_rng(0)
    weights = domain_weights(rng.normal(size=(2000, 3)), rng.normal(size=(1000, 3)))
    assert abs(weights.mean() - 1) < 0.05
    assert effective_rows(weights) > 1900


@pytest.mark.parametrize(
    ("weights", "own", "message"),
    [
        ([1.0, 1.0], [1.0], "one length"),
        ([1.0, -1.0, 1.0], [1.0], "not negative"),
        ([1.0, 1.0, 1.0], [np.nan], "finite"),
        ([0.0, 0.0, 0.0], [1.0], "all zero"),
    ],
)
def test_unusable_weights_are_refused(weights: list[float], own: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_thresholds([1.0, 2.0, 3.0], weights, own, 0.9)


# ---- risk control


def labelled(n: int, seed: int) -> tuple[Array, Array]:
    """Probabilities of eight labels of which several may be true, and these."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 1.5, size=(n, 8))
    return p, rng.uniform(size=p.shape) < p


def test_the_expected_false_negative_rate_is_at_most_the_target() -> None:
    """300 calibration sets of 100 rows, each judged on 200 new ones: the mean is at most .1 within six of its standard
    errors of about .0015, and not below .1 - 2/101 by more, for the control is tight."""
    grid = np.linspace(-1, 0, 201)
    found = []
    for seed in range(300):
        p, true = labelled(300, seed)
        losses = false_negative_rates(p, true, grid)
        threshold = controlled(losses[:100], grid, target=0.1)
        found.append(losses[100:, np.searchsorted(grid, threshold)].mean())
    assert 0.1 - 2 / 101 - 0.009 < np.mean(found) <= 0.1 + 0.009


def test_the_loss_of_missing_the_label_is_split_conformal() -> None:
    scores = np.random.default_rng(0).normal(size=70).astype(np.float32)
    grid = np.sort(scores).astype(float)
    losses = (scores[:, None] > grid).astype(float)
    for level in (0.5, 0.8, 0.9, 0.95):
        assert controlled(losses, grid, target=1 - level) == Thresholds.of(scores).at(level)[0]
    assert controlled(losses, grid, target=0.01) == np.inf


def test_set_sizes_are_those_of_the_sets_and_can_be_controlled() -> None:
    p = labelled(300, 0)[0]
    p = p / p.sum(axis=1, keepdims=True)
    grid = np.linspace(-1, 0, 101)
    sizes = set_sizes(p, grid)
    np.testing.assert_array_equal(sizes[:, 60], (p >= 0.4).sum(axis=1))
    threshold = controlled(sizes, grid, target=2.0, bound=8, growing=True)
    assert (
        sizes[:, np.searchsorted(grid, threshold)].mean() <= 2 < sizes[:, np.searchsorted(grid, threshold) + 2].mean()
    )
    assert controlled(sizes, grid, target=0.001, bound=8, growing=True) == -np.inf


@pytest.mark.parametrize(
    ("losses", "grid", "message"),
    [
        ([[0.5, 0.6]], [0.0, 1.0], "must not grow"),
        ([[0.5, 0.2]], [1.0, 0.0], "must ascend"),
        ([[1.5, 0.2]], [0.0, 1.0], r"in 0\.\.1"),
        ([[0.5, np.nan]], [0.0, 1.0], r"in 0\.\.1"),
        ([[0.5]], [0.0, 1.0], "shape"),
        (np.zeros((0, 2)), [0.0, 1.0], "shape"),
    ],
)
def test_unusable_losses_are_refused(losses: Any, grid: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controlled(losses, grid, target=0.1)


# ---- selective prediction


def sure_and_unsure(n: int, seed: int) -> tuple[Array, Array]:
    """Confidence c between .5 and 1, right with probability 2 c - 1: overconfident, but in the right order."""
    rng = np.random.default_rng(seed)
    c = rng.uniform(0.5, 1.0, size=n)
    return np.column_stack([c, 1 - c]), (rng.uniform(size=n) > 2 * c - 1).astype(int)


def test_answers_are_wrong_less_often_than_the_target_with_the_probability_asked_for() -> None:
    """300 fits at delta = .1. The error among answers from t on is 1 - t, so the bound fails where t < .9. More than 54
    failures of 300 would have probability 1e-5 at a rate of .1."""
    fits = [select(*sure_and_unsure(5000, seed), target=0.1, delta=0.1) for seed in range(300)]
    assert sum(found.threshold < 0.9 for found in fits) <= 54
    assert np.mean([found.coverage for found in fits]) > 0.12  # .2 could be answered
    assert all(found.error <= found.bound <= 0.1 for found in fits)


def test_nothing_is_answered_where_nothing_is_good_enough() -> None:
    found = select([[0.6, 0.4]] * 20, [0, 1] * 10, target=0.05)
    assert (found.threshold, found.coverage) == (np.inf, 0.0)


def test_the_bound_is_clopper_and_pearsons() -> None:
    for errors, n in ((0, 10), (3, 50), (10, 11)):
        bound = upper_bound(errors, n, 0.05)
        assert binom.cdf(errors, n, bound) == pytest.approx(0.05)
    assert upper_bound(5, 5, 0.05) == 1.0


@pytest.mark.parametrize("params", [{"target": 0.0}, {"target": 1.0}, {"target": 0.1, "delta": 0.0}])
def test_targets_outside_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        select([[0.6, 0.4]] * 4, [0, 1, 0, 1], **params)
