"""What the journal costs and what it can take.

    python -m benchmarks.journal [--rounds 7] [--labels 1000000] [--only cost,labels,opening,bytes] [--fronts h2,grpc]

The cost is the server's processor time a request with `--journal async` and `sync`, to that of the same server with
`off`, by turns (see benchmarks.serving), no monitor reading what is kept. The rest is measured on the disk that holds
the temporary folder.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from calserve.v1.feedback_service_pb2 import LabelResult, RecordLabelsResponse

from benchmarks.load import Load
from benchmarks.serving import Bench, Case, in_turn, say, show
from benchmarks.serving_models import MODELS
from benchmarks.serving_peers import Running
from service.client import AsyncClient, Client
from service.client.requests import label_requests
from service.store.journal import Journal
from service.store.labels import Labels, NewLabel, NewLabels, Result
from service.store.packs import Answered
from service.store.reading import Reader

MODES = ("off", "async", "sync")
CASES = (Case("unary", 1), Case("unary", 16), Case("unary", 64), Case("stream", 16))
SINGLE_CALLERS, SINGLE_SECONDS = 128, 4.0
BATCH, ROWS_EACH, LONE = 10_000, 500, 20_000


def cost(bench: Bench, front: str) -> list[list[str]]:
    """A row a case: microseconds with the journal off, then the others' ratio to that in the same round."""
    model = MODELS["mlp"]
    found: dict[tuple[Case, str], list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        flags = ["--front", front, "--monitors", "off", "--journal"]
        running = {mode: stack.enter_context(bench.start_bare(model, extra=[*flags, mode])) for mode in MODES}
        for turn in range(bench.rounds):
            say(f"round {turn + 1} of {bench.rounds}")
            for case in CASES:
                for mode in in_turn(list(MODES), turn):
                    cpu, seen = bench.measure(running[mode], case)
                    found.setdefault((case, mode), []).append((cpu, seen.right / seen.seconds))
    table = [["load", "off: us", *(f"{mode}: {what}" for mode in MODES[1:] for what in ("CPU", "answers/s"))]]
    for case in CASES:
        off = found[case, "off"]
        ratios = [
            statistics.median(one[figure] / base[figure] for one, base in zip(found[case, mode], off, strict=True))
            for mode in MODES[1:]
            for figure in (0, 1)
        ]
        table.append([case.name, f"{statistics.median(cpu for cpu, _ in off):.0f}", *(f"{r:.3f}" for r in ratios)])
    return table


def labels(bench: Bench) -> Iterator[list[str]]:
    """Over the wire: single labels of many callers, then batches of one."""
    model = MODELS["mlp"]
    with bench.start_bare(model) as running, Client(running.address, show_progress=False) as client:
        inputs = model.rows(ROWS_EACH)
        ids = [client.predict(model.name, inputs).prediction_id for _ in range(400)]
        places = list(itertools.product(ids, range(ROWS_EACH)))
        single = iter(places[: len(places) // 2])
        acknowledged, pauses = asyncio.run(singly(running.address, model.name, single))
        yield ["single labels acknowledged/s over the wire", f"{acknowledged / SINGLE_SECONDS:,.0f}"]
        yield ["their p50 and p99, ms", " / ".join(f"{1000 * np.percentile(pauses, q):.1f}" for q in (50, 99))]
        prepared, plain = places[len(places) // 2 : -len(places) // 4], places[-len(places) // 4 :]
        yield from in_messages(running, model.name, prepared, f"{ROWS_EACH} rows a prediction")
        lone = [(client.predict(model.name, inputs[:1]).prediction_id, 0) for _ in range(LONE)]
        yield from in_messages(running, model.name, lone, "a row a prediction")
        begun = time.perf_counter()
        names, rows = zip(*plain, strict=True)
        results = Counter(client.label(model.name, names, [1] * len(plain), rows=rows))
        yield ["labels/s over the wire by Client.label", f"{results['recorded'] / (time.perf_counter() - begun):,.0f}"]


def in_messages(running: Running, model: str, places: Sequence[tuple[str, int]], of: str) -> Iterator[list[str]]:
    """Batches in messages that were made before, so that what a client costs is not taken for the server's."""
    names, rows = zip(*places, strict=True)
    requests = label_requests(model, names, [1] * len(places), rows, None)
    messages = [request.SerializeToString() for request in requests]
    with grpc.insecure_channel(running.address) as channel:
        record = channel.unary_unary("/calserve.v1.FeedbackService/RecordLabels")
        begun, used = time.perf_counter(), running.cpu_seconds()
        answers = [record(message) for message in messages]
        seconds, cpu = time.perf_counter() - begun, running.cpu_seconds() - used
    results = Counter(result for answer in answers for result in RecordLabelsResponse.FromString(answer).results)
    count = results[LabelResult.Value("LABEL_RESULT_RECORDED")]
    yield [f"labels/s over the wire, in batches, messages made before: {of}", f"{count / seconds:,.0f}"]
    yield ["processor us of the server a label", f"{1e6 * cpu / count:.1f}"]


async def singly(address: str, model: str, places: Iterator[tuple[str, int]]) -> tuple[int, list[float]]:
    """How many labels were acknowledged in the time, each in a call of its own, and how long each took."""
    end, pauses = time.perf_counter() + SINGLE_SECONDS, []
    async with AsyncClient(address, show_progress=False) as client:

        async def caller() -> None:
            while (begun := time.perf_counter()) < end and (place := next(places, None)):
                if await client.label(model, [place[0]], [1], rows=[place[1]]) == ["recorded"]:
                    pauses.append(time.perf_counter() - begun)

        await asyncio.gather(*(caller() for _ in range(SINGLE_CALLERS)))
    return len(pauses), pauses


@contextmanager
def journal(folder: Path) -> Iterator[Journal]:
    opened = Journal(folder, queue_bytes=1 << 40)
    opened.start()
    try:
        yield opened
    finally:
        opened.close()


def filled(
    opened: Journal, count: int, n_classes: int, own_ids: bool = False, segments: int = 0, signals: int = 0
) -> list[str]:
    """Predictions of one row, of so many segments, with so many signals; the id of each."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1000, 1, n_classes)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    names = [f"segment-{number}" for number in range(segments)] or [""]
    beside = {f"input_{number}": rng.standard_normal(1).astype(np.float32) for number in range(signals)}
    stream = opened.open_stream("m", "1", "0" * 64, n_classes)
    begun, ids = int(1000 * time.time()), []
    for index in range(count):
        caller_id = b"%020d" % index if own_ids else b""
        at = index % 1000
        segment = names[index % len(names)]
        request = Answered.one(
            begun + index, "temperature-1", 0, logits[at], probabilities[at], caller_id, segment, beside
        )
        ids.append(stream.append(request, 1).decode())
        if index % 1000 == 999:
            opened.writer.write_now(opened.write_waiting)
    opened.writer.write_now(opened.write_waiting)
    return ids


def record_all(opened: Journal, ids: Sequence[str]) -> tuple[int, float, float]:
    """A label for each prediction, in batches: how many were recorded, in how many seconds, of the processor too."""
    joined, recorded, seconds, cpu = Labels(opened), 0, 0.0, 0.0
    for start in range(0, len(ids), BATCH):
        batch = NewLabels.of([NewLabel(prediction_id, 0, 1) for prediction_id in ids[start : start + BATCH]])
        begun, used = time.perf_counter(), time.process_time()
        became = opened.writer.write_now(partial(joined.record, model="m", producer="", labels=batch))
        seconds, cpu = seconds + time.perf_counter() - begun, cpu + time.process_time() - used
        recorded += became.count(Result.RECORDED)
    return recorded, seconds, cpu


def opening(folder: Path, count: int) -> Iterator[list[str]]:
    """Batches straight into the journal, then a start with so many labels, and the rate of a reader."""
    with journal(folder) as opened:
        recorded, seconds, cpu = record_all(opened, filled(opened, count, 10))
        yield ["labels/s into the journal, in batches", f"{recorded / seconds:,.0f}"]
        yield ["processor us a label", f"{1e6 * cpu / recorded:.1f}"]
    begun = time.perf_counter()
    with journal(folder) as opened:
        yield [f"seconds to open and verify {count:,} predictions and labels", f"{time.perf_counter() - begun:.1f}"]
        begun, read = time.perf_counter(), 0
        reader = Reader(opened, "m", "benchmark", 0.0)
        while cohort := reader.read():
            reader.commit(cohort)
            read += sum(map(len, cohort.pairs))
        yield ["pairs/s of a reader that commits each 10,000", f"{read / (time.perf_counter() - begun):,.0f}"]


def sizes(folder: Path, count: int = 100_000) -> Iterator[list[str]]:
    """Bytes a row on the disk."""
    for name, n_classes, beside in (
        ("10 classes", 10, {}),
        ("10 classes, callers' own ids of 20 characters", 10, {"own_ids": True}),
        ("10 classes, of 5 segments", 10, {"segments": 5}),
        ("10 classes, of 64 segments", 10, {"segments": 64}),
        ("10 classes, with 2 signals", 10, {"signals": 2}),
        ("10 classes, with 10 signals", 10, {"signals": 10}),
        ("10 classes, with labels", 10, {}),
        ("1000 classes", 1000, {}),
    ):
        place = folder / name
        with journal(place) as opened:
            ids = filled(opened, count, n_classes, **beside)
            if name.endswith("labels"):
                record_all(opened, ids)
        yield [f"bytes a prediction: {name}", f"{(place / 'journal.sqlite').stat().st_size / count:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--only", default="cost,labels,opening,bytes")
    parser.add_argument("--fronts", default="h2,grpc", help="whose cost is measured")
    parser.add_argument("--quick", action="store_true", help="to see that all of it runs")
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    server, client = {cores[0]}, {cores[-1]}
    rounds, seconds = (2, 0.4) if chosen.quick else (chosen.rounds, 1.5)
    with tempfile.TemporaryDirectory() as folder, Load(client) as load:
        place = Path(folder)
        bench = Bench(load, seconds, rounds, client, server, {}, [], place, "")
        parts: dict[str, Callable[[], Sequence[Any]]] = {
            **{f"cost, {front}": partial(cost, bench, front) for front in chosen.fronts.split(",")},
            "labels": lambda: [["what", "measured"], *labels(bench)],
            "opening": lambda: [["what", "measured"], *opening(place / "opening", chosen.labels)],
            "bytes": lambda: [["what", "measured"], *sizes(place)],
        }
        for name, part in parts.items():
            if name.partition(",")[0] in chosen.only.split(","):
                show(name, part())


if __name__ == "__main__":
    main()
