"""The loop: fit through the client, activate, and what is served is what was fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper

import calibrators
from calibrators.numerics import softmax
from service import errors
from service.client import Client
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X, LOGITS, LABELS = models.labelled_rows(2000, seed=1)

READ_LAYERS = {"density_aware", "feature_clipping"}
"""Kinds that read layers of a model unless told otherwise, so rows come as its inputs."""


def test_a_fit_from_logits_is_served_as_the_fused_graph_computes_it(server: RunningServer, client: Client) -> None:
    revision = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    assert revision.revision == "temperature-1"
    assert client.activate("mlp", revision.revision) == "none"

    calibrator = client.calibrator("mlp", revision.revision)
    fused = calibrators.fuse(models.classifier(), calibrator)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(fused.to_bytes(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(["probabilities"], {"x": X[:64]})

    stock = triton.InferenceServerClient(server.address)
    made = triton.InferInput("x", [64, 6], "FP32")
    made.set_data_from_numpy(X[:64])
    result = stock.infer("mlp", [made])
    stock.close()
    assert result.get_response().parameters["calibrator_revision"].string_param == "temperature-1"
    np.testing.assert_array_equal(result.as_numpy("probabilities"), expected)
    np.testing.assert_allclose(expected, calibrator.predict_proba(LOGITS[:64]), atol=2e-6)


def test_a_fit_recovers_the_temperature_that_the_labels_were_drawn_with(client: Client) -> None:
    """Labels ~ softmax(logits / 2.5); on 2,000 rows the standard error of T is about 0.1 (bound: 5 of them)."""
    revision = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    assert abs(client.calibrator("mlp", revision.revision).temperature_ - 2.5) < 0.5
    held_out = revision.held_out
    assert held_out is not None
    assert held_out.row_count == 400
    assert held_out.after["log_loss"].value < held_out.before["log_loss"].value
    assert held_out.after["log_loss"].low < held_out.after["log_loss"].value < held_out.after["log_loss"].high
    assert held_out.after["accuracy"] == held_out.before["accuracy"]


def test_a_fit_from_inputs_equals_a_fit_from_the_models_logits(client: Client) -> None:
    from_inputs = client.fit("mlp", "temperature", inputs={"x": X}, labels=LABELS)
    from_logits = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    a, b = (client.calibrator("mlp", r.revision).temperature_ for r in (from_inputs, from_logits))
    assert a == pytest.approx(b, rel=1e-6)


def test_the_client_gets_the_logits_that_calibrators_read(client: Client) -> None:
    np.testing.assert_allclose(client.logits("mlp", X[:150]), LOGITS[:150], atol=1e-4)


def test_a_calibration_set_larger_than_a_message_arrives_whole(client: Client) -> None:
    rows = 400_000
    repeated = np.tile(LOGITS, (rows // len(LOGITS), 1))
    revision = client.fit("mlp", "temperature", logits=repeated, labels=np.tile(LABELS, rows // len(LABELS)))
    assert revision.row_count == rows


def test_weight_two_is_the_row_twice_through_the_wire(client: Client) -> None:
    weight = np.where(np.arange(2000) < 500, 2.0, 1.0)
    weighted = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS, sample_weight=weight)
    doubled = client.fit(
        "mlp", "temperature", logits=np.vstack([LOGITS, LOGITS[:500]]), labels=np.append(LABELS, LABELS[:500])
    )
    a, b = (client.calibrator("mlp", r.revision).temperature_ for r in (weighted, doubled))
    assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("kind", calibrators.kinds())
def test_every_kind_is_fitted_activated_and_served(client: Client, kind: str) -> None:
    through_model = "input_gradients" in calibrators.create(kind).fit_needs
    rows: dict[str, Any] = {"inputs": X} if kind in READ_LAYERS or through_model else {"logits": LOGITS}
    revision = client.fit("mlp", kind, labels=LABELS, held_out_fraction=0.0, **rows)
    client.activate("mlp", revision.revision)
    prediction = client.predict("mlp", X[:50])
    assert prediction.calibrator_revision == revision.revision == f"{kind}-1"
    calibrator = client.calibrator("mlp", revision.revision)
    signals = {"features": models.hidden(X[:50])} if kind in READ_LAYERS else {}
    expected = calibrator.predict_proba(LOGITS[:50].astype(np.float32), **signals)
    np.testing.assert_allclose(prediction.probabilities, expected, atol=calibrator.float32_atol)


def test_auto_compares_fits_the_best_and_tells_the_ranking(client: Client) -> None:
    revision = client.fit("mlp", "auto", logits=LOGITS, labels=LABELS, candidates=["platt"])
    assert revision.kind == revision.ranking[0].kind or revision.kind == "temperature"
    assert revision.revision == f"{revision.kind}-1"
    assert {candidate.kind for candidate in revision.ranking} == {"identity", "temperature", "platt"}
    assert revision.ranking[-1].kind == "identity"
    assert repr(client.get("mlp", revision.revision)) == repr(revision)
    client.activate("mlp", revision.revision)
    assert client.predict("mlp", X[:3]).calibrator_revision == revision.revision
    with pytest.raises(errors.InvalidRequest, match="prefer must be"):
        client.fit("mlp", "auto", logits=LOGITS, labels=LABELS, prefer="cheap")


def test_rows_in_order_of_time_are_scored_on_the_last_ones(client: Client) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((500, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 500)
    labels[400:] = logits[400:].argmax(axis=1)
    found = client.fit("mlp", "auto", logits=logits, labels=labels, time_ordered=True, candidates=["temperature"])
    assert found.held_out is not None
    assert found.held_out.before["accuracy"].value == 1.0
    with pytest.raises(errors.InvalidRequest, match="time_ordered must be true or false, got 'yes'"):
        client.fit("mlp", "auto", logits=logits, labels=labels, time_ordered="yes")


def test_rows_that_are_held_out_score_what_auto_chose_and_have_no_say_in_it(client: Client) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((500, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 500)
    labels[250:] = logits[250:].argmax(axis=1)  # of all rows, identity would be chosen
    rows = {"logits": logits, "labels": labels, "time_ordered": True, "candidates": ["temperature"]}
    chosen = client.fit("mlp", "auto", held_out_fraction=0.5, **rows)
    assert chosen.kind == "temperature"
    assert client.fit("mlp", "auto", held_out_fraction=0.0, **rows).kind == "identity"
    assert chosen.row_count == 500


def test_activating_another_fit_of_the_same_kind_builds_no_session(server: RunningServer, client: Client) -> None:
    first = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    second = client.fit("mlp", "temperature", logits=LOGITS[:500], labels=LABELS[:500])
    model = server.app.repository.get("mlp")
    client.activate("mlp", first.revision)
    session = model.active.session
    client.activate("mlp", second.revision)
    assert model.active.session is session
    assert model.active.revision == second.revision


def test_a_request_may_name_the_revision_that_computes_it(client: Client) -> None:
    first = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    second = client.fit("mlp", "platt", logits=LOGITS, labels=LABELS)
    client.activate("mlp", second.revision)
    own = client.predict("mlp", X[:5], calibrator="none")
    named = client.predict("mlp", X[:5], calibrator=first.revision)
    assert (own.calibrator_revision, named.calibrator_revision) == ("none", first.revision)
    np.testing.assert_allclose(own.probabilities, softmax(LOGITS[:5]), atol=2e-6)
    assert np.abs(named.probabilities - own.probabilities).max() > 0.01


def test_rolling_back_goes_back_step_by_step(client: Client) -> None:
    for _ in range(2):
        client.activate("mlp", client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision)
    assert client.rollback("mlp") == "temperature-1"
    assert client.rollback("mlp") == "none"
    assert client.predict("mlp", X[:1]).calibrator_revision == "none"
    with pytest.raises(errors.Refused, match="nothing to roll back"):
        client.rollback("mlp")


def test_the_list_is_newest_first_and_marks_the_active_one(client: Client) -> None:
    for _ in range(2):
        client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    client.activate("mlp", "temperature-1")
    assert [(r.revision, r.active) for r in client.list("mlp")] == [("temperature-2", False), ("temperature-1", True)]
    assert repr(client.get("mlp", "temperature-1")) == repr(client.list("mlp")[1])


def test_a_deleted_revision_is_gone_and_its_number_is_not_used_again(client: Client) -> None:
    for _ in range(2):
        client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    client.activate("mlp", "temperature-1")
    with pytest.raises(errors.Refused, match="is active"):
        client.delete("mlp", "temperature-1")
    client.delete("mlp", "temperature-2")
    with pytest.raises(errors.NotFound):
        client.get("mlp", "temperature-2")
    assert client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision == "temperature-3"
    assert client.calibrator("mlp", "temperature-1").temperature_ > 0  # shares its bytes with the deleted one


def test_an_evaluation_scores_a_revision_on_the_callers_rows(client: Client) -> None:
    revision = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    _, logits, labels = models.labelled_rows(1500, seed=2)
    evaluation = client.evaluate("mlp", revision.revision, logits=logits, labels=labels)
    expected = calibrators.metrics.log_loss(client.calibrator("mlp", revision.revision).predict_proba(logits), labels)
    assert evaluation.after["log_loss"].value == pytest.approx(expected, rel=1e-5)
    assert evaluation.before["log_loss"].value == pytest.approx(
        calibrators.metrics.log_loss(softmax(logits), labels), rel=1e-5
    )
    with pytest.raises(errors.Refused, match="no active revision"):
        client.evaluate("mlp", logits=logits, labels=labels)


def test_everything_is_back_after_a_restart(root: Path) -> None:
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        revision = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
        client.activate("mlp", revision.revision)
        before, listed = client.predict("mlp", X[:8]), client.list("mlp")
    server.stop()
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        after = client.predict("mlp", X[:8])
        assert repr(client.list("mlp")) == repr(listed)
    server.stop()
    assert after.calibrator_revision == revision.revision
    np.testing.assert_array_equal(after.probabilities, before.probabilities)


@pytest.mark.parametrize("kind", ["none", "temperature", "isotonic"])
def test_an_exported_model_gives_plain_onnxruntime_the_served_numbers(client: Client, kind: str) -> None:
    revision = kind if kind == "none" else client.fit("mlp", kind, logits=LOGITS, labels=LABELS).revision
    client.activate("mlp", revision)
    exported = client.export("mlp")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert not session.get_overridable_initializers()
    assert [value.name for value in session.get_outputs()] == ["scores", "probabilities", "confidence", "label"]
    (probabilities,) = session.run(["probabilities"], {"x": X[:32]})
    np.testing.assert_allclose(probabilities, client.predict("mlp", X[:32]).probabilities, atol=1e-6)


def test_two_servers_cannot_hold_one_store(server: RunningServer, root: Path) -> None:
    with pytest.raises(errors.Refused, match="another calserve server"):
        RunningServer(settings_for(root))


REFUSED_FITS = {
    "one class": ({"labels": np.zeros(2000, int)}, errors.Refused, r"at least 2 classes"),
    "three rows": ({"logits": LOGITS[:1], "labels": LABELS[:1]}, errors.Refused, r"too few to hold out"),
    "label out of range": (
        {"labels": np.where(LABELS == 0, 4, LABELS)},
        errors.InvalidRequest,
        r"class indices 0\.\.3, got 4",
    ),
    "negative label": (
        {"labels": np.where(LABELS == 0, -1, LABELS)},
        errors.InvalidRequest,
        r"class indices 0\.\.3, got -1",
    ),
    "labels of text": ({"labels": LABELS.astype(str)}, errors.InvalidRequest, r"labels"),
    "NaN logits": ({"logits": np.where(LOGITS > 5, np.nan, LOGITS)}, errors.InvalidRequest, r"logits must be finite"),
    "another number of classes": ({"logits": LOGITS[:, :3]}, errors.InvalidRequest, r"4 classes.*3 columns"),
    "fewer labels": ({"labels": LABELS[:-1]}, errors.InvalidRequest, r"different numbers of rows"),
    "no rows": ({"logits": LOGITS[:0], "labels": LABELS[:0]}, errors.InvalidRequest, r"no rows"),
    "negative weight": ({"sample_weight": -np.ones(2000)}, errors.InvalidRequest, r"none negative"),
    "unknown kind": ({"kind": "tarot"}, errors.InvalidRequest, r"'tarot'.*temperature"),
    "kind as a path": ({"kind": "../../etc"}, errors.InvalidRequest, r"etc"),
    "unknown parameter": ({"depth": 3}, errors.InvalidRequest, r"depth"),
    "unknown model": ({"model": "nobody"}, errors.NotFound, r"'nobody'"),
    "held out too much": ({"held_out_fraction": 0.99}, errors.InvalidRequest, r"held_out_fraction must be in"),
}


def test_a_fit_that_cannot_be_is_refused_and_what_serves_goes_on_serving(client: Client) -> None:
    client.activate("mlp", client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision)
    for case, (changes, error, text) in REFUSED_FITS.items():
        arguments = {"model": "mlp", "kind": "temperature", "logits": LOGITS, "labels": LABELS, **changes}
        with pytest.raises(error, match=text):
            client.fit(**arguments)
        assert client.predict("mlp", X[:1]).calibrator_revision == "temperature-1", case
    assert len(client.list("mlp")) == 1


def test_a_damaged_artifact_is_refused_and_what_serves_goes_on_serving(
    root: Path, server: RunningServer, client: Client
) -> None:
    good = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    bad = client.fit("mlp", "temperature", logits=LOGITS[:900], labels=LABELS[:900])
    client.activate("mlp", good.revision)
    calibrator = calibrators.dumps(client.calibrator("mlp", bad.revision))
    (blob,) = [p for p in (root.parent / "models.calserve" / "blobs").iterdir() if p.read_bytes() == calibrator]
    blob.write_bytes(calibrator[:-1] + bytes([calibrator[-1] ^ 1]))
    with pytest.raises(errors.Damaged, match="damaged"):
        client.activate("mlp", bad.revision)
    assert client.predict("mlp", X[:1]).calibrator_revision == good.revision


def test_a_revision_of_another_model_file_is_refused(root: Path) -> None:
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    server.stop()
    (root / "mlp" / "1" / "model.onnx").write_bytes(models.classifier(seed=7).SerializeToString())
    server = RunningServer(settings_for(root))
    with (
        Client(server.address, show_progress=False) as client,
        pytest.raises(errors.Refused, match="another file") as caught,
    ):
        client.activate("mlp", "temperature-1")
    server.stop()
    assert caught.value.detail_reason == "DIGEST_DIFFERS"


def test_rows_of_other_classes_are_not_taken_for_a_revisions(root: Path) -> None:
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        revision = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision
    server.stop()
    models.write(root, "mlp", models.classifier(n_classes=3), version=2)
    server = RunningServer(settings_for(root))
    with (
        Client(server.address, show_progress=False) as client,
        pytest.raises(errors.Refused, match="has 4 classes, model 'mlp' version 2 has 3"),
    ):
        client.evaluate("mlp", revision, logits=LOGITS[:, :3], labels=LABELS % 3)
    server.stop()


def test_a_graph_that_disagrees_with_its_fit_is_refused(
    server: RunningServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted defect: `emit` multiplies by the temperature where `predict_proba` divides."""
    from calibrators.kinds.temperature import TemperatureScaling

    revision = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)

    def wrong(self, graph, logits):  # type: ignore[no-untyped-def]
        return graph.softmax(graph.node("Mul", logits, graph.parameter("temperature", self.temperature_)))

    monkeypatch.setattr(TemperatureScaling, "emit", wrong)
    with pytest.raises(errors.Refused, match="does not compute") as caught:
        client.activate("mlp", revision.revision)
    assert caught.value.detail_reason == "GRAPH_DISAGREES"
    assert client.predict("mlp", X[:1]).calibrator_revision == "none"


