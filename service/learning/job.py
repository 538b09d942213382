"""A job on labelled rows, as a folder: what the server writes, the worker reads, and back.

    job.json        what to do (JobSpec)
    logits.f32      float32, row-major, n_samples x n_classes
    views.f32       likewise, as any signal that the kind reads beside the logits: a row's shape is in job.json
    labels.i64      int64
    weights.f64     float64
    result.json     what came of it, written last
    artifact, golden    the fitted calibrator, and rows to check it by (fits only)

The folder is durable before the job is acknowledged, so a job outlives a crash of the server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from service.store.files import sync_folder, write_whole

LABELS, WEIGHTS = "labels.i64", "weights.f64"
RESULT, ARTIFACT, GOLDEN = "result.json", "artifact", "golden"

AUTO = "auto"
"""The kind that compares the others and takes the best."""


@dataclass(frozen=True)
class JobSpec:
    """`action` fit: make and score a calibrator of `kind`. evaluate: score the artifact in the folder.

    `signal_shapes` names what the calibrator reads beside the logits, with the shape of a row of it.
    """

    action: str
    model: str
    model_digest: str
    n_classes: int
    kind: str
    params_json: str
    held_out_fraction: float
    seed: int
    signal_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of a row of each signal, the logits among them."""
        return {"logits": (self.n_classes,), **{name: tuple(shape) for name, shape in self.signal_shapes.items()}}

    def write(self, folder: Path) -> None:
        write_whole(folder / "job.json", json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / "job.json").read_text()))


class RowWriter:
    """Appends labelled rows, of these signals, to a job's folder."""

    def __init__(self, folder: Path, signals: Iterable[str]) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        names = (*map(_file_of, signals), LABELS, WEIGHTS)
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}
        self.row_count = 0
        self.byte_count = 0

    def append(self, signals: Mapping[str, NDArray[Any]], labels: NDArray[Any], weights: NDArray[Any]) -> None:
        arrays = {_file_of(name): signal.astype("<f4", copy=False) for name, signal in signals.items()}
        arrays |= {LABELS: labels.astype("<i8", copy=False), WEIGHTS: weights.astype("<f8", copy=False)}
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array).data)
            self.byte_count += array.nbytes
        self.row_count += len(labels)

    def finish(self, spec: JobSpec) -> None:
        """Make the rows durable, then the spec: a folder with a spec is complete."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        spec.write(self._folder)
        sync_folder(self._folder.parent)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@dataclass(frozen=True)
class Rows:
    """Labelled rows, mapped from the folder's files. `signals` are what a calibrator reads, the logits among them."""

    signals: Mapping[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def read(cls, folder: Path, shapes: Mapping[str, Sequence[int]]) -> Self:
        labels = np.fromfile(folder / LABELS, dtype="<i8")
        weights = np.fromfile(folder / WEIGHTS, dtype="<f8")
        return cls({name: _mapped(folder / _file_of(name), shape) for name, shape in shapes.items()}, labels, weights)

    @property
    def logits(self) -> NDArray[np.float32]:
        return self.signals["logits"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Rows:
        signals = {name: signal[index] for name, signal in self.signals.items()}
        return Rows(signals, self.labels[index], self.weights[index])


def _file_of(signal: str) -> str:
    return f"{signal}.f32"


def _mapped(file: Path, shape: Sequence[int]) -> NDArray[np.float32]:
    return np.memmap(file, dtype="<f4", mode="r").reshape(-1, *shape)
