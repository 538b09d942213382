"""Bearer tokens: who may call what, until when, and that nothing of a token shows anywhere."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from calserve.open_inference import messages
from calserve.v1 import calibrator_service_pb2 as pb
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2

import service.app
from service import cli, errors
from service.client import AsyncClient, Client
from service.errors import Refused
from service.learning.operations import Operation
from service.rpc import tokens
from service.rpc.access import ROLES, check_complete
from service.rpc.methods import Method
from service.rpc.tokens import Role, TokenFile
from service.store.catalogue import OperationRow
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
OK, NOT_FOUND = grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
CALIBRATORS = "/calserve.v1.CalibratorService"
Metadata = Sequence[tuple[str, str | bytes]]


class Guarded:
    """A server with a token file, and a call of any of its methods."""

    def __init__(self, folder: Path) -> None:
        models.write(folder / "models", "mlp", models.classifier())
        models.write(folder / "models", "mean", models.regressor())
        self.file = folder / "tokens.toml"
        self.tokens = {role: tokens.add(self.file, f"only-{role}", [role], ["*"], 1) for role in Role}
        self.server = RunningServer(settings_for(folder / "models", token_file=self.file))
        self.channel = grpc.insecure_channel(self.server.address)

    def close(self) -> None:
        self.channel.close()
        self.server.stop()

    def stream(self, path: str, requests: Iterator[bytes], metadata: Metadata) -> grpc.Call:
        return self.channel.stream_stream(path)(requests, metadata=metadata, timeout=10)

    def code(self, path: str, metadata: Metadata, request: bytes = b"") -> grpc.StatusCode:
        """The code of a call with one request; of a stream of answers that goes on, OK as soon as there is one."""
        answers = self.stream(path, iter([request]), metadata)
        try:
            next(answers, None)
        except grpc.RpcError as error:
            return error.code()
        answers.cancel()
        return OK

    def code_as(self, role: Role, path: str, request: bytes = b"") -> grpc.StatusCode:
        return self.code(path, bearer(self.tokens[role]), request)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("guarded"))
    yield guarded
    guarded.close()


@pytest.fixture(scope="module")
def paths(guarded: Guarded) -> list[str]:
    """Every method that the running server names by reflection."""

    def ask(**asked: str) -> reflection_pb2.ServerReflectionResponse:
        request = reflection_pb2.ServerReflectionRequest(**asked).SerializeToString()
        metadata = bearer(guarded.tokens[Role.OPERATE])
        path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        (answer,) = guarded.stream(path, iter([request]), metadata)
        return reflection_pb2.ServerReflectionResponse.FromString(answer)

    found = []
    for listed in ask(list_services="*").list_services_response.service:
        files = ask(file_containing_symbol=listed.name).file_descriptor_response.file_descriptor_proto
        for file in map(descriptor_pb2.FileDescriptorProto.FromString, files):
            for offered in file.service:
                if f"{file.package}.{offered.name}" == listed.name:
                    found += [f"/{listed.name}/{method.name}" for method in offered.method]
    return found


def bearer(token: str) -> Metadata:
    return [("authorization", f"Bearer {token}")]


def infer(model: str = "mlp") -> bytes:
    request = messages.ModelInferRequest(model_name=model, raw_input_contents=[bytes(24)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 6])
    return request.SerializeToString()


def answers_to(code: Callable[[], grpc.StatusCode], wanted: grpc.StatusCode) -> bool:
    """Whether the code becomes the wanted one within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if code() == wanted:
            return True
    return False


def test_the_table_names_every_method_of_the_running_server_and_no_other(paths: list[str]) -> None:
    not_in_every_release = {"/grpc.health.v1.Health/List"}  # of grpcio-health-checking
    assert not_in_every_release | set(paths) == set(ROLES)


def test_a_method_that_is_not_in_the_table_keeps_the_server_from_starting() -> None:
    method = Method("/new.Service/New", False, False, lambda *_: b"", messages.ModelInferRequest)
    with pytest.raises(Refused, match=r"does not say who may call /new\.Service/New"):
        check_complete([method])


