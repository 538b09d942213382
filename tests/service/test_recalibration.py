"""The detector of wrong probabilities: what it promises about false alarms, what it sees, and that its bets are fair."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog, minimize
from scipy.special import log_softmax, softmax
from scipy.stats import binom

from service.drift.detectors import adwin, bets, page_hinkley, recalibration, top_label
from service.drift.detectors.base import Array, Batch
from service.drift.detectors.recalibration import Recalibration
from service.drift.detectors.registry import create

Stream = Callable[[np.random.Generator, int], Batch]

N_STREAMS, N_ROWS, ALLOWED = 300, 1000, 0.2
ALL = "temperature, class_bias, top_label"


def batch(logits: Array, labels: Any, segments: Any = None) -> Batch:
    segments = np.zeros(len(logits), np.int64) if segments is None else segments
    return Batch(logits, np.asarray(labels, np.int64), segments)


def drawn(rng: np.random.Generator, logits: Array) -> Any:
    """Labels of which the softmax of the logits is true."""
    return (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def right(rng: np.random.Generator, n: int, n_classes: int = 5) -> Batch:
    logits = rng.normal(0, 2.5, (n, n_classes))
    return batch(logits, drawn(rng, logits), rng.integers(0, 4, n))


def at_the_edge(rng: np.random.Generator, n: int, n_classes: int = 5, eps: float = 0.02) -> Batch:
    """The most probable class comes less often by eps, and the second more often: as wrong as the tolerance allows."""
    logits = rng.normal(0, 2.5, (n, n_classes))
    truth, order = softmax(logits, axis=1), np.argsort(logits, axis=1)
    for column, moved in ((-1, -eps), (-2, eps)):
        truth[np.arange(n), order[:, column]] += moved
    return batch(logits, drawn(rng, np.log(truth)), rng.integers(0, 4, n))


def false_alarms(made: Stream, **parameters: Any) -> int:
    """Of N_STREAMS."""
    parameters = {"horizon": N_ROWS, "false_alarm_probability": ALLOWED, **parameters}
    return sum(
        Recalibration(**parameters).update(made(np.random.default_rng(seed), N_ROWS)) is not None
        for seed in range(N_STREAMS)
    )


MOST = int(binom.isf(1e-4, N_STREAMS, ALLOWED))
"""False alarms in N_STREAMS streams. A detector that keeps its promise exceeds them with a probability of 1e-4 at most."""


# ---- false alarms


@pytest.mark.parametrize(
    ("made", "parameters"),
    [
        (right, {}),
        (right, {"adaptive": 0, "families": "temperature"}),
        (right, {"adaptive": 0, "families": "class_bias"}),
        (right, {"adaptive": 0, "families": "top_label"}),
        (right, {"families": ALL, "max_segments": 0}),
        (partial(right, n_classes=2), {"families": ALL}),
        (right, {"tolerance": 0.02}),
        (at_the_edge, {"tolerance": 0.02}),
        (at_the_edge, {"tolerance": 0.02, "families": ALL}),
        (partial(at_the_edge, n_classes=2), {"tolerance": 0.02, "families": ALL}),
    ],
)
def test_it_rings_falsely_no_more_often_than_it_says(made: Stream, parameters: dict[str, Any]) -> None:
    assert false_alarms(made, **parameters) <= MOST


def test_with_weights_that_do_not_sum_to_one_it_rings_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see it if each bet had the weight of all of them."""
    make = Recalibration._make_bets

    def forgotten(self: Recalibration) -> bets.Bets:
        made = make(self)
        return made._replace(weights=np.ones_like(made.weights), class_weights=np.ones_like(made.class_weights))

    monkeypatch.setattr(Recalibration, "_make_bets", forgotten)
    assert false_alarms(right) > MOST


def test_without_a_tolerance_a_model_that_was_always_a_little_wrong_rings() -> None:
    assert false_alarms(partial(at_the_edge, eps=0.08), tolerance=0.0) > MOST


@pytest.mark.parametrize("n_classes", [2, 3, 50])
@pytest.mark.parametrize("chosen", [["temperature"], ["class_bias"], ["top_label", "temperature", "class_bias"]])
def test_weights_sum_to_one_for_every_choice_of_families(n_classes: int, chosen: list[str]) -> None:
    for adaptive in (0, 1):
        for max_segments in (0, 7):
            detector = Recalibration(families=",".join(chosen), adaptive=adaptive, max_segments=max_segments)
            detector._begin(n_classes)
            made = detector._make_bets()
            by_class = made.class_weights.sum()
            assert made.weights[0].sum() + by_class == pytest.approx(1)
            assert made.weights[1].sum() + made.segment_weights.sum() + by_class == pytest.approx(1)


# ---- bets


