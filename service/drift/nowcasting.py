"""Now-casts as monitors that never ring: so they are read, kept and begun anew as these are.

One reads rows as they are predicted, the other their labels when they are waited for no longer; what is told needs
both. An alarm begins a new cohort of labels, another revision begins everything anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import inf
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from service.drift.detectors.base import Batch, Detector
from service.drift.nowcasts import Nowcast, Nowcasts
from service.drift.states import SERVED, MonitorSpec

HIDDEN = "."
"""How the names of these begin; no caller's monitor has such a name."""


class _Reading(Detector):
    """A now-cast that takes rows, and never rings."""

    ready, statistic, threshold = True, 0.0, inf

    def __init__(self) -> None:
        self.now, self.n_rows = Nowcasts(), 0

    @abstractmethod
    def read(self, batch: Batch) -> None: ...

    def update(self, batch: Batch) -> int | None:
        self.read(batch)
        self.n_rows += len(batch)
        return None

    def change_point(self) -> int:
        return 1

    def evidence(self) -> dict[str, float]:
        return {}

    def reset(self) -> None:
        self.n_rows = 0
        self.now.begin_cohort()

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {**self.now.state(), "n_rows": np.array(self.n_rows)}

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> Self:
        self.now.restore(state)
        self.n_rows = int(state["n_rows"])
        return self


class OfRows(_Reading):
    kind = ".nowcast_rows"
    labelled = False

    def read(self, batch: Batch) -> None:
        self.now.read(batch)


class OfLabels(_Reading):
    kind = ".nowcast_labels"
    labelled = True

    def read(self, batch: Batch) -> None:
        self.now.read_labels(batch)


class Told(NamedTuple):
    """Of what one model serves: its accuracy, without labels and with those that came, and its calibration error."""

    accuracy_without_labels: Nowcast
    accuracy: Nowcast
    calibration_error: Nowcast


KINDS = {one.kind: one for one in (OfRows, OfLabels)}


def specs(model: str) -> list[MonitorSpec]:
    return [MonitorSpec(model, kind, kind, SERVED) for kind in KINDS]


def without_labels(rows: Detector, labels: Detector, *, ringing: bool) -> Nowcast:
    return _joined(rows, labels).accuracy_without_labels(ringing=ringing)


def told(rows: Detector, labels: Detector, *, ringing: bool) -> Told:
    """`ringing`: whether an alarm that read the labels of what is served is open."""
    now = _joined(rows, labels)
    return Told(now.accuracy_without_labels(ringing=ringing), now.accuracy(), now.calibration_error())


def _joined(rows: Detector, labels: Detector) -> Nowcasts:
    """What both have read."""
    of_rows, of_labels = rows.state(), labels.state()
    counts = np.array([of_rows["counts"][0], *of_labels["counts"][1:]])
    return Nowcasts().restore({**of_labels, "window": of_rows["window"], "counts": counts})
