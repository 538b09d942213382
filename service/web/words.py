"""The page's findings in words, for a reader who has never heard of a calibration error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from calibrators.plots._style import percent
from service.drift.states import RAW, SERVED, Alarm
from service.drift.summary import Sums

NBSP, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
ENOUGH_LABELS = 50
"""Labels that a share in the first sentence should be counted over."""
LEAST_LABELS = 10
"""... and without which it is not said at all."""
NEARBY = 0.05
KINDS = {
    "temperature": "its scores have become too sure, or not sure enough",
    "class_bias": "it promises some classes too often or too rarely",
    "prior_shift": "some classes have become more common than they were",
    "covariate": "what it is asked has changed",
    "concept": "the same inputs now have other labels",
    "score_pipeline": "something between the model and its scores has changed",
    "unknown": "the cause cannot be told yet",
}
_WINDOW = re.compile(r"([1-9]\d{0,3})([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60))


@dataclass(frozen=True)
class Told:
    """What a confidence was worth: of `labels` answers given with about `said`, `right` were."""

    said: float
    right: float
    labels: int


@dataclass(frozen=True)
class Verdict:
    """How a model does, in short.

    Attributes
    ----------
    mood : good, off, alarm or unknown
    label : the same in a word or three
    sentence : what else there is to say
    raw, served : what about one confidence is worth, of the model itself and as served; None: too few labels
    """

    mood: str
    label: str
    sentence: str
    raw: Told | None
    served: Told | None


def seconds_of(window: str) -> int | None:
    """How long "90m", "24h" or "7d" is; None for anything else."""
    found = _WINDOW.fullmatch(window)
    return int(found[1]) * _SECONDS[found[2]] if found else None


def verdict(name: str, total: Sums | None, *, calibrated: bool, kept: bool, alarms: Sequence[Alarm]) -> Verdict:
    raw, served = _told(total, calibrated) if total else (None, None)
    ringing = any(not alarm.acknowledged_ms for alarm in alarms)
    which = SERVED if calibrated else RAW
    if total is None or total.labels < ENOUGH_LABELS:
        return Verdict("alarm" if ringing else "unknown", *_not_yet(name, total, kept), raw, served)
    error, chance = total.calibration_error(which), total.chance_error(which)
    gap = total[f"{which}.said"].sum() / total.labels - total.accuracy(which)
    honest = error <= chance
    sentence = f"Over {total.labels:,} labelled answers its confidence is off by {points(error)} on average" + (
        ", which chance alone would explain." if honest else f"; chance alone would explain {points(chance)}."
    )
    direction = "overconfident" if gap > 0 else "underconfident"
    label = "honest" if honest else direction if abs(gap) > error / 2 else "off"
    if ringing:
        return Verdict("alarm", "drift alarm", sentence, raw, served)
    return Verdict("good" if honest else "off", label, sentence, raw, served)


def _not_yet(name: str, total: Sums | None, kept: bool) -> tuple[str, str]:
    """In a word and in a sentence why nothing can be said."""
    if total is None or not total.answers:
        if not kept:
            return "not kept", f"The predictions of {name} are not kept: its journal is off."
        return "no answers", "Nothing was answered in this time."
    needed = f"{total.labels:,} of at least {ENOUGH_LABELS}"
    return "too few labels", f"Whether {name} keeps its promises can be told when labels have come: {needed} so far."


def _told(total: Sums, calibrated: bool) -> tuple[Told | None, Told | None]:
    """One confidence of which both make enough labelled answers, nine tenths if they do."""
    shown = (RAW, SERVED) if calibrated else (RAW,)

    def enough(candidate: float) -> tuple[int, float]:
        return min(ENOUGH_LABELS, *(_near(total, which, candidate).labels for which in shown)), -abs(candidate - 0.9)

    chosen = max((tenth / 10 for tenth in range(1, 11)), key=enough)
    return _enough(_near(total, RAW, chosen)), _enough(_near(total, SERVED, chosen))


def _enough(told: Told) -> Told | None:
    return told if told.labels >= LEAST_LABELS else None


def _near(total: Sums, which: str, confidence: float) -> Told:
    middle = round(60 * confidence)
    bins = slice(middle - 3, min(60, middle + 3))
    labels = int(total[f"{which}.labels"][bins].sum())
    right = float(total[f"{which}.right"][bins].sum() / labels) if labels else math.nan
    return Told(confidence, right, labels)


def about(confidence: float) -> str:
    """ "about 90 %", or "more than 95 %" at the end."""
    return f"more than 95{NBSP}%" if confidence > 0.95 else f"about {100 * confidence:.0f}{NBSP}%"


def points(error: float) -> str:
    """A difference of shares in percentage points."""
    value = f"{100 * error:.1f}"
    return f"{value} point{'' if value == '1.0' else 's'}"


def interval(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def short(count: int) -> str:
    """A count in four characters or so: 940, 12.3k, 1.20M."""
    for limit, divisor, unit in ((10_000, 1, ""), (100_000, 1e3, "k"), (1_000_000, 1e3, "k"), (1e15, 1e6, "M")):
        if count < limit:
            value = count / divisor
            return f"{count:,}" if not unit else f"{value:.1f}{unit}" if value < 100 else f"{value:.0f}{unit}"
    return f"{count:.3g}"


def utc(time_ms: int) -> str:
    """A time as it is written where no script makes it the reader's own."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


def lasting(seconds: int) -> str:
    """3600 -> "1 hour", 5400 -> "90 minutes"."""
    unit, size = next((one for one in _UNITS if seconds % one[1] == 0), _UNITS[-1])
    count = seconds // size
    return f"{count} {unit}{'' if count == 1 else 's'}"
