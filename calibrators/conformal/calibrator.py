"""What the conformal kinds share: a base calibrator, and sets of labels from its probabilities.

The set of a row holds its label with the probability that was asked for, whatever the model and the base, as long as
the rows of the calibration set and those served are exchangeable:

    P(label in set) >= c,   and <= c + 1/(n + 1) where no two scores are equal

Probability is over the calibration set and the row together, on average over all rows: a given calibration set of n
rows has its own coverage, Beta(k, n + 1 - k) distributed, and given rows, such as those of one class, may have another.

Base and thresholds are one artifact and one revision, so a threshold never stands on probabilities of another fit.
`predict_proba` is the base's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibrators.base import Calibrator, check_tensor
from calibrators.conformal.division import divide, hashes_of, uniforms
from calibrators.conformal.level import check_level
from calibrators.conformal.score import Score, emit_members, members
from calibrators.conformal.scores import create_score, score_class
from calibrators.conformal.thresholds import Thresholds
from calibrators.graph import Graph
from calibrators.layers import Layer
from calibrators.numerics import Array, blocks
from calibrators.registry import create

BASE = "base/"
"""The base's tensors are kept under its names with this before them."""

OWN_TENSORS = ("scores", "ranks", "starts", "group_of_class")
PARAMETERS = "score_parameters"


