"""The page: by what it says, by how it is served, and as a browser shows it."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from selectors import DefaultSelector, SelectorKey
from typing import Any

import numpy as np
import pytest

from service.cli import main
from service.client import Client
from service.drift.states import RAW, SERVED
from service.errors import InvalidRequest, NotFound
from service.web import assets, http, words
from service.web.elements import prose
from service.web.facts import ModelFacts, Sources
from service.web.figures import enough, wilson
from service.web.http import HttpServer
from service.web.markup import VOID, join, tag
from service.web.site import Site
from tests import browser
from tests.browser import Browser, Tab
from tests.service.conftest import RunningServer, settings_for
from tests.service.dashboards import (
    ALARM,
    FACTS,
    HOUR_MS,
    MONITORS,
    NOW_MS,
    SHADOWS,
    drifted,
    pairs,
    sets_of,
    sources,
    tally,
    traffic,
)

EVIL = "<script>alert('x')</script> & \"co\" {title} <b>"
N_FEATURES = 6


class Reader(HTMLParser):
    """What a browser would make of a page: every element closed, texts, addresses, nothing inline."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.figures: list[Any] = []
        self.inline: list[str] = []
        self._is_data = False
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if name not in VOID:
            self.open.append(name)
        self.ids += [own["id"] or ""] if "id" in own else []
        self.addresses += [own[key] or "" for key in ("src", "href") if key in own]
        self.inline += [key for key in own if key.startswith("on") or key == "style"]
        self.inline += [name] if name == "style" or (name == "script" and own.keys() == set()) else []
        self._is_data = own.get("type") == "application/json"

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"] and self._is_data:
            self.figures.append(json.loads(data))
        elif self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def site_of(shown: Sources) -> Site:
    return Site(shown, lambda: NOW_MS)


def page_of(shown: Sources, path: str = "/models/magika", query: str = "") -> Reader:
    response = site_of(shown)(path, query)
    assert response is not None and response.status == 200
    return Reader(response.body.decode())


