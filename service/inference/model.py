"""One version of one model, as it is served.

A `Snapshot` is everything a batch needs: the session, the parameters to feed, and the revision they belong to. The
active one is a single attribute; activating is assigning it, so every answer is computed by exactly one revision.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from calserve.open_inference import messages
from numpy.typing import NDArray

from calibrators import Calibrator, fuse
from calibrators.graph import LOGITS, FusedModel, signature, stage
from calibrators.inspection import Inspection
from calibrators.kinds.identity import Identity
from service.errors import DeadlinePassed, InvalidRequest, Overloaded, Refused
from service.inference import datatypes
from service.inference.session import Device, Session, TensorSpec
from service.inference.statistics import Statistics

NO_REVISION = "none"
"""The name of serving the model's own probabilities."""

KEPT_SESSIONS = 4
"""Sessions kept beside the active one, for other kinds and for requests that name a revision."""

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """What computes an answer, immutable."""

    revision: str
    session: Session
    feeds: Mapping[str, NDArray[Any]]
    own_outputs: Mapping[str, str] = field(default_factory=dict)  # the model's name -> the name it is served under


class ServedModel:
    """A loaded model and what serves it now.

    Attributes
    ----------
    inputs, outputs : specs of what a request may send and ask for; a request that names no outputs gets all of these
    hidden_outputs : specs of what a request gets only by naming it: the logits, as `calserve/logits`
    inspection : where logits and features are, None for a model that is no classifier (then served without calibration)
    active : the snapshot of the next batch
    config : what config.pbtxt says (inference.ModelConfig), empty without one
    statistics : what was served so far
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
        max_queued_runs: int = 256,
    ) -> None:
        self.name, self.version, self.digest = name, version, digest
        self.device, self.inspection = device, inspection
        self.config = messages.ModelConfig() if config is None else config
        self.class_names, self.max_batch_size = tuple(class_names), int(self.config.max_batch_size)
        self.statistics = Statistics()
        self._proto = proto
        self._sessions: OrderedDict[str, tuple[Session, FusedModel]] = OrderedDict()
        self._building = threading.Lock()  # two requests for one graph must not build it twice
        self._lane = _Lane(f"{name}/{version}", max_queued_runs)
        if inspection is None:
            self.n_classes = 0
            session = Session(proto.SerializeToString(), device)
            self.active = Snapshot(NO_REVISION, session, {}, {spec.name: spec.name for spec in session.outputs})
        else:
            self.n_classes = inspection.n_classes or self._count_classes(inspection)
            self.inspection = replace(inspection, n_classes=self.n_classes)
            self.active = self.uncalibrated = self.snapshot(Identity.of(self.n_classes), NO_REVISION)
        self.inputs = list(self.active.session.inputs)
        self.outputs = [spec for spec in self.active.session.outputs if spec.name != LOGITS]
        self.hidden_outputs = [spec for spec in self.active.session.outputs if spec.name == LOGITS]
        for spec in self.inputs:
            if spec.datatype not in datatypes.NUMPY:
                raise Refused(f"input {spec.name!r} is of type {spec.datatype}, which the protocol has no word for")

    @property
    def is_classifier(self) -> bool:
        return self.inspection is not None

    def check_signals(self, needed: Set[str]) -> None:
        """Refused, naming what is missing and what is there, unless this model shows every signal needed."""
        features = {"features"} if self.inspection is not None and self.inspection.features else set()
        shown = {"inputs"} | ({"logits"} if self.is_classifier else set()) | features
        if missing := needed - shown:
            raise Refused(
                f"model {self.name!r} does not show {', '.join(sorted(missing))}; it shows {', '.join(sorted(shown))}",
                reason="SIGNAL_MISSING",
            )

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
        return Snapshot(revision, session, stage(calibrator).parameters, fused.own_outputs)

    def _check_classifier(self) -> None:
        if self.inspection is None:
            raise Refused(f"model {self.name!r} is not a classifier that calserve understands; it has no calibrators")

    def _session_for(self, calibrator: Calibrator) -> tuple[Session, FusedModel]:
        key = signature(calibrator)
        if key not in self._sessions:
            fused = fuse(self._proto, calibrator, self.inspection)
            self._sessions[key] = (Session(fused.to_bytes(), self.device), fused)
            while len(self._sessions) > KEPT_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def export(self, calibrator: Calibrator | None) -> bytes:
        """The model with a calibrator inside (None: its own probabilities), as plain ONNX."""
        self._check_classifier()
        return fuse(self._proto, calibrator or Identity.of(self.n_classes), self.inspection).export()

    async def run(
        self,
        outputs: Sequence[str],
        feeds: Mapping[str, NDArray[Any]],
        snapshot: Snapshot,
        deadline: float | None = None,
    ) -> list[NDArray[Any]]:
        """The named outputs for one request, computed in this model's thread by `snapshot`.

        `deadline` is on time.monotonic(); work whose deadline has passed, or whose caller has left, is not run.
        """

        def work() -> list[NDArray[Any]]:
            begun = time.perf_counter_ns()
            try:
                return snapshot.session.run(outputs, {**feeds, **snapshot.feeds})
            finally:
                self.statistics.ran(self.row_count(feeds), begun - asked, time.perf_counter_ns() - begun)

        asked = time.perf_counter_ns()
        return await self._lane.submit(work, deadline)

    def row_count(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Rows of one request: its batch, or 1 for a model without a batch dimension."""
        batched = self.is_classifier or self.max_batch_size > 0
        shape = next(iter(feeds.values())).shape if feeds else ()
        return shape[0] if batched and shape else 1

    async def logits(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The logits [B, K] that the calibrators of this model are fitted on."""
        (logits,) = await self.run([LOGITS], feeds, self.uncalibrated)
        return logits

    def warm_up(self, snapshot: Snapshot) -> list[NDArray[Any]]:
        """Run `snapshot` once, in the calling thread, on made-up inputs; the logits and probabilities that came."""
        wanted = [LOGITS, "probabilities"] if self.is_classifier else [spec.name for spec in self.outputs[:1]]
        feeds = {spec.name: _made_up(spec) for spec in snapshot.session.inputs}
        return snapshot.session.run(wanted, {**feeds, **snapshot.feeds})

    def close(self) -> None:
        self._lane.close()

    def _count_classes(self, inspection: Inspection) -> int:
        """K from a run, where no shape in the graph tells it."""
        fused = fuse(self._proto, Identity.of(2), inspection)
        session = Session(fused.to_bytes(), self.device)
        try:
            (logits,) = session.run([LOGITS], {spec.name: _made_up(spec) for spec in session.inputs})
        except InvalidRequest:
            raise Refused(
                f"model {self.name!r} does not tell its number of classes; declare the output's dims in config.pbtxt"
            ) from None
        return int(logits.shape[1])


class _Lane:
    """One thread that makes a model's runs, in order, with a bounded queue before it."""

    def __init__(self, name: str, max_queued: int) -> None:
        self._name, self._max_queued, self._queued = name, max_queued, 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model {name}")

    async def submit(self, work: Callable[[], T], deadline: float | None) -> T:
        if self._queued >= self._max_queued:
            raise Overloaded(f"model {self._name}: {self._queued} requests are waiting already")

        def run_in_time() -> T:
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlinePassed("the deadline passed while the request waited for the model")
            return work()

        self._queued += 1
        try:
            # A cancelled caller cancels the future; the thread skips it if it has not begun.
            return await asyncio.wrap_future(self._thread.submit(run_in_time))
        finally:
            self._queued -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _made_up(spec: TensorSpec) -> NDArray[Any]:
    """One row for a warm-up: zeros for integers (the safest index), seeded normal numbers for floats."""
    shape = [1 if size < 0 else size for size in spec.shape]
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=object)
    dtype = datatypes.NUMPY[spec.datatype]
    if dtype.kind == "f":
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype=dtype)
