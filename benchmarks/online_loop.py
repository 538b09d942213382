"""How long it takes from a label to what it taught being served, and how many labels the loop can take.

    OMP_NUM_THREADS=1 python -m benchmarks.online_loop [--labels 200000] [--singles 300]

A server on one core, the client on another. At rest one label is sent after the other was learned, and the seconds are
the server's own: from the acknowledgement to the assignment of what serves. Then labels of many predictions are sent in
batches, timed until the last of them is learned, while another client asks for predictions one after the other. A
replay learns everything again.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.serving import say, show
from benchmarks.serving_models import MODELS
from benchmarks.serving_peers import SERVERS, Running
from service.client import Client, OnlineState

KINDS = ("online_temperature", "online_platt")
MODEL, ROWS_EACH = MODELS["mlp"], 500
EXTRA = ("--online-wait-seconds", "0", "--online-quota-labels", "1000000000")


def dealt_with(state: OnlineState) -> int:
    return sum(state.rows[what] for what in ("learned", "held_out"))


def wait_for(client: Client, count: int) -> OnlineState:
    while dealt_with(state := client.online_state(MODEL.name)) < count:
        time.sleep(0.001)
    return state


def activate(client: Client, kind: str) -> np.ndarray:
    """The class that each of ROWS_EACH rows has in truth: drawn, so that the model is overconfident."""
    rng = np.random.default_rng(0)
    logits = client.logits(MODEL.name, MODEL.rows(ROWS_EACH))
    labels = np.argmax(logits / 2 + rng.gumbel(size=logits.shape), axis=1)
    client.activate(MODEL.name, client.fit(MODEL.name, kind, logits=logits, labels=labels).revision)
    return labels


def at_rest(client: Client, labels: np.ndarray, count: int) -> Iterator[list[str]]:
    rows = MODEL.rows(ROWS_EACH)
    seconds, seen = [], dealt_with(client.online_state(MODEL.name))
    for index in range(count):
        row = index % ROWS_EACH
        known = client.predict(MODEL.name, rows[row : row + 1]).prediction_id
        client.label(MODEL.name, [known], [int(labels[row])])
        seconds.append(wait_for(client, seen + index + 1).seconds)
    low, middle, high = 1000 * np.nanpercentile(seconds, (50, 95, 100))
    yield ["a label alone, acknowledged to served: p50, p95, most, ms", f"{low:.1f} / {middle:.1f} / {high:.1f}"]


def flood(client: Client, address: str, labels: np.ndarray, count: int) -> Iterator[list[str]]:
    rows = MODEL.rows(ROWS_EACH)
    quiet = pauses(address, threading.Event(), 1.0)
    before = dealt_with(client.online_state(MODEL.name))
    ids = [client.predict(MODEL.name, rows).prediction_id for _ in range(count // ROWS_EACH)]
    ended, busy = threading.Event(), list[float]()
    other = threading.Thread(target=lambda: busy.extend(pauses(address, ended, 600.0)))
    other.start()
    begun = time.perf_counter()
    names = [name for name in ids for _ in range(ROWS_EACH)]
    client.label(MODEL.name, names, np.tile(labels, len(ids)), rows=np.tile(np.arange(ROWS_EACH), len(ids)))
    acknowledged = time.perf_counter() - begun
    wait_for(client, before + len(names))
    whole = time.perf_counter() - begun
    ended.set()
    other.join()
    yield ["labels/s acknowledged, in batches", f"{len(names) / acknowledged:,.0f}"]
    yield ["labels/s through the whole loop", f"{len(names) / whole:,.0f}"]
    for name, measured in (("quiet", quiet), ("in the flood", busy)):
        figures = " / ".join(f"{1000 * np.percentile(measured, q):.1f}" for q in (50, 99))
        yield [f"a prediction, {name}: p50, p99, ms", figures]


def pauses(address: str, ended: threading.Event, seconds: float) -> list[float]:
    """How long each of the predictions took that one caller asked for in this time."""
    taken, until = [], time.perf_counter() + seconds
    with Client(address, show_progress=False) as client:
        row = MODEL.rows(1)
        while not ended.is_set() and (begun := time.perf_counter()) < until:
            client.predict(MODEL.name, row, calibrator="none", outputs=["scores"])
            taken.append(time.perf_counter() - begun)
    return taken


def replay(client: Client) -> Iterator[list[str]]:
    begun = time.perf_counter()
    replayed = client.replay_learning(MODEL.name)
    equal = "equal bit for bit" if replayed.equal else "DIFFERENT"
    yield [f"labels/s of a replay, {equal}", f"{replayed.learned / (time.perf_counter() - begun):,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--labels", type=int, default=200_000)
    parser.add_argument("--singles", type=int, default=300)
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    for kind in KINDS:
        say(kind)
        with (
            Running(SERVERS["calserve"], MODEL, cores={cores[0]}, extra=EXTRA) as running,
            Client(running.address, show_progress=False, timeout_seconds=600) as client,
        ):
            labels = activate(client, kind)
            table = [["what", "measured"], *at_rest(client, labels, chosen.singles)]
            table += [*flood(client, running.address, labels, chosen.labels), *replay(client)]
        show(f"{kind}, {labels.max() + 1} classes", table)


if __name__ == "__main__":
    main()
