"""Finding the logits. The oracle is onnxruntime: what is tapped, made probabilities, is what the model itself gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from calibrators import fuse
from calibrators.inspection import Inspection, inspect_model
from calibrators.kinds.identity import Identity

Array = NDArray[Any]

RNG = np.random.default_rng(20)
N_ROWS = 9
X = RNG.normal(size=(N_ROWS, 5)).astype(np.float32)
CONSTANTS = {
    "V": RNG.normal(size=(5, 6)),  # x -> h
    "W": RNG.normal(size=(6, 4)),  # h -> four classes
    "b": RNG.normal(size=4),
    "w": RNG.normal(size=(6, 1)),  # h -> one score
    "one": np.array(1.0),
    "ones": np.ones(4),
    "half": np.array(0.5),
    "lowest": np.array(-np.inf),
    "tiny": np.array(1e-12),
    "large": np.array(100.0),
    "scale": np.array(0.05),
    "zero_point": np.array(0, dtype=np.int8),
}
INDICES = {
    "last": [-1],
    "first": [0],
    "column": [-1, 1],
    "flat": [-1],
    "halves": [-1, 2],
    "rows4": [-1, 4],
    "one_i": [1],
}
HIDDEN = "hidden = MatMul (x, V) h = Relu (hidden)"
DENSE = f"{HIDDEN} m = MatMul (h, W) z = Add (m, b)"
SCORE = f"{HIDDEN} s = MatMul (h, w)"


def build(body: str, outputs: str = "float[N, 4] p", *, opset: int = 17) -> onnx.ModelProto:
    """A model of x [N, 5] in ONNX's text syntax, with those of the constants that it names."""
    ir_version = 10 if opset > 20 else 8
    model = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["": {opset}, "ai.onnx.ml": 3]>\n'
        f"test (float[N, 5] x) => ({outputs}) {{ {body} }}"
    )
    arrays = {name: value if value.dtype == np.int8 else value.astype(np.float32) for name, value in CONSTANTS.items()}
    arrays |= {name: np.array(value, dtype=np.int64) for name, value in INDICES.items()}
    named = set(re.findall(r"\w+", body))
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in named
    )
    return model


def run(model: onnx.ModelProto, *tensors: str, x: Array = X) -> list[Any]:
    """The named tensors, inner ones too, as onnxruntime computes them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    shown = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(tensors) if name not in shown)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(list(tensors), {session.get_inputs()[0].name: x}))


def two_columns(positive: Array) -> Array:
    column = np.asarray(positive, dtype=np.float64).reshape(-1, 1)
    return np.hstack([1 - column, column])


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


FORMED = {
    "logits": softmax,
    "log_odds": lambda s: two_columns(1 / (1 + np.exp(-s))),
    "probabilities": lambda p: p / p.sum(axis=1, keepdims=True),
    "probability": two_columns,
}


def distribution(own: Any) -> Array:
    """A model's own output as rows of probabilities: maps listed, logarithms undone, a single column completed."""
    if isinstance(own, list):
        own = np.array([list(row.values()) for row in own])
    own = np.exp(own) if np.all(own <= 0) else own
    return two_columns(own) if own.ndim == 1 or own.shape[1] == 1 else own


def assert_tap_gives_the_output(model: onnx.ModelProto, found: Inspection, x: Array = X) -> None:
    own, tapped = run(model, found.output, found.logits.tensor, x=x)
    formed = FORMED[found.logits.form](tapped.astype(np.float64))
    np.testing.assert_allclose(formed, distribution(own), atol=1e-6)
    assert found.n_classes == formed.shape[1]


SHIFT = "top = ReduceMax <axes = [1]> (z) d = Sub (z, top) e = Exp (d)"
JAX = """
    top0 = ReduceMax <axes = [1], keepdims = 0> (z) top1 = Max (lowest, top0) top2 = Reshape (top1, column)
    rank = Shape (z) top = Expand (top2, rank) d = Sub (z, top) e = Exp (d)
    sum0 = ReduceSum <keepdims = 0> (e, last) sum1 = Reshape (sum0, column) sum = Expand (sum1, rank) p = Div (e, sum)
"""
PAIR = "q = Sigmoid (s) r = Sub (one, q) p = Concat <axis = 1> (r, q)"
LABELS = "classlabels_int64s = [0, 1, 2, 3]"

