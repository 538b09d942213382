"""What the page counts, against the metrics of the same rows."""

from __future__ import annotations

import asyncio
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from calibrators import metrics
from calibrators.numerics import softmax
from service.drift.states import RAW, SERVED
from service.drift.summaries import Counted, Summaries
from service.drift.summary import GROUP_FIELDS, LEVELS_MS, MOST_POINTS, OLDEST_MS, Sums, Tally, Timeline
from service.errors import Damaged
from service.store.labels import NewLabel
from service.store.reading import NO_LABEL, Cohort, Follower
from tests.service.dashboards import HOUR_MS, NOW_MS, pairs, sets_of, tally, traffic
from tests.service.journals import MODEL, N_CLASSES, Kept, answered

DAY_MS = 24 * HOUR_MS


def test_the_sums_are_the_metrics_of_the_rows() -> None:
    part = traffic(0, 6000)
    total = tally(part).summary(NOW_MS - 2 * DAY_MS, NOW_MS + 1).total
    labelled = part.labels != NO_LABEL
    y = part.labels[labelled]
    for which, p in (
        (RAW, softmax(part.kept.logits.astype(np.float64))[labelled]),
        (SERVED, part.kept.probabilities[labelled].astype(np.float64)),
    ):
        assert total.calibration_error(which) == pytest.approx(metrics.expected_calibration_error(p, y), abs=1e-9)
        assert total.log_loss(which) == pytest.approx(metrics.log_loss(p, y), rel=1e-6)
        assert total.accuracy(which) == metrics.accuracy(p, y)
        wanted = metrics.reliability_curve(p, y)
        np.testing.assert_array_equal(total.curve(which).counts, wanted.counts)
        np.testing.assert_allclose(total.curve(which).accuracy, wanted.accuracy)
    assert (total.answers, total.labels) == (6000, int(labelled.sum()))


def test_rows_that_are_no_numbers_count_for_nothing_and_a_class_ruled_out_costs_what_it_can() -> None:
    whole = traffic(9, 2000)
    logits, labels = whole.kept.logits.copy(), np.maximum(whole.labels, 0)
    odd = np.array([3, 500, 501])
    logits[odd, [1, 2, 4]] = np.nan, np.inf, -np.inf  # of the last the model itself rules its label out
    labels[odd] = 4
    with np.errstate(invalid="ignore"):
        served = softmax(logits.astype(np.float64))
    total = tally(pairs(logits, served, labels, whole.times_ms)).summary(NOW_MS - 2 * DAY_MS, NOW_MS + 1).total
    assert (total.answers, total.labels) == (1998, 1998)
    good = np.delete(np.arange(2000), odd)
    for which in (RAW, SERVED):
        wanted = metrics.log_loss(served[good], labels[good]) * len(good) - math.log(np.finfo(np.float32).tiny)
        assert total.log_loss(which) == pytest.approx(wanted / 1998, rel=1e-6)


def test_of_many_classes_the_model_may_rule_out_all_that_are_not_kept() -> None:
    logits = np.random.default_rng(6).normal(size=(50, 100))
    logits[:, 20:] = -np.inf
    labels = np.arange(50) % 20
    part = pairs(logits, softmax(logits), labels, np.linspace(NOW_MS - HOUR_MS, NOW_MS - 1, 50))
    total = tally(part).summary(NOW_MS - DAY_MS, NOW_MS + 1).total
    for which in (RAW, SERVED):
        assert total.log_loss(which) == pytest.approx(metrics.log_loss(softmax(logits[:, :20]), labels), rel=1e-5)


def test_sets_are_those_that_the_revision_makes() -> None:
    part = traffic(1, 4000)
    calibrator = sets_of(traffic(2, 3000))
    total = tally(part, sets=calibrator).summary(NOW_MS - 2 * DAY_MS, NOW_MS + 1).total
    sets = calibrator.sets(part.kept.probabilities)
    labelled = np.flatnonzero(part.labels != NO_LABEL)
    assert total.coverage == pytest.approx(sets[labelled, part.labels[labelled]].mean())
    assert total.mean_set_size == pytest.approx(sets.sum(axis=1).mean())
    np.testing.assert_array_equal(total["set_sizes"], np.bincount(sets.sum(axis=1), minlength=12))


