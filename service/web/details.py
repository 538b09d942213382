"""The sections further down a model's page: where it is off, what watches it, what rang, challengers, revisions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibrators.plots._style import percent
from service.drift.states import RAW, Alarm, MonitorState
from service.drift.summary import GROUP_FIELDS, Groups
from service.web import figures, words
from service.web.elements import command, heading, scale, table, when
from service.web.facts import RevisionFacts, ShadowFacts
from service.web.markup import Html, Part, data, tag
from service.web.view import NO_REVISION, View

SHOWN_GROUPS = 6
SHOWN_ALARMS = 8
SHOWN_SHADOWS = 8
SHOWN_REVISIONS = 8
LEAST_LABELS = 50
"""Of a class or a segment that is judged."""
CHANCE = 3.0
"""Standard deviations up to which a gap is put down to chance: of hundreds of classes some are off by two."""
LEAST_GAP = 0.005
NO_SEGMENT = "(none named)"


# --------------------------------------------------------------------------------------------- where it is off


@dataclass(frozen=True)
class Off:
    """A class or a segment that is off by more than chance explains; `rows` is how many rows' worth that is."""

    name: str
    said: float
    right: float
    labels: int
    rows: float


def where(view: View) -> Html | None:
    summary = view.summary
    if summary is None or summary.total.labels < words.ENOUGH_LABELS:
        return None
    groups, first = summary.groups, 3 if view.calibrated else 0
    judged = slice(first, first + 3)
    names = _class_names(view, len(groups.classes))
    parts = [_off("Classes", "answer", worst(names, groups.classes[:, judged]))]
    if any(groups.segments):
        segments = np.array([values[judged] for values in groups.segments.values()])
        named = [name or NO_SEGMENT for name in groups.segments]
        parts.append(_off("Segments", "segment", worst(named, segments)))
    whose = "as served" if view.calibrated else "by the model itself"
    note = ["What was promised ", whose, ", counted from ", when(summary.groups_since_ms), " on. "]
    note.append("A tick is what was said, a dot what came true.")
    parts += _unlike(names, groups)
    return tag("section", heading("Where it is off", note), tag("div", parts, class_="grid two"), id="where")


def worst(names: Sequence[str], sums: np.ndarray) -> list[Off]:
    """Those off by more than chance explains, the most harmful first; `sums` are labels, said and right of each."""
    found = []
    for name, (labels, said, right) in zip(names, sums.tolist(), strict=True):
        share = min(1.0, said / max(labels, 1.0))
        gap, chance = abs(said - right), CHANCE * math.sqrt(labels * share * (1 - share))
        if labels >= LEAST_LABELS and gap > max(chance, LEAST_GAP * labels):
            found.append(Off(name, share, right / labels, int(labels), gap))
    return sorted(found, key=lambda one: -one.rows)[:SHOWN_GROUPS]


def _off(title: str, what: str, found: Sequence[Off]) -> Html:
    none = tag("p", "None is off by more than chance explains.", class_="quiet")
    rows = [
        (
            one.name,
            scale(one.said, one.right, one.labels),
            percent(one.said),
            _came(one.said, one.right),
            f"{one.labels:,}",
        )
        for one in found
    ]
    shown = table((what, "", "said", "right", "labels"), rows, "off") if found else none
    return tag("div", tag("h3", title), shown, class_="card")


def _unlike(names: Sequence[str], groups: Groups) -> list[Html]:
    """Classes that come more or less often than their probabilities say."""
    promised, came = (groups.classes[:, GROUP_FIELDS.index(name)] for name in ("promised", "came"))
    labels = max(float(came.sum()), 1.0)
    share = np.clip(promised / labels, 0, 1)
    gap, chance = np.abs(promised - came) / labels, CHANCE * np.sqrt(share * (1 - share) / labels)
    off = np.argsort(-gap, kind="stable")
    chosen = [k for k in off.tolist() if gap[k] > max(chance[k], LEAST_GAP)][:SHOWN_GROUPS]
    if not chosen:
        return []
    rows = [(names[k], percent(share[k]), _came(share[k], came[k] / labels)) for k in chosen]
    shown = table(("class", "promised", "came"), rows)
    return [tag("div", tag("h3", "More or less common than promised"), shown, class_="card")]


