"""From arrays to requests and from answers to arrays: what both clients send, without a connection."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import feedback_service_pb2 as feedback
from calserve.v1 import resources_pb2 as resources
from calserve.v1 import shadow_service_pb2 as shadow
from numpy.typing import ArrayLike

from calibrators.augment import augmented
from calibrators.numerics import to_numpy
from service import errors
from service.client.results import Array, Prediction
from service.rpc import tensors
from service.rpc.wire import inference

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
LABELS_PER_MESSAGE = 10_000
RESULTS = {number: name.removeprefix("LABEL_RESULT_").lower() for name, number in feedback.LabelResult.items()}

Inputs: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
Reference: TypeAlias = Array | Mapping[str, ArrayLike] | Iterable[Array | Mapping[str, ArrayLike]]


def fit_spec(model: str, kind: str, params: Mapping[str, Any], held_out_fraction: float, seed: int) -> Any:
    spec = pb.FitCalibratorRequest.Spec(
        model=model, kind=kind, params_json=json.dumps(params), held_out_fraction=held_out_fraction, seed=seed
    )
    return pb.FitCalibratorRequest(spec=spec)


def evaluate_spec(model: str, revision: str, seed: int) -> Any:
    spec = pb.EvaluateRevisionRequest.Spec(model=model, revision=revision, seed=seed)
    return pb.EvaluateRevisionRequest(spec=spec)


def infer_request(
    model: str,
    columns: Mapping[str, Array],
    outputs: Sequence[str],
    calibrator: str | None,
    confidence_level: float | None = None,
    request_id: str = "",
    *,
    segment: str = "",
    receipt: bool = False,
) -> Any:
    request = inference.ModelInferRequest(model_name=model, id=request_id)
    for name, values in columns.items():
        request.inputs.add(name=name, datatype=tensors.datatype_of(name, values), shape=values.shape)
        request.raw_input_contents.append(tensors.to_raw(values))
    for name in outputs:
        request.outputs.add(name=name)
    if calibrator is not None:
        request.parameters["calibrator"].string_param = calibrator
    if confidence_level is not None:
        request.parameters["confidence_level"].double_param = confidence_level
    if segment:
        request.parameters["segment"].string_param = segment
    if receipt:
        request.parameters["receipt"].bool_param = True
    return request


def prediction_of(response: Any) -> Prediction:
    arrays = {
        output.name: tensors.from_raw(output.name, output.datatype, output.shape, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    said = {
        name: response.parameters[name].string_param for name in ("calibrator_revision", "prediction_id", "receipt")
    }
    state = response.parameters["online_state"].int64_param if "online_state" in response.parameters else None
    return Prediction(arrays, said["calibrator_revision"] or "none", said["prediction_id"], said["receipt"], state)


def named(inputs: Inputs, metadata: Any = None) -> dict[str, Array]:
    """Arrays by input name. A bare array needs the model's metadata; InvalidRequest unless it has just one input."""
    if isinstance(inputs, Mapping):
        return {name: to_numpy(values) for name, values in inputs.items()}
    names = [tensor.name for tensor in metadata.inputs]
    if len(names) != 1:
        raise errors.InvalidRequest(
            f"model {metadata.name!r} has the inputs {', '.join(names)}; pass a dict of arrays by name"
        )
    return {names[0]: to_numpy(inputs)}


def check_one_source(logits: ArrayLike | None, inputs: Inputs | None) -> None:
    if (logits is None) == (inputs is None):
        raise errors.InvalidRequest("pass either logits or inputs")


def calibration_set(
    labels: ArrayLike, logits: ArrayLike | None, inputs: Mapping[str, Array] | None, weight: ArrayLike | None
) -> dict[str, Array]:
    """All columns of a calibration set by name ("/name" for an input), of equal length."""
    columns = {"labels": to_numpy(labels)}
    if logits is not None:
        columns["logits"] = to_numpy(logits)
    if inputs is not None:
        columns.update({f"/{name}": values for name, values in inputs.items()})
    if weight is not None:
        columns["sample_weight"] = to_numpy(weight)
    for name, column in columns.items():
        tensors.datatype_of(name, column)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise errors.InvalidRequest(f"the columns have different numbers of rows: {lengths}")
    return columns


def with_shifted(
    columns: dict[str, Array],
    shifted: Mapping[str, Array] | None,
    labels: ArrayLike | None,
    augment: float = 0.0,
    seed: int = 0,
) -> dict[str, Array]:
    """A calibration set with rows appended that are marked as shifted: the caller's, and distorted copies of images."""
    if (shifted is None) != (labels is None):
        raise errors.InvalidRequest("shifted rows have shifted_inputs and shifted_labels: pass both")
    more = [_copies(columns, augment, seed)] if augment else []
    if shifted is not None and labels is not None:
        more.append(calibration_set(labels, None, shifted, None))
    for added in more:
        if "sample_weight" in columns:
            added["sample_weight"] = np.ones(len(added["labels"]))
        if added.keys() != columns.keys():
            raise errors.InvalidRequest("shifted rows come as the model's inputs, and so must the others")
    marks = [np.full(len(part["labels"]), part is not columns) for part in (columns, *more)]
    joined = {name: np.concatenate([column, *(part[name] for part in more)]) for name, column in columns.items()}
    return joined | {"shifted": np.concatenate(marks)} if more else columns


