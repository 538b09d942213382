"""Penalised multinomial logistic regression: the convex problem behind vector, matrix and Dirichlet scaling.

A map sends features x (n_samples, K) to scores s, and p = softmax(s):

    diagonal   s_k = w_k x_k + b_k                  map (K, 2):      row k is (w_k, b_k)
    full       s_k = sum_j W_kj x_j + b_k           map (K, K + 1):  row k is (W_k1 .. W_kK, b_k)

`minimise` finds the map of least

    L(A) = sum_i v_i [ -log p_i(y_i) ] + 1/2 sum_kc R_kc (A_kc - C_kc)^2,        v = weight / sum of weights

with a precision R_kc >= 0 and a centre C_kc for every entry. With u = (x_1 .. x_K, 1), or u_k = (x_k, 1) in a diagonal
map, and q_i = p_i - onehot(y_i) (Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3.4):

    dL/dA_k          = sum_i v_i q_ik u_i + R_k (A_k - C_k)
    d2L/(dA_k dA_l)  = sum_i v_i p_ik (1[k = l] - p_il) u_i u_i' + 1[k = l] diag R_k

Every solver sees coordinates in which the diagonal of the Hessian at the start is one, so neither the features' units
nor the precisions matter to them. Few parameters: Newton's method with backtracking, to rounding. Many: L-BFGS. Where
the penalty is zero and the rows are separable, the loss falls for ever and flattens; the answer is then the map at
which the slope was lost in rounding, marked not converged.

Fewer rows than classes: a full map W whose entries have the precision R off the diagonal and r <= R on it is written

    W = diag d + B V',       V (K, n) an orthonormal basis of the span of the rows,      B (K, n)

and R/2 |B|^2 + D/2 |d - diag C|^2 with D = r R / (R - r) takes the penalty's place: K (n + 2) parameters for K (K + 1),
and the same least value at the same map. First write W = diag d + M with all of M penalised by R. A diagonal entry a of
W - C, split into m + (a - m), costs R/2 m^2 + D/2 (a - m)^2, at least R D / (R + D) a^2 / 2 = r a^2 / 2: the penalty of
L. Then, d given, the scores see of each row of M its part in the span of the rows and no other, and any other part only
adds to |M|. Where r = R, d stays at diag C.

A class without rows pulls its unpenalised scores to minus infinity. `Rows.of(..., unseen=0.5)` gives all such classes
together half a row, spread evenly over the rows and the classes: row i counts as its label by the share N / (N + 1/2)
and as each of the m unseen classes by (1/2) / (N + 1/2) / m, with N the sum of weights. (Krichevsky, Trofimov, "The
performance of universal encoding", 1981: half a count for a symbol not seen yet.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from numbers import Real
from typing import Literal, NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # it ships no types

from calibrators import numerics
from calibrators.numerics import Array, blocks, memory_order, softmax

MOST_NEWTON_PARAMETERS = 300
MOST_NEWTON_WORK = 2e9
"""Newton's method up to so many parameters P and multiplications n P^2 for a Hessian; above, L-BFGS."""

NEWTON_TOLERANCE, LBFGS_TOLERANCE = 1e-10, 1e-6
"""Largest entry of the gradient at which a solver ends, in scaled coordinates."""

COARSE_TOLERANCE = 1e-3
"""While strengths are compared: held-out losses are then right to four digits, at a third of the cost."""

FLAT = 1e-7
"""A loss whose curvature fell to so much of that at the start has no minimum there."""

MAX_STEPS = 100
MAX_HALVINGS = 40
LBFGS_STEPS, COARSE_STEPS = 500, 30
LBFGS_MEMORY = 10
SUFFICIENT_DECREASE = 1e-4
DAMPING = 1e-10
"""Added to the scaled Hessian: softmax leaves directions flat, and rounding must not make them steep."""

ROUNDING = 1e-13
"""A step may seem to raise the loss by so much: near the optimum that is the sum's noise."""

N_FOLDS = 5
MOST_FOLD_WORK = 2e8
"""Up to so many multiplications for one loss, every fold is held out in turn; above, the first alone."""

MOST_WORK = 2e10
"""Fits of a full map beyond so many multiplications n K^2 for one loss are refused: K = 1000 up to 20,000 rows."""

LEAST_SHARED_WORK = 3e7
"""Matrix products of fewer multiplications are computed by one thread: on a machine at work, threads that wait for each
other at every product cost a hundred times what they save."""

UNSEEN_ROWS = 0.5
PENALTIES = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5)
"""Penalties that "cv" chooses from."""


