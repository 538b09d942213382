"""Distorted copies of images, with their labels kept: rows that are farther from home than the ordinary ones.

A calibrator that is to know what "far" costs must have seen some (`density_aware`). Each chosen image is distorted
once, by one of `DISTORTIONS`, of a strength drawn at random. Sizes are shares of the image, values shares of the range
that all images span, so bytes, numbers in 0..1 and normalised numbers are treated alike:

    rotate         by up to 30 degrees either way, edges repeated
    roll           by up to a quarter of the height and of the width, what leaves coming in again
    gamma          v^g, log g uniform within ±0.9
    salt_pepper    1 to 8 percent of the pixels at the ends of the range
    cutout         a square of 0.2 to 0.45 of the side, set to the image's mean
    motion         the mean of 2 to 5 copies, each a 32nd of the side further along one axis

Neither noise, nor blur in all directions, nor contrast or brightness is among them: those are what calibrators are
commonly tested by, and a test on what was trained on says little. Labels stay, so for images whose class a rotation
changes (6 and 9) name others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from calibrators.numerics import Array, to_numpy

CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Augmented:
    """Copies, and what was done.

    Attributes
    ----------
    images : (n_copies, ...) in the form and the type of the originals
    index : (n_copies,) which original each is of: its label is `labels[index]`
    names : (n_copies,) the distortion of each
    """

    images: Array
    index: Array
    names: list[str]

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(self.names).items()))
        return f"{len(self.index)} distorted copies of images: {counts}"


def augmented(images: ArrayLike, share: float = 1.0, *, distortions: Sequence[str] = (), seed: int = 0) -> Augmented:
    """Distorted copies of a share of the images.

    Parameters
    ----------
    images : (n_samples, C, H, W) or (n_samples, H, W, C) with 1, 3 or 4 channels, real
    share : copies for each image, above 0; up to 1 no image is taken twice
    distortions : names of `DISTORTIONS`, all by default

    Examples
    --------
    >>> copies = augmented(np.random.default_rng(0).random((10, 3, 8, 8)), 0.5, distortions=["roll"])
    >>> copies.images.shape, len(set(copies.index.tolist())), str(copies)
    ((5, 3, 8, 8), 5, '5 distorted copies of images: roll 5')
    """
    array, names = to_numpy(images), list(distortions) or [*DISTORTIONS]
    axis = _channel_axis(array)
    if unknown := sorted(set(names) - DISTORTIONS.keys()):
        raise ValueError(f"distortions are {', '.join(DISTORTIONS)}, got {', '.join(unknown)}")
    if not 0 < share < np.inf:
        raise ValueError(f"share must be a positive number, got {share}")
    rng = np.random.default_rng(seed)
    index = _drawn(len(array), max(1, round(share * len(array))), rng)
    low, high = float(array.min()), float(array.max())
    span = high - low or 1.0
    chosen = [names[i] for i in rng.integers(len(names), size=len(index))]
    copies = np.empty((len(index), *array.shape[1:]), array.dtype)
    for i, (row, name) in enumerate(zip(index, chosen, strict=True)):
        unit = (np.moveaxis(array[row], axis - 1, 0).astype(np.float64) - low) / span
        copy = low + span * np.clip(DISTORTIONS[name](unit, rng), 0, 1)
        copy = np.rint(copy) if array.dtype.kind in "iu" else copy
        copies[i] = np.moveaxis(copy, 0, axis - 1)
    return Augmented(copies, index, chosen)


def _drawn(n: int, count: int, rng: np.random.Generator) -> Array:
    whole, rest = divmod(count, n)
    return np.concatenate([*(np.arange(n) for _ in range(whole)), np.sort(rng.permutation(n)[:rest])])


def _channel_axis(images: Array) -> int:
    if images.dtype.kind not in "fiu":
        raise TypeError(f"images must be real numbers, got dtype {images.dtype}")
    if images.ndim == 4 and len(images):
        for axis in (1, 3):
            if images.shape[axis] in CHANNELS:
                return axis
    raise ValueError(f"images must be (n_samples, C, H, W) or (n_samples, H, W, C), C of 1, 3 or 4, got {images.shape}")


def _rotate(image: Array, rng: np.random.Generator) -> Array:
    turned: Array = ndimage.rotate(image, rng.uniform(-30, 30), axes=(1, 2), reshape=False, order=1, mode="nearest")
    return turned


def _roll(image: Array, rng: np.random.Generator) -> Array:
    height, width = image.shape[1:]
    by = [int(rng.integers(-(size // 4), size // 4 + 1)) for size in (height, width)]
    return np.roll(image, by, axis=(1, 2))


def _gamma(image: Array, rng: np.random.Generator) -> Array:
    bent: Array = image ** np.exp(rng.uniform(-0.9, 0.9))
    return bent


def _salt_pepper(image: Array, rng: np.random.Generator) -> Array:
    share, at = rng.uniform(0.01, 0.08), rng.random(image.shape[1:])
    return np.where(at < share / 2, 0.0, np.where(at > 1 - share / 2, 1.0, image))


def _cutout(image: Array, rng: np.random.Generator) -> Array:
    side = max(1, round(rng.uniform(0.2, 0.45) * min(image.shape[1:])))
    top, left = (int(rng.integers(size - side + 1)) for size in image.shape[1:])
    copy = image.copy()
    copy[:, top : top + side, left : left + side] = image.mean()
    return copy


def _motion(image: Array, rng: np.random.Generator) -> Array:
    axis, count = int(rng.integers(1, 3)), int(rng.integers(2, 6))
    step = max(1, round(image.shape[axis] / 32))
    moved: Array = np.mean([np.roll(image, i * step, axis) for i in range(count)], axis=0)
    return moved


DISTORTIONS: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "rotate": _rotate,
    "roll": _roll,
    "gamma": _gamma,
    "salt_pepper": _salt_pepper,
    "cutout": _cutout,
    "motion": _motion,
}
"""Each from an image (C, H, W) of numbers in 0..1."""