def test_classes_and_segments_add_up_to_the_whole() -> None:
    part = traffic(3, 3000)
    summary = tally(part).summary(NOW_MS - 2 * DAY_MS, NOW_MS + 1)
    fields = dict(zip(GROUP_FIELDS, summary.groups.classes.T, strict=True))
    labelled = part.labels != NO_LABEL
    np.testing.assert_array_equal(fields["came"], np.bincount(part.labels[labelled], minlength=10))
    np.testing.assert_allclose(fields["promised"], part.kept.probabilities[labelled].sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(fields["labels"], np.bincount(part.kept.label[labelled], minlength=10))
    assert fields["right"].sum() == summary.total["served.right"].sum()
    assert fields["raw_said"].sum() == pytest.approx(summary.total["raw.said"].sum())
    assert set(summary.groups.segments) == {"eu", "us"}
    both = np.sum(list(summary.groups.segments.values()), axis=0)
    assert both[:6] == pytest.approx(summary.groups.classes[:, :6].sum(axis=0))


def test_of_many_classes_those_not_kept_share_what_is_left() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(400, 100)).astype(np.float32) * 2
    p = softmax(logits.astype(np.float64))
    labels = rng.integers(100, size=400)
    times = np.linspace(NOW_MS - HOUR_MS, NOW_MS - 1, 400)
    summary = tally(pairs(logits, p, labels, times)).summary(NOW_MS - DAY_MS, NOW_MS + 1)
    kept = np.argsort(-p, axis=1)[:, :32]
    found = (kept == labels[:, None]).any(axis=1)
    rest = 1 - np.take_along_axis(p, kept, 1).sum(axis=1)
    of_label = np.where(found, p[np.arange(400), labels], rest / 68)
    for which in (RAW, SERVED):
        assert summary.total.log_loss(which) == pytest.approx(-np.log(of_label).mean(), rel=1e-4)
    assert summary.groups.classes[:, GROUP_FIELDS.index("promised")].sum() == pytest.approx(400, rel=1e-5)


@pytest.mark.parametrize("age_hours", [0.05, 1, 12, 72])
def test_a_label_that_comes_later_counts_as_one_that_was_there(age_hours: float) -> None:
    part = traffic(5, 2000, hours=age_hours)
    whole = tally(part)
    late = tally(pairs(part.kept.logits, part.kept.probabilities, np.full(2000, NO_LABEL), part.times_ms,
                       segments=[part.segment_of(row) for row in range(2000)]))  # fmt: skip
    late.age(NOW_MS + 600_000)
    whole.age(NOW_MS + 600_000)
    late.add_labels(part.chosen(np.flatnonzero(part.labels != NO_LABEL)))
    one, other = (counted.summary(NOW_MS - 7 * DAY_MS, NOW_MS + 1) for counted in (whole, late))
    np.testing.assert_allclose(one.total.values, other.total.values)
    np.testing.assert_allclose(one.groups.classes, other.groups.classes)
    assert [p.since_ms for p in one.points] == [p.since_ms for p in other.points]


def test_labels_of_rows_that_are_not_counted_are_not_counted() -> None:
    counted = tally(traffic(6, 100, hours=1))
    before = counted.summary(0, NOW_MS + 1).total.labels
    counted.add_labels(traffic(7, 100, hours=1, labelled=1.0).chosen(np.arange(0)))
    old = traffic(8, 50, labelled=1.0)
    counted.add_labels(pairs(old.kept.logits, old.kept.probabilities, old.labels, old.times_ms - DAY_MS))
    assert counted.summary(0, NOW_MS + 1).total.labels == before


def test_buckets_are_joined_as_they_age_and_lose_nothing() -> None:
    counted: Timeline[Sums] = Timeline(LEVELS_MS, OLDEST_MS, 7 * DAY_MS, Sums)
    rng = np.random.default_rng(9)
    times = np.sort(rng.integers(NOW_MS, NOW_MS + 6 * DAY_MS, 5000)).tolist()
    for time_ms in times:
        counted.age(time_ms)
        counted.at(time_ms)["sets"][0] += 1
    found = list(counted.between(0, NOW_MS + 7 * DAY_MS))
    assert sum(sums["sets"][0] for _, _, sums in found) == 5000
    assert all(end <= after for (_, end, _), (after, _, _) in pairwise(found))
    for since, until, sums in found:
        assert sums["sets"][0] == sum(since <= time_ms < until for time_ms in times)
    assert len(counted) < 300 + 360 + 288 + 7 * 24
    counted.age(NOW_MS + 20 * DAY_MS)
    assert len(counted) == 0


