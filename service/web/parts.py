"""The sections of a model's page. Every word of it goes through `tag`, which escapes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calibrators.plots._style import percent
from service.drift.states import RAW, SERVED, Alarm, MonitorState
from service.drift.summary import GROUP_FIELDS, Groups, Summary, Sums
from service.web import figures, words
from service.web.facts import ModelFacts, NowCast, RevisionFacts
from service.web.markup import Html, Part, data, tag

NO_REVISION = "none"
SHOWN_GROUPS = 6
SHOWN_ALARMS = 8
SHOWN_REVISIONS = 8
SEGMENT_WORDS = {"": "(no segment)"}


@dataclass(frozen=True)
class View:
    """All that a model's page shows.

    Attributes
    ----------
    window : "24h", as it was asked for
    charts : whether there is a script that draws them
    """

    model: ModelFacts
    summary: Summary | None
    monitors: Sequence[MonitorState]
    alarms: Sequence[Alarm]
    nowcasts: Sequence[NowCast]
    window: str
    charts: bool

    @property
    def calibrated(self) -> bool:
        """Whether what is served is something else than the model's own, now or in part of the window."""
        return self.model.active != NO_REVISION or bool(self.summary and _differs(self.summary.total))

    @property
    def total(self) -> Sums | None:
        return self.summary.total if self.summary else None

    @property
    def ringing(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if not alarm.acknowledged_by]

    @property
    def verdict(self) -> words.Verdict:
        model = self.model
        return words.verdict(model.name, self.total, calibrated=self.calibrated, kept=model.kept, alarms=self.alarms)

    @property
    def in_window(self) -> list[Alarm]:
        since = self.summary.since_ms if self.summary else 0
        return [alarm for alarm in self.alarms if alarm.time_ms >= since]


def sections(view: View) -> list[Html]:
    makers: tuple[Callable[[View], Html | None], ...] = (
        hero,
        ringing,
        tiles,
        reliability,
        over_time,
        where,
        monitors,
        alarms,
        revisions,
        glossary,
    )
    return [section for make in makers if (section := make(view)) is not None]


# ---------------------------------------------------------------------------------------------- the verdict


def hero(view: View) -> Html:
    verdict, model = view.verdict, view.model
    active = "no calibrator serves" if model.active == NO_REVISION else tag("span", model.active, " serves")
    return tag(
        "section",
        tag("p", pill(verdict), tag("span", f"version {model.version}"), tag("span", active), class_="eyebrow"),
        tag("h1", headline(view), class_="verdict"),
        tag("div", told(verdict, view.calibrated), class_="scales") if verdict.raw or verdict.served else None,
        tag("p", verdict.sentence, " ", _nowcast(view.nowcasts), class_="quiet"),
        id="verdict",
        class_=f"hero {verdict.mood}",
    )


def pill(verdict: words.Verdict) -> Html:
    return tag("b", verdict.label, class_=f"pill {verdict.mood}")


def headline(view: View) -> Part:
    name, verdict = tag("span", view.model.name, class_="name"), view.verdict
    raw, served = verdict.raw, verdict.served
    first = raw or served
    if first is None:
        return [name, ": ", "waiting for labels" if verdict.label == "too few labels" else "nothing to judge yet"]
    if raw is None or served is None or not view.calibrated:
        return ["When ", name, f" says {words.about(first.said)}, it is right ", _share(first), " of the time."]
    return [
        "When ",
        name,
        f" says {words.about(raw.said)}, it is right ",
        _share(raw),
        " of the time. ",
        tag("span", "As served: ", _share(served), ".", class_="served"),
    ]


def _share(told: words.Told) -> Html:
    low, high = figures.wilson(told.right * told.labels, told.labels)
    off = "over" if high < told.said - words.NEARBY / 2 else "under" if low > told.said + words.NEARBY / 2 else "good"
    return tag("b", f"{100 * told.right:.0f}{words.NBSP}%", class_=f"share {off}")


def told(verdict: words.Verdict, calibrated: bool) -> list[Html]:
    """A scale from 0 to 100 % for each forecaster: where it should be, and where it is."""
    rows = [("the model itself", verdict.raw, "raw")]
    rows += [("as served", verdict.served, "served")] if calibrated else []
    return [
        tag(
            "div",
            tag("span", name, class_="who"),
            scale(one.said, one.right, one.labels, style),
            tag("span", f"{one.labels:,} answers", class_="count"),
            class_="scale-row",
        )
        for name, one, style in rows
        if one is not None
    ]


