"""What a challenger in shadow costs those who are served, and how many labels a second are judged.

    OMP_NUM_THREADS=1 python -m benchmarks.shadow [--rounds 7] [--labels 200000] [--only cost,judged] [--quick]

The cost is the server's processor time a request with one shadow, of each sort, to that of the same server without, by
turns (see benchmarks.serving), the answers a second likewise, and the pause that 99 of 100 answers took no longer than.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import calibrators
from benchmarks.journal import filled, journal, record_all
from benchmarks.load import Load
from benchmarks.serving import Bench, Case, in_turn, say, show
from benchmarks.serving_models import MODELS
from service.client import Client
from service.learning import shadow
from service.learning.shadow import Judge
from service.store.shadows import ShadowPack, ShadowRow, append_shadow_pack

CASES = (Case("unary", 1), Case("unary", 16), Case("stream", 16))
SORTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "static, from the journal": ("temperature", {}, 0.0),
    "online, on the answer's logits": ("online_temperature", {}, 0.0),
    "reads features, a tenth": ("feature_clipping", {"layer": ""}, 0.1),
    "reads features, all": ("feature_clipping", {"layer": ""}, 1.0),
}
"""Kind, parameters, share. The layer is the one that the model is found to have."""
K, ROWS = 10, 500


def begin(client: Client, kind: str, params: dict[str, Any], share: float) -> None:
    model = MODELS["mlp"]
    inputs = model.rows(ROWS)
    (served,) = client.models()
    labels = np.random.default_rng(0).integers(0, served.class_count, ROWS)
    layer = {"layer": served.features_tensor} if "layer" in params else {}
    revision = client.fit(
        model.name, kind, inputs=inputs, labels=labels, held_out_fraction=0, **params | layer
    ).revision
    client.start_shadow(model.name, revision, share=share)


def cost(bench: Bench) -> list[list[str]]:
    """A row a case and sort: its ratio to no shadow in the same round."""
    model, names = MODELS["mlp"], ["none", *SORTS]
    found: dict[tuple[Case, str], list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        running = {name: stack.enter_context(bench.start_bare(model)) for name in names}
        for name, sort in SORTS.items():
            with Client(running[name].address, show_progress=False) as client:
                begin(client, *sort)
        for turn in range(bench.rounds):
            say(f"round {turn + 1} of {bench.rounds}")
            for case in CASES:
                for name in in_turn(names, turn):
                    cpu, seen = bench.measure(running[name], case)
                    found.setdefault((case, name), []).append((cpu, seen.right / seen.seconds))
    table = [["load", "shadow", "CPU", "answers/s"]]
    for case in CASES:
        for name in SORTS:
            pairs = list(zip(found[case, name], found[case, "none"], strict=True))
            ratios = (statistics.median(one[figure] / base[figure] for one, base in pairs) for figure in (0, 1))
            table.append([case.name, name, *(f"{ratio:.3f}" for ratio in ratios)])
    return table


def judged(folder: Path, count: int) -> Iterator[list[str]]:
    """Labels a second of a comparison that is behind by so many."""
    shadow.HOLD_SECONDS = 0.0
    for name, share in (("from kept logits", 0.0), ("of what a challenger gave", 1.0)):
        with journal(folder / name) as opened:
            calibrator = calibrators.create("temperature").fit(np.eye(K), np.arange(K))
            row = ShadowRow("m", "vector-2", "0" * 64, "temperature-1", "manual", 0.95, 1, share, 0, 0)
            judge = Judge(opened, row, calibrator, 0.0, 10**9)
            judge.begin()
            judge.load()
            record_all(opened, filled(opened, count, K))
            if share:
                give(opened, count)
            begun = time.perf_counter()
            while judge.step():
                pass
            seconds = time.perf_counter() - begun
        yield [f"labels judged/s, {name}", f"{judge.comparison.gain.n_labels / seconds:,.0f}"]


def give(opened: Any, count: int) -> None:
    given = np.full((1, K), 1 / K, np.float32)
    (stream,) = (one.row.stream for one in opened.streams())
    for start in range(0, count, 1000):
        pack = ShadowPack.of([(number, given) for number in range(start, min(count, start + 1000))])
        opened.writer.write_now(lambda c, pack=pack: append_shadow_pack(c, "m", "vector-2", stream, pack))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--labels", type=int, default=200_000)
    parser.add_argument("--only", default="cost,judged")
    parser.add_argument("--quick", action="store_true", help="to see that all of it runs")
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rounds, seconds = (2, 0.4) if chosen.quick else (chosen.rounds, 1.5)
    with tempfile.TemporaryDirectory() as folder, Load({cores[-1]}) as load:
        bench = Bench(load, seconds, rounds, {cores[-1]}, {cores[0]}, {}, [], Path(folder), "")
        parts: dict[str, Callable[[], Sequence[Any]]] = {
            "cost": lambda: cost(bench),
            "judged": lambda: [["what", "measured"], *judged(Path(folder), chosen.labels)],
        }
        for name in chosen.only.split(","):
            show(name, parts[name]())


if __name__ == "__main__":
    main()
