"""What every kind promises, run over every file in `calibrators/kinds`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import calibrators
from calibrators import Calibrator
from calibrators.graph import ADDED_OUTPUTS, LOGITS, FusedModel, default_opset, fuse, signature, stage
from calibrators.inspection import Inspection, Tap
from calibrators.kinds.identity import Identity
from calibrators.kinds.temperature import TemperatureScaling
from tests.calibrators.fits import beside, fit

Array = NDArray[Any]

PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "adaptive_temperature": [{}, {"form": "sorted"}],
    "beta": [{}, {"form": "am"}, {"form": "ab"}],
    "class_conditional_conformal": [{}, {"score": "aps", "base": "histogram_binning", "base_params": {"n_bins": 5}}],
    "clustered_conformal": [{}, {"score": "raps", "base": "platt"}],
    "density_aware": [
        {},
        {"link": "linear", "normalise": "l2"},
        {"link": "anchored_power", "distance": "mean", "base": "structured_vector"},
    ],
    "ensemble_temperature": [{}, {"loss": "brier"}],
    "feature_clipping": [{}, {"loss": "ece"}],
    "histogram_binning": [{}, {"strategy": "equal_width"}, {"top_label": True}],
    "isotonic": [{}, {"method": "accuracy_preserving"}],
    "split_conformal": [{}, {"score": "saps", "allow_empty": False}],
}
"""Variants of a kind, where its defaults alone would leave arithmetic untested."""

LEAVE_OVERCONFIDENCE = {"identity", "class_prior", "feature_clipping"}
"""Kinds that have nothing with which to temper a logit, or temper large ones alone."""

VARIANTS = [(kind, params) for kind in calibrators.kinds() for params in PARAMETERS.get(kind, [{}])]
every_kind = pytest.mark.parametrize(
    ("kind", "params"), VARIANTS, ids=[f"{kind}{params or ''}" for kind, params in VARIANTS]
)


def draw_rows(n_samples: int, n_classes: int, *, scale: float = 2.0, seed: int = 0) -> tuple[Array, Array]:
    """Overconfident logits: labels are drawn from softmax(z), the rows returned hold scale * z."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n_samples, n_classes))
    labels = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    labels[:2] = 0, 1  # at least two classes, however few the rows
    return scale * z, labels


def fitted(
    kind: str, params: dict[str, Any], n_classes: int = 4, *, n_samples: int = 200, seed: int = 0, **beside: Any
) -> Calibrator:
    return fit(kind, params, *draw_rows(n_samples, n_classes, seed=seed), **beside)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_stage(calibrator: Calibrator, logits: Array) -> Array:
    feeds = {"logits": logits.astype(np.float32)}
    return np.asarray(session(stage(calibrator).proto).run(["probabilities"], feeds)[0])


def assert_distributions(probabilities: Array, shape: tuple[int, int]) -> None:
    assert probabilities.shape == shape
    assert np.all(probabilities >= 0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)


# ---- probabilities


@every_kind
@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rows_are_distributions(kind: str, params: dict[str, Any], n_classes: int, scale: float) -> None:
    calibrator = fitted(kind, params, n_classes)
    logits = scale * np.random.default_rng(1).normal(size=(50, n_classes))
    for values in (logits, logits.astype(np.float32)):
        probabilities = calibrator.predict_proba(values)
        assert_distributions(probabilities, (50, n_classes))
        assert probabilities.dtype == values.dtype


@every_kind
def test_each_row_stands_alone(kind: str, params: dict[str, Any]) -> None:
    calibrator = fitted(kind, params)
    logits, _ = draw_rows(40, 4, seed=1)
    whole = calibrator.predict_proba(logits)
    chosen = np.random.default_rng(2).permutation(40)[:17]
    np.testing.assert_array_equal(calibrator.predict_proba(logits[chosen]), whole[chosen])
    np.testing.assert_array_equal(calibrator.predict_proba(logits[:1]), whole[:1])
    assert calibrator.predict_proba(logits[:0]).shape == (0, 4)


