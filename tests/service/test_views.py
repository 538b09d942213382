"""A kind that reads what the model says of transformed copies of its images, from the fit to the exported file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from scipy.special import softmax

from calibrators.kinds.correctness_aware import LEAST_SCALE, CorrectnessAwareTemperature
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.metrics import log_loss
from calibrators.views import views
from service import errors
from service.cli import main
from service.client import Client
from service.learning.job import JobSpec
from service.report import html
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

VIEWS = ["flip", "rotate"]
N_CLASSES, SIZE, N_ROWS = 3, 6, 300
BYTES_PER_ROW = 4 * N_CLASSES + 8 + 8
"""Of a row of logits with its label and weight, as the server counts them."""


def cnn(
    element: int = TensorProto.FLOAT, dims: tuple[str | int, ...] = ("N", 3, SIZE, SIZE), ending: str = "Softmax"
) -> onnx.ModelProto:
    """images -> Conv -> Relu -> mean over the image -> Gemm -> `ending` -> p FP32 [N, 3]."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 3, 3, 3)), "d": 6 * rng.standard_normal((8, N_CLASSES))}
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "d"], ["z"]),
        helper.make_node(ending, ["z"], ["p"]),
    ]
    return models.model(
        nodes,
        [("images", element, [*dims])],
        [("p", TensorProto.FLOAT, ["N", N_CLASSES])],
        {name: value.astype(np.float32) for name, value in weights.items()},
    )


def model_logits(images: np.ndarray) -> np.ndarray:
    """By plain onnxruntime."""
    return session_of(cnn(ending="Identity").SerializeToString()).run(None, {"images": images})[0]


def session_of(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def labelled_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, and labels that the model is the less sure of, the more a mirror changes its mind."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)
    mind = softmax((model_logits(images) + model_logits(np.ascontiguousarray(images[..., ::-1]))) / 3, axis=1)
    return images, (mind.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)


def expected(calibrator: Any, images: np.ndarray) -> np.ndarray:
    """Probabilities by the library alone."""
    seen = views(lambda copies: model_logits(np.ascontiguousarray(copies)), images, calibrator.views)
    p: np.ndarray = calibrator.predict_proba(model_logits(images).astype(np.float64), views=seen.astype(np.float64))
    return p


IMAGES, LABELS = labelled_images(N_ROWS, seed=1)
LOGITS = model_logits(IMAGES)
UNSEEN, UNSEEN_LABELS = labelled_images(150, seed=2)


@dataclass(frozen=True)
class Fitted:
    """A repository whose store holds fits, one of them active, and what was served when its server stopped."""

    root: Path
    first: str
    second: str
    held_out: Any
    served: np.ndarray


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Fits are dear, each a process that imports torch: these two serve all tests."""
    root = tmp_path_factory.mktemp("fitted") / "models"
    models.write(root, "cnn", cnn())
    models.write(root, "bytes", cnn(TensorProto.UINT8))
    models.write(root, "wide", cnn(dims=("N", 3, SIZE, SIZE + 2)))
    models.write(root, "open", cnn(dims=("N", 3, "H", "W")))
    models.write(root, "mlp", models.classifier())
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        fits = [fit(client, held_out_fraction=0.2), fit(client, views=VIEWS[::-1], held_out_fraction=0.0)]
        first, second = (revision.revision for revision in fits)
        client.activate("cnn", first)
        served = client.predict("cnn", UNSEEN).probabilities
    server.stop()
    return Fitted(root, first, second, fits[0].held_out, served)


def fit(client: Client, model: str = "cnn", **changes: Any) -> Any:
    arguments = {"inputs": {"images": IMAGES}, "labels": LABELS, "views": VIEWS, **changes}
    return client.fit(model, "correctness_aware", **arguments)


@pytest.fixture
def root(fitted: Fitted, tmp_path: Path) -> Path:
    for folder in ("models", "models.calserve"):
        shutil.copytree(fitted.root.parent / folder, tmp_path / folder)
    return tmp_path / "models"


def test_what_is_served_is_what_the_library_computes_with_views_of_its_own(client: Client, fitted: Fitted) -> None:
    """The second fit differs from the first by the order of its transforms alone: its graph must be another one all the same."""
    answers = []
    for revision in (fitted.first, fitted.second):
        client.activate("cnn", revision)
        prediction, calibrator = client.predict("cnn", UNSEEN), client.calibrator("cnn", revision)
        assert prediction.calibrator_revision == revision
        atol = calibrator.float32_atol
        np.testing.assert_allclose(prediction.probabilities, expected(calibrator, UNSEEN), atol=atol)
        np.testing.assert_array_equal(
            prediction.outputs["p"], client.predict("cnn", UNSEEN, calibrator="none").outputs["p"]
        )
        answers.append(prediction.probabilities)
    assert np.abs(answers[0] - answers[1]).max() > 0.01


def test_the_fit_saw_the_views_that_the_library_makes(client: Client, fitted: Fitted) -> None:
    """The network's weights depend on the last bit of a row, its standardisation does not."""
    seen = views(lambda copies: model_logits(np.ascontiguousarray(copies)), IMAGES, VIEWS)
    temperature = TemperatureScaling().fit(LOGITS, LABELS).temperature_
    ranks = np.argsort(-LOGITS, axis=1)[:, None]
    likely = np.take_along_axis(softmax(seen / temperature, axis=2), ranks, axis=2).reshape(N_ROWS, -1)
    calibrator: Any = client.calibrator("cnn", fitted.first)
    np.testing.assert_allclose(calibrator.centre_, likely.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(calibrator.scale_, np.maximum(likely.std(axis=0), LEAST_SCALE), rtol=1e-4)
    assert fitted.held_out.row_count == N_ROWS / 5
    assert fitted.held_out.after["log_loss"].value < fitted.held_out.before["log_loss"].value


def test_a_restart_restores_it(client: Client, fitted: Fitted) -> None:
    prediction = client.predict("cnn", UNSEEN)
    assert prediction.calibrator_revision == fitted.first
    np.testing.assert_array_equal(prediction.probabilities, fitted.served)


def test_an_exported_model_makes_its_views_itself(client: Client, fitted: Fitted) -> None:
    session = session_of(client.export("cnn"))
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["p", "probabilities", "confidence", "label"]
    (probabilities,) = session.run(["probabilities"], {"images": UNSEEN})
    np.testing.assert_allclose(probabilities, fitted.served, atol=1e-6)


def test_an_evaluation_and_a_report_read_the_views_of_the_callers_rows(
    client: Client, server: RunningServer, fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = log_loss(expected(client.calibrator("cnn", fitted.first), UNSEEN), UNSEEN_LABELS)
    evaluation = client.evaluate("cnn", inputs=UNSEEN, labels=UNSEEN_LABELS)
    assert evaluation.after["log_loss"].value == pytest.approx(after, rel=1e-4)
    np.savez(tmp_path / "rows.npz", images=UNSEEN, labels=UNSEEN_LABELS)
    main(["evaluate", "cnn", "--data", str(tmp_path / "rows.npz"), "--address", server.address])
    assert f"{after:.4f}" in capsys.readouterr().out
    assert fitted.first in html(client, "cnn", inputs=UNSEEN, labels=UNSEEN_LABELS)


def test_logits_alone_are_refused_with_the_reason(client: Client) -> None:
    rows: dict[str, Any] = {"logits": LOGITS, "labels": LABELS}
    for act in (
        lambda: client.fit("cnn", "correctness_aware", views=VIEWS, **rows),
        lambda: client.evaluate("cnn", **rows),
        lambda: html(client, "cnn", **rows),
    ):
        with pytest.raises(errors.InvalidRequest, match=r"reads views.* from the model's inputs"):
            act()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "mlp",
            r"does not show views \(views need one input of real images .*'x' \[None, 6\] FLOAT\); it shows features",
        ),
        ("bytes", r"does not show views \(.*the model has 'images' \[None, 3, 6, 6\] UINT8\)"),
        ("wide", r"does not show views \(to rotate, images must be as high as wide, the model reads 6 x 8\)"),
    ],
)
def test_a_model_whose_input_cannot_be_transformed_is_refused(client: Client, model: str, message: str) -> None:
    with pytest.raises(errors.Refused, match=message) as caught:
        fit(client, model, views=["rotate"])
    assert caught.value.detail_reason == "SIGNAL_MISSING"


