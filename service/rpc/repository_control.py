"""Triton's extension for the model repository: what is there, load it, unload it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from service.errors import InvalidRequest, Refused, shown
from service.inference.repository import Repository, folders
from service.learning.loading import Loading
from service.rpc.methods import Call
from service.rpc.wire import inference

CONFIG, FILE_PREFIX, UNLOAD_DEPENDENTS = "config", "file:", "unload_dependents"


@dataclass(frozen=True)
class RepositoryControl:
    """The part of inference.GRPCInferenceService that says which models are served.

    Attributes
    ----------
    mode : `none`, `explicit` or `poll`; models are loaded and unloaded by request only where it is `explicit`
    """

    repository: Repository
    loading: Loading
    mode: str

    async def repository_index(self, request: Any, call: Call) -> Any:
        _check_repository(request)
        response = inference.RepositoryIndexResponse()
        reasons = dict.fromkeys(self.repository.unloaded, "it was unloaded") | self.repository.failures
        for model in filter(lambda model: call.may_use(model.name), self.repository.models()):
            reason = f"serves what was loaded before: {reasons[model.name]}" if model.name in reasons else ""
            response.models.add(name=model.name, version=model.version, state="READY", reason=reason)
        if not request.ready:
            for name in await self._present():
                if call.may_use(name) and not self.repository.serves(name):
                    reason = reasons.get(name, "it is not loaded")
                    response.models.add(name=name, state="UNAVAILABLE", reason=reason)
        return response

    async def repository_model_load(self, request: Any, call: Call) -> Any:
        self._check_mode(request)
        await self.loading.load(request.model_name, _config(request.parameters))
        return inference.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any, call: Call) -> Any:
        self._check_mode(request)
        for key in request.parameters:
            if key != UNLOAD_DEPENDENTS:  # true or false, there are none: no model is made of others
                raise InvalidRequest(f"unknown parameter {shown(key)} of an unload; known: {UNLOAD_DEPENDENTS}")
        await self.loading.unload(request.model_name)
        return inference.RepositoryModelUnloadResponse()

    async def _present(self) -> list[str]:
        """Models with a folder, and those that had one."""
        there = await asyncio.to_thread(folders, self.repository.root)
        return sorted({*(path.name for path in there), *self.repository.names()})

    def _check_mode(self, request: Any) -> None:
        _check_repository(request)
        if self.mode != "explicit":
            raise Refused(
                "models are loaded and unloaded by request only with --model-control explicit; "
                f"this server runs with {self.mode}",
                reason="MODEL_CONTROL",
            )


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise InvalidRequest(f"there is one repository, without a name; got {shown(request.repository_name)}")


def _config(parameters: Mapping[str, Any]) -> Any:
    """The ModelConfig that a load request brings, None if it brings none."""
    for key in parameters:
        if key.startswith(FILE_PREFIX):
            raise InvalidRequest(f"parameter {shown(key)}: files come from the model repository, not with a request")
        if key != CONFIG:
            raise InvalidRequest(f"unknown parameter {shown(key)} of a load; known: {CONFIG}")
    if CONFIG not in parameters:
        return None
    if parameters[CONFIG].WhichOneof("parameter_choice") != "string_param":
        raise InvalidRequest("parameter 'config' must be a string, a ModelConfig as JSON")
    try:
        return json_format.Parse(parameters[CONFIG].string_param, inference.ModelConfig())
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidRequest(f"parameter 'config' is no ModelConfig as JSON: {shown(str(error))}") from error
