"""feature_clipping: what the classifier's last layer reads is cut off at ±C, so no feature can shout.

Tao, Dong, Xu, "Feature Clipping for Uncertainty Calibration", AAAI 2025 (arXiv 2410.19796): a network that is too sure
has large features on the rows it gets wrong. With f the features and W the weights of the last dense layer, whose
logits are z = f W + b,

    p = softmax(clip(f, -C, C) W + b) = softmax(z - (f - clip(f, -C, C)) W)

and C minimises the loss on the calibration set, as long as the accuracy stays above `least_accuracy` of what it was.
Published as a search from .01 to 20 in steps of .01, which suits features of one size; here C is sought among
`N_CANDIDATES` quantiles of |f|, and no clipping at all is always one of them: the loss it is fitted by never rises.

W is not asked for: it is found from the rows by least squares, and refused if it does not give their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.layers import LOGITS, Layer
from calibrators.numerics import MAX_ABS_LOGIT, Array, log_softmax, softmax

LOSSES = ("log_loss", "ece")
N_CANDIDATES = 200
N_BINS = 15
SMALLEST_SHARE = 1e-4
"""Of the numbers that the mildest limit cuts off; the others' shares rise from it evenly in their log-odds."""
LARGEST_RESIDUAL = 1e-3
"""Of the deviation of the logits, by which f W + b may miss them."""


class FeatureClipping(Calibrator):
    """p = softmax(z - (f - clip(f, ±C)) W). The argmax may change, in few rows.

    Parameters
    ----------
    layer : name of the tensor that the last dense layer reads; None: on a model the features that were found, in the
        library alone the logits themselves, less their row's mean
    width : numbers in a row of it; the server fills it in
    loss : log_loss or ece, that C minimises
    least_accuracy : share of the accuracy without clipping that must be left

    Attributes
    ----------
    limit_ : () float64, C; MAX_ABS_LOGIT where nothing is to be gained
    weight_ : (width, n_classes) float64, W; without a layer one zero

    Examples
    --------
    Rows with a large feature are as often wrong as right, and the model is sure of them.

    >>> features = np.where(np.arange(400)[:, None] < 200, 1.0, 9.0) * [[1.0, 0.0]]
    >>> features[::2] = features[::2, ::-1]
    >>> y = np.where(np.arange(400) < 200, np.arange(400) % 10 == 1, np.arange(400) // 2 % 2)
    >>> calibrator = FeatureClipping(layer="f", width=2).fit(features, y, features=features)
    >>> float(calibrator.limit_) < 9
    True
    """

    learned = ("limit", "weight")
    float32_atol = 1e-5

    def __init__(
        self, layer: str | None = None, width: int | None = None, loss: str = "log_loss", least_accuracy: float = 0.99
    ) -> None:
        self.layer = layer
        self.width = width
        self.loss = loss
        self.least_accuracy = least_accuracy

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "features"} if self.taps else {"logits"})

    @property
    def taps(self) -> tuple[str, ...]:
        return () if self.layer in (None, LOGITS) else (str(self.layer),)

    def signal_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        del n_classes
        if not self.taps:
            return {}
        if self.width is None:
            raise ValueError(f"width must say how many numbers a row of {self.layer} has")
        return {"features": (self.width,)}

    def on_model(self, layers: Callable[[Sequence[str] | None], Sequence[Layer]]) -> Self:
        chosen = layers(None if self.layer is None else [self.layer])[-1]
        width = None if chosen.tensor == LOGITS else chosen.width
        return type(self)(chosen.tensor, width, self.loss, self.least_accuracy)

    def check_params(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not isinstance(self.least_accuracy, int | float) or not 0 <= self.least_accuracy <= 1:
            raise ValueError(f"least_accuracy must lie in 0..1, got {self.least_accuracy!r}")
        if self.layer is not None and not isinstance(self.layer, str):
            raise ValueError(f"layer must be the name of a tensor, got {self.layer!r}")
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise ValueError(f"width must be a whole number, 1 or above, got {self.width!r}")

    def _fit(self, logits: Array, y: Array, weight: Array, features: Array | None = None) -> None:
        self.weight_ = np.zeros((1, 1)) if features is None else _head(features, logits, weight)
        values = np.abs(_centred(logits) if features is None else features)
        share = weight / weight.sum()
        losses, right = [], []
        candidates = _candidates(values, share)
        for limit in candidates:
            scores = self._scores(logits, features, limit)
            losses.append(self._loss(scores, y, share))
            right.append(share @ (scores.argmax(axis=1) == y))
        allowed = np.array(right) >= self.least_accuracy * right[0]  # the first clips nothing
        self.limit_ = np.asarray(candidates[int(np.argmin(np.where(allowed, losses, np.inf)))])

    def _predict_proba(self, logits: Array, features: Array | None = None) -> Array:
        return softmax(self._scores(logits, features, float(self.limit_)))

    def emit(self, graph: Graph, logits: str, features: str = "") -> str:
        limit = graph.parameter("limit", self.limit_)
        x = features or graph.node("Sub", logits, graph.reduce("ReduceMean", logits))
        clipped = graph.node("Max", graph.node("Min", x, limit), graph.node("Neg", limit))
        if not features:
            return graph.softmax(graph.centre(clipped))
        excess = graph.node("MatMul", graph.node("Sub", x, clipped), graph.parameter("weight", self.weight_))
        return graph.softmax(graph.centre(graph.node("Sub", graph.centre(logits), excess)))

    def _scores(self, logits: Array, features: Array | None, limit: float) -> Array:
        most = logits.dtype.type(limit)
        if features is None:
            return np.clip(_centred(logits), -most, most)
        excess = features - np.clip(features, -most, most)
        scores: Array = logits - logits.max(axis=1, keepdims=True)
        # Summed row by row: a matrix product's rounding depends on how many rows stand beside a row.
        scores -= np.einsum("ij,jk->ik", excess, self.weight_.astype(logits.dtype))
        return scores

    def _loss(self, scores: Array, y: Array, share: Array) -> float:
        if self.loss == "ece":
            return _calibration_error(softmax(scores), y, share)
        return float(-share @ log_softmax(scores)[np.arange(len(y)), y])

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_tensor("limit", tensors["limit"], np.float64, ())
        if not 0 <= tensors["limit"] <= MAX_ABS_LOGIT:
            raise ValueError(f"limit must lie in 0..{MAX_ABS_LOGIT:g}, got {tensors['limit']}")
        shape = (self.width or 0, n_classes) if self.taps else (1, 1)
        check_tensor("weight", tensors["weight"], np.float64, shape)


def _calibration_error(probabilities: Array, y: Array, share: Array) -> float:
    """ECE of weighted rows, `N_BINS` bins of equal width."""
    confidence = probabilities.max(axis=1)
    gap = share * (confidence - (probabilities.argmax(axis=1) == y))
    bins = np.clip(np.ceil(confidence * N_BINS).astype(np.int64) - 1, 0, N_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=gap)).sum())


