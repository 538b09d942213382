"""Which of two forecasters is called better, from a journal, without a server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import calibrators
from calibrators import Calibrator
from calibrators.graph import LOGITS
from calibrators.kinds.identity import Identity
from calibrators.numerics import softmax
from calibrators.online.comparison import Difference
from service.inference.batcher import Answer, Run
from service.learning import shadow, shadow_runs
from service.learning.shadow import BETTER, UNDECIDED, WORSE, Comparison, Judge, from_journal, reads_logits
from service.learning.shadow_runs import ShadowRun
from service.store.journal_tables import Retention, forget_revision, prune
from service.store.labels import NewLabel, Result
from service.store.packs import MOST_PROBABLE, Answered
from service.store.reading import Reader
from service.store.shadows import ShadowPack, ShadowRow, append_shadow_pack, given_to, read_shadows
from tests.service import journals
from tests.service.journals import MODEL
from tests.service.test_durability import until

PLENTY = 10**9
CHAMPION, CHALLENGER = "none", "temperature-1"
K = 4


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[journals.Kept]:
    opened = journals.Kept(tmp_path, queue_bytes=1 << 30)
    yield opened
    opened.close()


def rows(count: int, seed: int, temperature: float = 2.5, n_classes: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((count, n_classes))
    return logits.astype(np.float32), (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)


def temperature(value: float, n_classes: int = K) -> Calibrator:
    tensors = {"temperature": np.array(value), "n_classes": np.array(n_classes)}
    return calibrators.create("temperature").set_tensors(tensors)


def row_of(**changes: object) -> ShadowRow:
    values = {
        "model": MODEL,
        "revision": CHALLENGER,
        "model_digest": "digest",
        "champion": CHAMPION,
        "policy": "manual",
        "level": 0.95,
        "least_labels": 1,
        "share": 0.0,
        "start_ms": 0,
        "since_ms": 0,
    }
    return ShadowRow(**values | changes)  # type: ignore[arg-type]


def judge_of(
    kept: journals.Kept, calibrator: Calibrator | None = None, quota: int = PLENTY, **changes: object
) -> Judge:
    """A judge of the model's own probabilities against a temperature of 2.5, begun."""
    judge = Judge(kept.journal, row_of(**changes), calibrator or temperature(2.5), 0.0, quota)
    judge.begin()
    judge.load()
    return judge


def served(
    kept: journals.Kept, logits: np.ndarray, probabilities: np.ndarray | None = None, revision: str = CHAMPION
) -> list[str]:
    """Predictions of one row each."""
    now, given = int(1000 * time.time()), softmax(logits) if probabilities is None else probabilities
    return kept.predict(
        *(Answered.one(now, revision, 0, logits[i : i + 1], given[i : i + 1]) for i in range(len(logits)))
    )


def tell(kept: journals.Kept, ids: list[str], labels: np.ndarray, producer: str = "") -> None:
    told = [NewLabel(name, 0, label) for name, label in zip(ids, labels.tolist(), strict=True)]
    assert set(kept.label(told, producer=producer)) == {Result.RECORDED}


def come(kept: journals.Kept, count: int, seed: int, temperature: float = 2.5, producer: str = "") -> None:
    logits, labels = rows(count, seed, temperature)
    tell(kept, served(kept, logits), labels, producer)


def run(judge: Judge) -> Comparison:
    while judge.step():
        pass
    return judge.comparison


def half_brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1) / 2


def test_a_better_challenger_is_told_by_the_scores_of_what_was_served(kept: journals.Kept) -> None:
    judge = judge_of(kept)
    assert judge.comparison.verdict == UNDECIDED
    logits, labels = rows(3000, seed=1)
    tell(kept, served(kept, logits), labels)
    found = run(judge)
    p, q = softmax(logits.astype(np.float64)), softmax(logits.astype(np.float64) / 2.5)
    own = np.arange(len(labels)), labels
    assert found.gain.n_labels == found.counts["judged"] == 3000
    assert found.gain.mean == pytest.approx((half_brier(p, labels) - half_brier(q, labels)).mean(), abs=1e-6)
    assert found.log_loss_gain / 3000 == pytest.approx(np.log(q[own] / p[own]).mean(), abs=1e-5)
    assert (found.verdict, found.verdict_ms > 0) == (BETTER, True)
    assert found.gain.interval()[0] > 0


