"""order_preserving: one increasing function of every logit.

Rahimi, Shaban, Cheng, Hartley, Boots, "Intra Order-preserving Functions for Calibration of Multi-Class Neural
Networks", NeurIPS 2020, the diagonal family (DIAG): p = softmax(f(z)) with one increasing f for all
logits, so that every row keeps its order. There f is a monotone network; here it is piecewise linear in the distance
from the row's top, in units of the temperature T that fits best (`temperature`):

    p_k proportional to exp(-g(v_k)),   v_k = (max_j z_j - z_k) / T
    g(v) = sum_j r_j phi_j(v),   phi_j(v) = min(max(v - j, 0), 1), the last one unbounded,   j = 0 .. CELLS-1

so that r_j is the slope within cell j, r = 1 is temperature scaling, and an offset of the row changes nothing. g is
linear in r, so the log loss is convex in r. With N the sum of weights,

    L(r) = sum_i w_i (g(v_{i,y_i}) + log sum_k exp(-g(v_ik))) / N + penalty |r - 1|^2 / (2 N),    r_j >= LEAST_SLOPE

Held out on CIFAR-10 ResNet-50 (5,000 rows to fit, 10,000 to score) the log loss is .1867, of temperature scaling .2038.

Gradient and curvature need E[phi_j] and E[phi_j^2] over p alone: for j < l, phi_l > 0 implies phi_j = 1, so that
phi_j phi_l = phi_l. Newton's method with line search: each step minimises the quadratic model under the bounds, as
non-negative least squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import nnls

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.temperature import HIGHEST, LOWEST, TemperatureScaling
from calibrators.numerics import Array, blocks, centre, softmax, softmax_of_centred

CELLS = 16
LEAST_SLOPE = 0.01
MAX_SLOPE = 1e6
MAX_STEPS = 100
MAX_HALVINGS = 40
SUFFICIENT_DECREASE = 1e-4
PROMISED_DECREASE = 1e-15
"""Newton's method ends where its model promises less than this of the mean log loss."""


class OrderPreserving(Calibrator):
    """p = softmax(f(z)) with one increasing, piecewise linear f. Keeps the order of every row's classes.

    Parameters
    ----------
    penalty : above 0; pulls the slopes towards those of temperature scaling, as strongly as so many rows would

    Attributes
    ----------
    temperature_ : () float64, T > 0, the unit of the grid
    slope_ : (CELLS,) float64, r; the slope of f within cell j is r_j / T

    Examples
    --------
    Nine rows in ten are right at a logit gap of 9, three in four at a gap of 3: no one T says both.

    >>> logits = [[0, 9]] * 1000 + [[0, 3]] * 1000
    >>> y = [1] * 900 + [0] * 100 + [1] * 750 + [0] * 250
    >>> OrderPreserving().fit(logits, y).predict_proba([[0, 9], [0, 3]])[:, 1].round(2).tolist()
    [0.9, 0.75]
    """

    learned = ("temperature", "slope")
    float32_atol = 1e-5

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def check_params(self) -> None:
        number = isinstance(self.penalty, int | float) and not isinstance(self.penalty, bool)
        if not (number and 0 < self.penalty < np.inf):
            raise ValueError(f"penalty must be a finite number above 0, got {self.penalty!r}")

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        self.temperature_ = TemperatureScaling().fit(logits, y, sample_weight=weight).temperature_
        self.slope_ = _minimise(_Loss(logits / self.temperature_, y, weight, self.penalty))

    def _predict_proba(self, logits: Array) -> Array:
        slope = self.slope_.astype(logits.dtype)
        with np.errstate(over="ignore"):  # minus infinity is a probability of zero
            cell, beyond = _cells(centre(logits) * -logits.dtype.type(1 / self.temperature_))
            beyond *= slope[cell]
            beyond += _starts(slope)[cell]
            return softmax_of_centred(np.negative(beyond, out=beyond))

    def emit(self, graph: Graph, logits: str) -> str:
        slope, start = graph.parameter("slope", self.slope_), graph.parameter("start", _starts(self.slope_))
        temperature = graph.parameter("temperature", self.temperature_)
        v = graph.node("Div", graph.node("Neg", graph.centre(logits)), temperature)
        # A NaN must not become an index: one bad row would fail the whole batch. The rest carries it on.
        known = graph.node("Where", graph.node("Greater", v, graph.constant(0.0)), v, graph.constant(0.0))
        cell = graph.cast(graph.node("Min", known, graph.constant(CELLS - 1.0)), np.int32)
        beyond = graph.node("Sub", v, graph.cast(cell, np.float32))
        within = graph.node("Mul", graph.node("Gather", slope, cell, axis=0), beyond)
        return graph.softmax(graph.node("Neg", graph.node("Add", graph.node("Gather", start, cell, axis=0), within)))

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        del n_classes
        temperature, slope = tensors["temperature"], tensors["slope"]
        check_tensor("temperature", temperature, np.float64, ())
        check_tensor("slope", slope, np.float64, (CELLS,))
        if not LOWEST <= temperature <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {temperature}")
        if not (slope.min() >= LEAST_SLOPE and slope.max() <= MAX_SLOPE):
            raise ValueError(f"slopes must lie in {LEAST_SLOPE:g}..{MAX_SLOPE:g}, got {slope.min()}..{slope.max()}")


