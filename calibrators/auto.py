"""Which calibrator for these rows? Candidates compared by cross-validated log loss, the winner fitted on all rows.

Every candidate predicts each row from a fit that has not seen it (stratified folds), so its mean log loss is an honest
estimate of what it will cost on new rows of the same kind. The estimates of two candidates share their rows, so what
decides is the paired difference and its standard error, not two overlapping intervals.

Four rules keep the choice from doing harm:

1. `identity` and `temperature` are always candidates.
2. Only kinds whose log loss is bounded whatever the rows (no exact zeros) are.
3. The lowest of many noisy estimates is too good to be true, so `INCUMBENT`, which mixes its members where others are
   chosen, and holds identity and temperature scaling among them, is taken unless another kind leads it by
   `LEAST_LEAD_IN_ERRORS` standard errors of the paired difference. (The largest of fifteen standard normal numbers is
   1.7 on average. On 75 problems of two classes a lead of one error misled in three cases of four: loss over the best
   kind in hindsight 1.016, at worst 1.33; with three errors 1.010, at worst 1.12. On 36 of more classes both are .99.)
4. Without `INCUMBENT`, a kind replaces temperature scaling only if it gains `LEAST_GAIN_IN_ERRORS` standard errors.

Rows that drift are not exchangeable, and folds drawn from all of them let a candidate see the future of the rows that
it is judged on. With `time_ordered`, which the caller must say, each fold is predicted from the rows before it alone
(forward chaining), as the calibrator will be used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.base import Calibrator
from calibrators.metrics import Estimate, scores
from calibrators.metrics.proper import log_losses
from calibrators.numerics import Array, check_labels, check_logits, check_sample_weight
from calibrators.registry import create, kinds

SIMPLEST_FIRST = (
    "identity",
    "temperature",
    "ensemble_temperature",
    "class_prior",
    "platt",
    "beta",
    "quadratic",
    "structured_vector",
    "vector",
    "order_preserving",
    "venn_abers",
    "isotonic",
    "structured_matrix",
    "matrix",
    "dirichlet",
    "empirical_bayes",
)
"""Candidates in order of simplicity: by the freedom that the fit has."""

ALWAYS = ("identity", "temperature")
BINARY_ONLY = {"beta", "quadratic"}
FEW_CLASSES_ONLY = {"dirichlet": 20, "matrix": 50, "structured_matrix": 200, "venn_abers": 20}
"""Most classes for which a kind is a sensible candidate: its fit or its state grows too fast beyond."""

INCUMBENT = "empirical_bayes"
LEAST_LEAD_IN_ERRORS = 3.0
LEAST_GAIN_IN_ERRORS = 0.5
MOST_FOLDS = 50

Splits = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
Progress = Callable[[float, str], None]
"""Called with the share of the work done, 0 to 1, and what is done now."""


@dataclass(frozen=True)
class Candidate:
    """One row of the ranking.

    Attributes
    ----------
    kind : as for `create`, with its default parameters
    scores : cross-validated, with intervals (see `metrics.scores`); empty if it was not compared
    gain : mean log loss of temperature scaling minus its own on the same rows, and the standard error of that
    seconds : for all folds
    skipped : why it was not compared, empty if it was
    """

    kind: str
    scores: dict[str, Estimate] = field(default_factory=dict)
    gain: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    skipped: str = ""


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    Attributes
    ----------
    calibrator : the chosen kind, fitted on all rows
    candidates : best log loss first, those that were not compared last
    """

    calibrator: Calibrator
    candidates: list[Candidate]


