"""Finding the logits: for every pattern, softmax of what was tapped must be what the model itself gives in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibrators import create, fuse, inspect_model
from calibrators.inspection import Inspection
from calibrators.kinds.identity import Identity

Node = tuple[Any, ...]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((5, 4)).astype(np.float32),
    "wt": RNG.standard_normal((4, 5)).astype(np.float32),
    "w1": RNG.standard_normal((5, 1)).astype(np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
    "one": np.float32(1),
    "low": np.float32(-3e38),
    "axis": np.array([1]),
    "column": np.array([-1, 1]),
    "flat": np.array([-1]),
}
X = RNG.standard_normal((7, 5)).astype(np.float32)
DENSE: list[Node] = [("MatMul", "x w", "m"), ("Add", "m b", "z")]
SCORE: list[Node] = [("MatMul", "x w1", "s")]


def build(
    nodes: Sequence[Node], outputs: Sequence[tuple[str, list[Any]]], opset: int = 17, kind: int = FLOAT
) -> onnx.ModelProto:
    """A model of x [N, 5] from (operator, inputs, outputs, attributes) and (output, shape)."""
    made = [helper.make_node(n[0], n[1].split(), n[2].split(), **(n[3] if len(n) > 3 else {})) for n in nodes]
    used = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 5])],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in WEIGHTS.items() if name in used],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto, *outputs: str) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(outputs), {"x": X})


MAX_AXES = {"axes": [1], "keepdims": 1}
SOFTMAX_AS_ARITHMETIC: list[Node] = [
    ("ReduceMax", "z", "top", MAX_AXES), ("Sub", "z top", "d"), ("Exp", "d", "e"), ("ReduceSum", "e axis", "sum", {"keepdims": 1}), ("Div", "e sum", "p"),
]  # fmt: skip
SOFTMAX_OF_JAX: list[Node] = [
    ("ReduceMax", "z", "top0", {"axes": [1], "keepdims": 0}), ("Max", "low top0", "top1"), ("Reshape", "top1 column", "top2"),
    ("Shape", "z", "shape"), ("Expand", "top2 shape", "top"), ("Sub", "z top", "d"), ("Exp", "d", "e"),
    ("ReduceSum", "e axis", "sum0", {"keepdims": 0}), ("Reshape", "sum0 column", "sum1"), ("Expand", "sum1 shape", "sum"), ("Div", "e sum", "p"),
]  # fmt: skip
TWO_SIDED: list[Node] = [("Sigmoid", "s", "q"), ("Sub", "one q", "r"), ("Concat", "r q", "p", {"axis": 1})]

# nodes, output's shape, opset -> tensor, form, features, classes
PATTERNS: dict[str, tuple[list[Node], list[Any], int, tuple[str, str, str | None, int]]] = {
    "softmax": ([*DENSE, ("Softmax", "z", "p", {"axis": -1})], ["N", 4], 17, ("z", "logits", "x", 4)),
    "softmax by default axis": ([*DENSE, ("Softmax", "z", "p")], ["N", 4], 17, ("z", "logits", "x", 4)),
    "softmax of opset 11": ([*DENSE, ("Softmax", "z", "p")], ["N", 4], 11, ("z", "logits", "x", 4)),
    "softmax behind identity": ([*DENSE, ("Softmax", "z", "p0"), ("Identity", "p0", "p")], ["N", 4], 17, ("z", "logits", "x", 4)),
    "softmax of unknown width": ([*DENSE, ("Softmax", "z", "p")], ["N", "K"], 17, ("z", "logits", "x", 4)),
    "gemm transposed": ([("Gemm", "x wt", "z", {"transB": 1}), ("Softmax", "z", "p")], ["N", "K"], 17, ("z", "logits", "x", 4)),
    "exp over sum": ([*DENSE, *SOFTMAX_AS_ARITHMETIC], ["N", 4], 17, ("z", "logits", "x", 4)),
    "exp over sum, unshifted": (
        [*DENSE, ("Exp", "z", "e"), ("ReduceSum", "e axis", "sum"), ("Div", "e sum", "p")], ["N", 4], 17, ("z", "logits", "x", 4)
    ),
    "softmax of jax2tf": ([*DENSE, *SOFTMAX_OF_JAX], ["N", 4], 17, ("z", "logits", "x", 4)),
    "sigmoid of a column": ([*SCORE, ("Sigmoid", "s", "p")], ["N", 1], 17, ("s", "log_odds", "x", 2)),
    "sigmoid of a vector": ([*SCORE, ("Reshape", "s flat", "v"), ("Sigmoid", "v", "p")], ["N"], 17, ("v", "log_odds", "x", 2)),
    "both sides of a sigmoid": ([*SCORE, *TWO_SIDED], ["N", 2], 17, ("s", "log_odds", "x", 2)),
}  # fmt: skip


def as_probabilities(found: Inspection, model: onnx.ModelProto) -> np.ndarray:
    """What the tap says, through the graph that calserve serves."""
    assert found.n_classes is not None
    return run(fuse(model, Identity.of(found.n_classes), found).proto, "probabilities")[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_softmax_of_the_tapped_logits_is_what_the_model_gives(pattern: str) -> None:
    nodes, shape, opset, (tensor, form, features, n_classes) = PATTERNS[pattern]
    model = build(nodes, [("p", shape)], opset)
    found = inspect_model(model)
    assert (found.output, found.logits.tensor, found.logits.form) == ("p", tensor, form)
    assert (found.features, found.n_classes) == (features, n_classes)
    assert "'p'" in found.logits.reason
    (own,) = run(model, "p")
    served = as_probabilities(found, model)
    np.testing.assert_allclose(
        served if own.shape == served.shape else served[:, 1], own.reshape(len(X), -1).squeeze(), atol=1e-6
    )


@pytest.mark.parametrize(
    ("nodes", "shape", "form", "n_classes"),
    [
        (DENSE, ["N", 4], "logits", 4),
        ([("Gemm", "x w b", "z")], ["N", "K"], "logits", 4),
        ([("MatMul", "x w1", "z")], ["N", 1], "log_odds", 2),
    ],
)
def test_a_last_dense_layer_gives_the_logits_themselves(
    nodes: list[Node], shape: list[Any], form: str, n_classes: int
) -> None:
    found = inspect_model(build(nodes, [("z", shape)]))
    assert (found.logits.tensor, found.logits.form, found.n_classes, found.features) == ("z", form, n_classes, "x")


def test_a_log_softmax_is_tapped_before_it() -> None:
    found = inspect_model(build([*DENSE, ("LogSoftmax", "z", "p")], [("p", ["N", 4])]))
    assert (found.logits.tensor, found.logits.form) == ("z", "logits")


def test_probabilities_without_a_visible_softmax_are_taken_by_their_logarithm() -> None:
    model = build(
        [*DENSE, ("Softmax", "z", "p0"), ("Neg", "p0", "n"), ("Neg", "n", "probabilities")],
        [("probabilities", ["N", 4])],
    )
    found = inspect_model(model)
    assert (found.logits.tensor, found.logits.form) == ("probabilities", "probabilities")
    np.testing.assert_allclose(as_probabilities(found, model), run(model, "probabilities")[0], atol=1e-6)


def trees(post_transform: str) -> onnx.ModelProto:
    """Two leaves on feature 0 and three classes, as skl2onnx writes a decision tree."""
    attributes = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0], "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_values": [0.0, 0.0, 0.0], "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0],
        "class_treeids": [0] * 6, "class_nodeids": [1, 1, 1, 2, 2, 2], "class_ids": [0, 1, 2] * 2, "class_weights": [0.7, 0.2, 0.1, 0.1, 0.1, 0.8],
        "classlabels_int64s": [0, 1, 2], "post_transform": post_transform, "domain": "ai.onnx.ml",
    }  # fmt: skip
    return build([("TreeEnsembleClassifier", "x", "label p", attributes)], [("p", ["N", 3])])


def test_a_tree_with_softmax_inside_gives_probabilities() -> None:
    model = trees("SOFTMAX")
    found = inspect_model(model)
    assert (found.logits.form, found.features) == ("probabilities", None)
    np.testing.assert_allclose(as_probabilities(found, model), run(model, "p")[0], atol=1e-6)


def test_a_tree_whose_scores_could_be_either_is_refused() -> None:
    with pytest.raises(ValueError, match="may be logits or probabilities"):
        inspect_model(trees("NONE"))


def test_the_strongest_evidence_wins_among_several_outputs() -> None:
    nodes = [*DENSE, ("Softmax", "z", "p"), ("Relu", "x", "features")]
    model = build(nodes, [("z", ["N", 4]), ("features", ["N", 5]), ("p", ["N", 4])])
    assert inspect_model(model).output == "p"


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "two heads": (lambda: build([*DENSE, ("Softmax", "z", "p"), ("Softmax", "m", "q")], [("p", ["N", 4]), ("q", ["N", 4])]), "'p', 'q' are equally good"),
    "multi-label": (lambda: build([*DENSE, ("Sigmoid", "z", "p")], [("p", ["N", 4])]), "over 4 columns is multi-label"),
    "softmax over rows": (lambda: build([*DENSE, ("Softmax", "z", "p", {"axis": 0})], [("p", ["N", 4])]), "over axis 0 of rank 2"),
    "no classifier": (lambda: build([("Relu", "x", "r")], [("r", ["N", 5])]), "'r': made by Relu"),
    "token classes": (lambda: build([("Unsqueeze", "x axis", "u"), ("Softmax", "u", "p")], [("p", ["N", 1, 5])]), "not floating-point scores of rank 1 or 2"),
    "integers": (lambda: build([("Cast", "x", "i", {"to": INT64})], [("i", ["N", 5])], kind=INT64), "not floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_row_classifier_is_refused_with_the_reason_and_what_to_write(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason) as caught:
        inspect_model(make())
    assert "in calserve.toml" in str(caught.value)


def test_a_named_tensor_is_taken_as_it_is_named() -> None:
    model = build([*DENSE, ("Relu", "z", "r")], [("r", ["N", 4])])
    found = inspect_model(model, logits="m", features="x")
    assert (found.logits.tensor, found.logits.form, found.features, found.n_classes) == ("m", "logits", "x", 4)
    assert inspect_model(model, probabilities="r").logits.form == "probabilities"
    with pytest.raises(ValueError, match="no tensor 'zz'"):
        inspect_model(model, logits="zz")
    with pytest.raises(ValueError, match="at most one of"):
        inspect_model(model, logits="z", probabilities="r")


SHARED = {
    "cifar10/resnet20_cifar10.onnx": ("logits", "logits", "features", 10),
    "streams/elec2.onnx": ("add_result1", "log_odds", "next_activations", 2),
    "streams/phishing.onnx": ("add_result1", "log_odds", "next_activations", 2),
    "tabular/phoneme_mlp.onnx": ("add_result2", "log_odds", "next_activations1", 2),
    "tabular/mammography_mlp.onnx": ("add_result2", "log_odds", "next_activations1", 2),
}


@pytest.mark.parametrize("name", SHARED)
def test_real_models_are_understood_without_help(shared_data: Path, name: str) -> None:
    found = inspect_model(onnx.load(str(shared_data / name)))
    assert (found.logits.tensor, found.logits.form, found.features, found.n_classes) == SHARED[name]


def test_a_real_model_serves_its_own_probabilities_through_the_tap(shared_data: Path) -> None:
    model = onnx.load(str(shared_data / "streams" / "elec2.onnx"))
    rows = np.load(shared_data / "streams" / "elec2.npz")
    fused = fuse(model, create("identity").fit([[0.0, 0.0], [0.0, 1.0]], [0, 1]))
    session = ort.InferenceSession(fused.to_bytes(), providers=["CPUExecutionProvider"])
    own, served = session.run(["raw_probabilities", "probabilities"], {"X": rows["X"][:500]})
    np.testing.assert_allclose(served, own, atol=1e-6)
    np.testing.assert_allclose(own, rows["probs"][:500], atol=1e-5)
