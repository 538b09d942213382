"""Now-casts: their intervals hold as often as they say, and are taken back when they do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from benchmarks.drift_streams import stream
from calibrators.metrics import debiased_squared_error
from calibrators.metrics.calibration import binned_curve, equal_width_edges
from service.drift.detectors import registry
from service.drift.detectors.base import Array, Batch
from service.drift.nowcasts import LOOKS, N_BINS, Nowcasts, betting_interval, squared_gap_interval

EDGES = equal_width_edges(N_BINS, np.dtype(np.float64))


def after(change: str, seed: int, n: int = 2000) -> tuple[Batch, Batch]:
    batch = stream(change, 1000 + n, 1000, seed)
    return batch.rows(slice(0, 1000)), batch.rows(slice(1000, None))


def accuracy_in_the_long_run(change: str) -> float:
    batch = stream(change, 50_000, 1, 0)
    return float((batch.logits.argmax(axis=1) == batch.labels).mean())


def of_two_classes(confidence: Array, correct: Array) -> Batch:
    logits = np.stack([np.log(confidence), np.log1p(-confidence)], axis=1)
    return Batch(logits, np.where(correct, 0, 1), np.zeros(len(confidence), dtype=np.int64))


@pytest.mark.parametrize("change", ["none", "benign covariate", "label shift"])
def test_accuracy_is_told_without_labels_while_the_model_is_calibrated(change: str) -> None:
    """.95 of intervals hold the accuracy; of 60, fewer than 50 would with probability 2e-4."""
    truth, held = accuracy_in_the_long_run(change), 0
    for seed in range(60):
        before, now = after(change, seed)
        nowcasts = Nowcasts()
        nowcasts.read_labels(before)
        nowcasts.read(now)
        told = nowcasts.accuracy_without_labels(ringing=False)
        assert told.valid
        assert told.high - told.low < 0.1
        held += told.low <= truth <= told.high
    assert held >= 50


@pytest.mark.parametrize("change", ["input noise", "label noise", "temperature 2"])
def test_it_is_wrong_when_calibration_breaks_which_the_flag_says_and_labels_mend(change: str) -> None:
    """The sequence by betting holds in .95 of streams; of 40, fewer than 32 would with probability 1e-4."""
    truth, held = accuracy_in_the_long_run(change), 0
    for seed in range(40):
        before, now = after(change, seed)
        nowcasts = Nowcasts()
        nowcasts.read_labels(before)
        nowcasts.read(now)
        told = nowcasts.accuracy_without_labels(ringing=True)
        assert not told.low <= truth <= told.high
        assert not told.valid
        assert "an alarm rings" in told.why_not
        nowcasts.begin_cohort()
        nowcasts.read_labels(now.rows(slice(0, 400)))
        by_labels = nowcasts.accuracy()
        assert by_labels.valid
        held += by_labels.low <= truth <= by_labels.high
    assert held >= 32


def test_the_flag_goes_down_under_concept_drift_by_the_alarm_with_labels_and_stays_up_without() -> None:
    for change, goes_down in {"label noise": True, "benign covariate": False}.items():
        batch, detector, nowcasts = stream(change, 6000, 4000, 3), registry.create("recalibration"), Nowcasts()
        up = []
        for start in range(0, 6000, 500):
            part = batch.rows(slice(start, start + 500))
            nowcasts.read(part)
            nowcasts.read_labels(part)
            ringing = detector.statistic >= detector.threshold or detector.update(part) is not None
            up.append(nowcasts.accuracy_without_labels(ringing=ringing).valid)
        assert up[:8] == [True] * 8
        assert up[8:] == [not goes_down] * 4


def test_the_betting_sequence_holds_at_all_looks_together() -> None:
    """It may fail at one of the looks in .05 of streams; of 100, more than 14 would with probability 1e-4."""
    failed = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.beta(0.5, 1.5, size=400)
        bounds = [betting_interval(x[:n], 0.95) for n in range(20, 401, 20)]
        failed += not all(low <= 0.25 <= high for low, high in bounds)
    assert failed <= 14
    assert bounds[-1][1] - bounds[-1][0] < 0.15


def test_its_bounds_are_narrower_of_what_varies_less_and_never_beyond_what_can_be() -> None:
    wide, narrow = (betting_interval(np.tile([0.5 - h, 0.5 + h], 500), 0.95) for h in (0.5, 0.05))
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 3
    for x in (np.zeros(50), np.ones(50), np.array([0.3])):
        low, high = betting_interval(x, 0.95)
        assert 0 <= low <= x.mean() <= high <= 1


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_interval_of_the_calibration_error_holds_at_all_looks_together(temperature: float) -> None:
    """It may fail at one of the looks in .05 of cohorts; of 200, more than 21 would with probability 5e-4."""
    many = stream("none", 100_000, 0, 5)
    p, true = softmax(temperature * many.logits, axis=1), softmax(many.logits, axis=1)
    confidence, top = p.max(axis=1), p.argmax(axis=1)
    curve = binned_curve(confidence, true[np.arange(len(top)), top], EDGES)
    truth = float(curve.counts @ np.nan_to_num(curve.accuracy - curve.confidence) ** 2 / len(top))
    correct, rng, failed = (top == many.labels).astype(float), np.random.default_rng(0), 0
    for _ in range(200):
        chosen = rng.integers(len(top), size=2000)
        looks = [chosen[:n] for n in range(250, 2001, 250)]
        assert len(looks) == LOOKS
        bounds = [
            squared_gap_interval(binned_curve(confidence[rows], correct[rows], EDGES), 1 - 0.05 / LOOKS)
            for rows in looks
        ]
        failed += not all(low <= truth <= high for low, high in bounds)
    assert failed <= 21
    assert bounds[-1][1] ** 0.5 - bounds[-1][0] ** 0.5 < 0.1


def test_the_calibration_error_is_that_of_the_metrics_where_the_bins_are_the_same() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.permutation(np.repeat([0.55, 0.7, 0.9], 800))
    correct = rng.random(2400) < confidence - 0.1
    nowcasts = Nowcasts(cohort_labels=2400)
    nowcasts.read_labels(of_two_classes(confidence, correct))
    told = nowcasts.calibration_error()
    p = np.stack([confidence, 1 - confidence], axis=1)
    assert told.estimate == pytest.approx(debiased_squared_error(p, np.where(correct, 0, 1), n_bins=3) ** 0.5)
    assert told.low < told.estimate < told.high
    assert told.n_labels == 2400


def test_a_cohort_is_told_of_at_its_looks_and_the_one_before_until_it_has_half() -> None:
    batch = after("none", 0, n=2600)[1]
    nowcasts = Nowcasts(cohort_labels=800)
    nowcasts.read_labels(batch.rows(slice(0, 99)))
    assert nowcasts.calibration_error().why_not == "99 labels have come, 100 are needed."
    nowcasts.read_labels(batch.rows(slice(99, 350)))
    assert nowcasts.calibration_error().n_labels == 300
    first = nowcasts.calibration_error()
    nowcasts.read_labels(batch.rows(slice(350, 399)))
    assert nowcasts.calibration_error() == first  # between looks nothing changes
    nowcasts.read_labels(batch.rows(slice(399, 1100)))
    assert nowcasts.calibration_error().n_labels == 800  # 300 of the next are too few
    nowcasts.read_labels(batch.rows(slice(1100, 1200)))
    assert nowcasts.calibration_error().n_labels == 400
    nowcasts.begin_cohort()
    assert np.isnan(nowcasts.calibration_error().estimate)  # of labels from before a change nothing is told


def test_of_few_rows_or_labels_it_says_what_is_missing() -> None:
    before, now = after("none", 0)
    nowcasts = Nowcasts()
    assert nowcasts.accuracy_without_labels(ringing=False).why_not == "0 rows have come, 100 are needed."
    assert np.isnan(nowcasts.accuracy().estimate)
    nowcasts.read(now)
    nowcasts.read_labels(before.rows(slice(0, 60)))
    told = nowcasts.accuracy_without_labels(ringing=False)
    assert (told.valid, told.n_rows, told.n_labels) == (False, 2000, 60)
    assert told.why_not == "60 labels have come, 500 are needed to know what confidence is worth."
    assert nowcasts.accuracy().n_labels == 60


def test_rows_without_probabilities_pass_by() -> None:
    before, _ = after("none", 0)
    odd = np.full((30, before.logits.shape[1]), np.nan)
    odd[::2, 0] = np.inf
    mixed = replace(before.rows(slice(0, 30)), scores=odd)
    one, other = Nowcasts(), Nowcasts()
    for nowcasts, batches in ((one, [before]), (other, [mixed, before, mixed])):
        for batch in batches:
            nowcasts.read(batch)
            nowcasts.read_labels(batch)
    assert one.accuracy() == other.accuracy()
    assert one.calibration_error() == other.calibration_error()


def test_rows_whose_label_never_came_count_as_rows_only() -> None:
    before, _ = after("none", 0)
    one, other = Nowcasts(), Nowcasts()
    one.read_labels(before.rows(np.arange(0, 1000, 2)))
    other.read_labels(replace(before, labels=np.where(np.arange(1000) % 2 == 0, before.labels, -1)))
    one.read(before)
    other.read(before)
    assert one.accuracy() == other.accuracy()
    assert one.accuracy_without_labels(ringing=False) == other.accuracy_without_labels(ringing=False)


def test_the_figures_are_the_same_however_rows_are_divided_and_after_a_restart() -> None:
    batch = stream("none", 5000, 5000, 0)
    whole, divided = Nowcasts(), Nowcasts()
    whole.read(batch)
    whole.read_labels(batch)
    for start in range(0, 5000, 777):
        part = batch.rows(slice(start, start + 777))
        divided = Nowcasts().restore(divided.state())
        divided.read(part)
        divided.read_labels(part)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, divided.state()[name], err_msg=name)
    assert whole.calibration_error() == divided.calibration_error()
    assert whole.accuracy() == divided.accuracy()


def test_a_state_of_other_parameters_and_parameters_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="window_rows=2000"):
        Nowcasts().restore(Nowcasts(window_rows=500).state())
    with pytest.raises(ValueError, match="multiple of 8"):
        Nowcasts(cohort_labels=1001)
    with pytest.raises(ValueError, match="level"):
        Nowcasts(level=1.0)
