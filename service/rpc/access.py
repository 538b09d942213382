"""Who may call what: every method, the roles that may call it, and the check of the caller's token before it runs.

A method that is not in the table is called by nobody: the server refuses to start with it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

from service.errors import Forbidden, Refused, Unauthenticated
from service.rpc.methods import Call, Direct, Metadata, Method, parse
from service.rpc.sessions import Line, Session
from service.rpc.tokens import EVERY_MODEL, Role, Token, TokenFile

OPEN: frozenset[Role] = frozenset()
"""For callers without a token too: says whether something serves, and nothing else."""
ANY = frozenset(Role)
INFER, LABEL, FIT, OPERATE = (frozenset({role}) for role in (Role.INFER, Role.LABEL, Role.FIT, Role.OPERATE))
FIT_OR_OPERATE = FIT | OPERATE

_ROLES = {
    "grpc.health.v1.Health": {"Check": OPEN, "Watch": OPEN, "List": ANY},  # List names the models
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": OPERATE},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": OPERATE},
    "inference.GRPCInferenceService": {
        "ServerLive": OPEN,
        "ServerReady": OPEN,
        "ServerMetadata": ANY,
        "ModelReady": ANY,
        "ModelMetadata": ANY,
        "ModelConfig": ANY,
        "ModelStatistics": ANY,
        "RepositoryIndex": ANY,
        "ModelInfer": INFER,
        "ModelStreamInfer": INFER,
        "RepositoryModelLoad": OPERATE,
        "RepositoryModelUnload": OPERATE,
        "SystemSharedMemoryStatus": INFER,  # off unless the operator turns them on for callers on this machine
        "SystemSharedMemoryRegister": INFER,
        "SystemSharedMemoryUnregister": INFER,
        "CudaSharedMemoryStatus": INFER,
        "CudaSharedMemoryRegister": INFER,
        "CudaSharedMemoryUnregister": INFER,
        "TraceSetting": OPERATE,
        "LogSettings": OPERATE,
    },
    "calserve.v1.CalibratorService": {
        "ListModels": ANY,
        "FitCalibrator": FIT,
        "EvaluateRevision": FIT,
        "GetOperation": FIT_OR_OPERATE,
        "ListOperations": FIT_OR_OPERATE,
        "WaitOperation": FIT_OR_OPERATE,
        "CancelOperation": FIT_OR_OPERATE,
        "ListRevisions": FIT_OR_OPERATE,
        "GetRevision": FIT_OR_OPERATE,
        "GetArtifact": FIT_OR_OPERATE,
        "ExportModel": OPERATE,  # gives the model itself away
        "DeleteRevision": OPERATE,
        "ActivateRevision": OPERATE,
        "RollBack": OPERATE,
    },
    "calserve.v1.FeedbackService": {
        "RecordLabels": LABEL,
        "ImportLabels": LABEL,
        "GetPrediction": LABEL | OPERATE,
    },
    "calserve.v1.MonitorService": {
        "CreateMonitor": OPERATE,
        "GetMonitor": OPERATE,
        "ListMonitors": OPERATE,
        "UpdateMonitor": OPERATE,
        "DeleteMonitor": OPERATE,
        "ListAlarms": OPERATE,
        "WatchAlarms": OPERATE,
        "AcknowledgeAlarm": OPERATE,
        "GetReport": OPERATE,
    },
    "calserve.v1.OnlineService": {
        "GetOnlineState": OPERATE,
        "RollBackOnlineState": OPERATE,
        "SuspendLearning": OPERATE,
        "ResumeLearning": OPERATE,
        "ReplayLearning": OPERATE,
    },
    "calserve.v1.ShadowService": {
        "StartShadow": OPERATE,  # it costs what it runs, and may activate
        "GetShadow": FIT_OR_OPERATE,
        "ListShadows": FIT_OR_OPERATE,
        "StopShadow": OPERATE,
        "PromoteShadow": OPERATE,
    },
}
ROLES = {f"/{service}/{name}": roles for service, methods in _ROLES.items() for name, roles in methods.items()}
"""Method path -> roles, any one of which is enough."""

CHECK_THEIR_MODEL = {f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ModelStreamInfer")}
"""Methods that ask `call.check_model` themselves: they know most requests without reading them."""


class Access:
    """The check of every call's bearer token."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    def guarded(self, method: Method) -> Method:
        """The same method, for those who may call it."""
        if not ROLES[method.path]:
            return method
        path, handler = method.path, method.handler

        def allowed(request: Any, call: Call) -> Any:
            if self.admit(path, call).models == EVERY_MODEL or path in CHECK_THEIR_MODEL:
                return request
            check = _checked_one_by_one if method.client_streaming else _checked
            return check(method, request, call)

        if isinstance(handler, Direct):
            begin = handler.begin
            return replace(method, handler=Direct(lambda data, call, tell: begin(allowed(data, call), call, tell)))

        async def one(request: Any, call: Call) -> bytes:
            answer: bytes = await handler(allowed(request, call), call)
            return answer

        async def many(request: Any, call: Call) -> AsyncIterator[bytes]:
            async for answer in handler(allowed(request, call), call):
                yield answer

        def session(line: Line, call: Call) -> Session:
            self.admit(path, call)
            opened: Session = handler(line, call)
            return opened

        if method.by_session:
            return replace(method, handler=session)
        return replace(method, handler=many if method.server_streaming else one)

    def recheck(self, path: str, call: Call) -> None:
        """The same of a stream that is open, whose token may have changed since."""
        if ROLES[path]:
            self.admit(path, call)

    def admit(self, path: str, call: Call) -> Token:
        """Unauthenticated without a token that is valid now, Forbidden if it has none of the method's roles."""
        roles = ROLES[path]
        token = self._tokens.find(bearer(call.metadata()))
        if token is None:
            raise Unauthenticated("the token is not known here")
        _check_time(token)
        if not roles & token.roles:
            raise Forbidden(f"the token has the roles {_words(token.roles)}; {path} wants {_words(roles, ' or ')}")
        call.grant = token
        return token