@every_kind
def test_a_long_batch_is_worked_through_in_blocks_without_seams(
    kind: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrator = fitted(kind, params)
    logits, _ = draw_rows(100, 4, seed=1)
    whole = calibrator.predict_proba(logits)
    monkeypatch.setattr("calibrators.numerics.ELEMENTS_AT_ONCE", 28)
    np.testing.assert_array_equal(calibrator.predict_proba(logits), whole)


@every_kind
def test_overconfident_logits_are_not_made_worse(kind: str, params: dict[str, Any]) -> None:
    """Held out, 5,000 rows; the true probabilities are softmax(z / 2), far from softmax(z)."""
    calibrator = fitted(kind, params, n_samples=2000)
    logits, labels = draw_rows(5000, 4, seed=1)

    def log_loss(probabilities: Array) -> float:
        return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())

    own = log_loss(Identity.of(4).predict_proba(logits))
    calibrated = log_loss(calibrator.predict_proba(logits))
    if kind in LEAVE_OVERCONFIDENCE:
        assert calibrated <= own + 0.01
    else:
        assert calibrated < own - 0.1


# ---- fits


@every_kind
def test_a_clone_refits_to_the_same_bytes(kind: str, params: dict[str, Any]) -> None:
    calibrator = fitted(kind, params)
    again = clone(calibrator).fit(*draw_rows(200, 4), **beside(calibrator, draw_rows(200, 4)[0]))
    assert calibrators.dumps(again) == calibrators.dumps(calibrator)


@every_kind
def test_an_artifact_round_trips_exactly(kind: str, params: dict[str, Any]) -> None:
    calibrator = fitted(kind, params)
    loaded = calibrators.loads(calibrators.dumps(calibrator))
    assert type(loaded) is type(calibrator)
    assert loaded.get_params() == calibrator.get_params()
    assert loaded.tensors().keys() == calibrator.tensors().keys()
    for name, array in calibrator.tensors().items():
        assert loaded.tensors()[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.tensors()[name], array)
    logits, _ = draw_rows(20, 4, seed=1)
    np.testing.assert_array_equal(loaded.predict_proba(logits), calibrator.predict_proba(logits))
    assert calibrators.dumps(loaded) == calibrators.dumps(calibrator)


@every_kind
def test_a_weight_of_two_equals_the_row_twice(kind: str, params: dict[str, Any]) -> None:
    logits, labels = draw_rows(80, 3)
    counts = np.random.default_rng(1).integers(0, 4, size=80)
    counts[:2] = 1
    weighted = fit(kind, params, logits, labels, sample_weight=counts)
    repeated = fit(kind, params, np.repeat(logits, counts, axis=0), np.repeat(labels, counts))
    unseen, _ = draw_rows(50, 3, seed=2)
    np.testing.assert_allclose(weighted.predict_proba(unseen), repeated.predict_proba(unseen), atol=1e-9)


@every_kind
def test_float32_float64_torch_and_lists_agree(kind: str, params: dict[str, Any]) -> None:
    logits, labels = draw_rows(100, 3)
    single = logits.astype(np.float32)
    forms: list[tuple[Any, Any]] = [
        (single, labels.astype(np.int32)),
        (single.astype(np.float64), labels.astype(np.uint8)),
        (torch.tensor(single, requires_grad=True), torch.tensor(labels)),
        (single.tolist(), labels.tolist()),
    ]
    first, *others = [fit(kind, params, z, y).predict_proba(z) for z, y in forms]
    assert first.dtype == np.float32
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


@every_kind
def test_extreme_equal_and_tied_logits_have_an_answer(kind: str, params: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=60)
    sets = {
        "extreme": 1e4 * rng.normal(size=(60, 3)),
        "one far column": np.column_stack([rng.normal(size=(60, 2)), np.full(60, -1e4)]),
        "largest accepted": 1e30 * rng.choice([-1.0, 1.0], size=(60, 3)),
        "tiny": 1e-30 * rng.normal(size=(60, 3)),
        "all equal": np.full((60, 3), 7.0),
        "ties": rng.integers(-1, 2, size=(60, 3)).astype(float),
        "always right": 10.0 * np.eye(3)[labels],
        "always wrong": -10.0 * np.eye(3)[labels],
    }
    for logits in sets.values():
        calibrator = fit(kind, params, logits, labels)
        for unseen in sets.values():
            assert_distributions(calibrator.predict_proba(unseen), (60, 3))
            assert_distributions(calibrator.predict_proba(unseen.astype(np.float32)), (60, 3))