def select(
    logits: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    candidates: Sequence[str] | None = None,
    prefer: str = "best",
    n_folds: int = 5,
    time_ordered: bool = False,
    budget_seconds: float = 120.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Rank calibrators on labelled rows and fit the best.

    Parameters
    ----------
    logits : (n_samples, n_classes)
    y : (n_samples,) class indices
    sample_weight : (n_samples,), not negative; fits and choice are weighted, the scores in the table are not
    candidates : kinds to compare; by default those that suit the shape of the data. identity and temperature join them
    prefer : "best", the lowest log loss; "simple", the simplest within one standard error of it
    n_folds : each candidate is fitted so many times, and once more if it is chosen
    time_ordered : whether the rows are in order of time; each fold is then judged by a fit on the rows before it, and
        the first of n_folds + 1 stretches is only learned from
    budget_seconds : a candidate whose folds would not end in time, judged by its first, is skipped and says so
    seed : of the folds and of the intervals

    Raises
    ------
    ValueError, TypeError
        as `Calibrator.fit`; also for fewer than two rows a fold, or an unknown kind

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = 4 * rng.standard_normal((600, 3))
    >>> y = np.argmax(z / 3 + rng.gumbel(size=z.shape), axis=1)
    >>> selection = select(z, y, candidates=["identity", "temperature", "platt"])
    >>> [candidate.kind for candidate in selection.candidates][-1], selection.calibrator.kind
    ('identity', 'temperature')
    """
    z = check_logits(logits)
    labels = check_labels(y, n_samples=len(z), n_classes=z.shape[1])
    weight = check_sample_weight(sample_weight, n_samples=len(z))
    check_options(
        candidates=candidates,
        prefer=prefer,
        n_folds=n_folds,
        time_ordered=time_ordered,
        budget_seconds=budget_seconds,
    )
    if len(z) < 2 * n_folds:
        raise ValueError(f"{n_folds} folds need at least {2 * n_folds} rows, got {len(z)}")
    chosen_kinds = sensible(*z.shape) if candidates is None else list(dict.fromkeys([*ALWAYS, *candidates]))
    chosen_kinds.sort(key=_turn)
    splits = forward_splits(labels, n_folds) if time_ordered else splits_of(folds(labels, n_folds, seed))
    comparison = _Comparison(z, labels, weight, splits, seed, time.monotonic() + budget_seconds)
    for index, kind in enumerate(chosen_kinds):
        if progress is not None:
            progress(index / (len(chosen_kinds) + 1), f"cross-validating {kind}")
        comparison.add(kind)
    winner = comparison.winner(prefer)
    if progress is not None:
        progress(len(chosen_kinds) / (len(chosen_kinds) + 1), f"fitting {winner} on all rows")
    calibrator = create(winner).fit(z, labels, sample_weight=weight)
    return Selection(calibrator, comparison.ranking())


def check_options(
    *,
    candidates: Sequence[str] | None = None,
    prefer: str = "best",
    n_folds: int = 5,
    time_ordered: bool = False,
    budget_seconds: float = 120.0,
) -> None:
    """Options of `select` as they may be: ValueError or TypeError otherwise."""
    if not isinstance(time_ordered, bool):
        raise TypeError(f"time_ordered must be true or false, got {time_ordered!r}")
    for kind in candidates or ():
        create(kind)
    if prefer not in {"best", "simple"}:
        raise ValueError(f'prefer must be "best" or "simple", got {prefer!r}')
    if not 2 <= n_folds <= MOST_FOLDS:
        raise ValueError(f"n_folds must be in 2..{MOST_FOLDS}, got {n_folds}")
    if not budget_seconds >= 0:
        raise ValueError(f"budget_seconds must not be negative, got {budget_seconds}")


def sensible(n_samples: int, n_classes: int) -> list[str]:
    """The kinds worth comparing on data of this shape, cheapest first."""
    del n_samples  # few rows do not exclude a kind: cross-validation sees what they do to it
    known = set(kinds())
    return [
        kind
        for kind in SIMPLEST_FIRST
        if kind in known
        and not (kind in BINARY_ONLY and n_classes > 2)
        and n_classes <= FEW_CLASSES_ONLY.get(kind, n_classes)
    ]


def folds(y: NDArray[np.int64], n_folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for each row, every class spread evenly over the folds: rows in random order, dealt class by class."""
    shuffled = np.random.default_rng(seed).permutation(len(y))
    dealt = shuffled[np.argsort(y[shuffled], kind="stable")]
    fold = np.empty(len(y), dtype=np.int64)
    fold[dealt] = np.arange(len(y)) % n_folds
    return fold


def splits_of(fold: NDArray[np.int64]) -> Splits:
    """(learned, judged) row numbers for each fold."""
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in np.unique(fold)]


def forward_splits(y: NDArray[np.int64], n_folds: int) -> Splits:
    """(learned, judged) row numbers: n_folds + 1 stretches of rows, all but the first judged by the rows before them.

    ValueError where the first stretch holds a single class.
    """
    stretches = np.array_split(np.arange(len(y)), n_folds + 1)
    if len(np.unique(y[stretches[0]])) < 2:
        raise ValueError(
            f"time_ordered learns first from {len(stretches[0])} rows, which are all of one class; take fewer folds"
        )
    return [(np.arange(judged[0]), judged) for judged in stretches[1:]]


