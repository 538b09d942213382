"""The page: an overview of the models, one page a model, the same as JSON and as a file. Read-only.

A page is HTML from here, words and tables whole; a script of its own draws the charts, makes times the reader's own and
fetches the page again every few seconds. Nothing is loaded from elsewhere, and the browser is told to refuse it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from service import __version__
from service.drift.states import RAW, SERVED, Alarm, MonitorState
from service.drift.summary import Sums
from service.errors import shown
from service.web import parts, words
from service.web.assets import NO_STYLES, Assets
from service.web.elements import pill, when
from service.web.facts import ModelFacts, ShadowFacts, Sources
from service.web.figures import LEAST_IN_BIN
from service.web.http import Response
from service.web.markup import Html, Part, tag
from service.web.view import NO_REVISION, View

WINDOWS = {"1h": "1 hour", "24h": "24 hours", "7d": "7 days"}
DEFAULT_WINDOW = "24h"
FRESH_SECONDS = 1.0
"""How long an answer is given again: however many look, it is made once in that time."""
MOST_FRESH, LARGEST_FRESH = 64, 1 << 20
"""Answers that are kept for that, and bytes of each."""

ALARM_FIELDS = (
    "id", "monitor", "watched", "time_ms", "noticed_ms", "since_ms", "since_rows", "statistic", "threshold", "revision",
    "policy", "outcome", "acknowledged_by", "acknowledged_ms",
)  # fmt: skip

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_MODEL = re.compile(r"/models/([^/]{1,1000})(/summary\.json|/report\.html)?")
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='7' "
    "fill='%236941c6'/%3E%3Cpath d='M4 8.4l2.6 2.6L12 5.4' fill='none' stroke='white' stroke-width='1.8'/%3E%3C/svg%3E"
)


class Site:
    """Answers a path and a query. Called by many threads."""

    def __init__(self, sources: Sources, now_ms: Callable[[], int] = lambda: int(1000 * time.time())) -> None:
        self._sources, self._now_ms = sources, now_ms
        self._assets = Assets()
        self._lock = threading.Lock()
        self._fresh: dict[tuple[str, str], tuple[float, Response]] = {}

    def __call__(self, path: str, query: str) -> Response | None:
        if path.startswith("/assets/"):
            return self._assets.find(path)
        window = (parse_qs(query).get("since") or [DEFAULT_WINDOW])[-1]
        if words.seconds_of(window) is None:
            window = DEFAULT_WINDOW
        with self._lock:
            found = self._fresh.get((path, window))
            if found and time.monotonic() - found[0] < FRESH_SECONDS:
                return found[1]
            response = self._answer(path, window)
            if response and len(response.body) <= LARGEST_FRESH:
                if len(self._fresh) >= MOST_FRESH:
                    self._fresh.clear()
                self._fresh[path, window] = time.monotonic(), response
            return response

    def report(self, model: str, window: str) -> str:
        """A model's page as one file that needs no server and no network; ValueError without that window or model."""
        if words.seconds_of(window) is None:
            raise ValueError(
                f"a window is a number of minutes, hours or days such as 90m, 24h or 7d, got {shown(window)}"
            )
        facts = self._find(model)
        if facts is None:
            raise ValueError(f"model {shown(model)} has no page: it is no classifier")
        return self._file(self._view(facts, window))

    def _answer(self, path: str, window: str) -> Response | None:
        if path == "/":
            views = [self._view(model, window) for model in self._sources.models()]
            return _html(self._frame("calserve", "", window, path, overview(views)))
        found = _MODEL.fullmatch(path)
        model = self._find(unquote(found[1])) if found else None
        if found is None or model is None:
            return None
        view = self._view(model, window)
        if found[2] == "/summary.json":
            body = json.dumps(as_json(view), allow_nan=False).encode()
            return Response(HTTPStatus.OK, "application/json", body, _HEADERS)
        if found[2] == "/report.html":
            headers = {"Content-Disposition": "attachment; filename=report.html"}
            return Response(HTTPStatus.OK, "text/html; charset=utf-8", self._file(view).encode(), _HEADERS | headers)
        return _html(self._frame(model.name, model.name, window, path, parts.sections(view)))

    def _find(self, name: str) -> ModelFacts | None:
        return next((model for model in self._sources.models() if model.name == name), None)

    def _view(self, model: ModelFacts, window: str) -> View:
        now, name = self._now_ms(), model.name
        since = now - 1000 * (words.seconds_of(window) or 0)
        return View(
            model,
            self._sources.summary(name, since, now + 1),
            self._sources.monitors(name),
            self._sources.alarms(name),
            self._sources.accuracy(name),
            self._sources.shadows(name),
            window,
            charts=self._assets.plotly is not None,
        )

    def _frame(self, title: str, model: str, window: str, path: str, body: Sequence[Html]) -> Html:
        plotly = self._assets.plotly if model else None
        head = [
            tag("title", title if title == "calserve" else f"{title} · calserve"),
            tag("link", rel="icon", href=_ICON),
            tag("link", rel="stylesheet", href=self._assets.style.path, **NO_STYLES),
            self._assets.marks if model else None,
            tag("script", src=self._assets.script.path),
            tag("script", src=plotly.path, defer=True) if plotly else None,
        ]
        choices = tag(
            "nav",
            [
                tag("a", name, href=f"{path}?since={one}", aria_current="page" if one == window else None)
                for one, name in WINDOWS.items()
            ],
            class_="windows",
            aria_label="how far back",
        )
        crumbs = [tag("a", _MARK, "calserve", href=f"/?since={window}", class_="brand")]
        crumbs += [tag("span", model, class_="crumb")] if model else []
        bar = tag("header", tag("div", crumbs, class_="crumbs"), choices, _THEME, class_="bar")
        foot = [
            tag("span", "as of ", when(self._now_ms()), class_="asof"),
            tag("span", f"calserve {__version__}"),
        ]
        if model:
            foot.insert(1, tag("a", "save as a file", href=f"{path}/report.html?since={window}", download=True))
        return _document(head, [bar, tag("main", body), tag("footer", foot, id="foot")])

    def _file(self, view: View) -> Html:
        scripts = [self._assets.script.text, *([self._assets.plotly.text] if self._assets.plotly else [])]
        allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
        policy = _FILE_POLICY.format(scripts=allowed)
        head = [
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("title", f"{view.model.name} · calserve"),
            tag("style", Html(self._assets.style.text), **NO_STYLES),
            *(tag("script", Html(script)) for script in scripts),
        ]
        span = words.lasting(words.seconds_of(view.window) or 0)
        crumbs = [
            tag("span", _MARK, "calserve", class_="brand"),
            tag("span", f"{view.model.name}, the last {span}", class_="crumb"),
        ]
        bar = tag("header", tag("div", crumbs, class_="crumbs"), _THEME, class_="bar")
        foot = tag("footer", tag("span", "as of ", when(self._now_ms())), tag("span", f"calserve {__version__}"))
        return _document(head, [bar, tag("main", parts.sections(view)), foot], still=True)