class Rows(NamedTuple):
    """A calibration set as the solver reads it."""

    x: Array  # (n_samples, K) features
    y: Array  # (n_samples,) labels
    share: Array  # (n_samples,) weights, summing to one
    unseen: Array  # classes without rows
    unseen_share: float  # of every row, spread over `unseen`

    @classmethod
    def of(cls, x: Array, y: Array, weight: Array, *, unseen: float = 0.0) -> Rows:
        """Rows of which `unseen` in all count as the classes without rows."""
        absent = np.setdiff1d(np.arange(x.shape[1]), y)
        total = weight.sum()
        return cls(x, y, weight / total, absent, float(unseen / (total + unseen)) if len(absent) else 0.0)

    def part(self, block: slice) -> Rows:
        return self._replace(x=self.x[block], y=self.y[block], share=self.share[block])


class Ridge(NamedTuple):
    """Precisions of a full map that are the same for every class."""

    off_diagonal: float
    diagonal: float
    bias: float

    @classmethod
    def of(cls, precision: Array, centre: Array) -> Ridge | None:
        """None where classes differ, a diagonal is held more firmly than the rest, or the rest is not drawn to zero."""
        if precision.shape[1] == 2:
            return None
        ridge = cls(precision[0, 1], precision[0, 0], precision[0, -1])
        alike = ridge.diagonal <= ridge.off_diagonal and np.array_equal(precision, ridge.precision(len(precision)))
        return ridge if alike and np.count_nonzero(centre) == np.count_nonzero(np.diag(centre)) else None

    def split(self) -> float | None:
        """D of the module's head; None where d stays as it is."""
        if self.diagonal == self.off_diagonal:
            return None
        return self.diagonal * self.off_diagonal / (self.off_diagonal - self.diagonal)

    def precision(self, n_classes: int) -> Array:
        """R of the module's head, (n_classes, n_classes + 1)."""
        precision = np.full((n_classes, n_classes + 1), self.off_diagonal, dtype=np.float64)
        np.fill_diagonal(precision, self.diagonal)
        precision[:, -1] = self.bias
        return precision


class Fit(NamedTuple):
    """Where a solver ended: the map, and whether it is a minimum."""

    map: Array
    converged: bool


Objective = Callable[[Array], tuple[float, Array]]


class Choice(NamedTuple):
    """The strength that cross-validation found, and a map fitted with it to start from."""

    strength: float
    start: Array


def identity_map(n_classes: int, *, diagonal: bool) -> Array:
    """The map that leaves features as they are: (K, 2) if diagonal, else (K, K + 1); bias zero."""
    weights = np.ones((n_classes, 1)) if diagonal else np.eye(n_classes)
    return np.column_stack([weights, np.zeros(n_classes)])


def scores(x: Array, weights: Array) -> Array:
    """Scores (n_samples, K), in `memory_order`, of features under a map, diagonal or full by its shape."""
    order = memory_order(x.shape[1])
    if weights.shape[1] == 2:
        product = np.multiply(x, weights[:, 0], order=order)
    else:
        product = np.matmul(x, weights[:, :-1].T, order=order)
    product += weights[:, -1]
    return product


def products(matrix: Array, x: Array) -> Array:
    """matrix @ x_i (n_samples, K) for each row by itself; in one product of all, rounding knows a row's neighbours."""
    product: Array = np.matmul(matrix, x[:, :, None])[:, :, 0]
    return product


def log_losses(rows: Rows, weights: Array) -> Array:
    """-log p_i(y_i) (n_samples,) under a map, without the share of unseen classes."""
    pieces = []
    for block in blocks(*rows.x.shape):
        s = scores(rows.x[block], weights)
        top = s.max(axis=1)
        total = np.log(np.exp(s - top[:, None]).sum(axis=1))
        pieces.append(total + top - s[np.arange(len(s)), rows.y[block]])
    return np.concatenate(pieces)


def value_and_gradient(rows: Rows, weights: Array, precision: Array, centre: Array) -> tuple[float, Array]:
    """L and dL/dA at a map A = `weights`; precision and centre have its shape."""
    away = weights - centre
    value, gradient = 0.5 * float(np.sum(precision * away * away)), precision * away
    for block in blocks(*rows.x.shape):
        piece = rows.part(block)
        residual = scores(piece.x, weights)
        value += _loss(piece, residual)
        if weights.shape[1] == 2:
            gradient[:, :-1] += np.einsum("ik,ik->k", residual, piece.x)[:, None]
        else:
            gradient[:, :-1] += residual.T @ piece.x
        gradient[:, -1] += residual.sum(axis=0)
    return value, gradient


