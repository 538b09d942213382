"""The client for asyncio: the methods of `Client`, awaited, and a stream."""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc
import numpy as np
from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import feedback_service_pb2 as feedback
from calserve.v1 import monitor_service_pb2 as pb_monitor
from calserve.v1 import online_service_pb2 as online
from calserve.v1 import resources_pb2 as resources
from calserve.v1 import shadow_service_pb2 as shadow_pb
from grpc_health.v1 import health_pb2
from numpy.typing import ArrayLike

import calibrators
from calibrators import Calibrator
from calibrators.graph import LOGITS, PREFIX
from service import errors
from service.client import monitors, requests
from service.client.connection import Pem, Security
from service.client.failures import DEFAULT_RETRIES, Retries, is_cut_off, translated, translation
from service.client.following import POLL_SECONDS, Following, progress_bars, sending
from service.client.monitors import FIRST, Alarm, Monitor, MonitorReport, alarm_of, monitor_of, number_of, report_of
from service.client.requests import Inputs, Reference
from service.client.results import (
    Array,
    Evaluation,
    Model,
    OnlineState,
    Prediction,
    Replay,
    Revision,
    Shadow,
    StoredPrediction,
    evaluation_of,
    model_of,
    online_state_of,
    replay_of,
    revision_of,
    shadow_of,
    stored_prediction_of,
)
from service.client.stream import Stream
from service.rpc.health import READY
from service.rpc.wire import (
    CALIBRATOR_SERVICE,
    FEEDBACK_SERVICE,
    HEALTH_SERVICE,
    INFERENCE_SERVICE,
    MONITOR_SERVICE,
    ONLINE_SERVICE,
    SHADOW_SERVICE,
    inference,
)

MOST_SENDINGS = 5
"""How often rows are sent whose refusal was lost."""


