"""Fits of any kind on logits alone: for a kind that is fitted through a model, the model that gives its input as logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

import calibrators
from calibrators import Calibrator
from calibrators.numerics import to_numpy


def fit(kind: str, params: dict[str, Any], logits: Any, y: Any, **arguments: Any) -> Calibrator:
    calibrator = calibrators.create(kind, **params)
    return calibrator.fit(logits, y, **arguments, **beside(calibrator, logits))


def beside(calibrator: Calibrator, logits: Any) -> dict[str, Any]:
    """What the fit reads besides."""
    if "input_gradients" not in calibrator.fit_needs:
        return {}
    x = to_numpy(logits)
    return {"inputs": x.astype(np.float32), "model": softmax_model(x.shape[-1])} if x.dtype.kind in "fiu" else {}


def served_beside(calibrator: Calibrator, logits: Any) -> dict[str, Any]:
    """What a fit made here reads besides when serving these rows."""
    return calibrator.read_when_serving(beside(calibrator, logits))


def softmax_model(n_classes: int) -> bytes:
    """x FP32 [B, K] -> p = softmax(x)."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", n_classes]) for name in ("x", "p")]
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["p"], axis=1)], "softmax", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
