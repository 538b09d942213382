"""calserve beside a plain gRPC server and the peers that are installed: what a request costs, and the goals.

    python -m benchmarks.serving [--models mlp,head,wide,resnet18] [--cases TLS,c=16] [--rounds 7] [--quick]
                                 [--only compare,added,trials,kinds,open] [--json FILE]
                                 [--peers triton=/path/to/python,mlserver=...,kserve=...]

Each server runs on core 0 with one thread to a run, the load on core 1. They take turns, round by round; a figure is
the median over rounds of the ratio within the round. The cost is the processor time, user and system, of the server's
processes; wall time is shown too, but on a shared machine it is weather. calserve serves a fitted temperature.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console

from benchmarks import serving_trials as trials
from benchmarks.load import H2LOAD, Command, Load, Result, h2load
from benchmarks.open_loop import open_table, plot, steps
from benchmarks.serving_models import MODELS, BenchmarkModel, write_payloads
from benchmarks.serving_peers import SERVERS, Absent, Running
from benchmarks.serving_trials import Row
from benchmarks.stages import kinds_table
from service.client import Client
from service.errors import CalserveError

PEERS = {"floor": ("floor",), "triton": ("triton", "triton-batching"), "mlserver": ("mlserver",), "kserve": ("kserve",)}
OWN = ("calserve", "calserve-grpc")
"""The two fronts."""
FIT_ROWS, FIT_BYTES, REVISION = 500, 64 << 20, "temperature-1"
ADDED_GOAL = 1.03
FIGURES = {"cpu_us": "CPU us a request", "p50_ms": "p50 ms", "per_second": "requests/s"}
GOALS: dict[tuple[str, str], dict[tuple[str, str], float]] = {
    ("cpu_us", "reference"): {
        ("mlp", "unary c=1"): 0.20,
        ("mlp", "unary c=16"): 0.10,
        ("mlp", "unary c=64"): 0.08,
        ("mlp", "stream c=16"): 0.20,
        ("mlp", "unary c=16, stock client"): 0.20,
        ("mlp", "unary c=16, TLS"): 0.20,
        ("head", "unary c=64"): 0.08,
        ("wide", "unary c=1"): 0.90,
    },
    ("cpu_us", "triton-batching"): {
        ("mlp", "unary c=1"): 0.15,
        ("mlp", "unary c=16"): 0.20,
        ("mlp", "unary c=64"): 0.20,
        ("mlp", "stream c=16"): 0.20,
        ("mlp", "unary c=16, stock client"): 0.30,
        ("head", "unary c=64"): 0.30,
    },
    ("p50_ms", "reference"): {("mlp", "unary c=1"): 0.30},
    ("p50_ms", "triton-batching"): {("mlp", "unary c=1"): 0.10},
}
"""By figure and by whom it is compared with, the largest ratio wanted of a model under a load."""


@dataclass(frozen=True)
class Case:
    """A kind of load: so many calls in flight on each connection. `stock`: by grpc.aio even where h2load is there, to
    see a client that people have.
    """

    mode: str
    concurrency: int
    stock: bool = False
    connections: int = 1
    tls: bool = False

    @property
    def name(self) -> str:
        more = {"stock client": self.stock, f"{self.connections} connections": self.connections > 1, "TLS": self.tls}
        return ", ".join([f"{self.mode} c={self.concurrency}", *(what for what, true in more.items() if true)])


CASES = (Case("unary", 1), Case("unary", 16), Case("unary", 64), Case("stream", 16), Case("unary", 16, stock=True))
CASES_OF = {
    "mlp": (*CASES, Case("unary", 1, connections=64), Case("unary", 16, tls=True)),
    "wide": (Case("unary", 1), Case("unary", 4)),
}


@dataclass(frozen=True)
class Window:
    """One server under one load for about a second."""

    model: str
    case: str
    server: str
    round: int
    cpu_us: float
    p50_ms: float
    per_second: float
    rows_a_run: float | None


@dataclass
class Bench:
    """What all measurements share. `python` says which Python a server runs in."""

    load: Load
    seconds: float
    rounds: int
    client_cores: set[int]
    server_cores: set[int]
    python: Mapping[str, str]
    extra: Sequence[str]
    folder: Path
    output: str
    only_cases: Sequence[str] = ("",)
    windows: list[Window] = field(default_factory=list)
    rates: dict[tuple[str, str, Case], float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def cases(self, model: str) -> list[Case]:
        return [case for case in CASES_OF.get(model, CASES) if any(part in case.name for part in self.only_cases)]

    def start(self, name: str, model: BenchmarkModel, tls: bool = False) -> Running:
        """A server on a model, calibrated if it is calserve. Absent if it does not start."""
        if name in OWN:
            with ExitStack() as stack:
                running = stack.enter_context(self.start_bare(model, name=name, tls=tls))
                calibrate(running)
                stack.pop_all()  # it runs on, and whoever asked for it stops it
            return running
        python = self.python.get(name, sys.executable)
        return Running(SERVERS[name], model, cores=self.server_cores, python=python, tls=tls)

    def start_bare(
        self,
        model: BenchmarkModel,
        *,
        cores: set[int] | None = None,
        extra: Sequence[str] | None = None,
        name: str = "calserve",
        tls: bool = False,
    ) -> Running:
        """calserve with nothing fitted."""
        more = self.extra if extra is None else extra
        return Running(SERVERS[name], model, cores=cores or self.server_cores, extra=more, tls=tls)

    def command(self, running: Running, case: Case, revision: str = "") -> Command:
        return Command(
            running.address,
            str(self.payloads(running.model, self.output if running.server.name in OWN else "")),
            case.mode,
            case.concurrency,
            self.seconds,
            case.connections,
            revision=revision,
            authority=str(running.tls.certificate) if running.tls else "",
        )

    def payloads(self, model: BenchmarkModel, output: str = "", rows_each: int = 1) -> Path:
        path = self.folder / f"{model.name}-{output}-{rows_each}.npz"
        if not path.exists():
            write_payloads(model, path, rows_each, output)
        return path

    def measure(self, running: Running, case: Case, revision: str = "") -> tuple[float, Result]:
        """Microseconds of the server's processor time a request, and what the client saw."""
        command = self.command(running, case, revision)
        fast = H2LOAD and case.mode == "unary" and not case.stock
        checked = self.clean(running, self.load.run(replace(command, seconds=0.1))) if fast else Result()
        known = running.server.name, running.model.name, case
        requests = int(self.rates.get(known, checked.right / (checked.seconds or 1)) * self.seconds)
        before = running.cpu_seconds()
        if fast:
            least = 2 * case.concurrency * case.connections
            result = h2load(command, checked, max(least, requests), self.client_cores)
        else:
            result = self.load.run(command)
        used = running.cpu_seconds() - before
        self.rates[known] = self.clean(running, result).right / result.seconds
        return 1e6 * used / result.right, result

    def clean(self, running: Running, result: Result) -> Result:
        if not result.clean:
            failures = result.statuses or f"{result.wrong} wrong answers"
            raise Absent(f"{running.server.name} on {running.model.name}: {failures}: {result.problem[:120]}")
        return result