@every_kind
def test_a_thousand_classes_most_of_them_absent_are_served(kind: str, params: dict[str, Any]) -> None:
    logits, labels = draw_rows(60, 1000)
    calibrator = fit(kind, params, logits, labels)
    probabilities = calibrator.predict_proba(logits)
    assert_distributions(probabilities, (60, 1000))
    assert probabilities.min() > 0
    np.testing.assert_allclose(run_stage(calibrator, logits), probabilities, atol=calibrator.float32_atol)


@every_kind
def test_a_hundred_thousand_rows_are_fitted(kind: str, params: dict[str, Any]) -> None:
    calibrator = fitted(kind, params, 3, n_samples=100_000)
    assert_distributions(calibrator.predict_proba(draw_rows(100_000, 3, seed=1)[0]), (100_000, 3))


# ---- refusals


@every_kind
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, np.nan], [1.0, 0.0]], [0, 1], r"finite.*nan at \[0, 1\]"),
        ([[0.0, 1.0], [np.inf, 0.0]], [0, 1], r"finite.*inf at \[1, 0\]"),
        ([[0.0, 1.0], [1.0, 0.0]], [1, 1], r"at least 2 classes, got 2 rows with classes \[1\]"),
        ([[0.0, 1.0]], [1], "at least 2 classes, got 1 rows"),
        (np.zeros((0, 2)), [], "at least 2 classes, got 0 rows"),
        ([0.0, 1.0], [0, 1], r"shape \(n_samples, n_classes\), got shape \(2,\)"),
        ([[0.0], [1.0]], [0, 1], "at least 2 columns"),
        ([[0.0, 1.0], [1.0, 0.0]], [0, 2], r"0\.\.1, got 2 at row 1"),
        ([[0.0, 1.0], [1.0, 0.0]], [0.5, 1.0], r"0\.\.1, got 0.5 at row 0"),
        ([[0.0, 1.0], [1.0, 0.0]], [0, -1], r"0\.\.1, got -1 at row 1"),
        ([[0.0, 1.0], [1.0, 0.0]], [0.0, np.inf], r"0\.\.1, got inf at row 1"),
        ([[0.0, 1.0], [1.0, 0.0]], [0], r"y must have shape \(2,\)"),
    ],
)
def test_an_unusable_calibration_set_is_refused_and_named(
    kind: str, params: dict[str, Any], logits: Any, labels: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(kind, params, logits, labels)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, -1.0, 1.0], "not negative"),
        ([1.0, np.nan, 1.0], "finite"),
        ([1.0, 1.0], r"shape \(3,\), got shape \(2,\)"),
        ([0.0, 0.0, 0.0], "positive"),
        ([1.0, 1.0, 0.0], r"at least 2 classes, got 3 rows with classes \[0\]"),
    ],
)
def test_unusable_weights_are_refused_and_named(weight: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureScaling().fit([[0.0, 1.0], [1.0, 0.0], [1.0, 0.5]], [0, 0, 1], sample_weight=weight)


@pytest.mark.parametrize("logits", [[["a", "b"]], [[1j, 2.0]], [[True, False]], np.array([[None, 1.0]], dtype=object)])
def test_logits_that_are_not_real_numbers_are_a_type_error(logits: Any) -> None:
    with pytest.raises(TypeError, match="logits must be real numbers"):
        Identity.of(2).predict_proba(logits)


def test_labels_that_are_not_numbers_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="class indices"):
        Identity().fit([[0.0, 1.0], [1.0, 0.0]], ["cat", "dog"])


@every_kind
def test_nothing_is_predicted_or_written_before_a_fit(kind: str, params: dict[str, Any]) -> None:
    calibrator = calibrators.create(kind, **params)
    for use in (
        lambda: calibrator.predict_proba([[0.0, 1.0]]),
        calibrator.tensors,
        lambda: calibrators.dumps(calibrator),
    ):
        with pytest.raises(NotFittedError, match="not fitted; call fit"):
            use()


