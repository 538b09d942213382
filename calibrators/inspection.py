"""Where a classifier's logits and features are, read from its graph.

Calibrators work on logits, deployed models mostly give probabilities. In between stands a softmax or a sigmoid, as one
node or spelled out; its input is what is wanted. `inspect_model` looks back from each output, tries the patterns of
`RULES` from the strongest evidence to the weakest, and says in words what it took and why. Where two outputs are
equally good, or a score could be a logit as well as a probability, it refuses: the caller writes the tensor's name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

Form = Literal["logits", "log_odds", "probabilities", "probability"]

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
UNCHANGED = {"Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "ZipMap", "CastLike"}
"""Operators that pass their first input on, value for value."""

SPREAD = UNCHANGED | {"Expand", "Max", "Clip", "Tile"}
"""What may stand between a row's sum or maximum and its use: broadcasts, and a floor."""

ONNX_ML_CLASSIFIERS = {"TreeEnsembleClassifier", "LinearClassifier", "SVMClassifier"}
MAX_STEPS = 64
"""Bound of every walk through the graph; real chains are shorter than ten."""


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph and how it becomes logits [B, K].

    Attributes
    ----------
    tensor : its name
    form : "logits" [B, K] as it is; "log_odds" [B] or [B, 1], the score s of the second of two classes, logits [0, s];
        "probabilities" [B, K], their logarithm; "probability" [B] or [B, 1] of the second of two classes, likewise
    reason : why it was taken, in words
    """

    tensor: str
    form: Form
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What was found in a graph.

    Attributes
    ----------
    output : the model's output that gives the class scores
    logits : where the logits are
    features : tensor that enters the last dense layer before the logits, None if there is none
    features_reason : why, in words
    n_classes : None if the graph does not tell
    """

    output: str
    logits: Tap
    features: str | None
    features_reason: str
    n_classes: int | None


def inspect_model(
    model: onnx.ModelProto,
    *,
    logits: str | None = None,
    log_odds: str | None = None,
    probabilities: str | None = None,
    probability: str | None = None,
    features: str | None = None,
) -> Inspection:
    """Find the logits and the features of a classifier.

    Parameters
    ----------
    model : the ONNX model, not modified
    logits, log_odds, probabilities, probability : name of the tensor to take, by its form (see `Tap`); at most one
    features : name of the tensor to take

    Raises
    ------
    ValueError
        if a named tensor does not exist, no output is a classifier's, or several are equally good; says what to write
    """
    graph = _View(model)
    forms: dict[Form, str | None] = {
        "logits": logits,
        "log_odds": log_odds,
        "probabilities": probabilities,
        "probability": probability,
    }
    named = {form: tensor for form, tensor in forms.items() if tensor is not None}
    if len(named) > 1:
        raise ValueError(f"at most one of {', '.join(forms)} may be named, got {', '.join(named)}")
    for tensor in (*named.values(), features):
        graph.check_exists(tensor)
    if named:
        ((form, tensor),) = named.items()
        output, tap = tensor, Tap(tensor, form, "it was named")
    else:
        output, tap = _best_output(graph)
    feature, why = (features, "it was named") if features is not None else _features(graph, tap)
    return Inspection(output, tap, feature, why, _count_classes(graph, output, tap))