def paid(detector: Recalibration, logits: Array, label: int, before: Batch) -> tuple[Array, Array]:
    """L of every bet for this label, after rows from which learners learned, and whether it bets."""
    detector.reset()
    detector.update(before)
    held = detector._wealth.held
    held[:] = 1.0
    detector._bets.weights[:], detector._bets.class_weights[:], detector._bets.segment_weights[:] = 0.0, 0.0, 0.0
    detector.update(batch(logits[None], [label], np.array([1])))
    return held.copy(), held != 1.0


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.2])
def test_no_truth_within_the_tolerance_pays_a_bet_more_than_one(n_classes: int, tolerance: float) -> None:
    """The truth that pays most is a linear programme."""
    rng = np.random.default_rng(n_classes)
    detector = Recalibration(tolerance=tolerance, families=ALL, max_segments=4, horizon=1e9)
    before = right(rng, 60, n_classes)
    before = batch(3 * before.logits, before.labels, before.segments)
    bet = np.zeros(0, bool)
    for _ in range(5):
        logits = rng.normal(0, 2.5, n_classes)
        p = softmax(logits)
        pays, moved = zip(*(paid(detector, logits, y, before) for y in range(n_classes)), strict=True)
        bet = np.array(moved).any(axis=0) | (bet if bet.size else False)
        for payment in np.array(pays).T[np.array(moved).any(axis=0)]:
            bounds = [(max(0.0, at - tolerance), at + tolerance) for at in p]
            best = linprog(-payment, A_eq=np.ones((1, n_classes)), b_eq=[1.0], bounds=bounds)
            assert -best.fun <= 1 + 1e-9
    assert bet.mean() > 0.3 or tolerance > 0.1  # most of those within segments stay away from these rows


def test_the_denominator_of_a_bet_is_the_nearest_point_of_the_band() -> None:
    rng, eps = np.random.default_rng(3), 0.03
    for _ in range(20):
        p, q = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
        ours = np.clip(bets.nearest_multiple(p, q, eps) * q, p - eps, p + eps)
        assert ours.sum() == pytest.approx(1, abs=1e-11) and ours.min() >= 0
        found = minimize(
            lambda u, q=q: -(q * np.log(np.maximum(u, 1e-12))).sum(), p, method="SLSQP",
            bounds=[(max(1e-12, at - eps), at + eps) for at in p], constraints={"type": "eq", "fun": lambda u: u.sum() - 1},
        )  # fmt: skip
        assert -(q * np.log(ours)).sum() <= found.fun + 1e-9


def test_the_wealth_is_the_sum_over_all_beginnings_of_what_a_stake_became() -> None:
    rng = np.random.default_rng(0)
    rows = right(rng, 40)
    detector = Recalibration(families="temperature", adaptive=0, max_segments=0, horizon=1e9)
    detector.update(rows)
    logs, chosen = log_softmax(rows.logits, axis=1), np.arange(40)
    total = 0.0
    for scale, part in recalibration.SCALES.items():
        paid = np.exp(log_softmax(scale * logs, axis=1)[chosen, rows.labels] - logs[chosen, rows.labels])
        total += part * sum(np.prod(paid[begun:]) for begun in range(40))
    assert 10**detector.statistic == pytest.approx(total)


