"""The choice among calibrators: right where there is something to choose, harmless where there is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special

import calibrators
from calibrators import auto
from calibrators.metrics import log_loss

FEW = ("platt", "isotonic")


def rows(
    n: int, seed: int, n_classes: int = 5, temperature: float = 2.0, bias: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature + bias of the first class)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((n, n_classes))
    true = logits / temperature
    true[:, 0] += bias
    return logits, np.argmax(true + rng.gumbel(size=true.shape), axis=1)


def test_where_temperature_is_the_truth_it_is_chosen_or_costs_next_to_nothing() -> None:
    """Over 20 draws of 400 rows the choice loses at most .3 % of temperature's held-out log loss on average."""
    ratios = []
    for seed in range(20):
        logits, y = rows(400, seed)
        chosen = auto.select(logits, y, candidates=FEW).calibrator
        unseen, labels = rows(4000, 1000 + seed)
        temperature = calibrators.create("temperature").fit(logits, y)
        ratios.append(
            log_loss(chosen.predict_proba(unseen), labels) / log_loss(temperature.predict_proba(unseen), labels)
        )
    assert np.mean(ratios) <= 1.003


def test_where_a_class_is_biased_a_kind_that_can_say_so_is_chosen() -> None:
    logits, y = rows(2000, 0, bias=2.0)
    selection = auto.select(logits, y, candidates=FEW)
    assert selection.calibrator.kind in FEW
    gain, error = selection.candidates[0].gain
    assert gain > 5 * error


def test_the_ranking_is_by_log_loss_and_names_what_was_compared() -> None:
    selection = auto.select(*rows(500, 0), candidates=FEW)
    losses = [candidate.scores["log_loss"].value for candidate in selection.candidates]
    assert losses == sorted(losses)
    assert {candidate.kind for candidate in selection.candidates} == {"identity", "temperature", *FEW}
    for candidate in selection.candidates:
        assert candidate.scores["log_loss"].low < candidate.scores["log_loss"].value < candidate.scores["log_loss"].high


def test_the_scores_are_of_rows_that_no_fit_has_seen() -> None:
    """The oracle refits by hand on the same folds."""
    logits, y = rows(300, 3)
    selection = auto.select(logits, y, candidates=["platt"], seed=7)
    fold = auto.folds(y, 5, 7)
    expected = np.empty(logits.shape)
    for number in range(5):
        unseen = fold == number
        expected[unseen] = calibrators.create("platt").fit(logits[~unseen], y[~unseen]).predict_proba(logits[unseen])
    (platt,) = [candidate for candidate in selection.candidates if candidate.kind == "platt"]
    assert platt.scores["log_loss"].value == pytest.approx(log_loss(expected, y))


def test_the_winner_is_fitted_on_all_rows() -> None:
    logits, y = rows(500, 1)
    chosen = auto.select(logits, y, candidates=[]).calibrator
    assert calibrators.dumps(chosen) == calibrators.dumps(calibrators.create("temperature").fit(logits, y))


def test_a_lead_within_the_noise_does_not_replace_the_mixture() -> None:
    """Platt is the truth up to its sampling error: whichever is ahead by chance, the mixture or temperature is taken."""
    logits, y = rows(500, 4, bias=0.5)
    selection = auto.select(logits, y, candidates=["platt", "empirical_bayes"])
    losses = {candidate.kind: candidate.scores["log_loss"].value for candidate in selection.candidates}
    assert abs(losses["platt"] - losses["empirical_bayes"]) < 0.01 * losses["platt"]
    assert selection.calibrator.kind in {"empirical_bayes", "temperature"}


@pytest.mark.parametrize(
    ("lead_in_errors", "winner"), [(-1.0, "empirical_bayes"), (2.5, "empirical_bayes"), (3.5, "platt")]
)
def test_the_mixture_is_left_only_for_a_lead_of_three_standard_errors(lead_in_errors: float, winner: str) -> None:
    logits, y = rows(400, 3)
    comparison = auto._Comparison(logits, y, np.ones(400), auto.splits_of(auto.folds(y, 5, 0)), 0, np.inf)
    lead = np.random.default_rng(0).standard_normal(400)
    lead = (lead - lead.mean()) / lead.std() + lead_in_errors / np.sqrt(400)
    mixture = np.full(400, 3.0)
    comparison.losses = {"identity": mixture + 1, "temperature": mixture + 1, "empirical_bayes": mixture}
    comparison.losses["platt"] = mixture - lead
    assert comparison.winner("best") == winner