PATTERNS: dict[str, tuple[str, str, str, str]] = {  # nodes, outputs -> tensor, form
    "softmax": (f"{DENSE} p = Softmax <axis = -1> (z)", "float[N, 4] p", "z", "logits"),
    "softmax, default axis": (f"{DENSE} p = Softmax (z)", "float[N, 4] p", "z", "logits"),
    "softmax, axis 1": (f"{DENSE} p = Softmax <axis = 1> (z)", "float[N, 4] p", "z", "logits"),
    "softmax, nothing declared": (f"{DENSE} p = Softmax (z)", "float[N, K] p", "z", "logits"),
    "softmax, copied": (f"{DENSE} q = Softmax (z) i = Identity (q) p = Dropout (i)", "float[N, 4] p", "z", "logits"),
    "softmax, reshaped": (f"{DENSE} q = Softmax (z) p = Reshape (q, rows4)", "float[N, 4] p", "z", "logits"),
    "softmax, flattened": (f"{DENSE} q = Softmax (z) p = Flatten (q)", "float[N, 4] p", "z", "logits"),
    "softmax, lifted and back": (f"{DENSE} q = Softmax (z) u = Unsqueeze (q, one_i) p = Squeeze (u, one_i)", "float[N, 4] p", "z", "logits"),
    "softmax in double": (f"{DENSE} q = Softmax (z) p = Cast <to = 11> (q)", "double[N, 4] p", "z", "logits"),
    "softmax, zipped": (f"{DENSE} q = Softmax (z) p = ai.onnx.ml.ZipMap <{LABELS}> (q)", "seq(map(int64, float)) p", "z", "logits"),
    "log-softmax": (f"{DENSE} p = LogSoftmax (z)", "float[N, 4] p", "z", "logits"),
    "log of softmax": (f"{DENSE} q = Softmax (z) p = Log (q)", "float[N, 4] p", "z", "logits"),
    "exp of log-softmax": (f"{DENSE} q = LogSoftmax (z) p = Exp (q)", "float[N, 4] p", "z", "logits"),
    "softmax with a temperature": (f"{DENSE} t = Mul (z, half) p = Softmax (t)", "float[N, 4] p", "t", "logits"),
    "softmax of a normalised layer": (f"{DENSE} t = BatchNormalization (z, ones, b, b, ones) p = Softmax (t)", "float[N, 4] p", "t", "logits"),
    "exp over sum": (f"{DENSE} e = Exp (z) t = ReduceSum (e, last) p = Div (e, t)", "float[N, 4] p", "z", "logits"),
    "exp over guarded sum": (f"{DENSE} e = Exp (z) t = ReduceSum (e, last) g = Max (t, tiny) p = Div (e, g)", "float[N, 4] p", "z", "logits"),
    "exp over sum, shifted": (f"{DENSE} {SHIFT} t = ReduceSum (e, one_i) p = Div (e, t)", "float[N, 4] p", "z", "logits"),
    "exp over sum, as jax2tf": (f"{DENSE} {JAX}", "float[N, 4] p", "z", "logits"),
    "exp over sum of a difference": (f"{DENSE} d = Sub (z, b) e = Exp (d) t = ReduceSum (e, last) p = Div (e, t)", "float[N, 4] p", "d", "logits"),
    "less log of sum of exp": (f"{DENSE} t = ReduceLogSumExp <axes = [1]> (z) p = Sub (z, t)", "float[N, 4] p", "z", "logits"),
    "exp of less log of sum of exp": (f"{DENSE} t = ReduceLogSumExp <axes = [1], keepdims = 0> (z) u = Reshape (t, column) d = Sub (z, u) p = Exp (d)", "float[N, 4] p", "z", "logits"),
    "sigmoid of a column": (f"{SCORE} p = Sigmoid (s)", "float[N, 1] p", "s", "log_odds"),
    "sigmoid of a column, nothing declared": (f"{SCORE} p = Sigmoid (s)", "float[N, K] p", "s", "log_odds"),
    "sigmoid of a vector": (f"{SCORE} v = Reshape (s, flat) p = Sigmoid (v)", "float[N] p", "v", "log_odds"),
    "sigmoid of a column, flattened": (f"{SCORE} q = Sigmoid (s) p = Squeeze (q, one_i)", "float[N] p", "s", "log_odds"),
    "sigmoid and its complement": (f"{SCORE} {PAIR}", "float[N, 2] p", "s", "log_odds"),
    "sigmoid and its complement, zipped": (f"{SCORE} {PAIR.replace('p =', 'y =')} p = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (y)", "seq(map(int64, float)) p", "s", "log_odds"),
    "complement of a sigmoid first": (f"{SCORE} {PAIR.replace('(r, q)', '(q, r)').replace('p =', 'prob =')}", "float[N, 2] prob", "prob", "probabilities"),
    "rows divided by the runtime": (f"{DENSE} a = Sigmoid (z) p = ai.onnx.ml.Normalizer <norm = \"L1\"> (a)", "float[N, 4] p", "p", "probabilities"),
    "rows divided by their 1-norm": (f"{DENSE} a = Sigmoid (z) p = LpNormalization <p = 1> (a)", "float[N, 4] p", "p", "probabilities"),
    "a mean of two softmaxes, by its name": (f"{DENSE} q = Softmax (z) r = Softmax (m) prob = Mean (q, r)", "float[N, 4] prob", "prob", "probabilities"),
    "one column of a softmax, by its name": (f"{DENSE} q = Softmax (z) prob = Gather <axis = 1> (q, one_i)", "float[N, 1] prob", "prob", "probability"),
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_tapped_tensor_gives_the_models_own_probabilities(pattern: str) -> None:
    body, outputs, tensor, form = PATTERNS[pattern]
    model = build(body, outputs)
    found = inspect_model(model)
    assert (found.logits.tensor, found.logits.form) == (tensor, form)
    assert_tap_gives_the_output(model, found)


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 15, 18, 21, 23])
def test_a_softmax_is_found_in_every_opset(opset: int) -> None:
    for body in (f"{DENSE} p = Softmax (z)", f"{DENSE} p = LogSoftmax <axis = 1> (z)"):
        model = build(body, opset=opset)
        found = inspect_model(model)
        assert found.logits.tensor == "z"
        assert_tap_gives_the_output(model, found)


