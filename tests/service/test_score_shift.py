"""The detector without labels: its promise over chance references, what it sees, and what it cannot see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from benchmarks.drift_streams import stream
from service.drift.detectors import score_shift
from service.drift.detectors.base import Array, Batch, Lumped
from service.drift.detectors.score_shift import ScoreShift, signals_of

REFERENCE, HORIZON = 300, 5000

Stream = Callable[[np.random.Generator, int], Batch]


def rows(logits: Array, **signals: Array) -> Batch:
    n = len(logits)
    return Batch(logits, np.full(n, -1), np.zeros(n, dtype=np.int64), signals)


def numbers(rng: np.random.Generator, n: int) -> Batch:
    return rows(np.zeros((n, 2)), a=rng.random(n), b=rng.normal(size=n))


def few_values(rng: np.random.Generator, n: int) -> Batch:
    return rows(np.zeros((n, 2)), a=rng.geometric(0.5, size=n).astype(float), b=np.ones(n))


def classes(rng: np.random.Generator, n: int) -> Batch:
    return rows(np.eye(5)[rng.choice(5, size=n, p=[0.5, 0.3, 0.1, 0.08, 0.02])])


def share_that_rang(made: Stream, signals: str, runs: int, **parameters: float | str) -> float:
    rang = 0
    for seed in range(runs):
        detector = ScoreShift(signals, reference_rows=REFERENCE, horizon=HORIZON, **parameters)
        rang += detector.update(made(np.random.default_rng(seed), REFERENCE + HORIZON)) is not None
    return rang / runs


@pytest.mark.parametrize("slack", ["normal", "exact"])
@pytest.mark.parametrize(
    ("made", "signals"), [(numbers, "a"), (numbers, "a,b"), (few_values, "a,b"), (classes, "predicted_class")]
)
def test_over_chance_references_it_rings_falsely_no_more_often_than_it_says(
    made: Stream, signals: str, slack: str
) -> None:
    """At most .105 of references may ring; of 100, more than 22 would with probability 2e-4."""
    assert share_that_rang(made, signals, 100, slack=slack) <= 0.22


@pytest.mark.parametrize(("made", "signals"), [(numbers, "a"), (few_values, "a"), (classes, "predicted_class")])
def test_without_slack_a_reference_of_few_rows_breaks_the_promise(made: Stream, signals: str) -> None:
    assert share_that_rang(made, signals, 100, slack="none") > 0.35


def test_against_the_law_itself_it_rings_as_often_as_it_may_and_no_oftener() -> None:
    """The reference is the law, so the bound N / c = .1 holds without slack, and the bets waste little of it.

    Of 400 streams more than 62 would ring with probability 2e-4.
    """
    law, rang = (np.arange(20_000) + 0.5) / 20_000, 0
    for seed in range(400):
        values = np.concatenate([law, np.random.default_rng(seed).random(HORIZON)])
        detector = ScoreShift("a", reference_rows=len(law), slack="none", horizon=HORIZON)
        rang += detector.update(rows(np.zeros((len(values), 2)), a=values)) is not None
    assert 16 <= rang <= 62


@pytest.mark.parametrize(
    ("change", "signals", "within"),
    [
        ("temperature 1.5", "confidence", 400),
        ("temperature 2", "confidence", 150),
        ("temperature 0.67", "entropy", 250),
        ("temperature 1.5", "confidence,margin,entropy,predicted_class", 400),
        ("label shift", "predicted_class", 3000),
        ("input noise", "input_0,ood_score", 200),
        ("benign covariate", "input_0,ood_score", 600),
    ],
)
def test_it_rings_soon_after_a_change_and_says_when_it_came(change: str, signals: str, within: int) -> None:
    batch = stream(change, 8000, 4000, 0)
    detector = ScoreShift(signals)
    rang = detector.update(batch)
    assert rang is not None
    assert 0 < rang - 4000 < within
    assert abs(rang + 1 - detector.change_point() - 4000) < 200
    assert detector.statistic >= detector.threshold == pytest.approx(6)


def test_evidence_names_the_signal_and_the_class() -> None:
    detector = ScoreShift("confidence,input_0,ood_score")
    detector.update(stream("input noise", 8000, 4000, 0))
    assert detector.evidence()["ood_score"] > 0.9
    detector = ScoreShift("confidence,predicted_class")
    detector.update(stream("label shift", 8000, 4000, 0))
    assert max(detector.evidence(), key=lambda part: detector.evidence()[part]) in {"class 0", "class 8"}
    assert sum(detector.evidence().values()) == pytest.approx(1)


def test_it_is_blind_where_the_labels_alone_change() -> None:
    for seed in range(5):
        assert ScoreShift("confidence,predicted_class").update(stream("label noise", 9000, 4000, seed)) is None


def test_many_signals_with_ties_give_the_same_bits_however_divided_and_restored() -> None:
    batch = stream("none", 5000, 5000, 0)
    batch.signals["coarse"] = batch.signals["input_0"].round()  # type: ignore[index]
    signals = "confidence,coarse,predicted_class"
    whole, divided = ScoreShift(signals), ScoreShift(signals)
    assert whole.update(batch) == divided.update(batch.rows(slice(0, 1)))
    for start in range(1, 5000, 37):
        divided = ScoreShift(signals).restore(divided.state())
        divided.update(batch.rows(slice(start, start + 37)))
    for name, array in whole.state().items():
        assert array.tobytes() == divided.state()[name].tobytes(), name


def test_machine_code_and_python_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, signals = stream("none", 400, 400, 0), "confidence,margin,entropy,ood_score,predicted_class"
    machine = ScoreShift(signals, reference_rows=200)
    machine.update(batch)
    for name in ("_bet", "_signals"):
        monkeypatch.setattr(score_shift, name, getattr(score_shift, name).py_func)
    plain = ScoreShift(signals, reference_rows=200)
    plain.update(batch)
    for name, array in machine.state().items():
        assert array.tobytes() == plain.state()[name].tobytes(), name


def test_labels_are_not_read() -> None:
    batch = stream("temperature 2", 6000, 4000, 0)
    one, other = ScoreShift(), ScoreShift()
    assert one.update(batch) == other.update(rows(batch.logits))
    assert one.statistic == other.statistic


def test_rows_without_a_finite_signal_pass_it_by() -> None:
    detector = ScoreShift("density")
    assert detector.update(numbers(np.random.default_rng(0), 5000)) is None
    assert not detector.ready
    batch = stream("input noise", 6000, 4000, 0)
    apart = np.arange(0, 12_000, 2)
    far = np.full(12_000, np.nan)
    far[apart] = batch.signals["ood_score"]
    thinned = rows(np.zeros((12_000, 2)), ood_score=far)
    one, other = ScoreShift("ood_score"), ScoreShift("ood_score")
    assert apart[one.update(batch) or 0] == other.update(thinned)
    assert one.statistic == other.statistic


def test_after_a_reset_it_keeps_its_reference_and_after_it_rang_it_stays_finite() -> None:
    batch = stream("temperature 2", 12_000, 3000, 0)
    detector = ScoreShift()
    rang = detector.update(batch)
    assert rang is not None
    for start in range(rang + 1, 12_000):  # it rings at every row, until it is reset
        assert detector.update(batch.rows(slice(start, start + 1))) == 0
        if detector.n_rows > 6000:
            break
    assert np.isfinite(detector.statistic)
    detector.reset()
    assert detector.ready
    assert detector.statistic == detector.n_rows == 0
    assert detector.update(stream("temperature 2", 1000, 0, 1)) is not None


def test_signals_are_what_scipy_says() -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(500, 7))
    found, predicted = signals_of(logits)
    p = softmax(logits, axis=1)
    ordered = np.sort(p, axis=1)
    np.testing.assert_allclose(found, [ordered[:, -1], ordered[:, -1] - ordered[:, -2], entropy(p, axis=1)], rtol=1e-9)
    np.testing.assert_array_equal(predicted, p.argmax(axis=1))


def lumped(rng: np.random.Generator, n_rows: int, n_classes: int, *, other: float) -> Lumped:
    classes = np.argsort(rng.random((n_rows, n_classes)), axis=1)[:, :8]
    named = np.round(3 * rng.normal(size=classes.shape), 1)
    return Lumped(named, classes, np.round(other + rng.normal(size=n_rows), 1), n_classes)


@pytest.mark.parametrize("other", [-6.0, 3.0])
def test_signals_of_lumped_logits_are_those_of_all_classes_whichever_is_the_largest(other: float) -> None:
    scores = lumped(np.random.default_rng(0), 500, 90, other=other)
    found, predicted = signals_of(scores)
    wanted, class_of_all = signals_of(scores.whole)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(predicted, class_of_all)


def test_lumped_rows_are_read_as_if_they_were_whole() -> None:
    scores = lumped(np.random.default_rng(1), 3000, 90, other=-6.0)
    labels, segments = np.full(3000, -1), np.zeros(3000, np.int64)
    one, other = (ScoreShift("confidence,predicted_class", reference_rows=500) for _ in range(2))
    assert one.update(Batch(scores, labels, segments)) == other.update(Batch(scores.whole, labels, segments))
    assert one.statistic == pytest.approx(other.statistic)


def test_of_probabilities_of_zero_the_entropy_is_finite() -> None:
    found, _ = signals_of(np.array([[0.0, -np.inf, -np.inf], [0.0, 0.0, -np.inf]]))
    np.testing.assert_allclose(found, [[1, 0.5], [1, 0], [0, np.log(2)]], atol=1e-12)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"signals": ""}, "signals"),
        ({"signals": "a,,b"}, "signals"),
        ({"signals": "a,a"}, "signals"),
        ({"signals": "no name"}, "signals"),
        ({"slack": "some"}, "slack"),
        ({"reference_rows": 20}, "reference_rows"),
        ({"reference_rows": 20.5}, "reference_rows"),
        ({"reference_error": 0}, "reference_error"),
        ({"false_alarm_probability": 0}, "false_alarm_probability"),
        ({"horizon": float("inf")}, "horizon"),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_name(parameters: dict[str, float | str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScoreShift(**parameters)  # type: ignore[arg-type]


def test_another_number_of_classes_is_refused() -> None:
    detector = ScoreShift("predicted_class")
    detector.update(classes(np.random.default_rng(0), 10))
    with pytest.raises(ValueError, match="5 columns"):
        detector.update(numbers(np.random.default_rng(0), 10))


def test_a_thousand_classes_are_bet_on_by_the_most_frequent_of_them() -> None:
    rng = np.random.default_rng(0)
    often = np.sort(rng.zipf(1.3, size=12_000) % 1000)
    rng.shuffle(often)
    predicted = np.where((np.arange(12_000) > 6000) & (rng.random(12_000) < 0.2), 7, often)
    logits = np.zeros((12_000, 1000))
    logits[np.arange(12_000), predicted] = 1
    detector = ScoreShift("predicted_class")
    rang = detector.update(rows(logits))
    assert rang is not None
    assert rang < 6600
    assert detector.evidence()["class 7"] > 0.5
