"""A deployed model's logits as a function that torch differentiates: of one of its tensors, which a perturbation moves.

A fit that acts before the model needs the gradient of its loss in the model's input, which no runtime of deployed
models gives. Here the nodes between the inputs and the logits are run by `calibrators.operators`, one after the other,
with the weights as constants. Nothing is approximated: a model with an operator that is not in that table is refused by
the operator's name (`check` says so without torch), and the logits of every row of a calibration set are compared with
those that the runtime gave (`Rows.verify`) before a gradient is believed.

What is moved is called x: an input of real numbers, or any tensor of real numbers behind the inputs, as the embeddings
that a model looks up for ids. A perturbation has the shape of one row of x, with length one along a dimension that the
model leaves open, and is added to every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Self, TypeAlias

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, shape_inference

from calibrators.graph import FLOATS, LOGITS, ancestors, default_opset, fuse, inputs_of, reads
from calibrators.kinds.identity import Identity
from calibrators.numerics import Array, to_numpy
from calibrators.operators import OPERATORS, SEVERAL_OUTPUTS, Node, from_numpy, qualified_name, tensor_of
from calibrators.training import import_torch

Tensor: TypeAlias = Any

TOLERANCE = 1e-3
"""Largest difference between the logits here and the runtime's, of the largest logit (of one, where all are small)."""

BYTES_AT_ONCE = 1 << 29
"""Of the tensors of one run, all of which a gradient keeps."""


@dataclass(frozen=True)
class Site:
    """Where a perturbation is added.

    Attributes
    ----------
    tensor : name of x
    shape : of a perturbation: of one row of x, 1 along dimensions that are open
    element_type : of x, ONNX's number for it
    """

    tensor: str
    shape: tuple[int, ...]
    element_type: int


def site_of(model: onnx.ModelProto, tensor: str | None = None) -> Site:
    """Where a perturbation of this model is added: the named tensor, by default its one input of real numbers.

    Raises
    ------
    ValueError
        if there is no such tensor, if it is not rows of real numbers, and, without a name, if the inputs of real
        numbers are none or several: then it says which tensors could be named
    """
    inputs = {value.name: value for value in inputs_of(model)}
    tensor = tensor or _only(inputs, model)
    known = inputs if tensor in inputs else _known_tensors(model)
    if tensor not in known:
        raise ValueError(f"the model has no tensor {tensor!r} whose shape is known")
    tensor_type = known[tensor].type.tensor_type
    dims = [int(d.dim_value) if d.HasField("dim_value") else 1 for d in tensor_type.shape.dim]
    if not _is_real(known[tensor]) or len(dims) < 2:
        raise ValueError(f"a perturbation needs rows of real numbers, the model has {_described(known[tensor])}")
    return Site(tensor, tuple(dims[1:]), tensor_type.elem_type)


def check(model: onnx.ModelProto, tensor: str | None = None) -> Site:
    """Raise ValueError, naming what is in the way, unless this model can be differentiated in that tensor."""
    nodes = ancestors(list(model.graph.node), LOGITS)
    unknown = Counter(qualified_name(node) for node in nodes if qualified_name(node) not in OPERATORS)
    if unknown:
        named = ", ".join(f"{name} ({count} nodes)" if count > 1 else name for name, count in sorted(unknown.items()))
        raise ValueError(f"the model cannot be differentiated: it has operators that are not known here: {named}")
    beside = {name for node in nodes if qualified_name(node) not in SEVERAL_OUTPUTS for name in node.output[1:]} - {""}
    if used := beside & set().union(*map(reads, nodes)):
        raise ValueError(f"the model cannot be differentiated: it reads {', '.join(sorted(used))}, a second output")
    if texts := [value.name for value in inputs_of(model) if value.type.tensor_type.elem_type == TensorProto.STRING]:
        raise ValueError(f"the model cannot be differentiated: {', '.join(texts)} holds text")
    site = site_of(model, tensor)
    if not any(site.tensor in reads(node) for node in nodes):
        raise ValueError(f"the logits do not depend on {site.tensor!r}")
    return site