def scale(said: float, right: float, labels: float, style: str = "served") -> Html:
    """From what was said (a tick) to what came true (a dot), with its interval."""
    low, high = figures.wilson(right * labels, labels)
    off = "over" if high < said else "under" if low > said else "good"
    label = (
        f"said {percent(said)}, right {percent(right)}, with {int(labels)} labels between {words.interval(low, high)}"
    )
    return tag(
        "svg",
        tag("line", x1="0%", x2="100%", y1="11", y2="11", class_="track"),
        tag("line", x1=_at(low), x2=_at(high), y1="11", y2="11", class_="range"),
        tag("line", x1=_at(said), x2=_at(right), y1="11", y2="11", class_=f"gap {off}"),
        tag("line", x1=_at(said), x2=_at(said), y1="3", y2="19", class_="tick"),
        tag("circle", cx=_at(right), cy="11", r="5.5", class_=f"dot {style} {off}"),
        class_="scale",
        height="22",
        role="img",
        aria_label=label,
    )


def _at(share: float) -> str:
    return f"{1 + 98 * min(1.0, max(0.0, share)):.2f}%"


def _nowcast(nowcasts: Sequence[NowCast]) -> Part:
    return [
        tag(
            "span",
            f"{one.what} now, without waiting for labels: {percent(one.value)} ({words.interval(one.low, one.high)})"
            if one.valid
            else f"{one.what} cannot be told without labels now: {one.why}.",
            class_="nowcast",
        )
        for one in nowcasts
    ]


def ringing(view: View) -> Html | None:
    """What is wrong, what is behind it and what to do, first of all."""
    if not view.ringing:
        return None
    return tag(
        "section", [_alarm(alarm, view.model.name) for alarm in view.ringing[:3]], id="ringing", class_="ringing"
    )


def _alarm(alarm: Alarm, model: str) -> Html:
    cause = alarm.cause
    kind = words.KINDS.get(cause.kind, cause.kind) if cause else "the cause is being looked for"
    place = f" in {cause.where}" if cause and cause.where else ""
    whose = "The model's own probabilities" if alarm.watched == RAW else "The served probabilities"
    since: Part = None
    if alarm.since_ms:
        since = [" It began about ", when(alarm.since_ms), f", {alarm.since_rows:,} answers before the alarm."]
    return tag(
        "article",
        tag("h2", f"{whose} have drifted", place),
        tag("p", tag("b", kind[:1].upper() + kind[1:], "."), since),
        tag("ul", [tag("li", one) for one in cause.evidence]) if cause and cause.evidence else None,
        tag("p", tag("b", "What to do: "), cause.action) if cause and cause.action else None,
        tag(
            "p",
            f"Monitor {alarm.monitor} rang ",
            when(alarm.time_ms),
            f"; policy {alarm.policy}",
            ": " if alarm.outcome else "",
            alarm.outcome,
            ".",
            class_="quiet",
        ),
        command(f"calserve alarms acknowledge {shlex.quote(model)} {shlex.quote(alarm.id)}"),
        class_="rang",
    )


# ------------------------------------------------------------------------------------------------ figures


def tiles(view: View) -> Html | None:
    total = view.total
    if total is None or not total.answers:
        return None
    which = SERVED if view.calibrated else RAW
    share = f"{percent(total.labels / total.answers)} of them have a label by now"
    found = [tile("Answers", words.short(total.answers), share)]
    if total.labels:
        ends = figures.wilson(float(total[f"{which}.right"].sum()), total.labels)
        found.append(tile("Right", percent(total.accuracy(which)), f"{words.interval(*ends)}, accuracy"))
        found.append(
            _pair("Off by", view, total.calibration_error, lambda x: f"{100 * x:.1f}", "points, calibration error")
        )
        found.append(_pair("Log loss", view, total.log_loss, lambda x: f"{x:.3f}", "lower is better"))
    if total["sets"][0] and view.model.confidence_level is not None:
        asked = f"{percent(view.model.confidence_level)} asked for, {total.mean_set_size:.1f} labels a set"
        found.append(tile("Sets hold the label", percent(total.coverage), asked))
    return tag("section", found, id="tiles", class_="tiles")


def tile(name: str, value: Part, note: Part) -> Html:
    return tag("div", tag("span", name), tag("strong", value), tag("small", note), class_="tile")


def _pair(name: str, view: View, of: Callable[[str], float], written: Callable[[float], str], note: str) -> Html:
    """Of the model itself and as served."""
    if not view.calibrated:
        return tile(name, written(of(RAW)), note)
    raw = tag("s", written(of(RAW)), title="the model itself")
    return tile(name, [raw, tag("span", " → ", class_="arrow"), written(of(SERVED))], note)


