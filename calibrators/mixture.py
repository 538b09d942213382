"""What a mixture of calibrators is weighed on: distinct rows, folds, and held-out likelihood.

A row given twice must equal a row of weight two, in folds as in sums. So rows are merged first: sorted by label and by
a digest of their logits, equal neighbours become one row with the sum of their weights. Of a row of weight n, floor(n /
folds) goes to every fold and the rest to one: its place in that order modulo the number of folds. So the folds depend
on the distinct rows and their weights alone, not on their order or on a random number; each label's rows are spread
evenly, pseudo-randomly by the digest; and a label with a single row given many times is still in every fold.

The weights of a mixture p = sum_j w_j p_j maximise the held-out log likelihood with a pseudo-count a for each member,

    sum_i n_i log sum_j w_j P_ij + a sum_j log w_j,        P_ij = probability of row i's label under member j

by expectation-maximisation (Dempster, Laird, Rubin, JRSS B 39, 1977): R_ij ~ w_j P_ij, then w_j ~ sum_i n_i R_ij + a.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calibrators.numerics import Array, blocks

EM_STEPS = 300
DIGEST_SEED = 0


@dataclass(frozen=True)
class DistinctRows:
    """A calibration set without repetitions, sorted by label, then by digest."""

    centred: Array  # (n_rows, n_classes) logits less the largest of their row
    labels: Array  # (n_rows,)
    weight: Array  # (n_rows,) summed over equal rows

    @classmethod
    def of(cls, logits: Array, y: Array, weight: Array, most: int) -> DistinctRows:
        """Rows merged; where more than `most` are distinct, a stratified subset of about that many."""
        digest = row_digests(logits)
        order = np.lexsort((digest, y))
        digest, labels = digest[order], y[order]
        first = np.flatnonzero(np.r_[True, (digest[1:] != digest[:-1]) | (labels[1:] != labels[:-1])])
        chosen = stratified(labels[first], most)
        kept = order[first[chosen]]
        centred = logits[kept]
        centred -= centred.max(axis=1, keepdims=True)
        return cls(centred, y[kept], np.add.reduceat(weight[order], first)[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Array) -> DistinctRows:
        return DistinctRows(self.centred[chosen], self.labels[chosen], self.weight[chosen])

    def subset(self, most: int) -> DistinctRows:
        """All rows, or a stratified subset of about `most`."""
        return self if len(self) <= most else self.take(stratified(self.labels, most))

    def folds(self, number: int) -> Iterator[tuple[DistinctRows, DistinctRows]]:
        """(kept, held out) for each fold that holds a row."""
        everywhere = np.floor(self.weight / number)
        place = np.arange(len(self)) % number
        for fold in range(number):
            held_out = np.where(place == fold, self.weight - (number - 1) * everywhere, everywhere)
            if held_out.any():
                yield self.weighted(self.weight - held_out), self.weighted(held_out)

    def weighted(self, weight: Array) -> DistinctRows:
        """The rows of positive weight, so weighted."""
        chosen = weight > 0
        return DistinctRows(self.centred[chosen], self.labels[chosen], weight[chosen])


def row_digests(logits: Array) -> Array:
    """64 bits (n_samples,) for each row of float64 logits: equal for equal rows, else equal by chance 2^-64.

    The sum over columns, modulo 2^64, of the bits of the logit, mixed, times an odd number of its column.
    """
    random = np.random.default_rng(DIGEST_SEED)
    factors = random.integers(0, 1 << 63, size=logits.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return np.concatenate([_mixed(logits[block]) @ factors for block in blocks(*logits.shape)])


def _mixed(logits: Array) -> Array:
    """The bits of each logit, the high half folded onto the low; minus zero is zero."""
    bits = np.ascontiguousarray(logits + 0.0, dtype=np.float64).view(np.uint64)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    mixed: Array = bits ^ (bits >> np.uint64(29))
    return mixed


def stratified(labels: Array, most: int) -> Array:
    """Places of about `most` of the sorted labels: evenly spaced, and the first of each label."""
    if len(labels) <= most:
        return np.arange(len(labels))
    even = np.linspace(0, len(labels) - 1, most).astype(np.int64)
    return np.union1d(even, np.unique(labels, return_index=True)[1])


def mixture_weights(held_out: Array, weight: Array, pseudo_count: float | Sequence[float]) -> Array:
    """Weights (n_members,) that sum to one, none of them zero.

    Parameters
    ----------
    held_out : (n_members, n_rows) probability of each row's label under fits that did not see the row
    weight : (n_rows,) positive
    pseudo_count : rows' worth of evidence given to each member beforehand, or a number for each

    Examples
    --------
    The second member says twice as much of every label; the first keeps little but its pseudo-count.

    >>> mixture_weights(np.array([[0.3] * 100, [0.6] * 100]), np.ones(100), 0.5).round(4).tolist()
    [0.0099, 0.9901]
    """
    share = np.full(len(held_out), 1 / len(held_out))
    tiny = float(np.finfo(np.float64).tiny)
    for _ in range(EM_STEPS):
        responsibility = share[:, None] * held_out
        responsibility /= np.maximum(responsibility.sum(axis=0), tiny)
        share = responsibility @ weight + np.asarray(pseudo_count)
        share /= share.sum()
    return share


def cautious_weights(held_out: Array, weight: Array, mixture: Array, plain: Array, doubt: float) -> Array:
    """Weights (n_members,) between those of a plain mixture and of a richer one, by how sure the richer one's gain is.

    With t the held-out gain of `mixture` over `plain`, divided by its standard error, plain + (1 - doubt / t^2)
    (mixture - plain); `plain` where that factor is negative or the gain is. (The form of James, Stein, "Estimation with
    quadratic loss", 1961, its positive part.)

    Parameters
    ----------
    held_out, weight : as for `mixture_weights`
    mixture, plain : (n_members,) weights that sum to one
    doubt : t^2 up to which a gain counts as chance; 0 for `mixture` wherever it gains

    Examples
    --------
    Half the rows speak for the second member and half against: its gain is not sure.

    >>> held_out = np.array([[0.5] * 8, [0.9, 0.3] * 4])
    >>> cautious_weights(held_out, np.ones(8), np.array([0.5, 0.5]), np.array([1.0, 0.0]), doubt=0.5).tolist()
    [1.0, 0.0]
    """
    tiny = float(np.finfo(np.float64).tiny)
    gains = np.log(np.maximum(mixture @ held_out, tiny) / np.maximum(plain @ held_out, tiny))
    total = float(weight @ gains)
    variance = float(weight @ np.square(gains - total / weight.sum()))
    factor = 1 - doubt * variance / max(total**2, tiny)
    return plain + max(factor, 0.0) * (mixture - plain) if total > 0 else plain
