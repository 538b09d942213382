"""What a request for inference comes to once it is validated, and how it is recognised when it comes again.

A caller sends the same request over and over: only its id and the values of its inputs differ. The bytes around them
are kept as a template. A message that has the same bytes there is what was validated before; any other is read in full.
A hit is safe: whatever validation looks at lies in the compared bytes, so only requests qualify whose values need no
look (numbers, sent raw).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, shown
from service.inference.batcher import Lane
from service.inference.model import ServedModel, Snapshot
from service.inference.prediction_sets import SHARES, shares_of
from service.learning.journalling import NEEDED, NEEDED_IF_THERE, TELLING, Journalling, ModelJournal
from service.rpc import classification, infer_request, tensors
from service.rpc.shared_memory import OwnRegions
from service.rpc.wire import inference
from service.store.packs import LONGEST_CALLER_ID

ID_TAG, RAW_INPUT_TAG, RAW_OUTPUT_TAG = b"\x1a", b"\x3a", b"\x32"
MAX_TEMPLATES = 256
MAX_VARINT_BYTE = 0x80
COPIED_BYTES = 16 << 10
"""The values of a shorter message are copied: that costs less than to look at them where they are."""
CONFIDENCE_LEVEL = "confidence_level"
RECEIPT = "receipt"
SEGMENT, LONGEST_SEGMENT = "segment", 64
FINAL_RESPONSE = "triton_enable_empty_final_response"


@dataclass(eq=False, slots=True)
class Plan:
    """Everything in a request but its id and the values of its inputs.

    Attributes
    ----------
    model : what the request's name and version mean
    asked : the outputs that it names; none: all that there are
    lane, rows : where it waits for a run, and with how many rows
    revision : what its parameter `calibrator` names
    confidence_level : of the prediction sets, what its parameter says
    classes : output -> how many of its largest values are asked for instead of it
    typed : whether the answer is in typed contents, as the request was
    places : output -> where it goes in shared memory, of those that go there
    final : whether a stream's answer says that it is the last one of its request
    journal : where its predictions are kept, if they are
    receipt : whether the answer brings a receipt of them
    segment : under which they are kept
    datatypes : the outputs of the answer, in order, once `settle` has fixed them
    plain : whether the answer is numbers, sent raw
    replies : the answer's bytes around its values, by the layout of the run and what is said in it
    """

    model: ServedModel
    asked: tuple[str, ...]
    lane: Lane
    rows: int
    revision: str | None = None
    confidence_level: float | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    typed: bool = False
    final: bool = False
    journal: ModelJournal | None = None
    receipt: bool = False
    segment: str = ""
    places: Mapping[str, infer_request.Place] = field(default_factory=dict)
    datatypes: Mapping[str, str] = field(default_factory=dict)
    plain: bool = False
    replies: dict[Any, Any] = field(default_factory=dict)

    def settle(self, snapshot: Snapshot) -> Snapshot:
        """Fix what is computed: what was asked for, or all that this snapshot has. InvalidRequest for what it has not.

        Where not every snapshot computes it, it is this one that does, though another be active when the run is made.
        Returns it, with the sets of the confidence level that was asked for.
        """
        snapshot = snapshot if self.confidence_level is None else snapshot.at(self.confidence_level)
        specs = infer_request.choose_outputs(self.model, snapshot, self.asked)
        self.datatypes = {spec.name: spec.datatype for spec in specs}
        self.plain = not (self.typed or self.classes or self.places or "BYTES" in self.datatypes.values())
        if TELLING.isdisjoint(self.datatypes):
            self.journal = None
        besides = ["confidence"] if self.model.is_classifier else []
        if self.journal:
            there = [spec.name for spec in snapshot.graph_outputs]
            besides += [*NEEDED, *(name for name in NEEDED_IF_THERE if name in there)]
        computed = dict.fromkeys([*self.datatypes, *besides])
        common = computed.keys() <= set(self.model.common_outputs)
        self.lane = self.lane._replace(outputs=tuple(computed), snapshot=None if common else snapshot)
        return snapshot

    @property
    def waits(self) -> bool:
        """Whether its answers wait for the disk."""
        return self.journal is not None and self.journal.waits

    @property
    def divided(self) -> bool:
        """Whether it has more rows than a run takes."""
        return self.lane.joins and self.rows > self.model.batcher.limits.rows

    def arrays(self, feeds: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """The inputs as arrays, by name."""
        batch = (self.rows,) if self.lane.joins else ()
        return {
            name: feed if isinstance(feed, np.ndarray) else np.frombuffer(feed, dtype).reshape((*batch, *shape))
            for feed, (name, dtype, shape) in zip(feeds, self.lane.inputs, strict=True)
        }


class Reading(NamedTuple):
    """A request as read: its plan, its id as the bytes of the field, its inputs in the order of the lane."""

    plan: Plan
    id_field: bytes
    feeds: Sequence[Any]


def read(model: ServedModel, request: Any, regions: OwnRegions, journalling: Journalling | None = None) -> Reading:
    """A request, validated in full. InvalidRequest says what is wrong with it."""
    arrays = infer_request.read_inputs(model, request, regions)
    journal, segment = None if journalling is None else journalling.of(model), _segment(request)
    plan = Plan(
        model,
        infer_request.asked_outputs(request),
        model.lane((), arrays, None),
        model.row_count(arrays),
        _revision(request),
        _confidence_level(request),
        _classes(request),
        infer_request.sent_typed(request),
        wants_final(request),
        journal,
        _wants_receipt(request),
        journal.segment(segment) if journal else segment,
        infer_request.output_places(request, regions),
    )
    own_id = id_field(request.id)
    if plan.revision is None:  # else it is settled by the snapshot of the revision, when that is there
        add_shares(arrays, plan, plan.settle(model.active), own_id)
        plan.lane = model.lane(plan.lane.outputs, arrays, plan.lane.snapshot)
    feeds = [np.ascontiguousarray(arrays[name]) for name, _, _ in plan.lane.inputs]
    return Reading(plan, own_id, feeds)


def add_shares(arrays: dict[str, NDArray[Any]], plan: Plan, snapshot: Snapshot, own_id: bytes) -> None:
    """Where sets are randomised, the numbers of a request's rows beside its inputs."""
    if snapshot.sets is not None and snapshot.sets.drawn(plan.lane.outputs):
        arrays[SHARES] = shares_of(own_id, plan.rows)


