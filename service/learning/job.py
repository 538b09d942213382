"""A job on labelled rows, as a folder: what the server writes, the worker reads, and back.

    job.json        what to do (JobSpec)
    logits.f32      float32, row-major, n_samples x n_classes
    views.f32       likewise, as any signal that the kind reads beside the logits: a row's shape is in job.json
    inputs.0.i64    likewise, the model's inputs in their order, of a kind that is fitted through the model
    model.onnx      and that model, its logits among its outputs
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from service.store.files import sync_folder, write_whole

LABELS, WEIGHTS, SHIFTED = "labels.i64", "weights.f64", "shifted.f64"
RESULT, ARTIFACT, GOLDEN, MODEL = "result.json", "artifact", "golden", "model.onnx"

INPUT, REFERENCE = "inputs.", "reference."
"""Before the number of one of the model's inputs, and before a signal's name: the signal of a reference row."""

AUTO = "auto"
"""The kind that compares the others and takes the best."""


@dataclass(frozen=True)
class JobSpec:
    """`action` fit: make and score a calibrator of `kind`. evaluate: score the artifact in the folder.

    `signal_shapes` names what is read beside the logits, with the shape of a row of it; `signal_types` its numpy type,
    where it is not float32. The writer of the rows knows both.
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
    signal_types: Mapping[str, str] = field(default_factory=dict)

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
    """Appends labelled rows to a job's folder: the same signals each time, a row of each of the same shape."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._forms: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.row_count = self.shifted_count = self.reference_count = 0
        self.byte_count = 0

    def expect(self, signals: Mapping[str, NDArray[Any]], *, shifted: bool = False) -> None:
        """Open the files of the first rows; ValueError if later rows have another form."""
        self._open(LABELS, WEIGHTS, *self._formed(signals))
        if shifted and SHIFTED not in self._files:
            self._open(SHIFTED)
            self._write(SHIFTED, np.zeros(self.row_count))

    def expect_reference(self, signals: Mapping[str, NDArray[Any]]) -> None:
        """The same for reference rows, whose signals have the form of the others'."""
        self._open(*(f"{REFERENCE}{file}" for file in self._formed(signals)))

    def append(
        self,
        signals: Mapping[str, NDArray[Any]],
        labels: NDArray[Any],
        weights: NDArray[Any],
        shifted: NDArray[np.bool_] | None = None,
    ) -> None:
        """Write rows that were expected."""
        arrays = {_file_of(name, _stored(signal.dtype)): signal for name, signal in signals.items()}
        arrays |= {LABELS: labels, WEIGHTS: weights}
        if SHIFTED in self._files:
            arrays[SHIFTED] = np.zeros(len(labels)) if shifted is None else shifted
            self.shifted_count += int(arrays[SHIFTED].sum())
        for file, array in arrays.items():
            self._write(file, array)
        self.row_count += len(labels)

    def append_reference(self, signals: Mapping[str, NDArray[Any]]) -> None:
        """Write reference rows that were expected."""
        for name, signal in signals.items():
            self._write(f"{REFERENCE}{_file_of(name, _stored(signal.dtype))}", signal)
        self.reference_count += len(signals["logits"])

    def _formed(self, signals: Mapping[str, NDArray[Any]]) -> list[str]:
        """The files of these signals; ValueError unless each has the form that it had before."""
        forms = {name: (signal.shape[1:], _stored(signal.dtype)) for name, signal in signals.items()}
        for name, form in forms.items():
            known = self._forms.setdefault(name, form)
            if form != known:
                raise ValueError(f"rows of {name} are {_in_words(*form)}, those before were {_in_words(*known)}")
        return [_file_of(name, dtype) for name, (_, dtype) in forms.items()]

    def _open(self, *files: str) -> None:
        for file in files:
            if file not in self._files:
                self._files[file] = (self._folder / file).open("wb")

    def _write(self, file: str, array: NDArray[Any]) -> None:
        stored = np.ascontiguousarray(array, dtype=_TYPES.get(file) or _stored(array.dtype))
        self._files[file].write(stored.data)
        self.byte_count += stored.nbytes

    def finish(self, spec: JobSpec) -> None:
        """Make the rows durable, then the spec, with their form: a folder with a spec is complete."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        forms = {name: form for name, form in self._forms.items() if name != "logits"}
        shapes = {name: shape for name, (shape, _) in forms.items()}
        types = {name: dtype.str for name, (_, dtype) in forms.items() if dtype != np.dtype("<f4")}
        replace(spec, signal_shapes=shapes, signal_types=types).write(self._folder)
        sync_folder(self._folder.parent)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@dataclass(frozen=True)
class Rows:
    """Labelled rows, mapped from the folder's files. `signals` are what a calibrator reads, the logits among them;
    `reference` are the same of rows without labels."""

    signals: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    shifted: NDArray[np.float64] | None = None
    reference: Mapping[str, NDArray[np.float32]] | None = None

    @classmethod
    def read(cls, folder: Path, spec: JobSpec) -> Self:
        labels = np.fromfile(folder / LABELS, dtype="<i8")
        weights = np.fromfile(folder / WEIGHTS, dtype="<f8")
        shifted = np.fromfile(folder / SHIFTED, dtype="<f8") if (folder / SHIFTED).exists() else None
        types = {name: np.dtype(spec.signal_types.get(name, "<f4")) for name in spec.shapes}

        def mapped(prefix: str, name: str) -> NDArray[Any]:
            file = folder / f"{prefix}{_file_of(name, types[name])}"
            return np.memmap(file, types[name], "r").reshape(-1, *spec.shapes[name])

        names = [name for name in spec.shapes if not name.startswith(INPUT)]
        there = (folder / f"{REFERENCE}{_file_of('logits', types['logits'])}").exists()
        reference = {name: mapped(REFERENCE, name) for name in names} if there else None
        return cls({name: mapped("", name) for name in spec.shapes}, labels, weights, shifted, reference)

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


def _in_words(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"{dtype.name} {list(shape)}"


_TYPES = {LABELS: np.dtype("<i8"), WEIGHTS: np.dtype("<f8"), SHIFTED: np.dtype("<f8")}


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Real numbers become float32, others stay what they are."""
    return np.dtype("<f4") if dtype.kind == "f" else dtype.newbyteorder("<")


def _file_of(signal: str, dtype: np.dtype[Any]) -> str:
    return f"{signal}.{dtype.kind}{8 * dtype.itemsize}"
