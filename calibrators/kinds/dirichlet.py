"""dirichlet: a linear map of the log-probabilities.

Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, "Beyond temperature scaling: Obtaining well-calibrated
multi-class probabilities with Dirichlet calibration", NeurIPS 2019, section 3:

    p = softmax(W log q + b),      q = softmax(z),  W (K, K), b of length K

which is the calibration map if the q of each class follow a Dirichlet distribution. Fitted by least

    odir   mean log loss + strength / (K (K - 1)) sum_{i != j} W_ij^2 + bias_strength / K sum_k b_k^2
    l2     mean log loss + strength ( sum_ij W_ij^2 + sum_k b_k^2 )

so ODIR leaves the diagonal free and draws the rest to a diagonal map, and L2 draws everything to the uniform
distribution. (The authors' code subtracts the last class's row from all before it takes the penalty, so the order of
classes matters there; here the penalty is the paper's.) log q is floored at the logarithm of float32's smallest normal
number. A class without rows has a share in half a row (`calibrators.multinomial`): ODIR leaves it an unpenalised way to
minus infinity.

The paper chooses strengths from 36 values each by five folds and averages the five models. Here "cv" goes down
`STRENGTHS` from the strongest until the held-out loss rises, for both strengths tied, then for the bias alone, and fits
one model to all rows. Where that is dear (`multinomial.is_large`: K = 1000, whatever the rows), the strengths stay tied
and the fit ends after `COARSE_STEPS` of L-BFGS or at `COARSE_TOLERANCE`.

Published log loss, uncalibrated | temperature | L2 | ODIR: CIFAR-10 ResNet-110 .358 | .209 | .203 | .205, CIFAR-100
ResNet-110 1.694 | 1.092 | 1.212 | 1.096. Fits beyond `multinomial.MOST_WORK` are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.multinomial import (
    COARSE_TOLERANCE,
    UNSEEN_ROWS,
    Choice,
    Rows,
    check_strength,
    check_work,
    cross_validated,
    identity_map,
    is_large,
    minimise,
    products,
)
from calibrators.numerics import Array, log_softmax, softmax

REGULARISATIONS = ("odir", "l2")
STRENGTHS = {
    "odir": (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4),
    "l2": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
LEAST_LOG = float(np.log(np.finfo(np.float32).tiny))
LARGEST_WEIGHT = 1e7
"""A weight or bias that float32 holds with room for sums."""


class DirichletCalibration(Calibrator):
    """p = softmax(W log q + b). May change the argmax.

    Parameters
    ----------
    regularisation : "odir" (off the diagonal and intercept) or "l2"
    strength : of the penalty on W (L2: on all), 0 or more; "cv" chooses it
    bias_strength : of the penalty on b in ODIR, 0 or more; "cv" chooses it; L2 does not read it
    seed : of the folds, for "cv"

    Attributes
    ----------
    weight_ : (n_classes, n_classes) float64, W; row k makes the score of class k
    bias_ : (n_classes,) float64, b
    strength_, bias_strength_ : float, the strengths of the fit (not stored in the artifact)
    converged_ : whether W and b minimise the penalised loss (not stored in the artifact)

    Examples
    --------
    Logit gap 4, right three times in four: the gap that says 0.75 is log 3.

    >>> logits, y = [[0.0, 4.0]] * 4 + [[4.0, 0.0]] * 4, [1, 1, 1, 0, 0, 0, 0, 1]
    >>> calibrator = DirichletCalibration(strength=0, bias_strength=0).fit(logits, y)
    >>> calibrator.predict_proba([[0.0, 4.0]]).round(6).tolist()
    [[0.25, 0.75]]
    """

    learned = ("weight", "bias")
    float32_atol = 2e-5

    def __init__(
        self,
        regularisation: Literal["odir", "l2"] = "odir",
        strength: float | Literal["cv"] = "cv",
        bias_strength: float | Literal["cv"] = "cv",
        seed: int = 0,
    ) -> None:
        self.regularisation = regularisation
        self.strength = strength
        self.bias_strength = bias_strength
        self.seed = seed

    def check_params(self) -> None:
        if self.regularisation not in REGULARISATIONS:
            raise ValueError(f"regularisation must be one of {', '.join(REGULARISATIONS)}, got {self.regularisation!r}")
        check_strength("strength", self.strength)
        check_strength("bias_strength", self.bias_strength)

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        check_work(self.kind, *logits.shape)
        x = _floored_log(logits)
        start = self._choose(x, y, weight)
        n_classes = logits.shape[1]
        precision = _precision(self.regularisation, n_classes, self.strength_, self.bias_strength_)
        rows = Rows.of(x, y, weight, unseen=UNSEEN_ROWS)
        tolerance = COARSE_TOLERANCE if is_large(len(x), start) else 0.0
        found, self.converged_ = minimise(rows, precision, np.zeros_like(start), start, tolerance=tolerance)
        found = np.clip(found, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        self.weight_, self.bias_ = found[:, :-1], found[:, -1]

    def _choose(self, x: Array, y: Array, weight: Array) -> Array:
        """Set the strengths of the fit; return a map to start from."""
        n_classes, start = x.shape[1], identity_map(x.shape[1], diagonal=False)
        centre, grid = np.zeros_like(start), STRENGTHS[self.regularisation]

        def search(start: Array, strength: float | str, bias_strength: float | str) -> Choice:
            def precision(trial: float, total: float) -> Array:
                del total  # the published strengths are relative to the mean loss
                both = (trial if given == "cv" else float(given) for given in (strength, bias_strength))
                return _precision(self.regularisation, n_classes, *both)

            return cross_validated(x, y, weight, grid, precision, centre, start=start, seed=self.seed)

        choice = Choice(0.0, start)
        if self.strength == "cv":
            choice = search(start, "cv", self.bias_strength)
        self.strength_ = choice.strength if self.strength == "cv" else float(self.strength)
        tied = self.regularisation == "l2" or (self.strength == "cv" and is_large(len(x), start))
        if self.bias_strength == "cv" and not tied:
            choice = search(start, self.strength_, "cv")
        self.bias_strength_ = choice.strength if self.bias_strength == "cv" else float(self.bias_strength)
        return choice.start

    def _predict_proba(self, logits: Array) -> Array:
        weight, bias = self.weight_.astype(logits.dtype), self.bias_.astype(logits.dtype)
        return softmax(products(weight, _floored_log(logits)) + bias)

    def emit(self, graph: Graph, logits: str) -> str:
        floored = graph.node("Max", graph.node("LogSoftmax", logits, axis=1), graph.constant(LEAST_LOG))
        weight, bias = graph.parameter("weight", self.weight_), graph.parameter("bias", self.bias_)
        return graph.softmax(graph.node("Gemm", floored, weight, bias, transB=1))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_tensor("weight", tensors["weight"], np.float64, (n_classes, n_classes))
        check_tensor("bias", tensors["bias"], np.float64, (n_classes,))
        for name in self.learned:
            if np.abs(tensors[name]).max() > LARGEST_WEIGHT:
                raise ValueError(f"{name} must lie within ±{LARGEST_WEIGHT:g}")


def _precision(regularisation: str, n_classes: int, strength: float, bias_strength: float) -> Array:
    """Twice the factors of the squares, (n_classes, n_classes + 1)."""
    if regularisation == "l2":
        return np.full((n_classes, n_classes + 1), 2 * strength)
    precision = np.full((n_classes, n_classes + 1), 2 * strength / (n_classes * (n_classes - 1)))
    np.fill_diagonal(precision, 0.0)
    precision[:, -1] = 2 * bias_strength / n_classes
    return precision


def _floored_log(logits: Array) -> Array:
    return np.asarray(np.maximum(log_softmax(logits), logits.dtype.type(LEAST_LOG)))