@pytest.mark.parametrize("n_classes", [2, 6])
@pytest.mark.parametrize("tolerance", [0.0, 0.03])
def test_machine_code_and_python_give_the_same_bits(
    n_classes: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = right(np.random.default_rng(0), 120, n_classes)
    compiled, plain = (Recalibration(families=ALL, tolerance=tolerance, horizon=1e9) for _ in range(2))
    compiled.update(rows)
    for name, function in functions_of(bets).items():
        monkeypatch.setattr(bets, name, function)
    plain.update(rows)
    assert all((array == plain.state()[name]).all() for name, array in compiled.state().items())


@pytest.mark.parametrize("module", [adwin, page_hinkley, top_label])
def test_the_detectors_of_one_signal_too(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = module.__name__.rsplit(".")[-1].replace("top_label", "windowed_ece")
    rows = right(np.random.default_rng(0), 300)
    rows = batch(2 * rows.logits, rows.labels)
    compiled, plain = create(kind), create(kind)
    rang = compiled.update(rows)
    for name, function in functions_of(module).items():
        monkeypatch.setattr(module, name, function)
    assert plain.update(rows) == rang
    assert all((array == plain.state()[name]).all() for name, array in compiled.state().items())


def functions_of(module: ModuleType) -> dict[str, Any]:
    """What it compiles, as it is written."""
    found = {name: value.py_func for name, value in vars(module).items() if hasattr(value, "py_func")}
    return {name: function for name, function in found.items() if inspect.getmodule(function) is module}


@pytest.mark.parametrize("module", [adwin, bets, page_hinkley, top_label])
def test_machine_code_kept_on_disk_depends_on_its_own_file_alone(module: ModuleType) -> None:
    own = set()
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Assign):
            own |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    assert functions_of(module)
    for function in functions_of(module).values():
        used = {name for name in function.__code__.co_names if name in function.__globals__}
        assert used <= own | {"np", "exp", "log", "sqrt"}, function.__name__


# ---- what it sees


def delay(
    rng: np.random.Generator, changed: Callable[[Batch], Batch], n_rows: int = 3000, **parameters: Any
) -> Recalibration:
    """The detector after it rang at a change after 1,000 rows."""
    detector = Recalibration(**parameters)
    before, after = right(rng, 1000, 10), changed(right(rng, n_rows, 10))
    assert detector.update(before) is None
    assert detector.update(after) is not None
    return detector


def sharper(rows: Batch) -> Batch:
    return batch(2 * rows.logits, rows.labels, rows.segments)


def biased(rows: Batch) -> Batch:
    return batch(rows.logits + 2.5 * (np.arange(10) == 7), rows.labels, rows.segments)


def sharper_somewhere(rows: Batch) -> Batch:
    return batch(np.where(rows.segments == 2, 2.5, 1.0)[:, None] * rows.logits, rows.labels, rows.segments)


@pytest.mark.parametrize(
    ("changed", "part", "parameters"),
    [
        (sharper, "temperature", {}),
        (biased, "class 7", {"adaptive": 0}),
        (sharper_somewhere, "segment 2", {}),
        (sharper, "top label", {"families": "top_label", "adaptive": 0}),
    ],
)
def test_evidence_names_what_changed_and_the_change_is_put_where_it_was(
    changed: Callable[[Batch], Batch], part: str, parameters: dict[str, Any]
) -> None:
    off = []
    for seed in range(15):
        detector = delay(np.random.default_rng(seed), changed, **parameters)
        evidence = detector.evidence()
        assert max(evidence, key=lambda name: evidence[name]) == part
        off.append(abs(detector.n_rows - detector.change_point() - 1000))
    assert np.median(off) <= 40


def test_a_bias_of_one_of_two_classes_is_named() -> None:
    rng = np.random.default_rng(0)
    detector, rows = Recalibration(adaptive=0), right(rng, 2000, 2)
    assert detector.update(batch(rows.logits + np.array([0.0, 1.3]), rows.labels)) is not None
    assert max(detector.evidence().items(), key=lambda item: item[1])[0] == "class 1"


def test_more_segments_than_it_has_bets_for_count_for_the_whole_alone() -> None:
    rng = np.random.default_rng(0)
    rows = right(rng, 300)
    few, none = Recalibration(max_segments=2), Recalibration(max_segments=2)
    few.update(batch(rows.logits, rows.labels, rows.segments + 2))
    none.update(batch(rows.logits, rows.labels, np.full(300, -1)))
    assert few.statistic == pytest.approx(none.statistic) and few.evidence() == none.evidence()


def test_a_detector_that_is_never_reset_stays_finite_whatever_comes() -> None:
    rng = np.random.default_rng(0)
    detector, rows = Recalibration(), batch(30 * rng.normal(size=(3000, 3)), rng.integers(0, 3, 3000))
    row = detector.update(rows)
    while row is not None:
        rows = rows.rows(slice(row + 1, None))
        row = detector.update(rows) if len(rows) else None
    assert 150 < detector.statistic < 203 and sum(detector.evidence().values()) == pytest.approx(1)


# ---- against river 0.23.0

RIVER: list[tuple[str, dict[str, Any], list[int]]] = [
    ("adwin", {"delta": 0.002, "every": 32}, [4159, 8255, 14207]),
    ("adwin", {"delta": 0.05, "every": 1}, [2837, 6671, 7930, 11234, 12705, 15564, 18943]),
    ("page_hinkley", {"limit": 20, "slack": 0.005, "reference": "mean"},
     [1051, 2642, 3255, 4255, 5385, 7711, 8617, 10479, 11228, 11522, 12641, 14491, 15297, 17109, 18038]),
]  # fmt: skip
"""Where its ADWIN(delta, clock) and PageHinkley(threshold, delta, alpha=1) rang on the rows below."""


@pytest.mark.parametrize(("kind", "parameters", "wanted"), RIVER)
def test_the_detectors_of_one_signal_ring_where_river_does(
    kind: str, parameters: dict[str, Any], wanted: list[int]
) -> None:
    rng, n = np.random.default_rng(7), 20_000
    confidence = rng.uniform(0.5, 1, n)
    is_right = rng.random(n) < confidence - 0.08 * ((np.arange(n) // 2500) % 2)
    rows = batch(np.log(np.column_stack([confidence, 1 - confidence])), np.where(is_right, 0, 1))
    detector, rang, read = create(kind, **parameters), [], 0
    while read < n and (row := detector.update(rows.rows(slice(read, None)))) is not None:
        read += row + 1
        rang.append(read - 1)
        detector.reset()
    assert rang == wanted
