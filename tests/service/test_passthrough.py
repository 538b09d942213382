"""Models without a network: logits made elsewhere, calibrated as any other model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from service import cli, errors, passthrough
from service.client import Client
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

_, LOGITS, LABELS = models.labelled_rows(500, seed=2)
ROWS = LOGITS[:7].astype(np.float32)
LOG_P = scipy.special.log_softmax(ROWS, axis=1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Both kinds of passthrough models, as the command line writes them."""
    root = tmp_path_factory.mktemp("passthrough") / "models"
    root.mkdir()
    (root.parent / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    common = ("--classes", "4", "--model-repository", str(root))
    cli.main(["passthrough", "plain", *common, "--labels", str(root.parent / "names.txt")])
    cli.main(["passthrough", "logp", *common, "--log-probabilities"])
    server = RunningServer(settings_for(root))
    yield server
    server.stop()


@pytest.fixture
def client(served: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.address) as client:
        yield client


def infer(client: triton.InferenceServerClient, name: str, rows: np.ndarray, **keywords: object) -> triton.InferResult:
    tensor = triton.InferInput({"plain": "logits", "logp": "log_probabilities"}[name], list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows.astype(np.float32))
    return client.infer(name, [tensor], **keywords)


@pytest.mark.parametrize(("name", "sent"), [("plain", ROWS), ("logp", LOG_P)])
def test_without_a_calibrator_the_answer_is_the_softmax_of_what_was_sent(
    client: triton.InferenceServerClient, name: str, sent: np.ndarray
) -> None:
    answer = infer(client, name, sent, parameters={"calibrator": "none"})
    np.testing.assert_allclose(answer.as_numpy("probabilities"), scipy.special.softmax(ROWS, axis=1), atol=1e-6)
    np.testing.assert_array_equal(answer.as_numpy("unchanged"), sent)
    np.testing.assert_array_equal(answer.as_numpy("label"), ROWS.argmax(axis=1))


def test_it_is_fitted_activated_and_served_as_any_other_model(served: RunningServer, tmp_path: Path) -> None:
    with Client(served.address, show_progress=False) as ours:
        by_logits = ours.fit("plain", "temperature", logits=LOGITS, labels=LABELS)
        by_inputs = ours.fit("plain", "temperature", inputs={"logits": LOGITS.astype(np.float32)}, labels=LABELS)
        assert by_logits.held_out.after["log_loss"].value < by_logits.held_out.before["log_loss"].value
        ours.activate("plain", by_logits.revision)
        fitted, again = (ours.calibrator("plain", made.revision) for made in (by_logits, by_inputs))
    with triton.InferenceServerClient(served.address) as client:
        answer = infer(client, "plain", ROWS)
        names = infer(client, "plain", ROWS, outputs=[triton.InferRequestedOutput("probabilities", class_count=1)])
    assert answer.get_response().parameters["calibrator_revision"].string_param == by_logits.revision
    np.testing.assert_allclose(answer.as_numpy("probabilities"), fitted.predict_proba(ROWS), atol=1e-5)
    np.testing.assert_allclose(again.predict_proba(ROWS), fitted.predict_proba(ROWS), atol=1e-5)
    assert names.as_numpy("probabilities")[0, 0].split(b":")[2] == [b"ant", b"bee", b"cat", b"dog"][ROWS[0].argmax()]


def test_a_probability_of_zero_counts_as_the_smallest_number(client: triton.InferenceServerClient) -> None:
    rows = np.array([[np.log(0.5), np.log(0.5), -np.inf, -np.inf], [-np.inf, -np.inf, -np.inf, 0]], np.float32)
    answer = infer(client, "logp", rows)
    np.testing.assert_allclose(answer.as_numpy("probabilities"), np.exp(rows), rtol=1e-6, atol=1e-30)
    wanted = [triton.InferRequestedOutput("calserve/logits")]
    logits = infer(client, "logp", rows, outputs=wanted).as_numpy("calserve/logits")
    np.testing.assert_allclose(logits[0, 2:], np.log(np.finfo(np.float32).tiny), rtol=1e-6)


def test_a_class_of_logit_minus_infinity_has_probability_zero(client: triton.InferenceServerClient) -> None:
    rows = np.array([[1, 2, -np.inf, 0]], np.float32)
    answer = infer(client, "plain", rows, parameters={"calibrator": "none"})
    np.testing.assert_allclose(answer.as_numpy("probabilities"), scipy.special.softmax(rows, axis=1), atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "logp"])
@pytest.mark.parametrize("row", [[-np.inf] * 4, [0, 1, np.nan, 2], [0, np.inf, 1, 2]])
def test_a_row_that_is_no_distribution_is_refused(
    client: triton.InferenceServerClient, name: str, row: list[float]
) -> None:
    with pytest.raises(
        InferenceServerException, match="the model's probabilities of row 1 are then not numbers"
    ) as caught:
        infer(client, name, np.array([[0, 0, 0, 0], row], np.float32))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_command_refuses_a_name_in_use_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["passthrough", "llm", "--classes", "3", "--model-repository", str(tmp_path)]
    cli.main(arguments)
    assert "its input is 'logits'" in " ".join(capsys.readouterr().out.split())
    before = (tmp_path / "llm" / "1" / "model.onnx").read_bytes()
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--log-probabilities"])
    assert "has a model 'llm' already" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "llm" / "1" / "model.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_a_model_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def overtaken(source: Path, target: Path) -> Path:
        if target.name == "llm":
            models.write(tmp_path, "llm", models.classifier())
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(errors.AlreadyExists):
        passthrough.write(tmp_path, "llm", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]
    assert [path.name for path in (tmp_path / "llm").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("name", "n_classes", "labels", "text"),
    [
        ("../llm", 3, b"", "a model's name has"),
        ("", 3, b"", "a model's name has"),
        ("llm", 1, b"", "2 to 1048576 classes, got 1"),
        ("llm", 1 << 40, b"", "2 to 1048576 classes"),
        ("llm", 3, b"a\nb\n", "the labels are 2 lines, 3 wanted"),
        ("llm", 3, b"\xff\n", "not UTF-8"),
    ],
)
def test_what_cannot_be_a_model_is_refused(tmp_path: Path, name: str, n_classes: int, labels: bytes, text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=text):
        passthrough.write(tmp_path, name, n_classes, labels=labels)
    assert not list(tmp_path.iterdir())


def test_a_repository_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.Refused, match="not a directory"):
        passthrough.write(tmp_path / "nowhere", "llm", 3)