def _centred(logits: Array) -> Array:
    """Logits less their row's mean, so that both signs are cut alike."""
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _candidates(values: Array, share: Array) -> Array:
    """No limit first, then limits that cut off more and more of the numbers (n_samples, width)."""
    flat, order = values.ravel(), np.argsort(values, axis=None)
    below = np.cumsum(np.repeat(share / values.shape[1], values.shape[1])[order])
    most = np.log(1 / SMALLEST_SHARE - 1)
    tails = 1 / (1 + np.exp(np.linspace(most, -most, N_CANDIDATES - 1)))
    at = np.minimum(np.searchsorted(below, (1 - tails) - 1e-12), len(flat) - 1)
    return np.concatenate([[MAX_ABS_LOGIT], flat[order][at]])


def _head(features: Array, logits: Array, weight: Array) -> Array:
    """W by least squares; ValueError where the logits are not f W + b, or too few rows tell it."""
    root = np.sqrt(weight / weight.sum())[:, None]
    f, z = (x - np.average(x, axis=0, weights=weight) for x in (features, _centred(logits)))
    varied = f[:, np.abs(f).max(axis=0) > 0].shape[1]
    if len(f) <= varied:
        raise ValueError(f"{varied} features need more rows than that to tell the last layer's weights, got {len(f)}")
    found = np.linalg.lstsq(root * f, root * z, rcond=1e-10)[0]
    missed = np.sqrt(np.square(root * (z - f @ found)).sum() / max(np.square(root * z).sum(), np.finfo(float).tiny))
    if missed > LARGEST_RESIDUAL:
        raise ValueError(f"the logits are no linear function of the features: {missed:.0%} of them is not explained")
    return np.asarray(found)