class DifferentiableModel:
    """The logits of a classifier as a function of its inputs and a perturbation.

    Parameters
    ----------
    model : a classifier, or what `fuse` makes of it
    n_classes : of its logits
    tensor : x, see `site_of`

    Attributes
    ----------
    inputs : names of the inputs that rows hold
    site : where the perturbation is added
    device : "cuda" where torch can use one, else "cpu"

    Raises
    ------
    ValueError
        as `check`
    ImportError
        where torch is not installed
    """

    def __init__(self, model: bytes | onnx.ModelProto, n_classes: int, tensor: str | None = None) -> None:
        proto = with_logits(model, n_classes)
        self.site = check(proto, tensor)
        self.torch = torch = import_torch("a model's gradient")
        self.device = _usable_device(torch)
        self.inputs = [value.name for value in inputs_of(proto)]
        opsets = {entry.domain: int(entry.version) for entry in proto.opset_import} | {"": default_opset(proto)}
        nodes = ancestors(list(proto.graph.node), LOGITS)
        self._nodes = [Node.of(node, opsets.get(node.domain, opsets[""])) for node in nodes]
        self._last_use = {name: i for i, node in enumerate(self._nodes) for name in node.inputs}
        weights = [one for one in proto.graph.initializer if one.name in self._last_use]
        self._weights = {one.name: self._placed(tensor_of(torch, one)) for one in weights}
        self._bytes_per_row = 0

    def run(self, feeds: Mapping[str, Array], wanted: str = LOGITS, delta: Tensor | None = None) -> Tensor:
        """A tensor, the logits (n_samples, n_classes), of rows of the inputs, x moved by `delta`; on `device`.

        Raises
        ------
        ValueError
            if these rows cannot be computed, or have another shape than the model declares
        """
        with exact(self.torch):
            return self._run(feeds, wanted, delta)

    def _run(self, feeds: Mapping[str, Array], wanted: str, delta: Tensor | None) -> Tensor:
        values, size = dict(self._weights), 0
        for name in self.inputs:
            array = feeds[name]
            value = from_numpy(self.torch, array, real=array.dtype.kind == "f").to(self.device)
            values[name] = self._moved(name, value, delta)
        for i, node in enumerate(self._nodes):
            if wanted in values:
                return values[wanted]
            made = self._computed(node, [values[name] if name else None for name in node.inputs])
            for name, value in zip(node.outputs, made, strict=False):
                values[name] = self._moved(name, self._placed(value), delta)
                size += value.numel() * value.element_size()
            for name in node.inputs:
                if self._last_use[name] == i:
                    values.pop(name, None)
        self._bytes_per_row = size // max(1, len(values[wanted]))
        return values[wanted]

    def rows_at_once(self) -> int:
        """How many rows of tensors fit `BYTES_AT_ONCE`: one, until a run has shown what a row takes."""
        return max(1, BYTES_AT_ONCE // self._bytes_per_row) if self._bytes_per_row else 1

    def _computed(self, node: Node, given: list[Tensor | None]) -> list[Tensor]:
        if any(value is not None and value.is_cuda for value in given):  # shapes are computed beside the device
            given = [value if value is None else value.to(self.device) for value in given]
        try:
            made = OPERATORS[node.name](self.torch, node, *given)
        except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"operator {node.name} cannot be computed on these rows: {reason}") from error
        return made if isinstance(made, list) else [made]

    def _placed(self, value: Tensor) -> Tensor:
        """Real numbers on the device. What is computed of shapes alone stays where Python reads it."""
        return value.to(self.device) if value.is_floating_point() else value

    def _moved(self, name: str, value: Tensor, delta: Tensor | None) -> Tensor:
        if name != self.site.tensor:
            return value
        shape, wanted = tuple(value.shape[1:]), self.site.shape
        if len(shape) != len(wanted) or any(w not in (1, size) for w, size in zip(wanted, shape, strict=True)):
            raise ValueError(f"rows of {name!r} have shape {shape}, the model declares {wanted}")
        return value if delta is None else value + delta


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a model's inputs, and the model that gives them logits.

    Attributes
    ----------
    model : the model
    arrays : its inputs by name, (n_samples, ...) each
    """

    model: DifferentiableModel
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, model: DifferentiableModel, inputs: ArrayLike | Mapping[str, ArrayLike]) -> Self:
        """Rows of all inputs, by name or, where there is one, as a bare array.

        Raises
        ------
        ValueError, TypeError
            if an input is missing or unknown, does not hold finite numbers, or has not as many rows as another
        """
        given = inputs if isinstance(inputs, Mapping) else {model.inputs[0]: inputs}
        if sorted(given) != sorted(model.inputs):
            raise ValueError(f"the model reads {', '.join(model.inputs)}, got {', '.join(given) or 'nothing'}")
        arrays = {name: to_numpy(values) for name, values in given.items()}
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub":
                raise TypeError(f"{name} must hold numbers, got dtype {array.dtype}")
            if array.ndim == 0 or len(array) != len(next(iter(arrays.values()))):
                raise ValueError(f"inputs must have rows, each the same number, got {name} of shape {array.shape}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite")
        return cls(model, arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: Any) -> Self:
        return replace(self, arrays={name: array[index] for name, array in self.arrays.items()})

    def digests(self, *beside: Array) -> Array:
        """16 bytes for each row and what stands beside it: equal ones have equal ones."""
        arrays = [np.ascontiguousarray(array) for array in (*self.arrays.values(), *beside)]
        rows = (b"".join(array[i].tobytes() for array in arrays) for i in range(len(self)))
        return np.array([blake2b(row, digest_size=16).digest() for row in rows], dtype="V16")

    def pieces(self) -> Iterator[slice]:
        """All rows, in pieces that are run at once."""
        start = 0
        while start < len(self):
            stop = min(len(self), start + self.model.rows_at_once())
            yield slice(start, stop)
            start = stop

    def logits(self, delta: Array | None = None) -> Array:
        """Logits (n_samples, n_classes) of all rows, x moved by `delta`; float32."""
        torch = self.model.torch
        moved = None if delta is None else torch.from_numpy(delta.astype(np.float32)).to(self.model.device)
        with torch.no_grad():
            parts = [self.logits_of(piece, moved).cpu().numpy() for piece in self.pieces()]
        return np.concatenate(parts)

    def logits_of(self, piece: slice, delta: Tensor | None = None) -> Tensor:
        """Logits of some rows, x moved by `delta`, as torch's tensor on the model's device."""
        return self.model.run({name: array[piece] for name, array in self.arrays.items()}, LOGITS, delta)

    def deviation(self) -> Array:
        """The standard deviation of x: of each column, where a row is a vector, else () of all numbers together."""
        model = self.model
        axes = 0 if len(model.site.shape) == 1 else None
        with model.torch.no_grad():
            arrays = (self.model.run(self[piece].arrays, model.site.tensor) for piece in self.pieces())
            moments = [(a.numel(), a.double().mean(axes), (a.double() ** 2).mean(axes)) for a in arrays]
        weights = np.array([count for count, _, _ in moments])
        mean, square = (np.average([m[i].cpu().numpy() for m in moments], axis=0, weights=weights) for i in (1, 2))
        deviation: Array = np.sqrt(np.maximum(square - mean**2, 0))
        return deviation

    def verify(self, logits: Array) -> None:
        """Raise ValueError unless each row's logits are those that the runtime gave."""
        own = self.logits() if len(self) else logits[:0]
        if own.shape != logits.shape:
            raise ValueError(f"differentiated, the model gives logits of shape {own.shape}, it gave {logits.shape}")
        far = np.abs(own - logits).max(axis=1) / np.maximum(1, np.abs(logits).max(axis=1))
        if not far.max(initial=0.0) <= TOLERANCE:
            row = int(far.argmax())
            raise ValueError(
                f"differentiated, the model gives row {row} other logits than it gave: they differ by {far[row]:.2g} "
                f"of the largest, more than {TOLERANCE:g}; are these the inputs that the logits belong to?"
            )


