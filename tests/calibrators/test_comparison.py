"""The confidence sequence for the difference of two forecasters' scores."""

from __future__ import annotations

import numpy as np
import pytest

from calibrators.online.comparison import Difference, half_brier


def looks(differences: np.ndarray, every: int = 20) -> list[tuple[float, float]]:
    state, bounds = Difference(), []
    for start in range(0, len(differences), every):
        state = state.after(differences[start : start + every])
        bounds.append(state.interval())
    return bounds


def test_two_forecasters_who_are_as_good_are_never_told_apart_in_nearly_all_runs() -> None:
    """Looked at 100 times; 5 % may be told apart at any time, of 200 runs more than 20 with probability 2e-4."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        truth = rng.random(2000)
        y = rng.random(2000) < truth
        one, other = (half_brier(np.column_stack([1 - p, p]), y.astype(int)) for p in (truth + 0.1, truth - 0.1))

        wrong += any(not low <= 0 <= high for low, high in looks(one - other))
    assert wrong <= 20


def test_the_better_one_is_told_in_the_end_and_the_bounds_close_around_the_gain() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(20_000)
    y = (rng.random(20_000) < truth).astype(int)
    good, bad = (half_brier(np.column_stack([1 - p, p]), y) for p in (truth, np.clip(truth + 0.2, 0, 1)))
    gain = float(np.mean((np.clip(truth + 0.2, 0, 1) - truth) ** 2))
    bounds = looks(bad - good, every=1000)
    assert bounds[0][0] < 0 < bounds[-1][0] < gain < bounds[-1][1]
    assert bounds[-1][1] - bounds[-1][0] < 0.03


def test_the_state_is_the_same_however_the_labels_are_divided() -> None:
    differences = np.random.default_rng(2).uniform(-1, 1, 999)
    by_seven = Difference()
    for start in range(0, 999, 7):
        by_seven = by_seven.after(differences[start : start + 7])
    assert by_seven == Difference().after(differences)
    spread = sum((d - (np.mean(differences[:i]) if i else 0)) ** 2 for i, d in enumerate(differences))
    assert by_seven.variation == pytest.approx(spread)


def test_nothing_is_known_before_the_first_label_nor_beyond_what_a_score_can_be() -> None:
    assert Difference().interval() == (-1.0, 1.0)
    assert Difference().after(np.array([0.5])).interval() == (-1.0, 1.0)


def test_half_the_brier_score_of_two_classes_is_the_square_of_the_error() -> None:
    p, y = np.array([0.1, 0.7, 1.0]), np.array([0, 1, 0])
    np.testing.assert_allclose(half_brier(np.column_stack([1 - p, p]), y), (p - y) ** 2)
