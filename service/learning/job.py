"""A job on labelled rows, as a folder: what the server writes, the worker reads, and back.

    job.json        what to do (JobSpec)
    logits.f32      float32, row-major, n_samples x n_classes
    views.f32       likewise, as any signal that the kind reads beside the logits: a row's shape is in job.json
    labels.i64      int64
    weights.f64     float64
    shifted.f64     likewise, 1 where a row is shifted; only where the caller said so of some
    reference.logits.f32, reference.views.f32 ...   the same signals of rows without labels; only where there are any
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

LABELS, WEIGHTS, SHIFTED = "labels.i64", "weights.f64", "shifted.f64"
REFERENCE = "reference."
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
        self._files: dict[str, BinaryIO] = {}
        for name in (*map(_file_of, signals), LABELS, WEIGHTS):
            self._file(name)
        self.row_count = self.shifted_count = self.reference_count = 0
        self.byte_count = 0

    def append(
        self,
        signals: Mapping[str, NDArray[Any]],
        labels: NDArray[Any],
        weights: NDArray[Any],
        shifted: NDArray[np.bool_] | None = None,
    ) -> None:
        arrays = {_file_of(name): signal.astype("<f4", copy=False) for name, signal in signals.items()}
        arrays |= {LABELS: labels.astype("<i8", copy=False), WEIGHTS: weights.astype("<f8", copy=False)}
        if shifted is not None and SHIFTED not in self._files:
            self._write(SHIFTED, np.zeros(self.row_count, "<f8"))
        if SHIFTED in self._files:
            arrays[SHIFTED] = np.zeros(len(labels), "<f8") if shifted is None else shifted.astype("<f8")
            self.shifted_count += int(arrays[SHIFTED].sum())
        for name, array in arrays.items():
            self._write(name, array)
        self.row_count += len(labels)

    def append_reference(self, signals: Mapping[str, NDArray[Any]]) -> None:
        for name, signal in signals.items():
            self._write(f"{REFERENCE}{_file_of(name)}", signal.astype("<f4", copy=False))
        self.reference_count += len(signals["logits"])

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._file(name).write(np.ascontiguousarray(array).data)
        self.byte_count += array.nbytes

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
        return self._files[name]

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
    """Labelled rows, mapped from the folder's files. `signals` are what a calibrator reads, the logits among them;
    `reference` are the same of rows without labels."""

    signals: Mapping[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    shifted: NDArray[np.float64] | None = None
    reference: Mapping[str, NDArray[np.float32]] | None = None

    @classmethod
    def read(cls, folder: Path, shapes: Mapping[str, Sequence[int]]) -> Self:
        labels = np.fromfile(folder / LABELS, dtype="<i8")
        weights = np.fromfile(folder / WEIGHTS, dtype="<f8")
        shifted = np.fromfile(folder / SHIFTED, dtype="<f8") if (folder / SHIFTED).exists() else None
        reference = None
        if (folder / f"{REFERENCE}{_file_of('logits')}").exists():
            reference = {name: _mapped(folder / f"{REFERENCE}{_file_of(name)}", shapes[name]) for name in shapes}
        signals = {name: _mapped(folder / _file_of(name), shape) for name, shape in shapes.items()}
        return cls(signals, labels, weights, shifted, reference)

    @property
    def logits(self) -> NDArray[np.float32]:
        return self.signals["logits"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Rows:
        signals = {name: signal[index] for name, signal in self.signals.items()}
        shifted = None if self.shifted is None else self.shifted[index]
        return Rows(signals, self.labels[index], self.weights[index], shifted, self.reference)

    def and_(self, more: Rows) -> Rows:
        """These rows, then more of the same signals."""
        both = {name: np.concatenate([signal, more.signals[name]]) for name, signal in self.signals.items()}
        labels, weights = (np.concatenate([getattr(self, n), getattr(more, n)]) for n in ("labels", "weights"))
        moved = [np.zeros(len(rows)) if rows.shifted is None else rows.shifted for rows in (self, more)]
        return Rows(both, labels, weights, np.concatenate(moved), self.reference)

    @property
    def beside(self) -> dict[str, Any]:
        """What `Calibrator.fit` takes besides the logits and the labels."""
        return {"sample_weight": self.weights, "shifted": self.shifted, "reference": self.reference}


def _file_of(signal: str) -> str:
    return f"{signal}.f32"


def _mapped(file: Path, shape: Sequence[int]) -> NDArray[np.float32]:
    return np.memmap(file, dtype="<f4", mode="r").reshape(-1, *shape)