@pytest.mark.parametrize(
    ("opset", "reductions"), [(9, ("axes = [1]", "axes = [1]")), (13, ("axes = [-1]", "")), (18, ("", ""))]
)
def test_a_softmax_in_arithmetic_is_found_wherever_the_opset_has_the_axes(
    opset: int, reductions: tuple[str, str]
) -> None:
    largest, total = (f"<{axes}> ({{0}})" if axes else "({0}, last)" for axes in reductions)
    body = f"top = ReduceMax {largest.format('z')} d = Sub (z, top) e = Exp (d) t = ReduceSum {total.format('e')} p = Div (e, t)"
    model = build(f"{DENSE} {body}", opset=opset)
    assert inspect_model(model).logits.tensor == "z"
    assert_tap_gives_the_output(model, inspect_model(model))


@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
def test_every_float_type_is_understood(dtype: str) -> None:
    to = {"float": 1, "double": 11, "float16": 10}[dtype]
    model = build(f"{DENSE} c = Cast <to = {to}> (z) p = Softmax (c)", f"{dtype}[N, 4] p")
    assert inspect_model(model).logits.tensor == "c"


def test_a_quantised_output_is_looked_through() -> None:
    body = (
        f"{DENSE} q = Softmax (z) i = QuantizeLinear (q, scale, zero_point) p = DequantizeLinear (i, scale, zero_point)"
    )
    found = inspect_model(build(body))
    assert (found.logits.tensor, found.features) == ("z", "h")
    own, tapped = run(build(body), "p", "z")
    np.testing.assert_allclose(softmax(tapped), own, atol=0.05 / 2 + 1e-6)  # half a step of quantisation


# --- A dense layer with nothing after it. ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "outputs", "form", "n_classes"),
    [
        (DENSE, "float[N, 4] z", "logits", 4),
        (DENSE, "float[N, K] z", "logits", 4),
        (f"{HIDDEN} z = Gemm (h, W, b)", "float[N, 4] z", "logits", 4),
        (f"{DENSE} y = Identity (z)", "float[N, 4] y", "logits", 4),
        (f"{DENSE} y = Mul (z, half)", "float[N, 4] y", "logits", 4),
        (f"{DENSE} y = Softmax (z) best = ArgMax (y)", "float[N, 4] z, int64[N, 1] best", "logits", 4),
        (SCORE, "float[N, 1] s", "log_odds", 2),
        (f"{SCORE} y = Squeeze (s, one_i)", "float[N] y", "log_odds", 2),
    ],
)
def test_the_result_of_the_last_dense_layer_is_the_logits(body: str, outputs: str, form: str, n_classes: int) -> None:
    model = build(body, outputs)
    found = inspect_model(model)
    assert (found.logits.tensor, found.logits.form) == (found.output, form)
    assert (found.n_classes, found.features) == (n_classes, "h")
    assert "no normalisation after it" in found.logits.reason


def test_zipped_scores_are_tapped_in_front_of_the_maps() -> None:
    model = build(f"{DENSE} p = ai.onnx.ml.ZipMap <{LABELS}> (z)", "seq(map(int64, float)) p")
    found = inspect_model(model)
    assert (found.output, found.logits.tensor, found.logits.form) == ("p", "z", "logits")


# --- ai.onnx.ml ------------------------------------------------------------------------------------------------------

FREQUENCIES = [0.7, 0.2, 0.1, 0.0, 0.4, 0.6]
MARGINS = [1.5, -0.2, 0.1, -2.0, 0.4, 0.6]
KERNEL = {"kernel_type": "LINEAR", "kernel_params": [1.0, 0.0, 0.0], "vectors_per_class": [1, 1], "rho": [0.1]}