def test_rows_that_cannot_be_rotated_are_refused_where_the_model_takes_any_size(client: Client) -> None:
    with pytest.raises(
        errors.InvalidRequest, match=r"rows from 0 on: images .* to rotate with H = W, got \(64, 3, 6, 4\)"
    ):
        fit(client, "open", views=["rotate"], inputs={"images": IMAGES[..., :4]})


def test_views_count_among_the_bytes_of_a_calibration_set(root: Path) -> None:
    server = RunningServer(settings_for(root, fit_rows_bytes=N_ROWS * BYTES_PER_ROW))
    with Client(server.address, show_progress=False) as client:
        client.fit("cnn", "temperature", inputs={"images": IMAGES}, labels=LABELS)
        with pytest.raises(errors.InvalidRequest, match=f"at most {N_ROWS * BYTES_PER_ROW} bytes"):
            fit(client)
    server.stop()


def test_activation_proves_the_graph_on_rows_with_their_views(
    server: RunningServer, client: Client, fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted defect: `emit` reads the logits of the first view for those of every view."""
    model = server.app.repository.get("cnn")
    assert {"logits", "views", "probabilities"} == model.warm_up(model.active).keys()
    emit = CorrectnessAwareTemperature.emit

    def wrong(self, graph, logits, views):  # type: ignore[no-untyped-def]
        first = graph.node("Gather", views, graph.constant(np.array([0, 0])), axis=1)
        return emit(self, graph, logits, first)

    monkeypatch.setattr(CorrectnessAwareTemperature, "emit", wrong)
    with pytest.raises(errors.Refused, match="does not compute") as caught:
        client.activate("cnn", fitted.second)
    assert caught.value.detail_reason == "GRAPH_DISAGREES"


def test_a_job_from_before_jobs_had_signals_reads_the_logits_alone(tmp_path: Path) -> None:
    spec = JobSpec("fit", "mlp", "0" * 64, 4, "temperature", "{}", 0.2, 0)
    spec.write(tmp_path)
    written = (tmp_path / "job.json").read_text()
    (tmp_path / "job.json").write_text(written.replace(', "signal_shapes": {}', ""))
    assert (tmp_path / "job.json").read_text() != written
    assert JobSpec.read(tmp_path).shapes == {"logits": (4,)}