def test_a_kind_whose_signals_the_model_does_not_show_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibrators.kinds.temperature import TemperatureScaling

    fitted = client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS)
    monkeypatch.setattr(TemperatureScaling, "needs", frozenset({"logits", "attention"}))
    for act in (
        lambda: client.activate("mlp", fitted.revision),
        lambda: client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS),
    ):
        with pytest.raises(
            errors.Refused, match="does not show attention; it shows features, inputs, logits"
        ) as caught:
            act()
        assert caught.value.detail_reason == "SIGNAL_MISSING"


def test_a_model_without_calibration_refuses_fits(shared_server: RunningServer) -> None:
    with (
        Client(shared_server.address, show_progress=False) as client,
        pytest.raises(errors.Refused, match="not a classifier"),
    ):
        client.fit("mean", "temperature", logits=LOGITS, labels=LABELS)


def test_a_model_that_computes_no_made_up_input_can_still_be_calibrated(tmp_path: Path) -> None:
    """Height and width are open, and the convolution takes no image as small as one pixel."""
    kernel, (weight, bias) = models.weights(2 * 9, 1, 0)[0].reshape(2, 1, 3, 3), models.weights(2, 4, 1)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"], axis=-1),
    ]
    inputs = [("x", TensorProto.FLOAT, ["N", 1, "H", "W"])]
    constants = {"kernel": kernel, "weight": weight, "bias": bias}
    proto = models.model(nodes, inputs, [("p", TensorProto.FLOAT, ["N", 4])], constants)
    models.write(tmp_path / "models", "open", proto)
    server = RunningServer(settings_for(tmp_path / "models"))
    try:
        with Client(server.address, show_progress=False) as client:
            revision = client.fit("open", "temperature", logits=LOGITS, labels=LABELS).revision
            client.activate("open", revision)
            assert client.predict("open", {"x": np.ones((2, 1, 5, 7), np.float32)}).calibrator_revision == revision
    finally:
        server.stop()