def classifier(
    operator: str, *, labels: str = "classlabels_int64s", width: int | None = 3, **attributes: Any
) -> onnx.ModelProto:
    """x -> label, p by one ai.onnx.ml node."""
    node = helper.make_node(operator, ["x"], ["label", "p"], domain="ai.onnx.ml", **attributes)
    n_labels = width or 3
    node.attribute.append(helper.make_attribute(labels, list(range(n_labels))))
    model = build(
        "p = Identity (x)", "int64[N] label, float[N, C] p" if width is None else f"int64[N] label, float[N, {width}] p"
    )
    del model.graph.node[:]
    model.graph.node.append(node)
    return model


def trees(
    weights: list[float], classes: int = 3, post_transform: str = "NONE", n_trees: int = 1, **more: Any
) -> onnx.ModelProto:
    """Trees of two leaves on feature 0; each leaf has a weight for every class, or for class 0 of two."""
    ids = [0] if len(weights) == 2 else list(range(classes))
    count = len(weights)
    return classifier(
        "TreeEnsembleClassifier", width=classes, post_transform=post_transform,
        nodes_treeids=[t for t in range(n_trees) for _ in range(3)], nodes_nodeids=[0, 1, 2] * n_trees,
        nodes_featureids=[0, 0, 0] * n_trees, nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"] * n_trees, nodes_values=[0.0] * 3 * n_trees,
        nodes_truenodeids=[1, 0, 0] * n_trees, nodes_falsenodeids=[2, 0, 0] * n_trees,
        class_treeids=[t for t in range(n_trees) for _ in range(count)],
        class_nodeids=[node for node in (1, 2) for _ in ids] * n_trees, class_ids=ids * 2 * n_trees,
        class_weights=weights * n_trees, **more,
    )  # fmt: skip


def linear(intercepts: list[float], post_transform: str, classes: int = 3) -> onnx.ModelProto:
    coefficients = RNG.normal(size=5 * len(intercepts)).tolist()
    return classifier(
        "LinearClassifier", labels="classlabels_ints", width=classes,
        coefficients=coefficients, intercepts=intercepts, post_transform=post_transform,
    )  # fmt: skip


def svm(**platt: list[float]) -> onnx.ModelProto:
    return classifier(
        "SVMClassifier", labels="classlabels_ints", width=2, support_vectors=RNG.normal(size=10).tolist(),
        coefficients=[1.0, -1.0], **KERNEL, **platt,
    )  # fmt: skip


GIVES_PROBABILITIES = {
    "a forest's class frequencies": trees([w / 2 for w in FREQUENCIES], n_trees=2),
    "a tree's frequency of one of two classes": trees([0.9, 0.3], classes=2),
    "boosted trees, softmax": trees(MARGINS, post_transform="SOFTMAX"),
    "boosted trees, logistic": trees([1.5, -0.2], classes=2, post_transform="LOGISTIC"),
    "linear, softmax": linear([0.1, 0.2, -0.3], "SOFTMAX"),
    "linear, one score for two classes, logistic": linear([0.1], "LOGISTIC", classes=2),
    "an SVM with Platt's probabilities": svm(prob_a=[-1.0], prob_b=[0.1]),
}


@pytest.mark.parametrize("case", GIVES_PROBABILITIES)
def test_a_classifier_operator_that_gives_probabilities_is_tapped_by_their_logarithm(case: str) -> None:
    model = GIVES_PROBABILITIES[case]
    found = inspect_model(model)
    assert (found.logits.tensor, found.logits.form, found.features) == ("p", "probabilities", None)
    assert "logarithm of the probabilities" in found.logits.reason
    assert_tap_gives_the_output(model, found)


@pytest.mark.parametrize(
    "model",
    [
        trees(MARGINS),
        trees(FREQUENCIES, n_trees=2),
        linear([0.1, 0.2, -0.3], "NONE"),
        trees([0.5, -0.3, 0.1, 0.2, 0.1, 0.0]),
        trees(FREQUENCIES, base_values=[0.5, 0.0, 0.0]),
    ],
)
def test_a_classifier_operator_without_transform_gives_scores(model: onnx.ModelProto) -> None:
    found = inspect_model(model)
    assert (found.logits.tensor, found.logits.form, found.n_classes) == ("p", "logits", 3)
    (own,) = run(model, "p")
    assert own.min() < 0 or own.sum(axis=1).max() > 1.01  # so they are no probabilities


@pytest.mark.parametrize(
    "model",
    [
        linear([0.1], "NONE", classes=2),
        linear([0.1], "SOFTMAX", classes=2),
        trees([1.5, -0.2], classes=2),
        linear([0.1, 0.2, -0.3], "PROBIT"),
        svm(),
    ],
    ids=["linear", "linear softmax", "boosted trees", "probit", "svm"],
)
def test_scores_that_are_neither_logits_nor_probabilities_are_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="neither probabilities nor logits"):
        inspect_model(model)


