"""Triton's extensions as a stock tritonclient uses them: streams, configuration, statistics, the index, classes."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X = models.labelled_rows(40, seed=5)[0]
LABELS = {"labels_txt": "ant\nbee\ncat\ndog\n", "calserve_toml": 'labels = "labels.txt"\n'}


def tensor(values: np.ndarray) -> triton.InferInput:
    made = triton.InferInput("x", list(values.shape), "FP32")
    made.set_data_from_numpy(values)
    return made


@pytest.fixture
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(server.address)
    yield client
    client.close()


def answers_of(
    client: triton.InferenceServerClient, requests: list[tuple[str, np.ndarray]], **parameters: object
) -> list[object]:
    """What the callback of a stream gets: results and errors."""
    found: queue.Queue[object] = queue.Queue()
    client.start_stream(lambda result, error: found.put(error or result))
    for number, (name, values) in enumerate(requests):
        client.async_stream_infer(name, [tensor(values)], request_id=str(number), **parameters)
    answers = [found.get(timeout=30) for _ in requests]
    client.stop_stream()
    return answers


def test_a_stream_answers_in_order_and_an_error_does_not_end_it(client: triton.InferenceServerClient) -> None:
    requests = [("mlp" if number % 5 else "nobody", X[number : number + 1]) for number in range(30)]
    for number, answer in enumerate(answers_of(client, requests)):
        if number % 5:
            assert isinstance(answer, triton.InferResult)
            assert answer.get_response().id == str(number)
            expected = client.infer("mlp", [tensor(X[number : number + 1])]).as_numpy("probabilities")
            np.testing.assert_array_equal(answer.as_numpy("probabilities"), expected)
        else:
            assert isinstance(answer, InferenceServerException)
            assert "no model 'nobody'" in str(answer)


def test_the_final_response_is_marked_for_who_asks(client: triton.InferenceServerClient) -> None:
    (answer,) = answers_of(client, [("mlp", X[:1])], enable_empty_final_response=True)
    assert answer.get_response().parameters["triton_final_response"].bool_param


def test_the_configuration_is_what_the_file_says_completed_from_the_model(tmp_path: Path) -> None:
    config = 'max_batch_size: 8 dynamic_batching { preferred_batch_size: [4] } parameters { key: "a" value: { string_value: "b" } }'
    models.write(tmp_path / "models", "mlp", models.classifier(), config_pbtxt=config)
    server = RunningServer(settings_for(tmp_path / "models"))
    client = triton.InferenceServerClient(server.address)
    found = client.get_model_config("mlp").config
    client.close()
    server.stop()
    assert (found.name, found.platform, found.max_batch_size) == ("mlp", "onnxruntime_onnx", 8)
    assert [(t.name, list(t.dims)) for t in found.input] == [("x", [6])]
    assert [(t.name, list(t.dims)) for t in found.output] == [
        ("scores", [4]),
        ("probabilities", [4]),
        ("confidence", []),
        ("label", []),
    ]
    assert found.dynamic_batching.preferred_batch_size == [4]
    assert found.parameters["a"].string_value == "b"


def test_without_a_file_the_dims_hold_the_batch(client: triton.InferenceServerClient) -> None:
    found = client.get_model_config("mlp").config
    assert found.max_batch_size == 0
    assert [(t.name, list(t.dims)) for t in found.input] == [("x", [-1, 6])]


def test_statistics_count_rows_requests_runs_and_refusals(client: triton.InferenceServerClient) -> None:
    for rows in (1, 4, 4):
        client.infer("mlp", [tensor(X[:rows])])
    with pytest.raises(InferenceServerException):
        client.infer("mlp", [tensor(X[:2, :5])])
    (found,) = client.get_inference_statistics("mlp").model_stats
    assert (found.name, found.version) == ("mlp", "1")
    assert (found.inference_count, found.execution_count) == (9, 3)
    assert (found.inference_stats.success.count, found.inference_stats.fail.count) == (3, 1)
    assert [(batch.batch_size, batch.compute_infer.count) for batch in found.batch_stats] == [(1, 1), (4, 2)]
    assert found.inference_stats.success.ns > found.inference_stats.compute_infer.ns > 0
    counts = {getattr(found.inference_stats, f"compute_{part}").count for part in ("input", "infer", "output")}
    assert len(counts) == 1, "perf_analyzer ends itself where these differ"
    assert found.last_inference > 1_700_000_000_000
    assert len(client.get_inference_statistics().model_stats) == 1
    with pytest.raises(InferenceServerException, match="no model"):
        client.get_inference_statistics("nobody")


def test_the_index_names_what_serves_and_why_others_do_not(tmp_path: Path) -> None:
    root = tmp_path / "models"
    models.write(root, "mlp", models.classifier())
    (root / "broken" / "1").mkdir(parents=True)
    server = RunningServer(settings_for(root))
    client = triton.InferenceServerClient(server.address)
    found = {m.name: (m.state, m.reason) for m in client.get_model_repository_index().models}
    client.close()
    server.stop()
    assert found["mlp"] == ("READY", "")
    assert found["broken"][0] == "UNAVAILABLE"
    assert "has no file 'model.onnx'" in found["broken"][1]


@pytest.mark.parametrize("k", [1, 3, 9])
def test_classes_come_by_value_with_their_names(tmp_path: Path, k: int) -> None:
    models.write(tmp_path / "models", "mlp", models.classifier(), **LABELS)
    server = RunningServer(settings_for(tmp_path / "models"))
    client = triton.InferenceServerClient(server.address)
    wanted = [triton.InferRequestedOutput("probabilities", class_count=k), triton.InferRequestedOutput("label")]
    result = client.infer("mlp", [tensor(X[:3])], outputs=wanted)
    probabilities = client.infer("mlp", [tensor(X[:3])]).as_numpy("probabilities")
    client.close()
    server.stop()
    names = ("ant", "bee", "cat", "dog")
    order = np.argsort(-probabilities, axis=1)[:, :k]
    expected = [
        [f"{probabilities[row, i]:f}:{i}:{names[i]}".encode() for i in indices] for row, indices in enumerate(order)
    ]
    assert result.as_numpy("probabilities").tolist() == expected
    assert result.get_output("probabilities").datatype == "BYTES"


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, set()),
        ({"model_control": "explicit"}, {"model_repository"}),
        ({"model_control": "poll"}, set()),
        ({"shared_memory_prefix": "calserve_"}, {"system_shared_memory"}),
    ],
)
def test_the_server_advertises_what_works_and_nothing_else(
    root: Path, settings: dict[str, str], more: set[str]
) -> None:
    server = RunningServer(settings_for(root, **settings))
    client = triton.InferenceServerClient(server.address)
    found = client.get_server_metadata().extensions
    client.close()
    server.stop()
    assert set(found) == {"classification", "model_configuration", "statistics", "logging"} | more


@pytest.fixture
def level() -> Iterator[None]:
    """Puts the level of the server's log back: it is the process's."""
    before = logging.getLogger("service").level
    yield
    logging.getLogger("service").setLevel(before)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    return str(caught.value.message())


@pytest.mark.parametrize(
    ("change", "becomes"),
    [
        ({"log_verbose_level": 1}, logging.DEBUG),
        ({"log_info": False}, logging.WARNING),
        ({"log_info": False, "log_warning": False}, logging.ERROR),
        ({"log_info": False, "log_warning": False, "log_error": False}, logging.CRITICAL),
        ({"log_file": "", "log_format": "default"}, logging.INFO),
    ],
)
def test_log_settings_are_the_level_of_the_servers_log(
    client: triton.InferenceServerClient, level: None, change: dict[str, object], becomes: int
) -> None:
    logging.getLogger("service").setLevel(logging.INFO)
    now = {"log_verbose_level": 0, "log_info": True, "log_warning": True, "log_error": True}
    now |= {"log_file": "", "log_format": "default"}
    assert log_settings(client.get_log_settings()) == now
    assert log_settings(client.update_log_settings(change)) == now | change
    assert logging.getLogger("service.app").getEffectiveLevel() == becomes


def log_settings(response: object) -> dict[str, object]:
    settings = response.settings  # type: ignore[attr-defined]
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in settings.items()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"log_file": "server.log"}, "log setting 'log_file' is '' and cannot be changed to 'server.log'"),
        ({"log_format": "ISO8601"}, "log setting 'log_format' is 'default'"),
        ({"log_error": False}, "a level of the log brings with it those above it"),
        ({"log_error": None}, "log setting 'log_error' wants a value in bool_param, got None"),
        ({"log_colour": True}, "unknown log setting 'log_colour'"),
    ],
)
def test_a_log_setting_that_cannot_be_is_refused_and_none_is_changed(
    client: triton.InferenceServerClient, level: None, change: dict[str, object], text: str
) -> None:
    logging.getLogger("service").setLevel(logging.INFO)
    assert text in refusal(lambda: client.update_log_settings({"log_verbose_level": 1} | change))
    assert logging.getLogger("service").level == logging.INFO


def test_tracing_is_told_to_be_off_and_cannot_be_switched_on(client: triton.InferenceServerClient) -> None:
    for response in (
        client.get_trace_settings(),
        client.get_trace_settings("mlp"),
        client.update_trace_settings(settings={"trace_level": "OFF", "trace_rate": None}),
    ):
        assert {name: list(setting.value) for name, setting in response.settings.items()} == {"trace_level": ["OFF"]}
    for change in ({"trace_level": ["TIMESTAMPS"]}, {"trace_rate": "1"}):
        assert f"trace setting '{next(iter(change))}'" in refusal(
            lambda c=change: client.update_trace_settings(settings=c)
        )
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.get_trace_settings("nobody")
