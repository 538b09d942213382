"""Thresholds for any confidence level, from the sorted scores of a calibration set, in one or several groups.

    split              one group of all rows; Papadopoulos et al., "Inductive Confidence Machines", ECML 2002
    class-conditional  a group a class; Vovk, "Conditional Validity of Inductive Conformal Predictors", ACML 2012
    clustered          a group for classes alike (`clusters`)
    group-conditional  a group for each value of a column of the caller's, known before the label

Of a group with n rows the threshold is its k-th smallest score (`level.rank`), infinite where k > n. A row of that
group, exchangeable with them, then has a score at or below it with probability c or more, and at most c + 1/(n + 1)
where no two scores are equal.

A group keeps at most `MOST_KEPT` different scores, evenly spaced by rank and the largest among them; a rank that falls
between two takes the upper. So up to 65,536 rows are exact, and beyond the coverage grows by at most 1/65,536.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from calibrators.conformal.level import check_level, needed_weights
from calibrators.numerics import Array

MOST_KEPT = 1 << 16
LEVELS_REMEMBERED = 256


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Sorted scores of each group, one group after the other.

    Attributes
    ----------
    scores : (n_kept,) float32, ascending within a group
    ranks : (n_kept,) float64, the weight of the group's rows with at most this score
    starts : (n_groups + 1,) int64, where each group begins; the last is n_kept

    Examples
    --------
    >>> thresholds = Thresholds.of([0.1, 0.4, 0.2, 0.3, 0.9, 0.8, 0.7, 0.6, 0.5])
    >>> thresholds.at(0.9), thresholds.at(0.5), thresholds.at(0.95)
    (array([0.9], dtype=float32), array([0.5], dtype=float32), array([inf], dtype=float32))
    """

    scores: NDArray[np.float32]
    ranks: NDArray[np.float64]
    starts: NDArray[np.int64]
    _found: dict[float, NDArray[np.float32]] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def of(
        cls, scores: Array, weight: Array | None = None, group: Array | None = None, n_groups: int | None = None
    ) -> Self:
        """Thresholds of rows with these scores (n_samples,).

        Parameters
        ----------
        scores : the nonconformity score of each row's label
        weight : (n_samples,) above 0, ones by default
        group : (n_samples,) 0 .. n_groups-1, the row's group; one group by default
        n_groups : by default as many as `group` names; one without rows has infinite thresholds
        """
        values = np.asarray(scores, dtype=np.float32)
        weights = np.ones(len(values)) if weight is None else np.asarray(weight, dtype=np.float64)
        groups = np.zeros(len(values), dtype=np.int64) if group is None else np.asarray(group, dtype=np.int64)
        order = np.lexsort((values, groups))
        ends = np.searchsorted(groups[order], np.arange((n_groups or int(groups.max(initial=0)) + 1) + 1))
        kept = [_kept(values[order[a:b]], weights[order[a:b]]) for a, b in pairwise(ends)]
        starts = np.cumsum([0, *(len(own) for own, _ in kept)])
        return cls(np.concatenate([own for own, _ in kept]), np.concatenate([ranks for _, ranks in kept]), starts)

    @property
    def totals(self) -> NDArray[np.float64]:
        """(n_groups,) the weight of each group's rows."""
        filled = self.starts[1:] > self.starts[:-1]
        return np.where(filled, self.ranks[self.starts[1:] - 1], 0.0)

    def at(self, confidence_level: float) -> NDArray[np.float32]:
        """(n_groups,) the threshold of each group; infinite where it has too few rows for the level."""
        level = check_level(confidence_level)
        found = self._found.get(level)
        if found is None:
            if len(self._found) >= LEVELS_REMEMBERED:
                self._found.clear()
            found = self._found[level] = self._at(level)
        return found

    def _at(self, level: float) -> NDArray[np.float32]:
        totals = self.totals
        needed = needed_weights(level, totals)
        # Ranks counted through all groups ascend, so one search finds every group's place.
        before = np.concatenate([[0.0], np.cumsum(totals)[:-1]])
        through = self.ranks + np.repeat(before, np.diff(self.starts))
        places = np.minimum(np.searchsorted(through, before + needed), self.starts[1:] - 1)
        found = np.where(needed <= totals, self.scores[places], np.float32(np.inf))
        found.flags.writeable = False
        return found


def _kept(scores: NDArray[np.float32], weight: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Of ascending scores those to keep, each once, and the weight at or below each."""
    last_of_equals = np.flatnonzero(np.diff(scores, append=np.float32(np.inf)) > 0)
    ranks = np.cumsum(weight)[last_of_equals]
    if len(last_of_equals) > MOST_KEPT:
        chosen = np.unique(np.searchsorted(ranks, np.linspace(ranks[0], ranks[-1], MOST_KEPT)))
        last_of_equals, ranks = last_of_equals[chosen], ranks[chosen]
    return scores[last_of_equals], ranks