def _confidence_level(request: Any) -> float | None:
    if CONFIDENCE_LEVEL not in request.parameters:
        return None
    level = tensors.parameter_value(request.parameters[CONFIDENCE_LEVEL])
    if not isinstance(level, float) or not 0 < level < 1:
        raise InvalidRequest(
            f"parameter {CONFIDENCE_LEVEL!r} must be a double strictly between 0 and 1, got {shown(level)}"
        )
    return level


def _revision(request: Any) -> str | None:
    if "calibrator" not in request.parameters:
        return None
    revision = tensors.parameter_value(request.parameters["calibrator"])
    if not isinstance(revision, str):
        raise InvalidRequest(f"parameter 'calibrator' must be a string, a revision or 'none'; got {shown(revision)}")
    return revision


def _classes(request: Any) -> dict[str, int]:
    return {
        output.name: _positive_integer(output)
        for output in request.outputs
        if classification.PARAMETER in output.parameters
    }


def _positive_integer(output: Any) -> int:
    value = tensors.parameter_value(output.parameters[classification.PARAMETER])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(
            f"output {output.name!r}: parameter 'classification' must be a whole number of 1 or more, "
            f"got {shown(value)}"
        )
    return value


def wants_final(request: Any) -> bool:
    """Whether a stream's answer is to say that it is the last one of its request."""
    return FINAL_RESPONSE in request.parameters and bool(tensors.parameter_value(request.parameters[FINAL_RESPONSE]))


def _wants_receipt(request: Any) -> bool:
    if RECEIPT not in request.parameters:
        return False
    value = tensors.parameter_value(request.parameters[RECEIPT])
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter {RECEIPT!r} must be true or false, got {shown(value)}")
    return value


