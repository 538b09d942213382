"""One version of one model, as it is served.

A `Snapshot` is everything a batch needs: the session, the parameters to feed, and the revision they belong to. The
active one is a single attribute; activating is assigning it, so every answer is computed by exactly one revision.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import onnx
from calserve.open_inference import messages
from numpy.typing import NDArray

from calibrators import Calibrator, differentiable, fuse
from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.graph import (
    FEATURES,
    LOGITS,
    PREFIX,
    VIEWS,
    FusedModel,
    check_copies,
    parameters_of,
    signature,
)
from calibrators.inspection import Inspection
from calibrators.kinds.identity import Identity
from calibrators.layers import Layer, default_layers, find_layers, named_layers
from calibrators.online.learner import OnlineCalibrator
from service.errors import InvalidRequest, Refused
from service.inference import datatypes
from service.inference.batcher import Answer, Batcher, Lane, Limits, Run
from service.inference.indexed import IndexedSession
from service.inference.input_signals import InputSignals
from service.inference.prediction_sets import SET_OUTPUTS, SHARES, PredictionSets
from service.inference.session import Device, Session, TensorSpec
from service.inference.statistics import Statistics
from service.inference.warmup import made_up, row_costs, warm_up

NO_REVISION = "none"
"""The name of serving the model's own probabilities."""

KEPT_LEVELS = 64
"""Confidence levels for which a revision's snapshot is kept."""

