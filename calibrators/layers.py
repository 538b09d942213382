"""Layers of a classifier that a calibrator may read beside the logits, found in its graph alone.

Tomani, Waseda, Shen, Cremers, "Beyond In-Domain Scenarios: Robust Density-Aware Calibration", ICML 2023, section 4 and
appendix: the last tensor of each block, the one before the first block, the pre-classifier features and the logits,
each pooled to one vector a row. There they are listed for each network by hand; here:

    residual networks    a block ends where two computed tensors of one shape are added (Add, Sum), taken after the
                         activation that alone reads the sum; the layer before the first block is the last tensor
                         that both of the first block's addends come from
    others               each dense layer's result, and of convolutions the last of those with one height and width,
                         after bias, normalisation and activation
    always               the features that the last dense layer reads, and the logits (`calibrators.inspection`)

A map [B, C, H, W] is averaged over its pixels, tokens [B, T, D] over the tokens, rows [B, D] are left as they are.
Which axis holds the channels is told by the nearest operator before: convolutions and poolings put them second, all
else last. A last block whose pooled map is the features is not named twice. Nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from calibrators.inspection import Inspection, Shape, View, attribute, operator

LOGITS = "logits"
"""The name of the logits among layers: they are not tapped twice."""

MOST = 6
"""Layers that are read where nobody names them: the last ones, since early ones say little of the answer."""

_CHANNELS_SECOND = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "BatchNormalization", "InstanceNormalization"}
_CHANNELS_LAST = {"MatMul", "Gemm", "LayerNormalization", "Attention", "LSTM", "GRU", "Gather"}
_DENSE = {"MatMul", "Gemm"}
_CONVOLUTION = {"Conv", "ConvTranspose"}
_ACTIVATIONS = {
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Gelu", "Clip", "Tanh", "Sigmoid", "HardSwish", "Softplus"),
    *("Mish", "HardSigmoid", "ThresholdedRelu", "BatchNormalization", "Identity", "Cast", "Dropout"),
}
_BIASED = {"Add", "Sub", "Mul", "Div"}
_POOLING = {"GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Squeeze", "Identity", "Cast", "Dropout"}


@dataclass(frozen=True)
class Layer:
    """A tensor that can be read as one vector a row.

    Attributes
    ----------
    tensor : its name in the model; `logits` for the logits
    shape : as the graph declares it, None where open
    axes : those averaged away
    width : numbers a row once pooled
    reason : in words, why this tensor
    """

    tensor: str
    shape: Shape
    axes: tuple[int, ...]
    width: int
    reason: str

    @property
    def pooled_numbers(self) -> int | None:
        """Numbers a row that pooling reads; None where a dimension is open."""
        return None if None in self.shape[1:] else math.prod(n for n in self.shape[1:] if n is not None)


def find_layers(model: onnx.ModelProto, inspection: Inspection) -> list[Layer]:
    """Layers in the order of computation, the features and then the logits last.

    Examples
    --------
    >>> import onnx.parser
    >>> from calibrators import inspect_model
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["": 17]>
    ...     net (float[N, 2] x) => (float[N, 3] z) <float[2, 4] u = {1,0,1,0,0,1,0,1}, float[4, 4] v =
    ...         {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4, 3] w = {1,0,0,0,1,0,0,0,1,1,1,1}> {
    ...         a = MatMul (x, u)   h = Relu (a)   b = MatMul (h, v)   f = Relu (b)   z = MatMul (f, w)
    ...     }''')
    >>> [(layer.tensor, layer.width) for layer in find_layers(model, inspect_model(model))]
    [('h', 4), ('f', 4), ('logits', 3)]
    """
    view = View(model)
    nodes = _between(view, inspection.logits.tensor)
    found = _unique([*(_residual(view, nodes) or _chain(view, nodes)), *_features(view, inspection)])
    found = [layer for layer in found if layer.tensor != view.origin(inspection.logits.tensor)]
    if inspection.features is not None and len(found) > 1 and _is_pooled(view, inspection.features, found[-2].tensor):
        del found[-2]
    if inspection.n_classes:
        reason = inspection.logits.reason
        found.append(Layer(LOGITS, (None, inspection.n_classes), (), inspection.n_classes, reason))
    return found


def named_layers(model: onnx.ModelProto, inspection: Inspection, names: Sequence[str]) -> list[Layer]:
    """The layers of these tensors, in their order.

    Raises
    ------
    ValueError
        for a tensor that does not exist, depends on no input, or is not one vector, map or row of tokens a row
    """
    view, found = View(model), {layer.tensor: layer for layer in find_layers(model, inspection)}
    return [found.get(name) or _named(view, name, found) for name in names]


def default_layers(layers: Sequence[Layer]) -> list[Layer]:
    """What is read where nobody names anything: the last `MOST` before the logits; the logits where there are none."""
    return [layer for layer in layers if layer.tensor != LOGITS][-MOST:] or list(layers)


def multiply_adds(model: onnx.ModelProto) -> int | None:
    """Products that a row costs in the model's dense layers and convolutions; None where a shape is not known."""
    view = View(model)
    costs = [_cost(view, node) for node in model.graph.node if operator(node) in _DENSE | _CONVOLUTION]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


# --- Finding. --------------------------------------------------------------------------------------------------------


def _between(view: View, tensor: str) -> list[onnx.NodeProto]:
    """The nodes, in order, that the tensor comes from and that depend on an input."""
    needed, found = {tensor}, []
    for node in reversed(list({id(node): node for node in view.producers.values()}.values())):
        if not needed.isdisjoint(node.output) and not set(node.output) <= view.constants:
            needed |= set(node.input)
            found.append(node)
    return found[::-1]


def _residual(view: View, nodes: Sequence[onnx.NodeProto]) -> list[Layer]:
    sums = [node for node in nodes if operator(node) in ("Add", "Sum") and _joins_equals(view, node)]
    if not sums:
        return []
    before = _common_origin(view, sums[0], nodes)
    stem = [_layer(view, before, "the first residual block starts from it")] if before else []
    blocks = [_layer(view, _activated(view, node.output[0]), f"residual block {i} ends in it")
              for i, node in enumerate(sums, start=1)]  # fmt: skip
    return [layer for layer in (*stem, *blocks) if layer is not None]


def _joins_equals(view: View, node: onnx.NodeProto) -> bool:
    """Whether a sum is of two or more computed tensors of one shape, as far as it is known: a bias or a mask is not."""
    whole = view.shapes.get(node.output[0])
    if whole is None or len(node.input) < 2 or not view.constants.isdisjoint(node.input):
        return False
    shapes = [view.shapes.get(name) or (None,) * len(whole) for name in node.input]
    return _axes(view, node.output[0]) is not None and all(_may_equal(shape, whole) for shape in shapes)


def _may_equal(one: Shape, other: Shape) -> bool:
    return len(one) == len(other) and all(None in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))


def _common_origin(view: View, node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> str | None:
    """The last tensor that both addends come from, if some layer makes it."""
    common = set.intersection(*(_upstream(view, name) for name in node.input))
    for earlier in reversed(nodes):
        if earlier.output[0] in common and any(
            operator(view.producers.get(name)) in _DENSE | _CONVOLUTION for name in _upstream(view, earlier.output[0])
        ):
            return str(earlier.output[0])
    return None


def _upstream(view: View, tensor: str) -> set[str]:
    """A tensor and all that it is computed from."""
    waiting, seen = [tensor], {tensor}
    while waiting:
        node = view.producers.get(waiting.pop())
        new = set(node.input) - seen - view.constants - {""} if node is not None else set()
        seen |= new
        waiting += new
    return seen


def _chain(view: View, nodes: Sequence[onnx.NodeProto]) -> list[Layer]:
    """Of networks without residual sums: dense layers, and the last convolution of each size of map."""
    found: list[tuple[Layer, bool]] = []
    for node in nodes:
        if operator(node) in _DENSE | _CONVOLUTION and node.input[1] in view.constants:
            layer = _layer(view, _activated(view, _biased(view, node.output[0])), f"a {node.op_type} ends in it")
            if layer is not None:
                found.append((layer, operator(node) in _CONVOLUTION))
    return [
        layer
        for i, (layer, convolved) in enumerate(found)
        if not (convolved and i + 1 < len(found) and found[i + 1][1] and found[i + 1][0].shape[2:] == layer.shape[2:])
    ]


def _features(view: View, inspection: Inspection) -> Iterator[Layer]:
    if inspection.features is not None and inspection.features not in view.inputs:
        layer = _layer(view, inspection.features, inspection.features_reason)
        if layer is not None:
            yield layer


def _biased(view: View, tensor: str) -> str:
    """The tensor after a bias or a scale that alone reads it."""
    node = _only_consumer(view, tensor)
    if node is None or operator(node) not in _BIASED:
        return tensor
    computed = [name for name in node.input if name not in view.constants]
    return _biased(view, node.output[0]) if computed == [tensor] else tensor


def _activated(view: View, tensor: str) -> str:
    """The tensor after the activations and normalisations that alone read it, one after the other."""
    node = _only_consumer(view, tensor)
    if node is None or operator(node) not in _ACTIVATIONS or node.input[0] != tensor:
        return tensor
    return _activated(view, node.output[0])


def _only_consumer(view: View, tensor: str) -> onnx.NodeProto | None:
    nodes = view.consumers.get(tensor, [])
    return nodes[0] if len(nodes) == 1 and len(nodes[0].output) == 1 else None


def _unique(layers: Iterable[Layer]) -> list[Layer]:
    """Each tensor once, where it is named last."""
    by_tensor: dict[str, Layer] = {}
    for layer in layers:
        by_tensor.pop(layer.tensor, None)
        by_tensor[layer.tensor] = layer
    return list(by_tensor.values())


def _is_pooled(view: View, features: str, tensor: str) -> bool:
    """Whether the features are the mean of a map and nothing else."""
    averaged = False
    while features != tensor:
        node = view.producers.get(features)
        if node is None or operator(node) not in _POOLING:
            return False
        averaged |= operator(node) in ("GlobalAveragePool", "ReduceMean")
        features = node.input[0]
    return averaged


# --- One tensor. -----------------------------------------------------------------------------------------------------


def _named(view: View, name: str, found: dict[str, Layer]) -> Layer:
    if name not in view.producers or name in view.constants:
        raise ValueError(f"the model computes no tensor {name!r}; layers found in it: {', '.join(found) or 'none'}")
    layer = _layer(view, name, "the caller names it")
    if layer is None:
        raise ValueError(
            f"{view.shown(name)} cannot be read as one vector a row: wanted are rows [B, D], tokens [B, T, D] or maps "
            "[B, C, H, W] of a known width"
        )
    return layer


def _layer(view: View, tensor: str, reason: str) -> Layer | None:
    """None for a tensor whose form or width is not known."""
    axes = _axes(view, tensor)
    if axes is None:
        return None
    shape = view.shapes[tensor] if tensor in view.shapes else (None, view.width(tensor))
    (channel,) = set(range(1, len(shape))) - set(axes)
    width = shape[channel]
    return None if width is None else Layer(tensor, shape, axes, width, reason)


def _axes(view: View, tensor: str) -> tuple[int, ...] | None:
    """The axes that pooling averages over; None for what is no vector, map or row of tokens a row."""
    shape = view.shapes.get(tensor)
    if shape is None:
        return () if view.width(tensor) is not None else None
    if not 2 <= len(shape) <= 5 or not view.is_float(tensor):
        return None
    return tuple(range(2, len(shape)) if _channels_second(view, tensor) else range(1, len(shape) - 1))


def _channels_second(view: View, tensor: str) -> bool:
    waiting, seen = [tensor], {tensor}
    while waiting:
        node = view.producers.get(waiting.pop(0))
        if operator(node) in _CHANNELS_SECOND | _CHANNELS_LAST:
            return operator(node) in _CHANNELS_SECOND
        new = [name for name in (node.input if node is not None else ()) if name not in seen | view.constants | {""}]
        seen.update(new)
        waiting += new
    return False


def _cost(view: View, node: onnx.NodeProto) -> int | None:
    """Products a row of one dense layer or convolution."""
    weights, result = view.shapes.get(node.input[1]), view.shapes.get(node.output[0])
    if result is None or weights is None or None in weights or None in result[1:]:
        return None
    outputs = math.prod(n for n in result[1:] if n is not None)
    sizes = [n for n in weights if n is not None]
    if operator(node) in _CONVOLUTION:
        transposed = operator(node) == "ConvTranspose"
        per_output = math.prod(sizes[1:]) // (attribute(node, "group", 1) if transposed else 1)
        return outputs * per_output
    return outputs * (sizes[-1] if attribute(node, "transB", 0) else sizes[-2])
