"""plotly's bundled script, read when a report has charts and not before."""

from __future__ import annotations


def plotly_script() -> str:
    """plotly.min.js as plotly's own package carries it; ImportError naming the extra where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the charts of a report need plotly: pip install 'calserve[plots]'") from error
    # A browser hashes a script after it has made every line end a line feed.
    script: str = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    return script
