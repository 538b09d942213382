"""neural_clamping: a delta where inputs are shifted, temperature scaling where they are not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from scipy.special import log_softmax, softmax

import calibrators
from calibrators.differentiable import DifferentiableModel, Rows
from calibrators.graph import LOGITS, VIEWS, default_opset, fuse, parameters_of, signature, stage
from calibrators.kinds.neural_clamping import NeuralClamping
from calibrators.kinds.temperature import TemperatureScaling
from tests.calibrators import networks

Array = networks.Array
N_ROWS = 500
SHIFT = np.array([1.5, -1.0], np.float32)[:, None, None]
"""What every image has too much of in its two channels."""


def labelled(proto: onnx.ModelProto, feeds: dict[str, Array], seed: int = 0, sharpness: float = 0.6) -> Array:
    """Labels drawn from a softmax that is less sure than the model's."""
    z = sharpness * networks.logits_by_onnxruntime(proto, feeds)
    return np.asarray((z + np.random.default_rng(seed).gumbel(size=z.shape)).argmax(axis=1))


def shifted_rows(proto: onnx.ModelProto, n: int = N_ROWS, seed: int = 0) -> tuple[Array, Array, Array]:
    """Logits of shifted images, labels that belong to the images as they were, the shifted images."""
    x = networks.rows(proto, n, seed)["x"]
    y = labelled(proto, {"x": x}, seed, sharpness=1.5)
    x = (x + SHIFT).astype(x.dtype)
    return networks.logits_by_onnxruntime(proto, {"x": x}), y, x


@cache
def kept(seed: int = 0, **params: Any) -> NeuralClamping:
    proto = networks.convolutional()
    z, y, x = shifted_rows(proto, seed=seed)
    return NeuralClamping(**params).fit(z, y, inputs=x, model=proto)


@cache
def not_kept(**params: Any) -> tuple[NeuralClamping, Array, Array]:
    proto = networks.convolutional()
    feeds = networks.rows(proto, N_ROWS)
    z, y = networks.logits_by_onnxruntime(proto, feeds), labelled(proto, feeds)
    return NeuralClamping(**params).fit(z, y, inputs=feeds["x"], model=proto), z, y


def objective(z: Array, y: Array, temperature: float) -> float:
    return float(-log_softmax(z.astype(np.float64) / temperature, axis=1)[np.arange(len(y)), y].mean())


# ---- no delta


def test_where_no_delta_gains_it_is_temperature_scaling_to_the_last_bit() -> None:
    calibrator, z, y = not_kept()
    plain = TemperatureScaling().fit(z, y)
    assert calibrator.delta_.shape == () and calibrator.needs == {"logits"}
    assert calibrator.temperature_ == plain.temperature_
    np.testing.assert_array_equal(calibrator.predict_proba(z), plain.predict_proba(z))
    assert stage(calibrator).to_bytes() == stage(plain).to_bytes()
    assert "this is temperature scaling" in calibrator.notes[0].lower()
    model = networks.convolutional()
    assert fuse(model, calibrator).to_bytes() == fuse(model, plain).to_bytes()


@pytest.mark.parametrize("params", [{"loss": "focal"}, {"start": "normal"}, {"start": "gradient"}, {"penalty": 1.0}])
def test_a_published_start_or_loss_does_no_harm_where_nothing_is_to_be_gained(params: dict[str, Any]) -> None:
    calibrator, _z, _y = not_kept(**params)
    assert calibrator.delta_.shape == ()
    assert calibrator.temperature_ == not_kept()[0].temperature_


def test_few_rows_and_rows_that_are_all_right_are_temperature_scaling() -> None:
    proto = networks.convolutional()
    feeds = networks.rows(proto, 99)
    z = networks.logits_by_onnxruntime(proto, feeds)
    few = NeuralClamping().fit(z, labelled(proto, feeds), inputs=feeds["x"], model=proto)
    assert few.notes == ["no delta was sought, fewer than 100 rows differ: this is temperature scaling"]
    feeds = networks.rows(proto, 200)
    z = networks.logits_by_onnxruntime(proto, feeds)
    right = NeuralClamping().fit(z, z.argmax(axis=1), inputs=feeds["x"], model=proto)
    assert right.notes[1] == "no delta was sought, no finite temperature fits best: this is temperature scaling"


