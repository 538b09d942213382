"""Detectors of drift: false alarms, and labels until they ring, on streams that change in a known way.

    OMP_NUM_THREADS=1 python -m benchmarks.drift [--seeds 200] [--stationary 300] [--peers PYTHON,...] [--elec2 FILE]

`--peers` names Pythons that have river, frouros or alibi-detect (`benchmarks/peers.txt` pins what was compared);
`--elec2` a file with arrays probs (n, 2), y and n_train. The streams are made here, of seeds on which no constant of
`service.drift.detectors.recalibration` was chosen: ten classes, normal logits of standard deviation 3.6 that are right,
accuracy .71, and a change after 10,000 rows of 20,000. How much the priors, one class and the inputs change was set so
that the bets of the literature, half on five temperatures and half on four biases of each class (`temperatures and
biases, halves` below), take as long as they were measured to take elsewhere: 197, 410 and 274 rows, or nearly so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import drift_streams
from benchmarks.drift_peers import PEERS
from service.drift.detectors.base import Batch, Detector
from service.drift.detectors.recalibration import Recalibration
from service.drift.detectors.registry import create, kinds
from service.drift.detectors.top_label import confidence_and_correct

Array = NDArray[Any]
Rows = tuple[Array, Array, Array]
"""Logits, labels, segments."""

N_CLASSES, SPREAD, N_SEGMENTS = 10, 3.6, 5
N_ROWS, CHANGE, RAMP, N_STATIONARY = 20_000, 10_000, 5_000, 100_000
FIRST_SEED = 3_000_000

NOTHING = "nothing"

GOALS = {"temperature 1.5": 153, "temperature 2": 64, "label shift": 197, "one class": 410, "one segment": 519}
"""Rows, at a probability of .1 at most to ring falsely within 100,000 rows."""


# ---- streams


def draw(rng: np.random.Generator, n: int, spread: float = SPREAD) -> Rows:
    """Rows of which the softmax of the logits is true."""
    logits = spread * rng.normal(size=(n, N_CLASSES))
    return logits, sample(rng, logits), rng.integers(0, N_SEGMENTS, n)


def sample(rng: np.random.Generator, logits: Array) -> Array:
    return (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def temperature(factor: float, rng: np.random.Generator, n: int) -> Rows:
    """The logits are as many times as large as is right."""
    logits, labels, segments = draw(rng, n)
    return factor * logits, labels, segments


def label_noise(rng: np.random.Generator, n: int) -> Rows:
    """The logits stay, the labels come from flatter probabilities."""
    logits, _, segments = draw(rng, n)
    return logits, sample(rng, logits / 1.5), segments


def gradual(rng: np.random.Generator, n: int) -> Rows:
    """A temperature from 1 to 2 within RAMP rows."""
    logits, labels, segments = draw(rng, n)
    return (1 + np.minimum(np.arange(n) / RAMP, 1))[:, None] * logits, labels, segments


def input_noise(rng: np.random.Generator, n: int) -> Rows:
    logits, labels, segments = draw(rng, n)
    return logits + 1.05 * rng.normal(size=logits.shape), labels, segments


def one_segment(rng: np.random.Generator, n: int) -> Rows:
    """A temperature of 2 in one of five segments."""
    logits, labels, segments = draw(rng, n)
    return np.where(segments == 2, 2.0, 1.0)[:, None] * logits, labels, segments


def covariate_shift(rng: np.random.Generator, n: int) -> Rows:
    """Harder inputs, about which the model is as right as before: to a detector with labels an alarm is a false one."""
    return draw(rng, n, 2.8)


def label_shift(rng: np.random.Generator, n: int) -> Rows:
    """Each class comes .7 times as often as another, in random order; what is seen of a class stays the same."""
    often = rng.permutation(0.7 ** np.arange(N_CLASSES))
    logits, labels, segments = draw(rng, 5 * n)
    kept = np.flatnonzero(rng.random(5 * n) < often[labels])[:n]
    return logits[kept], labels[kept], segments[kept]


def one_class(rng: np.random.Generator, n: int) -> Rows:
    """The odds of one class are a fifth of what is stated."""
    logits, _, segments = draw(rng, n)
    return logits, sample(rng, logits - 1.6 * (np.arange(N_CLASSES) == 0)), segments


CHANGES: dict[str, Callable[[np.random.Generator, int], Rows]] = {
    "temperature 1.5": partial(temperature, 1.5),
    "temperature 2": partial(temperature, 2.0),
    "temperature 0.67": partial(temperature, 0.67),
    "label noise": label_noise,
    "gradual": gradual,
    "input noise": input_noise,
    "one segment": one_segment,
    "label shift": label_shift,
    "one class": one_class,
    "covariate shift": covariate_shift,
}


def changing(change: str, seed: int) -> Batch:
    rng = np.random.default_rng(FIRST_SEED + seed)
    parts = zip(draw(rng, CHANGE), CHANGES[change](rng, N_ROWS - CHANGE), strict=True)
    return Batch(*(np.concatenate(part) for part in parts))


def stationary(seed: int) -> Batch:
    return Batch(*draw(np.random.default_rng(2 * FIRST_SEED + seed), N_STATIONARY))


# ---- detectors


class Halves(Recalibration):
    """Bets as the literature has them: half on temperatures, half on biases of classes; no segments, no learners."""

    shares = dict.fromkeys(Recalibration.shares, 0.0) | {"temperature": 0.5, "class_bias": 0.5}
    grids = dict(Recalibration.grids) | {
        "temperature": dict.fromkeys((0.4, 0.6, 0.8, 1.3, 1.7), 0.2),
        "class_bias": dict.fromkeys((-1.0, -0.5, 0.5, 1.0), 0.25),
    }


class Oracle(Recalibration):
    """One bet, on what one of the changes turns out to be: logits one and a half times as large as is right."""

    shares = dict.fromkeys(Recalibration.shares, 0.0) | {"temperature": 1.0}
    grids = dict(Recalibration.grids) | {"temperature": {1 / 1.5: 1.0}}


CHOSEN: list[str] = []
"""Of the detectors; none: all."""


def detectors() -> dict[str, Callable[[], Detector]]:
    top_label = {"families": "top_label", "adaptive": 0, "max_segments": 0}
    found: dict[str, Callable[[], Detector]] = {
        "recalibration": partial(create, "recalibration"),
        "recalibration, tolerance .01": partial(create, "recalibration", tolerance=0.01),
        "temperatures and biases, halves": partial(Halves, adaptive=0, max_segments=0),
        "temperature 1.5, known beforehand": partial(Oracle, adaptive=0, max_segments=0),
        "top label alone": partial(create, "recalibration", **top_label),
        "top label alone, tolerance .01": partial(create, "recalibration", **top_label, tolerance=0.01),
    }
    found |= {kind: partial(create, kind) for kind in kinds() if kind != "recalibration"}
    return {name: make for name, make in found.items() if name in CHOSEN or not CHOSEN}


def alarms(detector: Detector, batch: Batch) -> Iterator[int]:
    """Rows that it rings at, begun anew after each."""
    read = 0
    while read < len(batch) and (row := detector.update(batch.rows(slice(read, None)))) is not None:
        read += row + 1
        detector.reset()
        yield read - 1


def signals(batch: Batch) -> Array:
    """(len(SIGNALS), n_rows)."""
    _, confidence, correct = confidence_and_correct(batch)
    gap = correct - confidence
    return np.stack([(1 + gap) / 2, gap * gap, 1 - correct, confidence])


def ask_peers(pythons: list[str], sets: dict[str, list[Batch]]) -> Iterator[dict[str, Any]]:
    """What detectors of other libraries make of the same streams, each in a Python that has it."""
    reference = signals(Batch(*draw(np.random.default_rng(0), 2000)))
    streams = {name: np.stack([signals(batch) for batch in batches]) for name, batches in sets.items()}
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file.name, reference=reference, **streams)
        for python in pythons:
            command = [python, str(Path(__file__).parent / "drift_peers.py"), file.name, ";".join(PEERS)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            yield from map(json.loads, done.stdout.splitlines())


# ---- tables


@dataclass
class Watched:
    """Of each detector, where it rang in each stream of a set, and rows a second."""

    rang: dict[str, list[list[int]]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)

    def watch(self, batches: Iterable[Batch]) -> None:
        seconds, n_rows = dict.fromkeys(detectors(), 0.0), 0
        for batch in batches:
            n_rows += len(batch)
            for name, make in detectors().items():
                begun = time.thread_time()
                self.rang.setdefault(name, []).append(list(alarms(make(), batch)))
                seconds[name] += time.thread_time() - begun
        self.speed = {name: n_rows / spent for name, spent in seconds.items()}

    def false_alarms(self, name: str) -> str:
        each = [len(rows) for rows in self.rang[name]]
        rings = np.mean([n > 0 for n in each])
        return f"{np.mean(each):8.2f}{rings:8.2f}{len(each):6d}{self.speed[name]:12,.0f}"

    def delay(self, name: str) -> str:
        """Rows from the change to the first alarm after it: the median, and the part of the streams that had one."""
        each = self.rang.get(name, [])
        first = np.array([min((row - CHANGE + 1 for row in rows if row >= CHANGE), default=np.inf) for rows in each])
        came = first[np.isfinite(first)]
        said = f"{np.median(came):.0f}" if len(came) else "none"
        return said if len(came) in (0, len(first)) else f"{said} ({len(came) / len(first):.0%})"


def elec2(file: Path) -> None:
    """Prices go up or down: the model was fitted on the first rows and never again."""
    given = np.load(file)
    rest = slice(int(given["n_train"]), None)
    logits, labels = np.log(np.clip(given["probs"][rest], 1e-12, 1)), given["y"][rest].astype(np.int64)
    batch = Batch(logits.astype(np.float64), labels, np.zeros(len(labels), np.int64))
    print(f"\nelec2, {len(labels):,} rows: alarms, and the first three")
    for name, make in detectors().items():
        rang = list(alarms(make(), batch))
        print(f"  {name:34}{len(rang):6d}   {rang[:3]}")


def clouds(seeds: int) -> None:
    """The same detector on streams that none of its constants was chosen on, nor how much they change."""
    print(f"\nClasses that are clouds in {drift_streams.N_INPUTS} dimensions: rows to the alarm, {seeds} streams each")
    for change in drift_streams.CHANGES:
        table = Watched()
        for seed in range(seeds):
            batch = drift_streams.stream(change, N_ROWS, CHANGE, FIRST_SEED + seed)
            table.rang.setdefault("recalibration", []).append(list(alarms(create("recalibration"), batch)))
        print(f"  {change:34}{table.delay('recalibration')}")


def speed(rounds: int = 5) -> None:
    print("\nRows a second of its own time, one thread, the best of five rounds")
    cases = [(2, {"adaptive": 0}), (2, {}), (2, {"tolerance": 0.01}), (10, {}), (10, {"tolerance": 0.01})]
    cases += [(100, {}), (1000, {}), (1000, {"tolerance": 0.01})]
    for n_classes, parameters in cases:
        rng, n = np.random.default_rng(0), max(400_000 // n_classes, 1000)
        logits = 3 * rng.normal(size=(n, n_classes))
        batch = Batch(logits, sample(rng, logits), np.zeros(n, np.int64))
        spent = []
        for _ in range(rounds):
            detector = create("recalibration", horizon=1e15, **parameters)
            begun = time.thread_time()
            detector.update(batch)
            spent.append(time.thread_time() - begun)
        n_bets = len(detector.state()["held"])
        print(f"  K={n_classes:<5}{parameters or ''!s:22}{n_bets:6d} bets held{n / min(spent):14,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="streams of each change")
    parser.add_argument("--stationary", type=int, default=300, help="streams without a change")
    parser.add_argument("--peer-seeds", type=int, default=20, help="of these, so many for the peers")
    parser.add_argument("--peers", default="", help="Pythons that have them, with commas between")
    parser.add_argument("--elec2", type=Path)
    parser.add_argument("--clouds", type=int, default=16, help="streams of each change of the other kind")
    parser.add_argument("--only", nargs="+", default=[], help="detectors of the project's own")
    asked = parser.parse_args()
    CHOSEN.extend(asked.only)
    sets: dict[str, Callable[[int], Batch]] = {NOTHING: stationary}
    sets |= {change: partial(changing, change) for change in CHANGES}
    tables = {name: Watched() for name in sets}
    for name, table in tables.items():
        table.watch(map(sets[name], range(asked.stationary if name == NOTHING else asked.seeds)))
    if asked.peers:
        n = {NOTHING: asked.peer_seeds // 4}
        kept = {name: [make(seed) for seed in range(n.get(name, asked.peer_seeds))] for name, make in sets.items()}
        for answer in ask_peers(asked.peers.split(","), kept):
            table, name = tables[answer["set"]], answer["name"]
            table.rang[name], table.speed[name] = answer["rang"], answer["rows_per_second"]
    show(tables)
    if asked.elec2:
        elec2(asked.elec2)
    clouds(asked.clouds)
    speed()


def show(tables: dict[str, Watched]) -> None:
    quiet = tables.pop(NOTHING)
    print(f"Nothing changes, {N_STATIONARY:,} rows{'':11}alarms  P(any)  runs  rows/second")
    for name in quiet.rang:
        print(f"  {name:34}{quiet.false_alarms(name)}")
    print("\nRows from the change to the alarm, median; in brackets how many of the streams had one")
    print(" " * 34 + "".join(f"{change:>18}" for change in tables))
    for name in quiet.rang:
        print(f"{name:34}" + "".join(f"{table.delay(name):>18}" for table in tables.values()))
    print(f"{'to beat':34}" + "".join(f"{GOALS.get(change, ''):>18}" for change in tables))


if __name__ == "__main__":
    main()