def test_a_session_whose_method_does_not_check_its_model_keeps_the_server_from_starting() -> None:
    path = f"{CALIBRATORS}/FitCalibrator"
    method = Method(path, True, True, lambda *_: b"", messages.ModelInferRequest, by_session=True)
    with pytest.raises(Refused, match="does not say who may call"):
        check_complete([method])
    check_complete([dataclasses.replace(method, path=STREAM_INFER)])


def test_without_a_token_only_the_status_questions_are_answered(guarded: Guarded, paths: list[str]) -> None:
    codes = {path: guarded.code(path, []) for path in paths}
    answered = {path.rpartition(".")[2] for path, code in codes.items() if code != UNAUTHENTICATED}
    assert answered == {
        "Health/Check",
        "Health/Watch",
        "GRPCInferenceService/ServerLive",
        "GRPCInferenceService/ServerReady",
    }


@pytest.mark.parametrize("role", Role)
def test_a_role_opens_its_methods_and_no_others(guarded: Guarded, paths: list[str], role: Role) -> None:
    wrong = {path for path in paths if ROLES[path] and role not in ROLES[path]}
    codes = {path: guarded.code_as(role, path) for path in paths}
    assert {path for path, code in codes.items() if code == DENIED} == wrong
    assert UNAUTHENTICATED not in codes.values()


def test_what_each_role_is_for(guarded: Guarded) -> None:
    opened = {role: {path.rpartition("/")[2] for path in ROLES if ROLES[path] == {role}} for role in Role}
    assert opened[Role.INFER] >= {"ModelInfer", "ModelStreamInfer"}
    assert opened[Role.FIT] >= {"FitCalibrator", "EvaluateRevision"}
    assert opened[Role.OPERATE] >= {"ActivateRevision", "RollBack", "DeleteRevision", "ExportModel"}
    assert guarded.code_as(Role.INFER, INFER, infer()) == OK


GOOD = "calserve_the-token-of-these-tests"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", GOOD)],
        [("authorization", f"Basic {GOOD}")],
        [("authorization", f"Bearer{GOOD}")],
        [("authorization", f"Bearer  {GOOD}")],
        [("authorization", f"Bearer {GOOD} {GOOD}")],
        [("authorization", f"Bearer {GOOD[:-1]}")],
        [("authorization", f"Bearer {GOOD}x")],
        [("authorization", f"Bearer {GOOD.upper()}")],
        [("authorization", f"Bearer {hashlib.sha256(GOOD.encode()).hexdigest()}")],
        [("authorization", f"Bearer {GOOD}"), ("authorization", f"Bearer {GOOD}")],
        [("authorization-bin", f"Bearer {GOOD}".encode())],
        [("token", GOOD)],
    ],
)
def test_a_header_that_is_not_one_known_bearer_token_is_unauthenticated(known: Guarded, metadata: Metadata) -> None:
    assert known.code(INFER, metadata, infer()) == UNAUTHENTICATED


def test_the_word_bearer_may_be_in_any_case(known: Guarded) -> None:
    codes = {word: known.code(INFER, [("authorization", f"{word} {GOOD}")], infer()) for word in ("Bearer", "bearer")}
    assert codes == {"Bearer": OK, "bearer": OK}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server that knows the token GOOD, and tokens out of their time."""
    folder = tmp_path_factory.mktemp("known")
    guarded = Guarded(folder)
    with guarded.file.open("a") as file:
        file.write(entry("good", GOOD))
        file.write(entry("expired", "old", "expires = 2026-01-01T00:00:00Z"))
        file.write(entry("not-yet", "young", "not_before = 2126-01-01T00:00:00Z"))
    reload(guarded)
    yield guarded
    guarded.close()


def entry(name: str, token: str, *lines: str) -> str:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return "\n".join([f'\n[[token]]\nname = "{name}"\nsha256 = "{digest}"', 'roles = ["infer"]', *lines, ""])


def reload(guarded: Guarded) -> None:
    """As SIGHUP does it."""
    done = queue.SimpleQueue[None]()
    guarded.server._loop.call_soon_threadsafe(lambda: done.put(guarded.server.app.reload()))
    done.get(timeout=10)


@pytest.mark.parametrize(("token", "text"), [("old", "has expired"), ("young", "is not valid yet"), ("x", "not known")])
def test_a_token_out_of_its_time_is_unauthenticated_and_told_so(known: Guarded, token: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        known.channel.unary_unary(INFER)(infer(), metadata=bearer(token))
    assert caught.value.code() == UNAUTHENTICATED
    assert text in caught.value.details()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """A guarded server of the test's own, that looks at its token file often."""
    monkeypatch.setattr(service.app, "WATCH_SECONDS", 0.05)
    guarded = Guarded(tmp_path)
    yield guarded
    guarded.close()


