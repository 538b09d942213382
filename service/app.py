"""The composition root: the one file that builds everything and knows every room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus
from multiprocessing.connection import Connection
from typing import Self

from service.cores import threads_per_run, usable_cores
from service.drift.summaries import Summaries
from service.drift.webhook import Target, Webhook
from service.inference.batcher import Limits as QueueLimits
from service.inference.device_loss import DeviceLoss
from service.inference.repository import Repository, folders
from service.inference.session import Device
from service.learning.coverage import Coverage
from service.learning.following import Following
from service.learning.journalling import Journalling
from service.learning.loading import Loading, Poll
from service.learning.monitoring import Monitoring
from service.learning.online import Online
from service.learning.online_serving import OnlineServing
from service.learning.operations import Limits, Operations
from service.learning.policies import Policies
from service.learning.revisions import Revisions
from service.learning.shadow_runs import ShadowRuns
from service.learning.shadows import Shadows
from service.lifecycle import Signals, end_process, keep_watchdog, notify, spare_collections
from service.measured import Measured
from service.page import PageFacts
from service.rpc.access import Access, check_complete
from service.rpc.calibrator_service import CalibratorService
from service.rpc.feedback_service import FeedbackService
from service.rpc.forward import Forward
from service.rpc.fronts import COMPANY_SECONDS, chosen, front_of
from service.rpc.health import PROCESS, READY, Health
from service.rpc.inference_service import Inference
from service.rpc.limits import ConnectionLimits
from service.rpc.methods import Method, methods_of
from service.rpc.monitor_service import MonitorService
from service.rpc.observed import observed
from service.rpc.online_service import OnlineService
from service.rpc.process_settings import ProcessSettings
from service.rpc.reflection import Reflection
from service.rpc.repository_control import RepositoryControl
from service.rpc.server_info import EXTENSIONS, ServerInfo
from service.rpc.shadow_service import ShadowService
from service.rpc.shared_memory import Regions, SharedMemory
from service.rpc.streams import StreamLimits, Streams
from service.rpc.tls import CertificateFiles
from service.rpc.tokens import TokenFile
from service.rpc.tracing import Tracing
from service.rpc.wire import FEEDBACK_SERVICE, INFERENCE_SERVICE
from service.settings import Settings, is_local
from service.store.blobs import Blobs
from service.store.catalogue import Catalogue
from service.store.journal import Journal
from service.store.journal_tables import Retention
from service.store.labels import Labels
from service.store.lock import lock_store
from service.store.online_states import OnlineStates
from service.supervisor import Member
from service.web.http import HttpServer, Page, text
from service.web.site import Site

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
"""How often the token file and the open streams are looked at."""


class App:
    """A server: built, started, stopped.

    Attributes
    ----------
    port, metrics_port : where it listens, once started
    """

    def __init__(self, settings: Settings, member: Member | None = None) -> None:
        self.settings = settings
        self._member = member
        self._learns = member is None or member.is_learner
        self._tokens = TokenFile(settings.token_file) if settings.token_file else None
        self._access = Access(self._tokens) if self._tokens else None
        certificates = _certificates(settings)
        self._webhook = _webhook(settings) if self._learns else None
        self._tracing = Tracing(settings.traces_endpoint) if settings.traces_endpoint else None
        self._device = _device(settings)
        self._lock = lock_store(settings.store) if self._learns else None
        self._catalogue = Catalogue(settings.store / "catalogue.sqlite")
        blobs = Blobs(settings.store / "blobs")
        self.repository = Repository(
            settings.model_repository, self._device, _queue_limits(settings), at_start=settings.at_start
        )
        self._health = Health()
        retention = Retention(86400 * settings.journal_days, settings.journal_bytes)
        self._journal = Journal(
            settings.store, retention, queue_bytes=settings.journal_queue_bytes, learns=self._learns
        )
        serving = OnlineServing(self.repository, OnlineStates(self._journal))
        self._revisions = Revisions(self._catalogue, blobs, self.repository, serving)
        self._following = Following(self._catalogue, self._revisions, serving)
        self._forward = None if self._learns or member is None else Forward(member.learner_socket, self._following.look)
        self._loading = Loading(self.repository, self._revisions, self._tell_health)
        self._poll = Poll(self.repository, self._loading, settings.poll_seconds)
        self._online = Online(
            self._journal,
            self.repository,
            self._revisions,
            serving,
            wait_seconds=settings.online_wait_seconds,
            quota=settings.online_quota_labels,
        )
        self._journalling = Journalling(self._journal, settings.journal)
        self._shadow_runs = ShadowRuns(self._journal, self.repository, self._revisions, self._journalling)
        self._shadows = Shadows(
            self._journal,
            self.repository,
            self._revisions,
            self._online,
            self._shadow_runs,
            self._journalling,
            wait_seconds=settings.online_wait_seconds,
            quota=settings.online_quota_labels,
        )
        self._coverage = Coverage(self._journal, self.repository, settings.online_wait_seconds)
        self._feedback = FeedbackService(self.repository, self._journal, Labels(self._journal), self._online.labelled)
        self._regions = Regions(settings.shared_memory_prefix, settings.shared_memory_bytes)
        self._operations = Operations(self._catalogue, blobs, settings.store / "jobs", _limits(settings))
        self._monitoring = Monitoring(
            self._journal,
            self.repository,
            Policies(self.repository, self._revisions, self._online, self._operations, self._shadows),
            mode=settings.monitors,
            wait_seconds=settings.monitor_wait_seconds,
        )
        self._metrics = Measured(
            self.repository,
            self._health,
            self._device.loss,
            self._journal,
            self._feedback,
            self._online,
            self._coverage,
            self._monitoring,
            self._shadows,
            self._shadow_runs,
            self._webhook,
        ).metrics()
        facts = PageFacts(self.repository, self._catalogue, settings.journal)
        self._summaries = Summaries(self._journal, facts.names, facts.sets_of, retention.seconds)
        self._site = Site(facts.sources(self._summaries, self._monitoring, self._shadows))
        self._streams = Streams(_stream_limits(settings))
        limits = replace(_connection_limits(settings), shared_port=member is not None)
        self._front = front_of(settings.front, self._guarded_methods(), limits, certificates)
        metrics_port = settings.metrics_port + (member.index if member and settings.metrics_port else 0)
        has_page = self._learns and not settings.no_page
        self._http = HttpServer(settings.metrics_host, metrics_port, self._pages(), self._site if has_page else None)
        self.port, self.metrics_port = 0, self._http.port

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, load and warm every model, restore what was active. Before that is done, calls are UNAVAILABLE.

        One of several workers listens when that is done: calls then go to those that are ready.
        """
        await self._health.set(PROCESS, serving=True)
        await self._health.set(READY, serving=False)
        if not is_local(self.settings.host) and not (self._access and self.settings.tls_cert):
            log.warning("host %s is reached by other machines, and --insecure is set", self.settings.host)
        self._http.start()
        self._journal.start()
        self._watch = asyncio.create_task(self._keep_watch())
        if self._member is None:
            self.port = await self._front.start(self.settings.host, self.settings.port)
        if self.settings.model_control == "poll":
            await self._poll.start()
        await self._loading.start()
        if self._learns:
            await self._operations.resume()
            self._online.start()
            self._coverage.start()
            self._shadows.begin()
            self._summaries.start()
            if self._webhook:
                self._webhook.start()
                self._monitoring.listeners.append(self._webhook.send)
            self._monitoring.start()
        else:
            self._following.start()
        self._shadow_runs.start()
        await self._tell_health(*self.repository.names())
        if self._member is not None:
            socket = self._member.learner_socket if self._learns else None
            self.port = await self._front.start(self.settings.host, self._member.port, socket)
        log.info(
            "gRPC on %s:%d, metrics on %s:%d, front %s",
            self.settings.host, self.port, self.settings.metrics_host, self.metrics_port, self._front.name,
        )  # fmt: skip

    async def stop(self) -> None:
        """Drain: say so, finish what is in flight, close the store."""
        await self._health.drain()
        await asyncio.sleep(self.settings.drain_delay_seconds)
        stopped = asyncio.create_task(self._front.stop(self.settings.drain_seconds))
        await self._operations.release()
        self._monitoring.release()
        await self._streams.drain()
        self._health.draining = True
        await stopped
        self._watch.cancel()
        await self._monitoring.close()
        await self._operations.close()
        await self._following.close()
        await self._shadows.close()
        await self._shadow_runs.close()
        await self._online.close()
        await self._coverage.close()
        await self._summaries.close()
        if self._webhook:
            await self._webhook.close()
        if self._forward:
            await self._forward.close()
        await self._poll.close()
        await self._loading.settle(self.settings.drain_seconds)
        self._regions.release()
        self._http.stop()
        self.repository.close()
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)
        await asyncio.to_thread(self._journal.close)
        self._catalogue.close()
        if self._lock:
            self._lock.close()

    def reload(self, *, force: bool = True) -> None:
        """Read the tokens again, and end the streams and shared memory of those that are no more."""
        if self._tokens:
            self._tokens.refresh(force=force)
            self._regions.release(all_but=self._tokens.names)
        self._streams.sweep(self._access.recheck if self._access else None)

    async def _keep_watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                self.reload(force=False)
                if self._health.serving(FEEDBACK_SERVICE.full_name) != self._journal.writer.writable:
                    await self._tell_health()
                if not self._device.usable:
                    await self._tell_health(*self.repository.names())
            except Exception:
                log.exception("the watch over tokens and streams failed once; it goes on")

    def _guarded_methods(self) -> list[Method]:
        """Every method: counted, its streams bounded, its callers' tokens checked."""
        methods = list(self._methods())
        check_complete(methods)
        methods = [self._streams.guarded(method) for method in methods]
        if self._access:
            methods = [self._access.guarded(method) for method in methods]
        return [observed(method, self._metrics.recorder) for method in methods]

    async def _tell_health(self, *names: str) -> None:
        """Say which of these models serve, and whether all do."""
        if not self._health.drained.is_set():
            await self._health.set(FEEDBACK_SERVICE.full_name, serving=self._journal.writer.writable)
            for name in names:
                await self._health.set(name, serving=self._device.usable and self.repository.serves(name))
            await self._health.set(READY, serving=self._device.usable and self.repository.ready)

    def _methods(self) -> Iterable[Method]:
        deadline = self.settings.default_deadline_seconds
        inference = Inference(
            self.repository,
            self._revisions,
            self._health,
            self._regions,
            deadline,
            self._journalling,
            self._tracing,
        )
        methods = [
            *methods_of(
                INFERENCE_SERVICE,
                ServerInfo(self.repository, self._health, self._extensions()),
                RepositoryControl(self.repository, self._loading, self.settings.model_control),
                SharedMemory(self._regions),
                ProcessSettings(self.repository),
                inference,
            ),
            *self._learners_methods(),
            *self._health.methods(),
        ]
        services = {method.path.split("/")[1] for method in methods}
        return [*methods, *Reflection([*services, *Reflection.SERVICES]).methods()]

    def _learners_methods(self) -> list[Method]:
        """The learner's own; of another worker, passed on to it. Labels may name what this worker answered just now."""
        own = [
            *CalibratorService(self.repository, self._revisions, self._operations, self._shadows).methods(),
            *OnlineService(self._online).methods(),
            *ShadowService(self._shadows).methods(),
            *MonitorService(self._monitoring, self._site.report).methods(),
        ]
        feedback = self._feedback.methods()
        if self._forward is None:
            return [*own, *feedback]
        passed_on = [self._forward.method(method) for method in own]
        return [*passed_on, *(self._forward.method(method, self._journal.flush) for method in feedback)]

    def _extensions(self) -> list[str]:
        """Triton's words for what this server does, as it is set up."""
        optional = {
            "model_repository": self.settings.model_control == "explicit",
            "system_shared_memory": self._regions.allowed,
        }
        return [*EXTENSIONS, *(name for name, works in optional.items() if works)]

    def _pages(self) -> dict[str, Page]:
        def ready() -> tuple[HTTPStatus, str, bytes]:
            serving = self._health.serving(READY)
            return text("ready\n") if serving else text("not ready\n", HTTPStatus.SERVICE_UNAVAILABLE)

        return {
            "/metrics": lambda: (HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", self._metrics.exposition()),
            "/health/live": lambda: text("live\n"),
            "/health/ready": ready,
        }


async def serve(settings: Settings, member: Member | None = None, supervisor: Connection | None = None) -> None:
    """Run a server until SIGTERM or SIGINT, or until its supervisor is gone; a second signal ends it at once."""
    spare_collections()
    app = App(settings, member)
    signals = Signals(app.reload)
    watchdog = asyncio.create_task(keep_watchdog())
    if supervisor:
        supervisor.send("open")
        asyncio.get_running_loop().add_reader(supervisor.fileno(), signals.stopping.set)  # nothing comes but its end
    starting, stopping = asyncio.create_task(app.start()), asyncio.create_task(signals.stopping.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        log.info("stopped while starting")
        end_process()  # what the store holds survives kill -9
    try:
        await starting
        if supervisor:
            supervisor.send("ready")
        else:
            notify("READY=1")  # of several workers the supervisor tells it
        await stopping
        log.info("draining")
        if not supervisor:
            notify("STOPPING=1")
    finally:
        await app.stop()
        watchdog.cancel()
    end_process()


def _certificates(settings: Settings) -> CertificateFiles | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def _webhook(settings: Settings) -> Webhook | None:
    if not settings.webhook_url:
        return None
    target = Target.parse(settings.webhook_url, settings.webhook_hosts, settings.webhook_ca)
    return Webhook(target, settings.store / "webhook.json", settings.webhook_secret_file)


def _connection_limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        message_bytes=settings.max_message_bytes,
        metadata_bytes=settings.max_metadata_bytes,
        streams=settings.max_streams_per_connection,
        idle_seconds=settings.connection_idle_seconds,
        age_seconds=settings.connection_age_seconds,
        age_grace_seconds=settings.connection_age_grace_seconds,
        keepalive_seconds=settings.keepalive_seconds,
    )


def _stream_limits(settings: Settings) -> StreamLimits:
    return StreamLimits(
        idle_seconds=settings.stream_idle_seconds,
        seconds=settings.stream_seconds,
        messages=settings.stream_messages,
        bytes=settings.stream_bytes,
    )


def _device(settings: Settings) -> Device:
    """The device, and on the CPU the threads of a run; both are said in the log."""
    models = len(folders(settings.model_repository) if settings.at_start is None else settings.at_start)
    cores = usable_cores()
    device = Device.choose(
        settings.device,
        settings.threads or threads_per_run(cores, models=models, replicas=settings.replicas * settings.workers),
        memory_limit_bytes=settings.gpu_memory_limit_bytes,
        cuda_graphs=settings.cuda_graphs,
        fp16=settings.tensorrt_fp16,
        loss=DeviceLoss(settings.device_lost),
    )
    log.info(
        "models run on %s %s, %d threads a run (%d cores, %d models, %d replicas)",
        device.provider, dict(device.options), device.threads, cores, models, settings.replicas,
    )  # fmt: skip
    return device


def _limits(settings: Settings) -> Limits:
    return Limits(
        processes=settings.fit_processes,
        seconds=settings.fit_seconds,
        memory_bytes=settings.fit_memory_bytes,
        bytes_per_job=settings.fit_rows_bytes,
    )


def _queue_limits(settings: Settings) -> QueueLimits:
    return QueueLimits(
        requests=settings.max_queued_requests,
        bytes=settings.max_queued_bytes,
        wait_seconds=settings.max_queue_seconds,
        rows=settings.max_batch_rows,
        delay_us=settings.max_queue_delay_us,
        company_seconds=COMPANY_SECONDS[chosen(settings.front)],
    )
