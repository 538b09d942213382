"""The answer to a request for inference, spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.inference.batcher import Answer, Run
from service.rpc import classification, infer_request, tensors
from service.rpc.infer_plan import RAW_OUTPUT_TAG, Plan, varint
from service.rpc.wire import inference
from service.store.keys import ID_CHARACTERS

MAX_REPLIES = 64
"""Layouts of answers kept for one plan; a revision or a shape that comes new makes a new one."""
JOINED_BYTES = 4 << 20
"""Of a run's answers: those of a longer run are not laid out together."""


class _Layout(NamedTuple):
    """What one run's answers to one plan have in common.

    Attributes
    ----------
    before, after : the bytes before the id, those between it and the values
    values : of each its name and the bytes before it
    rows : the values of all rows, each behind its bytes; empty where they were not joined
    row_bytes : what they are of each row
    """

    run: Run | None
    plan: Plan | None
    final: bool
    before: bytes = b""
    after: bytes = b""
    values: Sequence[tuple[str, bytes]] = ()
    rows: memoryview = memoryview(b"")
    row_bytes: int = 0


class Encoder:
    """Spells answers. Those of one run mostly come one after the other, so their rows are laid out once for all."""

    def __init__(self) -> None:
        self._layout = _Layout(None, None, False)

    def encode(self, plan: Plan, answer: Answer, id_field: bytes, said: bytes = b"", *, final: bool = False) -> bytes:
        """A ModelInferResponse: the bytes that every such answer has, and between them this one's id and values.

        `said` are parameters of this answer alone, as bytes of the message.
        """
        run, start, stop = answer
        if not plan.plain:
            return _spelled(plan, answer, id_field + said, final)
        layout = self._layout
        if layout.run is not run or layout.plan is not plan or layout.final is not final:
            layout = self._layout = _laid_out(plan, answer, final)
        if size := layout.row_bytes:
            return b"".join((layout.before, id_field, said, layout.after, layout.rows[start * size : stop * size]))
        parts = [layout.before, id_field, said, layout.after]
        for name, tag in layout.values:
            parts += (tag, run.part(name, start, stop).tobytes())
        return b"".join(parts)


def _laid_out(plan: Plan, answer: Answer, final: bool) -> _Layout:
    key, run = (answer.run.layout, final), answer.run
    if key not in plan.replies:
        if len(plan.replies) >= MAX_REPLIES:
            plan.replies.clear()
        plan.replies[key] = _around(plan, answer, final)
    before, after, values = plan.replies[key]
    sizes = [run.arrays[name].nbytes for name, _ in values]
    if plan.rows == 1 and run.rows and run.rows > 1 and all(sizes) and sum(sizes) <= JOINED_BYTES:
        return _Layout(run, plan, final, before, after, values, *_joined(run, values))
    # Nothing is kept of a long run, nor of one that nobody shares.
    return _Layout(None, None, final, before, after, values)


def _joined(run: Run, values: Sequence[tuple[str, bytes]]) -> tuple[memoryview, int]:
    columns = []
    for name, tag in values:
        array = np.ascontiguousarray(run.arrays[name])
        columns.append(np.frombuffer(tag * len(array), np.uint8).reshape(len(array), len(tag)))
        columns.append(array.view(np.uint8).reshape(len(array), -1))
    rows = np.concatenate(columns, axis=1)
    return rows.data.cast("B"), rows.shape[1]


def _around(plan: Plan, answer: Answer, final: bool) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    """The bytes before the id, those between it and the values; of each value its name and the bytes before it."""
    arrays = {name: answer.part(name) for name in plan.datatypes}
    values = [(name, RAW_OUTPUT_TAG + varint(array.nbytes)) for name, array in arrays.items()]
    head = inference.ModelInferResponse(model_name=plan.model.name, model_version=plan.model.version)
    rest = inference.ModelInferResponse()
    _say(rest, plan, answer.run, final)
    for name, array in arrays.items():
        rest.outputs.add(name=name, datatype=_datatype(plan, name, array), shape=array.shape)
    return head.SerializeToString(), rest.SerializeToString(), values


def parameter(name: str, value: bytes) -> bytes:
    """A parameter of an answer whose value is text, as bytes of the message."""
    response = inference.ModelInferResponse()
    response.parameters[name].string_param = value.decode()
    return bytes(response.SerializeToString())


PREDICTION_ID = parameter("prediction_id", bytes(ID_CHARACTERS))[:-ID_CHARACTERS]
"""What stands before a prediction's id, which is always of one length."""


def _spelled(plan: Plan, answer: Answer, own_fields: bytes, final: bool) -> bytes:
    """The same, field by field, for what has no fixed length: strings, classes, typed contents."""
    response = inference.ModelInferResponse(model_name=plan.model.name, model_version=plan.model.version)
    response.MergeFromString(own_fields)
    _say(response, plan, answer.run, final)
    arrays = {name: answer.part(name) for name in plan.datatypes}
    for name, k in plan.classes.items():
        arrays[name] = classification.top(name, arrays[name], k, plan.model.class_names)
    datatypes = {name: _datatype(plan, name, array) for name, array in arrays.items()}
    typed = plan.typed and all(datatype in tensors.TYPED_FIELDS for datatype in datatypes.values())
    for name, array in arrays.items():
        output = response.outputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        if typed and name not in plan.places:
            tensors.fill_typed(output.contents, datatypes[name], array)
            continue
        data = tensors.to_raw(array)
        if name in plan.places:
            infer_request.place_output(plan.places[name], output, data)
            data = b""
        if not typed:
            response.raw_output_contents.append(data)
    return bytes(response.SerializeToString())


def _say(response: Any, plan: Plan, run: Run, final: bool) -> None:
    """The answer's parameters: what computed it."""
    if plan.model.is_classifier:
        response.parameters["calibrator_revision"].CopyFrom(tensors.string_parameter(run.snapshot.revision))
    if run.snapshot.online_state is not None:
        response.parameters["online_state"].int64_param = run.snapshot.online_state
    sets = run.snapshot.sets
    if sets is not None and sets.needed(plan.lane.outputs):
        response.parameters["confidence_level"].double_param = sets.confidence_level
    response.parameters["provider"].CopyFrom(tensors.string_parameter(run.snapshot.session.provider))
    if final:
        response.parameters["triton_final_response"].bool_param = True


def _datatype(plan: Plan, name: str, array: NDArray[Any]) -> str:
    return "BYTES" if array.dtype == object else plan.datatypes[name]
