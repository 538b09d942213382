"""The Open Inference Protocol: what a caller sends is checked here, and the answer spelled out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import CalserveError, InvalidRequest, NotReady, Refused, shown
from service.inference.model import ServedModel, Snapshot
from service.inference.repository import Repository
from service.learning.revisions import Revisions
from service.rpc import classification, tensors
from service.rpc.health import Health
from service.rpc.infer_request import read_inputs, read_outputs
from service.rpc.methods import Call
from service.rpc.status import status_of
from service.rpc.wire import inference

log = logging.getLogger(__name__)

MOST_IN_FLIGHT = 128
"""Requests of one stream that may wait for their answers; more are not read until one is answered."""


@dataclass(frozen=True)
class Inference:
    """The part of inference.GRPCInferenceService that runs models."""

    repository: Repository
    revisions: Revisions
    health: Health
    default_deadline_seconds: float

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


def _positive_integer(output: Any) -> int:
    value = tensors.parameter_value(output.parameters[classification.PARAMETER])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(
            f"output {output.name!r}: parameter 'classification' must be a whole number of 1 or more, "
            f"got {shown(value)}"
        )
    return value


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
