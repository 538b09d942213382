"""calserve.v1.FeedbackService: labels that arrive later."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from calserve.v1 import feedback_service_pb2 as pb

from service.errors import InvalidRequest, NotFound
from service.inference.repository import Repository
from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import FEEDBACK_SERVICE
from service.store.journal import Journal
from service.store.labels import Labels, Message, NewLabels, Result
from service.store.reading import NO_LABEL, Pairs

MOST_LABELS = 100_000
"""In one message: they are recorded in one piece, for which others wait."""
NO_CLASS = -1
_RESULTS: dict[Result, Any] = {result: pb.LabelResult.Value(f"LABEL_RESULT_{result.name}") for result in Result}


@dataclass(frozen=True)
class FeedbackService:
    """Servicer of calserve.v1.FeedbackService.

    `recorded` is told of how many labels of a model are on the disk; `counts`: labels by what became of them.
    """

    repository: Repository
    journal: Journal
    labels: Labels
    recorded: Callable[[str, int], None]
    counts: Counter[str] = field(default_factory=Counter)

    def methods(self) -> list[Method]:
        return methods_of(FEEDBACK_SERVICE, self)

    async def record_labels(self, request: pb.RecordLabelsRequest, call: Call) -> pb.RecordLabelsResponse:
        return pb.RecordLabelsResponse(results=await self._record(request, call))

    async def import_labels(
        self, requests: AsyncIterator[pb.RecordLabelsRequest], call: Call
    ) -> pb.RecordLabelsResponse:
        response = pb.RecordLabelsResponse()
        async for request in requests:
            response.results.extend(await self._record(request, call))
        return response

    async def get_prediction(self, request: pb.GetPredictionRequest, call: Call) -> pb.StoredPrediction:
        def read() -> Pairs | None:
            with self.journal.reading() as connection:
                return self.labels.prediction(connection, request.model, request.prediction_id, request.row)

        found = await asyncio.to_thread(read)
        if found is None:  # it may be on its way
            await self.journal.flush()
            found = await asyncio.to_thread(read)
        if found is None:
            raise NotFound("this model has no such prediction, or no longer")
        return _message(found)

    async def _record(self, request: pb.RecordLabelsRequest, call: Call) -> list[Any]:
        if len(request.labels) > MOST_LABELS:
            raise InvalidRequest(f"a message holds at most {MOST_LABELS} labels, got {len(request.labels)}")
        labels = _labels(request.labels, self._class_indices(request.model))
        producer = call.grant.name if call.grant else ""
        message = Message(request.model, producer, labels)
        results = await self.journal.writer.write_piece(self.labels.record_all, message)
        self.counts.update(results)
        self.recorded(request.model, results.count(Result.RECORDED))
        return [_RESULTS[result] for result in results]

    def _class_indices(self, model: str) -> Mapping[str, int]:
        """The classes by name, of a model that is served."""
        names = self.repository.get(model).class_names if self.repository.serves(model) else ()
        return {name: index for index, name in enumerate(names)}


def _labels(messages: Sequence[pb.Label], classes: Mapping[str, int]) -> NewLabels:
    labels = list(messages)  # each look into a message makes an object
    indices = [label.class_index or _class_of(label, classes) for label in labels]
    return NewLabels(
        [label.prediction_id for label in labels],
        np.array([label.row for label in labels], np.int64),
        np.array(indices, np.int64),
        [label.receipt for label in labels],
    )


def _class_of(label: pb.Label, classes: Mapping[str, int]) -> int:
    """The class of a label whose index is zero: it may have none, or a name."""
    if label.HasField("class_index"):
        return 0
    return classes.get(label.class_name, NO_CLASS)


def _message(found: Pairs) -> pb.StoredPrediction:
    stream, kept = found.stream, found.kept
    message = pb.StoredPrediction(
        model=stream.model,
        model_version=stream.version,
        model_digest=stream.digest,
        calibrator_revision=found.revision,
        online_state=int(found.states[0]),
        class_count=stream.class_count,
        classes=() if kept.classes is None else kept.classes[0].tolist(),
        logits=kept.logits[0].tolist(),
        probabilities=kept.probabilities[0].tolist(),
        confidence=float(kept.confidence[0]),
        predicted=int(kept.label[0]),
        segment=found.segment_of(0),
        signals=found.signals_of(0),
    )
    message.time.FromMilliseconds(int(found.times_ms[0]))
    if found.labels[0] != NO_LABEL:
        message.label = int(found.labels[0])
    return message