def test_a_worse_challenger_is_told_too(kept: journals.Kept) -> None:
    judge = judge_of(kept, temperature(0.4))
    come(kept, 3000, seed=2)
    assert run(judge).verdict == WORSE


def test_what_was_predicted_before_or_by_another_revision_or_model_file_does_not_count(kept: journals.Kept) -> None:
    old_logits, old_labels = rows(20, seed=3)
    old = served(kept, old_logits)
    kept.flush()
    judge = judge_of(kept, since_ms=int(1000 * time.time()) + 1)
    since = judge.row.since_ms
    assert not run(judge).counts.total()
    while int(1000 * time.time()) < since:
        pass
    logits, labels = rows(100, seed=4)
    tell(kept, served(kept, logits[:40], revision="platt-7"), labels[:40])
    other = kept.journal.open_stream(MODEL, "2", "another digest", K)
    foreign = kept.predict(
        Answered.one(int(1000 * time.time()), CHAMPION, 0, logits[40:49], softmax(logits[40:49])), stream=other
    )
    kept.label([NewLabel(foreign[0], row, 0) for row in range(9)])
    tell(kept, served(kept, logits[49:]), labels[49:])
    tell(kept, old, old_labels)  # late, and from before
    counts = run(judge).counts
    assert (counts["judged"], counts["other"]) == (51, 49)


def test_what_is_missing_late_unusable_or_over_the_quota_is_counted(kept: journals.Kept) -> None:
    judge = judge_of(kept, quota=100)
    logits, labels = rows(200, seed=5)
    logits[0] = np.nan
    ids = served(kept, logits)
    tell(kept, ids[:50], labels[:50])
    counts = run(judge).counts
    assert (counts["judged"], counts["missing"], counts["unusable"]) == (49, 150, 1)
    tell(kept, ids[50:], labels[50:])
    counts = run(judge).counts
    assert (counts["judged"], counts["late"], counts["over_quota"]) == (100, 51, 99)


def test_one_producer_can_keep_a_challenger_from_being_called_better_and_none_can_make_it_so(
    kept: journals.Kept,
) -> None:
    judge = judge_of(kept, temperature(0.4))
    come(kept, 3000, seed=6, producer="honest")
    assert run(judge).verdict == WORSE
    come(kept, 20_000, seed=7, temperature=0.2, producer="mallory")  # labels that the worse one likes
    found = run(judge)
    assert found.gain.interval()[0] > 0
    assert (found.verdict, found.contesting(0.95)) == (UNDECIDED, 1)


def test_of_many_producers_those_with_the_most_labels_have_a_say(
    kept: journals.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "MOST_PRODUCERS", 3)
    judge = judge_of(kept)
    for producer in range(5):
        come(kept, 10 * (producer + 1), seed=producer, producer=f"p{producer}")
    found = run(judge)
    assert found.gain.n_labels == 150
    assert sorted(gain.n_labels for gain in found.by_producer.values()) == [30, 40, 50]


def test_a_restart_goes_on_and_a_replay_gives_the_same_numbers_to_the_bit(kept: journals.Kept) -> None:
    judge, undisturbed = judge_of(kept), judge_of(kept, revision="temperature-2")
    for seed in range(6):
        come(kept, 150, seed=10 + seed, producer=f"p{seed % 2}")
        run(judge)
        run(undisturbed)
        judge = Judge(kept.journal, judge.row, judge.calibrator, 0.0, PLENTY)
        judge.load()
    assert judge.comparison.gain.n_labels == 900
    assert judge.comparison == undisturbed.comparison
    assert judge.replay() == judge.comparison
    assert judge.replay().encode() == judge.comparison.encode()