def test_a_revoked_token_ends_its_open_stream_and_opens_nothing_more(own: Guarded) -> None:
    metadata = bearer(own.tokens[Role.INFER])
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    answers = own.stream(STREAM_INFER, iter(requests.get, b""), metadata)
    requests.put(infer())
    assert messages.ModelStreamInferResponse.FromString(next(answers)).infer_response.model_name == "mlp"
    tokens.revoke(own.file, "only-infer")
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() == UNAUTHENTICATED
    requests.put(b"")
    assert own.code(INFER, metadata, infer()) == UNAUTHENTICATED
    assert own.code_as(Role.FIT, f"{CALIBRATORS}/ListModels") == OK


def test_a_new_token_is_known_in_a_moment(own: Guarded) -> None:
    token = tokens.add(own.file, "late", ["infer"], ["*"], None)
    assert answers_to(lambda: own.code(INFER, bearer(token), infer()), OK)


@pytest.mark.parametrize(
    "spoil",
    [Path.unlink, lambda path: path.write_text(""), lambda path: path.write_text("[[token]]\nname = 3\n")],
    ids=["gone", "empty", "wrong"],
)
def test_a_file_that_is_spoilt_leaves_the_tokens_of_before_and_is_logged(
    own: Guarded, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    content = own.file.read_text()
    spoil(own.file)
    assert answers_to(lambda: OK if "go on being valid" in caplog.text else NOT_FOUND, OK)
    assert own.code_as(Role.INFER, INFER, infer()) == OK
    own.file.write_text(content.replace("only-infer", "other").replace('"infer"', '"label"'))
    assert answers_to(lambda: own.code_as(Role.INFER, INFER, infer()), DENIED)


def test_neither_a_token_nor_its_hash_is_ever_logged(own: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert own.code_as(Role.INFER, INFER, infer()) == OK
        assert own.code_as(Role.INFER, f"{CALIBRATORS}/RollBack") == DENIED
        assert own.code(INFER, bearer("calserve_forged"), infer()) == UNAUTHENTICATED
        content = own.file.read_text()
        own.file.write_text(content + content)
        assert answers_to(lambda: OK if "of another entry" in caplog.text else NOT_FOUND, OK)
    secrets = [*own.tokens.values(), "calserve_forged"]
    assert [s for s in secrets if s in caplog.text or hashlib.sha256(s.encode()).hexdigest() in caplog.text] == []


def test_the_clients_send_their_token_with_every_call(guarded: Guarded) -> None:
    rows = models.labelled_rows(3, seed=0)[0]

    async def many() -> int:
        async with AsyncClient(guarded.server.address, token=guarded.tokens[Role.INFER]) as client:
            await client.wait_until_ready()
            async with client.stream("mlp") as stream:
                return len((await stream.predict(rows)).probabilities)

    with Client(guarded.server.address, token=guarded.tokens[Role.INFER], show_progress=False) as client:
        assert client.predict("mlp", rows).probabilities.shape == (3, 4)
        with pytest.raises(errors.Forbidden, match=r"has the roles infer; .*RollBack wants operate"):
            client.rollback("mlp")
    assert asyncio.run(many()) == 3
    with Client(guarded.server.address) as client, pytest.raises(errors.Unauthenticated, match="a token is wanted"):
        client.models()


@pytest.mark.parametrize("address", ["example.org:8001", "10.0.0.1:8001", "[fe80::1]:8001", "dns:///example.org:8001"])
def test_a_client_sends_no_token_to_another_machine_in_plain_text(address: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="over TLS only"):
        Client(address, token="secret")  # noqa: S106
    Client(address, token="secret", tls=True).close()  # noqa: S106


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/calserve"])
def test_to_its_own_machine_it_does(address: str) -> None:
    Client(address, token="secret").close()  # noqa: S106


def test_the_command_line_takes_its_token_from_a_file(
    guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(guarded.tokens[Role.FIT] + "\n")
    cli.main(["models", "--address", guarded.server.address, "--token-from", str(tmp_path / "token")])
    assert "mlp" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["models", "--address", guarded.server.address, "--token-from", str(tmp_path / "missing")])
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guarded, Metadata]]:
    """A server, and a token for every role but only for models called ml*."""
    guarded = Guarded(tmp_path_factory.mktemp("limited"))
    token = tokens.add(guarded.file, "limited", list(Role), ["ml*", "other"], 1)
    reload(guarded)
    yield guarded, bearer(token)
    guarded.close()


