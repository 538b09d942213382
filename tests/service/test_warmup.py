"""What is run before the first request, and what is learned from it: on a clock that only the runs move."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest

from service.inference import bindings
from service.inference.session import Device, Session, TensorSpec
from service.inference.warmup import Costs, made_up, row_costs, warm_up, warm_up_sizes
from tests.service import models
from tests.service.gpu import FakeGpu


class Machine:
    """Runs take what `seconds(rows)` says; the first of each size takes `first` times as long."""

    def __init__(self, seconds: Callable[[int], float], first: float = 1.0) -> None:
        self.now, self.runs, self._seconds, self._first = 0.0, [], seconds, first

    def clock(self) -> float:
        return self.now

    def run(self, rows: int) -> None:
        self.now += self._seconds(rows) * (1.0 if rows in self.runs else self._first)
        self.runs.append(rows)


def test_sizes_are_the_largest_then_the_powers_of_two_below() -> None:
    assert warm_up_sizes(1) == [1]
    assert warm_up_sizes(8) == [8, 1, 2, 4]
    assert warm_up_sizes(48) == [48, 1, 2, 4, 8, 16, 32]


def test_a_model_without_a_batch_dimension_is_warmed_up_once(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 1)
    warm_up(Session(models.classifier(batch=3).SerializeToString(), device), ["scores"], {}, 64)
    assert len(gpu.graph_ids) == 1


def test_every_size_that_matters_becomes_a_cuda_graph_of_its_own_and_other_sizes_none(gpu: FakeGpu) -> None:
    device = Device.choose("cuda", 1, cuda_graphs=True)
    session = Session(models.classifier().SerializeToString(), device)
    warm_up(session, ["scores"], {}, 4)
    for n in (1, 3, 4):
        session.run(["scores"], made_up(session.inputs, n))
    assert gpu.graph_ids == ["1", "2", "3", "2", "-1", "1"]


def test_no_more_cuda_graphs_are_made_than_the_bound(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "CAPTURED_SHAPES", 2)
    session = Session(models.classifier().SerializeToString(), Device.choose("cuda", 1, cuda_graphs=True))
    warm_up(session, ["scores"], {}, 4)
    assert gpu.graph_ids == ["1", "2", "-1"]


def test_a_shape_that_the_device_has_no_room_for_runs_without_a_graph(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")

    session = Session(models.classifier().SerializeToString(), Device.choose("cuda", 1, cuda_graphs=True))
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    warm_up(session, ["scores"], {}, 2)
    assert gpu.graph_ids == ["-1", "-1"]


@pytest.mark.parametrize(
    ("seconds", "knee"),
    [
        (lambda rows: 4e-6 + 0.08e-6 * rows, 256),  # all overhead: a row gets cheaper up to the largest size
        (lambda rows: 60e-6 + 6e-6 * rows, 256),
        (lambda rows: 20e-6 + 20e-6 * rows, 64),  # what the server does around a run is shared too
        (lambda rows: 7e-3 * rows, 1),  # nothing shared by the rows of a batch
        (lambda rows: 2.5e-3 + 10e-3 * rows, 1),  # a fifth is, which is not worth three others' time
        (lambda rows: 0.25e-3 + 1e-3 * rows, 4),  # of quick rows it is
        (lambda rows: 10e-3 + 5e-3 * rows, 4),  # and so are two thirds
    ],
)
def test_the_knee_is_where_a_row_gets_no_cheaper(seconds: Callable[[int], float], knee: int) -> None:
    machine = Machine(seconds)
    costs = row_costs(machine.run, 256, clock=machine.clock)
    assert costs.knee == knee
    assert costs.seconds == {rows: pytest.approx(seconds(rows)) for rows in costs.seconds}


def test_a_first_run_that_takes_longer_does_not_count() -> None:
    machine = Machine(lambda rows: 1e-4 * rows, first=20)
    assert row_costs(machine.run, 16, clock=machine.clock).seconds == pytest.approx({1: 1e-4, 4: 4e-4, 16: 16e-4})


@pytest.mark.parametrize("row_seconds", [1e-6, 1e-4, 1e-3, 7e-3, 0.02, 0.1])
def test_measuring_ends_within_its_budget(row_seconds: float) -> None:
    machine = Machine(lambda rows: row_seconds * rows, first=1.5)
    row_costs(machine.run, 1024, budget_seconds=0.3, clock=machine.clock)
    assert machine.now <= 0.3


def test_one_row_is_timed_even_if_it_takes_longer_than_the_budget() -> None:
    machine = Machine(lambda rows: 2.0 * rows)
    assert row_costs(machine.run, 64, clock=machine.clock) == Costs({1: 2.0})
    assert machine.runs == [1]


def test_made_up_inputs_have_the_rows_asked_for_and_what_the_graph_fixes() -> None:
    specs = [
        TensorSpec("x", "FP32", (-1, 3, -1)),
        TensorSpec("index", "INT64", (-1,)),
        TensorSpec("fixed", "FP16", (2, 5)),
        TensorSpec("text", "BYTES", (-1, 1)),
        TensorSpec("scalar", "FP64", ()),
    ]
    inputs = made_up(specs, 7)
    assert {name: array.shape for name, array in inputs.items()} == {
        "x": (7, 3, 1), "index": (7,), "fixed": (2, 5), "text": (7, 1), "scalar": (),
    }  # fmt: skip
    assert not inputs["index"].any()
    assert np.unique(inputs["x"]).size == 21
    assert inputs["text"][0, 0] == b""
