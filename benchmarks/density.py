"""What density-aware calibration gains under shift, and what it costs at home, on two real networks.

    OMP_NUM_THREADS=1 python -m benchmarks.density [--shared-data FOLDER] [--draws 3] [--untouched] [--out results.txt]

Two ResNet-20 on CIFAR-10 (JPEG copies), 1,000 ordinary calibration rows, and two distorted copies of each made by
`calibrators.augment`, which knows none of the test's corruptions. Every calibrator reads the model through `fuse`, as a
server does. Tested on 2,500 other images, clean and under four corruptions of five severities made here, and on the
recorded logits and features of the data set's own corruptions, where the calibrators read the recorded layers alone.

`--untouched`: link and ridge were explored on the sets above, so figures that no choice was made by come from five
other families of corruptions, other rows to calibrate on and other draws of the copies.

Compared with temperature scaling on the SAME rows (ordinary and distorted), and on the ordinary rows. Differences of
the mean ECE over all shifted sets with 95 percent paired bootstrap intervals over images.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.datasets import DEFAULT_FOLDER
from calibrators import Calibrator, create, fuse, inspect_model
from calibrators.augment import augmented
from calibrators.graph import FEATURES, LOGITS
from calibrators.kinds.identity import Identity
from calibrators.layers import default_layers, find_layers, named_layers
from calibrators.metrics.proper import log_losses
from calibrators.numerics import softmax

Array = NDArray[Any]

N_ORDINARY = 1000
SEVERITIES = (1, 2, 3, 4, 5)
COPIES = 2.0
BOOTSTRAP = 500
N_BINS = 15
RECORDED = {"resnet20": (["features"], (1, 2, 3, 4, 5)), "resnet20_jpeg": (["gap2", "features"], (1, 3, 5))}

CALIBRATORS: dict[str, dict[str, Any]] = {
    "anchored_hinge": {},
    "anchored_power": {"link": "anchored_power"},
    "hinge, mean of k": {"distance": "mean"},
    "hinge, layers by cross-validation": {"l1": "cross_validation"},
    "hinge, l2": {"normalise": "l2"},
    "published (linear, l2, mse)": {"link": "linear", "normalise": "l2"},
    "hinge, reference of 200 rows": {"reference_rows": 200},
    "hinge, 200 cluster centres": {"reference_rows": 200, "compression": "clusters", "k": 2},
}


def gaussian_noise(x: Array, severity: int, rng: np.random.Generator) -> Array:
    return x + rng.normal(size=x.shape) * (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]


def gaussian_blur(x: Array, severity: int, rng: np.random.Generator) -> Array:
    del rng
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    return np.asarray(ndimage.gaussian_filter(x, (0, 0, sigma, sigma)))


def contrast(x: Array, severity: int, rng: np.random.Generator) -> Array:
    del rng
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean


def brightness(x: Array, severity: int, rng: np.random.Generator) -> Array:
    del rng
    return x + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]


def jpeg(x: Array, severity: int, rng: np.random.Generator) -> Array:
    del rng
    return np.stack([_recompressed(image, (60, 40, 25, 15, 8)[severity - 1]) for image in x])


def _recompressed(image: Array, quality: int) -> Array:
    written = io.BytesIO()
    whole = np.rint(255 * np.moveaxis(image, 0, 2)).astype(np.uint8)
    Image.fromarray(whole).save(written, "JPEG", quality=quality)
    return np.moveaxis(np.asarray(Image.open(written)), 2, 0) / 255


def saturate(x: Array, severity: int, rng: np.random.Generator) -> Array:
    del rng
    grey = x.mean(axis=1, keepdims=True)
    return grey + (x - grey) * (0.4, 0.1, 2.0, 3.5, 6.0)[severity - 1]


def pixelate(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """Every so many pixels a side one colour, the mean of what stood there, mixed with the image."""
    del rng
    side, share = ((2, 0.5), (2, 0.8), (2, 1.0), (4, 0.6), (4, 0.9))[severity - 1]
    n, channels, height, width = x.shape
    blocks = x.reshape(n, channels, height // side, side, width // side, side).mean(axis=(3, 5))
    return (1 - share) * x + share * blocks.repeat(side, axis=2).repeat(side, axis=3)


def haze(x: Array, severity: int, rng: np.random.Generator) -> Array:
    """White that lies thicker here than there, smooth over the image."""
    cloud = ndimage.gaussian_filter(rng.normal(size=(len(x), 1, *x.shape[2:])), (0, 0, 6, 6))
    low, high = cloud.min(axis=(2, 3), keepdims=True), cloud.max(axis=(2, 3), keepdims=True)
    share = (0.2, 0.3, 0.4, 0.5, 0.65)[severity - 1] * (0.6 + 0.4 * (cloud - low) / (high - low))
    return (1 - share) * x + 0.95 * share


def elastic(x: Array, severity: int, rng: np.random.Generator) -> Array:
    pixels = (0.6, 0.9, 1.2, 1.6, 2.2)[severity - 1]
    by = ndimage.gaussian_filter(rng.normal(size=(len(x), 2, *x.shape[2:])), (0, 0, 2.5, 2.5))
    by *= pixels / np.sqrt(np.square(by).mean(axis=(1, 2, 3), keepdims=True))
    grid = np.stack(np.meshgrid(*map(np.arange, x.shape[2:]), indexing="ij"))
    return np.stack(
        [
            [ndimage.map_coordinates(channel, grid + moved, order=1, mode="reflect") for channel in image]
            for image, moved in zip(x, by, strict=True)
        ]
    )


Corruption: TypeAlias = Callable[[Array, int, np.random.Generator], Array]
CORRUPTIONS: tuple[Corruption, ...] = (gaussian_noise, gaussian_blur, contrast, brightness)
UNTOUCHED: tuple[Corruption, ...] = (jpeg, saturate, pixelate, haze, elastic)
OTHER_DRAWS = 100
"""The first seed of the copies in the untouched run."""


@dataclass(frozen=True)
class Signals:
    """Logits and features of the same rows."""

    logits: Array
    features: Array

    def __add__(self, other: Signals) -> Signals:
        both = zip((self.logits, self.features), (other.logits, other.features), strict=True)
        return Signals(*(np.concatenate(pair) for pair in both))


class Network:
    """A model that shows layers, by default those that a server reads; one thread."""

    def __init__(self, file: Path, tensors: list[str] | None = None) -> None:
        model = onnx.load(str(file))
        inspection = inspect_model(model)
        layers = named_layers(model, inspection, tensors) if tensors else default_layers(find_layers(model, inspection))
        self.layers, self.widths = [layer.tensor for layer in layers], [layer.width for layer in layers]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        fused = fuse(model, Identity.of(10), inspection, taps=self.layers)
        self._session = onnxruntime.InferenceSession(fused.to_bytes(), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Array) -> Signals:
        batches = np.array_split(images.astype(np.float32), max(1, len(images) // 250))
        parts = [self._session.run([LOGITS, FEATURES], {"image": batch}) for batch in batches]
        return Signals(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Problem:
    """Ordinary calibration rows, what makes distorted ones, and sets to test on: the first is clean."""

    name: str
    network: Network
    images: Array
    ordinary: Signals
    labels: Array
    test_labels: Array
    tests: dict[str, Signals]
    far: dict[str, Signals]

    def distorted(self, seed: int) -> tuple[Signals, Array]:
        copies = augmented(self.images, COPIES, seed=seed)
        return self.network(copies.images), self.labels[copies.index]


def computed(
    name: str, network: Network, images: Array, labels: Array, corruptions: Sequence[Corruption] = CORRUPTIONS
) -> Problem:
    """Corruptions made here, and inputs that are no images of the kind."""
    ordinary, unseen = images[:N_ORDINARY], images[N_ORDINARY:]
    rng = np.random.default_rng(0)
    tests = {"clean": network(unseen)}
    for corrupt in corruptions:
        for severity in SEVERITIES:
            changed = np.clip(corrupt(unseen, severity, rng), 0, 1)
            tests[f"{corrupt.__name__} {severity}"] = network(changed)
    few = unseen[:300]
    far = {
        "noise of deviation 3": network(3 * rng.normal(size=few.shape)),
        "images times 10": network(10 * few),
        "images times 1000": network(1000 * few),
        "uniform noise": network(rng.random(few.shape)),
        "one colour": network(np.ones(few.shape) * rng.random((300, 3, 1, 1))),
        "negatives": network(1 - few),
    }
    own, later = labels[:N_ORDINARY], labels[N_ORDINARY:]
    return Problem(name, network, ordinary, network(ordinary), own, later, tests, far)


def recorded(name: str, folder: Path, images: Array, labels: Array) -> Problem:
    """The data set's own corruptions, of which some layers were recorded."""
    tensors, severities = RECORDED[name]
    network = Network(folder / f"{name}_cifar10.onnx", tensors)
    with np.load(folder / f"{name}_clean.npz") as file:
        arrays = [file[key][2500:].astype(np.float32) for key in ("logits", *tensors)]
        tests = {"clean": Signals(arrays[0], np.column_stack(arrays[1:]))}
        test_labels = file["labels"][2500:].astype(np.int64)
    with np.load(folder / f"{name}_shift.npz") as file:
        for corrupt in CORRUPTIONS:
            for severity in severities:
                key = f"{corrupt.__name__}_{severity}"
                arrays = [file[f"{key}_{tensor}"].astype(np.float32) for tensor in ("logits", *tensors)]
                tests[key] = Signals(arrays[0], np.column_stack(arrays[1:]))
    ordinary, own = images[:N_ORDINARY], labels[:N_ORDINARY]
    title = f"{name}, recorded corruptions, layers {', '.join(tensors)}"
    return Problem(title, network, ordinary, network(ordinary), own, test_labels, tests, {})


