"""The report's page around its words: colours in light and dark, styles, the script that draws, the frame.

The frame's policy allows the two scripts of the page by their hash, and nothing from anywhere else: the browser itself
refuses to load, to send, and to run what a name might have smuggled in.
"""

from __future__ import annotations

import base64
import hashlib

from calibrators.plots._style import BAND, FAINT, INK, OVERCONFIDENT, PAPER, QUIET, SERIES, SHARE, UNDERCONFIDENT

COLOURS = {
    "ink": (INK, "#e8ebf2"),
    "quiet": (QUIET, "#9aa5b8"),
    "faint": (FAINT, "#2b3342"),
    "band": (BAND, "#2a3345"),
    "paper": (PAPER, "#141923"),
    "over": (OVERCONFIDENT, "#ff8b4d"),
    "under": (UNDERCONFIDENT, "#6fb1ff"),
    "share": (SHARE, "#5d6880"),
    "accent": (SERIES[1], "#b79cff"),
    "clear": ("transparent", "transparent"),
}
"""Colours of the page and of its charts: in light, in dark."""

_THEMES = "".join(
    f"{start}{''.join(f'--{name}:{pair[which]};' for name, pair in COLOURS.items())}{end}"
    for which, start, end in (
        (0, ":root{color-scheme:light dark;", "}"),
        (1, "@media screen and (prefers-color-scheme:dark){:root{", "}}"),
    )
)

STYLE = (
    _THEMES
    + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:clamp(1.25rem,5vw,4rem);background:var(--paper);color:var(--ink);
 font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.eyebrow{margin:0;color:var(--quiet);overflow-wrap:anywhere}
h1{margin:.4rem 0 1.2rem;font-size:clamp(1.6rem,5vw,2.5rem);line-height:1.2;letter-spacing:-.015em;text-wrap:balance}
h2{margin:3.5rem 0 .75rem;font-size:1.25rem}
h3{margin:0;font-size:1rem;color:var(--ink);overflow-wrap:anywhere}
p{max-width:46rem}
.example{font-size:clamp(1.1rem,2.6vw,1.35rem);line-height:1.5}
.quiet,small,figcaption{color:var(--quiet)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(var(--least),100%),1fr));
 gap:1.5rem 2rem;align-items:end}
figure{margin:0;min-width:0;max-width:calc(var(--least)*1.5);break-inside:avoid}
figcaption small{min-height:2.6em}
.plot{width:100%;overflow:hidden}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;margin:1rem 0 0;padding:0;list-style:none;font-size:.875rem}
.key i{display:inline-block;margin-right:.5rem;vertical-align:middle}
.dot{width:.8rem;height:.8rem;border-radius:50%}
.band{width:1.4rem;height:.8rem;background:var(--band)}
.line{width:1.8rem;border-top:3px solid}
.stroke-dash{border-top-style:dashed}.stroke-dot{border-top-style:dotted}.stroke-dashdot{border-top-style:double}
.dot.over{background:var(--over)}.dot.under{background:var(--under)}.dot.ink{background:var(--ink)}
.line.over{border-color:var(--over)}.line.under{border-color:var(--under)}.line.share{border-color:var(--share)}
.line.quiet{border-color:var(--quiet)}.line.accent{border-color:var(--accent)}
details{margin-top:1rem;overflow-x:auto}
summary{color:var(--quiet);cursor:pointer}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.7rem .75rem;border-bottom:1px solid var(--faint);text-align:right;vertical-align:top}
details th,details td{padding:.25rem .75rem;font-size:.875rem}
th:first-child{padding-left:0;text-align:left;overflow-wrap:anywhere}
details th:first-child{overflow-wrap:normal}
thead th{font-weight:600;vertical-align:bottom}
small{display:block;font-size:.8rem;font-weight:400}
tbody th{font-weight:500}
.served th,.served td{font-weight:700}
mark{margin-left:.4rem;padding:.1rem .5rem;border-radius:1rem;background:var(--under);color:var(--paper);
 font-size:.75rem;font-weight:600;white-space:nowrap}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.7rem 2rem;margin:0}
dt{font-weight:600}
dd{margin:0;max-width:44rem;color:var(--quiet)}
@media(max-width:40rem){
 .scores thead{display:none}
 .scores tr{display:block;padding:.9rem 0;border-bottom:1px solid var(--faint)}
 .scores th,.scores td{display:flex;justify-content:space-between;gap:1rem;padding:.2rem 0;border:0}
 .scores tbody th{justify-content:flex-start;font-weight:700}
 .scores td::before{content:attr(data-head);color:var(--quiet);font-weight:400}
 details th,details td{padding:.25rem .3rem;white-space:nowrap}
 dl{display:block}
 dd{margin:0 0 1rem}
}
@media print{
 body{width:17cm;max-width:none;padding:0}
 .panels{grid-template-columns:repeat(auto-fit,minmax(min(calc(var(--least)*.8),100%),1fr))}
 h1,h2,h3,p{break-after:avoid}
 tr{break-inside:avoid}
}
"""
)

DRAW = """
const config = {displayModeBar: false};
const painted = (value, key, colours) =>
  Array.isArray(value) ? value.map((one) => painted(one, key, colours))
  : value && typeof value === 'object'
    ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, painted(one, key, colours)]))
  : /color$/.test(key) ? colours.getPropertyValue(value) : value;
const draw = (place) => {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  const {data, layout} = painted(figure, '', getComputedStyle(document.documentElement));
  Plotly.react(place, data, {...layout, width: place.clientWidth, height: place.clientHeight}, config);
};
const places = [...document.querySelectorAll('.plot')];
// Called for the first time when a place gets its first size.
const sizes = new ResizeObserver((changed) => changed.forEach(({target}) => draw(target)));
places.forEach((place) => sizes.observe(place));
for (const change of ['print', '(prefers-color-scheme: dark)'])
  matchMedia(change).addEventListener('change', () => places.forEach(draw));
"""
"""Draws each chart from the JSON beside it, anew when the size of its place or the colours of the page change."""

NO_SCRIPT = (
    "<noscript><style>.plot,.key{display:none}</style><p>The pictures need JavaScript, which is off here. "
    "Their numbers stand where they would be, under “The numbers”.</p></noscript>"
)

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: calibration report</title>
<style>{style}</style>
</head>
<body>
{body}
{scripts}
</body>
</html>
"""


def page(title: str, body: str, scripts: tuple[str, ...]) -> str:
    """The whole file around a body, of which title and body are HTML already; it runs these scripts and no other."""
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    # plotly.js writes its own style element; data: is for the pictures inside it.
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    elements = "\n".join(f"<script>{script}</script>" for script in scripts)
    return _FRAME.format(policy=policy, title=title, style=STYLE, body=body, scripts=elements)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
