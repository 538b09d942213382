"""density_aware: scikit-learn as the oracle of distances, numeric gradients of the fit's, and what distance must do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from scipy.optimize import check_grad
from sklearn.neighbors import NearestNeighbors

import calibrators
from calibrators import neighbours
from calibrators.graph import Graph, signature, stage
from calibrators.kinds.density_aware import FAR, DensityAware, _anchored, _linear, _log_loss, _mse, _Rows
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.layers import Layer
from calibrators.metrics import expected_calibration_error, log_loss
from calibrators.numerics import softmax

Array = NDArray[Any]

WIDTHS = {"early": 5, "late": 8}
LINKS = ["anchored_hinge", "anchored_power", "linear"]


def rows(n: int, *, moved: float = 0.0, seed: int = 0) -> tuple[Array, Array, Array]:
    """Logits of a linear head on two layers, labels, features. Moved rows are as sure, and wrong more often."""
    rng = np.random.default_rng(seed)
    late = rng.normal(size=(n, 8)) + moved * rng.choice([-1, 1], size=(n, 1)) * np.ones(8)
    early = rng.normal(size=(n, 5))
    logits = late @ np.random.default_rng(99).normal(size=(8, 4))
    temperature = 1.5 + moved
    y = (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)
    y[:2] = 0, 1
    return logits, y, np.column_stack([early, late])


def created(**params: Any) -> DensityAware:
    return DensityAware(**{"layers": list(WIDTHS), "widths": list(WIDTHS.values()), **params})


def fitted(n: int = 600, **params: Any) -> DensityAware:
    """On ordinary rows and half as many moved ones."""
    ordinary, moved = rows(n, seed=1), rows(n // 2, moved=2.0, seed=2)
    logits, y, features = (np.concatenate(pair) for pair in zip(ordinary, moved, strict=True))
    return created(**params).fit(logits, y, features=features, shifted=np.arange(len(y)) >= n)


def run_stage(calibrator: DensityAware, **signals: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(stage(calibrator).to_bytes(), providers=["CPUExecutionProvider"])
    names = ["probabilities", "density", "ood_score"]
    found = session.run(names, {name: array.astype(np.float32) for name, array in signals.items()})
    return dict(zip(names, found, strict=True))


# ---- distances


@pytest.mark.parametrize("k", [1, 3, 40])
def test_distances_are_those_of_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(0)
    x, reference = 5 + rng.normal(size=(70, 6)), 5 + rng.normal(size=(300, 6)).astype(np.float16)
    oracle, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(reference.astype(float)).kneighbors(x)
    np.testing.assert_allclose(np.sqrt(neighbours.nearest(x, reference, k)), oracle, rtol=1e-12)


@pytest.mark.parametrize("opset", [9, 11, 17, 21])
@pytest.mark.parametrize("only_last", [False, True])
def test_the_graph_finds_the_same_neighbours(opset: int, only_last: bool) -> None:
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(30, 6)).astype(np.float32), rng.normal(size=(200, 6)).astype(np.float16)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 6])
    proto = helper.make_model(
        helper.make_graph([], "g", [value], []), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    graph = Graph(proto)
    graph.output(
        neighbours.emit_nearest(graph, "x", reference, 7, only_last=only_last), "d", TensorProto.FLOAT, (None, None)
    )
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(["d"], {"x": x})
    expected = neighbours.nearest(x.astype(np.float64), reference, 7)
    np.testing.assert_allclose(found, expected[:, -1:] if only_last else expected, rtol=1e-5)


def test_a_calibration_row_is_no_neighbour_of_itself_wherever_the_reference_comes_from() -> None:
    logits, y, features = rows(300)
    alone = created().fit(logits, y, features=features)
    given = created().fit(logits, y, features=features, reference={"logits": logits, "features": features})
    among = created().fit(
        logits[:200], y[:200], features=features[:200], reference={"logits": logits, "features": features}
    )
    np.testing.assert_allclose(given.means_, alone.means_, rtol=1e-12)
    layer = features[:, slice(5, 13) if among.kept_[-1] else slice(0, 5)] / among.scale_[-1]
    d, _ = NearestNeighbors(n_neighbors=11).fit(layer).kneighbors(layer[:200])
    assert among.means_[-1] == pytest.approx(d[:, 10].mean(), rel=1e-3)  # the first is the row itself; float16


@pytest.mark.parametrize(("distance", "pick"), [("kth", -1), ("nearest", 0), ("mean", None)])
def test_the_choice_of_distance_is_what_it_says(distance: str, pick: int | None) -> None:
    calibrator = fitted(distance=distance, k=6)
    _, _, features = rows(20, seed=5)
    x = (features - np.zeros(13))[:, 5:]
    late = list(calibrator.kept_).index(1)
    columns = slice(5, 13) if len(calibrator.kept_) == 2 else slice(0, 8)
    x = (x - calibrator.centre_[columns]) / calibrator.scale_[late]
    d, _ = NearestNeighbors(n_neighbors=6).fit(calibrator.reference_[:, columns].astype(float)).kneighbors(x)
    found = calibrator._distances(calibrator._vectors(np.zeros((20, 4)), features))[:, late]
    np.testing.assert_allclose(found, d.mean(axis=1) if pick is None else d[:, pick], rtol=1e-12)


# ---- the fit


@pytest.mark.parametrize("loss", [_log_loss, _mse])
@pytest.mark.parametrize("objective", ["linear", "anchored"])
def test_analytic_gradients_are_the_numeric_ones(loss: Any, objective: str) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(50, 4))
    calibration = _Rows(logits - logits.max(axis=1, keepdims=True), rng.integers(4, size=50), np.full(50, 1 / 50))
    basis = rng.random((50, 3))
    for seed in range(5):
        w = np.random.default_rng(seed).random(4 if objective == "linear" else 3)

        def f(w: Array) -> tuple[float, Array]:
            if objective == "linear":
                return _linear(loss, calibration, basis, 0.01, w)
            return _anchored(loss, calibration, basis, 0.01, 0.1, w)

        assert check_grad(lambda w: f(w)[0], lambda w: f(w)[1], w) < 1e-6


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", ["log_loss", "mse"])
def test_weights_lower_the_loss_of_temperature_scaling_on_the_same_rows(link: str, loss: str) -> None:
    calibrator = fitted(link=link, loss=loss, ridge=0.0)
    ordinary, moved = rows(600, seed=1), rows(300, moved=2.0, seed=2)
    logits, y, features = (np.concatenate(pair) for pair in zip(ordinary, moved, strict=True))

    def value(p: Array) -> float:
        error = p - np.eye(4)[y]
        return log_loss(p, y) if loss == "log_loss" else float(np.square(error).mean())

    both = TemperatureScaling().fit(logits, y)
    assert value(calibrator.predict_proba(logits, features=features)) < value(both.predict_proba(logits)) - 1e-3


@pytest.mark.parametrize("link", LINKS)
def test_under_shift_it_is_better_calibrated_and_at_home_no_worse(link: str) -> None:
    """Both layers' distances grow with the shift, of which the calibrator has seen another amount."""
    calibrator, scaling = fitted(2000, link=link), TemperatureScaling().fit(*rows(2000, seed=1)[:2])
    for moved, better in ((0.0, -0.01), (2.5, 0.05)):
        logits, y, features = rows(4000, moved=moved, seed=7)
        before = expected_calibration_error(scaling.predict_proba(logits), y)
        assert expected_calibration_error(calibrator.predict_proba(logits, features=features), y) < before - better


