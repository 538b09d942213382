"""Ten minutes of everything at once: callers who behave, on several models, and attacks by turns. What must stay, does.

    python -m benchmarks.soak [--minutes 10] [--front h2]

The server runs on core 0. Four callers who wait for each answer run on the last core, in a process of their own: of an
MLP with a temperature, of a head of 1,000 classes, of a conformal revision, and of one that learns from the labels they
send. The attacks are those of the tests (`tests/service/attacks.py`), from a third process, which has what the callers
leave of that core. None of the four may see an error, and they send nothing again. Memory and open files are compared
when the connections of the attacks are gone and the callers are alone.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.serving import say, show
from benchmarks.serving_models import MODELS, request_bytes
from benchmarks.serving_peers import SERVERS, Place, Running, Server, Start
from benchmarks.serving_trials import Row
from service.client import Client
from service.client.failures import Retries
from service.errors import CalserveError
from tests.service.attacks import ATTACKS, Attack

MLP, HEAD = MODELS["mlp"], MODELS["head"]
LEARNING = replace(MLP, name="learning")
CONFORMAL = "split_conformal-2"
PAUSE_SECONDS = 0.02
ATTACK_SECONDS, CALM_SECONDS, SETTLE_SECONDS = 3.0, 5.0, 20.0
GROWTH_MB_GOAL, SLOPE_MB_GOAL, FILES_GOAL = 64.0, 2.0, 4
P99_MS_GOAL, SLOWER_GOAL = 100.0, 3.0
MANY_FILES = 8192
ROWS = 500


def mixed(place: Place) -> Start:
    start = SERVERS["calserve"].start(place)
    for model in (HEAD, LEARNING):
        model.write(place.folder / "models")
    flags = ["--online-wait-seconds", "0", "--online-quota-labels", "1000000000"]
    return replace(start, arguments=[*start.arguments, *flags])


def fit(client: Client) -> None:
    rng = np.random.default_rng(0)
    for model, kinds in ((MLP, ("temperature", "split_conformal")), (HEAD, ()), (LEARNING, ("online_temperature",))):
        logits = client.logits(model.name, model.rows(ROWS, seed=2))
        labels = np.argmax(logits / 2 + rng.gumbel(size=logits.shape), axis=1)
        revisions = [client.fit(model.name, kind, logits=logits, labels=labels).revision for kind in kinds]
        if revisions:
            client.activate(model.name, revisions[0])


@dataclass
class Caller:
    """One who behaves: what it asks for, how long that took, and what went wrong."""

    ask: Callable[[Client, int], object]
    milliseconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(self, address: str, over: threading.Event) -> None:
        number = 0
        with Client(address, show_progress=False, timeout_seconds=10, retries=Retries(most=0)) as client:
            while not over.wait(PAUSE_SECONDS):
                begun = time.perf_counter()
                try:
                    self.ask(client, number)
                    self.milliseconds.append(1000 * (time.perf_counter() - begun))
                except Exception as error:
                    self.errors.append(f"{type(error).__name__}: {error}"[:200])
                number += 1


def callers() -> dict[str, Caller]:
    mlp, head = MLP.rows(ROWS), HEAD.rows(ROWS)

    def learning(client: Client, number: int) -> None:
        row = number % ROWS
        known = client.predict(LEARNING.name, mlp[row : row + 1])
        told = client.label(LEARNING.name, [known.prediction_id], [int(known.outputs["label"][0])])
        if told != ["recorded"]:
            raise CalserveError(f"a label was {told[0]}")

    return {
        "mlp": Caller(lambda client, n: client.predict(MLP.name, mlp[n % ROWS][None])),
        "head": Caller(lambda client, n: client.predict(HEAD.name, head[n % ROWS][None])),
        "conformal": Caller(
            lambda client, n: client.predict(MLP.name, mlp[n % ROWS][None], calibrator=CONFORMAL, confidence_level=0.9)
        ),
        "online, with its label": Caller(learning),
    }


Heard = dict[str, tuple[list[float], list[str]]]


def behave(address: str, cores: set[int], ends: Connection) -> None:
    """The callers, in a process of their own: at each word what happened since the last; they stop at "stop"."""
    os.sched_setaffinity(0, cores)
    own, over = callers(), threading.Event()
    threads = [threading.Thread(target=caller.run, args=(address, over)) for caller in own.values()]
    for thread in threads:
        thread.start()
    word = ""
    while word != "stop":
        word = ends.recv()
        if word == "stop":
            over.set()
            for thread in threads:
                thread.join()
        heard = {}
        for name, caller in own.items():
            heard[name] = caller.milliseconds, caller.errors
            caller.milliseconds, caller.errors = [], []
        ends.send(heard)


@dataclass
class Target:
    """The server as the attacks see it."""

    address: str
    front: str
    request: bytes

    def connect(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=20)


@dataclass
class Soak:
    """What was seen so far: latencies and errors by phase, memory and files after each cycle."""

    running: Running
    target: Target
    ends: Connection
    latencies: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_caller: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)
    samples: list[tuple[float, float, int]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        """Note what the callers heard since the last phase."""
        self.ends.send(name)
        heard: Heard = self.ends.recv()
        for caller, (milliseconds, errors) in heard.items():
            self.latencies[name] += milliseconds
            self.by_caller[caller] += milliseconds
            self.errors += [f"{caller}, {name}: {error}" for error in errors]

    def calm(self) -> None:
        time.sleep(CALM_SECONDS)
        self.phase("calm")

    def attack(self, attack: Attack) -> None:
        end = time.monotonic() + ATTACK_SECONDS
        while time.monotonic() < end:
            with ExitStack() as stack:
                attack(self.target, stack)
        self.phase(attack.__name__)

    def sample(self) -> None:
        """Memory in MB and open files, when those are as few as they were at first."""
        end = time.monotonic() + SETTLE_SECONDS
        while self.samples and open_files(self.running) > self.samples[0][2] and time.monotonic() < end:
            time.sleep(0.1)
        self.samples.append((time.monotonic(), self.running.resident_bytes() / 1e6, open_files(self.running)))
        self.phase("while connections are let go")

    def slope(self) -> float:
        """MB a minute since the first cycle, by least squares."""
        times, sizes, _ = np.array(self.samples[1:]).T
        return float(np.polyfit((times - times[0]) / 60, sizes, 1)[0]) if len(times) > 1 else float("nan")

    def rows(self) -> Iterator[Row]:
        for error in self.errors[:10]:
            say(error)
        count = sum(map(len, self.latencies.values()))
        yield Row(f"errors of {count:,} well-behaved calls", str(len(self.errors)), "0", not self.errors)
        grown = self.samples[-1][1] - self.samples[1][1]
        shown = f"{grown:+.1f} MB, {self.slope():+.2f} MB a minute, to {self.samples[-1][1]:.0f} MB"
        flat = grown <= GROWTH_MB_GOAL and not self.slope() > max(SLOPE_MB_GOAL, GROWTH_MB_GOAL / self.minutes())
        goal = f"<= {GROWTH_MB_GOAL:g} MB, {SLOPE_MB_GOAL:g} a minute"
        yield Row("memory since the first cycle", shown, goal, flat)
        files = self.samples[-1][2] - self.samples[0][2]
        yield Row("open files since the start", f"{files:+d}", f"<= {FILES_GOAL}", files <= FILES_GOAL)
        calm = percentile(self.latencies["calm"], 99)
        yield Row("p99 in the calm", f"{calm:.1f} ms", "", None)
        limit = max(P99_MS_GOAL, SLOWER_GOAL * calm)
        for name, found in self.latencies.items():
            if name != "calm" and found:
                p99 = percentile(found, 99)
                yield Row(f"p99 beside {name}", f"{p99:.1f} ms", f"<= {limit:.0f} ms", p99 <= limit)

    def minutes(self) -> float:
        return (self.samples[-1][0] - self.samples[0][0]) / 60

    def caller_table(self) -> list[list[str]]:
        heading = ["caller", "calls", "p50 ms", "p99 ms"]
        figures = [
            [name, str(len(found)), *(f"{percentile(found, q):.2f}" for q in (50, 99))]
            for name, found in self.by_caller.items()
        ]
        return [heading, *figures]


def percentile(values: list[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else float("nan")


def open_files(running: Running) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in running.processes())


def soak(running: Running, target: Target, cores: set[int], minutes: float) -> Soak:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=behave, args=(running.address, cores, theirs))
    process.start()
    try:
        found = Soak(running, target, ours)
        found.phase("the first calls")
        found.calm()
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the callers have their core first
        found.sample()
        end = time.monotonic() + 60 * minutes
        cycles = 0
        while time.monotonic() < end or len(found.samples) < 3:
            cycles += 1
            for attack in ATTACKS:
                say(f"cycle {cycles}: {attack.__name__}")
                found.attack(attack)
            found.sample()
            found.calm()
        ours.send("stop")
        ours.recv()
    finally:
        process.join(20)
        process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="two cycles of all attacks at least, about 100 s")
    parser.add_argument("--front", default="h2", choices=("h2", "grpc"))
    chosen = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MANY_FILES, hard), hard))  # for the server too, which inherits it
    cores = sorted(os.sched_getaffinity(0))
    server = Server("calserve", mixed)
    with Running(server, MLP, cores={cores[0]}, extra=("--front", chosen.front)) as running:
        os.sched_setaffinity(0, {cores[-1]})
        with Client(running.address, show_progress=False, timeout_seconds=120) as client:
            fit(client)
        target = Target(running.address, chosen.front, request_bytes(MLP.name, MLP.rows(1)))
        found = soak(running, target, {cores[-1]}, chosen.minutes)
    rows = list(found.rows())
    show("The callers who behave", found.caller_table())
    show(f"Soak, front {chosen.front}", [["what", "measured", "goal", "met"], *(row.cells() for row in rows)])
    sys.exit(any(row.met is False for row in rows))


if __name__ == "__main__":
    main()
