"""vector: a slope and a bias for each class's logit.

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2 (vector scaling):

    p = softmax(w * z + b),        w and b of length K

fitted by maximum likelihood. With few rows for a class that overfits, and where rows are separable it diverges. Here w
and b are drawn to temperature scaling, w = 1/T and b = 0, by a ridge: with T the temperature of the calibration set,

    total log loss + penalty/2 [ sum_k (T w_k - 1)^2 + sum_k b_k^2 ]

is least. The penalty counts in rows, so it means the same for every number of rows; in Bayes' reading it is the
precision of a normal prior. `penalty=0` is the published form, `penalty="cv"` chooses from `multinomial.PENALTIES` by
cross-validated log loss. A class without rows has a share in half a row (`calibrators.multinomial`), so that its bias
is finite for every penalty.

Held-out log loss of temperature scaling, maximum likelihood and "cv": CIFAR-10 ResNet-50 (5,000 rows) .2038, .1980,
.1979; ResNet-20 with 200 rows .4225, .4963, .4294; EfficientNet-lite0, 100 classes (2,500 rows) 1.461, 1.267, 1.238.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.multinomial import check_strength, fit_towards_identity
from calibrators.numerics import Array, row_maxima, softmax_in_place

LEAST_TEMPERATURE = 1e-5
LARGEST_WEIGHT = 1e7
"""Bounds that keep float32 from overflowing for logits that `check_logits` accepts."""


class VectorScaling(Calibrator):
    """p = softmax(w * z + b). May change the argmax.

    Parameters
    ----------
    penalty : precision of the prior around temperature scaling, in rows, 0 or more; "cv" chooses it
    seed : of the folds, for "cv"

    Attributes
    ----------
    weight_, bias_ : (n_classes,) float64, w and b
    penalty_ : float, the penalty of the fit (not stored in the artifact)
    converged_ : whether w and b minimise the penalised loss (not stored in the artifact)

    Examples
    --------
    By hand: logits that say nothing, and three rows in four of class 1. Without a penalty the biases differ by log 3.

    >>> calibrator = VectorScaling(penalty=0).fit([[0.0, 0.0]] * 4, [1, 1, 1, 0])
    >>> calibrator.predict_proba([[0.0, 0.0]]).round(6).tolist()
    [[0.25, 0.75]]
    """

    learned = ("weight", "bias")
    float32_atol = 1e-5

    def __init__(self, penalty: float | Literal["cv"] = "cv", seed: int = 0) -> None:
        self.penalty = penalty
        self.seed = seed

    def check_params(self) -> None:
        check_strength("penalty", self.penalty)

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        tempered = TemperatureScaling().fit(logits, y, sample_weight=weight)
        temperature = np.maximum(tempered.temperature_, LEAST_TEMPERATURE)
        found, self.penalty_ = fit_towards_identity(
            logits / temperature, y, weight, self.penalty, diagonal=True, seed=self.seed
        )
        self.weight_ = np.clip(found.map[:, 0] / temperature, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        self.bias_, self.converged_ = found.map[:, 1], found.converged

    def _predict_proba(self, logits: Array) -> Array:
        weight, lean, bias = (array.astype(logits.dtype) for array in (self.weight_, self._lean(), self.bias_))
        if logits.dtype == np.float64:  # has digits enough for an offset
            logits *= weight
        else:
            top = row_maxima(logits)
            logits -= top
            logits *= weight
            logits += np.multiply(lean, top, out=np.empty_like(logits))  # in the logits' order of memory
        logits += bias
        return softmax_in_place(logits)

    def emit(self, graph: Graph, logits: str) -> str:
        top = graph.reduce("ReduceMax", logits)
        near = graph.node("Mul", graph.node("Sub", logits, top), graph.parameter("weight", self.weight_))
        far = graph.node("Mul", top, graph.parameter("lean", self._lean()))
        return graph.softmax(graph.node("Add", near, graph.node("Add", far, graph.parameter("bias", self.bias_))))

    def _lean(self) -> Array:
        """What an offset of the row adds to each class: w * z = w * (z - m) + (w - mean w) m, but for a constant.

        In this form float32 errs in proportion to the distance from the row's maximum m, not to the logit.
        """
        return np.asarray(self.weight_ - self.weight_.mean())

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        for name in self.learned:
            check_tensor(name, tensors[name], np.float64, (n_classes,))
        if np.abs(tensors["weight"]).max() > LARGEST_WEIGHT:
            raise ValueError(f"weights must lie within ±{LARGEST_WEIGHT:g}")
