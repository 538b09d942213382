"""First step: get a real model, and labelled inputs of a kind that it was not trained on.

python -m examples.step1_prepare

The model is magika (https://github.com/google/magika, Apache-2.0), which names the format of a file from its bytes. The
inputs are fragments of files that lie on this machine (`fragments.py`). Writes, under the folder given:

    models/magika/1/model.onnx     a model repository in Triton's layout
    models/magika/labels.txt       class names, one a line, in the model's order
    models/magika/calserve.toml    what calserve should know besides
    fragments.npz                  inputs, labels, class_names, is_test
    magika-1.0.3.whl               where the model came from, kept so that another run needs no network
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from examples.fragments import Fragments, extension_classes, gather, paths_by_class, walk
from service.store.files import write_whole

REQUIREMENT = "magika==1.0.3"
PLATFORM = "manylinux_2_28_x86_64"  # for any machine: the wheel is only unpacked, and all platforms' hold one model
WHEEL_NAME = "magika-1.0.3.whl"
MODEL_SHA256 = "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"
MODEL_FILE = "magika/models/standard_v3_3/model.onnx"
CONFIG_FILE = "magika/models/standard_v3_3/config.min.json"
KNOWLEDGE_FILE = "magika/config/content_types_kb.min.json"

CALSERVE_TOML = """\
# Class names for tables and reports, one a line in the model's order.
labels = "labels.txt"
"""

MOST_ENTRIES = 200_000
MOST_SECONDS = 10.0


@dataclass(frozen=True)
class Prepared:
    """What step 1 leaves for the next steps."""

    model_repository: Path
    model_path: Path
    inputs: NDArray[np.int32]  # (n_samples, 2048), for the model's input `bytes`
    labels: NDArray[np.int64]  # (n_samples,) class indices
    class_names: NDArray[np.str_]  # (n_classes,)
    is_test: NDArray[np.bool_]  # (n_samples,) the test half; the others are the calibration set


@dataclass(frozen=True)
class Shipped:
    """What is taken out of magika's wheel."""

    model: bytes
    class_names: list[str]
    knowledge_base: dict[str, Any]  # each content type's extensions and more