def ece(confidence: Array, correct: Array, weight: Array) -> Array:
    """Expected calibration error, 15 equal bins, for each row of weights (n_resamples, n_samples)."""
    bins = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
    gaps = np.zeros((len(bins), N_BINS))
    gaps[np.arange(len(bins)), bins] = confidence - correct
    return np.abs(weight @ gaps).sum(axis=1) / weight.sum(axis=1)


@dataclass(frozen=True)
class Outcome:
    """Of each bootstrap resample of the test images, the first being all of them once."""

    shift: Array
    clean: Array
    clean_loss: Array
    each: Array
    """ECE of each shifted set on the test images as they are."""


def mean_of(outcomes: list[Outcome]) -> Outcome:
    return Outcome(*(np.mean([getattr(one, key.name) for one in outcomes], axis=0) for key in fields(Outcome)))


def outcome(problem: Problem, predict: Callable[[Signals], Array]) -> Outcome:
    labels, n = problem.test_labels, len(problem.test_labels)
    rng = np.random.default_rng(1)
    weight = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP)])
    errors = []
    for signals in problem.tests.values():
        p = predict(signals)
        errors.append(ece(p.max(axis=1), p.argmax(axis=1) == labels, weight))
    losses = log_losses(predict(next(iter(problem.tests.values()))), labels)
    each = np.array([error[0] for error in errors[1:]])
    return Outcome(np.mean(errors[1:], axis=0), errors[0], weight @ losses / n, each)


