"""What an online revision learns from a journal, and which states may serve, without a server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import calibrators
import service.store.online_states
from calibrators.numerics import softmax
from calibrators.online.learner import OnlineCalibrator
from service.errors import Refused
from service.learning import gate
from service.learning.gate import Gate
from service.learning.online import Learner
from service.learning.progress import Progress, Rows, held_out
from service.store.catalogue import RevisionRow
from service.store.journal_tables import Retention, prune
from service.store.labels import NewLabel, Result
from service.store.online_states import OnlineStates, read_state
from service.store.packs import MOST_PROBABLE, Answered, Kept, logits_of
from service.store.reading import Reader
from tests.service import journals
from tests.service.journals import MODEL

DIGEST, PLENTY = "digest", 10**6


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[journals.Kept]:
    opened = journals.Kept(tmp_path, queue_bytes=1 << 30)
    opened.stream = opened.journal.open_stream(MODEL, "1", DIGEST, 2)
    yield opened
    opened.close()


def rows(count: int, seed: int, temperature: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of two classes, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    score = 3 * rng.standard_normal(count)
    logits = np.column_stack([np.zeros(count), score]).astype(np.float32)
    return logits, (rng.random(count) < 1 / (1 + np.exp(-score / temperature))).astype(np.int64)


def served(kept: journals.Kept, logits: np.ndarray) -> list[str]:
    """Predictions of one row each, on their way to the disk."""
    now, probabilities = int(1000 * time.time()), softmax(logits)
    return kept.predict(
        *(
            Answered.one(now, "online_platt-1", 0, logits[i : i + 1], probabilities[i : i + 1])
            for i in range(len(logits))
        )
    )


def tell(kept: journals.Kept, ids: list[str], labels: np.ndarray, producer: str = "honest") -> None:
    told = [NewLabel(name, 0, label) for name, label in zip(ids, labels.tolist(), strict=True)]
    assert set(kept.label(told, producer=producer)) == {Result.RECORDED}


def started(kind: str = "online_platt", n_classes: int = 2) -> OnlineCalibrator:
    calibrator = calibrators.create(kind).fit(np.zeros((2, n_classes)), [0, 1])
    assert isinstance(calibrator, OnlineCalibrator)
    return calibrator


def learner_of(kept: journals.Kept, *, number: int = 1, wait_seconds: float = 0, quota: int = PLENTY) -> Learner:
    row = RevisionRow(MODEL, number, "online_platt", "{}", DIGEST, "", "", 1, 2, None, 0.0, [])
    learner = Learner(kept.journal, row, started(), wait_seconds, quota)
    learner.load()
    return learner


def run(learner: Learner, most_steps: int = 1000) -> None:
    for _ in range(most_steps):
        if not learner.step():
            return
    pytest.fail("it comes to no end")


def serving(kept: journals.Kept, learner: Learner) -> OnlineCalibrator:
    with kept.journal.reading() as connection:
        artifact = read_state(connection, MODEL, learner.revision, learner.serving.number)
    return learner._calibrator(artifact)


def flooded(kept: journals.Kept, count: int) -> float:
    """How far forged labels, that are always the other class, move what is served after 20,000 honest ones.

    They come a few at a time, so that a state is tried after each few, then many at a time.
    """
    learner, (logits, labels) = learner_of(kept), rows(20_000, seed=0)
    tell(kept, served(kept, logits), labels)
    run(learner)
    before = serving(kept, learner).predict_proba(logits)
    assert learner.serving.number
    forged, _ = rows(count, seed=1)
    ids = served(kept, forged)
    bounds = [*range(0, 300, 5), *range(300, count, 200), count]
    for start, stop in itertools.pairwise(bounds):
        tell(kept, ids[start:stop], (forged[start:stop, 1] < 0).astype(np.int64), "mallory")
        run(learner)
    assert learner.progress.counts["learned"] + learner.progress.counts["held_out"] == 20_000 + count
    return float(np.abs(serving(kept, learner).predict_proba(logits) - before)[:, 1].mean())


def test_a_flood_of_forged_labels_of_one_producer_moves_what_is_served_by_less_than_two_hundredths(
    kept: journals.Kept,
) -> None:
    assert flooded(kept, 10_000) <= 0.02


def test_without_the_gate_the_same_flood_moves_it_far(kept: journals.Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MARGIN", np.inf)
    monkeypatch.setattr(gate, "MOVED", np.inf)
    assert flooded(kept, 2000) > 0.2


def test_a_real_drift_of_the_labels_of_every_producer_is_let_through(kept: journals.Kept) -> None:
    learner = learner_of(kept)
    for seed, temperature in ((0, 1.0), (1, 5.0)):
        logits, labels = rows(10_000, seed, temperature)
        for start in range(0, 10_000, 500):
            ids = served(kept, logits[start : start + 500])
            tell(kept, ids, labels[start : start + 500], f"producer {start // 500 % 2}")
            run(learner)
    logits, labels = rows(5000, 2, 5.0)
    losses = [
        -np.log(calibrator.predict_proba(logits)[np.arange(5000), labels]).mean()
        for calibrator in (started(), serving(kept, learner))
    ]
    assert losses[1] < 0.7 * losses[0]


def test_states_are_a_function_of_the_rows_however_they_were_divided(kept: journals.Kept) -> None:
    logits, labels = rows(600, seed=3)
    ids = served(kept, logits)
    tell(kept, ids[:300], labels[:300], "a")
    tell(kept, ids[300:], labels[300:], "b")
    ends = []
    for most in (7, 100, 10_000):
        reader, progress = Reader(kept.journal, MODEL, f"by {most}", 0), Progress.begin(started(), quota=200)
        while cohort := reader.read(most):
            progress.take(cohort, DIGEST)
            progress = Progress.decode(progress.encode())
            reader.commit(cohort)
        ends.append(progress.encode())
    assert ends[0] == ends[1] == ends[2]
    counts = Progress.decode(ends[0]).counts
    assert counts["learned"] == 2 * 200
    assert counts["learned"] + counts["over_quota"] + counts["held_out"] == 600


def test_a_producer_is_learned_from_up_to_its_quota_an_hour(kept: journals.Kept) -> None:
    logits, labels = rows(1000, seed=4)
    ids = served(kept, logits)
    tell(kept, ids[:900], labels[:900], "loud")
    tell(kept, ids[900:], labels[900:], "quiet")
    learner = learner_of(kept, quota=200)
    run(learner)
    counts = learner.progress.counts
    assert 200 + 60 < counts["learned"] <= 200 + 100
    assert counts["over_quota"] > 900 - 200 - 250
    again = learner_of(kept, quota=5)
    assert again.progress.quota == 200  # as it was when learning began: a replay comes to the same


def test_what_is_late_missing_or_of_another_model_file_is_counted(kept: journals.Kept) -> None:
    logits, labels = rows(100, seed=5)
    ids = served(kept, logits)
    other = kept.journal.open_stream(MODEL, "2", "another digest", 2)
    foreign = kept.predict(
        Answered.one(int(1000 * time.time()), "none", 0, logits[:9], softmax(logits[:9])), stream=other
    )
    tell(kept, ids[:60], labels[:60])
    kept.label([NewLabel(foreign[0], row, 0) for row in range(9)])
    kept.flush()
    learner = learner_of(kept)
    run(learner)
    counts = learner.progress.counts
    assert (counts["missing"], counts["late"], counts["unusable"]) == (40, 0, 9)
    tell(kept, ids[60:70], labels[60:70])
    run(learner)
    assert counts["late"] == 10
    assert counts["learned"] + counts["held_out"] == 70


def test_labels_behind_one_that_is_waited_for_are_not_learned_yet(kept: journals.Kept) -> None:
    logits, labels = rows(100, seed=6)
    ids = served(kept, logits)
    tell(kept, ids[:20] + ids[21:], np.delete(labels, 20))
    learner = learner_of(kept, wait_seconds=1e6)
    run(learner)
    dealt_with = lambda: learner.progress.counts["learned"] + learner.progress.counts["held_out"]  # noqa: E731
    assert dealt_with() == 20
    tell(kept, ids[20:21], labels[20:21])
    run(learner)
    assert dealt_with() == 100


def heads(kept: journals.Kept) -> dict[int, str]:
    return OnlineStates(kept.journal).heads(MODEL, "online_platt-1")


def forget(kept: journals.Kept, packs: int) -> None:
    for _ in range(packs):
        kept.journal.writer.write_now(lambda c: prune(c, Retention(seconds=1e9, bytes=0), most=1))


@pytest.fixture
def every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state serves, and is kept."""
    monkeypatch.setattr(service.store.online_states, "KEEP_SECONDS", 0.0)
    for bound in ("MARGIN", "MOVED"):
        monkeypatch.setattr(gate, bound, np.inf)