def prepare(
    out: Path, *, seed: int = 0, roots: Iterable[Path] | None = None, console: Console | None = None
) -> Prepared:
    """Get the model, gather fragments, write both under `out`.

    Parameters
    ----------
    seed : chooses the files, the places in them and the halves
    roots : folders to take files from; the system's and this Python's by default
    console : where progress is shown; standard output by default

    Raises
    ------
    RuntimeError
        if pip cannot fetch the wheel
    ValueError
        if the wheel is not the one expected, or `roots` hold too few labelled files
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    shipped = read_wheel(fetch_wheel(out, console))
    console.print(
        f"The model: magika, which reads the two ends of a file and names one of {len(shipped.class_names)} formats. "
        "It was trained on whole files.",
        highlight=False,
    )
    _write_model(out, shipped)

    console.print(
        "The inputs: fragments of 512 bytes from files of this machine, as a scanner of disks or packets meets them. "
        "The labels: what the files' extensions say.",
        highlight=False,
    )
    fragments = _gather(system_roots() if roots is None else roots, shipped, seed, console)
    console.print(_summary(fragments), highlight=False)
    _write_fragments(out, fragments, shipped.class_names)
    return load(out)


def load(out: Path) -> Prepared:
    """What an earlier `prepare` left under `out`; FileNotFoundError where it did not run."""
    folder = _model_folder(out)
    model_path, archive_path = folder / "1" / "model.onnx", _fragments_path(out)
    for path in (model_path, archive_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; run `python -m examples.step1_prepare --out {out}` first")
    with np.load(archive_path) as archive:
        return Prepared(folder.parent, model_path, **archive)


def system_roots() -> list[Path]:
    """This Python's packages and standard library, then the system's shared files."""
    places = sysconfig.get_paths()
    python = [Path(places[name]) for name in ("purelib", "platlib", "stdlib")]
    return [*python, Path("/usr/share"), Path("/usr/include"), Path("/usr/lib")]


def fetch_wheel(out: Path, console: Console) -> Path:
    """magika's wheel, from PyPI by pip unless an earlier run left it. It is not installed.

    Installing it would bring the package onnxruntime, which overwrites the files of onnxruntime-gpu.
    """
    wheel = out / WHEEL_NAME
    if not wheel.is_file():
        with (
            console.status(f"Downloading {REQUIREMENT} (16 MB) ..."),
            tempfile.TemporaryDirectory(dir=out, prefix=".download-") as folder,
        ):
            _pip_download(Path(folder), wheel)
            next(Path(folder).glob("*.whl")).rename(wheel)
    return wheel


def _pip_download(folder: Path, wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--platform", PLATFORM, "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # no word of it comes from outside
    if result.returncode != 0:
        raise RuntimeError(
            f"pip could not download {REQUIREMENT}; a wheel of that release put at {wheel} would do as well. "
            f"pip said:\n{result.stderr.strip()}"
        )


def read_wheel(wheel: Path) -> Shipped:
    """The model and its tables; ValueError if the wheel is damaged or holds another model."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            model, config, knowledge = (archive.read(name) for name in (MODEL_FILE, CONFIG_FILE, KNOWLEDGE_FILE))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not a wheel of {REQUIREMENT} ({error}); delete it and run again") from error
    digest = hashlib.sha256(model).hexdigest()
    if digest != MODEL_SHA256:
        raise ValueError(
            f"the model in {wheel} should have sha256 {MODEL_SHA256}, got {digest}; delete it and run again"
        )
    return Shipped(model, json.loads(config)["target_labels_space"], json.loads(knowledge))


def _gather(roots: Iterable[Path], shipped: Shipped, seed: int, console: Console) -> Fragments:
    entries = walk(roots, max_entries=MOST_ENTRIES, max_seconds=MOST_SECONDS)
    found = paths_by_class(
        track(entries, "Looking for files", total=None, console=console),  # how many there are is not known before
        extension_classes(shipped.knowledge_base, shipped.class_names),
    )
    return gather(track(found.items(), "Cutting fragments", console=console), seed=seed)


def _summary(fragments: Fragments) -> str:
    """The counts in a sentence; ValueError if there is nothing to fit on."""
    n_samples, n_classes = len(fragments.labels), len(np.unique(fragments.labels))
    n_test = int(fragments.is_test.sum())
    if n_classes < 2:
        raise ValueError(f"files of at least 2 formats are needed to fit on, got {n_classes} in {n_samples} fragments")
    return (
        f"{n_samples:,} fragments of {n_classes} formats: {n_samples - n_test:,} to calibrate on, "
        f"{n_test:,} to test on; no file gave to both."
    )


def _write_model(out: Path, shipped: Shipped) -> None:
    """The model last: a repository holds a model once its file is there."""
    folder = _model_folder(out)
    (folder / "1").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "labels.txt", "".join(f"{name}\n" for name in shipped.class_names).encode())
    write_whole(folder / "calserve.toml", CALSERVE_TOML.encode())
    write_whole(folder / "1" / "model.onnx", shipped.model)


def _write_fragments(out: Path, fragments: Fragments, class_names: list[str]) -> None:
    buffer = io.BytesIO()
    np.savez(  # not compressed: that takes seconds
        buffer,
        inputs=fragments.inputs,
        labels=fragments.labels,
        class_names=np.array(class_names),
        is_test=fragments.is_test,
    )
    write_whole(_fragments_path(out), buffer.getvalue())


def _model_folder(out: Path) -> Path:
    return out / "models" / "magika"


def _fragments_path(out: Path) -> Path:
    return out / "fragments.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    arguments = parser.parse_args()
    try:
        prepare(arguments.out, seed=arguments.seed)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