class ConformalCalibrator(Calibrator):
    """Base of the conformal kinds; these say how classes are grouped (`_groups`).

    Parameters
    ----------
    base : kind of the calibrator whose probabilities are scored
    base_params : its constructor parameters
    score : nonconformity score, a name of `conformal.scores`
    score_params : its parameters; None tunes them on the part that the base is fitted on
    confidence_level : the one to use where none is asked for, and the one that a score is tuned for
    randomised : whether the score counts a share of the label's own mass, by one uniform number a row
    allow_empty : whether a set may be empty; otherwise the likeliest label is in every set, which never lowers coverage
    tuning_share : of the rows, the share that base and score are fitted on; thresholds are read from the others. Where
        neither learns anything, all rows are for the thresholds

    Attributes
    ----------
    base_ : the fitted base
    score_ : the score with its parameters
    thresholds_ : sorted scores, of each group of classes
    group_of_class_ : (n_classes,) int64, the group whose threshold a class has
    """

    def __init__(
        self,
        base: str = "temperature",
        base_params: dict[str, Any] | None = None,
        score: str = "lac",
        score_params: dict[str, float] | None = None,
        confidence_level: float = 0.9,
        randomised: bool = False,
        allow_empty: bool = True,
        tuning_share: float = 0.25,
    ) -> None:
        self.base, self.base_params = base, base_params
        self.score, self.score_params = score, score_params
        self.confidence_level, self.randomised = confidence_level, randomised
        self.allow_empty, self.tuning_share = allow_empty, tuning_share

    # ---- the base's probabilities

    @property
    def needs(self) -> frozenset[str]:
        return self._base().needs

    def signal_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        return self._base().signal_shapes(n_classes)

    @property
    def taps(self) -> tuple[str, ...]:
        return self._base().taps

    @property
    def has_index(self) -> bool:
        return self.base_.has_index

    def stage_shapes(self, n_classes: int) -> dict[str, tuple[int, ...]]:
        return self.base_.stage_shapes(n_classes)

    def look_up(self, logits: Array, **signals: Array) -> dict[str, Array]:
        return self.base_.look_up(logits, **signals)

    def on_model(self, layers: Callable[[Sequence[str] | None], Sequence[Layer]]) -> Self:
        base = self._base()
        found = base.on_model(layers).get_params(deep=False)
        if found == base.get_params(deep=False):
            return self
        return type(self)(**(self.get_params(deep=False) | {"base_params": found}))

    @property
    def float32_atol(self) -> float:  # type: ignore[override]
        return self._base().float32_atol

    @property
    def further_outputs(self) -> tuple[str, ...]:
        return self._base().further_outputs

    def _predict_further(self, logits: Array, **signals: Array) -> dict[str, Array]:
        return self.base_._predict_further(logits, **signals)

    def copies(self, inputs: Array) -> Iterator[Array]:
        return self._base().copies(inputs)

    def emit_inputs(self, graph: Graph, x: str) -> str:
        return self._base().emit_inputs(graph, x)

    def _predict_proba(self, logits: Array, **signals: Array) -> Array:
        return self.base_._predict_proba(logits, **signals)

    def emit(self, graph: Graph, logits: str, **signals: str) -> str:
        return self.base_.emit(graph, logits, **signals)

    def _base(self) -> Calibrator:
        return getattr(self, "base_", None) or create(self.base, **(self.base_params or {}))

    # ---- sets

    def predict_set(
        self,
        logits: ArrayLike,
        confidence_level: float | None = None,
        *,
        shares: ArrayLike | None = None,
        **signals: ArrayLike | None,
    ) -> NDArray[np.bool_]:
        """(n_samples, n_classes) which labels are in each row's set.

        Parameters
        ----------
        logits, signals : as for `predict_proba`
        confidence_level : between 0 and 1, by default that of the constructor
        shares : (n_samples,) uniform numbers in [0, 1), for a randomised calibrator, which cannot do without; one row's
            number must not depend on the row

        Raises
        ------
        NotFittedError, ValueError, TypeError
            as `predict_proba`, and for a level or shares that are not
        """
        return self.sets(self.predict_proba(logits, **signals), confidence_level, shares=shares)

    def sets(
        self, probabilities: ArrayLike, confidence_level: float | None = None, *, shares: ArrayLike | None = None
    ) -> NDArray[np.bool_]:
        """The sets of rows whose probabilities (n_samples, n_classes) `predict_proba` gave."""
        self._check_fitted()
        thresholds = self.thresholds(confidence_level)
        p = np.asarray(probabilities, dtype=np.float32)
        if p.ndim != 2 or p.shape[1] != self.n_classes_:
            raise ValueError(f"probabilities must have shape (n_samples, {self.n_classes_}), got {p.shape}")
        drawn = self._check_shares(shares, len(p))
        found = np.empty(p.shape, dtype=bool)
        for block in blocks(*p.shape):
            cuts = self.score_.cuts(p[block], thresholds, None if drawn is None else drawn[block])
            of_class = cuts if cuts.shape[1] == 1 else cuts[:, self.group_of_class_]
            found[block] = members(p[block], of_class, allow_empty=self.allow_empty)
        return found

    def thresholds(self, confidence_level: float | None = None) -> NDArray[np.float32]:
        """(n_groups,) the thresholds at a level."""
        return self.thresholds_.at(self.confidence_level if confidence_level is None else confidence_level)

    def emit_sets(self, graph: Graph, probabilities: str) -> None:
        """Append `sets` at the constructor's confidence level, as `prediction_set` and `set_size`.

        Raises
        ------
        ValueError
            for a randomised calibrator
        """
        if self.randomised:
            raise ValueError("randomised sets need a number of its own for each row, which a graph has not")
        cuts = self.score_.emit_cuts(graph, probabilities, self.thresholds(), self.n_classes_)
        if len(self.thresholds_.starts) > 2:
            cuts = graph.node("Gather", cuts, graph.constant(self.group_of_class_), axis=1)
        inside = emit_members(graph, probabilities, cuts, allow_empty=self.allow_empty)
        graph.further("prediction_set", inside)
        graph.further("set_size", graph.reduce("ReduceSum", graph.cast(inside, np.int32), keepdims=False))

    def _check_shares(self, shares: ArrayLike | None, n_samples: int) -> NDArray[np.float64] | None:
        if (shares is not None) != self.randomised:
            wanted = "needs one uniform number for each row" if self.randomised else "takes no shares"
            raise ValueError(f"{self.kind} with randomised={self.randomised} {wanted}")
        if shares is None:
            return None
        drawn = np.asarray(shares, dtype=np.float64)
        if drawn.shape != (n_samples,) or not np.all((drawn >= 0) & (drawn < 1)):
            raise ValueError(f"shares must be {n_samples} numbers in [0, 1), got shape {drawn.shape}")
        return drawn

    # ---- the fit

    def check_params(self) -> None:
        base = create(self.base, **(self.base_params or {}))
        if isinstance(base, ConformalCalibrator):
            raise ValueError(f"base must be a kind that has no sets of its own, got {self.base!r}")
        if self.score_params is not None:
            create_score(self.score, self.score_params)
        score = score_class(self.score)
        check_level(self.confidence_level)
        for name in ("randomised", "allow_empty"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.randomised and not score.uses_share:
            raise ValueError(f"score {self.score} has nothing to randomise")
        share = self.tuning_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"tuning_share must be a number between 0 and 1, got {share!r}")

    def _fit(self, logits: Array, y: Array, weight: Array, **signals: Array) -> None:
        hashes = hashes_of(logits, y)
        tuning, ranking = self._divide(hashes, y, weight, logits.shape[1])
        learned, kept = (tuning if self._tunes else weight) > 0, ranking > 0
        self._check_divided(y[learned], int(kept.sum()))
        rows = _Rows(logits, y, uniforms(hashes) if self.randomised else None, signals)
        base = create(self.base, **(self.base_params or {}))
        own = rows.take(learned)
        read: dict[str, Any] = dict(own.signals)
        base.fit(own.logits, own.y, sample_weight=(tuning if self._tunes else weight)[learned], **read)
        score = self._tuned(base, rows.take(tuning > 0), tuning[tuning > 0])
        scores = rows.scores(base, score)
        groups = self._groups(scores, y, tuning, ranking, logits.shape[1])
        self.base_, self.score_, self.group_of_class_ = base, score, groups
        self.thresholds_ = self._thresholds(scores[kept], ranking[kept], groups[y[kept]], int(groups.max()) + 1)

    @property
    def _tunes(self) -> bool:
        """Whether anything is learned from a part of its own."""
        return self.base != "identity" or (self.score_params is None and bool(score_class(self.score).parameters))

    def _divide(self, hashes: Array, y: Array, weight: Array, n_classes: int) -> tuple[Array, Array]:
        """The weights of the rows in the tuning part and in that of the thresholds."""
        del y, n_classes
        return divide(hashes, weight, self.tuning_share if self._tunes else 0.0)

    def _check_divided(self, learned: Array, n_kept: int) -> None:
        if len(np.unique(learned)) < 2 or not n_kept:
            raise ValueError(
                f"too few rows to divide: {self.base} needs rows of at least 2 classes for itself, got {len(learned)} "
                f"of classes {np.unique(learned).tolist()}; {n_kept} are left for the thresholds"
            )

    def _tuned(self, base: Calibrator, rows: _Rows, weight: Array) -> Score:
        """The score with the parameters that were given, or else with those of the smallest mean set."""
        found = score_class(self.score)
        if self.score_params is not None or not found.parameters:
            return create_score(self.score, self.score_params)
        p = base.predict_proba(rows.logits.astype(np.float32), **rows.signals)
        candidates = [found(values) for values in found.candidates(p, rows.y, weight, self.confidence_level)]
        return min(candidates, key=lambda score: _mean_size(score, p, rows, weight, self.confidence_level))

    @abstractmethod
    def _groups(self, scores: Array, y: Array, tuning: Array, ranking: Array, n_classes: int) -> NDArray[np.int64]:
        """(n_classes,) the group of each class, 0 .. n_groups-1, from scores of the rows and their two weights."""

    def _thresholds(self, scores: Array, weight: Array, group: Array, n_groups: int) -> Thresholds:
        return Thresholds.of(scores, weight, group, n_groups)

    # ---- the artifact

    def tensors(self) -> dict[str, Array]:
        self._check_fitted()
        kept = self.thresholds_
        own: dict[str, Array] = {"scores": kept.scores, "ranks": kept.ranks, "starts": kept.starts}
        own |= {"group_of_class": self.group_of_class_, "n_classes": np.asarray(self.n_classes_, dtype=np.int64)}
        own |= {PARAMETERS: self.score_.values} if self.score_.parameters else {}
        return own | {BASE + name: array for name, array in self.base_.tensors().items()}

    def set_tensors(self, tensors: Mapping[str, Array]) -> Self:
        self.check_params()
        own = {name: array for name, array in tensors.items() if not name.startswith(BASE)}
        found = score_class(self.score)
        wanted = {*OWN_TENSORS, "n_classes", *([PARAMETERS] if found.parameters else [])}
        if own.keys() != wanted:
            raise ValueError(f"{self.kind} has tensors {sorted(wanted)} beside those of its base, got {sorted(own)}")
        of_base = {name.removeprefix(BASE): array for name, array in tensors.items() if name.startswith(BASE)}
        base = create(self.base, **(self.base_params or {})).set_tensors(of_base)
        check_tensor("n_classes", own["n_classes"], np.int64, ())
        n_classes = int(own["n_classes"])
        if base.n_classes_ != n_classes:
            raise ValueError(f"the base has {base.n_classes_} classes, the sets {n_classes}")
        thresholds = _thresholds(own)
        groups = own["group_of_class"]
        check_tensor("group_of_class", groups, np.int64, (n_classes,))
        if groups.min() < 0 or groups.max() >= len(thresholds.starts) - 1:
            raise ValueError(f"group_of_class must hold groups 0..{len(thresholds.starts) - 2}, got {groups.tolist()}")
        score = _score(self.score, own.get(PARAMETERS))
        self.base_, self.score_, self.thresholds_, self.group_of_class_ = base, score, thresholds, np.array(groups)
        self.n_classes_ = n_classes
        return self