def figure(view: View, title: str, caption: str, drawn: Callable[[], figures.Figure], size: str = "wide") -> Html:
    plot: Part = tag("p", "The picture needs plotly on the server: pip install 'calserve[page]'", class_="quiet")
    if view.charts:
        plot = [tag("div", class_=f"plot {size}", role="img", aria_label=f"{title}: {caption}"), data(drawn())]
    return tag("figure", tag("figcaption", tag("h3", title), tag("small", caption)), plot, class_="card")


def reliability(view: View) -> Html | None:
    total = view.total
    if total is None or not total.answers:
        return None
    shown = []
    if total.labels:
        shown.append(
            figure(
                view,
                "What it says, and how often it is right",
                "Honest dots lie on the dotted line, in the grey.",
                lambda: figures.reliability(total, calibrated=view.calibrated),
                "square",
            )
        )
    column = [
        figure(
            view,
            "How sure it is",
            "Its confidence, of all answers, with or without a label.",
            lambda: figures.confidences(total, calibrated=view.calibrated),
            "short",
        )
    ]
    if total.sets:
        column.append(
            figure(
                view,
                "How large the sets are",
                "Labels in each; the fewer, the more a set says.",
                lambda: figures.set_sizes(total),
                "short",
            )
        )
    key = [("dot raw", "the model itself"), ("band", "where chance would put an honest model")]
    if view.calibrated:
        key.insert(1, ("dot served", "as served"))
    return tag(
        "section",
        heading("Is it honest?"),
        legend(key),
        tag("div", shown, tag("div", column, class_="column"), class_="grid two"),
        id="reliability",
    )


def over_time(view: View) -> Html | None:
    summary, calibrated = view.summary, view.calibrated
    if summary is None or not summary.points:
        return None
    points, rang = summary.points, view.in_window
    shown = []
    if len(figures.enough(points)) > 0:
        shown += [
            figure(
                view,
                "Calibration error",
                "How far confidence is from the truth; in the grey it is chance.",
                lambda: figures.error_over_time(points, rang, calibrated=calibrated),
            ),
            figure(
                view,
                "Right, and said to be right",
                "Black: how often it is right. Lines above it promise too much.",
                lambda: figures.right_over_time(points, rang, calibrated=calibrated),
            ),
            figure(
                view,
                "Log loss",
                "The price of each answer: high where it was sure and wrong.",
                lambda: figures.loss_over_time(points, rang, calibrated=calibrated),
            ),
        ]
    level = view.model.confidence_level
    if level is not None and summary.total["sets"][0] >= figures.LEAST_LABELS:
        shown.append(
            figure(
                view,
                "Sets that hold the label",
                f"Asked for: {percent(level)}, the dashed line.",
                lambda: figures.coverage_over_time(points, rang, level),
            )
        )
    shown.append(
        figure(
            view,
            "Answers",
            "Violet: those whose label is known by now.",
            lambda: figures.answers_over_time(points, rang),
        )
    )
    key = [("line raw", "the model itself")]
    key += [("line served", "as served")] if calibrated else []
    key += [("line alarm", "an alarm"), ("line begun", "where the change began, as reckoned")] if rang else []
    return tag("section", heading("Over time"), legend(key), tag("div", shown, class_="grid two"), id="over-time")


def legend(key: Iterable[tuple[str, str]]) -> Html:
    return tag("ul", [tag("li", tag("i", class_=style), meaning) for style, meaning in key], class_="key")


def heading(text: str, note: Part = None) -> Html:
    return tag("header", tag("h2", text), tag("p", note, class_="quiet") if note else None)


# --------------------------------------------------------------------------------------------- where it is off


@dataclass(frozen=True)
class Off:
    """A class or a segment that is off by more than chance explains: `weight` is its share of all that is off."""

    name: str
    said: float
    right: float
    labels: int
    weight: float


