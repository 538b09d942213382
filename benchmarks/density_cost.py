"""What a reference set costs when serving: latency, memory and the time to load, from 1,000 rows to a million.

    OMP_NUM_THREADS=1 python -m benchmarks.density_cost [--rows 1000,10000,100000,1000000] [--forms graph,exact,ivf]
        [--shared-data FOLDER]
    python -m benchmarks.density_cost --server 1000000 [--forms exact,ivf]

Two models: ResNet-20 for CIFAR-10 (six layers of 32 to 64 numbers, where its file is at hand) and a dense model whose
last layer reads 512. The reference is a constant of the fused graph (MatMul + TopK), or an index beside it, served as a
server does it: by two sessions with the search between. An approximate index looks at as much as keeps every
probability of 300 rows within the default tolerance. The reference lies near few dimensions, as networks' features do.
Each form and size in a process of its own, so that memory is that process's growth. One thread, of which the seconds
that it works are counted; the model alone and the calibrated one in turns, medians.

`--server` sends a reference of so many rows to a server with the usual limits, which fits it and serves it, and asks.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.datasets import DEFAULT_FOLDER
from benchmarks.serving_models import BenchmarkModel
from benchmarks.serving_peers import SERVERS, Running
from calibrators import dumps, fuse, inspect_model, loads
from calibrators.graph import FusedModel
from calibrators.kinds.density_aware import RANKS, DensityAware
from calibrators.kinds.identity import Identity
from calibrators.layers import default_layers, find_layers
from calibrators.neighbours import nearest
from service.client import Client
from service.inference.indexed import IndexedSession
from service.inference.session import Device, Session

Array = NDArray[Any]

BATCHES = (1, 16, 64)
SECONDS_EACH = 0.7
K = 10
WIDTH = 512
N_CLASSES = 10
MOST_LINKED = 10_000
"""Rows of which a graph of edges is built within a minute of one thread."""
DIMENSIONS = 16
"""Of what the rows of each layer are made from."""
N_TRIED = 300
"""Rows on which an index is held to its tolerance."""
N_CALIBRATION, N_SHIFTED, SENT_ROWS = 1000, 250, 4096
"""Through a server: labelled rows, further ones from elsewhere, rows of the reference that are sent at once."""
LOOK_SECONDS = 0.2


def dense_model() -> onnx.ModelProto:
    """x [B, 512] -> 512 ReLU -> 512 ReLU -> 10."""
    rng = np.random.default_rng(0)
    shapes = {"a": (WIDTH, WIDTH), "b": (WIDTH, WIDTH), "c": (WIDTH, N_CLASSES)}
    weights = {name: (rng.normal(size=shape) / 16).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h0"]),
        helper.make_node("Relu", ["h0"], ["h1"]),
        helper.make_node("MatMul", ["h1", "b"], ["h2"]),
        helper.make_node("Relu", ["h2"], ["features"]),
        helper.make_node("MatMul", ["features", "c"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"], axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDTH])]
    outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["B", N_CLASSES])]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "dense", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def with_reference(model: onnx.ModelProto, n_rows: int, form: str) -> DensityAware:
    """As if fitted: a reference of random rows in the layers that a server reads by default, in this form."""
    layers = default_layers(find_layers(model, inspect_model(model)))
    layers = [layer for layer in layers if layer.width < WIDTH] or layers[-1:]
    widths = [layer.width for layer in layers]
    rng, n = np.random.default_rng(0), len(layers)
    bases = [rng.normal(size=(DIMENSIONS, width)) / np.sqrt(DIMENSIONS) for width in widths]

    def drawn(rows: int) -> Array:
        return np.column_stack([rng.normal(size=(rows, DIMENSIONS)) @ basis for basis in bases])

    reference = np.empty((n_rows, sum(widths)), np.float16)
    for start in range(0, n_rows, 10_000):
        reference[start : start + 10_000] = drawn(len(reference[start : start + 10_000]))
    columns = np.cumsum([0, *widths]).tolist()
    x = np.split(drawn(N_TRIED), columns[1:-1], axis=1)
    squared = [nearest(rows, reference[:, i:j], K) for rows, (i, j) in zip(x, pairwise(columns), strict=True)]
    distances = np.sqrt([each[:, -1] for each in squared])
    tensors = {
        "anchor": np.asarray(1.5),
        "weights": np.full(n, 0.3),
        "means": distances.mean(axis=1) - distances.std(axis=1),
        "deviations": distances.std(axis=1),
        "far": 2 * distances.max(axis=1),
        "scale": np.ones(n),
        "kept": np.arange(n),
        "centre": np.zeros(sum(widths)),
        "reference": reference,
        "k": np.asarray(K),
        "ranks": np.linspace(-1, 3, RANKS),
        "n_classes": np.asarray(N_CLASSES),
    }
    names = [layer.tensor for layer in layers]
    calibrator = DensityAware(layers=names, widths=widths, index=form).set_tensors(tensors)
    calibrator._fit_index(4 * rng.normal(size=(N_TRIED, N_CLASSES)), x, np.full(N_TRIED, -1), squared)
    return calibrator


def session(fused: FusedModel) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(fused.to_bytes(), options, providers=["CPUExecutionProvider"])


def medians(runs: dict[str, Callable[[], object]], clock: Callable[[], float] = time.thread_time) -> dict[str, float]:
    """Milliseconds of each, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + SECONDS_EACH * len(runs)
    while time.perf_counter() < end or min(map(len, taken.values())) < 5:
        for name, run in runs.items():
            start = clock()
            run()
            taken[name].append(1e3 * (clock() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def calibrated_session(model: onnx.ModelProto, artifact: bytes) -> Any:
    """From what a server reads: the file of the fit."""
    calibrator = loads(artifact)
    if not calibrator.has_index:
        return session(fuse(model, calibrator))
    device = Device.choose("cpu", 1)
    taps = fuse(model, Identity.of(N_CLASSES), taps=calibrator.taps)
    return IndexedSession(Session(taps.to_bytes(), device), calibrator, device)


def measure(model_bytes: bytes, n_rows: int, form: str, answer: Any) -> None:
    """One size in one form, in a process of its own."""
    model = onnx.ModelProto.FromString(model_bytes)
    start = time.perf_counter()
    made = with_reference(model, n_rows, form)
    building, notes, artifact = time.perf_counter() - start, made.notes, dumps(made)
    del made
    gc.collect()
    before, start = memory_mb(), time.perf_counter()
    calibrated = calibrated_session(model, artifact)
    loading = time.perf_counter() - start
    grown = memory_mb() - before
    megabytes = len(artifact) / 1e6
    alone = session(fuse(model, Identity.of(N_CLASSES)))
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    name = model.graph.input[0].name
    times = {}
    for batch in BATCHES:
        feeds = {name: np.random.default_rng(1).random((batch, *dims), dtype=np.float32)}
        times[batch] = medians(
            {
                "alone": lambda feeds=feeds: alone.run(["probabilities"], feeds),
                "calibrated": lambda feeds=feeds: calibrated.run(["probabilities"], feeds),
            }
        )
    answer.send((megabytes, building, loading, grown, times, notes))


def in_process(model_bytes: bytes, n_rows: int, form: str) -> Any:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(model_bytes, n_rows, form, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def described(found: Any) -> str:
    if found is None:
        return "its process ended without an answer"
    megabytes, building, loading, grown, times, notes = found
    shown = "   ".join(f"{t['alone']:.3f} -> {t['calibrated']:.3f}" for t in times.values())
    costs = f"made in {building:.1f} s, file {megabytes:.0f} MB, +{grown:.0f} MB, loads in {loading:.2f} s"
    return "; ".join([f"{shown}   {costs}", *notes])


def fed_or_constant(n_rows: int) -> str:
    """The same matrix product and TopK, its matrix a constant of the graph or fed on every run."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(WIDTH, n_rows)).astype(np.float32)
    runs = {}
    x = rng.normal(size=(1, WIDTH)).astype(np.float32)
    for name, overridable in (("constant", False), ("fed", True)):
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDTH])]
        if overridable:
            inputs.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, matrix.shape))
        nodes = [
            helper.make_node("MatMul", ["x", "m"], ["s"]),
            helper.make_node("TopK", ["s", "k"], ["v", "i"], axis=1),
        ]
        outputs = [helper.make_tensor_value_info("v", TensorProto.FLOAT, ["B", K])]
        initializers = [numpy_helper.from_array(np.array([K], np.int64), "k")]
        initializers += [] if overridable else [numpy_helper.from_array(matrix, "m")]
        graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        made = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {"x": x, "m": matrix} if overridable else {"x": x}
        runs[name] = lambda made=made, feeds=feeds: made.run(["v"], feeds)
    times = medians(runs)
    return f"{n_rows:>9,} rows of {WIDTH}: constant {times['constant']:.3f} ms, fed {times['fed']:.3f} ms"


def through_server(n_rows: int, form: str) -> None:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(DIMENSIONS, WIDTH)) / np.sqrt(DIMENSIONS)

    def drawn(n: int) -> Array:
        return (rng.normal(size=(n, DIMENSIONS)) @ basis).astype(np.float32)

    def reference(begun: float) -> Iterator[Array]:
        for start in range(0, n_rows, SENT_ROWS):
            yield drawn(min(SENT_ROWS, n_rows - start))
        print(f"  sent after {time.perf_counter() - begun:.1f} s", flush=True)

    model = BenchmarkModel("dense", dense_model, (WIDTH,), N_CLASSES)
    server = Running(SERVERS["calserve"], model, cores=os.sched_getaffinity(0))
    with server, Client(server.address, show_progress=True, timeout_seconds=3600) as client:
        client.wait_until_ready()
        print(f"\n{n_rows:,} rows through a server, {form}; it has {server.resident_bytes() / 1e9:.2f} GB", flush=True)

        def labels(x: Array, temperature: float) -> Array:
            logits = np.log(client.predict("dense", x).probabilities)
            return (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)

        x, far = drawn(N_CALIBRATION), drawn(N_SHIFTED) + rng.normal(size=(N_SHIFTED, WIDTH)).astype(np.float32)
        rows = {"inputs": x, "labels": labels(x, 2.0), "shifted_inputs": far, "shifted_labels": labels(far, 8.0)}
        params = {"layers": ["features"], "index": form, "reference_rows": n_rows}
        with costs(server, "sent and fitted"):
            sent = reference(time.perf_counter())
            revision = client.fit("dense", "density_aware", reference=sent, **rows, **params)
        print(*revision.notes, sep="\n")
        with costs(server, "activated"):
            client.activate("dense", revision.revision)
        for batch in BATCHES:
            asked = partial(client.predict, "dense", drawn(batch))
            print(f"  {batch} rows answered in {medians({'': asked}, time.perf_counter)['']:.1f} ms", flush=True)


@contextmanager
def costs(server: Running, what: str) -> Iterator[None]:
    """Say how long something took, what it took of the server and of its fit, and their memory while and after it."""
    done, most = threading.Event(), [0]

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            with suppress(OSError):  # a process that has just ended
                most.append(server.resident_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    begun, cpu = time.perf_counter(), server.cpu_seconds()
    try:
        yield
    finally:
        done.set()
        looking.join()
    seconds, cpu = time.perf_counter() - begun, server.cpu_seconds() - cpu
    print(f"  {what} in {seconds:.1f} s, {cpu:.0f} s of a core; {max(most) / 1e9:.1f} GB at most, "
          f"{server.resident_bytes() / 1e9:.2f} GB after it", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--rows", default="1000,10000,100000,1000000")
    parser.add_argument("--forms", default="graph,exact,ivf,hnsw")
    parser.add_argument("--server", type=int, default=0, help="rows of a reference to send to a server, nothing else")
    arguments = parser.parse_args()
    forms = arguments.forms.split(",")
    if arguments.server:
        for form in forms:
            through_server(arguments.server, form)
        return
    sizes = [int(text) for text in arguments.rows.split(",")]
    models = {"dense, one layer of 512": dense_model()}
    resnet = arguments.shared_data / "cifar10" / "resnet20_cifar10.onnx"
    if resnet.is_file():
        models = {"ResNet-20": onnx.load(str(resnet)), **models}
    for name, model in models.items():
        print(f"\n{name}: ms a run, alone -> calibrated, batches of {BATCHES}", flush=True)
        for n_rows in sizes:
            for form in forms:
                if form != "hnsw" or n_rows <= MOST_LINKED:
                    found = described(in_process(model.SerializeToString(), n_rows, form))
                    print(f"{n_rows:>9,} {form:5} {found}", flush=True)
    print("\na constant of the graph, or fed on every run", flush=True)
    for n_rows in sizes[:3]:
        print(fed_or_constant(n_rows), flush=True)


if __name__ == "__main__":
    main()