@dataclass(frozen=True)
class _Rows:
    """Rows of a calibration set; `drawn` are their uniform numbers, where the score is randomised."""

    logits: Array
    y: Array
    drawn: NDArray[np.float64] | None
    signals: Mapping[str, Array]

    def take(self, which: Any) -> _Rows:
        drawn = None if self.drawn is None else self.drawn[which]
        signals = {name: array[which] for name, array in self.signals.items()}
        return _Rows(self.logits[which], self.y[which], drawn, signals)

    def scores(self, base: Calibrator, score: Score) -> NDArray[np.float32]:
        """(n_samples,) the scores of the labels, a few rows at a time: probabilities of all would need the memory of
        the logits once more."""
        found = np.empty(len(self.y), dtype=np.float32)
        for block in blocks(*self.logits.shape):
            rows = self.take(block)
            p = base.predict_proba(rows.logits.astype(np.float32), **rows.signals)
            found[block] = score.of_labels(p, rows.y, rows.drawn)
        return found


def _mean_size(score: Score, p: Array, rows: _Rows, weight: Array, level: float) -> float:
    """Mean set size on the rows that the threshold is of."""
    thresholds = Thresholds.of(score.of_labels(p, rows.y, rows.drawn), weight).at(level)
    sizes = (p >= score.cuts(p, thresholds, rows.drawn)).sum(axis=1)
    return float(weight @ sizes)


