"""Where a classifier's logits and features are, read from its graph alone.

Calibration needs scores before the softmax. A deployed model shows its outputs, mostly probabilities, so the graph is
walked from each output back to what made it, and `RULES` is asked in order. A rule names the tensor to tap and the
form it has; the forms, with s and p one number a row, become logits z [B, K] so that softmax(z) is the model's answer:

    logits          z = the tensor                softmax does not change when a row is shifted, so the input of any
                                                  Softmax, LogSoftmax or exp / sum of exp will do
    log_odds        z = [0, s]                    softmax([0, s]) = [1 - sigmoid(s), sigmoid(s)]
    probabilities   z = log p                     softmax(log p) = p / sum(p), exact but for what underflowed to 0
    probability     z = [log(1 - p), log p]

The operators' meaning is that of the ONNX specification (Operators.md, Operators-ml.md); where it leaves a choice, of
onnxruntime. Nothing is run here, and no number of a weight decides but for the leaves of trees without post_transform.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

Form = Literal["logits", "log_odds", "probabilities", "probability"]

Shape: TypeAlias = tuple[int | None, ...]
"""Dimensions; None where a name or nothing stands for the number."""


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph and how it becomes logits [B, K].

    Attributes
    ----------
    tensor : name of a floating-point tensor of the main graph
    form : `logits` and `probabilities` are [B, K]; `log_odds` and `probability` (of class 1) are [B] or [B, 1]
    reason : in words, why this tensor
    """

    tensor: str
    form: Form
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What was found in a graph.

    Attributes
    ----------
    output : the model's output that the tap belongs to; the tapped tensor itself where no output depends on it
    logits : where the logits come from
    features : name of the tensor [B, D] that the last dense layer reads, None if there is no such layer
    features_reason : in words, why this tensor or why none
    n_classes : K, None where neither a shape nor a weight tells it
    layers : names of the tensors that calibrators are to read as layers, none unless the caller names them
    """

    output: str
    logits: Tap
    features: str | None
    features_reason: str
    n_classes: int | None
    layers: tuple[str, ...] = ()


def inspect_model(
    model: onnx.ModelProto,
    *,
    logits: str | None = None,
    log_odds: str | None = None,
    probabilities: str | None = None,
    probability: str | None = None,
    features: str | None = None,
    layers: Sequence[str] = (),
) -> Inspection:
    """Find the logits, the features and the number of classes of a classifier.

    Parameters
    ----------
    model : not modified
    logits, log_odds, probabilities, probability : name of the tensor to tap, and thereby its form; at most one
    features : name of the tensor of the features
    layers : names of the tensors that calibrators are to read as layers (`calibrators.layers`)

    Raises
    ------
    ValueError
        if a named tensor does not exist or cannot have its form, or nothing is named and no output, or more than one
        in the same way, is a classifier's

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["": 17]>
    ...     linear (float[N, 2] x) => (float[N, 3] scores) <float[2, 3] weights = {1, 0, 0, 0, 1, 0}> {
    ...         z = MatMul (x, weights)
    ...         scores = Softmax (z)
    ...     }''')
    >>> found = inspect_model(model)
    >>> found.logits.tensor, found.logits.form, found.features, found.n_classes
    ('z', 'logits', 'x', 3)
    >>> found.logits.reason
    "it enters the Softmax that makes 'scores'"
    """
    view = View(model)
    forms: dict[Form, str | None] = dict(
        zip(get_args(Form), (logits, log_odds, probabilities, probability), strict=True)
    )
    named = [(form, tensor) for form, tensor in forms.items() if tensor is not None]
    if len(named) > 1:
        got = ", ".join(f"{form} = {tensor!r}" for form, tensor in named)
        raise ValueError(f"at most one of {', '.join(forms)} may be named, got {got}")
    output, tap = _named_tap(view, *named[0]) if named else _strongest(view)
    layer = _last_layer(view, tap.tensor)
    found, reason = _find_features(view, tap.tensor, layer) if features is None else _named_features(view, features)
    for name in layers:
        _check_exists(view, "layers", name)
    return Inspection(output, tap, found, reason, _n_classes(view, output, tap, layer), tuple(layers))


# --- The graph, indexed for walking from its outputs to its inputs. --------------------------------------------------

_KEEPS_VALUES = {"Identity", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear"}
"""Each number stays what it is, up to rounding."""

_KEEPS_ROWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
"""May move the border between rows: harmless where a row has as many numbers before as after."""


class View:
    """A model's main graph by the names of its tensors.

    Attributes
    ----------
    outputs : the model's outputs -> the tensor that each shows, which differs behind a ZipMap
    producers : tensor -> the node that makes it; inputs and initializers have none
    consumers : tensor -> the nodes that read it, themselves or in a subgraph
    constants : tensors whose value does not depend on the model's inputs
    shapes, types : tensor -> what is declared or inferred, where anything is
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.opset = max((int(e.version) for e in model.opset_import if e.domain in ("", "ai.onnx")), default=1)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.initializers]
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in _reads(node):
                self.consumers.setdefault(name, []).append(node)
        self.constants = _constants(graph)
        self.shapes, self.types = _declared(model)
        self.outputs = {value.name: self._unzipped(value.name) for value in graph.output}

    def source(self, tensor: str) -> onnx.NodeProto | None:
        """The node that computes these numbers, however they were copied, cast or reshaped since."""
        return self.producers.get(self.origin(tensor))

    def made_by(self, tensor: str, *operators: str) -> onnx.NodeProto | None:
        """The source of a tensor if it is one of these operators."""
        node = self.source(tensor)
        return node if operator(node) in operators else None

    def origin(self, tensor: str) -> str:
        """The tensor in which these numbers first appear."""
        for _ in self.producers:  # no chain has more links than the graph has tensors, even in a malformed graph
            node = self.producers.get(tensor)
            if node is None or node.output[0] != tensor or not self._harmless(node):
                return tensor
            tensor = node.input[0]
        return tensor

    def _harmless(self, node: onnx.NodeProto) -> bool:
        if operator(node) in _KEEPS_ROWS:
            before, after = self._declared_width(node.input[0]), self._declared_width(node.output[0])
            return before is None or after is None or before == after
        return operator(node) in _KEEPS_VALUES

    def width(self, tensor: str) -> int | None:
        """Numbers in each row of a tensor, by its shape or by the dense layer that makes it."""
        declared = self._declared_width(tensor)
        if declared is None and (layer := _last_layer(self, tensor)):
            return _layer_width(self, layer)
        return declared

    def _declared_width(self, tensor: str) -> int | None:
        shape = self.shapes.get(tensor)
        if shape is None or None in shape[1:]:
            return None
        return math.prod(n for n in shape[1:] if n is not None)

    def value(self, tensor: str) -> NDArray[Any] | None:
        """The numbers of an initializer or a Constant node that lie in the model file itself, else None."""
        tensor = self.origin(tensor)
        node, stored = self.producers.get(tensor), self.initializers.get(tensor)
        if node is not None and operator(node) == "Constant":
            ((name, value),) = ((entry.name, helper.get_attribute_value(entry)) for entry in node.attribute)
            array = numpy_helper.to_array(value) if name == "value" else np.asarray(value)
            return array if array.dtype.kind in "iuf" else None
        if stored is None or stored.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(stored)

    def reached_from(self, tensor: str) -> Iterator[onnx.NodeProto]:
        """Every node that a tensor has an influence on."""
        waiting, seen = [tensor], {tensor}
        while waiting:
            for node in self.consumers.get(waiting.pop(), ()):
                new = set(node.output) - seen
                seen |= new
                waiting += new
                yield node

    def is_float(self, tensor: str) -> bool:
        return self.types.get(tensor, TensorProto.FLOAT) in _FLOATS

    def shown(self, tensor: str) -> str:
        """A tensor's name, with its shape where that is known, for a message."""
        shape = self.shapes.get(tensor)
        return f"{tensor!r}" if shape is None else f"{tensor!r} [{', '.join(str(n or '?') for n in shape)}]"

    def _unzipped(self, output: str) -> str:
        """The rows [B, K] in front of a ZipMap, whose list of class labels tells K."""
        node = self.producers.get(output)
        if node is None or operator(node) != "ai.onnx.ml.ZipMap":
            return output
        if self._declared_width(node.input[0]) is None:
            self.shapes[node.input[0]] = (None, len(_class_labels(node)))
        return node.input[0]


def operator(node: onnx.NodeProto | None) -> str:
    """A node's operator, with its domain unless that is ONNX's own; empty for no node."""
    if node is None:
        return ""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, strings decoded."""
    for entry in node.attribute:
        if entry.name == name:
            value = helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    single = [entry.g for entry in node.attribute if entry.type == onnx.AttributeProto.GRAPH]
    return single + [graph for entry in node.attribute for graph in entry.graphs]


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those among them that a subgraph takes from around it."""
    inner = (_reads(child) for graph in _subgraphs(node) for child in graph.node)
    return set(node.input).union(*inner) - {""}


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Initializers, and what nodes make of them alone (a transposed or dequantised weight)."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in the order of computation, as the format demands
        read = _reads(node)
        if read <= known and (read or operator(node) == "Constant"):
            known.update(node.output)
    return known


def _declared(model: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Shapes and element types of tensors, inferred as far as ONNX can."""
    with contextlib.suppress(shape_inference.InferenceError, ValueError, TypeError):  # then what the file declares
        model = shape_inference.infer_shapes(model, data_prop=True)
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    types = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = int(kind.elem_type)
        if kind.HasField("shape"):
            dims = kind.shape.dim
            shapes[value.name] = tuple(int(dim.dim_value) if dim.HasField("dim_value") else None for dim in dims)
    return shapes, types


# --- The last dense layer. -------------------------------------------------------------------------------------------

_AFFINE = {"Add", "Sub", "Mul", "Div"}
_LAYERS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "QLinearMatMul", "LSTM", "GRU", "RNN"}
"""What a network goes on with after its features."""


def _last_layer(view: View, tensor: str) -> onnx.NodeProto | None:
    """The MatMul or Gemm with constant weights that a tensor comes from by copies and affine steps alone."""
    for _ in view.producers:
        node = view.source(tensor)
        if node is None:
            return None
        if operator(node) in ("MatMul", "Gemm"):
            return node if node.input[1] in view.constants else None
        before = _before_affine(view, node)
        if before is None:
            return None
        tensor = before
    return None


def _before_affine(view: View, node: onnx.NodeProto) -> str | None:
    """What a bias, a scale or a batch normalisation is applied to; None for any other node."""
    if operator(node) == "BatchNormalization":
        return node.input[0]
    computed = [name for name in node.input if name not in view.constants]
    return computed[0] if operator(node) in _AFFINE and len(computed) == 1 else None


def _layer_width(view: View, layer: onnx.NodeProto) -> int | None:
    """Columns of a dense layer's result: those of its weights."""
    shape = view.shapes.get(layer.input[1])
    if shape is None or len(shape) != 2:
        return None
    return shape[0] if attribute(layer, "transB", 0) else shape[1]


def _find_features(view: View, tensor: str, layer: onnx.NodeProto | None) -> tuple[str | None, str]:
    if layer is None:
        return None, f"{tensor!r} {_source_in_words(view, tensor)}, not from a MatMul or Gemm with constant weights"
    features = layer.input[0]
    if problem := _not_rows(view, features):
        return None, f"the last {layer.op_type} reads {problem}"
    if attribute(layer, "transA", 0):
        return None, f"the last {layer.op_type} reads {features!r} transposed, [D, B]"
    return features, f"the last {layer.op_type} before {tensor!r} reads it"


def _named_features(view: View, features: str) -> tuple[str, str]:
    _check_exists(view, "features", features)
    if problem := _not_rows(view, features):
        raise ValueError(f"features must be rows [B, D], got {problem}")
    return features, "the caller names it"


def _not_rows(view: View, tensor: str) -> str | None:
    """What is wrong with a tensor that ought to be rows of numbers; None if nothing is known to be."""
    shape = view.shapes.get(tensor)
    return None if shape is None or len(shape) == 2 else f"{view.shown(tensor)}, which has rank {len(shape)}, not 2"


def _n_classes(view: View, output: str, tap: Tap, layer: onnx.NodeProto | None) -> int | None:
    if tap.form in ("log_odds", "probability"):
        return 2
    shapes = (view.shapes.get(tap.tensor), view.shapes.get(view.outputs.get(output, output)))
    columns = (shape[1] for shape in shapes if shape is not None and len(shape) == 2 and shape[1])
    found = next(columns, None) or (_layer_width(view, layer) if layer else None)
    return found or len(_class_labels(view.source(tap.tensor))) or None


# --- A tensor that the caller names. ---------------------------------------------------------------------------------

_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_NEAR_NAMES = 5


def _named_tap(view: View, form: Form, tensor: str) -> tuple[str, Tap]:
    _check_exists(view, form, tensor)
    if problem := _misfit(view, tensor, form):
        raise ValueError(f"{form} cannot be read from {problem}")
    made = {tensor}.union(*(node.output for node in view.reached_from(tensor)))
    output = next((name for name in view.outputs if name in made), tensor)
    return output, Tap(tensor, form, f"the caller names it as the {form}")


def _check_exists(view: View, key: str, tensor: str) -> None:
    names = [*view.inputs, *view.producers]
    if tensor not in names:
        near = ", ".join(_near(tensor, names)) or "none"
        raise ValueError(f"{key} = {tensor!r}: the model has no such tensor; near names: {near}")
    if not view.is_float(tensor):
        raise ValueError(f"{key} must be floating-point numbers, got {tensor!r} of {_type_in_words(view, tensor)}")


def _near(name: str, names: list[str]) -> list[str]:
    """Names that resemble one or contain it, most alike first."""
    alike = difflib.get_close_matches(name, names, n=_NEAR_NAMES)
    containing = [other for other in names if name.lower() in other.lower() and other not in alike]
    return [repr(other) for other in [*alike, *containing][:_NEAR_NAMES]]


def _misfit(view: View, tensor: str, form: Form) -> str | None:
    """What in a tensor's shape contradicts a form; None if nothing is known to."""
    if form in ("log_odds", "probability"):
        many = (view.width(tensor) or 1) > 1
        return f"{view.shown(tensor)}, which has more than the one number a row that a {form} is" if many else None
    single = view.width(tensor) == 1
    return _not_rows(view, tensor) or (f"{view.shown(tensor)}, which has a single column" if single else None)


def _type_in_words(view: View, tensor: str) -> str:
    return f"type {TensorProto.DataType.Name(view.types[tensor])}"


# --- A tensor that the graph shows. ----------------------------------------------------------------------------------

Verdict: TypeAlias = Tap | str | None
"""What a rule says of an output: the tap; that this is the rule's case and yet no classifier, and why; or nothing."""

_NAME_IT = 'write `logits = "<tensor>"` in calserve.toml'


def _strongest(view: View) -> tuple[str, Tap]:
    """The output with the strongest evidence, and its tap."""
    verdicts = {output: _judge(view, tensor) for output, tensor in view.outputs.items()}
    taps = [(strength, output, tap) for output, (strength, tap) in verdicts.items() if isinstance(tap, Tap)]
    if not taps:
        reasons = "; ".join(f"output {output!r} {reason}" for output, (_, reason) in verdicts.items())
        raise ValueError(f"no output is a classifier's: {reasons}. If a tensor holds the logits, {_NAME_IT}")
    strongest = max(strength for strength, _, _ in taps)
    equals = {view.origin(tap.tensor): (output, tap) for strength, output, tap in taps if strength == strongest}
    if len(equals) > 1:
        claims = "; or ".join(f"{tap.tensor!r}, because {tap.reason}" for _, tap in equals.values())
        raise ValueError(f"several tensors are equally good logits: {claims}. To choose, {_NAME_IT}")
    ((output, tap),) = equals.values()
    return output, tap


def _judge(view: View, tensor: str) -> tuple[int, Tap | str]:
    """The first verdict of the rules on an output, and its rule's strength."""
    origin = view.origin(tensor)
    if not view.is_float(origin):
        return 0, f"is of {_type_in_words(view, origin)}"
    for strength, rule in RULES:
        verdict = rule(view, tensor)
        if isinstance(verdict, Tap) and (problem := _misfit(view, verdict.tensor, verdict.form)):
            return strength, f"would have its {verdict.form} in {problem}"
        if verdict is not None:
            return strength, verdict
    return 0, _source_in_words(view, tensor)


def _source_in_words(view: View, tensor: str) -> str:
    node = view.source(tensor)
    return f"comes from {operator(node)}" if node is not None else "is an input or a constant of the model"


# Softmax.

_UNDONE_BY = {"Log": "Softmax", "Exp": "LogSoftmax"}


def _softmax_operator(view: View, tensor: str) -> Verdict:
    """Softmax or LogSoftmax over the last axis; or Log of the one, Exp of the other.

    Up to opset 12 the default axis is 1, and the axes from there on are taken together; since 13 it is the last. For
    rows [B, K] both are the same.
    """
    node = view.made_by(tensor, "Softmax", "LogSoftmax")
    if wrapper := view.made_by(tensor, *_UNDONE_BY):
        node = view.made_by(wrapper.input[0], _UNDONE_BY[wrapper.op_type])
    if node is None:
        return None
    z = node.input[0]
    axis = attribute(node, "axis", 1 if view.opset < 13 else -1)
    if not _is_last_axis(view, z, axis):
        return f"is a {node.op_type} over axis {axis} of {view.shown(z)}, not over the columns of rows [B, K]"
    return Tap(z, "logits", f"it enters the {node.op_type} that makes {tensor!r}")


def _softmax_division(view: View, tensor: str) -> Verdict:
    """exp(z - m) / sum exp(z - m) in Exp, ReduceSum, Div, as jax2tf writes it; m is each row's maximum, or left out."""
    division = view.made_by(tensor, "Div")
    exponential = view.made_by(division.input[0], "Exp") if division else None
    if not division or not exponential or _reduced(view, division.input[1], "ReduceSum") != exponential.output[0]:
        return None
    z = _before_shift(view, exponential.input[0])
    return Tap(z, "logits", f"it enters the softmax, written as Exp, ReduceSum and Div, that makes {tensor!r}")


def _softmax_difference(view: View, tensor: str) -> Verdict:
    """z - log sum exp(z) in Sub and ReduceLogSumExp, or Exp of it, as skl2onnx writes naive Bayes."""
    exponential = view.made_by(tensor, "Exp")
    difference = view.made_by(exponential.input[0] if exponential else tensor, "Sub")
    if not difference or _reduced(view, difference.input[1], "ReduceLogSumExp") != view.origin(difference.input[0]):
        return None
    reason = f"it enters the log-softmax, written as Sub and ReduceLogSumExp, that makes {tensor!r}"
    return Tap(difference.input[0], "logits", reason)


def _before_shift(view: View, tensor: str) -> str:
    """z, if a tensor is z less each row's maximum; else the tensor itself."""
    shift = view.made_by(tensor, "Sub")
    if shift and _reduced(view, shift.input[1], "ReduceMax") == view.origin(shift.input[0]):
        return shift.input[0]
    return tensor


_GUARDS = {"ReduceMax": math.inf, "ReduceSum": 1e-6}
"""Largest c for which max(c, reduction) leaves a softmax: any shift of a row does, a sum may be kept from zero."""


def _reduced(view: View, tensor: str, reduction: str) -> str | None:
    """Origin of the rows whose reduction a tensor holds, as a column, guarded, or repeated over the columns."""
    for _ in view.producers:
        node = view.made_by(tensor, reduction, "Expand", "Max")
        if node is None:
            return None
        if node.op_type == reduction:
            return view.origin(node.input[0]) if _is_over_last_axis(view, node) else None
        before = node.input[0] if node.op_type == "Expand" else _guarded(view, node, _GUARDS.get(reduction, -math.inf))
        if before is None:
            return None
        tensor = before
    return None


def _guarded(view: View, node: onnx.NodeProto, limit: float) -> str | None:
    """What a Max keeps from falling below a constant, if the constant is not above the limit."""
    values = {name: view.value(name) for name in node.input}
    others = [name for name, value in values.items() if value is None]
    if len(others) != 1 or any(value is not None and np.any(value > limit) for value in values.values()):
        return None
    return others[0]


def _is_over_last_axis(view: View, reduction: onnx.NodeProto) -> bool:
    """Whether a reduction's axes, an attribute in older opsets and an input in newer ones, are the last one alone."""
    axes = attribute(reduction, "axes")
    if axes is None and len(reduction.input) > 1:
        axes = view.value(reduction.input[1])
    return axes is not None and np.size(axes) == 1 and _is_last_axis(view, reduction.input[0], int(np.ravel(axes)[0]))


def _is_last_axis(view: View, tensor: str, axis: int) -> bool:
    """Whether an axis is a tensor's last; a tensor of unknown rank is taken to be rows [B, K]."""
    shape = view.shapes.get(tensor)
    return axis in (-1, 1 if shape is None else len(shape) - 1)


# Sigmoid.

_MULTI_LABEL = "multi-label, for which calibrated class probabilities are not defined"


def _sigmoid(view: View, tensor: str) -> Verdict:
    """Sigmoid of one score a row. Over more columns each class has its own yes or no, and no row is a distribution."""
    node = view.made_by(tensor, "Sigmoid")
    if node is None:
        return None
    score = node.input[0]
    width = view.width(score)
    if width is None:
        return f"is a Sigmoid of {score!r}, whose width is unknown; if it is 1, write `log_odds = {score!r}`"
    if width > 1:
        return f"is a Sigmoid of {view.shown(score)}: {_MULTI_LABEL}"
    return Tap(score, "log_odds", f"it enters the Sigmoid, of one score a row, that makes {tensor!r}")


def _sigmoid_pair(view: View, tensor: str) -> Verdict:
    """Columns [1 - sigmoid(s), sigmoid(s)], as skl2onnx writes a binary MLP."""
    pair = view.made_by(tensor, "Concat")
    if pair is None or len(pair.input) != 2 or not _is_last_axis(view, pair.output[0], attribute(pair, "axis")):
        return None
    rest, sigmoid = view.made_by(pair.input[0], "Sub"), view.made_by(pair.input[1], "Sigmoid")
    if not rest or not sigmoid or view.origin(rest.input[1]) != sigmoid.output[0]:
        return None
    one = view.value(rest.input[0])
    if one is None or np.any(one != 1):
        return None
    reason = f"it enters the Sigmoid that makes, with its complement to one, {tensor!r}"
    return Tap(sigmoid.input[0], "log_odds", reason)


# Probabilities whose logits the graph does not show.

_TREES, _LINEAR, _SVM = (f"ai.onnx.ml.{name}Classifier" for name in ("TreeEnsemble", "Linear", "SVM"))
_LOGARITHM = "the graph does not show its logits, so the logarithm of the probabilities is used"


def _classifier_operator(view: View, tensor: str) -> Verdict:
    """The second output of an ai.onnx.ml classifier: probabilities or scores, by post_transform."""
    node, origin = view.made_by(tensor, _TREES, _LINEAR, _SVM), view.origin(tensor)
    if node is None or origin == node.output[0]:
        return None
    found = f"{node.op_type} with post_transform {_transform(node)}"
    if _gives_probabilities(node):
        return Tap(origin, "probabilities", f"{found} makes it; {_LOGARITHM}")
    if _transform(node) != "NONE" or operator(node) == _SVM or _is_one_score_for_two(node):
        return f"comes from {found}, whose numbers here are neither probabilities nor logits"
    return Tap(origin, "logits", f"it holds the scores of {found}")


def _transform(classifier: onnx.NodeProto) -> str:
    return str(attribute(classifier, "post_transform", "NONE"))


def _gives_probabilities(classifier: onnx.NodeProto) -> bool:
    """Whether an ai.onnx.ml classifier's scores are probabilities of the classes.

    A forest averages the class frequencies of its leaves without a transform; an SVM has Platt's where it has prob_a.
    """
    if operator(classifier) == _SVM:
        return _transform(classifier) == "NONE" and bool(attribute(classifier, "prob_a"))
    match _transform(classifier):
        case "LOGISTIC":
            return True
        case "SOFTMAX" | "SOFTMAX_ZERO":
            return not _is_one_score_for_two(classifier)
        case "NONE":
            return operator(classifier) == _TREES and _leaves_are_frequencies(classifier)
    return False


def _is_one_score_for_two(classifier: onnx.NodeProto) -> bool:
    """Whether two classes share one score s. The runtime sets 1 - s or -s beside it; LOGISTIC alone transforms both."""
    scores = attribute(classifier, "intercepts") or set(attribute(classifier, "class_ids", ()))
    return len(scores) == 1 and len(_class_labels(classifier)) == 2


def _class_labels(node: onnx.NodeProto | None) -> list[Any]:
    """The class labels that a classifier or a ZipMap lists; none for any other node."""
    names = ("classlabels_ints", "classlabels_int64s", "classlabels_strings")
    found = [attribute(node, name) for name in names] if node is not None else []
    return next((list(labels) for labels in found if labels), [])


_LEAF_ROUNDING = 1e-3
"""How far the leaves' frequencies, written as float32 shares of each tree, may add up to more than one."""


def _leaves_are_frequencies(trees: onnx.NodeProto) -> bool:
    """Whether no leaf is negative and no choice of a leaf from each tree adds up to more than one."""
    stored = attribute(trees, "class_weights_as_tensor")
    weights = np.asarray(attribute(trees, "class_weights", ()) if stored is None else numpy_helper.to_array(stored))
    shifted = attribute(trees, "base_values") or attribute(trees, "base_values_as_tensor")
    if shifted or not weights.size or weights.min() < 0:
        return False
    keys = np.stack([attribute(trees, "class_treeids"), attribute(trees, "class_nodeids")], axis=1)
    leaves, leaf = np.unique(keys, axis=0, return_inverse=True)
    tree = np.unique(leaves[:, 0], return_inverse=True)[1]
    largest = np.zeros(len(leaves))
    np.maximum.at(largest, tree, np.bincount(leaf.ravel(), weights))
    return bool(largest.sum() <= 1 + _LEAF_ROUNDING)


def _normaliser(view: View, tensor: str) -> Verdict:
    """Rows divided by their sum, if none of it is negative: Normalizer or LpNormalization with the 1-norm."""
    node = view.made_by(tensor, "ai.onnx.ml.Normalizer", "LpNormalization")
    if node is None or (attribute(node, "norm"), attribute(node, "p")) not in (("L1", None), (None, 1)):
        return None
    if signed := _signed_source(view, node.input[0]):
        return f"is a {node.op_type} of numbers that may be negative: they come from {signed}"
    return Tap(view.origin(tensor), "probabilities", f"{node.op_type} makes its rows sum to one; {_LOGARITHM}")


# A dense layer and a name.


def _dense_layer(view: View, tensor: str) -> Verdict:
    """The result of the last MatMul or Gemm, biased or scaled, as it is."""
    layer = _last_layer(view, tensor)
    if layer is None:
        return None
    later = {operator(node) for node in view.reached_from(view.origin(tensor))}
    if onward := later & _LAYERS:
        return f"is a feature, not a result: {' and '.join(sorted(onward))} follow it"
    single = view.width(tensor) == 1
    if "Sigmoid" in later and not single:
        return f"enters a Sigmoid: {_MULTI_LABEL}"
    reason = f"it is the result of the last {layer.op_type}, with no normalisation after it"
    if single:
        return Tap(tensor, "log_odds", f"{reason}: one score a row, though a regression would look the same")
    return Tap(tensor, "logits", reason)


_LARGEST = ("ReduceMax", "TopK", "Max", "GatherElements")


def _name(view: View, tensor: str) -> Verdict:
    """An output called probabilities, if nothing in the graph contradicts it."""
    names = {tensor, *(output for output, shown in view.outputs.items() if shown == tensor)}
    if not any("prob" in name.lower() for name in names) or view.source(tensor) is None:
        return None
    if view.made_by(tensor, *_LARGEST):
        return f"{_source_in_words(view, tensor)}: the probability of whichever class is the likeliest"
    if signed := _signed_source(view, tensor):
        return f"is named like probabilities, but may be negative: it comes from {signed}"
    width = view.width(tensor)
    if width is None:
        return "is named like probabilities, but its width is unknown; write it as `probabilities` or `probability`"
    form: Form = "probability" if width == 1 else "probabilities"
    return Tap(tensor, form, f"it is named like probabilities; {_LOGARITHM}")


_MIXING = {"Sum", "Mean", "Neg", "ReduceMean", "ReduceSum", "Concat", "Split", "Slice", "Gather", "Transpose", "Expand"}
_MIXING |= {*_AFFINE, *_KEEPS_VALUES, *_KEEPS_ROWS, "ai.onnx.ml.ArrayFeatureExtractor"}
"""Their result is negative only if an operand may be, differences taken as those of probabilities (1 - p)."""

_SCORERS = {f"ai.onnx.ml.{name}" for name in ("TreeEnsembleRegressor", "LinearRegressor", "SVMRegressor", "Scaler")}


def _signed_source(view: View, tensor: str) -> str | None:
    """Something that may be negative and that a tensor is a mixture of; an unknown operator is trusted.

    skl2onnx names the scores of an SVM `probabilities`, too; their logarithm would be nonsense.
    """
    waiting, seen = [tensor], {tensor}
    while waiting:
        name = waiting.pop()
        node = view.producers.get(name)
        if node is None:
            return f"input {name!r}"
        kind = operator(node)
        if kind in _LAYERS | _SCORERS or (kind in (_TREES, _LINEAR, _SVM) and not _gives_probabilities(node)):
            return kind
        if kind in _MIXING:
            new = set(node.input) - seen - view.constants - {""}
            seen |= new
            waiting += new
    return None


RULES: tuple[tuple[int, Callable[[View, str], Verdict]], ...] = (
    (4, _softmax_operator),
    (4, _softmax_division),
    (4, _softmax_difference),
    (3, _sigmoid),
    (3, _sigmoid_pair),
    (2, _classifier_operator),
    (2, _normaliser),
    (1, _dense_layer),
    (2, _name),
)
"""The strength of the evidence and the rule, in the order of asking; an output is what the first verdict says.

A name is asked last, for what nothing in the graph explains, and outweighs another output's dense layer, which may be
an embedding.
"""
