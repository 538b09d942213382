"""A model run by torch gives onnxruntime's logits, and its gradient is the slope of onnxruntime's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from calibrators import differentiable
from calibrators.differentiable import DifferentiableModel, Rows, check, site_of, with_logits
from tests.calibrators import networks

STEP = 1e-2
"""Of the numeric gradient: onnxruntime's logits are float32."""

CASES = [
    pytest.param(networks.convolutional(), None, id="convolutional"),
    pytest.param(networks.convolutional(opset=9), None, id="convolutional of opset 9"),
    pytest.param(networks.convolutional(dims=("B", 2, "H", "W")), None, id="convolutional of any size"),
    pytest.param(networks.of_two(), None, id="two inputs"),
    pytest.param(networks.of_ids(), "embedded", id="ids"),
    pytest.param(networks.of_ids(), "mixed", id="ids, further inside"),
]


def moved(proto: onnx.ModelProto, tensor: str, by: Any) -> onnx.ModelProto:
    """The same with `by` added to a tensor, by an Add of the test's own."""
    made = onnx.ModelProto.FromString(proto.SerializeToString())
    for node in made.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "moved" if name == tensor else name
    place = next((i + 1 for i, node in enumerate(made.graph.node) if tensor in node.output), 0)
    made.graph.node.insert(place, helper.make_node("Add", [tensor, "by"], ["moved"]))
    made.graph.initializer.append(onnx.numpy_helper.from_array(by.astype(np.float32), "by"))
    return made


@pytest.mark.parametrize(("proto", "tensor"), CASES)
def test_logits_are_onnxruntimes_with_and_without_a_perturbation(proto: onnx.ModelProto, tensor: str | None) -> None:
    feeds = networks.rows(proto, 20)
    model = DifferentiableModel(proto, networks.N_CLASSES, tensor)
    rows = Rows.of(model, feeds)
    expected = networks.logits_by_onnxruntime(proto, feeds)
    np.testing.assert_allclose(rows.logits(), expected, atol=1e-5)
    rows.verify(expected)
    delta = np.random.default_rng(1).normal(size=model.site.shape)
    expected = networks.logits_by_onnxruntime(moved(proto, model.site.tensor, delta), feeds)
    np.testing.assert_allclose(rows.logits(delta), expected, atol=1e-5)


@pytest.mark.parametrize(("proto", "tensor"), CASES)
def test_the_gradient_is_the_slope_of_onnxruntimes_logits(proto: onnx.ModelProto, tensor: str | None) -> None:
    feeds = networks.rows(proto, 8)
    model = DifferentiableModel(proto, networks.N_CLASSES, tensor)
    weight = np.random.default_rng(1).normal(size=(8, networks.N_CLASSES))
    delta = torch.zeros(model.site.shape, requires_grad=True)
    (model.run(feeds, delta=delta) * torch.as_tensor(weight)).sum().backward()
    for direction in np.random.default_rng(2).normal(size=(5, *model.site.shape)):
        ahead, behind = (
            (
                weight * networks.logits_by_onnxruntime(moved(proto, model.site.tensor, s * STEP * direction), feeds)
            ).sum()
            for s in (1, -1)
        )
        slope = float((delta.grad.numpy() * direction).sum())
        assert slope == pytest.approx((ahead - behind) / (2 * STEP), rel=0.02, abs=0.01)


def test_rows_are_run_in_pieces_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows.of(
        DifferentiableModel(networks.convolutional(), networks.N_CLASSES), networks.rows(networks.convolutional(), 20)
    )
    whole = rows.logits()
    assert list(rows.pieces()) == [slice(0, 20)]
    monkeypatch.setattr(differentiable, "BYTES_AT_ONCE", 3 * rows.model._bytes_per_row + 1)
    assert [piece.stop for piece in rows.pieces()] == [3, 6, 9, 12, 15, 18, 20]
    np.testing.assert_allclose(rows.logits(), whole, atol=1e-6)


def test_a_perturbation_has_the_shape_of_a_row_and_length_one_where_that_is_open() -> None:
    assert site_of(networks.convolutional()).shape == (2, 6, 6)
    assert site_of(networks.convolutional(dims=("B", 2, "H", "W"))).shape == (2, 1, 1)
    assert site_of(networks.of_ids(), "embedded").shape == (5, 4)
    assert site_of(networks.of_two()).tensor == "numbers"


def test_an_operator_that_is_not_known_is_refused_by_name() -> None:
    proto = networks.convolutional()
    proto.graph.node[3].op_type = "Softsign"  # known
    check(with_logits(proto, networks.N_CLASSES))
    for node, name in zip(proto.graph.node[2:4], ("Shrink", "Bernoulli"), strict=True):
        node.op_type = name
        del node.attribute[:]
    with pytest.raises(ValueError, match="operators that are not known here: Bernoulli, Shrink"):
        check(with_logits(proto, networks.N_CLASSES))


