"""Small networks as ONNX, to be differentiated: a convolutional one, one that looks ids up, one with two inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
N_CLASSES = 3


def model(
    nodes: list[Any], inputs: list[tuple[str, int, list[Any]]], weights: dict[str, Array], opset: int = 17
) -> onnx.ModelProto:
    """Nodes up to the logits `z`; the output is p = softmax(z)."""
    nodes = [*nodes, helper.make_node("Softmax", ["z"], ["p"], axis=1)]
    values = [helper.make_tensor_value_info(name, element, dims) for name, element, dims in inputs]
    output = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["B", N_CLASSES])
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "network", values, [output], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def drawn(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return (scale * rng.normal(size=shape)).astype(np.float32)


def convolutional(
    element: int = TensorProto.FLOAT, dims: tuple[Any, ...] = ("B", 2, 6, 6), opset: int = 17
) -> onnx.ModelProto:
    """x [B, 2, 6, 6] -> padded convolution -> normalisation -> pools -> dense layer."""
    rng = np.random.default_rng(0)
    weights = {
        "w": drawn(rng, 4, 2, 3, 3), "b": drawn(rng, 4), "scale": drawn(rng, 4) + 2, "bias": drawn(rng, 4),
        "mean": drawn(rng, 4), "variance": np.abs(drawn(rng, 4)) + 1, "d": drawn(rng, 4, N_CLASSES, scale=4.0),
        "e": drawn(rng, N_CLASSES),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["f", "w", "b"], ["c"], auto_pad="SAME_UPPER"),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "variance"], ["n"]),
        helper.make_node("Sigmoid", ["n"], ["s"]),
        helper.make_node("AveragePool", ["s"], ["a"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0]),
        helper.make_node("GlobalAveragePool", ["a"], ["g"]),
        helper.make_node("Flatten", ["g"], ["v"]),
        helper.make_node("Gemm", ["v", "d", "e"], ["z"]),
    ]
    return model(nodes, [("x", element, list(dims))], weights, opset)


def of_ids() -> onnx.ModelProto:
    """ids INT64 [B, 5] -> embeddings [B, 5, 4] -> attention of a kind -> mean -> dense layer."""
    rng = np.random.default_rng(1)
    weights = {
        "table": drawn(rng, 11, 4), "q": drawn(rng, 4, 4), "one": np.ones(4, np.float32), "none": np.zeros(4, np.float32),
        "d": drawn(rng, 4, N_CLASSES, scale=3.0),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "q"], ["asked"]),
        helper.make_node("Transpose", ["embedded"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["asked", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "embedded"], ["mixed"]),
        helper.make_node("LayerNormalization", ["mixed", "one", "none"], ["normal"], axis=-1),
        helper.make_node("ReduceMean", ["normal"], ["m"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["m", "d"], ["z"]),
    ]
    return model(nodes, [("ids", TensorProto.INT64, ["B", 5])], weights)


def of_two() -> onnx.ModelProto:
    """numbers FLOAT [B, 4] and kinds INT32 [B], looked up -> one vector -> dense layer."""
    rng = np.random.default_rng(2)
    weights = {"table": drawn(rng, 6, 3), "d": drawn(rng, 7, N_CLASSES)}
    nodes = [
        helper.make_node("Gather", ["table", "kinds"], ["looked"]),
        helper.make_node("Concat", ["numbers", "looked"], ["v"], axis=1),
        helper.make_node("MatMul", ["v", "d"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Mul", ["t", "three"], ["z"]),
    ]
    weights["three"] = np.array(3, np.float32)
    return model(nodes, [("numbers", TensorProto.FLOAT, ["B", 4]), ("kinds", TensorProto.INT32, ["B"])], weights)


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def rows(proto: onnx.ModelProto, n: int, seed: int = 0) -> dict[str, Array]:
    """Drawn inputs of any of these."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        shape = [n, *(d.dim_value or 6 for d in tensor.shape.dim[1:])]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        made[value.name] = (rng.normal(size=shape) if dtype.kind == "f" else rng.integers(0, 6, size=shape)).astype(
            dtype
        )
    return made


def logits_by_onnxruntime(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """Of the tensor z, made an output."""
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    shown.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", N_CLASSES]))
    return np.asarray(session(shown).run(["z"], feeds)[0])
