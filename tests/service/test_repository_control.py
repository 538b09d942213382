"""Models that come, change and go while the server runs, as a stock tritonclient asks for it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from service.client import Client
from service.inference.repository import ModelFolder
from service.inference.run_costs import Costs
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X, LOGITS, LABELS = models.labelled_rows(300, seed=3)
INVALID, NOT_FOUND, REFUSED, UNAVAILABLE = (
    f"StatusCode.{code}" for code in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNAVAILABLE")
)


def tensor(values: np.ndarray) -> triton.InferInput:
    made = triton.InferInput("x", list(values.shape), "FP32")
    made.set_data_from_numpy(values)
    return made


@contextmanager
def serving(root: Path, **settings: object) -> Iterator[tuple[RunningServer, triton.InferenceServerClient]]:
    server = RunningServer(settings_for(root, **settings))
    client = triton.InferenceServerClient(server.address)
    try:
        yield server, client
    finally:
        client.close()
        server.stop()


@pytest.fixture
def explicit(root: Path) -> Iterator[tuple[RunningServer, triton.InferenceServerClient]]:
    with serving(root, model_control="explicit", load_model="*") as both:
        yield both


def replace(root: Path, proto: onnx.ModelProto, name: str = "mlp", version: int = 1) -> None:
    """Put another model in the place of one, whole."""
    file = root / name / str(version) / "model.onnx"
    file.with_name("next").write_bytes(proto.SerializeToString())
    file.with_name("next").rename(file)


def refusal(call: object, *arguments: object, **keywords: object) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **keywords)  # type: ignore[operator]
    return caught.value.status(), caught.value.message()


def index(client: triton.InferenceServerClient) -> dict[str, tuple[str, str]]:
    return {m.name: (m.state, m.reason) for m in client.get_model_repository_index().models}


def health(server: RunningServer, service: str) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def probabilities(client: triton.InferenceServerClient, name: str = "mlp", version: str = "") -> np.ndarray:
    return client.infer(name, [tensor(X[:5])], model_version=version).as_numpy("probabilities")


def revision_of(client: triton.InferenceServerClient, version: str = "") -> str:
    answer = client.infer("mlp", [tensor(X[:1])], model_version=version).get_response()
    return answer.parameters["calibrator_revision"].string_param


class Hammer:
    """Callers that never pause: unary calls, one naming a revision, and a stream. Collects answers and errors."""

    def __init__(self, address: str, revision: str) -> None:
        self._address, self._revision, self._stop = address, revision, threading.Event()
        self.answers: list[np.ndarray] = []
        self.errors: list[Exception] = []

    def __enter__(self) -> Hammer:
        self._threads = [threading.Thread(target=work) for work in (self._unary, self._naming, self._stream)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Return when this many more answers or errors have come."""
        wanted = len(self.answers) + len(self.errors) + more
        while len(self.answers) + len(self.errors) < wanted:
            self._stop.wait(0.001)

    def _unary(self, **keywords: object) -> None:
        client = triton.InferenceServerClient(self._address)
        while not self._stop.is_set():
            try:
                self.answers.append(client.infer("mlp", [tensor(X[:5])], **keywords).as_numpy("probabilities"))
            except Exception as error:
                self.errors.append(error)
        client.close()

    def _naming(self) -> None:
        self._unary(parameters={"calibrator": self._revision})

    def _stream(self) -> None:
        client = triton.InferenceServerClient(self._address)
        room = threading.Semaphore(16)

        def answered(result: triton.InferResult | None, error: Exception | None) -> None:
            room.release()
            if error is not None:
                self.errors.append(error)
            else:
                assert result is not None
                self.answers.append(result.as_numpy("probabilities"))

        client.start_stream(answered)
        while not self._stop.is_set():
            room.acquire()
            client.async_stream_infer("mlp", [tensor(X[:5])])
        client.stop_stream()
        client.close()


