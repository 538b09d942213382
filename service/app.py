"""The composition root: the one file that builds everything and knows every room."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import IO, Self

from service.errors import Refused
from service.inference.repository import Repository
from service.inference.session import Device
from service.learning.operations import Limits, Operations
from service.learning.revisions import Revisions
from service.rpc.calibrator_service import CalibratorService
from service.rpc.grpc_front import GrpcFront
from service.rpc.health import PROCESS, READY, Health
from service.rpc.inference_service import Inference
from service.rpc.methods import Method, methods_of
from service.rpc.observed import observed
from service.rpc.reflection import Reflection
from service.rpc.server_info import ServerInfo
from service.rpc.wire import INFERENCE_SERVICE
from service.settings import Settings
from service.store.blobs import Blobs
from service.store.catalogue import Catalogue
from service.web.http import HttpServer, Page, text
from service.web.metrics import Metrics, ModelInfo

log = logging.getLogger(__name__)


class App:
    """A server: built, started, stopped.

    Attributes
    ----------
    port, metrics_port : where it listens, once started
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = _lock_store(settings.store)
        self._catalogue = Catalogue(settings.store / "catalogue.sqlite")
        blobs = Blobs(settings.store / "blobs")
        device = Device.choose(settings.device, settings.model_threads)
        log.info("models run on %s, %d threads each", device.provider, device.threads)
        self.repository = Repository(settings.model_repository, device, settings.max_queued_runs)
        self._health = Health()
        self._revisions = Revisions(self._catalogue, blobs, self.repository)
        self._operations = Operations(self._catalogue, blobs, settings.store / "jobs", _limits(settings))
        self._metrics = Metrics(self._model_infos, lambda: self._health.serving(READY))
        methods = [observed(method, self._metrics.record_call) for method in self._methods()]
        self._front = GrpcFront(methods, max_message_bytes=settings.max_message_bytes)
        self._http = HttpServer(settings.host, settings.metrics_port, self._pages())
        self.port, self.metrics_port = 0, self._http.port

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, load and warm every model, restore what was active. Before that is done, calls are UNAVAILABLE."""
        await self._health.set(PROCESS, serving=True)
        await self._health.set(READY, serving=False)
        self._http.start()
        self.port = await self._front.start(self.settings.host, self.settings.port)
        await asyncio.to_thread(self.repository.load_all)
        await self._revisions.restore()
        self.repository.loaded = True
        await self._operations.resume()
        for name in self.repository.names():
            await self._health.set(name, serving=name not in self.repository.failures)
        await self._health.set(READY, serving=not self.repository.failures)
        log.info(
            "gRPC on %s:%d, metrics on %s:%d", self.settings.host, self.port, self.settings.host, self.metrics_port
        )

    async def stop(self) -> None:
        """Drain: say so, finish what is in flight, close the store."""
        await self._health.drain()
        await self._front.stop(self.settings.drain_seconds)
        await self._operations.close()
        self._http.stop()
        self.repository.close()
        self._catalogue.close()
        self._lock.close()

    def _methods(self) -> Iterable[Method]:
        inference = Inference(self.repository, self._revisions, self._health, self.settings.default_deadline_seconds)
        methods = [
            *methods_of(INFERENCE_SERVICE, ServerInfo(self.repository, self._health), inference),
            *CalibratorService(self.repository, self._revisions, self._operations).methods(),
            *self._health.methods(),
        ]
        services = {method.path.split("/")[1] for method in methods}
        return [*methods, *Reflection([*services, *Reflection.SERVICES]).methods()]

    def _model_infos(self) -> list[ModelInfo]:
        return [
            (model.name, model.version, model.active.revision, model.active.session.provider)
            for model in list(self.repository.models())
        ]

    def _pages(self) -> dict[str, Page]:
        def ready() -> tuple[HTTPStatus, str, bytes]:
            serving = self._health.serving(READY)
            return text("ready\n") if serving else text("not ready\n", HTTPStatus.SERVICE_UNAVAILABLE)

        return {
            "/metrics": lambda: (HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", self._metrics.exposition()),
            "/health/live": lambda: text("live\n"),
            "/health/ready": ready,
        }


async def serve(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT; a second signal ends it at once."""
    app = App(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        await app.start()
        await stopping.wait()
        log.info("draining")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # the second signal has its default effect
    finally:
        await app.stop()


def _limits(settings: Settings) -> Limits:
    return Limits(
        processes=settings.fit_processes,
        seconds=settings.fit_seconds,
        memory_bytes=settings.fit_memory_bytes,
        bytes_per_job=settings.fit_rows_bytes,
    )


def _lock_store(store: Path) -> IO[bytes]:
    """Hold the data directory: two servers writing one store would each undo the other."""
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (store / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Refused("another calserve server holds this data directory") from None
    return file
