"""Every knob of the server, typed, its unit in its name.

A setting comes from a flag, else from an environment variable `CALSERVE_<NAME>`, else from the default here. An unknown
flag or `CALSERVE_` variable is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from service.errors import Refused

ENVIRONMENT_PREFIX = "CALSERVE_"
MODEL_CONTROLS = ("none", "explicit", "poll")
JOURNAL_MODES = ("off", "async", "sync")
MONITOR_MODES = ("default", "own", "off")
FRONTS = ("auto", "h2", "grpc")


@dataclass(frozen=True)
class Settings:
    """Settings of `calserve serve`; `HELP` says what each is for."""

    model_repository: Path
    model_control: str = "none"
    load_model: str = ""
    poll_seconds: float = 15.0
    shared_memory_prefix: str = ""
    shared_memory_bytes: int = 1 << 30
    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8001
    front: str = "auto"
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 8002
    no_page: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    device: str = "auto"
    device_lost: str = "not_ready"
    gpu_memory_limit_bytes: int = 0
    cuda_graphs: bool = False
    tensorrt_fp16: bool = False
    threads: int = 0
    replicas: int = 1
    workers: int = 1
    max_message_bytes: int = 64 << 20
    max_queued_requests: int = 256
    max_queued_bytes: int = 512 << 20
    max_queue_seconds: float = 1.0
    max_batch_rows: int = 64
    max_queue_delay_us: int = 0
    default_deadline_seconds: float = 30.0
    drain_seconds: float = 30.0
    drain_delay_seconds: float = 0.0
    connection_idle_seconds: float = 300.0
    connection_age_seconds: float = 3600.0
    connection_age_grace_seconds: float = 60.0
    keepalive_seconds: float = 60.0
    max_metadata_bytes: int = 8 << 10
    max_streams_per_connection: int = 1024
    stream_idle_seconds: float = 60.0
    stream_seconds: float = 3600.0
    stream_messages: int = 10_000_000
    stream_bytes: int = 256 << 30
    journal: str = "async"
    journal_days: float = 7.0
    journal_bytes: int = 1 << 30
    journal_queue_bytes: int = 64 << 20
    online_wait_seconds: float = 60.0
    online_quota_labels: int = 10_000
    monitors: str = "default"
    monitor_wait_seconds: float = 3600.0
    webhook_url: str = ""
    webhook_hosts: str = ""
    webhook_secret_file: Path | None = None
    webhook_ca: Path | None = None
    traces_endpoint: str = ""
    fit_processes: int = 1
    fit_seconds: float = 3600.0
    fit_memory_bytes: int = 8 << 30
    fit_rows_bytes: int = 4 << 30
    log_level: str = "info"

    def __post_init__(self) -> None:
        if self.model_control not in MODEL_CONTROLS:
            raise Refused(f"model_control must be one of {', '.join(MODEL_CONTROLS)}, got {self.model_control!r}")
        if self.front not in FRONTS:
            raise Refused(f"front must be one of {', '.join(FRONTS)}, got {self.front!r}")
        if self.journal not in JOURNAL_MODES:
            raise Refused(f"journal must be one of {', '.join(JOURNAL_MODES)}, got {self.journal!r}")
        if self.monitors not in MONITOR_MODES:
            raise Refused(f"monitors must be one of {', '.join(MONITOR_MODES)}, got {self.monitors!r}")
        if self.load_model and self.model_control != "explicit":
            raise Refused("load_model is for model_control explicit; otherwise every model of the repository is loaded")
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise Refused(f"{name} must be in 0..65535, got {getattr(self, name)}")
        for name in (
            "replicas",
            "workers",
            "max_message_bytes",
            "max_queued_requests",
            "max_queued_bytes",
            "max_queue_seconds",
            "max_batch_rows",
            "default_deadline_seconds",
            "poll_seconds",
            "shared_memory_bytes",
            "connection_idle_seconds",
            "connection_age_seconds",
            "connection_age_grace_seconds",
            "keepalive_seconds",
            "max_metadata_bytes",
            "max_streams_per_connection",
            "stream_idle_seconds",
            "stream_seconds",
            "stream_messages",
            "stream_bytes",
            "journal_days",
            "journal_bytes",
            "journal_queue_bytes",
            "online_quota_labels",
            "fit_processes",
            "fit_seconds",
        ):
            if getattr(self, name) <= 0:
                raise Refused(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("online_wait_seconds", "monitor_wait_seconds"):
            if getattr(self, name) < 0:
                raise Refused(f"{name} must be zero or more, got {getattr(self, name)}")
        if not self.webhook_url and (self.webhook_hosts or self.webhook_secret_file or self.webhook_ca):
            raise Refused("webhook_hosts, webhook_secret_file and webhook_ca are for a webhook_url")
        if self.workers > 1 and (self.model_control == "explicit" or self.shared_memory_prefix):
            raise Refused("model_control explicit and shared memory are for one worker: a call reaches one of several")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise Refused("tls_cert and tls_key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise Refused("tls_client_ca needs tls_cert and tls_key")
        if not (self.insecure or is_local(self.host) or (self.tls_cert and self.token_file)):
            raise Refused(
                f"host {self.host!r} can be reached from other machines: give --tls-cert, --tls-key and --token-file, "
                f"or say --insecure"
            )

    @property
    def store(self) -> Path:
        """The data directory; by default beside the model repository."""
        return (
            self.data_dir or self.model_repository.resolve().parent / f"{self.model_repository.resolve().name}.calserve"
        )

    @property
    def at_start(self) -> list[str] | None:
        """Names of the models to load at start; None: all."""
        if self.model_control != "explicit" or self.load_model == "*":
            return None
        return [name.strip() for name in self.load_model.split(",") if name.strip()]

    @classmethod
    def from_sources(cls, flags: Mapping[str, Any], environment: Mapping[str, str]) -> Self:
        """Flags that were given, then the environment, then the defaults."""
        hints = get_type_hints(cls)
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if variable.startswith(ENVIRONMENT_PREFIX):
                name = variable[len(ENVIRONMENT_PREFIX) :].lower()
                if name not in known:
                    raise Refused(f"unknown setting {variable}; known: {', '.join(sorted(known))}")
                values[name] = _parse(name, text, hints[name])
        values.update({name: value for name, value in flags.items() if name in known and value is not None})
        return cls(**values)


HELP = {
    "model_repository": "folder of models in Triton's layout: <model>/<version>/model.onnx",
    "model_control": "none: every model, once, at start; explicit: by request; poll: follow the folder's changes",
    "load_model": "models to load at start with model control explicit: names with commas between, or * for all",
    "poll_seconds": "time between two looks at the folder with model control poll",
    "shared_memory_prefix": "beginnings of names of shared memory objects that callers may register, commas between",
    "shared_memory_bytes": "most bytes of shared memory registered at once",
    "data_dir": "where revisions and operations are kept (default: <model repository>.calserve beside it)",
    "host": "address to listen on; one that other machines reach wants TLS and a token file",
    "port": "gRPC port; 0 lets the system choose",
    "front": "what speaks gRPC: h2 (on libnghttp2, fast), grpc (grpc-core), or auto: h2 if the package ngh2 is there",
    "metrics_host": "address of the HTTP port, which has neither TLS nor tokens",
    "tls_cert": "certificate chain (PEM); new files are served to new connections",
    "tls_key": "its private key (PEM)",
    "tls_client_ca": "authorities (PEM) of which every caller must show a certificate (mutual TLS)",
    "token_file": "bearer tokens, see `calserve token`; without it every caller may do everything",
    "insecure": "listen where other machines reach it, though without TLS or tokens",
    "no_page": "serve no page beside /metrics; it shows anybody the models' names, revisions and how well they do",
    "metrics_port": "HTTP port of the page, /metrics and /health; 0 lets the system choose",
    "device": "auto, cpu, cuda[:index] or tensorrt[:index]; one that is named and absent is refused",
    "device_lost": "when the GPU is lost: not_ready (models are UNAVAILABLE) or cpu (they move there)",
    "gpu_memory_limit_bytes": "most GPU memory of each session; 0: what there is",
    "cuda_graphs": "replay batches of the sizes that were warmed up as CUDA graphs (device cuda)",
    "tensorrt_fp16": "let TensorRT compute in half precision, which changes the logits (device tensorrt)",
    "threads": "CPU threads of one model run; 0: the cores of this process, shared among models and replicas",
    "replicas": "server processes that share these cores",
    "workers": "server processes on this port, each with the models in memory; metrics of the n-th at metrics_port + n",
    "max_message_bytes": "largest gRPC message, both ways",
    "max_queued_requests": "requests that may wait for one model; more are refused with RESOURCE_EXHAUSTED",
    "max_queued_bytes": "bytes of inputs that may wait for one model",
    "max_queue_seconds": "a request that would wait longer for its run is refused; under overload much sooner",
    "max_batch_rows": "most rows in one run where config.pbtxt sets no max_batch_size; fewer if more make none cheaper",
    "max_queue_delay_us": "how long each incomplete batch waits for company; 0: 1 ms at most (front grpc: 4)",
    "default_deadline_seconds": "deadline of an inference whose caller set none",
    "drain_seconds": "how long calls in flight may take after SIGTERM",
    "drain_delay_seconds": "time between NOT_SERVING and the refusal of new calls, for a balancer to notice",
    "connection_idle_seconds": "a connection without calls is closed after this",
    "connection_age_seconds": "a connection is asked to be made anew after about this",
    "connection_age_grace_seconds": "time that its calls then have left",
    "keepalive_seconds": "a silent connection is pinged after this, and closed unless it answers in 20 s",
    "max_metadata_bytes": "largest metadata of a call",
    "max_streams_per_connection": "calls open at once on one connection; further ones wait at the caller",
    "stream_idle_seconds": "a stream of requests on which nothing is sent is ended after this",
    "stream_seconds": "longest time a stream of requests may last",
    "stream_messages": "most messages of one stream",
    "stream_bytes": "most bytes of one stream",
    "journal": "whether predictions are kept for labels that come later: off, async or sync; of a model: calserve.toml",
    "journal_days": "how long predictions and their labels are kept",
    "journal_bytes": "most bytes of the journal; the oldest predictions are forgotten beyond that",
    "journal_queue_bytes": "predictions that wait to be written; further ones are counted as lost",
    "online_wait_seconds": "how long online learning waits for a prediction's label before it passes to the next one",
    "online_quota_labels": "labels of one producer that an online revision learns from an hour",
    "monitors": "default: some for each model, and what callers ask for; own: only what they ask for; off: none",
    "monitor_wait_seconds": "how long monitors wait for a prediction's label before it counts as missing",
    "webhook_url": "https address that alarms are posted to; without it none are",
    "webhook_hosts": "hosts that may be posted to: names, addresses, networks (private ones too), commas between",
    "webhook_secret_file": "what posts are signed with (HMAC-SHA256, header Calserve-Signature)",
    "webhook_ca": "authorities (PEM) for the webhook's certificate; by default the system's",
    "traces_endpoint": "OTLP collector (gRPC) that a span of each inference goes to; needs the extra `tracing`",
    "fit_processes": "fits that may run at once, each in its own process",
    "fit_seconds": "longest time a fit may take",
    "fit_memory_bytes": "most memory (address space) a fit may use",
    "fit_rows_bytes": "largest calibration set",
    "log_level": "debug, info, warning or error",
}


def is_local(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse(name: str, text: str, hint: Any) -> Any:
    if hint is bool:
        return _parse_flag(name, text)
    kind = next((k for k in (int, float, Path) if hint is k or hint == k | None), str)
    try:
        return kind(text)
    except ValueError:
        raise Refused(f"setting {name} must be a {kind.__name__}, got {text!r}") from None


def _parse_flag(name: str, text: str) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in words:
        raise Refused(f"setting {name} must be true or false, got {text!r}")
    return words[text.lower()]
