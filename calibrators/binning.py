"""Step functions of log-odds, for the kinds that are made of them: histogram_binning, bbq, scaling_binning, venn_abers.

A class's map is a row of ascending edges and a row of levels, one more: cell c holds the scores s with
edges[c-1] <= s < edges[c], and the map is levels[c] there. Unused places at the end of a row hold an edge that no score
reaches. For two classes one map, that of class 1, serves both: p_0 = 1 - p_1.

A step has no tolerance, so both sides must see one score. It is defined in float32: logits less their row's largest,
rounded to float32, then log-odds in float32, in numpy as in the graph. Rows given in float32 and in float64 then fall
into the same cells. Between numpy and the graph the last bit of an exponential may differ (for two classes there is
none to take): a score within 1e-6 of an edge may fall on its other side. Edges therefore lie midway between scores of
the calibration set.

A cell is found by comparisons none of which branches: with the seven edges that part a map in eight, then by bisection
within the part. The seven need no look at a table, and together cost less than the three halvings that they replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.numerics import Array, centre, log_odds, normalise, sigmoid

BEYOND = float(np.finfo(np.float32).max)
"""An edge that no score reaches."""

COUNTED_PARTS = 8

LARGEST_LEVEL = 60.0
"""Calibrated log-odds stay within ±60, so that no probability underflows in float32."""


class OneVsRestSteps(Calibrator):
    """Base of kinds whose every class has one step function, rows normalised; subclasses fit `edges_` and `levels_`."""

    learned: ClassVar[tuple[str, ...]] = ("edges", "levels")

    @property
    def n_cells(self) -> int:
        """Length of the table of each map, a power of two fixed by the constructor parameters."""
        raise NotImplementedError

    def _fit_map(self, rows: Ties) -> Steps:
        """The step function of one class."""
        raise NotImplementedError

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        steps = [self._fit_map(rows) for rows in problems(logits, y, weight)]
        self.edges_, self.levels_ = table(steps, self.n_cells)

    def _levels(self) -> Array:
        """Log-odds of every cell, (n_maps, n_cells) float32."""
        levels: Array = self.levels_
        return levels

    def _predict_proba(self, logits: Array) -> Array:
        return distributions(look_up(scores(logits), self.edges_, self._levels()), logits.dtype)

    def emit(self, graph: Graph, logits: str) -> str:
        edges, levels = graph.parameter("edges", self.edges_), graph.parameter("levels", self._levels())
        s = emit_scores(graph, logits, len(self.edges_))
        return emit_distributions(graph, emit_look_up(graph, s, edges, levels, self.edges_.shape), len(self.edges_))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        check_table(tensors["edges"], tensors["levels"], (maps_of(n_classes), self.n_cells))


class Ties(NamedTuple):
    """The rows of one calibration problem by their distinct scores, ascending."""

    score: Array  # (m,) float32
    mass: Array  # (m,) sum of weights
    positive: Array  # (m,) sum of the weights of positives

    @classmethod
    def of(cls, score: Array, hits: Array, weight: Array) -> Ties:
        order = np.argsort(score, kind="stable")
        ordered = score[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-np.inf))
        sums = np.stack([weight, weight * hits])[:, order]
        return cls(ordered[starts], *np.add.reduceat(sums, starts, axis=1))

    def equal_mass_starts(self, n_bins: int) -> Array:
        """Where each of at most `n_bins` bins of nearly equal mass begins: indices into the scores, the first 0."""
        mass = np.cumsum(self.mass)
        wanted = mass[-1] * np.arange(1, n_bins) / n_bins
        after = np.searchsorted(mass, wanted)
        before = np.concatenate([[0.0], mass])[after]
        nearest = np.where(wanted - before < mass[after] - wanted, after, after + 1)
        inner = np.unique(nearest)
        return np.concatenate([[0], inner[(inner > 0) & (inner < len(mass))]])

    def edges(self, starts: Array) -> Array:
        """Edges in float32 midway between the scores on either side of each bin's beginning, the first one's aside."""
        below, above = self.score[starts[1:] - 1], self.score[starts[1:]]
        middle = ((below.astype(np.float64) + above) / 2).astype(np.float32)
        return np.where(middle > below, middle, above)


class Steps(NamedTuple):
    """One map."""

    edges: Array  # (c - 1,) float32
    levels: Array  # (c,) log-odds


def scores(logits: Array) -> Array:
    """float32 log-odds (n_samples, n_maps): of every class against the rest, of class 1 alone where there are two."""
    s = log_odds(centre(logits).astype(np.float32, copy=False))
    return s[:, 1:] if s.shape[1] == 2 else s


def maps_of(n_classes: int) -> int:
    return 1 if n_classes == 2 else n_classes


def power_of_two(n: int) -> int:
    """The least power of two that is n or more, and 2 or more."""
    return max(2, 1 << (n - 1).bit_length())


def problems(logits: Array, y: Array, weight: Array) -> Iterator[Ties]:
    """The calibration problem of each map: its class against the rest."""
    s = scores(logits)
    for column in range(s.shape[1]):
        k = logits.shape[1] - s.shape[1] + column  # class 1 alone of two
        yield Ties.of(s[:, column], y == k, weight)


def side_by_side(rows: Sequence[Array], length: int, fill: float | None = None) -> Array:
    """Rows of different lengths as one float32 array, each continued with `fill` or else with its last value."""
    whole = np.empty((len(rows), length), dtype=np.float32)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = row
        whole[i, len(row) :] = row[-1] if fill is None else fill
    return whole


def table(steps: Sequence[Steps], n_cells: int) -> tuple[Array, Array]:
    """Maps side by side: edges (n_maps, n_cells - 1) and levels (n_maps, n_cells), float32."""
    levels = side_by_side([one.levels for one in steps], n_cells)
    edges = side_by_side([one.edges for one in steps], n_cells - 1, BEYOND)
    return edges, np.clip(levels, -LARGEST_LEVEL, LARGEST_LEVEL)


def places(s: Array, edges: Array, maps: Array) -> Array:
    """Of each score the first edge above it on the score's own map, as a place in the edges laid end to end, int64.

    s (n_samples, n) are read on the maps numbered `maps`, which broadcasts to s; edges (n_maps, n_cells - 1). A score
    that no edge is above has the place after its map's last.
    """
    n_edges = edges.shape[1]
    part = max(1, (n_edges + 1) // COUNTED_PARTS)
    passed, count = np.empty_like(s, dtype=bool), np.zeros_like(s, dtype=np.int8)
    for edge in np.ascontiguousarray(edges.T[part - 1 :: part]):
        np.greater_equal(s, edge[maps], out=passed)
        count += passed.view(np.int8)
    place = count * np.int64(part)
    place += n_edges * maps
    # In one dimension, in the order of memory, and with "clip", which checks no bounds, numpy takes fastest.
    at, score = place.ravel(order="K"), s.ravel(order="K")
    flat, step = edges.ravel(), part // 2
    while step:
        passed = score >= flat[step - 1 :].take(at, mode="clip")
        at += np.int16(step) * passed.view(np.int8)  # small integers: a quarter of the memory to go through
        step //= 2
    return place


def look_up(s: Array, edges: Array, levels: Array, maps: Array | None = None) -> Array:
    """Levels at scores (n_samples, n), float32, on the maps numbered `maps`: without these, one for each column."""
    maps = np.arange(len(levels)) if maps is None else maps
    place = places(s, edges, maps)
    place += maps  # every map has one level more than it has edges
    return levels.ravel().take(place, mode="clip")


def distributions(t: Array, dtype: DTypeLike) -> Array:
    """Rows of probabilities in this dtype from calibrated log-odds (n_samples, n_maps), one of each row above -60.

    Levels are float32, so in float32 their sigmoids lose nothing but what underflows; the rows' sums are in `dtype`.
    """
    p = sigmoid(np.hstack([-t, t]) if t.shape[1] == 1 else t)
    return normalise(p.astype(dtype, copy=False))


def emit_scores(graph: Graph, logits: str, n_maps: int) -> str:
    """`scores` of FLOAT [B, K] logits."""
    s = graph.log_odds(graph.centre(logits))
    return graph.node("Gather", s, graph.constant(np.array([1], dtype=np.int64)), axis=1) if n_maps == 1 else s


def emit_look_up(graph: Graph, s: str, edges: str, levels: str, shape: tuple[int, ...]) -> str:
    """`look_up` of FLOAT [B, n_maps] scores in edges of this shape; NaN where a score is not finite."""
    n_maps, n_edges = shape
    first = np.arange(n_maps, dtype=np.int32)
    edges, levels = graph.reshape(edges, (-1,)), graph.reshape(levels, (-1,))
    zero, count, step = graph.constant(np.array(0, dtype=np.int32)), "", (n_edges + 1) // 2
    while step:
        place = graph.constant(n_edges * first + np.int32(step - 1))
        edge = graph.node("Gather", edges, graph.node("Add", count, place) if count else place)
        passed = graph.node("Where", graph.node("Less", s, edge), zero, graph.constant(np.array(step, dtype=np.int32)))
        count = graph.node("Add", count, passed) if count else passed
        step //= 2
    level = graph.node("Gather", levels, graph.node("Add", count, graph.constant((n_edges + 1) * first)))
    return graph.node("Add", level, graph.node("Sub", s, s))


def emit_distributions(graph: Graph, t: str, n_maps: int) -> str:
    """`distributions` of FLOAT [B, n_maps] log-odds."""
    return graph.normalised_sigmoid(graph.node("Concat", graph.node("Neg", t), t, axis=1) if n_maps == 1 else t)


def check_table(edges: Array, levels: Array, shape: tuple[int, int]) -> None:
    """Raise ValueError unless edges ascend and levels are log-odds, for tables of this shape (n_maps, n_cells)."""
    check_tensor("edges", edges, np.float32, (shape[0], shape[1] - 1))
    check_tensor("levels", levels, np.float32, shape)
    if np.any(edges[:, 1:] < edges[:, :-1]):
        raise ValueError("edges must not decrease")
    if np.abs(levels).max() > LARGEST_LEVEL:
        raise ValueError(f"levels must lie within ±{LARGEST_LEVEL:g}, got {np.abs(levels).max()}")


def thin(levels: Array, n_cells: int) -> Array:
    """Where each of at most `n_cells` cells begins that neighbouring cells of log-odds `levels` (c,) are joined into.

    Equal neighbours are joined. If more than `n_cells` remain, a cell begins wherever the total variation so far passes
    a multiple of delta = (total variation) / (n_cells - 1): inside one cell the levels lie within delta of each other.
    """
    starts = np.flatnonzero(np.diff(levels, prepend=np.inf))
    if len(starts) <= n_cells:
        return starts
    variation = np.cumsum(np.abs(np.diff(levels, prepend=levels[0])))
    part = np.floor(variation * ((n_cells - 1) / variation[-1]))
    return np.flatnonzero(np.diff(part, prepend=-1.0))


def logit(p: Array) -> Array:
    return np.log(p) - np.log1p(-p)