def _score(name: str, values: Array | None) -> Score:
    """A score with the parameters of an artifact; ValueError for what no fit gives."""
    found = score_class(name)
    if values is None:
        return create_score(name)
    check_tensor(PARAMETERS, values, np.float64, (len(found.parameters),))
    return create_score(name, dict(zip(found.parameters, values.tolist(), strict=True)))


def _thresholds(tensors: Mapping[str, Array]) -> Thresholds:
    """The thresholds of an artifact; ValueError for what no fit gives."""
    scores, ranks, starts = (tensors[name] for name in ("scores", "ranks", "starts"))
    check_tensor("scores", scores, np.float32, (scores.size,))
    check_tensor("ranks", ranks, np.float64, (scores.size,))
    check_tensor("starts", starts, np.int64, (max(starts.size, 2),))
    if starts[0] != 0 or starts[-1] != len(scores) or (np.diff(starts) < 0).any():
        raise ValueError(f"starts must ascend from 0 to {len(scores)}, got {starts.tolist()}")
    within = np.ones(max(len(scores) - 1, 0), dtype=bool)
    within[starts[(starts > 0) & (starts < len(scores))] - 1] = False
    if (ranks <= 0).any() or not ((np.diff(scores) > 0) & (np.diff(ranks) > 0))[within].all():
        raise ValueError("scores and ranks must ascend within each group, ranks from above 0")
    return Thresholds(np.array(scores), np.array(ranks), np.array(starts))
