"""What a server promises beside the cost of a request: start, size, more processes, overload, work nobody waits for."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.load import INFER, Command, Result
from benchmarks.serving_models import MODELS, BenchmarkModel, request_bytes
from benchmarks.serving_peers import Running
from benchmarks.stages import session_of
from service.rpc.wire import INFERENCE_SERVICE, Stub, inference

if TYPE_CHECKING:
    from benchmarks.serving import Bench

STARTS = 5
START_SECONDS_GOAL, RESIDENT_GOAL_MB = 2.0, 250
WORKERS_GOAL, WORKERS_SHARE_GOAL = 1.7, 0.85
CONNECTIONS = 48  # the system deals out connections, not calls: few of them fall unevenly
GOODPUT_GOAL, REFUSAL_MS_GOAL, ADMITTED_GOAL = 0.85, 50.0, 3.0
GROWTH_MB_GOAL = 20
RECOVERY_SECONDS_GOAL, MOST_RECOVERY_SECONDS = 5.0, 30.0  # who hammers is let in by a probe, every few seconds
CANCELLED_CALLS, SLOW_CALL_SECONDS = 20, 1.0


@dataclass(frozen=True)
class Row:
    """One line of the table of goals; `met` is None where there was nothing to measure."""

    what: str
    measured: str
    goal: str
    met: bool | None

    def cells(self) -> list[str]:
        return [self.what, self.measured, self.goal, {True: "yes", False: "**no**", None: "-"}[self.met]]


def cold_start(bench: Bench) -> Iterator[Row]:
    """From the start of the process to the first answer, one model, nothing fitted."""
    seconds, sizes, torch = [], [], False
    for _ in range(STARTS):
        with bench.start_bare(MODELS["mlp"]) as running:
            seconds.append(running.start_seconds)
            sizes.append(running.resident_bytes() / 1e6)
            torch |= running.maps("libtorch")
    start, size = statistics.median(seconds), max(sizes)
    yield Row("cold start to the first answer", f"{start:.2f} s", "<= 2 s", start <= START_SECONDS_GOAL)
    yield Row("resident memory then", f"{size:.0f} MB", "<= 250 MB", size <= RESIDENT_GOAL_MB)
    yield Row("torch in its memory", "yes" if torch else "no", "no", not torch)


def workers(bench: Bench) -> Iterator[Row]:
    """Throughput of two workers on two cores against one on one, on the model whose client costs nothing."""
    what, goal = "two workers against one, resnet18, requests/s", f">= {WORKERS_GOAL}x"
    asked = [sys.executable, "-m", "service", "serve", "--help"]
    known = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    cores = sorted(os.sched_getaffinity(0))
    if "--workers" not in known or len(cores) < 2:
        reason = "`calserve serve` has no --workers" if len(cores) > 1 else "one core"
        yield Row(what, f"not measured: {reason}", goal, None)
        return
    gains, ceilings = [], []
    for _ in range(max(3, bench.rounds // 2)):
        one, two = (workers_rate(bench, cores[:count]) for count in (1, 2))
        alone, beside = (raw_rate(cores[:count], 2 * bench.seconds) for count in (1, 2))
        gains.append(two / one)
        ceilings.append(beside / alone)
    gain, ceiling = statistics.median(gains), statistics.median(ceilings)
    share = statistics.median(gain / ceiling for gain, ceiling in zip(gains, ceilings, strict=True))
    spare = "" if len(cores) > 2 else "; the client shares the second core"
    yield Row(what, f"{gain:.2f}x", goal, gain >= WORKERS_GOAL)
    what = "the same, of what two processes of onnxruntime alone gain"
    shown = f"{100 * share:.0f} % of {ceiling:.2f}x{spare}"
    yield Row(what, shown, f">= {100 * WORKERS_SHARE_GOAL:.0f} %", share >= WORKERS_SHARE_GOAL)


def workers_rate(bench: Bench, cores: list[int]) -> float:
    """Requests a second of a server with a worker on each core."""
    extra = (*bench.extra, "--workers", str(len(cores)), "--max-queue-seconds", "30")
    with bench.start_bare(MODELS["resnet18"], cores=set(cores), extra=extra) as running:
        running.wait_for_workers(len(cores))
        payloads = str(bench.payloads(running.model))
        command = Command(running.address, payloads, "unary", 1, 2 * bench.seconds, channels=CONNECTIONS)
        result = bench.clean(running, bench.load.run(command))
        return result.right / result.seconds


def raw_rate(cores: list[int], seconds: float) -> float:
    """Runs a second of resnet18 by a process on each core, at the same time: what the machine itself gains by a second
    core."""
    context = get_context("spawn")
    with ProcessPoolExecutor(len(cores), context, _begin_together, (context.Barrier(len(cores)),)) as pool:
        return sum(pool.map(runs_a_second, cores, [seconds] * len(cores)))


def _begin_together(barrier: Barrier) -> None:
    global _all_are_ready  # a pool's process has nowhere else to keep it
    _all_are_ready = barrier


def runs_a_second(core: int, seconds: float) -> float:
    os.sched_setaffinity(0, {core})
    model = MODELS["resnet18"]
    session, rows, count = session_of(model.make().SerializeToString()), model.rows(1), 0
    _all_are_ready.wait(60)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        session.run(["scores"], {"x": rows})
        count += 1
    return count / seconds


def overload(bench: Bench) -> Iterator[Row]:
    """Calls offered at a multiple of what the server can do; resnet18, so that the client is not the limit."""
    with bench.start("calserve", MODELS["resnet18"]) as running:
        capacity = closed_rate(bench, running)
        calm = offered(bench, running, 0.5 * capacity)
        loaded = {multiple: offered(bench, running, multiple * capacity) for multiple in (2, 4)}
        recovery = seconds_until_all_are_admitted(bench, running)
        most = max(capacity, closed_rate(bench, running))  # the machine may have been busy the first time
        for multiple, result in loaded.items():
            yield from overload_rows(multiple, result, most, calm)
        before = running.resident_bytes()
        offered(bench, running, 4 * capacity)
        growth = (running.resident_bytes() - before) / 1e6
    what = "overload over: until 32 callers who ask again at once are all admitted"
    yield Row(what, f"{recovery:.1f} s", f"<= {RECOVERY_SECONDS_GOAL:g} s", recovery <= RECOVERY_SECONDS_GOAL)
    goal = f"flat (<= {GROWTH_MB_GOAL} MB)"
    yield Row("overload 4x once more: memory growth", f"{growth:+.0f} MB", goal, growth <= GROWTH_MB_GOAL)


def closed_rate(bench: Bench, running: Running) -> float:
    """Requests a second that callers get who wait for each answer."""
    seen = bench.clean(running, bench.load.run(closed_loop(bench, running, 4 * bench.seconds)))
    return seen.right / seen.seconds


def closed_loop(bench: Bench, running: Running, seconds: float) -> Command:
    """Callers who wait for each answer, and who ask again at once when they are refused."""
    return Command(running.address, str(bench.payloads(running.model)), "unary", 32, seconds)


def seconds_until_all_are_admitted(bench: Bench, running: Running) -> float:
    begun = time.perf_counter()
    while True:
        now = time.perf_counter()
        if bench.load.run(closed_loop(bench, running, 0.2)).clean or now - begun > MOST_RECOVERY_SECONDS:
            return now - begun


def offered(bench: Bench, running: Running, rate: float) -> Result:
    seconds = 5 * bench.seconds
    payloads = str(bench.payloads(running.model))
    return bench.load.run(Command(running.address, payloads, "open", seconds=seconds, rate=rate, deadline_seconds=20))


def overload_rows(multiple: int, result: Result, capacity: float, calm: Result) -> Iterator[Row]:
    goodput = result.right / result.seconds / capacity
    slower = result.p99 / calm.p99
    yield Row(f"overload {multiple}x: goodput", f"{100 * goodput:.0f} %", ">= 85 %", goodput >= GOODPUT_GOAL)
    codes = ", ".join(f"{n} {code}" for code, n in result.statuses.items())
    refused = f"{result.refused_p99:.0f} ms ({codes})" if codes else "nothing was refused"
    quick = result.refused_p99 <= REFUSAL_MS_GOAL if codes else None
    yield Row(f"overload {multiple}x: p99 of refusals", refused, "<= 50 ms", quick)
    shown = f"{slower:.1f}x ({result.p99:.0f} ms against {calm.p99:.0f} ms)"
    yield Row(f"overload {multiple}x: p99 of admitted, against 0.5x", shown, "<= 3x", slower <= ADMITTED_GOAL)
    if result.wrong:
        yield Row(f"overload {multiple}x: wrong answers", str(result.wrong), "0", False)


def cancelled(bench: Bench) -> Iterator[Row]:
    """Twenty calls of a second each, cancelled: how many were run all the same, and what the next caller waits."""
    model = MODELS["resnet18"]
    with bench.start("calserve", model) as running, grpc.insecure_channel(running.address, NO_LIMIT) as channel:
        infer = channel.unary_unary(INFER)
        rows = slow_rows(infer, model)
        small = request_bytes(model.name, model.rows(1))
        usual = seconds_of(infer, small)
        before = rows_run(channel, model)
        calls = [infer.future(request_bytes(model.name, model.rows(rows))) for _ in range(CANCELLED_CALLS)]
        time.sleep(0.2)  # the first is being run by now
        for call in calls:
            call.cancel()
        waited = seconds_of(infer, small)
        ran = (rows_run(channel, model) - before) / rows
    what = f"{CANCELLED_CALLS} cancelled calls of {SLOW_CALL_SECONDS:g} s"
    yield Row(f"{what}: run all the same", f"{ran:.1f}", "<= 1 (the one under way)", ran <= 1.5)
    limit = 1.5 * SLOW_CALL_SECONDS + usual
    yield Row(f"{what}: the next call takes", f"{waited:.2f} s", f"<= {limit:.2f} s", waited <= limit)


NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def slow_rows(infer: Any, model: BenchmarkModel) -> int:
    """How many rows take the model about SLOW_CALL_SECONDS."""
    probe = 16
    return max(1, round(probe * SLOW_CALL_SECONDS / seconds_of(infer, request_bytes(model.name, model.rows(probe)))))


def seconds_of(infer: Any, request: bytes) -> float:
    begun = time.perf_counter()
    infer(request, timeout=120)
    return time.perf_counter() - begun


def rows_run(channel: grpc.Channel, model: BenchmarkModel) -> int:
    """Rows that the server's statistics say were run, for whoever."""
    request = inference.ModelStatisticsRequest(name=model.name)
    (found,) = Stub(channel, INFERENCE_SERVICE).ModelStatistics(request).model_stats
    return sum(batch.batch_size * batch.compute_infer.count for batch in found.batch_stats)