def test_without_shifted_rows_of_which_distance_tells_nothing_it_says_that_it_is_temperature_scaling() -> None:
    logits, y = np.tile([[0.0, 2.0, 1.0, 0.0]], (400, 1)), np.arange(400) % 4
    features = np.random.default_rng(0).normal(size=(400, 13))
    y[np.linalg.norm(features, axis=1) > 3] = 1  # the far ones are right: no weight above zero helps
    calibrator = created().fit(logits, y, features=features)
    assert not calibrator.weights_.any()
    assert "this is plain temperature scaling" in calibrator.notes[-1]
    expected = TemperatureScaling().fit(logits, y).predict_proba(logits)
    np.testing.assert_allclose(calibrator.predict_proba(logits, features=features), expected, rtol=1e-9)
    assert not fitted().notes


@pytest.mark.parametrize("l1", [0.05, "cross_validation"])
def test_layers_that_say_nothing_are_dropped_and_no_longer_read(l1: float | str) -> None:
    calibrator = fitted(2000, l1=l1)
    assert calibrator.kept_.tolist() == [1]  # the early layer is noise
    assert calibrator.reference_.shape == (2000, 8)
    logits, _, features = rows(50, seed=3)
    changed = np.column_stack([features[:, :5] + 100, features[:, 5:]])
    np.testing.assert_array_equal(
        calibrator.predict_proba(logits, features=changed), calibrator.predict_proba(logits, features=features)
    )


