"""An e-detector of wrong probabilities: bets that they should have been recalibrated, begun anew at every row.

`service.drift.detectors.bets` says what the bets are and why R, the wealth of all of them together, reaches the
threshold c = horizon / false_alarm_probability within N rows with probability N / c at most, for every N, while the
probabilities are true to within the tolerance. Nothing is assumed of the rows: they may depend on each other and
drift, as long as the label of each has the stated probabilities given all that came before.

It sees what the families bet on: a temperature, whatever has its shape (noise in labels or in inputs), more or less
of a class, and the same within a segment. It does not see what leaves all of these true on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log10
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from service.drift.detectors import bets
from service.drift.detectors.base import Batch, Detector, number, whole
from service.drift.detectors.bets import Bets, Learners, Wealth

SHARES = {"temperature": 0.65, "class_bias": 0.17, "top_label": 0.17, "adaptive": 0.12, "segments": 0.06}
"""Of the weight, by family; those that are chosen are brought to the sum of one."""

SCALES = {0.5: 0.12, 0.65: 0.6, 0.85: 0.1, 1.2: 0.07, 1.5: 0.11}
BIASES = {-1.3: 0.35, -0.5: 0.15, 0.5: 0.15, 1.3: 0.35}
MEMORIES = {300.0: 1.0}
SLOPES, SHIFTS = (0.4, 0.6, 0.8, 1.3, 1.7), (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
TOP_LABEL = dict.fromkeys([*((slope, 0.0) for slope in SLOPES), *((1.0, shift) for shift in SHIFTS)], 1 / 11)
"""Of each bet, its part of the family's share."""

FAMILIES = ("temperature", "class_bias", "top_label")
SHOWN = 0.01
"""The least share that evidence names."""


