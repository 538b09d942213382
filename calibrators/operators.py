"""ONNX operators in torch: what `calibrators.differentiable` computes a model with.

`OPERATORS` is the whole of it, one entry an operator, each with the meaning that the ONNX specification (Operators.md,
Operators-ml.md) gives it in inference, tested against ONNX's own node tests. A model that has any other is refused by
that operator's name: a number that is nearly the model's would be a silent approximation. Real numbers of any width
are computed in float32, integers and truth values in their own type.

An entry is called with torch (imported by a fit alone), the node, and the node's inputs, None for one left out; it
returns a tensor, or a list of them where the node has several outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Tensor: TypeAlias = Any
Operator: TypeAlias = Callable[..., Any]

REALS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Node:
    """An operator as a model uses it.

    Attributes
    ----------
    name : the operator's, before it "domain::" where that is not ONNX's own
    opset : version of the operator set it belongs to
    """

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    opset: int
    attributes: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, proto: onnx.NodeProto, opset: int) -> Node:
        attributes = {one.name: helper.get_attribute_value(one) for one in proto.attribute}
        return cls(qualified_name(proto), list(proto.input), list(proto.output), opset, attributes)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def listed(self, name: str, given: Tensor | None) -> list[int] | None:
        """Whole numbers that later operator sets take as an input, earlier ones as an attribute."""
        if given is not None:
            return [int(value) for value in given.reshape(-1)]
        return None if self.get(name) is None else [int(value) for value in np.atleast_1d(self.get(name))]

    def refuse(self, *names: str) -> None:
        """Raise ValueError if an attribute that is not understood here is set."""
        for name in names:
            if self.get(name):
                raise ValueError(f"{self.name} with {name}={self.get(name)!r} cannot be differentiated here")


def qualified_name(node: onnx.NodeProto) -> str:
    """Operator names as `OPERATORS` has them."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def tensor_of(torch: Any, proto: onnx.TensorProto) -> Tensor:
    """A stored tensor, real numbers as float32."""
    return from_numpy(torch, numpy_helper.to_array(proto), real=proto.data_type in REALS)


def from_numpy(torch: Any, array: Any, *, real: bool) -> Tensor:
    """An array in the type it is computed in: float32, or its own; of unsigned integers torch adds up 8 bits alone."""
    wide = array.dtype.kind == "u" and array.itemsize > 1
    return torch.from_numpy(np.array(array, np.float32 if real else np.int64 if wide else array.dtype))


# ---- numbers one by one


def _named(name: str) -> Operator:
    """torch's own function of that name."""
    return lambda torch, node, *x: getattr(torch, name)(*x)


def _functional(name: str, **attributes: Any) -> Operator:
    """torch.nn.functional's function of that name, with these attributes of the node and their defaults, in order."""

    def compute(torch: Any, node: Node, x: Tensor) -> Tensor:
        values = [node.get(attribute, default) for attribute, default in attributes.items()]
        return getattr(torch.nn.functional, name)(x, *values)

    return compute


def _folded(name: str) -> Operator:
    """A function of two, over any number of inputs."""

    def compute(torch: Any, node: Node, *x: Tensor) -> Tensor:
        total = x[0]
        for other in x[1:]:
            total = getattr(torch, name)(total, other)
        return total

    return compute


def _mean(torch: Any, node: Node, *x: Tensor) -> Tensor:
    return _folded("add")(torch, node, *x) / len(x)