@pytest.mark.parametrize(
    ("body", "source"),
    [  # skl2onnx names all of these "probabilities"
        (f"{SCORE} n = Neg (s) probabilities = Concat <axis = 1> (n, s)", "MatMul"),
        ("probabilities = ai.onnx.ml.Scaler <offset = [0.0], scale = [1.0]> (x)", "ai.onnx.ml.Scaler"),
        ("probabilities = Mul (x, half)", "input 'x'"),
    ],
)
def test_a_name_is_not_believed_against_numbers_that_may_be_negative(body: str, source: str) -> None:
    with pytest.raises(ValueError, match=f"named like probabilities, but may be negative: it comes from {source}"):
        inspect_model(build(body, "float[N, 2] probabilities"))


def test_rows_of_signed_numbers_divided_by_their_norm_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match="Normalizer of numbers that may be negative: they come from input 'x'"):
        inspect_model(build('p = ai.onnx.ml.Normalizer <norm = "L1"> (x)', "float[N, 5] p"))


def test_the_classes_are_counted_by_the_labels_where_no_shape_tells() -> None:
    body = f"q = Unknown.op (x) probabilities = ai.onnx.ml.ZipMap <{LABELS}> (q)"
    assert inspect_model(build(body, "seq(map(int64, float)) probabilities")).n_classes == 4


def test_a_model_of_ai_onnx_ml_alone_takes_a_calibrator_too() -> None:
    """XGBoost's exports import no other domain; the calibrator's own nodes need ONNX's."""
    model = trees(MARGINS, post_transform="SOFTMAX")
    (own,) = run(model, "p")
    domains = [entry for entry in model.opset_import if entry.domain == "ai.onnx.ml"]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    (served,) = run(fuse(model, Identity.of(3)).proto, "probabilities")
    np.testing.assert_allclose(served, own, atol=1e-6)


def test_the_leaves_of_trees_are_read_in_double_precision_too() -> None:
    for weights, form in ((FREQUENCIES, "probabilities"), (MARGINS, "logits")):
        model = trees(weights)
        kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "class_weights"]
        del model.graph.node[0].attribute[:]
        stored = numpy_helper.from_array(np.array(weights, dtype=np.float64), "class_weights")
        model.graph.node[0].attribute.extend([*kept, helper.make_attribute("class_weights_as_tensor", stored)])
        assert inspect_model(model).logits.form == form


# --- Several outputs. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "outputs", "output", "tensor"),
    [
        (f"{DENSE} p = Softmax (z)", "float[N, 4] z, float[N, 6] h, float[N, 4] p", "p", "z"),
        (f"{DENSE} p = Softmax (z) q = Relu (z)", "float[N, 4] q, float[N, 4] p", "p", "z"),
        (f"{DENSE} p = Softmax (z) t = Sigmoid (m)", "float[N, 4] t, float[N, 4] p", "p", "z"),
        (f"{DENSE} p = Softmax (z) k = ArgMax (p)", "int64[N, 1] k, float[N, 4] p", "p", "z"),
        (
            f"{DENSE} {SCORE.removeprefix(HIDDEN)} p = Softmax (z) q = Sigmoid (s)",
            "float[N, 1] q, float[N, 4] p",
            "p",
            "z",
        ),
        (f"{DENSE} g = ReduceMean <axes = [1]> (h)", "float[N, 6] h, float[N, 1] g, float[N, 4] z", "z", "z"),
        (DENSE, "float[N, 6] hidden, float[N, 4] z", "z", "z"),  # an embedding is the result of a dense layer, too
        (f"{DENSE} e = Exp (b) prob = Pow (e, z)", "float[N, 6] hidden, float[N, 4] prob", "prob", "prob"),
        (f"{DENSE} e = Exp (b) prob = Pow (e, z) y = MatMul (h, w)", "float[N, 1] y, float[N, 4] prob", "prob", "prob"),
    ],
)
def test_the_strongest_evidence_wins_and_features_do_not_compete(
    body: str, outputs: str, output: str, tensor: str
) -> None:
    found = inspect_model(build(body, outputs))
    assert (found.output, found.logits.tensor) == (output, tensor)


def test_two_outputs_of_the_same_logits_are_no_contest() -> None:
    model = build(f"{DENSE} p = Softmax (z) i = Identity (z) q = LogSoftmax (i)", "float[N, 4] p, float[N, 4] q")
    assert_tap_gives_the_output(model, inspect_model(model))


