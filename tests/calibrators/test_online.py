"""Online learners: held against the published algorithm written out in matrices, exact in replay, and harmless."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit, softmax

import calibrators
from calibrators.online import calibeating, class_wise, experts, newton
from calibrators.online import softmax as softmax_experts
from calibrators.online.learner import OnlineCalibrator

Array = NDArray[Any]

ONLINE = ["online_beta", "online_platt", "online_temperature"]
every_online_kind = pytest.mark.parametrize("kind", ONLINE)


def stream(n: int, n_classes: int, *, scale: float = 1.0, seed: int = 0) -> tuple[Array, Array]:
    """Logits `scale` times those that the labels are drawn by."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def binary(n: int, seed: int, true_log_odds: Callable[[Array, Array], Array]) -> tuple[Array, Array, Array]:
    """Log-odds, labels, and the probabilities that the labels were drawn by, a function of log-odds and time in 0..1."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(-0.3, 2.0, size=n)
    p = expit(true_log_odds(scores, np.arange(n) / n))
    return scores, (rng.random(n) < p).astype(np.int64), p


def online(kind: str) -> OnlineCalibrator:
    calibrator = calibrators.create(kind)
    assert isinstance(calibrator, OnlineCalibrator)
    return calibrator


def log_losses(p: Array, y: Array) -> Array:
    return -np.log(p[np.arange(len(y)), y])


# ---- the published algorithms


def newton_in_matrices(x: Array, y: Array, gamma: float, diameter: float) -> Array:
    """Gupta, Ramdas, algorithm 1 in matrices, H inverted at each step."""
    theta, hessian, forecasts = np.zeros(x.shape[1]), np.eye(x.shape[1]) / (gamma * diameter) ** 2, []
    for features, label in zip(x, y, strict=True):
        forecasts.append(expit(theta @ features))
        gradient = (forecasts[-1] - label) * features
        hessian = hessian + np.outer(gradient, gradient)
        theta = theta - np.linalg.solve(hessian, gradient) / gamma
    return np.array(forecasts)


def test_online_platt_is_the_published_newton_step() -> None:
    scores, y, _ = binary(400, 0, lambda s, t: 0.5 * s + t)
    x = np.column_stack([scores, np.ones(400)])
    np.testing.assert_allclose(newton.online_platt(expit(scores), y), newton_in_matrices(x, y, 0.1, 1.0), rtol=1e-9)


def test_online_beta_is_the_published_newton_step() -> None:
    scores, y, _ = binary(400, 1, lambda s, t: 0.5 * s + t)
    x = np.column_stack([np.log(expit(scores)), np.log(expit(-scores)), np.ones(400)])
    np.testing.assert_allclose(newton.online_beta(expit(scores), y), newton_in_matrices(x, y, 0.1, 2.0), rtol=1e-9)


def test_tracking_says_the_mean_of_the_labels_its_bin_has_seen() -> None:
    forecasts, y = np.random.default_rng(0).random(500), np.random.default_rng(1).integers(0, 2, size=500)
    forecasts[:3] = 0.1, 0.2, 1.0  # on an edge: the bin below
    said, bins = calibeating.tracked(forecasts, y), np.ceil(10 * forecasts).astype(int) - 1
    for t in range(500):
        seen = y[:t][bins[:t] == bins[t]]
        assert said[t] == pytest.approx((seen.sum() + 0.1 * (bins[t] + 1) - 0.005) / (len(seen) + 1), abs=1e-12)


class Foster:
    """Foster 1999, one bin's game: of ten intervals the one to name next."""

    def __init__(self, own: int) -> None:
        self.own, self.labels = own, [[] for _ in range(10)]  # type: tuple[int, list[list[float]]]

    def mean(self, i: int) -> float:
        return float(np.mean(self.labels[i])) if self.labels[i] else 0.1 * i + 0.05

    def play(self, draw: Callable[[], float]) -> int:
        within = [i for i in range(10) if 0.1 * i - 1e-9 <= self.mean(i) <= 0.1 * (i + 1) + 1e-9]
        if within:
            return self.own if self.own in within else within[0]
        i = next(i for i in range(10) if self.mean(i) < 0.1 * i)
        deficit, excess = 0.1 * i - self.mean(i), self.mean(i - 1) - 0.1 * i
        return i - 1 if draw() <= deficit / (deficit + excess) else i


