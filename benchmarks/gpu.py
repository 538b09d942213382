"""The calibrator inside the model's graph against the calibrator in numpy after it, on the first GPU there is.

    python -m benchmarks.gpu [--provider cuda,tensorrt] [--models mlp,head,resnet18] [--batches 1,16,64,256]

Every run is one of the server's own: `service.inference.session`, with its I/O binding and its buffers. Fused gives
probabilities, confidences and labels from one graph; unfused gives logits, and numpy the rest. Memory of the host is
pageable, pinned, or (CUDA only) pinned with the batch replayed as a CUDA graph. Weights are drawn, not trained: no
weight changes what a run costs. Times are wall time and medians of rounds that take turns, so that what disturbs the
machine disturbs all.

On a machine without a GPU, `--provider cpu` runs the same code on the CPU; what it prints says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import calibrators
from calibrators.graph import stage
from service.errors import Refused
from service.inference.session import Device, Session
from service.inference.warmup import made_up

SERVED = ("probabilities", "confidence", "label")
MOST_ROUNDS = 15
KIND = "vector"


class Network:
    """An ONNX graph under construction, with weights drawn from a seed."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name, scale = f"w{len(self._weights)}", np.sqrt(2 / np.prod(shape[1:]))
        array = (scale * self._rng.standard_normal(shape)).astype(np.float32)
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def dense(self, x: str, n_in: int, n_out: int) -> str:
        return self.add("Gemm", x, self.weight(n_out, n_in), transB=1)

    def convolution(self, x: str, n_in: int, n_out: int, size: int, stride: int) -> str:
        """Batch normalisation is folded in, as an exporter for inference does."""
        return self.add("Conv", x, self.weight(n_out, n_in, size, size), strides=[stride] * 2, pads=[size // 2] * 4)

    def block(self, x: str, n_in: int, n_out: int, stride: int) -> str:
        inner = self.add("Relu", self.convolution(x, n_in, n_out, 3, stride))
        same = n_in == n_out and stride == 1
        shortcut = x if same else self.convolution(x, n_in, n_out, 1, stride)
        return self.add("Relu", self.add("Add", self.convolution(inner, n_out, n_out, 3, 1), shortcut))

    def model(self, input_shape: Sequence[int], logits: str, n_classes: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            [*self._nodes, helper.make_node("Identity", [logits], ["logits"])],
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *input_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", n_classes])],
            self._weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def mlp() -> tuple[onnx.ModelProto, int]:
    """32 -> 64 -> 10."""
    network = Network()
    hidden = network.add("Relu", network.dense("x", 32, 64))
    return network.model([32], network.dense(hidden, 64, 10), 10), 10


def head() -> tuple[onnx.ModelProto, int]:
    """512 -> 1000, the last layer of a large classifier by itself."""
    network = Network()
    return network.model([512], network.dense("x", 512, 1000), 1000), 1000


def resnet18(width: int = 64) -> tuple[onnx.ModelProto, int]:
    """ResNet-18 for images of 3 x 32 x 32 (He et al. 2016, CIFAR stem), 10 classes."""
    network = Network()
    x, channels = network.add("Relu", network.convolution("x", 3, width, 3, 1)), width
    for stage_index in range(4):
        for block in range(2):
            wider = width << stage_index
            x = network.block(x, channels, wider, stride=2 if stage_index and not block else 1)
            channels = wider
    pooled = network.add("Flatten", network.add("GlobalAveragePool", x))
    return network.model([3, 32, 32], network.dense(pooled, channels, 10), 10), 10


MODELS: dict[str, Callable[[], tuple[onnx.ModelProto, int]]] = {"mlp": mlp, "head": head, "resnet18": resnet18}


@dataclass(frozen=True)
class Row:
    """Seconds of one run, by how it was made."""

    provider: str
    model: str
    memory: str
    batch: int
    fused: float
    unfused: float


def devices(wanted: Sequence[str]) -> Iterator[tuple[str, str, Device]]:
    """(provider, memory, device) of everything that is to be measured and is there."""
    for name in wanted:
        try:
            device = replace(Device.choose(name, threads=1), bound=True)
        except Refused:
            continue
        yield name, "pageable", replace(device, pinned=False)
        yield name, "pinned" if not device.on_cpu else "staged", replace(device, pinned=True)
        if name == "cuda":
            yield name, "pinned, CUDA graph", Device.choose(name, threads=1, cuda_graphs=True)


def measure(
    model: tuple[onnx.ModelProto, int], device: Device, batches: Sequence[int], seconds: float
) -> Iterator[tuple[int, float, float]]:
    """(batch, seconds fused, seconds unfused) for each size of batch, `seconds` being about what a size may take."""
    proto, n_classes = model
    calibrator, found = fitted(n_classes), calibrators.inspect_model(proto, logits="logits")
    fused = Session(calibrators.fuse(proto, calibrator, found).to_bytes(), device)
    plain, parameters = Session(proto.SerializeToString(), device), stage(calibrator).parameters
    for batch in batches:
        feeds = made_up(plain.inputs, batch)
        fused.warm_up(SERVED, feeds, parameters)
        plain.warm_up(["logits"], feeds)

        def run_fused(feeds: dict[str, NDArray[np.float32]] = feeds) -> None:
            fused.run_with(SERVED, feeds, parameters)

        def run_unfused(feeds: dict[str, NDArray[np.float32]] = feeds) -> None:
            probabilities = calibrator.predict_proba(plain.run(["logits"], feeds)[0])
            probabilities.max(axis=1)
            probabilities.argmax(axis=1)

        of_fused, of_unfused = side_by_side([run_fused, run_unfused], seconds)
        yield batch, of_fused, of_unfused


def fitted(n_classes: int) -> calibrators.Calibrator:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4 * n_classes + 100, n_classes))
    return calibrators.create(KIND).fit(logits, np.argmax(logits + rng.gumbel(size=logits.shape), axis=1))


def side_by_side(runs: Sequence[Callable[[], None]], seconds: float) -> list[float]:
    """Median seconds of each, over rounds in which they take turns."""
    for run in runs:
        run()
    once = sum(timed(run, 1) for run in runs)
    rounds = min(MOST_ROUNDS, max(3, int(seconds / once)))
    repeats = max(1, int(seconds / (rounds * once)))
    times = [[timed(run, repeats) for run in runs] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def timed(run: Callable[[], None], repeats: int) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begun) / repeats


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title=f"one run, milliseconds; calibrator: {KIND}")
    for heading in ("provider", "model", "host memory", "batch", "fused", "unfused", "unfused / fused", "fused rows/s"):
        shown.add_column(heading, justify="left" if heading in {"provider", "model", "host memory"} else "right")
    for row in rows:
        numbers = (f"{1e3 * row.fused:.3f}", f"{1e3 * row.unfused:.3f}", f"{row.unfused / row.fused:.2f}")
        shown.add_row(row.provider, row.model, row.memory, str(row.batch), *numbers, f"{row.batch / row.fused:,.0f}")
    return shown


def gpu_name() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "the CPU"
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "the CPU"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cuda,tensorrt", help="cuda, tensorrt, cpu; those absent are left out")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=2.0, help="about, for each line of the table")
    options = parser.parse_args(arguments)
    found = list(devices(options.provider.split(",")))
    if not found:
        raise SystemExit(f"no usable device of {options.provider} here; --provider cpu runs the same code on the CPU")
    batches = [int(batch) for batch in options.batches.split(",")]
    console, rows = Console(width=120), []
    for name in options.models.split(","):
        model = MODELS[name]()
        for provider, memory, device in found:
            for batch, fused, unfused in measure(model, device, batches, options.seconds):
                rows.append(Row(provider, name, memory, batch, fused, unfused))
    console.print(f"on {gpu_name()}")
    console.print(table(rows))


if __name__ == "__main__":
    main()