@every_kind
def test_another_number_of_columns_is_refused(kind: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fitted on 4 classes, got logits with 3 columns"):
        fitted(kind, params).predict_proba(np.zeros((2, 3)))


# ---- the graph


@every_kind
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    n_classes=st.integers(2, 12),
    n_rows=st.integers(1, 20),
    fit_scale=st.sampled_from([0.03, 1.0, 3.0, 20.0]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 25.0]),
    offset=st.sampled_from([0.0, -60.0, 60.0]),
    seed=st.integers(0, 1000),
)
def test_the_graph_agrees_with_predict_proba(
    kind: str,
    params: dict[str, Any],
    n_classes: int,
    n_rows: int,
    fit_scale: float,
    scale: float,
    offset: float,
    seed: int,
) -> None:
    calibrator = fit(kind, params, *draw_rows(60, n_classes, scale=fit_scale, seed=seed))
    unseen = scale * np.random.default_rng(seed + 1).normal(size=(n_rows, n_classes)) + offset
    logits = np.clip(unseen, -100, 100).astype(np.float32)
    served = run_stage(calibrator, logits)
    assert_distributions(served, logits.shape)
    exact = calibrator.predict_proba(logits.astype(np.float64))
    np.testing.assert_allclose(served, exact, atol=calibrator.float32_atol)
    np.testing.assert_allclose(calibrator.predict_proba(logits), exact, atol=calibrator.float32_atol)


@every_kind
def test_the_graph_names_the_confidence_and_the_label(kind: str, params: dict[str, Any]) -> None:
    logits = draw_rows(30, 4, seed=1)[0].astype(np.float32)
    wanted = ["probabilities", "confidence", "label"]
    probabilities, confidence, label = session(stage(fitted(kind, params)).proto).run(wanted, {"logits": logits})
    np.testing.assert_array_equal(confidence, probabilities.max(axis=1))
    np.testing.assert_array_equal(label, probabilities.argmax(axis=1))
    assert (confidence.dtype, label.dtype) == (np.float32, np.int64)


@every_kind
def test_the_graph_computes_what_the_kind_computes_beside_the_probabilities(kind: str, params: dict[str, Any]) -> None:
    calibrator = fitted(kind, params)
    logits, _ = draw_rows(40, 4, seed=1)
    graph = session(stage(calibrator).proto)
    assert [output.name for output in graph.get_outputs()] == [*ADDED_OUTPUTS, *calibrator.further_outputs]
    wanted = calibrator.predict_further(logits)
    assert wanted.keys() == set(calibrator.further_outputs)
    for name in wanted:
        (served,) = graph.run([name], {"logits": logits.astype(np.float32)})
        np.testing.assert_allclose(served, wanted[name], rtol=calibrator.float32_atol, atol=calibrator.float32_atol)


@every_kind
def test_another_fit_is_another_feed_and_not_another_session(kind: str, params: dict[str, Any]) -> None:
    # A reference set is part of the graph: fits that compare with the same rows share it.
    reads_reference = "reference" in calibrators.create(kind).fit_reads
    beside = {"reference": {"logits": draw_rows(150, 4, seed=3)[0]}} if reads_reference else {}
    one, other = fitted(kind, params, **beside), fitted(kind, params, n_samples=500, seed=1, **beside)
    assert signature(one) == signature(other)
    assert signature(one) != signature(fitted(kind, params, n_classes=5))
    logits = draw_rows(30, 4, seed=2)[0].astype(np.float32)
    feeds = {"logits": logits, **stage(other).parameters}
    served = session(stage(one).proto).run(["probabilities"], feeds)[0]
    np.testing.assert_array_equal(served, run_stage(other, logits))


@every_kind
def test_a_row_that_is_not_finite_leaves_the_rest_of_its_batch_alone(kind: str, params: dict[str, Any]) -> None:
    calibrator = fitted(kind, params)
    logits = draw_rows(6, 4, seed=1)[0].astype(np.float32)
    expected = run_stage(calibrator, logits)
    logits[1, 2], logits[3], logits[4, 0] = np.nan, -np.inf, np.inf
    served = run_stage(calibrator, logits)
    np.testing.assert_array_equal(served[[0, 2, 5]], expected[[0, 2, 5]])
    assert np.isnan(served[1]).all()


# ---- fused into a model

N_FEATURES, N_HIDDEN, N_CLASSES = 5, 8, 3


