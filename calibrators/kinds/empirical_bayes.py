"""empirical_bayes: a mixture of log-linear maps around temperature scaling, as strong as the evidence lets them be.

A method of this project. Six members, each a softmax, and with two classes a seventh, are mixed with weights w_j from
held-out likelihood:

    p = sum_j w_j softmax(z^(j)) + w_6 (the kind `isotonic`)

    0 identity     z = c                                                   c: the logits less their row's largest
    1 temperature  z = X = log softmax(c / T)
    2 reduced      z = sum_m theta_m F_m + b
    3-5 full       z = sum_m theta_m F_m + b + d F_0 + Phi A               F_m = log(exp X + epsilon_m)

with Phi the projection of X on its r = min(64, n_classes - 1) principal axes. F_1..F_3 (epsilon = 0.001, 0.01, 0.1),
whose coefficients all classes share, bend the curve of confidence where it is low; b moves a class's prior, d its
confidence; A says which class is mistaken for which. Of n rows of two classes epsilon_0 = 1 / 2n: a row that is wrong
far out then says no more than n rows can know (1.1 % less held-out loss on mammography, no change on three other
sets). With more classes it is the least number of float32: far tails tell classes apart there.

Two classes. There one curve is the whole map, and that of a forest or of boosted trees may be one that no sum of four
features follows. On 75 problems of ten tables and five models, 200 to 2,500 rows, the isotonic member takes the loss
over that of the best of 15 kinds, chosen in hindsight, from 1.0121 to 1.0071; where it harms most, by 1.2 %.

Temperature. Least log loss on the calibration set and half a pseudo-observation whose label is the runner-up, spread
over the rows: separable rows have a finite T too.

Classes that never occur in the calibration set are one column, G = logsumexp of their X, in everything above, and share
its probability by softmax of X within. Half a pseudo-observation of that column, spread over the rows, keeps its
probability above zero. Phi sees all classes: what the model says of the unseen ones is information.

Ridge. theta, b, d, A minimise the sum of log losses + 1/2 [|theta - (1,0,0,0)|^2 + s_b |b|^2 + s_d |d|^2 + s_A |A|^2]
so that without evidence the map is temperature scaling. The strengths come from the evidence (MacKay, "Bayesian
interpolation", Neural Computation 4, 1992): s = gamma / |x|^2 for each group of parameters x, where gamma counts the
parameters that the rows decide, repeated with a new fit until s stands. gamma is exact where the Hessian is small
enough to invert (`ridge_softmax`), else from its diagonal, which shrinks too much where parameters outnumber rows:
hence the full map is there three times, with strengths times 1, 0.3 and 0.1.

Weights. Five folds, temperature and maps fitted again without each, strengths kept; `mixture_weights` weighs the
members by the probability that each row's label got. With more than two classes few rows can make a map of many
parameters look better than it is: `cautious_weights` draws the weights back to a mixture of identity and temperature
by how unsure the gain over that is. Over ten draws of 50, 100, 200 rows of a network that temperature scaling is right
for (CIFAR-10) the loss over that of temperature scaling is 0.996, 1.002, 1.002; without caution 1.016, 1.013, 1.011.

Large sets. Principal axes and strengths come from a stratified subset of max(4000, 1e6 / n_classes) distinct rows, at
most 10,000. Not all five folds are held out where fewer hold max(2000, 1e6 / n_classes) rows, at most 10,000: one fold
of the five for n_classes = 1000 from 10,000 rows on. So the weights are of maps fitted to four fifths of all rows, and
not to a subset on which many parameters look worse than they are. Maps of weight below 0.01 are not fitted to all rows:
they stay temperature scaling. Of more than 5e7 / n_classes rows a stratified subset is used.

Logits below the lowest (centred) of the calibration set are raised to it. Logits are finite, so a model's probability
of exactly zero arrives as the logarithm of what the caller clipped it to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import DTypeLike

from calibrators.base import Calibrator, check_tensor
from calibrators.graph import Graph
from calibrators.kinds.isotonic import GRID_POINTS, IsotonicCalibration
from calibrators.mixture import DistinctRows, cautious_weights, mixture_weights
from calibrators.numerics import Array, blocks, log_softmax, softmax
from calibrators.ridge_softmax import RidgeSoftmax, minimise, solver_dtype

SOFTENING = (1e-3, 1e-2, 1e-1)
"""epsilon_1 .. epsilon_3; epsilon_0 is `least_`."""

PATH = (1.0, 0.3, 0.1)
"""Of each full member, what its strengths are multiplied with."""

N_MAPS = 1 + len(PATH)
TEMPERATURE = 1
"""Its place among the members."""

MOST_AXES = 64
LEAST_AXIS = 1e-8
"""Of the largest variance: axes of less are left out."""

CURVE = {"levels": (2, GRID_POINTS), "low": (2,), "high": (2,)}
"""What the isotonic member learns: float32 of these shapes."""

N_FOLDS = 5
PSEUDO_COUNT = 0.5
PLAIN_COUNTS = 0.5, 2.0
"""Of identity and temperature where they are mixed alone."""

DOUBT = 0.5
"""Of `cautious_weights`."""


FIRST_STRENGTHS = {"softening": 1.0, "bias": 1.0, "slope": 10.0, "matrix": 100.0}
STRENGTH_RANGE = (1e-3, 1e5)
STRENGTH_ROUNDS = 6
STRENGTH_TOLERANCE = 0.1
"""In log s."""

LEAST_SQUARE = 1e-8

SUBSET_LOGITS, FEWEST_SUBSET_ROWS, FEWEST_HELD_OUT, MOST_SUBSET_ROWS = 1_000_000, 4_000, 2_000, 10_000
MOST_LOGITS = 50_000_000
LEAST_FITTED = 0.01

LOG_RANGE = 16.0
"""T lies within e^±16 of the logits' spread."""

