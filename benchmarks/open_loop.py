"""Latency against offered load: Poisson arrivals in steps, from low until a server cannot follow, servers in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load import Command
from benchmarks.serving_peers import Running

if TYPE_CHECKING:
    from benchmarks.serving import Bench

FIRST_RATE, FACTOR, MOST_STEPS = 500.0, 1.6, 12
DEADLINE_SECONDS = 2.0
KEPT_UP, HIGH_MS, LATE_MS = 0.95, 100.0, 2.0
"""A server has had enough when fewer are answered in time or the median is higher; the client when half its calls are
so late.
"""
COLOURS = {
    "reference": "#7f7f7f",
    "calserve": "#0072b2",
    "calserve-grpc": "#56b4e9",
    "triton": "#e69f00",
    "triton-batching": "#d55e00",
    "mlserver": "#009e73",
    "kserve": "#cc79a7",
}


@dataclass(frozen=True)
class Step:
    """What a server made of so many calls a second. Latencies in ms, of the calls that were answered."""

    server: str
    offered: float
    answered: float
    p50: float
    p99: float
    late: float
    cpu_us: float

    @property
    def followed(self) -> bool:
        return self.answered >= KEPT_UP * self.offered and self.p50 <= HIGH_MS and self.late <= LATE_MS


def steps(bench: Bench, running: Mapping[str, Running]) -> list[Step]:
    """Every server at every rate, as far as it can follow and one step beyond."""
    found: list[Step] = []
    following = dict(running)
    for rate in (FIRST_RATE * FACTOR**number for number in range(MOST_STEPS)):
        for name, server in list(following.items()):
            found.append(step(bench, server, rate))
            if not found[-1].followed:
                del following[name]
    return found


def step(bench: Bench, running: Running, rate: float) -> Step:
    payloads = str(bench.payloads(running.model))
    seconds = bench.seconds
    command = Command(running.address, payloads, "poisson", 1, seconds, rate=rate, deadline_seconds=DEADLINE_SECONDS)
    before = running.cpu_seconds()
    seen = bench.load.run(command)
    used = running.cpu_seconds() - before
    calls = seen.right + seen.wrong + sum(seen.statuses.values())
    answered = rate * seen.right / calls
    cpu = 1e6 * used / max(1, seen.right)
    return Step(running.server.name, rate, answered, seen.p50, seen.p99, seen.late, cpu)


def open_table(found: Sequence[Step], server: str) -> list[list[str]]:
    heading = ["offered/s", "answered/s", "p50 ms", "p99 ms", "CPU us a request", "client late, p50 ms"]
    figures = ("offered", "answered", "p50", "p99", "cpu_us", "late")
    rows = [[f"{getattr(step, name):.4g}" for name in figures] for step in found if step.server == server]
    return [heading, *rows]


def plot(found: Sequence[Step], path: Path) -> None:
    """Median and 99th percentile against what is offered; a cross where a server could not follow."""
    import matplotlib  # only here: nothing else needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, title in zip(axes, ("p50", "p99"), ("median", "99th percentile"), strict=True):
        for server in dict.fromkeys(step.server for step in found):
            own = [step for step in found if step.server == server]
            x, y = [step.offered for step in own], [getattr(step, name) for step in own]
            (line,) = axis.plot(x, y, "o-", color=COLOURS[server], label=server, markersize=4)
            over = [number for number, step in enumerate(own) if not step.followed]
            axis.plot([x[i] for i in over], [y[i] for i in over], "X", color=line.get_color(), markersize=9)
        axis.set(xscale="log", yscale="log", xlabel="requests offered a second (Poisson)", title=title)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