def test_five_reloads_under_load_fail_no_request(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = explicit
    contents = [models.classifier(seed=seed) for seed in (0, 10)]
    expected = []
    for proto in contents[::-1]:
        replace(root, proto)
        client.load_model("mlp")
        expected.append(probabilities(client))
    others = {thread for thread in threading.enumerate() if thread.name == "model mlp/1"}  # of other servers
    with Hammer(server.address, "none") as hammer:
        for number in range(5):
            hammer.wait_for(100)
            replace(root, contents[(number + 1) % 2])
            client.load_model("mlp")
            np.testing.assert_array_equal(probabilities(client), expected[number % 2])
        hammer.wait_for(100)
    assert hammer.errors == []
    assert all(any(np.array_equal(answer, one) for one in expected) for answer in hammer.answers)
    server._run(server.app._loading.settle(60))
    others.add(server.app.repository.get("mlp").batcher._thread)
    for thread in {thread for thread in threading.enumerate() if thread.name == "model mlp/1"} - others:
        thread.join(60)
        assert not thread.is_alive()


def test_a_request_that_waits_for_its_revision_is_answered_by_the_model_it_began_with(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is being made ready when the model is loaded again: that model stays until the request has it."""
    server, client = explicit
    with Client(server.address, show_progress=False) as ours:
        revision = ours.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision
    begun, go_on = threading.Event(), threading.Event()
    prove = server.app._revisions._prove

    def held_up(*arguments: object) -> object:
        begun.set()
        assert go_on.wait(60)
        return prove(*arguments)

    monkeypatch.setattr(server.app._revisions, "_prove", held_up)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.infer, "mlp", [tensor(X[:5])], parameters={"calibrator": revision})
        assert begun.wait(60)
        replace(root, models.classifier(seed=10))
        with triton.InferenceServerClient(server.address) as other:
            other.load_model("mlp")
        go_on.set()
        answer = asked.result()
    assert answer.get_response().parameters["calibrator_revision"].string_param == revision


def test_what_was_active_is_active_after_a_reload_of_the_same_file_and_of_no_other(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = explicit
    with Client(server.address, show_progress=False) as ours:
        revision = ours.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision
        ours.activate("mlp", revision)
    calibrated = probabilities(client)
    for proto, active in (
        (models.classifier(), revision),
        (models.classifier(seed=10), "none"),
        (models.classifier(), revision),
    ):
        replace(root, proto)
        client.load_model("mlp")
        assert revision_of(client) == active
    np.testing.assert_array_equal(probabilities(client), calibrated)


def test_a_model_that_cannot_be_loaded_again_goes_on_serving_and_the_index_says_why(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = explicit
    before, generation = probabilities(client), server.app.repository.generation
    (root / "mlp" / "1" / "model.onnx").write_bytes(b"torn")
    code, message = refusal(client.load_model, "mlp")
    assert (code, "not an ONNX file" in message) == (REFUSED, True)
    np.testing.assert_array_equal(probabilities(client), before)
    state, reason = index(client)["mlp"]
    assert state == "READY"
    assert "serves what was loaded before: model.onnx" in reason
    assert server.app.repository.generation == generation
    assert health(server, "mlp")
    assert client.is_server_ready()
    replace(root, models.classifier(seed=10))
    client.load_model("mlp")
    assert index(client)["mlp"] == ("READY", "")


def test_a_damaged_revision_keeps_the_model_from_being_swapped(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = explicit
    with Client(server.address, show_progress=False) as ours:
        revision = ours.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
        ours.activate("mlp", revision.revision)
    for blob in (p for p in server.app.settings.store.joinpath("blobs").rglob("*") if p.is_file()):
        blob.write_bytes(b"rust")
    assert "its active revision cannot be served" in refusal(client.load_model, "mlp")[1]
    assert revision_of(client) == revision.revision


def test_a_new_folder_is_loaded_and_unloaded_by_request(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = explicit
    models.write(root, "late", models.classifier(seed=5))
    assert index(client)["late"] == ("UNAVAILABLE", "it is not loaded")
    assert refusal(client.infer, "late", [tensor(X[:1])])[0] == NOT_FOUND
    generations = [server.app.repository.generation]
    client.load_model("late")
    generations.append(server.app.repository.generation)
    assert probabilities(client, "late").shape == (5, 4)
    assert health(server, "late")
    client.unload_model("late")
    generations.append(server.app.repository.generation)
    assert len({*generations}) == 3
    assert refusal(client.infer, "late", [tensor(X[:1])])[0] == UNAVAILABLE
    assert not client.is_model_ready("late")
    assert index(client)["late"] == ("UNAVAILABLE", "it was unloaded")
    assert not health(server, "late")
    assert client.is_server_ready()
    client.load_model("late")
    assert client.is_model_ready("late")


def test_a_model_that_never_loaded_makes_the_server_unready_until_it_is_mended_or_unloaded(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    _, client = explicit
    (root / "broken" / "1").mkdir(parents=True)
    assert refusal(client.load_model, "broken")[0] == REFUSED
    assert not client.is_server_ready()
    client.unload_model("broken")
    assert client.is_server_ready()


@pytest.mark.parametrize("leave", ["unload_model", "load_model"])
def test_requests_in_flight_are_answered_when_their_model_leaves(
    explicit: tuple[RunningServer, triton.InferenceServerClient],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    leave: str,
) -> None:
    server, client = explicit
    running, go_on = threading.Event(), threading.Event()
    batcher = server.app.repository.get("mlp").batcher
    execute = batcher._execute

    def held_up(*arguments: object) -> object:
        running.set()
        assert go_on.wait(60)
        return execute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(batcher, "_execute", held_up)
    monkeypatch.setattr(batcher, "costs", Costs())  # a run of unknown cost is made in the model's thread
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(client.infer, "mlp", [tensor(X[:5])])]
        assert running.wait(60)
        asked += [pool.submit(client.infer, "mlp", [tensor(X[:5])]) for _ in range(2)]  # they wait for the first
        with triton.InferenceServerClient(server.address) as other:
            while batcher.queued < 2:
                other.is_server_live()
            getattr(other, leave)("mlp")
        go_on.set()
        assert [answer.result().as_numpy("probabilities").shape for answer in asked] == [(5, 4)] * 3


def test_only_the_models_named_are_loaded_at_start(root: Path) -> None:
    models.write(root, "second", models.classifier(seed=1))
    models.write(root, "third", models.classifier(seed=2))
    with serving(root, model_control="explicit", load_model="mlp, second, nobody") as (_, client):
        assert {name for name, (state, _) in index(client).items() if state == "READY"} == {"mlp", "second"}
        assert index(client)["third"] == ("UNAVAILABLE", "it is not loaded")
        assert "no model 'nobody'" in index(client)["nobody"][1]
        assert not client.is_server_ready()
    with serving(root, model_control="explicit") as (_, client):
        assert client.is_server_ready()
        assert [m.state for m in client.get_model_repository_index().models] == ["UNAVAILABLE"] * 3


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_without_explicit_control_models_are_not_loaded_by_request(root: Path, mode: str) -> None:
    with serving(root, model_control=mode) as (_, client):
        for call in (client.load_model, client.unload_model):
            code, message = refusal(call, "mlp")
            assert code == REFUSED
            assert f"this server runs with {mode}" in message
        assert "model_repository" not in client.get_server_metadata().extensions


def test_a_configuration_sent_with_a_load_stands_in_for_the_file_until_the_next_load(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    _, client = explicit
    models.write(root, "mlp", models.classifier(seed=10), version=2)
    client.load_model("mlp", config=json.dumps({"version_policy": {"all": {}}, "max_batch_size": 4}))
    assert list(client.get_model_metadata("mlp").versions) == ["1", "2"]
    assert client.get_model_config("mlp").config.max_batch_size == 4
    client.load_model("mlp")
    assert list(client.get_model_metadata("mlp").versions) == ["2"]
    assert probabilities(client).shape == (5, 4)


def test_the_configuration_that_was_answered_can_be_sent_back(
    explicit: tuple[RunningServer, triton.InferenceServerClient],
) -> None:
    _, client = explicit
    answered = client.get_model_config("mlp", as_json=True)["config"]
    client.load_model("mlp", config=json.dumps(answered))
    assert client.get_model_config("mlp", as_json=True)["config"] == answered


@pytest.mark.parametrize(
    ("name", "keywords", "code", "text"),
    [
        ("nobody", {}, NOT_FOUND, "no model 'nobody' in the repository"),
        ("../mlp", {}, INVALID, "'../mlp' is no name of a model"),
        ("", {}, INVALID, "'' is no name of a model"),
        ("mlp", {"config": "{"}, INVALID, "'config' is no ModelConfig as JSON"),
        ("mlp", {"config": "[" * 100_000}, INVALID, "'config' is no ModelConfig as JSON"),
        ("mlp", {"config": '{"max_batch": 1}'}, INVALID, "max_batch"),
        ("mlp", {"config": '{"name": "cnn"}'}, REFUSED, "names another model, 'cnn'"),
        ("mlp", {"config": '{"max_batch_size": -1}'}, REFUSED, "max_batch_size must be 0 or more"),
        ("mlp", {"config": '{"version_policy": {"specific": {"versions": [7]}}}'}, REFUSED, r"found [1]"),
        (
            "mlp",
            {"config": "{}", "files": {"file:1/model.onnx": b"x"}},
            INVALID,
            "files come from the model repository",
        ),
        ("mlp", {"files": {"priority": b"x"}}, INVALID, "unknown parameter 'priority' of a load"),
    ],
)
def test_a_load_that_cannot_be_is_refused_and_changes_nothing(
    explicit: tuple[RunningServer, triton.InferenceServerClient],
    name: str,
    keywords: dict[str, object],
    code: str,
    text: str,
) -> None:
    server, client = explicit
    generation = server.app.repository.generation
    found, message = refusal(client.load_model, name, **keywords)
    assert (found, text in message) == (code, True), message
    assert server.app.repository.generation == generation
    assert probabilities(client).shape == (5, 4)
    assert set(index(client)) == {"mlp"}


def test_unloading_what_is_not_there_is_not_found(
    explicit: tuple[RunningServer, triton.InferenceServerClient],
) -> None:
    _, client = explicit
    assert refusal(client.unload_model, "nobody")[0] == NOT_FOUND
    client.unload_model("mlp", unload_dependents=True)
    client.unload_model("mlp")


def test_files_that_change_while_they_are_read_are_not_served(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = explicit
    before, read_model = probabilities(client), ModelFolder.read_model

    def written_to(folder: ModelFolder, version: str) -> object:
        found = read_model(folder, version)
        replace(root, models.classifier(seed=10))
        return found

    monkeypatch.setattr(ModelFolder, "read_model", written_to)
    assert refusal(client.load_model, "mlp") == (
        "StatusCode.ABORTED",
        "the files of model 'mlp' changed while they were read; load it again",
    )
    np.testing.assert_array_equal(probabilities(client), before)


# --- Polling. The test looks when it wants to; the server's own next look is an hour away. ----------------------------


@pytest.fixture
def polled(root: Path) -> Iterator[tuple[RunningServer, triton.InferenceServerClient]]:
    with serving(root, model_control="poll", poll_seconds=3600.0) as both:
        yield both


def look(server: RunningServer, times: int = 1) -> None:
    for _ in range(times):
        server._run(server.app._poll.look())


def test_a_changed_file_is_served_once_two_looks_found_it_the_same(
    polled: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = polled
    before = probabilities(client)
    replace(root, models.classifier(seed=10))
    look(server)
    np.testing.assert_array_equal(probabilities(client), before)
    look(server)
    assert not np.array_equal(probabilities(client), before)


def test_a_file_that_is_being_written_is_left_alone(
    polled: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = polled
    before, whole = probabilities(client), models.classifier(seed=10).SerializeToString()
    with (root / "mlp" / "1" / "model.onnx").open("wb", buffering=0) as file:
        for start in range(0, len(whole), 200):
            file.write(whole[start : start + 200])
            look(server)
            assert index(client)["mlp"] == ("READY", "")
            np.testing.assert_array_equal(probabilities(client), before)
    look(server)
    assert not np.array_equal(probabilities(client), before)


def test_a_change_of_the_same_size_at_the_same_time_is_seen(
    polled: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = polled
    file, before = root / "mlp" / "1" / "model.onnx", probabilities(client)
    was = file.stat()
    file.write_bytes(models.classifier(seed=10).SerializeToString())
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    now = file.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (was.st_ino, was.st_size, was.st_mtime_ns)
    look(server, times=2)
    assert not np.array_equal(probabilities(client), before)


def test_nothing_is_loaded_again_while_nothing_changes(
    polled: tuple[RunningServer, triton.InferenceServerClient],
) -> None:
    server, _ = polled
    generation = server.app.repository.generation
    look(server, times=3)
    assert server.app.repository.generation == generation


def test_new_folders_are_loaded_and_vanished_ones_unloaded(
    polled: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = polled
    models.write(root, "late", models.classifier(seed=5))
    look(server, times=2)
    assert probabilities(client, "late").shape == (5, 4)
    assert health(server, "late")
    (root / "late").rename(root.parent / "elsewhere")
    look(server)
    assert client.is_model_ready("late")
    look(server)
    assert refusal(client.infer, "late", [tensor(X[:1])])[0] == NOT_FOUND
    assert set(index(client)) == {"mlp"}
    assert not health(server, "late")


def test_a_broken_change_is_told_once_and_mended_when_the_files_are(
    polled: tuple[RunningServer, triton.InferenceServerClient], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = polled
    (root / "mlp" / "config.pbtxt").write_text("input [")
    look(server, times=4)
    assert caplog.text.count("model mlp cannot be loaded") == 1
    assert "config.pbtxt" in index(client)["mlp"][1]
    (root / "mlp" / "config.pbtxt").write_text("max_batch_size: 8")
    look(server, times=2)
    assert index(client)["mlp"] == ("READY", "")
    assert client.get_model_config("mlp").config.max_batch_size == 8


def test_a_repository_that_is_away_for_a_while_takes_nothing_away(
    polled: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = polled
    root.rename(root.with_name("away"))
    for _ in range(2):
        with pytest.raises(Exception, match="not a directory"):
            look(server)
    assert probabilities(client).shape == (5, 4)
    root.with_name("away").rename(root)
    generation = server.app.repository.generation
    look(server, times=2)
    assert server.app.repository.generation == generation


def test_the_server_looks_by_itself(root: Path) -> None:
    with serving(root, model_control="poll", poll_seconds=0.02) as (server, client):
        before = probabilities(client)
        replace(root, models.classifier(seed=10))
        with Hammer(server.address, "none") as hammer:
            while np.array_equal(probabilities(client), before):
                hammer.wait_for(1)
    assert hammer.errors == []


# --- Versions. -------------------------------------------------------------------------------------------------------


def test_versions_are_served_side_by_side_each_with_its_own_calibrator(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    server, client = explicit
    with Client(server.address, show_progress=False) as ours:
        revision = ours.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision
        ours.activate("mlp", revision)
    first = probabilities(client)
    models.write(root, "mlp", models.classifier(seed=10), version=2)
    (root / "mlp" / "config.pbtxt").write_text("version_policy { all {} }")
    client.load_model("mlp")
    assert list(client.get_model_metadata("mlp").versions) == ["1", "2"]
    assert (revision_of(client, "1"), revision_of(client, "2"), revision_of(client)) == (revision, "none", "none")
    np.testing.assert_array_equal(probabilities(client, version="1"), first)
    np.testing.assert_array_equal(probabilities(client, version="2"), probabilities(client))
    assert not np.array_equal(first, probabilities(client))
    named = {"parameters": {"calibrator": revision}, "model_version": "2"}
    code, message = refusal(client.infer, "mlp", [tensor(X[:1])], **named)
    assert (code, "was fitted on another file" in message) == (REFUSED, True)


def test_a_version_that_is_not_there_is_not_found_and_one_that_is_no_number_is_refused(
    explicit: tuple[RunningServer, triton.InferenceServerClient],
) -> None:
    _, client = explicit
    for call in (
        lambda v: client.infer("mlp", [tensor(X[:1])], model_version=v),
        lambda v: client.get_model_config("mlp", v),
    ):
        assert refusal(call, "2")[0] == NOT_FOUND
        assert {refusal(call, wrong)[0] for wrong in ("abc", "-1", "1abc", "0", "01")} == {INVALID}


def test_a_newer_version_takes_the_place_of_the_latest_and_the_named_old_one_is_gone(
    explicit: tuple[RunningServer, triton.InferenceServerClient], root: Path
) -> None:
    _, client = explicit
    models.write(root, "mlp", models.classifier(seed=10), version=12)
    client.load_model("mlp")
    answer = client.infer("mlp", [tensor(X[:1])]).get_response()
    assert answer.model_version == "12"
    code, message = refusal(client.infer, "mlp", [tensor(X[:1])], model_version="1")
    assert (code, "it has: 12" in message) == (NOT_FOUND, True)
