"""A kind that is fitted through the model and acts before it, from the fit to the exported file."""

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

from calibrators.kinds.neural_clamping import NeuralClamping
from calibrators.metrics import log_loss
from service import errors
from service.client import Client
from service.learning.job import RowWriter
from service.report import html
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

N_CLASSES, SIZE, N_ROWS = 3, 6, 400
SHIFT = np.float32([0.3, -0.3])[:, None, None]


def cnn() -> onnx.ModelProto:
    """images FP32 [N, 2, 6, 6] -> Conv -> Sigmoid -> mean over the image -> Gemm -> p FP32 [N, 3]."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((8, N_CLASSES))
    weights = {"w": rng.standard_normal((8, 2, 3, 3)), "d": 60 * (dense - dense.mean(axis=0))}
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "d"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"]),
    ]
    return models.model(
        nodes,
        [("images", TensorProto.FLOAT, ["N", 2, SIZE, SIZE])],
        [("p", TensorProto.FLOAT, ["N", N_CLASSES])],
        {name: value.astype(np.float32) for name, value in weights.items()},
    )


def of_ids() -> onnx.ModelProto:
    """ids INT64 [N, 4] -> embeddings -> mean -> Gemm -> p: its inputs are no numbers to add to."""
    rng = np.random.default_rng(1)
    weights = {"table": 2 * rng.standard_normal((12, 5)), "d": 3 * rng.standard_normal((5, N_CLASSES))}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["m"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["m", "d"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"]),
    ]
    return models.model(
        nodes,
        [("ids", TensorProto.INT64, ["N", 4])],
        [("p", TensorProto.FLOAT, ["N", N_CLASSES])],
        {name: value.astype(np.float32) for name, value in weights.items()},
    )


def unknown() -> onnx.ModelProto:
    proto = cnn()
    proto.graph.node[1].op_type = "Shrink"
    return proto


def logits_of(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """By plain onnxruntime."""
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    shown.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", N_CLASSES]))
    return session_of(shown.SerializeToString()).run(["z"], {proto.graph.input[0].name: x})[0]


def session_of(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def drawn_labels(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def shifted_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that came with a shift, and labels of what they show without it."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((n, 2, SIZE, SIZE)).astype(np.float32)
    return images + SHIFT, drawn_labels(logits_of(cnn(), images), rng)


IMAGES, LABELS = shifted_images(N_ROWS, seed=1)
UNSEEN, UNSEEN_LABELS = shifted_images(150, seed=2)
IDS = np.random.default_rng(3).integers(0, 12, size=(N_ROWS, 4))
IDS_LABELS = np.where(np.arange(N_ROWS) % 2, 0, drawn_labels(logits_of(of_ids(), IDS), np.random.default_rng(4)))


@dataclass(frozen=True)
class Fitted:
    """A repository whose store holds fits, one of them active, and what was served when its server stopped."""

    root: Path
    first: str
    second: str
    of_ids: str
    held_out: Any
    notes: tuple[str, ...]
    served: np.ndarray


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Fits are dear, each a process that imports torch: these serve all tests."""
    root = tmp_path_factory.mktemp("fitted") / "models"
    for name, proto in (("cnn", cnn()), ("ids", of_ids()), ("unknown", unknown())):
        models.write(root, name, proto)
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        first = fit(client, axis=1)
        second = fit(client, axis=1, learning_rate=0.03, held_out_fraction=0.0)
        ids = fit(client, "ids", inputs=IDS, labels=IDS_LABELS, tensor="embedded", held_out_fraction=0.0)
        client.activate("cnn", first.revision)
        served = client.predict("cnn", UNSEEN).probabilities
    server.stop()
    return Fitted(root, first.revision, second.revision, ids.revision, first.held_out, first.notes, served)


def fit(client: Client, model: str = "cnn", **changes: Any) -> Any:
    return client.fit(model, "neural_clamping", **{"inputs": IMAGES, "labels": LABELS, **changes})


@pytest.fixture
def root(fitted: Fitted, tmp_path: Path) -> Path:
    for folder in ("models", "models.calserve"):
        shutil.copytree(fitted.root.parent / folder, tmp_path / folder)
    return tmp_path / "models"


def expected(calibrator: Any, images: np.ndarray) -> np.ndarray:
    """Probabilities by plain onnxruntime on images that the test moves itself."""
    moved = images + calibrator.delta_.astype(np.float32)
    p: np.ndarray = softmax(logits_of(cnn(), moved).astype(np.float64) / float(calibrator.temperature_), axis=1)
    return p


def test_what_is_served_is_the_model_on_moved_inputs_beside_its_own_outputs(
    server: RunningServer, client: Client, fitted: Fitted
) -> None:
    sessions, answers = set(), []
    for revision in (fitted.first, fitted.second):
        client.activate("cnn", revision)
        prediction, calibrator = client.predict("cnn", UNSEEN), client.calibrator("cnn", revision)
        assert prediction.calibrator_revision == revision
        assert calibrator.delta_.shape == (2, 1, 1)
        np.testing.assert_allclose(prediction.probabilities, expected(calibrator, UNSEEN), atol=1e-5)
        np.testing.assert_allclose(prediction.outputs["p"], softmax(logits_of(cnn(), UNSEEN), axis=1), atol=1e-6)
        answers.append(prediction.probabilities)
        sessions.add(server.app.repository.get("cnn").active.session)
    assert len(sessions) == 1, "another delta is another feed"
    assert np.abs(answers[0] - answers[1]).max() > 1e-4


