"""Prediction sets as they are served: at any level, declared, the same as the calibrator's and the exported graph's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton

from calibrators.conformal.calibrator import ConformalCalibrator
from service import errors
from service.client import AsyncClient, Client
from service.inference.prediction_sets import shares_of
from service.rpc.wire import inference
from tests.service import models
from tests.service.conftest import RunningServer, settings_for

X, LOGITS, LABELS = models.labelled_rows(2000, seed=1)
OWN = ["scores", "probabilities", "confidence", "label"]
Fit = Callable[..., tuple[str, ConformalCalibrator]]
KINDS = ("split_conformal", "class_conditional_conformal", "clustered_conformal")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests here: a revision that one has fitted the next may use."""
    root = tmp_path_factory.mktemp("sets") / "models"
    models.write(root, "mlp", models.classifier())
    server = RunningServer(settings_for(root))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fitted() -> dict[str, str]:
    """Revisions by what they were fitted with."""
    return {}


@pytest.fixture
def fit(client: Client, fitted: dict[str, str]) -> Iterator[Fit]:
    """Makes a fit active and gives its revision and its calibrator; afterwards none is active."""

    def active(kind: str = "split_conformal", **params: Any) -> tuple[str, ConformalCalibrator]:
        key = json.dumps([kind, params], sort_keys=True)
        if key not in fitted:
            found = client.fit("mlp", kind, logits=LOGITS, labels=LABELS, held_out_fraction=0.0, **params)
            fitted[key] = found.revision
        client.activate("mlp", fitted[key])
        calibrator = client.calibrator("mlp", fitted[key])
        assert isinstance(calibrator, ConformalCalibrator)
        return fitted[key], calibrator

    yield active
    client.activate("mlp", "none")


@pytest.fixture
def stock(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as client:
        yield client


def asked(stock: triton.InferenceServerClient, rows: np.ndarray, **options: Any) -> Any:
    made = triton.InferInput("x", list(rows.shape), "FP32")
    made.set_data_from_numpy(rows)
    return stock.infer("mlp", [made], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_served_sets_are_the_calibrators_at_every_level(client: Client, kind: str, score: str, fit: Fit) -> None:
    revision, calibrator = fit(kind, score=score)
    for level in (None, 0.5, 0.8, 0.99, 0.99999):
        for _ in range(2):  # read in full, then recognised
            prediction = client.predict("mlp", X[:60], confidence_level=level)
            assert prediction.calibrator_revision == revision
            sets = calibrator.sets(prediction.probabilities, level)
            np.testing.assert_array_equal(prediction.prediction_set, sets)
            np.testing.assert_array_equal(prediction.outputs["set_size"], sets.sum(axis=1))
            assert prediction.outputs["set_size"].dtype == np.int32
            assert prediction.prediction_set.dtype == bool


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["lac", "raps"])
def test_the_exported_graph_makes_the_same_sets(client: Client, kind: str, score: str, fit: Fit) -> None:
    revision, _ = fit(kind, score=score, confidence_level=0.8)
    served = client.predict("mlp", X[:500])
    session = onnxruntime.InferenceSession(client.export("mlp", revision), providers=["CPUExecutionProvider"])
    p, sets, sizes = session.run(["probabilities", "prediction_set", "set_size"], {"x": X[:500]})
    np.testing.assert_allclose(p, served.probabilities, atol=1e-6)
    np.testing.assert_array_equal(sets, served.prediction_set)
    np.testing.assert_array_equal(sizes, served.outputs["set_size"])


def test_sets_cover_the_labels_of_new_rows(client: Client, fit: Fit) -> None:
    """4,000 rows at .9 by 1,500 scores: .9 - .03 .. .9 + .03 are four standard errors of .0093 (Beta and binomial)."""
    fit()
    rows, _, labels = models.labelled_rows(4000, seed=2)
    sets = client.predict("mlp", rows).prediction_set
    assert abs(sets[np.arange(4000), labels].mean() - 0.9) < 0.03


def test_they_are_declared_while_a_revision_makes_them(
    client: Client, stock: triton.InferenceServerClient, fit: Fit
) -> None:
    def declared() -> list[tuple[str, str, list[int]]]:
        outputs = stock.get_model_metadata("mlp").outputs
        config = stock.get_model_config("mlp").config.output
        assert [output.name for output in config] == [output.name for output in outputs]
        return [(output.name, output.datatype, list(output.shape)) for output in outputs]

    before = declared()
    assert [name for name, _, _ in before] == OWN
    fit()
    assert declared() == [*before, ("prediction_set", "BOOL", [-1, 4]), ("set_size", "INT32", [-1])]
    assert list(client.predict("mlp", X[:3]).outputs) == [*OWN, "prediction_set", "set_size"]
    client.rollback("mlp")
    assert declared() == before


def test_the_answer_says_of_which_level_its_sets_are(
    client: Client, stock: triton.InferenceServerClient, fit: Fit
) -> None:
    fit(confidence_level=0.75)

    def level(**options: Any) -> float | None:
        parameters = asked(stock, X[:2], **options).get_response().parameters
        return parameters["confidence_level"].double_param if "confidence_level" in parameters else None

    assert level() == 0.75
    assert level(parameters={"confidence_level": 0.5}) == 0.5
    assert level(outputs=[triton.InferRequestedOutput("set_size")]) == 0.75
    assert level(outputs=[triton.InferRequestedOutput("probabilities")]) is None


def test_one_of_the_two_can_be_asked_for_alone_and_typed_answers_hold_them(
    server: RunningServer, client: Client, fit: Fit
) -> None:
    _, calibrator = fit()
    alone = client.predict("mlp", X[:9], outputs=["set_size"]).outputs
    assert list(alone) == ["set_size"]
    request = inference.ModelInferRequest(model_name="mlp")
    request.inputs.add(name="x", datatype="FP32", shape=[2, 6]).contents.fp32_contents.extend(X[:2].ravel().tolist())
    response = client._inference.ModelInfer(request)
    found = {output.name: output.contents for output in response.outputs}
    sets = calibrator.predict_set(LOGITS[:2])
    assert list(found["prediction_set"].bool_contents) == sets.ravel().tolist()
    assert list(found["set_size"].int_contents) == sets.sum(axis=1).tolist() == alone["set_size"][:2].tolist()


def test_callers_of_several_levels_at_once_each_get_their_own(client: Client, fit: Fit) -> None:
    _, calibrator = fit(score="raps")
    levels = [0.5, 0.9, 0.99, None] * 30

    def sets(index: int) -> np.ndarray:
        return client.predict("mlp", X[index : index + 3], confidence_level=levels[index]).prediction_set

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(sets, range(len(levels))))
    for index, level in enumerate(levels):
        np.testing.assert_array_equal(found[index], calibrator.predict_set(LOGITS[index : index + 3], level))


