"""What a stock client sees: tritonclient against the real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from calibrators.numerics import softmax
from tests.service import models
from tests.service.conftest import ECHO_TYPES, RunningServer

X, LOGITS, _ = models.labelled_rows(16, seed=5)


@pytest.fixture(scope="module")
def client(shared_server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(shared_server.address)
    yield client
    client.close()


def tensor(name: str, values: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def test_a_stock_client_finds_the_server_and_its_models_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mlp")
    assert client.is_model_ready("mlp", "1")
    assert client.get_server_metadata().name == "calserve"


def test_metadata_declares_the_models_own_outputs_and_then_ours(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("mlp")
    declared = [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 6])]
    assert declared == [
        ("scores", "FP32", [-1, 4]),
        ("probabilities", "FP32", [-1, 4]),
        ("confidence", "FP32", [-1]),
        ("label", "INT64", [-1]),
    ]
    assert list(metadata.versions) == ["1"]


def test_a_request_that_names_no_outputs_gets_all_that_metadata_declares(client: triton.InferenceServerClient) -> None:
    result = client.infer("mlp", [tensor("x", X)], request_id="seven")
    response = result.get_response()
    assert [output.name for output in response.outputs] == ["scores", "probabilities", "confidence", "label"]
    assert response.id == "seven"
    assert response.model_version == "1"
    assert response.parameters["calibrator_revision"].string_param == "none"
    assert response.parameters["provider"].string_param == "CPUExecutionProvider"


def test_without_a_calibrator_the_probabilities_are_the_models_own(client: triton.InferenceServerClient) -> None:
    result = client.infer("mlp", [tensor("x", X)])
    session = ort.InferenceSession(models.classifier().SerializeToString(), providers=["CPUExecutionProvider"])
    (own,) = session.run(None, {"x": X})
    np.testing.assert_array_equal(result.as_numpy("scores"), own)
    np.testing.assert_allclose(result.as_numpy("probabilities"), softmax(LOGITS), atol=2e-6)
    np.testing.assert_array_equal(result.as_numpy("confidence"), result.as_numpy("probabilities").max(axis=1))
    np.testing.assert_array_equal(result.as_numpy("label"), result.as_numpy("probabilities").argmax(axis=1))


def test_only_the_outputs_asked_for_come_back_in_the_order_asked(client: triton.InferenceServerClient) -> None:
    wanted = [triton.InferRequestedOutput(name) for name in ("label", "probabilities")]
    response = client.infer("mlp", [tensor("x", X)], outputs=wanted).get_response()
    assert [output.name for output in response.outputs] == ["label", "probabilities"]
    assert len(response.raw_output_contents) == 2


def test_a_single_score_becomes_two_classes(client: triton.InferenceServerClient) -> None:
    result = client.infer("binary", [tensor("x", X)])
    p, both = result.as_numpy("p"), result.as_numpy("probabilities")
    assert both.shape == (16, 2)
    np.testing.assert_allclose(both[:, 1], p[:, 0], atol=1e-6)


def test_a_models_own_output_with_a_reserved_name_is_served_beside_as_raw(client: triton.InferenceServerClient) -> None:
    assert [t.name for t in client.get_model_metadata("reserved").outputs][:2] == ["raw_probabilities", "probabilities"]
    result = client.infer("reserved", [tensor("x", X)])
    np.testing.assert_allclose(result.as_numpy("raw_probabilities"), result.as_numpy("probabilities"), atol=1e-6)


def test_a_model_that_is_no_classifier_is_served_as_it_is(client: triton.InferenceServerClient) -> None:
    result = client.infer("mean", [tensor("x", X)])
    assert [t.name for t in client.get_model_metadata("mean").outputs] == ["mean"]
    np.testing.assert_allclose(result.as_numpy("mean"), X.mean(axis=1), rtol=1e-6)


def test_an_empty_batch_gives_empty_outputs(client: triton.InferenceServerClient) -> None:
    result = client.infer("mlp", [tensor("x", np.empty((0, 6), np.float32))])
    assert result.as_numpy("probabilities").shape == (0, 4)


SAMPLES: dict[str, list[list[Any]]] = {
    "BOOL": [[True, False]],
    "FP16": [[1.5, -2.0]],
    "FP32": [[1.5, -2.0], [np.nan, 3.0]],
    "FP64": [[1.5, -2.0]],
    "BF16": [[1.5, -2.0]],
    "BYTES": [[b"", "caf\u00e9 \x00 \U0001f600".encode()]],
} | {f"{sign}INT{bits}": [[0, 2 ** (bits - (not sign)) - 1]] for sign in ("", "U") for bits in (8, 16, 32, 64)}


@pytest.mark.parametrize("datatype", sorted(ECHO_TYPES))
def test_every_datatype_goes_through_raw_and_unchanged(client: triton.InferenceServerClient, datatype: str) -> None:
    special = {"BYTES": object, "BF16": ml_dtypes.bfloat16, "BOOL": "bool", "FP16": "f2", "FP32": "f4", "FP64": "f8"}
    values = np.array(SAMPLES[datatype], dtype=special.get(datatype, datatype.lower()))
    result = client.infer(f"echo_{datatype}", [tensor("x", values, datatype)])
    np.testing.assert_array_equal(result.as_numpy("y"), values)


TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-32768, 32767]),
    "INT32": ("int_contents", [-5, 7]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [1.5, -2.0]),
    "FP64": ("fp64_contents", [1.5, -2.0]),
    "BYTES": ("bytes_contents", [b"a", b"\xc3\xa9"]),
}


@pytest.mark.parametrize("datatype", sorted(TYPED))
def test_typed_contents_are_answered_with_typed_contents(client: triton.InferenceServerClient, datatype: str) -> None:
    field, values = TYPED[datatype]
    request = service_pb2.ModelInferRequest(model_name=f"echo_{datatype}")
    made = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(made.contents, field).extend(values)
    response = client._client_stub.ModelInfer(request)
    assert not response.raw_output_contents
    assert list(getattr(response.outputs[0].contents, field)) == values


def test_a_server_error_reaches_tritonclient_with_code_and_text(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no model 'nobody'") as caught:
        client.infer("nobody", [tensor("x", X)])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
