"""What a nonconformity score is, and the set of all labels whose score is at or below a threshold.

A score s(p, y) says how badly label y fits a row of probabilities p; the prediction set of a row is {y: s(p, y) <= t}.
Every score here depends on p_y and on the row's sorted probabilities v_1 >= v_2 >= .. alone, and grows as p_y falls.
So a score is its `profile`, the scores of v_1, v_2, .. in that order, and a set is a cut:

    cut = min {v_j : profile_j <= t}         set = {y: p_y >= cut}

Sorting values is ten times as fast as sorting labels, and the same few nodes are in the graph of an exported model.

Ties. Labels of equal probability have one score, that of the first of them in the order, so all are in or none is; no
index decides. A label whose score equals the threshold is in. The graph and numpy may round the last digits of a
probability differently, so equal means within `slack`: where many rows share a score, as behind a binned calibrator,
rounding would otherwise drop them all. Everything is float32, the arithmetic of serving, in calibration too.

Randomised scores count a share u of the label's own mass, one uniform number a row in calibration and when serving.
Deterministic ones have u = 0: the score is then what stands before the label, of the likeliest 0, so no set is empty.
With u = 1, as APS and RAPS are often run without randomness, confident rows get empty sets and all others far larger
ones: on CIFAR-10 (ResNet-20, level 0.9) 5.1 labels on average and 10 % empty, against 1.4 with u = 0 and 1.8
randomised. What u = 0 costs is where the model's accuracy is above the level: the score is 0 for all its right answers,
the sets are single labels, and the coverage is the accuracy and not the level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from calibrators.graph import Graph
from calibrators.numerics import Array

SLACK = 2.0**-16
"""Scores within this are equal; more than twice what float32 probabilities may differ by, graph against numpy."""

NOTHING = np.float32(0.0)


class Score(ABC):
    """One score, with its parameters if it has any.

    Attributes
    ----------
    parameters : names of what is tuned where it is not given, in the order of `values`
    values : (n_parameters,) float64
    """

    parameters: ClassVar[tuple[str, ...]] = ()
    uses_share: ClassVar[bool] = False
    """Whether the score has a part u p_y, so that it can be randomised."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.values = np.array([(values or {})[name] for name in self.parameters], dtype=np.float64)

    @property
    def name(self) -> str:
        """The filename."""
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def check(cls, values: Mapping[str, float]) -> None:
        """Raise ValueError for parameters outside their range."""
        del values

    @classmethod
    def candidates(cls, p: Array, y: Array, weight: Array, level: float) -> list[dict[str, float]]:
        """Parameters worth comparing on rows of these probabilities (n_samples, n_classes), labels and weights."""
        del p, y, weight, level
        return [{}]

    @abstractmethod
    def profile(self, v: Array, share: Array | np.float32) -> Array:
        """(n_samples, n_classes) scores, never falling along a row, of probabilities `v` sorted from large to small.

        `share` is u, (n_samples, 1) or one number in [0, 1].
        """

    @abstractmethod
    def emit_profile(self, graph: Graph, v: str, n_classes: int) -> str:
        """The same as nodes, u = 0."""

    def of_labels(self, p: Array, y: Array, share: Array | None = None) -> NDArray[np.float32]:
        """(n_samples,) the score of label y in each row of probabilities (n_samples, n_classes)."""
        p = np.asarray(p, dtype=np.float32)
        rows = np.arange(len(p))
        place = (p > p[rows, y][:, None]).sum(axis=1)
        scores: NDArray[np.float32] = self.profile(descending(p), _column(share))[rows, place]
        return scores

    def cuts(self, p: Array, thresholds: Array, share: Array | None = None) -> NDArray[np.float32]:
        """(n_samples, n_thresholds) the least probability that is in the set; infinite where the set is empty.

        Parameters
        ----------
        p : (n_samples, n_classes) float32
        thresholds : (n_thresholds,) or (n_samples, n_thresholds) float32
        """
        v = descending(p)
        profile = self.profile(v, _column(share))
        limits = np.broadcast_to(thresholds + self.slack(thresholds), (len(p), np.shape(thresholds)[-1]))
        sizes = (profile <= limits).sum(axis=1, keepdims=True) if limits.shape[1] == 1 else _places(profile, limits)
        found = np.take_along_axis(v, np.maximum(sizes - 1, 0), axis=1)
        return np.where(sizes > 0, found, np.float32(np.inf))

    def slack(self, thresholds: Array) -> Array | np.float32:
        """Within what scores count as equal."""
        del thresholds
        return np.float32(SLACK)

    def emit_cuts(self, graph: Graph, p: str, thresholds: Array, n_classes: int) -> str:
        """FLOAT [B, n_thresholds], `cuts` of FLOAT [B, n_classes] as nodes."""
        v = graph.largest(p, n_classes)
        limits = thresholds + self.slack(thresholds)
        profile = self.emit_profile(graph, v, n_classes)
        if len(limits) > 1:
            v, profile = graph.reshape(v, (0, 1, -1)), graph.reshape(profile, (0, 1, -1))
            limits = limits[:, None]
        out = graph.node("Greater", profile, graph.constant(limits))
        inside = graph.node("Where", out, graph.constant(np.inf), v)
        return graph.reduce("ReduceMin", inside, keepdims=len(limits) == 1)


def members(p: Array, cuts: Array, *, allow_empty: bool) -> NDArray[np.bool_]:
    """(n_samples, n_classes) which labels are in the set.

    Parameters
    ----------
    p : (n_samples, n_classes) float32
    cuts : (n_samples, 1) or (n_samples, n_classes), the least probability that is in
    allow_empty : False puts the likeliest label (all that tie for it) into a set that would be empty. That adds to the
        coverage, by at most the share of empty sets, and takes nothing from it
    """
    inside: NDArray[np.bool_] = p >= (cuts if allow_empty else np.minimum(cuts, p.max(axis=1, keepdims=True)))
    return inside


def emit_members(graph: Graph, p: str, cuts: str, *, allow_empty: bool) -> str:
    """BOOL [B, K], `members` as nodes."""
    if not allow_empty:
        cuts = graph.node("Min", cuts, graph.reduce("ReduceMax", p))
    if graph.opset >= 12:
        return graph.node("GreaterOrEqual", p, cuts)
    return graph.node("Not", graph.node("Less", p, cuts))


def descending(p: Array) -> Array:
    """Each row sorted from large to small."""
    return -np.sort(-p, axis=1)


def before(v: Array) -> Array:
    """Of rows sorted from large to small, the sum of what stands before each place."""
    sums = np.zeros_like(v)
    np.cumsum(v[:, :-1], axis=1, out=sums[:, 1:])
    return sums


def emit_before(graph: Graph, v: str, n_classes: int) -> str:
    """`before` as nodes; where there is no CumSum, which came with opset 11, a product, which rounds otherwise."""
    if graph.opset >= 11:
        return graph.node("CumSum", v, graph.constant(np.array(1, dtype=np.int64)), exclusive=1)
    return graph.node("MatMul", v, graph.constant(np.triu(np.ones((n_classes, n_classes)), 1)))


def _column(share: Array | None) -> Array | np.float32:
    return NOTHING if share is None else np.asarray(share, dtype=np.float32)[:, None]


def _places(profile: Array, limits: Array) -> NDArray[np.int64]:
    """Row by row, how many of the ascending profile are at or below each limit."""
    places = np.empty(limits.shape, dtype=np.int64)
    for row in range(len(profile)):
        places[row] = np.searchsorted(profile[row], limits[row], side="right")
    return places
