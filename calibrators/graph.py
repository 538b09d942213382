"""Model and calibrator as ONE ONNX graph.

`fuse` appends to a classifier: a stage that turns its tapped tensor into logits (`calibrators.inspection` finds the
tap), the calibrator's own nodes (`Calibrator.emit`), and the outputs `probabilities`, `confidence` and `label`. What
the calibrator learned becomes overridable initializers, so serving another fit of the same shape is another feed of a
few arrays, never another session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import TensorProto, helper, numpy_helper, shape_inference

from calibrators.inspection import Inspection, Tap, inspect_model
from calibrators.layers import Layer, named_layers
from calibrators.numerics import Array

if TYPE_CHECKING:
    from calibrators.base import Calibrator

PREFIX = "calserve/"
"""Every tensor and node added to a model begins with this."""

ADDED_OUTPUTS = ("probabilities", "confidence", "label")
"""Outputs that `fuse` adds: FLOAT [B, K], FLOAT [B], INT64 [B]."""

FURTHER_OUTPUTS = {
    "density": (TensorProto.FLOAT, ()),
    "ood_score": (TensorProto.FLOAT, ()),
    "prediction_set": (TensorProto.BOOL, ("K",)),
    "set_size": (TensorProto.INT32, ()),
}
"""Outputs that some calibrators add besides (`Graph.further`): their type, and a row's shape."""

LOGITS = f"{PREFIX}logits"
"""The FLOAT [B, K] logits inside a fused graph, fetchable as an output."""

FEATURES = f"{PREFIX}features"
"""Likewise the FLOAT [B, D] vectors of the layers that the calibrator reads, side by side."""

VIEWS = f"{PREFIX}views"
"""Likewise the FLOAT [B, V, K] logits of the transformed copies of each row, where the calibrator reads them."""

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)

MIN_OPSET = 9
STAGE_OPSET = 17
"""Of a calibrator's nodes where no model says which."""
_REDUCTION_AXES_BECAME_INPUT = {"ReduceSum": 13}  # the other reductions: 18


