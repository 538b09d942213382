"""Small ONNX models, made from a seed, for a model repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

N_FEATURES, N_CLASSES = 6, 4


def weights(n_in: int, n_out: int, seed: int, scale: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((n_in, n_out))).astype(np.float32), rng.standard_normal(n_out).astype(
        np.float32
    )


def classifier(
    *,
    n_classes: int = N_CLASSES,
    seed: int = 0,
    output: str = "scores",
    activation: str = "Softmax",
    batch: str | int = "N",
) -> onnx.ModelProto:
    """x FP32 [N, 6] -> Gemm -> Relu -> Gemm -> `activation` -> output FP32 [N, n_classes]."""
    w1, b1 = weights(N_FEATURES, 8, seed)
    w2, b2 = weights(8, n_classes, seed + 1)
    initializers = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    attributes = {"axis": -1} if activation == "Softmax" else {}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h0"]),
        helper.make_node("Relu", ["h0"], ["h"]),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["z"]),
        helper.make_node(activation, ["z"], [output], **attributes),
    ]
    return model(
        nodes,
        [("x", TensorProto.FLOAT, [batch, N_FEATURES])],
        [(output, TensorProto.FLOAT, [batch, n_classes])],
        initializers,
    )


def hidden(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """What the last layer of `classifier` reads, its tensor `h`."""
    w1, b1 = weights(N_FEATURES, 8, seed)
    return np.maximum(x @ w1 + b1, 0)


def regressor() -> onnx.ModelProto:
    """x FP32 [N, 6] -> mean FP32 [N]: not a classifier."""
    return model(
        [helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=0)],
        [("x", TensorProto.FLOAT, ["N", N_FEATURES])],
        [("mean", TensorProto.FLOAT, ["N"])],
    )


def echo(element_type: int) -> onnx.ModelProto:
    """x [N, 2] -> y [N, 2], the same values, of any element type."""
    return model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", element_type, ["N", 2])], [("y", element_type, ["N", 2])]
    )


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, list[str | int]]],
    outputs: Sequence[tuple[str, int, list[str | int]]],
    initializers: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(root: Path, name: str, proto: onnx.ModelProto, version: int = 1, **files: str) -> Path:
    """Put a model in the repository `root`; `files` are further files of its folder, `_` for the dot of the name."""
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    for filename, content in files.items():
        (root / name / filename.replace("_", ".")).write_text(content)
    return folder


def labelled_rows(n: int, seed: int, n_classes: int = N_CLASSES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, the model's logits for them, and labels that it is overconfident about: drawn from softmax(logits / 2.5)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, N_FEATURES)).astype(np.float32)
    w1, b1 = weights(N_FEATURES, 8, 0)
    w2, b2 = weights(8, n_classes, 1)
    logits = np.maximum(x @ w1 + b1, 0) @ w2 + b2
    gumbel = rng.gumbel(size=logits.shape)
    return x, logits, np.argmax(logits / 2.5 + gumbel, axis=1)
