"""Layers found in graphs of the common kinds, and pooled in the fused graph as torch pools them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibrators.graph import FEATURES, fuse
from calibrators.inspection import inspect_model
from calibrators.kinds.identity import Identity
from calibrators.layers import LOGITS, MOST, default_layers, find_layers, multiply_adds, named_layers

RNG = np.random.default_rng(0)


class Builder:
    """Nodes of a graph, one after the other; each method returns the name of a tensor."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)
        return name

    def constant(self, values: list[int]) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.array(values, dtype=np.int64)
        return name

    def conv(self, x: str, c_in: int, c_out: int, stride: int = 1) -> str:
        w = self.weight(c_out, c_in, 3, 3)
        return self.node("Conv", x, w, self.weight(c_out), pads=[1, 1, 1, 1], strides=[stride, stride])

    def dense(self, x: str, n_in: int, n_out: int) -> str:
        return self.node("Add", self.node("MatMul", x, self.weight(n_in, n_out)), self.weight(n_out))

    def model(self, z: str, shape: list[Any], n_classes: int = 4) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Softmax", [z], ["p"], axis=-1))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *shape])]
        outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["B", n_classes])]
        initializers = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def residual(*, pooled_by: str = "GlobalAveragePool", activated: bool = True) -> onnx.ModelProto:
    """A stem, two blocks of 8 and 16 channels, the second with a strided shortcut, and a head."""
    b = Builder()
    stem = b.node("Relu", b.conv("x", 3, 8))
    first = b.node("Add", b.conv(b.node("Relu", b.conv(stem, 8, 8)), 8, 8), stem)
    first = b.node("Relu", first) if activated else first
    shortcut = b.node("Conv", first, b.weight(16, 8, 1, 1), strides=[2, 2])
    second = b.node("Add", b.conv(b.node("Relu", b.conv(first, 8, 16, 2)), 16, 16), shortcut)
    second = b.node("Relu", second) if activated else second
    pooled = (
        b.node("GlobalAveragePool", second)
        if pooled_by == "GlobalAveragePool"
        else b.node("ReduceMean", second, axes=[2, 3])
    )
    return b.model(b.dense(b.node("Flatten", pooled), 16, 4), [3, 8, 8])