class Graph:
    """Appends nodes to an ONNX model, in the operator set which that model declares.

    Attributes
    ----------
    parameters : dict of the overridable initializers added so far, name -> float32 array
    further_outputs : dict of what `further` was told, name -> tensor
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.opset = default_opset(model)
        self.parameters: dict[str, Array] = {}
        self.further_outputs: dict[str, str] = {}
        self._count = 0

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append one node with one output; return the name of that output."""
        return self.nodes(op, *inputs, n_outputs=1, **attributes)[0]

    def nodes(self, op: str, *inputs: str, n_outputs: int, **attributes: Any) -> list[str]:
        """Append one node with `n_outputs` outputs; return their names."""
        self._count += 1
        outputs = [f"{PREFIX}{op}_{self._count}" + (f"_{i}" if i else "") for i in range(n_outputs)]
        self.model.graph.node.append(
            helper.make_node(op, list(inputs), outputs, name=f"{PREFIX}{op}_{self._count}", **attributes)
        )
        return outputs

    def constant(self, value: Array | float) -> str:
        """A fixed initializer; Python floats and float64 arrays become float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        self._count += 1
        name = f"{PREFIX}constant_{self._count}"
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def parameter(self, name: str, value: Array) -> str:
        """An overridable float32 initializer holding what was learned; each run may feed another value of its shape."""
        full_name = f"{PREFIX}{name}"
        array = np.array(value, dtype=np.float32)
        self.model.graph.initializer.append(numpy_helper.from_array(array, full_name))
        self.model.graph.input.append(helper.make_tensor_value_info(full_name, TensorProto.FLOAT, array.shape))
        self.parameters[full_name] = array
        return full_name

    def cast(self, x: str, dtype: DTypeLike) -> str:
        """x as another type; from float to integer the fraction is cut off."""
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reduce(self, op: str, x: str, *, axis: int = -1, keepdims: bool = True) -> str:
        """A reduction over one axis; `axes` moved from attribute to input at opset 13 (ReduceSum) or 18."""
        if self.opset >= _REDUCTION_AXES_BECAME_INPUT.get(op, 18):
            return self.node(op, x, self.constant(np.array([axis], dtype=np.int64)), keepdims=int(keepdims))
        return self.node(op, x, axes=[axis], keepdims=int(keepdims))

    def normalise(self, x: str) -> str:
        """Each row of x [B, K] divided by its sum."""
        return self.node("Div", x, self.reduce("ReduceSum", x))

    def softmax(self, x: str) -> str:
        """Softmax over the last axis of x [B, K]."""
        return self.node("Softmax", x, axis=1)

    def clip(self, x: str, low: float, high: float) -> str:
        """x within low..high; `Clip` itself takes these as attributes or as inputs, by operator set."""
        return self.node("Min", self.node("Max", x, self.constant(low)), self.constant(high))

    def centre(self, x: str) -> str:
        """x [B, K] less each row's maximum: float32 then keeps what decides the row, whatever the logits' offset."""
        return self.node("Sub", x, self.reduce("ReduceMax", x))

    def log_odds(self, logits: str) -> str:
        """`numerics.log_odds` of FLOAT [B, K] logits."""
        first, second = self.two_largest(logits)
        above, gap = self.node("Sub", logits, second), self.node("Sub", first, second)
        one, zero = self.constant(1.0), self.constant(0.0)
        terms = self.node("Exp", self.node("Min", above, zero))
        total = self.node("Sub", self.reduce("ReduceSum", terms), one)
        others = self.node("Mul", self.node("Sub", total, terms), self.node("Exp", self.node("Neg", gap)))
        below = self.node("Sub", self.node("Sub", above, gap), self.node("Log", self.node("Add", others, one)))
        largest = self.node("Sub", gap, self.node("Log", total))
        return self.node("Where", self.node("Greater", above, zero), largest, below)

    def normalised_sigmoid(self, log_odds: str) -> str:
        """`numerics.normalised_sigmoid` of FLOAT [B, K] log-odds."""
        numerator = self.softmax(self.node("Min", log_odds, self.constant(0.0)))
        decay = self.node("Exp", self.node("Neg", self.node("Abs", log_odds)))
        return self.normalise(self.node("Div", numerator, self.node("Add", decay, self.constant(1.0))))

    def largest(self, x: str, k: int) -> str:
        """The k largest of each row of x [B, K] in falling order, [B, k]; `k` moved to an input at opset 10."""
        if self.opset >= 10:
            return self.nodes("TopK", x, self.constant(np.array([k], dtype=np.int64)), n_outputs=2, axis=1)[0]
        return self.nodes("TopK", x, n_outputs=2, axis=1, k=k)[0]

    def largest_index(self, x: str, k: int) -> str:
        """Where the k largest of each row of x [B, K] stand, in falling order, INT64 [B, k]."""
        if self.opset >= 10:
            return self.nodes("TopK", x, self.constant(np.array([k], dtype=np.int64)), n_outputs=2, axis=1)[1]
        return self.nodes("TopK", x, n_outputs=2, axis=1, k=k)[1]

    def column(self, x: str, index: int) -> str:
        """One column of x [B, K], as [B, 1]."""
        return self.node("Gather", x, self.constant(np.array([index], dtype=np.int64)), axis=1)

    def two_largest(self, x: str) -> tuple[str, str]:
        """The largest and the second largest of each row of x [B, K], as [B, 1]."""
        values = self.largest(x, 2)
        return self.column(values, 0), self.column(values, 1)

    def image_input(self) -> tuple[str, tuple[int | None, ...]]:
        """The model's one input and its dimensions [B, C, H, W], None where they are open (else ValueError)."""
        inputs = inputs_of(self.model)
        types = [value.type.tensor_type for value in inputs]
        shapes = [tuple(d.dim_value if d.HasField("dim_value") else None for d in t.shape.dim) for t in types]
        if len(inputs) != 1 or len(shapes[0]) != 4 or shapes[0][0] is not None or types[0].elem_type not in FLOATS:
            named = zip(inputs, shapes, types, strict=True)
            found = ", ".join(
                f"{value.name!r} {list(shape)} {TensorProto.DataType.Name(t.elem_type)}" for value, shape, t in named
            )
            raise ValueError(f"views need one input of real images [B, C, H, W] with B open, the model has {found}")
        return inputs[0].name, shapes[0]

    def element_type(self, x: str) -> int:
        """ONNX's number for the type of the numbers in `x`; of a tensor whose type nothing tells FLOAT's."""
        known = {value.name: value for value in inputs_of(self.model)}
        if x not in known:
            known = {value.name: value for value in shape_inference.infer_shapes(self.model).graph.value_info}
        return int(known[x].type.tensor_type.elem_type) if x in known else TensorProto.FLOAT

    def repeat(self, n_nodes: int, x: str, changed: str, wanted: str) -> str:
        """Append the first `n_nodes` nodes once more, as far as they lie between `x` and `wanted`, reading `changed`.

        Weights are shared with the first run, whose tensors stay what they are. Returns the second `wanted`.
        """
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.model.graph.node[:n_nodes]]
        renamed = {x: changed}
        for node in ancestors(nodes, wanted):
            if not renamed.keys().isdisjoint(reads(node)):
                renamed |= {name: f"{PREFIX}again/{name}" for name in node.output if name}
                node.name = node.name and f"{PREFIX}again/{node.name}"
                _rename_node(node, renamed)
                _forget_named_dimensions(node)
                self.model.graph.node.append(node)
        return renamed[wanted]

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        """Reshape with ONNX's rules: 0 keeps a dimension, -1 is inferred."""
        return self.node("Reshape", x, self.constant(np.array(shape, dtype=np.int64)))

    def further(self, name: str, x: str) -> None:
        """Let tensor `x` be the output `name`, one of FURTHER_OUTPUTS, beside the probabilities of the rows."""
        if name not in FURTHER_OUTPUTS:
            raise ValueError(f"further outputs are {', '.join(FURTHER_OUTPUTS)}, got {name!r}")
        self.further_outputs[name] = x

    def output(self, x: str, name: str, element_type: int, shape: tuple[str | int | None, ...]) -> None:
        """Declare tensor `x` as the graph output `name`."""
        self.model.graph.node.append(helper.make_node("Identity", [x], [name], name=f"{PREFIX}output/{name}"))
        self.model.graph.output.append(helper.make_tensor_value_info(name, element_type, list(shape)))