class _Loss:
    """L of the module's head, for logits in units of the temperature."""

    def __init__(self, scaled: Array, y: Array, weight: Array, penalty: float) -> None:
        self.scaled = scaled
        self.share = weight / weight.sum()
        self.penalty = penalty / weight.sum()
        own = scaled[np.arange(len(y)), y]
        self.cell, self.beyond = _cells(scaled.max(axis=1) - own)
        before = self.cell[:, None] > np.arange(CELLS)
        self.target = self.share @ before + np.bincount(self.cell, self.share * self.beyond, CELLS)

    def value(self, slope: Array) -> float:
        """L at r."""
        total = self.target @ slope + self.penalty * np.square(slope - 1).sum() / 2
        for share, cell, beyond in self._blocks():
            terms = np.exp(-(_starts(slope)[cell] + slope[cell] * beyond))
            total += share @ np.log(terms.sum(axis=1))
        return float(total)

    def derivatives(self, slope: Array) -> tuple[Array, Array]:
        """Gradient (CELLS,) and curvature (CELLS, CELLS) at r."""
        gradient = self.target + self.penalty * (slope - 1)
        curvature = self.penalty * np.eye(CELLS)
        for share, cell, beyond in self._blocks():
            p = softmax(-(_starts(slope)[cell] + slope[cell] * beyond))
            later, first, second = _moments(p, cell, beyond)
            mean = later + first
            gradient -= share @ mean
            product = np.triu(np.broadcast_to(share @ mean, (CELLS, CELLS)), 1)
            curvature += product + product.T + np.diag(share @ (later + second)) - (mean * share[:, None]).T @ mean
        return gradient, curvature

    def _blocks(self) -> Iterator[tuple[Array, Array, Array]]:
        for block in blocks(*self.scaled.shape):
            z = self.scaled[block]
            yield self.share[block], *_cells(z.max(axis=1, keepdims=True) - z)


def _moments(p: Array, cell: Array, beyond: Array) -> tuple[Array, Array, Array]:
    """For each row and cell, (n_samples, CELLS): the sum of p in later cells, and of p x and p x^2 within it."""
    n_samples = len(p)
    index = (cell + CELLS * np.arange(n_samples)[:, None]).ravel()
    mass, first, second = (
        np.bincount(index, values.ravel(), n_samples * CELLS).reshape(n_samples, CELLS)
        for values in (p, p * beyond, p * beyond**2)
    )
    return mass.sum(axis=1, keepdims=True) - np.cumsum(mass, axis=1), first, second


def _minimise(loss: _Loss) -> Array:
    """The slopes of least loss, from those of temperature scaling."""
    slope, value = np.ones(CELLS), loss.value(np.ones(CELLS))
    for _ in range(MAX_STEPS):
        gradient, curvature = loss.derivatives(slope)
        step = _least_under_bounds(slope, gradient, curvature) - slope
        promised = gradient @ step
        if promised > -PROMISED_DECREASE:
            break
        for length in 0.5 ** np.arange(MAX_HALVINGS):
            trial = loss.value(slope + length * step)
            if trial <= value + SUFFICIENT_DECREASE * length * promised:
                break
        else:
            break
        slope, value = slope + length * step, trial
    return np.clip(slope, LEAST_SLOPE, MAX_SLOPE)


def _least_under_bounds(slope: Array, gradient: Array, curvature: Array) -> Array:
    """Minimum of the quadratic model over slopes of LEAST_SLOPE or more: |R x - R^-T b| with R'R the curvature."""
    root = np.linalg.cholesky(curvature)
    linear = curvature @ (slope - LEAST_SLOPE) - gradient
    found: Array = nnls(root.T, solve_triangular(root, linear, lower=True))[0]
    return LEAST_SLOPE + found


def _cells(v: Array) -> tuple[Array, Array]:
    """Each distance's cell and how far beyond that cell's start it lies."""
    start = np.floor(np.minimum(v, CELLS - 1))
    return start.astype(np.int64), v - start


def _starts(slope: Array) -> Array:
    """g at the start of each cell."""
    return np.cumsum(slope) - slope
