"""What a reference set costs when serving: latency, memory and the time to load, from 1,000 rows to a million.

    OMP_NUM_THREADS=1 python -m benchmarks.density_cost [--rows 1000,10000,100000,1000000] [--shared-data FOLDER]

Two models: ResNet-20 for CIFAR-10 (six layers of 32 to 64 numbers, where its file is at hand) and a dense model whose
last layer reads 512. The reference is a constant of the fused graph (MatMul + TopK), in a process of its own for each
size, so that memory is that process's growth. One thread, of which the seconds that it works are counted; the model
alone and the fused model in turns, medians.

With faiss installed (`pip install faiss-cpu`) the same search by its exact, inverted-file and graph indexes, with the
share of the true k-th neighbours' distance that each finds. It is no dependency of calserve.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.datasets import DEFAULT_FOLDER
from calibrators import Calibrator, create, fuse, inspect_model
from calibrators.graph import FusedModel
from calibrators.kinds.density_aware import RANKS
from calibrators.kinds.identity import Identity
from calibrators.layers import default_layers, find_layers

Array = NDArray[Any]

BATCHES = (1, 16, 64)
SECONDS_EACH = 0.7
K = 10
WIDTH = 512
N_CLASSES = 10
MOST_LINKED = 100_000
"""Rows of which faiss builds a graph index within minutes of one thread."""


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


def with_reference(model: onnx.ModelProto, n_rows: int) -> Calibrator:
    """As if fitted: a reference of random rows in the layers that a server reads by default."""
    layers = default_layers(find_layers(model, inspect_model(model)))
    layers = [layer for layer in layers if layer.width < WIDTH] or layers[-1:]
    widths = [layer.width for layer in layers]
    rng, n = np.random.default_rng(0), len(layers)
    reference = np.empty((n_rows, sum(widths)), np.float16)
    for start in range(0, n_rows, 10_000):
        reference[start : start + 10_000] = rng.normal(size=reference[start : start + 10_000].shape)
    tensors = {
        "anchor": np.asarray(1.5),
        **{name: np.ones(n) for name in ("weights", "means", "deviations", "far", "scale")},
        "kept": np.arange(n),
        "centre": np.zeros(sum(widths)),
        "reference": reference,
        "k": np.asarray(K),
        "ranks": np.linspace(-1, 3, RANKS),
        "n_classes": np.asarray(N_CLASSES),
    }
    params = {"layers": [layer.tensor for layer in layers], "widths": widths}
    return create("density_aware", **params).set_tensors(tensors)


def session(fused: FusedModel) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(fused.to_bytes(), options, providers=["CPUExecutionProvider"])


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + SECONDS_EACH * len(runs)
    while time.perf_counter() < end or min(map(len, taken.values())) < 5:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            taken[name].append(1e3 * (time.thread_time() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(model_bytes: bytes, n_rows: int, answer: Any) -> None:
    """One size, in a process of its own."""
    model = onnx.ModelProto.FromString(model_bytes)
    fused = fuse(model, with_reference(model, n_rows))
    data = fused.to_bytes()
    megabytes = len(data) / 1e6
    before, start = memory_mb(), time.perf_counter()
    calibrated = session(fused)
    loading = time.perf_counter() - start
    grown = memory_mb() - before
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
    answer.send((megabytes, loading, grown, times))


def in_process(model_bytes: bytes, n_rows: int) -> Any:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(model_bytes, n_rows, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


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


def by_index(n_rows: int) -> list[str]:
    try:
        import faiss
    except ImportError:
        return ["faiss is not installed"]
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(32, WIDTH)).astype(np.float32)  # features lie near a few dimensions, as networks' do
    reference = np.concatenate(
        [rng.normal(size=(min(50_000, n_rows - i), 32)).astype(np.float32) @ basis for i in range(0, n_rows, 50_000)]
    )
    x = rng.normal(size=(64, 32)).astype(np.float32) @ basis
    lines, exact = [], None
    n_lists = max(1, int(4 * np.sqrt(n_rows)))
    for name in ("Flat", f"IVF{n_lists},Flat", "HNSW32"):
        if name == "HNSW32" and n_rows > MOST_LINKED:
            continue
        start = time.perf_counter()
        index = faiss.index_factory(WIDTH, name)
        index.train(reference[: 50 * n_lists])
        index.add(reference)
        building = time.perf_counter() - start
        if name.startswith("IVF"):
            index.nprobe = max(1, n_lists // 32)
        distances = np.sqrt(index.search(x, K)[0][:, -1])
        exact = distances if exact is None else exact
        runs = {f"{b}": (lambda b=b, index=index: index.search(x[:b], K)) for b in BATCHES}
        times = medians(runs)
        error = float(np.abs(distances / exact - 1).max())
        shown = ", ".join(f"{time:.2f}" for time in times.values())
        lines.append(
            f"{n_rows:>9,} {name}: {shown} ms for {BATCHES} rows, built in {building:.1f} s, off by {error:.2%}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--rows", default="1000,10000,100000,1000000")
    arguments = parser.parse_args()
    sizes = [int(text) for text in arguments.rows.split(",")]
    models = {"dense, one layer of 512": dense_model()}
    resnet = arguments.shared_data / "cifar10" / "resnet20_cifar10.onnx"
    if resnet.is_file():
        models = {"ResNet-20": onnx.load(str(resnet)), **models}
    for name, model in models.items():
        print(f"\n{name}: ms a run, alone -> calibrated, batches of {BATCHES}", flush=True)
        for n_rows in sizes:
            found = in_process(model.SerializeToString(), n_rows)
            if found is None:
                print(f"{n_rows:>9,}: its process ended without an answer", flush=True)
                continue
            megabytes, loading, grown, times = found
            shown = "   ".join(f"{t['alone']:.3f} -> {t['calibrated']:.3f}" for t in times.values())
            costs = f"file {megabytes:.0f} MB, +{grown:.0f} MB, loads in {loading:.2f} s"
            print(f"{n_rows:>9,}: {shown}   {costs}", flush=True)
    print("\na constant of the graph, or fed on every run", flush=True)
    for n_rows in sizes[:3]:
        print(fed_or_constant(n_rows), flush=True)
    print("\nthe same search by faiss, one layer of 512", flush=True)
    for n_rows in sizes:
        for line in by_index(n_rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