class _View:
    """A graph to walk back through: who makes a tensor, its shape, its value if it is constant."""

    def __init__(self, model: onnx.ModelProto) -> None:
        try:
            graph = shape_inference.infer_shapes(model).graph
        except (shape_inference.InferenceError, RuntimeError, ValueError, TypeError):  # an operator it does not know
            graph = model.graph
        self.outputs = list(graph.output)
        self.opset = max(
            (int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1
        )
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._values = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t

    def check_exists(self, tensor: str | None) -> None:
        names = {*self._makers, *self._values}
        if tensor is not None and tensor not in names:
            near = difflib.get_close_matches(tensor, names, n=3, cutoff=0.5)
            raise ValueError(f"the graph has no tensor {tensor!r}" + (f"; near it: {', '.join(near)}" if near else ""))

    def maker(self, tensor: str, *, through: set[str]) -> onnx.NodeProto | None:
        """The node that makes a tensor, looking through nodes that pass it on."""
        node = self._makers.get(tensor)
        for _ in range(MAX_STEPS):
            if node is None or node.op_type not in through:
                return node
            node = self._makers.get(node.input[0])
        return None

    def made_from(self, tensor: str, op: str, *, through: set[str] = UNCHANGED) -> onnx.NodeProto | None:
        """The node of operator `op` behind a tensor, None if another one is there."""
        node = self.maker(tensor, through=through)
        return node if node is not None and node.op_type == op else None

    def any_input_from(self, tensor: str, op: str) -> onnx.NodeProto | None:
        """Like `made_from` through SPREAD, where the wanted one may be any input (Max has it first or second)."""
        waiting = [tensor]
        for _ in range(MAX_STEPS):
            if not waiting:
                break
            node = self._makers.get(waiting.pop())
            if node is not None and node.op_type == op:
                return node
            if node is not None and node.op_type in SPREAD:
                waiting.extend(node.input)
        return None

    def constant(self, tensor: str) -> np.ndarray[Any, Any] | None:
        found = self._constants.get(tensor)
        return None if found is None else numpy_helper.to_array(found)

    def dims(self, tensor: str) -> list[int | None] | None:
        """The shape, None for a size that is not fixed; None if the rank is not known."""
        if tensor in self._constants:
            return [int(size) for size in self._constants[tensor].dims]
        kind = self._values.get(tensor)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        return [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim]

    def width(self, tensor: str) -> int | None:
        """Columns: the last dimension of [B, K], 1 for [B]; None if not known."""
        dims = self.dims(tensor)
        if dims is None:
            node = self.maker(tensor, through=UNCHANGED | {"Sigmoid", "Softmax", "Add"})
            return self.dense_width(node) if node is not None else None
        if len(dims) == 1:
            return 1
        return dims[-1] if dims and dims[-1] is not None else self._width_behind(tensor)

    def _width_behind(self, tensor: str) -> int | None:
        node = self.maker(tensor, through={*UNCHANGED, "Sigmoid", "Softmax", "LogSoftmax", "Add"})
        return None if node is None else self.dense_width(node)

    def dense_width(self, node: onnx.NodeProto) -> int | None:
        """Columns that a MatMul or Gemm gives, by its constant weights."""
        if node.op_type not in {"MatMul", "Gemm"}:
            return None
        weights = self.dims(node.input[1])
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        return None if not weights or len(weights) != 2 else weights[0 if transposed else 1]

    def is_row_wise(self, output: onnx.ValueInfoProto) -> bool:
        """Whether an output may be class scores, a row for each sample: floats of rank 1 or 2, or ZipMap's maps."""
        if output.type.HasField("sequence_type"):
            return True
        if output.type.tensor_type.elem_type not in FLOATS:
            return False
        dims = self.dims(output.name)
        return dims is None or len(dims) in (1, 2)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


class _NotAClassifierError(Exception):
    """Why an output that a rule matched is no classifier's."""


def _softmax(graph: _View, output: str) -> Tap | None:
    node = graph.maker(output, through=UNCHANGED)
    if node is None or node.op_type not in {"Softmax", "LogSoftmax"}:
        return None
    axis = attribute(node, "axis", -1 if graph.opset >= 13 else 1)
    rank = len(graph.dims(node.input[0]) or [0, 0])
    if axis not in (-1, rank - 1) or rank != 2:
        raise _NotAClassifierError(
            f"its {node.op_type} over axis {axis} of rank {rank} is not one over the classes of a row"
        )
    return Tap(node.input[0], "logits", f"it enters the {node.op_type} that makes output {output!r}")


def _spelled_softmax(graph: _View, output: str) -> Tap | None:
    """Exp(x) / ReduceSum(Exp(x)), where x may be z - ReduceMax(z)."""
    division = graph.made_from(output, "Div")
    power = graph.made_from(division.input[0], "Exp") if division else None
    total = graph.any_input_from(division.input[1], "ReduceSum") if division else None
    if power is None or total is None or graph.made_from(total.input[0], "Exp") is not power:
        return None
    why = f"it enters the softmax spelled out as Exp, ReduceSum and Div that makes output {output!r}"
    shifted = graph.made_from(power.input[0], "Sub")
    largest = graph.any_input_from(shifted.input[1], "ReduceMax") if shifted else None
    if shifted and largest and largest.input[0] == shifted.input[0]:
        return Tap(shifted.input[0], "logits", f"{why}, before its row's maximum is taken off")
    return Tap(power.input[0], "logits", why)


def _sigmoid(graph: _View, output: str) -> Tap | None:
    node = graph.made_from(output, "Sigmoid")
    if node is None:
        return None
    width = graph.width(node.input[0]) or graph.width(output)
    if width != 1:
        raise _NotAClassifierError(
            f"its Sigmoid over {width or 'an unknown number of'} columns is multi-label: "
            "probabilities of exclusive classes are not defined for it"
        )
    return Tap(node.input[0], "log_odds", f"it enters the Sigmoid that makes output {output!r}: the score of class 1")


def _two_sided_sigmoid(graph: _View, output: str) -> Tap | None:
    """Concat(1 - sigmoid(s), sigmoid(s)), as skl2onnx writes a binary network."""
    both = graph.made_from(output, "Concat")
    if both is None or len(both.input) != 2:
        return None
    positive, rest = graph.made_from(both.input[1], "Sigmoid"), graph.made_from(both.input[0], "Sub")
    one = graph.constant(rest.input[0]) if rest else None
    if positive is None or rest is None or one is None or not np.all(one == 1):
        return None
    if graph.made_from(rest.input[1], "Sigmoid") is not positive:
        return None
    why = f"it enters the Sigmoid whose value p makes output {output!r} as [1 - p, p]: the score of class 1"
    return Tap(positive.input[0], "log_odds", why)


def _classifier_node(graph: _View, output: str) -> Tap | None:
    """ai.onnx.ml: what it gives depends on its post_transform."""
    node = graph.maker(output, through=UNCHANGED)
    if node is None or node.domain != "ai.onnx.ml":
        return None
    if node.op_type == "Normalizer":
        return _logarithm(graph, output, f"a Normalizer makes output {output!r}")
    if node.op_type not in ONNX_ML_CLASSIFIERS:
        return None
    transform = attribute(node, "post_transform", b"NONE").decode()
    if transform != "NONE" or "prob" in output.lower():
        return _logarithm(graph, output, f"a {node.op_type} makes output {output!r}")
    raise _NotAClassifierError(
        f"its {node.op_type} has no post_transform, so its scores may be logits or probabilities: "
        f"write `logits` or `probabilities = {output!r}`"
    )


def _dense(graph: _View, output: str) -> Tap | None:
    """A last dense layer with nothing after it: the output is the logits."""
    node = graph.maker(output, through=UNCHANGED)
    if node is not None and node.op_type == "Add":
        node = _dense_behind(graph, node.output[0])
    if node is None or graph.dense_width(node) is None:
        return None
    why = f"output {output!r} comes straight from a last {node.op_type}: it is not normalised, so it is the logits"
    return Tap(output, "log_odds" if graph.dense_width(node) == 1 else "logits", why)


def _by_name(graph: _View, output: str) -> Tap | None:
    if "logit" in output.lower() and graph.width(output) != 1:
        return Tap(output, "logits", f"output {output!r} is called so")
    if "prob" in output.lower():
        return _logarithm(graph, output, f"output {output!r} is called so, and no softmax is seen before it")
    return None


RULES: tuple[Callable[[_View, str], Tap | None], ...] = (
    _softmax,
    _spelled_softmax,
    _two_sided_sigmoid,
    _sigmoid,
    _classifier_node,
    _dense,
    _by_name,
)
"""Patterns by the strength of their evidence."""


def _logarithm(graph: _View, output: str, why: str) -> Tap:
    node = graph.maker(output, through={"ZipMap"})
    tensor = output if node is None or output in node.output else node.output[-1]
    form: Form = "probability" if graph.width(tensor) == 1 else "probabilities"
    return Tap(tensor, form, f"{why}; it holds probabilities, so their logarithm is used")


def _best_output(graph: _View) -> tuple[str, Tap]:
    """The output with the strongest evidence, and its tap."""
    refused: dict[str, str] = {}
    for rule in RULES:
        found: dict[str, Tap] = {}
        for output in _candidates(graph, refused):
            try:
                tap = rule(graph, output)
            except _NotAClassifierError as error:
                refused[output] = str(error)
                continue
            if tap is not None:
                found[output] = tap
        if len({tap.tensor for tap in found.values()}) > 1:
            names = ", ".join(map(repr, found))
            raise ValueError(
                f"outputs {names} are equally good class scores; write `logits = <tensor>` in calserve.toml"
            )
        if found:
            return next(iter(found.items()))
    outputs = "; ".join(f"{value.name!r}: {refused.get(value.name, _unfit(graph, value))}" for value in graph.outputs)
    raise ValueError(f"no output is seen to be a classifier's ({outputs}); write `logits = <tensor>` in calserve.toml")


def _candidates(graph: _View, refused: dict[str, str]) -> Iterator[str]:
    return (value.name for value in graph.outputs if graph.is_row_wise(value) and value.name not in refused)


def _unfit(graph: _View, output: onnx.ValueInfoProto) -> str:
    if not graph.is_row_wise(output):
        return "not floating-point scores of rank 1 or 2"
    node = graph.maker(output.name, through=UNCHANGED)
    return f"made by {node.op_type}, no softmax, sigmoid or last dense layer" if node else "an input of the graph"


def _features(graph: _View, tap: Tap) -> tuple[str | None, str]:
    node = _dense_behind(graph, tap.tensor)
    if node is None:
        return None, "no dense layer makes the logits"
    return node.input[0], f"it enters the {node.op_type} that makes the logits"


def _dense_behind(graph: _View, tensor: str) -> onnx.NodeProto | None:
    """The MatMul or Gemm behind a tensor, looking through biases."""
    waiting = [tensor]
    for _ in range(MAX_STEPS):
        if not waiting:
            break
        node = graph.maker(waiting.pop(), through=UNCHANGED)
        if node is not None and node.op_type in {"MatMul", "Gemm"}:
            return node
        if node is not None and node.op_type in {"Add", "Sub", "Mul", "Div", "BatchNormalization", "Clip"}:
            waiting.extend(name for name in reversed(node.input[:2]) if graph.constant(name) is None)
    return None


def _count_classes(graph: _View, output: str, tap: Tap) -> int | None:
    if tap.form in {"log_odds", "probability"}:
        return 2
    dense = _dense_behind(graph, tap.tensor)
    widths = (graph.width(tap.tensor), graph.width(output), graph.dense_width(dense) if dense else None)
    return next((width for width in widths if width), None)