def test_streams_ask_for_levels_too(server: RunningServer, client: Client, fit: Fit) -> None:
    _, calibrator = fit()

    async def ask() -> list[np.ndarray]:
        async with AsyncClient(server.address, show_progress=False) as own, own.stream("mlp") as stream:
            answers = await asyncio.gather(*(stream.predict(X[:5], confidence_level=c) for c in (0.5, 0.95, None)))
            return [answer.prediction_set for answer in answers]

    for sets, level in zip(asyncio.run(ask()), (0.5, 0.95, 0.9), strict=True):
        np.testing.assert_array_equal(sets, calibrator.predict_set(LOGITS[:5], level))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("double_param", 0.0),
        ("double_param", 1.0),
        ("double_param", -0.5),
        ("double_param", float("nan")),
        ("double_param", float("inf")),
        ("string_param", "0.9"),
        ("int64_param", 1),
        ("bool_param", True),
        (None, None),
    ],
)
def test_a_level_of_another_type_or_range_is_an_invalid_argument(
    server: RunningServer, client: Client, parameter: str | None, value: Any, fit: Fit
) -> None:
    fit()
    request = inference.ModelInferRequest(model_name="mlp", raw_input_contents=[X[:1].tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 6])
    chosen = request.parameters["confidence_level"]
    if parameter is not None:
        setattr(chosen, parameter, value)
    with pytest.raises(errors.InvalidRequest, match="'confidence_level' must be a double strictly between 0 and 1"):
        client._read(client._inference.ModelInfer, request)


def test_a_level_means_nothing_to_a_revision_without_sets(client: Client, fit: Fit) -> None:
    message = "'confidence_level' is for revisions that make prediction sets; 'none' makes none"
    with pytest.raises(errors.InvalidRequest, match=message):
        client.predict("mlp", X[:1], confidence_level=0.9)
    revision, calibrator = fit()
    client.activate("mlp", "none")
    with pytest.raises(errors.InvalidRequest, match=message):
        client.predict("mlp", X[:1], confidence_level=0.9)
    with pytest.raises(errors.InvalidRequest, match="has no output 'prediction_set'"):
        client.predict("mlp", X[:1], outputs=["prediction_set"])
    named = client.predict("mlp", X[:30], calibrator=revision, confidence_level=0.6)
    np.testing.assert_array_equal(named.prediction_set, calibrator.sets(named.probabilities, 0.6))


# ---- randomised


def test_a_request_of_one_id_gets_one_answer_and_others_get_others(
    client: Client, stock: triton.InferenceServerClient, fit: Fit
) -> None:
    revision, calibrator = fit(score="aps", randomised=True)

    def sets(**options: Any) -> np.ndarray:
        found = asked(stock, X[:200], **options).as_numpy("prediction_set")
        assert found is not None
        return found

    first = sets(request_id="a")
    np.testing.assert_array_equal(first, sets(request_id="a"))
    assert (first != sets(request_id="b")).any()
    assert (sets() != sets()).any()
    p = asked(stock, X[:200], request_id="a").as_numpy("probabilities")
    assert p is not None
    np.testing.assert_array_equal(first, calibrator.sets(p, shares=shares_of(b"\x1a\x01a", 200)))
    client.activate("mlp", "none")
    named = sets(request_id="a", parameters={"calibrator": revision})  # more rows than a run takes
    np.testing.assert_array_equal(first, named)
    few = asked(stock, X[:20], request_id="a", parameters={"calibrator": revision}).as_numpy("prediction_set")
    np.testing.assert_array_equal(first[:20], few)


def test_randomised_sets_are_not_exported(client: Client, fit: Fit) -> None:
    revision, _ = fit(score="aps", randomised=True)
    with pytest.raises(errors.Refused, match="randomised sets"):
        client.export("mlp", revision)


def test_the_numbers_of_a_request_are_uniform_and_its_own() -> None:
    """10,000 draws: Kolmogorov and Smirnov's distance beyond .023 has probability 1e-4 (the ids are fixed)."""
    drawn = np.concatenate([shares_of(str(i).encode(), 10) for i in range(1000)])
    assert np.abs(np.sort(drawn) - np.arange(10_000) / 10_000).max() < 0.023
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert len(np.unique(drawn)) == 10_000
    assert (shares_of(b"", 5) != shares_of(b"", 5)).all()
