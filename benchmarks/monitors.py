"""What the default monitors cost: pairs a second that they read, and what a caller notices of them.

    OMP_NUM_THREADS=1 python -m benchmarks.monitors [--pairs 100000] [--seconds 5] [--turns 4]

First in one process: a journal with predictions and labels of ten classes, read by each default monitor alone and by
all together, a transaction a step, as a server does. Then servers on one core, with the default monitors and without,
by turns: one caller asks for predictions one after the other, labels all of them, and is timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.serving import say, show
from benchmarks.serving_models import MODELS
from benchmarks.serving_peers import SERVERS, Running
from calibrators.numerics import softmax
from service.client import Client
from service.drift.defaults import default_monitors
from service.drift.monitors import Cohorts, Monitor, Step, subject_of
from service.store.database import Connection
from service.store.journal import Journal
from service.store.labels import Labels, NewLabel, NewLabels
from service.store.packs import Answered

N_CLASSES, ROWS_EACH, DIGEST, REVISION = 10, 64, "digest", "temperature-1"
MODEL = MODELS["mlp"]


def filled(journal: Journal, count: int) -> None:
    """Predictions with labels, of a calibrated model."""
    rng = np.random.default_rng(0)
    stream, labels = journal.open_stream("m", "1", DIGEST, N_CLASSES), Labels(journal)
    for _ in range(count // ROWS_EACH // 100):
        logits = (2 * rng.standard_normal((100, ROWS_EACH, N_CLASSES))).astype(np.float32)
        classes = (logits + rng.gumbel(size=logits.shape)).argmax(axis=2)
        now = int(1000 * time.time())
        ids = [stream.append(Answered.one(now, REVISION, 0, z, softmax(z)), ROWS_EACH).decode() for z in logits]
        journal.writer.write_now(journal.write_waiting)
        told = [
            NewLabel(name, row, int(y)) for name, own in zip(ids, classes, strict=True) for row, y in enumerate(own)
        ]
        journal.writer.write_now(partial(_record, labels, told))


def _record(labels: Labels, told: Sequence[NewLabel], connection: Connection) -> None:
    labels.record(connection, "m", "", NewLabels.of(told))


def read_all(journal: Journal, monitors: Sequence[Monitor]) -> float:
    """Pairs a second of processor time, until all have read everything."""
    begun, rows = time.process_time(), monitors[0].rows
    while True:
        known: Cohorts = {}
        steps = [(monitor, step) for monitor in monitors if (step := monitor.step(known)) is not None]
        if not steps:
            return (monitors[0].rows - rows) / (time.process_time() - begun)
        journal.writer.write_now(partial(_write, steps))
        for monitor, step in steps:
            monitor.written(step)


def _write(steps: Sequence[tuple[Monitor, Step]], connection: Connection) -> None:
    for monitor, step in steps:
        monitor.write(connection, step)


def begun(journal: Journal) -> list[Monitor]:
    monitors = [Monitor(journal, spec, wait_seconds=0) for spec in default_monitors("m")]
    for monitor in monitors:
        subject = subject_of(monitor.spec.watched, DIGEST, REVISION)
        journal.writer.write_now(partial(_begin, monitor, subject))
        monitor.load()
    return monitors


def _begin(monitor: Monitor, subject: str, connection: Connection) -> None:
    monitor.begin(connection, subject)


def in_process(count: int) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), queue_bytes=1 << 30)
        journal.start()
        monitors = begun(journal)
        filled(journal, 20_000)
        read_all(journal, monitors)  # now all is compiled and has its reference
        rates = []
        for chosen in (monitors, *([monitor] for monitor in monitors)):
            filled(journal, count)
            rates.append(read_all(journal, chosen))
        states = [len(monitor.watching.encode()) for monitor in monitors]
        journal.close()
    names = [monitor.spec.name for monitor in monitors]
    table = [
        ["", "pairs/s of processor time", "bytes of its state"],
        ["all together", f"{rates[0]:,.0f}", f"{sum(states):,}"],
    ]
    columns = zip(names, rates[1:], states, strict=True)
    return table + [[name, f"{rate:,.0f}", f"{state:,}"] for name, rate, state in columns]


def noticed(extra: Sequence[str], core: int, seconds: float) -> list[float]:
    """Seconds of each prediction of one caller, who labels every row."""
    options = ("--monitor-wait-seconds", "0", *extra)
    with (
        Running(SERVERS["calserve"], MODEL, cores={core}, extra=options) as running,
        Client(running.address, show_progress=False) as client,
    ):
        rows, taken, until = MODEL.rows(ROWS_EACH), [], time.perf_counter() + seconds
        while (before := time.perf_counter()) < until:
            known = client.predict(MODEL.name, rows).prediction_id
            taken.append(time.perf_counter() - before)
            client.label(MODEL.name, [known] * ROWS_EACH, [0] * ROWS_EACH, rows=range(ROWS_EACH))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=128_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=4)
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    show(f"{N_CLASSES} classes", in_process(chosen.pairs))
    taken: dict[str, list[float]] = {"off": [], "default": []}
    for turn in range(chosen.turns):
        for mode, seconds in taken.items():
            say(f"turn {turn + 1}, monitors {mode}")
            seconds += noticed(("--monitors", mode), cores[0], chosen.seconds)
    table = [["monitors", "predictions", "p50, ms", "p99, ms"]]
    for mode, seconds in taken.items():
        figures = [f"{1000 * float(np.percentile(seconds, q)):.2f}" for q in (50, 99)]
        table.append([mode, str(len(seconds)), *figures])
    show("a prediction of 64 rows, all labelled", table)


if __name__ == "__main__":
    main()