def build_mlp(opset: int, dtype: type[np.floating[Any]], ending: str = "logits", **names: str) -> onnx.ModelProto:
    """A perceptron with one hidden layer in the given type; `ending` names what its output holds."""
    rng = np.random.default_rng(0)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {
        "W1": rng.normal(size=(N_FEATURES, N_HIDDEN)),
        "b1": rng.normal(size=N_HIDDEN),
        "W2": 3 * rng.normal(size=(N_HIDDEN, N_CLASSES)),
        "b2": rng.normal(size=N_CLASSES),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "W1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "W2", "b2"], ["z"]),
        helper.make_node("Identity" if ending == "logits" else "Softmax", ["z"], [names.get("scores", "scores")]),
        helper.make_node("ArgMax", ["z"], [names.get("best", "best")], axis=1, keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(names.get("x", "x"), element, ["batch", N_FEATURES])]
    nodes[0].input[0] = inputs[0].name
    outputs = [
        helper.make_tensor_value_info(nodes[3].output[0], element, ["batch", N_CLASSES]),
        helper.make_tensor_value_info(nodes[4].output[0], TensorProto.INT64, ["batch"]),
    ]
    initializers = [numpy_helper.from_array(value.astype(dtype), name) for name, value in weights.items()]
    if opset < 10:  # IR version 3, as the exporters of that time wrote it: every initializer is an input too
        inputs += [helper.make_tensor_value_info(tensor.name, element, tensor.dims) for tensor in initializers]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, initializers)
    ir_version = {9: 3, 13: 7, 17: 8, 21: 10}[opset]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def tapped(ending: str = "logits", tensor: str = "z") -> Inspection:
    form: Any = "logits" if tensor == "z" else "probabilities"
    return Inspection("scores", Tap(tensor, form, f"ends in {ending}"), None, "not asked for", N_CLASSES)


def inputs_for(model: onnx.ModelProto, n_rows: int = 16) -> dict[str, Array]:
    (x,) = session(model).get_inputs()
    dtype = np.float16 if x.type == "tensor(float16)" else np.float32
    return {x.name: np.random.default_rng(1).normal(size=(n_rows, N_FEATURES)).astype(dtype)}


def assert_own_outputs_untouched(model: onnx.ModelProto, fused: FusedModel) -> None:
    feeds = inputs_for(model)
    before, after = session(model), session(fused.proto)
    assert [value.name for value in after.get_inputs()] == [value.name for value in before.get_inputs()]
    assert list(fused.own_outputs) == [value.name for value in before.get_outputs()]
    for name, served_name in fused.own_outputs.items():
        own, served = before.run([name], feeds)[0], after.run([served_name], feeds)[0]
        assert served.dtype == own.dtype
        np.testing.assert_array_equal(served, own)


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_a_fused_model_keeps_its_outputs_bit_for_bit_and_gains_calibrated_ones(
    kind: str, params: dict[str, Any], opset: int, dtype: type[np.floating[Any]]
) -> None:
    model = build_mlp(opset, dtype)
    calibrator = fitted(kind, params, N_CLASSES)
    fused = fuse(model, calibrator, tapped())
    onnx.checker.check_model(fused.proto, full_check=True)
    assert default_opset(fused.proto) == opset
    assert_own_outputs_untouched(model, fused)
    feeds = inputs_for(model)
    logits, probabilities = session(fused.proto).run([LOGITS, "probabilities"], feeds)
    # The runtime may compute float16 in float32 and then taps the value before its rounding.
    own = session(model).run(["scores"], feeds)[0].astype(np.float32)
    np.testing.assert_allclose(logits, own, rtol=0.0 if dtype == np.float32 else 2.0**-10)
    expected = calibrator.predict_proba(logits.astype(np.float64))
    np.testing.assert_allclose(probabilities, expected, atol=calibrator.float32_atol)


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_probabilities_are_tapped_as_their_logarithm(opset: int) -> None:
    model = build_mlp(opset, np.float32, ending="softmax")
    calibrator = fitted("temperature", {}, N_CLASSES)
    fused = fuse(model, calibrator, tapped("softmax", "scores"))
    assert_own_outputs_untouched(model, fused)
    own, served = session(fused.proto).run(["scores", "probabilities"], inputs_for(model))
    expected = calibrator.predict_proba(np.log(np.maximum(own, np.finfo(np.float32).tiny)).astype(np.float64))
    np.testing.assert_allclose(served, expected, atol=2e-6)