def _copies(columns: Mapping[str, Array], augment: float, seed: int) -> dict[str, Array]:
    images = [name for name in columns if name.startswith("/")]
    if len(images) != 1:
        raise errors.InvalidRequest("augment makes copies of images: pass them as the one input of the model")
    try:
        copies = augmented(columns[images[0]], augment, seed=seed)
    except (ValueError, TypeError) as error:
        raise errors.InvalidRequest(f"augment: {error}") from error
    log.info("%s", copies)
    return {images[0]: copies.images, "labels": columns["labels"][copies.index]}


def batches(reference: Reference | None, metadata: Any) -> Iterable[dict[str, Array]]:
    """A reference as batches of inputs by name: it is one, or an iterable of them."""
    if reference is None:
        return []
    if isinstance(reference, Mapping | np.ndarray):
        return [named(reference, metadata)]
    if isinstance(reference, Iterator):
        return (named(batch, metadata) for batch in reference)
    return [named(batch, metadata) for batch in reference]


def in_chunks(
    spec: Any,
    columns: Mapping[str, Array],
    sent: Callable[[int, int], object],
    reference: Iterable[Mapping[str, Array]] = (),
) -> Iterator[Any]:
    """The request with the spec, then the rows and the reference in requests of its kind, of about CHUNK_BYTES."""
    yield spec
    done = compared = 0
    for part in _pieces(columns):
        yield type(spec)(rows=_filled(resources.Rows(), part))
        done += len(part["labels"])
        sent(done, 0)
    for batch in reference:
        for part in _pieces({f"/{name}": values for name, values in batch.items()}):
            yield type(spec)(reference=_filled(resources.ReferenceRows(), part))
            compared += len(next(iter(part.values())))
            sent(done, compared)


def _pieces(columns: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    total = len(next(iter(columns.values())))
    row_bytes = sum(column.nbytes / max(1, total) for column in columns.values())
    step = max(1, math.floor(CHUNK_BYTES / max(1.0, row_bytes)))
    for start in range(0, total, step):
        yield {name: column[start : start + step] for name, column in columns.items()}


def _filled(rows: Any, columns: Mapping[str, Array]) -> Any:
    for name, part in columns.items():
        message = rows.inputs.add(name=name[1:]).array if name.startswith("/") else getattr(rows, name)
        message.datatype = tensors.datatype_of(name, part)
        message.shape.extend(part.shape)
        message.data = tensors.to_raw(part)
    return rows


def label_requests(
    model: str,
    prediction_ids: Sequence[str],
    labels: Sequence[int] | Sequence[str] | ArrayLike,
    rows: ArrayLike | None,
    receipts: Sequence[str] | None,
) -> Iterator[feedback.RecordLabelsRequest]:
    """The labels in messages of a bounded size. InvalidRequest unless the columns are of one length."""
    columns = {"prediction_ids": list(prediction_ids), "labels": np.asarray(labels).tolist()}
    if rows is not None:
        columns["rows"] = np.asarray(rows).tolist()
    if receipts is not None:
        columns["receipts"] = list(receipts)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise errors.InvalidRequest(f"the columns have different numbers of labels: {lengths}")
    for start in range(0, len(prediction_ids), LABELS_PER_MESSAGE):
        part = {name: column[start : start + LABELS_PER_MESSAGE] for name, column in columns.items()}
        yield feedback.RecordLabelsRequest(model=model, labels=_labels(**part))


def _labels(
    prediction_ids: Sequence[str],
    labels: Sequence[int | str],
    rows: Sequence[int] | None = None,
    receipts: Sequence[str] | None = None,
) -> Iterator[feedback.Label]:
    for index, (prediction_id, label) in enumerate(zip(prediction_ids, labels, strict=True)):
        message = feedback.Label(prediction_id=prediction_id, row=rows[index] if rows else 0)
        if isinstance(label, str):
            message.class_name = label
        else:
            message.class_index = label
        if receipts:
            message.receipt = receipts[index]
        yield message


def results_of(response: feedback.RecordLabelsResponse) -> list[str]:
    """What became of each label: recorded, duplicate, conflict, unknown, expired or invalid_class."""
    return [RESULTS[result] for result in response.results]


def start_shadow(
    model: str, revision: str, policy: str, level: float, least_labels: int, share: float
) -> shadow.StartShadowRequest:
    named = f"PROMOTION_POLICY_{policy.upper()}"
    if named not in dict(shadow.PromotionPolicy.items()):
        raise errors.InvalidRequest(f"policy must be manual or automatic, got {errors.shown(policy)}")
    return shadow.StartShadowRequest(
        model=model,
        revision=revision,
        policy=named,
        level=level,
        least_label_count=least_labels,
        share=share,
    )


def in_batches(columns: Mapping[str, Array], batch_size: int) -> Sequence[dict[str, Array]]:
    count = len(next(iter(columns.values())))
    return [
        {name: values[start : start + batch_size] for name, values in columns.items()}
        for start in range(0, count, batch_size)
    ]
