"""The answer to a request for inference, spelled out."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from service.inference.batcher import Answer, Run
from service.rpc import classification, infer_request, tensors
from service.rpc.infer_plan import RAW_OUTPUT_TAG, Plan, varint
from service.rpc.wire import inference
from service.store.keys import ID_CHARACTERS

MAX_REPLIES = 64
"""Layouts of answers kept for one plan; a revision or a shape that comes new makes a new one."""


def encode(plan: Plan, answer: Answer, id_field: bytes, said: bytes = b"", *, final: bool = False) -> bytes:
    """A ModelInferResponse: the bytes that every such answer has, and between them this one's id and values.

    `said` are parameters of this answer alone, as bytes of the message.
    """
    run, start, stop = answer
    if not plan.plain:
        return _spelled(plan, answer, id_field + said, final)
    key = (run.layout, final)
    reply = plan.replies.get(key)
    if reply is None:
        reply = _remember(plan, key, _around(plan, answer, final))
    before, after, names, tags = reply
    parts = [before, id_field, said, after]
    for tag, value in zip(tags, run.raw(names, start, stop), strict=True):
        parts += (tag, value)
    return b"".join(parts)


def _remember(plan: Plan, key: Any, reply: Any) -> Any:
    if len(plan.replies) >= MAX_REPLIES:
        plan.replies.clear()
    plan.replies[key] = reply
    return reply


def _around(plan: Plan, answer: Answer, final: bool) -> tuple[bytes, bytes, tuple[str, ...], list[bytes]]:
    """The bytes before the id, those between it and the values; of each value its name and the bytes before it."""
    arrays = {name: answer.part(name) for name in plan.datatypes}
    tags = [RAW_OUTPUT_TAG + varint(array.nbytes) for array in arrays.values()]
    head = inference.ModelInferResponse(model_name=plan.model.name, model_version=plan.model.version)
    rest = inference.ModelInferResponse()
    _say(rest, plan, answer.run, final)
    for name, array in arrays.items():
        rest.outputs.add(name=name, datatype=_datatype(plan, name, array), shape=array.shape)
    return head.SerializeToString(), rest.SerializeToString(), tuple(arrays), tags


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
