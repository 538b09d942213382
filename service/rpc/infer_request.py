"""What a request for inference says, held against what its model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from service.errors import InvalidRequest, shown
from service.inference.model import ServedModel
from service.inference.session import TensorSpec
from service.rpc import tensors

# Parameters of Triton's that would change what comes back: refused, not ignored.
UNSUPPORTED_OUTPUT_PARAMETERS = ("shared_memory_region",)


def read_inputs(model: ServedModel, request: Any) -> dict[str, NDArray[Any]]:
    """The request's inputs, each of the type and shape that the model declares. InvalidRequest otherwise."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents must hold one entry for each of the {len(request.inputs)} inputs, got {len(raw)}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    specs = {spec.name: spec for spec in model.inputs}
    for index, tensor in enumerate(request.inputs):
        check_input_name(model, tensor.name, specs, arrays)
        check_datatype(tensor.name, tensor.datatype, specs[tensor.name])
        check_dimensions(tensor.name, tensor.shape, specs[tensor.name])
        if "shared_memory_region" in tensor.parameters:
            raise InvalidRequest(f"input {shown(tensor.name)}: shared memory is not supported by this server")
        if raw:
            if tensor.HasField("contents"):
                raise InvalidRequest(
                    f"input {shown(tensor.name)} has typed contents beside raw_input_contents; send one kind"
                )
            arrays[tensor.name] = tensors.from_raw(tensor.name, tensor.datatype, tensor.shape, raw[index])
        else:
            arrays[tensor.name] = tensors.from_typed(tensor.name, tensor.datatype, tensor.shape, tensor.contents)
    check_complete(model, arrays)
    return arrays


def check_input_name(
    model: ServedModel, name: str, specs: Mapping[str, TensorSpec], seen: Mapping[str, NDArray[Any]]
) -> None:
    if name not in specs:
        raise InvalidRequest(f"model {model.name!r} has no input {shown(name)}; it has: {', '.join(specs)}")
    if name in seen:
        raise InvalidRequest(f"input {shown(name)} is given twice")


def check_datatype(name: str, datatype: str, spec: TensorSpec) -> None:
    if datatype != spec.datatype:
        raise InvalidRequest(f"input {name!r}: datatype {spec.datatype} wanted, got {shown(datatype)}")


def check_dimensions(name: str, shape: Sequence[int], spec: TensorSpec) -> None:
    tensors.check_shape(name, shape)
    if len(shape) != len(spec.shape):
        raise InvalidRequest(f"input {name!r}: shape {_shown(spec.shape)} wanted, got {list(shape)}, of another rank")
    for axis, (wanted, got) in enumerate(zip(spec.shape, shape, strict=True)):
        if wanted not in (-1, got):
            raise InvalidRequest(
                f"input {name!r}: dimension {axis} must be {wanted}, got {got} "
                f"(shape {_shown(spec.shape)} wanted, got {list(shape)})"
            )


def check_complete(model: ServedModel, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Every input is there, and the batch is one that the model takes."""
    missing = [spec.name for spec in model.inputs if spec.name not in arrays]
    if missing:
        raise InvalidRequest(f"model {model.name!r} needs the inputs {', '.join(missing)} too")
    if model.joins_requests:
        batches = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(batches.values())) > 1:
            raise InvalidRequest(f"the inputs have different batch sizes: {batches}")


def read_outputs(model: ServedModel, request: Any) -> list[str]:
    """The outputs to compute: those named, or all that the metadata declares."""
    names = [spec.name for spec in model.outputs]
    if not request.outputs:
        return names
    names += [spec.name for spec in model.hidden_outputs]
    wanted: list[str] = []
    for output in request.outputs:
        if output.name not in names:
            raise InvalidRequest(f"model {model.name!r} has no output {shown(output.name)}; it has: {', '.join(names)}")
        if output.name in wanted:
            raise InvalidRequest(f"output {shown(output.name)} is asked for twice")
        for parameter in UNSUPPORTED_OUTPUT_PARAMETERS:
            if parameter in output.parameters:
                raise InvalidRequest(f"output {output.name!r}: parameter {parameter!r} is not supported by this server")
        wanted.append(output.name)
    return wanted


def _shown(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if size < 0 else str(size) for size in shape) + "]"
