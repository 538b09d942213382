"""Tensors of the Open Inference Protocol: from messages to numpy and back.

Shapes are Python integers until they are proved to fit the bytes that came; nothing is allocated before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, shown
from service.inference.datatypes import NUMPY
from service.rpc.wire import inference

MAX_RANK = 8
MAX_DIMENSION = 2**31

# datatype -> the field of InferTensorContents that carries it
TYPED_FIELDS: dict[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def check_shape(name: str, shape: Sequence[int]) -> int:
    """The number of elements; InvalidRequest for a rank or a dimension that no tensor has."""
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"input {shown(name)}: rank at most {MAX_RANK} wanted, got {len(shape)}")
    for axis, size in enumerate(shape):
        if not 0 <= size <= MAX_DIMENSION:
            raise InvalidRequest(f"input {shown(name)}: dimension {axis} must be in 0..{MAX_DIMENSION}, got {size}")
    return math.prod(shape)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> NDArray[Any]:
    """An array over the raw bytes of one input, without a copy (BYTES: an object array)."""
    count = check_shape(name, shape)
    if datatype == "BYTES":
        return _object_array(_split_bytes(name, raw, count), shape)
    dtype = NUMPY[datatype]
    wanted = count * dtype.itemsize
    if len(raw) != wanted:
        raise InvalidRequest(
            f"input {shown(name)}: {datatype} of shape {list(shape)} takes {wanted} bytes, got {len(raw)}"
        )
    if datatype == "BOOL" and raw.translate(None, b"\0\1"):
        raise InvalidRequest(f"input {shown(name)}: a BOOL byte must be 0 or 1")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def from_typed(name: str, datatype: str, shape: Sequence[int], contents: Any) -> NDArray[Any]:
    """An array from typed contents: the right field, only that field, the right count, every value in range."""
    field = TYPED_FIELDS.get(datatype)
    if field is None:
        raise InvalidRequest(f"input {shown(name)}: {datatype} travels only as raw_input_contents")
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if filled not in ([], [field]):
        raise InvalidRequest(f"input {shown(name)}: {datatype} belongs in contents.{field}, got {', '.join(filled)}")
    values = getattr(contents, field)
    count = check_shape(name, shape)
    if len(values) != count:
        raise InvalidRequest(f"input {shown(name)}: shape {list(shape)} takes {count} elements, got {len(values)}")
    if datatype == "BYTES":
        return _object_array(list(values), shape)
    dtype = NUMPY[datatype]
    widest = {"i": np.dtype(np.int64), "u": np.dtype(np.uint64)}.get(dtype.kind, dtype)
    array = np.array(values, dtype=widest)
    if dtype.kind in "iu" and count:
        limits = np.iinfo(dtype)
        if not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
            worst = int(array.min()) if int(array.min()) < limits.min else int(array.max())
            raise InvalidRequest(
                f"input {shown(name)}: {datatype} holds {limits.min}..{limits.max}, got {worst} in contents.{field}"
            )
    return array.astype(dtype).reshape(shape)


def datatype_of(name: str, array: NDArray[Any]) -> str:
    """The protocol's word for an array's element type (16-bit words count as UINT16)."""
    for word, dtype in NUMPY.items():
        if dtype == array.dtype:
            return word
    raise InvalidRequest(f"{name}: an array of numbers, booleans or bytes wanted, got dtype {array.dtype}")


def to_raw(array: NDArray[Any]) -> bytes:
    """The bytes of one output: row-major, little endian; strings with a 4-byte length before each."""
    if array.dtype == object:
        parts = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def fill_typed(contents: Any, datatype: str, array: NDArray[Any]) -> None:
    """Write an output into typed contents (for callers that sent typed contents)."""
    values = array.ravel().tolist()
    if datatype == "BYTES":
        values = [item if isinstance(item, bytes) else str(item).encode() for item in values]
    getattr(contents, TYPED_FIELDS[datatype]).extend(values)


def parameter_value(parameter: Any) -> bool | int | str | float | None:
    """The value of an InferParameter; None if none is set."""
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def string_parameter(value: str) -> Any:
    return inference.InferParameter(string_param=value)


def _split_bytes(name: str, raw: bytes, count: int) -> list[bytes]:
    if 4 * count > len(raw):
        raise InvalidRequest(f"input {shown(name)}: {count} BYTES elements take 4 bytes each at least, got {len(raw)}")
    items: list[bytes] = []
    position = 0
    while position < len(raw) and len(items) < count:
        length = int.from_bytes(raw[position : position + 4], "little")
        start = position + 4
        position = start + length
        if start > len(raw) or position > len(raw):
            break
        items.append(raw[start:position])
    if len(items) != count or position != len(raw):
        raise InvalidRequest(
            f"input {shown(name)}: raw BYTES must be {count} elements, each behind its 4-byte little-endian length; "
            f"the {len(raw)} bytes sent are not"
        )
    return items


def _object_array(items: list[bytes], shape: Sequence[int]) -> NDArray[Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)