def _segment(request: Any) -> str:
    if SEGMENT not in request.parameters:
        return ""
    value = tensors.parameter_value(request.parameters[SEGMENT])
    if not (isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_SEGMENT):
        raise InvalidRequest(
            f"parameter {SEGMENT!r} must be a string of 1 to {LONGEST_SEGMENT} printable characters, got {shown(value)}"
        )
    return value


class _Template(NamedTuple):
    """`middle`: the bytes between the id and the first value; then of each value its length and the bytes after it."""

    middle: bytes
    values: tuple[tuple[int, bytes], ...]
    plan: Plan


class Templates:
    """The requests that were validated, by the bytes before the id and the number of bytes after it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[bytes, int], list[_Template]] = {}
        self._count = 0

    def match(self, data: bytes) -> Reading | None:
        """The reading of a message that differs from a validated one in nothing but its id and its values."""
        try:
            end = 2 + data[1]  # model_name, field 1, comes first; a length of two bytes finds no template
            if data[end] == 0x12:  # model_version
                end += 2 + data[end + 1]
            at = end + 2 + data[end + 1] if data[end] == ID_TAG[0] else end
        except IndexError:
            return None
        for middle, values, plan in self._kept.get((data[:end], len(data) - at), ()):
            if data.startswith(middle, at):
                feeds: list[bytes | memoryview] = []
                position, view = at + len(middle), data if len(data) <= COPIED_BYTES else memoryview(data)
                for length, after in values:
                    feeds.append(view[position : position + length])
                    position += length
                    if after and not data.startswith(after, position):
                        break
                    position += len(after)
                else:
                    id_field = data[end:at]
                    return Reading(plan, id_field, feeds) if id_field.isascii() else None
        return None

    def keep(self, request: Any, data: bytes, plan: Plan) -> None:
        """Remember a validated request, if it is spelled as such requests are and its values need no look."""
        looked_at = any(dtype.kind in "Ob" for _, dtype, _ in plan.lane.inputs)
        if plan.typed or plan.places or looked_at or not plan.lane.inputs:
            return
        if [tensor.name for tensor in request.inputs] != [name for name, _, _ in plan.lane.inputs]:
            return
        values = list(request.raw_input_contents)
        if len(values) != len(request.inputs):
            return
        own_id = id_field(request.id)
        head = inference.ModelInferRequest(model_name=request.model_name, model_version=request.model_version)
        before = head.SerializeToString()
        request.ClearField("raw_input_contents")
        request.ClearField("id")
        skeleton = request.SerializeToString()
        tags = [RAW_INPUT_TAG + varint(len(value)) for value in values]
        middle = skeleton[len(before) :] + tags[0]
        afters = [*tags[1:], b""]
        spelled = [before, own_id, middle, *(part for pair in zip(values, afters, strict=True) for part in pair)]
        if b"".join(spelled) != data or not skeleton.startswith(before) or len(own_id) > MAX_VARINT_BYTE:
            return
        if self._count >= MAX_TEMPLATES:
            self.clear()
        lengths = tuple((len(value), after) for value, after in zip(values, afters, strict=True))
        self._kept.setdefault((before, len(data) - len(before) - len(own_id)), []).append(
            _Template(middle, lengths, plan)
        )
        self._count += 1

    def clear(self) -> None:
        self._kept.clear()
        self._count = 0


def id_field(request_id: str) -> bytes:
    """The field `id` of a request or an answer as bytes; nothing if it is empty."""
    encoded = request_id.encode()
    return ID_TAG + varint(len(encoded)) + encoded if encoded else b""


def own_id(field: bytes) -> bytes:
    """The id that a field holds; nothing of one that is too long to be kept."""
    return field[2:] if len(field) <= LONGEST_CALLER_ID + 2 else b""


def varint(value: int) -> bytes:
    """Protobuf's base-128 number."""
    encoded = bytearray()
    while value >= MAX_VARINT_BYTE:
        encoded.append(value & 0x7F | MAX_VARINT_BYTE)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