@pytest.mark.parametrize("form", ["log_odds", "probability"])
def test_a_single_column_becomes_two_classes(form: Any) -> None:
    column = np.array([[0.2], [0.5], [0.999]], dtype=np.float32)
    value = helper.make_tensor_value_info("s", TensorProto.FLOAT, ["batch", 1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    graph = helper.make_graph([helper.make_node("Identity", ["s"], ["y"])], "column", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    fused = fuse(model, Identity.of(2), Inspection("y", Tap("s", form, "one column"), None, "none", 2))
    served = session(fused.proto).run(["probabilities"], {"s": column})[0]
    positive = column if form == "probability" else 1 / (1 + np.exp(-column))
    np.testing.assert_allclose(served, np.hstack([1 - positive, positive]), atol=1e-6)


@pytest.mark.parametrize("opset", [9, 17])
def test_outputs_with_reserved_names_are_served_as_raw(opset: int) -> None:
    model = build_mlp(opset, np.float32, scores="probabilities", best="label")
    fused = fuse(model, Identity.of(N_CLASSES), tapped(tensor="z"))
    assert fused.own_outputs == {"probabilities": "raw_probabilities", "label": "raw_label"}
    assert_own_outputs_untouched(model, fused)


def test_raw_names_that_are_taken_are_avoided_and_the_tap_follows_its_tensor() -> None:
    model = build_mlp(17, np.float32, scores="raw_label", best="label")
    fused = fuse(model, Identity.of(N_CLASSES), tapped(tensor="z"))
    assert fused.own_outputs == {"raw_label": "raw_label", "label": "raw_raw_label"}
    assert_own_outputs_untouched(model, fused)

    model = build_mlp(17, np.float32, ending="softmax", scores="probabilities")
    fused = fuse(model, Identity.of(N_CLASSES), tapped(tensor="probabilities"))
    own, served = session(fused.proto).run(["raw_probabilities", "probabilities"], inputs_for(model))
    np.testing.assert_allclose(served, own, atol=1e-6)


def test_an_initializer_with_a_reserved_name_is_renamed() -> None:
    model = build_mlp(17, np.float32)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("W2", "confidence")
    model.graph.node[2].input[1] = "confidence"
    assert_own_outputs_untouched(model, fuse(model, Identity.of(N_CLASSES), tapped()))


def test_a_model_that_cannot_be_fused_is_refused_and_left_alone() -> None:
    model = build_mlp(17, np.float32)
    before = model.SerializeToString()
    with pytest.raises(ValueError, match="the model has 3 classes, the calibrator was fitted on 4"):
        fuse(model, Identity.of(4), tapped())
    with pytest.raises(ValueError, match=r"inputs named like the outputs.*\['label'\]"):
        fuse(build_mlp(17, np.float32, x="label"), Identity.of(N_CLASSES), tapped())
    with pytest.raises(NotFittedError):
        fuse(model, TemperatureScaling(), tapped())
    model.opset_import[0].version = 8
    with pytest.raises(ValueError, match="opset 8"):
        fuse(model, Identity.of(N_CLASSES), tapped())
    model.opset_import[0].version = 17
    assert model.SerializeToString() == before


# ---- the facade


def test_a_kind_is_its_filename() -> None:
    assert calibrators.kinds() == sorted(calibrators.kinds())
    assert {"identity", "isotonic", "platt", "temperature"} <= set(calibrators.kinds())
    assert [calibrators.create(kind).kind for kind in calibrators.kinds()] == calibrators.kinds()


def test_an_unknown_kind_or_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown kind 'os'; kinds are .*temperature"):
        calibrators.create("os")
    with pytest.raises(ValueError, match=r"isotonic has parameters \['method'\], got \['bins', 'kind'\]"):
        calibrators.create("isotonic", bins=3, kind="x")
    with pytest.raises(ValueError, match="method must be one of one_vs_rest, accuracy_preserving, got 'both'"):
        calibrators.create("isotonic", method="both")


def test_importing_the_package_imports_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys, calibrators; from calibrators.kinds import temperature; import calibrators.kinds.platt;"
        "assert callable(calibrators.kinds) and calibrators.metrics;"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture(autouse=True)
def _numpy_speaks_up() -> Iterator[None]:
    """Overflow, NaN and division by zero are errors in every promise above."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        yield