@pytest.mark.usefixtures("every_state")
def test_a_replay_whose_beginning_is_forgotten_goes_on_from_the_oldest_kept_state_that_it_can(
    kept: journals.Kept,
) -> None:
    learner, (logits, labels) = learner_of(kept, quota=150), rows(800, seed=7)
    for start in range(0, 800, 100):
        tell(kept, served(kept, logits[start : start + 100]), labels[start : start + 100])
        run(learner)
    whole = learner.replay({}, heads(kept))
    assert (whole.equal, whole.since, whole.steps) == (True, 0, learner.number)
    forget(kept, 3)
    part = learner.replay({}, heads(kept))
    assert (part.equal, part.since, part.steps) == (True, 4, learner.number - 4)
    forget(kept, 1)
    assert learner.replay({}, heads(kept)).since == 5
    assert learner.replay({6: 2}, heads(kept)).since == 7  # set back at 6: what came before it says nothing
    learner.progress.counts["learned"] += 1  # another number than the journal's labels make
    with pytest.raises(Refused, match="the journal no longer has what online_platt-1 has learned from since any"):
        learner.replay({}, heads(kept))
    learner.progress.counts["learned"] -= 1
    learner.progress.calibrator.shares_[0] *= 1 + 1e-15
    assert not learner.replay({}, heads(kept)).equal


