"""A job on labelled rows, as a folder: what the server writes, the worker reads, and back.

    job.json        what to do (JobSpec)
    logits.f32      float32, row-major, n_samples x n_classes
    labels.i64      int64
    weights.f64     float64
    result.json     what came of it, written last
    artifact, golden    the fitted calibrator, and rows to check it by (fits only)

The folder is durable before the job is acknowledged, so a job outlives a crash of the server.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from service.store.files import sync_folder, write_whole

LOGITS, LABELS, WEIGHTS = "logits.f32", "labels.i64", "weights.f64"
RESULT, ARTIFACT, GOLDEN = "result.json", "artifact", "golden"

AUTO = "auto"
"""The kind that compares the others and takes the best."""


@dataclass(frozen=True)
class JobSpec:
    """`action` fit: make and score a calibrator of `kind`. evaluate: score the artifact in the folder."""

    action: str
    model: str
    model_digest: str
    n_classes: int
    kind: str
    params_json: str
    held_out_fraction: float
    seed: int

    def write(self, folder: Path) -> None:
        write_whole(folder / "job.json", json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / "job.json").read_text()))


class RowWriter:
    """Appends labelled rows to a job's folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in (LOGITS, LABELS, WEIGHTS)}
        self.row_count = 0
        self.byte_count = 0

    def append(self, logits: NDArray[Any], labels: NDArray[Any], weights: NDArray[Any]) -> None:
        arrays = {
            LOGITS: logits.astype("<f4", copy=False),
            LABELS: labels.astype("<i8", copy=False),
            WEIGHTS: weights.astype("<f8", copy=False),
        }
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
    """Labelled rows, mapped from the folder's files."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def read(cls, folder: Path, n_classes: int) -> Self:
        logits = np.memmap(folder / LOGITS, dtype="<f4", mode="r").reshape(-1, n_classes)
        labels = np.fromfile(folder / LABELS, dtype="<i8")
        weights = np.fromfile(folder / WEIGHTS, dtype="<f8")
        return cls(logits, labels, weights)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Rows:
        return Rows(self.logits[index], self.labels[index], self.weights[index])