@pytest.mark.parametrize(
    ("body", "outputs", "claims"),
    [
        (f"{DENSE} p = Softmax (z) q = Softmax (m)", "float[N, 4] p, float[N, 4] q", ["'z'", "'p'", "'m'", "'q'"]),
        (f"{DENSE} y = MatMul (h, w)", "float[N, 4] z, float[N, 1] y", ["'z'", "'y'"]),
    ],
)
def test_equally_good_outputs_are_refused_by_name(body: str, outputs: str, claims: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r'equally good logits: .* write `logits = "<tensor>"` in calserve\.toml'
    ) as error:
        inspect_model(build(body, outputs))
    assert all(claim in str(error.value) for claim in claims)


# --- No classifier. --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, str]] = {
    "multi-label": (f"{DENSE} p = Sigmoid (z)", "float[N, 4] p", r"'p' is a Sigmoid of 'z' \[\?, 4\]: multi-label"),
    "multi-label, with its logits": (f"{DENSE} p = Sigmoid (z)", "float[N, 4] p, float[N, 4] z", "'z' enters a Sigmoid: multi-label"),
    "multi-label, with an embedding": (f"{DENSE} p = Sigmoid (z)", "float[N, 4] p, float[N, 6] hidden", "'hidden' is a feature, not a result: MatMul"),
    "softmax over rows": (f"{DENSE} p = Softmax <axis = 0> (z)", "float[N, 4] p", r"a Softmax over axis 0 of 'z' \[\?, 4\]"),
    "softmax over one column": (f"{SCORE} p = Softmax (s)", "float[N, 1] p", "which has a single column"),
    "a class for each token": (f"{DENSE} t = Unsqueeze (z, one_i) p = Softmax (t)", "float[N, 1, 4] p", r"'t' \[\?, 1, 4\], which has rank 3"),
    "sum over the wrong axis": (f"{DENSE} e = Exp (z) t = ReduceSum (e, first) p = Div (e, t)", "float[N, 4] p", "'p' comes from Div"),
    "sum over everything": (f"{DENSE} e = Exp (z) t = ReduceSum (e) p = Div (e, t)", "float[N, 4] p", "'p' comes from Div"),
    "sum of other numbers": (f"{DENSE} e = Exp (z) f = Exp (m) t = ReduceSum (f, last) p = Div (e, t)", "float[N, 4] p", "'p' comes from Div"),
    "sum that a guard changes": (f"{DENSE} e = Exp (z) t = ReduceSum (e, last) g = Max (t, large) p = Div (e, g)", "float[N, 4] p", "'p' comes from Div"),
    "complement to another number": (f"{SCORE} {PAIR.replace('one', 'half')}", "float[N, 2] p", "'p' comes from Concat"),
    "complement of another score": (f"{SCORE} t = Neg (s) u = Sigmoid (t) q = Sigmoid (s) r = Sub (one, u) p = Concat <axis = 1> (r, q)", "float[N, 2] p", "'p' comes from Concat"),
    "rows rearranged": (f"{DENSE} q = Softmax (z) p = Reshape (q, halves)", "float[M, 2] p", "'p' comes from Reshape"),
    "the likeliest class alone": (f"{DENSE} q = Softmax (z) prob = ReduceMax <axes = [1]> (q)", "float[N, 1] prob", "whichever class is the likeliest"),
    "a mask": (f"{DENSE} i, mask = Dropout (z)", "bool[N, 4] mask", "'mask' is of type BOOL"),
    "labels": (f"{DENSE} k = ArgMax (z)", "int64[N, 1] k", "'k' is of type INT64"),
    "labels as floats": (f"{DENSE} k = ArgMax (z) f = Cast <to = 1> (k)", "float[N, 1] f", "'f' is of type INT64"),
    "features": (HIDDEN, "float[N, 6] h", "'h' comes from Relu"),
    "an input": ("p = Identity (x)", "float[N, 5] p", "'p' is an input or a constant"),
    "similarities of two inputs": ("t = Transpose (x) p = MatMul (x, t)", "float[N, N] p", "'p' comes from MatMul"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_row_classifier_is_refused_with_the_reason_and_what_to_write(case: str) -> None:
    body, outputs, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason) as error:
        inspect_model(build(body, outputs))
    assert 'write `logits = "<tensor>"` in calserve.toml' in str(error.value)


# --- What the caller names. ------------------------------------------------------------------------------------------


def test_a_named_tensor_is_taken_in_the_form_it_is_named_as() -> None:
    model = build(f"{DENSE} p = Softmax (z)")
    found = inspect_model(model, logits="m")
    assert (found.output, found.logits.tensor, found.logits.form, found.features) == ("p", "m", "logits", "h")
    assert inspect_model(model, probabilities="p").logits.form == "probabilities"
    column = build(f"{SCORE} p = Relu (s)", "float[N, 1] p")
    assert inspect_model(column, log_odds="s").n_classes == 2
    assert inspect_model(column, probability="p").logits.form == "probability"


def test_named_features_replace_the_ones_found() -> None:
    model = build(f"{DENSE} p = Softmax (z)")
    found = inspect_model(model, features="hidden")
    assert (found.features, found.logits.tensor) == ("hidden", "z")
    assert inspect_model(model, features="x").features == "x"


