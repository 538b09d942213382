"""Online thresholds: coverage of any sequence, a state that is numbers, and nothing that raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibrators.conformal.online import (
    AdaptiveConformal,
    ConformalPID,
    DecayingSteps,
    DynamicallyTunedConformal,
    OnlineThreshold,
    restored,
)

Array = NDArray[Any]
LEARNERS: dict[str, Callable[..., OnlineThreshold]] = {
    "aci": AdaptiveConformal,
    "dtaci": DynamicallyTunedConformal,
    "pid": ConformalPID,
    "pid with a forecast": lambda *args, **kwargs: ConformalPID(*args, forecast="theta", **kwargs),
    "decaying": DecayingSteps,
}
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


def sequences(n: int) -> dict[str, Array]:
    """Scores in 0..1 that nothing of the past foretells."""
    rng = np.random.default_rng(0)
    time = np.arange(n)
    return {
        "as before": rng.uniform(size=n),
        "a jump half way": np.where(time < n // 2, 0.2, 0.8) + 0.2 * rng.uniform(size=n),
        "a drift": 0.7 * time / n + 0.3 * rng.uniform(size=n),
        "waves": 0.4 + 0.3 * np.sin(time / 300) + 0.3 * rng.uniform(size=n),
        "two values": (time % 2).astype(float),
        "all equal": np.full(n, 0.5),
    }


@every_learner
@pytest.mark.parametrize("name", ["as before", "a jump half way", "a drift", "waves"])
def test_coverage_in_the_long_run_is_the_level(make: Any, name: str) -> None:
    """20,000 scores, within .01; the threshold of the rows before them, left alone, covers between .75 and 1."""
    start = np.random.default_rng(1).uniform(size=500)
    hits = make(0.9, scores=start).run(sequences(20_000)[name])
    assert abs(hits.mean() - 0.9) < 0.01


@pytest.mark.parametrize("step", [0.005, 0.05])
@pytest.mark.parametrize("name", sequences(1))
def test_adaptive_inference_keeps_its_bound_whatever_comes(step: float, name: str) -> None:
    """Proposition 4.1 of the paper, for T = 1, 2, .. 3000."""
    learner = AdaptiveConformal(0.9, step=step)
    misses = ~learner.run(sequences(3000)[name])
    t = np.arange(1, 3001)
    bound = (max(0.1, 0.9) + step) / (t * step)
    assert (np.abs(np.cumsum(misses) / t - 0.1) <= bound + 1e-12).all()


@pytest.mark.parametrize("name", sequences(1))
def test_decaying_steps_keep_their_bound_whatever_comes(name: str) -> None:
    """Theorem 1 of the paper: (B + step) / (T step T^-0.6), B the range of the scores, from a start within it."""
    misses = ~DecayingSteps(0.9, scores=[0.5]).run(sequences(3000)[name])
    t = np.arange(1, 3001)
    assert (np.abs(np.cumsum(misses) / t - 0.1) <= 2 * t**0.6 / t + 1e-12).all()


def test_decaying_steps_settle_where_rows_are_exchangeable() -> None:
    learner = DecayingSteps(0.9)
    learner.run(np.random.default_rng(0).uniform(size=20_000))
    assert abs(learner.threshold - 0.9) < 0.02


@every_learner
def test_local_coverage_follows_a_shift_that_a_fixed_threshold_does_not(make: Any) -> None:
    """Mean distance from .9 over windows of 500; the threshold of the rows before covers all, then half of the rows."""
    start, stream = np.random.default_rng(1).uniform(size=500), sequences(10_000)["a jump half way"]
    fixed = stream <= np.quantile(start, 0.9)
    hits = make(0.9, scores=start).run(stream)

    def astray(found: Array) -> float:
        return float(np.abs(np.convolve(found, np.ones(500) / 500, "valid") - 0.9).mean())

    assert astray(hits) < 0.3 * astray(fixed)


@every_learner
def test_a_replay_is_the_same_bit_for_bit_and_a_state_read_back_goes_on(make: Any) -> None:
    scores = sequences(1500)["waves"]
    whole, first = make(0.9, scores=scores[:50]), make(0.9, scores=scores[:50])
    whole.run(scores)
    first.run(scores[:700])
    text = json.dumps({name: values.tolist() for name, values in first.state.items()})
    second = restored(make(0.9), json.loads(text))
    second.run(scores[700:])
    assert second.threshold == whole.threshold
    for name, values in whole.state.items():
        assert values.dtype == np.float64
        np.testing.assert_array_equal(second.state[name], values)
    with pytest.raises(ValueError, match="a state of this learner has"):
        restored(make(0.9), {"misses_": np.zeros(1)})


@every_learner
@pytest.mark.parametrize("level", [0.001, 0.5, 0.999])
def test_nothing_raises_however_far_the_level_leaves_its_range(make: Any, level: float) -> None:
    learner = make(level)
    for score in [1e30, -1e30] * 50 + [0.0] * 500 + list(np.arange(500.0)):
        learner.update(score)
        assert not np.isnan(learner.threshold)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number"):
            learner.update(wrong)


def test_levels_beyond_nought_and_one_are_full_and_empty_sets() -> None:
    learner = AdaptiveConformal(0.9, scores=np.arange(99.0), step=0.5)
    learner.state["misses"] = np.array([-0.2])
    assert learner.threshold == np.inf
    learner.state["misses"] = np.array([1.3])
    assert learner.threshold == -np.inf
    assert learner.quantile(0.1) == 89.0  # the 90th of 99
    assert AdaptiveConformal(0.9).threshold == np.inf


def test_the_share_of_misses_that_would_still_have_held_the_label_is_the_largest() -> None:
    learner = AdaptiveConformal(0.9, scores=np.random.default_rng(0).normal(size=37))
    for score in (-3.0, -0.2, 0.0, 0.4, 1.0):
        most = learner.most_misses(score)
        assert learner.quantile(most - 1e-9) >= score
        assert most == 1 or learner.quantile(most + 1e-9) < score


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveConformal(0.9, step=0.0), "step must be above 0"),
        (lambda: AdaptiveConformal(0.9, window=0), "window must be 1 or more"),
        (lambda: AdaptiveConformal(0.9, scores=[np.nan]), "finite numbers"),
        (lambda: AdaptiveConformal(1.0), "strictly between"),
        (lambda: DynamicallyTunedConformal(0.9, steps=[]), "steps must be"),
        (lambda: ConformalPID(0.9, saturation=0.0), "must be above 0"),
        (lambda: ConformalPID(0.9, forecast="model"), "forecast must be one of"),  # type: ignore[arg-type]
        (lambda: DecayingSteps(0.9, step=-1.0), "step must be above 0"),
    ],
)
def test_parameters_outside_their_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