# ---- a delta


@pytest.mark.parametrize("axis", [None, 1])
def test_a_shift_of_the_inputs_is_taken_off_and_other_rows_gain(axis: int | None) -> None:
    calibrator = kept(axis=axis)
    assert calibrator.delta_.shape == ((2, 6, 6) if axis is None else (2, 1, 1))
    if axis == 1:
        np.testing.assert_allclose(calibrator.delta_, -SHIFT, atol=0.5)
    proto = networks.convolutional()
    z, y, x = shifted_rows(proto, seed=5)
    views = networks.logits_by_onnxruntime(proto, {"x": next(calibrator.copies(x))})[:, None]
    before = TemperatureScaling().fit(*shifted_rows(proto)[:2]).predict_proba(z)
    after = calibrator.predict_proba(z, views=views)
    loss_before, loss_after = (-np.log(p[np.arange(len(y)), y]).mean() for p in (before, after))
    assert loss_after < 0.97 * loss_before
    assert calibrator.improvement_ > 0
    assert calibrator.notes[0].startswith("delta is kept: held-out log loss ")


def test_the_objective_of_a_fit_with_a_delta_is_no_higher_than_that_of_temperature_scaling() -> None:
    """The published property, penalty counted."""
    calibrator = kept(penalty=0.05)
    z, y, x = shifted_rows(networks.convolutional())
    moved = networks.logits_by_onnxruntime(networks.convolutional(), {"x": next(calibrator.copies(x))})
    penalty = 0.05 * float(np.linalg.norm(calibrator.delta_ / x.std()))
    plain = TemperatureScaling().fit(z, y)
    assert objective(moved, y, float(calibrator.temperature_)) + penalty < objective(z, y, float(plain.temperature_))
    assert calibrator.temperature_ == pytest.approx(TemperatureScaling().fit(moved, y).temperature_, rel=1e-4)


def test_a_fit_is_the_same_again_and_another_by_another_seed() -> None:
    proto = networks.convolutional()
    z, y, x = shifted_rows(proto)
    again = NeuralClamping(axis=1).fit(z, y, inputs=x, model=proto)
    assert calibrators.dumps(again) == calibrators.dumps(kept(axis=1))
    turned = np.random.default_rng(0).permutation(N_ROWS)
    reordered = NeuralClamping(axis=1).fit(z[turned], y[turned], inputs=x[turned], model=proto)
    np.testing.assert_array_equal(reordered.delta_, again.delta_)
    assert not np.array_equal(again.delta_, NeuralClamping(axis=1, seed=1).fit(z, y, inputs=x, model=proto).delta_)


def test_rows_of_weight_zero_do_not_count_and_weight_two_is_the_row_twice() -> None:
    proto = networks.convolutional()
    z, y, x = shifted_rows(proto)
    weight = np.random.default_rng(0).integers(0, 3, size=N_ROWS)
    weighted = NeuralClamping(axis=1).fit(z, y, sample_weight=weight, inputs=x, model=proto)
    index = np.repeat(np.arange(N_ROWS), weight)
    repeated = NeuralClamping(axis=1).fit(z[index], y[index], inputs=x[index], model=proto)
    assert weighted.delta_.ndim
    np.testing.assert_allclose(weighted.delta_, repeated.delta_, atol=1e-6)


def test_units_of_a_table_do_not_matter() -> None:
    """A column in thousandths gives a delta in thousandths."""
    proto = networks.of_two()
    feeds = networks.rows(proto, 800)
    y = labelled(proto, feeds, sharpness=2.0)
    feeds["numbers"] = feeds["numbers"] + np.float32([1.5, 0, 0, 0])
    fits = {}
    for unit in (1.0, 1000.0):
        scaled = onnx.ModelProto.FromString(proto.SerializeToString())
        for stored in scaled.graph.initializer:
            if stored.name == "d":
                table = onnx.numpy_helper.to_array(stored).copy()
                table[0] /= unit
                stored.CopyFrom(onnx.numpy_helper.from_array(table, "d"))
        rows = feeds | {"numbers": feeds["numbers"] * np.float32([unit, 1, 1, 1])}
        z = networks.logits_by_onnxruntime(scaled, rows)
        fits[unit] = NeuralClamping().fit(z, y, inputs=rows, model=scaled)
    assert fits[1.0].delta_.shape == (4,)
    assert fits[1.0].delta_[0] == pytest.approx(-1.5, abs=0.3)
    assert fits[1000.0].delta_[0] / 1000 == pytest.approx(fits[1.0].delta_[0], rel=0.05)