@dataclass(frozen=True)
class FusedModel:
    """A model with its calibrator inside.

    `own_outputs` maps each output of the original model to its name in the fused graph: the same, unless calserve's own
    outputs claim that name, then `raw_<name>`.
    """

    proto: onnx.ModelProto = field(repr=False)
    parameters: dict[str, Array]
    inspection: Inspection
    own_outputs: dict[str, str]

    def to_bytes(self) -> bytes:
        return self.proto.SerializeToString()

    def export(self) -> bytes:
        """The same graph as one plain ONNX file for any runtime: nothing to override, no inner tensors shown."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        _keep(proto.graph.input, lambda name: name not in self.parameters)
        _keep(proto.graph.output, lambda name: name not in (LOGITS, FEATURES, VIEWS))
        return proto.SerializeToString()


def fuse(
    model: onnx.ModelProto | bytes,
    calibrator: Calibrator,
    inspection: Inspection | None = None,
    *,
    sets: bool = True,
    taps: Sequence[str] = (),
) -> FusedModel:
    """The calibrated graph: the model's own outputs, then `probabilities`, `confidence`, `label`, and what further the
    calibrator computes.

    Parameters
    ----------
    model : the classifier; not modified
    calibrator : fitted
    inspection : where the logits are; found by `inspect_model` if not given
    sets : whether the graph makes the calibrator's sets of labels, if it makes any, at its own confidence level
    taps : tensors whose vectors can be fetched as FEATURES, where the calibrator itself reads none

    Raises
    ------
    ValueError
        if no classifier output is found, the operator set is older than 9, the number of classes differs, an input of
        the model bears the name of an added output, the calibrator reads views of what is not one image a row, or
        a layer that is not there
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(model if isinstance(model, bytes) else model.SerializeToString())
    _allow_overridable_initializers(proto)
    _declare_onnx_operators(proto)
    found = inspection or inspect_model(proto)
    n_classes = int(calibrator.tensors()["n_classes"])
    if found.n_classes is not None and found.n_classes != n_classes:
        raise ValueError(f"the model has {found.n_classes} classes, the calibrator was fitted on {n_classes}")
    if default_opset(proto) < MIN_OPSET:
        raise ValueError(f"the model uses opset {default_opset(proto)}; calibrators need opset {MIN_OPSET} or later")
    names = calibrator.taps or taps
    layers = named_layers(proto, found, names) if names else []
    own_outputs, renamed = _free_reserved_names(proto)
    layers = [replace(layer, tensor=renamed.get(layer.tensor, layer.tensor)) for layer in layers]
    tap = Tap(renamed.get(found.logits.tensor, found.logits.tensor), found.logits.form, found.logits.reason)
    graph, n_nodes = Graph(proto), len(proto.graph.node)
    logits = graph.node("Identity", emit_logits(graph, tap))
    proto.graph.node[-1].output[0] = LOGITS
    logits = LOGITS
    proto.graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [None, n_classes]))
    signals = _emit_signals(graph, calibrator, tap, n_nodes) | _emit_features(graph, calibrator, layers)
    _emit_outputs(graph, calibrator, calibrator.emit(graph, logits, **signals), sets)
    return FusedModel(proto, graph.parameters, found, own_outputs)