def overview(views: Sequence[View]) -> list[Html]:
    """A card a model, those that need somebody first."""
    if not views:
        return [tag("section", tag("h1", "No model is served."), id="models")]
    order = {"alarm": 0, "off": 1, "unknown": 2, "good": 3}
    ordered = sorted(views, key=lambda view: (order[view.verdict.mood], view.model.name))
    moods = [view.verdict.mood for view in views]
    return [
        tag(
            "section",
            tag("p", tag("span", _counted(len(views), "model")), class_="eyebrow"),
            tag("h1", _state(moods), class_="verdict"),
            id="state",
            class_="hero",
        ),
        tag("section", tag("div", [_card(view) for view in ordered], class_="grid three"), id="models"),
    ]


def _state(moods: Sequence[str]) -> str:
    ringing, off = moods.count("alarm"), moods.count("off")
    if ringing:
        return f"{_counted(ringing, 'model')} drifted."
    if off:
        return f"{_counted(off, 'model')} {'says' if off == 1 else 'say'} more or less than comes true."
    if "good" in moods:
        return "What is said is what comes true."
    return "Waiting for labels."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _card(view: View) -> Html:
    verdict, total, model = view.verdict, view.total, view.model
    which = SERVED if view.calibrated else RAW
    numbers: list[Part] = [f"{words.short(total.answers)} answers, {words.short(total.labels)} labels"] if total else []
    if total and total.labels >= words.ENOUGH_LABELS:
        numbers.append(f"off by {words.points(total.calibration_error(which))}")
    return tag(
        "a",
        tag("header", tag("h2", model.name), pill(verdict)),
        tag("div", parts.told(verdict, view.calibrated), class_="scales")
        if verdict.raw or verdict.served
        else tag("p", verdict.sentence, class_="quiet"),
        tag("p", [tag("span", one) for one in numbers], class_="numbers"),
        tag(
            "p",
            "no calibrator serves" if model.active == NO_REVISION else [model.active, " serves"],
            class_="quiet",
        ),
        href=f"/models/{quote(model.name, safe='')}?since={view.window}",
        class_=f"card model {verdict.mood}",
    )


