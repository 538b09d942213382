"""HTML that escapes what it is given: names of models and classes are anybody's words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any, TypeAlias

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


class Html(str):
    """Text that is HTML already; only `tag` and `join` make it, and constants of this package."""

    __slots__ = ()


Part: TypeAlias = "str | int | Html | Iterable[Part] | None"


def tag(name: str, /, *parts: Part, **attributes: str | int | bool | None) -> Html:
    """An element; `None` and False leave an attribute or part out. `class_` is class, `aria_label` is aria-label.

    >>> tag("p", "a < b", tag("b", "c"), class_="quiet")
    '<p class="quiet">a &lt; b<b>c</b></p>'
    """
    head = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{head}>" if name in VOID else f"<{name}{head}>{join(parts)}</{name}>")


def join(parts: Part) -> Html:
    """Parts one after the other, escaped where they are not HTML."""
    if parts is None:
        return Html("")
    if isinstance(parts, Html):
        return parts
    if isinstance(parts, str | int):
        return Html(escape(str(parts)))
    return Html("".join(map(join, parts)))


def data(value: Any) -> Html:
    """A value as JSON in an element of its own, which no browser runs."""
    # In a script element nothing ends the text but "</script", so no "<" may stand in it.
    return Html(
        f'<script type="application/json">{json.dumps(value, allow_nan=False).replace("<", chr(92) + "u003c")}</script>'
    )