def fits(
    problem: Problem, draws: int, first_seed: int
) -> Iterator[tuple[str, int, Callable[[Signals], Array], Calibrator]]:
    for draw in range(draws):
        distorted, their_labels = problem.distorted(first_seed + draw)
        both, labels = problem.ordinary + distorted, np.concatenate([problem.labels, their_labels])
        shifted = np.arange(len(labels)) >= len(problem.labels)
        if draw == 0:
            alone = create("temperature").fit(problem.ordinary.logits, problem.labels)
            yield "temperature, ordinary rows", draw, _without_features(alone), alone
        same = create("temperature").fit(both.logits, labels)
        yield "temperature, the same rows", draw, _without_features(same), same
        for name, params in CALIBRATORS.items():
            calibrator = create("density_aware", layers=problem.network.layers, widths=problem.network.widths, **params)
            calibrator.fit(both.logits, labels, features=both.features, shifted=shifted)
            yield name, draw, _with_features(calibrator), calibrator
        calibrator = create("density_aware", layers=problem.network.layers, widths=problem.network.widths)
        calibrator.fit(problem.ordinary.logits, problem.labels, features=problem.ordinary.features)
        yield "hinge, ordinary rows alone", draw, _with_features(calibrator), calibrator


def _without_features(calibrator: Calibrator) -> Callable[[Signals], Array]:
    return lambda signals: calibrator.predict_proba(signals.logits.astype(np.float64))


