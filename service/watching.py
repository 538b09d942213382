"""What `calserve watch` shows: a model's monitors and its alarms, as they change, until somebody stops it."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live

from service.client import Client
from service.console import alarms_table, monitors_table, nowcasts_table

PAUSE_SECONDS = 1.0


def watch(client: Client, model: str, console: Console, pause: Callable[[float], None] = time.sleep) -> None:
    """Show it again every second, until interrupted."""
    with Live(shown(client, model), console=console, auto_refresh=False) as live:
        try:
            while True:
                pause(PAUSE_SECONDS)
                live.update(shown(client, model), refresh=True)
        except KeyboardInterrupt:
            return


def shown(client: Client, model: str) -> Group:
    report = client.monitor_report(model)
    tables = monitors_table(report.monitors), nowcasts_table(report.nowcasts), alarms_table(report.alarms)
    return Group(*tables)
