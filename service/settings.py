"""Every knob of the server, typed, its unit in its name.

A setting comes from a flag, else from an environment variable `CALSERVE_<NAME>`, else from the default here. An unknown
flag or `CALSERVE_` variable is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from service.errors import Refused

ENVIRONMENT_PREFIX = "CALSERVE_"


@dataclass(frozen=True)
class Settings:
    """Settings of `calserve serve`; `HELP` says what each is for."""

    model_repository: Path
    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8001
    metrics_port: int = 8002
    device: str = "auto"
    threads: int = 0
    max_message_bytes: int = 64 << 20
    max_queued_runs: int = 256
    default_deadline_seconds: float = 30.0
    drain_seconds: float = 30.0
    fit_processes: int = 1
    fit_seconds: float = 3600.0
    fit_memory_bytes: int = 8 << 30
    fit_rows_bytes: int = 4 << 30
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise Refused(f"{name} must be in 0..65535, got {getattr(self, name)}")
        for name in (
            "max_message_bytes",
            "max_queued_runs",
            "default_deadline_seconds",
            "fit_processes",
            "fit_seconds",
        ):
            if getattr(self, name) <= 0:
                raise Refused(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def store(self) -> Path:
        """The data directory; by default beside the model repository."""
        return (
            self.data_dir or self.model_repository.resolve().parent / f"{self.model_repository.resolve().name}.calserve"
        )

    @property
    def model_threads(self) -> int:
        """Threads of one model run; by default the cores this process may use."""
        return self.threads or len(os.sched_getaffinity(0))

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
    "data_dir": "where revisions and operations are kept (default: <model repository>.calserve beside it)",
    "host": "address to listen on",
    "port": "gRPC port; 0 lets the system choose",
    "metrics_port": "HTTP port of /metrics and /health; 0 lets the system choose",
    "device": "auto, cpu, cuda or cuda:<index>; cuda refuses to start where there is none",
    "threads": "threads of one model run; 0: the cores this process may use",
    "max_message_bytes": "largest gRPC message, both ways",
    "max_queued_runs": "requests that may wait for one model; more are refused with RESOURCE_EXHAUSTED",
    "default_deadline_seconds": "deadline of an inference whose caller set none",
    "drain_seconds": "how long calls in flight may take after SIGTERM",
    "fit_processes": "fits that may run at once, each in its own process",
    "fit_seconds": "longest time a fit may take",
    "fit_memory_bytes": "most memory (address space) a fit may use",
    "fit_rows_bytes": "largest calibration set",
    "log_level": "debug, info, warning or error",
}


def _parse(name: str, text: str, hint: Any) -> Any:
    kind = next((k for k in (int, float, Path) if hint is k or hint == k | None), str)
    try:
        return kind(text)
    except ValueError:
        raise Refused(f"setting {name} must be a {kind.__name__}, got {text!r}") from None