def _with_features(calibrator: Calibrator) -> Callable[[Signals], Array]:
    return lambda signals: calibrator.predict_proba(signals.logits.astype(np.float32), features=signals.features)


def report(problem: Problem, draws: int, say: Callable[[str], object], first_seed: int = 0) -> None:
    found: dict[str, list[Outcome]] = {}
    far: dict[str, dict[str, float]] = {}
    for name, draw, predict, calibrator in fits(problem, draws, first_seed):
        found.setdefault(name, []).append(outcome(problem, predict))
        if draw == 0:
            far[name] = {what: float(predict(signals).max(axis=1).mean()) for what, signals in problem.far.items()}
            for note in calibrator.notes:
                say(f"  {name}: {note}")
    means = {name: mean_of(each) for name, each in found.items()}
    same, alone = means["temperature, the same rows"], means["temperature, ordinary rows"]
    say(f"\n{problem.name}: {len(problem.tests) - 1} shifted sets, mean over {draws} draws of the distorted copies")
    own = outcome(problem, lambda signals: softmax(signals.logits.astype(np.float64)))
    say(f"  the model's own: shift ECE {own.shift[0]:.4f}, clean ECE {own.clean[0]:.4f}, loss {own.clean_loss[0]:.4f}")
    say(f"  {'':34} shift ECE  against the same rows         clean ECE less ordinary TS     clean loss less it")
    for name, of in means.items():
        ratio = of.shift / same.shift - 1
        say(
            f"  {name:34} {of.shift[0]:.4f}    {_interval(100 * ratio, '+.1f')} %   "
            f"{_interval(of.clean - alone.clean, '+.4f')}   {_interval(of.clean_loss - alone.clean_loss, '+.4f')}"
        )
    families = list(dict.fromkeys(name[:-2] for name in [*problem.tests][1:]))
    say(f"  shift ECE of each family: {', '.join(families)}")
    for name, of in means.items():
        by_family = of.each.reshape(len(families), -1).mean(axis=1)
        say(f"  {name:34} {'  '.join(f'{value:.3f}' for value in by_family)}")
    if problem.far:
        say(f"  mean confidence far away: {', '.join(problem.far)}")
        for name in ("temperature, ordinary rows", *CALIBRATORS, "hinge, ordinary rows alone"):
            say(f"  {name:34} {'  '.join(f'{value:.3f}' for value in far[name].values())}")


def _interval(values: Array, form: str) -> str:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--untouched", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.shared_data / "cifar10"
    if not folder.is_dir():
        sys.exit(f"no recorded data at {folder}")
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with np.load(folder / "images_A.npz") as file:
        images = np.moveaxis(file["images"], 3, 1).astype(np.float32) / 255
        labels = file["labels"].astype(np.int64)
    for name in RECORDED:
        network = Network(folder / f"{name}_cifar10.onnx")
        if arguments.untouched:
            title = f"{name}, other corruptions, rows and draws than any choice was made by"
            # The last rows calibrate; the first, which calibrated before, are among those tested on.
            report(computed(title, network, images[::-1], labels[::-1], UNTOUCHED), arguments.draws, say, OTHER_DRAWS)
            continue
        title = f"{name}, corruptions made here, layers found by inspection"
        report(computed(title, network, images, labels), arguments.draws, say)
        report(recorded(name, folder, images, labels), arguments.draws, say)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