# ---- far away


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("with_shifted_rows", [False, True])
def test_the_farther_a_row_the_nearer_its_confidence_to_the_base_rate(link: str, with_shifted_rows: bool) -> None:
    if with_shifted_rows:
        calibrator = fitted(link=link)
    else:
        logits, y, features = rows(600, seed=1)
        calibrator = created(link=link).fit(logits, y, features=features)
    if link == "linear" and not calibrator.weights_.any():
        assert calibrator.notes  # the published link has nothing else to go by, and says so
        return
    logits, _, features = rows(200, seed=4)
    confidence = [
        softmax_confidence(calibrator, factor * logits, factor * features) for factor in (1, 1e2, 1e4, 1e6, 1e12)
    ]
    assert confidence[0] > 0.4
    assert np.all(np.diff(confidence) < 1e-3)
    assert confidence[-1] == pytest.approx(1 / 4, abs=1e-3)


def softmax_confidence(calibrator: DensityAware, logits: Array, features: Array) -> float:
    served = run_stage(calibrator, logits=logits, features=features)["probabilities"]
    exact = calibrator.predict_proba(logits, features=features)
    np.testing.assert_allclose(served, exact, atol=1e-4)
    return float(exact.max(axis=1).mean())


def test_no_row_of_the_calibration_set_is_touched_by_the_guard() -> None:
    logits, y, features = rows(600, seed=1)
    calibrator = created(l1=1e3).fit(logits, y, features=features)  # all weights zero
    distances = calibrator._distances(calibrator._vectors(logits, features))
    assert np.all(distances * FAR <= calibrator.far_)
    expected = TemperatureScaling().fit(logits, y).predict_proba(logits)
    np.testing.assert_allclose(calibrator.predict_proba(logits, features=features), expected, rtol=1e-9)


def test_numbers_beyond_float32s_squares_have_an_answer() -> None:
    calibrator = fitted()
    logits, _, features = rows(10, seed=4)
    p = calibrator.predict_proba(logits.astype(np.float32), features=(1e30 * np.sign(features)).astype(np.float32))
    np.testing.assert_allclose(p, 1 / 4, atol=1e-6)


# ---- further outputs


def test_the_density_is_the_share_of_ordinary_rows_that_lie_farther() -> None:
    calibrator = fitted(4000)
    _, _, features = rows(4000, seed=11)
    further = calibrator.predict_further(np.zeros((4000, 4)), features=features)
    assert np.abs(np.sort(further["density"]) - np.linspace(0, 1, 4000)).max() < 0.05
    rank = np.argsort(np.argsort(-further["ood_score"])) / 4000
    assert np.abs(rank - further["density"]).max() < 0.05
    assert abs(float(further["ood_score"].mean())) < 0.1
    far = calibrator.predict_further(np.zeros((3, 4)), features=features[:3] * 50)
    assert np.all(far["density"] == 0)
    assert np.all(far["ood_score"] > 10)


