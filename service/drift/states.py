"""What monitors and alarms are to those who ask: the wire, the page, the command line. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RAW, SERVED = "raw", "served"
"""What a monitor watches: the model's own probabilities, or those that were served."""
TELL, SUSPEND, ROLL_BACK, REFIT = "tell", "suspend", "roll_back", "refit"
"""What an alarm does besides ringing: nothing; online updates stop; the revision before serves; a fit on the rows since
the change runs in shadow."""


@dataclass(frozen=True)
class MonitorSpec:
    """One monitor, as it was asked for.

    Attributes
    ----------
    name : its own within the model
    detector : the kind of its detector
    watched : RAW or SERVED
    parameters : the detector's keywords
    policy : TELL, SUSPEND, ROLL_BACK or REFIT
    cooldown_rows : rows after an alarm in which it does not ring again
    is_default : made by the server, not by a caller
    baseline_rows : labelled rows whose calibration is taken as given, so that only a change of it rings; 0: none
    """

    model: str
    name: str
    detector: str
    watched: str
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    policy: str = TELL
    cooldown_rows: int = 0
    is_default: bool = False
    baseline_rows: int = 0


@dataclass(frozen=True)
class MonitorState:
    """How far a monitor is.

    Attributes
    ----------
    ready : whether its reference is complete
    statistic, threshold : of the detector; it rings when the first reaches the second
    n_rows, missing, late : rows read since the last reset; whose label did not come in time; that came too late
    alarms : ids of its alarms that nobody has acknowledged
    history : (time in ms, statistic), oldest first, thinned to some hundreds
    false_alarms : the promise in words, with the number of rows for which it holds
    """

    spec: MonitorSpec
    ready: bool
    statistic: float
    threshold: float
    n_rows: int
    missing: int
    late: int
    alarms: Sequence[str]
    history: Sequence[tuple[int, float]]
    false_alarms: str


@dataclass(frozen=True)
class Cause:
    """What is behind an alarm, as far as it can be told.

    Attributes
    ----------
    kind : temperature, class_bias, prior_shift, covariate, concept, score_pipeline or unknown
    where : the class or segment that it is in, empty: everywhere
    evidence : sentences with the numbers that say so
    action : what to do about it, in a sentence
    """

    kind: str
    where: str
    evidence: Sequence[str]
    action: str


@dataclass(frozen=True)
class Alarm:
    """A monitor rang.

    Attributes
    ----------
    time_ms : when the row was predicted that it rang at
    noticed_ms : when it rang
    since_ms, since_rows : when the change is estimated to have come, and how many rows before the alarm
    statistic, threshold : at the alarm
    revision : what was active
    cause : None until it is told
    policy, outcome : what was to be done, and what became of it, in words
    acknowledged_by, acknowledged_ms : whose token said when that it was seen; zero: nobody yet
    evidence : what the statistic was made of, as the detector says
    repeats, repeated_ms : how often the monitor rang again before anybody had seen it, and the last time
    """

    id: str
    model: str
    monitor: str
    watched: str
    time_ms: int
    noticed_ms: int
    since_ms: int
    since_rows: int
    statistic: float
    threshold: float
    revision: str
    cause: Cause | None
    policy: str
    outcome: str
    acknowledged_by: str
    acknowledged_ms: int
    evidence: Mapping[str, float] = field(default_factory=dict)
    repeats: int = 0
    repeated_ms: int = 0