def test_a_fit_says_what_became_of_delta_and_is_scored_on_rows_it_has_not_seen(fitted: Fitted) -> None:
    (note,) = fitted.notes
    assert note.startswith("delta is kept: held-out log loss ") and "accuracy" in note
    assert fitted.held_out.row_count == N_ROWS / 5
    assert fitted.held_out.after["log_loss"].value < fitted.held_out.before["log_loss"].value


def test_a_restart_restores_it(client: Client, fitted: Fitted) -> None:
    prediction = client.predict("cnn", UNSEEN)
    assert prediction.calibrator_revision == fitted.first
    np.testing.assert_array_equal(prediction.probabilities, fitted.served)


def test_an_exported_model_moves_its_input_itself(client: Client, fitted: Fitted) -> None:
    session = session_of(client.export("cnn"))
    assert [value.name for value in session.get_inputs()] == ["images"]
    (probabilities,) = session.run(["probabilities"], {"images": UNSEEN})
    np.testing.assert_allclose(probabilities, fitted.served, atol=1e-6)


def test_an_evaluation_and_a_report_read_the_callers_inputs(client: Client, fitted: Fitted) -> None:
    after = log_loss(expected(client.calibrator("cnn", fitted.first), UNSEEN), UNSEEN_LABELS)
    evaluation = client.evaluate("cnn", inputs=UNSEEN, labels=UNSEEN_LABELS)
    assert evaluation.after["log_loss"].value == pytest.approx(after, rel=1e-4)
    assert fitted.first in html(client, "cnn", inputs=UNSEEN, labels=UNSEEN_LABELS)
    with pytest.raises(errors.InvalidRequest, match=r"reads views.* from the model's inputs"):
        client.evaluate("cnn", logits=logits_of(cnn(), UNSEEN), labels=UNSEEN_LABELS)


def test_a_tensor_behind_ids_is_moved_inside_the_graph(client: Client, fitted: Fitted) -> None:
    client.activate("ids", fitted.of_ids)
    calibrator: Any = client.calibrator("ids", fitted.of_ids)
    assert calibrator.delta_.shape == (4, 5)
    table = onnx.numpy_helper.to_array(of_ids().graph.initializer[0])
    head = onnx.numpy_helper.to_array(of_ids().graph.initializer[1])
    z = (table[IDS] + calibrator.delta_).mean(axis=1) @ head
    wanted = softmax(z / float(calibrator.temperature_), axis=1)
    np.testing.assert_allclose(client.predict("ids", IDS[:50]).probabilities, wanted[:50], atol=1e-5)
    evaluation = client.evaluate("ids", inputs=IDS, labels=IDS_LABELS)
    assert evaluation.after["log_loss"].value == pytest.approx(log_loss(wanted, IDS_LABELS), rel=1e-4)
    assert fitted.of_ids in html(client, "ids", inputs=IDS, labels=IDS_LABELS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ids", r"does not show input_gradients \(.*'ids' \[None, 4\] INT64; tensor='embedded' is the first of real"),
        ("unknown", r"does not show input_gradients \(.*operators that are not known here: Shrink\); it shows "),
    ],
)
def test_a_model_that_cannot_be_differentiated_is_refused_with_the_reason(
    client: Client, model: str, message: str
) -> None:
    with pytest.raises(errors.Refused, match=message) as caught:
        fit(client, model)
    assert caught.value.detail_reason == "SIGNAL_MISSING"


def test_logits_alone_are_refused_with_the_reason(client: Client) -> None:
    with pytest.raises(
        errors.InvalidRequest, match="by the gradient of its loss in the model's inputs: send these instead"
    ):
        fit(client, inputs=None, logits=logits_of(cnn(), IMAGES))


def test_activation_proves_on_golden_inputs_what_is_done_before_the_model(
    client: Client, fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted defect: delta is taken off instead of added."""

    def wrong(self, graph, x):  # type: ignore[no-untyped-def]
        return graph.node("Sub", x, graph.parameter("delta", self.delta_))

    monkeypatch.setattr(NeuralClamping, "emit_inputs", wrong)
    with pytest.raises(errors.Refused, match="with neural_clamping-2 does not compute the probabilities") as caught:
        client.activate("cnn", fitted.second)
    assert caught.value.detail_reason == "GRAPH_DISAGREES"


def test_rows_of_another_shape_than_those_before_are_refused(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "job")
    writer.expect({"logits": np.zeros((2, 3)), "inputs.0": np.zeros((2, 5), np.int64)})
    with pytest.raises(ValueError, match=r"rows of inputs\.0 are int64 \[6\], those before were int64 \[5\]"):
        writer.expect({"logits": np.zeros((2, 3)), "inputs.0": np.zeros((2, 6), np.int64)})
    writer.close()
