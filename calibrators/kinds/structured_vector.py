"""structured_vector: temperature scaling, then a slope and a bias for each class, both drawn to nothing.

Berta, Holzmüller, Jordan, Bach, "Structured matrix scaling for multi-class calibration", AISTATS 2026 (SVS), with the
defaults of its authors' package probmetrics. Two steps, n rows (the sum of weights), K classes:

    l = log( (1 - u) softmax(z / T) + u / K ),      T by temperature scaling, u = 1 / (n + 1)
    p = softmax( (1 + d) * l + b )

with b and d of least  mean log loss + lambda_bias K^rho / n^tau |b|^2 + lambda_diagonal K^rho / n^tau |d|^2. The
share u keeps l finite, whatever the logits; the penalty keeps b finite for a class without rows.

Published log loss, uncalibrated | temperature | SVS: CIFAR-10 ResNet-110 .358 | .209 | .207, CIFAR-100 ResNet-110
1.694 | 1.092 | 1.086, ImageNet DenseNet-161 .944 | .909 | .907.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import TemperatureScaling
from calibrators.multinomial import Rows, identity_map, minimise
from calibrators.numerics import Array, row_maxima, row_sums, softmax_in_place, softmax_of_centred

LARGEST_WEIGHT = 1e7
"""A slope or bias that float32 holds with room for sums."""

WIDEST = 60.0
"""Scores within so much of each other have exponentials, and sums of them, that float32 holds to its last digit."""


class StructuredVectorScaling(Calibrator):
    """p = softmax((1 + d) * l + b) on the mixed, tempered log-probabilities l. May change the argmax.

    Parameters
    ----------
    lambda_bias, lambda_diagonal : strength of the penalty on b, on d; 0 or more
    rho, tau : powers of the number of classes and of rows in both penalties

    Attributes
    ----------
    temperature_, mix_ : () float64, T and u
    weight_, bias_ : (n_classes,) float64, 1 + d and b
    converged_ : whether d and b minimise the penalised loss (not stored in the artifact)

    Examples
    --------
    Logits that say nothing stay as they are: the penalty holds the base rate, 3/4, back.

    >>> calibrator = StructuredVectorScaling().fit([[0.0, 0.0]] * 40, [1, 1, 1, 0] * 10)
    >>> calibrator.predict_proba([[0.0, 0.0]]).round(3).tolist()
    [[0.282, 0.718]]
    """

    float32_atol = 5e-6
    learned = ("temperature", "mix", "weight", "bias")

    def __init__(
        self, lambda_bias: float = 1.0, lambda_diagonal: float = 1.0, rho: float = 1.0, tau: float = 1.0
    ) -> None:
        self.lambda_bias = lambda_bias
        self.lambda_diagonal = lambda_diagonal
        self.rho = rho
        self.tau = tau

    def check_params(self) -> None:
        check_numbers(self, lowest={"lambda_bias": 0.0, "lambda_diagonal": 0.0})

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        self.temperature_, self.mix_ = first_step(logits, y, weight)
        centre = identity_map(logits.shape[1], diagonal=True)
        precision = 2 * len(centre) ** self.rho / weight.sum() ** self.tau * np.ones_like(centre)
        precision *= [self.lambda_diagonal, self.lambda_bias]
        rows = Rows.of(mixed_log(logits.copy(), self.temperature_, self.mix_), y, weight)
        found, self.converged_ = minimise(rows, precision, centre)
        self.weight_, self.bias_ = np.clip(found.T, -LARGEST_WEIGHT, LARGEST_WEIGHT)

    def _predict_proba(self, logits: Array) -> Array:
        weight, bias = self.weight_, self.bias_
        ends = np.log(self.mix_ / len(weight)) * weight + bias, np.log1p(self.mix_ / len(weight)) * weight + bias
        highest = np.max(ends)
        scores = mixed_log(logits, self.temperature_, self.mix_)
        scores *= weight.astype(logits.dtype)
        if highest - np.min(ends) > WIDEST:
            scores += bias.astype(logits.dtype)
            return softmax_in_place(scores)
        scores += (bias - highest).astype(logits.dtype)  # no row reaches so far down that its own top must be found
        return softmax_of_centred(scores)

    def emit(self, graph: Graph, logits: str) -> str:
        mixed = emit_mixed_log(graph, logits, self.temperature_, self.mix_, self.n_classes_)
        scaled = graph.node("Mul", mixed, graph.parameter("weight", self.weight_))
        return graph.softmax(graph.node("Add", scaled, graph.parameter("bias", self.bias_)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_first_step(tensors)
        for name in ("weight", "bias"):
            check_tensor(name, tensors[name], np.float64, (n_classes,))
            if np.abs(tensors[name]).max() > LARGEST_WEIGHT:
                raise ValueError(f"{name} must lie within ±{LARGEST_WEIGHT:g}")


def first_step(logits: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    """T and u, both () float64."""
    temperature = TemperatureScaling().fit(logits, y, sample_weight=weight).temperature_
    return temperature, np.asarray(1 / (weight.sum() + 1))


def mixed_log(logits: Array, temperature: Array, mix: Array) -> Array:
    """l (n_samples, n_classes), in the dtype of the logits and in their memory."""
    p = logits
    p -= row_maxima(p)
    with np.errstate(over="ignore"):  # minus infinity is a probability of zero
        p *= logits.dtype.type(1 / temperature)
    np.exp(p, out=p)
    p *= logits.dtype.type(1 - mix) / row_sums(p)
    p += logits.dtype.type(mix / logits.shape[1])
    return np.log(p, out=p)


def emit_mixed_log(graph: Graph, logits: str, temperature: Array, mix: Array, n_classes: int) -> str:
    """`mixed_log` of FLOAT [B, K] logits."""
    p = graph.softmax(graph.node("Div", graph.centre(logits), graph.parameter("temperature", temperature)))
    kept = graph.node("Mul", p, graph.parameter("kept", 1 - mix))
    return graph.node("Log", graph.node("Add", kept, graph.parameter("floor", mix / n_classes)))


def check_first_step(tensors: Mapping[str, Array]) -> None:
    """Raise ValueError for a T or u that `first_step` could not have made."""
    for name in ("temperature", "mix"):
        check_tensor(name, tensors[name], np.float64, ())
    if not (tensors["temperature"] > 0 and 0 < tensors["mix"] < 1):
        raise ValueError(
            f"temperature must be above 0 and mix inside 0..1, got {tensors['temperature']} and {tensors['mix']}"
        )


def check_numbers(calibrator: Calibrator, *, lowest: Mapping[str, float]) -> None:
    """Raise ValueError unless every constructor parameter is a finite number, not below its `lowest` value."""
    for name, value in calibrator.get_params().items():
        least = lowest.get(name, -np.inf)
        if not (isinstance(value, int | float) and np.isfinite(value) and value >= least):
            wanted = f" of {least:g} or more" if name in lowest else ""
            raise ValueError(f"{name} must be a finite number{wanted}, got {value!r}")
