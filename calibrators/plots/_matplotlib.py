"""matplotlib, loaded when something is drawn and not before; never pyplot, which keeps global state."""

from __future__ import annotations

from types import ModuleType


def import_matplotlib() -> ModuleType:
    """matplotlib with the modules that the plots use; ImportError naming the extra where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.patches
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'calserve[plots]'") from error
    return matplotlib