def check_complete(methods: Iterable[Method]) -> None:
    """Refused if a method is not in the table."""
    known = [ROLES.keys(), ROLES.keys() & CHECK_THEIR_MODEL]  # of a session nobody else reads what it is asked
    missing = sorted(method.path for method in methods if method.path not in known[method.by_session])
    if missing:
        raise Refused(f"service/rpc/access.py does not say who may call {', '.join(missing)}")


def bearer(metadata: Metadata) -> str:
    """The token of `authorization: Bearer <token>`. Unauthenticated if there is not just one such entry."""
    found = [value for key, value in metadata if key == "authorization"]
    if len(found) == 1:
        value = found[0] if isinstance(found[0], str) else ""
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer" and token and token.isascii() and " " not in token:
            return token
    raise Unauthenticated("a token is wanted, once, as metadata 'authorization: Bearer <token>'")


def model_field_of(request: Any) -> str | None:
    """The field by which a request (its descriptor) names its model, perhaps one of its `spec`; None: it names none."""
    if "spec" in request.fields_by_name:
        return f"spec.{model_field_of(request.fields_by_name['spec'].message_type)}"
    # The Open Inference Protocol's questions about a model call it `name`; elsewhere that may be anything's name.
    asks_about_model = request.file.package == "inference" and request.name.startswith("Model")
    words = ("model", "model_name", *(["name"] if asks_about_model else []))
    return next((word for word in words if word in request.fields_by_name), None)


def _checked(method: Method, data: bytes, call: Call) -> bytes:
    """The request, if it names a model that the token is for.

    It is read here once more than for other tokens: so no handler can forget to ask.
    """
    field = model_field_of(method.request.DESCRIPTOR)
    if field is not None:
        request: Any = parse(method.request, data)
        spec, _, name = field.rpartition(".")
        if not spec or request.HasField(spec):
            call.check_model(getattr(getattr(request, spec) if spec else request, name))
    return data


async def _checked_one_by_one(method: Method, requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
    async for data in requests:
        yield _checked(method, data, call)


def _check_time(token: Token) -> None:
    begin, end = token.span
    now = time.time()
    if now < begin:
        raise Unauthenticated("the token is not valid yet")
    if now >= end:
        raise Unauthenticated("the token has expired")


def _words(roles: Iterable[Role], join: str = ", ") -> str:
    return join.join(sorted(roles))