def test_a_tensor_that_no_output_depends_on_stands_for_its_own_output() -> None:
    assert inspect_model(build(f"{DENSE} p = Softmax (h)", "float[N, 6] p"), logits="z").output == "z"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"logits": "hiden"}, "logits = 'hiden': the model has no such tensor; near names: 'hidden'"),
        ({"features": "idd"}, "features = 'idd': .* near names: 'hidden'"),
        ({"logits": "W"}, "the model has no such tensor"),
        ({"logits": "k"}, "logits must be floating-point numbers, got 'k' of type INT64"),
        ({"logits": "s"}, "logits cannot be read from .*single column"),
        ({"probabilities": "deep"}, "probabilities cannot be read from .*rank 3"),
        ({"log_odds": "z"}, r"log_odds cannot be read from 'z' \[\?, 4\].* one number a row"),
        ({"probability": "p"}, "probability cannot be read from 'p'"),
        ({"features": "deep"}, r"features must be rows \[B, D\], got .*rank 3"),
        ({"logits": "z", "probability": "s"}, "at most one of .* got logits = 'z', probability = 's'"),
    ],
)
def test_a_name_that_cannot_be_meant_is_refused(named: dict[str, str], message: str) -> None:
    body = f"{DENSE} s = MatMul (h, w) deep = Unsqueeze (z, one_i) k = ArgMax (z) p = Softmax (z)"
    with pytest.raises(ValueError, match=message):
        inspect_model(build(body, "float[N, 4] p, float[N, 1] s, int64[N, 1] k, float[N, 1, 4] deep"), **named)


# --- Features. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "features"),
    [
        (f"{DENSE} p = Softmax (z)", "h"),
        (f"{HIDDEN} z = Gemm (h, W, b) c = Cast <to = 1> (z) p = Softmax (c)", "h"),
        (f"{DENSE} t = Mul (z, half) p = Softmax (t)", "h"),
        (f"{DENSE} t = BatchNormalization (z, ones, b, b, ones) p = Softmax (t)", "h"),
        (f"{HIDDEN} T = Transpose (W) U = Transpose (T) z = MatMul (h, U) p = Softmax (z)", "h"),
    ],
)
def test_the_features_are_what_the_last_dense_layer_reads(body: str, features: str) -> None:
    found = inspect_model(build(body, "float[N, K] p"))
    assert (found.features, found.n_classes) == (features, 4)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("p = Softmax (x)", "float[N, 5] p", "is an input or a constant"),
        (f"{DENSE} r = Relu (z) p = Softmax (r)", "float[N, 4] p", "'r' comes from Relu, not from a MatMul or Gemm"),
        (f"{DENSE} t = Add (z, m) p = Softmax (t)", "float[N, 4] p", "'t' comes from Add"),
        (f"{HIDDEN} t = Transpose (h) z = Gemm <transA = 1> (t, W, b) p = Softmax (z)", "float[N, 4] p", "transposed"),
        (f"{HIDDEN} u = Unsqueeze (h, one_i) y = MatMul (u, W) z = Reshape (y, rows4) p = Softmax (z)", "float[N, 4] p", "which has rank 3, not 2"),
    ],
)  # fmt: skip
def test_without_a_last_dense_layer_there_are_no_features_and_a_reason(body: str, outputs: str, reason: str) -> None:
    model = build(body, outputs)
    found = inspect_model(model)
    assert found.features is None
    assert reason in found.features_reason
    assert_tap_gives_the_output(model, found)


# --- Unusual graphs. -------------------------------------------------------------------------------------------------

BRANCHES = "If (flag) <then_branch = a () => (float[N, 4] y) { y = Softmax (z) }, else_branch = b () => (float[N, 4] y2) { y2 = Sigmoid (z) }>"


def test_an_output_of_a_subgraph_is_believed_by_its_name_only() -> None:
    body = f"{DENSE} t = ReduceMax (x) flag = Cast <to = 9> (t)"
    found = inspect_model(build(f"{body} probabilities = {BRANCHES}", "float[N, 4] probabilities"))
    assert (found.logits.tensor, found.logits.form) == ("probabilities", "probabilities")
    with pytest.raises(ValueError, match="'p' comes from If"):
        inspect_model(build(f"{body} p = {BRANCHES}"))