def test_embeddings_of_ids_can_be_perturbed() -> None:
    proto = networks.of_ids()
    feeds = networks.rows(proto, 400)
    z, y = networks.logits_by_onnxruntime(proto, feeds), labelled(proto, feeds)
    y[: len(y) // 2] = 0  # half of the rows are of one class, whatever they say
    calibrator = NeuralClamping(tensor="embedded").fit(z, y, inputs=feeds["ids"], model=proto)
    assert calibrator.delta_.shape == (5, 4) and calibrator.improvement_ > 0
    fused = fuse(proto, calibrator)
    logits, views, p, own = networks.session(fused.proto).run([LOGITS, VIEWS, "probabilities", "p"], feeds)
    np.testing.assert_allclose(logits, z, atol=1e-5)
    np.testing.assert_array_equal(own, networks.session(proto).run(["p"], feeds)[0])
    rows = {"inputs": feeds, "model": proto}
    np.testing.assert_allclose(views, calibrator.read_when_serving(rows)["views"], atol=1e-5)
    np.testing.assert_allclose(p, calibrator.predict_proba(z, views=views), atol=calibrator.float32_atol)


# ---- serving


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("opset", [9, 13, 17])
def test_the_fused_graph_moves_its_own_input_and_leaves_the_models_outputs(element: int, opset: int) -> None:
    proto = networks.convolutional(element, opset=opset)
    calibrator = kept()
    fused = fuse(proto, calibrator)
    onnx.checker.check_model(fused.proto, full_check=True)
    assert default_opset(fused.proto) == opset
    x = networks.rows(proto, 30, seed=3)["x"]
    z, views, p, own = networks.session(fused.proto).run([LOGITS, VIEWS, "probabilities", "p"], {"x": x})
    np.testing.assert_array_equal(own, networks.session(proto).run(["p"], {"x": x})[0])
    np.testing.assert_allclose(own, softmax(z, axis=1), atol=1e-6)
    expected = networks.logits_by_onnxruntime(proto, {"x": next(calibrator.copies(x))})
    atol = 2e-3 if element == TensorProto.FLOAT16 else 1e-5  # where delta and the sum are rounded once more
    np.testing.assert_allclose(views[:, 0], expected, atol=atol)
    np.testing.assert_allclose(p, calibrator.predict_proba(z, views=views), atol=calibrator.float32_atol)
    np.testing.assert_allclose(p, softmax(expected / calibrator.temperature_, axis=1), atol=atol)
    exported = networks.session(onnx.ModelProto.FromString(fused.export()))
    assert [value.name for value in exported.get_outputs()] == ["p", "probabilities", "confidence", "label"]
    np.testing.assert_allclose(exported.run(["probabilities"], {"x": x})[0], p, atol=atol)


def test_two_fits_with_a_delta_of_one_shape_are_one_session_and_two_answers() -> None:
    one, other = kept(), kept(seed=1)
    assert signature(one) == signature(other) != signature(kept(axis=1))
    assert signature(one) != signature(not_kept()[0])
    x = networks.rows(networks.convolutional(), 10)["x"]
    session = networks.session(fuse(networks.convolutional(), one).proto)
    for fit in (one, other):
        own = networks.session(fuse(networks.convolutional(), fit).proto)
        served = session.run(["probabilities"], {"x": x, **parameters_of(fit)})[0]
        np.testing.assert_array_equal(served, own.run(["probabilities"], {"x": x})[0])
    renamed = NeuralClamping(tensor="c").set_tensors(one.tensors())
    assert signature(renamed) != signature(one)


def test_an_artifact_holds_the_delta_exactly() -> None:
    loaded = calibrators.loads(calibrators.dumps(kept()))
    np.testing.assert_array_equal(loaded.delta_, kept().delta_)
    assert loaded.needs == {"logits", "views"} and loaded.signal_shapes(3) == {"views": (1, 3)}
    for change in (
        {"temperature": np.asarray(-1.0)},
        {"delta": np.full((2, 6, 6), np.nan)},
        {"delta": np.full(3, 1e39)},
    ):
        with pytest.raises(ValueError, match=r"temperature must|delta"):
            NeuralClamping().set_tensors(kept().tensors() | change)


def test_views_of_rows_are_made_by_the_model_as_a_fit_differentiates_it() -> None:
    calibrator, proto = kept(), networks.convolutional()
    z, _, x = shifted_rows(proto, 20, seed=3)
    model = DifferentiableModel(proto, networks.N_CLASSES)
    views = calibrator.read_when_serving({"inputs": {"x": x}, "model": model})["views"]
    np.testing.assert_allclose(views, Rows.of(model, x).logits(calibrator.delta_)[:, None], atol=1e-5)
    assert calibrator.predict_proba(z, views=views).shape == (20, 3)
    with pytest.raises(ValueError, match="reads views beside the logits, got nothing"):
        calibrator.predict_proba(z)


# ---- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "reads inputs and model, got nothing. Logits alone tell no gradient"),
        ({"inputs": np.zeros((4, 2, 6, 6))}, "reads inputs and model, got inputs"),
        (
            {"inputs": np.zeros((3, 2, 6, 6), np.float32), "model": networks.convolutional()},
            "must have 4 rows, .* got 3",
        ),
        (
            {"inputs": np.zeros((4, 2, 6, 6), np.float32), "model": networks.convolutional()},
            "other logits than it gave",
        ),
    ],
)
def test_rows_that_no_gradient_can_be_had_of_are_refused(given: dict[str, Any], message: str) -> None:
    z = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(ValueError, match=message):
        NeuralClamping().fit(z, [0, 1, 2, 0], **given)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"loss": "squared"}, "loss must be one of log, focal, got 'squared'"),
        ({"start": "one"}, "start must be one of zero, normal, gradient"),
        ({"penalty": -1}, "penalty must be a number from 0 on, got -1"),
        ({"learning_rate": 0}, "learning_rate must be a number from 1e-06 on"),
        ({"axis": 0}, "axis must be a whole number from 1 on"),
        ({"seed": 1.5}, "seed must be a whole number from 0 on"),
        ({"tensor": 3}, "tensor must be the name of a tensor or None"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.create("neural_clamping", **params)


def test_the_focal_loss_of_any_exponent_shapes_a_delta_that_gains() -> None:
    calibrator = kept(axis=1, loss="focal", gamma=2.5)
    assert calibrator.delta_.shape == (2, 1, 1) and calibrator.improvement_ > 0.1
    _, y, x = shifted_rows(networks.convolutional())
    moved = networks.logits_by_onnxruntime(networks.convolutional(), {"x": next(calibrator.copies(x))})
    plain = TemperatureScaling().fit(moved, y)
    assert calibrator.temperature_ == pytest.approx(plain.temperature_, rel=1e-4), "T is the log loss's"


def test_a_model_differentiated_in_another_tensor_is_refused() -> None:
    model = DifferentiableModel(networks.of_ids(), networks.N_CLASSES, "mixed")
    z = np.zeros((4, 3))
    with pytest.raises(ValueError, match="moves 'embedded', the model is differentiated in 'mixed'"):
        NeuralClamping(tensor="embedded").fit(z, [0, 1, 2, 0], inputs=np.zeros((4, 5), np.int64), model=model)


def test_a_fit_that_fails_leaves_the_calibrator_as_it_was() -> None:
    calibrator = NeuralClamping().set_tensors(kept().tensors()).set_params(axis=4)
    z, y, x = shifted_rows(networks.convolutional())
    with pytest.raises(ValueError, match="axis must be"):
        calibrator.fit(z, y, inputs=x, model=networks.convolutional())
    np.testing.assert_array_equal(calibrator.delta_, kept().delta_)


def test_an_axis_that_a_row_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"axis must be in 1\.\.3 of 'x', got 4"):
        not_kept(axis=4)


def test_progress_is_told_by_the_epoch() -> None:
    proto, told = networks.convolutional(), []
    z, y, x = shifted_rows(proto)
    NeuralClamping(axis=1).fit(z, y, inputs=x, model=proto, progress=lambda share, text: told.append((share, text)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert "comparing" in told[0][1] and "epoch 1 of 60" in told[1][1] and len(told) > 3
