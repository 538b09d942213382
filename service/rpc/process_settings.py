"""Triton's extensions for log and trace settings, as far as they have a meaning here.

Of the log's settings the levels are those of the server's logger. There is no tracing: it is told to be off, and asking
to switch it on is refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidRequest, shown
from service.inference.repository import Repository
from service.rpc.methods import Call
from service.rpc.wire import inference

LOGGER = logging.getLogger("service")

LEVELS = {
    "log_verbose_level": logging.DEBUG,
    "log_info": logging.INFO,
    "log_warning": logging.WARNING,
    "log_error": logging.ERROR,
}
"""A setting, and the most verbose level at which it is on. All off: CRITICAL."""

FIXED = {"log_file": "", "log_format": "default"}
"""Settings that have one value: the log goes to the standard error stream, in one format."""

TRACE_OFF = {"trace_level": ["OFF"]}


@dataclass(frozen=True)
class ProcessSettings:
    """The part of inference.GRPCInferenceService about the log and about tracing."""

    repository: Repository

    async def log_settings(self, request: Any, call: Call) -> Any:
        wanted = {name: _log_value(name, value) for name, value in request.settings.items()}
        if wanted:
            LOGGER.setLevel(_level(_levels_now() | {name: on for name, on in wanted.items() if name in LEVELS}))
        response = inference.LogSettingsResponse()
        for name, on in _levels_now().items():
            if name == "log_verbose_level":
                response.settings[name].uint32_param = int(on)
            else:
                response.settings[name].bool_param = on
        for name, text in FIXED.items():
            response.settings[name].string_param = text
        return response

    async def trace_setting(self, request: Any, call: Call) -> Any:
        if request.model_name:
            self.repository.get(request.model_name)
        for name, setting in request.settings.items():
            if list(setting.value) not in ([], TRACE_OFF.get(name)):
                raise InvalidRequest(
                    f"trace setting {shown(name)} cannot be {list(setting.value)}: there is no tracing"
                )
        response = inference.TraceSettingResponse()
        for name, values in TRACE_OFF.items():
            response.settings[name].value.extend(values)
        return response


def _levels_now() -> dict[str, bool]:
    return {name: LOGGER.getEffectiveLevel() <= level for name, level in LEVELS.items()}


def _log_value(name: str, setting: Any) -> Any:
    """What a log setting is to become; InvalidRequest if it cannot."""
    chosen = setting.WhichOneof("parameter_choice")
    value = None if chosen is None else getattr(setting, chosen)
    if name in FIXED:
        if value not in (None, FIXED[name]):
            raise InvalidRequest(f"log setting {name!r} is {FIXED[name]!r} and cannot be changed to {shown(value)}")
        return value
    if name not in LEVELS:
        raise InvalidRequest(f"unknown log setting {shown(name)}; known: {', '.join((*LEVELS, *FIXED))}")
    kind = "uint32_param" if name == "log_verbose_level" else "bool_param"
    if chosen != kind:
        raise InvalidRequest(f"log setting {name!r} wants a value in {kind}, got {shown(value)}")
    return bool(value)


def _level(on: dict[str, bool]) -> int:
    """The level at which exactly these settings are on; InvalidRequest if one is on without those above it."""
    switched = [on[name] for name in LEVELS]
    if switched != sorted(switched):
        names = ", ".join(f"{name} = {on[name]}" for name in LEVELS)
        raise InvalidRequest(f"a level of the log brings with it those above it; wanted were {names}")
    return next((level for name, level in LEVELS.items() if on[name]), logging.CRITICAL)
