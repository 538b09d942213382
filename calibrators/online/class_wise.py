"""What the online kinds share that calibrate each class against the rest: a learner a class, in the fused graph too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from calibrators.base import check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, log_odds, normalise
from calibrators.online import experts
from calibrators.online.experts import KNOTS, MOST, N_EXPERTS, NODES, WITHIN, State
from calibrators.online.learner import OnlineCalibrator


class ClassWise(OnlineCalibrator):
    """`calibrators.online.experts` on each class's log-odds; the forecasts of a row are divided by their sum.

    For two classes one learner forecasts class 1, and class 0 has the rest.

    Attributes
    ----------
    theta_, curvature_, shares_ : the states of the learners, one axis more than `experts.State` has
    """

    beta: ClassVar[bool] = False
    """Whether lines are beta maps."""

    learned = ("theta", "curvature", "shares")
    float32_atol = 2e-5

    def _begin(self, n_classes: int) -> None:
        n_learners = 1 if n_classes == 2 else n_classes
        for name, array in zip(State._fields, experts.start(self.beta), strict=True):
            setattr(self, f"{name}_", np.repeat(array[None], n_learners, axis=0))

    def _learn(self, logits: Array, y: Array, weight: Array) -> Array:
        scores = self._scores(logits)
        first = 1 if len(self.shares_) == 1 else 0
        forecasts = np.empty(scores.shape)
        for k in range(scores.shape[1]):
            state = State(self.theta_[k], self.curvature_[k], self.shares_[k])
            column, is_class = np.ascontiguousarray(scores[:, k]), (y == first + k).astype(np.float64)
            forecasts[:, k] = experts.learn(state, column, is_class, weight, self.beta)
        return np.hstack([1 - forecasts, forecasts]) if len(self.shares_) == 1 else normalise(forecasts)

    def _scores(self, logits: Array) -> Array:
        """The log-odds that the learners read, (n_samples, n_learners)."""
        return log_odds(logits)[:, -len(self.shares_) :]

    def _predict_proba(self, logits: Array) -> Array:
        scores, mixed = self._scores(logits), np.empty_like(logits)
        theta = experts.served(self.theta_, self.beta).astype(logits.dtype)
        shares = self.shares_.astype(logits.dtype)
        for k in range(scores.shape[1]):
            of_experts = np.einsum("nd,ed->ne", experts.features(scores[:, k], self.beta), theta[k])
            z = np.clip(np.column_stack([scores[:, k], of_experts]), -MOST, MOST)
            if len(shares) == 1:
                mixed[:, 0] = np.einsum("ne,e->n", 1 / (1 + np.exp(z)), shares[k])
            mixed[:, k - scores.shape[1]] = np.einsum("ne,e->n", 1 / (1 + np.exp(-z)), shares[k])
        return normalise(mixed)

    def emit(self, graph: Graph, logits: str) -> str:
        scores = graph.log_odds(logits)
        theta = graph.parameter("theta", experts.served(self.theta_, self.beta).transpose(0, 2, 1))
        shares = graph.parameter("shares", self.shares_[:, None, :])
        if len(self.shares_) == 1:
            scores = graph.column(scores, 1)
        by_class = graph.reshape(graph.node("Transpose", scores, perm=[1, 0]), (len(self.shares_), -1, 1))
        of_experts = graph.node("MatMul", self._emit_features(graph, by_class), theta)
        z = graph.clip(graph.node("Concat", by_class, of_experts, axis=2), -MOST, MOST)
        mixed = self._emit_mixture(graph, z, shares)
        if len(self.shares_) == 1:
            mixed = graph.node("Concat", self._emit_mixture(graph, graph.node("Neg", z), shares), mixed, axis=1)
        return graph.normalise(mixed)

    def _emit_features(self, graph: Graph, scores: str) -> str:
        """`experts.features` of scores [learners, B, 1]."""
        s, zero = graph.clip(scores, -WITHIN, WITHIN), graph.constant(0.0)
        one = graph.node("Add", graph.node("Mul", s, zero), graph.constant(1.0))
        line = [s, one]
        if self.beta:
            terms = graph.node("Exp", graph.node("Neg", graph.node("Abs", s)))
            decay = graph.node("Log", graph.node("Add", terms, graph.constant(1.0)))
            line = [graph.node("Sub", graph.node("Min", s, zero), decay), one]
            line.append(graph.node("Add", graph.node("Max", s, zero), decay))
        bends = graph.node("Relu", graph.node("Sub", s, graph.constant(KNOTS)))
        return graph.node("Concat", *line, bends, axis=2)

    def _emit_mixture(self, graph: Graph, z: str, shares: str) -> str:
        """[B, learners] forecasts of log-odds [learners, B, experts]."""
        weighted = graph.node("Mul", graph.node("Sigmoid", z), shares)
        return graph.node("Transpose", graph.reduce("ReduceSum", weighted, keepdims=False), perm=[1, 0])

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        n_learners = 1 if n_classes == 2 else n_classes
        shapes = ((N_EXPERTS, len(NODES)), (N_EXPERTS, len(NODES), 3), (N_EXPERTS,))
        for name, shape in zip(State._fields, shapes, strict=True):
            check_tensor(name, tensors[name], np.float64, (n_learners, *shape))
        if not (tensors["shares"].min() >= 0 and np.allclose(tensors["shares"].sum(axis=1), 1)):
            raise ValueError("shares must be zero or above and sum to one")