def emit_logits(graph: Graph, tap: Tap) -> str:
    """Turn the tapped tensor into FLOAT logits [B, K] (`Tap.form` says how)."""
    x = graph.cast(tap.tensor, np.float32)
    tiny = graph.constant(float(np.finfo(np.float32).tiny))
    if tap.form == "logits":
        return x
    if tap.form == "probabilities":
        return graph.node("Log", graph.node("Max", x, tiny))
    column = graph.reshape(x, (-1, 1))
    if tap.form == "log_odds":
        return graph.node("Concat", graph.node("Mul", column, graph.constant(0.0)), column, axis=1)
    both = graph.node("Concat", graph.node("Sub", graph.constant(1.0), column), column, axis=1)
    return graph.node("Log", graph.node("Max", both, tiny))


def stage(calibrator: Calibrator, opset: int = STAGE_OPSET, *, sets: bool = False) -> FusedModel:
    """The calibrator alone as a graph: inputs `logits` FLOAT [B, K] and the signals that it reads besides, likewise
    under their names, or what it looks up by them (`Calibrator.look_up`); outputs as `fuse` adds them.

    For comparing the graph's arithmetic with `predict_proba` without any model.
    """
    n_classes = int(calibrator.tensors()["n_classes"])
    signals = calibrator.stage_shapes(n_classes)
    shapes = {"logits": (n_classes,), **signals}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape]) for name, shape in shapes.items()]
    proto = helper.make_model(
        helper.make_graph([], "calibrator", inputs, []), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    graph = Graph(proto)
    _emit_outputs(graph, calibrator, calibrator.emit(graph, "logits", **{name: name for name in signals}), sets)
    tap = Tap("logits", "logits", "the graph's own input")
    return FusedModel(proto, graph.parameters, Inspection("logits", tap, None, "no model", n_classes), {})


def parameters_of(calibrator: Calibrator) -> dict[str, Array]:
    """What any graph with this calibrator can be fed, those that act before the model among them."""
    return stage(calibrator).parameters | _before_the_model(calibrator, STAGE_OPSET).parameters


def signature(calibrator: Calibrator, opset: int = STAGE_OPSET) -> str:
    """A digest of the calibrator's graph, with what acts before the model, without the values of its parameters.

    Two fits with one signature are served by one session: only the feeds differ.
    """
    fused, before = stage(calibrator, opset), _before_the_model(calibrator, opset)
    parameters = fused.parameters | before.parameters
    digest = hashlib.sha256("\n".join([calibrator.tensor or "", *calibrator.taps]).encode())
    for proto in (fused.proto, before.model):
        _keep(proto.graph.initializer, lambda name: name not in parameters)
        digest.update(proto.SerializeToString(deterministic=True))
    return digest.hexdigest()


def check_copies(model: onnx.ModelProto, calibrator: Calibrator) -> None:
    """Raise ValueError unless the model has what `calibrator`, which reads views, acts on."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    graph = Graph(proto)
    calibrator.emit_inputs(graph, calibrator.acts_on(graph))


def _before_the_model(calibrator: Calibrator, opset: int) -> Graph:
    """What acts before a model, on a stand-in for what it acts on, and nothing else."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", "C", "H", "W"])
    opsets = [helper.make_opsetid("", opset)]
    graph = Graph(helper.make_model(helper.make_graph([], "before", [images], []), opset_imports=opsets, ir_version=8))
    if "views" in calibrator.needs:
        calibrator.emit_inputs(graph, "images")
    return graph


def inputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What a run must be fed: inputs that have no value of their own."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def default_opset(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set which the model declares."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _emit_signals(graph: Graph, calibrator: Calibrator, tap: Tap, n_nodes: int) -> dict[str, str]:
    """What `emit` reads beside the logits: views, made by a second run of the model's nodes on copies of a tensor.

    One run on a batch of originals and copies would cost the same, but the model's own outputs had to be cut out of it.
    """
    shapes = calibrator.signal_shapes(int(calibrator.tensors()["n_classes"]))
    if "views" not in shapes:
        return {}
    x = calibrator.acts_on(graph)
    tensor = graph.repeat(n_nodes, x, calibrator.emit_inputs(graph, x), tap.tensor)
    stacked = emit_logits(graph, replace(tap, tensor=tensor))
    n_views, n_classes = shapes["views"]
    views = graph.node("Transpose", graph.reshape(stacked, (n_views, -1, n_classes)), perm=[1, 0, 2])
    graph.output(views, VIEWS, TensorProto.FLOAT, (None, n_views, n_classes))
    return {"views": views}


def _emit_features(graph: Graph, calibrator: Calibrator, layers: Sequence[Layer]) -> dict[str, str]:
    """The layers' vectors side by side: maps averaged over their pixels, tokens over the row."""
    if not layers:
        return {}
    pooled = []
    for layer in layers:
        x = graph.cast(layer.tensor, np.float32)
        for axis in sorted(layer.axes, reverse=True):
            x = graph.reduce("ReduceMean", x, axis=axis, keepdims=False)
        pooled.append(x)
    features = graph.node("Concat", *pooled, axis=1)
    graph.output(features, FEATURES, TensorProto.FLOAT, (None, sum(layer.width for layer in layers)))
    return {"features": features} if calibrator.taps else {}


def _emit_outputs(graph: Graph, calibrator: Calibrator, probabilities: str, sets: bool) -> None:
    n_classes = int(calibrator.tensors()["n_classes"])
    if sets:
        calibrator.emit_sets(graph, probabilities)
    graph.output(probabilities, "probabilities", TensorProto.FLOAT, (None, n_classes))
    graph.output(graph.reduce("ReduceMax", probabilities, keepdims=False), "confidence", TensorProto.FLOAT, (None,))
    label = graph.node("ArgMax", probabilities, axis=1, keepdims=0)
    graph.output(label, "label", TensorProto.INT64, (None,))
    for name, x in graph.further_outputs.items():
        element_type, row = FURTHER_OUTPUTS[name]
        graph.output(x, name, element_type, (None, *(n_classes for _ in row)))


