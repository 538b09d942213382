"""What a request for inference says, held against what its model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from calibrators.graph import FURTHER_OUTPUTS
from service.errors import InvalidRequest, shown
from service.inference.model import ServedModel, Snapshot
from service.inference.session import TensorSpec
from service.rpc import tensors
from service.rpc.shared_memory import OwnRegions

REGION, BYTE_SIZE, OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"


@dataclass(frozen=True)
class Place:
    """Where a tensor is in shared memory. The region is looked up at each use: it may be another one by then."""

    regions: OwnRegions
    region: str
    offset: int
    byte_size: int

    def check(self) -> None:
        self.regions.get(self.region).check(self.offset, self.byte_size)

    def read(self) -> bytes:
        return self.regions.get(self.region).read(self.offset, self.byte_size)

    def write(self, data: bytes | memoryview) -> None:
        self.regions.get(self.region).write(self.offset, self.byte_size, data)


def read_inputs(model: ServedModel, request: Any, regions: OwnRegions) -> dict[str, NDArray[Any]]:
    """The request's inputs, each of the type and shape that the model declares. InvalidRequest otherwise."""
    in_message = [tensor for tensor in request.inputs if REGION not in tensor.parameters]
    if request.raw_input_contents and len(request.raw_input_contents) != len(in_message):
        which = "inputs" if len(in_message) == len(request.inputs) else "inputs outside shared memory"
        raise InvalidRequest(
            f"raw_input_contents must hold one entry for each of the {len(in_message)} {which}, "
            f"got {len(request.raw_input_contents)}"
        )
    raw = iter(request.raw_input_contents)
    arrays: dict[str, NDArray[Any]] = {}
    specs = {spec.name: spec for spec in model.inputs}
    for tensor in request.inputs:
        check_input_name(model, tensor.name, specs, arrays)
        check_datatype(tensor.name, tensor.datatype, specs[tensor.name])
        check_dimensions(tensor.name, tensor.shape, specs[tensor.name])
        place = place_of(tensor, f"input {tensor.name!r}", regions)
        if place is None and not request.raw_input_contents:
            arrays[tensor.name] = tensors.from_typed(tensor.name, tensor.datatype, tensor.shape, tensor.contents)
            continue
        if tensor.HasField("contents"):
            beside = "raw_input_contents" if place is None else REGION
            raise InvalidRequest(f"input {tensor.name!r} has typed contents beside {beside}; send one kind")
        data = next(raw) if place is None else place.read()
        arrays[tensor.name] = tensors.from_raw(tensor.name, tensor.datatype, tensor.shape, data)
    check_complete(model, arrays)
    return arrays


def place_of(tensor: Any, what: str, regions: OwnRegions) -> Place | None:
    """Where in shared memory an input is or an output goes; None if in the message. InvalidRequest for half a place."""
    if REGION not in tensor.parameters:
        return None
    region = tensors.parameter_value(tensor.parameters[REGION])
    if not isinstance(region, str):
        raise InvalidRequest(f"{what}: parameter {REGION!r} must be a string, got {shown(region)}")
    numbers = {}
    for name, default in ((BYTE_SIZE, None), (OFFSET, 0)):
        value = tensors.parameter_value(tensor.parameters[name]) if name in tensor.parameters else default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidRequest(f"{what}: parameter {name!r} must be a whole number of 0 or more, got {shown(value)}")
        numbers[name] = value
    return Place(regions, region, numbers[OFFSET], numbers[BYTE_SIZE])


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


def sent_typed(request: Any) -> bool:
    """Whether the caller spells tensors in typed contents, and gets them so."""
    return any(tensor.HasField("contents") for tensor in request.inputs)


def output_places(request: Any, regions: OwnRegions) -> dict[str, Place]:
    """Where in shared memory outputs go, of those that go there. InvalidRequest for places that do not exist."""
    places = {output.name: place_of(output, f"output {shown(output.name)}", regions) for output in request.outputs}
    found = {name: place for name, place in places.items() if place is not None}
    for place in found.values():
        place.check()
    return found


def place_output(place: Place, output: Any, data: bytes | memoryview) -> None:
    """Write an output's bytes to its place and say in `output` (an InferOutputTensor) where they are.

    In the response such an output has no typed contents, and an empty entry in raw_output_contents.
    """
    place.write(data)
    output.parameters[REGION].string_param = place.region
    output.parameters[BYTE_SIZE].int64_param = len(data)
    if place.offset:
        output.parameters[OFFSET].int64_param = place.offset


def asked_outputs(request: Any) -> tuple[str, ...]:
    """The outputs that a request names."""
    names = [output.name for output in request.outputs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"output {shown(twice)} is asked for twice")
    return tuple(names)


def choose_outputs(model: ServedModel, snapshot: Snapshot, asked: Sequence[str]) -> list[TensorSpec]:
    """The outputs to compute: those asked for, or all that the metadata declares while this snapshot is active."""
    if not asked:
        return snapshot.outputs
    specs = {spec.name: spec for spec in (*snapshot.outputs, *model.hidden_outputs)}
    for name in asked:
        if name not in specs:
            under = f" with {snapshot.revision}" if name in FURTHER_OUTPUTS else ""
            raise InvalidRequest(f"model {model.name!r}{under} has no output {shown(name)}; it has: {', '.join(specs)}")
    return [specs[name] for name in asked]


def _shown(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if size < 0 else str(size) for size in shape) + "]"
