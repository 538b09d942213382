"""calserve.v1.CalibratorService: fits, revisions, activation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import resources_pb2 as resources
from numpy.typing import NDArray

import calibrators
from calibrators import Calibrator, auto
from calibrators.base import check_signal
from calibrators.kinds.identity import Identity
from calibrators.numerics import check_labels, check_logits
from service.errors import InvalidRequest, NotFound, Refused
from service.inference.datatypes import NUMPY
from service.inference.model import NO_REVISION, ServedModel
from service.inference.repository import Repository
from service.learning.job import ARTIFACT, AUTO, INPUT, MODEL, JobSpec, RowWriter
from service.learning.operations import Operation, Operations
from service.learning.revisions import Revisions
from service.learning.shadows import Shadows
from service.rpc import infer_request, tensors
from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import CALIBRATOR_SERVICE
from service.store.catalogue import RevisionRow

DEFAULT_HELD_OUT_FRACTION = 0.2
MAX_HELD_OUT_FRACTION = 0.9
EXPORT_PIECE_BYTES = 1 << 20
ROWS_PER_RUN = 64
"""Rows of a caller's inputs that go through the model at once, where it sets no smaller limit."""

_STATES = {
    "running": resources.Operation.STATE_RUNNING,
    "succeeded": resources.Operation.STATE_SUCCEEDED,
    "failed": resources.Operation.STATE_FAILED,
    "cancelled": resources.Operation.STATE_CANCELLED,
}