def test_a_token_for_some_models_is_for_no_other_whether_it_exists_or_not(limited: tuple[Guarded, Metadata]) -> None:
    server, metadata = limited
    codes = {model: server.code(INFER, metadata, infer(model)) for model in ("mlp", "mean", "nobody", "mlnobody", "")}
    assert codes == {"mlp": OK, "mean": DENIED, "nobody": DENIED, "mlnobody": NOT_FOUND, "": DENIED}


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/inference.GRPCInferenceService/ModelMetadata", messages.ModelMetadataRequest(name="mean")),
        ("/inference.GRPCInferenceService/ModelReady", messages.ModelReadyRequest(name="mean")),
        ("/inference.GRPCInferenceService/ModelConfig", messages.ModelConfigRequest(name="mean")),
        ("/inference.GRPCInferenceService/ModelStatistics", messages.ModelStatisticsRequest()),
        (f"{CALIBRATORS}/ListOperations", pb.ListOperationsRequest()),
        (f"{CALIBRATORS}/ListRevisions", pb.ListRevisionsRequest(model="mean")),
        (f"{CALIBRATORS}/ActivateRevision", pb.ActivateRevisionRequest(model="mean", revision="none")),
        (f"{CALIBRATORS}/ExportModel", pb.ExportModelRequest(model="mean")),
        (
            f"{CALIBRATORS}/FitCalibrator",
            pb.FitCalibratorRequest(spec=pb.FitCalibratorRequest.Spec(model="mean", kind="platt")),
        ),
    ],
)
def test_the_limit_holds_wherever_a_request_names_a_model(
    limited: tuple[Guarded, Metadata], path: str, request_: Message
) -> None:
    server, metadata = limited
    data = request_.SerializeToString()
    assert server.code(path, metadata, data) == DENIED
    assert server.code_as(Role.INFER, path, data) != DENIED or Role.INFER not in ROLES[path]


def test_in_a_stream_the_limit_refuses_a_request_and_not_the_stream(limited: tuple[Guarded, Metadata]) -> None:
    server, metadata = limited
    answers = server.stream(STREAM_INFER, iter([infer("mean"), infer("mlp")]), metadata)
    told = [messages.ModelStreamInferResponse.FromString(answer).error_message for answer in answers]
    assert told == ["the token is not for model 'mean'", ""]


def test_lists_of_models_hold_only_those_the_token_is_for(limited: tuple[Guarded, Metadata]) -> None:
    server, metadata = limited
    answer = server.channel.unary_unary(f"{CALIBRATORS}/ListModels")(b"", metadata=metadata)
    assert [model.model for model in pb.ListModelsResponse.FromString(answer).models] == ["mlp"]
    answer = server.channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")(b"", metadata=metadata)
    assert [model.name for model in messages.RepositoryIndexResponse.FromString(answer).models] == ["mlp"]