def _div(torch: Any, node: Node, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _mod(torch: Any, node: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


def _pow(torch: Any, node: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


def _cast(torch: Any, node: Node, x: Tensor) -> Tensor:
    if node.get("to") in REALS:
        return x.to(torch.float32)
    return x.to(from_numpy(torch, np.empty(0, helper.tensor_dtype_to_np_dtype(node.get("to"))), real=False).dtype)


def _clip(torch: Any, node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low = node.get("min") if low is None else low
    high = node.get("max") if high is None else high
    return x if low is None and high is None else torch.clamp(x, low, high)


def _prelu(torch: Any, node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _hard_sigmoid(torch: Any, node: Node, x: Tensor) -> Tensor:
    return torch.clamp(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


def _selu(torch: Any, node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


def _gelu(torch: Any, node: Node, x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=node.get("approximate", "none"))


def _thresholded_relu(torch: Any, node: Node, x: Tensor) -> Tensor:
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


def _scaler(torch: Any, node: Node, x: Tensor) -> Tensor:
    offset, scale = (x.new_tensor(node.get(name)) for name in ("offset", "scale"))
    return (x.to(torch.float32) - offset) * scale


# ---- numbers together


def _reduction(reduce: Callable[[Any, Tensor, list[int], bool], Tensor]) -> Operator:
    def compute(torch: Any, node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = node.listed("axes", axes)
        if not chosen and node.get("noop_with_empty_axes", 0):
            return x
        return reduce(torch, x, chosen or list(range(x.dim())), bool(node.get("keepdims", 1)))

    return compute


def _product(torch: Any, x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdims)
    return x


def _best(name: str) -> Operator:
    def compute(torch: Any, node: Node, x: Tensor) -> Tensor:
        node.refuse("select_last_index")
        return getattr(torch, name)(x, node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))

    return compute


def _softmax(name: str) -> Operator:
    """Before version 13 over all axes from one on, since then over one axis."""

    def compute(torch: Any, node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return getattr(torch, name)(x, node.get("axis", -1))
        flat = _flatten(torch, node, x)
        return getattr(torch, name)(flat, 1).reshape(x.shape)

    return compute


def _cumsum(torch: Any, node: Node, x: Tensor, axis: Tensor) -> Tensor:
    node.refuse("exclusive", "reverse")
    return torch.cumsum(x, int(axis))


def _gemm(torch: Any, node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = (a.T if node.get("transA", 0) else a) @ (b.T if node.get("transB", 0) else b)
    product = node.get("alpha", 1.0) * product
    return product if c is None else product + node.get("beta", 1.0) * c


def _einsum(torch: Any, node: Node, *x: Tensor) -> Tensor:
    return torch.einsum(node.get("equation"), *x)


def _batch_norm(
    torch: Any, node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    node.refuse("training_mode")
    return torch.nn.functional.batch_norm(x, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


def _instance_norm(torch: Any, node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt((centred**2).mean(axes, keepdim=True) + node.get("epsilon", 1e-5))
    shape = (-1, *(1 for _ in axes))
    return normal * scale.reshape(shape) + bias.reshape(shape)


def _layer_norm(torch: Any, node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | list[Tensor]:
    axes = tuple(range(node.get("axis", -1) % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    deviation = torch.rsqrt(((x - mean) ** 2).mean(axes, keepdim=True) + node.get("epsilon", 1e-5))
    normal = (x - mean) * deviation * scale
    normal = normal if bias is None else normal + bias
    return normal if len(node.outputs) == 1 else [normal, mean, deviation]


def _lp_norm(torch: Any, node: Node, x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, p=node.get("p", 2), dim=node.get("axis", -1))


def _lrn(torch: Any, node: Node, x: Tensor) -> Tensor:
    if node.get("size") % 2 == 0:  # torch's window then lies on the other side
        raise ValueError(f"LRN with size={node.get('size')} cannot be differentiated here")
    values = [node.get(name, default) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))]
    return torch.nn.functional.local_response_norm(x, node.get("size"), *values)


# ---- windows


def _window(node: Node, x: Tensor, size: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and padding as torch wants it: begin and end of the last axis first."""
    n = len(size)
    strides, dilations = node.get("strides", [1] * n), node.get("dilations", [1] * n)
    pads = list(node.get("pads", [0] * 2 * n))
    if node.get("auto_pad", "NOTSET").startswith("SAME"):
        needed = [
            max(0, (math.ceil(length / stride) - 1) * stride + (k - 1) * dilation + 1 - length)
            for length, k, stride, dilation in zip(x.shape[2:], size, strides, dilations, strict=True)
        ]
        less, more = [total // 2 for total in needed], [total - total // 2 for total in needed]
        pads = less + more if node.get("auto_pad") == "SAME_UPPER" else more + less
    return strides, dilations, [pad for axis in reversed(range(n)) for pad in (pads[axis], pads[axis + n])]


def _conv(torch: Any, node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations, pads = _window(node, x, weight.shape[2:])
    padded = torch.nn.functional.pad(x, pads) if any(pads) else x
    convolve = getattr(torch.nn.functional, f"conv{x.dim() - 2}d")
    return convolve(padded, weight, bias, strides, 0, dilations, node.get("group", 1))


def _max_pool(torch: Any, node: Node, x: Tensor) -> Tensor:
    node.refuse("storage_order")
    if not x.is_floating_point():
        raise ValueError("MaxPool with integers cannot be differentiated here")
    size = node.get("kernel_shape")
    strides, dilations, pads = _window(node, x, size)
    padded = torch.nn.functional.pad(x, pads, value=-torch.inf) if any(pads) else x
    pool = getattr(torch.nn.functional, f"max_pool{x.dim() - 2}d")
    return _in_range(pool(padded, size, strides, 0, dilations, bool(node.get("ceil_mode", 0))), x, strides, pads)


def _average_pool(torch: Any, node: Node, x: Tensor) -> Tensor:
    """The mean over what of a window counts: a pooled one says how much that is."""
    size = node.get("kernel_shape")
    strides, dilations, pads = _window(node, x, size)
    if any(dilation != 1 for dilation in dilations):
        node.refuse("dilations")
    pool = getattr(torch.nn.functional, f"avg_pool{x.dim() - 2}d")
    counted = [torch.ones_like(x[:1, :1]), float(node.get("count_include_pad", 0))]
    sums, counts = (
        pool(torch.nn.functional.pad(values, pads, value=outside), size, strides, 0, bool(node.get("ceil_mode", 0)))
        for values, outside in ((x, 0.0), counted)
    )
    return _in_range(sums / counts, x, strides, pads)


def _in_range(pooled: Tensor, x: Tensor, strides: Sequence[int], pads: Sequence[int]) -> Tensor:
    """Without windows that begin beyond x and its padding in front, which rounding up may add."""
    for axis, stride in enumerate(strides, start=2):
        before = pads[2 * (x.dim() - 1 - axis)]
        pooled = pooled.narrow(axis, 0, min(pooled.shape[axis], math.ceil((x.shape[axis] + before) / stride)))
    return pooled


def _global(name: str) -> Operator:
    return lambda torch, node, x: getattr(torch, name)(x, tuple(range(2, x.dim())), keepdim=True)


# ---- shapes


def _shape(torch: Any, node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[slice(node.get("start", 0), node.get("end"))], dtype=torch.int64)


def _reshape(torch: Any, node: Node, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [int(size) for size in shape]
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(torch: Any, node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _squeeze(torch: Any, node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = node.listed("axes", axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(torch: Any, node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = node.listed("axes", axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(torch: Any, node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm") or list(reversed(range(x.dim()))))


def _expand(torch: Any, node: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(int(size) for size in shape)))


def _concat(torch: Any, node: Node, *x: Tensor) -> Tensor:
    return torch.cat(x, node.get("axis"))


def _split(torch: Any, node: Node, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    axis, n = node.get("axis", 0), len(node.outputs)
    each = node.listed("split", sizes) or math.ceil(x.shape[axis] / n)
    return list(torch.split(x, each, axis))


def _slice(torch: Any, node: Node, x: Tensor, *given: Tensor | None) -> Tensor:
    names = ("starts", "ends", "axes", "steps")
    values = [node.listed(name, given[i] if i < len(given) else None) for i, name in enumerate(names)]
    starts, ends = values[0] or [], values[1] or []
    axes, steps = values[2] or list(range(len(starts))), values[3] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Python's slices have ONNX's meaning but for an end below the first, which Python counts from the back again.
        stop = None if step < 0 and end < -x.shape[axis] else end
        chosen = range(x.shape[axis])[slice(start, stop, step)]
        x = torch.index_select(x, axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def _positive(index: Tensor, size: int) -> Tensor:
    """Indices counted from the front."""
    index = index.long()
    return index + (index < 0) * size


def _gather(torch: Any, node: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.dim()
    chosen = torch.index_select(x, axis, _positive(index, x.shape[axis]).reshape(-1).to(x.device))
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gather_elements(torch: Any, node: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    return torch.gather(x, axis, _positive(index, x.shape[axis]))


def _one_hot(torch: Any, node: Node, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    axis, classes = node.get("axis", -1), int(depth)
    hits = _positive(index, classes).unsqueeze(-1) == torch.arange(classes, device=index.device)
    off, on = values.to(index.device)
    return torch.where(hits, on, off).movedim(-1, axis)


def _pad(torch: Any, node: Node, x: Tensor, *given: Tensor | None) -> Tensor:
    pads, value, axes = (*given, None, None, None)[:3]
    chosen = range(x.dim()) if axes is None else [int(axis) % x.dim() for axis in axes]
    widths = node.listed("pads", pads) or []
    n, both = len(widths) // 2, [0] * (2 * x.dim())
    for i, axis in enumerate(chosen):
        last_first = 2 * (x.dim() - 1 - axis)
        both[last_first], both[last_first + 1] = widths[i], widths[i + n]
    mode = node.get("mode", "constant")
    if mode == "constant":
        return torch.nn.functional.pad(x, both, value=node.get("value", 0.0) if value is None else value.item())
    if any(both[4:]) or mode not in ("reflect", "edge"):
        raise ValueError(f"Pad with mode={mode!r} on these axes cannot be differentiated here")
    return torch.nn.functional.pad(x, both[:4], mode={"reflect": "reflect", "edge": "replicate"}[mode])


def _tile(torch: Any, node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat([int(count) for count in repeats])


def _constant(torch: Any, node: Node) -> Tensor:
    ((name, value),) = node.attributes.items()
    if name == "value":
        return tensor_of(torch, value)
    if name not in ("value_float", "value_floats", "value_int", "value_ints"):
        raise ValueError(f"Constant with {name} cannot be differentiated here")
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


def _constant_of_shape(torch: Any, node: Node, shape: Tensor) -> Tensor:
    value = node.get("value")
    filled = torch.zeros(1) if value is None else tensor_of(torch, value)
    return filled.expand([int(size) for size in shape])


def _range(torch: Any, node: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _trilu(torch: Any, node: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if node.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))


def _identity(torch: Any, node: Node, x: Tensor) -> Tensor:
    return x


def _dropout(torch: Any, node: Node, x: Tensor, *further: Tensor) -> Tensor:
    if len(further) == 2 and bool(further[1]):
        raise ValueError("Dropout with training_mode=True cannot be differentiated here")
    return x


_NAMED = {
    "Abs": "abs", "Acos": "acos", "Acosh": "acosh", "Add": "add", "And": "logical_and", "Asin": "asin",
    "Asinh": "asinh", "Atan": "atan", "Atanh": "atanh", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Equal": "eq",
    "Erf": "erf", "Exp": "exp", "Floor": "floor", "Greater": "gt", "GreaterOrEqual": "ge", "IsNaN": "isnan",
    "Less": "lt", "LessOrEqual": "le", "Log": "log", "MatMul": "matmul", "Mul": "mul", "Neg": "neg",
    "Not": "logical_not", "Or": "logical_or", "Reciprocal": "reciprocal", "Round": "round", "Sigmoid": "sigmoid",
    "Sign": "sign", "Sin": "sin", "Sinh": "sinh", "Sqrt": "sqrt", "Sub": "sub", "Tan": "tan", "Tanh": "tanh",
    "Where": "where", "Xor": "logical_xor",
}  # fmt: skip
"""Functions of torch's own that mean the same."""

SEVERAL_OUTPUTS = ("LayerNormalization", "Split")
"""Operators of which more than the first output is computed."""

OPERATORS: dict[str, Operator] = {
    **{name: _named(function) for name, function in _NAMED.items()},
    "Celu": _functional("celu", alpha=1.0),
    "Elu": _functional("elu", alpha=1.0),
    "HardSwish": _functional("hardswish"),
    "LeakyRelu": _functional("leaky_relu", alpha=0.01),
    "Mish": _functional("mish"),
    "Relu": _functional("relu"),
    "Softplus": _functional("softplus"),
    "Softsign": _functional("softsign"),
    "Max": _folded("maximum"),
    "Min": _folded("minimum"),
    "Sum": _folded("add"),
    "Mean": _mean,
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Cast": _cast,
    "Clip": _clip,
    "PRelu": _prelu,
    "HardSigmoid": _hard_sigmoid,
    "Selu": _selu,
    "Gelu": _gelu,
    "ThresholdedRelu": _thresholded_relu,
    "ai.onnx.ml::Scaler": _scaler,
    "ReduceSum": _reduction(lambda torch, x, axes, keep: x.sum(axes, keepdim=keep)),
    "ReduceMean": _reduction(lambda torch, x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMax": _reduction(lambda torch, x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduction(lambda torch, x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceL1": _reduction(lambda torch, x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduction(lambda torch, x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceSumSquare": _reduction(lambda torch, x, axes, keep: (x * x).sum(axes, keepdim=keep)),
    "ReduceLogSum": _reduction(lambda torch, x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _reduction(lambda torch, x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ArgMax": _best("argmax"),
    "ArgMin": _best("argmin"),
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "CumSum": _cumsum,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm,
    "LRN": _lrn,
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("amax"),
    "Shape": _shape,
    "Size": lambda torch, node, x: torch.tensor(x.numel()),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Tile": _tile,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Trilu": _trilu,
    "Identity": _identity,
    "Dropout": _dropout,
}