class Recalibration(Detector):
    """Rings when somebody who bets on recalibrated probabilities would have multiplied their stake by the threshold.

    Parameters
    ----------
    horizon, false_alarm_probability : within so many rows it rings falsely with at most this probability
    tolerance : how far each class's probability may be from the truth, in every row, without being wrong
    families : words of FAMILIES, with commas between them
    adaptive : 1 to bet on the forecasts of online learners too, 0 not to
    max_segments : segments 0 to max_segments - 1 are bet on by themselves, once rows of two came

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(0, 3, (2000, 5))
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    >>> detector = Recalibration()
    >>> detector.update(Batch(logits, labels, np.zeros(2000, np.int64)))
    >>> detector.update(Batch(2 * logits, labels, np.zeros(2000, np.int64)))
    53
    """

    kind = "recalibration"
    labelled = True
    ready = True

    shares: ClassVar[Mapping[str, float]] = SHARES
    grids: ClassVar[Mapping[str, Mapping[Any, float]]] = {
        "temperature": SCALES,
        "class_bias": BIASES,
        "top_label": TOP_LABEL,
        "adaptive": MEMORIES,
    }

    def __init__(
        self,
        horizon: float = 1e5,
        false_alarm_probability: float = 0.1,
        tolerance: float = 0.0,
        families: str = "temperature,class_bias",
        adaptive: float = 1,
        max_segments: float = 32,
    ) -> None:
        self.horizon = number("horizon", horizon, least=1)
        self.false_alarm_probability = number("false_alarm_probability", false_alarm_probability, above=0, most=1)
        self.tolerance = number("tolerance", tolerance, least=0, most=1)
        self.adaptive = whole("adaptive", adaptive, least=0, most=1)
        self.max_segments = whole("max_segments", max_segments, least=0, most=10_000)
        self.families = str(families)
        self._chosen = [name.strip() for name in self.families.split(",")]
        if set(self._chosen) - set(FAMILIES):
            raise ValueError(f"families must be words of {', '.join(FAMILIES)} with commas between, got {families!r}")
        self.reset()

    def reset(self) -> None:
        self.n_rows = 0
        self._begin(0)

    @property
    def statistic(self) -> float:
        return log10(max(self._wealth.parts.sum(), 1.0))

    @property
    def threshold(self) -> float:
        return log10(self.horizon / self.false_alarm_probability)

    def update(self, batch: Batch) -> int | None:
        if not len(batch):
            return None
        if batch.n_classes != self._n_classes:
            if self.n_rows:
                raise ValueError(f"rows so far had {self._n_classes} classes, got {batch.n_classes}")
            self._begin(batch.n_classes)
        rows = (
            np.ascontiguousarray(batch.logits, np.float64),
            np.ascontiguousarray(batch.labels, np.int64),
            np.ascontiguousarray(batch.segments, np.int64),
        )
        enough = self.horizon / self.false_alarm_probability
        self.n_rows, row = bets.read(self._bets, self._wealth, self._learners, *rows, self.n_rows, enough)
        return None if row < 0 else row

    def change_point(self) -> int:
        return max(1, self.n_rows - int(self._wealth.since[np.argmax(self._wealth.held)])) if self.n_rows else 1

    def evidence(self) -> dict[str, float]:
        if not self.n_rows or not (total := self._wealth.parts.sum()):
            return {}
        named: dict[str, float] = {}
        for name, held in self._named_parts():
            shown = name if held >= SHOWN * total else "other"
            named[shown] = named.get(shown, 0.0) + float(held / total)
        return {name: share for name, share in named.items() if share > 0}

    def state(self) -> dict[str, NDArray[np.generic]]:
        arrays = {**self._wealth._asdict(), **self._learners._asdict()}
        return self._packed(n_rows=self.n_rows, n_classes=self._n_classes, **arrays)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        names = *Wealth._fields, *Learners._fields
        arrays = self._unpacked(state, "n_rows", "n_classes", *names)
        n_classes = int(arrays["n_classes"])
        self._begin(n_classes)
        for name, own in {**self._wealth._asdict(), **self._learners._asdict()}.items():
            if arrays[name].shape != own.shape or arrays[name].dtype != own.dtype:
                raise ValueError(
                    f"{name} must be {own.dtype} {own.shape}, got {arrays[name].dtype} {arrays[name].shape}"
                )
            own[...] = arrays[name]
        self.n_rows = int(arrays["n_rows"])
        return self

    def _named_parts(self) -> Iterator[tuple[str, float]]:
        """What each part of the bets is called, and holds."""
        bets, held, parts = self._bets, self._wealth.held, self._wealth.parts
        biased = "class 1" if self._n_classes == 2 else ""
        grids = (bets.scales, bets.factors if biased else (), bets.slopes, bets.memories)
        names = [
            name
            for name, grid in zip(("temperature", biased, "top label", "adaptive"), grids, strict=True)
            for _ in grid
        ]
        yield from zip(names, held, strict=False)
        yield from ((f"segment {i}", part) for i, part in enumerate(parts[1 : 1 + bets.n_segments]))
        yield from ((f"class {k}", part) for k, part in enumerate(parts[1 + bets.n_segments :]))

    def _begin(self, n_classes: int) -> None:
        self._n_classes = n_classes
        self._bets = self._make_bets()
        self._wealth, self._learners = bets.begin(self._bets, n_classes)

    def _make_bets(self) -> Bets:
        within_segments = self.max_segments and self._chosen != ["class_bias"]
        families = {"adaptive": self.adaptive, "segments": within_segments, **dict.fromkeys(self._chosen, 1)}
        total = sum(self.shares[name] for name, is_chosen in families.items() if is_chosen)
        share = {name: part / total if families.get(name) else 0.0 for name, part in self.shares.items()}
        values = {name: list(grid) if share[name] else [] for name, grid in self.grids.items()}
        weights = {
            name: [share[name] * part for part in grid.values() if share[name]] for name, grid in self.grids.items()
        }
        by_class = weights.pop("class_bias") if self._n_classes != 2 else []
        repeated = np.concatenate([weights[name] for name in weights if name != "adaptive"])
        within = share["segments"] * repeated / max(repeated.sum(), 1e-300)
        whole = np.concatenate([repeated, weights["adaptive"]])
        top = np.array(values["top_label"]).reshape(-1, 2)
        return Bets(
            scales=np.array(values["temperature"]),
            factors=np.exp(values["class_bias"]),
            slopes=top[:, 0].copy(),
            shifts=top[:, 1].copy(),
            memories=np.array(values["adaptive"]),
            weights=np.stack([np.concatenate([repeated + within, weights["adaptive"]]), whole]),
            segment_weights=within,
            class_weights=np.array(by_class),
            n_segments=self.max_segments,
            tolerance=self.tolerance,
        )