def test_an_operation_of_another_model_is_neither_shown_nor_ended(limited: tuple[Guarded, Metadata]) -> None:
    server, metadata = limited
    operation = OperationRow("op-foreign", "fit", "mean", "fit platt", "succeeded", time.time())
    server.server.app._operations._operations[operation.operation] = Operation(operation)
    for method, request in {
        "GetOperation": pb.GetOperationRequest(operation="op-foreign"),
        "WaitOperation": pb.WaitOperationRequest(operation="op-foreign"),
        "CancelOperation": pb.CancelOperationRequest(operation="op-foreign"),
    }.items():
        path, data = f"{CALIBRATORS}/{method}", request.SerializeToString()
        assert server.code(path, metadata, data) == DENIED
        assert server.code_as(Role.FIT, path, data) == OK


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[token]", "is not TOML"),
        ("[other]\n", "only .*token.* entries"),
        ("[[token]]\nname = 3\n", "entry 1: name must be"),
        (f"{entry('a b', 't')}", "entry 1: name must be"),
        (f"{entry('a', 't')}{entry('a', 'u')}", "'a' has the name of another entry"),
        (f"{entry('a', 't')}{entry('b', 't')}", "has the sha256 of another entry"),
        (entry("a", "t", 'secret = "x"'), "'a': unknown key secret"),
        (entry("a", "t", "expires = 2027-01-01"), "'a': expires must be a time with its zone"),
        (entry("a", "t", "models = []"), "'a': models must be a list of globs"),
        (entry("a", "t").replace('["infer"]', '["all"]'), "'a': roles must be a list of some of infer, label"),
        (entry("a", "t").replace('["infer"]', "[]"), "'a': roles must be"),
        ('[[token]]\nname = "a"\nsha256 = "abc"\nroles = ["infer"]\n', "'a': sha256 must be 64 hex"),
    ],
)
def test_a_token_file_with_anything_wrong_is_refused_by_the_entrys_name(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "tokens.toml").write_text(text)
    with pytest.raises(Refused, match=message) as caught:
        TokenFile(tmp_path / "tokens.toml")
    assert hashlib.sha256(b"t").hexdigest() not in caught.value.message


def test_a_token_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens.toml").write_text(entry("a", "t"))
    (tmp_path / "tokens.toml").chmod(0o606)
    with pytest.raises(Refused, match="everybody may write it"):
        TokenFile(tmp_path / "tokens.toml")


def test_the_command_line_makes_lists_and_revokes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.toml"
    cli.main(["token", "add", str(file), "--name", "ci", "--roles", "infer,label", "--days", "90", "--models", "ml*"])
    token = capsys.readouterr().out.strip()
    found = TokenFile(file).find(token)
    assert found is not None
    assert (found.name, found.roles, found.models) == ("ci", {Role.INFER, Role.LABEL}, ("ml*",))
    assert found.expires is not None
    assert 89.9 < (found.expires.timestamp() - time.time()) / 86400 <= 90
    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in file.read_text()
    file.chmod(0o640)
    cli.main(["token", "add", str(file), "--name", "ops", "--roles", "operate"])
    assert file.stat().st_mode & 0o777 == 0o640
    capsys.readouterr()
    cli.main(["token", "list", str(file)])
    listed = capsys.readouterr().out
    assert "infer, label" in listed
    assert "never" in listed
    assert found.sha256 not in listed
    cli.main(["token", "revoke", str(file), "ci"])
    assert TokenFile(file).find(token) is None
    assert [left.name for left in tokens.read(file)] == ["ops"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["add", "FILE", "--name", "ops", "--roles", "infer"], "has the name of another entry"),
        (["add", "FILE", "--name", "new", "--roles", "admin"], "roles must be a list of some of"),
        (["add", "FILE", "--name", "new", "--roles", "infer", "--days", "0"], "days must be in 0..36500, got 0"),
        (["revoke", "FILE", "nobody"], "no token 'nobody'; there are: ops"),
        (["list", "MISSING"], "cannot be read: No such file"),
    ],
)
def test_a_token_command_that_cannot_be_done_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    file = tmp_path / "tokens.toml"
    tokens.add(file, "ops", ["operate"], ["*"], None)
    before = file.read_bytes()
    with pytest.raises(SystemExit) as caught:
        cli.main(["token", *(str(file) if a == "FILE" else a for a in arguments)])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
    assert file.read_bytes() == before
