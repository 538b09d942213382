"""One onnxruntime session. The only file that imports onnxruntime.

Sessions are made from bytes that were read and hashed before, so a model cannot pull in other files (external data by
path is refused by the runtime when it is given bytes).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import InvalidRequest, Refused
from service.inference import datatypes

_ONNX_BFLOAT16 = 16
_QUIET = 3  # warnings are about the graph, errors come as exceptions
_OPERATOR = re.compile(r"while running (\w+) node")


@dataclass(frozen=True)
class TensorSpec:
    """Name, datatype (the protocol's word; of sequences and maps the runtime's) and shape (-1: any size)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """Where sessions run, decided once at start."""

    provider: str
    options: Mapping[str, str]
    threads: int

    @classmethod
    def choose(cls, wanted: str, threads: int) -> Device:
        """`auto`, `cpu`, `cuda` or `cuda:1`. Refused when CUDA is asked for and absent; auto then means the CPU."""
        kind, _, index = wanted.partition(":")
        if kind not in {"auto", "cpu", "cuda"} or (index and not (kind == "cuda" and index.isdigit())):
            raise Refused(f"device must be auto, cpu, cuda or cuda:<index>, got {wanted!r}")
        cuda = cls("CUDAExecutionProvider", {"device_id": index or "0"}, threads)
        if kind != "cpu" and _works(cuda):
            return cuda
        if kind == "cuda":
            raise Refused(f"device {wanted!r} was asked for, but onnxruntime finds no usable CUDA device here")
        return cls("CPUExecutionProvider", {}, threads)


class Session:
    """A loaded graph: feeds in, arrays out. `run` may be called from any thread; it releases the GIL."""

    def __init__(self, model: bytes, device: Device) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = device.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _QUIET
        providers: list[Any] = [(device.provider, dict(device.options))]
        if device.provider != "CPUExecutionProvider":
            providers.append("CPUExecutionProvider")  # for the operators that the first has not
        try:
            self._session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # the runtime raises a dozen unrelated classes
            raise Refused(f"onnxruntime cannot load the model: {_first_line(error)}") from error
        self._session.disable_fallback()
        self.provider: str = self._session.get_providers()[0]
        self.inputs = [_spec(node) for node in self._session.get_inputs()]
        self.outputs = [_spec(node) for node in self._session.get_outputs()]
        self._string_inputs = {spec.name for spec in self.inputs if spec.datatype == "BYTES"}
        self._bfloat16_inputs = {spec.name for spec in self.inputs if spec.datatype == "BF16"}
        self._bfloat16_outputs = {spec.name for spec in self.outputs if spec.datatype == "BF16"}

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Values of the named outputs.

        Raises
        ------
        InvalidRequest
            if the graph cannot compute these values (an index out of range, dimensions that do not agree)
        """
        given: dict[str, Any] = dict(feeds)
        for name in self._string_inputs & given.keys():
            given[name] = _text(name, feeds[name])
        for name in self._bfloat16_inputs & given.keys():
            words = np.ascontiguousarray(feeds[name])
            given[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(words, _ONNX_BFLOAT16)
        try:
            if self._bfloat16_outputs.isdisjoint(outputs):
                return list(self._session.run(list(outputs), given))
            values = {name: _ort_value(value) for name, value in given.items()}
            return [_array(value) for value in self._session.run_with_ort_values(list(outputs), values)]
        except Exception as error:
            operator = _OPERATOR.search(str(error))
            where = f" (operator {operator[1]})" if operator else ""
            raise InvalidRequest(
                f"the model cannot compute these inputs{where}: a value or a shape is out of its range"
            ) from error


def _works(device: Device) -> bool:
    """Whether the provider runs a graph here: the package lists providers that this machine lacks."""
    if device.provider not in ort.get_available_providers():
        return False
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_PROBE, options, providers=[(device.provider, dict(device.options))])
    except Exception:  # no driver, no library, no such device: each has its own class
        return False
    return bool(session.get_providers()[0] == device.provider)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return TensorSpec(node.name, datatypes.OF_RUNTIME.get(node.type, node.type), shape)


def _text(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """BYTES as the runtime's strings, which are UTF-8."""
    decoded = np.empty(array.size, dtype=object)
    for index, item in enumerate(array.ravel()):
        try:
            decoded[index] = item.decode() if isinstance(item, bytes) else str(item)
        except UnicodeDecodeError:
            raise InvalidRequest(f"input {name!r}: element {index} is not UTF-8, which ONNX strings are") from None
    return decoded.reshape(array.shape)


def _ort_value(value: Any) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value)


def _array(value: Any) -> NDArray[Any]:
    """The value as numpy; of BF16, which numpy lacks, the 16-bit words."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    words = (ctypes.c_uint16 * (value.tensor_size_in_bytes() // 2)).from_address(value.data_ptr())
    return np.array(words, dtype=np.uint16).reshape(value.shape())


def _first_line(error: Exception) -> str:
    """The runtime's reason without the paths it likes to add."""
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"\S*/\S*", "...", text)[:300]


def _probe() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())


_PROBE = _probe()
