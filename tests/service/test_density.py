"""A kind that reads layers and a reference set, from the client's stream to the exported file."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from calibrators.augment import augmented
from calibrators.graph import FEATURES, LOGITS
from calibrators.index import Index
from calibrators.kinds import density_aware
from calibrators.kinds.density_aware import DensityAware
from service import errors
from service.cli import main
from service.client import AsyncClient, Client
from service.inference.indexed import IndexedSession
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_views import IMAGES, cnn
from tests.service.test_views import LABELS as IMAGE_LABELS

X, LOGITS_OF_X, LABELS = models.labelled_rows(600, seed=1)
FAR, _, FAR_LABELS = models.labelled_rows(200, seed=2)
FAR = (3 * FAR).astype(np.float32)
REFERENCE, _, _ = models.labelled_rows(500, seed=3)
FIT: dict[str, Any] = {"inputs": X, "labels": LABELS, "shifted_inputs": FAR, "shifted_labels": FAR_LABELS}


def logits_of(x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(models.classifier(activation="Identity").SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


def library(**params: Any) -> DensityAware:
    """The same fit without a server."""
    both = np.concatenate([X, FAR])
    calibrator = DensityAware(layers=["h"], widths=[8], **params)
    return calibrator.fit(
        logits_of(both),
        np.concatenate([LABELS, FAR_LABELS]),
        features=models.hidden(both),
        shifted=np.arange(800) >= 600,
        reference={"logits": logits_of(REFERENCE), "features": models.hidden(REFERENCE)},
    )


def in_batches() -> Iterator[np.ndarray]:
    yield from np.array_split(REFERENCE, 7)


def test_what_is_served_is_what_the_library_fits_on_the_same_rows_and_reference(client: Client) -> None:
    revision = client.fit("mlp", "density_aware", reference=in_batches(), **FIT)
    client.activate("mlp", revision.revision)
    prediction, calibrator, alone = (
        client.predict("mlp", X[:50]),
        client.calibrator("mlp", revision.revision),
        library(),
    )
    assert calibrator.get_params() == alone.get_params()
    np.testing.assert_allclose(calibrator.weights_, alone.weights_, rtol=1e-3)
    signals = {"features": models.hidden(X[:50])}
    expected = alone.predict_proba(logits_of(X[:50]), **signals)
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-4)
    for name, values in alone.predict_further(logits_of(X[:50]), **signals).items():
        np.testing.assert_allclose(prediction.outputs[name], values, atol=1e-2)
    assert revision.held_out is not None
    assert revision.held_out.row_count == 120  # a fifth of the ordinary rows; shifted ones are not scored


def test_an_exported_model_needs_no_reference_beside_it(client: Client) -> None:
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, **FIT)
    client.activate("mlp", revision.revision)
    session = ort.InferenceSession(client.export("mlp"))
    assert [value.name for value in session.get_inputs()] == ["x"]
    names = [value.name for value in session.get_outputs()]
    assert names == ["scores", "probabilities", "confidence", "label", "density", "ood_score"]
    prediction = client.predict("mlp", X[:20])
    for name, values in zip(names, session.run(None, {"x": X[:20]}), strict=True):
        np.testing.assert_allclose(values, prediction.outputs[name], atol=1e-5)


def test_huge_inputs_are_served_at_the_base_rate_and_without_density(client: Client) -> None:
    huge = 1e6 * X[:50]
    huge = huge[np.abs(models.hidden(huge)).max(axis=1) > 1e5]  # a row whose hidden units are all off is not far
    assert len(huge) > 40
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, inputs=X, labels=LABELS)
    own = client.predict("mlp", huge).outputs["confidence"]
    client.activate("mlp", revision.revision)
    prediction = client.predict("mlp", huge)
    assert own.min() > 0.99
    np.testing.assert_allclose(prediction.outputs["confidence"], 1 / models.N_CLASSES, atol=1e-3)
    np.testing.assert_array_equal(prediction.outputs["density"], 0)


def test_a_fit_without_shifted_rows_notes_what_it_came_to(client: Client) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(models.N_CLASSES, size=600)
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, inputs=X, labels=labels, l1=10.0)
    assert any("this is plain temperature scaling" in note for note in revision.notes)


def test_an_evaluation_reads_the_layers_of_the_callers_rows(client: Client) -> None:
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, **FIT)
    p = client.calibrator("mlp", revision.revision).predict_proba(logits_of(FAR), features=models.hidden(FAR))
    evaluation = client.evaluate("mlp", revision.revision, inputs=FAR, labels=FAR_LABELS)
    expected = -np.log(p[np.arange(200), FAR_LABELS]).mean()
    assert evaluation.after["log_loss"].value == pytest.approx(expected, rel=1e-4)


def test_images_are_augmented_by_the_client(server_of_images: RunningServer) -> None:
    with Client(server_of_images.address, show_progress=False) as client:
        fit: dict[str, Any] = {"inputs": IMAGES, "labels": IMAGE_LABELS, "held_out_fraction": 0.0}
        revision = client.fit("cnn", "density_aware", augment=0.5, seed=4, **fit)
        copies = augmented(IMAGES, 0.5, seed=4)
        by_hand = client.fit(
            "cnn", "density_aware", shifted_inputs=copies.images, shifted_labels=IMAGE_LABELS[copies.index], **fit
        )
        assert revision.row_count == by_hand.row_count == 450
        one, other = (client.calibrator("cnn", r.revision) for r in (revision, by_hand))
        for name, array in one.tensors().items():
            np.testing.assert_array_equal(array, other.tensors()[name])
        with pytest.raises(errors.InvalidRequest, match="augment: images must be"):
            client.fit("mlp", "density_aware", augment=0.5, inputs=X, labels=LABELS)


def test_the_asynchronous_client_sends_references_too(server: RunningServer) -> None:
    async def fit() -> Any:
        async with AsyncClient(server.address, show_progress=False) as client:
            batches = list(in_batches())
            revision = await client.fit("mlp", "density_aware", reference=batches, held_out_fraction=0.0, **FIT)
            return await client.calibrator("mlp", revision.revision)

    assert asyncio.run(fit()).reference_.shape == (500, 8)


@pytest.fixture
def server_of_images(tmp_path: Path) -> Iterator[RunningServer]:
    models.write(tmp_path / "models", "cnn", cnn())
    models.write(tmp_path / "models", "mlp", models.classifier())
    server = RunningServer(settings_for(tmp_path / "models"))
    yield server
    server.stop()


def test_layers_are_chosen_by_name_and_in_calserve_toml(tmp_path: Path) -> None:
    root = tmp_path / "models"
    models.write(root, "mlp", models.classifier())
    (root / "mlp" / "calserve.toml").write_text('layers = ["z", "h0"]\n')
    server = RunningServer(settings_for(root))
    fit: dict[str, Any] = {"inputs": X, "labels": LABELS, "held_out_fraction": 0.0}
    with Client(server.address, show_progress=False) as client:
        by_default = client.fit("mlp", "density_aware", **fit)
        assert client.calibrator("mlp", by_default.revision).layers == ["z", "h0"]
        chosen = client.fit("mlp", "density_aware", layers=["h", "logits"], **fit)
        calibrator: Any = client.calibrator("mlp", chosen.revision)
        assert (calibrator.layers, calibrator.widths) == (["h", "logits"], [8])
        with pytest.raises(
            errors.Refused, match="computes no tensor 'nowhere'; layers found in it: h, logits"
        ) as caught:
            client.fit("mlp", "density_aware", layers=["nowhere"], **fit)
        assert caught.value.detail_reason == "SIGNAL_MISSING"
    server.stop()


def test_a_damaged_list_of_layers_is_refused(tmp_path: Path) -> None:
    models.write(tmp_path, "mlp", models.classifier())
    (tmp_path / "mlp" / "calserve.toml").write_text("layers = [1]\n")
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "mlp", "--model-repository", str(tmp_path)])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": None, "logits": LOGITS_OF_X, "shifted_inputs": None, "shifted_labels": None}, "send these instead"),
        ({"shifted_labels": None}, "pass both"),
        ({"reference": X[:, :3]}, "reference rows from 0 on: .*|shape"),
        ({"kind": "temperature"}, "does not ask which rows are shifted"),
        (
            {"kind": "temperature", "shifted_inputs": None, "shifted_labels": None, "reference": X},
            "does not read a ref",
        ),
    ],
)
def test_rows_that_a_kind_cannot_use_are_refused_and_named(
    client: Client, changes: dict[str, Any], message: str
) -> None:
    arguments = {"kind": "density_aware", **FIT, **changes}
    with pytest.raises(errors.InvalidRequest, match=message):
        client.fit("mlp", **arguments)


def test_a_planted_defect_in_the_graph_is_found_at_activation(
    client: Client, monkeypatch: pytest.MonkeyPatch, server: RunningServer
) -> None:
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, **FIT).revision
    emit = DensityAware._emit_distances

    def wrong(self: DensityAware, graph: Any, logits: str, features: str) -> str:
        return str(graph.node("Mul", emit(self, graph, logits, features), graph.constant(1.5)))

    monkeypatch.setattr(DensityAware, "_emit_distances", wrong)
    with pytest.raises(errors.Refused, match="does not compute") as caught:
        client.activate("mlp", revision)
    assert caught.value.detail_reason == "GRAPH_DISAGREES"


def test_a_model_that_shows_no_layer_is_calibrated_by_its_logits(tmp_path: Path) -> None:
    linear = models.model(
        [helper.make_node("Gemm", ["x", "w"], ["z"]), helper.make_node("Softmax", ["z"], ["p"], axis=-1)],
        [("x", TensorProto.FLOAT, ["N", 6])],
        [("p", TensorProto.FLOAT, ["N", 4])],
        {"w": models.weights(6, 4, 0)[0]},
    )
    models.write(tmp_path / "models", "linear", linear)
    server = RunningServer(settings_for(tmp_path / "models"))
    with Client(server.address, show_progress=False) as client:
        revision = client.fit("linear", "density_aware", inputs=X, labels=LABELS, held_out_fraction=0.0)
        client.activate("linear", revision.revision)
        assert client.calibrator("linear", revision.revision).layers == ["logits"]
        assert {LOGITS, FEATURES} - {s.name for s in server.app.repository.get("linear").active.session.outputs}
    server.stop()


@pytest.mark.parametrize("form", ["exact", "ivf"])
def test_what_is_looked_up_beside_the_graph_is_served_as_one_revision_and_exported_as_one_file(
    client: Client, server: RunningServer, form: str
) -> None:
    arguments: dict[str, Any] = {"reference": in_batches(), "held_out_fraction": 0.0, "index": form, **FIT}
    revision = client.fit("mlp", "density_aware", **arguments)
    assert any(f"index ({form}" in note for note in revision.notes)
    client.activate("mlp", revision.revision)
    assert isinstance(server.app.repository.get("mlp").active.session, IndexedSession)
    prediction, graph, lists = client.predict("mlp", X[:50]), library(index="graph"), library(index=form)
    signals = {"features": models.hidden(X[:50])}
    wanted = lists.predict_proba(logits_of(X[:50]), **signals)
    np.testing.assert_allclose(prediction.probabilities, wanted, atol=1e-4)
    assert prediction.calibrator_revision == revision.revision
    assert {"scores", "confidence", "label", "density", "ood_score"} < prediction.outputs.keys()
    np.testing.assert_allclose(prediction.outputs["confidence"], prediction.probabilities.max(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(
        prediction.outputs["scores"], client.predict("mlp", X[:50], calibrator="none").outputs["scores"]
    )
    exact = graph.predict_proba(logits_of(X[:50]), **signals)
    exported = ort.InferenceSession(client.export("mlp")).run(["probabilities"], {"x": X[:50]})[0]
    np.testing.assert_allclose(exported, exact, atol=1e-4)
    np.testing.assert_allclose(prediction.probabilities, exact, atol=2 * lists.index_tolerance)


def test_a_reference_too_large_for_a_graph_is_served_and_its_export_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, index="exact", **FIT).revision
    monkeypatch.setattr(density_aware, "MOST_NUMBERS", 1000)
    client.activate("mlp", revision)
    assert client.predict("mlp", X[:5]).calibrator_revision == revision
    with pytest.raises(errors.Refused, match="cannot be exported: a graph holds at most 1000 numbers"):
        client.export("mlp")


def test_an_index_that_finds_other_rows_than_it_did_is_found_at_activation(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, index="exact", **FIT).revision
    nearest = Index.nearest
    monkeypatch.setattr(Index, "nearest", lambda *args: 4 * nearest(*args))
    with pytest.raises(errors.Refused, match="no longer computes") as caught:
        client.activate("mlp", revision)
    assert caught.value.detail_reason == "GRAPH_DISAGREES"


def test_without_faiss_a_revision_that_needs_it_is_refused_and_says_what_to_install(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, index="exact", **FIT).revision
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(errors.Refused, match=r"cannot be served here: .*pip install 'calserve\[index\]'"):
        client.activate("mlp", revision)


def test_a_revision_that_costs_more_does_not_run_in_the_event_loop_at_the_old_price(
    client: Client, server: RunningServer
) -> None:
    model = server.app.repository.get("mlp")
    client.predict("mlp", X[:1])
    revision = client.fit("mlp", "density_aware", held_out_fraction=0.0, index="exact", **FIT).revision
    client.activate("mlp", revision)
    lane = model.lane(model.common_outputs, {"x": X[:1]}, None)
    assert model.batcher.costs.of(lane.inputs).expected_ns(1) == np.inf
