"""feature_clipping: the head that the rows tell, the limit that a search over all finds, and the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import calibrators
from calibrators.graph import stage
from calibrators.kinds.feature_clipping import FeatureClipping
from calibrators.metrics import expected_calibration_error, log_loss
from calibrators.numerics import MAX_ABS_LOGIT, softmax

Array = NDArray[Any]

HEAD = np.random.default_rng(99).normal(size=(6, 4))
BIAS = np.array([0.5, -0.5, 0.0, 1.0])


def rows(n: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Logits of a linear head, labels, features: where one of them is large, the label is any class."""
    rng = np.random.default_rng(seed)
    features = np.abs(rng.normal(size=(n, 6))) * np.where(rng.random((n, 1)) < 0.3, 6, 1)
    logits = features @ HEAD + BIAS
    y = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    loud = features.max(axis=1) > 6
    y[loud] = rng.integers(4, size=loud.sum())
    return logits, y, features


def fitted(n: int = 1500, **params: Any) -> FeatureClipping:
    logits, y, features = rows(n)
    return FeatureClipping(layer="f", width=6, **params).fit(logits, y, features=features)


def test_the_head_is_found_from_the_rows() -> None:
    """Up to what no softmax sees: a constant added to every class's column."""
    np.testing.assert_allclose(fitted().weight_, HEAD - HEAD.mean(axis=1, keepdims=True), atol=1e-9)


@pytest.mark.parametrize("loss", ["log_loss", "ece"])
def test_no_limit_on_a_fine_grid_is_better_by_more_than_the_grids_own_steps(loss: str) -> None:
    _, y, features = rows(1500)
    calibrator = fitted(loss=loss, least_accuracy=0.0)

    def value(limit: float) -> float:
        p = softmax(np.clip(features, -limit, limit) @ HEAD + BIAS)
        return log_loss(p, y) if loss == "log_loss" else expected_calibration_error(p, y)

    best = min(value(limit) for limit in np.arange(0.05, 20, 0.05))
    assert value(float(calibrator.limit_)) < best + 0.01
    assert value(float(calibrator.limit_)) < value(np.inf) - 0.01


def test_it_calibrates_unseen_rows_better_than_the_model_is() -> None:
    logits, y, features = rows(4000, seed=1)
    calibrated = fitted().predict_proba(logits, features=features)
    assert log_loss(calibrated, y) < log_loss(softmax(logits), y) - 0.1
    assert (calibrated.argmax(axis=1) == y).mean() > 0.98 * (logits.argmax(axis=1) == y).mean()


def test_where_clipping_only_harms_nothing_is_clipped() -> None:
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(size=(2000, 6)))
    logits = features @ HEAD + BIAS
    y = (3 * logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    calibrator = FeatureClipping(layer="f", width=6).fit(logits, y, features=features)
    assert (features > calibrator.limit_).mean() < 0.01
    untouched = calibrator.set_tensors({**calibrator.tensors(), "limit": np.asarray(MAX_ABS_LOGIT)})
    np.testing.assert_allclose(untouched.predict_proba(logits, features=features), softmax(logits), rtol=1e-12)


def test_the_accuracy_that_must_be_left_is_left() -> None:
    logits, y, features = rows(1500)
    accuracy = (logits.argmax(axis=1) == y).mean()
    for least in (0.99, 1.0):
        calibrator = FeatureClipping(layer="f", width=6, least_accuracy=least).fit(logits, y, features=features)
        clipped = calibrator.predict_proba(logits, features=features).argmax(axis=1)
        assert (clipped == y).mean() >= least * accuracy


def test_the_graph_computes_what_numpy_does() -> None:
    calibrator = calibrators.loads(calibrators.dumps(fitted()))
    logits, _, features = (array.astype(np.float32) for array in rows(50, seed=2))
    session = onnxruntime.InferenceSession(stage(calibrator).to_bytes(), providers=["CPUExecutionProvider"])
    (served,) = session.run(["probabilities"], {"logits": logits, "features": features})
    np.testing.assert_allclose(served, calibrator.predict_proba(logits, features=features), atol=1e-6)
    exact = softmax(np.clip(features, -calibrator.limit_, calibrator.limit_) @ HEAD + BIAS)
    np.testing.assert_allclose(served, exact, atol=1e-5)


def test_rows_that_do_not_tell_the_head_are_refused_and_named() -> None:
    logits, y, features = rows(100)
    with pytest.raises(ValueError, match=r"6 features need more rows than that .*got 6"):
        FeatureClipping(layer="f", width=6).fit(logits[:6], [0, 1, 2, 0, 1, 2], features=features[:6])
    with pytest.raises(ValueError, match="the logits are no linear function of the features"):
        FeatureClipping(layer="f", width=6).fit(logits**2, y, features=features)
    with pytest.raises(ValueError, match="width must say how many numbers"):
        FeatureClipping(layer="f").fit(logits, y, features=features)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"loss": "brier"}, "loss must be one of log_loss, ece, got 'brier'"),
        ({"least_accuracy": 1.5}, "least_accuracy must lie in 0..1"),
        ({"layer": 3}, "layer must be the name of a tensor"),
        ({"width": 0}, "width must be a whole number"),
    ],
)
def test_parameters_out_of_range_are_refused_and_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrators.create("feature_clipping", **params)


def test_a_forged_artifact_is_refused() -> None:
    tensors = fitted().tensors()
    for name, forged in (("limit", np.asarray(-1.0)), ("weight", np.zeros((5, 4)))):
        with pytest.raises(ValueError, match=name):
            FeatureClipping(layer="f", width=6).set_tensors({**tensors, name: forged})