KEPT_SESSIONS = 4
"""Sessions kept beside the active one, for other kinds and for requests that name a revision."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What computes an answer, immutable; `at_levels` only remembers.

    `online_state` is the number of the state of a revision that learns online, None of any other.
    """

    revision: str
    session: Session
    feeds: Mapping[str, NDArray[Any]]
    own_outputs: Mapping[str, str] = field(default_factory=dict)  # the model's name -> the name it is served under
    sets: PredictionSets | None = None
    at_levels: dict[float, Snapshot] = field(default_factory=dict)
    online_state: int | None = None

    @property
    def graph_outputs(self) -> list[TensorSpec]:
        """What the graph computes for callers."""
        return [spec for spec in self.session.outputs if not spec.name.startswith(PREFIX)]

    @property
    def outputs(self) -> list[TensorSpec]:
        """What a request gets that names nothing."""
        return [*self.graph_outputs, *(self.sets.specs if self.sets else ())]

    def at(self, confidence_level: float) -> Snapshot:
        """The same with sets of another level; one for all who ask for that level, so that they share runs."""
        if self.sets is None:
            raise InvalidRequest(
                f"parameter 'confidence_level' is for revisions that make prediction sets; {self.revision!r} makes none"
            )
        if confidence_level == self.sets.confidence_level:
            return self
        if confidence_level not in self.at_levels:
            if len(self.at_levels) >= KEPT_LEVELS:
                self.at_levels.clear()
            sets = replace(self.sets, confidence_level=confidence_level)
            self.at_levels[confidence_level] = replace(self, sets=sets)
        return self.at_levels[confidence_level]

    def learned(self, calibrator: Calibrator, number: int) -> Snapshot:
        """The same graph with another state of its calibrator."""
        return replace(self, feeds=parameters_of(calibrator), online_state=number, at_levels={})

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The values of these outputs, in their order."""
        if self.sets is None or not self.sets.needed(outputs):
            return self.session.run_with(outputs, feeds, self.feeds)
        inputs = {name: array for name, array in feeds.items() if name != SHARES}
        computed = [name for name in dict.fromkeys([*outputs, "probabilities"]) if name not in SET_OUTPUTS]
        values = self.session.run_with(computed, inputs, self.feeds)
        arrays = self.sets.beside(dict(zip(computed, values, strict=True)), feeds.get(SHARES))
        return [arrays[name] for name in outputs]


class ServedModel:
    """A loaded model and what serves it now.

    Attributes
    ----------
    inputs : specs of what a request may send
    common_outputs : names of what every snapshot computes
    hidden_outputs : specs of what a request gets only by naming it: the logits, as `calserve/logits`
    inspection : where logits and features are, None for a model that is no classifier (then served without calibration)
    active : the snapshot of the next batch
    config : what config.pbtxt says (inference.ModelConfig), empty without one
    statistics : what was served so far
    journal : whether its predictions are kept: off, async or sync; empty: as the server is set
    input_signals : what of the inputs is kept beside them, None: nothing
    """

    def __init__(
        self,
        name: str,
        version: str,
        proto: onnx.ModelProto,
        digest: str,
        device: Device,
        inspection: Inspection | None,
        *,
        config: Any = None,
        class_names: Sequence[str] = (),
        limits: Limits | None = None,
        journal: str = "",
        input_projections: int = 0,
    ) -> None:
        self.name, self.version, self.digest, self.journal = name, version, digest, journal
        self.device, self.inspection = device, inspection
        self.config = messages.ModelConfig() if config is None else config
        self.class_names, self.max_batch_size = tuple(class_names), int(self.config.max_batch_size)
        self.statistics = Statistics()
        self._proto = proto
        self._sessions: OrderedDict[str, tuple[Session, FusedModel]] = OrderedDict()
        self._tapped: tuple[tuple[str, ...], Snapshot | None] = ((), None)
        self._building = threading.Lock()  # two requests for one graph must not build it twice
        if inspection is None:
            self.n_classes = 0
            session = Session(proto.SerializeToString(), device)
            self.active = Snapshot(NO_REVISION, session, {}, {spec.name: spec.name for spec in session.outputs})
        else:
            self.n_classes = inspection.n_classes or self._count_classes(inspection)
            self.inspection = replace(inspection, n_classes=self.n_classes)
            self.active = self.uncalibrated = self.snapshot(Identity.of(self.n_classes), NO_REVISION)
        self.inputs = list(self.active.session.inputs)
        self.common_outputs = [spec.name for spec in self.active.session.outputs]
        self.hidden_outputs = [spec for spec in self.active.session.outputs if spec.name == LOGITS]
        for spec in self.inputs:
            if spec.datatype not in datatypes.NUMPY:
                raise Refused(f"input {spec.name!r} is of type {spec.datatype}, which the protocol has no word for")
        self.joins_requests = self.max_batch_size > 0 or self._rows_stand_alone()
        self.input_signals = self._signals_of_inputs(input_projections) if input_projections else None
        self.batcher = self._new_batcher(limits or Limits())

    @property
    def outputs(self) -> list[TensorSpec]:
        """Specs of what a request gets that names nothing: with what the active revision computes besides."""
        return self.active.outputs

    @property
    def is_classifier(self) -> bool:
        return self.inspection is not None

    def layers(self, names: Sequence[str] | None = None) -> list[Layer]:
        """The layers of these tensors; by default those that calserve.toml names, or else the last ones found.

        ValueError for a tensor that cannot be read as a layer.
        """
        self._check_classifier()
        inspection = cast(Inspection, self.inspection)
        if names := names or inspection.layers:
            return named_layers(self._proto, inspection, names)
        return default_layers(find_layers(self._proto, inspection))

    def reader(self, calibrator: Calibrator) -> Calibrator:
        """The calibrator, not fitted, as it reads this model; Refused, naming what the model shows, if it cannot."""
        try:
            return calibrator.on_model(self.layers)
        except ValueError as error:
            raise Refused(f"model {self.name!r}: {error}", reason="SIGNAL_MISSING") from error

    def check_signals(self, calibrator: Calibrator, *, to_fit: bool = False) -> None:
        """Refused, naming what is missing and what is there, unless this model shows what the calibrator reads."""
        features = {"features"} if self.inspection is not None and self.inspection.features else set()
        shown = {"inputs"} | ({"logits"} if self.is_classifier else set()) | features
        needed = calibrator.needs | (calibrator.fit_needs if to_fit else frozenset())
        why = ""
        checks = {"views": self._check_views, "input_gradients": self._check_gradients}
        if calibrator.taps:
            shown.discard("features")
            checks["features"] = self._check_taps
        for signal, check in checks.items():
            if signal in needed:
                try:
                    check(calibrator)
                    shown.add(signal)
                except ValueError as error:
                    why = f" ({error})"
        if missing := needed - shown:
            raise Refused(
                f"model {self.name!r} does not show {', '.join(sorted(missing))}{why}; "
                f"it shows {', '.join(sorted(shown))}",
                reason="SIGNAL_MISSING",
            )

    def _check_views(self, calibrator: Calibrator) -> None:
        check_copies(self._proto, calibrator)

    def _check_taps(self, calibrator: Calibrator) -> None:
        self.layers(calibrator.taps)

    def _check_gradients(self, calibrator: Calibrator) -> None:
        differentiable.check(self.with_logits(), calibrator.tensor)

    def with_logits(self) -> onnx.ModelProto:
        """The model with the logits among its outputs, as a fit differentiates it."""
        self._check_classifier()
        return fuse(self._proto, Identity.of(self.n_classes), self.inspection).proto

    def snapshot(self, calibrator: Calibrator, revision: str) -> Snapshot:
        """A snapshot that serves `calibrator`; builds a session only for a graph that no kept session has.

        Raises
        ------
        Refused
            if the model is no classifier, or the calibrator was fitted on another number of classes
        """
        self._check_classifier()
        n_classes = int(calibrator.tensors()["n_classes"])
        if n_classes != self.n_classes:
            raise Refused(f"model {self.name!r} has {self.n_classes} classes, the calibrator was fitted on {n_classes}")
        with self._building:
            session, fused = self._session_for(calibrator)
        conformal = isinstance(calibrator, ConformalCalibrator)
        sets = PredictionSets(calibrator, calibrator.confidence_level) if conformal else None
        state = 0 if isinstance(calibrator, OnlineCalibrator) else None
        feeds = parameters_of(calibrator)
        return Snapshot(revision, session, feeds, fused.own_outputs, sets, online_state=state)

    def _signals_of_inputs(self, projections: int) -> InputSignals:
        if not self.joins_requests:
            raise Refused(f"model {self.name!r} has no input_projections: the rows of its inputs do not stand alone")
        try:
            return InputSignals(self.inputs, projections)
        except ValueError as error:
            raise Refused(f"model {self.name!r} has no input_projections: {error}") from error

    def _check_classifier(self) -> None:
        if self.inspection is None:
            raise Refused(f"model {self.name!r} is not a classifier that calserve understands; it has no calibrators")

    def _session_for(self, calibrator: Calibrator) -> tuple[Session, FusedModel]:
        taps = calibrator.taps
        inside = Identity.of(self.n_classes) if calibrator.has_index else calibrator
        key = "\n".join(("layers", *taps)) if calibrator.has_index else signature(calibrator)
        if key not in self._sessions:
            fused = fuse(self._proto, inside, self.inspection, sets=False, taps=taps)
            self._sessions[key] = (Session(fused.to_bytes(), self.device), fused)
            while len(self._sessions) > KEPT_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        session, fused = self._sessions[key]
        return (IndexedSession(session, calibrator, self.device) if calibrator.has_index else session), fused

    def tapped(self, taps: Sequence[str]) -> Snapshot:
        """A snapshot that shows the vectors of these layers; the last that was asked for is kept."""
        with self._building:
            kept, snapshot = self._tapped
            if snapshot is None or kept != tuple(taps):
                fused = fuse(self._proto, Identity.of(self.n_classes), self.inspection, taps=taps)
                snapshot = Snapshot(NO_REVISION, Session(fused.to_bytes(), self.device), {}, fused.own_outputs)
                self._tapped = tuple(taps), snapshot
        return snapshot

    def export(self, calibrator: Calibrator | None) -> bytes:
        """The model with a calibrator inside (None: its own probabilities), as plain ONNX."""
        self._check_classifier()
        try:
            return fuse(self._proto, calibrator or Identity.of(self.n_classes), self.inspection).export()
        except ValueError as error:
            raise Refused(f"this revision of model {self.name!r} cannot be exported: {error}") from error

    def lane(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], snapshot: Snapshot | None) -> Lane:
        """Where a request waits: beside those that ask for the same of rows of the same form."""
        skipped = 1 if self.joins_requests else 0
        inputs = tuple(
            (spec.name, feeds[spec.name].dtype, feeds[spec.name].shape[skipped:])
            for spec in self.inputs
            if spec.name in feeds
        )
        if SHARES in feeds:
            inputs += ((SHARES, feeds[SHARES].dtype, ()),)
        return Lane(tuple(outputs), snapshot, inputs, self.joins_requests)

    async def run(
        self,
        outputs: Sequence[str],
        feeds: Mapping[str, NDArray[Any]],
        snapshot: Snapshot | None = None,
        deadline: float = math.inf,
        caller: Callable[[], str] = str,
    ) -> Answer:
        """The named outputs for one request, computed by `snapshot`, by default the active one.

        `deadline` is on time.monotonic(); work whose deadline has passed, or whose caller has left, is not run. A
        request of more rows than a run takes is divided, and its parts are computed by one snapshot.
        """
        rows, most = self.row_count(feeds), self.batcher.limits.rows
        if not self.joins_requests or rows <= most:
            return await self._submit(outputs, feeds, snapshot, deadline, caller)
        snapshot = snapshot or self.active
        parts = []
        for start in range(0, rows, most):  # one after the other: one caller's rows never fill the queue
            part = {name: array[start : start + most] for name, array in feeds.items()}
            parts.append(await self._submit(outputs, part, snapshot, deadline, caller))
            await asyncio.sleep(0)  # nor do its short runs keep the loop from the others
        return _rejoined(outputs, parts, snapshot)

    async def _submit(
        self,
        outputs: Sequence[str],
        feeds: Mapping[str, NDArray[Any]],
        snapshot: Snapshot | None,
        deadline: float,
        caller: Callable[[], str],
    ) -> Answer:
        lane = self.lane(outputs, feeds, snapshot)
        values = [np.ascontiguousarray(feeds[name]) for name, _, _ in lane.inputs]
        answer = self.batcher.submit(lane, values, self.row_count(feeds), deadline, caller)
        return answer if isinstance(answer, Answer) else await answer

    def _execute(
        self, asked: Snapshot | None, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]
    ) -> tuple[Snapshot, list[NDArray[Any]]]:
        """One run. The active snapshot is read once: every answer of the run is computed by it."""
        snapshot = asked or self.active
        return snapshot, snapshot.run(outputs, feeds)

    def _new_batcher(self, limits: Limits) -> Batcher:
        return Batcher(
            f"{self.name}/{self.version}",
            self._execute,
            self._limits(limits),
            self.statistics,
            # Waiting for a core is no cost of a run, so it is the thread's time; a GPU's is the wall clock's.
            time.thread_time_ns if self.device.on_cpu else time.perf_counter_ns,
            in_loop=not loops(self._proto),
        )

    def _limits(self, limits: Limits) -> Limits:
        """The server's limits with what config.pbtxt says of this model's batches."""
        return replace(
            limits,
            rows=self.max_batch_size or limits.rows,
            delay_us=int(self.config.dynamic_batching.max_queue_delay_microseconds) or limits.delay_us,
        )

    def _rows_stand_alone(self) -> bool:
        """Whether rows may share a run: every tensor has a free first dimension, and rows give alone what they give
        together. Tried on made-up rows, since no shape tells a batch from a sequence."""
        specs = [*self.inputs, *self.active.session.outputs]
        if not self.inputs or any(spec.shape[:1] != (-1,) for spec in specs):
            return False
        outputs = [spec.name for spec in self.active.session.outputs]
        together = made_up(self.inputs, 3)
        for array in together.values():
            if array.dtype.kind in "iu":
                array[1] = 1  # rows that differ, of the indices that are most likely to be in range
        try:
            of_all = self._execute(None, outputs, together)[1]
            for row in range(3):
                of_one = self._execute(None, outputs, {n: a[row : row + 1] for n, a in together.items()})[1]
                if not all(map(_agree, of_one, (array[row : row + 1] for array in of_all))):
                    return False
        except InvalidRequest:
            return False
        return True

    def row_count(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Rows of one request: its batch, or 1 for a model without a batch dimension."""
        batched = self.is_classifier or self.joins_requests
        shape = next(iter(feeds.values())).shape if feeds else ()
        return shape[0] if batched and shape else 1

    async def logits(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The logits [B, K] that the calibrators of this model are fitted on."""
        answer = await self.run([LOGITS], feeds, self.uncalibrated)
        return answer.part(LOGITS)

    async def signals(self, calibrator: Calibrator, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The logits, and what `calibrator` reads beside them, by name; ValueError if it cannot act on the inputs."""
        if calibrator.taps:
            snapshot = await asyncio.to_thread(self.tapped, calibrator.taps)
            answer = await self.run([LOGITS, FEATURES], feeds, snapshot)
            signals = {"logits": answer.part(LOGITS), "features": answer.part(FEATURES)}
        else:
            signals = {"logits": await self.logits(feeds)}
        if "views" in calibrator.needs and hasattr(calibrator, "n_classes_"):
            snapshot = await asyncio.to_thread(self.snapshot, calibrator, NO_REVISION)
            signals["views"] = (await self.run([VIEWS], feeds, snapshot)).part(VIEWS)
        elif "views" in calibrator.needs:  # no graph yet: nothing is fitted
            ((name, images),) = feeds.items()
            copies = [await self.logits({name: copy}) for copy in calibrator.copies(images)]
            signals["views"] = np.stack(copies, axis=1)
        return signals

    def warm_up(self, snapshot: Snapshot) -> dict[str, NDArray[Any]]:
        """Run `snapshot`, in the calling thread, on made-up inputs; one row's signals and probabilities, by name."""
        inner = [spec.name for spec in snapshot.session.outputs if spec.name.startswith(PREFIX)]
        wanted = [*inner, "probabilities"] if self.is_classifier else [spec.name for spec in self.outputs[:1]]
        if not self.device.on_cpu:  # where each size costs time when it comes first
            default = [spec.name for spec in snapshot.graph_outputs]
            warm_up(snapshot.session, default, snapshot.feeds, self.batcher.limits.rows)
        values = snapshot.session.run_with(wanted, made_up(self.inputs, 1), snapshot.feeds)
        return {name.removeprefix(PREFIX): value for name, value in zip(wanted, values, strict=True)}

    def measure(self) -> None:
        """Learn what runs cost, and where config.pbtxt does not say how many rows to join, join no more than make a row
        cheaper."""
        outputs, most = self.common_outputs, self.batcher.limits.rows if self.joins_requests else 1
        costs = row_costs(lambda rows: self._execute(None, outputs, made_up(self.inputs, rows)), most)
        lane = self.lane(outputs, made_up(self.inputs, 1), None)
        for rows, seconds in costs.seconds.items():
            self.batcher.costs.of(lane.inputs).learn(rows, int(1e9 * seconds))
        if self.joins_requests and not self.max_batch_size:
            self.batcher.limits = replace(self.batcher.limits, rows=costs.knee)

    async def retire(self) -> None:
        """Finish what is queued, then close. For a model that no new request can reach."""
        await self.batcher.drain()
        self.close()

    def close(self) -> None:
        self.batcher.close()

    def _count_classes(self, inspection: Inspection) -> int:
        """K from a run, where no shape in the graph tells it."""
        fused = fuse(self._proto, Identity.of(2), inspection)
        session = Session(fused.to_bytes(), self.device)
        try:
            (logits,) = session.run([LOGITS], made_up(session.inputs, 1))
        except InvalidRequest:
            raise Refused(
                f"model {self.name!r} does not tell its number of classes; declare the output's dims in config.pbtxt"
            ) from None
        return int(logits.shape[1])


def _rejoined(outputs: Sequence[str], parts: Sequence[Answer], snapshot: Snapshot) -> Answer:
    arrays = [np.concatenate([part.part(name) for part in parts]) for name in outputs]
    rows = sum(part.stop - part.start for part in parts)
    times = parts[0].run.times_ns[0], parts[-1].run.times_ns[1]
    return Answer(Run(outputs, arrays, snapshot, rows, times), 0, rows)


def _agree(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind == "f":
        return bool(np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True))
    return bool((one == other).all())


def loops(proto: onnx.ModelProto) -> bool:
    """Whether a node of the model, at any depth, may turn as often as an input says: no cost measured before holds."""

    def in_nodes(nodes: Iterable[onnx.NodeProto]) -> bool:
        return any(node.op_type in {"Loop", "Scan"} or any(map(in_attribute, node.attribute)) for node in nodes)

    def in_attribute(attribute: onnx.AttributeProto) -> bool:
        graphs = [attribute.g, *attribute.graphs] if attribute.HasField("g") else list(attribute.graphs)
        return any(in_nodes(graph.node) for graph in graphs)

    return in_nodes(proto.graph.node) or any(in_nodes(function.node) for function in proto.functions)