def test_a_second_output_that_is_read_is_refused_where_it_is_not_computed() -> None:
    proto = networks.convolutional()
    proto.graph.node.insert(1, helper.make_node("Dropout", ["f"], ["same", "mask"]))
    proto.graph.node.insert(2, helper.make_node("Cast", ["mask"], ["shown"], to=TensorProto.FLOAT))
    proto.graph.node.insert(3, helper.make_node("Mul", ["same", "shown"], ["kept"]))
    proto.graph.node[4].input[0] = "same"
    check(with_logits(proto, networks.N_CLASSES))
    proto.graph.node[4].input[0] = "kept"
    with pytest.raises(ValueError, match="it reads mask, a second output"):
        check(with_logits(proto, networks.N_CLASSES))


def test_operators_off_the_way_to_the_logits_do_not_matter() -> None:
    proto = networks.convolutional()
    proto.graph.node.append(helper.make_node("Shrink", ["z"], ["other"]))
    proto.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["B", 3]))
    assert check(with_logits(proto, networks.N_CLASSES)).tensor == "x"


@pytest.mark.parametrize(
    ("proto", "tensor", "message"),
    [
        (
            networks.of_ids(),
            None,
            r"'ids' \[None, 5\] INT64; tensor='embedded' is the first of real numbers behind them",
        ),
        (networks.of_ids(), "ids", r"needs rows of real numbers, the model has 'ids' \[None, 5\] INT64"),
        (networks.of_ids(), "elsewhere", "no tensor 'elsewhere' whose shape is known"),
        (networks.convolutional(), "p", "the logits do not depend on 'p'"),
        (
            networks.convolutional(dims=("B", 2, 6, 6), element=TensorProto.UINT8),
            None,
            "'x' .* UINT8; tensor='f' is the first",
        ),
    ],
)
def test_what_cannot_be_perturbed_is_refused_with_what_could(proto: Any, tensor: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(with_logits(proto, networks.N_CLASSES), tensor)


def test_several_inputs_of_real_numbers_must_be_told_apart() -> None:
    proto = networks.of_two()
    proto.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT
    proto.graph.node.insert(0, helper.make_node("Cast", ["kinds"], ["whole"], to=TensorProto.INT32))
    proto.graph.node[1].input[1] = "whole"
    with pytest.raises(ValueError, match="several inputs of real numbers; name one as tensor: numbers, kinds"):
        check(with_logits(proto, networks.N_CLASSES))
    assert check(with_logits(proto, networks.N_CLASSES), "numbers").shape == (4,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kinds": None}, ValueError, "the model reads numbers, kinds, got numbers"),
        ({"numbers": np.zeros((7, 4), np.float32)}, ValueError, r"each the same number, got kinds of shape \(8,\)"),
        ({"numbers": np.full((8, 4), np.nan)}, ValueError, "numbers must be finite"),
        ({"numbers": np.full((8, 4), "x")}, TypeError, "numbers must hold numbers, got dtype <U1"),
        (
            {"numbers": np.zeros((8, 5), np.float32)},
            ValueError,
            r"rows of 'numbers' have shape \(5,\), the model declares \(4,\)",
        ),
        (
            {"kinds": np.full(8, 9, np.int32)},
            ValueError,
            "operator Gather cannot be computed on these rows: index out of range",
        ),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(change: dict[str, Any], error: Any, message: str) -> None:
    model = DifferentiableModel(networks.of_two(), networks.N_CLASSES)
    feeds = networks.rows(networks.of_two(), 8) | change
    with pytest.raises(error, match=message):
        Rows.of(model, {name: array for name, array in feeds.items() if array is not None}).logits()


def test_logits_of_other_inputs_are_told_from_the_models_own() -> None:
    proto = networks.convolutional()
    rows = Rows.of(DifferentiableModel(proto, networks.N_CLASSES), networks.rows(proto, 9))
    logits = rows.logits()
    with pytest.raises(ValueError, match=r"row 4 other logits than it gave: they differ by 0\.\d+ of the largest"):
        logits[4] += 0.5
        rows.verify(logits)


def test_rows_are_alike_by_their_content_alone() -> None:
    model = DifferentiableModel(networks.of_two(), networks.N_CLASSES)
    feeds = networks.rows(networks.of_two(), 4)
    feeds["numbers"][3], feeds["kinds"][3] = feeds["numbers"][1], feeds["kinds"][1]
    digests = Rows.of(model, feeds).digests()
    assert digests[1] == digests[3] and len(np.unique(digests)) == 3
    assert len(np.unique(Rows.of(model, feeds).digests(np.arange(4)))) == 4