@dataclass(frozen=True)
class CalibratorService:
    """Servicer of calserve.v1.CalibratorService."""

    repository: Repository
    revisions: Revisions
    operations: Operations
    shadows: Shadows

    def methods(self) -> list[Method]:
        return methods_of(CALIBRATOR_SERVICE, self)

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[_model_message(model) for model in self.repository.models() if call.may_use(model.name)]
        )

    async def fit_calibrator(self, requests: AsyncIterator[pb.FitCalibratorRequest], call: Call) -> resources.Operation:
        spec: pb.FitCalibratorRequest.Spec = await _first_spec(requests)
        model = self._classifier(spec.model, spec.model_version)
        params = _params(spec.params_json)
        reader = await asyncio.to_thread(model.reader, _unfitted(spec.kind, params))
        if reader.kind == spec.kind:
            params = reader.get_params(deep=False)
        await asyncio.to_thread(model.check_signals, reader, to_fit=True)
        job = JobSpec(
            action="fit",
            model=model.name,
            model_digest=model.digest,
            n_classes=model.n_classes,
            kind=spec.kind,
            params_json=json.dumps(params, sort_keys=True, separators=(",", ":")),
            held_out_fraction=_held_out_fraction(spec),
            seed=spec.seed,
        )
        through_model = "input_gradients" in reader.fit_needs
        files = {MODEL: await asyncio.to_thread(_bytes_with_logits, model)} if through_model else {}
        async with self.operations.rows() as (name, writer):
            await self._receive(model, reader, requests, writer, through_model)
            what = f"fit {spec.kind} on {writer.row_count} rows"
            operation = await self.operations.submit(name, writer, job, what, files)
        return await self._message(operation)

    async def evaluate_revision(
        self, requests: AsyncIterator[pb.EvaluateRevisionRequest], call: Call
    ) -> resources.Operation:
        spec: pb.EvaluateRevisionRequest.Spec = await _first_spec(requests)
        model = self._classifier(spec.model, "")
        revision = spec.revision or model.active.revision
        if revision == NO_REVISION:
            raise Refused(f"model {model.name!r} has no active revision; name one to evaluate")
        row = await self.revisions.get(model.name, revision)
        if row.class_count != model.n_classes:
            raise Refused(
                f"revision {revision} has {row.class_count} classes, model {model.name!r} version {model.version} has "
                f"{model.n_classes}"
            )
        reader = await self.revisions.calibrator(row)
        model.check_signals(reader)
        job = JobSpec(
            action="evaluate",
            model=model.name,
            model_digest=row.model_digest,
            n_classes=row.class_count,
            kind=row.kind,
            params_json=row.params_json,
            held_out_fraction=0.0,
            seed=spec.seed,
        )
        files = {ARTIFACT: await self.revisions.artifact(row)}
        async with self.operations.rows() as (name, writer):
            await self._receive(model, reader, requests, writer, through_model=False)
            what = f"evaluate {revision} on {writer.row_count} rows"
            operation = await self.operations.submit(name, writer, job, what, files)
        return await self._message(operation)

    async def get_operation(self, request: pb.GetOperationRequest, call: Call) -> resources.Operation:
        return await self._message(self._operation(request.operation, call))

    async def list_operations(self, request: pb.ListOperationsRequest, call: Call) -> pb.ListOperationsResponse:
        found = [await self._message(operation) for operation in self.operations.of_model(request.model)]
        return pb.ListOperationsResponse(operations=found)

    async def wait_operation(self, request: pb.WaitOperationRequest, call: Call) -> resources.Operation:
        asked = request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else None
        limits = [seconds for seconds in (asked, call.seconds_left()) if seconds is not None]
        further = request.until_progress_above if request.HasField("until_progress_above") else None
        self._operation(request.operation, call)
        operation = await self.operations.wait(request.operation, min(limits, default=None), further)
        return await self._message(operation)

    async def cancel_operation(self, request: pb.CancelOperationRequest, call: Call) -> resources.Operation:
        self._operation(request.operation, call)
        return await self._message(await self.operations.cancel(request.operation))

    async def list_revisions(self, request: pb.ListRevisionsRequest, call: Call) -> pb.ListRevisionsResponse:
        rows = await self.revisions.of_model(request.model)
        return pb.ListRevisionsResponse(revisions=[self._revision_message(row) for row in rows])

    async def get_revision(self, request: pb.GetRevisionRequest, call: Call) -> resources.Revision:
        return self._revision_message(await self.revisions.get(request.model, request.revision))

    async def get_artifact(self, request: pb.GetArtifactRequest, call: Call) -> pb.GetArtifactResponse:
        row = await self.revisions.get(request.model, request.revision)
        return pb.GetArtifactResponse(artifact=await self.revisions.artifact(row))

    async def export_model(self, request: pb.ExportModelRequest, call: Call) -> AsyncIterator[pb.ExportModelResponse]:
        exported = await self.revisions.export(request.model, request.revision)
        for start in range(0, len(exported), EXPORT_PIECE_BYTES):
            yield pb.ExportModelResponse(piece=exported[start : start + EXPORT_PIECE_BYTES])

    async def delete_revision(self, request: pb.DeleteRevisionRequest, call: Call) -> pb.DeleteRevisionResponse:
        await self.shadows.delete_revision(request.model, request.revision)
        return pb.DeleteRevisionResponse()

    async def activate_revision(self, request: pb.ActivateRevisionRequest, call: Call) -> pb.ActivateRevisionResponse:
        active, before = await self.revisions.activate(request.model, request.revision, request.model_version)
        return pb.ActivateRevisionResponse(active_revision=active, previous_revision=before)

    async def roll_back(self, request: pb.RollBackRequest, call: Call) -> pb.RollBackResponse:
        active, before = await self.revisions.roll_back(request.model, request.model_version)
        return pb.RollBackResponse(active_revision=active, previous_revision=before)

    def _operation(self, name: str, call: Call) -> Operation:
        operation = self.operations.get(name)
        call.check_model(operation.row.model)
        return operation

    def _classifier(self, name: str, version: str) -> ServedModel:
        model = self.repository.get(name, version)
        if not model.is_classifier:
            raise Refused(
                f"model {name!r} is served without calibration: it is not a classifier that calserve understands"
            )
        return model

    async def _receive(
        self,
        model: ServedModel,
        reader: Calibrator,
        requests: AsyncIterator[Any],
        writer: RowWriter,
        through_model: bool,
    ) -> None:
        """Write what `reader` reads of the streamed rows into the job's folder, each chunk checked when it comes."""
        async for request in requests:
            match request.WhichOneof("payload"):
                case "rows":
                    try:
                        rows = await self._read_rows(model, reader, request.rows, through_model)
                        writer.expect(rows[0], shifted=rows[-1] is not None)
                    except (ValueError, TypeError) as error:
                        raise InvalidRequest(f"rows from {writer.row_count} on: {error}") from error
                    await asyncio.to_thread(writer.append, *rows)
                case "reference":
                    try:
                        signals = await self._read_reference(model, reader, request.reference)
                        writer.expect_reference(signals)
                    except (ValueError, TypeError) as error:
                        raise InvalidRequest(f"reference rows from {writer.reference_count} on: {error}") from error
                    await asyncio.to_thread(writer.append_reference, signals)
                case _:
                    raise InvalidRequest("only the first message of the stream may hold a spec; the others hold rows")
            if writer.byte_count > self.operations.limits.bytes_per_job:
                raise InvalidRequest(
                    f"a calibration set takes at most {self.operations.limits.bytes_per_job} bytes; "
                    f"that is passed after {writer.row_count} rows"
                )
        if writer.row_count == 0:
            raise InvalidRequest("the stream holds no rows")

    async def _read_rows(
        self, model: ServedModel, reader: Calibrator, rows: resources.Rows, through_model: bool
    ) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any], NDArray[np.bool_] | None]:
        """Signals, labels, weights, and which are shifted."""
        if rows.HasField("logits") == bool(rows.inputs):
            raise InvalidRequest("rows hold either logits or the model's inputs")
        beside = reader.signal_shapes(model.n_classes)
        if rows.HasField("logits"):
            if through_model:
                raise InvalidRequest(
                    f"{reader.kind} is fitted through the model, by the gradient of its loss in the model's inputs: "
                    "send these instead of logits"
                )
            if beside:
                raise InvalidRequest(
                    f"{reader.kind} reads {', '.join(beside)} beside the logits, which the server computes from the "
                    "model's inputs: send these instead of logits"
                )
            signals = {"logits": _array("logits", rows.logits)}
        else:
            inputs = {named.name: _array(named.name, named.array) for named in rows.inputs}
            signals = await self._signals(model, reader, inputs)
            if through_model:
                signals |= {f"{INPUT}{place}": inputs[spec.name] for place, spec in enumerate(model.inputs)}
        logits = _checked(signals, model.n_classes, beside)["logits"]
        labels = check_labels(_array("labels", rows.labels), n_samples=len(logits), n_classes=model.n_classes)
        weights = np.ones(len(logits))
        if rows.HasField("sample_weight"):
            weights = _array("sample_weight", rows.sample_weight).astype(np.float64)
            if weights.shape != (len(logits),) or not np.isfinite(weights).all() or weights.min(initial=0.0) < 0:
                raise InvalidRequest(f"sample_weight must be {len(logits)} finite numbers, none negative")
        return signals, labels, weights, _shifted(reader, rows, len(logits))

    async def _read_reference(
        self, model: ServedModel, reader: Calibrator, rows: resources.ReferenceRows
    ) -> dict[str, NDArray[Any]]:
        if "reference" not in reader.fit_reads:
            raise InvalidRequest(f"{reader.kind} does not read a reference")
        inputs = {named.name: _array(named.name, named.array) for named in rows.inputs}
        signals = await self._signals(model, reader, inputs)
        return _checked(signals, model.n_classes, reader.signal_shapes(model.n_classes))

    async def _signals(
        self, model: ServedModel, reader: Calibrator, inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """What `reader` reads of the caller's inputs, computed a few rows at a time."""
        specs = {spec.name: spec for spec in model.inputs}
        for name, array in inputs.items():
            infer_request.check_input_name(model, name, specs, {})
            infer_request.check_datatype(name, tensors.datatype_of(name, array), specs[name])
            infer_request.check_dimensions(name, array.shape, specs[name])
        missing = specs.keys() - inputs.keys()
        if missing:
            raise InvalidRequest(f"model {model.name!r} needs the inputs {', '.join(sorted(missing))} too")
        count = len(next(iter(inputs.values())))
        step = min(model.max_batch_size or ROWS_PER_RUN, ROWS_PER_RUN)
        parts = [
            await model.signals(reader, {name: array[start : start + step] for name, array in inputs.items()})
            for start in range(0, count, step)
        ]
        shapes = {"logits": (model.n_classes,), **reader.signal_shapes(model.n_classes)}
        none = {name: np.empty((0, *shape), np.float32) for name, shape in shapes.items()}
        return {name: np.concatenate([part[name] for part in [none, *parts]]) for name in shapes}

    async def _message(self, operation: Operation) -> resources.Operation:
        row = operation.row
        message = resources.Operation(
            operation=row.operation,
            model=row.model,
            description=row.description,
            state=_STATES[row.state],
            progress=1.0 if row.state == "succeeded" else operation.progress,
            stage=operation.stage if operation.running else row.state,
            error_reason=row.error_reason,
            error_message=row.error_message,
        )
        message.create_time.FromMicroseconds(int(row.create_time * 1e6))
        if row.result and "revision" in row.result:
            try:
                found = await self.revisions.get(row.model, row.result["revision"])
                message.revision.CopyFrom(self._revision_message(found))
            except NotFound:
                pass  # deleted since
        elif row.result:
            message.evaluation.CopyFrom(_evaluation_message(row.result["evaluation"]))
        return message

    def _revision_message(self, row: RevisionRow) -> resources.Revision:
        message = resources.Revision(
            model=row.model,
            revision=row.revision,
            kind=row.kind,
            params_json=row.params_json,
            model_digest=row.model_digest,
            artifact_digest=row.artifact_digest,
            row_count=row.row_count,
            class_count=row.class_count,
            active=self.revisions.is_active(row),
            notes=row.notes,
        )
        message.create_time.FromMicroseconds(int(row.create_time * 1e6))
        if row.held_out is not None:
            message.held_out.CopyFrom(_evaluation_message(row.held_out))
        for candidate in row.ranking:
            _fill_candidate(message.ranking.add(), candidate)
        return message


async def _first_spec(requests: AsyncIterator[Any]) -> Any:
    async for request in requests:
        if request.WhichOneof("payload") == "spec":
            return request.spec
        break
    raise InvalidRequest("the first message of the stream must hold a spec")


def _params(params_json: str) -> dict[str, Any]:
    try:
        params = json.loads(params_json or "{}")
    except (json.JSONDecodeError, RecursionError):
        raise InvalidRequest("params_json is not JSON") from None
    if not isinstance(params, dict):
        raise InvalidRequest(f"params_json must be a JSON object, got a {type(params).__name__}")
    return params


def _unfitted(kind: str, params: Mapping[str, Any]) -> Calibrator:
    """The calibrator that is to read the rows; of kind "auto" one that reads what all candidates do, the logits."""
    try:
        if kind == AUTO:
            auto.check_options(**params)
            return Identity()
        return calibrators.create(kind, **params)
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidRequest(str(error)) from error


def _bytes_with_logits(model: ServedModel) -> bytes:
    return bytes(model.with_logits().SerializeToString())


def _checked(
    signals: dict[str, NDArray[Any]], n_classes: int, beside: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    signals["logits"] = check_logits(signals["logits"], n_classes=n_classes)
    for name, shape in beside.items():
        check_signal(name, signals[name], (len(signals["logits"]), *shape))
    return signals


def _shifted(reader: Calibrator, rows: resources.Rows, count: int) -> NDArray[np.bool_] | None:
    if not rows.HasField("shifted"):
        return None
    if "shifted" not in reader.fit_reads:
        raise InvalidRequest(f"{reader.kind} does not ask which rows are shifted")
    shifted = _array("shifted", rows.shifted)
    if shifted.dtype != np.bool_ or shifted.shape != (count,):
        raise InvalidRequest(f"shifted must be {count} of BOOL, got {shifted.dtype} of shape {shifted.shape}")
    return shifted


def _held_out_fraction(spec: pb.FitCalibratorRequest.Spec) -> float:
    fraction = spec.held_out_fraction if spec.HasField("held_out_fraction") else DEFAULT_HELD_OUT_FRACTION
    if not 0 <= fraction <= MAX_HELD_OUT_FRACTION:
        raise InvalidRequest(f"held_out_fraction must be in 0..{MAX_HELD_OUT_FRACTION}, got {fraction}")
    return fraction


def _array(name: str, message: resources.Array) -> NDArray[Any]:
    if message.datatype not in NUMPY or message.datatype == "BF16":
        raise InvalidRequest(f"{name}: unknown datatype {message.datatype!r}")
    return tensors.from_raw(name, message.datatype, message.shape, message.data)


def _model_message(model: ServedModel) -> resources.Model:
    message = resources.Model(
        model=model.name,
        version=model.version,
        digest=model.digest,
        class_count=model.n_classes,
        active_revision=model.active.revision,
        provider=model.active.session.provider,
        class_names=model.class_names,
    )
    if model.inspection is not None:
        message.logits_tensor = model.inspection.logits.tensor
        message.logits_reason = model.inspection.logits.reason
        message.features_tensor = model.inspection.features or ""
        message.features_reason = model.inspection.features_reason
    return message


def _evaluation_message(evaluation: Mapping[str, Any]) -> resources.Evaluation:
    message = resources.Evaluation(row_count=evaluation["row_count"], level=evaluation["level"])
    _fill_scores(message.before, evaluation["before"])
    _fill_scores(message.after, evaluation["after"])
    return message


def _fill_scores(target: Any, scores: Sequence[tuple[str, float, float | None, float | None]]) -> None:
    for name, value, low, high in scores:
        target.add(name=name, value=value, low=low, high=high)


def _fill_candidate(message: resources.Candidate, candidate: Mapping[str, Any]) -> None:
    message.kind, message.seconds, message.skipped = (candidate[key] for key in ("kind", "seconds", "skipped"))
    message.gain, message.gain_error = candidate["gain"]
    _fill_scores(message.scores, candidate["scores"])