# ---------------------------------------------------------------------------------------------------- JSON


def as_json(view: View) -> dict[str, Any]:
    """The same in numbers. What cannot be said yet is null."""
    model, summary, verdict = view.model, view.summary, view.verdict
    return {
        "model": model.name,
        "version": model.version,
        "active": model.active,
        "window": view.window,
        "verdict": {
            "mood": verdict.mood,
            "label": verdict.label,
            "sentence": verdict.sentence,
            **{name: vars(one) if one else None for name, one in ((RAW, verdict.raw), (SERVED, verdict.served))},
        },
        "since_ms": summary.since_ms if summary else None,
        "counted_since_ms": summary.counted_ms if summary else None,
        "total": _sums(summary.total) if summary else None,
        "points": [{"since_ms": p.since_ms, "until_ms": p.until_ms, **_sums(p.sums)} for p in summary.points]
        if summary
        else [],
        "monitors": [_monitor(one) for one in view.monitors],
        "alarms": [_alarm(one) for one in view.alarms],
        "accuracy_now": _plain(vars(view.accuracy)) if view.accuracy else None,
        "revisions": [
            {"revision": one.revision, "created_ms": one.created_ms, "rows": one.rows} for one in model.revisions
        ],
        "roll_back_to": model.before or None,
        "shadows": [_shadow(one) for one in view.in_shadow],
    }


def _sums(sums: Sums) -> dict[str, Any]:
    """Counts of all rows; of labelled rows only what many of them say together."""
    many, many_sets = (count >= words.ENOUGH_LABELS for count in (sums.labels, sums["sets"][0]))
    return {
        "answers": sums.answers,
        "labels": sums.labels,
        "coverage": sums.coverage if many_sets else None,
        "mean_set_size": _known(sums.mean_set_size),
        **{which: _scores(sums, which) if many else None for which in (RAW, SERVED)},
    }


def _scores(sums: Sums, which: str) -> dict[str, Any]:
    curve = sums.curve(which)
    return {
        "accuracy": sums.accuracy(which),
        "calibration_error": sums.calibration_error(which),
        "log_loss": sums.log_loss(which),
        "bins": [
            {"labels": int(labels), "said": float(said), "right": float(right)}
            for labels, said, right in zip(curve.counts, curve.confidence, curve.accuracy, strict=True)
            if labels >= LEAST_IN_BIN
        ],
    }


def _shadow(shadow: ShadowFacts) -> dict[str, Any]:
    many = shadow.labels >= words.ENOUGH_LABELS
    return {
        "revision": shadow.revision,
        "champion": shadow.champion,
        "labels": shadow.labels,
        "gain": dict(zip(("mean", "low", "high"), shadow.gain, strict=True)) if many else None,
        "verdict": shadow.verdict,
        "ended": shadow.ended or None,
    }


def _monitor(monitor: MonitorState) -> dict[str, Any]:
    return {
        "name": monitor.spec.name,
        "detector": monitor.spec.detector,
        "watched": monitor.spec.watched,
        "ready": monitor.ready,
        "statistic": _known(monitor.statistic),
        "threshold": _known(monitor.threshold),
        "rows": monitor.n_rows,
        "alarms": list(monitor.alarms),
        "false_alarms": monitor.false_alarms,
    }


def _alarm(alarm: Alarm) -> dict[str, Any]:
    cause = alarm.cause and {name: getattr(alarm.cause, name) for name in ("kind", "where", "action")}
    if alarm.cause and cause:
        cause["evidence"] = list(alarm.cause.evidence)
    return {**_plain({name: getattr(alarm, name) for name in ALARM_FIELDS}), "cause": cause}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _known(value) if isinstance(value, float) else value for name, value in values.items()}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------- frame


def _html(page: Html) -> Response:
    return Response(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), _HEADERS)


def _document(head: Part, body: Part, *, still: bool = False) -> Html:
    first = [tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1")]
    whole = tag("html", tag("head", first, head), tag("body", body), lang="en", data_still=still)
    return Html(f"<!DOCTYPE html>\n{whole}\n")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


_MARK = tag(
    "svg",
    tag("circle", cx="10", cy="10", r="8.5"),
    tag("path", d="M5.5 10.4l3 3 6-6.4"),
    viewBox="0 0 20 20",
    class_="mark",
    aria_hidden="true",
)
_THEME = tag("button", "light or dark", type="button", class_="theme", hidden=True)
