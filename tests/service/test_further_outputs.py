"""What a revision computes beside the probabilities: declared while it is active, served, exported, and proved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton

from calibrators.graph import Graph
from calibrators.kinds.temperature import TemperatureScaling
from service import errors
from service.client import Client
from service.client.results import Prediction
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X, LOGITS, LABELS = models.labelled_rows(300, seed=0)
OWN = ["scores", "probabilities", "confidence", "label"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature scaling computes each row's largest logit too, as `ood_score`."""
    emit = TemperatureScaling.emit

    def emit_both(self: TemperatureScaling, graph: Graph, logits: str) -> str:
        graph.further("ood_score", graph.reduce("ReduceMax", logits, keepdims=False))
        return emit(self, graph, logits)

    monkeypatch.setattr(TemperatureScaling, "emit", emit_both)
    monkeypatch.setattr(TemperatureScaling, "further_outputs", ("ood_score",))
    monkeypatch.setattr(TemperatureScaling, "_predict_further", lambda _, z: {"ood_score": z.max(axis=1)})


@pytest.fixture
def revision(measured: None, client: Client) -> str:
    """A fit whose kind computes more; not active."""
    return client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision


@pytest.fixture
def stock(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as client:
        yield client


def declared(stock: triton.InferenceServerClient) -> list[str]:
    by_metadata = [output.name for output in stock.get_model_metadata("mlp").outputs]
    assert [output.name for output in stock.get_model_config("mlp").config.output] == by_metadata
    return by_metadata


def assert_scored(prediction: Prediction, rows: slice) -> None:
    np.testing.assert_allclose(prediction.outputs["ood_score"], LOGITS[rows].max(axis=1), rtol=1e-5)


def test_what_the_active_revision_computes_is_declared_and_served_unasked(
    client: Client, revision: str, stock: triton.InferenceServerClient
) -> None:
    assert declared(stock) == list(client.predict("mlp", X[:3]).outputs) == OWN
    client.activate("mlp", revision)
    assert declared(stock) == [*OWN, "ood_score"]
    for _ in range(2):  # read in full, then recognised
        prediction = client.predict("mlp", X[:3])
        assert list(prediction.outputs) == [*OWN, "ood_score"]
        assert_scored(prediction, slice(3))
    client.rollback("mlp")
    assert declared(stock) == list(client.predict("mlp", X[:3]).outputs) == OWN


def test_another_fit_takes_over_from_the_request_after_its_activation_on(client: Client, revision: str) -> None:
    other = client.fit("mlp", "temperature", logits=2 * LOGITS, labels=LABELS).revision
    for active in (revision, other, revision, other):
        client.activate("mlp", active)
        assert [client.predict("mlp", X[:2]).calibrator_revision for _ in range(2)] == [active, active]


def test_it_is_asked_for_by_name(client: Client, revision: str) -> None:
    client.activate("mlp", revision)
    assert_scored(client.predict("mlp", X, outputs=["ood_score"]), slice(None))  # more rows than a run takes
    client.activate("mlp", "none")
    with pytest.raises(errors.InvalidRequest, match=r"'mlp' with none has no output 'ood_score'; it has: scores, "):
        client.predict("mlp", X[:1], outputs=["ood_score"])


def test_a_request_that_names_the_revision_gets_what_that_one_computes(client: Client, revision: str) -> None:
    for _ in range(2):
        assert_scored(client.predict("mlp", X[:5], calibrator=revision), slice(5))
        assert "ood_score" not in client.predict("mlp", X[:5]).outputs
    client.activate("mlp", revision)
    for _ in range(2):
        assert list(client.predict("mlp", X[:5], calibrator="none").outputs) == OWN


def test_the_exported_model_computes_it(client: Client, revision: str) -> None:
    session = onnxruntime.InferenceSession(client.export("mlp", revision), providers=["CPUExecutionProvider"])
    (scores,) = session.run(["ood_score"], {"x": X})
    np.testing.assert_allclose(scores, LOGITS.max(axis=1), rtol=1e-5)


def test_a_graph_that_computes_another_value_is_refused(
    client: Client, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TemperatureScaling, "_predict_further", lambda _, z: {"ood_score": z.min(axis=1)})
    with pytest.raises(errors.Refused, match=f"{revision} does not compute the ood_score of its fit") as caught:
        client.activate("mlp", revision)
    assert caught.value.detail_reason == "GRAPH_DISAGREES"


def test_a_models_own_output_of_that_name_is_served_beside_it(tmp_path: Path, measured: None) -> None:
    models.write(tmp_path / "models", "mlp", models.classifier(output="density"))
    server = RunningServer(settings_for(tmp_path / "models"))
    with Client(server.address, show_progress=False) as client:
        assert list(client.predict("mlp", X[:1]).outputs) == ["raw_density", *OWN[1:]]
    server.stop()


def test_a_config_that_declares_it_is_read_while_nothing_computes_it(root: Path, measured: None) -> None:
    text = "output [ { name: 'ood_score' data_type: TYPE_FP32 dims: [ -1 ] } ]"
    (root / "mlp" / "config.pbtxt").write_text(text)
    server = RunningServer(settings_for(root))
    with Client(server.address, show_progress=False) as client:
        assert list(client.predict("mlp", X[:1]).outputs) == OWN
    server.stop()
