"""Which revision serves: activation, roll-back, and back to what was active after a restart.

Activating never touches what serves until everything is proved: the artifact is what was stored, it belongs to this
model file, its fit still gives the probabilities it gave when it was made, and the graph computes the same. Then one
attribute is assigned.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import numpy as np
import safetensors.numpy

import calibrators
from calibrators import Calibrator
from calibrators.graph import stage
from calibrators.kinds.identity import Identity
from service.errors import CalserveError, Damaged, InvalidRequest, Refused, Stale, shown
from service.inference import datatypes
from service.inference.model import NO_REVISION, ServedModel, Snapshot
from service.inference.repository import Repository
from service.inference.session import Session
from service.learning.job import INPUT
from service.learning.online_serving import OnlineServing
from service.learning.whole import to_its_end
from service.store.blobs import Blobs
from service.store.catalogue import ActivationRow, Catalogue, RevisionRow

log = logging.getLogger(__name__)

T = TypeVar("T")
Signals: TypeAlias = Mapping[str, np.ndarray]

DIFFERENTIATED = 1e-3
"""Largest difference between probabilities of the model as a fit differentiated it and as it is served."""

KEPT_SNAPSHOTS = 8
"""Snapshots of one model kept for requests that name a revision which is not active."""


class Revisions:
    """The revisions of all models. Methods are for the event loop."""

    def __init__(self, catalogue: Catalogue, blobs: Blobs, repository: Repository, online: OnlineServing) -> None:
        self._catalogue, self._blobs, self._repository, self._online = catalogue, blobs, repository, online
        self._lock = asyncio.Lock()  # one activation at a time: each changes the history the next one reads
        self._snapshots: dict[ServedModel, dict[str, Snapshot]] = {}
        self._preparing: dict[ServedModel, set[asyncio.Future[None]]] = {}  # one future a request that waits for one

    async def restore(self) -> None:
        """Make active what was active before the restart. A model whose revision is damaged is not served at all."""
        for model in list(self._repository.models()):
            try:
                await self._restore(model)
            except CalserveError as error:
                for removed in self._repository.remove(model.name):
                    removed.close()
                self._repository.fail(model.name, error.message)

    async def restore_then(self, models: Iterable[ServedModel], swap: Callable[[], T]) -> T:
        """Make active on new models what is active now, then `swap` them in. No activation can come between."""
        async with self._lock:
            for model in models:
                await self._restore(model)
            return swap()

    async def _restore(self, model: ServedModel) -> None:
        """Activate what was activated last on this model file, if anything was."""
        for activation in await asyncio.to_thread(self._catalogue.activations, model.name, model.digest):
            try:
                model.active = await self._prepare(model, activation.revision)
            except CalserveError as error:
                raise Refused(f"its active revision cannot be served: {error.message}") from error
            return

    async def follow(self) -> None:
        """Make active what another process recorded as active. A revision that cannot be served leaves what is."""
        async with self._lock:
            for model in list(self._repository.models()):
                history = await asyncio.to_thread(self._catalogue.activations, model.name, model.digest)
                revision = history[0].revision if history else NO_REVISION
                try:
                    if revision != model.active.revision:
                        self._swap(model, await self._prepare(model, revision))
                except CalserveError as error:
                    log.error("model %s goes on with %s: %s", model.name, model.active.revision, error.message)

    async def of_model(self, model: str) -> list[RevisionRow]:
        self._repository.get(model)
        return await asyncio.to_thread(self._catalogue.revisions, model)

    async def get(self, model: str, revision: str) -> RevisionRow:
        return await asyncio.to_thread(self._catalogue.revision, model, revision)

    async def artifact(self, row: RevisionRow) -> bytes:
        return await asyncio.to_thread(self._blobs.get, row.artifact_digest)

    async def calibrator(self, row: RevisionRow) -> Calibrator:
        return await asyncio.to_thread(self._read, row)

    async def challenger(self, model: ServedModel, revision: str) -> Calibrator:
        """A revision as it was fitted, `none` as what changes nothing. Refused if it is not for this model."""
        if revision == NO_REVISION:
            return Identity.of(model.n_classes)
        row = await self.get(model.name, revision)
        return await asyncio.to_thread(self._load, model, row)

    async def export(self, model_name: str, revision: str) -> bytes:
        """The model with a revision (default: the active one; `none`: the model's own) inside, as plain ONNX."""
        model = self._repository.get(model_name)
        revision = revision or model.active.revision
        if revision == NO_REVISION:
            return await asyncio.to_thread(model.export, None)
        model = await self.model_for(model_name, revision)
        row = await self.get(model_name, revision)
        return await asyncio.to_thread(
            lambda: model.export(self._online.calibrator(model_name, revision, self._load(model, row)))
        )

    def is_active(self, row: RevisionRow) -> bool:
        return any(model.active.revision == row.revision for model in self._models_of(row))

    async def snapshot(self, model: ServedModel, revision: str) -> Snapshot:
        """The snapshot that a request named by its `calibrator` parameter."""
        if revision == model.active.revision:
            return model.active
        if revision == NO_REVISION:
            return model.uncalibrated if model.is_classifier else model.active
        kept = self._snapshots.setdefault(model, {})
        if revision not in kept:
            with self._busy(model):
                kept[revision] = await self._prepare(model, revision)
            while len(kept) > KEPT_SNAPSHOTS:
                kept.pop(next(iter(kept)))
        return kept[revision]

    @contextmanager
    def _busy(self, model: ServedModel) -> Iterator[None]:
        ended = asyncio.get_running_loop().create_future()
        self._preparing.setdefault(model, set()).add(ended)
        try:
            yield
        finally:
            self._preparing[model].discard(ended)
            ended.set_result(None)

    async def left(self, model: ServedModel) -> None:
        """Return when no request waits for a snapshot of this model, which no new request can reach."""
        while waiting := self._preparing.get(model):
            await asyncio.wait(waiting)
        self._preparing.pop(model, None)
        self._snapshots.pop(model, None)

    @to_its_end
    async def activate(
        self, model_name: str, revision: str, version: str = "", *, instead_of: str | None = None
    ) -> tuple[str, str]:
        """Make a revision (or `none`) serve; return (active now, active before). A failure changes nothing.

        Stale if another is active than the one that it is to serve `instead_of`.
        """
        async with self._lock:
            model = await self.model_for(model_name, revision, version)
            if instead_of not in (None, model.active.revision):
                raise Stale(f"model {shown(model_name)}: {model.active.revision} is active, no longer {instead_of}")
            snapshot = await self._prepare(model, revision)
            row = ActivationRow(model.name, model.digest, revision, time.time())
            await asyncio.to_thread(self._catalogue.record_activation, row)
            return self._swap(model, snapshot)

    @to_its_end
    async def roll_back(self, model_name: str, version: str = "", *, only: str = "") -> tuple[str, str]:
        """Activate what was active before the present one; return (active now, active before).

        Stale if the present one is not the `only` one that is to be left.
        """
        async with self._lock:
            model = self._repository.get(model_name, version)
            if only not in ("", model.active.revision):
                raise Stale(f"{model.active.revision} is active on model {shown(model_name)}, no longer {only}")
            history = await asyncio.to_thread(self._catalogue.activations, model.name, model.digest)
            if not history:
                raise Refused(f"model {shown(model_name)}: nothing was ever activated, there is nothing to roll back")
            earlier = history[1].revision if len(history) > 1 else NO_REVISION
            snapshot = await self._prepare(model, earlier)
            await asyncio.to_thread(self._catalogue.undo_activation, model.name, model.digest)
            return self._swap(model, snapshot)

    @to_its_end
    async def delete(self, model_name: str, revision: str) -> None:
        """Forget a revision and what it learned. Refused while it is active, or rolling back would activate it."""
        async with self._lock:
            row = await self.get(model_name, revision)
            history = await asyncio.to_thread(self._catalogue.activations, model_name, row.model_digest)
            if any(activation.revision == revision for activation in history[:2]):
                raise Refused(
                    f"revision {shown(revision)} is active or would be after a roll-back; activate others first"
                )
            await self._online.forget(model_name, revision)
            for digest in await asyncio.to_thread(self._catalogue.delete_revision, row):
                await asyncio.to_thread(self._blobs.delete, digest)
            for model in self._models_of(row):
                self._snapshots.get(model, {}).pop(revision, None)

    def _swap(self, model: ServedModel, snapshot: Snapshot) -> tuple[str, str]:
        before = model.active.revision
        model.active = snapshot
        self._snapshots.get(model, {}).pop(before, None)  # it may have learned since it was kept
        model.batcher.costs.forget()
        self._repository.generation += 1  # what is remembered of requests may belong to the one before
        log.info("model %s/%s: %s is active, before %s", model.name, model.version, snapshot.revision, before)
        return snapshot.revision, before

    def _models_of(self, row: RevisionRow) -> list[ServedModel]:
        return [m for m in self._repository.models() if m.name == row.model and m.digest == row.model_digest]

    async def model_for(self, name: str, revision: str, version: str = "") -> ServedModel:
        """The loaded version that the revision was fitted on."""
        model = self._repository.get(name, version)
        if revision == NO_REVISION:
            return model
        row = await self.get(name, revision)
        if version or model.digest == row.model_digest:
            return model  # a digest that differs is refused in `_prepare`
        return next(iter(self._models_of(row)), model)

    async def _prepare(self, model: ServedModel, revision: str) -> Snapshot:
        """A proved, warm snapshot."""
        if revision == NO_REVISION:
            return model.uncalibrated if model.is_classifier else model.active
        row = await self.get(model.name, revision)
        return await asyncio.to_thread(lambda: self._online.learned(model, self._prove(model, row)))

    def _load(self, model: ServedModel, row: RevisionRow) -> Calibrator:
        if row.model_digest != model.digest:
            raise Refused(
                f"revision {row.revision} was fitted on another file of model {model.name!r} "
                f"(sha256 {row.model_digest[:12]}..., version {model.version} has {model.digest[:12]}...); fit again",
                reason="DIGEST_DIFFERS",
            )
        calibrator = self._read(row)
        model.check_signals(calibrator)
        return calibrator

    def _read(self, row: RevisionRow) -> Calibrator:
        try:
            return calibrators.loads(self._blobs.get(row.artifact_digest))
        except ValueError as error:
            raise Damaged(f"the artifact of revision {row.revision} cannot be read: {error}") from error
        except ImportError as error:
            raise Refused(f"revision {row.revision} cannot be served here: {error}") from error

    def _prove(self, model: ServedModel, row: RevisionRow) -> Snapshot:
        calibrator = self._load(model, row)
        golden = safetensors.numpy.load(self._blobs.get(row.golden_digest))
        probabilities = golden.pop("probabilities")
        inputs = [golden.pop(name) for name in sorted(golden, key=_place) if name.startswith(INPUT)]
        _agree(calibrator, golden, probabilities, f"revision {row.revision} no longer computes")
        _stage_agrees(calibrator, golden, model, row.revision)
        snapshot = model.snapshot(calibrator, row.revision)
        if inputs:
            _whole_agrees(model, snapshot, inputs, probabilities)
        try:
            made_up = model.warm_up(snapshot)
        except InvalidRequest as error:  # not every model computes what can be made up, an image of one pixel say
            log.warning("model %s with %s is not tried on made-up inputs: %s", model.name, row.revision, error.message)
            return snapshot
        probabilities = made_up.pop("probabilities")
        what = f"the graph of model {model.name!r} with {row.revision} does not compute"
        _agree(calibrator, made_up, probabilities, what)
        return snapshot


def _stage_agrees(calibrator: Calibrator, signals: Signals, model: ServedModel, revision: str) -> None:
    """The calibrator's own graph gives on the golden rows what `predict_proba` and `predict_further` give."""
    session = Session(stage(calibrator).to_bytes(), model.device)
    beside = {name: signals[name] for name in calibrator.signal_shapes(calibrator.n_classes_)}
    read = {"logits": signals["logits"], **calibrator.look_up(signals["logits"], **beside)}
    probabilities, *further = session.run(["probabilities", *calibrator.further_outputs], read)
    what = f"the graph of {revision} does not compute"
    _agree(calibrator, signals, probabilities, what)
    wanted = calibrator.predict_further(**signals)
    for name, values in zip(calibrator.further_outputs, further, strict=True):
        _check_close(values, wanted[name], calibrator.float32_atol, f"{what} the {name}")


def _whole_agrees(model: ServedModel, snapshot: Snapshot, inputs: Sequence[np.ndarray], wanted: np.ndarray) -> None:
    """Model and calibrator together give on golden rows of inputs what the fit saw, who differentiated the model."""
    feeds = {
        spec.name: array.astype(datatypes.NUMPY[spec.datatype], copy=False)
        for spec, array in zip(model.inputs, inputs, strict=True)
    }
    (probabilities,) = snapshot.session.run_with(["probabilities"], feeds, snapshot.feeds)
    what = f"the graph of model {model.name!r} with {snapshot.revision} does not compute the probabilities"
    _check_close(probabilities, wanted, DIFFERENTIATED, what)


def _place(signal: str) -> int:
    """Of an input among the signals: its number."""
    return int(signal.removeprefix(INPUT)) if signal.startswith(INPUT) else -1


def _agree(calibrator: Calibrator, signals: Signals, probabilities: np.ndarray, what: str) -> None:
    _check_close(
        probabilities, calibrator.predict_proba(**signals), calibrator.float32_atol, f"{what} the probabilities"
    )


def _check_close(values: np.ndarray, wanted: np.ndarray, tolerance: float, what: str) -> None:
    """Differences count by the size of what is wanted, where that is above one."""
    differences = np.abs(values.astype(np.float64) - wanted) / np.maximum(np.abs(wanted), 1.0)
    worst = float(differences.max(initial=0.0))
    if not worst <= tolerance:
        raise Refused(
            f"{what} of its fit: they differ by {worst:.2g}, more than {tolerance:g}", reason="GRAPH_DISAGREES"
        )
