"""What monitors make of a journal, without a server: the same alarms however it was read, after a restart and again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibrators.numerics import softmax
from service.drift import alarms as alarm_rows
from service.drift import monitors, nowcasting
from service.drift.alarms import Alarms
from service.drift.defaults import FALSE_ALARM, HORIZON_ROWS, default_monitors
from service.drift.detectors.base import Batch
from service.drift.monitors import (
    CHANGED,
    FRESH,
    RESET,
    STEP_ROWS,
    Monitor,
    Ring,
    Turn,
    Watching,
    detector_of,
    subject_of,
)
from service.drift.states import RAW, SERVED, SUSPEND, Alarm, Cause, MonitorSpec
from service.errors import Damaged, InvalidRequest, NotFound
from service.store.database import open_database
from service.store.journal import Journal
from service.store.journal_tables import SCHEMA, StreamRow, append_pack, insert_stream
from service.store.labels import NewLabel, Result
from service.store.maintenance import forget_damaged, journal_problems
from service.store.packs import Answered, Pack
from service.store.reading import Reader
from tests.service import journals
from tests.service.journals import MODEL

DIGEST, REVISION, K = "digest", "temperature-1", 3
SHIFT = MonitorSpec(MODEL, "scores", "score_shift", RAW, {"reference_rows": 500, "false_alarm_probability": 0.01})
MISSING = MonitorSpec(MODEL, "labels", "missing_labels", RAW, {"reference_rows": 200})


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[journals.Kept]:
    opened = journals.Kept(tmp_path, queue_bytes=1 << 30)
    opened.stream = opened.journal.open_stream(MODEL, "1", DIGEST, K)
    yield opened
    opened.close()


def rows(count: int, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of calibrated forecasts and their labels; the logits are then multiplied."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((count, K))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return (scale * logits).astype(np.float32), labels


def come(
    kept: journals.Kept,
    logits: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    revision: str = REVISION,
    served: np.ndarray | None = None,
    at: int = 0,
) -> list[str]:
    """Predictions, one a second, and the labels of those that have one."""
    probabilities = softmax(logits if served is None else served)
    begun = at or int(1000 * time.time()) - 10**8
    ids = kept.predict(
        *(
            Answered.one(begun + 1000 * i, revision, 0, logits[i : i + 1], probabilities[i : i + 1])
            for i in range(len(logits))
        )
    )
    kept.flush()
    if labels is not None:
        told = [NewLabel(name, 0, label) for name, label in zip(ids, labels.tolist(), strict=True) if label >= 0]
        assert set(kept.label(told)) <= {Result.RECORDED}
    return ids


def begun(kept: journals.Kept, spec: MonitorSpec, wait_seconds: float = 0.0) -> Monitor:
    monitor = Monitor(kept.journal, spec, wait_seconds)
    subject = subject_of(spec.watched, DIGEST, REVISION)
    kept.journal.writer.write_now(lambda connection: monitor.begin(connection, subject))
    monitor.load()
    return monitor


def opened(kept: journals.Kept, spec: MonitorSpec, wait_seconds: float = 0.0) -> Monitor:
    monitor = Monitor(kept.journal, spec, wait_seconds)
    monitor.load()
    return monitor


def run(kept: journals.Kept, *monitors: Monitor, most_steps: int = 1000) -> list[Ring]:
    """Every step that there is; where they rang."""
    rings: list[Ring] = []
    for monitor in monitors:
        for _ in range(most_steps):
            if (step := monitor.step({})) is None:
                break
            kept.journal.writer.write_now(lambda c, m=monitor, s=step: m.write(c, s))
            monitor.written(step)
            rings += step.rings
        else:
            pytest.fail("it comes to no end")
    return rings


def turn(kept: journals.Kept, monitor: Monitor, what: str, **changes: object) -> None:
    kept.journal.writer.write_now(lambda connection: monitor.turn(connection, what, **changes))
    monitor.load()


def test_a_change_of_the_scores_rings_once_soon_after_and_says_since_when(kept: journals.Kept) -> None:
    monitor = begun(kept, SHIFT)
    at = 1_700_000_000_000
    come(kept, np.concatenate([rows(4000, 1)[0], rows(1000, 2, scale=3.0)[0]]), at=at)
    (ring,) = run(kept, replaced(monitor, cooldown_rows=1000))
    assert at + 4000_000 < ring.time_ms < at + 4100_000
    assert abs(ring.since_ms - (at + 4000_000)) < 60_000
    assert ring.statistic >= ring.threshold == 7
    assert ring.evidence == {"confidence": 1.0}


def replaced(monitor: Monitor, **changes: object) -> Monitor:
    """The same monitor, not begun yet, of a slightly other spec."""
    monitor.watching.spec = monitor.spec = replace(monitor.spec, **changes)
    return monitor


def test_what_does_not_change_does_not_ring(kept: journals.Kept) -> None:
    monitors = [begun(kept, SHIFT), begun(kept, MISSING)]
    come(kept, *rows(6000, 3))
    assert run(kept, *monitors) == []
    shift, missing = (monitor.state(()) for monitor in monitors)
    assert (shift.ready, shift.n_rows, shift.missing) == (True, 5500, 0)
    assert (missing.ready, missing.n_rows, missing.missing) == (True, 5800, 0)
    assert missing.false_alarms == (
        "rings falsely within 100,000 rows with probability 0.1 at most, and 0.005 for a reference unlike its source"
    )


def test_labels_that_stay_away_ring(kept: journals.Kept) -> None:
    monitor = begun(kept, MISSING)
    logits, labels = rows(1400, 4)
    labels[1000:] = labels[300:303] = -1
    at = 1_700_000_000_000
    come(kept, logits[:900], labels[:900], at=at)
    run(kept, monitor)
    assert monitor.state(()).missing == 3
    come(kept, logits[900:], labels[900:], at=at + 900_000)
    first, *_ = run(kept, monitor)
    assert at + 1000_000 < first.time_ms < at + 1030_000
    assert abs(first.since_ms - (at + 1000_000)) <= 3000


@pytest.mark.parametrize("spec", [*default_monitors(MODEL), *nowcasting.specs(MODEL)], ids=lambda spec: spec.name)
def test_what_is_kept_of_many_classes_is_read_as_if_it_were_all_of_them(
    kept: journals.Kept, monkeypatch: pytest.MonkeyPatch, spec: MonitorSpec
) -> None:
    n_classes = 100
    kept.stream = kept.journal.open_stream(MODEL, "1", DIGEST, n_classes)
    rng = np.random.default_rng(6)
    logits = (2 * rng.standard_normal((900, n_classes))).astype(np.float32)
    labels = np.where(rng.random(900) < 0.8, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1), -1)
    spec = replace(spec, baseline_rows=min(spec.baseline_rows, 500))
    come(kept, logits, labels)
    cohort = Reader(kept.journal, MODEL, "anyone", 0).read()
    turn = Turn(spec, subject_of(spec.watched, DIGEST, REVISION), FRESH, 0)
    lumped, whole = Watching(turn), Watching(turn)
    rings = lumped.take(cohort)
    make = monitors.scores_of
    monkeypatch.setattr(monitors, "scores_of", lambda *given: make(*given).whole)
    assert whole.take(cohort) == rings
    assert (lumped.missing, lumped.detector.n_rows) == (whole.missing, whole.detector.n_rows)
    mine, other = lumped.detector.state(), whole.detector.state()
    assert all(np.allclose(mine[name], other[name]) for name in mine.keys() | other.keys())


def test_a_detector_of_labels_rings_at_the_same_row_however_few_have_one(kept: journals.Kept) -> None:
    logits, labels = rows(4000, 8, scale=3.0)
    few = np.where(np.random.default_rng(0).random(4000) < 0.05, labels, -1)
    spec = MonitorSpec(MODEL, "served", "recalibration", SERVED)
    monitor, detector = begun(kept, spec), detector_of(spec)
    come(kept, logits, few, at=1_700_000_000_000)
    at = detector.update(Batch(np.log(softmax(logits).astype(np.float64)), few, np.zeros(4000, np.int64)))
    first, *_ = run(kept, monitor)
    assert at is not None and first.time_ms == 1_700_000_000_000 + 1000 * at


def test_a_label_that_is_waited_for_holds_back_what_comes_behind_it(kept: journals.Kept) -> None:
    labelled, not_labelled = begun(kept, MISSING, wait_seconds=1e9), begun(kept, SHIFT, wait_seconds=1e9)
    logits, labels = rows(300, 5)
    labels[100] = -1
    ids = come(kept, logits, labels)
    assert run(kept, labelled, not_labelled) == []
    assert (labelled.rows, not_labelled.rows) == (100, 300)
    kept.label_one(ids[100], 1)
    run(kept, labelled)
    assert labelled.rows == 300


def test_a_label_that_came_too_late_is_counted_and_not_read(
    kept: journals.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.drift.monitors._now_ms", lambda: 1_600_000_000_000)
    before = come(kept, rows(10, 6)[0], at=1_500_000_000_000)
    monitor = begun(kept, MISSING)
    ids = come(kept, rows(300, 6)[0], at=1_700_000_000_000)
    run(kept, monitor)
    for name in (before[0], *ids[:5]):
        kept.label_one(name, 1)
    run(kept, monitor)
    state = monitor.state(())
    assert (state.missing, state.late) == (300, 5)


def test_a_monitor_begins_with_what_is_predicted_after_it_was_made(kept: journals.Kept) -> None:
    come(kept, *rows(100, 7))
    monitor = begun(kept, SHIFT)
    run(kept, monitor)
    assert monitor.rows == 0
    come(kept, *rows(50, 8))
    run(kept, monitor)
    assert monitor.rows == 50
    assert monitor.replay() == (True, [])


def test_alarms_are_the_same_to_the_bit_after_a_restart_at_any_step_and_in_a_replay(
    kept: journals.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.drift.monitors.STEP_ROWS", 170)
    spec = replace(SHIFT, cooldown_rows=50)
    monitor, straight = begun(kept, spec), begun(kept, replace(spec, name="straight"))
    come(kept, np.concatenate([rows(1500, 9)[0], rows(1500, 10, scale=3.0)[0]]), at=1_700_000_000_000)
    rings: list[Ring] = []
    for _ in range(1000):
        step = monitor.step({})
        if step is None:
            break
        if monitor.number % 2:
            monitor = opened(kept, spec)  # what was read and not written is read again
            step = monitor.step({})
        kept.journal.writer.write_now(lambda c, m=monitor, s=step: m.write(c, s))
        rings += step.rings
        monitor = opened(kept, spec)
    assert len(rings) >= 3
    assert monitor.replay() == (True, rings)
    assert run(kept, straight) == rings
    ours, theirs = (m.watching.encode().partition(b"\n")[2] for m in (monitor, straight))
    assert ours == theirs
    monitor.watching.detector.n_rows += 1
    assert monitor.replay() == (False, rings)


def test_what_befell_a_monitor_is_in_its_replay(kept: journals.Kept) -> None:
    monitor = begun(kept, SHIFT)
    come(kept, rows(700, 11)[0])
    run(kept, monitor)
    turn(kept, monitor, RESET)
    come(kept, rows(400, 12)[0])
    run(kept, monitor)
    turn(kept, monitor, CHANGED, spec=replace(SHIFT, cooldown_rows=7))
    turn(kept, monitor, FRESH, subject="another digest")
    come(kept, rows(300, 13)[0])
    run(kept, monitor)
    turn(kept, monitor, FRESH, subject=DIGEST)
    come(kept, np.concatenate([rows(800, 14)[0], rows(400, 15, scale=4.0)[0]]))
    rings = run(kept, monitor)
    assert len(rings) > 1
    assert monitor.watching.spec.cooldown_rows == 7
    assert monitor.replay() == (True, rings)
    assert opened(kept, SHIFT).watching.encode() == monitor.watching.encode()


def test_a_reset_keeps_the_reference_and_a_new_subject_does_not(kept: journals.Kept) -> None:
    monitor = begun(kept, SHIFT)
    come(kept, rows(700, 16)[0])
    run(kept, monitor)
    turn(kept, monitor, RESET)
    assert (monitor.state(()).ready, monitor.state(()).n_rows) == (True, 0)
    turn(kept, monitor, FRESH, subject="digest revision-2")
    assert not monitor.state(()).ready
    assert monitor.state(()).history  # what was is still to be seen


def test_what_was_served_is_watched_of_the_active_revision_alone(kept: journals.Kept) -> None:
    served, raw = begun(kept, replace(SHIFT, watched=SERVED)), begun(kept, replace(SHIFT, name="raw"))
    logits, _ = rows(3000, 17)
    come(kept, logits[:1500], served=0.5 * logits[:1500])
    come(kept, logits[1500:], revision="none")
    assert run(kept, served, raw) == []
    assert (served.state(()).n_rows, raw.state(()).n_rows) == (1000, 2500)
    come(kept, logits[:500], served=3 * logits[:500])  # only what was served has changed
    assert run(kept, raw) == []
    assert run(kept, served)


def test_after_a_ring_rows_are_passed_by_until_it_has_cooled_down(kept: journals.Kept) -> None:
    monitor = begun(kept, replace(SHIFT, cooldown_rows=400))
    at = 1_700_000_000_000
    come(kept, np.concatenate([rows(1000, 18)[0], rows(2000, 19, scale=3.0)[0]]), at=at)
    times = [ring.time_ms for ring in run(kept, monitor)]
    assert len(times) in (4, 5)
    assert min(np.diff(times)) > 400_000


def test_monitors_at_one_place_share_what_is_read(kept: journals.Kept) -> None:
    monitors = [begun(kept, replace(SHIFT, name=name)) for name in "ab"]
    come(kept, rows(900, 20)[0])
    known: dict = {}
    steps = [monitor.step(known) for monitor in monitors]
    assert len(known) == 1
    for monitor, step in zip(monitors, steps, strict=True):
        kept.journal.writer.write_now(lambda c, m=monitor, s=step: m.write(c, s))
        monitor.written(step)
    assert [monitor.replay() for monitor in monitors] == [(True, [])] * 2


def test_a_history_stays_short(kept: journals.Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.drift.monitors.STEP_ROWS", 2)
    monkeypatch.setattr("service.drift.monitors.MOST_POINTS", 20)
    monitor, at = begun(kept, replace(SHIFT, parameters={"reference_rows": 200, "slack": "none"})), 1_700_000_000_000
    come(kept, rows(400, 21)[0], at=at)
    run(kept, monitor)
    times = [time_ms for time_ms, _ in monitor.state(()).history]
    assert 10 <= len(times) <= 20
    assert times == sorted(times)
    assert times[0] < at + 5000
    assert times[-1] == at + 399_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"detector": "crystal_ball"}, "unknown kind 'crystal_ball'"),
        ({"parameters": {"reference_rows": -1}}, "reference_rows must be a number at least 1"),
        ({"parameters": {"colour": 1}}, r"score_shift has parameters \[.*\], got \['colour'\]"),
        ({"detector": "missing_labels", "parameters": {"colour": 1}}, "colour"),
        ({"detector": "missing_labels", "parameters": {"tolerance": "much"}}, "tolerance must be a number"),
    ],
)
def test_what_cannot_be_is_told(kept: journals.Kept, changes: dict, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Monitor(kept.journal, replace(SHIFT, **changes), 0)


# ---- labels

CALIBRATION = MonitorSpec(MODEL, "calibration", "recalibration", RAW, {"tolerance": 0.02})


def test_labels_of_mistakes_that_come_later_do_not_ring_behind_the_watermark(kept: journals.Kept) -> None:
    waiting = begun(kept, CALIBRATION, wait_seconds=1e9)
    hasty = begun(kept, replace(CALIBRATION, name="hasty"))
    rings = []
    for seed in range(5):
        logits, labels = rows(600, seed)
        right = logits.argmax(axis=1) == labels
        ids = come(kept, logits, np.where(right, labels, -1))
        rings += run(kept, waiting)
        hasty_rings = run(kept, hasty)
        told = [NewLabel(ids[row], 0, int(labels[row])) for row in np.flatnonzero(~right)]
        assert set(kept.label(told)) == {Result.RECORDED}
        rings += run(kept, waiting)
    assert (rings, waiting.watching.detector.n_rows) == ([], 3000)
    assert hasty_rings  # who reads labels as they come is told that everything is right


def test_a_model_that_was_never_calibrated_rings_when_that_changes_and_not_before(kept: journals.Kept) -> None:
    spec = replace(CALIBRATION, baseline_rows=2000)
    from_baseline, from_truth = begun(kept, spec), begun(kept, replace(CALIBRATION, name="truth"))
    shifted = [
        logits + np.float32([0.7, 0, 0]) for logits in (rows(6000, 30, scale=2.0)[0], rows(1500, 31, scale=2.0)[0])
    ]
    come(kept, shifted[0], rows(6000, 30)[1])
    assert run(kept, from_baseline) == []
    assert run(kept, from_truth)
    assert from_baseline.state(()).n_rows == 4000
    come(kept, 1.6 * shifted[1], rows(1500, 31)[1], at=1_700_000_000_000)
    first, *_ = run(kept, from_baseline)
    assert first.time_ms < 1_700_000_000_000 + 1000_000
    assert from_baseline.replay()[0]
    assert opened(kept, spec).watching.encode() == from_baseline.watching.encode()


def test_the_default_monitors_together_seldom_ring_and_say_so() -> None:
    names = ["served_calibration", "raw_calibration", "raw_scores", "missing_labels"]
    assert [spec.name for spec in default_monitors(MODEL)] == names
    specs = default_monitors(MODEL, ["input_mean", "input_1"])
    assert [spec.name for spec in specs] == [*names, "raw_inputs"]
    assert specs[-1].parameters["signals"] == "input_mean,input_1"
    total = 0.0
    for spec in specs:
        detector = detector_of(spec)
        horizon, probability = (detector.parameters()[name] for name in ("horizon", "false_alarm_probability"))
        assert horizon == HORIZON_ROWS
        assert detector.threshold == pytest.approx(np.log10(horizon / probability))
        total += probability
    assert total == pytest.approx(FALSE_ALARM)


# ---- alarms

RING = Ring(2000, 1000, 7, 6.5, 6.0, {"class 3": 0.75})


def added(kept: journals.Kept, spec: MonitorSpec = SHIFT, ring: Ring = RING) -> Alarm:
    return kept.journal.writer.write_now(lambda c: alarm_rows.add(c, spec, ring, REVISION, 3000))


def changed(kept: journals.Kept, alarm: Alarm, **changes: object) -> Alarm:
    return kept.journal.writer.write_now(lambda c: alarm_rows.change(c, MODEL, alarm.id, **changes))


def test_an_alarm_comes_back_as_it_was_and_as_it_was_changed(kept: journals.Kept) -> None:
    alarm, alarms = added(kept, replace(SHIFT, policy=SUSPEND)), Alarms(kept.journal)
    assert (alarm.id, alarm.outcome, alarm.evidence) == ("alarm-1", "pending", {"class 3": 0.75})
    assert alarms.get(MODEL, alarm.id) == alarm
    assert alarms.pending() == [alarm]
    cause = Cause("concept", "class 3", ["it is so"], "do this")
    assert changed(kept, alarm, cause=cause, outcome="done").cause == cause
    assert alarms.get(MODEL, alarm.id) == replace(alarm, cause=cause, outcome="done")
    assert alarms.pending() == []
    for model, name in (("other", alarm.id), (MODEL, "alarm-2"), (MODEL, "alarm-x"), (MODEL, "1")):
        with pytest.raises(NotFound, match="has no alarm"):
            alarms.get(model, name)


def test_while_an_alarm_is_open_it_is_said_of_it_that_it_rang_again(kept: journals.Kept) -> None:
    first, other, alarms = added(kept), added(kept, MISSING), Alarms(kept.journal)
    again = added(kept, ring=RING._replace(time_ms=9000))
    assert (again.id, again.repeats, again.repeated_ms) == (first.id, 1, 9000)
    assert alarms.open_of(MODEL, SHIFT.name) == (first.id,)
    changed(kept, first, acknowledged_by="ann", acknowledged_ms=5)
    assert alarms.open_of(MODEL, SHIFT.name) == ()
    assert added(kept).id == "alarm-3"
    assert [alarm.id for alarm in alarms.before(MODEL)] == ["alarm-3", "alarm-2", "alarm-1"]
    assert [alarm.id for alarm in alarms.before("", other.id)] == ["alarm-1"]
    assert alarms.before("other") == []


def test_an_alarm_of_what_another_revision_served_is_another_alarm(kept: journals.Kept) -> None:
    served, alarms = replace(SHIFT, watched=SERVED), Alarms(kept.journal)
    first = added(kept, served)
    assert added(kept, served).id == first.id
    later = kept.journal.writer.write_now(lambda c: alarm_rows.add(c, served, RING, "vector-2", 3000))
    assert alarms.open_of(MODEL, served.name) == (first.id, later.id)


def test_few_rows_are_left_until_there_are_more(kept: journals.Kept) -> None:
    monitor = begun(kept, SHIFT)
    come(kept, rows(50, 23)[0])
    assert monitor.step({}, 51) is None
    come(kept, rows(1, 24)[0])
    assert monitor.step({}, 51) is not None


def test_changes_are_followed_in_their_order(kept: journals.Kept) -> None:
    alarms = Alarms(kept.journal)
    first = added(kept)
    found, change = alarms.changed("", 0)
    assert [alarm.id for alarm in found] == [first.id]
    second = added(kept, MISSING)
    changed(kept, first, outcome="done")
    found, change = alarms.changed(MODEL, change)
    assert [(alarm.id, alarm.outcome) for alarm in found] == [(second.id, "told"), (first.id, "done")]
    assert alarms.changed(MODEL, change) == ([], change)
    assert [alarm.id for alarm in alarms.after(MODEL, first.id)[0]] == [second.id]
    assert alarms.changed("other", 0)[0] == []


def test_the_oldest_alarms_are_forgotten(kept: journals.Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.monitors.MOST_ALARMS", 3)
    for number in range(6):
        added(kept, replace(SHIFT, name=f"m{number}"))
    assert [alarm.id for alarm in Alarms(kept.journal).before("")] == ["alarm-6", "alarm-5", "alarm-4"]


# ---- the store


@pytest.mark.parametrize("table", ["monitors", "monitor_turns", "alarms"])
def test_damage_to_what_is_kept_of_monitors_is_seen_and_can_be_given_up(tmp_path: Path, table: str) -> None:
    kept = journals.Kept(tmp_path)
    begun(kept, SHIFT)
    added(kept)
    kept.journal.writer.write_now(lambda c: c.execute("INSERT INTO monitors VALUES ('m', 'a', '{}', 7)"))
    kept.journal.writer.write_now(lambda c: c.execute(f"UPDATE {table} SET row = row || ' '"))  # noqa: S608
    kept.journal.writer.write_now(lambda c: table == "monitors" or c.execute("DELETE FROM monitors"))
    kept.close()
    assert [problem for problem in journal_problems(tmp_path) if f"table {table}" in problem]
    with pytest.raises(Damaged, match=f"table {table}"):
        Journal(tmp_path)
    forget_damaged(tmp_path)
    assert journal_problems(tmp_path) == []


def test_a_journal_of_the_release_before_is_brought_up_to_date_with_all_that_it_has(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "journal.sqlite", "journal", SCHEMA, 1)
    stream = StreamRow(1, MODEL, "1", DIGEST, 4, 0.0)
    insert_stream(connection, stream)
    append_pack(connection, stream, Pack.of(0, [journals.answered(1)]), 0)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()
    again = journals.Kept(tmp_path)
    (part,) = Reader(again.journal, MODEL, "anyone", 0).read().pairs
    assert (part.kept.logits == journals.answered(1).kept.logits).all()
    begun(again, SHIFT)
    again.close()
    assert journal_problems(tmp_path) == []


def test_a_step_reads_so_many_rows_at_most(kept: journals.Kept) -> None:
    monitor = begun(kept, SHIFT)
    come(kept, rows(STEP_ROWS + 10, 22)[0])
    step = monitor.step({})
    assert sum(map(len, step.cohort.pairs)) == STEP_ROWS
