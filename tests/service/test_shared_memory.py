"""System shared memory, as a stock tritonclient and its shared memory utility use it; and as an attacker might."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from tritonclient._plugin import InferenceServerClientPlugin
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, shared_memory

from service import errors
from service.rpc import tokens
from service.rpc.shared_memory import MAX_REGION_BYTES, MAX_REGIONS, OBJECTS, Regions
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_lifecycle import wait_for

PREFIX = "calserve_test_"
X = models.labelled_rows(5, seed=7)[0]
ROWS = X.nbytes
INVALID = "StatusCode.INVALID_ARGUMENT"


def subtract() -> object:
    """a FP32 [N, 2], b FP32 [N, 2] -> d = a - b: the order of the inputs shows in the answer."""
    return models.model(
        [helper.make_node("Sub", ["a", "b"], ["d"])],
        [(name, TensorProto.FLOAT, ["N", 2]) for name in "ab"],
        [("d", TensorProto.FLOAT, ["N", 2])],
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("shm") / "models"
    models.write(root, "mlp", models.classifier())
    models.write(root, "subtract", subtract())  # type: ignore[arg-type]
    models.write(root, "echo", models.echo(TensorProto.STRING))
    server = RunningServer(settings_for(root, shared_memory_prefix=PREFIX, shared_memory_bytes=1 << 20))
    yield server
    server.stop()


@pytest.fixture
def client(served: RunningServer) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(served.address)
    yield client
    client.unregister_system_shared_memory()
    client.close()


@pytest.fixture
def key() -> Iterator[str]:
    """The name of a shared memory object of 4096 bytes, all 0xFF."""
    name = f"{PREFIX}{secrets.token_hex(8)}"
    path = OBJECTS / name
    path.write_bytes(b"\xff" * 4096)
    yield name
    path.unlink()


def file_of(key: str) -> Path:
    return OBJECTS / key


def input_at(region: str, offset: int, values: np.ndarray, name: str = "x") -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), "FP32")
    made.set_shared_memory(region, values.nbytes, offset=offset)
    return made


def sent(values: np.ndarray, name: str = "x") -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), "FP32")
    made.set_data_from_numpy(values)
    return made


def output_at(region: str, offset: int, byte_size: int, name: str = "probabilities") -> triton.InferRequestedOutput:
    made = triton.InferRequestedOutput(name)
    made.set_shared_memory(region, byte_size, offset=offset)
    return made


def put(key: str, offset: int, data: bytes) -> None:
    with file_of(key).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status(), caught.value.message()


def test_the_stock_utility_goes_the_whole_round(client: triton.InferenceServerClient) -> None:
    name = f"{PREFIX}{secrets.token_hex(8)}"
    handle = shared_memory.create_shared_memory_region("rows", name, 2 * 4096)
    try:
        shared_memory.set_shared_memory_region(handle, [X])
        client.register_system_shared_memory("rows", name, 2 * 4096)
        wanted = [output_at("rows", 4096, 80), triton.InferRequestedOutput("label")]
        answer = client.infer("mlp", [input_at("rows", 0, X)], outputs=wanted)
        found = shared_memory.get_contents_as_numpy(handle, np.float32, [5, 4], offset=4096)
        expected = client.infer("mlp", [sent(X)])
        np.testing.assert_array_equal(found, expected.as_numpy("probabilities"))
        np.testing.assert_array_equal(answer.as_numpy("label"), expected.as_numpy("label"))
        output = answer.get_output("probabilities")
        assert (output.datatype, list(output.shape)) == ("FP32", [5, 4])
        assert output.parameters["shared_memory_region"].string_param == "rows"
        assert output.parameters["shared_memory_byte_size"].int64_param == 80
        assert output.parameters["shared_memory_offset"].int64_param == 4096
        assert answer.get_response().raw_output_contents[0] == b""
        client.unregister_system_shared_memory("rows")
        assert "no shared memory region 'rows'" in refusal(lambda: client.infer("mlp", [input_at("rows", 0, X)]))[1]
    finally:
        shared_memory.destroy_shared_memory_region(handle)


@pytest.mark.parametrize("shared", ["a", "b"])
def test_raw_contents_are_those_of_the_inputs_outside_shared_memory(
    client: triton.InferenceServerClient, key: str, shared: str
) -> None:
    values = {"a": np.full((3, 2), 5, np.float32), "b": np.arange(6, dtype=np.float32).reshape(3, 2)}
    put(key, 8, values[shared].tobytes())
    client.register_system_shared_memory("r", f"/{key}", 4088, offset=8)
    inputs = [input_at("r", 0, v, n) if n == shared else sent(v, n) for n, v in values.items()]
    np.testing.assert_array_equal(client.infer("subtract", inputs).as_numpy("d"), values["a"] - values["b"])


def test_strings_are_read_and_written_with_their_lengths(client: triton.InferenceServerClient, key: str) -> None:
    words = np.array([["a", "bee"], ["", "dromedary"]], dtype=object)
    data = serialize_byte_tensor(words).item()
    put(key, 0, data)
    client.register_system_shared_memory("r", key, 4096)
    tensor = triton.InferInput("x", [2, 2], "BYTES")
    tensor.set_shared_memory("r", len(data))
    client.infer("echo", [tensor], outputs=[output_at("r", 1000, 100, "y")])
    assert file_of(key).read_bytes()[1000:1101] == data + b"\xff" * (101 - len(data))


def test_a_request_that_comes_again_writes_again(client: triton.InferenceServerClient, key: str) -> None:
    """It is known by its bytes; what it wrote before must not stand for what it writes now."""
    client.register_system_shared_memory("r", key, 4096)
    for _ in range(3):
        put(key, 0, b"\xff" * 80)
        client.infer("mlp", [sent(X)], outputs=[output_at("r", 0, 80)])
        found = np.frombuffer(file_of(key).read_bytes()[:80], np.float32)
        np.testing.assert_allclose(found.reshape(5, 4).sum(axis=1), 1, rtol=1e-5)
    client.unregister_system_shared_memory("r")
    code, message = refusal(lambda: client.infer("mlp", [sent(X)], outputs=[output_at("r", 0, 80)]))
    assert (code, "no shared memory region 'r'" in message) == (INVALID, True)


def test_the_status_lists_what_is_registered(client: triton.InferenceServerClient, key: str) -> None:
    client.register_system_shared_memory("one", key, 100, offset=7)
    client.register_system_shared_memory("two", f"/{key}", 4096)
    regions = client.get_system_shared_memory_status().regions
    found = {name: (r.name, r.key, r.offset, r.byte_size) for name, r in regions.items()}
    assert found == {"one": ("one", key, 7, 100), "two": ("two", f"/{key}", 0, 4096)}
    assert list(client.get_system_shared_memory_status("one").regions) == ["one"]
    assert refusal(lambda: client.get_system_shared_memory_status("three"))[0] == "StatusCode.NOT_FOUND"
    client.unregister_system_shared_memory("three")
    client.unregister_system_shared_memory()
    assert not client.get_system_shared_memory_status().regions


REFUSED_REGISTRATIONS = {
    "another prefix": (("r", "other", 1, 0), INVALID, "a key is 'calserve_test_' and then"),
    "a path": (("r", PREFIX + "/../../etc/hostname", 1, 0), INVALID, "a key is"),
    "two slashes": (("r", "//" + PREFIX, 1, 0), INVALID, "a key is"),
    "a dot": (("r", PREFIX + ".", 1, 0), INVALID, "a key is"),
    "a long key": (("r", PREFIX + "a" * 500, 1, 0), INVALID, "a key is"),
    "nothing there": (("r", PREFIX + "nothing", 1, 0), "StatusCode.NOT_FOUND", "there is no shared memory object"),
    "no bytes": (("r", "KEY", 0, 0), INVALID, "a region has 1 to"),
    "more than the object": (("r", "KEY", 4096, 1), INVALID, "has 4096 bytes; 4096 from 1 on are not in it"),
    "offset that wraps": (("r", "KEY", 2, 2**64 - 1), INVALID, "are not in it"),
    "size that wraps": (("r", "KEY", 2**64 - 1, 2), INVALID, "a region has 1 to"),
    "too many bytes": (("r", "KEY", 1 << 21, 0), "StatusCode.RESOURCE_EXHAUSTED", "regions of 1048576 bytes together"),
    "no name": (("", "KEY", 1, 0), INVALID, "1 to 256 characters"),
    "a long name": (("r" * 257, "KEY", 1, 0), INVALID, "1 to 256 characters, got 257"),
}


@pytest.mark.parametrize("case", REFUSED_REGISTRATIONS)
def test_a_registration_that_cannot_be_is_refused(client: triton.InferenceServerClient, key: str, case: str) -> None:
    (name, asked, size, offset), code, text = REFUSED_REGISTRATIONS[case]
    wanted = key if asked == "KEY" else asked
    found, message = refusal(lambda: client.register_system_shared_memory(name, wanted, size, offset=offset))
    assert (found, text in message) == (code, True), message
    assert not client.get_system_shared_memory_status().regions


def test_a_name_is_registered_once(client: triton.InferenceServerClient, key: str) -> None:
    client.register_system_shared_memory("r", key, 1)
    found = refusal(lambda: client.register_system_shared_memory("r", key, 1))
    assert found[0] == "StatusCode.ALREADY_EXISTS"


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_a_plain_object_is_opened(client: triton.InferenceServerClient, key: str, kind: str) -> None:
    """A link would lead to files of the server's user, a pipe would hold the server up."""
    path = file_of(f"{key}_{kind}")
    {"link": lambda: path.symlink_to("/etc/hostname"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    try:
        found, message = refusal(lambda: client.register_system_shared_memory("r", path.name, 1))
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
    assert (found, "cannot be opened" in message or "not a plain object" in message) == (
        "StatusCode.FAILED_PRECONDITION",
        True,
    )


def with_parameters(tensor: triton.InferInput, **parameters: object) -> triton.InferInput:
    for name, value in parameters.items():
        field = {str: "string_param", int: "int64_param", bool: "bool_param"}[type(value)]
        setattr(tensor._get_tensor().parameters[f"shared_memory_{name}"], field, value)
    return tensor


REFUSED_INPUTS = {
    "no such region": (lambda: input_at("nowhere", 0, X), "no shared memory region 'nowhere' is registered"),
    "past its end": (lambda: input_at("r", 3000, X), "has 3000 bytes; 120 from 3000 on are not in it"),
    "offset below zero": (lambda: with_parameters(input_at("r", 0, X), offset=-8), "must be a whole number of 0 or more, got -8"),
    "size below zero": (lambda: with_parameters(input_at("r", 0, X), byte_size=-1), "must be a whole number of 0 or more, got -1"),
    "great offset": (lambda: with_parameters(input_at("r", 0, X), offset=2**63 - 1), "are not in it"),
    "too short": (lambda: with_parameters(input_at("r", 0, X), byte_size=119), "takes 120 bytes, got 119"),
    "too long": (lambda: with_parameters(input_at("r", 0, X), byte_size=121), "takes 120 bytes, got 121"),
    "a number as region": (lambda: with_parameters(input_at("r", 0, X), region=3), "'shared_memory_region' must be a string, got 3"),
    "a text as size": (lambda: with_parameters(input_at("r", 0, X), byte_size="120"), "must be a whole number of 0 or more, got '120'"),
    "true as offset": (lambda: with_parameters(input_at("r", 0, X), offset=True), "must be a whole number of 0 or more, got True"),
    "in both places": (lambda: with_parameters(sent(X), region="r", byte_size=120), "one entry for each of the 0 inputs outside shared memory, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_INPUTS)
def test_an_input_that_is_not_there_is_refused(client: triton.InferenceServerClient, key: str, case: str) -> None:
    make, text = REFUSED_INPUTS[case]
    client.register_system_shared_memory("r", key, 3000)
    put(key, 0, X.tobytes())
    found, message = refusal(lambda: client.infer("mlp", [make()]))
    assert (found, text in message) == (INVALID, True), message


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (lambda: output_at("r", 0, 79), "the output takes 80 bytes, shared memory region 'r' has 79 for it"),
        (lambda: output_at("r", 2999, 80), "are not in it"),
        (lambda: output_at("nowhere", 0, 80), "no shared memory region 'nowhere'"),
    ],
)
def test_an_output_that_does_not_fit_is_refused_and_nothing_is_written(
    client: triton.InferenceServerClient, key: str, wanted: Callable[[], triton.InferRequestedOutput], text: str
) -> None:
    client.register_system_shared_memory("r", key, 3000)
    found, message = refusal(lambda: client.infer("mlp", [sent(X)], outputs=[wanted()]))
    assert (found, text in message) == (INVALID, True), message
    assert file_of(key).read_bytes() == b"\xff" * 4096


def test_an_object_that_is_cut_short_later_is_a_refused_request_and_not_the_servers_end(
    client: triton.InferenceServerClient, key: str
) -> None:
    client.register_system_shared_memory("r", key, 4096)
    os.truncate(file_of(key), 100)
    for call in (
        lambda: client.infer("mlp", [input_at("r", 0, X)]),
        lambda: client.infer("mlp", [sent(X)], outputs=[output_at("r", 50, 80)]),
    ):
        found, message = refusal(call)
        assert (found, "is shorter than it was" in message) == (INVALID, True)
    assert file_of(key).stat().st_size == 100
    assert client.is_server_live()


def test_shared_memory_is_off_unless_the_operator_gives_a_prefix(shared_server: RunningServer, key: str) -> None:
    with triton.InferenceServerClient(shared_server.address) as client:
        for call in (
            lambda: client.register_system_shared_memory("r", key, 1),
            lambda: client.infer("mlp", [input_at("r", 0, X)]),
            lambda: client.infer("mlp", [sent(X)], outputs=[output_at("r", 0, 80)]),
        ):
            found, message = refusal(call)
            assert (found, "--shared-memory-prefix" in message) == (INVALID, True)
        assert not client.get_system_shared_memory_status().regions
        client.unregister_system_shared_memory()


def test_there_is_no_cuda_shared_memory(client: triton.InferenceServerClient) -> None:
    assert not client.get_cuda_shared_memory_status().regions
    client.unregister_cuda_shared_memory()
    found, message = refusal(lambda: client.register_cuda_shared_memory("r", b"AA==", 0, 1))
    assert (found, "CUDA shared memory is not supported" in message) == (INVALID, True)


def test_keys_may_begin_in_several_ways(key: str) -> None:
    regions = Regions(f"other,{PREFIX}", 10).of("")
    regions.register("r", key, 0, 1)
    with pytest.raises(errors.InvalidRequest, match=f"a key is 'other' or '{PREFIX}' and then"):
        regions.register("s", "neither", 0, 1)
    regions.unregister()
    assert not Regions(",", 10).allowed


def test_regions_are_bounded_in_number_and_leave_no_descriptors_behind(key: str) -> None:
    regions = Regions(PREFIX, MAX_REGION_BYTES).of("")
    for number in range(MAX_REGIONS):
        regions.register(str(number), key, 0, 1)
    with pytest.raises(errors.Overloaded, match=f"at most {MAX_REGIONS} regions"):
        regions.register("one more", key, 0, 1)
    assert str(file_of(key)) in {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    regions.unregister()
    with pytest.raises(errors.InvalidRequest):
        regions.register("r", key, 4096, 1)
    with pytest.raises(errors.NotFound):
        regions.register("r", PREFIX + "nothing", 0, 1)
    assert str(file_of(key)) not in {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}


class TokenClient(triton.InferenceServerClient):
    """The stock client with a bearer token in every call."""

    def __init__(self, address: str, token: str) -> None:
        super().__init__(address)
        self.register_plugin(BearerToken(token))


class BearerToken(InferenceServerClientPlugin):  # type: ignore[misc]  # tritonclient ships no types
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> None:
        request.headers["authorization"] = f"Bearer {self._token}"


@pytest.fixture
def two_tokens(tmp_path: Path) -> Iterator[tuple[RunningServer, TokenClient, TokenClient]]:
    models.write(tmp_path / "models", "mlp", models.classifier())
    file = tmp_path / "tokens.toml"
    made = [tokens.add(file, name, ["infer"], ["*"], None) for name in ("one", "other")]
    server = RunningServer(settings_for(tmp_path / "models", token_file=file, shared_memory_prefix=PREFIX))
    one, other = (TokenClient(server.address, token) for token in made)
    yield server, one, other
    one.close()
    other.close()
    server.stop()


def test_a_region_is_its_tokens_own(two_tokens: tuple[RunningServer, TokenClient, TokenClient], key: str) -> None:
    _, one, other = two_tokens
    put(key, 0, X.tobytes())
    one.register_system_shared_memory("r", key, 4096)
    assert one.infer("mlp", [input_at("r", 0, X)]).as_numpy("label").shape == (5,)
    for call in (
        lambda: other.infer("mlp", [input_at("r", 0, X)]),
        lambda: other.infer("mlp", [sent(X)], outputs=[output_at("r", 0, 80)]),
    ):
        found, message = refusal(call)
        assert (found, "no shared memory region 'r' is registered" in message) == (INVALID, True)
    assert not other.get_system_shared_memory_status().regions
    other.unregister_system_shared_memory()
    assert list(one.get_system_shared_memory_status().regions) == ["r"]


def test_an_object_is_its_tokens_own_while_it_is_registered(
    two_tokens: tuple[RunningServer, TokenClient, TokenClient], key: str
) -> None:
    _, one, other = two_tokens
    one.register_system_shared_memory("r", key, 4096)
    one.register_system_shared_memory("again", f"/{key}", 4096)
    link = file_of(f"{key}_link")
    link.hardlink_to(file_of(key))
    try:
        for name in (key, link.name):
            found, message = refusal(lambda name=name: other.register_system_shared_memory("mine", name, 10))
            assert (found, "in use by another token" in message) == ("StatusCode.FAILED_PRECONDITION", True)
    finally:
        link.unlink()
    one.unregister_system_shared_memory()
    other.register_system_shared_memory("r", key, 10)
    assert list(other.get_system_shared_memory_status().regions) == ["r"]


def test_what_a_revoked_token_registered_is_let_go(
    two_tokens: tuple[RunningServer, TokenClient, TokenClient], key: str, tmp_path: Path
) -> None:
    _, one, other = two_tokens
    one.register_system_shared_memory("r", key, 4096)
    tokens.revoke(tmp_path / "tokens.toml", "one")

    def other_may_have_it() -> bool:
        try:
            other.register_system_shared_memory("r", key, 4096)
        except InferenceServerException as refused:
            assert refused.status() == "StatusCode.FAILED_PRECONDITION"
            return False
        return True

    assert wait_for(other_may_have_it)
