"""The sections of a model's page. Every word of it goes through `tag`, which escapes."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from calibrators.plots._style import percent
from service.drift.nowcasts import Nowcast
from service.drift.states import RAW, SERVED, Alarm
from service.web import figures, words
from service.web.details import alarms, glossary, monitors, revisions, shadows, where
from service.web.elements import command, figure, heading, legend, pill, prose, scale, tile, when
from service.web.markup import Html, Part, tag
from service.web.view import NO_REVISION, View

SHOWN_ALARMS = 3
NOTED = 20
"""A window that begins later than was asked for, by more than a part of so many, says so."""


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
        shadows,
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
        tag("p", verdict.sentence, " ", _now(view.accuracy) if view.accuracy else None, class_="quiet"),
        [tag("p", "To send them, type:"), command(f"calserve label {shlex.quote(model.name)} --csv labels.csv")]
        if verdict.label == "too few labels"
        else None,
        id="verdict",
        class_=f"hero {verdict.mood}",
    )


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


def _now(accuracy: Nowcast) -> Html:
    if accuracy.valid:
        found = f"{percent(accuracy.estimate)} ({words.interval(accuracy.low, accuracy.high)})"
        return tag("span", f"Right now, without waiting for labels: {found}.", class_="nowcast")
    return tag(
        "span", f"How often it is right now cannot be told before labels come. {accuracy.why_not}", class_="nowcast"
    )


def ringing(view: View) -> Html | None:
    """What is wrong, what is behind it and what to do, first of all."""
    if not view.ringing:
        return None
    return tag(
        "section",
        [_alarm(alarm, view.model.name) for alarm in view.ringing[:SHOWN_ALARMS]],
        id="ringing",
        class_="ringing",
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
        tag("ul", [tag("li", prose(one)) for one in cause.evidence]) if cause and cause.evidence else None,
        tag("p", tag("b", "What to do: "), prose(cause.action)) if cause and cause.action else None,
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
    if total.labels >= words.ENOUGH_LABELS:
        ends = figures.wilson(float(total[f"{which}.right"].sum()), total.labels)
        found.append(tile("Right", percent(total.accuracy(which)), f"{words.interval(*ends)}, accuracy"))
        found.append(
            _pair("Off by", view, total.calibration_error, lambda x: f"{100 * x:.1f}", "points, calibration error")
        )
        found.append(_pair("Log loss", view, total.log_loss, lambda x: f"{x:.3f}", "lower is better"))
    if total["sets"][0] >= words.ENOUGH_LABELS and view.model.confidence_level is not None:
        asked = f"{percent(view.model.confidence_level)} asked for, {total.mean_set_size:.1f} labels a set"
        found.append(tile("Sets hold the label", percent(total.coverage), asked))
    return tag("section", found, id="tiles", class_="tiles")


def _pair(name: str, view: View, of: Callable[[str], float], written: Callable[[float], str], note: str) -> Html:
    """Of the model itself and as served."""
    if not view.calibrated:
        return tile(name, written(of(RAW)), note)
    raw = tag("s", written(of(RAW)), title="the model itself")
    return tile(name, [raw, tag("span", " → ", class_="arrow"), written(of(SERVED))], note)


def reliability(view: View) -> Html | None:
    total = view.total
    if total is None or not total.answers:
        return None
    shown = []
    if total.labels >= words.ENOUGH_LABELS:
        shown.append(
            figure(
                "What it says, and how often it is right",
                "Honest dots lie on the dotted line, in the grey.",
                view.chart(lambda: figures.reliability(total, calibrated=view.calibrated)),
                "square",
            )
        )
    column = [
        figure(
            "How sure it is",
            "Its confidence, of all answers, with or without a label.",
            view.chart(lambda: figures.confidences(total, calibrated=view.calibrated)),
            "short",
        )
    ]
    if total.sets:
        column.append(
            figure(
                "How large the sets are",
                "Labels in each; the fewer, the more a set says.",
                view.chart(lambda: figures.set_sizes(total)),
                "short",
            )
        )
    key = [("dot raw", "the model itself")]
    key += [("dot served", "as served")] if view.calibrated else []
    key += [("band", "where chance would put an honest model")] if shown else []
    return tag(
        "section",
        heading("Is it honest?" if shown else "What it says"),
        legend(key),
        tag("div", shown, tag("div", column, class_="column"), class_="grid two"),
        id="reliability",
    )


def over_time(view: View) -> Html | None:
    summary, calibrated = view.summary, view.calibrated
    if summary is None or not summary.points:
        return None
    points, rang = summary.points, view.in_window
    late = summary.counted_ms - summary.since_ms > (summary.until_ms - summary.since_ms) / NOTED
    counted = ["Counted from ", when(summary.counted_ms), " on."] if late else None
    shown = []
    if len(figures.enough(points)) > 0:
        shown += [
            figure(
                "Calibration error",
                "How far confidence is from the truth; in the grey it is chance.",
                view.chart(lambda: figures.error_over_time(points, rang, calibrated=calibrated)),
            ),
            figure(
                "Right, and said to be right",
                "In its band: how often it is right. A line above it promises too much.",
                view.chart(lambda: figures.right_over_time(points, rang, calibrated=calibrated)),
            ),
            figure(
                "Log loss",
                "The price of each answer: high where it was sure and wrong.",
                view.chart(lambda: figures.loss_over_time(points, rang, calibrated=calibrated)),
            ),
        ]
    level = view.model.confidence_level
    if level is not None and summary.total["sets"][0] >= figures.LEAST_LABELS:
        shown.append(
            figure(
                "Sets that hold the label",
                f"Asked for: {percent(level)}, the dashed line.",
                view.chart(lambda: figures.coverage_over_time(points, rang, level)),
            )
        )
    shown.append(
        figure(
            "Answers",
            "Violet: those whose label is known by now.",
            view.chart(lambda: figures.answers_over_time(points, rang)),
        )
    )
    key = [("line raw", "the model itself")]
    key += [("line served", "as served")] if calibrated else []
    key += [("line alarm", "an alarm"), ("line begun", "where the change began, as reckoned")] if rang else []
    return tag(
        "section", heading("Over time", counted), legend(key), tag("div", shown, class_="grid two"), id="over-time"
    )
