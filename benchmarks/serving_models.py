"""The models that serving is measured on, made from a seed, with requests and the answers they must get.

mlp        x [N, 32] -> 64 -> 10     a run takes microseconds: everything else is the server's
head       x [N, 512] -> 1000        wide rows: bytes and calibration count
resnet18   x [N, 3, 32, 32] -> 10    0.56 GMAC: the run is everything
wide       x [N, 262144] -> 10       a request of 1 MiB, of which the model reads 32 numbers: bytes alone count
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.rpc.wire import inference

DISTINCT_REQUESTS = 16
"""Requests of different rows: an answer that goes to the wrong caller is then a wrong answer."""

WIDTH = 1 << 18

Array = NDArray[np.float32]


class Graph:
    """An ONNX graph under construction, its weights drawn from one seed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def weight(self, *shape: int, fan_in: int) -> str:
        """Normal numbers of the variance that keeps the scale of what passes a ReLU."""
        return self.constant(math.sqrt(2 / fan_in) * self._rng.standard_normal(shape))

    def constant(self, values: NDArray[np.float64]) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def integers(self, *values: int) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def dense(self, x: str, n_in: int, n_out: int) -> str:
        return self.node("Gemm", x, self.weight(n_in, n_out, fan_in=n_in), self.weight(n_out, fan_in=n_out))

    def convolution(self, x: str, n_in: int, n_out: int, size: int, stride: int = 1) -> str:
        """Its normalization is folded in, as exporters do."""
        kernel = self.weight(n_out, n_in, size, size, fan_in=n_in * size * size)
        bias = self.weight(n_out, fan_in=n_out)
        return self.node("Conv", x, kernel, bias, pads=[size // 2] * 4, strides=[stride] * 2)

    def residual(self, x: str, n_in: int, n_out: int, stride: int) -> str:
        y = self.node("Relu", self.convolution(x, n_in, n_out, 3, stride))
        y = self.convolution(y, n_out, n_out, 3)
        shortcut = x if n_in == n_out else self.convolution(x, n_in, n_out, 1, stride)
        return self.node("Relu", self.node("Add", y, shortcut))

    def standardized(self, features: str, rows: Array) -> str:
        """Features of mean 0 and variance 1 over these rows, as training would leave them: the rows then differ."""
        model = self.model(features, rows.shape[1:], ["N", "D"])
        (seen,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": rows}
        )
        centred = self.node("Sub", features, self.constant(seen.mean(axis=0)))
        return self.node("Div", centred, self.constant(seen.std(axis=0) + 1e-6))

    def classifier(self, logits: str, shape: tuple[int, ...], n_classes: int) -> onnx.ModelProto:
        return self.model(self.node("Softmax", logits, output="scores", axis=-1), shape, ["N", n_classes])

    def model(self, output: str, shape: Sequence[int], output_shape: list[str | int]) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, output_shape)
        graph = helper.make_graph(self.nodes, "benchmark", [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def mlp() -> onnx.ModelProto:
    graph = Graph()
    hidden = graph.node("Relu", graph.dense("x", 32, 64))
    return graph.classifier(graph.dense(hidden, 64, 10), (32,), 10)


def head() -> onnx.ModelProto:
    graph = Graph()
    return graph.classifier(graph.dense("x", 512, 1000), (512,), 1000)


def wide() -> onnx.ModelProto:
    graph = Graph()
    first, last, axis = (graph.integers(number) for number in (0, 32, 1))
    return graph.classifier(graph.dense(graph.node("Slice", "x", first, last, axis), 32, 10), (WIDTH,), 10)


def resnet18() -> onnx.ModelProto:
    graph = Graph()
    x, channels = graph.node("Relu", graph.convolution("x", 3, 64, 3)), 64
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        x, channels = graph.residual(x, channels, width, stride), width
    pooled = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    features = graph.standardized(pooled, normal_rows((3, 32, 32), 64, seed=0))
    return graph.classifier(graph.dense(features, 512, 10), (3, 32, 32), 10)


def normal_rows(shape: Sequence[int], n: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


@dataclass(frozen=True)
class BenchmarkModel:
    name: str
    make: Callable[[], onnx.ModelProto]
    row_shape: tuple[int, ...]
    n_classes: int
    batches: tuple[int, ...] = (1, 16, 64)

    def rows(self, n: int, seed: int = 1) -> Array:
        return normal_rows(self.row_shape, n, seed)

    def write(self, folder: Path) -> Path:
        """The model in a repository of Triton's layout; the path of its file."""
        version = folder / self.name / "1"
        version.mkdir(parents=True)
        path = version / "model.onnx"
        path.write_bytes(self.make().SerializeToString())
        return path


MODELS = {
    model.name: model
    for model in (
        BenchmarkModel("mlp", mlp, (32,), 10),
        BenchmarkModel("head", head, (512,), 1000),
        BenchmarkModel("resnet18", resnet18, (3, 32, 32), 10),
        BenchmarkModel("wide", wide, (WIDTH,), 10),
    )
}


def request_bytes(model: str, rows: Array, output: str = "") -> bytes:
    """A ModelInferRequest as every client sends it; `output` names the one output wanted (default: all)."""
    request = inference.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    if output:
        request.outputs.add(name=output)
    return bytes(request.SerializeToString())


def write_payloads(model: BenchmarkModel, path: Path, rows_each: int = 1, output: str = "") -> None:
    """The distinct requests, and the scores that a right answer to each holds, for `benchmarks.load`."""
    session = ort.InferenceSession(model.make().SerializeToString(), providers=["CPUExecutionProvider"])
    rows = model.rows(DISTINCT_REQUESTS * rows_each).reshape(DISTINCT_REQUESTS, rows_each, *model.row_shape)
    requests = [np.frombuffer(request_bytes(model.name, each, output), np.uint8) for each in rows]
    scores = [session.run(["scores"], {"x": each})[0] for each in rows]
    np.savez(path, requests=np.stack(requests), scores=np.stack(scores))