def with_logits(model: bytes | onnx.ModelProto, n_classes: int) -> onnx.ModelProto:
    """A classifier with the output `calserve/logits`, which a fused one has already."""
    proto = onnx.ModelProto()
    proto.ParseFromString(model if isinstance(model, bytes) else model.SerializeToString())
    has_logits = any(value.name == LOGITS for value in proto.graph.output)
    return proto if has_logits else fuse(proto, Identity.of(n_classes)).proto


def exact(torch: Any) -> Any:
    """Within, convolutions on a GPU keep all bits of float32 and sum in one order."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _usable_device(torch: Any) -> str:
    """A GPU that is there may still be out of reach, of a process whose address space is bounded for example."""
    try:
        return str(torch.zeros(1, device="cuda").device.type) if torch.cuda.is_available() else "cpu"
    except RuntimeError:
        return "cpu"


def _only(inputs: Mapping[str, onnx.ValueInfoProto], model: onnx.ModelProto) -> str:
    """The one input of real numbers."""
    real = [name for name, value in inputs.items() if _is_real(value)]
    if len(real) > 1:
        raise ValueError(f"the model has several inputs of real numbers; name one as tensor: {', '.join(real)}")
    if real:
        return real[0]
    found = ", ".join(map(_described, inputs.values()))
    behind = _first_real(model)
    offer = f"; tensor={behind!r} is the first of real numbers behind them" if behind else ""
    raise ValueError(f"a perturbation needs an input of real numbers, the model has {found}{offer}")


def _first_real(model: onnx.ModelProto) -> str | None:
    """The first tensor of rows of real numbers that is computed from the inputs."""
    known = _known_tensors(model)
    dependent = {value.name for value in inputs_of(model)}
    for node in model.graph.node:
        if not dependent.isdisjoint(reads(node)):
            dependent |= set(node.output)
            for name in node.output:
                if name in known and _is_real(known[name]) and len(known[name].type.tensor_type.shape.dim) > 1:
                    return name
    return None


def _known_tensors(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Inputs, and tensors whose type the graph tells."""
    inner = shape_inference.infer_shapes(model).graph.value_info
    return {value.name: value for value in (*inner, *model.graph.output, *inputs_of(model))}


def _is_real(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in FLOATS


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    return f"{value.name!r} {dims} {TensorProto.DataType.Name(tensor.elem_type)}"