def _allow_overridable_initializers(model: onnx.ModelProto) -> None:
    """Raise the IR version to 4, which tells defaults that a caller may override from constants.

    Before, every initializer had to be listed as an input too. Those of the model go from the list: the runtime took
    them as constants and folded them, and must go on doing so for the model's outputs to stay the same.
    """
    if model.ir_version >= 4:
        return
    model.ir_version = 4
    constants = {tensor.name for tensor in model.graph.initializer}
    _keep(model.graph.input, lambda name: name not in constants)


def _declare_onnx_operators(model: onnx.ModelProto) -> None:
    """Name a version of ONNX's own operators where a model has none of them, as exported trees do."""
    if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("", STAGE_OPSET))


def _keep(values: Any, wanted: Callable[[str], bool]) -> None:
    """Drop the inputs, outputs or initializers whose name is not wanted."""
    kept = [value for value in values if wanted(value.name)]
    del values[:]
    values.extend(kept)


def _free_reserved_names(model: onnx.ModelProto) -> tuple[dict[str, str], dict[str, str]]:
    """Rename tensors that bear a name of calserve's outputs; return (the outputs' names old -> new, all renamed)."""
    reserved = (*ADDED_OUTPUTS, *FURTHER_OUTPUTS)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input} - initializers
    if taken := inputs.intersection(reserved):
        raise ValueError(f"the model has inputs named like the outputs that calserve adds: {sorted(taken)}")
    names = initializers | inputs | _tensor_names(model.graph)
    renamed = {name: _raw_name(name, names) for name in reserved if name in names}
    outputs = [value.name for value in model.graph.output]
    if renamed:
        _rename(model.graph, renamed)
    return {name: renamed.get(name, name) for name in outputs}, renamed


def _raw_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"raw_{name}"
    return name


def _tensor_names(graph: onnx.GraphProto) -> set[str]:
    """Every name given to a value by a node of the graph or of its subgraphs."""
    subgraphs = (subgraph for node in graph.node for subgraph in _subgraphs(node))
    own = {name for node in graph.node for name in node.output}
    return own.union(*(_tensor_names(subgraph) for subgraph in subgraphs))


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return graphs + [graph for attribute in node.attribute for graph in attribute.graphs]


def reads(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that a node or its subgraphs read."""
    inner = (reads(inner) for subgraph in _subgraphs(node) for inner in subgraph.node)
    return set(node.input).union(*inner) - {""}  # an optional input left out


def ancestors(nodes: list[onnx.NodeProto], wanted: str) -> list[onnx.NodeProto]:
    """The nodes that `wanted` is made by, in their order."""
    needed, found = {wanted}, []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed |= reads(node)
            found.append(node)
    return found[::-1]


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Rename tensors in a graph and in the subgraphs that see its scope."""
    for node in graph.node:
        _rename_node(node, renamed)
    for value in (*graph.output, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)


def _forget_named_dimensions(node: onnx.NodeProto) -> None:
    """In subgraphs: a runtime takes dimensions of one name for equal, and a second batch is longer than the first."""
    for subgraph in _subgraphs(node):
        for value in (*subgraph.input, *subgraph.output, *subgraph.value_info):
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.HasField("dim_param"):
                    dimension.Clear()
        for inner in subgraph.node:
            _forget_named_dimensions(inner)


def _rename_node(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for names in (node.input, node.output):
        for index, name in enumerate(names):
            names[index] = renamed.get(name, name)
    for subgraph in _subgraphs(node):
        _rename(subgraph, renamed)
