"""structured_matrix: temperature scaling, then a linear map whose parts are each drawn to nothing.

Berta, Holzmüller, Jordan, Bach, "Structured matrix scaling for multi-class calibration", AISTATS 2026 (SMS), with the
defaults of its authors' package probmetrics. With the first step of `structured_vector`,

    l = log( (1 - u) softmax(z / T) + u / K ),      T by temperature scaling, u = 1 / (n + 1)
    p = softmax( (I + M) l + b )

with b and M of least  mean log loss + lambda_bias K^rho / n^tau |b|^2 + lambda_diagonal K^rho / n^tau |diag M|^2
+ lambda_off_diagonal (K (K - 1))^rho / n^tau |M off the diagonal|^2. What a part may move shrinks with its number of
parameters, so that many classes end near `structured_vector` and few rows near temperature scaling.

Published log loss, uncalibrated | temperature | SMS: CIFAR-10 ResNet-110 .358 | .209 | .203, CIFAR-100 ResNet-110
1.694 | 1.092 | 1.086. Best of 15 methods on 1,800 experiments (CalArena, arXiv 2605.30188). Fits beyond
`multinomial.MOST_WORK` are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.structured_vector import (
    LARGEST_WEIGHT,
    check_first_step,
    check_numbers,
    emit_mixed_log,
    first_step,
    mixed_log,
)
from calibrators.multinomial import Rows, check_work, identity_map, minimise, products
from calibrators.numerics import Array, softmax


class StructuredMatrixScaling(Calibrator):
    """p = softmax((I + M) l + b) on the mixed, tempered log-probabilities l. May change the argmax.

    Parameters
    ----------
    lambda_bias, lambda_diagonal, lambda_off_diagonal : of the penalty on b and on M's two parts; 0 or more
    rho, tau : powers of the number of classes (off the diagonal: of entries) and of rows in the penalties

    Attributes
    ----------
    temperature_, mix_ : () float64, T and u
    weight_ : (n_classes, n_classes) float64, I + M; row k makes the score of class k
    bias_ : (n_classes,) float64, b
    converged_ : whether M and b minimise the penalised loss (not stored in the artifact)

    Examples
    --------
    Of rows that say class 0 a tenth are class 2, so M lends class 2 some of what class 0 has.

    >>> logits = [[4, 0, 0]] * 100 + [[0, 4, 0]] * 100 + [[0, 0, 4]] * 100
    >>> calibrator = StructuredMatrixScaling().fit(logits, [0] * 90 + [2] * 10 + [1] * 100 + [2] * 100)
    >>> calibrator.predict_proba([[4.0, 0.0, 0.0]]).round(2).tolist()
    [[0.9, 0.01, 0.09]]
    """

    learned = ("temperature", "mix", "weight", "bias")
    float32_atol = 1e-5

    def __init__(
        self,
        lambda_bias: float = 1.0,
        lambda_diagonal: float = 1.0,
        lambda_off_diagonal: float = 1.0,
        rho: float = 1.0,
        tau: float = 1.0,
    ) -> None:
        self.lambda_bias = lambda_bias
        self.lambda_diagonal = lambda_diagonal
        self.lambda_off_diagonal = lambda_off_diagonal
        self.rho = rho
        self.tau = tau

    def check_params(self) -> None:
        check_numbers(self, lowest={"lambda_bias": 0.0, "lambda_diagonal": 0.0, "lambda_off_diagonal": 0.0})

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        check_work(self.kind, *logits.shape)
        self.temperature_, self.mix_ = first_step(logits, y, weight)
        rows = Rows.of(mixed_log(logits.copy(), self.temperature_, self.mix_), y, weight)
        n_classes = logits.shape[1]
        precision = self._precision(n_classes, weight.sum())
        found, self.converged_ = minimise(rows, precision, identity_map(n_classes, diagonal=False))
        found = np.clip(found, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        self.weight_, self.bias_ = found[:, :-1], found[:, -1]

    def _precision(self, n_classes: int, total: float) -> Array:
        """Twice the factors of the squares, (n_classes, n_classes + 1)."""
        off_diagonal = self.lambda_off_diagonal * (n_classes * (n_classes - 1)) ** self.rho
        precision = np.full((n_classes, n_classes + 1), off_diagonal)
        np.fill_diagonal(precision, self.lambda_diagonal * n_classes**self.rho)
        precision[:, -1] = self.lambda_bias * n_classes**self.rho
        return np.asarray(2 / total**self.tau * precision)

    def _predict_proba(self, logits: Array) -> Array:
        weight, bias = self.weight_.astype(logits.dtype), self.bias_.astype(logits.dtype)
        return softmax(products(weight, mixed_log(logits, self.temperature_, self.mix_)) + bias)

    def emit(self, graph: Graph, logits: str) -> str:
        mixed = emit_mixed_log(graph, logits, self.temperature_, self.mix_, self.n_classes_)
        weight, bias = graph.parameter("weight", self.weight_), graph.parameter("bias", self.bias_)
        return graph.softmax(graph.node("Gemm", mixed, weight, bias, transB=1))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_first_step(tensors)
        check_tensor("weight", tensors["weight"], np.float64, (n_classes, n_classes))
        check_tensor("bias", tensors["bias"], np.float64, (n_classes,))
        for name in ("weight", "bias"):
            if np.abs(tensors[name]).max() > LARGEST_WEIGHT:
                raise ValueError(f"{name} must lie within ±{LARGEST_WEIGHT:g}")
