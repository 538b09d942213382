"""The logits that benchmarks run on: real models, real labels, split into calibration and test rows.

They lie in a folder of their own (`--shared-data`, default ../shared/data beside the checkout) and are not part of the
project; a set that is not there is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEFAULT_FOLDER = Path(__file__).parents[2] / "shared" / "data"
Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class DataSet:
    """Logits (or logarithms of probabilities) and labels."""

    name: str
    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    test_logits: NDArray[np.float64]
    test_labels: NDArray[np.int64]
    time_ordered: bool = False

    @property
    def n_classes(self) -> int:
        return int(self.logits.shape[1])


def _halves(name: str, logits: NDArray[np.generic], labels: NDArray[np.generic], n: int) -> DataSet:
    z, y = logits.astype(np.float64), labels.astype(np.int64)
    return DataSet(name, z[:n], y[:n], z[n:], y[n:])


def _log(probabilities: NDArray[np.generic]) -> NDArray[np.float64]:
    p = probabilities.astype(np.float64)
    return np.log(np.maximum(p, np.finfo(np.float32).tiny))


def _chosen(name: str, data: Arrays) -> DataSet:
    z, y, cal, test = _log(data["probs"]), data["y"].astype(np.int64), data["cal"], data["test"]
    return DataSet(name, z[cal], y[cal], z[test], y[test])


def _stream(name: str, data: Arrays, n: int) -> DataSet:
    start = int(data["n_train"])
    rows = _halves(name, _log(data["probs"])[start : start + 2 * n], data["y"][start : start + 2 * n], n)
    return replace(rows, time_ordered=True)


def _in_order(seed: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(n)


def _fragments(name: str, data: Arrays, size: int) -> DataSet:
    order = _in_order(0, len(data["labels"]))
    return _halves(name, data[f"frag{size}_logits"][order], data["labels"][order], len(order) // 2)


def _vgg(name: str, data: Arrays) -> DataSet:
    return _halves(name, _log(data["probs"]), data["labels"], 1000)


def _agnews(name: str, data: Arrays) -> DataSet:
    arrays = (data[key] for key in ("cal_logits", "cal_labels", "test_logits", "test_labels"))
    z, y, test_z, test_y = arrays
    return DataSet(name, z.astype(np.float64), y.astype(np.int64), test_z.astype(np.float64), test_y.astype(np.int64))


SETS: dict[str, tuple[str, Callable[[str, Arrays], DataSet]]] = {
    "mammography (K=2)": ("tabular/mammography.npz", _chosen),
    "phoneme (K=2)": ("tabular/phoneme.npz", _chosen),
    "elec2, first weeks (K=2)": ("streams/elec2.npz", lambda name, data: _stream(name, data, 2000)),
    "phishing (K=2)": ("streams/phishing.npz", lambda name, data: _stream(name, data, 2000)),
    "AG News (K=4)": ("text/agnews_mlp.npz", _agnews),
    "CIFAR-10 ResNet-20, JPEG (K=10)": (
        "cifar10/resnet20_clean.npz",
        lambda name, data: _halves(name, data["logits"], data["labels"], 2500),
    ),
    "CIFAR-10 ResNet-20, tuned (K=10)": (
        "cifar10/resnet20_jpeg_clean.npz",
        lambda name, data: _halves(name, data["logits"], data["labels"], 2500),
    ),
    "CIFAR-10 VGG-16 (K=10)": ("cifar10/vgg16_verified_calibration_dev.npz", _vgg),
    "Tiny-ImageNet, closed (K=100)": (
        "imagenet/effnet_lite0_tiny_k100_dev.npz",
        lambda name, data: _halves(name, data["logits"], data["labels"], int(data["n_cal"])),
    ),
    "magika, whole files (K=214)": (
        "magika/magika_whole.npz",
        lambda name, data: _halves(name, data["logits"], data["labels"], int(data["n_cal"])),
    ),
    "magika, fragments of 512 (K=214)": (
        "magika/magika_fragments.npz",
        lambda name, data: _fragments(name, data, 512),
    ),
    "Tiny-ImageNet (K=1000)": (
        "imagenet/effnet_lite0_tiny_k1000_dev.npz",
        lambda name, data: _halves(name, data["logits"], data["labels"], int(data["n_cal"])),
    ),
}


def load(folder: Path, only: str = "") -> Iterator[DataSet]:
    """The sets whose name contains `only`, smallest number of classes first."""
    resnet50 = folder / "cifar10_resnet50_ce"
    for name, (file, read) in SETS.items():
        if only.lower() in name.lower() and (folder / file).is_file():
            with np.load(folder / file, allow_pickle=False) as archive:
                yield read(name, dict(archive))
    name = "CIFAR-10 ResNet-50 (K=10)"
    if only.lower() in name.lower() and resnet50.is_dir():
        val, test = (np.load(resnet50 / f"{part}.npz") for part in ("val", "test"))
        yield DataSet(
            name,
            val["logits"].astype(np.float64),
            val["labels"].astype(np.int64),
            test["logits"].astype(np.float64),
            test["labels"].astype(np.int64),
        )
