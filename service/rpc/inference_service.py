"""The Open Inference Protocol's calls that run a model: bytes in, bytes out."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np

from service.errors import InvalidRequest, NotReady, Refused
from service.inference.batcher import Answer, bytes_of
from service.inference.repository import Repository
from service.learning.journalling import Journalling, ModelJournal
from service.learning.revisions import Revisions
from service.rpc import infer_plan
from service.rpc.health import Health
from service.rpc.infer_plan import RECEIPT, Reading, Templates, own_id
from service.rpc.infer_response import PREDICTION_ID, encode, parameter
from service.rpc.infer_stream import Begun, InferStream
from service.rpc.methods import Call, parse
from service.rpc.sessions import Line
from service.rpc.shared_memory import Regions
from service.rpc.tracing import Tracing
from service.rpc.wire import inference


class Inference:
    """The part of inference.GRPCInferenceService that runs models."""

    def __init__(
        self,
        repository: Repository,
        revisions: Revisions,
        health: Health,
        regions: Regions,
        default_deadline_seconds: float,
        journalling: Journalling | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._repository, self._revisions, self._health = repository, revisions, health
        self._regions, self._default_deadline_seconds = regions, default_deadline_seconds
        self._journalling, self._tracing = journalling, tracing
        self._templates, self._known_at = Templates(), -1

    def model_infer_bytes(self, data: bytes, call: Call) -> Coroutine[Any, Any, bytes]:
        return self._finish(self._begin(data, call, "ModelInfer"), call)

    def model_stream_infer_session(self, line: Line, call: Call) -> InferStream:
        begin = partial(self._begin, call=call, method="ModelStreamInfer")
        return InferStream(line, call, begin, partial(self._finish, call=call, in_stream=True))

    def _begin(self, data: bytes, call: Call, method: str) -> Begun:
        """Read a request and queue it for its run."""
        begun, reading = time.perf_counter_ns(), None
        try:
            reading = self._read(data, call, begun)
            return Begun(reading, self._submit(reading, call), begun)
        except Exception as error:
            if reading is not None:
                reading.plan.model.statistics.refused(time.perf_counter_ns() - begun)
            if self._tracing is not None:
                self._tracing.refused(method, call, begun, error)
            raise

    async def _finish(self, begun: Begun, call: Call, *, in_stream: bool = False) -> bytes:
        """The bytes of the answer, or the request's error; either is counted."""
        plan, tracing, computed, kept = begun.reading.plan, self._tracing, 0, 0
        method = "ModelStreamInfer" if in_stream else "ModelInfer"
        try:
            answer = begun.answer if isinstance(begun.answer, Answer) else await begun.answer
            if plan.model.is_classifier and not answer.run.finite("confidence"):
                _check_confidence(answer, begun.reading)
            if tracing is not None:
                computed = time.perf_counter_ns()
            said = b"" if plan.journal is None else _keep(plan.journal, answer, begun.reading)
            if said and plan.journal is not None and plan.journal.waits:
                await plan.journal.flush()
            if tracing is not None:
                kept = time.perf_counter_ns()
            reply = encode(plan, answer, begun.reading.id_field, said, final=in_stream and plan.final)
        except Exception as error:
            plan.model.statistics.refused(time.perf_counter_ns() - begun.begun_ns)
            if tracing is not None:
                tracing.refused(method, call, begun.begun_ns, error, plan)
            raise
        plan.model.statistics.answered(plan.rows, time.perf_counter_ns() - begun.begun_ns)
        if tracing is not None:
            tracing.answered(method, call, begun.begun_ns, plan, answer.run, (computed, kept))
        return reply

    def _read(self, data: bytes, call: Call, begun_ns: int) -> Reading:
        if self._health.draining:
            raise NotReady("the server is shutting down")
        if self._known_at != self._repository.generation:  # other models are served: the old must not be kept alive
            self._templates.clear()
            self._known_at = self._repository.generation
        reading = self._templates.match(data)
        if reading is not None:
            if call.grant is not None:
                call.check_model(reading.plan.model.name)
            return reading
        request = parse(inference.ModelInferRequest, data)
        call.check_model(request.model_name)
        model = self._repository.get(request.model_name, request.model_version)
        try:
            reading = infer_plan.read(model, request, self._regions.of(call.owner), self._journalling)
        except Exception:
            model.statistics.refused(time.perf_counter_ns() - begun_ns)
            raise
        self._templates.keep(request, data, reading.plan)
        return reading

    def _submit(self, reading: Reading, call: Call) -> Answer | Awaitable[Answer]:
        plan = reading.plan
        deadline = call.deadline or time.monotonic() + self._default_deadline_seconds
        if plan.revision is not None or plan.divided:
            return self._run(reading, deadline, call.peer)
        return plan.model.batcher.submit(plan.lane, reading.feeds, plan.rows, deadline, call.peer, more=call.more)

    async def _run(self, reading: Reading, deadline: float, caller: Callable[[], str]) -> Answer:
        """A request that names a revision, or has more rows than a run takes."""
        plan = reading.plan
        snapshot, arrays = plan.lane.snapshot, plan.arrays(reading.feeds)
        if plan.revision is not None:
            snapshot = plan.settle(await self._revisions.snapshot(plan.model, plan.revision))
            infer_plan.add_shares(arrays, plan, snapshot, reading.id_field)
        return await plan.model.run(plan.lane.outputs, arrays, snapshot, deadline, caller)


def _keep(journal: ModelJournal, answer: Answer, reading: Reading) -> bytes:
    """Append an answer to the journal; what it says of that, as bytes of the message."""
    plan, of_inputs = reading.plan, reading.plan.model.input_signals
    inputs = () if of_inputs is None else of_inputs.sample(plan.arrays(reading.feeds))
    prediction_id, receipt = journal.keep(answer, own_id(reading.id_field), plan.segment, inputs, receipt=plan.receipt)
    if not prediction_id:
        return b""
    if journal.shadows:
        journal.offer(answer, partial(plan.arrays, reading.feeds), bytes_of(reading.feeds))
    return PREDICTION_ID + prediction_id + (parameter(RECEIPT, receipt) if receipt else b"")


def _check_confidence(answer: Answer, reading: Reading) -> None:
    """No probability is served that is not a number. InvalidRequest if an input brought it in, else Refused."""
    finite = np.isfinite(answer.part("confidence"))
    if finite.all():
        return  # it was in another caller's rows of the same run
    row, model = int(np.argmin(finite)), reading.plan.model
    for name, array in reading.plan.arrays(reading.feeds).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
            raise InvalidRequest(
                f"input {name!r} holds {array[tuple(index)]} at index {index}; "
                f"the model's probabilities of row {row} are then not numbers"
            )
    raise Refused(f"model {model.name!r} gave scores that are not numbers for row {row}", reason="MODEL_GAVE_NAN")
