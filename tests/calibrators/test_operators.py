"""The operators in torch give what ONNX's own node tests expect, and what they cannot give they refuse by name."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from calibrators.operators import OPERATORS, Node, from_numpy, qualified_name

NO_CASE = {"Cast", "ai.onnx.ml::Scaler"}
"""Operators of which ONNX has no test with an expected output that is an array of numpy's own types."""


@cache
def cases() -> Mapping[str, Sequence[Any]]:
    """ONNX's tests of one node by its operator, those on numbers that a classifier is made of."""
    with warnings.catch_warnings():  # the expected outputs of some operators overflow while they are made
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    found = defaultdict(list)
    for case in collected:
        if len(case.model.graph.node) == 1 and all(
            map(_is_plain, (a for rows in case.data_sets for io in rows for a in io))
        ):
            found[qualified_name(case.model.graph.node[0])].append(case)
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub" and value.dtype.isbuiltin == 1


def compute(case: Any, inputs: Sequence[NDArray[Any]]) -> list[Any]:
    proto = case.model.graph.node[0]
    opset = max(entry.version for entry in case.model.opset_import if entry.domain in ("", "ai.onnx"))
    feeds = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
    given = [
        from_numpy(torch, feeds[name], real=feeds[name].dtype.kind == "f") if name else None for name in proto.input
    ]
    values = OPERATORS[qualified_name(proto)](torch, Node.of(proto, opset), *given)
    return values if isinstance(values, list) else [values]


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - NO_CASE))
def test_an_operator_gives_what_onnx_expects_or_refuses_by_name(operator: str) -> None:
    given = 0
    for case in cases()[operator]:
        for inputs, outputs in case.data_sets:
            if any(array.size == 0 for array in inputs) and operator.startswith("Reduce"):
                continue  # a reduction of nothing
            try:
                values = compute(case, inputs)
            except ValueError as error:
                assert str(error).startswith(f"{operator} with ") and "cannot be differentiated here" in str(error)
                continue
            for value, expected in zip(values, outputs, strict=False):
                assert value.is_floating_point() == (expected.dtype.kind == "f"), case.name
                assert tuple(value.shape) == expected.shape, case.name
                np.testing.assert_allclose(value.numpy(), expected, rtol=1e-3, atol=1e-5, err_msg=case.name)
                given += 1
    assert given


def test_real_numbers_of_any_width_become_float32_and_others_keep_their_type() -> None:
    for to, expected in [
        (TensorProto.FLOAT16, torch.float32),
        (TensorProto.DOUBLE, torch.float32),
        (TensorProto.INT64, torch.int64),
        (TensorProto.INT32, torch.int32),
        (TensorProto.UINT32, torch.int64),
        (TensorProto.BOOL, torch.bool),
    ]:
        node = Node.of(helper.make_node("Cast", ["x"], ["y"], to=to), 17)
        cast = OPERATORS["Cast"](torch, node, torch.tensor([-1.5, 0.0, 2.5], dtype=torch.float64))
        assert cast.dtype == expected
        assert cast.tolist() == pytest.approx(
            {torch.float32: [-1.5, 0.0, 2.5], torch.bool: [True, False, True]}.get(expected, [-1, 0, 2])
        )


def test_the_scaler_takes_off_and_multiplies() -> None:
    proto = onnx.helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0, 2.0], scale=[2.0, 0.5])
    scaled = OPERATORS[qualified_name(proto)](torch, Node.of(proto, 3), torch.tensor([[3.0, 4.0]]))
    assert scaled.tolist() == [[4.0, 1.0]]