def calibrate(running: Running) -> None:
    """Fit a temperature through the client on random rows, and make it serve."""
    rng = np.random.default_rng(3)
    name, row_bytes = running.model.name, running.model.rows(1).nbytes
    authority = running.tls and running.tls.certificate
    with Client(running.address, root_certificates=authority, show_progress=False, timeout_seconds=120) as client:
        logits = client.logits(name, running.model.rows(min(FIT_ROWS, FIT_BYTES // row_bytes), seed=2), batch_size=16)
        labels = (logits / 2 + rng.gumbel(size=logits.shape)).argmax(axis=1)
        client.fit(name, "temperature", logits=logits, labels=labels, held_out_fraction=0)
        client.activate(name, REVISION)


def compare(bench: Bench, model: BenchmarkModel, servers: Sequence[str]) -> None:
    """All servers on one model, taking turns; and once more with TLS, where that is a case."""
    for tls in (False, True):
        cases = [case for case in bench.cases(model.name) if case.tls == tls]
        if cases:
            with ExitStack() as stack:
                taking_turns(bench, started(bench, stack, model, servers, tls), cases)


def started(
    bench: Bench, stack: ExitStack, model: BenchmarkModel, servers: Sequence[str], tls: bool = False
) -> dict[str, Running]:
    running = {}
    for name in servers:
        with noted(bench, f"{name} on {model.name}" + (" with TLS" if tls else "")):
            running[name] = stack.enter_context(bench.start(name, model, tls))
    return running


def taking_turns(bench: Bench, running: Mapping[str, Running], cases: Sequence[Case]) -> None:
    for turn in range(bench.rounds):
        say(f"round {turn + 1} of {bench.rounds} with {', '.join(running)}")
        for case in cases:
            for name in in_turn(list(running), turn):
                server = running[name]
                if case.mode != "stream" or server.server.streams:
                    with noted(bench, f"{name} on {server.model.name}, {case.name}"):
                        bench.windows.append(window(bench, server, case, turn))


def window(bench: Bench, running: Running, case: Case, turn: int) -> Window:
    name = running.server.name
    before = running.batches()
    cpu, seen = bench.measure(running, case, REVISION if name in OWN else "")
    rows, runs = (after - earlier for after, earlier in zip(running.batches(), before, strict=True))
    batch = rows / runs if runs else None
    return Window(running.model.name, case.name, name, turn, cpu, seen.p50, seen.right / seen.seconds, batch)


def batch_table(bench: Bench, model: str) -> list[list[str]]:
    """A row a case: how many rows a run had, of the servers that tell."""
    told = [w for w in bench.windows if w.model == model and w.rows_a_run is not None]
    servers = list(dict.fromkeys(w.server for w in told))
    table = [["load", *servers]]
    for case in bench.cases(model):
        of = [[w.rows_a_run or 0 for w in told if (w.case, w.server) == (case.name, server)] for server in servers]
        table.append([case.name, *(f"{statistics.median(found):.1f}" if found else "-" for found in of)])
    return table


def added_by_calibration(bench: Bench, model: BenchmarkModel) -> Iterator[Row]:
    """One calserve, its revision switched on and off between windows; callers may wait as long as they like."""
    ratios: dict[str, list[float]] = {}
    patient = [*bench.extra, "--max-queue-seconds", "60"]
    with bench.start_bare(model, extra=patient) as running, Client(running.address, show_progress=False) as client:
        calibrate(running)
        for turn in range(2 * bench.rounds):
            say(f"{model.name}: what calibration adds, round {turn + 1} of {2 * bench.rounds}")
            for case in (Case("unary", 16), Case("unary", 64)):
                cpu = {}
                for revision in in_turn([REVISION, "none"], turn):
                    client.activate(model.name, revision)
                    cpu[revision], _ = bench.measure(running, case, revision)
                ratios.setdefault(case.name, []).append(cpu[REVISION] / cpu["none"])
    for case_name, found in ratios.items():
        middle, spread = statistics.median(found), np.subtract(*np.percentile(found, [75, 25]))
        shown = f"{100 * (middle - 1):+.1f} % (quartiles {100 * spread:.1f} apart)"
        yield Row(f"calibration adds, {model.name}, {case_name}", shown, "<= 3 %", middle <= ADDED_GOAL)


def ratio(
    windows: Sequence[Window], model: str, case: str, server: str, figure: str, other: str = "reference"
) -> float | None:
    """The median over rounds of a figure's ratio to another server's in the same round."""
    of = {(w.server, w.round): getattr(w, figure) for w in windows if (w.model, w.case) == (model, case)}
    rounds = [turn for name, turn in of if name == server and (other, turn) in of]
    return statistics.median(of[server, turn] / of[other, turn] for turn in rounds) if rounds else None


def comparison_table(bench: Bench, model: str, figure: str) -> list[list[str]]:
    """A row a case: the reference's own figure, then every server's ratio to it, with the goal for calserve."""
    goals = GOALS.get((figure, "reference"), {})
    windows = [window for window in bench.windows if window.model == model]
    servers = [name for name in SERVERS if name != "reference" and any(w.server == name for w in windows)]
    table = [["load", "reference", "goal", *servers]]
    for case in bench.cases(model):
        own = [getattr(w, figure) for w in windows if w.case == case.name and w.server == "reference"]
        if own:
            ratios = [ratio(windows, model, case.name, server, figure) for server in servers]
            goal = goals.get((model, case.name))
            shown = ["-" if value is None else f"{value:.2f}" for value in ratios]
            table.append([case.name, f"{statistics.median(own):.4g}", f"<= {goal:.2f}" if goal else "", *shown])
    return table


def goal_rows(bench: Bench) -> Iterator[Row]:
    for (figure, other), goals in GOALS.items():
        for (model, case), goal in goals.items():
            value = ratio(bench.windows, model, case, "calserve", figure, other)
            if value is not None:
                what = f"{model}, {case}: {FIGURES[figure]}, to {other}"
                yield Row(what, f"{value:.2f}", f"<= {goal:.2f}", value <= goal)


def open_arrivals(bench: Bench, servers: Sequence[str], picture: Path) -> None:
    """Latency against offered load on the MLP, as a table for each server and as a picture."""
    with ExitStack() as stack:
        found = steps(bench, started(bench, stack, MODELS["mlp"], servers))
    for name in dict.fromkeys(step.server for step in found):
        show(f"{name}: latency against offered load", open_table(found, name))
    plot(found, picture)


def trial_rows(bench: Bench) -> list[Row]:
    """Every trial; one that fails is noted, and the others go on."""
    rows: list[Row] = []
    for trial in (trials.cold_start, trials.workers, trials.overload, trials.cancelled):
        say(trial.__doc__ or "")
        with noted(bench, trial.__name__):
            rows += trial(bench)
    return rows


def in_turn(names: list[str], turn: int) -> list[str]:
    """Forwards and backwards by turns, so that a machine that slows down favours nobody."""
    return names if turn % 2 == 0 else names[::-1]


@contextmanager
def noted(bench: Bench, what: str) -> Iterator[None]:
    """Notes what could not be measured, and goes on."""
    try:
        yield
    except (Absent, CalserveError, grpc.RpcError, subprocess.SubprocessError) as problem:
        bench.absent[what] = str(problem)
        say(f"  {what}: {problem}")


def say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def show(title: str, table: Sequence[Sequence[str]]) -> None:
    """A table in markdown, at once: a run takes long, and what it found is kept when it is cut short."""
    heading, *rows = table
    lines = ["| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(heading), *rows)]
    print(f"\n### {title}\n", *lines, sep="\n", flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default="", help=f"name=python, comma-separated; of {', '.join(PEERS)}")
    parser.add_argument("--quick", action="store_true", help="short windows, two rounds: to see that all of it runs")
    parser.add_argument("--cases", default="", help="the loads whose names hold one of these parts, comma-separated")
    parser.add_argument("--only", default="compare,added,trials,kinds,open", help="some of these")
    parser.add_argument(
        "--picture", type=Path, default=Path("docs/latency.png"), help="where latency against offered load is drawn"
    )
    parser.add_argument(
        "--named", action="store_true", help="ask calserve for `probabilities` alone, not for all outputs"
    )
    parser.add_argument("--calserve-arguments", default="", help="more flags for `calserve serve`")
    parser.add_argument("--json", type=Path, help="also write every window and row there")
    return parser.parse_args()


def bench_for(arguments: argparse.Namespace, load: Load, folder: Path, server: set[int], client: set[int]) -> Bench:
    python: dict[str, str] = {}
    for part in filter(None, arguments.peers.split(",")):
        name, _, path = part.partition("=")
        python |= dict.fromkeys(PEERS[name], path or sys.executable)
    return Bench(
        load,
        seconds=0.4 if arguments.quick else 1.5,
        rounds=2 if arguments.quick else arguments.rounds,
        client_cores=client,
        server_cores=server,
        python=python,
        extra=arguments.calserve_arguments.split(),
        folder=folder,
        output="probabilities" if arguments.named else "",
        only_cases=arguments.cases.split(","),
    )


def main() -> None:
    arguments = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    models = [MODELS[name] for name in arguments.models.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    server, client = {cores[0]}, {cores[-1]}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Load(client) as load:
        bench = bench_for(arguments, load, Path(folder), server, client)
        if "compare" in arguments.only:
            for model in models:
                compare(bench, model, ["reference", *OWN, *bench.python])
                for figure, unit in FIGURES.items():
                    title = f"{model.name}: {unit}; the servers as ratios to the reference"
                    show(title, comparison_table(bench, model.name, figure))
                show(f"{model.name}: rows a run, as the servers' statistics have it", batch_table(bench, model.name))
        rows += goal_rows(bench)
        if "added" in arguments.only:
            for model in models:
                with noted(bench, f"what calibration adds to {model.name}"):
                    rows += added_by_calibration(bench, model)
        if "trials" in arguments.only:
            rows += trial_rows(bench)
        if "open" in arguments.only:
            open_arrivals(bench, ["reference", *OWN, *bench.python], arguments.picture)
    if rows:
        show("Goals", [["what", "measured", "goal", "met"], *(row.cells() for row in rows)])
    if "kinds" in arguments.only:
        for name in ("mlp", "head"):
            table = kinds_table(MODELS[name], rounds=bench.rounds)
            show(f"What each kind adds to a run of {name}, us (session alone)", table)
    for what, reason in {**absent_peers(bench), **bench.absent}.items():
        print(f"\nNot measured: {what}: {reason}")
    if arguments.json:
        found = {"windows": list(map(asdict, bench.windows)), "rows": list(map(asdict, rows)), "absent": bench.absent}
        arguments.json.write_text(json.dumps(found, indent=1))


def absent_peers(bench: Bench) -> dict[str, str]:
    return {peer: "not named by --peers" for peer, names in PEERS.items() if not set(names) & set(bench.python)}


if __name__ == "__main__":
    main()
