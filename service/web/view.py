"""What one model's page is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from service.drift.nowcasts import Nowcast
from service.drift.states import RAW, SERVED, Alarm, MonitorState
from service.drift.summary import Summary, Sums
from service.web import words
from service.web.facts import ModelFacts, ShadowFacts
from service.web.figures import Figure

NO_REVISION = "none"


@dataclass(frozen=True)
class View:
    """All that a model's page shows.

    Attributes
    ----------
    accuracy : as it is now without labels; None: it is not followed
    window : "24h", as it was asked for
    charts : whether there is a script that draws them
    """

    model: ModelFacts
    summary: Summary | None
    monitors: Sequence[MonitorState]
    alarms: Sequence[Alarm]
    accuracy: Nowcast | None
    shadows: Sequence[ShadowFacts]
    window: str
    charts: bool

    @property
    def calibrated(self) -> bool:
        """Whether what is served is something else than the model's own, now or in part of the window."""
        return self.model.active != NO_REVISION or bool(self.summary and _differs(self.summary.total))

    def chart(self, drawn: Callable[[], Figure]) -> Callable[[], Figure] | None:
        return drawn if self.charts else None

    @property
    def total(self) -> Sums | None:
        return self.summary.total if self.summary else None

    @property
    def ringing(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if not alarm.acknowledged_ms]

    @property
    def verdict(self) -> words.Verdict:
        model = self.model
        return words.verdict(model.name, self.total, calibrated=self.calibrated, kept=model.kept, alarms=self.alarms)

    @property
    def since_ms(self) -> int:
        return self.summary.since_ms if self.summary else 0

    @property
    def in_window(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if alarm.time_ms >= self.since_ms]

    @property
    def in_shadow(self) -> list[ShadowFacts]:
        """Challengers: those that are compared, then those that were within the window, newest first."""
        shown = [one for one in self.shadows if not one.ended or one.ended_ms >= self.since_ms]
        return sorted(shown, key=lambda one: (bool(one.ended), -one.ended_ms))


def _differs(total: Sums) -> bool:
    return not np.allclose(total[f"{RAW}.answers"], total[f"{SERVED}.answers"]) or not math.isclose(
        float(total[f"{RAW}.log_loss"][0]), float(total[f"{SERVED}.log_loss"][0]), rel_tol=1e-6, abs_tol=1e-6
    )
