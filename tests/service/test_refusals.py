"""Every bad request: the right code, a text with field, wanted and got, and never an INTERNAL, a path or a traceback."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from calserve.open_inference import messages
from google.rpc import error_details_pb2, status_pb2

from service import errors
from service.rpc.status import CODES, DETAILS_KEY, status_of
from tests.service.conftest import RunningServer

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
Raw = Callable[..., bytes]


@pytest.fixture(scope="module")
def infer(shared_server: RunningServer) -> Iterator[Raw]:
    """ModelInfer, bytes in and bytes out."""
    with grpc.insecure_channel(shared_server.address) as channel:
        yield channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")


def request(**changes: object) -> messages.ModelInferRequest:
    """A good request to `mlp`, with changes: fields of the message, of its one input (`input_`), `raw`, `contents`."""
    values = {"model_name": "mlp", "name": "x", "datatype": "FP32", "shape": [1, 6], "raw": [bytes(24)], **changes}
    made = messages.ModelInferRequest(model_name=values["model_name"], model_version=values.get("version", ""))
    made.inputs.add(name=values["name"], datatype=values["datatype"], shape=values["shape"])
    made.raw_input_contents.extend(values["raw"])
    for output in values.get("outputs", ()):
        made.outputs.add(name=output)
    for field, items in values.get("contents", {}).items():
        getattr(made.inputs[0].contents, field).extend(items)
    return made


def with_parameter(key: str, field: str, value: object) -> messages.ModelInferRequest:
    made = request()
    setattr(made.parameters[key], field, value)
    return made


def with_output_parameter(key: str, output: str = "scores", value: int = 2) -> messages.ModelInferRequest:
    made = request(outputs=[output])
    made.outputs[0].parameters[key].int64_param = value
    return made


def twice() -> messages.ModelInferRequest:
    made = request()
    made.inputs.append(made.inputs[0])
    made.raw_input_contents.append(bytes(24))
    return made


NAN = np.array([[0, 1, np.nan, 0, 0, 0]], "<f4").tobytes()
CASES: dict[str, tuple[Callable[[], messages.ModelInferRequest], grpc.StatusCode, str]] = {
    "unknown model": (lambda: request(model_name="nobody"), NOT_FOUND, r"no model 'nobody'; there are: .*mlp"),
    "path as model": (lambda: request(model_name="../mlp"), NOT_FOUND, r"no model '../mlp'"),
    "unknown version": (lambda: request(version="9"), NOT_FOUND, r"has no version 9; it has: 1"),
    "version in letters": (lambda: request(version="1abc"), INVALID, r"positive number or empty, got '1abc'"),
    "negative version": (lambda: request(version="-1"), INVALID, r"positive number or empty, got '-1'"),
    "no inputs": (lambda: messages.ModelInferRequest(model_name="mlp"), INVALID, r"needs the inputs x"),
    "unknown input": (lambda: request(name="y"), INVALID, r"no input 'y'; it has: x"),
    "input twice": (twice, INVALID, r"'x' is given twice"),
    "wrong datatype": (lambda: request(datatype="FP64", raw=[bytes(48)]), INVALID, r"'x': datatype FP32 wanted, got 'FP64'"),
    "unknown datatype": (lambda: request(datatype="FP128"), INVALID, r"datatype FP32 wanted, got 'FP128'"),
    "wrong rank": (lambda: request(shape=[6]), INVALID, r"shape \[any, 6\] wanted, got \[6\]"),
    "wrong dimension": (lambda: request(shape=[1, 5], raw=[bytes(20)]), INVALID, r"dimension 1 must be 6, got 5"),
    "too few bytes": (lambda: request(raw=[bytes(23)]), INVALID, r"takes 24 bytes, got 23"),
    "too many bytes": (lambda: request(raw=[bytes(28)]), INVALID, r"takes 24 bytes, got 28"),
    "negative dimension": (lambda: request(shape=[-1, 6]), INVALID, r"dimension 0 must be in 0\.\.2147483648, got -1"),
    "batch of 2^62": (lambda: request(shape=[2**62, 6]), INVALID, r"dimension 0 must be in 0\.\.2147483648"),
    "batch of 2^31": (lambda: request(shape=[2**31, 6]), INVALID, r"takes 51539607552 bytes, got 24"),
    "rank 100": (lambda: request(shape=[1] * 100), INVALID, r"rank at most 8 wanted, got 100"),
    "two raws for one input": (lambda: request(raw=[bytes(24)] * 2), INVALID, r"one entry for each of the 1 inputs, got 2"),
    "raw and typed": (lambda: request(contents={"fp32_contents": [0] * 6}), INVALID, r"typed contents beside raw"),
    "typed in the wrong field": (
        lambda: request(raw=[], contents={"fp64_contents": [0] * 6}), INVALID, r"belongs in contents.fp32_contents"
    ),
    "typed in two fields": (
        lambda: request(raw=[], contents={"fp32_contents": [0] * 6, "int_contents": [1]}), INVALID, r"belongs in contents.fp32"
    ),
    "typed with too few": (lambda: request(raw=[], contents={"fp32_contents": [0] * 5}), INVALID, r"takes 6 elements, got 5"),
    "INT8 of 300": (
        lambda: request(model_name="echo_INT8", datatype="INT8", shape=[1, 2], raw=[], contents={"int_contents": [1, 300]}),
        INVALID, r"INT8 holds -128\.\.127, got 300",
    ),
    "typed FP16": (
        lambda: request(model_name="echo_FP16", datatype="FP16", shape=[1, 2], raw=[], contents={"fp32_contents": [1, 2]}),
        INVALID, r"FP16 travels only as raw_input_contents",
    ),
    "BOOL byte of 2": (
        lambda: request(model_name="echo_BOOL", datatype="BOOL", shape=[1, 2], raw=[b"\1\2"]), INVALID, r"must be 0 or 1"
    ),
    "BYTES without lengths": (
        lambda: request(model_name="echo_BYTES", datatype="BYTES", shape=[1, 2], raw=[b"abcdefghij"]), INVALID, r"4-byte little-endian length"
    ),
    "BYTES with a tail": (
        lambda: request(model_name="echo_BYTES", datatype="BYTES", shape=[1, 2], raw=[bytes(9)]), INVALID, r"the 9 bytes sent are not"
    ),
    "BYTES that are not UTF-8": (
        lambda: request(model_name="echo_BYTES", datatype="BYTES", shape=[1, 2], raw=[b"\1\0\0\0\xff\0\0\0\0"]), INVALID, r"'x': element 0 is not UTF-8"
    ),
    "unknown output": (lambda: request(outputs=["nope"]), INVALID, r"no output 'nope'; it has: scores, probabilities"),
    "a tensor inside": (lambda: request(outputs=["h"]), INVALID, r"no output 'h'"),
    "output twice": (lambda: request(outputs=["label", "label"]), INVALID, r"'label' is asked for twice"),
    "classes of a vector": (lambda: with_output_parameter("classification", "confidence"), INVALID, r"'confidence': classification wants numbers of shape"),
    "no classes": (lambda: with_output_parameter("classification", value=0), INVALID, r"'classification' must be a whole number of 1 or more, got 0"),
    "shared memory": (lambda: with_output_parameter("shared_memory_region"), INVALID, r"'shared_memory_region' must be a string, got 2"),
    "NaN": (lambda: request(raw=[NAN]), INVALID, r"'x' holds nan at index \[0, 2\]"),
    "unknown revision": (lambda: with_parameter("calibrator", "string_param", "platt-3"), NOT_FOUND, r"no revision 'platt-3'"),
    "calibrator not a string": (lambda: with_parameter("calibrator", "int64_param", 3), INVALID, r"must be a string"),
    "a name of 100 kB": (lambda: request(model_name="m" * 100_000), NOT_FOUND, r"no model 'm{199}\.\.\. \(100002 characters\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_request_is_refused_with_field_wanted_and_got(infer: Raw, case: str) -> None:
    make, code, text = CASES[case]
    with pytest.raises(grpc.RpcError) as caught:
        infer(make().SerializeToString())
    assert caught.value.code() == code, caught.value.details()
    details = caught.value.details()
    assert re.search(text, details), details
    assert "Traceback" not in details
    assert "onnxruntime" not in details


def test_after_all_of_these_a_good_request_still_works(infer: Raw) -> None:
    for make, _, _ in CASES.values():
        with pytest.raises(grpc.RpcError):
            infer(make().SerializeToString())
    answer = messages.ModelInferResponse.FromString(infer(request().SerializeToString()))
    assert len(answer.outputs) == 4


def test_bytes_that_are_no_message_are_an_invalid_argument(infer: Raw) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(b"\xff\xff\xff")
    assert caught.value.code() == INVALID
    assert "not a inference.ModelInferRequest" in caught.value.details()


def test_two_hundred_undecodable_messages_leave_the_connection_usable(infer: Raw) -> None:
    for _ in range(200):
        with pytest.raises(grpc.RpcError):
            infer(b"\xff")
    assert infer(request().SerializeToString())


def test_an_unknown_key_among_the_parameters_is_accepted(infer: Raw) -> None:
    assert infer(with_parameter("sequence_id", "int64_param", 7).SerializeToString())


def test_an_unknown_method_is_unimplemented(shared_server: RunningServer) -> None:
    with grpc.insecure_channel(shared_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_message_beyond_the_limit_is_refused_and_one_within_it_passes(shared_server: RunningServer) -> None:
    rows = 63 * 2**20 // 24
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(shared_server.address, options=options) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        good = request(shape=[rows, 6], raw=[bytes(24 * rows)], outputs=["label"])
        assert messages.ModelInferResponse.FromString(call(good.SerializeToString())).outputs[0].shape == [rows]
        with pytest.raises(grpc.RpcError) as caught:
            call(request(shape=[2 * rows, 6], raw=[bytes(48 * rows)]).SerializeToString())
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_every_error_class_has_a_code_and_only_overload_says_when_to_retry() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.CalserveError)]
    assert set(CODES) == set(classes) - {errors.CalserveError}
    for kind in CODES:
        status = status_of(kind("what, wanted, got"), "id")
        details = status_pb2.Status.FromString(status.details).details
        assert status.code == CODES[kind]
        info = error_details_pb2.ErrorInfo()
        assert details[0].Unpack(info)
        assert info.reason == kind.reason
        retry = [d for d in details if d.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
        assert bool(retry) == (kind is errors.Overloaded)


def test_an_unexpected_error_tells_its_id_and_nothing_else() -> None:
    status = status_of(RuntimeError("secret /etc/passwd"), "c0ffee")
    assert status.code == grpc.StatusCode.INTERNAL
    assert "c0ffee" in status.message
    assert "secret" not in status.message + status.details.decode("latin-1")


def test_the_reason_travels_in_the_trailer(infer: Raw) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(request(model_name="nobody").SerializeToString())
    trailers = dict(caught.value.trailing_metadata())
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(trailers[DETAILS_KEY]).details[0].Unpack(info)
    assert (info.reason, info.domain) == ("NOT_FOUND", "calserve")
