"""Step functions of log-odds, for the kinds that are made of them: histogram_binning, bbq, scaling_binning, venn_abers.

A class's map is a row of ascending edges and a row of levels, one more: cell c holds the scores s with
edges[c-1] <= s < edges[c], and the map is levels[c] there. Unused places at the end of a row hold an edge that no score
reaches. For two classes one map, that of class 1, serves both: p_0 = 1 - p_1.

A step has no tolerance, so both sides must see one score. It is defined in float32: logits less their row's largest,
rounded to float32, then log-odds in float32, in numpy as in the graph. Rows given in float32 and in float64 then fall
into the same cells. Between numpy and the graph the last bit of an exponential may differ (for two classes there is
none to take): a score within 1e-6 of an edge may fall on its other side. Edges therefore lie midway between scores of
the calibration set.

A cell is found without a branch: a grid over a map's edges tells which of them are passed for certain (`Edges`), and
bisection decides about the few that are left, those in the score's square of the grid. Of the 255 edges of a map fitted
to the 100 or 1,000 classes of EfficientNet-lite0 these are seven at most: three halvings for eight.
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

GRID_SQUARES = 512

STEEPEST, FARTHEST = 1e6, 1e31
"""Bounds of what scores are multiplied with and of where grids end: no product of the two overflows."""

LARGEST_LEVEL = 60.0
"""Calibrated log-odds stay within ±60, so that no probability underflows in float32."""


class Stepped(Calibrator):
    """Base of kinds that learn `edges_`."""

    edges_: Array
    _ready: tuple[Array, Edges] | None = None

    def _edges(self) -> Edges:
        """`edges_`, made ready once."""
        if self._ready is None or self._ready[0] is not self.edges_:
            self._ready = self.edges_, Edges.of(self.edges_)
        return self._ready[1]


class OneVsRestSteps(Stepped):
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
        return distributions(look_up(scores(logits), self._edges(), self._levels()), logits.dtype)

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


class Edges(NamedTuple):
    """The edges of all maps, and over those of each map an even grid.

    A score lies in square floor(scale s + offset) of its map's grid, or in the first or the last. Rounding turns no
    order round: of edges and scores that take the same arithmetic, an edge in a lower square is at or below the score,
    one in a higher square is above it.
    """

    flat: Array  # (n_maps * n_cells,) float32, each map's edges and one that no score reaches, maps end to end
    n_cells: int
    scale: Array  # (n_maps,) float32
    offset: Array  # (n_maps,) float32
    passed: Array  # (n_maps * GRID_SQUARES,) int16: so many edges are at or below any score in the square
    step: int  # that bisection begins with; 0 where there is nothing to decide

    @classmethod
    def of(cls, table: Array) -> Edges:
        """Edges (n_maps, n_cells - 1), as the function `table` makes them, ready to be searched."""
        n_maps, n_edges = table.shape
        real = table < BEYOND
        known = np.clip(np.where(real, table, table[:, :1]), -FARTHEST, FARTHEST)
        low, high = known.min(axis=1), known.max(axis=1)
        scale = np.minimum((GRID_SQUARES - 1) / np.maximum(high - low, 1 / FARTHEST), STEEPEST).astype(np.float32)
        flat = np.pad(table, [(0, 0), (0, 1)], constant_values=BEYOND).ravel()
        edges = cls(flat, n_edges + 1, scale, -low * scale, np.empty(0, np.int16), 0)
        squares = edges._squares(table, np.arange(n_maps)[:, None])[real]
        count = np.bincount(squares, minlength=n_maps * GRID_SQUARES).reshape(n_maps, GRID_SQUARES)
        size = 1 << int(count.max()).bit_length()
        # Fewer than are passed are as good: bisection decides about `size` - 1 edges, which must all be the map's own.
        passed = np.minimum(np.cumsum(count, axis=1) - count, edges.n_cells - size)
        return edges._replace(passed=passed.astype(np.int16).ravel(), step=size // 2)

    def cells(self, s: Array, maps: Array) -> Array:
        """Of each score its cell, as a place in the cells of all maps laid end to end, int64.

        s (n_samples, n) are read on the maps numbered `maps`, which broadcasts to s.
        """
        cell = self._squares(s, maps)
        # In one dimension, in the order of memory, and with "clip", which checks no bounds, numpy takes fastest.
        at, score, step = cell.ravel(order="K"), s.ravel(order="K"), self.step
        at[:] = self.passed.take(at, mode="clip")
        cell += self.n_cells * maps
        while step:
            above = (score >= self.flat[step - 1 :].take(at, mode="clip")).view(np.int8)
            at += above if step == 1 else np.int16(step) * above  # small integers: little memory to go through
            step //= 2
        return cell

    def _squares(self, s: Array, maps: Array) -> Array:
        """Of each score its square, as a place in the grids laid end to end, int64."""
        with np.errstate(over="ignore"):  # infinity is beyond the grid too
            x = s * self.scale[maps]
        x += self.offset[maps]
        square = np.clip(x, 0, GRID_SQUARES - 1, out=x).astype(np.int64)
        square += GRID_SQUARES * maps
        return square


def look_up(s: Array, edges: Edges, levels: Array, maps: Array | None = None) -> Array:
    """Levels at scores (n_samples, n), float32, on the maps numbered `maps`: without these, one for each column."""
    return levels.ravel().take(edges.cells(s, np.arange(len(levels)) if maps is None else maps), mode="clip")


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
