"""Answers spelled out: each holds its own rows, however those of one run are mixed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calserve.open_inference import messages

from service.inference.batcher import Answer, Lane, Run
from service.rpc import infer_response
from service.rpc.infer_plan import Plan, id_field
from service.rpc.infer_response import JOINED_BYTES, Encoder

MODEL: Any = SimpleNamespace(name="m", version="1", is_classifier=False)
SNAPSHOT = SimpleNamespace(
    revision="r1", online_state=None, sets=None, session=SimpleNamespace(provider="CPUExecutionProvider")
)
LANE = Lane(("y", "label"), None, (), joins=True)


def plan(rows: int, *names: str) -> Plan:
    datatypes = {name: {"y": "FP32", "label": "INT64"}[name] for name in names}
    return Plan(MODEL, names, LANE, rows, datatypes=datatypes, plain=True)


def run(rows: int, width: int = 3) -> Run:
    y = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    return Run(LANE.outputs, [y, 10 * np.arange(rows)], SNAPSHOT, rows, (0, 0))


def check(encoder: Encoder, plan: Plan, run: Run, start: int) -> None:
    """The answer to the request whose rows begin there, against the run's own arrays."""
    stop, own_id = start + plan.rows, f"id {start}"
    reply = messages.ModelInferResponse.FromString(encoder.encode(plan, Answer(run, start, stop), id_field(own_id)))
    assert reply.id == own_id
    assert [output.name for output in reply.outputs] == list(plan.datatypes)
    for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
        assert raw == run.arrays[output.name][start:stop].tobytes()
        assert list(output.shape) == [plan.rows, *run.arrays[output.name].shape[1:]]


def test_each_answer_of_a_run_holds_its_own_rows() -> None:
    encoder, shared, all_of_it, some = Encoder(), run(4), plan(1, "y", "label"), plan(1, "label")
    for start in range(4):
        check(encoder, all_of_it, shared, start)
        check(encoder, some, shared, start)
    check(encoder, plan(2, "y"), shared, 2)
    check(encoder, all_of_it, run(1), 0)
    check(encoder, all_of_it, run(7), 6)


def test_the_rows_of_a_run_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    laid = []
    joined = infer_response._joined
    monkeypatch.setattr(infer_response, "_joined", lambda *of: laid.append(1) or joined(*of))
    encoder, shared, asked = Encoder(), run(4), plan(1, "y", "label")
    for start in range(4):
        check(encoder, asked, shared, start)
    assert len(laid) == 1


def test_a_long_run_and_one_without_values_are_not_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(infer_response, "_joined")
    check(Encoder(), plan(1, "y"), run(2, width=JOINED_BYTES // 8 + 1), 1)
    check(Encoder(), plan(1, "y"), run(2, width=0), 1)