def test_a_window_has_so_many_points_at_most_however_long() -> None:
    counted = tally(traffic(10, 20_000, hours=6 * 24))
    for hours in (0.1, 0.2, 1, 7, 24, 100, 168):
        points = counted.summary(int(NOW_MS - hours * HOUR_MS), NOW_MS + 1).points
        assert 1 <= len(points) <= MOST_POINTS + 2
        assert all(one.until_ms <= other.since_ms for one, other in pairwise(points))


def test_the_calibration_error_of_a_calibrated_model_is_what_chance_explains() -> None:
    """Each run is over with probability .02 at most: of 200 runs more than 15 are with probability 1e-6."""
    shares = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        logits = 2 * rng.standard_normal((600, 4))
        p = softmax(logits)
        labels = (rng.random((600, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=3)
        total = tally(pairs(logits, p, labels, np.full(600, NOW_MS - 1))).summary(0, NOW_MS + 1).total
        shares.append(total.calibration_error(RAW) / total.chance_error(RAW))
    assert sum(share > 1 for share in shares) <= 15
    assert np.median(shares) > 0.5


def test_nothing_counted_is_nothing_said() -> None:
    total = Tally(4, DAY_MS).summary(0, NOW_MS).total
    assert total.answers == total.labels == total.sets == 0
    for value in (total.calibration_error(RAW), total.log_loss(SERVED), total.coverage, total.mean_set_size):
        assert math.isnan(value)


def test_a_follower_counts_rows_when_they_come_and_labels_when_they_come(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    now = 1_700_000_100_000
    counted = Counted(kept.journal, MODEL, 7 * DAY_MS, lambda *_: None)
    try:
        ids = kept.predict(*(answered(seed, rows=2) for seed in range(30)))
        kept.flush()
        while counted.step(now):
            pass
        assert counted.summary(0, now).total.answers == 60  # type: ignore[union-attr]
        assert counted.summary(0, now).total.labels == 0  # type: ignore[union-attr]
        kept.label([NewLabel(one, row, row) for one in ids[:20] for row in (0, 1)])
        assert counted.step(now)
        assert not counted.step(now)
        more = kept.predict(answered(99))
        kept.label_one(more[0], N_CLASSES - 1)
        kept.flush()
        kept.label_one(ids[25], 3)
        while counted.step(now):
            pass
        total = counted.summary(0, now).total  # type: ignore[union-attr]
        assert (total.answers, total.labels) == (61, 42)
    finally:
        kept.close()


def test_a_model_whose_journal_is_damaged_keeps_no_other_from_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Follower.read

    def damaged(self: Follower, most_rows: int) -> Cohort:
        if self._model == "first":
            raise Damaged("a pack is damaged")
        return read(self, most_rows)

    monkeypatch.setattr(Follower, "read", damaged)
    kept = Kept(tmp_path)
    summaries = Summaries(kept.journal, lambda: ["first", MODEL], lambda *_: None, 7 * DAY_MS / 1000)
    try:
        kept.predict(answered(0, time_ms=int(1000 * time.time())))
        kept.flush()
        asyncio.run(summaries.look())
        assert summaries.summary(MODEL, 0, 2 * NOW_MS).total.answers == 1  # type: ignore[union-attr]
    finally:
        kept.close()


def test_a_follower_that_starts_late_counts_the_last_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.drift.summaries.LOOK_BACK_ROWS", 25)
    kept = Kept(tmp_path)
    try:
        for start in range(0, 50, 10):  # a pack each
            ids = kept.predict(*(answered(seed) for seed in range(start, start + 10)))
            kept.flush()
            kept.label_one(ids[0], 1)
        counted = Counted(kept.journal, MODEL, 7 * DAY_MS, lambda *_: None)
        while counted.step(1_700_000_100_000):
            pass
        summary = counted.summary(0, 1_800_000_000_000)
        assert summary is not None
        assert (summary.total.answers, summary.total.labels) == (20, 2)
        assert summary.counted_ms == 1_700_000_000_030
    finally:
        kept.close()