def fetch(address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    request = urllib.request.Request(address, headers=named)  # noqa: S310  # the test's own server
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the page of `drifted` is served."""
    server = HttpServer("127.0.0.1", 0, {}, site_of(drifted()))
    server.start()
    yield f"http://127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Tab]:
    tab = chromium.tab()
    yield tab
    assert tab.complaints == []
    tab.close()


# ---------------------------------------------------------------------------------------------- what it says


def test_the_first_sentence_is_what_a_confidence_is_worth() -> None:
    text = page_of(sources([(FACTS, tally(traffic(1, 20_000)))])).text
    found = re.search(r"When magika says about 90 %, it is right (\d+) % of the time\. "
                      r"As served: (\d+) %\.", text)  # fmt: skip
    assert found
    part = traffic(1, 20_000)
    labelled = part.labels != -1
    for share, which in zip(found.groups(), (RAW, SERVED), strict=True):
        logits = part.kept.logits[labelled].astype(float)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True) if which == RAW else part.kept.probabilities[labelled]
        near = (p.max(axis=1) > 0.85) & (p.max(axis=1) <= 0.95)
        assert int(share) == round(100 * (p.argmax(axis=1) == part.labels[labelled])[near].mean())


@pytest.mark.parametrize(
    ("facts", "counted", "said", "label"),
    [
        (replace(FACTS, active="none", before=""), None, "magika: nothing to judge yet", "no answers"),
        (FACTS, traffic(2, 500, labelled=0.0), "magika: waiting for labels", "too few labels"),
        (replace(FACTS, kept=False), None, "magika: nothing to judge yet", "not kept"),
        (replace(FACTS, active="none"), traffic(9, 9000, truth=1.0), "of the time.", "honest"),
        (replace(FACTS, active="none"), traffic(4, 9000, truth=1.0, drift=3.0), "of the time.", "overconfident"),
        (FACTS, traffic(5, 20_000), "As served: ", "honest"),
    ],
)
def test_the_verdict_in_every_state(facts: ModelFacts, counted: Any, said: str, label: str) -> None:
    page = page_of(sources([(facts, tally(counted) if counted is not None else None)]))
    assert said in f"{page.text} version"
    assert f" {label} " in " " + " ".join(page.texts) + " "


def test_an_alarm_that_nobody_has_seen_comes_first_with_its_cause_and_what_to_do() -> None:
    page = page_of(drifted())
    assert page.ids.index("ringing") == page.ids.index("verdict") + 1
    for words_ in (*ALARM.cause.evidence, ALARM.cause.action, ALARM.monitor, "412 answers before the alarm"):  # type: ignore[union-attr]
        assert words_ in page.text
    seen = page_of(replace(drifted(), alarms=lambda _: (replace(ALARM, acknowledged_by="anna", acknowledged_ms=1),)))
    assert "ringing" not in seen.ids
    assert "seen by anna" in seen.text


def test_alarms_are_marked_where_they_rang_and_where_the_change_began() -> None:
    times = [shape["x0"] for figure in page_of(drifted()).figures for shape in figure["layout"].get("shapes", ())]
    assert times.count(ALARM.time_ms) == 5  # in each chart over time
    assert times.count(ALARM.since_ms) == 10


def test_every_monitor_is_shown_with_its_threshold_and_its_promise() -> None:
    page = page_of(drifted())
    for monitor in MONITORS:
        assert monitor.spec.name in page.text
    drawn = [f["layout"]["yaxis"].get("tickvals") for f in page.figures]
    assert sum(ticks == [0, 6.0] for ticks in drawn) == sum(monitor.ready for monitor in MONITORS)
    assert page.text.count("Rings falsely within 100,000 labelled rows") == len(MONITORS)


def test_what_is_off_is_named_and_what_chance_explains_is_not() -> None:
    honest, off = traffic(6, 30_000, truth=1.0), traffic(7, 30_000, truth=1.0)
    logits = off.kept.logits.astype(float)
    logits[:, 2] += 1.5  # one class promised too often
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    wrong = pairs(logits, p / p.sum(axis=1, keepdims=True), off.labels, off.times_ms)
    plain = replace(FACTS, active="none", confidence_level=None)
    good, bad = (page_of(sources([(plain, tally(part))])) for part in (honest, wrong))
    assert "None is off by more than chance explains." in good.text
    assert "More or less common than promised" not in good.text
    section = bad.text.partition("Where it is off")[2]
    assert section.index("rust") < section.index("python")
    assert "More or less common than promised" in bad.text


def test_how_to_go_back_is_a_command_to_type() -> None:
    assert "calserve rollback magika" in page_of(drifted()).text
    strange = replace(FACTS, name="it's; rm -rf", before="none")
    text = page_of(sources([(strange, None)]), "/models/it%27s%3B%20rm%20-rf").text
    assert "calserve rollback 'it'\"'\"'s; rm -rf'" in text
    assert "calserve fit magika --kind auto" in page_of(sources([(replace(FACTS, before="", revisions=()), None)])).text


def test_a_challenger_is_shown_with_its_gain_and_the_command_that_makes_it_serve() -> None:
    page = page_of(drifted())
    text = page.text.partition("In shadow")[2].partition("Revisions")[0]
    assert text.index("vector-6") < text.index("class_prior-5") < text.index("beta-4")  # what has ended comes last
    assert "class_prior-5temperature-31,500+0.039 (+0.010 to +0.068)better" in text
    assert "calserve shadow promote magika class_prior-5" in text
    assert text.count("calserve shadow promote") == 1  # neither of what is undecided nor of what has ended
    assert "promoted by itself once better on 500 labels" in text
    assert "stopped 2026-09-21" in text
    assert "none" not in text  # it ended before the window that is shown
    assert "shadows" not in page_of(replace(drifted(), shadows=lambda _: SHADOWS[3:])).ids


def test_what_a_challenger_gains_is_not_told_of_few_labels() -> None:
    page = page_of(replace(drifted(), shadows=lambda _: SHADOWS[:1]))
    assert "31told from 50 labels onundecided" in page.text
    numbers = json.loads(site_of(drifted())("/models/magika/summary.json", "").body)["shadows"]  # type: ignore[union-attr]
    gains = {one["revision"]: one["gain"] for one in numbers}
    assert gains["vector-6"] is None
    assert gains["class_prior-5"] == {"mean": 0.0389, "low": 0.0101, "high": 0.0677}


def test_a_sentence_is_set_as_print_has_it() -> None:
    assert join(prose("fit `<b>`: 10^23 times")) == "fit <code>&lt;b&gt;</code>: 10<sup>23</sup> times"
    assert join(prose("1e-12, not 4e-06")) == "10<sup>−12</sup>, not 4 × 10<sup>−6</sup>"


def test_the_overview_puts_first_what_needs_somebody() -> None:
    page = page_of(drifted(), "/")
    assert page.text.index("magika") < page.text.index("sentiment") < page.text.index("resnet-50")
    assert "1 model drifted." in page.text
    assert "/models/waits%20for%20labels?since=24h" in page.addresses
    assert page_of(sources([]), "/").text.count("No model is served.") == 1


def test_names_are_text_whatever_they_hold() -> None:
    facts = replace(
        FACTS,
        name=EVIL,
        class_names=[EVIL, *FACTS.class_names[1:]],
        active=EVIL,
        before=EVIL,
        revisions=[replace(one, revision=EVIL, kind=EVIL) for one in FACTS.revisions],
    )
    cause = replace(ALARM.cause, kind=EVIL, where=EVIL, evidence=[EVIL], action=EVIL)  # type: ignore[type-var]
    alarm = replace(ALARM, model=EVIL, monitor=EVIL, id=EVIL, cause=cause, outcome=EVIL)
    shadow = replace(SHADOWS[2], revision=EVIL, champion=EVIL, note=EVIL)
    monitor = replace(MONITORS[0], spec=replace(MONITORS[0].spec, name=EVIL), false_alarms=EVIL)
    part = traffic(8, 9000)
    named = pairs(part.kept.logits, part.kept.probabilities, part.labels, part.times_ms, segments=[EVIL] * len(part))
    shown = sources(
        [(facts, tally(named))], alarms=lambda _: (alarm,), monitors=lambda _: (monitor,), shadows=lambda _: (shadow,)
    )
    site = site_of(shown)
    report = site.report(EVIL, "24h")
    path = "/models/" + urllib.parse.quote(EVIL, safe="")
    for body in (site(path, "").body, site("/", "").body, report.encode()):  # type: ignore[union-attr]
        head, _, rest = body.decode().partition("<body>")
        assert "<script>alert" not in (rest or head)
    page = Reader(site(path, "").body.decode())  # type: ignore[union-attr]
    assert page.inline == []
    assert page.text.count(EVIL) >= 14


def test_a_tag_escapes_texts_and_attributes() -> None:
    assert tag("p", "<b>", tag("b", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<b>&amp;</b></p>'


# --------------------------------------------------------------------------------------------- how it is served


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline(address: str) -> None:
    for path in ("/", "/models/magika"):
        status, headers, body = fetch(address + path)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        page = Reader(body.decode())
        assert page.inline == []
        assert all(one.startswith(("/", "data:image/svg+xml,")) and not one.startswith("//") for one in page.addresses)


def test_files_are_named_by_their_content_and_kept_for_ever(address: str) -> None:
    page = Reader(fetch(f"{address}/models/magika")[2].decode())
    files = [one for one in page.addresses if one.startswith("/assets/")]
    assert sorted(one.rpartition("/")[2] for one in files) == ["page.css", "page.js", "plotly.js"]
    for one in files:
        status, headers, body = fetch(address + one)
        packed = fetch(address + one, Accept_Encoding="gzip")[2]
        assert status == 200
        assert headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert gzip.decompress(packed) == body
    assert fetch(f"{address}/assets/0123456789abcdef/page.js")[0] == 404


def test_what_has_not_changed_is_not_sent_again(address: str) -> None:
    _, headers, body = fetch(f"{address}/models/sentiment")
    assert body
    assert fetch(f"{address}/models/sentiment", If_None_Match=headers["ETag"])[::2] == (304, b"")


@pytest.mark.parametrize("path", ["/models/nobody", "/models/", "/models/a/b", "/models/magika/nothing", "/etc/passwd"])
def test_there_is_nothing_else(address: str, path: str) -> None:
    assert fetch(address + path)[0] == 404


def test_a_window_is_a_number_and_a_unit(address: str) -> None:
    wide, narrow = (
        json.loads(fetch(f"{address}/models/sentiment/summary.json?since={one}")[2]) for one in ("7d", "60m")
    )
    assert wide["total"]["answers"] == 20_000
    assert 0 < narrow["total"]["answers"] < 2000
    assert json.loads(fetch(f"{address}/models/sentiment/summary.json?since=<b>")[2])["window"] == "24h"
    assert [words.seconds_of(one) for one in ("90m", "24h", "7d", "0d", "7w", "-1d", "99999d", "")] == [
        5400, 86400, 604800, None, None, None, None, None,
    ]  # fmt: skip


def test_the_numbers_are_there_for_programs(address: str) -> None:
    numbers = json.loads(fetch(f"{address}/models/magika/summary.json")[2])
    assert numbers["verdict"]["mood"] == "alarm"
    bins = numbers["total"]["served"]["bins"]
    assert 0 <= numbers["total"]["labels"] - sum(one["labels"] for one in bins) < 10 * (15 - len(bins))
    assert sum(point["answers"] for point in numbers["points"]) == numbers["total"]["answers"]
    assert [one["id"] for one in numbers["alarms"]] == ["a-2", "a-1"]
    assert numbers["roll_back_to"] == "online_temperature-2"


def test_few_labels_say_nothing_so_that_none_can_be_told_from_the_sums() -> None:
    """Neither in the page nor in its numbers; of 49 rows with a label there is no more than their count."""
    part = traffic(11, 49, labelled=1.0)
    shown = sources([(FACTS, tally(part, sets=sets_of(traffic(5, 4000))))])
    numbers = json.loads(site_of(shown)("/models/magika/summary.json", "").body)  # type: ignore[union-attr]
    labels = numbers["total"]["labels"]
    assert 40 < labels < 50
    for one in (numbers["total"], *numbers["points"]):
        assert one["raw"] is one["served"] is one["coverage"] is None
    text = page_of(shown).text
    said = text.partition("What the words mean")[0]
    assert all(word not in said for word in ("Where it is off", "Log loss", "accuracy", "Sets hold the label"))
    assert f"{labels} of at least 50" in said


def test_an_answer_is_made_once_however_many_ask() -> None:
    asked: list[str] = []
    shown = drifted()

    def summary(name: str, since_ms: int, until_ms: int) -> Any:
        asked.append(name)
        return shown.summary(name, since_ms, until_ms)

    site = site_of(replace(shown, summary=summary))
    first = site("/models/magika", "since=7d")
    assert all(site("/models/magika", "since=7d") is first for _ in range(20)) or len(asked) < 5
    assert site("/models/magika", "since=1h") is not first


def test_a_page_that_fails_says_so_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(name: str, since_ms: int, until_ms: int) -> Any:
        raise RuntimeError("secret")

    server = HttpServer("127.0.0.1", 0, {}, site_of(replace(drifted(), summary=broken)))
    server.start()
    try:
        status, _, body = fetch(f"http://127.0.0.1:{server.port}/models/magika")
        assert (status, b"secret" in body) == (500, False)
        assert "secret" in caplog.text
        assert fetch(f"http://127.0.0.1:{server.port}/nothing")[0] == 404
    finally:
        server.stop()


def test_while_nobody_asks_nothing_wakes_and_the_server_stops_when_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float | None]()

    class Selector(DefaultSelector):
        def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
            waits.append(timeout)
            return super().select(timeout)

    monkeypatch.setattr(http, "DefaultSelector", Selector)
    server = HttpServer("127.0.0.1", 0, {"/here": lambda: http.text("yes")})
    server.start()
    try:
        assert fetch(f"http://127.0.0.1:{server.port}/here")[0] == 200
        with socket.create_connection(("127.0.0.1", server.port)):
            pass
        assert fetch(f"http://127.0.0.1:{server.port}/here")[0] == 200
    finally:
        server.stop()
    assert set(waits) == {None}


def test_without_plotly_the_words_and_tables_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ImportError("no plotly")

    monkeypatch.setattr(assets, "plotly_script", missing)
    page = page_of(drifted())
    assert page.figures == []
    assert "pip install 'calserve[page]'" in page.text
    assert "When magika says about 90" in page.text


def test_points_are_joined_until_they_have_labels_enough() -> None:
    summary = tally(traffic(9, 3000, labelled=0.1)).summary(NOW_MS - 24 * HOUR_MS, NOW_MS + 1)
    joined = enough(summary.points)
    assert all(point.sums.labels >= 60 for point in joined)
    assert sum(point.sums.labels for point in joined) <= summary.total.labels


def test_the_interval_is_scipys() -> None:
    from scipy.stats import binomtest

    for hits, trials in ((0, 10), (3, 10), (71, 100), (500, 500)):
        wanted = binomtest(hits, trials).proportion_ci(method="wilson")
        assert wilson(hits, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-4)


def test_plotly_knows_every_property_of_every_chart() -> None:
    import plotly.graph_objects

    from tests.calibrators.test_plots_report import in_light

    def known(value: Any, key: str = "") -> Any:
        """With colours for the names that only the page has."""
        if isinstance(value, dict):
            return {name: known(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [known(one, key) for one in value]
        return "--ink" if value in {"--card", "--line"} else value

    figures = page_of(drifted()).figures
    assert len(figures) == 12
    for figure in figures:
        plotly.graph_objects.Figure(in_light(known(figure)))


# ------------------------------------------------------------------------------------------ as a browser shows it


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/", "/models/magika", "/models/waits%20for%20labels", "/models/new"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_and_has_nothing_to_complain_of(
    tab: Tab, address: str, path: str, width: int, dark: bool
) -> None:
    tab.look(width, dark=dark)
    tab.open(address + path)
    tab.wait(browser.DRAWN)
    assert tab.run("document.documentElement.scrollWidth") <= width
    red, green, blue = map(int, re.findall(r"\d+", tab.run("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue < 150) == dark
    assert tab.run(TOO_WIDE) == []
    assert len(tab.picture()) > 10_000


TOO_WIDE = """[...document.querySelectorAll('h1, h2, h3, p, small, .tile strong, .pill')]
    .filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.textContent)"""
LEAST_CONTRAST = """(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = one => { for (; one; one = one.parentElement) {
    const colour = parts(getComputedStyle(one).backgroundColor); if (colour.length < 4 || colour[3] > .99) return colour; } };
  return [...document.querySelectorAll('h1, h2, h3, p, small, td, th, a, button, .pill, .share, dd, code')]
    .filter(one => one.checkVisibility() && one.textContent.trim() && behind(one)).map(one => {
      const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
      return [(a + .05) / (b + .05), one.className + ' ' + one.textContent.slice(0, 40)]; }).sort((x, y) => x[0] - y[0])[0];
})()"""


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/", "/models/magika"])
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_what_is_behind_it(tab: Tab, address: str, path: str, dark: bool) -> None:
    """The contrast that WCAG 2 asks of normal text, level AA."""
    tab.look(1280, dark=dark)
    tab.open(address + path)
    contrast, where = tab.run(LEAST_CONTRAST)
    assert contrast >= 4.5, where


@pytest.mark.browser
def test_the_switch_goes_from_light_to_dark_and_is_remembered(tab: Tab, address: str) -> None:
    tab.look(1280)
    tab.open(f"{address}/models/magika")
    tab.wait(browser.DRAWN)
    shade = "getComputedStyle(document.body).backgroundColor"
    before = tab.run(shade)
    line = "document.querySelector('.plot .xgrid').style.stroke"
    drawn = tab.run(line)
    tab.run("document.querySelector('.theme').click()")
    tab.wait(f"{line} !== {json.dumps(drawn)}")
    dark = tab.run(shade)
    assert dark != before
    tab.open(f"{address}/")
    assert tab.run(shade) == dark
    tab.run("localStorage.clear()")


@pytest.mark.browser
def test_the_page_keeps_itself_up_to_date(tab: Tab) -> None:
    """New labels, an alarm, another revision: all come without loading the page again; what is open stays open."""
    counted = tally(traffic(1, 4000))
    rang: list[Any] = []
    facts = [FACTS]
    shown = Sources(lambda: facts, lambda _, since, until: counted.summary(since, until), alarms=lambda _: rang)
    server = HttpServer("127.0.0.1", 0, {}, site_of(shown))
    server.start()
    try:
        tab.look(1280)
        tab.open(f"http://127.0.0.1:{server.port}/models/magika")
        tab.wait(browser.DRAWN)
        tab.run(
            "document.querySelector('details').open = true; window.same = document.querySelector('.plot.square'); 0"
        )
        assert tab.run("document.getElementById('ringing') === null")
        rang.append(ALARM)
        facts[0] = replace(FACTS, active="isotonic-1")
        counted.add(traffic(2, 4000, hours=1))
        tab.wait("document.getElementById('ringing')")
        tab.wait("document.querySelector('.tile strong').textContent === '8,000'")
        tab.wait(browser.DRAWN)
        assert "isotonic-1 serves" in tab.run("document.querySelector('.eyebrow').textContent")
        assert tab.run("document.querySelector('details').open && document.contains(window.same)")
        assert tab.run("document.querySelector('main').children[1].id") == "ringing"
        rang.clear()
        tab.wait("!document.getElementById('ringing')")
    finally:
        server.stop()


@pytest.mark.browser
def test_the_report_is_one_file_that_a_browser_opens_without_a_network(tab: Tab, tmp_path: Any) -> None:
    report = site_of(drifted()).report("magika", "7d")
    for model, window, wanted in (("nobody", "7d", "no page"), ("magika", "7w", "90m, 24h or 7d")):
        with pytest.raises(ValueError, match=wanted):
            site_of(drifted()).report(model, window)
    (tmp_path / "report.html").write_text(report, encoding="utf-8")
    page = Reader(report)
    assert page.addresses == []
    tab.look(1280)
    tab.open((tmp_path / "report.html").as_uri())
    tab.wait(browser.DRAWN)
    assert "When magika says about 90" in tab.run("document.querySelector('h1').textContent")


# ---------------------------------------------------------------------------------------------------- a server


def test_a_server_shows_what_it_predicted_and_what_came_true(server: RunningServer, client: Client) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((300, N_FEATURES)).astype(np.float32)
    prediction = client.predict("mlp", inputs)
    classes = prediction.probabilities.argmax(axis=1)
    ids = [prediction.prediction_id] * 200
    assert set(client.label("mlp", ids, classes[:200].tolist(), rows=list(range(200)))) == {"recorded"}
    base = f"http://127.0.0.1:{server.app.metrics_port}"

    end = time.monotonic() + 60
    while (found := json.loads(fetch(f"{base}/models/mlp/summary.json?since=1h")[2])["total"] or {}).get(
        "labels"
    ) != 200:
        assert time.monotonic() < end, found
    assert (found["answers"], found["labels"]) == (300, 200)
    assert found["raw"]["accuracy"] == 1.0
    for path in ("/", "/models/mlp"):
        status, _, body = fetch(base + path)
        assert status == 200
        assert "mlp" in Reader(body.decode()).text
    assert fetch(f"{base}/metrics")[0] == 200
    assert b"calserve_ready" in fetch(f"{base}/metrics")[2]


def test_the_command_line_writes_the_page_as_a_file(server: RunningServer, client: Client, tmp_path: Any) -> None:
    client.predict("mlp", np.zeros((5, N_FEATURES), np.float32))
    out = tmp_path / "report.html"
    main(["report", "mlp", "--since", "7d", "--out", str(out), "--address", server.address])
    page = Reader(out.read_text())
    assert page.addresses == []
    assert "mlp, the last 7 days" in page.text
    with pytest.raises(InvalidRequest, match="90m, 24h or 7d"):
        client.page("mlp", "a week")
    with pytest.raises(NotFound):
        client.page("nobody")


def test_the_page_can_be_switched_off(root: Any) -> None:
    server = RunningServer(settings_for(root, no_page=True))
    try:
        base = f"http://127.0.0.1:{server.app.metrics_port}"
        assert fetch(f"{base}/")[0] == 404
        assert fetch(f"{base}/models/mlp")[0] == 404
        assert fetch(f"{base}/health/ready")[0] == 200
    finally:
        server.stop()


def test_every_section_has_a_name_by_which_the_script_finds_it() -> None:
    page = page_of(drifted())
    assert len(page.ids) == len(set(page.ids)) > 8
