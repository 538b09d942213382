"""What the page knows besides the summaries: which models are served, by which revision, and which others there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.drift.nowcasts import Nowcast
from service.drift.states import Alarm, MonitorState
from service.drift.summary import Summary


@dataclass(frozen=True)
class RevisionFacts:
    """One fit of a model.

    Attributes
    ----------
    created_ms : when it was made
    log_loss : on rows that it was not fitted on, of the model itself and of the revision; NaN where none were held out
    fits : whether it was made of the model file that is served
    """

    revision: str
    kind: str
    created_ms: int
    rows: int
    log_loss: tuple[float, float]
    fits: bool


@dataclass(frozen=True)
class ShadowFacts:
    """A challenger, and how its comparison with what serves stands, or stood when it ended.

    Attributes
    ----------
    champion : what it is compared with
    labels : that it was compared on
    gain : of half the Brier score, with bounds that hold at all times: mean, low, high
    verdict : better, worse or undecided
    automatic_from : labels from which on it is promoted without being asked for; 0: somebody must
    ended, ended_ms : promoted or stopped, and when; empty and 0: it is in shadow
    note : what befell it, in words
    """

    revision: str
    champion: str
    labels: int
    gain: tuple[float, float, float]
    verdict: str
    automatic_from: int = 0
    ended: str = ""
    ended_ms: int = 0
    note: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """A model that is served.

    Attributes
    ----------
    class_names : in their order; empty: they have none
    active, before : the revision that serves, and the one that a roll-back would activate; empty: nothing to go back to
    confidence_level : how often prediction sets are to hold the label; None: the active revision makes none
    kept : whether its predictions are kept in the journal
    """

    name: str
    version: str
    class_names: Sequence[str]
    active: str
    before: str
    confidence_level: float | None
    revisions: Sequence[RevisionFacts]
    kept: bool = True


@dataclass(frozen=True)
class Sources:
    """Where the page reads. Each is called by threads of the HTTP port.

    Attributes
    ----------
    models : those that are served
    summary : of a model, from a time to another in ms; None: nothing was answered yet
    monitors, alarms : of a model; alarms newest first
    accuracy : of what a model serves, as it is now without labels; None: it is not followed
    shadows : of a model, those that have ended too
    """

    models: Callable[[], Sequence[ModelFacts]]
    summary: Callable[[str, int, int], Summary | None]
    monitors: Callable[[str], Sequence[MonitorState]] = lambda _: ()
    alarms: Callable[[str], Sequence[Alarm]] = lambda _: ()
    accuracy: Callable[[str], Nowcast | None] = lambda _: None
    shadows: Callable[[str], Sequence[ShadowFacts]] = lambda _: ()
