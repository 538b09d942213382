"""The Open Inference Protocol's calls that run a model: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np

from service.errors import InvalidRequest, NotReady, Refused
from service.inference.batcher import Answer, bytes_of
from service.inference.repository import Repository
from service.learning.journalling import Journalling, ModelJournal
from service.learning.revisions import Revisions
from service.rpc import infer_plan
from service.rpc.health import Health
from service.rpc.infer_plan import RECEIPT, Reading, Templates, own_id
from service.rpc.infer_response import PREDICTION_ID, Encoder, parameter
from service.rpc.infer_stream import Begun, InferStream
from service.rpc.methods import Call, Cancellable, Tell, in_task, parse
from service.rpc.sessions import Line
from service.rpc.shared_memory import Regions
from service.rpc.tracing import Tracing
from service.rpc.wire import inference

INFER, STREAM_INFER = "ModelInfer", "ModelStreamInfer"


class _Asked:
    """A call of ModelInfer that waits for nothing but its run: told of its answer, it tells the front."""

    __slots__ = ("_call", "_finish", "_over", "_tell", "begun")
    begun: Begun

    def __init__(self, call: Call, tell: Tell, finish: Callable[[Begun, Answer | Exception, Call, str], bytes]) -> None:
        self._call, self._tell, self._finish = call, tell, finish
        self._over = False

    def done(self) -> bool:
        return self._over

    def set_result(self, answer: Answer | Exception) -> None:
        self._over = True
        try:
            reply = self._finish(self.begun, answer, self._call, INFER)
        except Exception as error:
            self._tell(b"", error)
        else:
            self._tell(reply, None)

    set_exception = set_result

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._tell(b"", asyncio.CancelledError())


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
        self._templates, self._known_at, self._encoder = Templates(), -1, Encoder()

    def model_infer_direct(self, data: bytes, call: Call, tell: Tell) -> Cancellable | None:
        asked = _Asked(call, tell, self._finish_now)
        begun = self._begin(data, call, INFER, asked)
        if begun.answer is None:
            return None if asked.done() else asked
        if isinstance(begun.answer, Answer) and not begun.reading.plan.waits:
            asked.set_result(begun.answer)
            return None
        return in_task(self._finish(begun, call, INFER), tell)

    def model_stream_infer_session(self, line: Line, call: Call) -> InferStream:
        begin = partial(self._begin, call=call, method=STREAM_INFER)
        finish = partial(self._finish, call=call, method=STREAM_INFER)
        return InferStream(line, call, begin, finish, partial(self._finish_now, call=call, method=STREAM_INFER))

    def _begin(self, data: bytes, call: Call, method: str, asked: _Asked | None = None) -> Begun:
        """Read a request and queue it for its run; where it waits for no more than that, `asked` is told of it."""
        begun, reading = time.perf_counter_ns(), None
        try:
            reading = self._read(data, call, begun)
            if asked is not None:
                asked.begun = Begun(reading, None, begun)  # it may be told at once
            return Begun(reading, self._submit(reading, call, asked), begun)
        except Exception as error:
            if reading is not None:
                reading.plan.model.statistics.refused(time.perf_counter_ns() - begun)
            if self._tracing is not None:
                self._tracing.refused(method, call, begun, error)
            raise

    async def _finish(self, begun: Begun, call: Call, method: str) -> bytes:
        """The bytes of the answer, or the request's error; either is counted."""
        try:
            assert begun.answer is not None  # noqa: S101 # nobody else is told
            answer = begun.answer if isinstance(begun.answer, Answer) else await begun.answer
            computed, said = self._kept(begun.reading, answer)
            journal = begun.reading.plan.journal
            if said and journal is not None and journal.waits:
                await journal.flush()
            return self._reply(begun, answer, call, method, computed, said)
        except Exception as error:
            self._refused(begun, call, method, error)
            raise

    def _finish_now(self, begun: Begun, answer: Answer | BaseException, call: Call, method: str) -> bytes:
        """The same of a request whose run was made, or could not be."""
        try:
            if isinstance(answer, BaseException):
                raise answer
            return self._reply(begun, answer, call, method, *self._kept(begun.reading, answer))
        except Exception as error:
            self._refused(begun, call, method, error)
            raise

    def _kept(self, reading: Reading, answer: Answer) -> tuple[int, bytes]:
        """When the answer was there, if calls are traced, and what it says of its place in the journal."""
        plan = reading.plan
        if plan.model.is_classifier and not answer.run.finite("confidence"):
            _check_confidence(answer, reading)
        computed = 0 if self._tracing is None else time.perf_counter_ns()
        return computed, b"" if plan.journal is None else _keep(plan.journal, answer, reading)

    def _reply(self, begun: Begun, answer: Answer, call: Call, method: str, computed: int, said: bytes) -> bytes:
        plan, kept = begun.reading.plan, 0 if self._tracing is None else time.perf_counter_ns()
        final = plan.final and method == STREAM_INFER
        reply = self._encoder.encode(plan, answer, begun.reading.id_field, said, final=final)
        plan.model.statistics.answered(plan.rows, time.perf_counter_ns() - begun.begun_ns)
        if self._tracing is not None:
            self._tracing.answered(method, call, begun.begun_ns, plan, answer.run, (computed, kept))
        return reply

    def _refused(self, begun: Begun, call: Call, method: str, error: Exception) -> None:
        plan = begun.reading.plan
        plan.model.statistics.refused(time.perf_counter_ns() - begun.begun_ns)
        if self._tracing is not None:
            self._tracing.refused(method, call, begun.begun_ns, error, plan)

    def _read(self, data: bytes, call: Call, begun_ns: int) -> Reading:
        if self._health.draining:
            raise NotReady("the server is shutting down")
        if self._known_at != self._repository.generation:  # other models are served: the old must not be kept alive
            self._templates.clear()
            self._encoder = Encoder()
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

    def _submit(self, reading: Reading, call: Call, asked: _Asked | None) -> Answer | Awaitable[Answer] | None:
        plan, feeds = reading.plan, reading.feeds
        deadline = call.deadline or time.monotonic() + self._default_deadline_seconds
        if plan.revision is not None or plan.divided:
            return self._run(reading, deadline, call.peer)
        if asked is None or plan.waits:
            return plan.model.batcher.submit(plan.lane, feeds, plan.rows, deadline, call.peer, more=call.more)
        answer = plan.model.batcher.submit_for(asked, plan.lane, feeds, plan.rows, deadline, call.peer, more=call.more)
        return answer if isinstance(answer, Answer) else None

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
