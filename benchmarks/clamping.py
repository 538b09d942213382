"""Neural Clamping beside kinds that leave the inputs alone: convolutional networks, images as they were and shifted.

    OMP_NUM_THREADS=1 python -m benchmarks.clamping [--shared-data DIR] [--only resnet20_jpeg] [--shifts own,brighter]

1,000 images to fit, 2,500 others to score, in percent but for the log loss and the entropy: the columns are those of
the paper's table (Tang, Chen, Ho 2024), with log loss and the seconds of a fit. `density_aware` is fitted on these
images alone, and with two distorted copies of each beside (`calibrators.augment`). The last table is what serving
costs, as a multiple of the model alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

import calibrators
from benchmarks.datasets import DEFAULT_FOLDER
from benchmarks.stages import microseconds, session_of
from calibrators import inspect_model, metrics
from calibrators.augment import augmented
from calibrators.graph import FEATURES, LOGITS, fuse
from calibrators.kinds.identity import Identity
from calibrators.layers import Layer, default_layers, find_layers, named_layers

Array = NDArray[Any]

MODELS = ("resnet20", "resnet20_jpeg")
N_FIT, N_CLASSES = 1000, 10
SHIFTS: dict[str, Callable[[Array], Array]] = {
    "own": lambda x: x,
    "brighter": lambda x: np.clip(x + 0.25, 0, 1),
    "darker": lambda x: 0.4 * x,
    "flat": lambda x: 0.5 + 0.4 * (x - 0.5),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "the model itself": ("identity", {}),
    "temperature": ("temperature", {}),
    "energy_temperature": ("energy_temperature", {}),
    "structured_matrix": ("structured_matrix", {}),
    "neural_clamping": ("neural_clamping", {}),
    "neural_clamping, axis=1": ("neural_clamping", {"axis": 1}),
    "feature_clipping": ("feature_clipping", {}),
    "feature_clipping by ECE": ("feature_clipping", {"loss": "ece"}),
    "density_aware": ("density_aware", {}),
    "density_aware, copies": ("density_aware", {}),
}
COPIES = {"density_aware, copies": 2.0}
"""Distorted copies of each image that are fitted on as well."""
BATCHES = (1, 16, 64)


def images(folder: Path) -> tuple[Array, Array]:
    """[3500, 3, 32, 32] in 0..1, and labels."""
    data = np.load(folder / "cifar10" / "images_A.npz")
    return (data["images"].transpose(0, 3, 1, 2) / 255).astype(np.float32), data["labels"].astype(np.int64)


def run(session: ort.InferenceSession, x: Array, output: str) -> Array:
    parts = [session.run([output], {"image": x[start : start + 250]})[0] for start in range(0, len(x), 250)]
    return np.concatenate(parts)


def read(model: bytes, taps: Sequence[str], x: Array) -> dict[str, Array]:
    """The logits of images, and the layers that a calibrator reads."""
    session = session_of(fuse(model, Identity.of(N_CLASSES), taps=taps).to_bytes())
    names = {"logits": LOGITS, **({"features": FEATURES} if taps else {})}
    return {name: run(session, x, output) for name, output in names.items()}


def layers_of(model: bytes) -> Callable[[Sequence[str] | None], Sequence[Layer]]:
    proto = onnx.load_from_string(model)
    found = inspect_model(proto)
    return lambda names: named_layers(proto, found, names) if names else default_layers(find_layers(proto, found))


def measured(model: bytes, x: Array, y: Array, methods: Sequence[str]) -> Iterator[list[str]]:
    """A row a method."""
    for name in methods:
        kind, params = METHODS[name]
        calibrator = calibrators.create(kind, **params).on_model(layers_of(model))
        fitted, labels, beside = x[:N_FIT], y[:N_FIT], {}
        if name in COPIES:
            copies = augmented(fitted, COPIES[name])
            fitted, labels = np.concatenate([fitted, copies.images]), np.concatenate([labels, labels[copies.index]])
            beside = {"shifted": np.arange(len(labels)) >= N_FIT}
        signals = read(model, calibrator.taps, fitted)
        if calibrator.fit_needs:
            beside = {"inputs": fitted, "model": model}
        begun = time.perf_counter()
        calibrator.fit(y=labels, **signals, **beside)
        seconds = time.perf_counter() - begun
        p = run(session_of(fuse(model, calibrator).to_bytes()), x[N_FIT:], "probabilities")
        yield [name, *scored(p.astype(np.float64), y[N_FIT:]), f"{seconds:.2g}", *calibrator.notes]


def scored(p: Array, y: Array) -> list[str]:
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=1).mean()
    percent = [
        metrics.accuracy(p, y),
        metrics.expected_calibration_error(p, y, n_bins=15),
        metrics.adaptive_calibration_error(p, y, n_bins=15),
        metrics.classwise_calibration_error(p, y, n_bins=15),
    ]
    return [f"{metrics.log_loss(p, y):.4f}", f"{entropy:.3f}", *(f"{100 * value:.2f}" for value in percent)]


def cost(model: bytes) -> Iterator[list[str]]:
    """What a run takes, as a multiple of the model's own, by rows in it; each with its parameters fed."""
    clamped = calibrators.create("neural_clamping").set_tensors(
        {"temperature": np.asarray(2.0), "delta": np.full((3, 32, 32), 0.01), "n_classes": np.asarray(N_CLASSES)}
    )
    plain = calibrators.create("neural_clamping").set_tensors(
        {"temperature": np.asarray(2.0), "delta": np.asarray(0.0), "n_classes": np.asarray(N_CLASSES)}
    )
    sessions = {"the model alone": (session_of(model), {})}
    for name, calibrator in (("no delta kept", plain), ("a delta kept", clamped)):
        fused = fuse(model, calibrator)
        sessions[name] = (session_of(fused.to_bytes()), fused.parameters)
    columns = []
    for rows in BATCHES:
        x = np.random.default_rng(0).random((rows, 3, 32, 32), np.float32)
        works = {
            name: lambda session=session, feeds={"image": x, **fed}: session.run(None, feeds)
            for name, (session, fed) in sessions.items()
        }
        columns.append(microseconds(works, rounds=7))
    for name in sessions:
        yield [name, *(f"{times[name] / times['the model alone']:.2f}" for times in columns)]


def show(heading: str, titles: list[str], rows: Iterator[list[str]]) -> None:
    print(f"\n{heading}\n")
    for row in chain([titles], rows):
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--shifts", default=",".join(SHIFTS))
    parser.add_argument("--methods", choices=METHODS, action="append")
    arguments = parser.parse_args()
    x, y = images(arguments.shared_data)
    titles = ["method", "log loss", "entropy", "accuracy", "ECE", "adaptive", "class-wise", "seconds", "delta"]
    for name in arguments.only or MODELS:
        model = (arguments.shared_data / "cifar10" / f"{name}_cifar10.onnx").read_bytes()
        for shift in arguments.shifts.split(","):
            moved = SHIFTS[shift](x).astype(np.float32)
            show(f"{name}, images {shift}", titles, measured(model, moved, y, arguments.methods or [*METHODS]))
    columns = ["", *(f"{rows} rows" for rows in BATCHES)]
    show(f"{name}: a run, in runs of the model alone", columns, cost(model))


if __name__ == "__main__":
    main()