@pytest.mark.usefixtures("every_state")
def test_a_replay_goes_on_from_no_state_whose_late_labels_are_forgotten(kept: journals.Kept) -> None:
    """A label of the first pack is learned in the fourth step; when the pack goes, no state before that will do."""
    learner, (logits, labels) = learner_of(kept), rows(600, seed=8)
    first = served(kept, logits[:100])
    tell(kept, first[:90], labels[:90])
    run(learner)
    for start in range(100, 600, 100):
        ids = served(kept, logits[start : start + 100])
        late = first[90:] if start == 300 else []
        tell(kept, ids + late, np.concatenate([labels[start : start + 100], labels[90 : 90 + len(late)]]))
        run(learner)
    before = learner.replay({}, heads(kept))
    assert (before.equal, before.since) == (True, 0)
    forget(kept, 1)
    after = learner.replay({}, heads(kept))
    assert (after.equal, after.since) == (True, 4)


@pytest.mark.usefixtures("every_state")
def test_labels_that_are_skipped_teach_nothing_and_a_replay_skips_them_too(kept: journals.Kept) -> None:
    learner, (logits, labels) = learner_of(kept), rows(600, seed=9)
    tell(kept, served(kept, logits[:200]), labels[:200])
    run(learner)
    before, served_before = learner.progress.artifact, learner.serving
    tell(kept, served(kept, logits[200:400]), 1 - labels[200:400])
    learner.skip()
    assert (learner.progress.artifact, learner.serving) == (before, served_before)
    assert not learner.step()
    tell(kept, served(kept, logits[400:]), labels[400:])
    run(learner)
    again = learner_of(kept)
    assert again.progress.encode() == learner.progress.encode()
    setbacks = OnlineStates(kept.journal).setbacks(MODEL, learner.revision)
    assert learner.replay(setbacks, heads(kept)).equal


