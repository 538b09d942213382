"""What the sections of a page are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from calibrators.plots._style import percent
from service.web import words
from service.web.figures import Figure, wilson
from service.web.markup import Html, Part, data, tag

_MARKS = re.compile(r"(`[^`]+`|10\^\d+|\b\d+e-\d+\b)")


def table(heads: Sequence[str], rows: Iterable[Sequence[Part]], style: str = "") -> Html:
    """The first of each row names it; on a phone a table of style "stack" has its heads beside the values."""
    head = tag("thead", tag("tr", [tag("th", one, scope="col") for one in heads]))
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            [tag("td", one, data_head=of) for of, one in zip(heads[1:], rest, strict=True)],
        )
        for name, *rest in rows
    ]
    return tag("div", tag("table", head, tag("tbody", body), class_=style or None), class_="scroll")


def pill(verdict: words.Verdict) -> Html:
    return tag("b", verdict.label, class_=f"pill {verdict.mood}")


def scale(said: float, right: float, labels: float, style: str = "served") -> Html:
    """From what was said (a tick) to what came true (a dot), with its interval."""
    low, high = wilson(right * labels, labels)
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


def tile(name: str, value: Part, note: Part) -> Html:
    return tag("div", tag("span", name), tag("strong", value), tag("small", note), class_="tile")


def figure(title: str, caption: str, drawn: Callable[[], Figure] | None, size: str = "wide") -> Html:
    """A chart with its title; `drawn` is None where no script draws it."""
    plot: Part = tag("p", "The picture needs plotly on the server: pip install 'calserve[page]'", class_="quiet")
    if drawn is not None:
        plot = [tag("div", class_=f"plot {size}", role="img", aria_label=f"{title}: {caption}"), data(drawn())]
    return tag("figure", tag("figcaption", tag("h3", title), tag("small", caption)), plot, class_="card")


def legend(key: Iterable[tuple[str, str]]) -> Html:
    return tag("ul", [tag("li", tag("i", class_=style), meaning) for style, meaning in key], class_="key")


def heading(text: str, note: Part = None) -> Html:
    return tag("header", tag("h2", text), tag("p", note, class_="quiet") if note else None)


def prose(text: str) -> list[Part]:
    """A sentence; names in backticks and powers of ten as print has them."""
    return [_printed(piece) for piece in _MARKS.split(text)]


def _printed(piece: str) -> Part:
    if not _MARKS.fullmatch(piece):
        return piece
    if piece[0] == "`":
        return tag("code", piece[1:-1])
    digit, small, power = piece.partition("e-")
    if not small:
        return ["10", tag("sup", piece.removeprefix("10^"))]
    return ["" if digit == "1" else f"{digit} × ", "10", tag("sup", words.MINUS, int(power))]


def command(text: str) -> Html:
    return tag(
        "div", tag("code", text), tag("button", "copy", type="button", class_="copy", hidden=True), class_="command"
    )


def when(time_ms: int) -> Html:
    return tag("time", words.utc(time_ms), datetime=words.iso(time_ms))