def _came(said: float, right: float) -> Html:
    return tag("b", percent(right), class_="over" if right < said else "under")


def _class_names(view: View, n_classes: int) -> Sequence[str]:
    names = view.model.class_names
    return names if len(names) == n_classes else [f"class {k}" for k in range(n_classes)]


# ------------------------------------------------------------------------------------------ monitors and alarms


def monitors(view: View) -> Html | None:
    if not view.monitors:
        return None
    ordered = sorted(view.monitors, key=lambda one: (not one.alarms, not one.ready, one.spec.watched, one.spec.name))
    note = "Each gathers evidence that something has changed, row by row, and rings when it reaches the dashed line."
    cards = [_monitor(one, charts=view.charts) for one in ordered]
    return tag("section", heading("What watches it", note), tag("div", cards, class_="grid three"), id="monitors")


def _monitor(monitor: MonitorState, *, charts: bool) -> Html:
    spec, promise = monitor.spec, monitor.false_alarms
    state, mood = "learning", "unknown"
    if monitor.ready:
        state, mood = ("ringing", "alarm") if monitor.alarms else ("quiet", "good")
    counts = [f"{monitor.n_rows:,} rows"]
    counts += [f"{monitor.missing:,} without a label in time"] if monitor.missing else []
    counts += [f"{monitor.late:,} labels too late"] if monitor.late else []
    watched = "the model itself" if spec.watched == RAW else "as served"
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("h3", spec.name, " ", tag("b", state, class_=f"pill {mood}")),
            tag("small", watched, " · ", spec.detector.replace("_", " ")),
        ),
        _evidence(monitor) if charts and monitor.ready and monitor.history else None,
        None if monitor.ready else tag("p", "It still gathers the quiet rows that it compares with.", class_="quiet"),
        tag("small", promise[:1].upper(), promise[1:], class_="promise"),
        tag("small", " · ".join(counts)),
        class_=f"card monitor {mood}",
    )


def _evidence(monitor: MonitorState) -> list[Html]:
    label = f"{monitor.spec.name}: {monitor.statistic:.2f}, rings at {monitor.threshold:.2f}"
    return [tag("div", class_="plot small", role="img", aria_label=label), data(figures.evidence(monitor))]


def alarms(view: View) -> Html | None:
    if not view.alarms:
        return None
    more = len(view.alarms) - SHOWN_ALARMS
    note = f"The last {SHOWN_ALARMS} of {len(view.alarms)}." if more > 0 else None
    rows = [(when(one.time_ms), one.monitor, _cause(one), _outcome(one)) for one in view.alarms[:SHOWN_ALARMS]]
    shown = table(("rang", "monitor", "cause", "what became of it"), rows, "left stack")
    return tag("section", heading("Alarms", note), tag("div", shown, class_="card"), id="alarms")


def _cause(alarm: Alarm) -> str:
    if alarm.cause is None:
        return "not told yet"
    place = f" ({alarm.cause.where})" if alarm.cause.where else ""
    return words.KINDS.get(alarm.cause.kind, alarm.cause.kind) + place


def _outcome(alarm: Alarm) -> str:
    seen = "; seen" if alarm.acknowledged_ms else ""
    seen += f" by {alarm.acknowledged_by}" if alarm.acknowledged_by else ""
    return (alarm.outcome or alarm.policy) + seen


# -------------------------------------------------------------------------------------------------- in shadow

MOODS = {"better": "good", "worse": "off"}


def shadows(view: View) -> Html | None:
    shown = view.in_shadow[:SHOWN_SHADOWS]
    if not shown:
        return None
    note = (
        "These revisions are given what callers send, and are compared with what serves, label by label. The gain is "
        "of half the Brier score, above 0 where the challenger is better; its bounds hold however often one looks."
    )
    heads = ("challenger", "compared with", "labels", "gain", "verdict")
    name = shlex.quote(view.model.name)
    ready = [one for one in shown if one.verdict == "better" and not one.ended and not one.automatic_from]
    ways = [
        [tag("p", "To make ", tag("b", one.revision), " serve, type:"),
         command(f"calserve shadow promote {name} {shlex.quote(one.revision)}")]
        for one in ready
    ]  # fmt: skip
    card = tag("div", table(heads, map(_shadow, shown), "stack"), ways, class_="card")
    return tag("section", heading("In shadow", note), card, id="shadows")