def test_a_comparison_with_another_champion_begins_anew_and_says_so(kept: journals.Kept) -> None:
    judge = judge_of(kept)
    come(kept, 300, seed=20)
    assert run(judge).gain.n_labels == 300
    now = int(1000 * time.time()) + 1
    judge.begin_anew("platt-9", now, "compared with platt-9")
    assert judge.comparison == Comparison()
    with kept.journal.reading() as connection:
        (row,) = read_shadows(connection)
    assert (row, row.champion, row.note) == (judge.row, "platt-9", "compared with platt-9")
    while int(1000 * time.time()) < now:
        pass
    logits, labels = rows(100, seed=21)
    tell(kept, served(kept, logits, revision="platt-9"), labels)
    come(kept, 50, seed=22)
    judge = Judge(kept.journal, row, judge.calibrator, 0.0, PLENTY)
    judge.load()
    counts = run(judge).counts
    assert (counts["judged"], counts["other"]) == (100, 50)
    assert judge.replay() == judge.comparison


def test_the_end_of_a_shadow_is_written_down_and_its_rows_are_forgotten(kept: journals.Kept) -> None:
    judge = judge_of(kept)
    come(kept, 100, seed=23)
    run(judge)
    judge.end("stopped", "somebody", "why")
    with kept.journal.reading() as connection:
        (row,) = read_shadows(connection)
        left = connection.execute("SELECT (SELECT count(*) FROM readers), (SELECT count(*) FROM releases)").fetchone()
    assert (row.outcome, row.ended_by, row.note, row.final["gain"][0]) == ("stopped", "somebody", "why", 100)
    assert left == (0, 0)


def given(kept: journals.Kept, requests: list[tuple[int, np.ndarray]], stream: int | None = None) -> None:
    pack = ShadowPack.of(requests)
    place = (MODEL, CHALLENGER, kept.stream.row.stream if stream is None else stream)
    kept.journal.writer.write_now(lambda connection: append_shadow_pack(connection, *place, pack))


