"""A fitted calibrator as bytes.

The bytes are a safetensors file: eight bytes with the header's length, the header as JSON (each tensor's dtype, shape
and place), then the learned arrays. Its metadata has ONE key, `calserve`, holding canonical JSON

    {"format": 1, "kind": "temperature", "params": {}}

because safetensors writes several keys in no stable order. So one fit always gives the same bytes, and their sha256 is
its name; that name, not the artifact, is what protects the numbers against silent change. Against everything else
`loads` defends itself: artifacts hold numbers and names only, never code or a path to import, each length is checked
before it is used, and each array must be one that the kind could have learned. (Pickle runs code; `.npz` is a zip with
timestamps; ONNX holds the arithmetic too and would fix it for ever.)
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from calibrators.base import Calibrator
from calibrators.numerics import Array
from calibrators.registry import create

FORMAT = 1
METADATA_KEY = "calserve"
MAX_HEADER_BYTES = 1 << 16
"""A header names a handful of tensors and parameters; a longer one is not ours."""

DTYPES = ("F64", "F32", "F16", "I64")


def dumps(calibrator: Calibrator) -> bytes:
    """The artifact of a fitted calibrator; the same fit gives the same bytes.

    Raises
    ------
    NotFittedError
        before `fit`
    TypeError
        if a constructor parameter is not a plain JSON value

    Examples
    --------
    >>> from calibrators.kinds.temperature import TemperatureScaling
    >>> calibrator = TemperatureScaling().fit([[0.0, 4.0]] * 4, [1, 1, 1, 0])
    >>> loads(dumps(calibrator)).temperature_ == calibrator.temperature_
    np.True_
    """
    document = {"format": FORMAT, "kind": calibrator.kind, "params": calibrator.get_params(deep=False)}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    tensors = {name: np.asarray(array, order="C") for name, array in calibrator.tensors().items()}
    return bytes(safetensors.numpy.save(tensors, metadata={METADATA_KEY: text}))


def loads(data: bytes) -> Calibrator:
    """The calibrator that `dumps` wrote.

    Raises
    ------
    ValueError
        if the bytes are cut short, of another format version, or name a kind, parameters or tensors unknown here, or
        hold arrays that the kind cannot have learned
    """
    header = _header(data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.keys() != {METADATA_KEY}:
        raise ValueError(f"not a calibrator's artifact: its metadata must be one text, {METADATA_KEY!r}")
    document = _json_object(metadata[METADATA_KEY], "the artifact's metadata")
    version = document.get("format")
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"the artifact has format {version!r}, this release reads {FORMAT}")
    kind, params = document.get("kind"), document.get("params")
    if document.keys() != {"format", "kind", "params"} or not isinstance(kind, str) or not isinstance(params, dict):
        raise ValueError(f"the artifact's metadata must hold format, kind and params, got {sorted(document)}")
    return create(kind, **params).set_tensors(_tensors(data, header))


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"not a calibrator's artifact: {len(data)} bytes cannot hold a header of {length} bytes")
    return _json_object(data[8 : 8 + length], "the artifact's header")


def _json_object(text: Any, name: str) -> dict[str, Any]:
    if not isinstance(text, str | bytes):
        raise ValueError(f"{name} must be text, got {type(text).__name__}")
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers disagree about a name given twice, so that is refused."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name is given twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tensors(data: bytes, header: dict[str, Any]) -> dict[str, Array]:
    """The arrays, after safetensors has checked that they fill the rest of the bytes without gap or overlap."""
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or entry.get("dtype") not in DTYPES:
            raise ValueError(f"tensor {name!r} must have a shape and a dtype of {', '.join(DTYPES)}, got {entry!r}")
        if not all(type(size) is int and 0 < size <= len(data) for size in shape):
            raise ValueError(f"tensor {name!r} cannot have shape {shape}")
    try:
        return dict(safetensors.numpy.load(data))
    except SafetensorError as error:
        raise ValueError(f"not a calibrator's artifact: {error}") from None