def _shadow(one: ShadowFacts) -> list[Part]:
    mean, low, high = one.gain
    gain: Part = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", words.MINUS)
    if one.labels < words.ENOUGH_LABELS:
        gain = tag("small", f"told from {words.ENOUGH_LABELS} labels on")
    verdict = tag("b", one.verdict, class_=f"pill {MOODS.get(one.verdict, 'unknown')}")
    return [[tag("span", one.revision), *_fate(one)], one.champion, f"{one.labels:,}", gain, verdict]


def _fate(one: ShadowFacts) -> list[Part]:
    """What became of it, or will."""
    if one.ended:
        said: list[Part] = [f"{one.ended} ", when(one.ended_ms)]
    elif one.automatic_from:
        said = [f"promoted by itself once better on {one.automatic_from:,} labels"]
    else:
        said = []
    said += [f"{'; ' if said else ''}{one.note}"] if one.note else []
    return [" ", tag("small", said)] if said else []


# -------------------------------------------------------------------------------------------------- revisions


def revisions(view: View) -> Html:
    model = view.model
    heads = ("revision", "fitted", "rows", "log loss before", "after")
    rows = [_revision(one, one.revision == model.active) for one in model.revisions[:SHOWN_REVISIONS]]
    more = len(model.revisions) - SHOWN_REVISIONS
    card = tag(
        "div",
        table(heads, rows, "stack") if rows else None,
        tag("p", f"and {more} older ones", class_="quiet") if more > 0 else None,
        _way_back(view),
        class_="card",
    )
    return tag("section", heading("Revisions"), card, id="revisions")


def _revision(one: RevisionFacts, active: bool) -> list[Part]:
    before, after = ("" if math.isnan(value) else f"{value:.4f}" for value in one.log_loss)
    mark = tag("b", "serves", class_="pill good") if active else None
    other = None if one.fits else tag("small", " of another model file")
    return [[tag("span", one.revision), " ", mark, other], when(one.created_ms), f"{one.rows:,}", before, after]


def _way_back(view: View) -> Part:
    """What to type to make another revision serve."""
    model, name = view.model, shlex.quote(view.model.name)
    if model.before:
        to = "the model's own probabilities" if model.before == NO_REVISION else model.before
        return [tag("p", "To go back to ", tag("b", to), ", type:"), command(f"calserve rollback {name}")]
    if model.revisions:
        newest = shlex.quote(model.revisions[0].revision)
        return [tag("p", "To make one serve, type:"), command(f"calserve activate {name} {newest}")]
    fit = command(f"calserve fit {name} --kind auto --data rows.npz --activate")
    return [tag("p", "None was fitted yet. To fit one on labelled rows, type:"), fit]


# --------------------------------------------------------------------------------------------------- glossary


def glossary(_: View) -> Html:
    terms = [part for term, meaning in GLOSSARY.items() for part in (tag("dt", term), tag("dd", meaning))]
    return tag("section", tag("details", tag("summary", "What the words mean"), tag("dl", terms)), id="glossary")


GLOSSARY = {
    "Confidence": "The probability that the model gives to its answer.",
    "Honest": "Of all answers given with 80 %, 80 % are right. Overconfident: fewer are. Underconfident: more are.",
    "The model itself, as served": "What the model computes, and what callers get: the same after the active "
    "calibrator, a small correction learned from labelled rows.",
    "Calibration error": "How far confidence lies from the share of right answers, on average over groups of answers "
    "of like confidence, in percentage points (expected calibration error, ECE). Chance alone makes some, the more the "
    "fewer labels.",
    "Log loss": "The price of an answer: small if the class that came true had a high probability, large if a low one.",
    "Set": "Several labels instead of one, as many as it takes to hold the right one as often as asked for.",
    "Label": "What turned out to be right. Labels come later, and count for the time at which the answer was given: "
    "the newest stretches wait for some of theirs.",
    "Monitor, alarm": "A monitor gathers evidence against “nothing has changed”. It rings when there is so much that "
    "it would be rarer than its promise says if nothing had.",
}