class AsyncClient:
    """A connection to one server, made and used inside one event loop. Every method is as in `Client`.

    Parameters
    ----------
    address : host:port of the gRPC front
    token : bearer token, sent with every call; in plain text to this machine only
    root_certificates : authorities (PEM, or the path of a file), one of which signed the server's certificate
    certificate, private_key : the client's own (likewise), where the server asks for one
    tls : TLS with the authorities that grpc brings along; implied by any of the above but the token
    show_progress : draw progress bars for fits (default: when standard output is a terminal)
    timeout_seconds : deadline of each short call, its retries included; fits take as long as they take
    retries : of calls that change nothing: predictions and everything that reads
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        *,
        token: str | None = None,
        root_certificates: Pem | None = None,
        certificate: Pem | None = None,
        private_key: Pem | None = None,
        tls: bool = False,
        show_progress: bool | None = None,
        timeout_seconds: float = 60.0,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        security = Security(token, root_certificates, certificate, private_key, tls)
        self._channel = security.channel(grpc.aio, address)
        self._calibrators, self._feedback, self._monitors, self._online, self._inference, self._health = (
            security.stub(self._channel, service)
            for service in (
                CALIBRATOR_SERVICE,
                FEEDBACK_SERVICE,
                MONITOR_SERVICE,
                ONLINE_SERVICE,
                INFERENCE_SERVICE,
                HEALTH_SERVICE,
            )
        )
        self._shadows = security.stub(self._channel, SHADOW_SERVICE)
        self._show_progress, self._timeout, self._retries = show_progress, timeout_seconds, retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Return as soon as every model of the server is served; NotReady when the time is over."""
        request = health_pb2.HealthCheckRequest(service=READY)
        answers = self._health.Watch(request, timeout=timeout_seconds, wait_for_ready=True)
        heard = "no server answers"
        try:
            async for answer in answers:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    answers.cancel()
                    return
                heard = "the server runs, but not every model is served"
        except grpc.RpcError:
            pass  # the deadline, or a server that went away
        raise errors.NotReady(f"{heard} after {timeout_seconds:g} seconds")

    async def models(self) -> builtins.list[Model]:
        """Every served version of every model."""
        answer = await self._read(self._calibrators.ListModels, pb.ListModelsRequest())
        return [model_of(message) for message in answer.models]

    async def fit(
        self,
        model: str,
        kind: str,
        *,
        labels: ArrayLike,
        logits: ArrayLike | None = None,
        inputs: Inputs | None = None,
        sample_weight: ArrayLike | None = None,
        reference: Reference | None = None,
        shifted_inputs: Inputs | None = None,
        shifted_labels: ArrayLike | None = None,
        augment: float = 0.0,
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
        inputs : the model's inputs, rows first, by name (a bare array if there is one): the server computes the logits,
            and the views for a kind that reads them; a kind that is fitted through the model takes no other rows
        sample_weight : (n_samples,), not negative
        reference : for a kind that compares rows with others: inputs without labels, all at once or batch by batch from
            an iterable, which is sent as it comes; the calibration rows themselves where nothing is given
        shifted_inputs, shifted_labels : for a kind that wants them: further rows, distorted or of another origin
        augment : have distorted copies of this share of the images made (`calibrators.augment`), and added to these
        held_out_fraction : of the rows, kept from the fit that is scored; the revision itself is fitted on all rows
        params : constructor parameters of the kind

        Raises
        ------
        errors.InvalidRequest, errors.Refused
            naming what was wrong; `Refused` also when the fit itself failed
        """
        spec = requests.fit_spec(model, kind, params, held_out_fraction, seed)
        rows = await self._rows(model, labels, logits, inputs, sample_weight)
        metadata = await self._metadata(model) if reference is not None or shifted_inputs is not None else None
        shifted = None if shifted_inputs is None else requests.named(shifted_inputs, metadata)
        rows = requests.with_shifted(rows, shifted, shifted_labels, augment, seed)
        batches = requests.batches(reference, metadata)
        operation = await self._send(self._calibrators.FitCalibrator, spec, rows, f"fit {kind}", batches)
        return revision_of(operation.revision)

    async def evaluate(
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
        spec = requests.evaluate_spec(model, revision, seed)
        rows = await self._rows(model, labels, logits, inputs, None)
        what = f"evaluate {revision or 'the active revision'}"
        operation = await self._send(self._calibrators.EvaluateRevision, spec, rows, what)
        return evaluation_of(operation.evaluation)

    async def activate(self, model: str, revision: str) -> str:
        """Make a revision serve ("none": the model's own probabilities); return what was active before."""
        request = pb.ActivateRevisionRequest(model=model, revision=revision)
        answer = await self._call(self._calibrators.ActivateRevision, request)
        return str(answer.previous_revision)

    async def rollback(self, model: str) -> str:
        """Activate what was active before the present revision; return what is active now."""
        answer = await self._call(self._calibrators.RollBack, pb.RollBackRequest(model=model))
        return str(answer.active_revision)

    async def list(self, model: str) -> builtins.list[Revision]:
        """The revisions of a model, newest first."""
        answer = await self._read(self._calibrators.ListRevisions, pb.ListRevisionsRequest(model=model))
        return [revision_of(message) for message in answer.revisions]

    async def get(self, model: str, revision: str) -> Revision:
        request = pb.GetRevisionRequest(model=model, revision=revision)
        return revision_of(await self._read(self._calibrators.GetRevision, request))

    async def delete(self, model: str, revision: str) -> None:
        """Forget a revision. Refused while it is active, or while a roll-back would activate it."""
        await self._call(self._calibrators.DeleteRevision, pb.DeleteRevisionRequest(model=model, revision=revision))

    async def calibrator(self, model: str, revision: str) -> Calibrator:
        """The fitted calibrator itself, for use without the server."""
        answer = await self._read(self._calibrators.GetArtifact, pb.GetArtifactRequest(model=model, revision=revision))
        return calibrators.loads(answer.artifact)

    async def export(self, model: str, revision: str = "") -> bytes:
        """The model with a revision (default: the active one) inside, as one ONNX file that any runtime serves."""
        request = pb.ExportModelRequest(model=model, revision=revision)

        async def whole(request: Any, **options: Any) -> bytes:
            answers = self._calibrators.ExportModel(request, **options)
            return b"".join([answer.piece async for answer in answers])

        return bytes(await self._read(whole, request))

    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Sequence[str] = (),
        calibrator: str | None = None,
        confidence_level: float | None = None,
        segment: str = "",
        receipt: bool = False,
    ) -> Prediction:
        """Run the model on one batch.

        `outputs` names what to return (default: everything); `calibrator` a revision, or "none" (default: the active).
        `confidence_level` is that of the prediction sets of a conformal revision (default: its own).
        `segment` says which part of the traffic the rows belong to ("android"), for monitors to tell it from others.
        With `receipt` the answer brings what to send back with labels that must find their prediction whatever happens.
        """
        columns = await self._named(model, inputs)
        request = requests.infer_request(
            model, columns, outputs, calibrator, confidence_level, segment=segment, receipt=receipt
        )
        return requests.prediction_of(await self._read(self._inference.ModelInfer, request))

    @asynccontextmanager
    async def stream(self, model: str) -> AsyncIterator[Stream]:
        """One stream for many predictions of a model in flight: less than half the cost of a call each.

        Example
        -------
            async with client.stream("magika") as stream:
                predictions = await asyncio.gather(*map(stream.predict, batches))
        """
        stream = Stream(self._inference.ModelStreamInfer, model, await self._metadata(model), self._timeout)
        try:
            yield stream
        finally:
            await stream.close()

    async def label(
        self,
        model: str,
        prediction_ids: Sequence[str],
        labels: ArrayLike,
        *,
        rows: ArrayLike | None = None,
        receipts: Sequence[str] | None = None,
    ) -> builtins.list[str]:
        """Say which classes came true; return what became of each label, in order.

        Labels that are `recorded` survive a crash of the server. Sending them again is safe: they are then `duplicate`.
        Others are `conflict` (another label is there, and stays), `unknown`, `expired` or `invalid_class`.

        Parameters
        ----------
        prediction_ids : of the predictions; or the ids that you gave the requests
        labels : class indices, or class names
        rows : which row of each prediction is meant (default: its first)
        receipts : of the predictions, if you asked for them; empty for those without
        """
        results: builtins.list[str] = []
        with progress_bars(self._show_progress) as progress:
            sending = progress.add_task(f"labels of {model}", total=len(prediction_ids))
            for request in requests.label_requests(model, prediction_ids, labels, rows, receipts):
                results += requests.results_of(await self._read(self._feedback.RecordLabels, request))
                progress.update(sending, completed=len(results))
        return results

    async def get_prediction(self, model: str, prediction_id: str, row: int = 0) -> StoredPrediction:
        """One row as it was served, from the server's journal. NotFound if it is not there, or no longer."""
        request = feedback.GetPredictionRequest(model=model, prediction_id=prediction_id, row=row)
        return stored_prediction_of(await self._read(self._feedback.GetPrediction, request))

    async def online_state(self, model: str) -> OnlineState:
        """What the active revision has learned online. Refused if it does not learn online."""
        return online_state_of(await self._read(self._online.GetOnlineState, online.GetOnlineStateRequest(model=model)))

    async def roll_back_online_state(self, model: str, online_state: int) -> OnlineState:
        """Serve an earlier state, one of those kept or 0, the revision as it was fitted; learning goes on from it."""
        request = online.RollBackOnlineStateRequest(model=model, online_state=online_state)
        return online_state_of(await self._call(self._online.RollBackOnlineState, request))

    async def suspend_learning(self, model: str) -> OnlineState:
        """Learn nothing until `resume_learning`; the state stays that serves."""
        request = online.SuspendLearningRequest(model=model)
        return online_state_of(await self._call(self._online.SuspendLearning, request))

    async def resume_learning(self, model: str, *, skip_waiting: bool = False) -> OnlineState:
        """Go on learning: with the labels that came meanwhile, or, to `skip_waiting`, as if they had taught nothing."""
        request = online.ResumeLearningRequest(model=model, skip_waiting=skip_waiting)
        return online_state_of(await self._call(self._online.ResumeLearning, request))

    async def replay_learning(self, model: str) -> Replay:
        """Learn everything again from the server's journal, as far back as it goes, and compare; changes nothing."""
        request = online.ReplayLearningRequest(model=model)
        return replay_of(await self._call(self._online.ReplayLearning, request))

    async def start_shadow(
        self,
        model: str,
        revision: str,
        *,
        policy: str = "manual",
        level: float = 0.95,
        least_labels: int = 500,
        share: float = 0.0,
    ) -> Shadow:
        """Compare a revision ("none": the model's own probabilities) with the active one, on what is predicted from now
        on.

        Parameters
        ----------
        policy : "automatic" promotes it as soon as it is shown better on `least_labels` or more; "manual" leaves it
        level : the probability with which the bounds of the gain hold, at all times at once
        share : of requests on which it is run, where kept logits are not enough; 0: as is usual for its kind
        """
        request = requests.start_shadow(model, revision, policy, level, least_labels, share)
        return shadow_of(await self._call(self._shadows.StartShadow, request))

    async def shadow(self, model: str, revision: str) -> Shadow:
        """How a challenger stands, or stood when its shadow ended."""
        request = shadow_pb.GetShadowRequest(model=model, revision=revision)
        return shadow_of(await self._read(self._shadows.GetShadow, request))

    async def shadows(self, model: str) -> builtins.list[Shadow]:
        """All challengers of a model, those whose shadow has ended too."""
        answer = await self._read(self._shadows.ListShadows, shadow_pb.ListShadowsRequest(model=model))
        return [shadow_of(message) for message in answer.shadows]

    async def stop_shadow(self, model: str, revision: str) -> Shadow:
        """Compare it no longer."""
        request = shadow_pb.StopShadowRequest(model=model, revision=revision)
        return shadow_of(await self._call(self._shadows.StopShadow, request))

    async def promote(self, model: str, revision: str) -> Shadow:
        """Activate a challenger that is shown better. Refused if it is not; Stale if another revision than the one that
        it was compared with is active by now."""
        request = shadow_pb.PromoteShadowRequest(model=model, revision=revision)
        return shadow_of(await self._call(self._shadows.PromoteShadow, request))

    async def create_monitor(
        self,
        model: str,
        name: str,
        detector: str,
        *,
        watched: str = "served",
        policy: str = "tell",
        cooldown_rows: int = 0,
        baseline_rows: int = 0,
        **params: Any,
    ) -> Monitor:
        """Watch what is predicted from now on, and what comes true of it.

        Parameters
        ----------
        detector, params : its kind and its parameters
        watched : "raw", the model's own probabilities, or "served"
        policy : what an alarm does: "tell", "suspend" online learning, "roll_back" the revision, "refit" a calibrator
        cooldown_rows : rows after an alarm that are not read
        baseline_rows : labelled rows whose calibration is taken as given, so that only a change of it rings
        """
        fields = {"detector": detector, "watched": watched, "policy": policy, "cooldown_rows": cooldown_rows}
        spec = monitors.spec_of(model, name, {**fields, "baseline_rows": baseline_rows, "params": params})
        return monitor_of(await self._call(self._monitors.CreateMonitor, pb_monitor.CreateMonitorRequest(spec=spec)))

    async def monitors(self, model: str) -> builtins.list[Monitor]:
        """All of a model: the default ones and those that were asked for."""
        answer = await self._read(self._monitors.ListMonitors, pb_monitor.ListMonitorsRequest(model=model))
        return [monitor_of(message) for message in answer.monitors]

    async def monitor(self, model: str, name: str) -> Monitor:
        request = pb_monitor.GetMonitorRequest(model=model, monitor=name)
        return monitor_of(await self._read(self._monitors.GetMonitor, request))

    async def update_monitor(
        self,
        model: str,
        name: str,
        *,
        policy: str | None = None,
        cooldown_rows: int | None = None,
        detector: str | None = None,
        watched: str | None = None,
        baseline_rows: int | None = None,
        params: dict[str, Any] | None = None,
    ) -> Monitor:
        """Change what is given. Unless that is policy or cool-down alone, the monitor begins anew."""
        fields = {"policy": policy, "cooldown_rows": cooldown_rows, "detector": detector, "watched": watched}
        request = monitors.update_request(model, name, {**fields, "baseline_rows": baseline_rows, "params": params})
        return monitor_of(await self._call(self._monitors.UpdateMonitor, request))

    async def delete_monitor(self, model: str, name: str) -> None:
        """Forget a monitor. Its alarms stay."""
        await self._call(self._monitors.DeleteMonitor, pb_monitor.DeleteMonitorRequest(model=model, monitor=name))

    async def alarms(self, model: str = "", *, most: int = 100) -> builtins.list[Alarm]:
        """The last alarms of a model (default: of all), newest first."""
        request = pb_monitor.ListAlarmsRequest(model=model, page_size=most)
        return [alarm_of(message) for message in (await self._read(self._monitors.ListAlarms, request)).alarms]

    async def watch_alarms(self, model: str = "", *, after: str = "") -> AsyncIterator[Alarm]:
        """Each alarm as it comes, and again when its cause, its outcome or anything else about it has changed.

        `after` names an alarm: those after it come first. A stream that is cut off is taken up again. It has no end.
        """
        newest = [] if after else await self.alarms(model, most=1)
        seen, tried = after or next((alarm.alarm for alarm in newest), FIRST), 0
        while True:
            request = pb_monitor.WatchAlarmsRequest(model=model, after=seen)
            try:
                async for message in self._monitors.WatchAlarms(request):
                    seen, tried = max(seen, message.alarm, key=number_of), 0
                    yield alarm_of(message)
                await asyncio.sleep(self._retries.first_seconds)  # the server drains
            except grpc.RpcError as error:
                tried += 1
                if (pause := self._retries.pause(error, tried, float("inf"))) is None:
                    raise translation(error) from None
                await asyncio.sleep(pause)

    async def acknowledge(self, model: str, alarm: str, *, rebaseline: bool = False) -> Alarm:
        """Say that an alarm was seen: its monitor begins anew, and may ring again.

        With `rebaseline` what comes from now on is the reference that changes are measured from: a change that stays.
        """
        request = pb_monitor.AcknowledgeAlarmRequest(model=model, alarm=alarm, rebaseline=rebaseline)
        return alarm_of(await self._call(self._monitors.AcknowledgeAlarm, request))

    async def monitor_report(self, model: str) -> MonitorReport:
        """What all monitors of a model say, and its last alarms."""
        return report_of(await self._read(self._monitors.GetReport, pb_monitor.GetReportRequest(model=model)))

    async def page(self, model: str, since: str = "7d") -> str:
        """A model's page as one HTML file: what was said and what came true in the last "90m", "24h" or "7d"."""
        request = pb_monitor.GetReportRequest(model=model, page_window=since)
        answer = await self._read(self._monitors.GetReport, request)
        return str(answer.page_html)

    async def logits(self, model: str, inputs: Inputs, *, batch_size: int = 64) -> Array:
        """The logits (n_samples, n_classes) that the model's calibrators read, computed by the server batch by batch.

        For fitting and comparing several kinds on the same rows: compute once, then pass `logits`.
        """
        return await self._in_batches(model, inputs, LOGITS, None, batch_size)

    async def probabilities(
        self, model: str, inputs: Inputs, *, calibrator: str | None = None, batch_size: int = 64
    ) -> Array:
        """The probabilities (n_samples, n_classes) of many rows by one revision (default: the active)."""
        return await self._in_batches(model, inputs, "probabilities", calibrator, batch_size)

    async def _in_batches(
        self, model: str, inputs: Inputs, output: str, calibrator: str | None, batch_size: int
    ) -> Array:
        batches = requests.in_batches(await self._named(model, inputs), batch_size)
        with progress_bars(self._show_progress) as progress:
            shown = progress.track(batches, description=f"{output.removeprefix(PREFIX)} in batches of {batch_size}")
            predictions = [await self.predict(model, batch, outputs=[output], calibrator=calibrator) for batch in shown]
        return np.concatenate([prediction.outputs[output] for prediction in predictions])

    async def _rows(
        self, model: str, labels: ArrayLike, logits: ArrayLike | None, inputs: Inputs | None, weight: ArrayLike | None
    ) -> dict[str, Array]:
        requests.check_one_source(logits, inputs)
        own = None if inputs is None else await self._named(model, inputs)
        return requests.calibration_set(labels, logits, own, weight)

    async def _named(self, model: str, inputs: Inputs) -> dict[str, Array]:
        return requests.named(inputs, None if isinstance(inputs, Mapping) else await self._metadata(model))

    async def _metadata(self, model: str) -> Any:
        return await self._read(self._inference.ModelMetadata, inference.ModelMetadataRequest(name=model))

    async def _send(
        self,
        method: Any,
        spec: Any,
        columns: dict[str, Array],
        what: str,
        reference: Iterable[Mapping[str, Array]] = (),
    ) -> resources.Operation:
        """Send the rows in bounded chunks, then follow the operation to its end."""
        with progress_bars(self._show_progress) as progress:
            sent = sending(progress, what, len(columns["labels"]))
            for tried in range(1, MOST_SENDINGS + 1):
                chunks = requests.in_chunks(spec, columns, sent, reference)
                try:
                    following = Following(progress, what, await method(chunks))
                    break
                except grpc.RpcError as error:
                    if tried == MOST_SENDINGS or not is_cut_off(error) or isinstance(reference, Iterator):
                        raise translation(error) from None
            while following.running:
                wait = following.wait_request()
                following.saw(await self._read(self._calibrators.WaitOperation, wait, POLL_SECONDS + self._timeout))
            return following.result()

    async def _read(self, method: Callable[..., Any], request: Any, timeout_seconds: float | None = None) -> Any:
        """A call that changes nothing, made again where the server says that this helps."""
        deadline, tried = time.monotonic() + (timeout_seconds or self._timeout), 0
        while True:
            try:
                return await method(request, timeout=deadline - time.monotonic())
            except grpc.RpcError as error:
                tried += 1
                pause = self._retries.pause(error, tried, deadline - time.monotonic())
                if pause is None:
                    raise translation(error) from None
                await asyncio.sleep(pause)

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        """A call that changes something, made once: whether one that failed took effect is not known."""
        with translated():
            return await method(request, timeout=self._timeout)