def test_of_many_classes_those_that_are_not_kept_share_what_is_left() -> None:
    rng = np.random.default_rng(8)
    logits = (3 * rng.standard_normal((50, 200))).astype(np.float32)
    rebuilt = logits_of(Kept.of(logits, softmax(logits)), 200)
    assert rebuilt.shape == (50, 200)
    np.testing.assert_allclose(np.log(np.exp(rebuilt).sum(axis=1)), np.log(np.exp(logits).sum(axis=1)), atol=1e-5)
    assert ((rebuilt == logits).sum(axis=1) == MOST_PROBABLE).all()


def test_about_one_row_in_five_is_held_out_by_its_name_alone(kept: journals.Kept) -> None:
    served(kept, rows(5000, seed=9)[0])
    kept.flush()
    reader = Reader(kept.journal, MODEL, "anyone", 0)
    parts = reader.read().pairs
    count = sum(held_out(part).sum() for part in parts)
    assert 860 < count < 1140  # 4.9 standard deviations: false failures one in a million
    assert (held_out(parts[0])[1:] == held_out(parts[0].chosen(slice(1, None)))).all()


def labelled(count: int, seed: int, producer: int, flip: bool = False, temperature: float = 0.5) -> Rows:
    logits, labels = rows(count, seed, temperature)
    now = np.full(count, 1_700_000_000_000)
    return Rows(logits.astype(np.float64), 1 - labels if flip else labels, np.full(count, producer), now)


@pytest.mark.parametrize("change", [lambda theta: theta * np.nan, lambda theta: theta + 1e6])
def test_parameters_out_of_bounds_do_not_serve(change: Callable[[np.ndarray], np.ndarray]) -> None:
    bad = started("online_temperature")
    bad.theta_ = change(bad.theta_)
    assert Gate(started(), started()).judge(bad).refused == "a parameter is out of bounds"


def test_one_producer_can_keep_a_state_from_serving_and_none_can_make_it_serve() -> None:
    honest, forged = started(), started()
    honest.partial_fit(*rows(5000, seed=10, temperature=0.5))
    logits, labels = rows(5000, seed=11)
    forged.partial_fit(logits, 1 - labels)
    judge = Gate(started(), honest)
    judge.add(labelled(1000, 12, producer=1))
    assert not judge.judge(honest).refused
    assert "worse than the best so far, worse than the start" in judge.judge(forged).refused
    judge.add(labelled(1000, 13, producer=2, flip=True))
    assert judge.judge(forged).refused
    assert judge.judge(honest).refused == "worse than the start"


def test_what_is_not_surely_better_may_move_little() -> None:
    far = started()
    far.partial_fit(*rows(400, seed=17, temperature=1.6))
    judge = Gate(started(), started())
    judge.add(labelled(25, 18, producer=1, temperature=1.6))
    assert judge.judge(started()).refused == ""
    assert "far from the best so far and not surely better" in judge.judge(far).refused
    judge.add(labelled(500, 19, producer=1, temperature=1.6))
    assert judge.judge(far) == judge.judge(far)._replace(refused="", best=True)


def test_a_producer_with_few_rows_has_no_say() -> None:
    forged = started()
    logits, labels = rows(5000, seed=11)
    forged.partial_fit(logits, 1 - labels)
    judge = Gate(started(), started())
    judge.add(labelled(gate.LEAST_ROWS - 1, 14, producer=1))
    verdict = judge.judge(forged)
    assert (verdict.refused, np.isnan(verdict.new)) == ("", True)
    judge.add(labelled(200, 15, producer=1))
    assert judge.judge(forged).refused
