"""Runs of one runtime session through I/O binding: what stays on the device, and through which memory the rest goes.

Parameters are copied when they change, not on every run. Inputs and outputs pass through buffers on the host that are
made once and grow. With CUDA graphs, batches of the captured shapes have their own place on the device.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.inference import datatypes
from service.inference.host_memory import HostBuffers

Arrays = Mapping[str, NDArray[Any]]
Shape = tuple[int, ...]

NOTHING: Arrays = {}

BFLOAT16 = 16
"""ONNX's number for the element type that numpy lacks."""

KEPT_BINDINGS = 16
"""Bindings kept for one session, one for each set of outputs that is asked for."""

CAPTURED_SHAPES = 16
"""CUDA graphs kept for one session: each holds its buffers on the device for good."""


class Declared(NamedTuple):
    """What the graph says of a tensor."""

    dims: tuple[int | str | None, ...]  # a size, the name of one, or nothing
    element: Any  # numpy's type, or BFLOAT16

    @classmethod
    def of(cls, node: Any) -> Declared:
        word = datatypes.OF_RUNTIME.get(node.type, "BYTES")
        return cls(tuple(node.shape), BFLOAT16 if word == "BF16" else datatypes.NUMPY[word].type)

    def shape(self, sizes: Mapping[int | str | None, int]) -> Shape | None:
        """With the names put in; None if one is not known."""
        shape = tuple(dim if isinstance(dim, int) else sizes.get(dim, -1) for dim in self.dims)
        return None if -1 in shape else shape


class Graphs(NamedTuple):
    """What the runtime is asked for to make CUDA graphs."""

    allocate: Callable[[Shape, Any], Any]  # a tensor on the device
    options: Callable[[int], Any]  # of a run that is graph 1, 2, ...; -1: neither captured nor replayed


class Bindings:
    """The I/O bindings of one session, used by one run at a time.

    `pinned_for` is the CUDA device that buffers on the host are pinned for, None for batches that are bound where they
    lie.
    """

    def __init__(self, session: Any, pinned_for: int | None, graphs: Graphs | None) -> None:
        self._session, self._graphs, self._host = session, graphs, HostBuffers(pinned_for)
        self._staged = pinned_for is not None
        nodes = [*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs()]
        self._declared = {node.name: Declared.of(node) for node in nodes}
        self._declared_shapes_hold = True
        self._any_shape: OrderedDict[tuple[str, ...], _AnyShape] = OrderedDict()
        self._captured: dict[tuple[Any, ...], _FixedShape] = {}
        self._lock = threading.Lock()

    def run(
        self, outputs: tuple[str, ...], feeds: Arrays, parameters: Arrays, options: Any = None
    ) -> list[NDArray[Any]]:
        """`options` are of this run alone; a CUDA graph that is replayed has its own."""
        with self._lock:
            captured = self._captured.get(_form(outputs, feeds)) if self._captured else None
            if captured is not None:
                return captured.run(feeds, parameters)
            staged = {name: self._host.copy(name, array) for name, array in feeds.items()} if self._staged else feeds
            binding = self._binding(outputs, feeds, parameters)
            return binding.run(staged, parameters, lambda: self._shapes(outputs, feeds), options)

    def capture(self, outputs: tuple[str, ...], feeds: Arrays, parameters: Arrays) -> None:
        """Keep a CUDA graph for batches of this form, where the size of every output is known before the run."""
        given, shapes, form = {**feeds, **parameters}, self._shapes(outputs, feeds), _form(outputs, feeds)
        elements = {self._declared[name].element for name in (*outputs, *given)}
        if self._graphs is None or shapes is None or BFLOAT16 in elements:
            return
        with self._lock:
            if form not in self._captured and len(self._captured) < CAPTURED_SHAPES:
                known = {name: array.shape for name, array in given.items()} | shapes
                allocate, options = self._graphs.allocate, self._graphs.options(1 + len(self._captured))
                tensors = {name: allocate(shape, self._declared[name].element) for name, shape in known.items()}
                self._captured[form] = _FixedShape(self._session, self._host, tensors, outputs, options)

    def distrust_declared_shapes(self) -> None:
        """From now on the runtime allocates every output."""
        with self._lock:
            self._declared_shapes_hold = False
            self._captured.clear()
            self._any_shape.clear()

    def _binding(self, outputs: tuple[str, ...], feeds: Arrays, parameters: Arrays) -> _AnyShape:
        key = (*outputs, *feeds, *parameters)
        if key not in self._any_shape:
            options = self._graphs.options(-1) if self._graphs else None
            self._any_shape[key] = _AnyShape(self._session, self._host, self._declared, outputs, options)
            while len(self._any_shape) > KEPT_BINDINGS:
                self._any_shape.popitem(last=False)
        self._any_shape.move_to_end(key)
        return self._any_shape[key]

    def _shapes(self, outputs: tuple[str, ...], feeds: Arrays) -> dict[str, Shape] | None:
        """The outputs' shapes, where every size of each is a number in the graph or has the name of an input's size."""
        sizes = {
            dim: size
            for name, array in feeds.items()
            for dim, size in zip(self._declared[name].dims, array.shape, strict=False)
        }
        shapes = {name: self._declared[name].shape(sizes) for name in outputs}
        known = {name: shape for name, shape in shapes.items() if shape is not None}
        return known if self._declared_shapes_hold and len(known) == len(shapes) else None