def _loss(rows: Rows, scores: Array) -> float:
    """Mean log loss of scores (n_samples, K), which become its gradient in them."""
    y, share, own = rows.y, rows.share, np.arange(len(rows.y))
    scores -= scores.max(axis=1, keepdims=True)
    of_label, of_unseen = scores[own, y], scores[:, rows.unseen]
    np.exp(scores, out=scores)
    total = scores.sum(axis=1)
    value = float(share @ (np.log(total) - (1 - rows.unseen_share) * of_label))
    scores *= (share / total)[:, None]
    scores[own, y] -= (1 - rows.unseen_share) * share
    if len(rows.unseen):
        value -= rows.unseen_share * float(share @ of_unseen.mean(axis=1))
        scores[:, rows.unseen] -= (rows.unseen_share / len(rows.unseen) * share)[:, None]
    return value


def hessian(rows: Rows, weights: Array, precision: Array) -> Array:
    """Second derivatives (P, P) in the P entries of the map, row by row."""
    n_classes, width = weights.shape
    matrix = np.diag(precision.ravel())
    own = matrix.reshape(n_classes, width, n_classes, width)
    classes = np.arange(n_classes)
    for block in blocks(len(rows.x), weights.size):
        u, p, share = _inputs(rows.x[block], weights), softmax(scores(rows.x[block], weights)), rows.share[block]
        terms = p[:, :, None] * u
        weighted = terms * share[:, None, None]
        own[classes, :, classes, :] += np.matmul(weighted.transpose(1, 2, 0), u.transpose(1, 0, 2))
        matrix -= weighted.reshape(len(p), -1).T @ terms.reshape(len(p), -1)
    return matrix


def curvature(rows: Rows, weights: Array, precision: Array) -> Array:
    """The diagonal of `hessian`, in the shape of the map."""
    diagonal = precision.copy()
    for block in blocks(*rows.x.shape):
        p = softmax(scores(rows.x[block], weights))
        spread = p * (1 - p) * rows.share[block][:, None]
        square = np.square(rows.x[block])
        diagonal[:, :-1] += (
            np.einsum("ik,ik->k", spread, square)[:, None] if weights.shape[1] == 2 else spread.T @ square
        )
        diagonal[:, -1] += spread.sum(axis=0)
    return diagonal


def minimise(rows: Rows, precision: Array, centre: Array, start: Array | None = None, *, tolerance: float = 0.0) -> Fit:
    """The map of least penalised loss.

    Parameters
    ----------
    precision, centre : shape of the map, (K, 2) or (K, K + 1)
    start : map to begin from; `centre` if not given
    tolerance : a gradient that is small enough, where a solver's own tolerance is more than is needed

    Examples
    --------
    Three rows in four are class 1 and nothing tells them apart: without a penalty the biases say log 3.

    >>> rows = Rows.of(np.zeros((4, 2)), np.array([1, 1, 1, 0]), np.ones(4))
    >>> found = minimise(rows, np.zeros((2, 2)), identity_map(2, diagonal=True))
    >>> print(f"{np.exp(found.map[1, 1] - found.map[0, 1]):.6f}")
    3.000000
    """
    weights = centre if start is None else start
    with limited_threads(rows.x):
        first = curvature(rows, weights, precision)
        found = _solve(rows, precision, centre, weights, _scale(first), tolerance)
        curved = bool(np.all(curvature(rows, found.map, precision) > FLAT * first))
    return Fit(found.map, found.converged and curved)


def _solve(rows: Rows, precision: Array, centre: Array, weights: Array, scale: Array, tolerance: float) -> Fit:
    if weights.size <= MOST_NEWTON_PARAMETERS and len(rows.x) * weights.size**2 <= MOST_NEWTON_WORK:
        return _newton(rows, precision, centre, weights, scale, tolerance)
    ridge = Ridge.of(precision, centre) if len(rows.x) < len(weights) else None
    if ridge is not None:
        return _lbfgs_in_span(rows, ridge, centre, weights, tolerance)
    return _lbfgs(lambda trial: value_and_gradient(rows, trial, precision, centre), weights, scale, tolerance)


