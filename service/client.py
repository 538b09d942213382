"""The Python client: fit, compare and activate calibrators, and ask for calibrated probabilities.

    with Client("127.0.0.1:8001") as client:
        revision = client.fit("magika", "temperature", inputs=inputs, labels=labels)
        client.activate("magika", revision.revision)

Works in one process with tritonclient: the messages of package `inference` are in a private descriptor pool. Failures
are the classes of `service.errors`, as on the server.
"""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self, TypeAlias

import grpc
import numpy as np
from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import resources_pb2 as resources
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from numpy.typing import ArrayLike, NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import calibrators
from calibrators import Calibrator
from calibrators.auto import Candidate
from calibrators.graph import LOGITS
from calibrators.metrics import Estimate
from calibrators.numerics import to_numpy
from service import errors
from service.rpc import tensors
from service.rpc.health import READY
from service.rpc.status import CODES, DETAILS_KEY
from service.rpc.wire import CALIBRATOR_SERVICE, HEALTH_SERVICE, INFERENCE_SERVICE, Stub, inference

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 64 << 20
POLL_SECONDS = 10.0
ERRORS = {code: error for error, code in CODES.items()}

Array: TypeAlias = NDArray[Any]
Inputs: TypeAlias = ArrayLike | Mapping[str, ArrayLike]


@dataclass(frozen=True)
class Evaluation:
    """What the model said and what the calibrator made of it, on the same labelled rows; intervals at `level`."""

    row_count: int
    level: float
    before: dict[str, Estimate]
    after: dict[str, Estimate]