@pytest.mark.parametrize("sequence", ["drawn", "in blocks", "by turns"])
def test_hedging_plays_fosters_game_and_is_calibrated_whatever_comes(sequence: str) -> None:
    rng, n = np.random.default_rng(0), 3000
    forecasts, uniforms = rng.uniform(0.401, 0.499, size=n), rng.random(n)
    labels = {"drawn": rng.integers(0, 2, size=n), "in blocks": np.arange(n) // 200 % 2, "by turns": np.arange(n) % 2}
    y = 0.0137 + 0.97 * labels[sequence]  # so that no mean lies on an edge, where rounding decides
    drawn, game = iter(uniforms), Foster(4)
    said = calibeating.hedged(forecasts, y, uniforms)
    for forecast, label in zip(said, y, strict=True):
        played = game.play(lambda: next(drawn))
        assert forecast == pytest.approx(0.1 * played + 0.05)
        game.labels[played].append(float(label))
    off = [abs(y[said == middle].mean() - middle) * (said == middle).mean() for middle in np.unique(said)]
    assert sum(off) < 0.05 + 0.05  # half an interval, and what is left of the first labels


# ---- the learners


@pytest.mark.parametrize("beta", [False, True])
def test_machine_code_and_python_give_the_same_bits(beta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, y, _ = binary(150, 2, lambda s, t: 0.5 * s + t)
    weight = np.random.default_rng(0).choice([0.0, 0.3, 1.0, 2.0], size=150)
    compiled = experts.start(beta)
    wanted = experts.learn(compiled, scores, y.astype(np.float64), weight, beta)
    for name in ("_learn", "_step_lines", "_step_bent", "_fill_line"):
        monkeypatch.setattr(experts, name, getattr(experts, name).py_func)
    plain = experts.start(beta)
    assert (experts.learn(plain, scores, y.astype(np.float64), weight, beta) == wanted).all()
    assert all((a == b).all() for a, b in zip(plain, compiled, strict=True))


def test_machine_code_and_python_give_the_same_bits_for_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = stream(120, 5)
    compiled = softmax_experts.start(5)
    wanted = softmax_experts.learn(compiled, z, y, np.ones(120))
    gains, theta = softmax_experts.gains(z, y)
    for name in ("_learn", "_gains", "_step", "_forecast"):
        monkeypatch.setattr(softmax_experts, name, getattr(softmax_experts, name).py_func)
    plain = softmax_experts.start(5)
    assert (softmax_experts.learn(plain, z, y, np.ones(120)) == wanted).all()
    assert all((a == b).all() for a, b in zip(plain, compiled, strict=True))
    assert all((a == b).all() for a, b in zip(softmax_experts.gains(z, y), (gains, theta), strict=True))
    assert (theta == compiled.theta).all()


def test_gains_are_what_each_expert_alone_would_have_gained() -> None:
    """The mixture of the experts, with weights that do not move, is the mixture of their likelihoods."""
    z, y = stream(800, 4, scale=2.0)
    gains, _ = softmax_experts.gains(z, y)
    assert gains[0] == 0
    assert gains[1:].min() > 20
    forecasts = softmax_experts.learn(softmax_experts.start(4), z, y, np.ones(800))
    mixed = float((log_losses(softmax(z, axis=1), y) - log_losses(forecasts, y)).sum())
    assert mixed == pytest.approx(np.logaddexp.reduce(gains + np.log(softmax_experts.FIRST_SHARES)), abs=0.5)


@pytest.mark.parametrize("module", [calibeating, experts, newton, softmax_experts], ids=lambda module: module.__name__)
def test_machine_code_kept_on_disk_depends_on_its_own_file_alone(module: ModuleType) -> None:
    own = set()
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Assign):
            own |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    functions = [value.py_func for value in vars(module).values() if hasattr(value, "py_func")]
    assert functions
    for function in functions:
        used = {name for name in function.__code__.co_names if name in function.__globals__}
        assert used <= own | {"np", "exp", "log", "log1p"}, function.__name__


def whole(band: Array) -> Array:
    """A symmetric matrix from its diagonal and the two below."""
    return sum(
        (np.diag(band[: len(band) - k, k], k) + np.diag(band[: len(band) - k, k], -k)) / (1 + (k == 0))
        for k in range(3)
    )


@pytest.mark.parametrize("beta", [False, True])
def test_every_expert_takes_the_step_that_is_written_in_matrices(beta: bool) -> None:
    scores, y, _ = binary(60, 4, lambda s, t: 0.5 * s + t)
    weight = np.random.default_rng(0).choice([0.3, 1.0], size=60)
    scores[:3] = -14.0, 14.0, 0.0  # beyond the nodes, and on one
    state, fresh = experts.start(beta), experts.start(beta)
    for t in range(60):
        before = experts.State(*(array.copy() for array in state))
        experts.learn(state, scores[t : t + 1], y[t : t + 1].astype(np.float64), weight[t : t + 1], beta)
        s = np.clip(scores[t], -experts.WITHIN, experts.WITHIN)
        hats = np.array([np.interp(s, experts.NODES, unit) for unit in np.eye(len(experts.NODES))])
        line = [np.log(expit(s)), 1, -np.log(expit(-s))] if beta else [s, 1]
        for e in range(1, experts.N_EXPERTS):
            phi = hats if experts.BENT[e] else np.array(line)
            n, kept = len(phi), 1 - weight[t] / experts.MEMORY[e]
            theta, theta_0, ridge = before.theta[e, :n], fresh.theta[e, :n], whole(fresh.curvature[e, :n])
            p = expit(np.clip(theta @ phi, -experts.MOST, experts.MOST))
            information = weight[t] * (p * (1 - p) + (p - y[t]) ** 2) / 2
            hessian = kept * whole(before.curvature[e, :n]) + information * np.outer(phi, phi) + (1 - kept) * ridge
            gradient = weight[t] * (p - y[t]) * phi + (1 - kept) * ridge @ (theta - theta_0)
            np.testing.assert_allclose(whole(state.curvature[e, :n]), hessian, atol=1e-12)
            np.testing.assert_allclose(state.theta[e, :n], theta - np.linalg.solve(hessian, gradient), atol=1e-11)


@pytest.mark.parametrize("beta", [False, True])
def test_what_is_served_is_the_curve_that_was_learned(beta: bool) -> None:
    scores, y, _ = binary(500, 3, lambda s, _: np.sin(s))
    state = experts.start(beta)
    experts.learn(state, scores, y.astype(np.float64), np.ones(500), beta)
    s = np.linspace(-14, 14, 57)
    bent = [np.interp(s, experts.NODES, theta) for theta in state.theta[experts.BENT]]
    z = experts.features(s, beta) @ experts.served(state.theta, beta).T
    np.testing.assert_allclose(z[:, -len(bent) :], np.transpose(bent), atol=1e-9)
    assert np.ptp(z[:, 0]) > 1


@every_online_kind
@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_state_depends_on_the_rows_alone_and_not_on_how_they_were_divided(kind: str, n_classes: int) -> None:
    z, y = stream(300, n_classes)
    whole = online(kind).fit(z, y)
    pieces = online(kind)
    for rows in (slice(0, 1), slice(1, 1), slice(1, 140), slice(140, 300)):
        pieces.partial_fit(z[rows], y[rows])
    assert calibrators.dumps(pieces) == calibrators.dumps(whole)
    went_on = calibrators.loads(calibrators.dumps(online(kind).fit(z[:200], y[:200])))
    assert isinstance(went_on, OnlineCalibrator)
    assert calibrators.dumps(went_on.partial_fit(z[200:], y[200:])) == calibrators.dumps(whole)


@every_online_kind
@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_forecast_is_what_would_have_been_served_before_its_label(kind: str, n_classes: int) -> None:
    z, y = stream(60, n_classes)
    forecasts = online(kind).learn(z, y)
    calibrator = online(kind).partial_fit(z[:1], y[:1])
    for t in range(1, 60):
        np.testing.assert_allclose(forecasts[t], calibrator.predict_proba(z[t : t + 1])[0], atol=1e-12)
        calibrator.partial_fit(z[t : t + 1], y[t : t + 1])


@every_online_kind
@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_row_of_no_weight_is_forecast_and_not_learned_from(kind: str, n_classes: int) -> None:
    z, y = stream(80, n_classes)
    calibrator = online(kind).fit(z[:60], y[:60])
    before, expected = calibrators.dumps(calibrator), calibrator.predict_proba(z[60:])
    forecasts = calibrator.learn(z[60:], y[60:], sample_weight=np.r_[np.zeros(19), 1e-300])
    np.testing.assert_allclose(forecasts, expected, atol=1e-12)
    np.testing.assert_allclose(calibrator.predict_proba(z), calibrators.loads(before).predict_proba(z), atol=1e-12)


@every_online_kind
def test_over_any_labels_the_loss_is_hardly_above_the_models_own(kind: str) -> None:
    """Fixed share's bound, which holds for every sequence: log 2 + T SHARE. The labels here are the worst there are:
    always the class to which the forecast gives less."""
    rng, calibrator, n = np.random.default_rng(0), online(kind), 400
    own = said = 0.0
    calibrator.partial_fit([[0.0, 0.0]], [0])
    for _ in range(n):
        z = rng.normal(size=(1, 2))
        y = int(calibrator.predict_proba(z).argmin())
        said += log_losses(calibrator.learn(z, [y]), np.array([y]))[0]
        own += log_losses(softmax(z, axis=1), np.array([y]))[0]
    assert said <= own + np.log(2) + 2 * n * experts.SHARE


@pytest.mark.parametrize(
    ("drift", "at_most"),
    [
        (lambda s, _: s, 0.6),
        (lambda s, _: 0.5 * s, 4),
        (lambda s, t: np.where(t < 1 / 3, s, np.where(t < 2 / 3, 0.5 * s - 0.5, 0.8 * s + 0.7)), 13),
        (lambda s, t: s + 0.9 * np.sin(12 * np.pi * t), 25),
        (lambda s, _: np.where(s > 0, 0.35 * s, s) + 0.9 * np.sin(1.5 * s) * (np.abs(s) < 4), 14),
    ],
    ids=["true already", "overconfident", "two jumps", "a cycle", "no sigmoid"],
)
def test_the_mixture_comes_near_the_truth_whatever_happens(drift: Any, at_most: float) -> None:
    """Mean squared distance to the true probability x 1e4. The largest of 40 seeds were .3, 2.6, 9.4, 17 and 10; the
    published learner's means are 2.3, 3.1, 25, 78 and 174."""
    scores, y, p = binary(30_000, 0, drift)
    forecasts = online("online_platt").learn(np.column_stack([np.zeros(len(scores)), scores]), y)
    excess = 1e4 * np.mean((forecasts[:, 1] - p) ** 2)
    published = 1e4 * np.mean((newton.online_platt(expit(scores), y) - p) ** 2)
    assert excess < at_most
    assert excess < published


def test_a_drift_of_the_priors_is_followed_by_the_biases() -> None:
    z, y = stream(6000, 5, seed=1)
    kept = np.flatnonzero((np.arange(6000) < 3000) | (y < 2) | (np.arange(6000) % 10 == 0))  # three classes become rare
    z, y = z[kept], y[kept]
    after = slice(3500, None)
    losses = {kind: log_losses(online(kind).learn(z, y), y)[after].mean() for kind in ONLINE}
    own = log_losses(softmax(z, axis=1), y)[after].mean()
    assert losses["online_temperature"] < own - 0.2
    assert losses["online_platt"] < own - 0.1


@every_online_kind
def test_no_single_label_throws_the_curve(kind: str) -> None:
    """A label that the calibrator gave one in a million, once."""
    z, y = stream(500, 2)
    calibrator = online(kind).fit(z, y)
    before = calibrator.predict_proba(z)
    calibrator.partial_fit([[0.0, 14.0]], [0])
    assert np.abs(calibrator.predict_proba(z) - before).max() < 0.1


@every_online_kind
def test_further_rows_have_the_classes_of_the_first(kind: str) -> None:
    with pytest.raises(ValueError, match="4 classes, got logits with 3 columns"):
        online(kind).fit(*stream(50, 4)).partial_fit(*stream(50, 3))


@every_online_kind
def test_shares_that_are_none_are_refused(kind: str) -> None:
    calibrator = online(kind).fit(*stream(50, 3))
    with pytest.raises(ValueError, match="shares must be zero or above and sum to one"):
        online(kind).set_tensors(calibrator.tensors() | {"shares": -calibrator.tensors()["shares"]})


def test_log_odds_of_two_classes_are_read_from_one_column() -> None:
    calibrator = online("online_platt").fit(*stream(50, 2))
    assert isinstance(calibrator, class_wise.ClassWise)
    p = np.array([0.2, 0.9])
    scores = calibrator._scores(np.log(np.column_stack([1 - p, p])))
    np.testing.assert_allclose(scores[:, 0], logit(p))