@pytest.mark.parametrize(
    "params", [{}, {"link": "linear"}, {"normalise": "l2"}, {"distance": "mean"}, {"base": "platt"}]
)
def test_the_graph_with_layers_computes_what_numpy_does(params: dict[str, Any]) -> None:
    calibrator = calibrators.loads(calibrators.dumps(fitted(**params)))
    logits, _, features = rows(100, moved=1.0, seed=5)
    served = run_stage(calibrator, logits=logits, features=features)
    np.testing.assert_allclose(served["probabilities"], calibrator.predict_proba(logits, features=features), atol=1e-5)
    for name, expected in calibrator.predict_further(logits, features=features).items():
        np.testing.assert_allclose(served[name], expected, rtol=1e-3, atol=1e-4)


def test_a_conformal_kind_reads_the_layers_of_its_base_and_makes_sets_of_it() -> None:
    found = [Layer(name, (None, width), (), width, "found") for name, width in WIDTHS.items()]
    kind = calibrators.create("split_conformal", base="density_aware").on_model(lambda _: found)
    assert kind.taps == tuple(WIDTHS)
    assert kind.get_params()["base_params"]["widths"] == [5, 8]
    logits, y, features = rows(2000)
    fitted_sets = calibrators.loads(calibrators.dumps(kind.fit(logits, y, features=features)))
    unseen, unseen_y, unseen_features = rows(2000, seed=1)
    session = onnxruntime.InferenceSession(stage(fitted_sets, sets=True).to_bytes(), providers=["CPUExecutionProvider"])
    feeds = {"logits": unseen.astype(np.float32), "features": unseen_features.astype(np.float32)}
    members, score = session.run(["prediction_set", "ood_score"], feeds)
    assert members[np.arange(2000), unseen_y].mean() == pytest.approx(0.9, abs=0.04)
    assert score.shape == (2000,)
    plain = calibrators.create("split_conformal")
    assert plain.on_model(lambda _: found) is plain


# ---- the reference


def test_a_large_reference_is_sampled_or_clustered_and_calibrates_as_well() -> None:
    logits, y, features = rows(1500, seed=1)
    many_logits, _, many = rows(6000, seed=8)
    reference = {"logits": many_logits, "features": many}
    unseen, unseen_y, unseen_features = rows(3000, seed=9)
    for compression in ("sample", "clusters"):
        calibrator = created(reference_rows=200, compression=compression, k=3)
        calibrator.fit(logits, y, features=features, reference=reference)
        assert calibrator.reference_.shape[0] == 200
        again = created(reference_rows=200, compression=compression, k=3)
        again.fit(logits, y, features=features, reference=reference)
        np.testing.assert_array_equal(again.reference_, calibrator.reference_)
        p = calibrator.predict_proba(unseen, features=unseen_features)
        assert expected_calibration_error(p, unseen_y) < 0.03


def test_a_reference_on_disk_is_not_read_whole() -> None:
    """The planted array refuses to be copied as a whole."""

    class Mapped(np.ndarray):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            assert np.size(index) <= 100
            return np.asarray(super().__getitem__(index))

    logits, y, features = rows(200)
    many = {name: array.view(Mapped) for name, array in (("logits", np.zeros((5000, 4))), ("features", rows(5000)[2]))}
    calibrator = created(reference_rows=100).fit(logits, y, features=features)
    calibrator._embed(many, 4)
    assert calibrator.reference_.shape == (100, 13)


def test_a_reference_too_large_for_a_graph_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DensityAware._embed.__globals__, "MOST_NUMBERS", 1000)
    logits, y, features = rows(200)
    with pytest.raises(ValueError, match="a graph holds at most 1000 numbers, got 2600: lower reference_rows"):
        created(index="graph").fit(logits, y, features=features)
    assert created(reference_rows=70).fit(logits, y, features=features).reference_.shape[0] == 70