def limited_threads(x: Array) -> AbstractContextManager[object]:
    """Where products of rows like these are small (`LEAST_SHARED_WORK`), one thread for each."""
    work = min(x.size, numerics.ELEMENTS_AT_ONCE) * min(x.shape)
    limited: AbstractContextManager[object] = _thread_pools().limit(
        limits=1 if work < LEAST_SHARED_WORK else None, user_api="blas"
    )
    return limited


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def fold_of_row(x: Array, y: Array, seed: int) -> Array:
    """Fold 0 .. N_FOLDS-1 of each row (n_samples,): by label, then by a hash of the row's bytes, dealt in turn.

    Equal rows share a fold, whatever their order: a repeated row is never learned from and held out at once, and weight
    two is the row twice here too.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in x + 0.0]  # -0.0 becomes 0.0
    ranked = np.stack([y.astype(np.uint64), np.frombuffer(b"".join(digests), np.uint64)], axis=1)
    position = np.unique(ranked, axis=0, return_inverse=True)[1].ravel()
    return np.asarray(position % N_FOLDS)


def cross_validated(
    x: Array,
    y: Array,
    weight: Array,
    strengths: Sequence[float],
    precision: Callable[[float, float], Array],
    centre: Array,
    *,
    start: Array | None = None,
    seed: int = 0,
) -> Choice:
    """The strength of least held-out log loss over N_FOLDS folds; where a fit is large (`MOST_FOLD_WORK`), over one
    fold, and every other strength is tried.

    Strengths are tried from the strongest on, each fit begun at the one before; the first that raises the loss is the
    last one tried. `precision(strength, total)` gives R for rows of that total weight.
    """
    fold = fold_of_row(x, y, seed)
    large = is_large(len(x), centre)
    held_out = np.unique(fold)[: 1 if large else None]
    learned = [_subset(x, y, weight, fold != k) for k in held_out]
    judged = [_subset(x, y, weight, fold == k) for k in held_out]
    maps = [centre if start is None else start] * len(held_out)
    best, least = Choice(max(strengths), maps[0]), np.inf
    for strength in sorted(strengths, reverse=True)[:: 2 if large else 1]:
        for index, (rows, total) in enumerate(learned):
            penalty = precision(strength, total)
            maps[index] = minimise(rows, penalty, centre, maps[index], tolerance=COARSE_TOLERANCE).map
        with limited_threads(x):
            loss = sum(
                total * float(rows.share @ log_losses(rows, found))
                for (rows, total), found in zip(judged, maps, strict=True)
            )
        if loss > least:
            break
        best, least = Choice(strength, maps[0]), loss
    return best


def is_large(n_samples: int, weights: Array) -> bool:
    """Whether fits of such a map are dear. A step of L-BFGS itself costs what a thousand rows do."""
    return bool((n_samples + 1000) * weights.size > MOST_FOLD_WORK)


def fit_towards_identity(
    x: Array, y: Array, weight: Array, penalty: float | Literal["cv"], *, diagonal: bool, seed: int
) -> tuple[Fit, float]:
    """The map of least total log loss + penalty / 2 |A - identity|^2, and its penalty; "cv" chooses from PENALTIES."""
    centre = identity_map(x.shape[1], diagonal=diagonal)

    def precision(strength: float, total: float) -> Array:
        return np.full_like(centre, strength / total)

    choice = (
        Choice(float(penalty), centre)
        if penalty != "cv"
        else cross_validated(x, y, weight, PENALTIES, precision, centre, seed=seed)
    )
    rows = Rows.of(x, y, weight, unseen=UNSEEN_ROWS)
    return minimise(rows, precision(choice.strength, weight.sum()), centre, choice.start), choice.strength


def check_strength(name: str, value: float | str) -> None:
    """Raise ValueError unless a constructor parameter is "cv" or a finite number, zero or more."""
    if value != "cv" and not (isinstance(value, Real) and 0 <= value < np.inf):
        raise ValueError(f'{name} must be "cv" or a finite number of 0 or more, got {value!r}')


def check_work(kind: str, n_samples: int, n_classes: int) -> None:
    """Raise ValueError for a full map that no fit would finish in practical time."""
    if n_samples * n_classes**2 > MOST_WORK:
        raise ValueError(
            f"{kind} is fitted for n_samples * n_classes^2 up to {MOST_WORK:g}, got {n_samples} rows of {n_classes}"
            " classes; take fewer rows, or a diagonal map: vector, structured_vector"
        )


def _subset(x: Array, y: Array, weight: Array, chosen: Array) -> tuple[Rows, float]:
    return Rows.of(x[chosen], y[chosen], weight[chosen], unseen=UNSEEN_ROWS), float(weight[chosen].sum())


def _inputs(x: Array, weights: Array) -> Array:
    """u: (n_samples, K, 2) for a diagonal map, (n_samples, 1, K + 1) for a full one."""
    if weights.shape[1] == 2:
        return np.stack([x, np.ones_like(x)], axis=2)
    return np.column_stack([x, np.ones(len(x))])[:, None, :]


def _scale(curvature: Array) -> Array:
    return np.asarray(1 / np.sqrt(np.where(curvature > 0, curvature, 1.0)))


def _newton(rows: Rows, precision: Array, centre: Array, weights: Array, scale: Array, tolerance: float) -> Fit:
    value, gradient = value_and_gradient(rows, weights, precision, centre)
    for _ in range(MAX_STEPS):
        if np.abs(scale * gradient).max() <= max(tolerance, NEWTON_TOLERANCE):
            return Fit(weights, True)
        scaled = hessian(rows, weights, precision) * np.outer(scale, scale)
        scaled[np.diag_indices_from(scaled)] += DAMPING
        step = -scale * cho_solve(cho_factor(scaled), (scale * gradient).ravel()).reshape(scale.shape)
        promised = SUFFICIENT_DECREASE * float(np.sum(gradient * step))
        for halving in range(MAX_HALVINGS):
            trial = weights + 0.5**halving * step
            trial_value, trial_gradient = value_and_gradient(rows, trial, precision, centre)
            if trial_value <= value + 0.5**halving * promised + ROUNDING * (1 + abs(value)):
                break
        else:
            return Fit(weights, False)
        weights, value, gradient = trial, trial_value, trial_gradient
    return Fit(weights, False)


def _lbfgs(objective: Objective, weights: Array, scale: Array, tolerance: float) -> Fit:
    tolerance = max(tolerance, LBFGS_TOLERANCE)

    def scaled(flat: Array) -> tuple[float, Array]:
        value, gradient = objective(weights + scale * flat.reshape(scale.shape))
        return value, (scale * gradient).ravel()

    steps = LBFGS_STEPS if tolerance < COARSE_TOLERANCE else COARSE_STEPS
    options = {"gtol": tolerance, "ftol": 0.0, "maxcor": LBFGS_MEMORY, "maxiter": steps}
    found = minimize(scaled, np.zeros(scale.size), jac=True, method="L-BFGS-B", options=options)
    return Fit(weights + scale * found.x.reshape(scale.shape), bool(np.abs(found.jac).max() <= tolerance))


class _Span(NamedTuple):
    """Rows, fewer than classes, in coordinates of their span. A map is (K, n + 2): each class's row of B, b and d."""

    rows: Rows
    basis: Array  # (n, K), V transposed
    common: Array  # (n, n + 1), the rows in that basis, and ones

    @classmethod
    def of(cls, rows: Rows) -> _Span:
        basis = np.linalg.svd(rows.x, full_matrices=False)[2]
        return cls(rows, basis, np.column_stack([rows.x @ basis.T, np.ones(len(rows.x))]))

    def coordinates(self, weights: Array, diagonal: Array) -> Array:
        """Those of a map (K, K + 1) of which `diagonal` is d."""
        rest = weights[:, :-1] - np.diag(diagonal)
        return np.column_stack([rest @ self.basis.T, weights[:, -1], diagonal])

    def map(self, own: Array) -> Array:
        """The map (K, K + 1) of coordinates."""
        return np.column_stack([own[:, :-2] @ self.basis + np.diag(own[:, -1]), own[:, -2]])

    def scores(self, own: Array) -> Array:
        s: Array = self.common @ own[:, :-1].T
        s += self.rows.x * own[:, -1]
        return s

    def value_and_gradient(self, own: Array, precision: Array, centre: Array) -> tuple[float, Array]:
        away, residual = own - centre, self.scores(own)
        value = _loss(self.rows, residual) + 0.5 * float(np.sum(precision * away * away))
        of_diagonal = np.einsum("ik,ik->k", residual, self.rows.x)
        return value, np.column_stack([residual.T @ self.common, of_diagonal]) + precision * away

    def curvature(self, own: Array, precision: Array) -> Array:
        p = softmax(self.scores(own))
        spread = p * (1 - p) * self.rows.share[:, None]
        of_diagonal = np.einsum("ik,ik->k", spread, np.square(self.rows.x))
        return np.column_stack([spread.T @ np.square(self.common), of_diagonal]) + precision


def _lbfgs_in_span(rows: Rows, ridge: Ridge, centre: Array, weights: Array, tolerance: float) -> Fit:
    span, split = _Span.of(rows), ridge.split()
    centre = span.coordinates(centre, np.diag(centre))
    own = span.coordinates(weights, centre[:, -1] if split is None else np.diag(weights))
    precision = np.full_like(own, ridge.off_diagonal)
    precision[:, -2:] = ridge.bias, split or 0.0
    scale = _scale(span.curvature(own, precision))
    if split is None:
        scale[:, -1] = 0.0
    found = _lbfgs(lambda trial: span.value_and_gradient(trial, precision, centre), own, scale, tolerance)
    return Fit(span.map(found.map), found.converged)