def where(view: View) -> Html | None:
    summary = view.summary
    if summary is None or summary.total.labels < words.ENOUGH_LABELS:
        return None
    first = 3 if view.calibrated else 0
    classes = worst(_class_names(view.model, len(summary.groups.classes)), summary.groups.classes[:, first : first + 3])
    parts = [
        tag(
            "div",
            tag("h3", "Classes"),
            _off_table(classes, "answer") or tag("p", "No class is off by more than chance explains.", class_="quiet"),
            class_="card",
        ),
        _unlike(view, summary.groups),
    ]
    segments = {
        name: values for name, values in summary.groups.segments.items() if name or len(summary.groups.segments) > 1
    }
    if segments:
        stacked = np.array([values[first : first + 3] for values in segments.values()])
        names = [SEGMENT_WORDS.get(name, name) for name in segments]
        table = _off_table(worst(names, stacked), "segment")
        none = tag("p", "No segment is off by more than chance explains.", class_="quiet")
        parts.insert(1, tag("div", tag("h3", "Segments"), table or none, class_="card"))
    whose = "as served" if view.calibrated else "by the model itself"
    return tag(
        "section",
        heading(
            "Where it is off",
            [
                "What was promised ",
                whose,
                ", counted from ",
                when(summary.groups_since_ms),
                " on. A tick is what was said, a dot what came true.",
            ],
        ),
        tag("div", parts, class_="grid two"),
        id="where",
    )


def worst(names: Sequence[str], sums: np.ndarray) -> list[Off]:
    """Those off by more than two standard deviations of chance and half a point, the most harmful first."""
    found = []
    for name, (labels, said, right) in zip(names, sums.tolist(), strict=True):
        if labels >= 20:
            mean = min(1.0, said / labels)
            chance = 2.5 * math.sqrt(mean * (1 - mean) / labels)
            gap = abs(said - right) / labels
            if gap > max(chance, 0.005):
                found.append(Off(name, mean, right / labels, int(labels), abs(said - right)))
    return sorted(found, key=lambda one: -one.weight)[:SHOWN_GROUPS]


def _off_table(rows: Sequence[Off], what: str) -> Html | None:
    if not rows:
        return None
    head = tag("thead", tag("tr", [tag("th", text, scope="col") for text in (what, "", "said", "right", "labels")]))
    body = [
        tag(
            "tr",
            tag("th", one.name, scope="row"),
            tag("td", scale(one.said, one.right, one.labels), class_="wide"),
            tag("td", percent(one.said)),
            tag("td", tag("b", percent(one.right), class_=_side(one.said, one.right))),
            tag("td", f"{one.labels:,}"),
        )
        for one in rows
    ]
    return tag("div", tag("table", head, tag("tbody", body), class_="off"), class_="scroll")


def _unlike(view: View, groups: Groups) -> Html | None:
    """Classes that come more or less often than their probabilities say."""
    promised, came = groups.classes[:, GROUP_FIELDS.index("promised")], groups.classes[:, GROUP_FIELDS.index("came")]
    labels = came.sum()
    share = promised / max(labels, 1)
    chance = 3 * np.sqrt(np.clip(share * (1 - share), 0, None) / max(labels, 1))
    gap = np.abs(promised - came) / max(labels, 1)
    chosen = [k for k in np.argsort(-gap, kind="stable").tolist() if gap[k] > max(chance[k], 0.002)][:SHOWN_GROUPS]
    if not chosen:
        return None
    names = _class_names(view.model, len(came))
    head = tag("thead", tag("tr", [tag("th", text, scope="col") for text in ("class", "promised", "came")]))
    body = [
        tag(
            "tr",
            tag("th", names[k], scope="row"),
            tag("td", percent(share[k])),
            tag("td", tag("b", percent(came[k] / labels), class_=_side(share[k], came[k] / labels))),
        )
        for k in chosen
    ]
    return tag(
        "div",
        tag("h3", "More or less common than promised"),
        tag("div", tag("table", head, tag("tbody", body)), class_="scroll"),
        class_="card",
    )


def _class_names(model: ModelFacts, n_classes: int) -> Sequence[str]:
    return model.class_names if len(model.class_names) == n_classes else [f"class {k}" for k in range(n_classes)]


def _side(said: float, right: float) -> str:
    return "over" if right < said else "under"


# -------------------------------------------------------------------------------------- monitors and revisions


def monitors(view: View) -> Html | None:
    if not view.monitors:
        return None
    ordered = sorted(view.monitors, key=lambda one: (not one.alarms, not one.ready, one.spec.watched, one.spec.name))
    note = "Each gathers evidence that something has changed, row by row, and rings when it reaches the dashed line."
    return tag(
        "section",
        heading("What watches it", note),
        tag("div", [_monitor(view, one) for one in ordered], class_="grid three"),
        id="monitors",
    )