@pytest.mark.parametrize("n_classes", [2, K, 200])
def test_a_challenger_that_was_run_is_judged_by_what_it_gave_to_the_rows_it_was_run_on(
    kept: journals.Kept, n_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "HOLD_SECONDS", 0.0)
    kept.stream = kept.journal.open_stream(MODEL, "1", "digest", n_classes)
    judge = judge_of(kept, temperature(2.5, n_classes), share=0.5)
    logits, labels = rows(300, seed=24, n_classes=n_classes)
    p, q = softmax(logits), softmax(logits / 2.5)
    now = int(1000 * time.time())
    ids = kept.predict(*(Answered.one(now, CHAMPION, 0, logits[i : i + 3], p[i : i + 3]) for i in range(0, 300, 3)))
    given(kept, [(number, q[3 * number : 3 * number + 3]) for number in range(0, 40, 2)])
    given(kept, [(number, q[3 * number : 3 * number + 3]) for number in range(41, 100, 4)])
    given(kept, [(number, q[:3]) for number in range(100)], stream=77)
    kept.label([NewLabel(ids[i // 3], i % 3, int(labels[i])) for i in range(300)])
    found = run(judge)
    ran = np.isin(np.arange(300) // 3, [*range(0, 40, 2), *range(41, 100, 4)])
    assert (found.counts["judged"], found.counts["not_run"]) == (ran.sum(), (~ran).sum()) == (105, 195)
    if n_classes <= MOST_PROBABLE:
        wanted = half_brier(p.astype(float), labels) - half_brier(q.astype(float), labels)
        assert found.gain.mean == pytest.approx(wanted[ran].mean(), abs=1e-6)
    assert judge.replay() == found


def test_probabilities_that_are_no_numbers_get_the_worst_score(
    kept: journals.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "HOLD_SECONDS", 0.0)
    judge = judge_of(kept, share=1.0)
    logits, labels = rows(2, seed=25)
    tell(kept, served(kept, logits), labels)
    given(kept, [(0, np.full((1, K), np.nan)), (1, softmax(logits[1:]))])
    found = run(judge)
    assert found.gain.total == pytest.approx(half_brier(softmax(logits[:1]), labels[:1])[0] - 1.0, abs=1e-6)


def test_rows_that_a_challenger_may_still_be_run_on_are_not_judged_yet(kept: journals.Kept) -> None:
    judge = judge_of(kept, share=1.0)
    come(kept, 10, seed=26)
    assert not run(judge).counts.total()


def test_what_a_challenger_gave_goes_with_the_rows_it_was_given_to(kept: journals.Kept) -> None:
    logits, labels = rows(40, seed=27)
    for start in (0, 20):
        tell(kept, served(kept, logits[start : start + 20]), labels[start : start + 20])
        given(kept, [(number, softmax(logits[number : number + 1])) for number in range(start, start + 20)])
    count = "SELECT count(*) FROM shadow_packs"
    kept.journal.writer.write_now(lambda c: prune(c, Retention(seconds=1e9, bytes=0), most=1))
    with kept.journal.reading() as connection:
        assert connection.execute(count).fetchone() == (1,)
    kept.journal.writer.write_now(lambda c: forget_revision(c, MODEL, CHALLENGER))
    with kept.journal.reading() as connection:
        assert connection.execute(count).fetchone() == (0,)


@pytest.mark.parametrize(
    ("calibrator", "n_classes", "of_logits", "of_journal"),
    [
        (Identity.of(K), K, True, True),
        (temperature(2.0), 65, True, False),
        (calibrators.create("online_temperature"), K, True, False),
        (calibrators.create("feature_clipping"), K, True, True),  # of the logits themselves
        (calibrators.create("feature_clipping", layer="h", width=8), K, False, False),
        (calibrators.create("split_conformal", base="temperature").fit(*rows(300, seed=0)), K, True, True),
    ],
)
def test_it_is_told_what_must_be_run(calibrator: Calibrator, n_classes: int, of_logits: bool, of_journal: bool) -> None:
    assert (reads_logits(calibrator), from_journal(calibrator, n_classes)) == (of_logits, of_journal)


def answer_of(logits: np.ndarray, revision: str = CHAMPION) -> Answer:
    session = SimpleNamespace(provider="CPUExecutionProvider")
    snapshot = SimpleNamespace(revision=revision, online_state=None, session=session)
    return Answer(Run([LOGITS], [logits], snapshot, len(logits), (0, 0)), 0, len(logits))


def test_a_request_is_computed_by_the_state_that_there_was_when_it_was_answered(
    kept: journals.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state after it may have learned its label."""
    monkeypatch.setattr(shadow_runs, "GATHER_SECONDS", 0.05)
    model = SimpleNamespace(n_classes=K)
    run = ShadowRun(kept.journal, row_of(share=1.0), model, kept.stream.row.stream, temperature(2.0))  # type: ignore[arg-type]
    logits, _ = rows(6, seed=28)
    run.offer(0, answer_of(logits[:2]), dict, 0)
    run.challenger = temperature(5.0)
    run.offer(1, answer_of(logits[2:4]), dict, 0)
    run.offer(2, answer_of(logits[4:], "another"), dict, 0)
    until(lambda: run.counts["run"] == 4)
    run.close()
    now = int(1000 * time.time())
    kept.predict(*(Answered.one(now, CHAMPION, 0, logits[i : i + 2], softmax(logits[i : i + 2])) for i in (0, 2, 4)))
    kept.flush()
    reader = Reader(kept.journal, MODEL, "anyone", 0)
    (part,) = reader.read().pairs
    with kept.journal.reading() as connection:
        there, found = given_to(connection, CHALLENGER, part)
    assert there.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(found[:2], softmax(logits[:2] / 2), atol=1e-6)
    np.testing.assert_allclose(found[2:4], softmax(logits[2:4] / 5), atol=1e-6)


def test_what_waited_too_long_is_given_up(kept: journals.Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_runs, "GATHER_SECONDS", 0.05)
    monkeypatch.setattr(shadow_runs, "LATEST_SECONDS", 0.0)
    model = SimpleNamespace(n_classes=K)
    run = ShadowRun(kept.journal, row_of(share=1.0), model, 1, temperature(2.0))  # type: ignore[arg-type]
    run.offer(0, answer_of(rows(3, seed=29)[0]), dict, 0)
    until(lambda: run.counts["late"] == 3)
    run.close()
    assert run.counts["run"] == 0


def promotions(gains: np.ndarray, level: float, least: int) -> np.ndarray:
    """Of each of many streams of gains, (streams, labels), after how many labels it is called better; 0: never.

    The interval is looked at after every label.
    """
    n = np.arange(1, gains.shape[1] + 1)
    total = np.cumsum(gains, axis=1)
    before = np.concatenate([np.zeros((len(gains), 1)), total[:, :-1] / n[:-1]], axis=1)
    variation = np.cumsum((gains - before) ** 2, axis=1)
    ends = np.zeros(len(gains), int)
    for index in range(len(gains)):
        for count in range(least, gains.shape[1] + 1):
            found = Difference(count, total[index, count - 1], variation[index, count - 1])
            if found.interval(level)[0] > 0:
                ends[index] = count
                break
    return ends


def streams(count: int, labels: int, challenger: float, seed: int) -> np.ndarray:
    """Gains of a challenger with this temperature, where the champion's is 1 and the truth lies at 1.5."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((count * labels, 3))
    y = (logits / 1.5 + rng.gumbel(size=logits.shape)).argmax(axis=1)
    gains = half_brier(softmax(logits), y) - half_brier(softmax(logits / challenger), y)
    return gains.reshape(count, labels)


def equal_forecasters(count: int, labels: int, seed: int) -> np.ndarray:
    """Gains between forecasts that differ on each label and are as good: (.6, .4) and (.4, .6) of a fair coin."""
    y = np.random.default_rng(seed).integers(0, 2, (count, labels))
    return np.where(y == 0, 0.4**2 - 0.6**2, 0.6**2 - 0.4**2)


def test_the_simulation_says_what_the_comparison_says() -> None:
    (gains,) = streams(1, 600, 1.5, seed=0)
    (end,) = promotions(gains[None], 0.95, 1)
    found = Difference()
    for count, gain in enumerate(gains, 1):
        found = found.after(np.array([gain]))
        assert (found.interval()[0] > 0) == (count >= end > 0) or count > end > 0


def test_an_equal_challenger_is_hardly_ever_called_better() -> None:
    """At level .8, looked at after each of 1500 labels: at most .2 of the streams, and on one side alone, so .1.

    Of 300 streams more than 60 would be called better with probability below 1e-7 if the chance were .1. An interval
    for one number of labels, looked at as often, calls more than that better.
    """
    gains = equal_forecasters(300, 1500, seed=1)
    assert np.count_nonzero(promotions(gains, 0.8, 1)) <= 60
    n = np.arange(1, 1501)
    for_one_time = np.cumsum(gains, axis=1) - 1.28 * np.sqrt(n) * gains.std()
    assert np.count_nonzero((for_one_time[:, 30:] > 0).any(axis=1)) > 60


def test_a_better_challenger_is_called_so_in_a_bounded_number_of_labels_and_a_worse_never() -> None:
    """The true temperature gains .0066 a label with a deviation of .064: the bound is above zero by 9,000 labels. A
    worse one's chance is below that of an equal one."""
    ends = promotions(streams(20, 10_000, 1.5, seed=2), 0.95, 500)
    assert (ends > 0).all()
    assert np.median(ends) < 8000
    assert not promotions(streams(20, 4000, 0.7, seed=3), 0.95, 1).any()
