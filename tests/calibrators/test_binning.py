"""histogram_binning, bbq and scaling_binning against their formulas written out, and the step functions under them."""

from __future__ import annotations

from math import ceil, exp, lgamma, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.calibration import calibration_curve

from calibrators.binning import BEYOND, Edges, Ties, look_up, power_of_two, thin
from calibrators.kinds.bbq import BayesianBinning
from calibrators.kinds.histogram_binning import HistogramBinning
from calibrators.kinds.platt import PlattScaling
from calibrators.kinds.scaling_binning import ScalingBinning
from calibrators.numerics import log_odds, softmax

Array = NDArray[Any]


def draw_rows(n_samples: int, n_classes: int, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def binary(scores: Array) -> Array:
    return np.column_stack([np.zeros(len(scores)), scores])


# ---- step functions


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.integers(-9, 9), min_size=1, max_size=31), n_bits=st.integers(5, 6))
def test_cells_count_the_edges_at_or_below_a_score(values: list[int], n_bits: int) -> None:
    edges = np.full((2, 2**n_bits - 1), np.finfo(np.float32).max, dtype=np.float32)
    edges[0, : len(values)] = np.sort(values)
    edges[1, : len(values)] = np.sort(values) / 2
    scores = np.tile(np.arange(-10, 10.5, 0.5, dtype=np.float32)[:, None], (1, 2))
    expected = np.column_stack([np.searchsorted(row, scores[:, 0], side="right") for row in edges])
    first = 2**n_bits * np.arange(2)
    for stored in (scores, np.asfortranarray(scores), np.repeat(scores, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(Edges.of(edges).cells(stored, np.arange(2)) - first, expected)


@pytest.mark.parametrize("spread", [1e-44, 1e-7, 1.0, 1e31, 1e38])
def test_cells_are_found_among_edges_however_near_or_far(spread: float) -> None:
    """Half of the edges in one square of the grid, or all, and scores that are edges or their neighbours in float32."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.normal(size=64), 1e-4 * rng.normal(size=64), [3.0, 3.0]])
    own = np.sort((spread * np.clip(drawn, -3, 3)).astype(np.float32))
    edges = np.full((3, 255), BEYOND, dtype=np.float32)
    edges[0, : len(own)], edges[1, :2] = own, own[:2]
    scores = np.concatenate([own, np.nextafter(own, np.float32(-np.inf)), np.nextafter(own, np.float32(np.inf)), [0.0]])
    found = Edges.of(edges).cells(np.tile(scores[:, None], (1, 3)), np.arange(3)) - 256 * np.arange(3)
    np.testing.assert_array_equal(found, np.stack([np.searchsorted(row, scores, side="right") for row in edges], 1))


def test_edges_that_are_replaced_are_read() -> None:
    logits, y = draw_rows(300, 3)
    moved = logits + np.arange(3)
    first, second = BayesianBinning().fit(logits, y), BayesianBinning().fit(moved, y)
    first.predict_proba(logits)
    np.testing.assert_array_equal(first.fit(moved, y).predict_proba(logits), second.predict_proba(logits))
    first.fit(logits, y)
    first.set_tensors(second.tensors())
    np.testing.assert_array_equal(first.predict_proba(logits), second.predict_proba(logits))


@pytest.mark.parametrize("n_cells", [2, 4, 8, 16, 1024])
def test_cells_are_found_in_tables_of_any_size(n_cells: int) -> None:
    edges = np.arange(1, n_cells, dtype=np.float32)[None]
    scores = np.arange(0, n_cells, 0.5, dtype=np.float32)[:, None]
    found = look_up(scores, Edges.of(edges), np.arange(n_cells, dtype=np.float32)[None])
    np.testing.assert_array_equal(found, np.floor(scores))


@pytest.mark.parametrize(("n_rows", "n_bins"), [(100, 10), (97, 10), (7, 10), (50, 1)])
def test_bins_of_equal_mass_differ_by_one_row_at_most(n_rows: int, n_bins: int) -> None:
    rows = Ties.of(np.arange(n_rows, dtype=np.float32), np.zeros(n_rows), np.ones(n_rows))
    sizes = np.diff(rows.equal_mass_starts(n_bins), append=n_rows)
    assert len(sizes) == min(n_rows, n_bins)
    assert np.ptp(sizes) <= 1


def test_equal_scores_share_a_bin_and_edges_part_their_neighbours_in_float32() -> None:
    close = np.float32(1.0), np.nextafter(np.float32(1), np.float32(2))
    rows = Ties.of(np.array([close[0], close[1], *[0.0] * 6], dtype=np.float32), np.ones(8), np.ones(8))
    np.testing.assert_array_equal(rows.mass, [6, 1, 1])
    edges = rows.edges(rows.equal_mass_starts(8))
    assert edges[0] == 0.5
    assert close[0] < edges[1] <= close[1]


@pytest.mark.parametrize("n_cells", [16, 256])
def test_joined_cells_hold_levels_within_their_part_of_the_total_variation(n_cells: int) -> None:
    levels = np.random.default_rng(0).normal(size=1000).cumsum()
    starts = thin(levels, n_cells)
    assert 1 < len(starts) <= n_cells
    delta = np.abs(np.diff(levels)).sum() / (n_cells - 1)
    assert max(np.ptp(part) for part in np.split(levels, starts[1:])) <= delta


def test_few_levels_are_joined_only_where_they_are_equal() -> None:
    assert thin(np.array([1.0, 1.0, 2.0, 2.0, 1.0]), 4).tolist() == [0, 2, 4]


@pytest.mark.parametrize("kind", [HistogramBinning, BayesianBinning, ScalingBinning])
def test_rows_in_float32_and_in_float64_fall_into_the_same_cells(kind: type[Any]) -> None:
    calibrator = kind().fit(*draw_rows(500, 4))
    logits = draw_rows(20_000, 4, seed=1)[0].astype(np.float32)
    wide = calibrator.predict_proba(logits.astype(np.float64))
    np.testing.assert_allclose(calibrator.predict_proba(logits), wide, atol=1e-6)


# ---- histogram binning


def smoothed(hits: Array, rate: float) -> float:
    return float((hits.sum() + rate) / (len(hits) + 1))


def test_bins_of_equal_mass_say_their_smoothed_share() -> None:
    scores = np.random.default_rng(0).permutation(np.linspace(-3, 3, 60))
    y = (np.random.default_rng(1).random(60) < expit(scores)).astype(int)
    served = HistogramBinning(n_bins=6).fit(binary(scores), y).predict_proba(binary(scores))[:, 1]
    order, rate = np.argsort(scores), (y.sum() + 0.5) / 61
    expected = np.repeat([smoothed(part, rate) for part in np.split(y[order], 6)], 10)
    np.testing.assert_allclose(served[order], expected, atol=1e-6)


def test_bins_of_equal_width_are_scikit_learns() -> None:
    logits, y = draw_rows(2000, 2)
    p = softmax(logits)[:, 1]
    shares, _ = calibration_curve(y, p, n_bins=10, strategy="uniform")
    rows = np.histogram(p, bins=10, range=(0, 1))[0]
    expected = (shares * rows + (y.sum() + 0.5) / 2001) / (rows + 1)
    calibrator = HistogramBinning("equal_width", n_bins=10).fit(logits, y)
    middles = (np.arange(10) + 0.5) / 10
    served = calibrator.predict_proba(binary(np.log(middles / (1 - middles))))[:, 1]
    np.testing.assert_allclose(served, expected, atol=1e-6)
    np.testing.assert_array_equal(calibrator.rows_[0, :10], rows)


def test_a_bin_without_rows_says_its_middle() -> None:
    calibrator = HistogramBinning("equal_width", n_bins=4).fit([[0, -3], [0, 3], [0, 3]], [0, 1, 0])
    assert calibrator.predict_proba([[0.0, 0.5]])[0, 1] == pytest.approx(0.625)


def test_a_class_without_rows_stays_as_it_is_before_rows_are_normalised() -> None:
    logits, y = draw_rows(300, 3)
    y[y == 2] = 0
    calibrator = HistogramBinning().fit(logits, y)
    served = calibrator.predict_proba(logits)
    levels = look_up(log_odds(logits).astype(np.float32), Edges.of(calibrator.edges_), calibrator.levels_)
    binned = expit(levels[:, :2].astype(np.float64))
    expected = np.column_stack([binned, softmax(logits)[:, 2]])
    np.testing.assert_allclose(served, expected / expected.sum(axis=1, keepdims=True), atol=1e-6)


# ---- top-label histogram binning


def test_the_predicted_class_says_how_often_it_was_right_and_the_others_keep_their_proportions() -> None:
    logits, y = draw_rows(2000, 4)
    calibrator = HistogramBinning(n_bins=5, top_label=True).fit(logits, y)
    served, own = calibrator.predict_proba(logits), softmax(logits)
    predicted = logits.argmax(axis=1)
    for k in range(4):
        group = predicted == k
        order = np.argsort(own[group, k])
        right = (y == k)[group][order]
        parts = np.split(right, [round(i * len(right) / 5) for i in range(1, 5)])
        rate = (right.sum() + 0.5) / (len(right) + 1)
        levels = np.concatenate([np.full(len(part), smoothed(part, rate)) for part in parts])
        # A cut that falls midway between two rows may go to either side.
        assert (np.abs(served[group, k][order] - levels) > 1e-6).sum() <= 4
        others = np.delete(served[group], k, axis=1)
        kept = np.delete(own[group], k, axis=1)
        shares, kept_shares = (part / part.sum(axis=1, keepdims=True) for part in (others, kept))
        np.testing.assert_allclose(shares, kept_shares, atol=1e-5)


def test_a_class_predicted_for_too_few_rows_stays_as_it_is() -> None:
    logits, y = draw_rows(49, 3)
    served = HistogramBinning(top_label=True).fit(logits, y).predict_proba(logits)
    np.testing.assert_allclose(served, softmax(logits), atol=1e-6)


def top_label_error(p: Array, y: Array, n_bins: int = 15) -> float:
    """Gupta, Ramdas, ICLR 2022, equation 5, with bins of equal width for each predicted class."""
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    cell = predicted * n_bins + np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(cell, weights=(predicted == y) - confidence)
    return float(np.abs(gaps).sum() / len(y))


def test_cifar10_top_label_error_stays_where_it_was_measured(shared_data: Path) -> None:
    """ResNet-50, 5,000 rows to fit, 10,000 held out."""
    rows = {part: np.load(shared_data / "cifar10_resnet50_ce" / f"{part}.npz") for part in ("val", "test")}
    calibrator = HistogramBinning(top_label=True).fit(rows["val"]["logits"], rows["val"]["labels"])
    unseen, y = rows["test"]["logits"].astype(np.float64), rows["test"]["labels"]
    assert top_label_error(softmax(unseen), y) == pytest.approx(0.0448, abs=1e-4)
    assert top_label_error(calibrator.predict_proba(unseen), y) == pytest.approx(0.0143, abs=5e-4)


def test_the_bound_is_that_of_the_smallest_bin() -> None:
    """By hand: two classes of 100 rows, two bins of 50 each, so B = 4 and k = 50."""
    logits = np.vstack([binary(np.linspace(1, 2, 100)), binary(-np.linspace(1, 2, 100))])
    calibrator = HistogramBinning(top_label=True).fit(logits, np.arange(200) % 2)
    assert calibrator.error_bound(0.1) == pytest.approx(sqrt(log(2 * 4 / 0.1) / (2 * 49)) + 1 / 51)


def test_the_bound_holds_for_all_bins_at_once() -> None:
    """The promise is 80 % of calibration sets. Hoeffding's inequality and the union over 8 bins leave slack: at a true
    rate of 95 % fewer than 80 of 100 sets hold with probability below 1e-8."""
    held = 0
    unseen, y = draw_rows(100_000, 2, seed=1)
    right, confidence = unseen.argmax(axis=1) == y, np.abs(unseen[:, 1] - unseen[:, 0]).astype(np.float32)
    for seed in range(100):
        calibrator = HistogramBinning(n_bins=4, top_label=True).fit(*draw_rows(600, 2, seed=seed + 2))
        errors = []
        for k in (0, 1):
            group = unseen.argmax(axis=1) == k
            cell = np.searchsorted(calibrator.edges_[k], confidence[group], side="right")
            shares = np.bincount(cell, weights=right[group]) / np.bincount(cell)
            errors.append(np.abs(shares - expit(calibrator.levels_[k, : len(shares)])).max())
        held += max(errors) <= calibrator.error_bound(0.2)
    assert held >= 80


def test_a_bound_that_does_not_hold_is_not_given() -> None:
    logits, y = draw_rows(300, 3)
    with pytest.raises(ValueError, match="error_bound needs top_label=True"):
        HistogramBinning().fit(logits, y).error_bound(0.1)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 1"):
        HistogramBinning(top_label=True).fit(logits, y).error_bound(1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"strategy": "quantile"}, "strategy must be one of equal_mass, equal_width, got 'quantile'"),
        ({"n_bins": 0}, r"n_bins must be an integer in 1\.\.4096, got 0"),
        ({"strategy": "equal_width", "top_label": True}, "top_label needs strategy 'equal_mass'"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HistogramBinning(**params).fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])


# ---- Bayesian binning


def written_out(scores: Array, y: Array, asked: float) -> float:
    """BBQ term by term for distinct scores: lengths of bins as numpy splits them, edges midway."""
    order = np.argsort(scores)
    scores, y = scores[order], y[order]
    n = len(y)
    weights, values = [], []
    for n_bins in range(max(1, int(n ** (1 / 3) / 10)), min(ceil(10 * n ** (1 / 3)), n // 5) + 1):
        cuts = [round(i * n / n_bins) for i in range(1, n_bins)]
        edges = [(scores[cut - 1] + scores[cut]) / 2 for cut in cuts]
        bounds, prior, evidence = [0.0, *expit(edges), 1.0], 2 / n_bins, 0.0
        for b, part in enumerate(np.split(y, cuts)):
            middle = (bounds[b] + bounds[b + 1]) / 2
            alpha, beta, m, rows = prior * middle, prior * (1 - middle), int(part.sum()), len(part)
            evidence += lgamma(prior) - lgamma(rows + prior) + lgamma(m + alpha) - lgamma(alpha)
            evidence += lgamma(rows - m + beta) - lgamma(beta)
            if b == sum(asked >= edge for edge in edges):
                value = (m + alpha) / (rows + prior)
        weights.append(exp(evidence))
        values.append(value)
    return float(np.average(values, weights=weights))


def test_bbq_is_the_average_over_models_written_out() -> None:
    """Cuts that fall midway between two rows (B = 8: 7.5, 22.5, ...) may go to either side, hence the tolerance."""
    scores = np.linspace(-4, 4, 60)
    y = (np.random.default_rng(0).random(60) < expit(scores / 2)).astype(int)
    calibrator = BayesianBinning().fit(binary(scores), y)
    asked = np.linspace(-5, 5, 41)
    expected = [written_out(scores, y, score) for score in asked]
    np.testing.assert_allclose(calibrator.predict_proba(binary(asked))[:, 1], expected, atol=2e-3)


def test_bbq_prefers_the_bins_that_the_labels_have() -> None:
    """A step at log-odds 0 from .2 to .7: 4,000 rows, standard error of each side .009."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=4000)
    y = (rng.random(4000) < np.where(scores > 0, 0.7, 0.2)).astype(int)
    served = BayesianBinning().fit(binary(scores), y).predict_proba(binary(np.array([-1.0, 1.0])))[:, 1]
    np.testing.assert_allclose(served, [0.2, 0.7], atol=0.06)


# ---- scaling-binning


@pytest.mark.parametrize("n_bins", [4, 20])
def test_scaling_binning_is_the_mean_of_platts_values_in_bins_of_equal_mass(n_bins: int) -> None:
    logits, y = draw_rows(400, 2)
    curve = PlattScaling().fit(logits, y).predict_proba(logits)[:, 1]
    order = np.argsort(logits[:, 1] - logits[:, 0])
    expected = np.repeat([part.mean() for part in np.split(curve[order], n_bins)], 400 // n_bins)
    served = ScalingBinning(n_bins).fit(logits, y).predict_proba(logits)[:, 1]
    np.testing.assert_allclose(served[order], expected, atol=1e-6)


def test_scaling_binning_takes_as_many_values_as_it_has_bins_and_the_mean_of_platt() -> None:
    logits, y = draw_rows(1000, 2)
    served = ScalingBinning(10).fit(logits, y).predict_proba(logits)[:, 1]
    assert len(np.unique(served)) == 10
    assert served.mean() == pytest.approx(PlattScaling().fit(logits, y).predict_proba(logits)[:, 1].mean(), abs=1e-6)


def test_a_table_is_as_long_as_a_power_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 15, 16, 100)] == [2, 2, 4, 16, 16, 128]
