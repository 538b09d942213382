"""What a page loads: its style, its script, and plotly's, from the installed package. Named by what is in them.

A file with another content has another name, so that browsers may keep each for ever.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path

from calibrators.plots._page import COLOURS
from calibrators.plots._plotly import plotly_script
from service.web.http import Response
from service.web.markup import Html, tag

NO_STYLES = {"id": "plotly.js-style-global", "class_": "no-inline-styles"}
"""What plotly looks for in a page that has its styles already: `page.css` has them."""
_STYLE_NAME = re.compile(r'getElementById\("([0-9a-f]{64})"\)')

CARDS = {
    "page": ("#f6f7f9", "#0e1218"),
    "card": ("#ffffff", "#161c26"),
    "line": ("#e4e7ec", "#2a3342"),
    "good": ("#0b7285", "#5cc8d8"),
    "warn": ("#b33a08", "#ff8b4d"),
    "wash": ("#fff1e8", "#33211a"),
}
"""Colours of the page that the report has not: in light, in dark."""


@dataclass(frozen=True)
class Asset:
    """A file as it is served, and its address."""

    path: str
    response: Response

    @classmethod
    def of(cls, name: str, content_type: str, content: str) -> Asset:
        body = content.encode()
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
        packed = gzip.compress(body, 6, mtime=0)
        response = Response(HTTPStatus.OK, content_type, body, headers, packed)
        return cls(f"/assets/{hashlib.sha256(body).hexdigest()[:16]}/{name}", response)

    @property
    def text(self) -> str:
        return self.response.body.decode()


class Assets:
    """The three files; plotly's only if it is installed, read when it is first asked for."""

    @cached_property
    def style(self) -> Asset:
        return Asset.of("page.css", "text/css; charset=utf-8", _themes() + _read("page.css"))

    @cached_property
    def script(self) -> Asset:
        return Asset.of("page.js", "text/javascript; charset=utf-8", _read("page.js"))

    @cached_property
    def plotly(self) -> Asset | None:
        """None: it is not installed, and there are no charts."""
        try:
            return Asset.of("plotly.js", "text/javascript; charset=utf-8", plotly_script())
        except ImportError:
            return None

    @cached_property
    def marks(self) -> Html:
        """What keeps plotly from writing a style element for maps, which each release knows by another name."""
        found = _STYLE_NAME.search(self.plotly.text) if self.plotly else None
        return tag("meta", id=found[1]) if found else Html("")

    def find(self, path: str) -> Response | None:
        return next((one.response for one in (self.style, self.script, self.plotly) if one and one.path == path), None)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _themes() -> str:
    """The colours of both themes: the system's choice, unless the reader made one."""
    colours = COLOURS | CARDS
    light, dark = ("".join(f"--{name}:{pair[which]};" for name, pair in colours.items()) for which in (0, 1))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        '@media screen and (prefers-color-scheme:dark){:root:not([data-theme="light"])'
        f"{{color-scheme:dark;{dark}}}}}\n"
        f'@media screen{{:root[data-theme="dark"]{{color-scheme:dark;{dark}}}}}\n'
    )
