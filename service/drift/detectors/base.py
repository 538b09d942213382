"""What every detector is: a statistic that is updated row by row, a threshold, and a state that survives a restart.

A detector watches one forecaster: the raw model, or what was served. It knows neither the journal nor a server. Rows
come in the order of the predictions; how they are divided into batches changes nothing, to the last bit.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NO_LABEL = -1


@dataclass(frozen=True)
class Lumped:
    """Logits of many classes, most of which are alike: a few by name, and one number for each of all others.

    Attributes
    ----------
    named : (n_rows, n_named) float64
    classes : (n_rows, n_named) int64, which they are, no class twice
    other : (n_rows,) float64, of each class that is not named
    n_classes : of all
    """

    named: Array
    classes: NDArray[np.int64]
    other: Array
    n_classes: int

    def __len__(self) -> int:
        return len(self.other)

    def __getitem__(self, chosen: slice | NDArray[np.intp]) -> Lumped:
        return Lumped(self.named[chosen], self.classes[chosen], self.other[chosen], self.n_classes)

    @classmethod
    def joined(cls, parts: Sequence[Lumped]) -> Lumped:
        """One after the other; all are of as many classes, and name as many."""
        return cls(
            np.concatenate([part.named for part in parts]),
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.other for part in parts]),
            parts[0].n_classes,
        )

    @property
    def whole(self) -> Array:
        """(n_rows, n_classes)"""
        logits = np.repeat(self.other[:, None], self.n_classes, axis=1)
        np.put_along_axis(logits, self.classes, self.named, 1)
        return logits

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Of each row whether all are."""
        return np.asarray(np.isfinite(self.named).all(axis=1) & np.isfinite(self.other))


@dataclass(frozen=True)
class Batch:
    """Rows of one forecaster, in the order in which they were predicted.

    Attributes
    ----------
    scores : the logits, (n_rows, n_classes) float64, whose softmax is the forecast; logarithms of probabilities are
        logits. Of many classes they may be lumped: what reads few numbers of a row need not make a thousand of them
    labels : (n_rows,) int64, the class that came true; -1: it is not known
    segments : (n_rows,) int64, the segment that each row belongs to, 0 if there is but one
    signals : name -> (n_rows,) float64, what else is known of a row: density, ood_score, projections of its input
    """

    scores: Array | Lumped
    labels: NDArray[np.int64]
    segments: NDArray[np.int64]
    signals: Mapping[str, Array] = field(default_factory=dict)

    @property
    def logits(self) -> Array:
        """(n_rows, n_classes)"""
        return self.scores.whole if isinstance(self.scores, Lumped) else self.scores

    @property
    def n_classes(self) -> int:
        return self.scores.n_classes if isinstance(self.scores, Lumped) else self.scores.shape[1]

    @property
    def width(self) -> int:
        """Numbers that the scores of a row are."""
        return 1 + self.scores.named.shape[1] if isinstance(self.scores, Lumped) else self.n_classes

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: slice | NDArray[np.intp]) -> Batch:
        signals = {name: values[chosen] for name, values in self.signals.items()}
        return replace(
            self,
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            segments=self.segments[chosen],
            signals=signals,
        )


class Detector(ABC):
    """A test that may be looked at after every row.

    A kind's parameters are the keywords of its constructor, which raises ValueError for one that cannot be. They are
    fixed; what changes with the rows is in `state`, a flat dict of arrays whose size does not grow with the rows.

    Attributes
    ----------
    kind : its name
    labelled : whether it reads labels, so that rows without one pass it by; otherwise it reads no label
    n_rows : rows that it has read since it was last reset
    """

    kind: ClassVar[str]
    labelled: ClassVar[bool]
    n_rows: int

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it has the reference that it compares with, if it needs one: until then rows make the reference."""

    @property
    @abstractmethod
    def statistic(self) -> float:
        """What is held against the threshold, of the same unit; an e-detector's is the logarithm of base 10."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """It rings when the statistic reaches this."""

    @abstractmethod
    def update(self, batch: Batch) -> int | None:
        """Read rows; where it rings, the row of the batch that it rang at: rows behind that one are not read."""

    @abstractmethod
    def change_point(self) -> int:
        """How many of the rows read last are estimated to have come after the change, at least 1."""

    @abstractmethod
    def evidence(self) -> dict[str, float]:
        """What the statistic is made of: name of a part (`class 3`, `segment 1`, `temperature`) -> share, of sum 1.

        Names are the detector's own; where it has no parts, the dict is empty.
        """

    @abstractmethod
    def reset(self) -> None:
        """Begin anew, with the reference that it has."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[np.generic]]:
        """Everything that rows have changed, as arrays."""

    @abstractmethod
    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        """Go on from what `state` gave. ValueError if it is of another detector or other parameters."""

    def parameters(self) -> dict[str, float | str]:
        """The keywords of the constructor, which keeps each as the attribute of its name, and their values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def _packed(self, **arrays: NDArray[np.generic] | float) -> dict[str, NDArray[np.generic]]:
        """For `state`: copies of the arrays, and under `detector` the kind and its parameters, by which it is known."""
        return {"detector": self._described(), **{name: np.array(array) for name, array in arrays.items()}}

    def _unpacked(self, state: Mapping[str, NDArray[np.generic]], *names: str) -> dict[str, NDArray[Any]]:
        """For `restore`: copies of the named arrays of a state that `_packed` made, for this kind and parameters."""
        described = bytes(np.asarray(state.get("detector", ()), np.uint8)).decode(errors="replace")
        if described != (own := bytes(self._described()).decode()):
            raise ValueError(f"the state must be of the detector {own}, it is of {described or 'none'}")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"the state lacks {', '.join(missing)}")
        return {name: np.array(state[name]) for name in names}

    def _described(self) -> NDArray[np.uint8]:
        said = json.dumps({"kind": self.kind, **self.parameters()}, sort_keys=True, default=float)
        return np.frombuffer(said.encode(), np.uint8)


def number(
    name: str, value: float | str, *, above: float = -np.inf, least: float = -np.inf, most: float = np.inf
) -> float:
    """A parameter that is a finite number, larger than `above` and within `least` and `most`; else ValueError."""
    is_number = isinstance(value, int | float | np.number) and np.isfinite(value)
    if not is_number or not (above < float(value) and least <= float(value) <= most):
        bounds = f"above {above:g}" if above > -np.inf else f"at least {least:g}"
        raise ValueError(
            f"{name} must be a number {bounds}{f', at most {most:g}' if most < np.inf else ''}, got {value!r}"
        )
    return float(value)


def whole(name: str, value: float | str, *, least: int = 1, most: int = 1 << 53) -> int:
    """A parameter that is a whole number, which the wire brings as a float; else ValueError."""
    checked = number(name, value, least=least, most=most)
    if checked != int(checked):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(checked)


def one_of(name: str, value: float | str, choices: Sequence[str]) -> str:
    """A parameter that is one of some words; else ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)