def vgg() -> onnx.ModelProto:
    b = Builder()
    x = b.node("Relu", b.conv(b.node("Relu", b.conv("x", 3, 8)), 8, 8))
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.node("Relu", b.conv(b.node("Relu", b.conv(x, 8, 16)), 16, 16))
    x = b.node("Flatten", b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    return b.model(b.dense(b.node("Relu", b.dense(x, 64, 12)), 12, 4), [3, 8, 8])


def transformer() -> onnx.ModelProto:
    """Tokens [B, T, 6]: a pre-norm block whose normalisation is written in primitives, then the mean over tokens."""
    b = Builder()
    embedded = b.dense("x", 5, 6)
    centred = b.node("Sub", embedded, b.node("ReduceMean", embedded, axes=[-1]))
    variance = b.node("ReduceMean", b.node("Mul", centred, centred), axes=[-1])
    normal = b.node("Div", centred, b.node("Sqrt", b.node("Add", variance, b.weight(1))))
    first = b.node("Add", b.dense(b.node("Relu", b.dense(normal, 6, 9)), 9, 6), embedded)
    second = b.node("Add", b.dense(b.node("Relu", b.dense(first, 6, 9)), 9, 6), first)
    return b.model(b.dense(b.node("ReduceMean", second, axes=[1], keepdims=0), 6, 4), [7, 5])


def shown(model: onnx.ModelProto) -> list[tuple[str, int]]:
    return [(layer.tensor, layer.width) for layer in find_layers(model, inspect_model(model))]


@pytest.mark.parametrize("pooled_by", ["GlobalAveragePool", "ReduceMean"])
def test_a_residual_network_has_its_stem_its_blocks_and_its_features_the_last_block_not_twice(pooled_by: str) -> None:
    model = residual(pooled_by=pooled_by)
    widths = [width for _, width in shown(model)]
    assert widths == [8, 8, 16, 4]
    layers = find_layers(model, inspect_model(model))
    assert [layer.axes for layer in layers] == [(2, 3), (2, 3), (), ()]
    assert [layer.reason.split()[0] for layer in layers[:2]] == ["the", "residual"]
    assert layers[1].tensor.startswith("relu")
    assert layers[-1].tensor == LOGITS


def test_a_block_whose_sum_goes_two_ways_is_taken_at_the_sum() -> None:
    names = [name for name, _ in shown(residual(activated=False))]
    assert names[1].startswith("add")


def test_a_chain_of_convolutions_has_one_layer_for_each_size_and_each_dense_layer() -> None:
    assert [width for _, width in shown(vgg())] == [8, 16, 12, 4]


def test_tokens_are_averaged_and_a_normalisation_is_no_block() -> None:
    layers = find_layers(transformer(), inspect_model(transformer()))
    assert [(layer.width, layer.axes) for layer in layers] == [(6, (1,)), (6, (1,)), (6, ()), (4, ())]


def test_a_model_that_is_one_dense_layer_has_its_logits_alone() -> None:
    b = Builder()
    model = b.model(b.dense("x", 5, 4), [5])
    assert shown(model) == [(LOGITS, 4)]
    assert [layer.tensor for layer in default_layers(find_layers(model, inspect_model(model)))] == [LOGITS]


def test_by_default_the_last_few_are_read() -> None:
    b = Builder()
    x, width = "x", 5
    for _ in range(9):
        x, width = b.node("Relu", b.dense(x, width, 6)), 6
    model = b.model(b.dense(x, 6, 4), [5])
    found = find_layers(model, inspect_model(model))
    assert len(found) == 10
    assert default_layers(found) == found[9 - MOST : 9]


@pytest.mark.parametrize("build", [residual, vgg, transformer])
def test_the_graph_pools_as_torch_does(build: Any) -> None:
    model = build()
    inspection = inspect_model(model)
    layers = [layer for layer in find_layers(model, inspection) if layer.tensor != LOGITS]
    taps = [layer.tensor for layer in layers]
    fused = fuse(model, Identity.of(4), inspection, taps=taps)
    onnx.checker.check_model(fused.proto, full_check=True)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = RNG.normal(size=(5, *dims)).astype(np.float32)
    (features,) = onnxruntime.InferenceSession(fused.to_bytes()).run([FEATURES], {"x": x})
    for tensor in taps:
        model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    raw = onnxruntime.InferenceSession(model.SerializeToString()).run(taps, {"x": x})
    pooled = [
        torch.tensor(a).mean(dim=layer.axes) if layer.axes else torch.tensor(a)
        for a, layer in zip(raw, layers, strict=True)
    ]
    np.testing.assert_allclose(features, torch.cat(pooled, dim=1).numpy(), rtol=1e-5, atol=1e-6)
    assert "p" in {value.name for value in onnx.load_from_string(fused.export()).graph.output}


def test_named_tensors_are_read_in_the_callers_order_and_unknown_ones_refused() -> None:
    model = vgg()
    inspection = inspect_model(model)
    names = [layer.tensor for layer in find_layers(model, inspection)]
    assert [layer.tensor for layer in named_layers(model, inspection, names[::-1])] == names[::-1]
    with pytest.raises(ValueError, match=f"computes no tensor 'nowhere'; layers found in it: {names[0]}, .*logits"):
        named_layers(model, inspection, ["nowhere"])
    with pytest.raises(ValueError, match="computes no tensor 'x'"):
        named_layers(model, inspection, ["x"])
    b = Builder()
    counted = b.node("Shape", "x")
    odd = b.model(b.dense("x", 5, 4), [5])
    with pytest.raises(ValueError, match=rf"'{counted}' .*cannot be read as one vector a row"):
        named_layers(odd, inspect_model(odd), [counted])


def test_layers_named_for_a_model_must_be_there() -> None:
    with pytest.raises(ValueError, match="layers = 'nowhere': the model has no such tensor"):
        inspect_model(vgg(), layers=["nowhere"])


def test_what_a_row_costs_is_counted_in_products() -> None:
    b = Builder()
    x = b.conv("x", 3, 8)
    model = b.model(b.dense(b.node("Flatten", b.node("GlobalAveragePool", x)), 8, 4), [3, 10, 10])
    assert multiply_adds(model) == 100 * 8 * 27 + 8 * 4
    layer = find_layers(model, inspect_model(model))[0]
    assert layer.pooled_numbers == 8
