"""masked_temperature against temperature scaling, a minimiser from outside, and the labels' own law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from calibrators.kinds.masked_temperature import MaskedTemperatureScaling
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.metrics import expected_calibration_error

Array = NDArray[Any]

SHARES = [0.0, 0.25, 0.9]


def draw_rows(n_samples: int, n_classes: int, scale: float = 3.0, seed: int = 0) -> tuple[Array, Array]:
    """Labels drawn from softmax(z), rows of scale * z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_samples, n_classes))
    return scale * z, (z + rng.gumbel(size=z.shape)).argmax(axis=1)


def concentrated_rows(n_samples: int, seed: int = 0) -> tuple[Array, Array]:
    """The largest logit is 9 above whatever follows, and right seven times in ten; the rest say the truth."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_samples, 6))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    right = rng.random(n_samples) < 0.7
    top = np.where(right, y, (y + rng.integers(1, 6, size=n_samples)) % 6)
    z[np.arange(n_samples), top] = 9 + np.delete(z, 0, axis=1).max(axis=1)
    return z, y


def masked_loss(logits: Array, y: Array, weight: Array, share: float, beta: float) -> float:
    """The definition, a row at a time."""
    loss = 0.0
    for z, label, w in zip(beta * logits, y, weight / weight.sum(), strict=True):
        loss += (1 - share) * w * (logsumexp(z) - z[label])
        if label != z.argmax():
            loss += share * w * (logsumexp(np.delete(z, z.argmax())) - z[label])
    return loss


def temperature(logits: Array, y: Array, share: float) -> float:
    return float(MaskedTemperatureScaling(share).fit(logits, y).temperature_)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("n_samples", "n_classes", "scale"), [(60, 3, 1e-6), (200, 10, 1.0), (100, 4, 300.0)])
def test_the_masked_loss_is_what_scipy_reaches(n_samples: int, n_classes: int, scale: float, share: float) -> None:
    logits, y = draw_rows(n_samples, n_classes, scale)
    weight = np.random.default_rng(1).random(n_samples)
    found = minimize_scalar(
        lambda u: masked_loss(logits, y, weight, share, np.exp(u) / scale), bounds=(-8, 8), options={"xatol": 1e-10}
    )
    calibrator = MaskedTemperatureScaling(share).fit(logits, y, sample_weight=weight)
    assert calibrator.converged_
    assert masked_loss(logits, y, weight, share, 1 / float(calibrator.temperature_)) <= found.fun + 1e-14
    assert float(calibrator.temperature_) == pytest.approx(scale / np.exp(found.x), rel=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_nothing_masked_is_temperature_scaling(n_classes: int) -> None:
    logits, y = draw_rows(300, n_classes)
    plain = float(TemperatureScaling().fit(logits, y).temperature_)
    assert temperature(logits, y, 0.0) == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize("share", SHARES)
def test_two_classes_leave_nothing_to_mask(share: float) -> None:
    logits, y = draw_rows(300, 2)
    plain = float(TemperatureScaling().fit(logits, y).temperature_)
    assert temperature(logits, y, share) == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize("share", SHARES)
def test_labels_that_follow_one_temperature_give_it_back_whatever_is_masked(share: float) -> None:
    """T = 3; its deviation over 40 draws is .032 at s = 0 and .046 at .9, so .25 is 5.4 of them: fails once in 1e7."""
    assert temperature(*draw_rows(20_000, 5), share) == pytest.approx(3.0, abs=0.25)


def test_labels_without_the_largest_logit_decide_alone_as_the_share_nears_one() -> None:
    """There the logits say the truth, so T = 1; the largest logit alone asks for another."""
    logits, y = concentrated_rows(4000)
    assert temperature(logits, y, 0.999) == pytest.approx(1.0, abs=0.25)
    falling = [temperature(logits, y, share) for share in (0.0, 0.5, 0.9, 0.999)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 3


def test_of_equal_largest_logits_the_first_is_hidden_and_a_label_beside_it_is_not() -> None:
    logits = np.array([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    y, weight = np.array([1, 0, 1, 2]), np.ones(4)
    found = minimize_scalar(lambda u: masked_loss(logits, y, weight, 0.5, np.exp(u)), bounds=(-8, 8))
    assert temperature(logits, y, 0.5) == pytest.approx(np.exp(-found.x), rel=1e-4)


@pytest.mark.parametrize("share", SHARES)
def test_where_no_finite_temperature_is_best_it_is_that_of_temperature_scaling(share: float) -> None:
    y = np.arange(30) % 3
    for logits in (np.eye(3)[y], -np.eye(3)[y], np.ones((30, 3))):
        calibrator = MaskedTemperatureScaling(share).fit(logits, y)
        assert not calibrator.converged_
        assert calibrator.temperature_ == TemperatureScaling().fit(logits, y).temperature_


def test_masking_costs_calibration_on_a_cifar10_resnet50(shared_data: Path) -> None:
    """What the kind's page says: ECE .0137 without, .0149 at the default share, .0322 at .9."""
    fit, held = (np.load(shared_data / "cifar10_resnet50_ce" / f"{name}.npz") for name in ("val", "test"))
    errors = []
    for share in (0.0, 0.25, 0.9):
        p = MaskedTemperatureScaling(share).fit(fit["logits"], fit["labels"]).predict_proba(held["logits"])
        errors.append(expected_calibration_error(p, held["labels"]))
    assert errors == pytest.approx([0.0137, 0.0149, 0.0322], abs=2e-4)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), True, "0.5"])
def test_a_share_outside_its_range_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match="masked_share must be a number in 0 <= s < 1"):
        MaskedTemperatureScaling(share).fit(*draw_rows(20, 3))