def _turn(kind: str) -> int:
    """What is chosen from in any case comes before what the time budget may leave out."""
    return [*ALWAYS, INCUMBENT].index(kind) if kind in {*ALWAYS, INCUMBENT} else len(ALWAYS) + 1


def _freedom(kind: str) -> int:
    return SIMPLEST_FIRST.index(kind) if kind in SIMPLEST_FIRST else len(SIMPLEST_FIRST)


@dataclass
class _Comparison:
    """Out-of-fold predictions of each candidate, scored."""

    logits: Array
    labels: NDArray[np.int64]
    weight: NDArray[np.float64]
    splits: Splits
    seed: int
    deadline: float
    found: dict[str, Candidate] = field(default_factory=dict)
    losses: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, kind: str) -> None:
        begun = time.monotonic()
        try:
            probabilities = self._out_of_fold(kind)
        except _SkippedError as reason:
            self.found[kind] = Candidate(kind, skipped=str(reason))
            return
        labels = self.labels[self._judged]
        self.losses[kind] = log_losses(probabilities, labels)
        found = scores(probabilities, labels, seed=self.seed)
        self.found[kind] = Candidate(kind, found, seconds=time.monotonic() - begun)

    def winner(self, prefer: str) -> str:
        ranked = sorted(self.losses, key=lambda kind: float(self._share @ self.losses[kind]))
        best = ranked[0]
        if INCUMBENT in self.losses:
            best = next((kind for kind in ranked if self._is_ahead(kind, INCUMBENT, LEAST_LEAD_IN_ERRORS)), INCUMBENT)
        elif not self._is_ahead(best, "temperature", LEAST_GAIN_IN_ERRORS):
            best = next(kind for kind in ranked if kind in ALWAYS)
        if prefer == "simple":
            simple = sorted(self.losses, key=_freedom)
            best = next(kind for kind in simple if self._is_close(kind, best))
        return best

    def ranking(self) -> list[Candidate]:
        compared = [
            replace(candidate, gain=self._difference("temperature", candidate.kind))
            for candidate in self.found.values()
            if not candidate.skipped
        ]
        compared.sort(key=lambda candidate: candidate.scores["log_loss"].value)
        return compared + [candidate for candidate in self.found.values() if candidate.skipped]

    def _is_ahead(self, kind: str, other: str, errors: float) -> bool:
        """Whether a kind's mean loss is below the other's, by more than so many standard errors."""
        lead, error = self._difference(other, kind)
        return lead > errors * error

    def _is_close(self, kind: str, best: str) -> bool:
        """Within one standard error of the best, by the paired difference."""
        difference, error = self._difference(kind, best)
        return difference <= error

    def _difference(self, first: str, second: str) -> tuple[float, float]:
        """Weighted mean of first minus second, and its standard error."""
        share = self._share
        difference = self.losses[first] - self.losses[second]
        mean = float(share @ difference)
        return mean, float(np.sqrt(np.square(share) @ np.square(difference - mean)))

    @cached_property
    def _judged(self) -> NDArray[np.int64]:
        """Numbers of the rows that are predicted."""
        return np.concatenate([judged for _, judged in self.splits])

    @cached_property
    def _share(self) -> NDArray[np.float64]:
        weight = self.weight[self._judged]
        return np.asarray(weight / weight.sum())

    def _out_of_fold(self, kind: str) -> Array:
        """Probabilities of the rows `_judged`, in its order."""
        probabilities = []
        for number, (learned, judged) in enumerate(self.splits, start=1):
            begun = time.monotonic()
            try:
                fitted = create(kind).fit(
                    self.logits[learned], self.labels[learned], sample_weight=self.weight[learned]
                )
            except (ImportError, ValueError) as error:
                if kind in ALWAYS:
                    raise
                raise _SkippedError(str(error)) from error
            probabilities.append(fitted.predict_proba(self.logits[judged]))
            remaining = (len(self.splits) - number) * (time.monotonic() - begun)
            if kind not in ALWAYS and time.monotonic() + remaining > self.deadline:
                raise _SkippedError("its fits would pass the time budget")
        return np.concatenate(probabilities)


class _SkippedError(Exception):
    """Why a candidate is not compared."""