def test_fits_with_one_reference_share_a_session_and_other_layers_do_not() -> None:
    logits, y, features = rows(400)
    reference = {"logits": logits, "features": features}
    one, other = (
        created(link="linear").fit(logits[:n], y[:n], features=features[:n], reference=reference) for n in (300, 400)
    )
    if one.kept_.tolist() == other.kept_.tolist():
        assert signature(one) == signature(other)
    renamed = created(link="linear", layers=["early", "other"])
    renamed.fit(logits, y, features=features, reference=reference)
    assert signature(renamed) != signature(other)


# ---- refusals


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": []}, "layers must be distinct names"),
        ({"layers": ["a", "a"]}, "layers must be distinct names"),
        ({"widths": [5]}, "widths must be 2 positive whole numbers"),
        ({"link": "cubic"}, "link must be one of anchored_hinge, anchored_power, linear, got 'cubic'"),
        ({"k": 0}, "k must be a whole number, 1 or above, got 0"),
        ({"k": True}, "k must be a whole number"),
        ({"ridge": -1.0}, "ridge must be a number, 0 or above"),
        ({"l1": "some"}, "l1 must be a number, 0 or above, or cross_validation, got 'some'"),
        ({"base": "density_aware"}, "base must be another kind"),
        ({"base": "correctness_aware", "base_params": {"views": ["flip"]}}, "base must read the logits alone"),
        ({"base_params": {"loss": "brier"}}, "base_params are of a base, and none is named"),
    ],
)
def test_parameters_out_of_range_are_refused_and_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.create("density_aware", **{"layers": list(WIDTHS), "widths": list(WIDTHS.values()), **params})


def test_rows_and_references_that_do_not_fit_are_refused_and_named() -> None:
    logits, y, features = rows(50)
    with pytest.raises(ValueError, match="reads features beside the logits, got nothing"):
        created().fit(logits, y)
    with pytest.raises(ValueError, match=r"a reference for .* has features, logits, got logits"):
        created().fit(logits, y, features=features, reference={"logits": logits})
    with pytest.raises(ValueError, match=r"features of the reference must have shape \(50, 13\), got \(50, 12\)"):
        created().fit(logits, y, features=features, reference={"logits": logits, "features": features[:, 1:]})
    with pytest.raises(ValueError, match="every row is shifted"):
        created().fit(logits, y, features=features, shifted=np.ones(50))
    with pytest.raises(ValueError, match=r"shifted must have shape \(50,\)"):
        created().fit(logits, y, features=features, shifted=np.ones(49))
    with pytest.raises(ValueError, match="temperature does not read shifted"):
        TemperatureScaling().fit(logits, y, shifted=np.zeros(50))
    with pytest.raises(ValueError, match="widths must say how many columns"):
        DensityAware(layers=["a"]).fit(logits, y, features=features)


def test_a_forged_artifact_is_refused() -> None:
    calibrator = fitted()
    tensors = calibrator.tensors()
    for name, forged in (
        ("kept", np.array([1, 0])),
        ("kept", np.array([2])),
        ("k", np.asarray(10_000)),
        ("weights", -tensors["weights"] - 1),
        ("reference", tensors["reference"].astype(np.float32)),
        ("far", 0 * tensors["far"]),
        ("base/temperature", np.asarray(1.0)),
    ):
        with pytest.raises(ValueError, match=r"kept|k must|weights|reference|positive|tensors"):
            created().set_tensors({**tensors, name: forged})


def test_logits_that_are_a_layer_count_without_their_offset() -> None:
    logits, y, _ = rows(300)
    calibrator = DensityAware(layers=["logits"]).fit(logits, y)
    moved = calibrator.predict_further(logits + 50)["ood_score"]
    np.testing.assert_allclose(moved, calibrator.predict_further(logits)["ood_score"], atol=1e-6)
    assert np.allclose(softmax(logits).sum(axis=1), 1)