class _AnyShape:
    """Batches of any shape for one set of outputs, bound where they lie on the host; the runtime copies them."""

    def __init__(
        self, session: Any, host: HostBuffers, declared: Mapping[str, Declared], outputs: tuple[str, ...], options: Any
    ) -> None:
        self._session, self._host, self._declared = session, host, declared
        self._outputs, self._options = outputs, options
        self._required = {node.name for node in session.get_inputs()}
        self._binding = session.io_binding()
        self._parameters: Arrays = NOTHING
        self._bound_parameters: list[NDArray[Any]] = []  # on the CPU a binding holds no more than an address
        self._sizes: list[Shape] = []  # of the inputs that `_buffers` are for
        self._buffers: list[NDArray[Any]] = []  # bound as outputs; none where the runtime allocates them

    def run(
        self, feeds: Arrays, parameters: Arrays, shapes: Callable[[], Mapping[str, Shape] | None], options: Any
    ) -> list[NDArray[Any]]:
        if parameters is not self._parameters:
            self._bound_parameters = [self._bind_input(name, array) for name, array in parameters.items()]
            self._parameters = parameters
        given = [self._bind_input(name, array) for name, array in feeds.items()]
        sizes = [array.shape for array in given]
        if sizes != self._sizes or not self._buffers:
            self._sizes, self._buffers = sizes, self._bind_outputs(shapes())
        self._session.run_with_iobinding(self._binding, options or self._options)
        if not self._buffers:
            return [array_of(value) for value in self._binding.get_outputs()]
        return [buffer.copy() for buffer in self._buffers]

    def _bind_input(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        array = np.asarray(array, order="C")
        if name in self._required and self._declared[name].element != BFLOAT16:
            self._binding.bind_cpu_input(name, array)
        else:  # the call above knows no others
            element = BFLOAT16 if self._declared[name].element == BFLOAT16 else array.dtype.type
            self._binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)
        return array

    def _bind_outputs(self, shapes: Mapping[str, Shape] | None) -> list[NDArray[Any]]:
        if shapes is None:
            for name in self._outputs:
                self._binding.bind_output(name, "cpu")  # each time, or the runtime would write where it wrote before
            return []
        return [self._bind_output(name, shape) for name, shape in shapes.items()]

    def _bind_output(self, name: str, shape: Shape) -> NDArray[Any]:
        element = self._declared[name].element
        buffer = self._host.view(name, shape, np.dtype(np.uint16 if element == BFLOAT16 else element))
        self._binding.bind_output(name, "cpu", 0, element, shape, buffer.ctypes.data)
        return buffer


class _FixedShape:
    """Batches of one shape, at addresses on the device that stay: what a CUDA graph replays."""

    def __init__(
        self, session: Any, host: HostBuffers, tensors: Mapping[str, Any], outputs: tuple[str, ...], options: Any
    ) -> None:
        self._session, self._host, self._tensors, self._outputs = session, host, tensors, outputs
        self._options = options
        self._parameters: Arrays = NOTHING
        self._binding = session.io_binding()
        for name, tensor in tensors.items():
            bind = self._binding.bind_ortvalue_output if name in outputs else self._binding.bind_ortvalue_input
            bind(name, tensor)

    def run(self, feeds: Arrays, parameters: Arrays) -> list[NDArray[Any]]:
        changed = {} if parameters is self._parameters else parameters
        for name, array in {**feeds, **changed}.items():
            self._tensors[name].update_inplace(self._host.copy(name, array))
        self._parameters = parameters
        self._session.run_with_iobinding(self._binding, self._options)
        return [np.array(self._tensors[name].numpy()) for name in self._outputs]


def _form(outputs: tuple[str, ...], feeds: Arrays) -> tuple[Any, ...]:
    return (outputs, *((name, array.shape, array.dtype) for name, array in feeds.items()))


def array_of(value: Any) -> NDArray[Any]:
    """A tensor of the runtime as numpy; of BF16, which numpy lacks, the 16-bit words."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    words = (ctypes.c_uint16 * (value.tensor_size_in_bytes() // 2)).from_address(value.data_ptr())
    return np.array(words, dtype=np.uint16).reshape(value.shape())