@dataclass(frozen=True)
class Revision:
    """One immutable fit.

    `held_out` are its scores on rows that the scored fit had not seen, None if none were kept; `ranking` is what kind
    "auto" compared, best first.
    """

    model: str
    revision: str
    kind: str
    params: dict[str, Any]
    model_digest: str
    row_count: int
    class_count: int
    held_out: Evaluation | None
    create_time: datetime
    active: bool
    notes: tuple[str, ...]
    ranking: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Model:
    """What is served, and where signals are read. `logits_tensor` is empty for a model that is no classifier."""

    model: str
    version: str
    digest: str
    class_count: int
    logits_tensor: str
    logits_reason: str
    features_tensor: str
    features_reason: str
    active_revision: str
    provider: str
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Outputs by name, and which revision computed the probabilities."""

    outputs: dict[str, Array]
    calibrator_revision: str

    @property
    def probabilities(self) -> Array:
        return self.outputs["probabilities"]


class Client:
    """A connection to one server. Calls block; a client may be shared between threads.

    Parameters
    ----------
    address : host:port of the gRPC front
    show_progress : draw progress bars for fits (default: when standard error is a terminal)
    timeout_seconds : deadline of each short call; fits take as long as they take
    """

    def __init__(
        self, address: str = "127.0.0.1:8001", *, show_progress: bool | None = None, timeout_seconds: float = 60.0
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ]
        self._channel = grpc.insecure_channel(address, options=options)
        self._calibrators = Stub(self._channel, CALIBRATOR_SERVICE)
        self._inference = Stub(self._channel, INFERENCE_SERVICE)
        self._show_progress, self._timeout = show_progress, timeout_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Return as soon as every model of the server is served; NotReady when the time is over."""
        watch = Stub(self._channel, HEALTH_SERVICE).Watch
        request = health_pb2.HealthCheckRequest(service=READY)
        answers = watch(request, timeout=timeout_seconds, wait_for_ready=True)
        heard = "no server answers"
        try:
            for answer in answers:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    answers.cancel()
                    return
                heard = "the server runs, but not every model is served"
        except grpc.RpcError:
            pass  # the deadline, or a server that went away
        raise errors.NotReady(f"{heard} after {timeout_seconds:g} seconds")

    def models(self) -> builtins.list[Model]:
        """Every served version of every model."""
        answer = self._call(self._calibrators.ListModels, pb.ListModelsRequest())
        return [_model(message) for message in answer.models]

    def fit(
        self,
        model: str,
        kind: str,
        *,
        labels: ArrayLike,
        logits: ArrayLike | None = None,
        inputs: Inputs | None = None,
        sample_weight: ArrayLike | None = None,
        held_out_fraction: float = 0.2,
        seed: int = 0,
        **params: Any,
    ) -> Revision:
        """Fit a calibrator of `kind` on labelled rows; return the revision, which is not yet active.

        Parameters
        ----------
        kind : see `calserve kinds`; "auto" compares those that suit the data and takes the best (`calibrators.auto`)
        labels : (n_samples,) class indices
        logits : (n_samples, n_classes); or
        inputs : the model's inputs, rows first, by name (a bare array if there is one): the server computes the logits
        sample_weight : (n_samples,), not negative
        held_out_fraction : of the rows, kept from the fit that is scored; the revision itself is fitted on all rows
        params : constructor parameters of the kind

        Raises
        ------
        errors.InvalidRequest, errors.Refused
            naming what was wrong; `Refused` also when the fit itself failed
        """
        spec = pb.FitCalibratorRequest.Spec(
            model=model, kind=kind, params_json=json.dumps(params), held_out_fraction=held_out_fraction, seed=seed
        )
        rows = self._rows(model, labels, logits, inputs, sample_weight)
        operation = self._stream(self._calibrators.FitCalibrator, pb.FitCalibratorRequest, spec, rows, f"fit {kind}")
        return _revision(operation.revision)

    def evaluate(
        self,
        model: str,
        revision: str = "",
        *,
        labels: ArrayLike,
        logits: ArrayLike | None = None,
        inputs: Inputs | None = None,
        seed: int = 0,
    ) -> Evaluation:
        """Compare a revision (default: the active one) with the model's own probabilities on labelled rows."""
        spec = pb.EvaluateRevisionRequest.Spec(model=model, revision=revision, seed=seed)
        rows = self._rows(model, labels, logits, inputs, None)
        what = f"evaluate {revision or 'the active revision'}"
        operation = self._stream(self._calibrators.EvaluateRevision, pb.EvaluateRevisionRequest, spec, rows, what)
        return _evaluation(operation.evaluation)

    def activate(self, model: str, revision: str) -> str:
        """Make a revision serve ("none": the model's own probabilities); return what was active before."""
        request = pb.ActivateRevisionRequest(model=model, revision=revision)
        return str(self._call(self._calibrators.ActivateRevision, request).previous_revision)

    def rollback(self, model: str) -> str:
        """Activate what was active before the present revision; return what is active now."""
        return str(self._call(self._calibrators.RollBack, pb.RollBackRequest(model=model)).active_revision)

    def list(self, model: str) -> builtins.list[Revision]:
        """The revisions of a model, newest first."""
        answer = self._call(self._calibrators.ListRevisions, pb.ListRevisionsRequest(model=model))
        return [_revision(message) for message in answer.revisions]

    def get(self, model: str, revision: str) -> Revision:
        return _revision(
            self._call(self._calibrators.GetRevision, pb.GetRevisionRequest(model=model, revision=revision))
        )

    def delete(self, model: str, revision: str) -> None:
        """Forget a revision. Refused while it is active, or while a roll-back would activate it."""
        self._call(self._calibrators.DeleteRevision, pb.DeleteRevisionRequest(model=model, revision=revision))

    def calibrator(self, model: str, revision: str) -> Calibrator:
        """The fitted calibrator itself, for use without the server."""
        answer = self._call(self._calibrators.GetArtifact, pb.GetArtifactRequest(model=model, revision=revision))
        return calibrators.loads(answer.artifact)

    def export(self, model: str, revision: str = "") -> bytes:
        """The model with a revision (default: the active one) inside, as one ONNX file that any runtime serves."""
        request = pb.ExportModelRequest(model=model, revision=revision)
        with _translated():
            return b"".join(answer.piece for answer in self._calibrators.ExportModel(request, timeout=self._timeout))

    def predict(
        self, model: str, inputs: Inputs, *, outputs: Sequence[str] = (), calibrator: str | None = None
    ) -> Prediction:
        """Run the model on one batch.

        `outputs` names what to return (default: everything); `calibrator` a revision, or "none" (default: the active).
        """
        request = inference.ModelInferRequest(model_name=model)
        for name, values in self._named(model, inputs).items():
            request.inputs.add(name=name, datatype=tensors.datatype_of(name, values), shape=values.shape)
            request.raw_input_contents.append(tensors.to_raw(values))
        for name in outputs:
            request.outputs.add(name=name)
        if calibrator is not None:
            request.parameters["calibrator"].string_param = calibrator
        response = self._call(self._inference.ModelInfer, request)
        arrays = {
            output.name: tensors.from_raw(output.name, output.datatype, output.shape, raw)
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        return Prediction(arrays, response.parameters["calibrator_revision"].string_param or "none")

    def logits(self, model: str, inputs: Inputs, *, batch_size: int = 64) -> Array:
        """The logits (n_samples, n_classes) that the model's calibrators read, computed by the server batch by batch.

        For fitting and comparing several kinds on the same rows: compute once, then pass `logits`.
        """
        columns = self._named(model, inputs)
        count = len(next(iter(columns.values())))
        parts = []
        with self._progress() as progress:
            for start in progress.track(range(0, count, batch_size), description=f"logits of {count} rows"):
                batch = {name: values[start : start + batch_size] for name, values in columns.items()}
                parts.append(self.predict(model, batch, outputs=[LOGITS]).outputs[LOGITS])
        return np.concatenate(parts)

    def _rows(
        self, model: str, labels: ArrayLike, logits: ArrayLike | None, inputs: Inputs | None, weight: ArrayLike | None
    ) -> dict[str, Array]:
        """All columns of a calibration set by name ("/name" for an input), of equal length."""
        if (logits is None) == (inputs is None):
            raise errors.InvalidRequest("pass either logits or inputs")
        columns = {"labels": to_numpy(labels)}
        if logits is not None:
            columns["logits"] = to_numpy(logits)
        if inputs is not None:
            columns.update({f"/{name}": values for name, values in self._named(model, inputs).items()})
        if weight is not None:
            columns["sample_weight"] = to_numpy(weight)
        for name, column in columns.items():
            tensors.datatype_of(name, column)
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise errors.InvalidRequest(f"the columns have different numbers of rows: {lengths}")
        return columns

    def _named(self, model: str, inputs: Inputs) -> dict[str, Array]:
        if isinstance(inputs, Mapping):
            return {name: to_numpy(values) for name, values in inputs.items()}
        names = [
            t.name for t in self._call(self._inference.ModelMetadata, inference.ModelMetadataRequest(name=model)).inputs
        ]
        if len(names) != 1:
            raise errors.InvalidRequest(
                f"model {model!r} has the inputs {', '.join(names)}; pass a dict of arrays by name"
            )
        return {names[0]: to_numpy(inputs)}

    def _stream(self, method: Any, kind: Any, spec: Any, columns: dict[str, Array], what: str) -> resources.Operation:
        """Send the rows in bounded chunks, then follow the operation to its end."""
        total = len(columns["labels"])
        with self._progress() as progress:
            sending = progress.add_task(f"{what}: sending rows", total=total)
            requests = _requests(kind, spec, columns, lambda sent: progress.update(sending, completed=sent))
            operation = self._call(method, requests, timeout=None)
            working = progress.add_task(what, total=100)
            return self._follow(operation, progress, working, what)

    def _follow(
        self, operation: resources.Operation, progress: Progress, task: TaskID, what: str
    ) -> resources.Operation:
        while operation.state == resources.Operation.STATE_RUNNING:
            progress.update(task, completed=round(100 * operation.progress), description=f"{what}: {operation.stage}")
            request = pb.WaitOperationRequest(operation=operation.operation, until_progress_above=operation.progress)
            request.timeout.FromMilliseconds(int(1000 * POLL_SECONDS))
            operation = self._call(self._calibrators.WaitOperation, request, timeout=POLL_SECONDS + self._timeout)
        if operation.state != resources.Operation.STATE_SUCCEEDED:
            raise errors.Refused(operation.error_message or f"{what} was cancelled", reason=operation.error_reason)
        progress.update(task, completed=100, description=f"{what}: done")
        return operation

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        progress = Progress(*columns)
        shown = progress.console.is_terminal if self._show_progress is None else self._show_progress
        progress.disable = not shown
        return progress

    def _call(self, method: Callable[..., Any], request: Any, timeout: float | None = -1.0) -> Any:
        with _translated():
            return method(request, timeout=self._timeout if timeout == -1.0 else timeout)


def _requests(kind: Any, spec: Any, columns: dict[str, Array], sent: Callable[[int], object]) -> Iterator[Any]:
    """The spec, then the rows in messages of about CHUNK_BYTES."""
    yield kind(spec=spec)
    total = len(columns["labels"])
    row_bytes = sum(column.nbytes / max(1, total) for column in columns.values())
    step = max(1, math.floor(CHUNK_BYTES / max(1.0, row_bytes)))
    for start in range(0, total, step):
        rows = resources.Rows()
        for name, column in columns.items():
            message = rows.inputs.add(name=name[1:]).array if name.startswith("/") else getattr(rows, name)
            part = column[start : start + step]
            message.datatype = tensors.datatype_of(name, part)
            message.shape.extend(part.shape)
            message.data = tensors.to_raw(part)
        yield kind(rows=rows)
        sent(min(start + step, total))


@contextmanager
def _translated() -> Iterator[None]:
    """gRPC's status as the error class it was on the server."""
    try:
        yield
    except grpc.RpcError as error:
        kind = ERRORS.get(error.code(), errors.CalserveError)
        raise kind(error.details() or "", **_reason(error, kind)) from None


def _reason(error: grpc.RpcError, kind: type[errors.CalserveError]) -> dict[str, str]:
    if kind is errors.Overloaded:
        return {}
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return {"reason": info.reason}
    return {}


def _revision(message: resources.Revision) -> Revision:
    return Revision(
        model=message.model,
        revision=message.revision,
        kind=message.kind,
        params=json.loads(message.params_json or "{}"),
        model_digest=message.model_digest,
        row_count=message.row_count,
        class_count=message.class_count,
        held_out=_evaluation(message.held_out) if message.HasField("held_out") else None,
        create_time=message.create_time.ToDatetime(tzinfo=UTC),
        active=message.active,
        notes=tuple(message.notes),
        ranking=tuple(map(_candidate, message.ranking)),
    )


def _evaluation(message: resources.Evaluation) -> Evaluation:
    return Evaluation(message.row_count, message.level, _scores(message.before), _scores(message.after))


def _scores(messages: Iterable[resources.Score]) -> dict[str, Estimate]:
    return {score.name: _estimate(score) for score in messages}


def _candidate(message: resources.Candidate) -> Candidate:
    gain = (message.gain, message.gain_error)
    return Candidate(message.kind, _scores(message.scores), gain, message.seconds, message.skipped)


def _estimate(score: resources.Score) -> Estimate:
    if not score.HasField("low"):
        return Estimate(score.value)
    return Estimate(score.value, score.low, score.high)


def _model(message: resources.Model) -> Model:
    return Model(
        model=message.model,
        version=message.version,
        digest=message.digest,
        class_count=message.class_count,
        logits_tensor=message.logits_tensor,
        logits_reason=message.logits_reason,
        features_tensor=message.features_tensor,
        features_reason=message.features_reason,
        active_revision=message.active_revision,
        provider=message.provider,
        class_names=tuple(message.class_names),
    )
