"""class_prior: one bias for each class, for a share of classes that differs from the training's.

p = softmax(z + b). Where the classes are as they were in training but for their shares, log-odds move by the logarithm
of the ratio of shares, new over old, and by nothing else (Saerens, Latinne, Decaestecker, "Adjusting the Outputs of a
Classifier to New a Priori Probabilities", Neural Computation 14, 2002, section 2). Here b is fitted on labelled rows,
by maximum posterior under a symmetric Dirichlet law on softmax(b), c pseudo-rows of each class:

    L(b) = - sum_i w_i log softmax(z_i + b)_{y_i} - c sum_k log softmax(b)_k

that is, beside the rows there are c of every class about which the logits say nothing. L is convex and finite whatever
the labels; a class that never occurs ends where sum_i w_i p_ik + c K softmax(b)_k = c. Where the logits say nothing at
all, p_k = (N_k + c) / (N + c K) exactly; without rows, b = 0 is the model as it is. Adding a constant to b changes
nothing: b has mean zero.

With P the probabilities of the rows and r = softmax(b),

    gradient   P'w + c K r - N - c
    curvature  diag(P'w) - P' diag(w) P + c K (diag(r) - r r')

The biases are in units of the logits. Overconfident logits make them too large, and want a temperature first: on
CIFAR-10 ResNet-50, whose classes are as in training, the held-out log loss goes from .412 to .420.

The solver is Newton's method damped as by Levenberg and Marquardt, to a gradient of 1e-11 of the weights' sum: the
damping falls while steps succeed, so that biases of 10,000 are reached as surely as biases of 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, blocks, row_maxima, softmax, softmax_in_place, softmax_of_centred

GRADIENT_TOLERANCE = 1e-11
MAX_STEPS = 300
LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING = 1e-30, 1e-6, 1e6
DAMPING_FACTOR = 10.0
ROUNDING = 1e-14
"""A step may seem to raise the loss by so much of the sizes it is summed from."""

NEAR = 60.0
"""Biases within so much of each other leave a row's largest score so near 0 that float64 needs no other shift."""

MAX_BIAS = 1e31
"""No finite bias beyond this could matter to logits that `check_logits` accepts."""


class ClassPrior(Calibrator):
    """p = softmax(z + b). May change the argmax; leaves over- and underconfidence as they are.

    Parameters
    ----------
    pseudo_count : c > 0, rows of each class that are added in thought

    Attributes
    ----------
    bias_ : (n_classes,) float64, mean zero; above zero the class is more frequent than the model takes it to be
    converged_ : whether the gradient vanished (not stored in the artifact)

    Examples
    --------
    Logits that say nothing: seven rows of class 0, one of class 1, and one more of each in thought, are 8/10 and 2/10.

    >>> ClassPrior().fit([[0.0, 0.0]] * 8, [0] * 7 + [1]).predict_proba([[0.0, 0.0]]).round(6).tolist()
    [[0.8, 0.2]]
    """

    learned = ("bias",)
    float32_atol = 5e-6

    def __init__(self, pseudo_count: float = 1.0) -> None:
        self.pseudo_count = pseudo_count

    def check_params(self) -> None:
        number = isinstance(self.pseudo_count, int | float) and not isinstance(self.pseudo_count, bool)
        if not (number and 0 < self.pseudo_count < np.inf):
            raise ValueError(f"pseudo_count must be a finite number above 0, got {self.pseudo_count!r}")

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        self.bias_, self.converged_ = _minimise(_Loss(logits, y, weight, self.pseudo_count))

    def _predict_proba(self, logits: Array) -> Array:
        logits -= row_maxima(logits)
        below = self.bias_ - self.bias_.max()
        logits += below.astype(logits.dtype)
        if logits.dtype == np.float64 and below.min() > -NEAR:
            return softmax_of_centred(logits)
        return softmax_in_place(logits)

    def emit(self, graph: Graph, logits: str) -> str:
        return graph.softmax(graph.node("Add", graph.centre(logits), graph.parameter("bias", self.bias_)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        bias = tensors["bias"]
        check_tensor("bias", bias, np.float64, (n_classes,))
        if np.abs(bias).max() > MAX_BIAS:
            raise ValueError(f"biases must lie within ±{MAX_BIAS:g}, got {bias.min()}..{bias.max()}")


class _Loss:
    """L of the module's head, divided by N + c K."""

    def __init__(self, logits: Array, y: Array, weight: Array, pseudo_count: float) -> None:
        n_classes = logits.shape[1]
        total = weight.sum() + pseudo_count * n_classes
        self.logits = logits - logits[np.arange(len(y)), y][:, None]  # the label's own logit is zero: offsets cancel
        self.y = y
        self.weight = weight / total
        self.pseudo = pseudo_count / total
        self.target = np.bincount(y, weights=self.weight, minlength=n_classes) + self.pseudo

    def value(self, bias: Array) -> float:
        total = self.pseudo * (len(bias) * _log_sum_exp(bias[None])[0] - bias.sum())
        for block in blocks(*self.logits.shape):
            total += self.weight[block] @ (_log_sum_exp(self.logits[block] + bias) - bias[self.y[block]])
        return float(total)

    def derivatives(self, bias: Array) -> tuple[Array, Array]:
        """Gradient (n_classes,) and curvature (n_classes, n_classes)."""
        n_classes = len(bias)
        prior = softmax(bias[None])[0]
        mass = self.pseudo * n_classes * prior
        outer = self.pseudo * n_classes * np.outer(prior, prior)
        for block in blocks(*self.logits.shape):
            p = softmax(self.logits[block] + bias)
            weighted = p * self.weight[block][:, None]
            mass += weighted.sum(axis=0)
            outer += weighted.T @ p
        return mass - self.target, np.diag(mass) - outer


def _minimise(loss: _Loss) -> tuple[Array, bool]:
    """The bias of least loss, and whether its gradient vanishes."""
    bias, damping = np.zeros(len(loss.target)), FIRST_DAMPING
    value, (gradient, curvature) = loss.value(bias), loss.derivatives(bias)
    for _ in range(MAX_STEPS):
        if np.abs(gradient).max() <= GRADIENT_TOLERANCE:
            return bias - bias.mean(), True
        trial = bias + _step(gradient, curvature, damping)
        trial_value = loss.value(trial)
        if trial_value <= value + ROUNDING * (1 + np.abs(trial).max()):
            bias, value = trial, trial_value
            gradient, curvature = loss.derivatives(bias)
            damping = max(damping / DAMPING_FACTOR, LEAST_DAMPING)
        elif damping < MOST_DAMPING:
            damping *= DAMPING_FACTOR
    return bias - bias.mean(), False


def _step(gradient: Array, curvature: Array, damping: float) -> Array:
    """-(H + damping)^-1 g. The constant direction, in which H is zero, is given the size of H."""
    n_classes = len(gradient)
    whole = curvature + np.trace(curvature) / n_classes**2
    whole.flat[:: n_classes + 1] += damping
    step: Array = -cho_solve(cho_factor(whole, lower=True), gradient)
    centred: Array = step - step.mean()
    return centred


def _log_sum_exp(logits: Array) -> Array:
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))
