"""The Open Inference Protocol: what a caller sends is checked here, and the answer spelled out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import __version__
from service.errors import CalserveError, InvalidRequest, NotReady, Refused, shown
from service.inference.model import ServedModel, Snapshot
from service.inference.repository import Repository
from service.inference.session import TensorSpec
from service.inference.statistics import Statistics
from service.learning.revisions import Revisions
from service.rpc import classification, tensors
from service.rpc.health import READY, Health
from service.rpc.methods import Call, Method, methods_of
from service.rpc.status import status_of
from service.rpc.wire import INFERENCE_SERVICE, inference

log = logging.getLogger(__name__)

PLATFORM = "onnxruntime_onnx"
# Parameters of Triton's that would change what comes back: refused, not ignored.
UNSUPPORTED_OUTPUT_PARAMETERS = ("shared_memory_region",)
EXTENSIONS = ("classification", "model_configuration", "statistics")
"""What is advertised. The repository's index is answered too, but not the rest of that extension, load and unload."""
MOST_IN_FLIGHT = 128
"""Requests of one stream that may wait for their answers; more are not read until one is answered."""


@dataclass(frozen=True)
class InferenceService:
    """Servicer of inference.GRPCInferenceService."""

    repository: Repository
    revisions: Revisions
    health: Health
    default_deadline_seconds: float

    def methods(self) -> list[Method]:
        return methods_of(INFERENCE_SERVICE, self)

    async def server_live(self, request: Any, call: Call) -> Any:
        return inference.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, call: Call) -> Any:
        return inference.ServerReadyResponse(ready=self.health.serving(READY))

    async def model_ready(self, request: Any, call: Call) -> Any:
        try:
            model = self.repository.get(request.name, request.version)
        except NotReady:
            return inference.ModelReadyResponse(ready=False)
        return inference.ModelReadyResponse(ready=self.health.serving(model.name))

    async def server_metadata(self, request: Any, call: Call) -> Any:
        return inference.ServerMetadataResponse(name="calserve", version=__version__, extensions=EXTENSIONS)

    async def model_metadata(self, request: Any, call: Call) -> Any:
        model = self.repository.get(request.name, request.version)
        response = inference.ModelMetadataResponse(
            name=model.name, versions=self.repository.versions(model.name), platform=PLATFORM
        )
        for specs, messages in ((model.inputs, response.inputs), (model.outputs, response.outputs)):
            for spec in specs:
                messages.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return response

    async def model_infer(self, request: Any, call: Call) -> Any:
        if self.health.draining:
            raise NotReady("the server is shutting down")
        model = self.repository.get(request.model_name, request.model_version)
        begun = time.perf_counter_ns()
        try:
            response, rows = await self._infer(model, request, call)
        except Exception:
            model.statistics.refused(time.perf_counter_ns() - begun)
            raise
        model.statistics.answered(rows, time.perf_counter_ns() - begun)
        return response

    async def model_stream_infer(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        """Answers in the order of the requests; runs are made meanwhile. An error is an answer."""
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(MOST_IN_FLIGHT)

        async def read() -> None:
            async for request in requests:
                await answers.put(asyncio.create_task(self._stream_answer(request, call)))
            await answers.put(None)

        reader = asyncio.create_task(read())
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
            await reader  # a message that could not be read ends the stream with its error
        finally:
            reader.cancel()
            while not answers.empty():
                if (left := answers.get_nowait()) is not None:
                    left.cancel()

    async def model_config(self, request: Any, call: Call) -> Any:
        model = self.repository.get(request.name, request.version)
        response = inference.ModelConfigResponse(config=model.config)
        config = response.config
        config.name, config.platform, config.backend = model.name, PLATFORM, "onnxruntime"
        for specs, field in ((model.inputs, "input"), (model.outputs, "output")):
            config.ClearField(field)
            for spec in specs:
                dims = spec.shape[1:] if model.max_batch_size else spec.shape
                getattr(config, field).add(name=spec.name, data_type=f"TYPE_{_config_word(spec.datatype)}", dims=dims)
        return response

    async def model_statistics(self, request: Any, call: Call) -> Any:
        if request.name:
            self.repository.get(request.name, request.version)
        response = inference.ModelStatisticsResponse()
        for model in self.repository.models():
            if request.name in ("", model.name) and request.version in ("", model.version):
                _fill_statistics(response.model_stats.add(name=model.name, version=model.version), model.statistics)
        return response

    async def repository_index(self, request: Any, call: Call) -> Any:
        response = inference.RepositoryIndexResponse()
        for model in self.repository.models():
            if model.name not in self.repository.failures:
                response.models.add(name=model.name, version=model.version, state="READY")
        for name, reason in sorted(self.repository.failures.items()):
            if not request.ready:
                response.models.add(name=name, state="UNAVAILABLE", reason=reason)
        return response

    async def _stream_answer(self, request: Any, call: Call) -> Any:
        answer = inference.ModelStreamInferResponse()
        try:
            answer.infer_response.CopyFrom(await self.model_infer(request, call))
        except Exception as error:
            if not isinstance(error, CalserveError):
                log.error("call %s failed in a stream", call.id, exc_info=error)
            answer.error_message = status_of(error, call.id).message
            answer.infer_response.id = request.id
        if tensors.parameter_value(request.parameters["triton_enable_empty_final_response"]):
            answer.infer_response.parameters["triton_final_response"].bool_param = True
        return answer

    async def _infer(self, model: ServedModel, request: Any, call: Call) -> tuple[Any, int]:
        """The response, and how many rows it answers."""
        feeds = read_inputs(model, request)
        wanted = read_outputs(model, request)
        snapshot = await self._snapshot(model, request)
        computed = list(dict.fromkeys([*wanted, *_watched(model)]))
        deadline = call.deadline or time.monotonic() + self.default_deadline_seconds
        arrays = dict(zip(computed, await model.run(computed, feeds, snapshot, deadline), strict=True))
        if model.is_classifier:
            check_confidence(arrays["confidence"], feeds, model)
        answered = {name: arrays[name] for name in wanted}
        for output in request.outputs:
            if classification.PARAMETER in output.parameters:
                k = _positive_integer(output)
                answered[output.name] = classification.top(output.name, answered[output.name], k, model.class_names)
        return self._respond(model, request, snapshot, answered), model.row_count(feeds)

    async def _snapshot(self, model: ServedModel, request: Any) -> Snapshot:
        parameter = request.parameters.get("calibrator") if "calibrator" in request.parameters else None
        if parameter is None:
            return model.active
        revision = tensors.parameter_value(parameter)
        if not isinstance(revision, str):
            raise InvalidRequest(
                f"parameter 'calibrator' must be a string, a revision or 'none'; got {shown(revision)}"
            )
        return await self.revisions.snapshot(model, revision)

    def _respond(self, model: ServedModel, request: Any, snapshot: Snapshot, arrays: Mapping[str, NDArray[Any]]) -> Any:
        response = inference.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
        if model.is_classifier:
            response.parameters["calibrator_revision"].CopyFrom(tensors.string_parameter(snapshot.revision))
        response.parameters["provider"].CopyFrom(tensors.string_parameter(snapshot.session.provider))
        datatypes = {spec.name: spec.datatype for spec in (*model.outputs, *model.hidden_outputs)}
        sent_typed = bool(request.inputs) and not request.raw_input_contents
        datatypes |= {name: "BYTES" for name, array in arrays.items() if array.dtype == object}
        typed = sent_typed and all(datatypes[name] in tensors.TYPED_FIELDS for name in arrays)
        for name, array in arrays.items():
            output = response.outputs.add(name=name, datatype=datatypes[name], shape=array.shape)
            if typed:
                tensors.fill_typed(output.contents, datatypes[name], array)
            else:
                response.raw_output_contents.append(tensors.to_raw(array))
        return response


def _config_word(datatype: str) -> str:
    return "STRING" if datatype == "BYTES" else datatype


def _positive_integer(output: Any) -> int:
    value = tensors.parameter_value(output.parameters[classification.PARAMETER])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(
            f"output {output.name!r}: parameter 'classification' must be a whole number of 1 or more, "
            f"got {shown(value)}"
        )
    return value


def _fill_statistics(message: Any, statistics: Statistics) -> None:
    message.last_inference = statistics.last_ms
    message.inference_count, message.execution_count = statistics.rows, statistics.executions
    totals = message.inference_stats
    for target, duration in (
        (totals.success, statistics.success),
        (totals.fail, statistics.fail),
        (totals.queue, statistics.queue),
        (totals.compute_infer, statistics.infer),
    ):
        target.count, target.ns = duration.count, duration.ns
    for rows, duration in sorted(statistics.batches.items()):
        batch = message.batch_stats.add(batch_size=rows)
        batch.compute_infer.count, batch.compute_infer.ns = duration.count, duration.ns


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
    if model.max_batch_size:
        batches = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(batches.values())) > 1:
            raise InvalidRequest(f"the inputs have different batch sizes: {batches}")
        for name, rows in batches.items():
            if rows > model.max_batch_size:
                raise InvalidRequest(
                    f"input {name!r}: a batch of at most {model.max_batch_size} rows wanted, got {rows}"
                )


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


def check_confidence(confidence: NDArray[Any], feeds: Mapping[str, NDArray[Any]], model: ServedModel) -> None:
    """No probability is served that is not a number. InvalidRequest if an input brought it in, else Refused."""
    if np.isfinite(confidence).all():
        return
    row = int(np.argmin(np.isfinite(confidence)))
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
            raise InvalidRequest(
                f"input {name!r} holds {array[tuple(index)]} at index {index}; "
                f"the model's probabilities of row {row} are then not numbers"
            )
    raise Refused(f"model {model.name!r} gave scores that are not numbers for row {row}", reason="MODEL_GAVE_NAN")


def _watched(model: ServedModel) -> list[str]:
    """Outputs fetched in any case: a NaN anywhere in a row shows in its confidence."""
    return ["confidence"] if model.is_classifier else []


def _shown(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if size < 0 else str(size) for size in shape) + "]"