def test_a_tensor_that_a_subgraph_passes_on_to_a_dense_layer_is_a_feature() -> None:
    then_branch = "a () => (float[N, 6] y) { y = Relu (hidden) }"
    else_branch = "c () => (float[N, 6] y2) { y2 = Tanh (hidden) }"
    branches = f"If (flag) <then_branch = {then_branch}, else_branch = {else_branch}>"
    body = f"hidden = MatMul (x, V) t = ReduceMax <keepdims = 0> (x) flag = Cast <to = 9> (t) i = {branches} z = MatMul (i, W)"
    model = build(body, "float[N, 6] hidden, float[N, 4] z")
    found = inspect_model(model)
    assert (found.output, found.logits.tensor, found.features) == ("z", "z", "i")
    assert run(model, "i")[0].shape == (N_ROWS, 6)  # the runtime takes the graph


def test_an_output_that_is_an_input_does_not_compete() -> None:
    model = build(f"{DENSE} p = Softmax (z)")
    model.graph.output.append(model.graph.input[0])
    assert inspect_model(model).output == "p"


def test_a_graph_without_any_declared_shape_is_still_understood() -> None:
    model = build(f"{DENSE} p = Softmax (z)")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    found = inspect_model(model)
    assert (found.logits.tensor, found.features, found.n_classes) == ("z", "h", 4)


def test_where_onnx_cannot_infer_shapes_what_the_file_declares_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("larger than two gigabytes")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", refuse)
    found = inspect_model(build(f"{DENSE} p = Softmax (z)", "float[N, K] p"))
    assert (found.logits.tensor, found.features, found.n_classes) == ("z", "h", 4)
    labelled = trees(MARGINS, post_transform="SOFTMAX")
    labelled.graph.node.append(helper.make_node("Cast", ["label"], ["f"], to=1))
    labelled.graph.output[0].CopyFrom(helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, ["N"]))
    assert inspect_model(labelled).output == "p"


def test_up_to_opset_12_the_default_axis_of_a_softmax_is_the_second() -> None:
    with pytest.raises(ValueError, match=r"a Softmax over axis 1 of 't' \[\?, 1, 4\]"):
        inspect_model(build(f"{DENSE} t = Unsqueeze <axes = [1]> (z) p = Softmax (t)", "float[N, 1, 4] p", opset=11))


def test_a_transposed_weight_tells_the_number_of_classes_by_its_rows() -> None:
    model = build("r = Unknown.op (x) z = Gemm <transB = 1> (r, W) p = Softmax (z)", "float[N, K] p")
    assert inspect_model(model).n_classes == 6


def test_where_nothing_tells_the_number_of_classes_it_is_left_open() -> None:
    model = build("r = Unknown.op (x) p = Softmax (r)", "float[N, K] p")
    assert inspect_model(model).n_classes is None


def test_an_unknown_operator_before_the_logits_does_no_harm() -> None:
    model = build(f"r = Unknown.op (x) {DENSE.replace('(x, V)', '(r, V)')} p = Softmax (z)", "float[N, K] p")
    found = inspect_model(model)
    assert (found.logits.tensor, found.features, found.n_classes) == ("z", "h", 4)


def test_a_sigmoid_of_unknown_width_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match="whose width is unknown; if it is 1, write `log_odds = 'r'`"):
        inspect_model(build("r = Unknown.op (x) p = Sigmoid (r)", "float[N, K] p"))


def test_a_malformed_graph_that_runs_in_a_circle_ends() -> None:
    model = build("p = Identity (q) q = Identity (p)", "float[N, 4] p")
    with pytest.raises(ValueError, match="no output is a classifier's"):
        inspect_model(model)


def test_the_model_is_not_modified() -> None:
    model = build(f"{DENSE} p = Softmax (z)")
    before = model.SerializeToString(deterministic=True)
    inspect_model(model, features="h")
    assert model.SerializeToString(deterministic=True) == before


# --- Real models. ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet20_jpeg_cifar10"])
def test_a_network_that_shows_its_features_is_tapped_at_its_logits(shared_data: Path, name: str) -> None:
    found = inspect_model(onnx.load(str(shared_data / "cifar10" / f"{name}.onnx")))
    assert (found.output, found.logits.tensor, found.logits.form) == ("logits", "logits", "logits")
    assert (found.features, found.n_classes) == ("features", 10)


@pytest.mark.parametrize(
    ("name", "score", "features"),
    [
        ("streams/elec2", "add_result1", "next_activations"),
        ("streams/phishing", "add_result1", "next_activations"),
        ("tabular/mammography_mlp", "add_result2", "next_activations1"),
        ("tabular/phoneme_mlp", "add_result2", "next_activations1"),
    ],
)
def test_a_binary_mlp_of_scikit_learn_is_tapped_at_its_score(
    shared_data: Path, name: str, score: str, features: str
) -> None:
    model = onnx.load(str(shared_data / f"{name}.onnx"))
    found = inspect_model(model)
    assert (found.output, found.logits.tensor, found.logits.form) == ("probabilities", score, "log_odds")
    assert (found.features, found.n_classes) == (features, 2)
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    assert_tap_gives_the_output(model, found, RNG.normal(size=(50, width)).astype(np.float32))
