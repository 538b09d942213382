"""Coverage and size of prediction sets, counted by hand and against scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from calibrators.metrics import (
    class_coverage,
    coverage,
    coverage_curve,
    coverage_gap,
    local_coverage,
    mean_set_size,
    set_size_counts,
    size_stratified_coverage,
)

SETS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 1]], dtype=bool)
Y = np.array([0, 2, 0, 2, 1, 1])  # held, missed, missed, held, held, held


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (20, 19), (1000, 903)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_coverage_has_clopper_and_pearsons_interval(n: int, k: int, level: float) -> None:
    sets = np.zeros((n, 2), dtype=bool)
    sets[:k, 0] = True
    found = coverage(sets, np.zeros(n, dtype=int), level=level)
    wanted = binomtest(k, n).proportion_ci(level, method="exact")
    assert found.value == k / n
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_sizes_are_counted() -> None:
    assert set_size_counts(SETS).tolist() == [1, 2, 2, 1]
    assert mean_set_size(SETS) == 1.5


def test_coverage_by_size_and_by_class() -> None:
    by_size = size_stratified_coverage(SETS, Y)
    assert [(s.name, s.n_rows, s.coverage.value) for s in by_size] == [
        ("0 labels", 1, 0.0),
        ("1 label", 2, 1.0),
        ("2 to 3 labels", 3, 2 / 3),
    ]
    by_class = class_coverage(SETS, Y, class_names=["a", "b", "c"])
    assert [(s.name, s.n_rows, s.coverage.value) for s in by_class] == [("a", 2, 0.5), ("c", 2, 0.5), ("b", 2, 1.0)]
    assert coverage_gap(SETS, Y, 0.9) == pytest.approx((0.4 + 0.4 + 0.1) / 3)
    assert [s.name for s in class_coverage(SETS[:1], Y[:1])] == ["class 0"]


def test_a_curve_stands_in_order_of_level() -> None:
    curve = coverage_curve({0.9: np.ones_like(SETS), 0.5: SETS}, Y)
    assert curve.levels.tolist() == [0.5, 0.9]
    assert [one.value for one in curve.coverage] == [4 / 6, 1.0]
    assert curve.sizes.tolist() == [1.5, 3.0]


def test_local_coverage_is_a_moving_share() -> None:
    hits = np.array([True, False, True, True])
    assert local_coverage(hits, 2).tolist() == [0.5, 0.5, 1.0]
    assert local_coverage(hits, 4).tolist() == [0.75]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: coverage(SETS.astype(int), Y), TypeError, "sets must be bool"),
        (lambda: coverage(SETS[0], Y), ValueError, "shape"),
        (lambda: coverage(SETS[:0], Y[:0]), ValueError, "at least 1 row"),
        (lambda: coverage(SETS, Y[:2]), ValueError, "one label for each row"),
        (lambda: coverage(SETS, Y + 2), ValueError, r"0\.\.2"),
        (lambda: class_coverage(SETS, Y, class_names=["a"]), ValueError, "3 names"),
        (lambda: size_stratified_coverage(SETS, Y, sizes=[1, 2]), ValueError, "ascend from 0"),
        (lambda: coverage_curve({}, Y), ValueError, "at least one level"),
        (lambda: local_coverage(Y > 0, 7), ValueError, r"1\.\.6"),
    ],
)
def test_what_cannot_be_judged_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
