"""Runs of one session, plain and through I/O binding: the same answers, the same refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import calibrators
from calibrators.graph import stage
from service import errors
from service.inference.session import Device, Session
from tests.service import models

PLAIN = Device.choose("cpu", 1)
DEVICES = {
    "plain": PLAIN,
    "bound": replace(PLAIN, bound=True),
    "staged": replace(PLAIN, bound=True, pinned=True),
    "graphs": replace(PLAIN, bound=True, pinned=True, graphs=True),
}
OUTPUTS = ["probabilities", "confidence", "label"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]


def rows(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((n, models.N_FEATURES)).astype(np.float32)}


def fitted(seed: int) -> calibrators.Calibrator:
    _, logits, labels = models.labelled_rows(300, seed)
    return calibrators.create("vector").fit(logits, labels)


def calibrated(device: Device) -> Session:
    return Session(calibrators.fuse(models.classifier(), fitted(1)).to_bytes(), device)


def compress() -> bytes:
    """x FP32 [N, 2] -> the rows whose first value is positive, declared as [N, 2]."""
    first = helper.make_node("Gather", ["x", "zero"], ["first"], axis=1)
    positive = helper.make_node("Greater", ["first", "none"], ["positive"])
    kept = helper.make_node("Compress", ["x", "positive"], ["kept"], axis=0)
    sizes: list[str | int] = ["N", 2]
    proto = models.model(
        [first, positive, kept],
        [("x", TensorProto.FLOAT, sizes)],
        [("kept", TensorProto.FLOAT, sizes)],
        {"zero": np.array(0), "none": np.array(0, np.float32)},
    )
    return proto.SerializeToString()


def test_every_way_to_run_gives_the_same_answers_to_batches_of_any_size(device: Device) -> None:
    session, parameters = calibrated(device), stage(fitted(2)).parameters
    reference = calibrated(PLAIN)
    session.warm_up(OUTPUTS, rows(4), parameters)
    for n in (1, 4, 70, 4, 2):
        expected = reference.run(OUTPUTS, {**rows(n, seed=n), **parameters})
        for got, wanted in zip(session.run_with(OUTPUTS, rows(n, seed=n), parameters), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["bound", "staged", "graphs"])
def test_bound_runs_are_made_through_the_binding_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session, parameters = calibrated(DEVICES[name]), stage(fitted(2)).parameters
    monkeypatch.setattr(session._loaded, "_run_plainly", pytest.fail)
    session.warm_up(OUTPUTS, rows(4), parameters)
    for n in (4, 1, 4):
        session.run_with(OUTPUTS, rows(n), parameters)
        session.run(OUTPUTS, rows(n))


def test_an_answer_is_not_changed_by_later_runs(device: Device) -> None:
    session = calibrated(device)
    session.warm_up(OUTPUTS, rows(3))
    answers = session.run(OUTPUTS, rows(3, seed=1))
    kept = [answer.copy() for answer in answers]
    session.run(OUTPUTS, rows(3, seed=2))
    for answer, copy in zip(answers, kept, strict=True):
        np.testing.assert_array_equal(answer, copy)


def test_each_run_is_computed_with_the_parameters_it_was_given(device: Device) -> None:
    session = calibrated(device)
    states = [stage(fitted(seed)).parameters for seed in (3, 4)]
    session.warm_up(OUTPUTS, rows(2), states[0])
    own = [session.run_with(OUTPUTS, rows(2), state)[0] for state in states]
    assert np.abs(own[0] - own[1]).max() > 1e-3
    for turn in (0, 1, 1, 0):
        np.testing.assert_array_equal(session.run_with(OUTPUTS, rows(2), states[turn])[0], own[turn])


def test_a_run_without_parameters_takes_those_of_the_graph_whatever_ran_before(device: Device) -> None:
    session = calibrated(device)
    (before,) = session.run(["probabilities"], rows(2))
    (other,) = session.run_with(["probabilities"], rows(2), stage(fitted(3)).parameters)
    (after,) = session.run(["probabilities"], rows(2))
    assert np.abs(before - other).max() > 1e-3
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, models.N_FEATURES + 1), np.float32), np.zeros((2, models.N_FEATURES)), np.zeros(2, np.float32)],
    ids=["width", "dtype", "rank"],
)
def test_what_the_graph_cannot_compute_is_the_callers_to_fix_and_hurts_no_later_run(
    device: Device, wrong: np.ndarray
) -> None:
    session = calibrated(device)
    (before,) = session.run(["probabilities"], rows(2))
    with pytest.raises(errors.InvalidRequest, match="cannot compute these inputs"):
        session.run(["probabilities"], {"x": wrong})
    np.testing.assert_array_equal(session.run(["probabilities"], rows(2))[0], before)


def test_outputs_of_other_shapes_than_the_graph_declares_are_given_as_they_are(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(compress(), device)
    session.warm_up(["kept"], {"x": np.ones((3, 2), np.float32)})
    x = np.array([[1, 2], [-1, 3], [4, 5]], np.float32)
    for _ in range(2):
        (kept,) = session.run(["kept"], {"x": x})
        if device.bound:  # the first run showed that the declaration does not hold
            monkeypatch.setattr(session._loaded, "_run_plainly", pytest.fail)
        np.testing.assert_array_equal(kept, x[[0, 2]])
    (later,) = session.run(["kept"], {"x": -x})
    np.testing.assert_array_equal(later, -x[[1]])
    np.testing.assert_array_equal(kept, x[[0, 2]])


@pytest.mark.parametrize(
    ("element", "values"),
    [
        (TensorProto.BFLOAT16, np.array([[0x3F80, 0xC000], [0x0001, 0x7F80]], np.uint16)),
        (TensorProto.FLOAT16, np.array([[1, -2], [0.5, 3]], np.float16)),
        (TensorProto.INT64, np.array([[1, -2], [2**62, 3]])),
        (TensorProto.BOOL, np.array([[True, False], [False, True]])),
        (TensorProto.STRING, np.array([["", "é"], ["a", "b" * 300]], object)),
    ],
    ids=["BF16", "FP16", "INT64", "BOOL", "BYTES"],
)
def test_every_element_type_passes_unchanged(device: Device, element: int, values: np.ndarray) -> None:
    session = Session(models.echo(element).SerializeToString(), device)
    session.warm_up(["y"], {"x": values})
    for given in (values, values[:1], values[::-1], np.asfortranarray(values)):
        (got,) = session.run(["y"], {"x": given})
        assert got.dtype == values.dtype
        np.testing.assert_array_equal(got, given)


def test_a_batch_of_no_rows_gets_no_rows(device: Device) -> None:
    session = calibrated(device)
    session.run(["probabilities"], rows(1))
    assert session.run(["probabilities"], rows(0))[0].shape == (0, models.N_CLASSES)
    assert session._loaded._bindings is None or session._loaded._bindings._declared_shapes_hold


def test_runs_of_many_threads_each_get_their_own_rows(device: Device) -> None:
    session, parameters = calibrated(device), stage(fitted(2)).parameters
    session.warm_up(OUTPUTS, rows(2), parameters)
    expected = {seed: session.run_with(OUTPUTS, rows(1 + seed % 3, seed), parameters) for seed in range(12)}

    def agrees(seed: int) -> bool:
        got = session.run_with(OUTPUTS, rows(1 + seed % 3, seed), parameters)
        return all(map(np.array_equal, got, expected[seed]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, [seed for seed in range(12) for _ in range(20)]))


def test_sets_of_outputs_without_end_leave_no_more_than_the_last_ones_bound() -> None:
    session = calibrated(DEVICES["bound"])
    names = [spec.name for spec in session.outputs]
    orders = [[names[(shift + at) % len(names)] for at in range(take)] for shift in range(5) for take in range(1, 5)]
    expected = dict(zip(names, session.run(names, rows(2)), strict=True))
    for order in orders:
        for name, got in zip(order, session.run(order, rows(2)), strict=True):
            np.testing.assert_array_equal(got, expected[name])
    assert len(session._loaded._bindings._any_shape) == 16


def test_the_runtime_sends_nothing_about_the_models_away(tmp_path: Path) -> None:
    """It would keep the name that it gives this machine in the home folder. On the machines of CI it never does."""
    left = {name: value for name, value in os.environ.items() if name in {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH"}}
    for code, kept in (("import onnxruntime", True), ("import service.inference.session", False)):
        home = tmp_path / str(kept)
        home.mkdir()
        subprocess.run([sys.executable, "-c", code], env={**left, "HOME": str(home)}, check=True)
        assert bool(list(home.rglob("*"))) == kept