def _monitor(view: View, monitor: MonitorState) -> Html:
    spec = monitor.spec
    state, mood = (
        ("ringing", "alarm") if monitor.alarms else ("quiet", "good") if monitor.ready else ("learning", "unknown")
    )
    plot: Part = None
    if monitor.ready and monitor.history and view.charts:
        said = f"{spec.name}: {monitor.statistic:.2f} of {monitor.threshold:.2f}"
        plot = [tag("div", class_="plot small", role="img", aria_label=said), data(figures.evidence(monitor))]
    counts = [f"{monitor.n_rows:,} rows"]
    counts += [f"{monitor.missing:,} without a label in time"] if monitor.missing else []
    counts += [f"{monitor.late:,} labels too late"] if monitor.late else []
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("h3", spec.name, " ", tag("b", state, class_=f"pill {mood}")),
            tag(
                "small",
                "the model itself" if spec.watched == RAW else "as served",
                " · ",
                spec.detector.replace("_", " "),
            ),
        ),
        plot
        if monitor.ready
        else tag("p", "It is still gathering the quiet rows that it compares with.", class_="quiet"),
        tag("small", monitor.false_alarms[:1].upper(), monitor.false_alarms[1:], class_="promise"),
        tag("small", " · ".join(counts)),
        class_=f"card monitor {mood}",
    )


def alarms(view: View) -> Html | None:
    if not view.alarms:
        return None
    head = tag(
        "thead", tag("tr", [tag("th", text, scope="col") for text in ("rang", "monitor", "cause", "what became of it")])
    )
    body = [
        tag(
            "tr",
            tag("th", when(one.time_ms), scope="row"),
            tag("td", one.monitor),
            tag(
                "td",
                words.KINDS.get(one.cause.kind, one.cause.kind) if one.cause else "not told yet",
                f" ({one.cause.where})" if one.cause and one.cause.where else None,
            ),
            tag("td", one.outcome or one.policy, f"; seen by {one.acknowledged_by}" if one.acknowledged_by else None),
        )
        for one in view.alarms[:SHOWN_ALARMS]
    ]
    more = len(view.alarms) - SHOWN_ALARMS
    return tag(
        "section",
        heading("Alarms", f"The last {SHOWN_ALARMS} of {len(view.alarms)}." if more > 0 else None),
        tag("div", tag("div", tag("table", head, tag("tbody", body), class_="left"), class_="scroll"), class_="card"),
        id="alarms",
    )


def revisions(view: View) -> Html:
    model = view.model
    name = shlex.quote(model.name)
    rows = [_revision(one, one.revision == model.active) for one in model.revisions[:SHOWN_REVISIONS]]
    head = ("revision", "fitted", "rows", "log loss before", "after")
    table = tag("table", tag("thead", tag("tr", [tag("th", text, scope="col") for text in head])), tag("tbody", rows))
    if model.before:
        to = "the model's own probabilities" if model.before == NO_REVISION else model.before
        back: Part = [tag("p", "To go back to ", tag("b", to), ", type:"), command(f"calserve rollback {name}")]
    elif model.revisions:
        newest = model.revisions[0].revision
        back = [tag("p", "To make one serve, type:"), command(f"calserve activate {name} {shlex.quote(newest)}")]
    else:
        back = [
            tag("p", "None was fitted yet. To fit one on labelled rows, type:"),
            command(f"calserve fit {name} --kind auto --data rows.npz --activate"),
        ]
    more = len(model.revisions) - SHOWN_REVISIONS
    return tag(
        "section",
        heading("Revisions"),
        tag(
            "div",
            tag("div", table, class_="scroll") if rows else None,
            tag("p", f"and {more} older ones", class_="quiet") if more > 0 else None,
            back,
            class_="card",
        ),
        id="revisions",
    )


def _revision(one: RevisionFacts, active: bool) -> Html:
    before, after = ("" if math.isnan(value) else f"{value:.4f}" for value in one.log_loss)
    mark = tag("b", "serves", class_="pill good") if active else None
    other = None if one.fits else tag("small", " of another model file")
    return tag(
        "tr",
        tag("th", one.revision, " ", mark, other, scope="row"),
        tag("td", when(one.created_ms)),
        tag("td", f"{one.rows:,}"),
        tag("td", before),
        tag("td", after),
        class_="active" if active else None,
    )


def command(text: str) -> Html:
    return tag(
        "div", tag("code", text), tag("button", "copy", type="button", class_="copy", hidden=True), class_="command"
    )


def when(time_ms: int) -> Html:
    return tag("time", words.utc(time_ms), datetime=words.iso(time_ms))


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


def _differs(total: Sums) -> bool:
    return not np.allclose(total[f"{RAW}.answers"], total[f"{SERVED}.answers"]) or not math.isclose(
        float(total[f"{RAW}.log_loss"][0]), float(total[f"{SERVED}.log_loss"][0]), rel_tol=1e-6, abs_tol=1e-6
    )