def test_simple_is_preferred_within_one_standard_error() -> None:
    logits, y = rows(1500, 2, bias=0.25)
    best, simple = (
        auto.select(logits, y, candidates=FEW, prefer=prefer).calibrator.kind for prefer in ("best", "simple")
    )
    assert auto.SIMPLEST_FIRST.index(simple) <= auto.SIMPLEST_FIRST.index(best)
    unbiased = auto.select(*rows(1500, 2), candidates=FEW, prefer="simple").calibrator.kind
    assert unbiased == "temperature"


def test_folds_spread_every_class_evenly() -> None:
    y = np.repeat(np.arange(7), [100, 50, 25, 11, 5, 2, 1])
    fold = auto.folds(y, 5, 0)
    counts = np.array([np.bincount(fold[y == k], minlength=5) for k in range(7)])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    assert np.ptp(np.bincount(fold)) <= 1


def test_rows_in_order_of_time_are_predicted_from_earlier_rows_alone() -> None:
    """The oracle refits by hand: six stretches of 50 rows, the first only learned from."""
    logits, y = rows(300, 3)
    selection = auto.select(logits, y, candidates=[], time_ordered=True)
    expected = np.concatenate(
        [
            calibrators.create("temperature").fit(logits[:start], y[:start]).predict_proba(logits[start : start + 50])
            for start in range(50, 300, 50)
        ]
    )
    found = {candidate.kind: candidate.scores["log_loss"].value for candidate in selection.candidates}
    assert found["temperature"] == pytest.approx(log_loss(expected, y[50:]))
    assert found["identity"] == pytest.approx(log_loss(scipy.special.softmax(logits[50:], axis=1), y[50:]))
    whole = calibrators.create("temperature").fit(logits, y)
    assert calibrators.dumps(selection.calibrator) in {
        calibrators.dumps(whole),
        calibrators.dumps(calibrators.create("identity").fit(logits, y)),
    }


def test_what_drifted_within_the_rows_is_not_learned_from_their_future() -> None:
    """The bias changes its sign every 200 rows: folds of all rows see a bias of nought, and with it no harm; rows in
    order show that a bias learned from the past is wrong in what comes next."""
    parts = [rows(200, seed, bias=2.0 * (-1) ** seed) for seed in range(2)]
    logits, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    gains = {}
    for ordered in (False, True):
        selection = auto.select(logits, y, candidates=["vector"], n_folds=3, time_ordered=ordered)
        gains[ordered] = {candidate.kind: candidate.gain[0] for candidate in selection.candidates}["vector"]
    assert gains[True] < -0.02
    assert gains[True] < gains[False] - 0.02


def test_a_first_stretch_of_one_class_is_refused() -> None:
    logits, _ = rows(60, 0)
    with pytest.raises(ValueError, match="time_ordered learns first from 10 rows, which are all of one class"):
        auto.select(logits, np.repeat([0, 1], 30), candidates=[], time_ordered=True)


def test_a_candidate_that_would_pass_the_budget_is_skipped_and_says_so() -> None:
    selection = auto.select(*rows(300, 0), candidates=FEW, budget_seconds=0.0)
    skipped = {candidate.kind: candidate.skipped for candidate in selection.candidates if candidate.skipped}
    assert skipped == dict.fromkeys(FEW, "its fits would pass the time budget")
    assert selection.calibrator.kind in auto.ALWAYS


def test_progress_runs_from_start_to_the_last_fit() -> None:
    seen: list[tuple[float, str]] = []
    auto.select(*rows(300, 0), candidates=["platt"], progress=lambda share, text: seen.append((share, text)))
    assert [text for _, text in seen][:3] == [
        "cross-validating identity",
        "cross-validating temperature",
        "cross-validating platt",
    ]
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert seen[-1][1].startswith("fitting")


def test_the_choice_is_the_same_every_time() -> None:
    logits, y = rows(400, 5, bias=1.0)
    first, second = (auto.select(logits, y, candidates=FEW, seed=3) for _ in range(2))
    assert calibrators.dumps(first.calibrator) == calibrators.dumps(second.calibrator)


@pytest.mark.parametrize("n_classes", [2, 5, 100, 1000])
def test_what_is_sensible_is_known_bounded_and_always_holds_the_two_that_do_no_harm(n_classes: int) -> None:
    chosen = auto.sensible(1000, n_classes)
    assert set(auto.ALWAYS) <= set(chosen) <= set(calibrators.kinds())
    assert ("beta" in chosen) == (n_classes == 2 and "beta" in calibrators.kinds())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prefer": "cheap"}, "prefer must be"),
        ({"n_folds": 200}, "n_folds must be in 2..50"),
        ({"n_folds": 50, "candidates": []}, "folds need at least 100 rows"),
        ({"candidates": ["tarot"]}, "tarot"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        auto.select(*rows(90, 0), **arguments)
