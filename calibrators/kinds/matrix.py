"""matrix: a linear map of all logits.

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2 (matrix scaling):

    p = softmax(W z + b),        W (K, K), b of length K

fitted by maximum likelihood: K^2 + K parameters, which on 100 classes ruin the model (published ECE of CIFAR-100
ResNet-110: 16.5 % before, 25.5 % after). Here W and b are drawn to temperature scaling, W = I/T and b = 0, by a ridge:
with T the temperature of the calibration set,

    total log loss + penalty/2 [ |T W - I|^2 + |b|^2 ]

is least. The penalty counts in rows, so it means the same for every number of rows. `penalty=0` is the published form,
`penalty="cv"` chooses from `multinomial.PENALTIES` by cross-validated log loss. A class without rows has a share in
half a row (`calibrators.multinomial`), so that its bias is finite for every penalty.

Held-out log loss of temperature scaling, maximum likelihood and "cv": CIFAR-10 ResNet-50 (5,000 rows) .2038, .2015,
.1934; AG News, 4 classes (2,000) .3989, .3917, .3918. A full map costs n K^2 for each step: fits beyond
`multinomial.MOST_WORK` are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.multinomial import check_strength, check_work, fit_towards_identity, products
from calibrators.numerics import Array, softmax

LEAST_TEMPERATURE = 1e-5
LARGEST_WEIGHT = 1e7
"""Bounds that keep float32 from overflowing for logits that `check_logits` accepts; a row's weights together."""


class MatrixScaling(Calibrator):
    """p = softmax(W z + b). May change the argmax.

    Parameters
    ----------
    penalty : precision of the prior around temperature scaling, in rows, 0 or more; "cv" chooses it
    seed : of the folds, for "cv"

    Attributes
    ----------
    weight_ : (n_classes, n_classes) float64, W; row k makes the score of class k
    bias_ : (n_classes,) float64, b
    penalty_ : float, the penalty of the fit (not stored in the artifact)
    converged_ : whether W and b minimise the penalised loss (not stored in the artifact)

    Examples
    --------
    A model that calls class 0 class 1 and the other way round, right three times in four: W swaps the columns.

    >>> logits, y = [[2.0, 0.0]] * 4 + [[0.0, 2.0]] * 4, [1, 1, 1, 0, 0, 0, 0, 1]
    >>> MatrixScaling(penalty=0).fit(logits, y).predict_proba([[2.0, 0.0]]).round(6).tolist()
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
        check_work(self.kind, *logits.shape)
        tempered = TemperatureScaling().fit(logits, y, sample_weight=weight)
        temperature = np.maximum(tempered.temperature_, LEAST_TEMPERATURE)
        found, self.penalty_ = fit_towards_identity(
            logits / temperature, y, weight, self.penalty, diagonal=False, seed=self.seed
        )
        bound = LARGEST_WEIGHT / len(found.map)
        self.weight_ = np.clip(found.map[:, :-1] / temperature, -bound, bound)
        self.bias_, self.converged_ = found.map[:, -1], found.converged

    def _predict_proba(self, logits: Array) -> Array:
        weight, lean, bias = (array.astype(logits.dtype) for array in (self.weight_, self._lean(), self.bias_))
        top = logits.max(axis=1, keepdims=True)
        return softmax(products(weight, logits - top) + (lean * top + bias))

    def emit(self, graph: Graph, logits: str) -> str:
        top = graph.reduce("ReduceMax", logits)
        far = graph.node("Mul", top, graph.parameter("lean", self._lean()))
        rest = graph.node("Add", far, graph.parameter("bias", self.bias_))
        weight = graph.parameter("weight", self.weight_)
        return graph.softmax(graph.node("Gemm", graph.node("Sub", logits, top), weight, rest, transB=1))

    def _lean(self) -> Array:
        """What an offset of the row adds to each class: W z = W (z - m) + (W 1) m, but for a constant.

        In this form float32 errs in proportion to the distance from the row's maximum m, not to the logit.
        """
        sums = self.weight_.sum(axis=1)
        return np.asarray(sums - sums.mean())

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_tensor("weight", tensors["weight"], np.float64, (n_classes, n_classes))
        check_tensor("bias", tensors["bias"], np.float64, (n_classes,))
        if np.abs(tensors["weight"]).max() > LARGEST_WEIGHT / n_classes:
            raise ValueError(f"weights must lie within ±{LARGEST_WEIGHT / n_classes:g}")
