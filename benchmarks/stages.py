"""The floor of each stage of a request, in one process without a network, and what each kind adds to a run.

    OMP_NUM_THREADS=1 python -m benchmarks.stages [--model mlp] [--rounds 7]

No server can be faster than the sum of what it cannot leave out. Microseconds of one thread, medians of interleaved
rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

import calibrators
from benchmarks.load import INFER
from benchmarks.serving_models import MODELS, BenchmarkModel, request_bytes
from calibrators.graph import stage
from calibrators.kinds.identity import Identity
from service.app import App
from service.rpc import tensors
from service.rpc.methods import Call
from service.rpc.wire import inference
from service.settings import Settings

Work: TypeAlias = Callable[[], object]
Fused: TypeAlias = tuple[ort.InferenceSession, dict[str, Any]]

ROUND_SECONDS, LEAST_RUNS = 0.02, 4
FIT_ROWS, FIT_SECONDS = 1500, 30
CALLERS = (1, 16, 64)
SERVED = ("scores", "probabilities", "confidence", "label")


def session_of(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def microseconds(works: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Each piece of work, by turns: the median over rounds of the mean within a round, in this thread's own time."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            count, begun = 0, time.thread_time()
            while (spent := time.thread_time() - begun) < ROUND_SECONDS or count < LEAST_RUNS:
                for _ in range(LEAST_RUNS):
                    work()
                count += LEAST_RUNS
            found[name].append(1e6 * spent / count)
    return {name: statistics.median(values) for name, values in found.items()}


def stages(model: BenchmarkModel, rounds: int) -> dict[str, float]:
    """Decode, run and encode of one unbatched request, each alone."""
    data = request_bytes(model.name, model.rows(1))
    request = inference.ModelInferRequest.FromString(data)
    raw, shape = request.raw_input_contents[0], list(request.inputs[0].shape)
    session = session_of(model.make().SerializeToString())
    feeds = {"x": tensors.from_raw("x", "FP32", shape, raw)}
    (scores,) = session.run(["scores"], feeds)
    works: dict[str, Work] = {
        "decode: parse the message (upb)": lambda: inference.ModelInferRequest.FromString(data),
        "decode: the bytes as an array, checked": lambda: tensors.from_raw("x", "FP32", shape, raw),
        "run: session.run": lambda: session.run(["scores"], feeds),
        "run: its inner call": lambda: session._sess.run(["scores"], feeds, None),
        "encode: build and serialize the reply (upb)": lambda: reply(model.name, scores),
    }
    return microseconds(works, rounds)


async def whole_path(model: BenchmarkModel, rounds: int) -> dict[str, float]:
    """The server from bytes to bytes without a front: decode, queue, run and encode, of one caller and of many."""
    data = request_bytes(model.name, model.rows(1))
    with TemporaryDirectory() as folder:
        model.write(Path(folder) / "models")
        settings = Settings(model_repository=Path(folder) / "models", port=0, metrics_port=0, device="cpu", threads=1)
        async with App(settings) as app:
            infer = next(method.handler for method in app._methods() if method.path == INFER)
            found = {count: [await seconds_each(infer, data, count) for _ in range(rounds)] for count in CALLERS}
    return {f"all of it, {count} callers": 1e6 * statistics.median(times) for count, times in found.items()}


async def seconds_each(infer: Callable[[bytes, Call], Awaitable[bytes]], data: bytes, callers: int) -> float:
    """Processor time of the process for one request, with so many in flight."""
    turns = 400 // callers + 1
    begun = time.process_time()
    for _ in range(turns):
        await asyncio.gather(*(infer(data, Call()) for _ in range(callers)))
    return (time.process_time() - begun) / (turns * callers)


def reply(name: str, scores: Any) -> bytes:
    response = inference.ModelInferResponse(model_name=name, model_version="1")
    response.outputs.add(name="scores", datatype="FP32", shape=scores.shape)
    response.raw_output_contents.append(scores.tobytes())
    return bytes(response.SerializeToString())


def kinds_table(model: BenchmarkModel, rounds: int) -> list[list[str]]:
    """A row a kind: what the fused graph takes beyond the identity's, by batch size, parameters fed on every run."""
    runs, problems = fused_sessions(model)
    columns = [microseconds(works_of(runs, model, n), rounds) for n in model.batches]
    table = [["kind", *(f"batch {n}" for n in model.batches)]]
    for kind in runs:
        own = [f"{times[kind]:.1f}" for times in columns]
        added = [f"{times[kind] - times['identity']:+.1f}" for times in columns]
        table.append([kind, *(own if kind == "identity" else added)])
    return [*table, *([kind, reason, *[""] * (len(columns) - 1)] for kind, reason in problems.items())]


def fused_sessions(model: BenchmarkModel) -> tuple[dict[str, Fused], dict[str, str]]:
    """A session for each kind, fitted on made-up rows; of the others why not."""
    runs: dict[str, Fused] = {}
    problems: dict[str, str] = {}
    proto, (logits, labels) = model.make(), calibration_rows(model.n_classes)
    for kind in calibrators.kinds():
        try:
            with at_most(FIT_SECONDS):
                calibrator = fitted(kind, model.n_classes, logits, labels)
                session = session_of(calibrators.fuse(proto, calibrator).to_bytes())
                runs[kind] = session, dict(stage(calibrator).parameters)
        except Exception as error:  # a kind that is not for this model says so in its own words
            problems[kind] = f"not measured: {type(error).__name__}: {error}"[:100]
    return runs, problems


def works_of(runs: Mapping[str, Fused], model: BenchmarkModel, n: int) -> dict[str, Work]:
    rows = model.rows(n)
    return {
        kind: partial(session.run, SERVED, {"x": rows, **parameters}) for kind, (session, parameters) in runs.items()
    }


def fitted(kind: str, n_classes: int, logits: Any, labels: Any) -> calibrators.Calibrator:
    return Identity.of(n_classes) if kind == "identity" else calibrators.create(kind).fit(logits, labels)


def calibration_rows(n_classes: int) -> tuple[Any, Any]:
    """Logits, and labels that they are overconfident about; every class occurs."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((FIT_ROWS, n_classes))
    labels = (logits / 2 + rng.gumbel(size=logits.shape)).argmax(axis=1)
    labels[:n_classes] = np.arange(n_classes)
    return logits, labels


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"the fit takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mlp", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| stage | us |\n| --- | --- |")
    model = MODELS[chosen.model]
    found = {**stages(model, chosen.rounds), **asyncio.run(whole_path(model, chosen.rounds))}
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