TEMPERATURE_STEPS = 100
LOWEST, HIGHEST = 1e-37, 1e38
TINY = float(np.finfo(np.float32).tiny)


class EmpiricalBayes(Calibrator):
    """A convex mixture of identity, temperature, four log-linear maps with a ridge, and of two classes isotonic.

    May change the argmax.

    Never zero for a class, whether it occurred in the calibration set or not, unless float32 or float64 underflows.

    Attributes
    ----------
    mixture_ : (6,) or, of two classes, (7,) float64, w_j at or above 0, sum to one
    temperature_ : () float64, T > 0
    least_ : () float64, epsilon_0 > 0
    floor_ : () float64, at or below 0; centred logits are raised to it
    unseen_ : (n_classes,) float64, 1 for a class without rows, else 0
    axes_ : (n_classes, r) float64, principal axes; columns of zeros where there are fewer
    softening_ : (4, 4) float64, theta_m of each map, the reduced one first
    bias_ : (4, n_classes) float64, b; the mean of Phi is taken off here
    slope_ : (3, n_classes) float64, d of the full maps
    matrix_ : (3, r, n_classes) float64, A of the full maps
    levels_, low_, high_ : as in the kind `isotonic` of two classes; zeros where there are more

    Examples
    --------
    The model never says class 2 loudly enough: it comes true in half the rows that give it a third.

    >>> logits, labels = np.log([[0.4, 0.27, 0.33]] * 4), [0, 1, 2, 2]
    >>> calibrator = EmpiricalBayes().fit(np.tile(logits, (50, 1)), np.tile(labels, 50))
    >>> calibrator.predict_proba(logits[:1]).round(2).tolist()
    [[0.28, 0.26, 0.46]]
    """

    learned = (
        *("mixture", "temperature", "least", "floor", "unseen", "axes", "softening", "bias", "slope", "matrix"),
        *CURVE,
    )
    float32_atol = 1e-5

    def _fit(self, logits: Array, y: Array, weight: Array) -> None:
        n_classes = logits.shape[1]
        rows = DistinctRows.of(logits, y, weight, MOST_LOGITS // n_classes)
        few = rows.subset(min(max(FEWEST_SUBSET_ROWS, SUBSET_LOGITS // n_classes), MOST_SUBSET_ROWS))
        axes = _Axes.of(few)
        strengths = [_strengths(problem) for problem in _Fit.of(few, axes).problems]
        mixture = _weights(*_held_out(rows, axes, strengths), n_classes)
        fit = _Fit.of(rows, axes)
        maps = fit.maps(strengths, mixture[2 : 2 + N_MAPS] >= LEAST_FITTED)
        self.mixture_, self.floor_ = mixture, np.asarray(rows.centred.min())
        curve = _curve(rows)
        of_curve = {name: getattr(curve, f"{name}_", np.zeros(CURVE[name], np.float32)) for name in CURVE}
        for name, array in (fit.members(axes, maps).arrays() | of_curve).items():
            setattr(self, f"{name}_", array)

    def _predict_proba(self, logits: Array) -> Array:
        dtype = logits.dtype
        centred = np.maximum(logits - logits.max(axis=1, keepdims=True), dtype.type(self.floor_))
        learned = {name: getattr(self, f"{name}_") for name in _Members.__dataclass_fields__}
        members = _Members(**{name: array.astype(dtype, copy=False) for name, array in learned.items()})
        curves = [self._curve()] if centred.shape[1] == 2 else []
        probabilities = chain(members.probabilities(centred), (curve.predict_proba(centred) for curve in curves))
        mixed: Array = np.zeros_like(centred)
        for w, p in zip(self.mixture_.astype(dtype), probabilities, strict=True):
            mixed += w * p
        mixed /= mixed.sum(axis=1, keepdims=True)
        return mixed

    def emit(self, graph: Graph, logits: str) -> str:
        centred = graph.node("Max", graph.centre(logits), graph.parameter("floor", self.floor_))
        x = _emit_log_softmax(graph, graph.node("Div", centred, graph.parameter("temperature", self.temperature_)))
        within = self._emit_within(graph, x)
        grouped = graph.node("Sub", x, within)
        phi = graph.node("MatMul", x, graph.parameter("axes", self.axes_))
        p = graph.node("Exp", grouped)
        added = (graph.parameter("least", self.least_), *map(graph.constant, SOFTENING))
        soft = [graph.node("Log", graph.node("Add", p, epsilon)) for epsilon in added]
        members = [graph.softmax(centred), graph.node("Exp", x)]
        for m in range(N_MAPS):
            terms = [within, graph.parameter(f"bias_{m}", self.bias_[m])]
            coefficients = zip(self.softening_[m], soft, strict=True)
            terms += [
                graph.node("Mul", feature, graph.parameter(f"softening_{m}_{i}", theta))
                for i, (theta, feature) in enumerate(coefficients)
            ]
            if m:
                terms.append(graph.node("Mul", soft[0], graph.parameter(f"slope_{m}", self.slope_[m - 1])))
                terms.append(graph.node("MatMul", phi, graph.parameter(f"matrix_{m}", self.matrix_[m - 1])))
            members.append(graph.softmax(graph.node("Sum", *terms)))
        if self.n_classes_ == 2:
            members.append(self._curve().emit(graph, centred))
        weighted = [
            graph.node("Mul", member, graph.parameter(f"mixture_{j}", self.mixture_[j]))
            for j, member in enumerate(members)
        ]
        return graph.normalise(graph.node("Sum", *weighted))

    def _emit_within(self, graph: Graph, x: str) -> str:
        """`_within` of FLOAT [B, K] x."""
        unseen = graph.parameter("unseen", self.unseen_)
        lowest = graph.reduce("ReduceMin", x)
        above = graph.node("Mul", graph.node("Sub", x, lowest), unseen)
        highest = graph.node("Add", graph.reduce("ReduceMax", above), lowest)
        terms = graph.node("Exp", graph.node("Min", graph.node("Sub", x, highest), graph.constant(0.0)))
        total = graph.reduce("ReduceSum", graph.node("Mul", terms, unseen))
        log_sum = graph.node("Add", highest, graph.node("Log", graph.node("Max", total, graph.constant(TINY))))
        return graph.node("Mul", unseen, graph.node("Sub", x, log_sum))

    def _curve(self) -> IsotonicCalibration:
        learned = {name: getattr(self, f"{name}_") for name in CURVE}
        return IsotonicCalibration().set_tensors(learned | {"n_classes": np.asarray(2, dtype=np.int64)})

    def _check_learned(self, tensors: Mapping[str, Array], n_classes: int) -> None:
        n_axes, n_soft = _n_axes(n_classes), 1 + len(SOFTENING)
        shapes: dict[str, tuple[int, ...]] = {
            "mixture": (2 + N_MAPS + (n_classes == 2),),
            "temperature": (),
            "least": (),
            "floor": (),
            "unseen": (n_classes,),
            "axes": (n_classes, n_axes),
            "softening": (N_MAPS, n_soft),
            "bias": (N_MAPS, n_classes),
            "slope": (len(PATH), n_classes),
            "matrix": (len(PATH), n_axes, n_classes),
        }
        for name, shape in shapes.items():
            check_tensor(name, tensors[name], np.float64, shape)
        for name, shape in CURVE.items():
            check_tensor(name, tensors[name], np.float32, shape)
        if n_classes == 2:
            IsotonicCalibration()._check_learned({name: tensors[name] for name in CURVE}, n_classes)
        if tensors["mixture"].min() < 0 or not np.isclose(tensors["mixture"].sum(), 1):
            raise ValueError(f"mixture weights must not be negative and sum to one, got {tensors['mixture']}")
        if not LOWEST <= tensors["temperature"] <= HIGHEST:
            raise ValueError(f"temperature must lie in {LOWEST:g}..{HIGHEST:g}, got {tensors['temperature']}")
        if not TINY <= tensors["least"] <= 1:
            raise ValueError(f"least must lie in {TINY:g}..1, got {tensors['least']}")
        if tensors["floor"] > 0:
            raise ValueError(f"floor must be at or below 0, got {tensors['floor']}")
        if not np.isin(tensors["unseen"], (0, 1)).all():
            raise ValueError("unseen must hold zeros and ones")


def _emit_log_softmax(graph: Graph, z: str) -> str:
    """log softmax of z whose rows have the maximum 0."""
    return graph.node("Sub", z, graph.node("Log", graph.reduce("ReduceSum", graph.node("Exp", z))))


@dataclass(frozen=True)
class _Members:
    """What the members have learned, in the type that they compute in; attributes as in `EmpiricalBayes`."""

    temperature: Array
    least: Array
    unseen: Array
    axes: Array
    softening: Array
    bias: Array
    slope: Array
    matrix: Array

    def arrays(self) -> dict[str, Array]:
        return dict(vars(self))

    def probabilities(self, centred: Array) -> Iterator[Array]:
        """(n_samples, n_classes) from each member in turn."""
        yield softmax(centred)
        x = log_softmax(centred / self.temperature)
        yield np.exp(x)
        within = _within(x, self.unseen)
        grouped = x - within
        soft, phi = _soft(grouped, self.least), x @ self.axes
        for m in range(N_MAPS):
            z = np.einsum("m,mik->ik", self.softening[m], soft) + within + self.bias[m]
            if m:
                z += self.slope[m - 1] * soft[0]
                z += phi @ self.matrix[m - 1]
            yield softmax(z)


def _soft(x: Array, least: float | Array) -> Array:
    """F_0 .. F_3, (4, n_samples, n_columns)."""
    p = np.exp(x)
    return np.stack([np.log(p + x.dtype.type(epsilon)) for epsilon in (least, *SOFTENING)])


def _within(x: Array, unseen: Array) -> Array:
    """log probability within the unseen classes, X - G; 0 for the others (n_samples, n_classes)."""
    found: Array = unseen * (x - _log_sum(x, unseen))
    return found


def _log_sum(x: Array, unseen: Array) -> Array:
    """G, log of the sum of exp(x) over the unseen classes (n_samples, 1); finite also where there are none."""
    lowest = x.min(axis=1, keepdims=True)
    highest = (unseen * (x - lowest)).max(axis=1, keepdims=True) + lowest
    total = (unseen * np.exp(np.minimum(x - highest, 0))).sum(axis=1, keepdims=True)
    found: Array = highest + np.log(np.maximum(total, x.dtype.type(TINY)))
    return found


# ---- the fit


def _n_axes(n_classes: int) -> int:
    return min(MOST_AXES, n_classes - 1)


@dataclass(frozen=True)
class _Axes:
    """Principal axes of the logits, rows centred on their mean: they and Phi's direction do not depend on T."""

    axes: Array  # (n_classes, r), each column's mean 0, so that a row's offset does not matter
    mean: Array  # (r,) of the rows along them

    @classmethod
    def of(cls, rows: DistinctRows) -> _Axes:
        n_classes = rows.centred.shape[1]
        scale = -float(rows.centred.min()) or 1.0
        share = rows.weight / rows.weight.sum()
        spread = rows.centred / scale
        spread -= spread.mean(axis=1, keepdims=True)
        mean = share @ spread
        spread -= mean
        spread *= np.sqrt(share)[:, None]
        few = len(spread) < n_classes
        values, vectors = np.linalg.eigh(spread @ spread.T if few else spread.T @ spread)
        wanted = np.flatnonzero(values > LEAST_AXIS * max(values[-1], TINY))[::-1][: _n_axes(n_classes)]
        found = vectors[:, wanted]
        if few:
            found = spread.T @ found / np.sqrt(values[wanted])
        axes = np.zeros((n_classes, _n_axes(n_classes)))
        axes[:, : len(wanted)] = found - found.mean(axis=0)
        return cls(axes, scale * (mean @ axes))


@dataclass(frozen=True)
class _Fit:
    """One set of rows: its temperature, its unseen classes, and the two convex problems on its features."""

    temperature: float
    least: float
    unseen: Array  # (n_classes,) of bool
    problems: tuple[RidgeSoftmax, RidgeSoftmax]  # reduced, full

    @classmethod
    def of(cls, rows: DistinctRows, axes: _Axes) -> _Fit:
        n_rows, n_classes = rows.centred.shape
        temperature = _temperature(rows)
        least = 1 / (2 * float(rows.weight.sum())) if n_classes == 2 else TINY
        unseen = np.bincount(rows.labels, minlength=n_classes) == 0
        on_last = unseen.any() * PSEUDO_COUNT * rows.weight / rows.weight.sum()
        phi = (rows.centred @ axes.axes - axes.mean) / temperature
        common = np.concatenate([np.ones((n_rows, 1)), phi], axis=1)
        labels = (np.cumsum(~unseen) - 1)[rows.labels]
        soft: dict[type, Array] = {}

        def problem(common: Array, slopes: bool) -> RidgeSoftmax:
            n_columns = n_classes - max(int(unseen.sum()) - 1, 0)
            dtype = solver_dtype(n_rows, n_columns, common.shape[1] + slopes)
            if dtype not in soft:
                soft[dtype] = _all_soft(rows.centred, temperature, least, unseen, n_columns, dtype)
            return RidgeSoftmax(soft[dtype], common.astype(dtype, copy=False), labels, rows.weight, on_last, slopes)

        return cls(temperature, least, unseen, (problem(common[:, :1], slopes=False), problem(common, slopes=True)))

    def maps(self, strengths: list[dict[str, float]], wanted: Sequence[bool] | Array = (True,) * N_MAPS) -> list[Array]:
        """Parameters of the four maps; those not wanted are temperature scaling."""
        found: list[Array] = []
        for m, scale in enumerate((1.0, *PATH)):
            problem = self.problems[min(m, 1)]
            centre = _centre(problem)
            if not wanted[m]:
                found.append(centre)
                continue
            first = found[-1] if m > 1 else centre
            found.append(minimise(problem, _precision(problem, strengths[min(m, 1)], scale), centre, first).parameters)
        return found

    def members(self, axes: _Axes, maps: list[Array]) -> _Members:
        """The maps as they are served: a column for each class, the mean of Phi in the bias."""
        column = np.where(self.unseen, self.problems[1].shape[0] - 1, np.cumsum(~self.unseen) - 1)
        (reduced, *full), (small, large) = maps, self.problems
        softening, own = zip(small.split(reduced), *(large.split(x) for x in full), strict=True)
        bias, *of_classes = (values[column] for values in own)
        matrix = np.stack([values[:, 1:-1].T for values in of_classes])
        shift = np.einsum("r,mrk->mk", axes.mean / self.temperature, matrix)
        full_bias = np.stack([values[:, 0] for values in of_classes]) - shift
        return _Members(
            np.asarray(self.temperature),
            np.asarray(self.least),
            self.unseen.astype(float),
            axes.axes,
            np.stack(softening),
            np.concatenate([bias.T, full_bias]),
            np.stack([values[:, -1] for values in of_classes]),
            matrix,
        )


def _all_soft(
    centred: Array, temperature: float, least: float, unseen: Array, n_columns: int, dtype: DTypeLike
) -> Array:
    """F_0 .. F_3 of all rows, (4, n_samples, n_columns): X of the classes seen, then G where some are not."""
    soft = np.empty((1 + len(SOFTENING), len(centred), n_columns), dtype)
    for block in blocks(*centred.shape):
        x = log_softmax(centred[block] / temperature)
        grouped = [x[:, ~unseen], _log_sum(x, unseen.astype(float))][: 1 + unseen.any()]
        soft[:, block] = _soft(np.concatenate(grouped, axis=1, dtype=dtype), least)
    return soft


def _held_out(rows: DistinctRows, axes: _Axes, strengths: list[dict[str, float]]) -> tuple[Array, Array]:
    """Probability (members, rows) of held-out rows' labels under members fitted without them; the rows' weights."""
    scores, weights = [], []
    of_two = rows.centred.shape[1] == 2
    wanted = min(max(FEWEST_HELD_OUT, SUBSET_LOGITS // rows.centred.shape[1]), MOST_SUBSET_ROWS)
    for kept, out in islice(rows.folds(N_FOLDS), -(-wanted * N_FOLDS // len(rows))):
        fit = _Fit.of(kept, axes)
        members, curve = fit.members(axes, fit.maps(strengths)), _curve(kept)
        for block in blocks(*out.centred.shape):
            own = np.arange(len(out.labels[block])), out.labels[block]
            found = [p[own] for p in members.probabilities(out.centred[block])]
            if of_two:
                found.append(curve.predict_proba(out.centred[block])[own] if curve else found[TEMPERATURE])
            scores.append(np.stack(found))
        weights.append(out.weight)
    return np.concatenate(scores, axis=1), np.concatenate(weights)


def _curve(rows: DistinctRows) -> IsotonicCalibration | None:
    """The isotonic member: of two classes, where both occur."""
    if rows.centred.shape[1] > 2 or len(np.unique(rows.labels)) < 2:
        return None
    return IsotonicCalibration().fit(rows.centred, rows.labels, sample_weight=rows.weight)


def _weights(held_out: Array, weight: Array, n_classes: int) -> Array:
    """w: of all members, or less of the maps the less sure it is that these gain."""
    mixture = mixture_weights(held_out, weight, PSEUDO_COUNT)
    if n_classes == 2:
        return mixture
    plain = np.zeros_like(mixture)
    plain[: len(PLAIN_COUNTS)] = mixture_weights(held_out[: len(PLAIN_COUNTS)], weight, PLAIN_COUNTS)
    return cautious_weights(held_out, weight, mixture, plain, DOUBT)


def _centre(problem: RidgeSoftmax) -> Array:
    """Temperature scaling: theta = (1, 0, 0, 0), the rest 0."""
    centre = np.zeros(problem.n_parameters)
    centre[0] = 1.0
    return centre


def _groups(problem: RidgeSoftmax) -> dict[str, Array]:
    """Masks of the parameters of one strength."""
    group = np.full(problem.n_parameters, "matrix", dtype="U9")
    softening, own = problem.split(group)
    softening[:] = "softening"
    own[:, 0] = "bias"
    if problem.slopes:
        own[:, -1] = "slope"
    return {name: group == name for name in FIRST_STRENGTHS if name in group}


def _precision(problem: RidgeSoftmax, strengths: dict[str, float], scale: float) -> Array:
    """The ridge of each parameter; the softening's does not change along the path."""
    precision = np.empty(problem.n_parameters)
    for name, mask in _groups(problem).items():
        precision[mask] = strengths[name] * (1 if name == "softening" else scale)
    return precision


def _strengths(problem: RidgeSoftmax) -> dict[str, float]:
    """MacKay's fixed point: s = gamma / |x|^2 for each group but the softening."""
    groups, strengths = _groups(problem), dict(FIRST_STRENGTHS)
    x = centre = _centre(problem)
    for _ in range(STRENGTH_ROUNDS):
        solution = minimise(problem, _precision(problem, strengths, 1.0), centre, x)
        x, old = solution.parameters, dict(strengths)
        for name, mask in groups.items():
            if name != "softening":
                square = max(float(np.square(x[mask]).sum()), LEAST_SQUARE)
                strengths[name] = float(np.clip(solution.effective[mask].sum() / square, *STRENGTH_RANGE))
        if all(abs(np.log(strengths[name] / old[name])) < STRENGTH_TOLERANCE for name in groups):
            break
    return strengths


def _temperature(rows: DistinctRows) -> float:
    """T of least log loss: the root of the slope in u = -log T, by Newton steps in a bracket (see `temperature`)."""
    scale = -float(rows.centred.min()) or 1.0
    z = rows.centred / scale
    pseudo = PSEUDO_COUNT / rows.weight.sum()
    share = rows.weight / rows.weight.sum()
    runner_up = np.partition(z, -2, axis=1)[:, -2]
    observed = share @ (z[np.arange(len(z)), rows.labels] + pseudo * runner_up)
    low, high, u = -LOG_RANGE, LOG_RANGE, 0.0
    for _ in range(TEMPERATURE_STEPS):
        of_blocks = [_moments(z[block], u) for block in blocks(*z.shape)]
        mean, variance = (np.concatenate(moments) for moments in zip(*of_blocks, strict=True))
        slope, curvature = (1 + pseudo) * float(share @ mean) - observed, np.exp(u) * float(share @ variance)
        low, high = (u, high) if slope < 0 else (low, u)
        step = u - slope / curvature if curvature > 0 else np.inf
        arrived = abs(step - u) <= 1e-12  # it may then be u itself, the bracket's end
        following = step if arrived or low < step < high else (low + high) / 2
        if abs(following - u) <= 1e-12:
            break
        u = following
    return float(np.clip(scale * np.exp(-u), LOWEST, HIGHEST))


def _moments(z: Array, u: float) -> tuple[Array, Array]:
    """Of each row of z, mean and variance under softmax(exp(u) z)."""
    p = softmax(np.exp(u) * z)
    p *= z
    mean = p.sum(axis=1)
    return mean, np.maximum(np.einsum("ik,ik->i", p, z) - mean**2, 0)
